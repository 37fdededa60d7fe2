"""A small blocking HTTP client for the command line: JSON in, JSON or server-sent events out.

Standard library only, so that `pd status` and `pd chat` start at once. The load generator does not
use it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class HttpError(RuntimeError):
    """The server cannot be reached, answered with an error, or broke off; one line."""


def get_json(url: str, key: str = "", timeout_s: float = 10.0) -> Any:
    with _open(url, None, key, timeout_s) as response:
        return _parse(response.read(), url)


def send_json(method: str, url: str, body: Any, key: str = "", timeout_s: float = 10.0) -> Any:
    """`body` None: none is sent."""
    with _open(url, body, key, timeout_s, method) as response:
        return _parse(response.read(), url)


def stream_json(url: str, body: Any, key: str = "", timeout_s: float = 600.0) -> Iterator[Any]:
    """POST `body` and yield each event's JSON until [DONE]; closing the generator hangs up.

    `timeout_s` bounds the wait for each piece. Raises HttpError, also for an error inside the
    stream.
    """
    with _open(url, body, key, timeout_s) as response:
        for line in response:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = _parse(data, url)
            if isinstance(event, dict) and event.get("error"):
                raise HttpError(_message(event) or str(event["error"]))
            yield event
    raise HttpError(f"{url}: the answer broke off")


@contextlib.contextmanager
def _open(
    url: str, body: Any, key: str, timeout_s: float, method: str | None = None
) -> Iterator[http.client.HTTPResponse]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    data = None
    if body is not None:
        data = json.dumps(body).encode()
        headers["Content-Type"] = "application/json"
    try:
        request = urllib.request.Request(url, data, headers, method=method)
        here = urllib.parse.urlsplit(url).hostname in _LOOPBACK  # whatever proxy is set
        proxies = [urllib.request.ProxyHandler({})] if here else []
        with urllib.request.build_opener(*proxies).open(request, timeout=timeout_s) as response:
            yield response
    except urllib.error.HTTPError as error:
        raise HttpError(f"{url}: {error.code}: {_reason(error)}") from error
    except urllib.error.URLError as error:
        raise HttpError(f"{url}: cannot be reached: {error.reason}") from error
    except TimeoutError as error:
        raise HttpError(f"{url}: no answer for {timeout_s:g} s") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise HttpError(f"{url}: {error or type(error).__name__}") from error


def _parse(data: bytes, url: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise HttpError(f"{url}: expected JSON, got {data[:80]!r}") from error


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return _message(json.loads(error.read())) or error.reason
    except (OSError, ValueError):
        return str(error.reason)


def _message(body: Any) -> str:
    """The message of an error in OpenAI's shape, if it is one."""
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message", "")) if isinstance(error, dict) else ""
