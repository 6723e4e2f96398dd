"""Independent processes that pack one dataset together, such as a job array: `md2 prep … --task 2/5`.

Each encodes its share of the chunks. None waits for another: whichever finds all chunks there assembles the shards and
commits. They share the scratch folder, or only the dataset's bucket; in a bucket, the chunks of all lie under
`.publish/chunks/` until the commit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prep.packing.encode import ChunkJob, encode_chunk, read_chunk, scratch_error
from prep.workers import Progress, Workers, run
from shards.errors import UsageError
from shards.files import remove_quietly, temporary
from shards.parallel import run_threads
from shards.publish import FOLDER
from shards.storage import Storage

_SENT = f"{FOLDER}/chunks"
_MOST = 100_000
_PARALLEL = 8


@dataclass(frozen=True)
class Task:
    """One of the processes; by default the only one."""

    number: int = 1
    count: int = 1

    @property
    def alone(self) -> bool:
        return self.count == 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass(frozen=True)
class Unfinished:
    """A task's result if other tasks' chunks are not there: their numbers."""

    url: str
    late: list[int]


def parse_task(text: str) -> Task:
    """`2/5` -> the second of five.

    Raises:
        UsageError: another form, or no such task.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    task = Task(int(match[1]), int(match[2])) if match else Task(0)
    if not 1 <= task.number <= task.count <= _MOST:
        raise UsageError(f"--task {text[:40]}: give number and count, from 1/5 to 5/5 for five processes")
    return task


def owners(jobs: Iterable[ChunkJob], count: int) -> list[int]:
    """The number of the task of each job: about as many images each, next to each other in the raw data."""
    jobs = list(jobs)
    total, done, found = sum(job.images for job in jobs), 0, []
    for job in jobs:
        found.append(done * count // total + 1)
        done += job.images
    return found


class Chunks:
    """The finished chunks: in the scratch folder, and in the bucket through which tasks work together.

    Args:
        bucket: None: the tasks share the scratch folder, or there is only one.
        sends: whether this process puts its chunks into the bucket.
    """

    def __init__(self, scratch: Path, bucket: Storage | None, sends: bool) -> None:
        self._scratch, self._bucket = scratch, bucket
        self._target = bucket if sends else None
        self._sent = set() if bucket is None else {name.rpartition("/")[2] for name in bucket.names(_SENT)}

    def encode(self, jobs: Sequence[ChunkJob], workers: Workers, progress: Progress) -> None:
        """Make those of the jobs' chunks that are not there, or that lack a broken file, which may be mended."""
        progress.phase("encoding frames", sum(job.images for job in jobs), "images")
        missing = {job.name: job for job in jobs if not self._is_whole(job.name)}
        progress.advance(sum(job.images for job in jobs) - sum(job.images for job in missing.values()))
        work = encode_chunk if self._target is None else partial(_encode_and_send, self._target)
        for name in run(workers, work, missing.values()):
            progress.advance(missing[name].images)
            if self._target is not None:
                self._sent.add(name)

    def _is_whole(self, name: str) -> bool:
        chunk = None if self._target is not None else read_chunk(self._scratch / name)
        return name in self._sent or (chunk is not None and not chunk.broken)

    def late(self, jobs: Sequence[ChunkJob], owner: Sequence[int]) -> list[int]:
        """Numbers of the tasks that have not made all of their chunks yet."""
        if self._bucket is not None:
            self._sent |= {name.rpartition("/")[2] for name in self._bucket.names(_SENT)}
        there = self._sent | {path.name for path in self._scratch.glob("*.chunk")}
        return sorted({number for job, number in zip(jobs, owner, strict=True) if job.name not in there})

    def fetch(self, jobs: Sequence[ChunkJob]) -> None:
        """Copy the chunks that only the bucket has into the scratch folder.

        Raises:
            StorageError: the bucket fails, or the disk is full.
        """
        names = [job.name for job in jobs if job.name in self._sent and not (self._scratch / job.name).exists()]
        if self._bucket is not None:
            run_threads(partial(_fetch, self._bucket, self._scratch), names, _PARALLEL, self._bucket.cancel)


def _encode_and_send(bucket: Storage, job: ChunkJob) -> str:
    """As `encode_chunk`, into the bucket as well. Runs in a worker."""
    name = encode_chunk(job)
    bucket.write(f"{_SENT}/{name}", (job.folder / name).read_bytes())
    return name


def _fetch(bucket: Storage, scratch: Path, name: str) -> None:
    tmp = temporary(scratch / name)
    try:
        with tmp.open("wb") as file:
            file.writelines(bucket.stream(f"{_SENT}/{name}"))
        tmp.replace(scratch / name)
    except OSError as error:
        raise scratch_error(scratch, error) from error
    finally:
        remove_quietly(tmp)
