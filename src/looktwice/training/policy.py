"""The policy update: advantages of the rollouts that carry signal, and the optimizer steps on the ids they sampled."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from looktwice.config import GRPOConfig
from looktwice.engine.sampling import mixed_seed
from looktwice.model.numerics import check_same_numerics
from looktwice.processing.packing import PackedBatch
from looktwice.rewards import Reward
from looktwice.rollout.trajectory import Trajectory
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


def improve(
    learner: Learner, groups: Sequence[Sequence[Rollout]], config: GRPOConfig, reference: Reference | None
) -> dict[str, float]:
    """Give every rollout its advantage, and update the policy on those that carry signal."""
    kept = [group for group in groups if carries_signal(group, config)]
    trained = with_advantages(kept, config)
    num_tokens = sum(rollout.trajectory.num_sampled for group in trained for rollout in group)
    metrics = {
        "group/dropped": 1 - len(kept) / len(groups),
        "rollout/trained_tokens": num_tokens / sum(map(len, groups)),
    }
    return metrics | (update_policy(learner, trained, config, reference) if num_tokens else {"loss": 0.0})


class Paid(Protocol):
    """A finished rollout with its reward and its advantage, now or as it was written down."""

    reward: Reward
    advantage: float

    @property
    def trajectory(self) -> Trajectory: ...


class Trained(Paid, Protocol):
    """One that the policy is updated on, with the logprobs that are known of its sampled ids."""

    reference_logprobs: list[float] | None
    old_logprobs: list[float] | None


AnyPaid = TypeVar("AnyPaid", bound=Paid)


def with_advantages(kept: Sequence[Sequence[AnyPaid]], config: GRPOConfig) -> list[list[AnyPaid]]:
    """Give the rollouts of the groups that carry signal their advantages; those of each that have a loss.

    The others are in neither its sum nor what it is divided by.
    """
    if kept:
        for group, values in zip(kept, advantages_of(kept, config).tolist()):
            for rollout, value in zip(group, values):
                rollout.advantage = value
    is_masked = config.mask_truncated_completions
    return [
        [one for one in group if counts(one, config) and not (is_masked and one.trajectory.is_truncated)]
        for group in kept
    ]


def carries_signal(group: Sequence[Paid], config: GRPOConfig) -> bool:
    """Whether a group is trained on: two rewards that count, and by default not all equally right."""
    rewards = [rollout.reward for rollout in group if counts(rollout, config)]
    if len(rewards) < 2:
        return False
    return not config.drop_constant_groups or has_accuracy_signal(torch.tensor([reward.accuracy for reward in rewards]))


def counts(rollout: Paid, config: GRPOConfig) -> bool:
    """Whether a rollout is in the statistics of its group."""
    is_left_out = rollout.trajectory.is_truncated and not config.truncated_in_statistics
    return rollout.reward.error is None and not is_left_out


def advantages_of(groups: Sequence[Sequence[Paid]], config: GRPOConfig) -> Tensor:
    """Advantages [B, G] of groups; 0 for a rollout that is in no statistics."""
    is_out = torch.tensor([[not counts(rollout, config) for rollout in group] for group in groups])
    if config.scale_rewards == "per_term":
        paid = [rollout.reward for group in groups for rollout in group if counts(rollout, config)]
        names = sorted({name for reward in paid for name in reward.terms})
        weights = {name: weight for reward in paid for name, weight in reward.weights.items()}
        terms = [[[rollout.reward.terms.get(name, 0.0) for name in names] for rollout in group] for group in groups]
        return advantages_by_term(
            torch.tensor(terms).masked_fill(is_out[..., None], torch.nan),
            torch.tensor([weights.get(name, 1.0) for name in names]),
        )
    totals = torch.tensor([[rollout.reward.total for rollout in group] for group in groups])
    return group_advantages(totals.masked_fill(is_out, torch.nan), scale=config.scale_rewards)


def in_minibatches(groups: Sequence[Sequence[AnyPaid]], config: GRPOConfig, step: int) -> list[list[AnyPaid]]:
    """The rollouts of the groups by optimizer step, as even as can be and no group split, in an order that the seed
    and the step (counted from 0) decide."""
    order = [group for group in groups if group]
    if config.num_minibatches > 1:
        random.Random(mixed_seed(config.seed, step)).shuffle(order)
    parts = [order[first :: config.num_minibatches] for first in range(config.num_minibatches)]
    return [[rollout for group in part for rollout in group] for part in parts if part]


class Minibatch(NamedTuple):
    """The rows of one optimizer step that are this process's own, and what the loss of all rows is divided by."""

    rows: list[PackedBatch]
    num_tokens: int
    num_sequences: int

    @classmethod
    def of(cls, learner: Learner, rollouts: Sequence[Rollout]) -> Minibatch:
        num_tokens = sum(rollout.trajectory.num_sampled for rollout in rollouts)
        own = [rollout.example for rollout in rollouts if rollout.is_own]
        return cls(learner.rows(own), num_tokens, len(rollouts))


