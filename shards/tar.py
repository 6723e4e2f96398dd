"""Tar shards and their DALI index: written deterministically, read without trusting them.

    with ShardWriter(folder / "train" / "000000.tar") as writer:
        writer.add(sample)
    for sample in read_samples(folder / "train" / "000000.tar"): ...

The tars are plain WebDataset: USTAR, the files of one key adjacent, the component's name after the
first dot. The index is DALI's own format v1.2, byte for byte what its `wds2idx` writes.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

from shards.errors import DatasetError
from shards.files import fsync_folder, replace
from shards.sample import Sample

MAX_COMPONENT_BYTES = 256 << 20
"""A component larger than this is refused, by the writer and before a reader allocates it."""
MAX_SAMPLE_BYTES = 1 << 30
MAX_COMPONENTS = 1000
"""Of one sample; a manifest has 100 frames at most."""
MAX_INDEX_BYTES = 32 << 20
"""Some 300,000 components."""
_MAX_HEADER_BYTES = 1 << 20
"""GNU's and PAX's long names and attributes come as blocks of a length that the tar claims."""
_BLOCK = tarfile.BLOCKSIZE
_NAME_BYTES = 100
_COMPONENT = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_MEMBER = re.compile(rf"(?:\./)?([A-Za-z0-9_-]+)\.({_COMPONENT.pattern})")
"""Key and component; some tools put `./` in front."""
_INDEX_VERSION = "v1.2"
_NUMBERS = range(1 << 50)
_BROKEN = (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError)
"""What tarfile raises at headers that are none."""


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says about one shard, besides its name."""

    samples: int
    bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str


class IndexEntry(NamedTuple):
    """One component of one sample: extension, offset of its data in the tar, size, both in bytes, and file name."""

    component: str
    offset: int
    size: int
    name: str


class ShardWriter:
    """Writes one tar and, beside it, its index; the same samples give the same bytes.

    Headers are USTAR with mtime 0, uid and gid 0 and mode 0644; components stand in sorted order. Until
    `close` both files carry the ending `.tmp`: a shard under its own name is whole.

    Args:
        tar_path: where the tar goes, `….tar`; the index goes to `….idx`. Its folder is created. What is
            there already is replaced.
    """

    def __init__(self, tar_path: Path) -> None:
        self.tar_path = tar_path
        self.index_path = tar_path.with_suffix(".idx")
        tar_path.parent.mkdir(parents=True, exist_ok=True)
        self._tar_tmp = tar_path.with_name(tar_path.name + ".tmp")
        self._index_tmp = self.index_path.with_name(self.index_path.name + ".tmp")
        self._file = _HashingFile(self._tar_tmp.open("wb"))
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[arg-type]
        self._keys: set[str] = set()
        self._entries: list[list[IndexEntry]] = []
        self._info: ShardInfo | None = None

    @property
    def samples(self) -> int:
        """Samples added so far."""
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Size of the tar so far, without its end mark."""
        return self._tar.offset

    def add(self, sample: Sample) -> None:
        """Append one sample.

        Raises:
            ValueError: a component name, a name's length or a size that DALI or `tar` would misread, an empty
                component, or a key that is in this shard already.
        """
        if sample.key in self._keys:
            raise ValueError(f"sample key {sample.key!r} is in {self.tar_path.name} already")
        components = sorted(sample.components.items())
        _check_sample(sample.key, components)
        entries, pieces, offset = [], list[bytes](), self._tar.offset
        for component, data in components:
            name = f"{sample.key}.{component}"
            padding = bytes(-len(data) % _BLOCK)
            pieces += (tar_header(name, len(data)), data, padding)
            entries.append(IndexEntry(component, offset + _BLOCK, len(data), name))
            offset += _BLOCK + len(data) + len(padding)
        # A sample at a time: hashing and writing two dozen pieces one by one takes twice as long.
        self._file.write(b"".join(pieces))
        self._tar.offset = offset
        self._keys.add(sample.key)
        self._entries.append(entries)

    def close(self) -> ShardInfo:
        """Finish both files, sync them to disk and give them their names.

        Raises:
            ValueError: the shard is empty; nothing is left of it.
        """
        if self._info is not None:
            return self._info
        if not self._entries:
            self.abort()
            raise ValueError(f"{self.tar_path}: a shard without samples; DALI cannot read one")
        self._tar.close()
        self._file.close()
        index = format_index(self._entries)
        self._index_tmp.write_bytes(index)
        # The index first: a tar under its own name then always has its index.
        replace(self._index_tmp, self.index_path)
        replace(self._tar_tmp, self.tar_path)
        fsync_folder(self.tar_path.parent)
        self._info = ShardInfo(
            samples=len(self._entries),
            bytes=self._file.position,
            sha256=self._file.sha256.hexdigest(),
            index_bytes=len(index),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )
        return self._info

    def abort(self) -> None:
        """Leave nothing of the unfinished shard."""
        try:
            self._file.close()  # on a full disk this fails, too
        finally:
            self._tar_tmp.unlink(missing_ok=True)
            self._index_tmp.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


_HEADER = bytes(tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT))
_SIZE, _CHECKSUM, _CHECKSUM_END = 124, 148, 156


def tar_header(name: str, size: int) -> bytes:
    """What `tarfile` writes for a plain file of mode 0644 and time 0; name below 100 ASCII characters.

    Patched into a template: a shard has thousands of small files, and `tarfile` takes 50 microseconds for each.
    """
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode("ascii")
    header[_SIZE : _SIZE + 11] = b"%011o" % size
    header[_CHECKSUM:_CHECKSUM_END] = b" " * 8
    header[_CHECKSUM:_CHECKSUM_END] = b"%06o\0 " % sum(header)
    return bytes(header)


class _HashingFile:
    """A file to write forward into, which knows its sha256 and its length (tarfile only ever writes forward)."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.position = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.position += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.position

    def close(self) -> None:
        self._file.close()


