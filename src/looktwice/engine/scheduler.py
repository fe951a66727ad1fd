"""The policy of the engine: who is admitted, who feeds how many ids in the next pass, who gives up its cache.

It knows lengths and pages and no tensors.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from looktwice.engine.cache import Cache
from looktwice.engine.state import Row, Sequence, SharedPrompt


@dataclass(frozen=True)
class Feed:
    """In this pass a sequence feeds its next `count` ids."""

    sequence: Sequence
    count: int

    @property
    def is_sampled(self) -> bool:
        """Whether it brings logits to draw an id from: a rollout that has then fed all it has."""
        return isinstance(self.sequence, Row) and self.count == self.sequence.num_pending


class Scheduler:
    """Rollouts in order of arrival, `max_rows` of them live; a pass feeds at most `max_pass_tokens` ids.

    Decoding rows come first, one id each; then prompts, crops and what is computed again, longest waiting first, in
    chunks of what the pass has left. When pages run short the youngest rollout gives up its own and waits at the head
    of the queue, to be computed again.
    """

    def __init__(self, cache: Cache, *, max_rows: int, max_pass_tokens: int) -> None:
        self.cache = cache
        self.max_rows = max_rows
        # a row always leaves room for a chunk beside the decoding ones
        self.max_pass_tokens = max(max_pass_tokens, max_rows + cache.page_size)
        self.waiting: deque[Row] = deque()
        self.live: list[Row] = []
        self.prompts: list[SharedPrompt] = []
        self.stuck: list[Row] = []
        """Those that do not fit into the whole cache; the engine ends them."""
        self.num_passes = 0
        self._given_up: set[Sequence] = set()
        """What gave up its pages while the present pass was planned."""

    def add(self, row: Row) -> None:
        self.waiting.append(row)

    def remove(self, row: Row) -> None:
        """Forget a rollout, live or waiting, and free what is its own."""
        if row in self.live:
            self.live.remove(row)
        else:
            self.waiting.remove(row)
        self.cache.release(row)
        if (prompt := row.prompt) is not None:
            prompt.num_readers -= 1
            if not prompt.num_readers:
                self._let_go(prompt)

    def plan(self) -> list[Feed]:
        """What the next pass feeds; each sequence has the pages for it."""
        self.num_passes += 1
        self._given_up.clear()
        self._admit()
        self._fork()
        feeds: dict[Sequence, Feed] = {}
        room = self.max_pass_tokens
        for sequence in self._in_turn():
            if sequence in self._given_up:
                continue
            count = min(sequence.num_pending, room)
            if not count:
                break
            if self._reserve(sequence, sequence.num_cached + count, feeds):
                feeds[sequence] = Feed(sequence, count)
                room -= count
        return [feed for feed in feeds.values() if feed.sequence not in self.stuck]

    def _in_turn(self) -> list[Sequence]:
        """Decoding rows in order of admission, then whatever has more to feed, longest waiting first."""
        ready = [row for row in self.live if not row.is_blocked and row.num_pending]
        longer: list[Sequence] = [row for row in ready if row.num_pending > 1]
        longer += [prompt for prompt in self.prompts if prompt.num_pending]
        longer.sort(key=lambda sequence: sequence.since)
        return [*(row for row in ready if row.num_pending == 1), *longer]

    def _admit(self) -> None:
        while self.waiting and len(self.live) < self.max_rows:
            row = self.waiting[0]
            if self.live and self._pages_needed(row) + len(self.live) > self.cache.num_available:
                return
            self.live.append(self.waiting.popleft())
            row.since = self.num_passes
            if row.prompt is not None and row.prompt not in self.prompts:
                row.prompt.since = self.num_passes
                self.prompts.append(row.prompt)

    def _pages_needed(self, row: Row) -> int:
        """Pages that a row takes from the cache when it is admitted, and those that admitted ones still lack."""
        prompts = {*self.prompts}
        lacking = sum(self.cache.missing(prompt, len(prompt.ids)) for prompt in prompts)
        needed = self.cache.pages_for(len(row.ids) + 1)
        if row.prompt is not None:
            shared = len(row.prompt.ids) // self.cache.page_size
            needed -= shared
            if row.prompt not in prompts:
                lacking += self.cache.missing(row.prompt, len(row.prompt.ids))
        lacking += sum(self.cache.missing(live, len(live.ids)) for live in self.live if not live.is_blocked)
        return needed + lacking

    def _fork(self) -> None:
        """Rows whose prompt is computed go on after it."""
        for row in [*self.live]:
            prompt = row.prompt
            if prompt is None or row.num_cached or prompt.num_pending or row in self._given_up:
                continue
            while not self.cache.fork(prompt, row):
                if not self._make_room(row, {}):
                    break

    def _reserve(self, sequence: Sequence, num_tokens: int, feeds: dict[Sequence, Feed]) -> bool:
        """Pages for so many tokens, taken from the youngest rows if need be; False when it gave up itself."""
        while not self.cache.reserve(sequence, num_tokens):
            if not self._make_room(sequence, feeds):
                return False
        return True

    def _make_room(self, sequence: Sequence, feeds: dict[Sequence, Feed]) -> bool:
        """Free the pages of a prompt that no live row waits for (rows after it hold what is shared), else those of the
        youngest row; False if that is the one that asks for them."""
        read = {row.prompt for row in self.live if not row.num_cached}
        for prompt in self.prompts:
            if prompt not in read:
                self._let_go(prompt)
                self._given_up.add(prompt)
                feeds.pop(prompt, None)
                return prompt is not sequence
        youngest = self.live[-1]
        if len(self.live) == 1:
            self.stuck.append(youngest)
            return False
        self.preempt(youngest)
        feeds.pop(youngest, None)
        return sequence not in self._given_up

    def preempt(self, row: Row) -> None:
        """Take a row's pages and put it at the head of the queue."""
        self.live.remove(row)
        self.cache.release(row)
        self._given_up.add(row)
        row.num_preemptions += 1
        self.waiting.appendleft(row)

    def _let_go(self, prompt: SharedPrompt) -> None:
        if prompt in self.prompts:
            self.prompts.remove(prompt)
        self.cache.release(prompt)
