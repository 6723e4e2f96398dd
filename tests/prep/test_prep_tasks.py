"""`md2 prep --task I/N`: independent processes pack one dataset, whatever happens to one of them; the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from prep_data import command, files_of, run_pack
from storage_servers import Bucket

from prep.packing.encode import ChunkJob
from prep.packing.pack import Packed, pack, pack_share, scratch_folder
from prep.packing.plan import PackingPlan, make_plan
from prep.packing.tasks import Task, Unfinished, owners, parse_task
from prep.raw.files import RawData
from prep.raw.kitti import Kitti
from prep.raw.splits import SplitLists, read_split
from prep.request import make_content
from prep.workers import InProcess, Workers
from shards.errors import StorageError, UsageError

OPTIONS = ("--size", "192x64", "--shard-mb", "2")
BOTH_AT_ONCE = """
import pathlib, sys, time
from prep.packing.tasks import Chunks
late, (mine, other) = Chunks.late, map(pathlib.Path, sys.argv[1:3])
def wait_for_the_other(*arguments):
    mine.touch()
    deadline = time.monotonic() + 120
    while not other.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    return late(*arguments)
Chunks.late = wait_for_the_other
from cli.console import run
from cli.main import app
sys.exit(run(app, sys.argv[3:]))
"""
"""A command line of md2 that looks whether all chunks are there when another process has encoded its share, too."""


@pytest.fixture(scope="module")
def expected(long: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of one process."""
    raw, split = long
    out = tmp_path_factory.mktemp("expected") / "out"
    run_pack(split, raw, out, size="192x64", shard_mb=2)
    return files_of(out)


def words(long: tuple[Path, Path], out: Path, task: int) -> list[str | Path]:
    raw, split = long
    return [
        "prep", "--split", split, "--raw", raw, "--follow-links", "--out", out, *OPTIONS, "--workers", "1",
        "--task", f"{task}/5",
    ]  # fmt: skip


def chunks(out: Path) -> dict[str, int]:
    """Name and time of each finished chunk."""
    return {path.name: path.stat().st_mtime_ns for path in scratch_folder(str(out)).glob("*.chunk")}


