"""Answers of servers have bounds: whatever comes, little is read, and the command ends with one line."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from storage_servers import use_endpoint
from test_storage_waits import OK, server

from shards.errors import Md2Error, StorageError
from shards.manage import find_datasets
from shards.storage import open_storage, remote
from shards.storage.remote import Page, all_pages

MOST = 40 << 20
"""Bytes that are sent before the client ends the request: buffers of the sockets, on top of the bound."""
GIGABYTE = 1 << 30
XML = b"Content-Type: application/xml\r\n"


def flood(status: bytes, piece: bytes, sent: list[int]) -> Callable[[socket.socket, threading.Event], None]:
    """Send a gigabyte, and count what was taken."""

    def talk(connection: socket.socket, done: threading.Event) -> None:
        sent.append(0)
        number, block = len(sent) - 1, piece * ((1 << 18) // len(piece))
        connection.sendall(b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n\r\n" % (status, XML, GIGABYTE))
        while sent[number] < GIGABYTE and not done.is_set():
            connection.sendall(block)
            sent[number] += len(block)

    return talk


@pytest.mark.parametrize("status", [b"403 Forbidden", b"200 OK"], ids=bytes.decode)
@pytest.mark.parametrize("piece", [b"<a/>", b"<a>"], ids=["flat", "nested"])
def test_a_gigabyte_instead_of_an_answer_is_not_read(
    monkeypatch: pytest.MonkeyPatch, status: bytes, piece: bytes
) -> None:
    sent: list[int] = []
    with server(flood(status, piece, sent)) as endpoint:
        use_endpoint(monkeypatch, endpoint, patience=30)
        storage = open_storage("s3://team/d")
        for operation in (lambda: storage.read("dataset.json", 1000), lambda: storage.names("")):
            with pytest.raises(StorageError, match=r"s3://team/d.*: (the server's answer is larger|larger than)"):
                operation()
    assert 0 < max(sent) < MOST


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_raw_data_of_a_server_that_floods_are_not_read(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    from prep.raw.files import RawData

    sent: list[int] = []
    with server(flood(b"404 Not Found", b"<a/>", sent)) as endpoint:
        use_endpoint(monkeypatch, endpoint, patience=30)
        # fsspec would give the file system of another test, whose server is gone.
        monkeypatch.setattr("s3fs.S3FileSystem.cachable", False)
        raw = RawData([endpoint if scheme == "http" else "s3://team/raw"])
        try:
            assert raw.files("2011_09_26") == {}  # over http nothing of a 404 is read
        except Md2Error as error:
            assert "larger than" in str(error)
    assert 0 < max(sent) < MOST


def listing(number: int, keys: int) -> bytes:
    names = "".join(f"<Contents><Key>d/{number}/{key}</Key><Size>1</Size></Contents>" for key in range(keys))
    return (
        f"<ListBucketResult>{names}<IsTruncated>true</IsTruncated>"
        f"<NextContinuationToken>t{number}</NextContinuationToken></ListBucketResult>"
    ).encode()


def test_pages_without_an_end_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [0]

    def talk(connection: socket.socket, done: threading.Event) -> None:
        pages[0] += 1
        body = listing(pages[0], pages[0] % 3)
        connection.sendall(OK + XML + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    with server(talk) as endpoint:
        use_endpoint(monkeypatch, endpoint, patience=5)
        with pytest.raises(StorageError, match="team/d: the server's list of names does not end"):
            open_storage("s3://team/d").names("")
    assert pages[0] > 1


def test_a_listing_has_a_most_of_names_and_of_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_NAMES", 30_000)

    def endless(length: int) -> Callable[[str], Page]:
        return lambda token: Page(
            {f"{token}/{key}{'x' * length}": 1 for key in range(1000)}, [], str(int(token or 0) + 1)
        )

    for length, most in ((1, 30_000), (20_000, 20_000)):
        with pytest.raises(StorageError, match="names below it; give a longer prefix") as caught:
            all_pages("s3://b", 1e9, endless(length))
        found = re.search(r"more than ([\d,]+) names", str(caught.value))
        assert found is not None
        assert int(found[1].replace(",", "")) <= most
    with pytest.raises(StorageError, match="does not end"):
        all_pages("s3://b", 1e9, lambda token: Page({}, [], "same"))
    with pytest.raises(StorageError, match="does not end"):  # ever the same names, which earn no time
        all_pages("s3://b", 0.1, lambda token: Page({"a": 1}, ["d"], str(int(token or 0) + 1)))


def test_a_circle_of_folders_ends(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("b", "c", "d"):
        (tmp_path / "a" / name).symlink_to(tmp_path / "a")
    assert list(find_datasets(str(tmp_path))) == []
