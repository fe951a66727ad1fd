"""A vLLM server without vLLM: it replays greedy answers that a real one gave about the tiny model.

What it is asked is in `requests`. Recorded anew, from a server that serves the tiny model in float32:
LOOKTWICE_RECORD=http://host:8000 python -m pytest tests/engine -k vllm
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

TAPE = Path(__file__).with_name("recorded_vllm.json")
NUM_RECORDED = 16
"""Ids recorded after each beginning."""


class FakeVllm:
    """What the server holds and does; tests change it as they go.

    `before` is called with each request for an answer, before it is answered, and `between` after each id that was
    sent. `die_after` ids of an answer the connection is gone. `num_left` answers were closed by whoever asked.
    """

    def __init__(self, decode: Callable[[list[int]], str] | None = None) -> None:
        self.version = "0.32.0"
        self.max_length = 1024
        self.has_processed_logprobs = True
        self.has_dev_mode = True
        self.weight_version = "default"
        self.requests: list[dict[str, Any]] = []
        self.calls: list[tuple[str, Any]] = []
        self.held: set[str] = set()
        self.before: Callable[[dict[str, Any]], None] = lambda request: None
        self.between: Callable[[], None] = lambda: None
        self.die_after: int | None = None
        self.num_left = 0
        self.finish_reason: str | None = None
        self.decode = decode
        self.address = ""
        self.tape: dict[str, list[Any]] = json.loads(TAPE.read_text()) if TAPE.exists() else {}

    def answer(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Choices as they are streamed, an id each."""
        params, ids = request["sampling_params"], []
        for step in self._recorded(request)[: params["max_tokens"]]:
            token, logprobs = step[0], step[1:]
            ids.append(token)
            watched = dict(zip(params["logprob_token_ids"], logprobs[1:]))
            told = {"token_id": token, "logprob": logprobs[0], "rank": 1}
            others = [{"token_id": other, "logprob": value, "rank": 2} for other, value in watched.items()]
            choice: dict[str, Any] = {"index": 0, "finish_reason": None, "stop_reason": None, "token_ids": [token]}
            choice["logprobs"] = {"content": [{**told, "top_logprobs": [told, *others]}]}
            text = self.decode(ids) if params["stop"] and self.decode else ""
            if token in params["stop_token_ids"]:
                choice |= {"finish_reason": "stop", "stop_reason": token}
            elif found := [stop for stop in params["stop"] if stop in text]:
                choice |= {"finish_reason": "stop", "stop_reason": found[0]}
            elif len(ids) == params["max_tokens"]:
                choice["finish_reason"] = self.finish_reason or "length"
            if choice["finish_reason"] is not None:
                choice["weight_versions"] = [{"version": self.weight_version, "start": 0, "end": len(ids)}]
            yield choice
            if choice["finish_reason"] is not None:
                return
        raise AssertionError(f"only {NUM_RECORDED} ids are recorded")

    def _recorded(self, request: dict[str, Any]) -> list[Any]:
        params = request["sampling_params"]
        keys = [key for kind in request.get("features", {}).get("mm_hashes", {}).values() for key in kind]
        told = [request["token_ids"], keys, sorted(map(int, params["logit_bias"])), params["temperature"]]
        key = blake2b(json.dumps(told).encode(), digest_size=8).hexdigest()
        if key not in self.tape and (upstream := os.environ.get("LOOKTWICE_RECORD")):
            self.tape[key] = record(upstream, request)
            lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(self.tape[k])}" for k in sorted(self.tape))
            TAPE.write_text("{\n" + lines + "\n}\n")
        return self.tape[key]

    def lacks(self, request: dict[str, Any]) -> bool:
        """Whether a picture came without its pixels, and is not held; those that came are held from now on."""
        features = request.get("features") or {"mm_hashes": {}, "kwargs_data": {}}
        for kind, keys in features["mm_hashes"].items():
            for key, pixels in zip(keys, features["kwargs_data"][kind]):
                if pixels is None and key not in self.held:
                    return True
                self.held.add(key)
        return False


def record(upstream: str, request: dict[str, Any]) -> list[Any]:
    """What a real server answers: of each id itself, its logprob, and those of the watched ids."""
    watched = request["sampling_params"]["logprob_token_ids"]
    params = {**request["sampling_params"], "max_tokens": NUM_RECORDED, "stop_token_ids": [], "stop": []}
    connection = HTTPConnection(upstream.removeprefix("http://"), timeout=60)
    body = json.dumps({**request, "sampling_params": params, "stream": False})
    connection.request("POST", "/inference/v1/generate", body, {"Content-Type": "application/json"})
    told = json.loads(connection.getresponse().read())["choices"][0]["logprobs"]["content"]
    rows = []
    for entry in told:
        others = {other["token_id"]: other["logprob"] for other in entry["top_logprobs"]}
        values = [entry["logprob"], *(others[token] for token in watched[:-1])]
        rows.append([entry["token_id"], *(round(value, 6) for value in values)])
    return rows


class Handler(BaseHTTPRequestHandler):
    fake: FakeVllm

    def do_GET(self) -> None:
        told = {"/version": {"version": self.fake.version}}
        told["/v1/models"] = {"data": [{"id": "tiny", "max_model_len": self.fake.max_length}]}  # type: ignore[dict-item]
        self._tell(told[self.path])

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = json.loads(text) if text else None
        if self.path != "/inference/v1/generate":
            self._control(body)
        elif body is None:
            return  # closed before it was asked
        elif "allowed_token_ids" in body["sampling_params"]:
            told = {"logprob": 0.0 if self.fake.has_processed_logprobs else -3.5}
            versions = [{"version": self.fake.weight_version, "start": 0, "end": 1}]
            self._tell({"choices": [{"logprobs": {"content": [told]}, "weight_versions": versions}]})
        else:
            self.fake.requests.append(body)
            self.fake.before(body)
            self._stream(body)

    def _control(self, body: Any) -> None:
        fake = self.fake
        fake.calls.append((self.path, body))
        if not fake.has_dev_mode:
            self.send_error(404)
            return
        if self.path == "/collective_rpc":
            fake.held.clear()
        if self.path == "/update_weight_version":
            fake.weight_version = body["new_version"]
        self._tell({"success": True})

    def _tell(self, told: Any) -> None:
        data = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, body: dict[str, Any]) -> None:
        fake = self.fake
        self.send_response(200)
        self.end_headers()
        if fake.lacks(body):
            self._event({"error": {"message": "Internal server error", "code": 500}})
            self.wfile.write(b"data: [DONE]\n\n")
            return
        try:
            for number, choice in enumerate(fake.answer(body), 1):
                self._event({"request_id": "generate-tokens-1", "usage": None, "choices": [choice]})
                if number == fake.die_after:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                fake.between()
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            fake.num_left += 1

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(fake: FakeVllm) -> Iterator[FakeVllm]:
    """Serve on a free port of this machine."""
    handler = type("FakeHandler", (Handler,), {"fake": fake})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    fake.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
