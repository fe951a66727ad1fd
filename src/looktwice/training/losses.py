"""Pure functions of logprobs and rewards: losses, KL, aggregation, advantages.

Legend: T packed tokens, N trained tokens of a pack, S sequences, V vocabulary, D model width, G rollouts of a group,
B groups of a batch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

AdvantageScale = Literal["std", "batch", "none"]
Aggregation = Literal["token_mean", "seq_mean_token_mean", "constant"]
KLEstimator = Literal["k1", "k2", "k3"]

MIN_REWARD_SPREAD = 1e-6
"""Rewards of one group closer than this are equal: their difference is rounding, not signal."""

MAX_LOG_RATIO = 20.0
"""Log ratios are clamped here; exp of a larger one overflows and turns the gradient into NaN."""


def group_advantages(rewards: Tensor, *, scale: AdvantageScale = "std", eps: float = 1e-4) -> Tensor:
    """Centre rewards on the mean of their group and scale them: [G] -> [G], or groups of a batch [B, G] -> [B, G].

    NaN marks a failed reward: it enters no mean or std and gets 0. A group whose rewards are all equal gives exactly
    zeros. `std` divides by the group's unbiased std + eps (GRPO, arXiv 2402.03300; R-GRPO with eps 1e-4), `batch`
    by the unbiased std + eps of all rewards given (Lite PPO, arXiv 2508.08221), `none` by nothing (Dr. GRPO,
    arXiv 2503.20783). Raises ValueError when a group has fewer than 2 rewards that did not fail.

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
    if scale == "batch":
        return centred / (rewards[is_valid].std() + eps)
    return centred / ((centred.square().sum(-1, keepdim=True) / (num_valid - 1)).sqrt() + eps)


def has_accuracy_signal(accuracies: Tensor) -> bool:
    """Whether a group [G] is worth training on: at least two rollouts, NaN left out, differ in accuracy.

    Shaping terms do not count: a group that is all wrong and differs in format only would otherwise get advantages
    as large as real signal (R-GRPO's phantom advantages).
    """
    valid = accuracies[~accuracies.isnan()]
    return len(valid) >= 2 and bool(valid.max() - valid.min() > MIN_REWARD_SPREAD)


def policy_surrogate(
    policy_logprobs: Tensor,
    sampling_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss per token and metrics of PPO's clipped surrogate with separate bounds: [N], [N], [N] -> [N].

    -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), ratio against the policy that sampled.
    Source: arXiv 2402.03300; separate bounds: DAPO, arXiv 2503.14476.
    """
    log_ratio = _log_ratio(policy_logprobs, sampling_logprobs)
    return _clipped_surrogate(log_ratio.exp(), advantages, clip_low, clip_high, log_ratio)


def gspo_surrogate(
    policy_logprobs: Tensor,
    sampling_logprobs: Tensor,
    advantages: Tensor,
    sequence_index: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss per token and metrics of GSPO-token: clipping by the ratio of the whole sequence, [N] x 4 -> [N].

    The sequence ratio is the geometric mean of its token ratios; every token carries its value and its own gradient.
    `sequence_index` [N] int64 names each token's sequence; a sequence must be whole. Source: arXiv 2507.18071.
    """
    log_ratio = _log_ratio(policy_logprobs, sampling_logprobs)
    counts = torch.bincount(sequence_index)
    mean_log_ratio = torch.zeros_like(counts, dtype=log_ratio.dtype).index_add(0, sequence_index, log_ratio.detach())
    sequence_log_ratio = (mean_log_ratio / counts.clamp(min=1))[sequence_index]
    ratio = sequence_log_ratio.exp() * (policy_logprobs - policy_logprobs.detach()).exp()
    return _clipped_surrogate(ratio, advantages, clip_low, clip_high, log_ratio)


def cispo_surrogate(
    policy_logprobs: Tensor, sampling_logprobs: Tensor, advantages: Tensor, *, clip_high: float = 5.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss per token and metrics of CISPO: -min(ratio, 1 + clip_high) * A * logprob, the weight without gradient.

    No token is dropped: beyond the bound only its weight stops growing. [N], [N], [N] -> [N].
    Source: MiniMax-M1, arXiv 2506.13585; the bound: ScaleRL, arXiv 2510.13786.
    """
    log_ratio = _log_ratio(policy_logprobs, sampling_logprobs)
    ratio = log_ratio.detach().exp()
    loss = -ratio.clamp(max=1 + clip_high) * advantages * policy_logprobs
    return loss, _ratio_metrics(log_ratio, torch.zeros_like(ratio, dtype=torch.bool), ratio > 1 + clip_high)


def kl_estimate(policy_logprobs: Tensor, ref_logprobs: Tensor, *, estimator: KLEstimator = "k3") -> Tensor:
    """Estimate of KL(policy || ref) per token: [N], [N] -> [N]. With d = ref - policy logprob:

    k1 = -d, unbiased, any sign; k2 = d^2 / 2; k3 = exp(d) - d - 1, unbiased and never negative.
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
    `constant`: sum / (num_sequences * max_tokens), free of length bias (Dr. GRPO).
    """
    if mode == "token_mean":
        return per_token.sum() / num_tokens
    if mode == "seq_mean_token_mean":
        counts = torch.bincount(sequence_index)
        return (per_token / counts[sequence_index]).sum() / num_sequences
    if max_tokens is None:
        raise ValueError("aggregation `constant` divides by max_tokens; give the completion limit of the run")
    return per_token.sum() / (num_sequences * max_tokens)


def _log_ratio(logprobs: Tensor, base_logprobs: Tensor) -> Tensor:
    return (logprobs - base_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, log_ratio: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    is_low = (ratio < 1 - clip_low) & (advantages < 0)
    is_high = (ratio > 1 + clip_high) & (advantages > 0)
    return loss, _ratio_metrics(log_ratio, is_low, is_high)


def _ratio_metrics(log_ratio: Tensor, is_clipped_low: Tensor, is_clipped_high: Tensor) -> dict[str, Tensor]:
    """Means over the tokens given, without gradient; 0 when there are none."""
    num_tokens = max(1, len(log_ratio))
    return {
        "clip/low": is_clipped_low.sum() / num_tokens,
        "clip/high": is_clipped_high.sum() / num_tokens,
        "kl/sampling": log_ratio.detach().abs().sum() / num_tokens,
    }
