"""Files from outside have bounds on their bytes and on what they become: even the worst takes little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shards.errors import DatasetError
from shards.manifest import Manifest
from shards.publish import MAX_MANIFEST_BYTES
from shards.storage import open_storage
from shards.tar import MAX_ENTRIES, parse_index

LIMIT = 500e6
PROGRAM = """
import sys
from shards.errors import DatasetError
from shards.publish import MAX_MANIFEST_BYTES, require_manifest
from shards.storage import open_storage
from shards.tar import build_index, parse_index
from pathlib import Path
path = Path(sys.argv[1])
try:
    if path.suffix == ".json":
        require_manifest(open_storage(str(path.parent)))
    elif path.suffix == ".tar":
        build_index(path)
    else:
        parse_index(path.read_bytes(), path.name)
except DatasetError as error:
    assert "\\n" not in str(error)
    print(len(str(error)))
# Not getrusage: a process inherits the peak of the one that started it.
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) * 1024)
"""


def line(number: int) -> bytes:
    return b"a 512 1 k%d.a" % number


def headers(path: Path, count: int) -> None:
    """A tar of `count` empty files: nothing but headers."""
    import tarfile

    with path.open("wb") as file:
        for number in range(count):
            file.write(tarfile.TarInfo(f"k{number}.a").tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(1024))


BOMBS = {
    "a list of numbers": ("dataset.json", lambda: b"[" + b"1," * 7_900_000 + b"1]"),
    "a list of lists": ("dataset.json", lambda: b"[" + b"[]," * 333_000 + b"[]]"),
    "one list, most that is parsed": (
        "dataset.json",
        lambda: b'{"schema_version": 1, "x": [' + b"0," * 999_000 + b"0]}",
    ),
    "one word in wide characters": ("dataset.json", lambda: b'{"x": "' + "😀".encode() + b"a" * 16_000_000 + b'"}'),
    "nested": ("dataset.json", lambda: b"[" * 999_000),
    "a number": ("dataset.json", lambda: b'{"schema_version": ' + b"1" * 16_000_000 + b"}"),
    "larger than any": ("dataset.json", lambda: b" " * 100_000_000),
    "an index of one sample": ("x.idx", lambda: b"v1.2 1\n" + b" ".join(map(line, range(399_000))) + b"\n"),
    "an index of many": ("x.idx", lambda: b"v1.2 399000\n" + b"\n".join(map(line, range(399_000))) + b"\n"),
    "an index of empty lines": ("x.idx", lambda: b"\n" * 32_000_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_the_worst_file_that_is_read_stays_small(tmp_path: Path, name: str) -> None:
    file, make = BOMBS[name]
    (tmp_path / file).write_bytes(make())
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / file)], check=True, capture_output=True, text=True
    )
    *length, peak = map(int, ended.stdout.split())
    assert all(characters < 1000 for characters in length)
    assert peak < LIMIT, f"{peak / 1e6:.0f} MB"


def test_too_many_values_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="more than 1,000,000 values"):
        Manifest.from_json("[" + "0," * 1_000_001 + "0]", "dataset.json")
    with pytest.raises(DatasetError, match="more than 400,000 components"):
        parse_index(b"v1.2 1\n" + b" ".join(map(line, range(MAX_ENTRIES + 2))), "x.idx")
    (tmp_path / "dataset.json").write_bytes(b" " * (MAX_MANIFEST_BYTES + 1))
    with pytest.raises(DatasetError, match=f"larger than {MAX_MANIFEST_BYTES} bytes"):
        open_storage(str(tmp_path)).read("dataset.json", MAX_MANIFEST_BYTES)


def test_a_tar_of_too_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shards import tar

    monkeypatch.setattr(tar, "MAX_ENTRIES", 100)
    headers(tmp_path / "x.tar", 101)
    with pytest.raises(DatasetError, match="more than 100 components"):
        tar.build_index(tmp_path / "x.tar")
