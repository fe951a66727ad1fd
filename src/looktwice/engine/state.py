"""What the engine knows of a rollout, and of the prompt that its siblings share: ids, pictures, pages of the cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from looktwice.engine.interface import Continuation, Driver, Mask, Request, Segment, StopCause
from looktwice.processing.images import PatchedImage


@dataclass(kw_only=True, eq=False)
class Sequence:
    """Ids whose keys and values are, or come to be, in the cache.

    The first `num_cached` ids are there, in `pages`, of which the first `num_shared` belong to a prompt as well and are
    never written. `images` are all the pictures of the ids. `embeds` [N, D] are the vectors of the ids from place
    `embeds_start` on, while a chunk of them waits to be fed.
    """

    ids: list[int] = field(default_factory=list)
    images: list[PatchedImage] = field(default_factory=list)
    num_cached: int = 0
    pages: list[int] = field(default_factory=list)
    num_shared: int = 0
    embeds: Tensor | None = None
    embeds_start: int = 0
    adapter: str | None = None
    since: int = 0
    """The pass since which ids wait to be fed."""

    @property
    def num_pending(self) -> int:
        return len(self.ids) - self.num_cached

    def forget(self) -> None:
        """Nothing of it is in the cache any more."""
        self.num_cached = self.num_shared = 0
        self.pages = []
        self.embeds = None


@dataclass(kw_only=True, eq=False)
class SharedPrompt(Sequence):
    """A prompt without its last id, computed once for the siblings of a group. Each feeds the last id itself, and so
    has logits of its own to draw its first id from. `num_readers` siblings have not ended."""

    num_readers: int = 0


@dataclass(kw_only=True, eq=False)
class Row(Sequence):
    """A rollout: what it sampled since the last decision, and how many ids it may sample until the next."""

    number: int
    request: Request
    driver: Driver
    seed: int
    prompt: SharedPrompt | None = None
    mask: Mask | None = None
    allowance: int = 0
    new_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    drawn_logprobs: list[float] = field(default_factory=list)
    sampled_from: int = 0
    """Place of the first id that was sampled since something was put in."""
    deadline: float | None = None
    is_paused: bool = False
    """Its driver has not replied yet."""
    num_preemptions: int = 0

    @property
    def is_blocked(self) -> bool:
        """Whether it waits for its prompt or its driver."""
        return self.is_paused or (self.prompt is not None and not self.num_cached and self.prompt.num_pending > 0)

    @property
    def position(self) -> int:
        """Ids after the prompt: with the seed it decides the next random number."""
        return len(self.ids) - len(self.request.prompt)

    def take(self, token: int, logprob: float, drawn_logprob: float) -> None:
        self.ids.append(token)
        self.new_ids.append(token)
        self.logprobs.append(logprob)
        self.drawn_logprobs.append(drawn_logprob)

    def close(self, stop: StopCause) -> Segment:
        """What was sampled since the last decision, as a segment."""
        segment = Segment(ids=self.new_ids, logprobs=self.logprobs, drawn_logprobs=self.drawn_logprobs, stop=stop)
        self.new_ids, self.logprobs, self.drawn_logprobs = [], [], []
        return segment

    def go_on(self, continuation: Continuation) -> None:
        """Put in what the driver gave."""
        self.ids += continuation.ids
        if continuation.ids and self.mask is not None:
            self.mask.put_in(continuation.ids)
        if continuation.ids:
            self.sampled_from = len(self.ids)
        self.images += continuation.images
        self.allowance = continuation.max_new_tokens
        self.is_paused = False
