"""A walk through the commands with each of their inputs broken in each way: no traceback, no hang, one line.

By default each input meets some of the ways, in turn; MD2_WALK=all takes every way for every input.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from evaluation_data import constant, pack_truth, tiny_checkpoint, tiny_config
from PIL import Image
from pipeline_data import smooth

from cli.console import run
from cli.main import app
from md2.checkpoint import load_checkpoint
from md2.evaluation.metrics import METRICS
from shards.dataset import open_dataset

pytestmark = pytest.mark.filterwarnings("ignore")
ALL = os.environ.get("MD2_WALK") == "all"
WAYS_IN_TURN = 1
TURN = count()
MOST_SECONDS = 90
MOST_MEGABYTES = 500


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes() or b"\0")
    for place in range(0, len(data), max(1, len(data) // 7)):
        data[place] ^= 0x55
    path.write_bytes(data)


def utf16(path: Path) -> None:
    path.write_bytes(path.read_bytes().decode("latin-1").encode("utf-16"))


def gigabyte(path: Path) -> None:
    os.truncate(path, 1 << 30)  # sparse: what follows reads as zeros


def aliases(path: Path) -> None:
    """YAML of a kilobyte that stands for ten billion values."""
    lists = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 10)]
    path.write_text("\n".join(["l0: &l0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]", *lists, ""]))


def vast_image(path: Path) -> None:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1 << 20))
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def zip_bomb(path: Path) -> None:
    """A zip of a megabyte with a gigabyte in it, under names that NumPy and PyTorch look for."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("data.npy", "archive/data.pkl"):
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(
                    b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000,), }"
                )
                for _ in range(512):
                    member.write(bytes(1 << 20))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


WAYS: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": cut,
    "flipped": flip,
    "html": lambda path: path.write_text("<html><body>403 Forbidden</body></html>\n"),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "utf-16": utf16,
    "nested": lambda path: path.write_text("[" * 5000),
    "braces": lambda path: path.write_text('{"a":' * 5000),
    "digits": lambda path: path.write_text(f'{{"a": {"9" * 5000}}}'),
    "number": lambda path: path.write_text("1"),
    "list": lambda path: path.write_text('["a", "\\u001b[2J", null]'),
    "escapes": lambda path: path.write_bytes(b"\x1b]0;title\x07\x1b[2J \xe2\x80\xae: \xff\n" * 5),
    "nan": lambda path: path.write_text('{"a": NaN, "a": 1e999, "b": -Infinity}'),
    "gigabyte": gigabyte,
    "aliases": aliases,
    "vast image": vast_image,
    "zip bomb": zip_bomb,
    "folder": folder,
    "pipe": pipe,
    "circle": circle,
}


@dataclass(frozen=True)
class Case:
    """A command line with `{}` for the folder of its inputs, and those of its inputs that are broken in turn."""

    words: str
    victims: tuple[str, ...]


