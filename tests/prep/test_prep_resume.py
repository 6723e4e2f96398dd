"""Killed at any moment it goes on, and the bytes are those of an uninterrupted run, whoever did the work."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prep_data import files_of, run_pack

from prep.packing.assemble import SampleJob, ShardJob
from prep.packing.encode import ChunkJob, Extent, ImageFormat, TimeStep, encode_chunk, read_chunk, versions
from prep.packing.pack import scratch_folder
from prep.raw.calibration import StereoCalibration
from prep.raw.splits import CameraSide
from prep.raw.zips import Member, Ref
from prep.workers import run, start_workers
from shards.errors import DatasetError, Md2Error, UsageError
from shards.publish import Store

CHUNKS = 10
OPTIONS = {"size": "native", "shard_mb": 5}


@pytest.fixture(scope="module")
def expected(long: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of an uninterrupted run in one process."""
    raw, split = long
    out = tmp_path_factory.mktemp("expected") / "out"
    run_pack(split, raw, out, **OPTIONS)
    return files_of(out)


def children(pid: int) -> list[int]:
    """Processes started by a process, and by those in turn."""
    found = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, listed.read_text().split()):
            found += [child, *children(child)]
    return found


def alive(pid: int) -> bool:
    try:
        return not re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> bool:
    """True once the condition holds; False if the process ended first."""
    deadline = time.monotonic() + 60
    while not condition():
        if process is not None and process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "nothing happened within a minute"
        time.sleep(0.002)
    return True


def prep_command(long: tuple[Path, Path], out: Path, scratch: Path, *more: str) -> list[str]:
    """`md2 prep` of the long drive by two workers, in a process of its own."""
    raw, split = long
    words: list[str | Path] = ["prep", "--split", split, "--raw", raw, "--follow-links", "--out", out]
    words += ["--scratch", scratch, "--size", "native", "--workers", "2", *more]
    return [sys.executable, "-m", "cli.main", *map(str, words)]


def test_sigkill_at_any_moment(long: tuple[Path, Path], expected: dict[str, bytes], tmp_path: Path) -> None:
    out, within = tmp_path / "out", tmp_path / "scratch"
    within.mkdir()
    (within / "notes.txt").write_text("not prep's")
    scratch = scratch_folder(str(out), within)
    command = prep_command(long, out, within, "--shard-mb", "5")

    def chunks() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in scratch.glob("*.chunk")}

    def receipts() -> dict[str, int]:
        return {path.stem: path.stat().st_mtime_ns for path in out.glob(".publish/*/*.json")}

    # When to kill: in the first chunks, some chunks later, while the first shard is written, after it is published.
    moments: list[tuple[str, Callable[[], bool]]] = [
        ("a chunk under way", lambda: bool(list(scratch.glob(".*.tmp")))),
        ("2 chunks", lambda: len(chunks()) >= 2),
        ("6 chunks", lambda: len(chunks()) >= 6),
        ("a shard under way", lambda: bool(list(scratch.glob("shards/*/*/*.tmp")))),
        ("a shard published", lambda: len(receipts()) >= 1),
    ]
    print()
    for label, reached in moments:
        kept_chunks, kept_receipts = chunks(), receipts()
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            assert wait_until(reached, process), f"finished before: {label}"
            workers = children(process.pid)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert wait_until(lambda pids=workers: not any(map(alive, pids)))  # type: ignore[misc]
        print(f"killed at {label}: {len(chunks())} of {CHUNKS} chunks, {len(receipts())} shards are whole")
        assert not (out / "dataset.json").exists()
        # What was whole at the kill before was not made again.
        assert {name: chunks().get(name) for name in kept_chunks} == kept_chunks
        assert {name: receipts().get(name) for name in kept_receipts} == kept_receipts
    kept_shards = {name: (out / f"train/{name}.tar").stat().st_mtime_ns for name in receipts()}
    assert kept_shards
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    print(done.stdout.strip())
    assert {name: (out / f"train/{name}.tar").stat().st_mtime_ns for name in kept_shards} == kept_shards
    assert files_of(out) == expected
    assert [path.name for path in within.iterdir()] == ["notes.txt"]  # a folder that was there is never emptied
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (out / ".publish").mkdir()
    (out / ".publish" / "claim.json").write_text("what a kill right after the commit leaves")
    again = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    print(again.stdout.strip())
    assert "was there already" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("presses", [1, 2, 5])
