"""Files that are whole or absent: written beside, synced, renamed; and how to recognise those of killed processes."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from shards.errors import StorageError, UsageError

_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{12})-(\d+)-(\d+)-[0-9a-f]{12}\.tmp")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z0-9+.-]+)*:/")
"""Also as a `Path`, which makes one slash of two."""
CACHE_FOLDER = "MD2_CACHE"
"""Environment variable: the folder of downloads, cached datasets and unfinished work that has no other place."""


def expanded(path: Path) -> Path:
    """Return a path whose `~` or `~USER` is the home folder.

    Raises:
        UsageError: there is none: no such user, or a process without HOME whose user has no entry.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        advice = f"set HOME, or {CACHE_FOLDER} for the cache"
        raise UsageError(f"{path}: no home folder is known for {path.parts[0]}; {advice}") from error


def cache_folder() -> Path:
    """Return the folder that `MD2_CACHE` names; without it, `md2` in the user's cache folder.

    Raises:
        UsageError: as `expanded`.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(Path(os.environ.get(CACHE_FOLDER) or Path(base) / "md2"))


def require_local(path: Path) -> None:
    """Refuse a URL in the place of a local path: it would become a folder of that name, credentials included.

    Raises:
        UsageError: it begins like a URL, or as `require_possible`.
    """
    if _URL.match(str(path)):
        raise UsageError(f"{path}: a URL, but this must be a local file or folder")
    require_possible(path)


def require_possible(path: Path) -> None:
    """Refuse what no file system can have.

    Raises:
        UsageError: a NUL in it, or a name too long.
    """
    try:
        os.lstat(path)
    except ValueError as error:
        raise UsageError(f"{str(path)!r}: no path can hold a NUL character") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(f"{str(path)[:60]}...: {os.strerror(error.errno)}") from error


class ProcessIdentity(NamedTuple):
    """A process, told apart from all others, also from one in another container or after a reboot.

    `machine` is a hash of host name, boot id and process namespace: process ids have a meaning only within it.
    `started` is the process's start time in clock ticks since boot, because process ids are used again; 0: not known.
    """

    machine: str
    process: int
    started: int

    @classmethod
    def own(cls) -> ProcessIdentity:
        """Return the identity of this process."""
        return cls(_machine(), os.getpid(), _start_time(os.getpid()) or 0)

    def has_ended(self) -> bool:
        """Return True if the process has certainly ended; False also if it belongs to another machine."""
        if self.machine != _machine():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):  # another user's process, or a number that no process can have
            pass
        started = _start_time(self.process)
        return bool(self.started and started and started != self.started)


@cache
def _machine() -> str:
    words = [socket.gethostname()]
    with suppress(OSError):  # outside Linux
        words.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        words.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]


def _start_time(process: int) -> int | None:
    """Clock ticks from boot to the start of a process; None if it is not known."""
    try:
        # The name of the program, in brackets, may hold anything; the fields after it are numbers.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def temporary(path: Path) -> Path:
    """Return a name beside `path` that no other process uses and that holds this process's identity.

    The first such name in a folder removes what killed processes left there.

    Raises:
        OSError: the path is a folder without a name, `/` or `.`.
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    _sweep_once(path.parent)
    machine, process, started = ProcessIdentity.own()
    return path.with_name(f".{path.name}.{machine}-{process}-{started}-{uuid.uuid4().hex[:12]}.tmp")


def is_abandoned(path: Path) -> bool:
    """Return whether `temporary` made the name in a process of this machine that has ended since."""
    made = _TEMPORARY.fullmatch(path.name)
    return made is not None and ProcessIdentity(made[1], int(made[2]), int(made[3])).has_ended()


def sweep(folder: Path, pattern: str = ".*.tmp", *, held: bool = False) -> list[Path]:
    """Remove the files and folders that killed processes left under names of `temporary`; return their paths.

    Args:
        pattern: which of them (`Path.glob`).
        held: the caller holds the folder, so that those of other machines have been left as well.
    """
    removed = []
    with suppress(OSError):
        for path in [path for path in folder.glob(pattern) if is_abandoned(path) or (held and _is_temporary(path))]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                remove_quietly(path)
            removed.append(path)
    return removed


@cache
def _sweep_once(folder: Path) -> None:
    sweep(folder)


def _is_temporary(path: Path) -> bool:
    return _TEMPORARY.fullmatch(path.name) is not None


