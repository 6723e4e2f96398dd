"""A dataset in a folder of this machine."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from shards.errors import StorageError
from shards.files import create_from, is_abandoned, open_regular, remove_quietly, temporary, write_atomic
from shards.storage import Stat, check_folder, check_name
from shards.storage.retry import MissingError

_CHUNK = 8 << 20


class LocalStorage:
    """A folder of this machine. Only regular files are read: a named pipe in their place is refused, not waited for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)

    def _path(self, name: str) -> Path:
        return self.folder / check_name(name)

    def read(self, name: str, limit: int) -> bytes | None:
        path = self._path(name)
        try:
            with open_regular(path) as file:
                data = file.read(limit + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise local_error(path, error) from error
        if len(data) > limit:
            raise StorageError(f"{path}: larger than {limit} bytes, refused")
        return data

    def read_range(self, name: str, start: int, size: int) -> bytes:
        path = self._path(name)
        try:
            with open_regular(path) as file:
                file.seek(start)
                return file.read(size)
        except FileNotFoundError as error:
            raise MissingError(str(path)) from error
        except OSError as error:
            raise local_error(path, error) from error

    def stream(self, name: str, start: int = 0) -> Iterator[bytes]:
        while data := self.read_range(name, start, _CHUNK):
            start += len(data)
            yield data

    def stat(self, name: str) -> Stat | None:
        path = self._path(name)
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise local_error(path, error) from error
        return Stat(found.st_size, f"{found.st_ino}-{found.st_mtime_ns}")

    def write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        try:
            write_atomic(path, data)
        except OSError as error:
            raise local_error(path, error) from error

    def create(self, name: str, data: bytes) -> bool:
        return self._create(self._path(name), lambda tmp: tmp.write_bytes(data))

    def create_file(self, name: str, path: Path, move: bool = False) -> bool:
        def fill(tmp: Path) -> None:
            if not move or not _linked(path, tmp):
                shutil.copyfile(path, tmp)

        created = self._create(self._path(name), fill)
        if created and move:
            path.unlink()
        return created

    def _create(self, path: Path, fill: Callable[[Path], object]) -> bool:
        tmp = temporary(path)
        try:
            if path.exists():
                return False
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                fill(tmp)
                return create_from(tmp, path)
            finally:
                remove_quietly(tmp)
        except OSError as error:
            raise local_error(path, error) from error

    def names(self, prefix: str) -> list[str]:
        folder = self._path(prefix) if prefix else self.folder
        try:
            files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".tmp")]
        except OSError as error:
            raise local_error(folder, error) from error
        return sorted(path.relative_to(self.folder).as_posix() for path in files)

    def children(self, prefix: str) -> tuple[list[str], list[str]]:
        folder = self.folder / check_folder(prefix) if prefix else self.folder
        try:
            entries = sorted(folder.iterdir())
            folders = {entry.name for entry in entries if entry.is_dir()}
        except (FileNotFoundError, NotADirectoryError):
            return [], []
        except OSError as error:
            raise local_error(folder, error) from error
        return [e.name for e in entries if e.name not in folders], sorted(folders)

    def cancel(self) -> None:
        """No call waits here."""

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            path = self._path(name)
            try:
                path.unlink(missing_ok=True)
                self._remove_empty(path.parent)
            except OSError as error:
                raise local_error(path, error) from error

    def sweep(self) -> None:
        try:
            for path in [path for path in self.folder.rglob(".*.tmp") if is_abandoned(path)]:
                path.unlink(missing_ok=True)
                self._remove_empty(path.parent)
        except OSError as error:
            raise local_error(self.folder, error) from error

    def _remove_empty(self, folder: Path) -> None:
        """Remove empty folders up to the storage's own: object storage has none."""
        while folder != self.folder and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def _linked(path: Path, tmp: Path) -> bool:
    """Make `tmp` a hard link of `path`; return False across file systems, or if there are no hard links."""
    try:
        os.link(path, tmp)
    except OSError:
        return False
    return True


_ADVICE = {
    errno.ENOSPC: "free some space and run it again: finished files are kept",
    errno.EDQUOT: "free some space and run it again: finished files are kept",
    errno.EACCES: "check its permissions, or choose another folder",
    errno.EPERM: "check its permissions, or choose another folder",
    errno.EROFS: "choose another folder",
    errno.ENOTDIR: "choose another folder",
}


def local_error(path: Path, error: OSError) -> StorageError:
    """Return a failure of the local disk as an error of one line that says what to do."""
    cause, advice = error.strerror or str(error), _ADVICE.get(error.errno or 0)
    return StorageError(f"{path}: {cause}; {advice}" if advice else f"{path}: {cause}")
