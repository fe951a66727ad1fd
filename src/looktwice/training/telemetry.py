"""What the rollouts of a step say of the policy: how it crops, stops and answers, and what it was paid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean as mean

from looktwice.answers import answers_right
from looktwice.rewards import ROBUST
from looktwice.rollout.trajectory import gold_overlaps
from looktwice.training.losses import MIN_REWARD_SPREAD
from looktwice.training.rollouts import Rollout

WHOLE_IMAGE = 0.9
"""A crop of at least this share of its picture shows the whole of it once more."""


def rollout_metrics(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """Metrics of the rollouts of a step, of which each names in METRICS what it is a mean or a share of."""
    rollouts = [rollout for group in groups for rollout in group]
    return {
        **_rewards(rollouts),
        **_groups(groups),
        **_lengths_and_ends(rollouts),
        **_crops(rollouts),
        **_right_answers(rollouts),
    }


def token_rates(
    groups: Sequence[Sequence[Rollout]], trained_tokens: float, seconds: Mapping[str, float]
) -> dict[str, float]:
    """Tokens a second of sampling and of the updates. `trained_tokens` are the mean of all these rollouts, `seconds`
    those of the phases."""
    rollouts = [rollout for group in groups for rollout in group]
    counts = {
        "sampled": ("rollout", sum(rollout.trajectory.num_sampled for rollout in rollouts)),
        "trained": ("update", trained_tokens * len(rollouts)),
    }
    return {
        f"perf/{name}_tokens_per_s": count / seconds[phase]
        for name, (phase, count) in counts.items()
        if seconds.get(phase)
    }


def _rewards(rollouts: Sequence[Rollout]) -> dict[str, float]:
    rewards = [rollout.reward for rollout in rollouts if rollout.reward.error is None]
    metrics = {"reward/failed": 1 - len(rewards) / len(rollouts)}
    if rewards:
        metrics["reward/total"] = mean(reward.total for reward in rewards)
    for part in {part: None for reward in rewards for part in reward.parts}:
        name = f"reward/{part}" if part in ROBUST.largest else f"reward/own/{part}"
        metrics[name] = mean(reward.parts.get(part, 0.0) for reward in rewards)
    return metrics


def _groups(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """How many groups there are, and the shares of those without an accuracy signal, by why they have none."""
    alike: Counter[str] = Counter()
    for group in groups:
        accuracies = [rollout.reward.accuracy for rollout in group if rollout.reward.error is None]
        if len(accuracies) > 1 and max(accuracies) - min(accuracies) <= MIN_REWARD_SPREAD:
            alike["right" if accuracies[0] > 0 else "wrong"] += 1
    return {
        "group/number": float(len(groups)),
        "group/all_right": alike["right"] / len(groups),
        "group/all_wrong": alike["wrong"] / len(groups),
    }


def _lengths_and_ends(rollouts: Sequence[Rollout]) -> dict[str, float]:
    trajectories = [rollout.trajectory for rollout in rollouts]
    stops = Counter(trajectory.stop_reason for trajectory in trajectories)
    return {
        "rollout/num_turns": mean(trajectory.num_turns for trajectory in trajectories),
        "rollout/num_tokens": mean(trajectory.num_sampled for trajectory in trajectories),
        "rollout/visual_tokens": mean(trajectory.num_visual_tokens for trajectory in trajectories),
        "rollout/truncated": mean(trajectory.is_truncated for trajectory in trajectories),
        **{f"rollout/stop/{reason}": count / len(rollouts) for reason, count in stops.items()},
    }


def _crops(rollouts: Sequence[Rollout]) -> dict[str, float]:
    trajectories = [rollout.trajectory for rollout in rollouts]
    calls = [call for trajectory in trajectories for call in trajectory.calls]
    metrics = {
        "tool/calls": len(calls) / len(rollouts),
        "tool/crop_share": mean(trajectory.has_crop for trajectory in trajectories),
    }
    if calls:
        metrics["tool/valid_share"] = mean(call.is_valid for call in calls)
        refused = Counter(call.error for call in calls if call.error)
        metrics |= {f"tool/refused/{reason}": count / len(calls) for reason, count in refused.items()}
    areas = [one.share_of_image(call) for one in trajectories for call in one.calls if call.box is not None]
    if areas:
        metrics["tool/area_share"] = mean(areas)
        metrics["tool/whole_share"] = mean(area >= WHOLE_IMAGE for area in areas)
    overlaps = gold_overlaps(trajectories, [rollout.sample.gold_boxes for rollout in rollouts])
    if overlaps:
        metrics["tool/mean_iou"] = mean(overlaps)
    return metrics


def _right_answers(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """How many answers are right by the rules: of all, with and without a crop; and how long and how well paid the
    right and the wrong ones are."""
    rights = [answers_right(rollout.trajectory.text, rollout.sample.solution) for rollout in rollouts]
    metrics = {"rollout/right": mean(rights)}
    for name, wanted in (("with_crop", True), ("without_crop", False)):
        chosen = [right for right, one in zip(rights, rollouts) if one.trajectory.has_crop == wanted]
        if chosen:
            metrics[f"rollout/right_{name}"] = mean(chosen)
    for name, wanted in (("right", True), ("wrong", False)):
        chosen_rollouts = [one for right, one in zip(rights, rollouts) if right == wanted]
        if chosen_rollouts:
            metrics[f"rollout/num_tokens_{name}"] = mean(one.trajectory.num_sampled for one in chosen_rollouts)
        if totals := [one.reward.total for one in chosen_rollouts if one.reward.error is None]:
            metrics[f"reward/total_{name}"] = mean(totals)
    return metrics
