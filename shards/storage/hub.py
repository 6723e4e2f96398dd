"""Reading from the Hugging Face Hub: `hf://datasets/USER/NAME[@REVISION][/path]`, and `hf://USER/NAME…` for a model.

Files are read through the Hub's resolve addresses, which redirect large ones to signed addresses of another host. The
token goes to the Hub alone. Form of the addresses: https://huggingface.co/docs/huggingface_hub/guides/hf_file_system
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, unquote

from shards.errors import StorageError, UsageError
from shards.files import expanded, open_regular
from shards.storage.http import HttpStorage
from shards.storage.retry import MissingError

ENDPOINT = "HF_ENDPOINT"
"""Environment variable: a mirror of the Hub."""
TOKEN = "HF_TOKEN"
"""Environment variable: the token; without it, that of the Hub's login (`hf auth login`)."""
_ADDRESS = re.compile(
    r"hf://(?P<kind>datasets/)?(?P<user>[\w.-]+)/(?P<name>[\w.-]+)"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[\w.-]+|[\w.%-]+))?(?P<path>(?:/[\w.-]+)*)/?",
    re.IGNORECASE | re.ASCII,
)
_LONGEST_TOKEN = 1000


def is_hub(url: str) -> bool:
    """Return whether a URL is an address on the Hub."""
    return url[:5].lower() == "hf://"


def _token() -> tuple[str, str] | None:
    """Return the token and where it comes from; None if this machine has none.

    Raises:
        UsageError: it cannot be one.
    """
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    path = expanded(Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token"))
    token, place = os.environ.get(TOKEN, "").strip(), TOKEN
    if not token:
        try:
            with open_regular(path) as file:
                token, place = file.read(_LONGEST_TOKEN + 1).decode(errors="replace").strip(), str(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageError(f"{path}: the Hub's token cannot be read ({error.strerror or error})") from error
    if not re.fullmatch(rf"[!-~]{{1,{_LONGEST_TOKEN}}}", token):
        raise UsageError(f"{place}: not a token of the Hub; log in again (hf auth login), or set {TOKEN}")
    return token, place


class HubStorage(HttpStorage):
    """A repository on the Hub, or a folder in it; read only.

    Raises:
        UsageError: not an address on the Hub, or `HF_ENDPOINT` is none.
    """

    def __init__(self, url: str) -> None:
        found = _ADDRESS.fullmatch(url)
        parts = url.lower().split("/")[2:]
        # `datasets/NAME`, without a user, would be a model's name.
        if found is None or ".." in parts or "." in parts or parts[0] == "spaces" or parts[:-1] == ["datasets"]:
            raise UsageError(
                f"{url}: not an address on the Hub; the form is hf://datasets/USER/NAME[@REVISION][/path], or "
                "hf://USER/NAME for a model"
            )
        endpoint = (os.environ.get(ENDPOINT) or "https://huggingface.co").rstrip("/")
        kind = "datasets/" if found["kind"] else ""
        revision = quote(unquote(found["revision"] or "main"), safe="")
        self._endpoint, self._page = endpoint, f"{endpoint}/{kind}{found['user']}/{found['name']}"
        self._revision = unquote(found["revision"] or "main")
        try:
            if not endpoint.startswith(("https://", "http://")):
                raise UsageError(endpoint)
            super().__init__(f"{self._page}/resolve/{revision}{found['path']}")
        except UsageError as error:
            raise UsageError(f"{ENDPOINT} is not a web address (such as https://huggingface.co)") from error
        self._address, self._given = self.url, url
        self.url = url.rstrip("/")

    def __reduce__(self) -> tuple[Callable[[str], HttpStorage], tuple[str]]:
        return type(self), (self._given,)

    def _headers(self) -> dict[str, str]:
        token = _token()
        return {} if token is None else {"Authorization": f"Bearer {token[0]}"}

    def _check(self, answer: Any) -> None:
        """Turn the Hub's refusals into lines that say what to do: a header of it tells apart what has one status."""
        code, token = answer.headers.get("X-Error-Code", ""), _token()
        if answer.status not in (401, 403, 404) or not str(answer.url).startswith(f"{self._endpoint}/"):
            return
        if answer.status == 404 and code in ("", "EntryNotFound"):
            raise MissingError(self.url)
        login = f"log in (hf auth login) or set {TOKEN}"
        if code == "RevisionNotFound":
            problem = f"no revision {self._revision!r} there; see {self._page}/tree/main"
        elif code == "GatedRepo":
            problem = f"gated: accept its conditions at {self._page}, then {login}"
        elif code != "RepoNotFound" and answer.status == 401 and token is not None:
            problem = f"the Hub does not accept the token of {token[1]} (401): expired, revoked or mistyped; {login}"
        elif code != "RepoNotFound" and answer.status == 403 and token is not None:
            problem = f"the token of {token[1]} has no right to read it (403)"
        else:
            private = f"it is private: {login}" if token is None else f"the token of {token[1]} may not read it"
            problem = f"no such repository on the Hub, or {private} ({answer.status})"
        raise StorageError(f"{self.url}: {problem}")

    def _refuse_listing(self, *_: Any, **__: Any) -> NoReturn:
        raise UsageError(f"{self.url}: the Hub is not listed here; give a dataset's own address")

    def _refuse_writing(self, *_: Any, **__: Any) -> NoReturn:
        raise UsageError(
            f"{self.url}: md2 only reads from the Hub; write to a folder, then: hf upload USER/NAME FOLDER "
            "--repo-type dataset"
        )

    names = children = _refuse_listing
    write = create = create_file = delete = sweep = _refuse_writing
