"""Helpers of the prep tests: packing in one call, raw trees in other forms, and a web server that counts."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from prep.packing.pack import Packed, pack
from prep.packing.plan import OnError, make_plan
from prep.raw.calibration import read_raw_calibration
from prep.raw.files import RawData
from prep.raw.kitti import Kitti
from prep.raw.splits import read_split
from prep.request import make_content
from prep.workers import Workers, start_workers

DATE = "2011_09_26"
DRIVE = f"{DATE}_drive_0001_sync"
VAL_DRIVE = f"{DATE}_drive_0002_sync"


def run_pack(
    split: Path | str,
    raw: Path | str | list[str],
    out: Path,
    *,
    workers: Workers | None = None,
    on_error: OnError = "stop",
    parts: list[str] | None = None,
    follow_links: bool = True,
    **content_options: Any,
) -> Packed:
    """What `md2 prep` does, in this process unless `workers` are given."""
    lists = read_split(str(split))
    content = make_content(lists, **{"size": "96x32", **content_options})
    urls = raw if isinstance(raw, list) else [str(raw)]
    plan = make_plan(
        lists, Kitti(RawData(urls, follow_links), content.depth, motion=content.motion), content, on_error, parts
    )
    scratch = out.with_name(f".{out.name}.scratch")
    if workers is not None:
        return pack(plan, lists, str(out), scratch, workers, skip_broken=on_error == "skip")
    with start_workers(1) as alone:
        return pack(plan, lists, str(out), scratch, alone, skip_broken=on_error == "skip")


def command(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command line of md2 in this process: a second or two quicker than in one of its own."""
    from cli.console import run
    from cli.main import app

    words, out, err = [str(argument) for argument in arguments], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(cwd):
        code = run(app, words)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def write_split(folder: Path, *lines: str, part: str = "train") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{part}_files.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def read_part(dataset: Path, part: str = "train") -> list[dict[str, Any]]:
    """The samples by the `webdataset` library, in order."""
    samples: list[dict[str, Any]] = []
    for path in sorted((dataset / part).glob("*.tar")):
        with path.open("rb") as file:
            samples += webdataset.tariterators.group_by_keys(
                {**entry, "__url__": str(path)} for entry in webdataset.tariterators.tar_file_iterator(file)
            )
    return samples


