"""Every wait for a storage ends: whatever a server sends slowly, whatever lies in the place of a file."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from storage_data import make_dataset
from storage_servers import use_endpoint

from shards import locks
from shards.dataset import open_dataset
from shards.errors import DatasetError, InputError, Md2Error, StorageError
from shards.files import open_regular, sha256_file
from shards.locks import FileLock
from shards.manage import find_datasets
from shards.storage import open_storage
from shards.transfer import copy_dataset, verify

Talk = Callable[[socket.socket, threading.Event], None]
OK = b"HTTP/1.1 200 OK\r\n"
BOUND = 15.0
"""Seconds within which a time limit of 2 s must end, on a loaded machine."""


@contextmanager
def server(talk: Talk) -> Iterator[str]:
    """A TCP server that reads a request's first bytes and then lets `talk` misbehave; gives its http address."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection: socket.socket) -> None:
            with connection:
                connection.settimeout(30)
                try:
                    connection.recv(65536)
                    talk(connection, done)
                except OSError:
                    pass  # the client has gone away, as it should

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            done.set()
            listener.shutdown(socket.SHUT_RDWR)


def drip(connection: socket.socket, done: threading.Event, data: bytes) -> None:
    """One byte each 50 ms, so that no socket's time limit is ever reached."""
    while not done.is_set():
        for byte in data:
            connection.sendall(bytes([byte]))
            if done.wait(0.05):
                return


def headers(connection: socket.socket, done: threading.Event) -> None:
    connection.sendall(OK)
    drip(connection, done, b"X-Filler: abcdefgh\r\n")


def status_line(connection: socket.socket, done: threading.Event) -> None:
    drip(connection, done, b"HTTP/1.1 200 " + b"O" * 1000)


def chunk_sizes(connection: socket.socket, done: threading.Event) -> None:
    connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n")
    drip(connection, done, b"1\r\n{\r\n")


def body(connection: socket.socket, done: threading.Event) -> None:
    connection.sendall(OK + b"Content-Length: 1000000\r\n\r\n")
    drip(connection, done, b"{")


def interim_answers(connection: socket.socket, done: threading.Event) -> None:
    while not done.wait(0.05):
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")


