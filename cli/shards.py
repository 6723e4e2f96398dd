"""`md2 shards ls|latest|show|diff|verify|pull|push|copy|rm|clean|cache`: datasets in folders and object storage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from cli.console import counted, errors, local_paths, say
from shards.errors import INCOMPLETE, DatasetError, StorageError, UsageError, visible

if TYPE_CHECKING:
    from collections.abc import Callable

    from shards.manifest import Manifest
    from shards.transfer import Copied

app = typer.Typer(help="List, check, copy and remove packed datasets.", no_args_is_help=True, rich_markup_mode=None)

Url = Annotated[str, typer.Argument(metavar="URL", help="Folder, s3://, gs://, hf:// or http(s)://.")]
Writable = Annotated[str, typer.Argument(metavar="URL", help="Folder, s3:// or gs://.")]
Parts = Annotated[
    list[str] | None, typer.Option("--part", metavar="PART", help="Copy only this part; repeatable. (default: all)")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.command("ls")
def list_datasets(url: Url) -> None:
    """List the datasets at URL and below it."""
    from shards.manage import find_datasets

    nothing = True
    for found in find_datasets(url):
        say(f"{found.url}  {_summary(found.manifest) if found.manifest else found.note}")
        nothing = False
    if nothing:
        raise DatasetError(f"{url}: no datasets there")


@app.command()
def latest(url: Url) -> None:
    """Print the URL of a dataset's newest version: NAME, NAME-v2, ….

    For commands: md2 train mono data.url=$(md2 shards latest URL).
    """
    from shards.manage import newest_version

    print(newest_version(url))


@app.command()
@local_paths
def show(
    url: Url,
    part: Annotated[
        str | None,
        typer.Option(metavar="PART", help="Part to take samples from. (default: train, else val, else test)"),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, max=100, help="Rows of the contact sheet.")] = 6,
    sheet: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File of the contact sheet. (default: ./NAME.png, NAME being the dataset's)"),
    ] = None,
    no_sheet: Annotated[bool, typer.Option("--no-sheet", help="Print only.")] = False,
) -> None:
    """Describe a dataset, and draw a contact sheet of some samples.

    Its columns are target, source frames, stereo partner and depth.
    """
    from shards.contact_sheet import contact_sheet, read_some
    from shards.files import disk_error, write_atomic
    from shards.publish import require_manifest
    from shards.storage import open_storage

    if no_sheet:
        _describe(require_manifest(open_storage(url)).manifest)
        return
    manifest, chosen = read_some(url, part, samples)
    _describe(manifest)
    path = sheet or _sheet_path(url)
    try:
        write_atomic(path, contact_sheet(manifest, chosen))
    except OSError as error:
        raise StorageError(f"{disk_error(path, error)} (--sheet FILE names another place)") from error
    say(f"contact sheet  {path}")


def _sheet_path(url: str) -> Path:
    """Return a name from the URL, which the user chose, and not from the dataset's content."""
    from shards.storage import is_local, local_path

    name = local_path(url).resolve().name if is_local(url) else url.rstrip("/").rpartition("/")[2]
    return Path(f"{name or 'dataset'}.png")


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A dataset.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another dataset.")],
) -> None:
    """Say what differs between two datasets.

    Content and samples are compared, and whether one trains on what the other holds out.
    """
    from shards.manage import difference

    found = difference(a, b)
    for name, (mine, other) in found.settings.items():
        say(f"{name:<16}A: {mine}")
        say(f"{'':<16}B: {other}")
    for part, (both, only_a, only_b) in found.samples.items():
        say(f"{part:<16}{both:,} samples in both, {only_a:,} in A alone, {only_b:,} in B alone")
    for leak in found.leaks:
        train, held = ("A", "B") if leak.train == a else ("B", "A")
        say(
            f"{'leak':<16}{train}'s part train uses {leak.seen:,} of {held}'s {leak.images:,} {leak.part} images "
            f"({leak.targets:,} as target frame)"
        )
    if not found.settings and not any(only_a or only_b for _, only_a, only_b in found.samples.values()):
        say("no difference in content or samples")


