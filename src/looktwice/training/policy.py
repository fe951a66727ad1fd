"""The policy update: advantages of the rollouts that carry signal, and the optimizer steps on the ids they sampled."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from looktwice.config import GRPOConfig
from looktwice.engine.sampling import mixed_seed
from looktwice.model.numerics import check_same_numerics
from looktwice.processing.packing import PackedBatch
from looktwice.training.learner import Learner, Reference, Scores, Update
from looktwice.training.losses import (
    Surrogate,
    advantages_by_term,
    aggregate,
    cispo_surrogate,
    group_advantages,
    gspo_surrogate,
    has_accuracy_signal,
    importance_weights,
    kl_estimate,
    policy_surrogate,
    reinforce_surrogate,
    sapo_surrogate,
)
from looktwice.training.rollouts import Rollout

Logprobs = Mapping[int, Tensor]
"""Logprobs of the trained tokens [N] of an example, by its id."""


def improve(
    learner: Learner, groups: Sequence[Sequence[Rollout]], config: GRPOConfig, reference: Reference | None
) -> dict[str, float]:
    """Give every rollout its advantage, and update the policy on those that carry signal."""
    kept = [group for group in groups if carries_signal(group, config)]
    metrics = {"group/dropped": 1 - len(kept) / len(groups)}
    if kept:
        for group, values in zip(kept, advantages_of(kept, config).tolist()):
            for rollout, value in zip(group, values):
                rollout.advantage = value
    trained = [trained_of(group, config) for group in kept]
    num_tokens = sum(sum(rollout.trajectory.is_sampled) for group in trained for rollout in group)
    metrics["rollout/trained_tokens"] = num_tokens / sum(map(len, groups))
    return metrics | (update_policy(learner, trained, config, reference) if num_tokens else {"loss": 0.0})


def carries_signal(group: Sequence[Rollout], config: GRPOConfig) -> bool:
    """Whether a group is trained on: two rewards that count, and by default not all equally right."""
    rewards = [rollout.reward for rollout in group if counts(rollout, config)]
    if len(rewards) < 2:
        return False
    return not config.drop_constant_groups or has_accuracy_signal(torch.tensor([reward.accuracy for reward in rewards]))


def counts(rollout: Rollout, config: GRPOConfig) -> bool:
    """Whether a rollout is in the statistics of its group."""
    is_left_out = rollout.trajectory.is_truncated and not config.truncated_in_statistics
    return rollout.reward.error is None and not is_left_out


def trained_of(group: Sequence[Rollout], config: GRPOConfig) -> list[Rollout]:
    """Those of a group that have a loss; the others are in neither its sum nor what it is divided by."""
    is_masked = config.mask_truncated_completions
    return [
        rollout for rollout in group if counts(rollout, config) and not (is_masked and rollout.trajectory.is_truncated)
    ]


def advantages_of(groups: Sequence[Sequence[Rollout]], config: GRPOConfig) -> Tensor:
    """Advantages [B, G] of groups; 0 for a rollout that is in no statistics."""
    is_out = torch.tensor([[not counts(rollout, config) for rollout in group] for group in groups])
    if config.scale_rewards == "per_term":
        names = sorted({name for group in groups for rollout in group for name in rollout.reward.parts})
        terms = [[[rollout.reward.parts.get(name, 0.0) for name in names] for rollout in group] for group in groups]
        weights = next(rollout.reward.weights for group in groups for rollout in group if counts(rollout, config))
        return advantages_by_term(
            torch.tensor(terms).masked_fill(is_out[..., None], torch.nan),
            torch.tensor([weights.get(name, 1.0) for name in names]),
        )
    totals = torch.tensor([[rollout.reward.total for rollout in group] for group in groups])
    return group_advantages(totals.masked_fill(is_out, torch.nan), scale=config.scale_rewards)


class Minibatch(NamedTuple):
    """The rollouts of one optimizer step, packed, and what the step's loss is divided by."""

    rows: list[PackedBatch]
    num_tokens: int
    num_sequences: int