@pytest.mark.parametrize("talk", [headers, status_line, chunk_sizes, body, interim_answers], ids=lambda t: t.__name__)
@pytest.mark.parametrize("kind", ["http", "s3"])
def test_a_server_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch, kind: str, talk: Talk) -> None:
    with server(talk) as endpoint:
        use_endpoint(monkeypatch, endpoint, patience=2)
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"not answer in time; gave up after|connection was cut") as caught:
            open_dataset(f"{endpoint}/d" if kind == "http" else "s3://team/d")
        assert time.monotonic() - began < BOUND
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "location", [b"/again", b"http://a..b/", b"http://[", b"no such\x01", b"ftp://x/", b"http:///"]
)
def test_a_redirect_to_nowhere_is_one_line(monkeypatch: pytest.MonkeyPatch, location: bytes) -> None:
    def talk(connection: socket.socket, done: threading.Event) -> None:
        connection.sendall(OK.replace(b"200 OK", b"302 Found") + b"Location: " + location)
        connection.sendall(b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    with server(talk) as endpoint:
        use_endpoint(monkeypatch, endpoint, patience=2)
        began = time.monotonic()
        with pytest.raises(StorageError) as caught:
            open_dataset(f"{endpoint}/d")
        assert time.monotonic() - began < BOUND
        assert f"{endpoint}/d/dataset.json: " in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [b"\0" * 5000, b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 abc\r\n\r\n", OK + b"X" * 100_000, OK + b"A: b\r\n" * 20_000,
     OK + b"Content-Length: 9" + b"9" * 5000 + b"\r\n\r\n", OK + b"Content-Length: -5\r\n\r\n",
     OK + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFFFF\r\nx"],
    ids=lambda answer: repr(answer[:24]),
)  # fmt: skip
def test_an_answer_that_is_not_http_is_one_line(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    with server(lambda connection, done: connection.sendall(answer)) as endpoint:
        use_endpoint(monkeypatch, endpoint, patience=0.5)
        with pytest.raises(DatasetError) as caught:
            open_dataset(f"{endpoint}/d")
        assert "dataset.json" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    make_dataset(tmp_path / "d", train=4, val=2, per_shard=2)
    return tmp_path / "d"


@pytest.mark.parametrize("name", ["dataset.json", "README.md", "train/000000.tar", "train/000001.idx"])
def test_a_named_pipe_in_place_of_a_file_is_refused(dataset: Path, tmp_path: Path, name: str) -> None:
    """Reading from it would wait for ever."""
    (dataset / name).unlink()
    os.mkfifo(dataset / name)
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(dataset / name)
    with pytest.raises(OSError, match="not a regular file"):
        sha256_file(dataset / name)
    with pytest.raises(Md2Error, match=rf"{name}.*not a regular file"):
        copy_dataset(str(dataset), str(tmp_path / "e"))
    if name == "dataset.json":
        found = {Path(found.url).name: found.note for found in find_datasets(str(tmp_path))}
        assert "not a regular file" in found["d"]
    elif name != "README.md":
        assert list(verify(str(dataset)).broken) == [name[:-4] + ".tar"]
        with pytest.raises(DatasetError, match="not a regular file"):
            open_dataset(str(dataset)).tars("train")


def test_a_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(StorageError, match=r"no file locks .*\(No locks available\); use a local disk"):
        FileLock(tmp_path / "x").acquire(1)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_a_lock_that_is_not_given_back_is_waited_for_with_an_end(tmp_path: Path) -> None:
    with FileLock(tmp_path / "x").acquire(1), pytest.raises(StorageError, match=rf"process {os.getpid()} has held"):
        FileLock(tmp_path / "x").acquire(0.2)
    with FileLock(tmp_path / "x").acquire(0.2, shared=True):
        assert FileLock(tmp_path / "x").try_acquire(shared=True)


def test_a_fifo_beside_a_dataset_is_not_a_dataset(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert open_storage(str(tmp_path)).children("") == (["pipe"], [])
    with pytest.raises(StorageError, match="not a regular file"):
        open_storage(str(tmp_path)).read("pipe", 10)


@pytest.mark.parametrize("talk", [headers, status_line, interim_answers], ids=lambda talk: talk.__name__)
def test_raw_data_of_a_server_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch, talk: Talk) -> None:
    from prep.raw.files import RawData

    with server(talk) as endpoint:
        use_endpoint(monkeypatch, endpoint, patience=1)
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"not answer in time; gave up after|connection was cut"):
            RawData([endpoint]).files("2011_09_26")
        assert time.monotonic() - began < BOUND


def test_downloads_of_a_server_that_trickles_are_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of lists of splits, and of ImageNet weights, which one waited for without an end."""
    from md2 import weights
    from prep.raw.splits import read_split

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("MD2_CACHE", str(tmp_path / "cache"))
    with server(body) as endpoint:
        use_endpoint(monkeypatch, endpoint, patience=1)
        monkeypatch.setitem(weights.IMAGENET_URLS, "resnet18", f"{endpoint}/resnet18-00000000.pth")
        began = time.monotonic()
        with pytest.raises(InputError, match=r"in time; gave up after .*; put the lists"):
            read_split("eigen", url=endpoint)
        with pytest.raises(InputError, match=r"in time; gave up after .*; download the file elsewhere"):
            weights.download_imagenet("resnet18")
        assert time.monotonic() - began < 2 * BOUND
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_file_system_that_blocks_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An FTP server that never greets, one that does not list, and files that never come: fsspec waits for them."""
    from fsspec.implementations.memory import MemoryFileSystem

    from prep.raw.files import RawData, read

    monkeypatch.setenv("MD2_STORAGE_PATIENCE", "1")
    began = time.monotonic()
    with (
        server(lambda connection, done: None) as address,
        pytest.raises(StorageError, match=r"^ftp://127.*: .* not answer in time; gave up after"),
    ):
        RawData([address.replace("http", "ftp")]).files("2011_09_26")
    MemoryFileSystem().pipe("/raw/x/1.png", b"1")
    found = RawData(["memory://raw"]).files("x")
    assert read(found["1.png"]) == b"1"
    for method in ("ls", "cat_ranges"):
        monkeypatch.setattr(MemoryFileSystem, method, lambda *_, **__: time.sleep(30))
        with pytest.raises(StorageError, match=r"memory://.*: .* not answer in time; gave up after"):
            read(found["1.png"]) if method == "cat_ranges" else RawData(["memory://raw"]).files("x")
    assert time.monotonic() - began < 3 * BOUND
