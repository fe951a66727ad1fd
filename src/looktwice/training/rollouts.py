"""The rollouts of a step: groups of episodes of the present policy, and what each was paid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from looktwice.config import GRPOConfig
from looktwice.data.examples import processor_for
from looktwice.data.sample import Sample
from looktwice.engine.sampling import mixed_seed
from looktwice.errors import TrainingError, counted, one_line
from looktwice.model.vision_cache import VisionCache
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.rewards import Played, Reward, RewardFunction
from looktwice.rollout.conversation import in_model_frame
from looktwice.rollout.episode import Episode, EpisodeRules, Look, start_episodes
from looktwice.rollout.trajectory import Trajectory
from looktwice.training.distributed import World
from looktwice.training.learner import Learner
from looktwice.training.phases import Phases
from looktwice.training.sampler import Sampler
from looktwice.training.shares import costs_of

NO_ROOM = "longer than the memory of the cache; set --cache_tokens higher, or --max_new_tokens or --max_pixels lower"


@dataclass(kw_only=True)
class Rollout:
    """One finished rollout with its reward and its advantage within the group."""

    example: Example
    trajectory: Trajectory
    sample: Sample
    reward: Reward
    advantage: float = 0.0
    seed: int
    """With which its group was drawn."""
    numerics: Mapping[str, str] = field(default_factory=dict)
    """What the bits of its logprobs depend on, under exact mode."""
    version: int = 0
    """The optimizer steps, counted as those of the run, that the weights had which sampled it."""
    trainer_logprobs: list[list[float]] = field(default_factory=list)
    """Those of its sampled ids in each update that it was trained in."""
    reference_logprobs: list[float] | None = None
    old_logprobs: list[float] | None = None
    """Those of the policy before the step's first update, where more than one corrects by importance."""
    is_own: bool = True
    """Whether this process made it. Another one's has an example without ids."""


class MadeAhead(NamedTuple):
    """For which step rollouts are made, counted from 0, what keeps their pictures, and where their time is counted."""

    step: int
    images: VisionCache | None
    phases: Phases


def roll_out(
    learner: Learner,
    samples: Sequence[Sample],
    config: GRPOConfig,
    pay: RewardFunction,
    sampler: Sampler,
    *,
    first: int = 0,
) -> list[list[Rollout]]:
    """Sample `num_generations` rollouts of each prompt with crops executed, and reward them; groups in order.

    `first` is the place of the first prompt among all of the step, which with seed and step decides what is drawn. Of
    several processes each takes whole groups, and all of them call this at the same time, with the same samples.
    They all get all rollouts, of another process's what a `SentRollout` holds.
    """
    places = own_places(learner, samples, config)
    with learner.world.whole_model(learner.model):
        sampler.take_weights(learner.step)
        own = make_rollouts(learner, samples, places, config, pay, sampler, first=first)
    return of_all(learner, samples, places, own)


def own_places(learner: Learner, samples: Sequence[Sample], config: GRPOConfig) -> list[int]:
    """Places of the prompts whose groups fall to this process: of each prompt the ids of its rollouts count, which are
    not known yet, and its own."""
    if learner.world.size == 1:
        return [*range(len(samples))]
    rollouts = config.num_generations * config.max_new_tokens
    return learner.world.share([rollouts + length for length in costs_of(samples, learner.processor)])


def make_rollouts(
    learner: Learner,
    samples: Sequence[Sample],
    places: Sequence[int],
    config: GRPOConfig,
    pay: RewardFunction,
    sampler: Sampler,
    ahead: MadeAhead | None = None,
    *,
    first: int = 0,
) -> list[list[Rollout]]:
    """The groups of the prompts at these places, sampled and rewarded without the other processes: for this step, or
    `ahead` for another."""
    step, images, phases = ahead or MadeAhead(learner.step, learner.vision_cache, learner.phases)
    own = [samples[place] for place in places]
    with phases.during("data"):
        episodes = begin_episodes(learner.processor, own, config)
    seeds = seeds_of(config, step, [first + place for place in places])
    with phases.during("rollout"):
        numerics = sampler.play(episodes, config, seeds, images)
    played = [
        played_of(episode.trajectory, sample, place)
        for place, sample, group in zip(places, own, episodes)
        for episode in group
    ]
    with phases.during("reward"):
        rewards = iter(rewarded(played, pay))
    version = step - 1 if ahead else step
    return [
        [
            Rollout(
                example=episode.example,
                trajectory=episode.trajectory,
                sample=sample,
                reward=next(rewards),
                seed=seed,
                numerics=numerics,
                version=version,
            )
            for episode in group
        ]
        for sample, seed, group in zip(own, seeds, episodes)
    ]


