"""The built-in engine: rollouts come, advance together and go, each from its own pages of one cache.

A pass is: the scheduler chooses (scheduler.py), the runner computes (runner.py), each row draws its id (sampling.py),
and whoever a finished segment belongs to says how to go on.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from looktwice.engine.attention import PAGED
from looktwice.engine.cache import Cache
from looktwice.engine.interface import Continuation, Request, Segment, StopCause
from looktwice.engine.runner import ImageFeatures, Runner
from looktwice.engine.sampling import Sampling, Seen, draw, mixed_seed, uniforms
from looktwice.engine.scheduler import Feed, Scheduler
from looktwice.engine.state import SharedPrompt, Trajectory
from looktwice.errors import ConfigError
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.processing.images import PatchedImage

PASS_TOKENS = 4096
"""Ids of a pass at the most: it bounds the memory of activations, and how long a long prompt holds up the others."""
FEATURE_BYTES = 256 * 2**20
CACHE_SHARE = 0.25
"""Of the memory of the machine (of a GPU: of what is free there) that the cache may take unless it is told."""


@dataclass(kw_only=True)
class Stats:
    """What an engine has done so far, and how full it is.

    `seconds` are CPU seconds of this process and `tokens` ids by phase: prefill, decode; seconds also of vision,
    sampling and drivers. `rows_used` of `rows_offered` decoded in the passes that had work for all rows.
    """

    num_waiting: int = 0
    num_live: int = 0
    num_passes: int = 0
    num_finished: int = 0
    num_preemptions: int = 0
    num_images_encoded: int = 0
    rows_used: int = 0
    rows_offered: int = 0
    cache_bytes_held: int = 0
    cache_bytes_held_peak: int = 0
    cache_bytes_used_at_peak: int = 0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    tokens: Counter[str] = field(default_factory=Counter)


class BuiltinEngine:
    """Runs on the model itself, in eval mode and without gradients.

    `max_rows` rollouts live at a time; their cache takes at most `cache_tokens`, in pages of `page_size`. With
    `num_threads` drivers reply in threads while the others go on; without, between two passes, so that the order of
    everything is the same in each run. `decode` (ids to text) is needed for stop texts alone.
    """

    def __init__(
        self,
        model: Ovis2_5ForConditionalGeneration,
        *,
        max_rows: int = 64,
        cache_tokens: int | None = None,
        page_size: int = 16,
        max_pass_tokens: int = PASS_TOKENS,
        num_threads: int = 0,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        config = model.config.llm_config
        self.model = model
        self.decode = decode
        self.stats = Stats()
        self.cache = Cache(
            config.num_hidden_layers, max_tokens=cache_tokens or default_cache_tokens(model), page_size=page_size
        )
        self.scheduler = Scheduler(self.cache, max_rows=max_rows, max_pass_tokens=max_pass_tokens)
        self.runner = Runner(model, self.cache, ImageFeatures(model, max_bytes=FEATURE_BYTES))
        self._numbers = count()
        self._rows: dict[int, Trajectory] = {}
        self._arrivals: deque[Trajectory] = deque()
        self._cancelled: deque[int] = deque()
        self._threads = ThreadPoolExecutor(num_threads) if num_threads else None
        self._replies: dict[Future[Continuation | None], Trajectory] = {}
        self._late: dict[int, StopCause] = {}

    def submit(self, request: Request) -> list[int]:
        """Queue a request. Raises ValueError when its pictures do not fit its ids, ConfigError for stop texts that
        cannot be decoded."""
        self._check(request.prompt.input_ids, request.prompt.images)
        if request.stop_texts and self.decode is None:
            raise ConfigError("stop texts need an engine with `decode`, which makes text of ids")
        prompt = None
        ids = request.prompt.input_ids
        if len(request.drivers) > 1 and len(ids) > 1:
            prompt = SharedPrompt(ids=ids[:-1], images=[*request.prompt.images], num_readers=len(request.drivers))
        rows = [
            Trajectory(
                number=next(self._numbers),
                request=request,
                driver=driver,
                seed=mixed_seed(request.seed, place),
                prompt=prompt,
                ids=[*ids],
                images=[*request.prompt.images],
                allowance=request.max_new_tokens,
            )
            for place, driver in enumerate(request.drivers)
        ]
        self._arrivals.extend(rows)
        return [row.number for row in rows]

    def cancel(self, number: int) -> None:
        self._cancelled.append(number)

    def run(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.submit(request)
        with self.ready():
            while self.step():
                pass

    @contextmanager
    def ready(self) -> Iterator[None]:
        """What `step` needs around it: eval mode, no gradients, attention over pages. `run` enters it by itself."""
        was_training, config = self.model.training, self.model.config.llm_config
        attention = config._attn_implementation
        self.model.eval()
        config._attn_implementation = PAGED
        try:
            with torch.no_grad():
                yield
        finally:
            config._attn_implementation = attention
            self.model.train(was_training)

    def step(self) -> bool:
        """One pass; False when nothing is left to do. Call it inside `ready`."""
        self._let_in()
        self._hear_replies()
        self._cut_off()
        feeds = self.scheduler.plan()
        self._end_stuck()
        if feeds:
            self._advance(feeds)
        elif self._replies:
            wait(self._replies, return_when=FIRST_COMPLETED)
        self._count()
        return bool(self._rows or self._arrivals or self._replies)

    def _let_in(self) -> None:
        while self._arrivals:
            row = self._arrivals.popleft()
            self._rows[row.number] = row
            self.scheduler.add(row)

    def _cut_off(self) -> None:
        """End what was cancelled or ran out of time."""
        while self._cancelled:
            if row := self._rows.get(self._cancelled.popleft()):
                self._end(row, "cancelled")
        if any(row.deadline is not None for row in self.scheduler.live):
            now = time.monotonic()
            for row in [*self.scheduler.live, *self.scheduler.waiting]:
                if row.deadline is not None and now >= row.deadline and not row.is_paused:
                    self._end(row, "seconds")

    def _end_stuck(self) -> None:
        for row in {row.number: row for row in self.scheduler.stuck}.values():
            self._end(row, "no_room")
        self.scheduler.stuck.clear()

    def _advance(self, feeds: list[Feed]) -> None:
        started = time.process_time()
        self.runner.embed(feeds)
        embedded = time.process_time()
        rows: list[Trajectory] = [feed.sequence for feed in feeds if feed.is_sampled]  # type: ignore[misc]
        logits = self.runner.forward(feeds)
        computed = time.process_time()
        drawn = self._draw(rows, logits) if rows else []
        sampled = time.process_time()
        self._measure(len(rows))
        for row, (token, logprob, drawn_logprob) in zip(rows, drawn):
            row.take(token, logprob, drawn_logprob)
            self._settle(row)
        self._time(feeds, started, embedded, computed, sampled)

    def _draw(self, rows: list[Trajectory], logits: Tensor) -> list[tuple[int, float, float]]:
        """The next id of each row with its two logprobs; one copy from the device for all."""
        device, visual_ids = logits.device, self.model.config.visual_token_ids
        groups: dict[tuple[Sampling, frozenset[int]], list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault((row.request.sampling, row.request.banned_ids), []).append(place)
        numbers = torch.from_numpy(uniforms([row.seed for row in rows], [row.position for row in rows])).to(device)
        told = torch.empty(3, len(rows), dtype=torch.float64, device=device)
        for (sampling, banned), places in groups.items():
            where = slice(None) if len(places) == len(rows) else torch.tensor(places, device=device)
            never = torch.tensor(sorted({*visual_ids, *banned}), dtype=torch.long, device=device)
            seen = [self._seen(rows[place], device) for place in places] if sampling.is_penalised else ()
            chosen = draw(logits[where], sampling, never, numbers[where], seen)
            told[:, where] = torch.stack([part.double() for part in chosen])
        ids, logprobs, drawn_logprobs = told.tolist()
        return list(zip(map(int, ids), logprobs, drawn_logprobs))

    def _seen(self, row: Trajectory, device: torch.device) -> Seen:
        visual = set(self.model.config.visual_token_ids)
        context, answer = ({*ids} - visual for ids in (row.ids, row.ids[len(row.request.prompt) :]))
        return Seen(*(torch.tensor(sorted(ids), dtype=torch.long, device=device) for ids in (context, answer)))

    def _settle(self, row: Trajectory) -> None:
        """Tell a row's driver of its newest id, and ask it how to go on when the segment is complete."""
        request = row.request
        if row.deadline is None and request.max_seconds is not None:
            row.deadline = time.monotonic() + request.max_seconds
        try:
            row.driver.hear(row.new_ids[-1], row.logprobs[-1])
        except Exception as error:
            self._fail(row, error)
            return
        stop: StopCause | None = None
        if row.new_ids[-1] in request.stop_ids:
            stop = "stop_id"
        elif request.stop_texts and self._has_stop_text(row):
            stop = "stop_text"
        elif len(row.new_ids) >= row.allowance:
            stop = "length"
        if stop is not None:
            self._ask(row, row.close(stop))

    def _has_stop_text(self, row: Trajectory) -> bool:
        assert self.decode is not None
        texts = row.request.stop_texts
        # an id stands for one byte at least
        tail = self.decode(row.new_ids[-max(len(text.encode()) for text in texts) - 4 :])
        return any(text in tail for text in texts)

    def _ask(self, row: Trajectory, segment: Segment) -> None:
        row.is_paused = True
        if self._threads is not None:
            self._replies[self._threads.submit(row.driver.respond, segment)] = row
            return
        started = time.process_time()
        try:
            reply = row.driver.respond(segment)
        except Exception as error:
            self._fail(row, error)
        else:
            self._go_on(row, reply)
        self.stats.seconds["drivers"] += time.process_time() - started

    def _hear_replies(self) -> None:
        for future in [future for future in self._replies if future.done()]:
            row = self._replies.pop(future)
            stop = self._late.pop(row.number, None)
            if (error := future.exception()) is None:
                if stop is None:
                    self._go_on(row, future.result())
                elif future.result() is not None:
                    self._tell(row, stop)
            elif isinstance(error, Exception):
                self._fail(row, error)
            else:
                raise error

    def _go_on(self, row: Trajectory, reply: Continuation | None) -> None:
        if reply is None:
            self._forget(row)
            return
        try:
            self._check(reply.ids, reply.images)
        except ValueError as error:
            self._fail(row, error)
            return
        row.go_on(reply)
        row.since = self.scheduler.num_passes

    def _check(self, ids: Sequence[int], images: Sequence[PatchedImage]) -> None:
        atoms, needed = ids.count(self.model.config.image_token_id), sum(image.num_tokens for image in images)
        if atoms != needed:
            raise ValueError(f"{atoms} visual tokens among the ids, {needed} in the pictures")

    def _end(self, row: Trajectory, stop: StopCause) -> None:
        """Cut a rollout off; its driver is told."""
        self._forget(row)
        if row.is_paused:  # its driver has a segment still, and is told after its reply
            self._late[row.number] = stop
        else:
            self._tell(row, stop)

    def _tell(self, row: Trajectory, stop: StopCause) -> None:
        try:
            row.driver.respond(row.close(stop))
        except Exception as error:
            row.driver.fail(error)

    def _fail(self, row: Trajectory, error: Exception) -> None:
        if row.number in self._rows:
            self._forget(row)
        row.driver.fail(error)

    def _forget(self, row: Trajectory) -> None:
        del self._rows[row.number]
        self.scheduler.remove(row)
        self.stats.num_finished += 1
        self.stats.num_preemptions += row.num_preemptions

    def _time(self, feeds: list[Feed], started: float, embedded: float, computed: float, sampled: float) -> None:
        num_single = sum(feed.count == 1 for feed in feeds)
        num_fed = sum(feed.count for feed in feeds)
        seconds, tokens = self.stats.seconds, self.stats.tokens
        seconds["vision"] += embedded - started
        seconds["decode"] += (computed - embedded) * num_single / num_fed
        seconds["prefill"] += (computed - embedded) * (1 - num_single / num_fed)
        seconds["sampling"] += sampled - computed
        tokens["decode"] += num_single
        tokens["prefill"] += num_fed - num_single

    def _measure(self, num_rows: int) -> None:
        """What is held and used in the middle of a pass, before any row goes."""
        stats, scheduler, cache = self.stats, self.scheduler, self.cache
        if len(scheduler.live) + len(scheduler.waiting) >= scheduler.max_rows:
            stats.rows_used += num_rows
            stats.rows_offered += scheduler.max_rows
        used = cache.used_tokens([*scheduler.live, *scheduler.prompts])
        held, peak = cache.num_bytes, stats.cache_bytes_held_peak
        used_bytes = held * used // (cache.num_pages * cache.page_size)
        stats.cache_bytes_held, stats.cache_bytes_held_peak = held, max(held, peak)
        if held >= peak:
            stats.cache_bytes_used_at_peak = max(used_bytes, stats.cache_bytes_used_at_peak if held == peak else 0)

    def _count(self) -> None:
        stats, scheduler = self.stats, self.scheduler
        stats.num_passes = scheduler.num_passes
        stats.num_waiting, stats.num_live = len(scheduler.waiting) + len(self._arrivals), len(scheduler.live)
        stats.num_images_encoded = self.runner.features.num_encoded
        stats.cache_bytes_held = self.cache.num_bytes


def default_cache_tokens(model: Ovis2_5ForConditionalGeneration) -> int:
    """Tokens whose keys and values fill CACHE_SHARE of the memory."""
    config = model.config.llm_config
    width = config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, int(free * CACHE_SHARE) // (2 * width * model.dtype.itemsize))