def _check_sample(key: str, components: list[tuple[str, bytes]]) -> None:
    """Refuse what DALI's index or a tar reader would misread, before anything of the sample is written."""
    if not components:
        raise ValueError(f"sample {key}: no components")
    if len(components) > MAX_COMPONENTS:
        raise ValueError(f"sample {key}: {len(components)} components, at most {MAX_COMPONENTS}")
    total = 0
    for component, data in components:
        name = f"{key}.{component}"
        if not _COMPONENT.fullmatch(component):
            raise ValueError(f"component {component!r} of sample {key}: only letters, digits, '.', '_' and '-'")
        if len(name) >= _NAME_BYTES:
            raise ValueError(f"file name {name!r}: {len(name)} characters; a tar and DALI take under {_NAME_BYTES}")
        if not data:
            raise ValueError(f"component {component!r} of sample {key} is empty, which DALI reads as missing")
        if len(data) > MAX_COMPONENT_BYTES:
            raise ValueError(f"component {component!r} of {key}: {len(data)} bytes, at most {MAX_COMPONENT_BYTES}")
        total += len(data)
    if total > MAX_SAMPLE_BYTES:
        raise ValueError(f"sample {key}: {total} bytes, at most {MAX_SAMPLE_BYTES}")


def format_index(samples: list[list[IndexEntry]]) -> bytes:
    """DALI's index v1.2: a line with the number of samples, then one line a sample."""
    lines = [f"{_INDEX_VERSION} {len(samples)}"]
    lines += [" ".join(f"{e.component} {e.offset} {e.size} {e.name}" for e in entries) for entries in samples]
    return ("\n".join(lines) + "\n").encode("ascii")


def parse_index(data: bytes, where: str) -> list[list[IndexEntry]]:
    """The entries of an index, one list a sample; `where` goes into the message.

    Raises:
        DatasetError: not an index v1.2, its lines do not fit the count in its first line, or a name that is no
            `key.component`: DALI hands the names on, and keys become names of files.
    """
    try:
        header, *lines = data.decode("ascii").splitlines()
        version, count = header.split()
        announced = int(count)
        samples = [_parse_index_line(line) for line in lines]
    except ValueError as error:
        raise DatasetError(f"{where}: not a DALI index ({error}); pack or pull the shard again") from error
    if version != _INDEX_VERSION or announced != len(samples):
        raise DatasetError(
            f"{where}: {version} index announces {count} samples and lists {len(samples)}; pack or pull the shard again"
        )
    return samples


def _parse_index_line(line: str) -> list[IndexEntry]:
    words = line.split(" ")
    if len(words) % 4:
        raise ValueError(f"{len(words)} words in a line, not a multiple of 4")
    fields = zip(words[0::4], words[1::4], words[2::4], words[3::4], strict=True)
    entries = [IndexEntry(component, int(offset), int(size), name) for component, offset, size, name in fields]
    if any(number not in _NUMBERS for entry in entries for number in (entry.offset, entry.size)):
        raise ValueError("an offset or size that no tar has")
    for entry in entries:
        if _split_name(entry.name)[1] != entry.component:
            raise ValueError(f"component {entry.component!r} of a file {entry.name!r}")
    return entries


def build_index(tar_path: Path) -> bytes:
    """The index of a tar that another tool wrote.

    Raises:
        DatasetError: as `read_samples`.
    """
    with _open_tar(tar_path) as tar:
        return format_index([entries for _, entries in _groups(tar, tar_path)])