def seeds_of(config: GRPOConfig, step: int, places: Sequence[int]) -> list[int]:
    """The seeds of groups: the step, counted from 0, and the place of a prompt among all of it decide the random
    numbers of its rollouts."""
    return [mixed_seed(config.seed, step, place) for place in places]


def of_all(
    learner: Learner, samples: Sequence[Sample], places: Sequence[int], own: list[list[Rollout]]
) -> list[list[Rollout]]:
    """The groups of all processes in the order of their prompts; `own` are those of this one, at these places."""
    if learner.world.size == 1:
        return own
    sent = [[SentRollout.of(rollout) for rollout in group] for group in own]
    groups = dict(zip(places, own))
    for place, group in learner.world.gather([*zip(places, sent)]):
        groups.setdefault(place, [one.rollout(samples[place]) for one in group])
    return [groups[place] for place in range(len(samples))]


def know_of_all(world: World, groups: Sequence[Sequence[Rollout]]) -> None:
    """Tell rank 0 the logprobs that the other processes' updates computed of their rollouts."""
    if world.size == 1:
        return
    rollouts = [rollout for group in groups for rollout in group]
    names = ("trainer_logprobs", "reference_logprobs", "old_logprobs")
    own = [
        (place, {name: getattr(rollout, name) for name in names})
        for place, rollout in enumerate(rollouts)
        if rollout.is_own
    ]
    for place, known in world.gather(own):
        for name, logprobs in known.items():
            setattr(rollouts[place], name, logprobs)


class SentRollout(NamedTuple):
    """What another process is told of a rollout: nothing to sample or train with."""

    trajectory: Trajectory
    reward: Reward
    seed: int
    version: int

    @classmethod
    def of(cls, rollout: Rollout) -> SentRollout:
        return cls(rollout.trajectory, rollout.reward, rollout.seed, rollout.version)

    def rollout(self, sample: Sample) -> Rollout:
        return Rollout(example=Example(), sample=sample, is_own=False, **self._asdict())


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


def played_of(trajectory: Trajectory, sample: Sample, group: int) -> Played:
    """What a reward sees of a finished rollout."""
    return Played(
        trajectory=trajectory,
        solution=sample.solution,
        question=sample.question,
        gold_boxes=sample.gold_boxes,
        group=group,
        source=f"{sample.where} {sample.field}",
    )


def rewarded(played: Sequence[Played], pay: RewardFunction) -> list[Reward]:
    """The rewards of finished rollouts; failed where the rollout did, by no fault of the policy."""
    failures = [failure_of(one.trajectory) for one in played]
    paid = iter(pay([one for one, failure in zip(played, failures) if not failure]))
    return [Reward(total=math.nan, error=failure) if failure else next(paid) for failure in failures]


def failure_of(trajectory: Trajectory) -> str | None:
    """What kept a rollout from being played to its end, if it was neither the policy nor a limit."""
    return {"error": trajectory.error, "no_room": NO_ROOM}.get(trajectory.stop_reason)


def tell_failures(groups: Sequence[Sequence[Rollout]], *, may_stop: bool = True) -> None:
    """Say how many rollouts of a step failed, or their rewards, and why the first did. Raises TrainingError when all
    did, if it `may_stop` the run."""
    rollouts = [rollout for group in groups for rollout in group]
    failures = [failure for rollout in rollouts if (failure := failure_of(rollout.trajectory))]
    errors = [error for rollout in rollouts if not failure_of(rollout.trajectory) and (error := rollout.reward.error)]
    told = [
        f"{counted(len(found), what)} of this step failed, the first by: {one_line(found[0])}"
        for what, found in (("rollout", failures), ("reward", errors))
        if found
    ]
    if may_stop and len(failures) + len(errors) == len(rollouts):
        raise TrainingError(f"{'; '.join(told)}; nothing can be learnt from them")
    for line in told:
        print(line)
