"""Tar shards: what is written, and what is read back whoever wrote it, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import sysconfig
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_data import make_samples

from shards import tar as tar_module
from shards.errors import DatasetError
from shards.files import create_from, temporary, write_atomic
from shards.sample import Sample
from shards.tar import ShardWriter, build_index, parse_index, read_samples

leaky = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
"""webdataset's reader does not close the files it opens."""


TRAIN = "train/000000.tar"


def write(path: Path, samples: list[Sample]) -> Path:
    """A shard below the folder `path`."""
    path = path / TRAIN
    with ShardWriter(path) as writer:
        for sample in samples:
            writer.add(sample)
    return path


def wds2idx(tar: Path, index: Path) -> bytes:
    """DALI's own tool."""
    tool = Path(sysconfig.get_path("scripts")) / "wds2idx"
    subprocess.run([str(tool), str(tar), str(index)], check=True, stdout=subprocess.DEVNULL)
    return index.read_bytes()


def test_index_is_byte_identical_to_dalis_own_tool(tmp_path: Path) -> None:
    sizes = [1, 511, 512, 513, 10_240, 100_000]  # around tar's block and record sizes
    samples = [Sample(f"k-{n}_l", {"0.jpg": os.urandom(n), "a.b.c": b"x" * (n // 2 + 1)}) for n in sizes]
    tar = write(tmp_path, samples)
    expected = wds2idx(tar, tmp_path / "dali.idx")
    assert tar.with_suffix(".idx").read_bytes() == expected
    assert build_index(tar) == expected


def test_shards_are_what_tarfile_writes(tmp_path: Path) -> None:
    samples = [Sample(f"k{n}", {"0.jpg": os.urandom(n), "k.f32": b"x" * 16}) for n in (1, 511, 512, 513, 10_240)]
    expected = io.BytesIO()
    with tarfile.TarFile(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for component, data in sample.components.items():
                info = tarfile.TarInfo(f"{sample.key}.{component}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert write(tmp_path, samples).read_bytes() == expected.getvalue()


def test_close_reports_the_files_as_they_are(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / TRAIN)
    for sample in make_samples(3):
        writer.add(sample)
    info = writer.close()
    tar, index = (tmp_path / TRAIN).read_bytes(), (tmp_path / "train/000000.idx").read_bytes()
    assert (info.name, info.index_name) == (TRAIN, "train/000000.idx")
    assert (info.samples, info.bytes, info.index_bytes) == (3, len(tar), len(index))
    assert info.sha256 == hashlib.sha256(tar).hexdigest()
    assert info.index_sha256 == hashlib.sha256(index).hexdigest()
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == ["000000.idx", "000000.tar"]


def test_same_samples_give_the_same_bytes_whatever_the_order_of_components(tmp_path: Path) -> None:
    samples = list(make_samples(4))
    turned = [Sample(s.key, dict(reversed(s.components.items()))) for s in samples]
    first, second = write(tmp_path / "a", samples), write(tmp_path / "b", turned)
    assert first.read_bytes() == second.read_bytes()
    assert first.with_suffix(".idx").read_bytes() == second.with_suffix(".idx").read_bytes()


def test_headers_hold_nothing_of_the_machine(tmp_path: Path) -> None:
    path = write(tmp_path / "a", list(make_samples(2)))
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname, member.pax_headers) == ("", "", {})
    assert path.read_bytes()[257:265] == b"ustar\x0000"


def test_plain_tarfile_reads_our_shards(tmp_path: Path) -> None:
    samples = list(make_samples(3))
    with tarfile.open(write(tmp_path / "a", samples)) as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar}
    assert content == {f"{s.key}.{name}": data for s in samples for name, data in s.components.items()}


@leaky
def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    import webdataset

    samples = list(make_samples(5))
    path = write(tmp_path / "a", samples)
    read = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [r["__key__"] for r in read] == [s.key for s in samples]
    assert [{k: v for k, v in r.items() if not k.startswith("__")} for r in read] == [s.components for s in samples]


@pytest.mark.parametrize("mtime", [None, 0.0, 1.5])
def test_we_read_and_index_shards_of_webdatasets_writer(tmp_path: Path, mtime: float | None) -> None:
    import webdataset

    samples = list(make_samples(4))
    with webdataset.TarWriter(str(tmp_path / "w.tar"), encoder=False, mtime=mtime) as sink:
        for sample in samples:
            sink.write({"__key__": sample.key, **sample.components})
    assert list(read_samples(tmp_path / "w.tar")) == samples
    data = (tmp_path / "w.tar").read_bytes()
    for sample, entries in zip(samples, parse_index(build_index(tmp_path / "w.tar"), "w"), strict=True):
        assert {e.component: data[e.offset : e.offset + e.size] for e in entries} == sample.components


components = st.dictionaries(
    st.from_regex(r"[a-z0-9]{1,6}_?(\.[a-z0-9]{1,4}){0,2}", fullmatch=True), st.binary(min_size=1, max_size=1200),
    min_size=1, max_size=4,
)  # fmt: skip
keys = st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(keys, components, min_size=1, max_size=5))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, content: dict[str, dict[str, bytes]]) -> None:
    samples = [Sample(key, dict(sorted(parts.items()))) for key, parts in content.items()]
    path = write(tmp_path_factory.mktemp("trip"), samples)
    assert list(read_samples(path)) == samples
    data = path.read_bytes()
    for sample, entries in zip(samples, parse_index(path.with_suffix(".idx").read_bytes(), "a"), strict=True):
        assert {e.component: data[e.offset : e.offset + e.size] for e in entries} == sample.components


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (Sample("k" * 94, {"0.jpg": b"x"}), "100"),
        (Sample("k", {"0.jpg": b""}), "empty"),
        (Sample("k", {}), "no components"),
        (Sample("k", {f"{number}.jpg": b"x" for number in range(1001)}), "at most 1000"),
        (Sample("k", {"a/b": b"x"}), "only letters"),
        (Sample("k", {"../b": b"x"}), "only letters"),
        (Sample("k", {"tiefe.ä": b"x"}), "only letters"),
        (Sample("k", {"a b": b"x"}), "only letters"),
        (Sample("k", {"a..b": b"x"}), "only letters"),
        (Sample("k", {"__key__": b"x"}), "leading '_'"),
    ],
)
def test_writer_refuses_what_dali_would_misread(tmp_path: Path, sample: Sample, reason: str) -> None:
    writer = ShardWriter(tmp_path / TRAIN)
    longest = "k" * 93  # with .0.jpg 99 characters
    writer.add(Sample(longest, {"0.jpg": b"y"}))
    with pytest.raises(ValueError, match=reason):
        writer.add(sample)
    writer.close()  # what was refused left no trace
    assert [s.key for s in read_samples(tmp_path / TRAIN)] == [longest]


