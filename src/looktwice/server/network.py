"""Fetching from public web addresses, and from no other: each connection goes to an address that was checked.

A name is resolved once and the connection opened to the very address found, so a name that is another one a moment
later reaches nothing. A redirect is a connection like any other.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable
from contextlib import suppress
from http import HTTPStatus
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

from looktwice.errors import short
from looktwice.server.refusal import Refusal

REDIRECTS = (301, 302, 303, 307, 308)
MOST_REDIRECTS = 5
PORTS = (80, 443, 8080, 8443)
"""Ports that are called: services that are no web servers listen on others."""
FETCH_SECONDS = 20.0
NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
COMPATIBLE = ipaddress.ip_network("::/96")
"""IPv6 addresses that stand for the IPv4 address in their last 32 bits; RFC 6052, RFC 8215, RFC 4291 2.5.5.1."""


class Unreachable(httpcore.ConnectError):
    """A name that leads to no public address."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, and so are all that it stands for: IPv4 addresses inside
    IPv6 ones (mapped, compatible, NAT64, 6to4, Teredo)."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = [found.ipv4_mapped, found.sixtofour, *(found.teredo or ())]
        if any(found in network for network in (*NAT64, COMPATIBLE)):
            inner.append(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF))
        embedded = [one for one in inner if one is not None]
        if embedded:
            return all(is_public(str(one)) for one in embedded)
        if found.is_site_local:
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


def public_address(host: str, port: int) -> str:
    """An address of a host to connect to. Raises Unreachable unless all its addresses are public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Unreachable("the name of the host leads nowhere") from error
    addresses = [str(address[0]) for *_, address in found]
    if not addresses or not all(map(is_public, addresses)):
        raise Unreachable("the host is no public one")
    return addresses[0]


class TimedStream(httpcore.NetworkStream):
    """A connection that ends at a moment of the monotonic clock, however slowly its other side writes."""

    def __init__(self, inner: httpcore.NetworkStream, ends: float) -> None:
        self.inner, self.ends = inner, ends

    def _left(self, timeout: float | None, error: type[Exception]) -> float:
        left = self.ends - time.monotonic()
        if left <= 0:
            raise error("it takes too long")
        return left if timeout is None else min(timeout, left)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.inner.read(max_bytes, self._left(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.inner.write(buffer, self._left(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self.inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        inner = self.inner.start_tls(ssl_context, server_hostname, self._left(timeout, httpcore.ConnectTimeout))
        return TimedStream(inner, self.ends)

    def get_extra_info(self, info: str) -> Any:
        return self.inner.get_extra_info(info)


class PublicBackend(httpcore.NetworkBackend):
    """Opens connections to public addresses alone, which end at a moment of the monotonic clock."""

    def __init__(self, ends: float) -> None:
        self.inner = httpcore.SyncBackend()
        self.ends = ends

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        address = public_address(host, port)
        stream = self.inner.connect_tcp(address, port, timeout, local_address, socket_options)
        return TimedStream(stream, self.ends)


def fetch(url: str, *, max_bytes: int, seconds: float = FETCH_SECONDS) -> bytes:
    """What lies at a public web address. Raises Refusal for another kind of address, and for what cannot be had."""
    ends = time.monotonic() + seconds
    context = ssl.create_default_context()
    with httpcore.ConnectionPool(ssl_context=context, network_backend=PublicBackend(ends), max_connections=1) as pool:
        for _ in range(MOST_REDIRECTS + 1):
            check_url(url)
            try:
                target = _ask(pool, url, max_bytes=max_bytes, ends=ends)
            except Unreachable as error:
                raise _refused(url, str(error)) from error
            except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError) as error:
                raise _refused(url, f"it cannot be fetched ({type(error).__name__})") from error
            if isinstance(target, bytes):
                return target
            url = urljoin(url, target)
    raise _refused(url, f"more than {MOST_REDIRECTS} redirects")


def check_url(url: str) -> None:
    """Raise Refusal unless an address can be that of a picture in the public web."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
    except ValueError as error:
        raise _refused(url, "it is no web address") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _refused(url, "it is no address of http or https")
    if parts.username is not None or parts.password is not None:
        raise _refused(url, "it holds a name or a password")
    if port not in PORTS:
        raise _refused(url, f"its port is none of {', '.join(map(str, PORTS))}")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise _refused(url, "it holds letters that no web address has; write them percent-encoded")
    with suppress(ValueError):  # a name, which is resolved when it is called
        if not is_public(str(ipaddress.ip_address(parts.hostname))):
            raise _refused(url, "the host is no public one")


def _ask(pool: httpcore.ConnectionPool, url: str, *, max_bytes: int, ends: float) -> bytes | str:
    """The body at an address, or the address that it sends on to."""
    left = max(0.1, ends - time.monotonic())
    timeouts = dict.fromkeys(("connect", "read", "write", "pool"), min(left, 10.0))
    headers: dict[str | bytes, str | bytes] = {"Host": urlsplit(url).netloc, "User-Agent": "looktwice", "Accept": "*/*"}
    with pool.stream("GET", url.partition("#")[0], headers=headers, extensions={"timeout": timeouts}) as response:
        if response.status in REDIRECTS:
            location = dict(response.headers).get(b"location") or dict(response.headers).get(b"Location")
            if not location:
                raise _refused(url, "it redirects to nowhere")
            return location.decode("ascii", "replace")
        if response.status != HTTPStatus.OK:
            raise _refused(url, f"its server answers with status {response.status}")
        body = bytearray()
        for piece in response.iter_stream():
            body += piece
            if len(body) > max_bytes:
                raise _refused(url, f"it is larger than {max_bytes:,} bytes")
            if time.monotonic() > ends:
                raise _refused(url, "it takes too long")
        return bytes(body)


def _refused(url: str, why: str) -> Refusal:
    return Refusal(f"the picture at {short(url)}: {why}", param="messages", code="image_not_fetched")
