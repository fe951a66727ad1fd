"""Choosing the next token: random numbers that belong to a rollout, penalties, truncation, and both logprobs.

Legend: B rows, V vocabulary, F banned ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from looktwice.errors import ConfigError
from looktwice.model.exact import is_exact
from looktwice.model.logprobs import distribution_logprobs

BLOCK = 1024
"""Ids whose weights are summed together: a draw finds its block first, then its id in the block."""
CANDIDATES = 1024
"""Ids that top-p sorts at first; where they do not hold its share of the mass, it sorts all."""
CACHED_LOGITS = 2**20
"""Logits that a CPU works on at a time, so that they stay in its cache."""
SMALLEST_TEMPERATURE = 1e-30
"""A smaller divisor would overflow, and decides alike."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 is greedy; top_p 1, top_k 0, min_p 0, repetition_penalty 1 and presence_penalty 0 are off.

    Penalties change the logits first: of every id seen in prompt or answer (repetition: divided where positive,
    multiplied where not; arXiv 1909.05858) and of every id of the answer (presence: subtracted). Then come
    temperature, top-k, top-p of what top-k left, and min-p, a share of the largest probability.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:  # refuses NaN too
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is {self.min_p}; it must lie in [0, 1]")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1 is off)")
        if not math.isfinite(self.presence_penalty):
            raise ConfigError(f"presence_penalty is {self.presence_penalty}; it must be a number (0 is off)")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_truncated(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def is_penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0


class Draw(NamedTuple):
    """One id a row [B], its logprob in the plain distribution and in the one drawn from [B], float32."""

    ids: Tensor
    logprobs: Tensor
    drawn_logprobs: Tensor


class Seen(NamedTuple):
    """The distinct ids that stand in a row's prompt or answer, and those of them that stand in its answer."""

    context: Tensor
    answer: Tensor


def mixed_seed(*parts: int | bytes) -> int:
    """One 64-bit seed of several numbers or bytes: any change of one gives an unrelated seed."""
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode() + b"/")
    return int.from_bytes(digest.digest(), "little")


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """A number of [0, 1) for each seed and position [B] float64: nothing else decides it.

    SplitMix64 (Steele, Lea and Flood 2014) at state `seed + position * golden`, its upper 53 bits.
    """
    state = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
    state += (np.array(positions, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(logits: Tensor, sampling: Sampling, banned: Tensor, numbers: Tensor | None, seen: Sequence[Seen] = ()) -> Draw:
    """One id a row: logits [B, V], which are overwritten, banned ids [F], uniform numbers [B] float64.

    `numbers` is not read when greedy, `seen` [B] only under a penalty. Plain means the whole distribution at this
    temperature, as training computes it; greedy has the plain one at temperature 1.
    """
    at_once = max(1, CACHED_LOGITS // logits.shape[1])
    if logits.device.type != "cpu" or len(logits) <= at_once:
        return _draw(logits, sampling, banned, numbers, seen)
    parts = [
        _draw(
            logits[start : start + at_once],
            sampling,
            banned,
            None if numbers is None else numbers[start : start + at_once],
            seen[start : start + at_once],
        )
        for start in range(0, len(logits), at_once)
    ]
    return Draw(*map(torch.cat, zip(*parts)))


def _draw(logits: Tensor, sampling: Sampling, banned: Tensor, numbers: Tensor | None, seen: Sequence[Seen]) -> Draw:
    """`draw` of rows that are worked on at a time."""
    divisor = max(sampling.temperature or 1.0, SMALLEST_TEMPERATURE)
    exact = distribution_logprobs(logits, divisor) if is_exact() else None  # first, since logits are overwritten
    scores = plain = logits.float() if divisor == 1 else logits.float() / divisor
    plain_normaliser = None
    if sampling.is_penalised:
        plain_normaliser = plain.logsumexp(-1)
        scores = _penalised(logits.float(), sampling, seen) / divisor
    held = scores[:, banned].logsumexp(-1)
    scores.index_fill_(1, banned, -torch.inf)
    if sampling.is_greedy:
        ids = scores.argmax(-1)
        normaliser = scores.logsumexp(-1)
        drawn_logprobs = torch.zeros_like(normaliser)
    else:
        assert numbers is not None
        weights = scores.softmax(-1)
        if sampling.is_truncated:
            weights.masked_fill_(weights < _threshold(weights, sampling), 0)
        ids, mass = _inverse_cdf(weights, numbers)
        log_weights = weights.gather(1, ids[:, None])[:, 0].log()
        normaliser = scores.gather(1, ids[:, None])[:, 0] - log_weights
        drawn_logprobs = log_weights - mass.log()
    if exact is not None:
        return Draw(ids, exact.gather(1, ids[:, None])[:, 0], drawn_logprobs)
    if plain_normaliser is None:
        plain_normaliser = torch.logaddexp(normaliser, held)
    return Draw(ids, plain.gather(1, ids[:, None])[:, 0] - plain_normaliser, drawn_logprobs)


def _inverse_cdf(weights: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The id [B] at which the running sum of weights [B, V] passes its share `numbers` of the mass, and the mass [B].

    Whole blocks are summed first, so that only one block of a row is summed up id by id.
    """
    num_rows, size = weights.shape
    whole = size - size % BLOCK
    sums = weights[:, :whole].reshape(num_rows, whole // BLOCK, BLOCK).sum(-1)
    if whole < size:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], -1)
    running = sums.double().cumsum(-1)
    mass = running[:, -1:]
    target = numbers[:, None] * mass
    block = torch.searchsorted(running, target, right=True).clamp_(max=running.shape[1] - 1)
    before = torch.where(block > 0, running.gather(1, (block - 1).clamp_(min=0)), 0.0)
    places = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(1, places.clamp(max=size - 1)).double().masked_fill_(places >= size, 0).cumsum_(-1)
    # the block's sum was rounded otherwise: stay below it, so that an id with weight is found
    rest = torch.minimum(target - before, inside[:, -1:] * (1 - 1e-15))
    ids = block * BLOCK + torch.searchsorted(inside, rest, right=True).clamp_(max=BLOCK - 1)
    return ids[:, 0].clamp(max=size - 1), mass[:, 0].float()


def _threshold(weights: Tensor, sampling: Sampling) -> Tensor:
    """The lowest probability [B, 1] that top-k, top-p and min-p leave of [B, V]; equal ones share their fate."""
    num_ids = weights.shape[-1]
    lowest, mass = torch.zeros_like(weights[:, :1]), torch.ones_like(weights[:, :1])
    if 0 < sampling.top_k < num_ids:
        lowest = weights.topk(sampling.top_k).values[:, -1:]
        mass = weights.masked_fill(weights < lowest, 0).sum(-1, keepdim=True)
    if sampling.top_p < 1:
        for count in (min(CANDIDATES, num_ids), num_ids):
            ranked = weights.topk(count).values
            running = (ranked / mass).cumsum(-1)
            if count == num_ids or bool((running[:, -1] >= sampling.top_p).all()):
                break
        is_kept = running - ranked / mass < max(sampling.top_p, SMALLEST_TEMPERATURE)
        last = is_kept.sum(-1, keepdim=True).clamp(min=1) - 1
        lowest = torch.maximum(lowest, ranked.gather(1, last))
    if sampling.min_p > 0:
        lowest = torch.maximum(lowest, weights.amax(-1, keepdim=True) * sampling.min_p)
    return lowest


def _penalised(logits: Tensor, sampling: Sampling, seen: Sequence[Seen]) -> Tensor:
    """The logits with those of seen ids changed: a new tensor [B, V]."""
    changed = logits.clone()
    for row, (context, answer) in zip(changed, seen, strict=True):
        if sampling.repetition_penalty != 1:
            values = row[context]
            penalty = sampling.repetition_penalty
            row[context] = torch.where(values > 0, values / penalty, values * penalty)
        row[answer] -= sampling.presence_penalty
    return changed
