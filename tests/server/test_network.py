"""Only public addresses are fetched from: whatever a name says, and whatever form an address is written in."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from looktwice.server import network
from looktwice.server.network import fetch, is_public
from looktwice.server.refusal import Refusal


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "240.0.0.1", "::", "::1",
        "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::a00:1",
        "2002:7f00:1::", "2002:a9fe:a9fe::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1",
        "ff02::1", "2001:0:4136:e378:8000:63bf:80ff:fffe", "2001:db8::1", "100::1", "localhost", "",
    ],
)  # fmt: skip
def test_an_address_that_is_not_of_the_public_internet(address) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_an_address_of_the_public_internet(address) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png", "http://localhost/a.png", "http://2130706433/a.png", "http://0x7f.1/a.png",
        "http://0177.0.0.1/a.png", "http://[::1]/a.png", "http://[::ffff:127.0.0.1]/a.png", "http://0/a.png",
        "http://169.254.169.254/latest/meta-data/", "http://user:word@example.org/a.png", "ftp://example.org/a.png",
        "http://example.org:22/a.png", "http://[fe80::1%25lo]/a.png", "http:///a.png", "http://example.org:x/",
        "http://exa mple.org/", "http://ex\u0430mple.org/", "http://.../a.png", "http://127.0.0.1:8080/a.png",
    ],
)  # fmt: skip
def test_an_address_that_leads_inside_is_refused(url) -> None:
    with pytest.raises(Refusal) as refusal:
        fetch(url, max_bytes=1000, seconds=2)
    assert refusal.value.code == "image_not_fetched"


class Handler(BaseHTTPRequestHandler):
    answers: dict[str, tuple[int, dict[str, str], bytes]] = {}

    def do_GET(self) -> None:
        status, headers, body = self.answers[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A web server, called public.example, which a test may call as the only one on the loopback."""
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    real, port = socket.getaddrinfo, server.server_port

    def found(host: str, wanted: int, *rest: object, **named: object) -> object:
        return real("127.0.0.1" if host == "public.example" else host, wanted, *rest, **named)  # type: ignore[arg-type]

    def public(host: str, wanted: int) -> str:
        return "127.0.0.1" if host == "public.example" else real_address(host, wanted)

    real_address = network.public_address
    monkeypatch.setattr(network, "public_address", public)
    monkeypatch.setattr(network, "PORTS", (80, port))
    yield port
    server.shutdown()
    server.server_close()


def test_what_a_public_server_has_is_fetched_also_by_a_redirect(web) -> None:
    Handler.answers = {"/b": (200, {}, b"found"), "/a": (302, {"Location": "/b"}, b"")}
    assert fetch(f"http://public.example:{web}/a", max_bytes=100) == b"found"


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:{port}/b", "http://[::ffff:127.0.0.1]:{port}/b", "file:///etc/passwd"]
)
def test_a_redirect_to_inside_is_refused(web, target) -> None:
    Handler.answers = {"/a": (302, {"Location": target.format(port=web)}, b""), "/b": (200, {}, b"secret")}
    with pytest.raises(Refusal):
        fetch(f"http://public.example:{web}/a", max_bytes=100)


@pytest.mark.parametrize(
    "answer, said",
    [
        ((200, {}, b"x" * 200), "larger than 100 bytes"),
        ((500, {}, b""), "status 500"),
        ((302, {}, b""), "to nowhere"),
        ((302, {"Location": "/a"}, b""), "redirects"),
    ],
)
def test_what_is_too_large_or_no_answer_is_refused(web, answer, said) -> None:
    Handler.answers = {"/a": answer}
    with pytest.raises(Refusal, match=said):
        fetch(f"http://public.example:{web}/a", max_bytes=100)


def test_a_name_that_changes_its_address_reaches_only_the_one_that_was_checked(monkeypatch) -> None:
    """The first answer of the name server is public, the next is the loopback: only the first is connected to."""
    answers = iter(["93.184.216.34", "127.0.0.1", "127.0.0.1"])
    tried: list[str] = []

    def found(host: str, port: int, *_: object, **__: object) -> object:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    def connect(self: object, host: str, *_: object) -> None:
        tried.append(host)
        raise network.httpcore.ConnectError("not in a test")

    monkeypatch.setattr(network.socket, "getaddrinfo", found)
    monkeypatch.setattr(network.httpcore.SyncBackend, "connect_tcp", connect)
    with pytest.raises(Refusal):
        fetch("http://rebinding.example/a.png", max_bytes=100)
    assert tried == ["93.184.216.34"]


def test_a_name_with_a_private_address_among_others_is_refused(monkeypatch) -> None:
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 80)) for one in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(network.Unreachable):
        network.public_address("two.example", 80)


def test_a_server_that_dribbles_does_not_hold_a_fetch_beyond_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def dribble(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            for _ in range(50):
                try:
                    connection.sendall(b"H")
                except OSError:
                    return
                time.sleep(0.1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setattr(network, "PORTS", (port,))
        monkeypatch.setattr(network, "is_public", lambda address: True)
        threading.Thread(target=dribble, args=(listener,), daemon=True).start()
        started = time.monotonic()
        with pytest.raises(Refusal, match="cannot be fetched"):
            network.fetch(f"http://localhost:{port}/a.png", max_bytes=100, seconds=0.5)
        assert time.monotonic() - started < 3