def update_policy(
    learner: Learner, groups: Sequence[Sequence[Rollout]], config: GRPOConfig, reference: Reference | None
) -> dict[str, float]:
    """`num_iterations` passes over the rollouts of groups, in minibatches of one optimizer step each.

    The groups are those of all processes, each of which trains on its own. Metrics are means over the steps. Where one
    step trains on what the present policy sampled here, its own forward is the only one: no logprobs are computed
    before it. Raises NumericsError under exact mode when the first would not compute as the sampler did.
    """
    world = learner.world
    own = [rollout for group in groups for rollout in group if rollout.is_own]
    if config.exact:
        numerics = learner.numerics()
        for rollout in own:
            check_same_numerics(trainer=numerics, sampler=rollout.numerics)
    parts = [Minibatch.of(learner, part) for part in in_minibatches(groups, config, learner.step)]
    loss = PolicyLoss(config, {id(rollout.example): rollout for rollout in own})
    loss.know(learner, parts, reference)
    options = {"temperature": config.temperature, "with_entropy": True, "entropy_gradient": config.entropy_coef > 0}
    updates: list[Update] = []
    sums: Counter[str] = Counter()
    gaps: list[tuple[float, float, float]] = []
    for _ in range(config.num_iterations):
        for part in parts:
            world.at("rows", learner.step + 1)
            loss.begin(part)
            with learner.phases.during("update"):
                updates.append(learner.update(part.rows, loss, **options))
            for example, logprobs in loss.policy.items():
                loss.rollouts[example].trainer_logprobs.append(logprobs.tolist())
            sums.update(loss.means())
            gaps = gaps or world.gather([loss.gap()])
    metrics: defaultdict[str, float] = defaultdict(float)
    for name, value in world.gather([*sums.items()]):
        metrics[name] += value / len(updates)
    metrics |= {
        "loss": sum(update.loss for update in updates) / len(updates),
        "optim/grad_norm": updates[-1].grad_norm,
        "optim/lr": learner.optimizer.param_groups[0]["lr"],
        "optim/updates": float(len(updates)),
    }
    if all(rollout.version == learner.step for group in groups for rollout in group):
        largest, means, ratios = zip(*gaps)
        metrics |= {"gap/max": max(largest), "gap/mean": sum(means), "gap/ratio": sum(ratios)}
    if num_splits := sum(update.num_splits for update in updates):
        metrics["memory/row_splits"] = float(num_splits)
    return dict(metrics)


@dataclass
class PolicyLoss:
    """The loss of rows of rollouts, as `Learner.update` calls it, and what is seen on the way.

    `policy` are the logprobs of the present step's rollouts, by the id of their example.
    """

    config: GRPOConfig
    rollouts: Mapping[int, Rollout]
    """By the id of their example."""
    part: Minibatch | None = None
    policy: dict[int, Tensor] = field(default_factory=dict)
    seen: dict[int, tuple[int, dict[str, float]]] = field(default_factory=dict)
    """By the id of an example its trained tokens and the means of its row: what is said again, because memory ran out
    afterwards, takes the place of what was said before."""

    def know(self, learner: Learner, parts: Sequence[Minibatch], reference: Reference | None) -> None:
        """Compute the logprobs that the loss needs beside those of the update's own forward."""
        config, world = self.config, learner.world
        rows = [row for part in parts for row in part.rows]
        has_one_step = len(parts) * config.num_iterations == 1
        for name, weights in (
            ("reference_logprobs", reference and reference.active()),
            ("old_logprobs", config.correction != "none" and not has_one_step and nullcontext()),
        ):
            if not weights:
                continue
            world.at("reference", learner.step + 1)
            with learner.phases.during("reference"), weights, world.whole_model(learner.model):
                found = learner.logprobs(rows, temperature=config.temperature)
            for example, logprobs in found.items():
                setattr(self.rollouts[example], name, logprobs.tolist())

    def begin(self, part: Minibatch) -> None:
        """What follows are rows of one optimizer step."""
        self.part = part
        self.policy.clear()
        self.seen.clear()

    def __call__(self, scores: Scores, row: PackedBatch) -> Tensor:
        assert self.part is not None
        if not row.num_loss_tokens:  # one without weight, beside those of other processes
            return scores.logprobs.sum()
        config = self.config
        facts = TokenFacts.of([self.rollouts[id(example)] for example in row.examples]).to(scores.logprobs.device)
        per_token, seen = token_loss(scores.logprobs, facts, config)
        if scores.entropy is not None:
            seen["policy/entropy"] = scores.entropy.detach().mean()
            if config.entropy_coef:
                per_token = per_token - config.entropy_coef * scores.entropy
        means = {name: float(value) for name, value in seen.items()}
        lengths = [sum(example.loss_mask) for example in row.examples]
        self.policy.update(zip(map(id, row.examples), scores.logprobs.detach().split(lengths)))
        self.seen.update({id(example): (length, means) for example, length in zip(row.examples, lengths)})
        return share_of(per_token, facts.sequences, config, self.part.num_tokens, self.part.num_sequences)

    def means(self) -> dict[str, float]:
        """Means over the tokens of the step."""
        assert self.part is not None
        sums: Counter[str] = Counter()
        for num_tokens, means in self.seen.values():
            share = num_tokens / self.part.num_tokens
            sums.update({name: share * value for name, value in means.items() if not name.startswith("gap/")})
        return dict(sums)

    def gap(self) -> tuple[float, float, float]:
        """How far trainer and sampler are apart, as a step sees it: before the first update the gap between engines.

        The largest, and this process's share of the mean and of the mean ratio.
        """
        assert self.part is not None
        pairs = self.seen.values()
        mean, ratio = (
            sum(num_tokens * means[name] for num_tokens, means in pairs) / self.part.num_tokens
            for name in ("gap/mean", "gap/ratio")
        )
        return max((means["gap/max"] for _, means in pairs), default=0.0), mean, ratio


