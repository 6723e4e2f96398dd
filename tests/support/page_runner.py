"""Runs the code blocks of a documentation page, from top to bottom, in one folder and in this process.

bash expands each line as a user's shell does (globs, quotes, variables, loops), with functions in the place of the
programs: they print their words, which this module then runs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest
from hub_server import Hub
from markdown_it import MarkdownIt

from cli.console import run
from cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("md2", "torchrun", "hf", "curl", "unzip", "pip", "make")
"""Those of the pages; `Runner` has a method for each that is run."""
_STUBS = "".join(f"{name}() {{ printf '%s\\0' {name} \"$@\"; echo; }}\n" for name in PROGRAMS)


@dataclass(frozen=True)
class Chunk:
    """Lines of a code block up to a blank line, or a whole snippet or script.

    Attributes:
        kind: `shell` (command lines), `script`, `python`, or `text` for whatever is none of them.
    """

    kind: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The command lines, each joined from its continuations."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]


def chunks(page: Path) -> Iterator[Chunk]:
    for token in MarkdownIt().enable("table").parse(page.read_text()):
        if token.type not in ("fence", "code_block") or token.info == "mermaid":
            continue
        if token.content.startswith("#!/bin/bash"):
            yield Chunk("script", token.content)
        elif re.match(r"(import|from) \w", token.content):
            yield Chunk("python", token.content)
        else:
            for text in re.split(r"\n\s*\n", token.content.strip("\n")):
                command = re.match(rf"(?:{'|'.join(PROGRAMS)}|for) ", text)
                yield Chunk("shell" if command else "text", text)


@dataclass
class Runner:
    """Does what a page's commands say.

    Attributes:
        folder: where they run.
        hub: receives what `hf upload` sends.
        internet: folder of the files that `curl` finds.
        replaced: what stands for the page's own words.
        added: the words to add to those of a command.
        names: the variables of the page's last snippet in Python.
    """

    folder: Path
    hub: Hub
    internet: Path
    replaced: Sequence[tuple[str, str]]
    added: Callable[[list[str]], list[str]]
    patch: pytest.MonkeyPatch
    names: dict[str, Any] = field(default_factory=dict)

    def python(self, text: str) -> None:
        self.names = {}
        exec(compile(self.local(text), "snippet", "exec"), self.names)

    def shell(self, text: str) -> None:
        """Run a line, or a script."""
        found = subprocess.run(
            ["bash", "-uec", _STUBS + self.local(text)],
            cwd=self.folder,
            capture_output=True,
            timeout=20,
            check=False,
        )
        assert found.returncode == 0, f"{text}: {found.stderr.decode()}"
        lines = [line.decode().split("\0")[:-1] for line in found.stdout.splitlines()]
        assert lines, f"{text}: runs nothing"
        for name, *words in lines:
            code = getattr(self, name)(words)
            assert not code, f"{name} {' '.join(words)}: exit code {code}"

    def local(self, text: str) -> str:
        for there, here in self.replaced:
            text = text.replace(there, here)
        return text

    def md2(self, words: list[str]) -> int:
        return run(app, words + self.added(words))

    def torchrun(self, words: list[str]) -> int:
        """What each process would run, as one rank."""
        from torch.distributed.run import get_args_parser

        import md2.train

        options = get_args_parser().parse_args(words)
        inner = list(options.training_script_args)
        if options.no_python:
            assert options.training_script == "md2"
            return self.md2(inner)
        assert options.module and options.training_script == "md2.train"
        return md2.train.main(inner + self.added(["train", *inner]))

    def hf(self, words: list[str]) -> int:
        """The Hub's own command line, up to the network."""
        if words == ["auth", "login"]:
            self.patch.setenv("HF_TOKEN", self.hub.token)
            return 0
        from huggingface_hub import HfApi
        from huggingface_hub.cli.hf import app as command

        def upload_folder(api: HfApi, *, repo_id: str, folder_path: str, repo_type: str, **options: Any) -> str:
            place = self.internet / repo_id.replace("/", "-")
            shutil.copytree(folder_path, place)
            self.hub.repositories[f"datasets/{repo_id}" if repo_type == "dataset" else repo_id] = place
            return repo_id

        def create_repo(api: HfApi, repo_id: str, *, repo_type: str, private: bool, **options: Any) -> str:
            if private:
                self.hub.private.add(f"datasets/{repo_id}" if repo_type == "dataset" else repo_id)
            return type("Repo", (), {"repo_id": repo_id})()

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(click.exceptions.Exit):
            patch.setattr(HfApi, "upload_folder", upload_folder)
            patch.setattr(HfApi, "create_repo", create_repo)
            command(words, standalone_mode=False)
        return 0

    def curl(self, words: list[str]) -> int:
        (options, address) = words
        assert options == "-LO", "follow the redirect, keep the name"
        shutil.copy(self.internet / address.removeprefix("https://"), self.folder / Path(address).name)
        return 0

    def unzip(self, words: list[str]) -> int:
        (archive, option, folder) = words
        assert option == "-d"
        with zipfile.ZipFile(self.folder / archive) as file:
            file.extractall(self.folder / folder)
        return 0


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