def image(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


def files_of(dataset: Path) -> dict[str, bytes]:
    """Every file of a dataset: two datasets are the same if these are."""
    return {str(path.relative_to(dataset)): path.read_bytes() for path in sorted(dataset.rglob("*")) if path.is_file()}


def copy_raw(drive: Path, target: Path) -> Path:
    """A raw tree of this test's own, to damage."""
    shutil.copytree(drive / DATE, target / DATE)
    return target


def long_raw(drive: Path, target: Path, frames: int) -> tuple[Path, Path]:
    """A raw tree with one drive of so many frames, linked to the short drive's in turn, and its train list."""
    source, long = drive / DATE / DRIVE, target / DATE / DRIVE
    for name, suffix in (("image_02", "png"), ("image_03", "png"), ("velodyne_points", "bin")):
        (long / name / "data").mkdir(parents=True)
        for number in range(frames):
            (long / name / "data" / f"{number:010d}.{suffix}").symlink_to(
                source / name / "data" / f"{number % 8:010d}.{suffix}"
            )
    for path in (drive / DATE).glob("calib_*"):
        (target / DATE / path.name).symlink_to(path)
    lines = [f"{DATE}/{DRIVE} {number} {side}" for number in range(1, frames - 1) for side in "lr"]
    return target, write_split(target, *lines)


def odometry_raw(drive: Path, top: Path) -> Path:
    """The validation drive as sequence 09 of KITTI odometry."""
    sequence = top / "sequences" / "09"
    for camera in ("2", "3"):
        (sequence / f"image_{camera}").mkdir(parents=True)
        for path in (drive / DATE / VAL_DRIVE / f"image_0{camera}" / "data").glob("*.png"):
            shutil.copy(path, sequence / f"image_{camera}" / f"{int(path.stem):06d}.png")
    (sequence / "velodyne").mkdir()
    for path in (drive / DATE / VAL_DRIVE / "velodyne_points" / "data").glob("*.bin"):
        shutil.copy(path, sequence / "velodyne" / f"{int(path.stem):06d}.bin")
    calibration = read_raw_calibration(DATE, lambda path: (drive / path).read_bytes(), depth=True)
    assert calibration.velodyne is not None
    rows = {"P2": calibration.projection["l"], "P3": calibration.projection["r"], "Tr": calibration.velodyne[:3]}
    (sequence / "calib.txt").write_text(
        "".join(f"{n}: {' '.join(map(repr, m.ravel().tolist()))}\n" for n, m in rows.items())
    )
    (top / "poses").mkdir()
    shutil.copy(drive / DATE / VAL_DRIVE / "true_pose_02.txt", top / "poses" / "09.txt")
    return top


def zip_raw(drive: Path, target: Path, *, nested: bool = False, stored: bool = False) -> Path:
    """The raw tree as KITTI publishes it: a zip per drive with grey cameras in front, and one for the calibration.

    Args:
        nested: as in the public archive, `raw_data/2011_09_26_drive_0001/2011_09_26_drive_0001_sync.zip`.
    """
    method = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
    top = target / "raw_data" if nested else target
    top.mkdir(parents=True)
    with zipfile.ZipFile(top / f"{DATE}_calib.zip", "w", method) as archive:
        for path in sorted((drive / DATE).glob("calib_*.txt")):
            archive.write(path, f"{DATE}/{path.name}")
    for name in (DRIVE, VAL_DRIVE):
        folder = top / name.removesuffix("_sync") if nested else top
        folder.mkdir(exist_ok=True)
        grey = np.random.default_rng(0).bytes(200_000)
        with zipfile.ZipFile(folder / f"{name}.zip", "w", method) as archive:
            archive.writestr(zipfile.ZipInfo(f"{DATE}/{name}/image_00/"), b"")
            for number in range(8):
                archive.writestr(f"{DATE}/{name}/image_00/data/{number:010d}.png", grey)
                archive.writestr(f"{DATE}/{name}/image_01/data/{number:010d}.png", grey)
            for path in sorted((drive / DATE / name).rglob("*")):
                if path.is_file():
                    archive.write(path, path.relative_to(drive))
    return target


@dataclass
class Web:
    """A web server over a folder, and what it was asked.

    Attributes:
        sent: bytes of all bodies.
        ranges: whether ranges are served.
        failures: answers to refuse with 503 before it works again.
    """

    url: str = ""
    sent: int = 0
    requests: list[str] = field(default_factory=list)
    ranges: bool = True
    failures: int = 0


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web

    def __init__(self, *args: Any, web: Web, **kwargs: Any) -> None:
        self.web = web
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        self.web.requests.append(self.path)
        path = Path(self.translate_path(self.path))
        if self.web.failures > 0:
            self.web.failures -= 1
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, b"")
        elif not path.is_file():
            self._answer(HTTPStatus.NOT_FOUND, b"")
        else:
            self._send_file(path)

    def _send_file(self, path: Path) -> None:
        data = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None or not self.web.ranges:
            self._answer(HTTPStatus.OK, data)
            return
        start = int(match[1])
        piece = data[start : int(match[2]) + 1 if match[2] else None]
        self._answer(HTTPStatus.PARTIAL_CONTENT, piece, f"bytes {start}-{start + len(piece) - 1}/{len(data)}")

    def _answer(self, status: HTTPStatus, body: bytes, content_range: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if content_range is not None:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if self.command != "HEAD":
            self.web.sent += len(body)
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815  (http.server's name)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[Web]:
    """A real web server on loopback for the time of the block."""
    web = Web()
    handler = partial(_Handler, directory=str(folder), web=web)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        web.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield web
        finally:
            server.shutdown()
            thread.join()