def read_samples(tar_path: Path) -> Iterator[Sample]:
    """All samples of a tar, in order. Any WebDataset tar will do, whichever tool wrote it.

    Member names become keys and component names and nothing else; they are never used as paths.

    Raises:
        DatasetError: not a tar, truncated, a member that is no plain file, a name that is no `key.component`, a
            key that comes twice, or a size beyond `MAX_COMPONENT_BYTES` or the tar itself.
    """
    with _open_tar(tar_path) as tar, tar_path.open("rb") as file:
        for key, entries in _groups(tar, tar_path):
            yield Sample(key, {e.component: _read(file, e, tar_path) for e in entries})


@contextmanager
def _open_tar(tar_path: Path) -> Iterator[tarfile.TarFile]:
    try:
        file = tar_path.open("rb")
    except OSError as error:
        raise DatasetError(f"{tar_path}: cannot be read ({error.strerror or error})") from error
    with file:
        try:
            # Taken as it is, without compression: a small file must not unpack into a large one.
            tar = tarfile.TarFile(fileobj=_Headers(file), mode="r")  # type: ignore[arg-type]
        except _BROKEN as error:
            raise DatasetError(f"{tar_path}: not a tar shard ({error}); pack or pull it again") from error
        with tar:
            yield tar


class _Headers:
    """A tar as tarfile sees it here: headers, of which it must not believe any length they claim."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """At most `size` bytes.

        Raises:
            tarfile.ReadError: more than any header has.
        """
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _groups(tar: tarfile.TarFile, tar_path: Path) -> Iterator[tuple[str, list[IndexEntry]]]:
    """(key, components) of each run of members with one key, after checking names, numbers and sizes."""
    tar_bytes = tar_path.stat().st_size
    seen: set[str] = set()
    current, entries = "", list[IndexEntry]()
    for member in _members(tar, tar_path):
        try:
            key, component = _split_name(member.name)
        except ValueError as error:
            raise DatasetError(f"{tar_path}: {error}") from error
        _check_member(member, tar_bytes, tar_path)
        if key != current:
            if entries:
                yield current, entries
            if key in seen:
                raise DatasetError(f"{tar_path}: the files of sample {key!r} are not adjacent, or the key comes twice")
            seen.add(key)
            current, entries = key, []
        if any(e.component == component for e in entries):
            raise DatasetError(f"{tar_path}: sample {key!r} has two components {component!r}")
        if len(entries) == MAX_COMPONENTS:
            raise DatasetError(f"{tar_path}: sample {key!r} has more than {MAX_COMPONENTS} components")
        entries.append(IndexEntry(component, member.offset_data, member.size, member.name))
        if sum(e.size for e in entries) > MAX_SAMPLE_BYTES:
            raise DatasetError(f"{tar_path}: sample {key!r} is larger than {MAX_SAMPLE_BYTES} bytes")
    if entries:
        yield current, entries
    _check_end(tar, tar_path)


def _check_end(tar: tarfile.TarFile, tar_path: Path) -> None:
    """A tar ends with zero blocks; tarfile takes one that is cut off between two files or in a header for whole."""
    with tar_path.open("rb") as file:
        file.seek(tar.offset)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise DatasetError(f"{tar_path}: truncated, or followed by something else; pack or pull it again")


def _members(tar: tarfile.TarFile, tar_path: Path) -> Iterator[tarfile.TarInfo]:
    try:
        for member in tar:
            if not member.isdir():
                yield member
            tar.members.clear()  # type: ignore[attr-defined]  # else every header read so far stays in memory
    except _BROKEN as error:
        raise DatasetError(f"{tar_path}: broken or truncated tar ({error}); pack or pull it again") from error


def _split_name(name: str) -> tuple[str, str]:
    """Key and component of a file in a tar.

    Raises:
        ValueError: it is not of that form, or could be read as a path.
    """
    match = _MEMBER.fullmatch(name)
    if match is None:
        raise ValueError(f"name {name!r} is not of the form 'key.component' (letters, digits, '_' and '-')")
    return match[1], match[2]


def _check_member(member: tarfile.TarInfo, tar_bytes: int, tar_path: Path) -> None:
    if not member.isreg() or member.issparse():
        raise DatasetError(f"{tar_path}: member {member.name!r} is not a plain file")
    if not 0 <= member.size <= MAX_COMPONENT_BYTES:
        raise DatasetError(f"{tar_path}: member {member.name!r}: {member.size} bytes, at most {MAX_COMPONENT_BYTES}")
    if member.offset_data + member.size > tar_bytes:
        raise DatasetError(f"{tar_path}: truncated within {member.name!r}; pack or pull it again")


def _read(file: IO[bytes], entry: IndexEntry, tar_path: Path) -> bytes:
    file.seek(entry.offset)
    data = file.read(entry.size)
    if len(data) != entry.size:
        raise DatasetError(f"{tar_path}: truncated within {entry.name!r}; pack or pull it again")
    return data
