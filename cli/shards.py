"""`md2 shards ls|show|verify|pull|push|copy`: datasets in folders and object storage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from cli.console import console, errors, visible
from shards.errors import DatasetError

if TYPE_CHECKING:
    from collections.abc import Callable

    from shards.copy import Copied
    from shards.manifest import Manifest

app = typer.Typer(help="Look at, check and copy packed datasets, in folders and object storage.", no_args_is_help=True)

Url = Annotated[str, typer.Argument(metavar="URL", help="Folder, s3://, gs:// or http(s)://.")]


@app.command("ls")
def list_datasets(url: Url) -> None:
    """What datasets are there: at URL and below it."""
    from shards.listing import find_datasets

    nothing = True
    for found in find_datasets(url):
        _print(f"{found.url}  {_summary(found.manifest) if found.manifest else found.note}")
        nothing = False
    if nothing:
        raise DatasetError(f"{url}: no datasets there")


@app.command()
def show(
    url: Url,
    part: Annotated[
        str | None, typer.Option(help="Part to take samples from. (default: train, else val, else test)")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=100, help="Rows of the contact sheet.")] = 6,
    sheet: Annotated[
        Path | None, typer.Option(help="Where the contact sheet goes. (default: ./NAME.png, NAME being the dataset's)")
    ] = None,
    no_sheet: Annotated[bool, typer.Option("--no-sheet", help="Print only.")] = False,
) -> None:
    """What a dataset holds, and a contact sheet of some samples: target, neighbours, stereo partner, depth."""
    from shards.contact_sheet import contact_sheet, read_some
    from shards.files import write_atomic
    from shards.publish import require_manifest
    from shards.storage import open_storage

    if no_sheet:
        _print(*_describe(require_manifest(open_storage(url)).manifest))
        return
    manifest, chosen = read_some(url, part, samples)
    _print(*_describe(manifest))
    path = sheet or _sheet_path(url)
    write_atomic(path, contact_sheet(manifest, chosen))
    _print(f"contact sheet  {path}")


def _sheet_path(url: str) -> Path:
    """Named by the URL, which the user chose, and by nothing that stands in the dataset."""
    from shards.storage import is_local, local_path

    name = local_path(url).resolve().name if is_local(url) else url.rstrip("/").rpartition("/")[2]
    return Path(f"{name or 'dataset'}.png")


@app.command()
def verify(url: Url) -> None:
    """Check every byte: each shard's sha256, index and sample count against the manifest."""
    from shards.verify import verify as run

    began = time.monotonic()
    with _bytes_bar("checking") as progress:
        result = run(url, progress)
    for broken in result.broken:
        _print(f"broken  {broken.name}  {broken.problem}")
    for problem in result.problems:
        _print(f"broken  dataset.json  {problem}")
    if not result.sound:
        raise DatasetError(
            f"{url}: {len(result.broken)} of {len(result.manifest.shards)} shards are broken"
            if result.broken
            else f"{url}: every shard is sound, but the manifest's component list is not theirs"
        )
    _print(f"{result.url}  sound: {_summary(result.manifest)}  ({time.monotonic() - began:.1f} s)")


@app.command()
def pull(url: Url, folder: Annotated[Path, typer.Argument(help="Local folder for the dataset.")]) -> None:
    """Bring a dataset to a local folder. Run it again after an interruption: it goes on."""
    _copy(url, str(folder))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Local folder with a dataset.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="Where to publish it: s3://, gs:// or a folder.")],
) -> None:
    """Publish a local dataset. Nothing is ever overwritten; run it again after an interruption: it goes on."""
    _copy(str(folder), url)


@app.command("copy")
def copy_(
    source: Annotated[str, typer.Argument(metavar="FROM", help="URL or folder of a dataset.")],
    url: Annotated[str, typer.Argument(metavar="TO", help="URL or folder to publish it at.")],
) -> None:
    """Copy a dataset from anywhere to anywhere."""
    _copy(source, url)


def _copy(source: str, url: str) -> None:
    from shards.copy import copy_dataset

    with _bytes_bar("copying") as progress:
        copied = copy_dataset(source, url, progress)
    _print(_tell(copied, url))


def _tell(copied: Copied, asked: str) -> str:
    if copied.already:
        return f"{copied.url}  was there already, byte for byte: {_summary(copied.manifest)}"
    beside = "" if copied.url == asked.rstrip("/") else f" (another dataset is at {asked})"
    found = f", {copied.found} were there already" if copied.found else ""
    return f"{copied.url}{beside}  {copied.sent} shards copied{found}: {_summary(copied.manifest)}"


@contextmanager
def _bytes_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes on stderr; gives the callback that moves it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _summary(manifest: Manifest) -> str:
    from shards.cache.folder import format_bytes

    parts = ", ".join(f"{manifest.samples(part):,} {part}" for part in manifest.parts)
    size = "native size" if manifest.size is None else f"{manifest.size[0]}x{manifest.size[1]}"
    total = format_bytes(sum(shard.bytes + shard.index_bytes for shard in manifest.shards))
    return f"{manifest.split.name}: {parts}; {size} {manifest.codec}; {len(manifest.shards)} shards, {total}"


def _describe(manifest: Manifest) -> list[str]:
    depth = "no" if manifest.depth is None else f"{manifest.depth.source}, {manifest.depth.convention}"
    optional = ", ".join(f"{name} ({count:,})" for name, count in manifest.optional_components.items()) or "-"
    lines = {
        "split": manifest.split.name,
        "contents": _summary(manifest),
        "frames": f"{', '.join(str(frame) for frame in manifest.frames)}{' and the stereo partner' * manifest.stereo}",
        "depth": depth,
        "images": manifest.encoding,
        "in every sample": ", ".join(manifest.components),
        "in some": optional,
        "left out": str(manifest.skipped),
        "seed": str(manifest.seed),
        "packed by": f"md2 {manifest.md2_version}",
    }
    return [f"{name:<16}{text}" for name, text in lines.items()]


def _print(*lines: str) -> None:
    for line in lines:
        console.print(escape(visible(line)), highlight=False, soft_wrap=True)