def start(*command: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_five_processes_one_killed_one_twice_two_at_once(
    long: tuple[Path, Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    one, two = start("-m", "cli.main", *words(long, out, 1)), start("-m", "cli.main", *words(long, out, 2))
    deadline = time.monotonic() + 120
    while two.poll() is None and time.monotonic() < deadline:
        if (scratch_folder(str(out)) / "lock-2").exists() and chunks(out):
            break
        time.sleep(0.002)
    two.send_signal(signal.SIGKILL)
    two.communicate()
    printed, errors = one.communicate(timeout=120)
    assert one.returncode == 0, errors
    assert "share 1/5 is encoded" in printed
    assert not (out / "dataset.json").exists()

    three = command(*words(long, out, 3), cwd=tmp_path)
    assert three.returncode == 0, three.stderr
    before = chunks(out)
    again = command(*words(long, out, 3), cwd=tmp_path)  # one is run twice
    assert chunks(out) == before, "made nothing again"
    lost = [2, 4, 5] if len(before) < 6 else [4, 5]  # task 2 may have finished its chunks before it was killed
    listed = ", ".join(map(str, lost))
    assert f"not those of {len(lost)} tasks: {listed}\n" in again.stdout
    assert f"run a lost one again, such as --task {lost[0]}/5" in again.stdout

    assert command(*words(long, out, 2), cwd=tmp_path).returncode == 0  # the killed one, again
    assert {name: chunks(out)[name] for name in before} == before
    marks = [tmp_path / "four", tmp_path / "five"]
    last = [start("-c", BOTH_AT_ONCE, marks[i], marks[1 - i], *words(long, out, 4 + i)) for i in (0, 1)]
    for process in last:
        printed, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert "476 train samples" in printed, "each found all chunks, and both publish the same"
    assert files_of(out) == expected
    assert not scratch_folder(str(out)).exists()
    late = command(*words(long, out, 3), cwd=tmp_path)
    assert (late.returncode, "was there already" in late.stdout) == (0, True)
    assert files_of(out) == expected


def plan_of(long: tuple[Path, Path]) -> tuple[PackingPlan, SplitLists]:
    raw, split = long
    lists = read_split(str(split))
    content = make_content(lists, size="192x64", shard_mb=2)
    return make_plan(lists, Kitti(RawData([str(raw)], follow_links=True), content.depth), content), lists


def test_machines_that_share_nothing_but_a_bucket(
    long: tuple[Path, Path], expected: dict[str, bytes], tmp_path: Path, moto_bucket: Bucket
) -> None:
    """Each has a scratch folder of its own; one loses it, and starts again on another machine."""
    plan, lists = plan_of(long)
    one = Workers(InProcess(), 1)
    url = f"{moto_bucket.url}/long"

    def run(task: int, scratch: str) -> Packed | Unfinished:
        return pack_share(plan, lists, url, tmp_path / scratch, one, Task(task, 3))

    assert run(2, "two") == Unfinished(url, [1, 3])
    assert run(1, "one") == Unfinished(url, [3])
    sent = {name for name in moto_bucket.objects() if name.endswith(".chunk")}
    assert run(1, "another") == Unfinished(url, [3])
    assert not list((tmp_path / "another").glob("*.chunk")), "the bucket had its share"
    done = run(3, "three")
    assert isinstance(done, Packed) and not done.already
    assert len(sent) == 7
    assert {name.removeprefix("long/"): moto_bucket.get(name) for name in moto_bucket.objects()} == expected
    after = run(2, "two")
    assert isinstance(after, Packed) and after.already
    assert not (tmp_path / "two").exists()


def test_one_process_takes_over_what_tasks_have_left_in_a_bucket(
    long: tuple[Path, Path], expected: dict[str, bytes], tmp_path: Path, moto_bucket: Bucket
) -> None:
    plan, lists = plan_of(long)
    one, url = Workers(InProcess(), 1), f"{moto_bucket.url}/long"
    pack_share(plan, lists, url, tmp_path / "one", one, Task(1, 3))
    made: list[str] = []

    class Counting(InProcess):
        def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def]
            made.extend(job.name for job in args if isinstance(job, ChunkJob))
            return super().submit(fn, *args, **kwargs)

    done = pack(plan, lists, url, tmp_path / "alone", Workers(Counting(), 1))
    assert (done.url, len(made)) == (url, 6)
    assert {name.removeprefix("long/"): moto_bucket.get(name) for name in moto_bucket.objects()} == expected


def test_shares_are_equal_and_cover_everything(long: tuple[Path, Path]) -> None:
    jobs = list(plan_of(long)[0].jobs(Path("scratch"), False, "1"))
    for count in (1, 2, 3, 5, 10):
        sizes = Counter[int]()
        owner = owners(jobs, count)
        for job, number in zip(jobs, owner, strict=True):
            sizes[number] += job.images
        assert owner == sorted(owner)
        assert sorted(sizes) == list(range(1, count + 1))
        assert max(sizes.values()) - min(sizes.values()) <= max(job.images for job in jobs)
    assert set(owners(jobs, 1000)) <= set(range(1, 1001)), "more tasks than chunks: some have nothing to do"


@pytest.mark.parametrize("text", ["0/5", "6/5", "5", "1/0", "-1/5", "a/b", "1/5/9", "", "1/9999999"])
def test_what_is_no_task(text: str) -> None:
    with pytest.raises(UsageError, match=r"--task .*from 1/5 to 5/5"):
        parse_task(text)
    assert parse_task("2/5") == Task(2, 5)


def test_the_same_task_at_the_same_time_is_refused(long: tuple[Path, Path], tmp_path: Path) -> None:
    from prep.packing.pack import _locked

    scratch = scratch_folder(str(tmp_path / "out"))
    with _locked(scratch, Task(1, 5)):
        for task, holder in ((Task(1, 5), "md2 prep --task 1/5"), (Task(), "another md2 prep")):
            with pytest.raises(StorageError, match=f"{holder} is at work there"), _locked(scratch, task):
                pass
        with _locked(scratch, Task(2, 5)):
            pass
    words = ["prep", "--split", long[1], "--raw", long[0], "--task", "1/5", "--scheduler", "tcp://127.0.0.1:1"]
    refused = command(*words, cwd=tmp_path)
    assert (refused.returncode, "give one of them" in refused.stderr) == (2, True)
