"""The rollouts of a step: groups of episodes of the present policy, what each was paid, and what their metrics say."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import fmean as mean
from uuid import uuid4

from looktwice.answers import Solution
from looktwice.config import GRPOConfig
from looktwice.data.examples import processor_for
from looktwice.data.sample import Sample
from looktwice.engine.builtin import BuiltinEngine
from looktwice.engine.sampling import Sampling, mixed_seed
from looktwice.errors import TrainingError, counted, one_line
from looktwice.metrics import METRICS
from looktwice.model.adapters import merged
from looktwice.rewards import Reward, RewardFunction
from looktwice.rollout.conversation import in_model_frame
from looktwice.rollout.episode import Episode, EpisodeRules, play, start_episodes
from looktwice.rollout.trajectory import Trajectory, gold_overlaps
from looktwice.training.learner import Learner

NO_ROOM = "longer than the memory of the cache; set --cache_tokens higher, or --max_new_tokens or --max_pixels lower"
RUN = uuid4().hex[:8]
"""Tells the weights that this process pushes to servers from those of another."""
SERVED_WEIGHTS = "served_weights"
"""Folder in that of the run from which vLLM servers read the policy."""


@dataclass(kw_only=True)
class Rollout:
    """One finished episode with its reward and its advantage within the group."""

    episode: Episode
    sample: Sample
    reward: Reward
    advantage: float = 0.0
    numerics: Mapping[str, str] = field(default_factory=dict)
    """What the bits of its logprobs depend on, under exact mode."""

    @property
    def trajectory(self) -> Trajectory:
        return self.episode.trajectory


def roll_out(
    learner: Learner, samples: Sequence[Sample], config: GRPOConfig, pay: RewardFunction
) -> list[list[Rollout]]:
    """Sample `num_generations` rollouts of each prompt with crops executed, and reward them."""
    rules = EpisodeRules(
        max_turns=config.max_turns,
        max_new_tokens=config.max_new_tokens,
        thinking=config.enable_thinking,
        thinking_budget=config.thinking_budget,
        max_turn_tokens=config.max_turn_tokens,
        max_visual_tokens=config.max_visual_tokens,
    )
    episodes = [
        start_episodes(
            in_model_frame(sample.prompt, sample.box_frame, learner.processor),
            processor_for(sample, learner.processor),
            rules,
            count=config.num_generations,
        )
        for sample in samples
    ]
    numerics = sample_episodes(learner, episodes, config)
    for sample, group in zip(samples, episodes):
        for episode in group:
            episode.example.where = sample.where
    played = [(episode.trajectory, sample.solution) for sample, group in zip(samples, episodes) for episode in group]
    rewards = iter(rewarded(played, pay))
    return [
        [Rollout(episode=episode, sample=sample, reward=next(rewards), numerics=numerics) for episode in group]
        for sample, group in zip(samples, episodes)
    ]


def sample_episodes(learner: Learner, groups: Sequence[Sequence[Episode]], config: GRPOConfig) -> Mapping[str, str]:
    """Play groups of sibling episodes with the present policy, here or on vLLM servers that get its weights first.

    Gives what the bits of the logprobs depended on, under exact mode.
    """
    sampling = Sampling(temperature=config.temperature, top_p=config.top_p, top_k=config.top_k)
    seeds = [mixed_seed(config.seed, learner.step, place) for place in range(len(groups))]
    if config.vllm_servers:
        from looktwice.engine.vllm import VllmEngine  # needs the extra

        servers = VllmEngine(config.vllm_servers, learner.processor.config, max_rollouts=config.rollout_batch_size)
        servers.push_weights(learner.model, config.output_dir / SERVED_WEIGHTS, version=f"{RUN}-{learner.step}")
        play(servers, groups, sampling, seeds)
        return {}
    # a merged weight has other bits than a layer and its adapter
    with learner.precision(), nullcontext() if config.exact else merged(learner.base):
        engine = BuiltinEngine(
            learner.base,
            max_rows=config.rollout_batch_size,
            cache_tokens=config.cache_tokens,
            encode=learner.encode_images,
        )
        play(engine, groups, sampling, seeds)
        return learner.numerics() if config.exact else {}


def rewarded(played: Sequence[tuple[Trajectory, Solution]], pay: RewardFunction) -> list[Reward]:
    """The rewards of finished rollouts with their gold answers; failed where the rollout did, by no fault of the
    policy."""
    failures = [failure_of(trajectory) for trajectory, _ in played]
    paid = iter(pay([pair for pair, failure in zip(played, failures) if not failure]))
    return [Reward(total=math.nan, error=failure) if failure else next(paid) for failure in failures]


def failure_of(trajectory: Trajectory) -> str | None:
    """What kept a rollout from being played to its end, if it was neither the policy nor a limit."""
    return {"error": trajectory.error, "no_room": NO_ROOM}.get(trajectory.stop_reason)


def tell_failures(groups: Sequence[Sequence[Rollout]]) -> None:
    """Say how many rollouts of a step failed, or their rewards, and why the first did. Raises TrainingError when all
    did."""
    rollouts = [rollout for group in groups for rollout in group]
    failures = [failure for rollout in rollouts if (failure := failure_of(rollout.trajectory))]
    errors = [error for rollout in rollouts if not failure_of(rollout.trajectory) and (error := rollout.reward.error)]
    told = [
        f"{counted(len(found), what)} of this step failed, the first by: {one_line(found[0])}"
        for what, found in (("rollout", failures), ("reward", errors))
        if found
    ]
    if len(failures) + len(errors) == len(rollouts):
        raise TrainingError(f"{'; '.join(told)}; nothing can be learnt from them")
    for line in told:
        print(line)


def rollout_metrics(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """Means over the rollouts of a step; reward parts over those whose reward did not fail."""
    rollouts = [rollout for group in groups for rollout in group]
    trajectories = [rollout.trajectory for rollout in rollouts]
    calls = [call for trajectory in trajectories for call in trajectory.calls]
    rewards = [rollout.reward for rollout in rollouts if rollout.reward.error is None]
    stops = Counter(trajectory.stop_reason for trajectory in trajectories)
    metrics = {
        "reward/failed": 1 - len(rewards) / len(rollouts),
        "rollout/num_turns": mean(trajectory.num_turns for trajectory in trajectories),
        "rollout/num_tokens": mean(sum(trajectory.is_sampled) for trajectory in trajectories),
        "tool/calls": len(calls) / len(rollouts),
    }
    metrics |= {f"rollout/stop/{reason}": count / len(rollouts) for reason, count in stops.items()}
    if rewards:
        metrics["reward/total"] = mean(reward.total for reward in rewards)
        for part in {part: None for reward in rewards for part in reward.parts}:
            name = f"reward/{part}" if f"reward/{part}" in METRICS else f"reward/own/{part}"
            metrics[name] = mean(reward.parts.get(part, 0.0) for reward in rewards)
    if calls:
        metrics["tool/valid_share"] = mean(call.is_valid for call in calls)
    overlaps = gold_overlaps(trajectories, [rollout.sample.gold_box for rollout in rollouts])
    if overlaps:
        metrics["tool/mean_iou"] = mean(overlaps)
    return metrics
