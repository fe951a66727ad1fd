"""The policy update: advantages of the rollouts that carry signal, and the clipped steps on the ids they sampled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from looktwice.config import GRPOConfig
from looktwice.model.numerics import check_same_numerics
from looktwice.processing.packing import PackedBatch
from looktwice.training.learner import Learner, Reference, Scores
from looktwice.training.losses import (
    aggregate,
    cispo_surrogate,
    group_advantages,
    gspo_surrogate,
    has_accuracy_signal,
    kl_estimate,
    policy_surrogate,
)
from looktwice.training.rollouts import Rollout


def improve(
    learner: Learner, groups: Sequence[Sequence[Rollout]], config: GRPOConfig, reference: Reference | None
) -> dict[str, float]:
    """Give every rollout its advantage, and update the policy on those that carry signal."""
    kept = [group for group in groups if carries_signal(group, config)]
    metrics = {"group/dropped": 1 - len(kept) / len(groups)}
    if not kept:
        return metrics | {"loss": 0.0, "rollout/trained_tokens": 0.0}
    rewards = torch.tensor([[rollout.reward.total for rollout in group] for group in kept])
    advantages = group_advantages(rewards, scale=config.scale_rewards)
    for group, values in zip(kept, advantages.tolist()):
        for rollout, value in zip(group, values):
            rollout.advantage = value
    trained = [
        rollout
        for group in kept
        for rollout in group
        if rollout.reward.error is None and not (config.mask_truncated_completions and rollout.trajectory.is_truncated)
    ]
    num_trained = sum(sum(rollout.trajectory.is_sampled) for rollout in trained)
    metrics["rollout/trained_tokens"] = num_trained / sum(map(len, groups))
    return metrics | (update_policy(learner, trained, config, reference) if trained else {"loss": 0.0})


def carries_signal(group: Sequence[Rollout], config: GRPOConfig) -> bool:
    """Whether a group is trained on: two rewards that did not fail, and by default not all equally right."""
    rewards = [rollout.reward for rollout in group if rollout.reward.error is None]
    if len(rewards) < 2:
        return False
    return not config.drop_constant_groups or has_accuracy_signal(torch.tensor([reward.accuracy for reward in rewards]))


def update_policy(
    learner: Learner, trained: Sequence[Rollout], config: GRPOConfig, reference: Reference | None
) -> dict[str, float]:
    """`num_iterations` clipped updates on ids the policy sampled; metrics are means over them.

    Raises NumericsError under exact mode when the first would not compute as the sampler did.
    """
    if config.exact:
        numerics = learner.numerics()
        for rollout in trained:
            check_same_numerics(trainer=numerics, sampler=rollout.numerics)
    rows = learner.rows([rollout.episode.example for rollout in trained])
    num_tokens = sum(row.num_loss_tokens for row in rows)
    ref_logprobs: dict[int, Tensor] = {}
    if reference is not None:
        learner.model.eval()
        with torch.no_grad(), reference.active(), learner.phases.during("reference"):
            for row in rows:
                logprobs = learner.score(row, temperature=config.temperature).logprobs
                counts = [sum(example.loss_mask) for example in row.examples]
                ref_logprobs |= zip(map(id, row.examples), logprobs.split(counts))
    noted: dict[int, tuple[float, dict[str, float]]] = {}
    sums: Counter[str] = Counter()

    def loss(scores: Scores, row: PackedBatch) -> Tensor:
        # of this row, which is half of one of `rows` when memory did not suffice for it
        [facts] = split_like([row], trained)
        sampling_logprobs, advantages = (fact.to(scores.logprobs.device) for fact in facts)
        sequences = row.loss_sequence().to(scores.logprobs.device)
        per_token, seen = surrogate(scores.logprobs, sampling_logprobs, advantages, sequences, config)
        if scores.entropy is not None:
            seen["policy/entropy"] = scores.entropy.mean()
        if reference is not None:
            kl = kl_estimate(scores.logprobs, torch.cat([ref_logprobs[id(example)] for example in row.examples]))
            seen["kl/reference"] = kl.detach().mean()
            per_token = per_token + config.beta * kl
        means = {name: float(value) for name, value in seen.items()}
        # by example, which replaces what a row said for which memory ran out afterwards
        noted.update({id(example): (sum(example.loss_mask) / num_tokens, means) for example in row.examples})
        return aggregate(
            per_token, sequences, mode=config.loss_aggregation, num_tokens=num_tokens, num_sequences=len(trained)
        )

    updates = []
    for _ in range(config.num_iterations):
        with learner.phases.during("update"):
            updates.append(learner.update(rows, loss, temperature=config.temperature, with_entropy=True))
        for share, facts in noted.values():
            sums.update({name: share * value for name, value in facts.items()})
    means = {name: value / len(updates) for name, value in sums.items()}
    if num_splits := sum(update.num_splits for update in updates):
        means["memory/row_splits"] = float(num_splits)
    return means | {
        "loss": sum(update.loss for update in updates) / len(updates),
        "optim/grad_norm": updates[-1].grad_norm,
        "optim/lr": learner.optimizer.param_groups[0]["lr"],
    }


def surrogate(
    policy_logprobs: Tensor, sampling_logprobs: Tensor, advantages: Tensor, sequences: Tensor, config: GRPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss per token [N] and metrics of the configured surrogate."""
    given = {"clip_low": config.epsilon, "clip_high": config.epsilon_high}
    bounds = {name: value for name, value in given.items() if value is not None}
    if config.surrogate == "gspo":
        return gspo_surrogate(policy_logprobs, sampling_logprobs, advantages, sequences, **bounds)
    if config.surrogate == "cispo":
        return cispo_surrogate(policy_logprobs, sampling_logprobs, advantages, **bounds)
    return policy_surrogate(policy_logprobs, sampling_logprobs, advantages, **bounds)


def split_like(rows: Sequence[PackedBatch], trained: Sequence[Rollout]) -> list[tuple[Tensor, Tensor]]:
    """Per row, the sampling logprobs and the advantages of its trained tokens [N], [N]."""
    by_example = {id(rollout.episode.example): rollout for rollout in trained}
    facts = []
    for row in rows:
        members = [by_example[id(example)] for example in row.examples]
        logprobs = [
            logprob
            for rollout in members
            for logprob, sampled in zip(rollout.trajectory.sampling_logprobs, rollout.trajectory.is_sampled)
            if sampled
        ]
        advantages = [rollout.advantage for rollout in members for sampled in rollout.trajectory.is_sampled if sampled]
        facts.append((torch.tensor(logprobs), torch.tensor(advantages)))
    return facts
