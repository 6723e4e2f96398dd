"""What a storage failure means, and how long to try again.

A server that is busy or away for a while (5xx, 429, timeouts, cut connections) is asked again, with growing pauses,
until the time limit. What another try cannot help (credentials, missing bucket) fails at once. A server that was never
reached gets a tenth of the time: a wrong endpoint is more likely than an outage.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

from shards.errors import Md2Error, StorageError, UsageError, first_line

PATIENCE_VARIABLE = "MD2_STORAGE_PATIENCE"
"""Environment variable: time limit in seconds of retries of a storage that fails for a while."""
DEFAULT_PATIENCE = 120.0
ATTEMPT = 60.0
"""Seconds that one attempt may take, besides what its bytes need at `SLOWEST`."""
SLOWEST = 100e3
"""Bytes per second below which a transfer is given up."""
_LAST_ATTEMPT = 2.0
"""Seconds that an attempt gets even if the time limit is nearly over."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 8.0
_SHORT_PATIENCE = 0.1
_POLL = 0.2
_LONGEST_CODE = 60

_log = logging.getLogger(__name__)
T = TypeVar("T")
ErrorKind = Literal["missing", "exists", "denied", "no_bucket", "beyond_end", "transient", "unreachable", "refused"]


class MissingError(Exception):
    """No object has that name."""


class ExistsError(Exception):
    """An object has that name already."""


class BeyondEndError(Exception):
    """A range that starts at or behind the object's end."""


class AnswerTooLargeError(Exception):
    """A server sends more than any answer holds."""


class CancelledError(Exception):
    """The caller gave up; raised in its worker threads."""


_ANSWERS: dict[ErrorKind, type[Exception]] = {
    "missing": MissingError,
    "exists": ExistsError,
    "beyond_end": BeyondEndError,
}


class Failure(NamedTuple):
    """Meaning of an exception of a storage library, in words for the user."""

    kind: ErrorKind
    cause: str


def patience_from_environment() -> float:
    """Return the time limit of retries in seconds: `MD2_STORAGE_PATIENCE` or the default.

    Raises:
        UsageError: the variable is not a number of seconds.
    """
    text = os.environ.get(PATIENCE_VARIABLE)
    try:
        seconds = DEFAULT_PATIENCE if text is None else float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UsageError(f"{PATIENCE_VARIABLE}={text}: not a number of seconds")
    return seconds


class Retrier:
    """Runs operations against one storage until they succeed, fail for good, or the time limit ends. Thread-safe.

    Args:
        credentials: what to check if access is denied.
    """

    def __init__(self, credentials: str = "check the credentials") -> None:
        self._credentials = credentials
        self.patience = patience_from_environment()
        self.cancelled = threading.Event()
        self._reached = False

    def call(self, url: str, operation: Callable[[], T]) -> T:
        """Return the operation's result; `url` goes into messages.

        Raises:
            MissingError, ExistsError, BeyondEndError: the storage's answer.
            CancelledError: `cancelled` was set.
            StorageError: denied, or still failing at the end of the time limit.
        """
        start, attempts, pause = time.monotonic(), 0, _FIRST_PAUSE
        while not self.cancelled.is_set():
            attempts += 1
            try:
                result = operation()
            except Exception as error:
                failure = classify(error)
                if failure is None:
                    raise
                allowed = self._allowed(url, failure, error)
                passed = time.monotonic() - start
                if passed + pause > allowed:
                    raise StorageError(_gave_up(url, failure, attempts, passed)) from error
                if attempts == 3:
                    _log.warning("%s: %s; trying again for up to %.0f s", url, failure.cause, allowed)
                self.cancelled.wait(pause * random.uniform(0.7, 1.3))
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                self._reached = True
                return result
        raise CancelledError

    def run(
        self,
        url: str,
        loop: asyncio.AbstractEventLoop,
        start: Callable[[], Coroutine[Any, Any, T]],
        size: int = 0,
        *,
        sends: bool = False,
    ) -> T:
        """As `call`, for a request on an event loop: every attempt is ended, wherever it waits, when its time is over.

        Args:
            url: for messages.
            loop: runs in another thread.
            start: makes the coroutine of one attempt.
            size: bytes that one attempt moves; they may take as long as they need at `SLOWEST`.
            sends: the bytes go to the storage: one attempt may then take longer than the time limit, since a large
                upload cannot be resumed.
        """
        end = time.monotonic() + self.patience

        def begin() -> tuple[concurrent.futures.Future[T], float]:
            limit = _limit(end, size, sends)
            return asyncio.run_coroutine_threadsafe(asyncio.wait_for(start(), limit), loop), math.inf

        return self.call(url, lambda: self._result(url, *begin()))

    def run_blocking(self, url: str, operation: Callable[[], T], size: int = 0) -> T:
        """As `run`, for a function that blocks: nothing can end it, so a thread of its own is left behind with it."""
        end = time.monotonic() + self.patience

        def begin() -> tuple[concurrent.futures.Future[T], float]:
            future: concurrent.futures.Future[T] = concurrent.futures.Future()
            future.set_running_or_notify_cancel()  # from here on it cannot be cancelled, whose result would be an error

            def work() -> None:
                try:
                    future.set_result(operation())
                except BaseException as error:
                    future.set_exception(error)

            threading.Thread(target=work, name="md2-storage", daemon=True).start()
            return future, time.monotonic() + _limit(end, size)

        return self.call(url, lambda: self._result(url, *begin()))

    def _result(self, url: str, future: concurrent.futures.Future[T], end: float) -> T:
        """Return an attempt's result, or raise its error, as one that `classify` knows or as a StorageError."""
        try:
            while not concurrent.futures.wait([future], _POLL).done:
                if self.cancelled.is_set():
                    raise CancelledError
                if time.monotonic() > end:
                    raise TimeoutError
            return future.result()
        except (Md2Error, MissingError, ExistsError, BeyondEndError, CancelledError):
            raise
        except Exception as error:
            if classify(error) is not None:
                raise
            cause = f"{type(error).__name__}: {first_line(error)}"
            raise StorageError(f"{url}: the request fails ({cause})") from error
        finally:
            future.cancel()

    def _allowed(self, url: str, failure: Failure, error: Exception) -> float:
        """Return the time limit in seconds for further tries; raise if they cannot help."""
        if failure.kind == "unreachable":
            return self.patience if self._reached else self.patience * _SHORT_PATIENCE
        self._reached = True
        if failure.kind == "transient":
            return self.patience
        if failure.kind in _ANSWERS:
            raise _ANSWERS[failure.kind](url) from error
        advice = f"; {self._credentials}" if failure.kind == "denied" else ""
        raise StorageError(f"{url}: {failure.cause}{advice}") from error


