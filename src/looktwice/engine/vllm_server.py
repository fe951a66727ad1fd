"""One vLLM server: what is asked of it over HTTP, and how ids, pixels, logprobs and weights travel.

Answers come from its token-in, token-out endpoint (`--enable-scale-out`), which takes our own ids, visual tokens
written out, and our own pixels. Both logprobs of an id are had from one: the server gives those of the distribution it
drew from (`--logprobs-mode processed_logprobs`), and tells how likely the banned ids are under their bias.
"""

from __future__ import annotations

import json
import math
import re
import socket
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from threading import Event, Lock
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from looktwice.engine.interface import StopCause
from looktwice.engine.sampling import Sampling
from looktwice.errors import ConfigError, ServerError, one_line
from looktwice.model.configuration import Ovis2_5Config
from looktwice.processing.images import PatchedImage, normalise

OLDEST = (0, 32)
"""The oldest version this was run with. Those before February 2026 apply the tower's last norm (vLLM pull request 34426
took it out)."""
NEEDED_FLAGS = "--enable-scale-out --logprobs-mode processed_logprobs"
NEEDED_FOR_WEIGHTS = "VLLM_SERVER_DEV_MODE=1"
PAUSE, RESUME = "/pause?mode=wait", "/resume"
PATIENCE_S = 600.0
"""How long a server may be silent before it counts as lost."""
BAN = -100.0
"""Added to the logit of a banned id: so much that it is never drawn, so little that its logprob is still told."""
FLOOR = -9999.0
"""vLLM tells no lower logprob."""
COLDEST = 0.01
"""vLLM raises lower temperatures to this one without a word."""
RAW = 3
"""The msgpack extension in which vLLM's own encoder puts the bytes of a tensor."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What to continue, and how: one request to a server."""

    ids: list[int]
    images: list[PatchedImage]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop_ids: frozenset[int]
    stop_texts: tuple[str, ...]
    banned_ids: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Ids as they come, with both logprobs; the last piece says why no more come, and which weights wrote how many.

    `weights` are pairs of a version and the number of ids it wrote, of the whole answer.
    """

    ids: list[int]
    logprobs: list[float]
    drawn_logprobs: list[float]
    stop: StopCause | None = None
    weights: list[tuple[str, int]] = field(default_factory=list)


class VllmServer:
    """A server at an address such as `http://host:8000`.

    Raises ConfigError when it does not answer, is too old, or was started without what is needed, and when the extra
    `vllm` is not installed here.
    """

    def __init__(self, address: str, config: Ovis2_5Config) -> None:
        self.address = address if "://" in address else f"http://{address}"
        self.config = config
        self.weight_version = ""
        self._held: dict[str, Event] = {}
        self._lock = Lock()
        packer()
        try:
            self._check_version(self._ask("GET", "/version")["version"])
            self.max_length: int = self._ask("GET", "/v1/models")["data"][0]["max_model_len"]
            self._check_flags()
        except (ServerError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{self.address}: no vLLM server that can be used ({error}); start one: python -m "
                f"vllm.entrypoints.openai.api_server --model FOLDER --trust-remote-code {NEEDED_FLAGS}"
            ) from error

    def _check_version(self, version: str) -> None:
        numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
        if numbers < OLDEST:
            raise ConfigError(
                f"{self.address}: vLLM {version} is older than {'.'.join(map(str, OLDEST))}, the oldest that was tried "
                "(those before February 2026 apply the vision tower's last norm, so every answer about a picture is "
                "another one); install a newer one there"
            )

    def _check_flags(self) -> None:
        """A lone allowed id has the logprob 0 where it was drawn, and another one in the plain distribution."""
        params = {"temperature": 0, "max_tokens": 1, "allowed_token_ids": [1], "logprobs": 1}
        told = self._ask("POST", "/inference/v1/generate", {"token_ids": [0], "sampling_params": params})["choices"][0]
        self.weight_version = told["weight_versions"][-1]["version"]
        if told["logprobs"]["content"][0]["logprob"] != 0:
            raise ConfigError(
                f"{self.address}: this server tells logprobs of the plain distribution; start it with {NEEDED_FLAGS}"
            )

    def answer(self, prompt: Prompt) -> Answer:
        """An answer to iterate over. Nothing is sent before that."""
        return Answer(self, prompt)

    def load_weights(self, folder: Path, version: str) -> None:
        """Take the weights of a folder in the released layout, which the server sees under the same path.

        Answers begun before are finished first, and caches of the old weights are emptied. Raises ServerError.
        """
        self._ask("POST", PAUSE)
        try:
            settings = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._ask("POST", "/collective_rpc", settings)
            if not self._ask("POST", "/reset_prefix_cache")["success"]:
                raise ServerError(f"{self.address}: the cache of the old weights is still in use; push again")
            self._ask("POST", "/update_weight_version", {"new_version": version})
            self.weight_version = version
        finally:
            self.settle([*self._held], is_held=False)  # the server forgot all pictures
            self._ask("POST", RESUME)

    def note_weights(self, version: str) -> None:
        """Note that the server has weights of this version, for which it forgot all pictures."""
        self.weight_version = version
        self.settle([*self._held], is_held=False)

    def features(self, prompt: Prompt, sent: list[str], *, is_full: bool) -> dict[str, Any]:
        """The pictures of a prompt as the endpoint takes them; the keys of those whose pixels are in it go to `sent`.

        A picture that the server holds is named by its key alone; one that is on its way is waited for, unless others
        wait for what is sent here. `is_full` sends all pixels.
        """
        kinds: dict[str, tuple[list[str], list[dict[str, int]], list[str | None]]] = {}
        for image, (offset, length) in zip(prompt.images, self._ranges(prompt.ids), strict=True):
            key = image_key(image)
            keys, places, pixels = kinds.setdefault("video" if image.is_video else "image", ([], [], []))
            keys.append(key)
            places.append({"offset": offset, "length": length})
            if not is_full and (key in sent or self._is_held(key, patience=0 if sent else PATIENCE_S)):
                pixels.append(None)
            else:
                sent.append(key)
                pixels.append(encode_image(image, self.config.visual_vocab_size))
        names = ("mm_hashes", "mm_placeholders", "kwargs_data")
        return {name: {kind: parts[i] for kind, parts in kinds.items()} for i, name in enumerate(names)}

    def _ranges(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Where each picture stands, its start and end included: offset and length."""
        config, first = self.config, 0
        for place, token in enumerate(ids):
            if token in (config.image_start_token_id, config.video_start_token_id):
                first = place
            elif token in (config.image_end_token_id, config.video_end_token_id):
                yield first, place + 1 - first

    def _is_held(self, key: str, *, patience: float) -> bool:
        """Whether the server has a picture, once whoever is sending it is done; if not, the caller is to send it."""
        with self._lock:
            if (is_there := self._held.get(key)) is None:
                self._held[key] = Event()
                return False
        return is_there.wait(patience)

    def settle(self, keys: Sequence[str], *, is_held: bool) -> None:
        """Note that the server has these pictures, or that it has not."""
        with self._lock:
            for key in keys:
                is_there = self._held.setdefault(key, Event()) if is_held else self._held.pop(key, Event())
                is_there.set()

    def connect(self) -> HTTPConnection:
        parts = urlsplit(self.address)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.netloc, timeout=PATIENCE_S)
        connection.connect()
        return connection

    def send(self, connection: HTTPConnection, method: str, path: str, body: Any = None) -> HTTPResponse:
        """The response, its body unread. Raises ServerError for another status than 200."""
        text = None if body is None else json.dumps(body).encode()
        prefix = urlsplit(self.address).path.rstrip("/")
        connection.request(method, prefix + path, text, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            told = one_line(response.read().decode(errors="replace"), 300)
            mend = f"; start it with {NEEDED_FOR_WEIGHTS}" if path in (PAUSE, RESUME) else ""
            raise ServerError(f"{self.address}{path}: status {response.status}, {told}{mend}", response.status)
        return response

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        try:
            with closing(self.connect()) as connection:
                text = self.send(connection, method, path, body).read()
            return json.loads(text) if text else None
        except (OSError, HTTPException, ValueError) as error:
            raise ServerError(f"{self.address}{path}: {error}") from error


class Answer:
    """One answer as it comes. `close` may be called from any thread: the server then stops writing it."""

    def __init__(self, server: VllmServer, prompt: Prompt) -> None:
        self.server = server
        self.prompt = prompt
        self.is_closed = False
        self._socket: socket.socket | None = None

    def __iter__(self) -> Iterator[Piece]:
        """Raises ServerError when the server fails or goes away; ends early when closed."""
        for is_full in (False, True):
            has_begun = False
            try:
                for piece in self._pieces(is_full=is_full):
                    has_begun = True
                    yield piece
                return
            except ServerError as error:
                # no more is said of a picture that was left out, and that the server no longer holds
                may_lack_pixels = error.status in (500, 503) and bool(self.prompt.images)
                if is_full or has_begun or self.is_closed or not may_lack_pixels:
                    raise

    def close(self) -> None:
        self.is_closed = True
        if self._socket is not None:
            with suppress(OSError):  # it was over
                self._socket.shutdown(socket.SHUT_RDWR)

    def _pieces(self, *, is_full: bool) -> Iterator[Piece]:
        server = self.server
        sent: list[str] = []
        body: dict[str, Any] = {"token_ids": self.prompt.ids, "sampling_params": sampling_params(self.prompt)}
        body["stream"] = True
        try:
            if self.prompt.images:
                body["features"] = server.features(self.prompt, sent, is_full=is_full)
            for event in self._events(body):
                server.settle(sent, is_held=True)
                sent.clear()
                yield piece_of(event["choices"][0], self.prompt)
        except (OSError, HTTPException) as error:
            if not self.is_closed:
                raise ServerError(f"{server.address}: the server is gone ({error}); is it still running?") from error
        finally:
            server.settle(sent, is_held=False)

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The server-sent events up to the last one that counts."""
        with closing(self.server.connect()) as connection:
            self._socket = connection.sock
            if self.is_closed:
                return
            for line in self.server.send(connection, "POST", "/inference/v1/generate", body):
                text = line.decode().removeprefix("data: ").strip()
                if text == "[DONE]":
                    return
                if not text:
                    continue
                event = json.loads(text)
                if "error" in event:
                    told = one_line(str(event["error"].get("message")), 300)
                    raise ServerError(f"{self.server.address}: {told}", event["error"].get("code", 500))
                yield event
            raise ConnectionError("the answer has no end")


def check_sampling(sampling: Sampling) -> None:
    """Raises ConfigError for what vLLM would do otherwise than it is meant here."""
    if 0 < sampling.temperature < COLDEST:
        raise ConfigError(
            f"temperature is {sampling.temperature}, and vLLM has none between 0 and {COLDEST}; use 0 (greedy)"
        )
    if sampling.presence_penalty:
        raise ConfigError(
            "presence_penalty: vLLM would forget at each crop what was written before it; use repetition_penalty"
        )


def sampling_params(prompt: Prompt) -> dict[str, Any]:
    """The fields of vLLM's SamplingParams. Ours have the same names."""
    banned = sorted(prompt.banned_ids)
    watched = [*banned, banned[0]]  # vLLM tells as many ids as it is given, the sampled one among them
    return {
        **asdict(prompt.sampling),
        "seed": prompt.seed,
        "max_tokens": prompt.max_new_tokens,
        "ignore_eos": True,  # it is one of our stop ids, or none
        "stop_token_ids": sorted(prompt.stop_ids),
        "stop": list(prompt.stop_texts),
        "detokenize": bool(prompt.stop_texts),
        "skip_special_tokens": False,
        "logit_bias": {str(token): BAN for token in banned},
        "logprob_token_ids": watched,
        "logprobs": len(watched),
    }


def piece_of(choice: dict[str, Any], prompt: Prompt) -> Piece:
    """A piece of an answer as the server streams it. Raises ServerError when it was ended from outside."""
    told = (choice.get("logprobs") or {}).get("content") or []
    both = [both_logprobs(entry, prompt) for entry in told]
    reason, stop = choice.get("finish_reason"), None
    if reason in ("abort", "error"):
        raise ServerError("the server broke the answer off; ask again", 503)
    if reason == "stop":
        stop = "stop_text" if isinstance(choice.get("stop_reason"), str) else "stop_id"
    elif reason is not None:
        stop = "length"
    spans = choice.get("weight_versions") or []
    return Piece(
        ids=choice.get("token_ids") or [],
        logprobs=[plain for plain, _ in both],
        drawn_logprobs=[drawn for _, drawn in both],
        stop=stop,  # type: ignore[arg-type]
        weights=[(span["version"], span["end"] - span["start"]) for span in spans],
    )


def both_logprobs(entry: dict[str, Any], prompt: Prompt) -> tuple[float, float]:
    """Of one id: its logprob in the plain distribution, and in the one drawn from.

    With p_b the probability of a banned id, of which the server tells log p_b + BAN / temperature relative to what is
    left, the plain one is lower by log(1 + sum p_b). Truncation and penalties leave nothing to tell it by: it is NaN.
    Greedy has the plain one at temperature 1, and draws its id for sure.
    """
    sampling, drawn = prompt.sampling, entry["logprob"]
    bias = BAN / (sampling.temperature or 1.0)
    banned = {other["token_id"]: other["logprob"] for other in entry["top_logprobs"]}
    mass = sum(math.exp(banned[token] - bias) for token in prompt.banned_ids if banned[token] > FLOOR)
    plain = drawn - math.log1p(mass) if is_whole(sampling) else math.nan
    return plain, 0.0 if sampling.temperature == 0 else drawn


def is_whole(sampling: Sampling) -> bool:
    """Whether only banned ids are missing from the distribution that is drawn from."""
    return Sampling(temperature=sampling.temperature) == sampling


def image_key(image: PatchedImage) -> str:
    """What vLLM's caches know a picture by: a hash of its pixels and its shape."""
    digest = blake2b(digest_size=16)
    digest.update(repr((image.grid_thw, image.is_video)).encode())
    digest.update(image.pixel_values.reshape(-1).numpy().data)
    return digest.hexdigest()


def packer() -> Any:
    """The library in whose format pictures travel. Raises ConfigError when it is not installed."""
    try:
        import msgpack
    except ImportError as error:
        raise ConfigError("pictures travel to vLLM by msgpack; install looktwice[vllm]") from error
    return msgpack


def encode_image(image: PatchedImage, visual_vocab_size: int) -> str:
    """Pixels, grid and indicators of a picture in vLLM's encoding of its `MultiModalKwargsItem`.

    Indicators are the last four rows of the visual table: image start and end, video start and end.
    """
    msgpack = packer()
    first = visual_vocab_size - (2 if image.is_video else 4)
    tensors = {
        "pixel_values": normalise(image.pixel_values),
        "grids": torch.tensor([image.grid_thw]),
        "indicator_tokens": torch.tensor([first, first + 1]),
    }
    prefix = "video_" if image.is_video else ""

    def encoded(tensor: Tensor) -> list[Any]:
        data = msgpack.ExtType(RAW, tensor.contiguous().numpy().tobytes())
        return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), data]

    item = {
        prefix + name: {"data": encoded(tensor), "field": ["batched", {"keep_on_cpu": False}]}
        for name, tensor in tensors.items()
    }
    return b64encode(msgpack.packb(item)).decode("ascii")