@pytest.mark.parametrize("key", ["a.b", "a b", "a/b", "..", "", "ä", "a\n"])
def test_keys_that_break_dali_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        Sample(key, {"0.jpg": b"x"})


def test_writer_refuses_a_key_twice_and_an_empty_shard(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.tar")
    writer.add(Sample("k", {"0.jpg": b"x"}))
    with pytest.raises(ValueError, match="already"):
        writer.add(Sample("k", {"0.jpg": b"z"}))
    writer.abort()
    with pytest.raises(ValueError, match="without samples"):
        ShardWriter(tmp_path / "b.tar").close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="shard name"), ShardWriter(tmp_path / "b.tar") as other:
        other.add(Sample("k", {"0.jpg": b"x"}))


def test_a_shard_has_its_names_only_when_it_is_on_the_disk_and_the_index_first(tmp_path: Path, disk: list[str]) -> None:
    with ShardWriter(tmp_path / "new" / "000000.tar") as writer:
        writer.add(Sample("k", {"a": b"1"}))
        assert disk == []
    index, tar = ([f"sync 000000.{kind}.tmp", f"000000.{kind}.tmp -> 000000.{kind}"] for kind in ("idx", "tar"))
    assert disk == [*index, *tar, "sync new"]


def test_small_files_are_on_the_disk_before_they_have_their_names(tmp_path: Path, disk: list[str]) -> None:
    write_atomic(tmp_path / "new" / "a", b"1")
    assert disk == ["sync a.tmp", "a.tmp -> a", "sync new"]
    disk.clear()
    made = temporary(tmp_path / "new" / "b")
    assert temporary(tmp_path / "new" / "b") != made, "two processes would write into one file"
    made.write_bytes(b"2")
    assert create_from(made, tmp_path / "new" / "b")
    assert disk == ["sync b.tmp", "b.tmp -> b", "sync new"]
    made.write_bytes(b"3")
    assert not create_from(made, tmp_path / "new" / "b")
    assert (tmp_path / "new" / "b").read_bytes() == b"2"


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "a.tar") as writer:
        writer.add(Sample("k", {"0.jpg": b"x"}))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def raw_tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def claiming(path: Path, size: int, kind: bytes = tarfile.REGTYPE, headers: int = 1) -> Path:
    """A tar that claims `size` bytes behind its only header, or behind each of some headers in a row."""
    info = special("k.0.jpg", kind)
    info.size = size
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) * headers + b"x" * 512 + b"\0" * 1024)
    return path


