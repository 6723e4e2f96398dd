"""Real storage servers on loopback for the tests, and a proxy before them that fails on demand."""

from __future__ import annotations

import functools
import http.client
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ACCESS_KEY, SECRET_KEY = "md2tests", "md2tests-secret"
BUCKET = "team"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes] | None = None, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline or (process is not None and process.poll() is not None):
                raise
            time.sleep(0.02)


@contextmanager
def moto_server() -> Iterator[str]:
    """moto's S3: knows conditional writes, checks no credentials."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def rclone_server(folder: Path) -> Iterator[str]:
    """rclone's S3 on a folder: checks credentials, ignores the condition of a conditional write."""
    port = free_port()
    rclone = Path(sysconfig.get_path("scripts")) / "rclone"
    process = subprocess.Popen(
        [
            str(rclone), "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}", "--config", "", "--quiet",
            "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextmanager
def plain_web_server(folder: Path) -> Iterator[str]:
    """Python's own web server, which ignores Range."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@functools.cache
def client(endpoint: str) -> Any:
    """A plain botocore client: the tests' own way to the objects, past the code under test."""
    import botocore.session

    session = botocore.session.get_session()
    return session.create_client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
    )


@dataclass
class Bucket:
    """An empty bucket on one server, and a plain client for it."""

    endpoint: str
    name: str
    server: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    def objects(self) -> dict[str, int]:
        """Size of every object by key."""
        listed = client(self.endpoint).list_objects_v2(Bucket=self.name)
        return {entry["Key"]: entry["Size"] for entry in listed.get("Contents", [])}

    def get(self, key: str) -> bytes:
        return client(self.endpoint).get_object(Bucket=self.name, Key=key)["Body"].read()

    def put(self, key: str, data: bytes) -> None:
        client(self.endpoint).put_object(Bucket=self.name, Key=key, Body=data)

    def make_public(self) -> None:
        """Everyone may read every object."""
        for key in self.objects():
            client(self.endpoint).put_object_acl(Bucket=self.name, Key=key, ACL="public-read")

    def remove(self, key: str) -> None:
        client(self.endpoint).delete_object(Bucket=self.name, Key=key)


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str, patience: float = 20.0) -> None:
    """The standard chain, and nothing of the user's own."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    monkeypatch.setenv("MD2_STORAGE_PATIENCE", str(patience))


Rule = Callable[[str, str, int], "Fault | None"]
"""(method, path, number of this request) -> what to do with it, None: pass it on."""


@dataclass(frozen=True)
class Fault:
    """One misbehaviour."""

    status: int = 0
    """Answer with this status instead of asking the server."""
    cut_after: int | None = None
    """Cut the connection after so many bytes of the body."""
    delay: float = 0.0
    """Seconds before the answer."""
    rate: float | None = None
    """Bytes per second of the body."""
    silent: bool = False
    """Never answer."""
    lose_answer: bool = False
    """Pass the request on, and cut the connection instead of answering."""


@dataclass
class Request:
    """One request as the proxy saw it."""

    method: str
    path: str
    sent: int = 0
    """Bytes of the answer's body that went to the client."""
    received: int = 0
    """Bytes of the request's body."""


@dataclass
class Proxy:
    """What a test sees of a running proxy."""

    endpoint: str
    rule: Rule | None = None
    requests: list[Request] = field(default_factory=list)

    def sent(self, ending: str) -> int:
        """Bytes that clients got of objects whose path ends so."""
        return sum(r.sent for r in self.requests if r.method == "GET" and r.path.split("?")[0].endswith(ending))

    def received(self, ending: str) -> int:
        """Bytes that clients sent of objects whose path ends so."""
        return sum(r.received for r in self.requests if r.path.split("?")[0].endswith(ending))


class _Handler(BaseHTTPRequestHandler):
    """Passes one request on, or does what the proxy's rule says."""

    protocol_version = "HTTP/1.1"
    server: _ProxyServer

    def handle_any(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        seen = Request(self.command, self.path, received=len(body))
        with self.server.guard:
            number = len(proxy.requests)
            proxy.requests.append(seen)
        fault = (proxy.rule(self.command, self.path, number) if proxy.rule else None) or Fault()
        self.server.done.wait(60 if fault.silent else fault.delay)
        if fault.silent:
            self.close_connection = True
        elif fault.status:
            self.send_response(fault.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif fault.cut_after == 0 and self.command != "GET":
            self.close_connection = True  # the request arrived, and was not passed on
        else:
            self.pass_on(body, seen, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815 - http.server's names

    def pass_on(self, body: bytes, seen: Request, fault: Fault) -> None:
        connection = http.client.HTTPConnection(self.server.backend, timeout=30)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            if fault.lose_answer:
                answer.read()
                self.close_connection = True
                return
            self.send_response(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                    self.send_header(name, value)
            if answer.getheader("Content-Length") is None:
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            self.copy_body(answer, seen, fault)
        finally:
            connection.close()

    def copy_body(self, answer: http.client.HTTPResponse, seen: Request, fault: Fault) -> None:
        step = 65536 if fault.rate is None else max(1, int(fault.rate / 20))
        while not self.server.done.is_set() and (data := answer.read(step)):
            left = len(data) if fault.cut_after is None else fault.cut_after - seen.sent
            self.wfile.write(data[:left])
            seen.sent += len(data[:left])
            if left < len(data):
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if fault.rate is not None:
                self.server.done.wait(len(data) / fault.rate)

    def log_message(self, *_: object) -> None:
        """Quiet."""


class _ProxyServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, backend: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend = backend.removeprefix("http://")
        self.done, self.guard = threading.Event(), threading.Lock()
        self.proxy = Proxy(f"http://127.0.0.1:{self.server_address[1]}")

    def handle_error(self, *_: object) -> None:
        """A client that goes away is part of the game."""


@contextmanager
def faulty_proxy(backend: str) -> Iterator[Proxy]:
    """An HTTP proxy before `backend` that passes everything on unless its rule says otherwise."""
    server = _ProxyServer(backend)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.proxy
    finally:
        server.done.set()
        server.shutdown()
        server.server_close()
        thread.join()
