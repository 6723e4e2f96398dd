"""File locks between processes (flock): the kernel lets go of them when a process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from shards.errors import StorageError

_POLL = 0.05


class FileLock:
    """A lock on a file that exists for nothing else and is never deleted.

    Each object is a holder of its own, threads of one process included.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def try_acquire(self, *, shared: bool = False) -> bool:
        """Take the lock unless another holder excludes that."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        if not shared:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        return True

    def acquire(self, seconds: float, *, shared: bool = False) -> Self:
        """Wait for the lock.

        Raises:
            StorageError: not within `seconds`; names the process that holds it.
        """
        deadline = time.monotonic() + seconds
        while not self.try_acquire(shared=shared):
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{self.path}: {self.holder()} has held this lock for {seconds:.0f} s; is it stopped?"
                )
            time.sleep(_POLL)
        return self

    def holder(self) -> str:
        """`process 123`, whoever took the lock last."""
        try:
            return f"process {int(self.path.read_text())}"
        except (OSError, ValueError):
            return "another process"

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