def many_components(path: Path, count: int) -> Path:
    """Empty files of one sample: nothing but headers, each of which is compared with all before it."""
    with path.open("wb") as file:
        file.writelines(tarfile.TarInfo(f"k.{number}").tobuf(tarfile.USTAR_FORMAT) for number in range(count))
        file.write(bytes(1024))
    return path


def sparse(path: Path) -> Path:
    """A sparse file of PAX, whose map of pieces is missing."""
    info = tarfile.TarInfo("k.0.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 20}
    return raw_tar(path, info, form=tarfile.PAX_FORMAT)


HOSTILE: dict[str, Callable[[Path], Path]] = {
    "climbs out": lambda p: raw_tar(p, ("../../etc/k.0.jpg", b"x")),
    "absolute": lambda p: raw_tar(p, ("/etc/k.0.jpg", b"x")),
    "no component": lambda p: raw_tar(p, ("key", b"x")),
    "hidden": lambda p: raw_tar(p, (".bashrc", b"x")),
    "space in key": lambda p: raw_tar(p, ("a b.0.jpg", b"x")),
    "symlink": lambda p: raw_tar(p, special("k.0.jpg", tarfile.SYMTYPE, "/etc/passwd")),
    "hard link": lambda p: raw_tar(p, special("k.0.jpg", tarfile.LNKTYPE, "/etc/passwd")),
    "device": lambda p: raw_tar(p, special("k.0.jpg", tarfile.CHRTYPE)),
    "not adjacent": lambda p: raw_tar(p, ("a.0.jpg", b"x"), ("b.0.jpg", b"y"), ("a.1.jpg", b"z")),
    "component twice": lambda p: raw_tar(p, ("a.0.jpg", b"x"), ("a.0.jpg", b"y")),
    "claims 1 TB": lambda p: claiming(p, 1 << 40),
    "claims more than there is": lambda p: claiming(p, 100_000),
    "long name of 1 TB": lambda p: claiming(p, 1 << 40, tarfile.GNUTYPE_LONGNAME),
    "long link of -512 bytes": lambda p: claiming(p, -512, tarfile.GNUTYPE_LONGLINK),
    "attributes of 4 GB": lambda p: claiming(p, 4 << 30, tarfile.XHDTYPE),
    "attributes for all of 1 TB": lambda p: claiming(p, 1 << 40, tarfile.XGLTYPE),
    "components without end": lambda p: many_components(p, 1001),
    "10,000 long names of one file": lambda p: claiming(p, 0, tarfile.GNUTYPE_LONGNAME, 10_000),
    "sparse": sparse,
    "not a tar": lambda p: p.write_bytes(b"no tar at all" * 1000) and p,
    "empty file": lambda p: p.write_bytes(b"") or p,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tars_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = HOSTILE[name](tmp_path / "bad.tar")
    with pytest.raises(DatasetError) as caught:
        list(read_samples(path))
    assert "bad.tar" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(DatasetError):
        build_index(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.tar"], "a member name was used as a path"


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    """A small file must not unpack into a large one."""
    plain = raw_tar(tmp_path / "plain.tar", ("k.0.jpg", b"\0" * 1_000_000))
    (tmp_path / "bomb.tar").write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(DatasetError):
        list(read_samples(tmp_path / "bomb.tar"))


def test_a_component_beyond_the_bound_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = raw_tar(tmp_path / "big.tar", ("k.0.jpg", b"x" * 5000))
    monkeypatch.setattr(tar_module, "MAX_COMPONENT_BYTES", 4999)
    with pytest.raises(DatasetError, match="at most 4999"):
        list(read_samples(path))
    with pytest.raises(ValueError, match="at most 4999"), ShardWriter(tmp_path / "a.tar") as writer:
        writer.add(Sample("k", {"0.jpg": b"x" * 5000}))
    monkeypatch.setattr(tar_module, "MAX_COMPONENT_BYTES", 10_000)
    monkeypatch.setattr(tar_module, "MAX_SAMPLE_BYTES", 4999)
    with pytest.raises(DatasetError, match="larger than 4999"):
        list(read_samples(path))


def cuts() -> dict[str, Callable[[list[tarfile.TarInfo]], int]]:
    """Where to cut a tar, in bytes from its start."""
    return {
        "within data": lambda members: members[-1].offset_data + 100,
        "within a header": lambda members: members[-1].offset + 100,
        "between two files": lambda members: members[-1].offset,
        "between two samples": lambda members: members[len(members) // 2].offset,
        "before the end mark": lambda members: members[-1].offset_data + -(-members[-1].size // 512) * 512,
        "within the first header": lambda members: 100,
    }


@pytest.mark.parametrize("name", cuts())
def test_truncated_tars_are_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a", list(make_samples(2, padding=3000)))
    with tarfile.open(path) as tar:
        where = cuts()[name](tar.getmembers())
    with path.open("r+b") as file:
        file.truncate(where)
    with pytest.raises(DatasetError, match=r"000000\.tar"):
        list(read_samples(path))


@pytest.mark.parametrize(
    "text",
    [
        "", "v1.1 1\n0.jpg 512 1 k.0.jpg\n", "v1.2 2\n0.jpg 512 1 k.0.jpg\n", "v1.2 1\n0.jpg 512 1\n",
        "v1.2 1\n0.jpg x 1 k.0.jpg\n", "v1.2 x\n0.jpg 512 1 k.0.jpg\n", "v1.2 1\n0.jpg -512 1 k.0.jpg\n",
        "v1.2 1\n0.jpg 512 -1 k.0.jpg\n", f"v1.2 1\n0.jpg 512 {'9' * 4000} k.0.jpg\n",
        "v1.2 0\n0.jpg 512 1 k.0.jpg\n", "v1.2 1\nä 512 1 k.0.jpg\n", "v1.2 1\n0.jpg 512 1 /etc/k.0.jpg\n",
        "v1.2 1\n0.jpg 512 1 ../k.0.jpg\n", "v1.2 1\n0.jpg 512 1 .0.jpg\n", "v1.2 1\n0.jpg 512 1 k.1.jpg\n",
        "v1.2 1\n0.jpg 5_12 1 k.0.jpg\n", "v1.2 1\n0.jpg +512 1 k.0.jpg\n", "v1.2 1\n0.jpg 512 01 k.0.jpg\n",
        "v1.2 +1\n0.jpg 512 1 k.0.jpg\n", "v1.2 1_0\n0.jpg 512 1 k.0.jpg\n", "v1.2 01\n0.jpg 512 1 k.0.jpg\n",
        "v1.2 1\n0.jpg 512 1 k.0.jpg 0.jpg 1536 1 k.0.jpg\n", "v1.2 1\n0.jpg 512 1 k.0.jpg 1.jpg 1536 1 l.1.jpg\n",
        "v1.2 2\n0.jpg 512 1 k.0.jpg\n0.jpg 1536 1 k.0.jpg\n", "v1.2  1\n0.jpg 512 1 k.0.jpg\n", "v1.2 1\n\n",
    ],
)  # fmt: skip
def test_broken_indexes_are_refused(text: str) -> None:
    with pytest.raises(DatasetError, match="here"):
        parse_index(text.encode(), "here")
