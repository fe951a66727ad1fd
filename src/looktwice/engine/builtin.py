"""The built-in engine: rollouts come, advance together and go, each from its own pages of one cache.

A pass is: the scheduler chooses (scheduler.py), the runner computes (runner.py), each row draws its id (sampling.py),
and whoever a finished segment belongs to says how to go on.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from threading import Event

import torch
from torch import Tensor

from looktwice.engine.attention import PAGED
from looktwice.engine.cache import Cache
from looktwice.engine.interface import Continuation, Request, Segment, StopCause, check_images
from looktwice.engine.reading import PAGED_TOKENS
from looktwice.engine.runner import Encode, ImageFeatures, Runner
from looktwice.engine.sampling import Sampling, Seen, draw, mixed_seed, uniforms
from looktwice.engine.scheduler import Feed, Scheduler
from looktwice.engine.state import Row, SharedPrompt
from looktwice.errors import ConfigError, LooktwiceError
from looktwice.model.adapter_bank import AdapterBank
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration

PASS_TOKENS = 4096
"""Ids of a pass at the most: it bounds the memory of activations, and how long a long prompt holds up the others."""
PAGE_TOKENS = 16
FEATURE_BYTES = 256 * 2**20
CACHE_SHARE = 0.25
"""Of the memory of the machine (of a GPU: of what is free there) that the cache may take unless it is told."""


@dataclass(kw_only=True)
class Stats:
    """What an engine has done so far, and how full it is.

    `seconds` and `tokens`, which are ids, are by phase: prefill, decode; seconds also of vision, sampling and drivers
    (which reply between two passes). `rows_used` of `rows_offered` decoded in the passes that had work for all rows.
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
    everything is the same in each run. `decode` (ids to text) is needed for stop texts alone; `encode` makes vectors of
    pictures (`ImageFeatures`), the model where it is left out; `adapters` are those that requests may name.
    """

    def __init__(
        self,
        model: Ovis2_5ForConditionalGeneration,
        *,
        max_rows: int = 64,
        cache_tokens: int | None = None,
        page_size: int | None = None,
        max_pass_tokens: int = PASS_TOKENS,
        num_threads: int = 0,
        decode: Callable[[list[int]], str] | None = None,
        encode: Encode | None = None,
        adapters: AdapterBank | None = None,
    ) -> None:
        config = model.config.llm_config
        if max_rows < 1:
            raise ConfigError(f"max_rows is {max_rows}; it must be 1 or more")
        if cache_tokens is None:
            cache_tokens = default_cache_tokens(model)
        if page_size is None:
            page_size = PAGED_TOKENS if model.device.type == "cuda" else PAGE_TOKENS
        if cache_tokens < page_size:
            raise ConfigError(f"cache_tokens is {cache_tokens}; it must be {page_size} or more, which is one page")
        self.model = model
        self.decode = decode
        self.stats = Stats()
        self.cache = Cache(config.num_hidden_layers, max_tokens=cache_tokens, page_size=page_size)
        self.scheduler = Scheduler(self.cache, max_rows=max_rows, max_pass_tokens=max_pass_tokens)
        self.runner = Runner(
            model, self.cache, ImageFeatures(encode or model.get_image_features, max_bytes=FEATURE_BYTES), adapters
        )
        self._numbers = count()
        self._rows: dict[int, Row] = {}
        self._arrivals: deque[Row] = deque()
        self._cancelled: deque[int] = deque()
        self._threads = ThreadPoolExecutor(num_threads) if num_threads else None
        self._replies: dict[Future[Continuation | None], Row] = {}
        self._late: dict[int, StopCause] = {}
        self._timed: set[Row] = set()
        self._news = Event()
        self._is_ready = False

    def submit(self, request: Request) -> list[int]:
        """Queue a request. Raises ValueError when it has no ids, or its pictures do not fit them, ConfigError for stop
        texts that cannot be decoded and an adapter that is not there."""
        check_images(request.prompt.input_ids, request.prompt.images, self.model.config)
        if not request.prompt.input_ids:
            raise ValueError("the prompt has no ids; there is nothing to continue")
        if request.stop_texts and self.decode is None:
            raise ConfigError("stop texts need an engine with `decode`, which makes text of ids")
        if request.adapter is not None and request.adapter not in self.runner.adapters:
            raise ConfigError(f"no adapter {request.adapter!r} in the engine; load it first")
        prompt = None
        ids = request.prompt.input_ids
        # the last id is fed by each sibling itself, and a picture cannot be cut in two
        if len(request.drivers) > 1 and len(ids) > 1 and ids[-1] != self.model.config.image_token_id:
            prompt = SharedPrompt(ids=ids[:-1], images=[*request.prompt.images], num_readers=len(request.drivers))
            prompt.adapter = request.adapter
        rows = [
            Row(
                number=next(self._numbers),
                request=request,
                driver=driver,
                seed=mixed_seed(request.seed, place),
                prompt=prompt,
                mask=request.masks[place] if request.masks else None,
                adapter=request.adapter,
                ids=[*ids],
                images=[*request.prompt.images],
                sampled_from=len(ids),
                allowance=request.max_new_tokens,
            )
            for place, driver in enumerate(request.drivers)
        ]
        self._arrivals.extend(rows)
        self._news.set()
        return [row.number for row in rows]

    def cancel(self, number: int) -> None:
        self._cancelled.append(number)
        self._news.set()

    def run(self, requests: Sequence[Request]) -> None:
        """Submit requests and step until nothing is left; after an interruption the engine is empty."""
        try:
            for request in requests:
                self.submit(request)
            with self.ready():
                while self.step():
                    pass
        except BaseException:
            self._clear()
            raise

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Eval mode, no gradients, attention over pages. `run` and `step` enter it by themselves; around many steps it
        saves doing so at each."""
        if self._is_ready:
            yield
            return
        config, training = self.model.config.llm_config, [one for one in self.model.modules() if one.training]
        attention = config._attn_implementation
        self.model.eval()
        config._attn_implementation = PAGED
        self._is_ready = True
        try:
            yield
        finally:
            self._is_ready = False
            config._attn_implementation = attention
            for module in training:
                module.training = True

    def step(self) -> bool:
        """One pass; False when nothing is left to do."""
        with self.ready(), torch.no_grad():
            self._news.clear()  # before anything is looked at, so that what comes later wakes it
            # a rollout may arrive and be cancelled at once: who was cancelled now has arrived below
            cancelled = [self._cancelled.popleft() for _ in range(len(self._cancelled))]
            self._let_in()
            self._hear_replies()
            self._cut_off(cancelled)
            feeds = self.scheduler.plan()
            self._start_clocks()
            self._end_stuck()
            if feeds:
                self._advance(feeds)
            elif self._replies:
                self._wait()
            self._count()
            return bool(self._rows or self._arrivals or self._replies)

    def _clear(self) -> None:
        """Forget all rollouts, without a word to their drivers."""
        self._arrivals.clear()
        self._cancelled.clear()
        self._replies.clear()
        self._late.clear()
        for row in [*self._rows.values()]:
            self._forget(row)

    def _wait(self) -> None:
        """Until a driver replies, somebody comes or is cancelled, or time is up."""
        deadlines = [row.deadline for row in self._timed if row.deadline is not None]
        self._news.wait(max(0.0, min(deadlines) - time.monotonic()) if deadlines else None)

    def _let_in(self) -> None:
        while self._arrivals:
            row = self._arrivals.popleft()
            self._rows[row.number] = row
            self.scheduler.add(row)

    def _start_clocks(self) -> None:
        """A rollout's time runs from when it is first admitted."""
        for row in self.scheduler.live:
            if row.deadline is None and row.request.max_seconds is not None:
                row.deadline = time.monotonic() + row.request.max_seconds
                self._timed.add(row)

    def _cut_off(self, cancelled: list[int]) -> None:
        """End what was cancelled or ran out of time."""
        for number in cancelled:
            if row := self._rows.get(number):
                self._end(row, "cancelled")
        if self._timed:
            now = time.monotonic()
            for row in [*self._timed]:
                if row.deadline is not None and now >= row.deadline:
                    self._end(row, "seconds")

    def _end_stuck(self) -> None:
        for row in {row.number: row for row in self.scheduler.stuck}.values():
            self._end(row, "no_room")
        self.scheduler.stuck.clear()

    def _advance(self, feeds: list[Feed]) -> None:
        rows: list[Row] = [feed.sequence for feed in feeds if feed.is_sampled]  # type: ignore[misc]
        times = [time.perf_counter()]
        try:
            self.runner.embed(feeds)
            times.append(time.perf_counter())
            logits = self.runner.forward(feeds)
            times.append(time.perf_counter())
            barred = self._bar(rows, logits)
            drawn = self._draw(rows, logits) if rows else []
            times.append(time.perf_counter())
        except LooktwiceError:
            raise
        except Exception as error:  # such as a picture that takes more memory than there is
            self._fail_pass(feeds, error)
            return
        self._time(feeds, times)
        self._measure(len(rows))
        for row, new in zip(rows, drawn):
            if row not in barred:
                row.take(*new)
        started = time.perf_counter()
        for row in rows:
            if row in barred:
                self._fail(row, barred[row])
            else:
                self._settle(row)
        self.stats.seconds["drivers"] += time.perf_counter() - started

    def _fail_pass(self, feeds: list[Feed], error: Exception) -> None:
        """End the rollouts of a pass that failed: those that fed a prompt or a picture, if any did. Rows that were to
        decode one id have changed in nothing until they have their logits, and try again without them."""
        longer = {feed.sequence for feed in feeds if feed.count > 1}
        fed = {feed.sequence for feed in feeds}
        for row in [*self.scheduler.live]:
            is_done_for = row in fed and not row.num_pending
            if {row, row.prompt} & (longer or fed) or is_done_for:
                self._fail(row, error)

    def _bar(self, rows: list[Row], logits: Tensor) -> dict[Row, Exception]:
        """Leave out of logits [S, V] what masks do not allow; the rows whose mask failed, with what it raised."""
        failed: dict[Row, Exception] = {}
        for place, row in enumerate(rows):
            if row.mask is None:
                continue
            try:
                if (allowed := row.mask.allowed()) is not None:
                    logits[place].masked_fill_(~allowed.to(logits.device), -torch.inf)
            except Exception as error:
                failed[row] = error
        return failed

    def _draw(self, rows: list[Row], logits: Tensor) -> list[tuple[int, float, float]]:
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

    def _seen(self, row: Row, device: torch.device) -> Seen:
        visual = set(self.model.config.visual_token_ids)
        context, answer = ({*ids} - visual for ids in (row.ids, row.ids[len(row.request.prompt) :]))
        return Seen(*(torch.tensor(sorted(ids), dtype=torch.long, device=device) for ids in (context, answer)))

    def _settle(self, row: Row) -> None:
        """Tell a row's driver of its newest id, and ask it how to go on when the segment is complete."""
        request = row.request
        try:
            if row.mask is not None:
                row.mask.take(row.new_ids[-1])
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

    def _has_stop_text(self, row: Row) -> bool:
        assert self.decode is not None
        texts = row.request.stop_texts
        # an id stands for one byte at least
        longest = max(len(text.encode()) for text in texts) + 4
        tail = self.decode(row.ids[max(row.sampled_from, len(row.ids) - longest) :])
        return any(text in tail for text in texts)

    def _ask(self, row: Row, segment: Segment) -> None:
        row.is_paused = True
        if self._threads is not None:
            reply_to_come = self._threads.submit(row.driver.respond, segment)
            self._replies[reply_to_come] = row
            reply_to_come.add_done_callback(lambda _: self._news.set())
            return
        try:
            reply = row.driver.respond(segment)
        except Exception as error:
            self._fail(row, error)
        else:
            self._go_on(row, reply)

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

    def _go_on(self, row: Row, reply: Continuation | None) -> None:
        if reply is None:
            self._forget(row)
            return
        try:
            check_images(reply.ids, reply.images, self.model.config)
        except ValueError as error:
            self._fail(row, error)
            return
        row.go_on(reply)
        row.since = self.scheduler.num_passes

    def _end(self, row: Row, stop: StopCause) -> None:
        """Cut a rollout off; its driver is told."""
        self._forget(row)
        if row.is_paused:  # its driver has a segment still, and is told after its reply
            self._late[row.number] = stop
        else:
            self._tell(row, stop)

    def _tell(self, row: Row, stop: StopCause) -> None:
        try:
            row.driver.respond(row.close(stop))
        except Exception as error:
            self._fail(row, error)

    def _fail(self, row: Row, error: Exception) -> None:
        if row.number in self._rows:
            self._forget(row)
        with suppress(Exception):  # nobody else is left to be told
            row.driver.fail(error)

    def _forget(self, row: Row) -> None:
        del self._rows[row.number]
        self._timed.discard(row)
        self.scheduler.remove(row)
        self.stats.num_finished += 1
        self.stats.num_preemptions += row.num_preemptions

    def _time(self, feeds: list[Feed], times: list[float]) -> None:
        started, embedded, computed, sampled = times
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
        stats.cache_bytes_held_peak = max(held, peak)
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
        # what torch keeps for later is free too
        free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, int(free * CACHE_SHARE) // (2 * width * model.dtype.itemsize))