def minibatches(learner: Learner, groups: Sequence[Sequence[Rollout]], config: GRPOConfig) -> list[Minibatch]:
    """The groups in as many optimizer steps as asked for, as even as can be, by an order that seed and step decide."""
    order = [group for group in groups if group]
    if config.num_minibatches > 1:
        random.Random(mixed_seed(config.seed, learner.step)).shuffle(order)
    parts = [order[first :: config.num_minibatches] for first in range(config.num_minibatches)]
    made = []
    for part in filter(None, parts):
        rollouts = [rollout for group in part for rollout in group]
        num_tokens = sum(sum(rollout.trajectory.is_sampled) for rollout in rollouts)
        rows = learner.rows([rollout.episode.example for rollout in rollouts])
        made.append(Minibatch(rows, num_tokens, len(rollouts)))
    return made


def update_policy(
    learner: Learner, groups: Sequence[Sequence[Rollout]], config: GRPOConfig, reference: Reference | None
) -> dict[str, float]:
    """`num_iterations` passes over the rollouts of groups, in minibatches of one optimizer step each.

    Metrics are means over the steps. Where one step trains on what the present policy sampled here, its own forward is
    the only one: no logprobs are computed before it.
    Raises NumericsError under exact mode when the first would not compute as the sampler did.
    """
    trained = [rollout for group in groups for rollout in group]
    if config.exact:
        numerics = learner.numerics()
        for rollout in trained:
            check_same_numerics(trainer=numerics, sampler=rollout.numerics)
    parts = minibatches(learner, groups, config)
    rows = [row for part in parts for row in part.rows]
    loss = PolicyLoss(config, {id(rollout.episode.example): rollout for rollout in trained})
    if reference is not None:
        with reference.active(), learner.phases.during("reference"):
            loss.reference = learner.logprobs(rows, temperature=config.temperature)
    has_one_step = len(parts) * config.num_iterations == 1
    if config.correction != "none" and not has_one_step:
        with learner.phases.during("reference"):
            loss.old = learner.logprobs(rows, temperature=config.temperature)
    options = {
        "temperature": config.temperature,
        "with_entropy": True,
        "entropy_gradient": config.entropy_coef > 0,
    }
    updates: list[Update] = []
    sums: Counter[str] = Counter()
    for _ in range(config.num_iterations):
        for part in parts:
            loss.begin(part)
            with learner.phases.during("update"):
                updates.append(learner.update(part.rows, loss, **options))
            sums.update(loss.means())
            if len(updates) == 1:
                first = loss.gap()
    means = {name: value / len(updates) for name, value in sums.items()}
    if num_splits := sum(update.num_splits for update in updates):
        means["memory/row_splits"] = float(num_splits)
    return (
        first
        | means
        | {
            "loss": sum(update.loss for update in updates) / len(updates),
            "optim/grad_norm": updates[-1].grad_norm,
            "optim/lr": learner.optimizer.param_groups[0]["lr"],
            "optim/updates": float(len(updates)),
        }
    )


