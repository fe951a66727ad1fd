"""The one thread that owns the engines: answers join between two passes, and what happened goes out after each.

Everything that touches an engine is done here, in turn, so that nothing needs a lock but the counting of places.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from looktwice.asking.asked import Asked
from looktwice.asking.events import Done, Event
from looktwice.engine.builtin import BuiltinEngine
from looktwice.engine.interface import Engine
from looktwice.errors import LooktwiceError, one_line
from looktwice.server.metrics import ServerMetrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failed:
    """An answer that came to nothing; it is the last event, as `Done` is of others."""

    message: str
    is_our_fault: bool = True


@dataclass(frozen=True)
class Told:
    """An event of one of the answers to a request."""

    number: int
    event: Event | Failed

    @property
    def is_last(self) -> bool:
        return isinstance(self.event, (Done, Failed))


@dataclass(kw_only=True, eq=False)
class Job:
    """A request on its way: `count` answers. Each event is `told`, and handed on after each pass where the answers are
    streamed, else when all are whole; `over` are the numbers of those that have told their last."""

    count: int
    lane: str
    adapter: str | None = None
    is_streamed: bool
    mail: Callable[[list[Told]], None]
    """Takes what is handed on, on the side that asked."""
    asked: Sequence[Asked] = ()
    numbers: list[int] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    over: set[int] = field(default_factory=set)

    def tell(self, number: int) -> Callable[[Event], None]:
        """What hears the answer of this number."""
        return lambda event: self.hear(number, event)

    def hear(self, number: int, event: Event | Failed) -> None:
        told = Told(number, event)
        self.told.append(told)
        if told.is_last:
            self.over.add(number)

    def fail(self, failed: Failed) -> None:
        """End all answers that are not over."""
        for number in {*range(self.count)} - self.over:
            self.hear(number, failed)

    @property
    def is_over(self) -> bool:
        return len(self.over) == self.count


Post = Callable[[list[tuple[Job, list[Told]]]], None]
"""Takes what happened in a pass: jobs, and what each was told. It is called in the worker's thread."""


@dataclass(kw_only=True, eq=False)
class Lane:
    """An engine and its jobs; `open` begins it anew after it broke."""

    open: Callable[[], Engine]
    engine: Engine
    jobs: list[Job] = field(default_factory=list)
    is_ready: bool = False
    has_work: bool = False
    """Whether the engine had something left after its last pass."""

    def prepare(self, stack: ExitStack) -> None:
        """Have the model ready for many passes, until the stack is closed."""
        if not self.is_ready and isinstance(self.engine, BuiltinEngine):
            stack.enter_context(self.engine.ready())
            stack.callback(self._rest)
            self.is_ready = True

    def begin_anew(self) -> None:
        self.engine, self.is_ready, self.has_work = self.open(), False, False

    def _rest(self) -> None:
        self.is_ready = False


