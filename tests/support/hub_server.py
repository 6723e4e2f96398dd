"""A server that answers as the Hugging Face Hub does: shards by a redirect to a signed address of another host.

`Hub.seen` are the requests to the Hub, `Hub.elsewhere` those to the other host, each with its Authorization header.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

SIGNATURE = "X-Amz-Signature=5eC4e7"
COMMIT = "c" * 40
_RESOLVE = re.compile(r"/(?P<repo>(?:datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Hub:
    """A running server: repositories by name (`datasets/USER/NAME`), and what it was asked.

    Attributes:
        token: the one that is accepted; "" accepts none.
        private, gated: repositories that need the token.
        refusals: answers of 429 before it serves again.
        cut: bytes after which the other host cuts each answer once.
    """

    endpoint: str = ""
    storage: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    token: str = ""
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    revisions: set[str] = field(default_factory=lambda: {"main"})
    refusals: int = 0
    cut: int | None = None
    seen: list[tuple[str, str]] = field(default_factory=list)
    elsewhere: list[tuple[str, str]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def serve(self, data: bytes, **headers: str) -> None:
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self.answer(200, data, ETag=etag, **headers)
            return
        start = int(wanted[1])
        if start >= len(data):
            self.answer(416, b"", Content_Range=f"bytes */{len(data)}")
            return
        piece = data[start : int(wanted[2]) + 1 if wanted[2] else None]
        place = f"bytes {start}-{start + len(piece) - 1}/{len(data)}"
        self.answer(206, piece, ETag=etag, Content_Range=place, **headers)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _HubHandler(_Handler):
    def do_GET(self) -> None:
        hub, authorization = self.hub, self.headers.get("Authorization", "")
        hub.seen.append((self.path, authorization))
        found = _RESOLVE.fullmatch(urlsplit(self.path).path)
        if hub.refusals > 0:
            hub.refusals -= 1
            self.answer(429, b"", RateLimit='"resolvers";r=0;t=1')
        elif found is None:
            self.answer(404, b"Not Found")
        elif authorization and authorization != f"Bearer {hub.token}":
            self.answer(401, b"", X_Error_Message="Invalid credentials in Authorization header")
        elif found["repo"] not in hub.repositories or (found["repo"] in hub.private and not authorization):
            # The Hub does not say whether a repository is missing or private.
            self.answer(404 if authorization else 401, b"", X_Error_Code="RepoNotFound")
        elif found["repo"] in hub.gated and not authorization:
            self.answer(401, b"", X_Error_Code="GatedRepo")
        elif unquote(found["revision"]) not in hub.revisions:
            self.answer(404, b"", X_Error_Code="RevisionNotFound")
        else:
            self.file(hub.repositories[found["repo"]] / found["path"], found["repo"])

    def file(self, path: Path, repo: str) -> None:
        if not path.is_file():
            self.answer(404, b"", X_Error_Code="EntryNotFound")
            return
        data = path.read_bytes()
        if path.suffix in (".tar", ".safetensors"):  # stored apart, as Git LFS
            digest = hashlib.sha256(data).hexdigest()
            place = f"{self.hub.storage}/{repo}/{path.relative_to(self.hub.repositories[repo])}?{SIGNATURE}"
            self.answer(
                302,
                b"",
                Location=place,
                X_Linked_Size=str(len(data)),
                X_Linked_ETag=f'"{digest}"',
                X_Repo_Commit=COMMIT,
            )
        else:
            self.serve(data, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET  # noqa: N815  (http.server's name)


class _StorageHandler(_Handler):
    def do_GET(self) -> None:
        hub, authorization = self.hub, self.headers.get("Authorization", "")
        hub.elsewhere.append((self.path, authorization))
        parts = urlsplit(self.path)
        repo = next((name for name in hub.repositories if parts.path.startswith(f"/{name}/")), None)
        if authorization or repo is None or parts.query != SIGNATURE:  # as S3: only one way to authenticate
            self.answer(400, b"InvalidArgument")
            return
        data = (hub.repositories[repo] / parts.path.removeprefix(f"/{repo}/")).read_bytes()
        if hub.cut is not None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: hub.cut])
            hub.cut, self.close_connection = None, True
            return
        self.serve(data)

    do_HEAD = do_GET  # noqa: N815


@contextmanager
def hub_server() -> Iterator[Hub]:
    """The Hub and the other host, on two ports of loopback."""
    hub = Hub()
    servers = []
    for kind, base in (("Front", _HubHandler), ("Storage", _StorageHandler)):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type(kind, (base,), {"hub": hub}))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        servers.append((server, thread))
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{server.server_port}" for server, _ in servers)
    try:
        yield hub
    finally:
        for server, thread in servers:
            server.shutdown()
            server.server_close()
            thread.join()
