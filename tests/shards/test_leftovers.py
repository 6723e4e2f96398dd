"""What a killed process leaves goes with the next one; what a live one, or another machine, has there stays."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from md2.distributed import Ranks
from md2.train import _claimed
from prep.synthetic.write import _appearing
from shards.cache.folder import Cache, CachedFolder, clear, residents
from shards.files import scratch_folder, sweep, temporary, write_atomic
from shards.locks import FileLock
from shards.manifest import Shard

KILLED = """
import os, sys
from pathlib import Path
from prep.synthetic.write import _appearing
from shards.cache.folder import Cache
from shards.files import scratch_folder, temporary
from shards.manifest import Shard
top = Path(sys.argv[1])
place = Cache(top / "cache").dataset("a" * 64)
shard = Shard.model_construct(name="train/000000.tar", index_name="train/000000.idx", bytes=700, index_bytes=77,
                              sha256="0" * 64, index_sha256="0" * 64)
place.fetch_lock(shard).acquire(1)
place.take_room(shard, urgent=True)
for path in (place.folder / "dataset.json", place.folder / ".verified/train-000000", top / "run/checkpoints/last.pt"):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary(path).write_bytes(b"half")
with _appearing(top / "sample") as folder, scratch_folder("md2-copy", top / "tmp") as scratch:
    (folder / "frame.png").write_bytes(b"half")
    (scratch / "000000.tar").write_bytes(b"half")
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """What one killed process left in a cache, a run folder, a temporary folder and beside `md2 sample`'s folder."""
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=60, check=False).returncode == -9
    assert len(hidden(tmp_path)) == 5
    return tmp_path


def hidden(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob(".*.tmp")]


def test_every_place_is_swept_by_who_uses_it_next(top: Path) -> None:
    with _appearing(top / "sample") as folder:
        (folder / "frame.png").write_bytes(b"whole")
    with scratch_folder("md2-verify", top / "tmp") as scratch:
        assert list((top / "tmp").iterdir()) == [scratch]
    with _claimed(top / "run", Ranks(0, 1, torch.device("cpu"))):
        assert not hidden(top / "run")
    cache = Cache(top / "cache")
    place = cache.dataset("a" * 64)
    assert not list((place.folder / ".claims").iterdir())
    write_atomic(place.folder / ".verified" / "train-000001", b"{}")
    place.close()
    assert hidden(top) == []
    assert sorted(path.name for path in top.iterdir()) == ["cache", "run", "sample", "tmp"]


def test_a_cleared_cache_keeps_no_locks_of_it(top: Path) -> None:
    cache = Cache(top / "cache")
    other = cache.dataset("b" * 64)
    assert [resident.coming for resident in residents(cache)] == [0, 0]
    clear(cache)
    assert sorted(path.name for path in (top / "cache" / "locks").iterdir()) == [f"{other.identity}.use", "room"]
    other.close()


def test_a_live_process_keeps_its_claim_and_its_files(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    shard = Shard.model_construct(
        name="train/000000.tar",
        index_name="train/000000.idx",
        bytes=700,
        index_bytes=77,
        sha256="0" * 64,
        index_sha256="0" * 64,
    )
    place = cache.dataset("a" * 64)
    with place.fetch_lock(shard).acquire(1):
        place.take_room(shard, urgent=True)
        mine = temporary(place.folder / "dataset.json")
        mine.write_bytes(b"half")
        again = CachedFolder(cache, place.identity)
        assert [resident.coming for resident in residents(cache)] == [777]
        assert mine.exists()
    again.close()


def test_only_the_holder_of_a_folder_removes_what_another_machine_left(tmp_path: Path) -> None:
    name = temporary(tmp_path / "last.pt").name
    machine = name.rsplit(".", 2)[1].split("-")[0]
    foreign = tmp_path / name.replace(machine, "0" * 12)
    own = tmp_path / "notes.tmp"
    for path in (foreign, own):
        path.write_bytes(b"")
    assert sweep(tmp_path) == []
    assert sweep(tmp_path, held=True) == [foreign]
    assert list(tmp_path.iterdir()) == [own]


def test_a_lock_on_a_removed_file_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has opened the file when it is removed must not hold it beside one who locks the new file."""
    path = tmp_path / "lock"
    with FileLock(path).acquire(1):
        FileLock(path).remove()
        assert path.exists()
    flock = fcntl.flock

    def removed_before(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        FileLock(path).remove()
        assert not path.exists()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with FileLock(path).acquire(1):
        assert not FileLock(path).try_acquire()
