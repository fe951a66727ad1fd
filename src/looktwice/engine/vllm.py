"""The engine behind vLLM servers: rollouts are spread over them, and each stays with the one that holds its cache.

A segment is one request. The next one sends all ids again, of which the server's prefix cache has all but the last
block, and names the pictures it has seen by their keys. Our ids are the truth: none is read back but those sampled.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Literal

from torch import nn

from looktwice.engine.interface import Driver, Request, Segment, StopCause, check_images
from looktwice.engine.sampling import mixed_seed
from looktwice.engine.vllm_server import Answer, Piece, Prompt, VllmServer, check_sampling
from looktwice.errors import ConfigError
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.weights import save_merged
from looktwice.processing.images import PatchedImage

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class ServedSegment(Segment):
    """A segment that says which weights wrote each id: `weight_versions`, as `push_weights` named them."""

    weight_versions: list[str]


@dataclass(kw_only=True, eq=False)
class Rollout:
    """A rollout: all its ids and pictures so far, and what it sampled since the last decision."""

    number: int
    request: Request
    driver: Driver
    server: VllmServer
    seed: int
    ids: list[int]
    images: list[PatchedImage]
    allowance: int
    new_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    drawn_logprobs: list[float] = field(default_factory=list)
    weight_versions: list[str] = field(default_factory=list)
    answer: Answer | None = None

    def close(self, stop: StopCause) -> ServedSegment:
        """What was sampled since the last decision, as a segment; its ids are then part of the rollout."""
        unknown = len(self.new_ids) - len(self.weight_versions)  # of an answer that was cut off
        segment = ServedSegment(
            ids=self.new_ids,
            logprobs=self.logprobs,
            drawn_logprobs=self.drawn_logprobs,
            stop=stop,
            weight_versions=self.weight_versions + [self.server.weight_version] * unknown,
        )
        self.ids += self.new_ids
        self.new_ids, self.logprobs, self.drawn_logprobs, self.weight_versions = [], [], [], []
        return segment


@dataclass(frozen=True, kw_only=True)
class News:
    """Something to be dealt with by the thread that steps. Of an answer that its rollout has left, it is not read."""

    number: int
    answer: Answer | None
    told: Piece | Exception | Literal["cancelled"]


class VllmEngine:
    """Samples on vLLM servers, named by their addresses; at most `max_rollouts` live at a time on each.

    The siblings of a group go to one server, which computes their prompt once. Drivers are called by the thread that
    steps. Raises ConfigError when a server cannot be used.
    """

    def __init__(self, addresses: Sequence[str], config: Ovis2_5Config, *, max_rollouts: int = 64) -> None:
        if not addresses:
            raise ConfigError("no vLLM server is named; give one address or more, such as http://localhost:8000")
        self.config = config
        self.max_rollouts = max_rollouts
        self.servers = [VllmServer(address, config) for address in addresses]
        self._numbers = count()
        self._arrivals: deque[list[Rollout]] = deque()
        self._waiting: dict[VllmServer, deque[Rollout]] = {server: deque() for server in self.servers}
        self._rollouts: dict[int, Rollout] = {}
        self._live: dict[VllmServer, set[int]] = {server: set() for server in self.servers}
        self._deadlines: dict[int, float] = {}
        self._news: SimpleQueue[News | None] = SimpleQueue()

    def submit(self, request: Request) -> list[int]:
        """Queue a request. Raises ValueError when its pictures do not fit its ids, ConfigError for a sampling that
        vLLM has not, for masks and for an adapter."""
        check_images(request.prompt.input_ids, request.prompt.images, self.config)
        check_sampling(request.sampling)
        if request.masks or request.adapter is not None:
            raise ConfigError("a JSON schema and an adapter are of the built-in engine; leave them out with vLLM")
        group = [
            Rollout(
                number=next(self._numbers),
                request=request,
                driver=driver,
                server=self.servers[0],
                seed=mixed_seed(request.seed, place),
                ids=[*request.prompt.input_ids],
                images=[*request.prompt.images],
                allowance=request.max_new_tokens,
            )
            for place, driver in enumerate(request.drivers)
        ]
        self._arrivals.append(group)
        self._news.put(None)  # whoever waits in `step` looks again
        return [rollout.number for rollout in group]

    def cancel(self, number: int) -> None:
        self._news.put(News(number=number, answer=None, told="cancelled"))

    def run(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.submit(request)
        while self.step():
            pass

    def step(self) -> bool:
        """Deal with all that servers have told, after waiting for the first of it; False when nothing is left to do."""
        self._let_in()
        if self._rollouts:
            self._deal_with_news()
            self._cut_late()
        return bool(self._rollouts or self._arrivals)

    def push_weights(self, model: nn.Module, folder: Path, version: str) -> None:
        """Have all servers sample from this model: what follows is of `version`. Nothing is done if all have it.

        Call it from the thread that steps.

        The weights are written to `folder`, adapters merged, which every server must see under the same path. Answers
        begun before are finished first. Raises CheckpointError when they cannot be written, ServerError when a server
        does not take them.
        """
        if all(server.weight_version == version for server in self.servers):
            return
        folder = folder.absolute()
        save_merged(model, folder)
        with ThreadPoolExecutor(len(self.servers)) as threads:
            list(threads.map(lambda server: server.load_weights(folder, version), self.servers))

    def note_weights(self, version: str) -> None:
        """Note that another process has pushed the weights of `version`: what follows is theirs, and of what the
        servers held before they know nothing more."""
        for server in self.servers:
            server.note_weights(version)

    def _let_in(self) -> None:
        """Give each new group to the server with the least to do, and start what has room."""
        while self._arrivals:
            group = self._arrivals.popleft()
            server = min(self.servers, key=lambda server: len(self._live[server]) + len(self._waiting[server]))
            for rollout in group:
                rollout.server = server
                self._rollouts[rollout.number] = rollout
            self._waiting[server].extend(group)
        for server, waiting in self._waiting.items():
            while waiting and len(self._live[server]) < self.max_rollouts:
                rollout = waiting.popleft()
                if rollout.number in self._rollouts:  # else it was cancelled
                    self._live[server].add(rollout.number)
                    if rollout.request.max_seconds is not None:
                        self._deadlines[rollout.number] = time.monotonic() + rollout.request.max_seconds
                    self._send(rollout)

    def _deal_with_news(self) -> None:
        patience = None
        if self._deadlines:
            patience = max(0.0, min(self._deadlines.values()) - time.monotonic())
        try:
            told = [self._news.get(timeout=patience)]
        except Empty:
            return
        told += [self._news.get() for _ in range(self._news.qsize())]  # nobody else takes from it
        for news in told:
            if news is not None and (rollout := self._rollouts.get(news.number)) is not None:
                self._take(rollout, news)

    def _take(self, rollout: Rollout, news: News) -> None:
        if news.told == "cancelled":
            self._end(rollout, "cancelled")
        elif news.answer is rollout.answer:
            if isinstance(news.told, Piece):
                self._hear(rollout, news.told)
            else:
                self._fail(rollout, news.told)

    def _hear(self, rollout: Rollout, piece: Piece) -> None:
        try:
            for token, logprob, drawn_logprob in zip(piece.ids, piece.logprobs, piece.drawn_logprobs, strict=True):
                rollout.new_ids.append(token)
                rollout.logprobs.append(logprob)
                rollout.drawn_logprobs.append(drawn_logprob)
                rollout.driver.hear(token, logprob)
        except Exception as error:
            self._fail(rollout, error)
            return
        rollout.weight_versions += [version for version, number in piece.weights for _ in range(number)]
        if piece.stop == "length" and len(rollout.new_ids) < rollout.allowance:
            self._end(rollout, "no_room")
        elif piece.stop is not None:
            self._ask(rollout, piece.stop)

    def _ask(self, rollout: Rollout, stop: StopCause) -> None:
        """Hand a segment to the driver, and go on as it says."""
        rollout.answer = None
        try:
            reply = rollout.driver.respond(rollout.close(stop))
            if reply is not None:
                check_images(reply.ids, reply.images, self.config)
        except Exception as error:
            self._fail(rollout, error)
            return
        if reply is None:
            self._forget(rollout)
            return
        rollout.ids += reply.ids
        rollout.images += reply.images
        rollout.allowance = reply.max_new_tokens
        self._send(rollout)

    def _send(self, rollout: Rollout) -> None:
        request, room = rollout.request, rollout.server.max_length - len(rollout.ids)
        if room < 1:
            self._end(rollout, "no_room")
            return
        position = len(rollout.ids) - len(request.prompt)
        prompt = Prompt(
            ids=[*rollout.ids],
            images=[*rollout.images],
            max_new_tokens=min(rollout.allowance, room),
            sampling=request.sampling,
            seed=mixed_seed(rollout.seed, position) & MAX_SEED,  # a segment's own: no two draw the same numbers
            stop_ids=request.stop_ids,
            stop_texts=request.stop_texts,
            banned_ids=request.banned_ids.union(self.config.visual_token_ids),
        )
        rollout.answer = rollout.server.answer(prompt)
        Thread(target=self._listen, args=(rollout.number, rollout.answer), daemon=True).start()

    def _listen(self, number: int, answer: Answer) -> None:
        """Put all that an answer tells into the queue: the work of a thread."""
        try:
            for piece in answer:
                self._news.put(News(number=number, answer=answer, told=piece))
        except Exception as error:
            self._news.put(News(number=number, answer=answer, told=error))

    def _cut_late(self) -> None:
        now = time.monotonic()
        for number in [number for number, deadline in self._deadlines.items() if now >= deadline]:
            self._end(self._rollouts[number], "seconds")

    def _end(self, rollout: Rollout, stop: StopCause) -> None:
        """Cut a rollout off; its driver is told."""
        self._forget(rollout)
        try:
            rollout.driver.respond(rollout.close(stop))
        except Exception as error:
            rollout.driver.fail(error)

    def _fail(self, rollout: Rollout, error: Exception) -> None:
        self._forget(rollout)
        rollout.driver.fail(error)

    def _forget(self, rollout: Rollout) -> None:
        del self._rollouts[rollout.number]
        self._live[rollout.server].discard(rollout.number)
        self._deadlines.pop(rollout.number, None)
        if rollout.answer is not None:
            rollout.answer.close()