class TokenFacts(NamedTuple):
    """What the loss of sampled tokens needs beside the policy's logprobs, [N] each: both kinds of logprobs of the
    sampler, advantages, the number of the sequence; and where they are known the logprobs of the reference and of the
    policy before the step's first update."""

    sampling: Tensor
    drawn: Tensor
    advantages: Tensor
    sequences: Tensor
    reference: Tensor | None = None
    old: Tensor | None = None

    @classmethod
    def of(cls, rollouts: Sequence[Trained]) -> TokenFacts:
        """Those of rollouts, one after the other."""
        tokens = [
            (trajectory.sampling_logprobs[place], trajectory.drawn_logprobs[place], rollout.advantage, number)
            for number, rollout in enumerate(rollouts)
            for trajectory in [rollout.trajectory]
            for place, is_sampled in enumerate(trajectory.is_sampled)
            if is_sampled
        ]
        sampling, drawn, advantages, sequences = map(torch.tensor, zip(*tokens))
        reference = _joined([one.reference_logprobs for one in rollouts])
        old = _joined([one.old_logprobs for one in rollouts])
        return cls(sampling, drawn, advantages, sequences, reference, old)

    def to(self, device: torch.device) -> TokenFacts:
        return TokenFacts(*(None if fact is None else fact.to(device) for fact in self))  # type: ignore[arg-type]


def token_loss(policy: Tensor, facts: TokenFacts, config: GRPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss per token from the policy's logprobs [N] -> [N], without the entropy, and means of what was seen."""
    is_corrected = config.correction != "none"
    old = facts.sampling
    if is_corrected:
        old = policy.detach() if facts.old is None else facts.old
    found = surrogate(policy, old, facts.advantages, facts.sequences, config)
    gap = policy.detach() - facts.sampling
    seen = {
        "clip/low": found.clipped_low.float().mean(),
        "clip/high": found.clipped_high.float().mean(),
        "kl/sampling": gap.abs().mean(),
        "gap/max": gap.abs().max(),
        "gap/mean": gap.abs().mean(),
        "gap/ratio": gap.exp().mean(),
    }
    per_token = found.loss
    if is_corrected:
        weights = importance_weights(old, facts.drawn, correction=config.correction, cap=config.importance_cap)
        seen |= {"importance/mean": weights.mean(), "importance/left_out": (weights == 0).float().mean()}
        per_token = per_token * weights
    if facts.reference is not None:
        kl = kl_estimate(policy, facts.reference, estimator=config.kl_estimator)
        seen["kl/reference"] = kl.detach().mean()
        per_token = per_token + config.beta * kl
    return per_token, seen


def share_of(per_token: Tensor, sequences: Tensor, config: GRPOConfig, num_tokens: int, num_sequences: int) -> Tensor:
    """What the tokens add to the loss of an optimizer step of so many tokens and sequences."""
    return aggregate(
        per_token,
        sequences,
        mode=config.loss_aggregation,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        max_tokens=config.max_new_tokens,
    )


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


def _joined(logprobs: Sequence[list[float] | None]) -> Tensor | None:
    """One after the other, [N]; None where they are not known."""
    known = [one for one in logprobs if one is not None]
    return torch.tensor([number for one in known for number in one]) if known else None