def _limit(end: float, size: int, sends: bool = False) -> float:
    """Return the seconds of one attempt, of a request whose time limit ends at `end`."""
    left = max(end - time.monotonic(), _LAST_ATTEMPT)
    return min(ATTEMPT, left) + size / SLOWEST if sends else min(ATTEMPT + size / SLOWEST, left)


_ADDRESSES = {
    "http": "check the address",
    "https": "check the address",
    "hf": "check the network, and HF_ENDPOINT if it is set",
    "s3": "check AWS_ENDPOINT_URL",
    "s3a": "check AWS_ENDPOINT_URL",
}
"""What to check if a server cannot be reached."""


def _gave_up(url: str, failure: Failure, attempts: int, passed: float) -> str:
    advice = "try again later"
    if failure.kind == "unreachable":
        advice = _ADDRESSES.get(url.partition(":")[0].lower(), "check the network")
    tries = "1 attempt" if attempts == 1 else f"{attempts} attempts"
    return f"{url}: {failure.cause}; gave up after {tries} in {passed:.0f} s, {advice}"


_NO_ENDPOINT = Failure("refused", "AWS_ENDPOINT_URL is not an address (such as http://minio:9000)")
_NOT_CONNECTED = Failure("unreachable", "cannot connect to the server")
_NO_ADDRESS = Failure("refused", "not a valid web address")
_NO_REDIRECT = Failure("refused", "the server redirects without end, or to an invalid address")
_NO_CERTIFICATE = Failure("refused", "the server's certificate is not accepted")
_TOO_LARGE = Failure("refused", "the server's answer is larger than any that it should give")
_CUT = Failure("transient", "the connection was cut")
_LATE = Failure("transient", "the server does not answer in time")
_CONNECTING = {
    "EndpointResolutionError": _NO_ENDPOINT,
    "TooManyRedirects": _NO_REDIRECT,
    "RedirectClientError": _NO_REDIRECT,
    "NonHttpUrlClientError": _NO_REDIRECT,
    "InvalidURL": _NO_ADDRESS,
    "LocationParseError": _NO_ADDRESS,
    "ClientConnectorCertificateError": _NO_CERTIFICATE,
    "SSLCertVerificationError": _NO_CERTIFICATE,
    "AnswerTooLargeError": _TOO_LARGE,
} | dict.fromkeys(
    ("EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "ClientConnectorError",
     "ClientConnectorDNSError", "ConnectionTimeoutError", "ConnectionRefusedError", "gaierror"),
    _NOT_CONNECTED,
)  # fmt: skip
"""Exceptions by the name of their class: importing botocore and aiohttp only to compare takes a second."""
_NETWORK = (
    dict.fromkeys(
        ("ReadTimeoutError", "TimeoutError", "ServerTimeoutError", "SocketTimeoutError", "FSTimeoutError"), _LATE
    )
    | dict.fromkeys(
        ("ConnectionClosedError", "HTTPClientError", "ResponseStreamingError", "IncompleteReadError",
         "ResponseParserError", "ClientPayloadError", "ServerDisconnectedError", "ClientOSError", "ConnectionError",
         "ClientConnectionError", "ClientConnectionResetError", "SSLError"),
        _CUT,
    )
    | {
        name: Failure("denied", f"access denied (no credentials on this machine, {name})")
        for name in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError",
                     "TokenRetrievalError")
    }
)  # fmt: skip
_BUILTIN = {
    "FileNotFoundError": Failure("missing", "nothing there"),
    "FileExistsError": Failure("exists", "there already"),
    "PermissionError": Failure("denied", "access denied (PermissionError)"),
}
"""Python's own exceptions, which fsspec raises where it can."""
_BAD_PROFILE = (
    "ProfileNotFound", "InvalidConfigError", "ConfigParseError", "InvalidRegionError", "NoRegionError",
)  # fmt: skip
_NO_TLS = Failure("refused", "the server does not speak https; is its address http://…?")
_TEXTS = {
    "Invalid endpoint": _NO_ENDPOINT,
    "CERTIFICATE_VERIFY_FAILED": _NO_CERTIFICATE,
    "WRONG_VERSION_NUMBER": _NO_TLS,  # OpenSSL, if a server answers in plain HTTP
    "RECORD_LAYER_FAILURE": _NO_TLS,
}


