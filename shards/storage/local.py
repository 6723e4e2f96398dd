"""A dataset in a folder of this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.files import create_from, disk_errors, open_regular, remove_quietly, sweep, temporary, write_atomic
from shards.storage import Stat, Storage, check_folder, check_name
from shards.storage.retry import MissingError


class LocalStorage(Storage):
    """A folder of this machine. Only regular files are read: a named pipe in their place is refused, not waited for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)

    def _path(self, name: str) -> Path:
        return self.folder / check_name(name)

    def read_range(self, name: str, start: int, size: int) -> bytes:
        path = self._path(name)
        with _absent_is_missing(path), open_regular(path) as file:
            file.seek(start)
            return file.read(size)

    def stat(self, name: str) -> Stat | None:
        path = self._path(name)
        try:
            with _absent_is_missing(path):
                found = path.stat()
        except MissingError:
            return None
        return Stat(found.st_size, f"{found.st_ino}-{found.st_mtime_ns}")

    def write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with disk_errors(path):
            write_atomic(path, data)

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
        with disk_errors(path):
            if path.exists():
                return False
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                fill(tmp)
                return create_from(tmp, path)
            finally:
                remove_quietly(tmp)

    def names(self, prefix: str) -> list[str]:
        folder = self._path(prefix) if prefix else self.folder
        with disk_errors(folder):
            files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".tmp")]
        return sorted(path.relative_to(self.folder).as_posix() for path in files)

    def children(self, prefix: str) -> tuple[list[str], list[str]]:
        folder = self.folder / check_folder(prefix) if prefix else self.folder
        try:
            with _absent_is_missing(folder):
                entries = sorted(folder.iterdir())
                folders = {entry.name for entry in entries if entry.is_dir()}
        except MissingError:
            return [], []
        return [e.name for e in entries if e.name not in folders], sorted(folders)

    def cancel(self) -> None:
        """No call waits here."""

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            path = self._path(name)
            with disk_errors(path):
                path.unlink(missing_ok=True)
                self._remove_empty(path.parent)

    def sweep(self) -> None:
        with disk_errors(self.folder):
            for path in sweep(self.folder, "**/.*.tmp"):
                self._remove_empty(path.parent)

    def _remove_empty(self, folder: Path) -> None:
        """Remove empty folders up to the storage's own: object storage has none."""
        while folder != self.folder and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


@contextmanager
def _absent_is_missing(path: Path) -> Iterator[None]:
    with disk_errors(path):
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingError(str(path)) from error


def _linked(path: Path, tmp: Path) -> bool:
    """Make `tmp` a hard link of `path`; return False across file systems, or if there are no hard links."""
    try:
        os.link(path, tmp)
    except OSError:
        return False
    return True
