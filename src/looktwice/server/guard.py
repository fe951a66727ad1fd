"""Who may ask, and how much of it is read: judged before a request reaches anything else.

It also counts and logs: a line a request with its path, status and time, and nothing that it held.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import time
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from looktwice.config import ServeConfig, number_of_bytes
from looktwice.errors import ConfigError
from looktwice.server.metrics import ServerMetrics
from looktwice.server.refusal import Refusal

logger = logging.getLogger("looktwice.server")
KEY_VARIABLE = "LOOKTWICE_API_KEY"
OPEN_PATHS, OPEN_FOLDER = ("/", "/health"), "/page/"
"""What needs no key: the page holds nothing, and who watches over servers has none."""
OWN_HOSTS = ("localhost", "127.0.0.1", "::1")
ANY_HOSTS = ("0.0.0.0", "::")
BODY_SECONDS = SEND_SECONDS = 60.0
BODIES_AT_ONCE = 8
"""So many of the largest bodies are read at a time."""


def read_keys(path: Path | None) -> list[bytes]:
    """The hashes of the keys in a file, and of the one in the environment. Raises ConfigError for a file without."""
    words = [os.environ.get(KEY_VARIABLE, "")]
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: the keys cannot be read ({type(error).__name__})") from error
        if not lines:
            raise ConfigError(f"{path}: no key in it; write one a line")
        words += lines
    return [_hash(word.strip()) for word in words if word.strip()]


def is_known(word: str, keys: Sequence[bytes]) -> bool:
    """Whether a word is one of the keys. It takes as long whatever the word is, and whichever key it is."""
    given = _hash(word)
    return bool(sum([hmac.compare_digest(given, key) for key in keys]))


def _hash(word: str) -> bytes:
    return hashlib.sha256(word.encode("utf-8", "replace")).digest()


class Guard:
    """Lets through what may pass: a host that is ours, a key that is known, a body that is small enough and JSON."""

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: ServerMetrics) -> None:
        self.app = app
        self.metrics = metrics
        self.keys = read_keys(config.api_key_file)
        self.hosts = {*OWN_HOSTS, config.host.lower(), *map(str.lower, config.allowed_hosts)}
        # whoever listens for everybody is called by names that only they know
        self.is_any_host = config.host in ANY_HOSTS and not config.allowed_hosts
        self.origins = {*config.allow_origins}
        self.max_bytes = number_of_bytes(config.max_body)
        self.bytes_held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
            async with asyncio.timeout(SEND_SECONDS):  # a client that does not read holds its body and its place
                await send(message)

        held = [0]
        try:
            self._check(scope)
            body = await self._body(scope, receive, held)
            await self.app(scope, _again(body, receive), noted)
        except Refusal as refusal:
            await answer(refusal, noted)
        except Exception as error:
            # what it says may hold what the request wrote
            logger.error("%s %s failed: %s", scope["method"], _endpoint(scope), type(error).__name__)
            if not status:
                await answer(Refusal("this request failed; ask again", status=500), noted)
        finally:
            self.bytes_held -= held[0]
            self._note(scope, status, time.monotonic() - started)

    def _check(self, scope: Scope) -> None:
        """Raise Refusal for a request that may not pass, whatever its body."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = _host_of(headers.get("host", ""))
        if not self.is_any_host and host not in self.hosts:
            raise Refusal(
                "this server does not answer to that host; start it with --allowed_hosts", status=403, code="host"
            )
        origin = headers.get("origin")
        if origin and origin not in self.origins and not _is_of(origin, headers.get("host", "")):
            raise Refusal("this page may not call the server; start it with --allow_origins", status=403, code="origin")
        if scope["method"] == "OPTIONS":
            return  # a browser asks what it may do, without a key
        if self.keys and not (scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDER)):
            kind, _, word = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not is_known(word.strip(), self.keys):
                raise Refusal(
                    "no key, or an unknown one; send it as `Authorization: Bearer KEY`",
                    status=HTTPStatus.UNAUTHORIZED,
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        # a page of elsewhere can make a browser send anything but this without asking first
        if scope["method"] == "POST" and kind != "application/json":
            raise Refusal("the body is JSON: send Content-Type: application/json", status=415, code="content_type")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self.max_bytes:
            raise self._too_large()

    async def _body(self, scope: Scope, receive: Receive, held: list[int]) -> bytes:
        """The whole body, however it comes; `held` counts its bytes. Raises Refusal when it is too large or too slow,
        or too much is read already."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return b""
        pieces: list[bytes] = []
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return b""
                    piece = message.get("body", b"")
                    pieces.append(piece)
                    held[0] += len(piece)
                    self.bytes_held += len(piece)
                    if held[0] > self.max_bytes:
                        raise self._too_large()
                    if self.bytes_held > BODIES_AT_ONCE * self.max_bytes:
                        raise Refusal("too much is sent at a time; try again", status=429, headers={"Retry-After": "1"})
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            raise Refusal("the body takes too long", status=408, code="slow_body") from None

    def _too_large(self) -> Refusal:
        return Refusal(f"the body is larger than {self.max_bytes:,} bytes", status=413, code="body_too_large")

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        endpoint = _endpoint(scope)
        self.metrics.requests.labels(endpoint, str(status or 499)).inc()
        self.metrics.request_seconds.labels(endpoint).observe(seconds)
        logger.info("%s %s %s %.0f ms", scope["method"], endpoint, status or "gone", 1000 * seconds)


async def answer(refusal: Refusal, send: Send) -> None:
    """Send a refusal as a response."""
    body = json.dumps(refusal.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": int(refusal.status), "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives the body, and after it what comes: that the client has left."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def given() -> Message:
        return waiting.pop() if waiting else await receive()

    return given


def _endpoint(scope: Scope) -> str:
    """The path of a request where it is one of ours; others may hold anything."""
    route: Any = scope.get("route")
    return getattr(route, "path", None) or (scope["path"] if scope["path"] in OPEN_PATHS else "other")


def _is_of(origin: str, netloc: str) -> bool:
    """Whether an origin is that of a page which this server gave: the same host and port."""
    try:
        return urlsplit(origin).netloc.lower() == netloc.lower() != ""
    except ValueError:
        return False


def _host_of(netloc: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").lower()
    except ValueError:
        return ""