def classify(error: Exception) -> Failure | None:
    """Return what an exception of fsspec, botocore or aiohttp means; None if it is not one of theirs."""
    links = list(_chain(error))
    # No connection at all: botocore wraps the reason in what looks like a connection that was cut.
    for link in links:
        if (failure := _from_settings(link) or _look_up(_CONNECTING, link)) is not None:
            return failure
    for link in links:
        # The outermost first: below a cut connection aiohttp has an error of its own that looks like an HTTP status.
        if (failure := _look_up(_NETWORK, link) or _from_response(link)) is not None:
            return failure
    if isinstance(error, OSError):
        other = Failure("refused", error.strerror or str(error) or type(error).__name__)
        return _look_up(_BUILTIN, error) or other
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and what caused it, outermost first."""
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def _look_up(table: dict[str, Failure], error: BaseException) -> Failure | None:
    return next((table[cls.__name__] for cls in type(error).__mro__ if cls.__name__ in table), None)


def _from_settings(error: BaseException) -> Failure | None:
    """From settings with which nothing is sent, and from TLS. Most of their texts are not shown: they hold secrets."""
    name, text = type(error).__name__, str(error)
    if name in _BAD_PROFILE:
        return Failure("refused", f"the AWS configuration of this machine is broken ({name}: {first_line(error)})")
    if name == "ParamValidationError":
        bucket = "Invalid bucket name" in text
        return Failure("refused", "not a valid bucket name" if bucket else "the storage does not accept that name")
    if "in headers" in text and isinstance(error, ValueError):
        return Failure("refused", "a credential has a line end or control character in it")
    return next((failure for words, failure in _TEXTS.items() if words in text), None)


_CODES: dict[str, ErrorKind] = {
    "NoSuchBucket": "no_bucket",
    "NoSuchKey": "missing",
    "NoSuchUpload": "transient",
    "PreconditionFailed": "exists",
    "InvalidRange": "beyond_end",
    "SlowDown": "transient",
    "RequestTimeout": "transient",
    "Throttling": "transient",
    "ConditionalRequestConflict": "transient",
    "OperationAborted": "transient",
}
_STATUS: dict[int, ErrorKind] = {
    401: "denied",
    403: "denied",
    404: "missing",
    408: "transient",
    412: "exists",
    416: "beyond_end",
    425: "transient",
    429: "transient",
}
_EXPLANATIONS = {
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    "InvalidAccessKeyId": "the storage does not know the access key",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "ExpiredToken": "the credentials have expired",
    "NotImplemented": "the server cannot do that",
    "429": "too many requests for its rate limit",
}


def _from_response(error: BaseException) -> Failure | None:
    """From an HTTP status or an S3 error code."""
    response = getattr(error, "response", None)
    code, status = "", 0
    if isinstance(response, dict):  # botocore
        code = str(response.get("Error", {}).get("Code", ""))[:_LONGEST_CODE]
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    else:  # gcsfs, aiohttp
        value = getattr(error, "status", None) or getattr(error, "code", None)
        status = int(value) if isinstance(value, int | str) and str(value).isdigit() else 0
    if code.isdigit():  # HEAD has no body: botocore puts the status there
        code, status = "", int(code)
    if not code and status < 400:
        return None
    kind = _CODES.get(code) or _STATUS.get(status) or ("transient" if status >= 500 else "refused")
    label = " ".join(str(word) for word in (status or "", code) if word)
    explanation = _EXPLANATIONS.get(code or str(status))
    detail = f"{label}: {explanation}" if explanation else label
    words: dict[ErrorKind, str] = {
        "denied": f"access denied ({detail})",
        "no_bucket": "no such bucket; check its name, or create it first",
        "transient": f"the server answers {detail}",
    }
    return Failure(kind, words.get(kind, f"the server refuses ({detail})"))
