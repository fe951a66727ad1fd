"""Paying the rollouts of a run anew, and computing its loss anew, from what is written of them: no model is loaded.

Rewards come from the recorded text and calls; the loss from the recorded logprobs of the sampler, of the trainer in
each update, and of the reference. So rewards, advantages, clipping, aggregation, masks and beta may be others than in
the run. A rollout that the run left out of training has no logprobs of the trainer: those of the sampler stand in for
them, which is what they are at the first update, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean as mean

import torch

from looktwice.config import GRPOConfig
from looktwice.errors import ConfigError
from looktwice.metrics import LOG_FILE, read_log
from looktwice.report.tables import Table
from looktwice.rewarding.paying import load_rewards
from looktwice.rewards import Reward, RewardFunction
from looktwice.training.folder import CONFIG_FILE, TRAJECTORIES
from looktwice.training.policy import (
    TokenFacts,
    carries_signal,
    in_minibatches,
    share_of,
    token_loss,
    with_advantages,
)
from looktwice.training.rollouts import rewarded
from looktwice.training.trajectories import Recorded, read_trajectories, written_steps

ARROW = " → "


@dataclass(frozen=True, kw_only=True)
class ReplayedStep:
    """One step as it was and as it is under the settings of the replay.

    `rewards` are means of the total and of each term, over rollouts whose reward did not fail, as (was, is); None where
    there is none. `changed` is the share of rollouts whose accuracy is another one, `num_untrained` how many of those
    the loss is of had no logprobs of the trainer.
    """

    step: int
    num_rollouts: int
    rewards: Mapping[str, tuple[float | None, float | None]]
    changed: float
    loss: tuple[float | None, float]
    num_untrained: int
    had_entropy: bool
    """Whether the run's loss had an entropy term, which no replay has."""


def replayed(run: Path, config: GRPOConfig) -> Iterator[ReplayedStep]:
    """The steps of a run whose rollouts are in its folder, in order."""
    pay = load_rewards(config)
    steps = written_steps(run / TRAJECTORIES)
    losses = {int(line["step"]): line.get("loss") for line in read_log(run / LOG_FILE)}
    for step, path in steps.items():
        yield replay_step(step, read_trajectories(path), config, pay, loss=losses.get(step))


def replay_step(
    step: int, groups: list[list[Recorded]], config: GRPOConfig, pay: RewardFunction, *, loss: float | None
) -> ReplayedStep:
    """One step; `loss` is that of the run."""
    before = [one.reward for group in groups for one in group]
    played = [one.played for group in groups for one in group]
    after = rewarded(played, pay)
    each = iter(after)
    anew = [[replace(one, reward=next(each), advantage=0.0) for one in group] for group in groups]
    trained = with_advantages([group for group in anew if carries_signal(group, config)], config)
    accuracies = zip((one.accuracy for one in before), (one.accuracy for one in after))
    return ReplayedStep(
        step=step,
        num_rollouts=len(before),
        rewards=_means(before, after),
        changed=mean(was != now and not (math.isnan(was) and math.isnan(now)) for was, now in accuracies),
        loss=(loss, replayed_loss(in_minibatches(trained, config, step - 1), config)),
        num_untrained=sum(not one.trainer_logprobs for group in trained for one in group),
        had_entropy=config.entropy_coef > 0,
    )


def replayed_loss(parts: Sequence[Sequence[Recorded]], config: GRPOConfig) -> float:
    """The loss of minibatches of rollouts: the mean over the updates of the run, 0 where there is nothing to train on.

    Raises ConfigError where a KL term, or a correction by importance, needs logprobs that the run did not write.
    """
    trained = [one for part in parts for one in part]
    if not trained:
        return 0.0
    if config.beta and any(one.trainer_logprobs and one.reference_logprobs is None for one in trained):
        raise ConfigError(
            f"beta is {config.beta:g}, and the run had no reference policy, so none of its logprobs are written; "
            "replay with --beta 0"
        )
    has_several = any(len(one.trainer_logprobs) > 1 for one in trained) or len(parts) > 1
    were_trained = all(one.trainer_logprobs for one in trained)
    if config.correction != "none" and has_several and were_trained and not any(one.old_logprobs for one in trained):
        raise ConfigError(
            f"importance_correction is {config.correction}, and the run had none, so the logprobs before its first "
            "update are not written; replay with --importance_correction none"
        )
    num_passes = max(1, *(len(one.trainer_logprobs) for one in trained))
    return mean(_loss_of_update(part, number, config) for number in range(num_passes) for part in parts)


