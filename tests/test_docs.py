"""The pages say what is true: links and paths exist, commands parse, keys and recipes are known, imports resolve."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from markdown_it import MarkdownIt
from pydantic import BaseModel
from typer.main import get_command

from cli.bench import WHAT
from cli.main import app
from md2.config import Config, recipes

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/RESULTS.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FOLDERS = "prep|shards|md2|cli|bench|tests|docs|scripts|examples"
PATH = re.compile(rf"(?<![\w./~:=-])(?:{FOLDERS})/[\w./-]*?(?:\.(?:py|md|yaml|png)\b|/(?![\w.{{*]))")
MARKDOWN = MarkdownIt().enable("table")


def tokens(page: Path) -> Iterator[Any]:
    for token in MARKDOWN.parse(page.read_text()):
        yield token
        yield from token.children or ()


def code(page: Path) -> list[str]:
    """Code blocks and code spans."""
    found = [token for token in tokens(page) if token.type in ("fence", "code_block", "code_inline")]
    return [token.content for token in found if token.info != "mermaid"]


def anchors(page: Path) -> set[str]:
    """Headings as GitHub turns them into anchors."""
    found = set()
    for line in page.read_text().splitlines():
        if line.startswith("#"):
            words = re.sub(r"[^\w\- ]", "", line.lstrip("# ").replace("`", "").lower())
            found.add(words.strip().replace(" ", "-"))
    return found


def commands(text: str) -> list[list[str]]:
    """The md2 command lines in a piece of code, without comments; alternatives (`ls|show`) one by one."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        start = re.match(r"\s*(?:\$ )?(?:torchrun .*--no-python )?md2(?= |$)(.*)", line)
        if start is None:
            continue
        # Brackets mark what may be left out, except those of a list: key=[0.7,1].
        words = re.sub(r"(=\[[^\]]*\])|[\[\]…]", lambda found: found[1] or " ", start[1].replace("\\|", "|"))
        words = re.split(r"\s#|;|&&|:\s|\s\|\s", words)[0].rstrip(":,.")
        choices = [[word] if word.isupper() else word.split("|") for word in shlex.split(words)]
        found += [list(choice) for choice in product(*choices)]
    return found


def literals(annotation: Any) -> set[str]:
    """The words that an option's type lists; none if it takes any."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return {word for part in get_args(annotation) for word in literals(part)}


def parse(words: list[str]) -> None:
    """Parse a command line as `md2` does, and run nothing.

    Raises:
        AssertionError: an unknown command, recipe or key, a word too many, a value that is no choice.
        typer's usage errors: an unknown option, an option without its value.
    """
    command, context = get_command(app), None
    while hasattr(command, "commands"):
        context = command.context_class(command, info_name="md2", parent=context)
        words = command.make_parser(context).parse_args(list(words))[1]
        if not words or words[0].isupper():
            return
        assert words[0] in command.commands, f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    context = command.context_class(command, info_name="md2", parent=context)
    if command.name == "bench":
        assert not words or words[0].startswith("--") or words[0].isupper() or words[0] in WHAT, f"no bench {words[0]}"
        return
    words = [f"{word}=public" if word == "--download" else word for word in words]
    values, rest, _ = command.make_parser(context).parse_args(list(words))
    assert not rest, f"{rest}: words too many"
    for parameter in command.params:
        choices = literals(parameter.type_descriptor.annotation)
        value = values.get(parameter.name)
        for word in value if isinstance(value, (list, tuple)) else [value]:
            if choices and isinstance(word, str) and word.islower():
                assert word in choices, f"{word}: not of {choices}"
    if command.name == "train":
        check_training(values.get("config"), values.get("overrides") or ())
    if command.name == "zoo" and (values.get("name") or "X").islower():
        assert values["name"] in recipes()


def check_training(recipe: Any, overrides: Any) -> None:
    for word in [recipe, *overrides]:
        if not isinstance(word, str) or word.isupper() or word.endswith(".yaml"):
            continue
        if "=" not in word:
            assert word in recipes(), f"no recipe {word}"
            continue
        check_key(word.split("=")[0])


def check_key(key: str) -> None:
    if key == "key.sub":
        return
    model: Any = Config
    for name in key.split("."):
        assert isinstance(model, type) and issubclass(model, BaseModel), f"{key}: no such key"
        assert name in model.model_fields, f"{key}: no such key"
        model = model.model_fields[name].annotation


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for token in tokens(page):
        target = token.attrGet("href") or token.attrGet("src")
        if target is None or str(target).startswith(("http://", "https://")):
            continue
        place, _, anchor = str(target).partition("#")
        file = (page.parent / place).resolve() if place else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_is_one(page: Path) -> None:
    """A wrong line of dashes leaves the rows as text."""
    for token in MARKDOWN.parse(page.read_text()):
        assert token.type != "inline" or not re.search(r"^\|.*\|$", token.content, re.MULTILINE), token.content[:80]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_of_the_repository_exists(page: Path) -> None:
    """In code and in drawings: `md2/loss.py`, `prep/raw/`."""
    drawings = [token.content for token in tokens(page) if token.info == "mermaid"]
    for text in [*code(page), *drawings]:
        for path in PATH.findall(text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page: Path) -> None:
    for text in code(page):
        for words in commands(text):
            try:
                parse(words)
            except Exception as error:
                pytest.fail(f"{page.name}: md2 {shlex.join(words)}: {error or type(error).__name__}")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_key_is_known(page: Path) -> None:
    """The changelog may name keys that are gone."""
    for text in code(page):
        for key in re.findall(r"(?<![\w./-])(?:data|model|loss|train)\.[a-z]\w*(?=$|=[^=]|\s|:)", text):
            if not key.endswith(".py") and "import " not in text:
                check_key(key)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_targets_that_commands_name_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for text in code(page):
        for module in re.findall(rf"-m ((?:{FOLDERS})(?:\.\w+)*)", text):
            assert (ROOT / (module.replace(".", "/") + ".py")).exists(), f"{page.name}: -m {module}"
        for target in re.findall(r"(?:^|&& )make ([a-z]+)", text, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_import_in_an_example_resolves(page: Path) -> None:
    for text in code(page):
        if not re.search(r"^(from|import) ", text, re.MULTILINE):
            continue
        tree = ast.parse(text.replace(": ...", ": pass"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page.name}: {node.module}.{alias.name}"


@pytest.mark.parametrize(
    "line",
    [
        "prep --splits eigen_zhou --row x",
        "trian mono",
        "train momo",
        "train mono train.epoch=3",
        "shards list x",
        "report RUN MORE",
        "export RUN --to onxx",
        "bench loaders",
        "zoo nothing",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    (words,) = commands(f"md2 {line}")
    with pytest.raises(Exception, match=r".+"):
        parse(words)


def test_commands_are_found_in_blocks_and_spans() -> None:
    assert commands("md2 train mono data.url=x   # a comment") == [["train", "mono", "data.url=x"]]
    assert commands("md2 shards ls\\|show URL") == [["shards", "ls", "URL"], ["shards", "show", "URL"]]
    assert commands("    $ md2 eval RUN DATASET [--json FILE] …") == [["eval", "RUN", "DATASET", "--json", "FILE"]]
    assert commands("the md2 command") == []
