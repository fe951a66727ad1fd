"""The rollouts of a step: groups of episodes of the present policy, and what each was paid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from uuid import uuid4

from looktwice.answers import Solution
from looktwice.config import GRPOConfig
from looktwice.data.examples import processor_for
from looktwice.data.sample import Sample
from looktwice.engine.builtin import BuiltinEngine
from looktwice.engine.sampling import Sampling, mixed_seed
from looktwice.errors import TrainingError, counted, one_line
from looktwice.model.adapters import merged
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.rewards import Reward, RewardFunction
from looktwice.rollout.conversation import in_model_frame
from looktwice.rollout.episode import Episode, EpisodeRules, Look, play, start_episodes
from looktwice.rollout.trajectory import Trajectory
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
    trainer_logprobs: list[list[float]] = field(default_factory=list)
    """Those of its sampled ids in each update that it was trained in."""
    reference_logprobs: list[float] | None = None
    old_logprobs: list[float] | None = None
    """Those of the policy before the step's first update, where more than one corrects by importance."""

    @property
    def trajectory(self) -> Trajectory:
        return self.episode.trajectory


def roll_out(
    learner: Learner, samples: Sequence[Sample], config: GRPOConfig, pay: RewardFunction, *, first: int = 0
) -> list[list[Rollout]]:
    """Sample `num_generations` rollouts of each prompt with crops executed, and reward them.

    `first` is the place of the first prompt among all of the step, which with seed and step decides what is drawn.
    """
    episodes = begin_episodes(learner.processor, samples, config)
    with learner.phases.of("rollout"):
        numerics = sample_episodes(learner, episodes, config, first=first)
    played = [(episode.trajectory, sample.solution) for sample, group in zip(samples, episodes) for episode in group]
    with learner.phases.of("reward"):
        rewards = iter(rewarded(played, pay))
    return [
        [Rollout(episode=episode, sample=sample, reward=next(rewards), numerics=numerics) for episode in group]
        for sample, group in zip(samples, episodes)
    ]


def begin_episodes(
    processor: Ovis2_5Processor, samples: Sequence[Sample], config: GRPOConfig, look: Look | None = None
) -> list[list[Episode]]:
    """The `num_generations` sibling episodes of each prompt; `look` replaces the crop tool."""
    rules = EpisodeRules(
        max_turns=config.max_turns,
        max_new_tokens=config.max_new_tokens,
        thinking=config.enable_thinking,
        thinking_budget=config.thinking_budget,
        max_turn_tokens=config.max_turn_tokens,
        max_visual_tokens=config.max_visual_tokens,
    )
    groups = []
    for sample in samples:
        prompt = in_model_frame(sample.prompt, sample.box_frame, processor)
        own = processor_for(sample, processor)
        groups.append(start_episodes(prompt, own, rules, count=config.num_generations, look=look))
        for episode in groups[-1]:
            episode.example.where = sample.where
    return groups


def sample_episodes(
    learner: Learner, groups: Sequence[Sequence[Episode]], config: GRPOConfig, *, first: int = 0
) -> Mapping[str, str]:
    """Play groups of sibling episodes with the present policy, here or on vLLM servers that get its weights first.

    Gives what the bits of the logprobs depended on, under exact mode.
    """
    sampling = Sampling(temperature=config.temperature, top_p=config.top_p, top_k=config.top_k)
    seeds = [mixed_seed(config.seed, learner.step, first + place) for place in range(len(groups))]
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
