"""File locks between processes (flock): the kernel releases them when a process ends, however it ends.

`filelock` has no shared lock on a plain file (its read-write lock is an SQLite database), and does not report who holds
a lock; the cache needs both.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from shards.errors import StorageError

_POLL = 0.05


class FileLock:
    """A lock on a file that exists only for it, and that nothing but `remove` may delete.

    Each object is a holder of its own, threads of one process included.

    Args:
        advice: what to do if the file system has no locks.
    """

    def __init__(self, path: Path, advice: str = "use a local disk (MD2_CACHE names the cache's folder)") -> None:
        self.path, self._advice = path, advice
        self._descriptor: int | None = None

    def try_acquire(self, *, shared: bool = False) -> bool:
        """Take the lock unless another holder excludes that; return whether it was taken.

        Raises:
            OSError: the lock's file cannot be made.
            StorageError: the file system has no locks (such as NFS without a lock daemon).
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError as error:
            os.close(descriptor)
            reason = error.strerror or error
            raise StorageError(f"{self.path}: no file locks on this file system ({reason}); {self._advice}") from error
        if not _is_at(descriptor, self.path):  # removed since it was opened: whoever comes next locks a new file
            os.close(descriptor)
            return self.try_acquire(shared=shared)
        self._descriptor = descriptor
        if not shared:
            with suppress(OSError):  # the holder's number is only for messages; the disk may be full
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        return True

    def acquire(self, seconds: float, *, shared: bool = False) -> Self:
        """Wait for the lock.

        Raises:
            StorageError: not within `seconds` (names the process that holds it), or there are no locks.
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
        """Return the last process that took the lock for itself: `process 123`."""
        with suppress(OSError, ValueError):  # gone, or just written
            if self.path.is_file():
                return f"process {int(self.path.read_text())}"
        return "another process"

    def release(self) -> None:
        """Give the lock back; without effect if it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def remove(self) -> None:
        """Delete the lock's file unless somebody holds the lock."""
        if self.try_acquire():
            with suppress(OSError):
                self.path.unlink()
            self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