def test_ctrl_c_ends_all_processes(long: tuple[Path, Path], tmp_path: Path, presses: int) -> None:
    scratch = scratch_folder(str(tmp_path / "out"), tmp_path)
    command = prep_command(long, tmp_path / "out", tmp_path)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    assert wait_until(lambda: bool(list(scratch.glob("*.chunk"))), process)
    workers = children(process.pid)
    assert workers
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does for Ctrl-C
    for _ in range(presses - 1):  # while the workers finish what they are at
        time.sleep(0.02)
        with suppress(ProcessLookupError):  # ended already
            os.killpg(process.pid, signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors.decode()
    assert b"Traceback" not in errors
    assert wait_until(lambda: not any(map(alive, workers)))
    assert presses > 1 or not list(scratch.glob("**/.*.tmp"))


def test_ctrl_c_again_ends_a_job_that_does_not(tmp_path: Path) -> None:
    script = "import sys, time, prep.workers as w; w.PATIENCE = 0.5\n"
    script += "with w.start_workers(2) as workers: list(w.run(workers, time.sleep, [3600, 3600]))"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, start_new_session=True)
    try:
        assert wait_until(lambda: len(children(process.pid)) >= 3, process)  # two workers and Python's tracker
        workers = children(process.pid)
        for wait in (0.2, 0.2, 0.6):
            assert process.poll() is None
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(wait)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in errors  # the tracker may say that it cleans up
    assert wait_until(lambda: not any(map(alive, workers)))