class Worker:
    """Runs the engines in a thread of its own. All methods may be called from any thread."""

    def __init__(self, metrics: ServerMetrics, post: Post, *, max_open: int) -> None:
        self.metrics = metrics
        self.post = post
        self.max_open = max_open
        self.num_open = 0
        """Answers that are begun or wait."""
        self.num_crashes = 0
        """Passes that failed since the last good one."""
        self._lanes: dict[str, Lane] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._news = threading.Event()
        self._lock = threading.Lock()
        self._is_closed = self._is_drained = False
        self._thread = threading.Thread(target=self._run, name="looktwice-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop after the present pass; what is unfinished fails."""
        self._is_closed = True
        self._news.set()
        self._thread.join()

    @property
    def is_running(self) -> bool:
        """Whether it takes jobs."""
        return not self._is_closed

    def reserve(self, count: int) -> bool:
        """Take places for so many answers; False when there are not enough. They are given back by the last event of
        each, or by `give_back`."""
        with self._lock:
            if self.num_open + count > self.max_open:
                return False
            self.num_open += count
            return True

    def give_back(self, count: int) -> None:
        with self._lock:
            self.num_open -= count

    def submit(self, job: Job) -> None:
        self._do(lambda: self._begin(job))

    def cancel(self, job: Job) -> None:
        """End the answers of a job; each is told as cancelled, with what it has so far."""
        self._do(lambda: self._cancel(job))

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Do something between two passes."""
        future: Future[Any] = Future()

        def do() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._do(do)
        return future

    def add_lane(self, name: str, open: Callable[[], Engine]) -> None:
        """Have an engine of this name from now on. Call it in `call`, or before the start."""
        self._lanes[name] = Lane(open=open, engine=open())

    def remove_lane(self, name: str) -> None:
        """Forget an engine; its unfinished answers fail. Call it in `call`."""
        self.end_jobs(name)
        del self._lanes[name]

    def end_jobs(self, name: str, adapter: str | None = None) -> None:
        """Have the unfinished answers of an adapter fail; those of the whole lane where none is named. Call it in
        `call`."""
        lane = self._lanes[name]
        for job in [job for job in lane.jobs if adapter in (None, job.adapter)]:
            for number in job.numbers:
                lane.engine.cancel(number)
            lane.has_work = True
            job.fail(Failed("the model was removed", is_our_fault=False))
        self._hand_out([lane])

    def _do(self, function: Callable[[], None]) -> None:
        with self._lock:
            if not self._is_drained:
                self._inbox.append(function)
                self._news.set()
                return
        function()  # nobody else would: the worker has ended

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            # only a bug gets here, or an engine that cannot be begun anew
            logger.error("the worker ends (%s at %s)", type(error).__name__, _places(error))
        finally:
            self._is_closed = True
            for lane in self._lanes.values():
                for job in lane.jobs:
                    job.fail(Failed("the server stops"))
            self._hand_out([*self._lanes.values()])
            while function := self._late():
                function()

    def _late(self) -> Callable[[], None] | None:
        """What came too late for a pass; None when there is no more of it, from when on it is done where it comes."""
        with self._lock:
            self._is_drained = not self._inbox
            return self._inbox.popleft() if self._inbox else None

    def _work(self) -> None:
        while not self._is_closed:
            self._news.wait()
            self._news.clear()
            with ExitStack() as stack:
                while self._pass(stack):
                    pass

    def _pass(self, stack: ExitStack) -> bool:
        """One pass of every engine that has jobs; False when none has, and nothing came in."""
        if self._is_closed:
            return False
        while self._inbox:
            self._inbox.popleft()()
        lanes = [lane for lane in self._lanes.values() if lane.jobs or lane.has_work]
        for lane in lanes:
            self._step(lane, stack)
        self._hand_out(lanes)
        self._measure()
        return bool(lanes or self._inbox)

    def _step(self, lane: Lane, stack: ExitStack) -> None:
        try:
            lane.prepare(stack)
            lane.has_work = lane.engine.step()
        except Exception as error:
            self._begin_anew(lane, error)
            return
        self.num_crashes = 0
        self.metrics.steps.inc()
        for job in lane.jobs:
            for number, asked in enumerate(job.asked):
                if asked.is_over and number not in job.over:
                    job.hear(number, Failed("the answer could not be read"))

    def _begin_anew(self, lane: Lane, error: Exception) -> None:
        """After an engine broke: its answers fail, and those to come have a new one."""
        self.num_crashes += 1
        self.metrics.crashes.inc()
        # what an exception says may hold what a request wrote, where it was raised does not
        logger.error("the engine broke (%s at %s) and is begun anew", type(error).__name__, _places(error))
        told = str(error) if isinstance(error, LooktwiceError) else type(error).__name__
        for job in lane.jobs:
            job.fail(Failed(one_line(f"the engine broke ({told}); ask again")))
        lane.begin_anew()

    def _begin(self, job: Job) -> None:
        lane = self._lanes.get(job.lane)
        try:
            if lane is None or self._is_closed:
                raise LooktwiceError("the server stops" if self._is_closed else "the model was removed")
            job.numbers = lane.engine.submit(job.asked[0].request)
            lane.jobs.append(job)
        except Exception as error:
            is_theirs = isinstance(error, (LooktwiceError, ValueError)) and not self._is_closed
            job.fail(Failed(one_line(str(error)) if is_theirs else "it cannot be begun", is_our_fault=not is_theirs))
            self._settle([job])

    def _cancel(self, job: Job) -> None:
        if lane := self._lanes.get(job.lane):
            for number in job.numbers:
                lane.engine.cancel(number)

    def _hand_out(self, lanes: Sequence[Lane]) -> None:
        due = [job for lane in lanes for job in lane.jobs if job.told and (job.is_streamed or job.is_over)]
        self._settle(due)
        for lane in lanes:
            lane.jobs = [job for job in lane.jobs if not job.is_over]

    def _settle(self, jobs: Sequence[Job]) -> None:
        """Hand on what jobs were told, and give back the places of what is over."""
        if not jobs:
            return
        news = [(job, job.told) for job in jobs]
        for job in jobs:
            job.told = []
        self.give_back(sum(one.is_last for _, told in news for one in told))
        for _, told in news:
            for one in told:
                if isinstance(one.event, Done):
                    self.metrics.note_answer(one.event.answer)
        self.post(news)

    def _measure(self) -> None:
        waiting = running = held = pages = 0
        for lane in self._lanes.values():
            if isinstance(lane.engine, BuiltinEngine):
                stats, cache = lane.engine.stats, lane.engine.cache
                waiting, running = waiting + stats.num_waiting, running + stats.num_live
                held, pages = held + stats.cache_bytes_held, pages + cache.num_used
            else:
                running += sum(job.count - len(job.over) for job in lane.jobs)
        self.metrics.waiting.set(waiting)
        self.metrics.running.set(running)
        self.metrics.cache_bytes.set(held)
        self.metrics.cache_pages.set(pages)


def _places(error: BaseException) -> str:
    """Where an exception was raised, innermost last, without what it says."""
    found: list[str] = []
    trace = error.__traceback__
    while trace is not None:
        found.append(f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " > ".join(found[-4:])