@app.command()
def verify(url: Url) -> None:
    """Check every byte of the datasets at URL and below it.

    Each shard's sha256, index and number of samples must be those of the manifest.
    """
    from shards.manage import datasets_at

    problems = []
    found = datasets_at(url)
    for dataset in found:
        problem = dataset.note if dataset.manifest is None else _verify(dataset.url)
        if problem:
            problems.append(f"{dataset.url}: {problem}")
            if len(found) > 1:
                say(f"broken  {problems[-1]}")
    if problems:
        raise DatasetError(problems[0] if len(found) == 1 else f"{url}: {len(problems)} of {len(found)} are broken")


def _verify(url: str) -> str:
    """Check one dataset; what is wrong with it, "" if nothing is."""
    from shards.manifest import MANIFEST
    from shards.transfer import verify as run

    began = time.monotonic()
    with _bytes_bar("checking") as progress:
        result = run(url, progress)
    for name, problem in result.broken.items():
        say(f"broken  {name}  {problem}")
    if MANIFEST in result.broken:
        return "every shard is sound, but the manifest's component list is not theirs"
    if result.broken:
        return f"{len(result.broken)} of {counted(len(result.manifest.shards), 'shard')} are broken"
    say(f"{result.url}  sound: {_summary(result.manifest)}  ({time.monotonic() - began:.1f} s)")
    return ""


@app.command()
def pull(
    url: Url,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Local folder for the dataset.")],
    part: Parts = None,
) -> None:
    """Fetch a dataset into a local folder. After an interruption, run it again: it resumes."""
    _require_local(folder, "pull fetches into a local folder; use md2 shards copy FROM TO")
    _copy(url, folder, part)


@app.command()
def push(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Local folder with a dataset.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="Where to publish it: s3://, gs:// or a folder.")],
    part: Parts = None,
) -> None:
    """Publish a local dataset. Nothing is ever overwritten. After an interruption, run it again: it resumes."""
    _require_local(folder, "push sends from a local folder; use md2 shards pull URL FOLDER, or md2 shards copy FROM TO")
    _copy(folder, url, part)


@app.command("copy")
def copy_(
    source: Annotated[str, typer.Argument(metavar="FROM", help="URL or folder of a dataset.")],
    url: Annotated[str, typer.Argument(metavar="TO", help="URL or folder to publish it at.")],
    part: Parts = None,
) -> None:
    """Copy a dataset, or all datasets below FROM, to anywhere."""
    _copy(source, url, part)


@app.command("rm")
def remove(url: Writable, yes: Yes = False) -> None:
    """Remove a dataset, after a question. Readers that have not cached it lose it."""
    from shards.manage import remove_dataset
    from shards.publish import require_manifest
    from shards.storage import open_storage

    storage = open_storage(url)
    say(f"{storage.url}  {_summary(require_manifest(storage).manifest)}")
    _ask("Remove this dataset for good?", yes)
    say(f"{storage.url}  removed: {counted(remove_dataset(url), 'file')}")


@app.command()
def clean(url: Writable, yes: Yes = False) -> None:
    """Remove what interrupted writers left below URL.

    These are unfinished publications. md2 asks before it removes them.
    """
    from shards.manage import find_unfinished, remove_unfinished

    found = find_unfinished(url)
    if not found:
        say(f"{url}  nothing unfinished there")
        return
    for leavings in found:
        say(f"{leavings.url}  unfinished: {counted(len(leavings.names), 'file')}; {leavings.who}")
    _ask("Remove all of this? A writer that is still running would fail.", yes)
    for leavings in found:
        remove_unfinished(leavings)
        say(f"{leavings.url}  removed")


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove what no process uses, after a question.")] = False,
    yes: Yes = False,
) -> None:
    """List or clear this machine's cache of datasets (MD2_CACHE).

    Readers fetch again what they need.
    """
    from shards.cache.folder import Cache, format_bytes, residents
    from shards.cache.folder import clear as clear_cache
    from shards.manage import find_datasets

    place = Cache.from_environment()
    found = residents(place)
    for resident in found:
        (dataset, *_) = [*find_datasets(str(resident.folder)), None]
        what = _summary(dataset.manifest) if dataset is not None and dataset.manifest is not None else "no manifest"
        day = time.strftime("%Y-%m-%d", time.localtime(resident.used))
        state = f"last used {day}" if resident.idle else "in use"
        say(f"{resident.folder}  {format_bytes(resident.present)} here of {what}; {state}")
    say(f"{place.folder}  {counted(len(found), 'dataset')}, {format_bytes(sum(r.present for r in found))}")
    if clear and found:
        _ask("Remove those that no process uses?", yes)
        say(f"{place.folder}  {format_bytes(clear_cache(place))} removed")


