"""Downloads of both hubs: patience with a busy server, bounded HTTP requests, checked files, errors.

Does not import torch. Problems of HTTP are OSErrors (urllib's URLError and HTTPError are).
"""

from __future__ import annotations

import email.utils
import http.client
import logging
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from email.message import Message
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from ascendit.checkpoint.sources import sha256_of
from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.report import human_bytes
from ascendit.version import __version__

log = logging.getLogger("ascendit")
Result = TypeVar("Result")

TRIES = 5
WAIT = 1.0
"""Seconds before the second try; doubles with each try."""
MAX_WAIT = 60.0
"""Seconds. A server that wants more, with Retry-After, is reported instead."""
PATIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may change when the request is repeated."""
TIMEOUT = 30
"""Seconds without a byte."""
_CHUNK = 1 << 20
_DROPPED = ("ReadTimeout", "WriteTimeout", "ReadError", "RemoteProtocolError", "ChunkedEncodingError")
"""Names of exceptions of httpx and requests for a connection that was closed."""


def patiently(subject: str, call: Callable[[], Result]) -> Result:
    """Call until it succeeds: again after a dropped connection or a status of `PATIENT`, up to `TRIES` times.

    Waits as long as Retry-After says, else with exponential backoff. Raises the last error, and OSError if
    the server asks for more than `MAX_WAIT`.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except Exception as error:
            wait = _wait(error, attempt)
            if wait is None or attempt == TRIES:
                raise
            if wait > MAX_WAIT:
                raise OSError(f"{error}; the server asks to wait {wait:.0f} s") from error
            log.warning("%s: %s; try %d of %d in %.0f s", subject, error, attempt + 1, TRIES, wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _wait(error: BaseException, attempt: int) -> float | None:
    """Seconds before the next try; None if it would fail again."""
    response = getattr(error, "response", None)
    if response is None and isinstance(error, urllib.error.HTTPError):
        response = error
    if response is None and isinstance(error.__cause__, Exception):
        response = getattr(error.__cause__, "response", None)  # the Hub's library wraps errors of its listing
    backoff = WAIT * 2 ** (attempt - 1)
    if response is not None:
        status = getattr(response, "status_code", None) or getattr(response, "code", None)
        if status not in PATIENT:
            return None
        asked_for = _retry_after(response.headers)
        return backoff if asked_for is None else asked_for
    reason = getattr(error, "reason", error)
    dropped = isinstance(reason, (TimeoutError, ConnectionResetError, http.client.HTTPException))
    return backoff if dropped or type(error).__name__ in _DROPPED else None


def _retry_after(headers: Mapping[str, str] | Message) -> float | None:
    """Seconds in the header Retry-After, a number or a date; None if absent or invalid."""
    text = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


class _HttpOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to HTTP and HTTPS, never from HTTPS to HTTP."""

    def redirect_request(self, request: Any, response: Any, *args: Any) -> Any:
        target = urlsplit(args[-1]).scheme
        if target not in ("http", "https") or (request.type == "https" and target == "http"):
            response.close()
            raise OSError(f"the server redirects to {target}:, which is not followed")
        return super().redirect_request(request, response, *args)


_OPENER = urllib.request.build_opener(_HttpOnly)


def _open(url: str, headers: Mapping[str, str] | None = None) -> Any:
    if urlsplit(url).scheme not in ("http", "https"):
        raise OSError(f"{url} is not an address of HTTP")
    own = {"User-Agent": f"ascendit/{__version__}", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers={**own, **(headers or {})})
    try:
        response = _OPENER.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise
    if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
        response.close()
        raise OSError(f"the server sends {encoding}, which was not requested")
    return response


def get(url: str, *, limit: int, seconds: float) -> bytes:
    """The body at `url`. Raises OSError if it has more than `limit` bytes or takes more than `seconds`."""
    end, body = time.monotonic() + seconds, bytearray()
    with _open(url) as response:
        while data := response.read1(_CHUNK):
            body += data
            if len(body) > limit:
                raise OSError(f"the response has more than {limit:,} bytes")
            if time.monotonic() > end:
                raise OSError(f"the response takes more than {seconds:.0f} s")
    return bytes(body)


def download(url: str, file: IO[bytes], *, size: int, progress: Callable[[int], object]) -> None:
    """Append the bytes of `url` to `file`, from its end; from its start if the server cannot resume.

    `size`: bytes of the complete file. `progress` gets the number of bytes that `file` has. Raises OSError
    for another length than `size`, or another range than requested.
    """
    start = file.seek(0, 2)
    if start > size:
        start = _restart(file)
    if start == size > 0:
        return
    try:
        response = _open(url, {"Range": f"bytes={start}-"} if start else None)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the file on the server is shorter
            _restart(file)
        raise
    with response:
        if start and response.status != 206:
            start = _restart(file)
        elif start:
            _check_range(response.headers.get("Content-Range", ""), start, size, file)
        progress(start)
        while data := response.read1(_CHUNK):
            start += len(data)
            if start > size:
                _restart(file)
                raise OSError(f"the server sends more than the {size:,} bytes that it listed")
            file.write(data)
            progress(start)
    if start < size:
        raise ConnectionResetError(f"the server sent {start:,} of {size:,} bytes")


def _check_range(header: str, start: int, size: int, file: IO[bytes]) -> None:
    """Raise OSError unless `header` announces the bytes from `start` to the end; the next try restarts."""
    if header.strip() not in (f"bytes {start}-{size - 1}/{size}", f"bytes {start}-{size - 1}/*"):
        _restart(file)
        raise OSError(f"the server sends the range {header[:80]!r}, not the bytes from {start} to {size - 1}")


def _restart(file: IO[bytes]) -> int:
    file.seek(0)
    file.truncate()
    return 0


# ---- files and errors ---------------------------------------------------------------------------


def check_sha256(model: str, name: str, file: Path, sha256: str, *links: Path) -> None:
    """Remove a damaged file and the links to it. Raises EnvironmentProblem (E-HUB-01)."""
    if (digest := sha256_of(file)) != sha256:
        for path in (*links, file):
            path.unlink()
        problem = f"{name} was damaged during the download (sha256 {digest[:12]}..., not {sha256})"
        raise download_error(model, problem, "run it again: only this file is downloaded again")


def check_space(model: str, folder: Path, needed: int) -> None:
    """Raise EnvironmentProblem (E-HUB-01) unless `needed` bytes to download fit on the disk of `folder`."""
    if (free := shutil.disk_usage(folder).free) < needed:
        got = f"{human_bytes(needed)} to download, {human_bytes(free)} free"
        raise download_error(model, got, "free disk space, or choose a cache folder on another disk")


def unknown_model(model: str, reason: str, fix: str) -> UsageError:
    """The error E-HUB-01 for a model or revision that the hub does not have."""
    needs = "an existing model and revision that you have access to"
    return UsageError(f"{model}: {reason}", needs=needs, fix=fix, code="E-HUB-01")


def download_error(model: str, reason: object, fix: str) -> EnvironmentProblem:
    """The error E-HUB-01 for a download that failed."""
    needs = "a reachable hub, or a complete copy in the cache"
    return EnvironmentProblem(f"{model}: {reason}", needs=needs, fix=fix, code="E-HUB-01")
