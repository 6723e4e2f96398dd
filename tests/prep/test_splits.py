"""Split lists: names, files and folders, the pinned download, and lines that are not lines."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from prep.packing.pack import scratch_folder
from prep.packing.plan import leaks
from prep.raw.splits import NAMED, SplitLine, eigen_overlap, part_of, read_split
from shards.errors import InputError, UsageError

LINES = "2011_09_26/2011_09_26_drive_0001_sync 5 l\n2011_09_26/2011_09_26_drive_0001_sync 0000000006 r\n"


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A real web server over a folder: its URL and the folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder))) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}", folder
        web.shutdown()
        thread.join()


@pytest.fixture(params=["XDG_CACHE_HOME", "MD2_CACHE"])
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A user cache of this test's own, by either variable."""
    monkeypatch.delenv("MD2_CACHE", raising=False)
    monkeypatch.setenv(request.param, str(tmp_path / ("cache" if request.param.startswith("XDG") else "cache/md2")))
    return tmp_path / "cache"


def test_unfinished_work_for_a_bucket_is_kept_in_the_same_cache(cache: Path) -> None:
    assert scratch_folder("s3://bucket/kitti").parent == cache / "md2" / "prep"


def write(path: Path, text: str = LINES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_is_the_part_that_it_is_named_after(tmp_path: Path) -> None:
    lists = read_split(str(write(tmp_path / "night" / "val_files.txt")))
    assert lists.parts == {
        "val": [
            SplitLine("2011_09_26/2011_09_26_drive_0001_sync", 5, "l"),
            SplitLine("2011_09_26/2011_09_26_drive_0001_sync", 6, "r"),
        ]
    }


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train_files.txt", "train"),
        ("test_files_09.txt", "test_09"),
        ("val.txt", "val"),
        ("My-drives.txt", "my_drives"),
    ],
)
def test_part_names(name: str, part: str) -> None:
    assert part_of(Path(name)) == part


def test_a_name_that_cannot_be_a_part_is_refused() -> None:
    with pytest.raises(InputError, match=r"train_files\.txt"):
        part_of(Path("früh_files.txt"))


def test_a_folder_gives_all_its_lists(tmp_path: Path) -> None:
    write(tmp_path / "mine" / "train_files.txt")
    write(tmp_path / "mine" / "test_files_09.txt", "9 0 l\n")
    write(tmp_path / "mine" / "notes.txt", "not a list")
    lists = read_split(str(tmp_path / "mine"))
    assert (lists.name, sorted(lists.parts)) == ("mine", ["test_09", "train"])
    assert lists.parts["test_09"] == [SplitLine("9", 0, "l")]


def test_an_empty_folder_or_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no train_files\.txt"):
        read_split(str(tmp_path / "empty"))
    write(tmp_path / "several" / "mine" / "train_files.txt")
    with pytest.raises(InputError, match=f"give --split mine --splits {tmp_path}/several"):
        read_split(str(tmp_path / "several"))
    with pytest.raises(InputError, match="no lines"):
        read_split(str(write(tmp_path / "train_files.txt", "\n# nothing\n")))


@pytest.mark.parametrize(
    "line", ["drive 5", "drive five l", "drive -5 l", "drive 5 x", "drive 5 l extra", "image 0", "drive 12345678901 l"]
)
def test_a_line_that_is_none_is_named_by_file_and_number(tmp_path: Path, line: str) -> None:
    lists = read_split(str(write(tmp_path / "train_files.txt", LINES + line + "\n")))
    assert len(lists.parts["train"]) == 2
    assert [(b.where, b.text) for b in lists.bad["train"]] == [(f"{tmp_path}/train_files.txt:3", line)]


def test_a_pipe_for_a_list_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "val_files.txt")
    with pytest.raises(InputError, match=r"val_files\.txt: not a regular file, but a pipe"):
        read_split(str(tmp_path))


def test_a_repeated_line_is_not_packed_twice(tmp_path: Path) -> None:
    # The same sample, though written in two ways: two entries under one key would break a tar's grouping.
    again = "2011_09_26/2011_09_26_drive_0001_sync/ 05 l\n"
    lists = read_split(str(write(tmp_path / "train_files.txt", LINES + again)))
    assert len(lists.parts["train"]) == 2
    assert "repeats" in lists.bad["train"][0].reason
    assert str(lists.bad["train"][0]).endswith("repeats line 1")


def test_the_hash_tells_lists_apart_but_not_line_ends(tmp_path: Path) -> None:
    first = read_split(str(write(tmp_path / "a" / "train_files.txt"))).sha256
    windows = read_split(str(write(tmp_path / "b" / "train_files.txt", LINES.replace("\n", "\r\n")))).sha256
    val = read_split(str(write(tmp_path / "c" / "val_files.txt"))).sha256
    swapped = "".join(reversed(LINES.splitlines(keepends=True)))
    order = read_split(str(write(tmp_path / "d" / "train_files.txt", swapped))).sha256
    marked = tmp_path / "e" / "train_files.txt"
    marked.parent.mkdir()
    marked.write_bytes(b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode())  # as Windows' Notepad saves it
    assert read_split(str(marked)).parts["train"] == read_split(str(tmp_path / "a" / "train_files.txt")).parts["train"]
    assert first == windows == read_split(str(marked)).sha256
    blanks = write(tmp_path / "f" / "train_files.txt", LINES.replace("\n", " \t\n"))
    assert first == read_split(str(blanks)).sha256
    assert len({first, val, order}) == 3