@dataclass
class PolicyLoss:
    """The loss of rows of rollouts, as `Learner.update` calls it, and what is seen on the way.

    `reference` and `old` are logprobs by the starting policy and by this one before its first update, where they are
    needed.
    """

    config: GRPOConfig
    rollouts: Mapping[int, Rollout]
    """By the id of their example."""
    reference: Logprobs | None = None
    old: Logprobs | None = None
    part: Minibatch | None = None
    seen: dict[int, tuple[int, dict[str, float]]] = field(default_factory=dict)
    """By the id of an example its trained tokens and the means of its row: what is said again, because memory ran out
    afterwards, takes the place of what was said before."""

    def begin(self, part: Minibatch) -> None:
        """What follows are rows of one optimizer step."""
        self.part = part
        self.seen.clear()

    def __call__(self, scores: Scores, row: PackedBatch) -> Tensor:
        assert self.part is not None
        config, device = self.config, scores.logprobs.device
        members = [self.rollouts[id(example)] for example in row.examples]
        sampling, drawn, advantages = (fact.to(device) for fact in facts_of(members))
        sequences = row.loss_sequence().to(device)
        old = sampling
        if config.correction != "none":
            old = scores.logprobs.detach() if self.old is None else of_row(self.old, row)
        found = surrogate(scores.logprobs, old, advantages, sequences, config)
        gap = scores.logprobs.detach() - sampling
        seen = {
            "clip/low": found.clipped_low.float().mean(),
            "clip/high": found.clipped_high.float().mean(),
            "kl/sampling": gap.abs().mean(),
            "gap/max": gap.abs().max(),
            "gap/ratio": gap.exp().mean(),
        }
        per_token = found.loss
        if config.correction != "none":
            weights = importance_weights(old, drawn, correction=config.correction, cap=config.importance_cap)
            seen |= {"importance/mean": weights.mean(), "importance/left_out": (weights == 0).float().mean()}
            per_token = per_token * weights
        if scores.entropy is not None:
            seen["policy/entropy"] = scores.entropy.detach().mean()
            if config.entropy_coef:
                per_token = per_token - config.entropy_coef * scores.entropy
        if self.reference is not None:
            kl = kl_estimate(scores.logprobs, of_row(self.reference, row), estimator=config.kl_estimator)
            seen["kl/reference"] = kl.detach().mean()
            per_token = per_token + config.beta * kl
        means = {name: float(value) for name, value in seen.items()}
        self.seen.update({id(example): (sum(example.loss_mask), means) for example in row.examples})
        return aggregate(
            per_token,
            sequences,
            mode=config.loss_aggregation,
            num_tokens=self.part.num_tokens,
            num_sequences=self.part.num_sequences,
            max_tokens=config.max_new_tokens,
        )

    def means(self) -> dict[str, float]:
        """Means over the tokens of the step."""
        assert self.part is not None
        sums: Counter[str] = Counter()
        for num_tokens, means in self.seen.values():
            share = num_tokens / self.part.num_tokens
            sums.update({name: share * value for name, value in means.items() if not name.startswith("gap/")})
        return dict(sums)

    def gap(self) -> dict[str, float]:
        """How far trainer and sampler are apart, as a step sees it: before the first update the gap between engines."""
        assert self.part is not None
        pairs = self.seen.values()
        ratio = sum(num_tokens * means["gap/ratio"] for num_tokens, means in pairs) / self.part.num_tokens
        return {"gap/max": max(means["gap/max"] for _, means in pairs), "gap/ratio": ratio}


def facts_of(rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the sampled tokens of rollouts, one after the other: both kinds of logprobs and the advantages, [N] each."""
    sampling: list[float] = []
    drawn: list[float] = []
    advantages: list[float] = []
    for rollout in rollouts:
        trajectory = rollout.trajectory
        places = [place for place, is_sampled in enumerate(trajectory.is_sampled) if is_sampled]
        sampling += [trajectory.sampling_logprobs[place] for place in places]
        drawn += [trajectory.drawn_logprobs[place] for place in places]
        advantages += [rollout.advantage] * len(places)
    return torch.tensor(sampling), torch.tensor(drawn), torch.tensor(advantages)


def of_row(known: Logprobs, row: PackedBatch) -> Tensor:
    """The logprobs of the trained tokens of a row [N]."""
    return torch.cat([known[id(example)] for example in row.examples])


def surrogate(policy: Tensor, old: Tensor, advantages: Tensor, sequences: Tensor, config: GRPOConfig) -> Surrogate:
    """The configured surrogate."""
    given = {"clip_low": config.epsilon, "clip_high": config.epsilon_high, "delta": config.delta}
    bounds = {name: value for name, value in given.items() if value is not None}
    match config.surrogate:
        case "gspo" | "gspo_token":
            by_token = config.surrogate == "gspo_token"
            return gspo_surrogate(policy, old, advantages, sequences, by_token=by_token, **bounds)
        case "cispo":
            return cispo_surrogate(policy, old, advantages, **bounds)
        case "sapo":
            return sapo_surrogate(policy, old, advantages)
        case "reinforce":
            return reinforce_surrogate(policy, old, advantages)
    return policy_surrogate(policy, old, advantages, **bounds)
