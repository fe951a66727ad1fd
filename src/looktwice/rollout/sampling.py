"""Choosing the next token.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from looktwice.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 is greedy; top_p 1 and top_k 0 are off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:  # refuses NaN too
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0 (off) or more")


def sample(
    logits: Tensor, sampling: Sampling, forbidden: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """One id a row and its logprob: logits [B, V], forbidden ids [F] -> [B], [B] float32.

    The logprob is of the whole distribution at this temperature, as training computes it: before forbidden ids,
    top-p and top-k are cut away.
    """
    # a smaller divisor would overflow, and decides alike
    scores = logits.float() / max(sampling.temperature or 1.0, 1e-30)
    allowed = scores.index_fill(1, forbidden, -torch.inf)
    if sampling.temperature == 0:
        ids = allowed.argmax(-1)
    else:
        probabilities = _truncate(allowed, sampling).softmax(-1)
        ids = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    return ids, scores.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def _truncate(scores: Tensor, sampling: Sampling) -> Tensor:
    if sampling.top_k and sampling.top_k < scores.shape[-1]:
        last = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < last, -torch.inf)
    if sampling.top_p < 1:
        ranked, order = scores.sort(descending=True)
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        cut = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, before >= max(sampling.top_p, 1e-30))
        scores = scores.masked_fill(cut, -torch.inf)
    return scores
