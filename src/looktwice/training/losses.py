"""Pure functions of logprobs and rewards: losses, KL, aggregation, advantages.

Legend: T packed tokens, N trained tokens of a pack, S sequences, V vocabulary, D model width, G rollouts of a group,
B groups of a batch.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

AdvantageScale = Literal["std", "batch", "none", "leave_one_out"]
Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"]
KLEstimator = Literal["k1", "k2", "k3"]
Correction = Literal["none", "truncate", "mask"]

MIN_REWARD_SPREAD = 1e-6
"""Rewards of one group closer than this are equal: their difference is rounding, not signal."""

MAX_LOG_RATIO = 20.0
"""Log ratios are clamped here; exp of a larger one overflows and turns the gradient into NaN."""


def group_advantages(rewards: Tensor, *, scale: AdvantageScale = "std", eps: float = 1e-4) -> Tensor:
    """Centre rewards on the mean of their group and scale them: [G] -> [G], or groups of a batch [B, G] -> [B, G].

    NaN marks a failed reward: it enters no mean or std and gets 0. A group whose rewards are all equal gives exactly
    zeros. `std` divides by the group's unbiased std + eps (GRPO, arXiv 2402.03300; R-GRPO with eps 1e-4), `batch`
    by the unbiased std + eps of all rewards given (Lite PPO, arXiv 2508.08221), `none` by nothing (Dr. GRPO,
    arXiv 2503.20783); `leave_one_out` centres each reward on the mean of the others (RLOO, arXiv 2402.14740).
    Raises ValueError when a group has fewer than 2 rewards that did not fail.

    Example: [2.1, 1.6, 0.6, 0.5, 0.0] -> [1.3224, 0.7424, -0.4176, -0.5336, -1.1136]
    """
    is_valid = ~rewards.isnan()
    num_valid = is_valid.sum(-1, keepdim=True)
    if (num_valid < 2).any():
        raise ValueError(f"a group needs 2 or more rewards that did not fail, got {num_valid.flatten().tolist()}")
    mean = rewards.nansum(-1, keepdim=True) / num_valid
    highest = rewards.nan_to_num(nan=-math.inf).amax(-1, keepdim=True)
    lowest = rewards.nan_to_num(nan=math.inf).amin(-1, keepdim=True)
    centred = torch.where(is_valid & (highest - lowest > MIN_REWARD_SPREAD), rewards - mean, 0.0)
    if scale == "none":
        return centred
    if scale == "leave_one_out":
        return centred * num_valid / (num_valid - 1)
    if scale == "batch":
        return centred / (rewards[is_valid].std() + eps)
    return centred / ((centred.square().sum(-1, keepdim=True) / (num_valid - 1)).sqrt() + eps)


def advantages_by_term(terms: Tensor, weights: Tensor, *, eps: float = 1e-4) -> Tensor:
    """Advantages of groups whose terms are scaled each by itself: [B, G, K], [K] -> [B, G].

    Each term is centred and divided by its std within the group, the weighted sum of them by the std of the batch, so
    that a rare term is not drowned by a frequent one. NaN marks a failed reward, as in `group_advantages`.
    Source: GDPO, arXiv 2601.05242.
    """
    scaled = group_advantages(terms.transpose(-1, -2), eps=eps).transpose(-1, -2)
    total = scaled @ weights.to(scaled.dtype)
    is_valid = ~terms.isnan().any(-1)
    if is_valid.sum() < 2 or not total.any():
        return total
    values = total[is_valid]
    return torch.where(is_valid, (total - values.mean()) / (values.std() + eps), 0.0)


def has_accuracy_signal(accuracies: Tensor) -> bool:
    """Whether a group [G] is worth training on: at least two rollouts, NaN left out, differ in accuracy.

    Shaping terms do not count: a group that is all wrong and differs in format only would otherwise get advantages
    as large as real signal (R-GRPO's phantom advantages).
    """
    valid = accuracies[~accuracies.isnan()]
    return len(valid) >= 2 and bool(valid.max() - valid.min() > MIN_REWARD_SPREAD)


class Surrogate(NamedTuple):
    """Loss per token [N], and where its gradient is cut off [N] because the ratio is too low or too high."""

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def policy_surrogate(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    delta: float | None = None,
) -> Surrogate:
    """PPO's clipped surrogate with separate bounds: [N], [N], [N] -> [N].

    -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), ratio against the policy that sampled. With `delta` a
    negative advantage counts at most delta times, however large the ratio: the two-sided clip, which is dual clip with
    c = delta. Source: arXiv 2402.03300; separate bounds: DAPO, arXiv 2503.14476; delta: INTELLECT-2, arXiv 2505.07291.
    """
    ratio = _log_ratio(policy_logprobs, old_logprobs).exp()
    return _clipped(ratio, advantages, clip_low, clip_high, delta)


def gspo_surrogate(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sequence_index: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    by_token: bool = False,
) -> Surrogate:
    """GSPO: clipping by the ratio of the whole sequence, [N] x 4 -> [N].

    The sequence ratio is the geometric mean of its token ratios, and every token carries it. In the plain form its
    gradient is that of the ratio, in the token form each token has its own: the same gradient where all tokens of a
    sequence have one advantage and one weight. `sequence_index` [N] int64 names each token's sequence; a sequence must
    be whole. Source: arXiv 2507.18071.
    """
    log_ratio = _log_ratio(policy_logprobs, old_logprobs)
    counts = torch.bincount(sequence_index)
    mean = torch.zeros_like(counts, dtype=log_ratio.dtype).index_add(0, sequence_index, log_ratio) / counts.clamp(min=1)
    ratio = mean.exp()[sequence_index]
    if by_token:
        ratio = ratio.detach() * (policy_logprobs - policy_logprobs.detach()).exp()
    return _clipped(ratio, advantages, clip_low, clip_high)


def cispo_surrogate(
    policy_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_high: float = 5.0
) -> Surrogate:
    """CISPO: -min(ratio, 1 + clip_high) * A * logprob, the weight without gradient. [N], [N], [N] -> [N].

    No token is dropped: beyond the bound only its weight stops growing.
    Source: MiniMax-M1, arXiv 2506.13585; the bound: ScaleRL, arXiv 2510.13786.
    """
    ratio = _log_ratio(policy_logprobs, old_logprobs).detach().exp()
    loss = -ratio.clamp(max=1 + clip_high) * advantages * policy_logprobs
    return Surrogate(loss, torch.zeros_like(ratio, dtype=torch.bool), ratio > 1 + clip_high)


def sapo_surrogate(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    positive: float = 1.0,
    negative: float = 1.05,
) -> Surrogate:
    """SAPO: a soft gate in the clip's place, -(4 / t) * sigmoid(t * (ratio - 1)) * A. [N], [N], [N] -> [N].

    t is `positive` or `negative` by the sign of the advantage. Source: arXiv 2511.20347.
    """
    ratio = _log_ratio(policy_logprobs, old_logprobs).exp()
    steepness = torch.where(advantages > 0, positive, negative)
    loss = -4 / steepness * torch.sigmoid(steepness * (ratio - 1)) * advantages
    never = torch.zeros_like(ratio, dtype=torch.bool)
    return Surrogate(loss, never, never)


def reinforce_surrogate(policy_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Surrogate:
    """REINFORCE with the group as its baseline: -A * logprob, whoever sampled. [N], [N], [N] -> [N]."""
    never = torch.zeros_like(policy_logprobs, dtype=torch.bool)
    return Surrogate(-advantages * policy_logprobs, never, never)


def importance_weights(
    old_logprobs: Tensor, drawn_logprobs: Tensor, *, correction: Correction, cap: float = 2.0
) -> Tensor:
    """What a token counts where another distribution drew it than the trainer computes: [N], [N] -> [N], no gradient.

    w = exp(old - drawn), with the trainer's logprob before the update and that of the distribution really drawn from.
    `truncate` takes min(w, cap) (Flash-RL, verl), `mask` takes w and leaves out tokens with w outside 1/cap to cap.
    """
    weights = _log_ratio(old_logprobs, drawn_logprobs).detach().exp()
    if correction == "none":
        return torch.ones_like(weights)
    if correction == "truncate":
        return weights.clamp(max=cap)
    return torch.where((weights < 1 / cap) | (weights > cap), 0.0, weights)


def kl_estimate(policy_logprobs: Tensor, ref_logprobs: Tensor, *, estimator: KLEstimator = "k3") -> Tensor:
    """Estimate of KL(policy || ref) per token: [N], [N] -> [N]. With d = ref - policy logprob:

    k1 = -d, unbiased, any sign; k2 = d^2 / 2; k3 = exp(d) - d - 1, unbiased and never negative. As a loss on sampled
    tokens k2 has the gradient of the KL, k3 one close to it near the reference, and that of k1 is 0 on average.
    Source: Schulman, "Approximating KL divergence".
    """
    d = _log_ratio(ref_logprobs, policy_logprobs)
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    return d.exp() - d - 1


def aggregate(
    per_token: Tensor,
    sequence_index: Tensor,
    *,
    mode: Aggregation,
    num_tokens: int,
    num_sequences: int,
    max_tokens: int | None = None,
) -> Tensor:
    """One loss from a loss per trained token [N], as this pack's share of the whole optimizer step.

    `num_tokens` and `num_sequences` count the trained tokens, and the sequences that have any, of the whole step: all
    packs of the accumulation and all ranks. So the shares add up to the loss of one large batch, whatever the packs.
    `sequence_index` [N] int64 names each token's sequence within the pack; a sequence must be whole.
    `token_mean`: sum / num_tokens (DAPO). `seq_mean_token_mean`: mean over sequences of each one's mean (GRPO).
    `seq_mean_token_sum`: sum / num_sequences. `constant`: sum / (num_sequences * max_tokens), free of length bias
    (Dr. GRPO).
    """
    if mode == "token_mean":
        return per_token.sum() / num_tokens
    if mode == "seq_mean_token_mean":
        counts = torch.bincount(sequence_index)
        return (per_token / counts[sequence_index]).sum() / num_sequences
    if mode == "seq_mean_token_sum":
        return per_token.sum() / num_sequences
    if max_tokens is None:
        raise ValueError("aggregation `constant` divides by max_tokens; give the completion limit of the run")
    return per_token.sum() / (num_sequences * max_tokens)


def _log_ratio(logprobs: Tensor, base_logprobs: Tensor) -> Tensor:
    return (logprobs - base_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _clipped(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, delta: float | None = None
) -> Surrogate:
    is_low = (ratio < 1 - clip_low) & (advantages < 0)
    is_high = (ratio > 1 + clip_high) & (advantages > 0)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    if delta is not None:
        is_high |= (ratio > delta) & (advantages < 0)
        ratio = ratio.clamp(max=delta)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    return Surrogate(loss, is_low, is_high)
