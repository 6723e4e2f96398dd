"""Errors that a user can act on, and the exit codes of the commands.

    Md2Error                 1   any of the errors below; raised itself only if a worker process died
    ├── UsageError           2   a wrong option, configuration key or combination
    ├── InputError           3   a missing or broken input: raw data, image, checkpoint
    │   └── SampleError      3   the input of one sample: it can be skipped and listed
    ├── DatasetError         5   a broken packed dataset, or not the expected one
    │   └── StorageError     5   the storage behind a URL refuses or fails
    └── TrainingError        6   training cannot continue: NaN, a rank that died

Exit code 0 means done. 4 (`INCOMPLETE`) means done, but samples were skipped (the report lists them). 130 and 143
mean interrupted and terminated. A message is one line: what is wrong, where, and what to do. The commands print it
without a traceback.
"""

from __future__ import annotations

import os
import re

INCOMPLETE = 4
_LONGEST = 200
# Control characters, and the marks that change the direction of text or cannot be seen.
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
_USER = re.compile(
    r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]{0,30}:/{1,3})"
    # A secret may hold a slash: after a colon that is no port, everything up to the last @ counts.
    r"(?:[^\s/'\"<>@]*(?:@[^\s/'\"<>@]*)*@|[^\s/:'\"<>]*:(?!\d{1,5}(?:/|$))[^\s'\"<>]*@)"
)
_OTHER_KIND = re.compile(
    r"(?P<scheme>\b(?!(?:s3a?|gs|gcs|hf|file|https?|memory):)[A-Za-z][A-Za-z0-9+.-]{0,30}:/{2,3})[^\s'\"<>]*@",
    re.IGNORECASE,
)
"""URLs whose first part is no bucket or host that md2 knows: everything up to the last @ counts."""
_NO_SCHEME = re.compile(r"(?<![^\s'\"<>=])//[^\s/@:'\"<>]{1,200}:[^\s@'\"<>]{1,1000}@")
"""The rest of a URL whose begin was left out: it is a path, and its password one in messages."""
_QUERY = re.compile(
    r"(?P<address>\b[A-Za-z][A-Za-z0-9+.-]{0,30}:/{1,3}[^\s?'\"<>]*)\?[^\s'\"<>]*=[^\s'\"<>]*?(?=[:;,.)]*(?:[\s'\"<>]|$))"
)
_FRAGMENT = re.compile(r"(?P<address>\bhttps?://[^\s#'\"<>]*)#[^\s'\"<>]*=[^\s'\"<>]*", re.IGNORECASE)
_WORD = re.compile(r"[^\s'\"<>]+")
_LONGEST_URL = 2048
_PARAMETER = re.compile(
    r"(?P<name>(?:X-(?:Amz|Goog)-)?(?:Signature|Credential|Security-Token|session_token)|AWSAccessKeyId|access_token"
    r"|api_?key|token|sig|secret|password|passwd)(?P<equals>=|['\"]\s*:\s*['\"]?)[^&\s'\",;)]+",
    re.IGNORECASE,
)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_AUTHORIZATION = re.compile(r"(?P<name>(?:proxy-)?authorization['\"]?\s*[:=]\s*)[^\n]+", re.IGNORECASE)
_VARIABLE = re.compile(r"^(AWS_(SECRET_ACCESS_KEY|SESSION_TOKEN)|.*(SECRET|TOKEN|PASSWORD|PASSWD|API_KEY)(_.*)?)$")
_ADDRESS = re.compile(r"(?:MD2_SPLITS_URL|HF_ENDPOINT|AWS_ENDPOINT_URL(?:_[A-Z0-9_]+)?)")
_SERVER = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?:.*@)?[^/?#;\s]*")
_SHORTEST = 8
"""Shorter values of environment variables are left alone: they may be words of the message."""


class Md2Error(Exception):
    """Base of every error that md2 raises on purpose; its message holds no credentials."""

    exit_code = 1

    def __str__(self) -> str:
        return conceal(super().__str__())

    def __repr__(self) -> str:
        return conceal(super().__repr__())


class UsageError(Md2Error):
    """A wrong option, configuration key or combination of them."""

    exit_code = 2


class InputError(Md2Error):
    """A missing or broken input: raw data, a calibration file, an image, a checkpoint."""

    exit_code = 3


class SampleError(InputError):
    """The input of a single sample is missing or broken; the other samples are not affected."""


class DatasetError(Md2Error):
    """A packed dataset is broken, or differs from its manifest."""

    exit_code = 5


class StorageError(DatasetError):
    """The storage behind a URL refuses or fails: credentials, missing bucket, network, full disk."""


class TrainingError(Md2Error):
    """Training cannot continue."""

    exit_code = 6


def first_line(error: BaseException) -> str:
    """Return the first line of another library's exception, without credentials; its type if it has no text."""
    lines = conceal(str(error)).strip().splitlines()
    return lines[0][:_LONGEST] if lines else type(error).__name__


def conceal(text: str) -> str:
    """`text` without credentials.

    Removes from URLs, chained ones included, the user part and the query; from anything else the values of parameters
    and headers that carry credentials, tokens of the Hub, and the values of environment variables named like secrets.
    Of variables that hold an address, it removes what follows the server: a path may be a token as well.
    """
    for name, value in os.environ.items():
        if _VARIABLE.match(name):
            text = _without(text, value, "…")
        elif _ADDRESS.fullmatch(name):
            server = _SERVER.match(value)
            rest = value[server.end() :].rstrip("/") if server else value
            for part in (rest, re.split("[?#]", rest)[0].rstrip("/")):
                text = _without(text, part, f"{part[0]}…" if server and part else "…")
    if "//" in text:
        text = _NO_SCHEME.sub("//…@", text)
    if ":/" in text:
        text = _WORD.sub(_conceal_url, text)
    text = _AUTHORIZATION.sub(r"\g<name>…", _HUB_TOKEN.sub("…", text))
    return _PARAMETER.sub(r"\g<name>\g<equals>…", text)


def _without(text: str, secret: str, shown: str) -> str:
    return text.replace(secret, shown) if len(secret) >= _SHORTEST else text


def _conceal_url(word: re.Match[str]) -> str:
    url = word[0]
    if ":/" not in url:
        return url
    if len(url) > _LONGEST_URL:  # the patterns' time grows with the square of the length
        return url[: min(url.index(":/") + 2, _LONGEST)] + "…"
    if "@" in url:
        url = _USER.sub(r"\g<scheme>…@", _OTHER_KIND.sub(r"\g<scheme>…@", url))
    if "=" in url:
        url = _FRAGMENT.sub(r"\g<address>#…", _QUERY.sub(r"\g<address>?…", url))
    return url


def visible(text: str) -> str:
    """Return `text` for a terminal: no credentials, control characters and bidi marks escaped (`\\x1b`, `\\u202e`).

    Bytes of a file name that are not UTF-8 are escaped as well.
    """
    text = conceal(text).encode(errors="backslashreplace").decode()
    return _UNSEEN.sub(lambda found: repr(found[0])[1:-1], text)