def test_four_workers_give_the_same_bytes(long: tuple[Path, Path], expected: dict[str, bytes], tmp_path: Path) -> None:
    raw, split = long
    with start_workers(4) as pool:
        run_pack(split, raw, tmp_path / "out", workers=pool, **OPTIONS)
    assert files_of(tmp_path / "out") == expected


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A dask scheduler and two worker processes on loopback."""
    folder = tmp_path_factory.mktemp("dask")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    address_file = folder / "scheduler.json"
    base = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    quiet = {"cwd": folder, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [
        subprocess.Popen(
            [*base, "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(address_file)],
            **quiet,  # type: ignore[call-overload]
        )
    ]
    try:
        wait_until(address_file.exists)
        for _ in range(2):
            worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(address_file)]
            worker += ["--nthreads", "1", "--no-dashboard", "--no-nanny", "--local-directory", str(folder)]
            processes.append(subprocess.Popen(worker, **quiet))  # type: ignore[call-overload]
        from distributed import Client

        with Client(scheduler_file=str(address_file)) as client:
            client.wait_for_workers(2, timeout=60)
            address = client.scheduler.address
        yield address
    finally:
        for process in reversed(processes):
            process.kill()  # asked nicely, a worker whose scheduler is going too may take its time
            process.wait()


def test_dask_gives_the_same_bytes(
    long: tuple[Path, Path], expected: dict[str, bytes], tmp_path: Path, scheduler: str
) -> None:
    raw, split = long
    with start_workers(scheduler=scheduler) as workers:
        assert workers.count == 2
        run_pack(split, raw, tmp_path / "out", workers=workers, **OPTIONS)
    assert files_of(tmp_path / "out") == expected


def test_a_broken_frame_under_dask_names_the_file(long: tuple[Path, Path], tmp_path: Path, scheduler: str) -> None:
    from shards.errors import SampleError

    raw, split = long
    number = 120
    broken = tmp_path / "raw"
    for path in raw.rglob("*"):
        if path.is_symlink() and str(number) in path.name and "image_02" in str(path):
            copy = broken / path.relative_to(raw)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes()[:5000])
    with (
        start_workers(scheduler=scheduler) as workers,
        pytest.raises(SampleError, match=rf"{number}\.png: broken image"),
    ):
        run_pack(split, [str(broken), str(raw)], tmp_path / "out", workers=workers, **OPTIONS)


def test_no_scheduler_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prep.workers.SCHEDULER_TIMEOUT", 1)
    with pytest.raises(UsageError, match="no dask scheduler answers"), start_workers(scheduler="tcp://127.0.0.1:9"):
        pass


def test_a_worker_that_dies_is_one_line(tmp_path: Path) -> None:
    says = r"a worker process died .*run the same command again"
    with start_workers(2) as workers, pytest.raises(Md2Error, match=says):
        list(run(workers, os._exit, [9, 9]))


def test_a_damaged_chunk_is_noticed(drive: Path, tmp_path: Path) -> None:
    """Any byte changed, or the end cut off: every file is read back as it was, or an error is raised."""
    names = [f"2011_09_26/2011_09_26_drive_0001_sync/image_02/data/{n:010d}.png" for n in (1, 2)]
    refs = [Ref(name, str(drive / name), (drive / name).stat().st_size) for name in names]
    steps = tuple(TimeStep(n, {"l": ref}) for n, ref in enumerate(refs, start=1))
    p = np.array([[100.0, 0, 96, 0], [0, 100, 32, 0], [0, 0, 1, 0]])
    calibration = StereoCalibration({"l": p, "r": p}, (192, 64), None, "calib")
    form = ImageFormat((24, 8), "png", None)
    name = encode_chunk(ChunkJob("d", steps, calibration, form, "camera_z", False, tmp_path, versions()))
    path = tmp_path / name
    chunk = read_chunk(path)
    assert chunk is not None
    assert (sorted(chunk.files), chunk.sizes["image d 1 l"], chunk.broken) == (
        ["image d 1 l", "image d 2 l"],
        (192, 64),
        {},
    )
    content = {label: extent.read(tmp_path) for label, extent in chunk.files.items()}
    assert all(data.startswith(b"\x89PNG") for data in content.values())
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with suppress(DatasetError):
            assert {label: extent.read(tmp_path) for label, extent in chunk.files.items()} == content
        damaged = read_chunk(path)
        if damaged is not None and set(damaged.files) == set(content):
            with suppress(DatasetError):
                assert {label: extent.read(tmp_path) for label, extent in damaged.files.items()} == content
    extent = chunk.files["image d 1 l"]
    path.write_bytes(whole[: extent.offset] + bytes([whole[extent.offset] ^ 1]) + whole[extent.offset + 1 :])
    with pytest.raises(DatasetError, match=r"\.chunk: damaged scratch file"):
        extent.read(tmp_path)
    for size in range(0, len(whole), 11):
        path.write_bytes(whole[:size])
        assert read_chunk(path) is None
    for index in (
        b"[]",
        b"[" * 5000,
        b'{"sizes": [1], "broken": 3}',
        b'{"sizes": {"a": []}, "broken": {}}',
        b" " * (5 << 20),
    ):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("index.json", index)
        assert read_chunk(path) is None
    path.unlink()
    os.mkfifo(path)
    assert read_chunk(path) is None


def chunk_job() -> ChunkJob:
    """Of two time_steps: both images, a scan and a ready-made depth map in the first; the left image in the second."""
    names = enumerate(("l", "r", "scan", "map"))
    refs = {name: Ref(name, f"file:///raw/{name}", 100 + number) for number, name in names}
    packed = Ref("next", "file:///raw.zip", 7, Member(0, 1, 5, 8, 99))
    time_steps = (
        TimeStep(3, {"l": refs["l"], "r": refs["r"]}, refs["scan"], ("l",), {"r": refs["map"]}),
        TimeStep(4, {"l": packed}),
    )
    projection: dict[CameraSide, np.ndarray] = {side: np.arange(12.0).reshape(3, 4) + len(side) for side in ("l", "r")}
    calibration = StereoCalibration(projection, (192, 64), np.eye(4), "calib")
    return ChunkJob(
        "d", time_steps, calibration, ImageFormat((96, 32), "jpeg", 90), "camera_z", False, Path("scratch"), "1"
    )


def changed_jobs(job: ChunkJob) -> Iterator[tuple[str, ChunkJob]]:
    first, second = job.time_steps
    assert first.scan is not None and second.images["l"].member is not None

    def time_step(**changes: Any) -> ChunkJob:
        return replace(job, time_steps=(replace(first, **changes), second))

    def calibration(**changes: Any) -> ChunkJob:
        return replace(job, calibration=replace(job.calibration, **changes))

    yield "drive", replace(job, drive="e")
    yield "frame", time_step(frame=2)
    yield "image", time_step(images={"l": first.images["l"]})
    yield "side", time_step(images={"l": first.images["r"], "r": first.images["l"]})
    yield "size of a file", time_step(images={**first.images, "l": replace(first.images["l"], size=1)})
    yield "place of a file", time_step(scan=replace(first.scan, url="file:///other/scan"))
    yield "scan", time_step(scan=None, depth_sides=())
    yield "side of the depth", time_step(depth_sides=("r",))
    yield "both depths", time_step(depth_sides=("l", "r"))
    yield "ready-made depth", time_step(depth_maps={})
    crc = replace(second.images["l"], member=replace(second.images["l"].member, crc=98))
    yield "content of a zip", replace(job, time_steps=(first, replace(second, images={"l": crc})))
    yield "fewer", replace(job, time_steps=(first,))
    yield "calibration", calibration(projection={**job.calibration.projection, "r": np.zeros((3, 4))})
    yield "native size", calibration(size=(192, 63))
    yield "lidar", calibration(velodyne=np.eye(4)[::-1])
    yield "no lidar", calibration(velodyne=None)
    for number, form in enumerate((ImageFormat(None, "jpeg", 90), ImageFormat((96, 32), "png", 90))):
        yield f"format {number}", replace(job, format=form)
    yield "quality", replace(job, format=ImageFormat((96, 32), "jpeg", 91))
    yield "convention", replace(job, convention="lidar_x")
    yield "versions", replace(job, versions="2")
    yield "levels", replace(job, levels=(0, 4095))


def test_a_chunk_is_named_after_everything_that_decides_its_bytes() -> None:
    """Else a run with other options, or after a file was mended, would take what an earlier one left in scratch."""
    job = chunk_job()
    names = {"": job.name} | {what: other.name for what, other in changed_jobs(job)}
    assert len(set(names.values())) == len(names)
    # Where the work is done, and whether broken files are skipped (such chunks are made again), decides nothing.
    assert chunk_job().name == replace(job, folder=Path("elsewhere"), skip_broken=True).name == job.name


def test_a_shard_is_told_by_all_that_goes_into_it() -> None:
    def spec(key: str = "k", small: bytes = b"abc", size: int = 5, crc: int = 6, name: str = "0.jpg") -> str:
        sample = SampleJob(key, {"k.f32": small}, {name: Extent("a.chunk", 0, size, crc)})
        return ShardJob("train", 0, [sample], Path("scratch"), Store("out")).spec

    changes: list[dict[str, Any]] = [{"key": "l"}, {"small": b"abd"}, {"size": 4}, {"crc": 7}, {"name": "s.jpg"}]
    assert len({spec(), *(spec(**change) for change in changes)}) == 6
    assert spec() == spec()
