"""What an engine is: it knows tokens and caches, and asks a rollout's driver what to do after each segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor
from transformers import PreTrainedConfig

from looktwice.engine.sampling import Sampling
from looktwice.processing.images import PatchedImage
from looktwice.processing.processor import Example

StopCause = Literal["stop_id", "stop_text", "length", "seconds", "no_room", "cancelled"]
"""stop_id and stop_text end what the model wrote; length is the segment's own limit; the others end the rollout."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Ids sampled in one go, and why no more of them.

    `logprobs` are of the plain distribution at the sampling temperature, as training computes them;
    `drawn_logprobs` of the one really drawn from, after penalties, top-k, top-p, min-p and banned ids.
    """

    ids: list[int]
    logprobs: list[float]
    drawn_logprobs: list[float]
    stop: StopCause

    @property
    def is_stopped(self) -> bool:
        return self.stop in ("stop_id", "stop_text")


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What to put after a segment (ids, and the pictures their atoms show) and how many ids to sample next."""

    ids: list[int] = field(default_factory=list)
    images: list[PatchedImage] = field(default_factory=list)
    max_new_tokens: int


class Driver(Protocol):
    """Whoever a rollout belongs to: an episode, a script in tests. What it raises ends its rollout alone."""

    def hear(self, token: int, logprob: float) -> None:
        """Each id as it is sampled."""

    def respond(self, segment: Segment) -> Continuation | None:
        """What to go on with after a segment, or None when the rollout is over.

        Of a segment that the engine cut for good (seconds, no_room, cancelled) the reply is not read.
        """

    def fail(self, error: Exception) -> None:
        """The rollout ended because `hear` or `respond` raised, or its pictures could not be read."""


class Mask(Protocol):
    """Decides, id by id, what a rollout may write next. What it raises ends its rollout alone."""

    def allowed(self) -> Tensor | None:
        """Which ids may come next, bool [V] on the host, one of them at least; None where all may."""

    def take(self, token: int) -> None:
        """An id was sampled."""

    def put_in(self, ids: Sequence[int]) -> None:
        """Ids were put in by the driver."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue once for each driver.

    `max_new_tokens` is how many ids to sample before the first decision. `seed` and the number of the driver decide
    the random numbers of a rollout, nothing else does. `stop_ids` and `stop_texts` end a segment and stay in it;
    `banned_ids` are never sampled, nor are the ids of visual tokens. `max_seconds` is counted from when a rollout
    is admitted, the time of its driver included. `masks`, one for each driver if there are any, leave out ids before
    all else: logprobs are then of what they leave. `adapter` names one of the engine's.
    """

    prompt: Example
    drivers: Sequence[Driver]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    stop_texts: tuple[str, ...] = ()
    banned_ids: frozenset[int] = frozenset()
    max_seconds: float | None = None
    masks: Sequence[Mask] = ()
    adapter: str | None = None


def check_images(ids: Sequence[int], images: Sequence[PatchedImage], config: PreTrainedConfig) -> None:
    """Raise ValueError for ids outside the vocabulary, or whose visual tokens are not as many as the pictures have."""
    if not all(0 <= token < config.vocab_size for token in ids):
        raise ValueError(f"an id lies outside the vocabulary of {config.vocab_size}")
    atoms, needed = ids.count(config.image_token_id), sum(image.num_tokens for image in images)
    if atoms != needed:
        raise ValueError(f"{atoms} visual tokens among the ids, {needed} in the pictures")


class Engine(Protocol):
    """Anything that samples: the built-in engine, vLLM, a scripted one in tests.

    `submit` and `cancel` may be called at any time, from any thread; `step` and `run` by one thread at a time.
    """

    def submit(self, request: Request) -> list[int]:
        """Queue a request; the numbers of its rollouts, for `cancel`."""

    def cancel(self, number: int) -> None:
        """End a rollout within one step: its driver is told what it sampled so far, with cause `cancelled`."""

    def step(self) -> bool:
        """Advance what is live by one pass; False when nothing is left to do."""

    def run(self, requests: Sequence[Request]) -> None:
        """Submit requests and step until nothing is left."""
