"""What an engine is: it knows tokens and caches, and asks the caller what to do after each segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from looktwice.processing.images import PatchedImage
from looktwice.processing.processor import Example


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Ids sampled in one go, their logprobs, and whether the last one is a stop id (else the length limit cut it)."""

    ids: list[int]
    logprobs: list[float]
    is_stopped: bool


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What to put after a segment (ids, and the pictures their atoms show) and how many ids to sample next."""

    ids: list[int] = field(default_factory=list)
    images: list[PatchedImage] = field(default_factory=list)
    max_new_tokens: int


Respond = Callable[[int, Segment], Continuation | None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue `num_rollouts` times, and how many ids to sample before the first decision."""

    prompt: Example
    num_rollouts: int
    max_new_tokens: int


class Engine(Protocol):
    """Anything that samples: the built-in engine, a scripted one in tests, an external server."""

    def run(self, requests: Sequence[Request], respond: Respond) -> None:
        """Sample all rollouts to their end.

        Rollouts are numbered through the requests in order; `respond` gets a rollout's number and its newest
        segment, and gives what to continue with, or None when the rollout is over.
        """