def test_a_folder_of_splits_comes_before_the_download(tmp_path: Path) -> None:
    write(tmp_path / "eigen_zhou" / "train_files.txt")
    lists = read_split("eigen_zhou", tmp_path, url="http://127.0.0.1:9/never")
    assert (lists.name, len(lists.parts["train"])) == ("eigen_zhou", 2)
    assert lists.named is NAMED["eigen_zhou"]


def test_a_name_means_the_published_split_whatever_lies_in_the_folder_that_one_is_in(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "eigen" / "test_files.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9/lists/eigen/test_files\.txt"):
        read_split("eigen", url="http://127.0.0.1:9/lists")
    assert len(read_split("./eigen").parts["test"]) == 2


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean eigen_zhou"):
        read_split("eigen_zhuo")


def test_a_named_split_is_downloaded_once_and_checked(server: tuple[str, Path], cache: Path, kitti: Path) -> None:
    url, folder = server
    shutil.copytree(kitti / "splits" / "eigen", folder / "eigen")
    assert len(read_split("eigen", url=url).parts["test"]) == 697
    (folder / "eigen" / "test_files.txt").unlink()
    assert len(read_split("eigen", url=url).parts["test"]) == 697  # from the cache
    assert any(cache.rglob("test_files.txt"))


def test_a_server_that_is_not_there_is_named_with_the_reason_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MD2_STORAGE_PATIENCE", "1")
    with pytest.raises(InputError) as caught:
        read_split("eigen", url="http://127.0.0.1:9/lists")
    reason = r"http://127\.0\.0\.1:9/lists/eigen/test_files\.txt: [^:]*; gave up after [^:]*; put the lists"
    assert re.match(reason, str(caught.value))


def test_a_download_with_another_hash_is_refused_and_not_kept(server: tuple[str, Path], cache: Path) -> None:
    url, folder = server
    write(folder / "eigen" / "test_files.txt")
    for _ in range(2):
        with pytest.raises(InputError, match="sha256"):
            read_split("eigen", url=url)


def test_a_mirror_can_be_named_by_the_environment(
    server: tuple[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MD2_SPLITS_URL", server[0])
    with pytest.raises(InputError, match=rf"{server[0]}/eigen/test_files\.txt.*--splits DIR"):
        read_split("eigen")  # 404: the server was asked, and the message says what to do


@pytest.mark.kitti
def test_counts_and_hashes_of_the_published_lists(kitti: Path) -> None:
    counts = {
        "eigen_zhou": {"train": 39810, "val": 4424},
        "eigen_full": {"train": 45200, "val": 1776},
        "eigen": {"test": 697},
        "eigen_benchmark": {"test": 652},
        "odom": {"train": 36671, "val": 4075, "test_09": 1590, "test_10": 1200},
    }
    assert set(counts) == set(NAMED)
    for name, expected in counts.items():
        lists = read_split(name, kitti / "splits")
        assert {part: len(lines) for part, lines in lists.parts.items()} == expected
        assert not any(lists.bad.values())
        for file, sha256 in NAMED[name].files.items():
            assert hashlib.sha256((kitti / "splits" / name / file).read_bytes()).hexdigest() == sha256


def test_lists_that_train_on_eigens_test_frames_are_noted() -> None:
    """Frames 54 and 69 of drive 0002 are tested; the second is a target here, the first a neighbour."""
    drive = "2011_09_26/2011_09_26_drive_0002_sync"
    lines = [SplitLine(drive, 69, "l"), SplitLine(drive, 55, "r"), SplitLine(drive.replace("0002", "0001"), 1, "l")]
    assert eigen_overlap(lines, (0, -1, 1)) == (1, 2)
    assert eigen_overlap(lines[2:], (0, -1, 1)) == (0, 0)
    assert leaks(lines, (0,)) and not leaks(lines[2:], (0, -1, 1))


@pytest.mark.kitti
def test_the_official_lists_overlap_as_known(kitti: Path) -> None:
    """Monodepth2's list `benchmark` has 451 of the 697 test frames as targets, 457 with neighbours; eigen_zhou none."""
    found = {
        name: read_split(name, kitti / "splits").parts for name in ("benchmark", "eigen_zhou", "eigen_full", "eigen")
    }
    counts = {name: eigen_overlap(parts["train"], (0, -1, 1)) for name, parts in found.items() if "train" in parts}
    assert counts == {"benchmark": (451, 457), "eigen_zhou": (0, 0), "eigen_full": (0, 0)}
    assert eigen_overlap(found["eigen"]["test"], (0,)) == (697, 697)