def memory() -> float:
    """Peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@dataclass
class Tally:
    inputs: int = 0
    problems: list[str] = field(default_factory=list)
    netted: list[str] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)
    memory: float = field(default_factory=memory)


SMALL_RUN = "train.device=cpu train.max_steps=2 train.log_every=1"
CASES = [
    Case("predict {}/model.pt {}/street.png --out {}/out", ("model.pt", "street.png")),
    Case("predict {}/model.pt {}/film.mp4 --out {}/out --limit 2", ("film.mp4",)),
    Case("predict {}/model.pt {}/street.png --camera {}/own/camera.yaml --out {}/out", ("own/camera.yaml",)),
    Case("predict {}/published {}/street.png --out {}/out", ("published/model.safetensors", "published/config.json")),
    Case("compare {}/e.json {}/run", ("e.json", "run/config.yaml", "run/metrics.jsonl")),
    Case("export {}/model.pt --to monodepth2 --out {}/out", ("model.pt",)),
    Case(
        "eval {}/model.pt {}/truth --json {}/e.json",
        ("model.pt", "truth/dataset.json", "truth/test/000000.tar", "truth/test/000000.idx"),
    ),
    Case("eval {}/truth --predictions {}/d.npy", ("d.npy", "d.npy.keys.txt")),
    Case("eval {}/gt_depths.npz --predictions {}/d.npy", ("gt_depths.npz",)),
    Case("eval {}/truth --predictions {}/pngs", ("pngs/drive_000.png",)),
    Case("odometry {}/model.pt {}/frames --poses {}/poses.txt --out {}/out", ("frames/1.png", "poses.txt")),
    Case(
        "report {}/run --out {}/r.html --no-eval",
        ("run/config.yaml", "run/environment.json", "run/metrics.jsonl", "run/panels/val-00000001.png"),
    ),
    Case(
        "report {}/run --out {}/r.html --limit 1", ("run/checkpoints/best.pt", "truth/README.md", "truth/dataset.json")
    ),
    Case("shards ls {}/truth", ("truth/dataset.json",)),
    Case("shards show {}/truth --sheet {}/s.png", ("truth/dataset.json", "truth/test/000000.tar")),
    Case("shards verify {}/truth", ("truth/dataset.json", "truth/test/000000.idx", "truth/README.md")),
    Case("shards pull {}/truth {}/copy", ("truth/dataset.json", "truth/test/000000.tar", "truth/README.md")),
    Case("shards push {}/truth {}/there", ("truth/dataset.json", "truth/test/000000.tar", "truth/README.md")),
    Case("shards push {}/truth {}/begun", ("begun/.publish/claim.json", "begun/.publish/test/000000.json")),
    Case("shards copy {}/truth {}/there", ("truth/dataset.json", "truth/test/000000.idx")),
    Case("shards rm {}/truth --yes", ("truth/dataset.json", "truth/test/000000.tar")),
    Case("shards clean {}/begun --yes", ("begun/.publish/claim.json",)),
    Case("bench parity {}/bench --report", ("bench/runs.jsonl",)),
    Case(
        "prep --raw {}/raw --split {}/raw/splits/sample --part val --size 96x32 --workers 1 --out {}/packed",
        (
            "raw/splits/sample/val_files.txt",
            "raw/2011_09_26/calib_cam_to_cam.txt",
            "raw/2011_09_26/calib_velo_to_cam.txt",
            "raw/2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000002.png",
            "raw/2011_09_26/2011_09_26_drive_0002_sync/velodyne_points/data/0000000002.bin",
        ),
    ),
    Case(
        "prep --dataset folder --raw {}/own --size 96x64 --workers 1 --out {}/packed",
        ("own/camera.yaml", "own/d/left/2.png"),
    ),
    Case("prep --dataset folder --motion --raw {}/own --size 96x64 --workers 1 --out {}/packed", ("own/d/poses.txt",)),
    Case("train {}/mono.yaml --run {}/new", ("mono.yaml",)),
    Case("train --resume {}/run", ("run/config.yaml", "run/environment.json", "run/checkpoints/last.pt")),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every input, small and whole."""
    root = tmp_path_factory.mktemp("good")
    pack_truth(root / "truth", [constant(4), constant(9)])
    tiny_checkpoint(root / "model.pt")
    for name in ("best", "last"):
        tiny_checkpoint(root / "run" / "checkpoints" / f"{name}.pt", tiny_config(data={"url": str(root / "truth")}))
    config = load_checkpoint(root / "run" / "checkpoints" / "best.pt").parsed_config().to_yaml()
    (root / "run" / "config.yaml").write_text(config)
    (root / "mono.yaml").write_text(config)
    (root / "run" / "environment.json").write_text(
        json.dumps({"dataset": {"manifest_sha256": open_dataset(str(root / "truth")).manifest_sha256}})
    )
    begun = root / "begun" / ".publish" / "test" / "000000.json"
    begun.parent.mkdir(parents=True)
    begun.write_text("{}")
    claim = {"plan": {}, "plan_sha256": "0", "host": "h", "process": 1, "since": "2026-01-01 00:00:00"}
    (root / "begun" / ".publish" / "claim.json").write_text(json.dumps(claim))
    (root / "bench").mkdir()
    (root / "bench" / "runs.jsonl").write_text('{"setting": "mono", "variant": "md2 png", "seed": 0}\n')
    lines = [{"kind": kind, "step": 1, "epoch": 0, "loss": 0.2, "lr": 1e-4} for kind in ("train", "val")]
    (root / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pictures = [smooth(np.random.default_rng(seed), 96, 64) for seed in range(5)]
    for place in ("street.png", "run/panels/val-00000001.png"):
        (root / place).parent.mkdir(exist_ok=True)
        Image.fromarray(pictures[0]).save(root / place)
    for folder in ("frames", "own/d/left"):
        (root / folder).mkdir(parents=True)
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(root / folder / f"{number}.png")
    (root / "own" / "camera.yaml").write_text("width: 96\nheight: 64\nfx: 50\nfy: 48\ncx: 47.5\ncy: 31.5\n")
    (root / "poses.txt").write_text("".join(f"1 0 0 0 0 1 0 0 0 0 1 {n}\n" for n in range(5)))
    shutil.copy(root / "poses.txt", root / "own" / "d" / "poses.txt")
    assert run(app, ["export", str(root / "model.pt"), "--to", "safetensors", "--out", str(root / "published")]) == 0
    result = {
        "metrics": dict.fromkeys(METRICS, 0.1),
        "model": "x",
        "split": "eigen",
        "part": "test",
        "scaling": "median",
    }
    (root / "e.json").write_text(json.dumps(result))
    np.save(root / "d.npy", np.full((2, 8, 24), 0.2, np.float32))
    (root / "d.npy.keys.txt").write_text("drive_000\ndrive_001\n")
    (root / "pngs").mkdir()
    for key in ("drive_000", "drive_001"):
        Image.fromarray(constant(5)).save(root / "pngs" / f"{key}.png")
    ragged = np.empty(2, dtype=object)
    ragged[0], ragged[1] = np.full((40, 120), 4, np.float32), np.full((36, 110), 9, np.float32)
    np.savez(root / "gt_depths.npz", data=ragged)
    from fractions import Fraction

    from md2.inference.film import VideoWriter

    with VideoWriter(root / "film.mp4", Fraction(10)) as writer:
        for picture in pictures:
            writer.write(picture)
    return root


@contextmanager
def at_most(seconds: float) -> Iterator[list[str]]:
    """Interrupt what runs longer; the list then says so (the command's own net may catch the exception)."""
    told: list[str] = []

    def late(number: int, frame: FrameType | None) -> None:
        told.append(f"still running after {seconds} s")
        raise AssertionError(told[0])

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield told
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def needed(case: Case, good: Path, drive: Path) -> list[tuple[Path, str]]:
    """What a case reads: (source, place below its folder)."""
    names = {word.removeprefix("{}/").split("/")[0] for word in case.words.split() if word.startswith("{}/")}
    names |= {victim.split("/")[0] for victim in case.victims}
    if "d.npy" in names:
        names.add("d.npy.keys.txt")
    if "--resume" in case.words or case.words.startswith("report"):
        names |= {"truth"}
    found = [(good / name, name) for name in sorted(names) if (good / name).exists()]
    return [*found, (drive, "raw")] if "raw" in names else found


def attempt(words: list[str], capsys: pytest.CaptureFixture[str], tally: Tally, label: str) -> None:
    tally.inputs += 1
    capsys.readouterr()
    began = time.monotonic()
    try:
        with at_most(MOST_SECONDS) as told:
            code = run(app, words)
    except BaseException as error:  # nothing may come through
        tally.problems.append(f"{label}: {type(error).__name__}: {error}")
        return
    shown = capsys.readouterr()
    if ALL:
        with capsys.disabled():
            print(f"{time.monotonic() - began:6.2f} s  {code}  {label}: {shown.err.strip()[-150:]!r}")
    tally.codes[code] = tally.codes.get(code, 0) + 1
    lines = [line for line in shown.err.splitlines() if line.startswith("md2: ")]
    both = shown.out + shown.err
    if "Traceback" in both or any(mark in both for mark in ("\x1b]", "\x1b[2J", "\u202e", "\x07")):
        tally.problems.append(f"{label}: {both[-400:]!r}")
    tally.problems += [f"{label}: {late}" for late in told]
    if code == 1:
        tally.netted.append(f"{label}: {lines}")
    if code not in (0, 1, 2, 3, 4, 5, 6) or (code not in (0, 4) and not lines):
        tally.problems.append(f"{label}: exit code {code}, {lines} {shown.err[-300:]!r}")


@pytest.fixture(scope="module")
def tally(good: Path) -> Iterator[Tally]:
    found, began = Tally(), time.monotonic()
    yield found
    print(
        f"\n{found.inputs} broken inputs: {len(found.problems)} problems, {len(found.netted)} caught by the net, "
        f"exit codes {dict(sorted(found.codes.items()))}, {time.monotonic() - began:.0f} s, "
        f"{memory() - found.memory:.0f} MB more at the peak"
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.words.replace("{}/", ""))
def test_every_input_broken(
    case: Case,
    good: Path,
    drive: Path,
    tally: Tally,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MD2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MD2_STORAGE_PATIENCE", "2")
    monkeypatch.chdir(tmp_path)
    before = len(tally.problems), len(tally.netted)
    for victim in case.victims:
        ways = list(WAYS)
        if not ALL:
            ways = [ways[next(TURN) * 5 % len(ways)] for _ in range(WAYS_IN_TURN)]
        for way in ways:
            place = tmp_path / "inputs"
            for source, name in needed(case, good, drive):
                copy = shutil.copytree if source.is_dir() else shutil.copy
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                copy(source, place / name)
            for file in (place / "run" / "config.yaml", place / "mono.yaml"):
                if file.is_file():
                    file.write_text(file.read_text().replace(str(good), str(place)))
            WAYS[way](place / victim)
            words = [word.replace("{}", str(place)) for word in case.words.split()]
            attempt(words, capsys, tally, f"{case.words.split(' {')[0]}, {victim} {way}")
            shutil.rmtree(place)
    found = tally.problems[before[0] :] + tally.netted[before[1] :]
    assert not found, "\n".join(found)
    assert memory() - tally.memory < MOST_MEGABYTES
