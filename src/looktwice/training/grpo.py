"""Stage 2: R-GRPO. Groups of rollouts with executed crops, rewards, group advantages, clipped policy update."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean as mean
from uuid import uuid4

import torch
from torch import Tensor

from looktwice.answers import Solution
from looktwice.config import DataConfig, GRPOConfig, ModelConfig
from looktwice.custom_reward import load_reward
from looktwice.data.examples import processor_for
from looktwice.data.lengths import fit_lengths
from looktwice.data.problems import View, refuse
from looktwice.data.sample import Sample
from looktwice.engine.builtin import BuiltinEngine
from looktwice.engine.sampling import Sampling, mixed_seed
from looktwice.errors import TrainingError, counted, one_line
from looktwice.metrics import METRICS
from looktwice.model.adapters import merged
from looktwice.model.numerics import as_json, check_same_numerics
from looktwice.paths import write_result
from looktwice.processing.packing import PackedBatch
from looktwice.processing.processor import Ovis2_5Processor, load_processor
from looktwice.rewards import PresetReward, Reward, RewardFunction
from looktwice.rollout.conversation import in_model_frame
from looktwice.rollout.episode import Episode, EpisodeRules, play, start_episodes
from looktwice.rollout.trajectory import Trajectory, gold_overlaps
from looktwice.training.canaries import check_rollouts
from looktwice.training.checkpoints import Checkpoints
from looktwice.training.determinism import deterministic
from looktwice.training.folder import claimed
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
from looktwice.training.overview import show_overview
from looktwice.training.run import batch_order, begin, close_step, is_due, open_recorder, planned, save_final
from looktwice.training.sets import LengthReport, load_sets
from looktwice.training.start import check_processes
from looktwice.training.stopping import stop_requests

SHOWN = ("eval/accuracy", "reward/accuracy", "reward/total", "tool/valid_share", "group/dropped", "time/step_s")
NO_ROOM = "longer than the memory of the cache; set --cache_tokens higher, or --max_new_tokens or --max_pixels lower"
NUMERICS = "numerics.json"
"""Of an exact run: what the bits of its first logprobs depend on, and the digest of it."""
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


def train_grpo(model: ModelConfig, data: DataConfig, config: GRPOConfig) -> Path:
    """Run R-GRPO from the SFT checkpoint and give back the folder of the final model."""
    check_processes(model, config)
    start = str(config.sft_checkpoint_path)
    processor = load_processor(start, data)
    samples, held_out, refits, sizes = load_sets(data, processor, "grpo")
    pay = load_reward(config.reward, seconds=config.reward_seconds, retries=config.reward_retries)
    order = batch_order(sizes, config, data.train_weights)
    settings = (model, data, config)
    if config.vllm_servers:  # one that cannot be used is told before the model is loaded
        from looktwice.engine.vllm import VllmEngine

        VllmEngine(config.vllm_servers, processor.config)
    with claimed(config.output_dir), stop_requests() as stop, deterministic(config.deterministic):
        record = planned("grpo", settings, order, start)
        learner = Learner.load(start, model, config, processor, total_steps=order.total_steps, is_exact=config.exact)
        reference = learner.freeze_reference() if config.beta > 0 else None
        record = begin(learner, record, settings, order)
        if config.exact:
            write_result(config.output_dir / NUMERICS, as_json(learner.numerics()))
        lengths = LengthReport(config)
        lengths.note(refits)
        lengths.show()
        with open_recorder(learner, record, settings, sizes, shown=SHOWN, title="R-GRPO") as recorder:
            saves = Checkpoints(learner, record, order)
            show_overview(recorder.console, learner, order, model)
            is_checked = False
            eval_every = config.eval_steps or order.steps_per_epoch
            stop.arm()
            while learner.step < order.total_steps:
                started = time.perf_counter()
                prompts = fitted([samples[number] for number in order[learner.step]], processor, data, lengths)
                metrics: dict[str, float] = {}
                if prompts:
                    # once a run, also after a resume: three forwards of one rollout
                    metrics = train_step(learner, prompts, config, pay, reference, with_canaries=not is_checked)
                    is_checked = True
                learner.step += 1
                metrics |= {"epoch": order.epoch(learner.step), "time/step_s": time.perf_counter() - started}
                if held_out and is_due(learner, eval_every):
                    metrics["eval/accuracy"] = evaluation_accuracy(learner, held_out, data, config, lengths)
                metrics |= lengths.metrics
                close_step(learner, recorder, metrics, saves, stop)
        lengths.show()
        return save_final(learner, record, stop)


def train_step(
    learner: Learner,
    prompts: Sequence[Sample],
    config: GRPOConfig,
    pay: RewardFunction,
    reference: Reference | None,
    *,
    with_canaries: bool,
) -> dict[str, float]:
    """Rollouts of the prompts, their rewards, and the update on those that carry signal."""
    started = time.perf_counter()
    with learner.images_kept():
        groups = roll_out(learner, prompts, config, pay)
        tell_failures(groups)
        metrics = rollout_metrics(groups) | {"time/rollout_s": time.perf_counter() - started}
        if with_canaries:
            episodes = [rollout.episode for group in groups for rollout in group]
            metrics |= check_rollouts(learner, episodes, temperature=config.temperature)
        metrics |= improve(learner, groups, config, reference)
    return metrics | {"time/update_s": time.perf_counter() - started - metrics["time/rollout_s"]}


def fitted(
    samples: Sequence[Sample], processor: Ovis2_5Processor, data: DataConfig, lengths: LengthReport
) -> list[Sample]:
    """Samples that can be rolled out, with prompts of at most `max_length` tokens.

    Checked again at every step, because samples of a large set were not seen at the start.
    Raises DataError as `refuse` and `fit_lengths` do.
    """
    refuse(samples, "the data", stage="grpo", view=View.of(processor))
    prompts, refits = fit_lengths(
        samples, processor, max_length=data.max_length, length_policy=data.length_policy, purpose="prompt"
    )
    lengths.note(refits)
    return prompts


def evaluation_accuracy(
    learner: Learner, samples: Sequence[Sample], data: DataConfig, config: GRPOConfig, lengths: LengthReport
) -> float:
    """Share of right greedy answers, judged by the rules of the `robust` reward."""
    greedy = config.model_copy(update={"num_generations": 1, "temperature": 0.0})
    size = config.rollout_batch_size
    groups = [
        group
        for first in range(0, len(samples), size)
        for group in roll_out(
            learner, fitted(samples[first : first + size], learner.processor, data, lengths), greedy, PresetReward()
        )
    ]
    rewards = [rollout.reward for group in groups for rollout in group]
    # one that failed, such as by an error of the crop tool, is no right answer
    return mean(0.0 if reward.error else reward.accuracy for reward in rewards)


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


def improve(
    learner: Learner, groups: Sequence[Sequence[Rollout]], config: GRPOConfig, reference: Reference | None
) -> dict[str, float]:
    """Give every rollout its advantage, and update the policy on those that carry signal."""
    kept = [group for group in groups if carries_signal(group, config)]
    metrics = {"group/dropped": 1 - len(kept) / len(groups)}
    if not kept:
        return metrics | {"loss": 0.0}
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
        with torch.no_grad(), reference.active():
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
