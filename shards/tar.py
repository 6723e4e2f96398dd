"""Tar shards and their DALI index: written deterministically, read without trust in their content.

    with ShardWriter(folder / "train" / "000000.tar") as writer:
        writer.add(sample)
    for sample in read_samples(folder / "train" / "000000.tar"): ...

The tars are plain WebDataset: USTAR, the files of one key adjacent, the component's name after the first dot. The index
has DALI's format v1.2, byte for byte as its `wds2idx` writes it.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from shards.errors import DatasetError, first_line
from shards.files import fsync_folder, open_regular, remove_quietly, replace, sha256_file
from shards.manifest import Shard
from shards.sample import Sample

MAX_COMPONENT_BYTES = 256 << 20
"""A component larger than this is refused, by the writer and before a reader allocates it."""
MAX_SAMPLE_BYTES = 1 << 30
MAX_COMPONENTS = 1000
"""Components of one sample; a manifest has at most 100 frames."""
MAX_ENTRIES = 400_000
"""Components in one shard; each takes some 300 bytes of memory."""
_MAX_HEADER_BYTES = 1 << 20
"""Of GNU's and PAX's long names and attributes, whose length the tar itself claims."""
_BLOCK = tarfile.BLOCKSIZE
_NAME_BYTES = 100
_MAX_ATTRIBUTES = 1000
_COMPONENT = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_MEMBER = re.compile(rf"(?:\./)?([A-Za-z0-9_-]+)\.({_COMPONENT.pattern})")
"""Key and component; some tools put `./` in front."""
_INDEX_VERSION = "v1.2"
_DIGITS = re.compile(r"0|[1-9][0-9]{0,14}")
_BROKEN = (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError)
"""Exceptions of tarfile at malformed headers."""


class IndexEntry(NamedTuple):
    """One component of one sample: extension, offset of its data in the tar, size, both in bytes, and file name."""

    component: str
    offset: int
    size: int
    name: str


class ShardWriter:
    """Writes one tar, with webdataset's writer, and beside it its index; the same samples give the same bytes.

    Headers have mtime 0, uid and gid 0, no user and group, and mode 0644; components are sorted. Until `close` both
    files have the ending `.tmp`: a shard under its own name is whole. The writer takes 1.1 ms of CPU for a sample of
    seven files and 300 kB, of some 46 ms that packing a KITTI sample takes.

    Args:
        tar_path: the tar, `…/train/000000.tar`; the index is `….idx` beside it. Its folder is created. Existing files
            are replaced.
    """

    def __init__(self, tar_path: Path) -> None:
        from webdataset.writer import TarWriter  # imports torch, which readers of shards do not need

        self.tar_path = tar_path
        self.index_path = tar_path.with_suffix(".idx")
        tar_path.parent.mkdir(parents=True, exist_ok=True)
        self._tar_tmp = tar_path.with_name(tar_path.name + ".tmp")
        self._index_tmp = self.index_path.with_name(self.index_path.name + ".tmp")
        self._file = self._tar_tmp.open("wb")
        self._writer = TarWriter(self._file, encoder=False, user="", group="", mode=0o644, mtime=0)
        # tarfile hands on 10 kB at a time, which takes a third longer.
        stream = self._writer.tarstream
        stream.copybufsize = stream.fileobj.bufsize = 1 << 16
        self._keys: set[str] = set()
        self._entries: list[list[IndexEntry]] = []
        self._shard: Shard | None = None

    @property
    def samples(self) -> int:
        """Samples added so far."""
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Size of the tar so far, without its end mark."""
        return int(self._writer.tarstream.offset)

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
        entries, offset = [], self.bytes
        for component, data in components:
            entries.append(IndexEntry(component, offset + _BLOCK, len(data), f"{sample.key}.{component}"))
            offset += _BLOCK + -(-len(data) // _BLOCK) * _BLOCK
        self._writer.write({"__key__": sample.key, **sample.components})
        if self.bytes != offset:
            raise RuntimeError(f"{self.tar_path}: webdataset's writer is at {self.bytes}, the index at {offset}")
        self._keys.add(sample.key)
        self._entries.append(entries)

    def close(self) -> Shard:
        """Finish both files, sync them to disk and give them their names; return the manifest's entry.

        Raises:
            ValueError: the shard is empty (nothing is left of it), or its path is not `…/train/000000.tar`.
        """
        if self._shard is not None:
            return self._shard
        if not self._entries:
            self.abort()
            raise ValueError(f"{self.tar_path}: a shard without samples; DALI cannot read one")
        self._writer.close()
        self._file.close()
        index = format_index(self._entries)
        shard = Shard(
            name=f"{self.tar_path.parent.name}/{self.tar_path.name}",
            samples=len(self._entries),
            bytes=self._tar_tmp.stat().st_size,
            sha256=sha256_file(self._tar_tmp),
            index_bytes=len(index),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )
        self._index_tmp.write_bytes(index)
        # The index first: a tar under its own name then always has its index.
        replace(self._index_tmp, self.index_path)
        replace(self._tar_tmp, self.tar_path)
        fsync_folder(self.tar_path.parent)
        self._shard = shard
        return shard

    def abort(self) -> None:
        """Remove the unfinished shard; without effect after `close`."""
        with suppress(OSError, ValueError):  # on a full disk closing fails, too
            self._writer.close()
        with suppress(OSError):
            self._file.close()
        remove_quietly(self._tar_tmp)
        remove_quietly(self._index_tmp)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _check_sample(key: str, components: list[tuple[str, bytes]]) -> None:
    """Refuse a sample that DALI's index or a tar reader would misread, before any of it is written."""
    if not components:
        raise ValueError(f"sample {key}: no components")
    if len(components) > MAX_COMPONENTS:
        raise ValueError(f"sample {key}: {len(components)} components, at most {MAX_COMPONENTS}")
    total = 0
    for component, data in components:
        name = f"{key}.{component}"
        if not _COMPONENT.fullmatch(component):
            raise ValueError(f"component {component!r} of sample {key}: only letters, digits, '.', '_' and '-'")
        if component.startswith("_"):
            raise ValueError(f"component {component!r} of sample {key}: webdataset keeps names with a leading '_'")
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
    """Return DALI's index v1.2: a line with the number of samples, then one line a sample."""
    lines = [f"{_INDEX_VERSION} {len(samples)}"]
    lines += [" ".join(f"{e.component} {e.offset} {e.size} {e.name}" for e in entries) for entries in samples]
    return ("\n".join(lines) + "\n").encode("ascii")


def parse_index(data: bytes, where: str) -> list[list[IndexEntry]]:
    """Return the entries of an index, one list a sample; `where` goes into messages.

    Raises:
        DatasetError: not an index v1.2; too large; its lines do not match the count in its first line; or a name that
            is not `key.component`, a key of another sample, or a component twice in one sample.
    """
    if data.count(b" ") > 4 * MAX_ENTRIES or data.count(b"\n") > MAX_ENTRIES:
        raise DatasetError(f"{where}: more than {MAX_ENTRIES:,} components, refused")
    try:
        header, *lines = data.decode("ascii").splitlines()
        version, count = header.split(" ")
        announced = _number(count)
        samples = [_parse_index_line(line) for line in lines]
        if len({_split_name(entries[0].name)[0] for entries in samples}) != len(samples):
            raise ValueError("a key twice")
    except ValueError as error:
        raise DatasetError(f"{where}: not a DALI index ({first_line(error)}); pack or pull the shard again") from error
    if version != _INDEX_VERSION or announced != len(samples):
        raise DatasetError(
            f"{where}: {version[:10]} index announces {announced} samples and lists {len(samples)}; pack or pull the "
            "shard again"
        )
    return samples


def check_index(data: bytes | None, shard: Shard, where: str) -> list[list[IndexEntry]]:
    """Return the entries of a shard's index, after a comparison with its manifest entry.

    Raises:
        DatasetError: it is missing (None), or differs; as `parse_index`.
    """
    again = "; md2 shards verify checks all files, then pack or pull the dataset again"
    if data is None:
        raise DatasetError(f"{where}: missing, though the manifest lists it{again}")
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise DatasetError(f"{where}: its sha256 is not the manifest's{again}")
    samples = parse_index(data, where)
    if len(samples) != shard.samples:
        raise DatasetError(f"{where}: {len(samples)} samples, the manifest says {shard.samples}{again}")
    if any(entry.offset + entry.size > shard.bytes for entries in samples for entry in entries):
        raise DatasetError(f"{where}: points beyond the end of {shard.name}{again}")
    return samples


def _parse_index_line(line: str) -> list[IndexEntry]:
    words = line.split(" ")
    if len(words) % 4:
        raise ValueError(f"{len(words)} words in a line, not a multiple of 4")
    fields = zip(words[0::4], words[1::4], words[2::4], words[3::4], strict=True)
    entries = [IndexEntry(component, _number(offset), _number(size), name) for component, offset, size, name in fields]
    key = _split_name(entries[0].name)[0]
    for entry in entries:
        if _split_name(entry.name) != (key, entry.component):
            raise ValueError(f"component {entry.component!r} of a file {entry.name!r}, in the line of {key!r}")
    if len({entry.component for entry in entries}) != len(entries):
        raise ValueError(f"a component of {key!r} twice")
    return entries


def _number(word: str) -> int:
    if not _DIGITS.fullmatch(word):
        raise ValueError(f"{word[:20]!r} is not an offset, size or count")
    return int(word)


def build_index(tar_path: Path) -> bytes:
    """Return the index of a tar, from its headers.

    Raises:
        DatasetError: as `read_samples`, or more than `MAX_ENTRIES` components.
    """
    samples, count = [], 0
    with _open_tar(tar_path) as tar:
        for _, entries in _groups(tar, tar_path):
            count += len(entries)
            if count > MAX_ENTRIES:
                raise DatasetError(f"{tar_path}: more than {MAX_ENTRIES:,} components, refused")
            samples.append(entries)
    return format_index(samples)


def read_samples(tar_path: Path) -> Iterator[Sample]:
    """Yield all samples of a WebDataset tar, in order, whichever tool wrote it.

    Member names become keys and component names only; they are never used as paths.

    Raises:
        DatasetError: not a tar, truncated, a member that is not a plain file, a name that is not `key.component`, a
            key that comes twice, or a size beyond `MAX_COMPONENT_BYTES` or the tar itself.
    """
    with _open_tar(tar_path) as tar, open_regular(tar_path) as file:
        for key, entries in _groups(tar, tar_path):
            yield Sample(key, {e.component: _read(file, e, tar_path) for e in entries})


@contextmanager
def _open_tar(tar_path: Path) -> Iterator[tarfile.TarFile]:
    try:
        file = open_regular(tar_path)
    except OSError as error:
        raise DatasetError(f"{tar_path}: cannot be read ({error.strerror or error})") from error
    with file:
        try:
            # No compression: a small file must not unpack into a large one.
            tar = tarfile.TarFile(fileobj=_Headers(file), mode="r")  # type: ignore[arg-type]
        except _BROKEN as error:
            raise DatasetError(f"{tar_path}: not a tar shard ({error}); pack or pull it again") from error
        with tar:
            yield tar


class _Headers:
    """A tar's headers for tarfile, with a bound on the lengths that they claim."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes.

        Raises:
            tarfile.ReadError: more than any header has.
        """
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _groups(tar: tarfile.TarFile, tar_path: Path) -> Iterator[tuple[str, list[IndexEntry]]]:
    """Yield (key, components) of each run of members with one key, after a check of names, counts and sizes."""
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
    """Refuse a tar without zero blocks at its end: tarfile accepts one that is cut off between two files."""
    with tar_path.open("rb") as file:
        file.seek(tar.offset)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise DatasetError(f"{tar_path}: truncated, or other data follow; pack or pull it again")


def _members(tar: tarfile.TarFile, tar_path: Path) -> Iterator[tarfile.TarInfo]:
    try:
        for member in tar:
            if not member.isdir():
                yield member
            tar.members.clear()  # type: ignore[attr-defined]  # else every header stays in memory
            if len(tar.pax_headers) > _MAX_ATTRIBUTES:
                raise tarfile.ReadError(f"more than {_MAX_ATTRIBUTES} global attributes")
    except _BROKEN as error:
        raise DatasetError(f"{tar_path}: broken or truncated tar ({error}); pack or pull it again") from error


def _split_name(name: str) -> tuple[str, str]:
    """Return key and component of a file in a tar.

    Raises:
        ValueError: the name has another form, or could be read as a path.
    """
    match = _MEMBER.fullmatch(name)
    if match is None:
        raise ValueError(
            f"name {name[:_NAME_BYTES]!r} is not of the form 'key.component' (letters, digits, '_' and '-')"
        )
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