def _loss_of_update(trained: Sequence[Recorded], number: int, config: GRPOConfig) -> float:
    own = [one.trajectory.of_sampled(one.trajectory.sampling_logprobs) for one in trained]
    has_old = any(one.old_logprobs for one in trained)
    policy = [one.trainer_logprobs[number] if one.trainer_logprobs else logprobs for one, logprobs in zip(trained, own)]
    known = [
        replace(
            one,
            # what was not trained counts as no way from the start
            reference_logprobs=(one.reference_logprobs or logprobs) if config.beta else None,
            old_logprobs=(one.old_logprobs or logprobs) if has_old else None,
        )
        for one, logprobs in zip(trained, policy)
    ]
    facts = TokenFacts.of(known)
    per_token, _ = token_loss(_joined(policy), facts, config)
    return float(share_of(per_token, facts.sequences, config, len(per_token), len(trained)))


def _joined(logprobs: Sequence[Sequence[float]]) -> torch.Tensor:
    return torch.tensor([number for one in logprobs for number in one])


def _means(before: Sequence[Reward], after: Sequence[Reward]) -> dict[str, tuple[float | None, float | None]]:
    """Means of the total and of each term, before and after."""
    names = dict.fromkeys(name for reward in (*before, *after) for name in reward.parts)
    return {
        "total": (_mean(before, None), _mean(after, None)),
        **{name: (_mean(before, name), _mean(after, name)) for name in names},
    }


def _mean(rewards: Sequence[Reward], name: str | None) -> float | None:
    """Mean of a term, or of the total; None where no reward has it."""
    valid = [reward for reward in rewards if reward.error is None]
    if not valid or (name is not None and not any(name in reward.parts for reward in valid)):
        return None
    return mean(reward.total if name is None else reward.parts.get(name, 0.0) for reward in valid)


def replay_table(steps: Sequence[ReplayedStep]) -> Table:
    """The steps as rows; a cell with an arrow is what was and what is."""
    names = dict.fromkeys(name for step in steps for name in step.rewards)
    rows = [
        (
            f"{step.step}",
            f"{step.num_rollouts}",
            *(_cell(*step.rewards.get(name, (None, None))) for name in names),
            f"{100 * step.changed:.1f} %",
            _cell(*step.loss, digits=6),
        )
        for step in steps
    ]
    untrained = sum(step.num_untrained for step in steps)
    notes = [f"{untrained} rollouts were not trained on in the run; their ratio counts as 1"] if untrained else []
    if any(step.had_entropy for step in steps):
        notes.append("the loss that is leaves out the entropy, of which nothing is written")
    header = ("step", "rollouts", *names, "accuracy changed", "loss")
    return Table(
        title="Replay: what was, and what is where that differs", header=header, rows=tuple(rows), note="; ".join(notes)
    )


def _cell(was: float | None, now: float | None, digits: int = 3) -> str:
    texts = ["-" if value is None else f"{value:.{digits}f}" for value in (was, now)]
    # sums in another order are no change
    is_same = was is not None and now is not None and math.isclose(was, now, rel_tol=1e-5, abs_tol=1e-6)
    return texts[0] if is_same or texts[0] == texts[1] else ARROW.join(texts)


def run_of(path: Path) -> Path:
    """The run folder of a path to it or to its trajectories. Raises ConfigError when there are none."""
    run = path.parent if path.name == TRAJECTORIES else path
    if not written_steps(run / TRAJECTORIES):
        raise ConfigError(f"{path}: no {TRAJECTORIES}/step-N.jsonl.zst in it; name the run folder of stage 2")
    if not (run / CONFIG_FILE).is_file():
        raise ConfigError(f"{run / CONFIG_FILE}: not there, and it says how the run was paid; put it back")
    return run


def replay_config(run: Path, given: GRPOConfig) -> GRPOConfig:
    """The settings of a run, with those that were given in their place."""
    own = {name: getattr(given, name) for name in given.model_fields_set}
    recorded = {name: value for name, value in GRPOConfig.read(run / CONFIG_FILE).items() if value is not None}
    return GRPOConfig(**{**recorded, **own})