@contextmanager
def scratch_folder(name: str, parent: Path | None = None) -> Iterator[Path]:
    """Make a temporary folder for a `with` block, and remove those that killed processes left beside it.

    Args:
        name: what the folder is for, such as `md2-copy`.
        parent: where it is made; None: the system's temporary folder.
    """
    parent = parent or Path(tempfile.gettempdir())
    sweep(parent)
    folder = temporary(parent / name)
    folder.mkdir(mode=0o700, parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises:
        OSError: it cannot be opened, or is something else: reading from a named pipe or device may never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file, but a pipe, socket or device", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


class BoundedReader:
    """A file of which one call reads a limited number of bytes, for libraries that read as many as the file says."""

    def __init__(self, file: Any, most: int) -> None:
        self._file, self.most = file, most

    def read(self, size: int = -1) -> bytes:
        """Return `size` bytes, or with -1 as many as the limit allows.

        Raises:
            ValueError: more than the limit are wanted.
        """
        if size > self.most:
            raise ValueError(f"a part of it claims {size:,} bytes")
        data: bytes = self._file.read(self.most if size < 0 else size)
        return data

    def readline(self) -> bytes:
        """Return a line, or as much of it as the limit allows."""
        line: bytes = self._file.readline(self.most)
        return line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def bounded_zip(path: Path, most: int = 4 << 20) -> Iterator[zipfile.ZipFile]:
    """Open a zip whose directory has at most `most` bytes: a gigabyte of names would take ten in memory.

    Raises:
        OSError, ValueError, zipfile.BadZipFile: it cannot be read, has more, or is no zip.
    """
    with open_regular(path) as file:
        reader: Any = BoundedReader(file, most)
        with zipfile.ZipFile(reader) as archive:
            reader.most = sys.maxsize
            yield archive


def read_small(path: Path, most: int = 16 << 20) -> bytes:
    """Read a file that is small unless it is broken.

    Raises:
        OSError: it cannot be read, is not a regular file, or has more than `most` bytes.
    """
    with open_regular(path) as file:
        data = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    if data is None or len(data) > most:
        raise OSError(errno.EFBIG, f"larger than {most >> 20} MiB", str(path))
    return data


_FULL = "free some space, or choose another disk (MD2_CACHE for the cache), and run it again: finished files are kept"
_DENIED = "check its permissions, or choose another folder"
_ADVICE = {
    errno.ENOSPC: ("the disk is full", _FULL),
    errno.EDQUOT: ("the disk quota is used up", _FULL),
    errno.EFBIG: ("larger than this file system or process may write", _FULL),
    errno.EACCES: ("", _DENIED),
    errno.EPERM: ("", _DENIED),
    errno.EROFS: ("", "choose another folder"),
    errno.ENOTDIR: ("", "choose another folder"),
}


def disk_error(path: Path, error: OSError) -> StorageError:
    """Return a failure of the local disk as an error of one line that says what to do."""
    reason, (meaning, advice) = error.strerror or str(error), _ADVICE.get(error.errno or 0, ("", ""))
    cause = f"{meaning} ({reason})" if meaning else reason
    return StorageError(f"{path}: {cause}; {advice}" if advice else f"{path}: {cause}")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of a `with` block into `disk_error`."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries (renames, new files) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(tmp: Path, path: Path) -> None:
    """Sync `tmp` to disk and rename it to `path`, replacing an existing file.

    Raises:
        OSError: it fails, or `path` is a pipe or device: root could rename over /dev/null.
    """
    require_replaceable(path)
    with tmp.open("rb") as file:
        os.fsync(file.fileno())
    tmp.replace(path)


def require_replaceable(path: Path) -> None:
    """Refuse to put a file in the place of a pipe, socket or device.

    Raises:
        OSError: there is one.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "a pipe, socket or device, not a file", str(path))


def remove_quietly(path: Path) -> None:
    """Remove a file of one's own in a clean-up: a second failure must not hide the first."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = temporary(path)
    try:
        tmp.write_bytes(data)
        replace(tmp, path)
        fsync_folder(path.parent)
    finally:
        remove_quietly(tmp)


def create_from(tmp: Path, path: Path) -> bool:
    """Rename `tmp` to `path` unless `path` exists; return whether it was renamed.

    Of two processes that create the same path at once, one gets True.
    """
    with tmp.open("rb") as file:
        os.fsync(file.fileno())
    try:
        os.link(tmp, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: not exclusive, but a reader still sees whole files only
        if path.exists():
            return False
        tmp.replace(path)
    tmp.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return True


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file's content, read in pieces.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