def _ask(question: str, yes: bool) -> None:
    if yes:
        return
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort as error:
        typer.echo(err=True)  # the question's line is still open
        raise UsageError("no answer to the question; --yes answers it") from error
    if not agreed:
        raise typer.Exit(1)


def _require_local(folder: str, advice: str) -> None:
    from shards.storage import is_local

    if not is_local(folder):
        raise UsageError(f"{folder}: not a local folder; {advice}")


def _copy(source: str, url: str, parts: list[str] | None) -> None:
    from shards.manage import datasets_at
    from shards.storage import open_storage
    from shards.transfer import copy_dataset

    top, skipped = open_storage(source).url, False
    for dataset in datasets_at(source):
        if dataset.manifest is None:
            say(f"{dataset.url}  skipped: {dataset.note}")
            skipped = True
            continue
        target = (url.rstrip("/") or url) + dataset.url.removeprefix(top)
        with _bytes_bar("copying") as progress:
            copied = copy_dataset(dataset.url, target, progress, parts)
        say(_report(copied, target))
    if skipped:
        raise typer.Exit(INCOMPLETE)


def _report(copied: Copied, asked: str) -> str:
    from shards.storage import open_storage

    asked = open_storage(asked.rstrip("/") or asked).url  # in the form in which the result names it
    if copied.already:
        return f"{copied.url}  was there already, byte for byte: {_summary(copied.manifest)}"
    beside = "" if copied.url == asked else f" (another dataset is at {asked})"
    there = len(copied.manifest.shards) - copied.sent
    found = f", {there} were there already" if there else ""
    return f"{copied.url}{beside}  {counted(copied.sent, 'shard')} copied{found}: {_summary(copied.manifest)}"


@contextmanager
def _bytes_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of bytes on stderr; give the callback that moves it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(visible(label), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _summary(manifest: Manifest) -> str:
    from pydantic import ByteSize

    parts = ", ".join(f"{manifest.samples(part):,} {part}" for part in manifest.parts)
    size = "native size" if manifest.size is None else f"{manifest.size[0]}x{manifest.size[1]}"
    total = ByteSize(sum(shard.total_bytes for shard in manifest.shards))
    return (
        f"{manifest.split.name}: {parts}; {size} {manifest.codec}; {counted(len(manifest.shards), 'shard')}, "
        f"{total.human_readable(decimal=True, separator=' ')}"
    )


def _describe(manifest: Manifest) -> None:
    depth = "no" if manifest.depth is None else f"{manifest.depth.source}, {manifest.depth.convention}"
    optional = ", ".join(f"{name} ({count:,})" for name, count in manifest.optional_components.items()) or "-"
    lines = {
        "split": manifest.split.name,
        "contents": _summary(manifest),
        "frames": f"{', '.join(str(frame) for frame in manifest.frames)}{' and the stereo partner' * manifest.stereo}",
        "depth": depth,
        "images": manifest.encoding,
        **({"intrinsics": "guessed from a field of view"} if manifest.intrinsics else {}),
        "in every sample": ", ".join(manifest.components),
        "in some": optional,
        "skipped": str(manifest.skipped),
        "seed": str(manifest.seed),
        "packed by": f"md2 {manifest.md2_version}",
    }
    for name, text in lines.items():
        say(f"{name:<16}{text}")
