"""Stage 2: R-GRPO. Groups of rollouts with executed crops, rewards, group advantages, clipped policy update."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean as mean

from looktwice.config import DataConfig, GRPOConfig, ModelConfig
from looktwice.custom_reward import load_reward
from looktwice.data.lengths import fit_lengths
from looktwice.data.problems import View, refuse
from looktwice.data.sample import Sample
from looktwice.model.numerics import as_json
from looktwice.paths import write_result
from looktwice.processing.processor import Ovis2_5Processor, load_processor
from looktwice.rewards import PresetReward, RewardFunction
from looktwice.training.canaries import check_rollouts
from looktwice.training.checkpoints import Checkpoints
from looktwice.training.determinism import deterministic
from looktwice.training.folder import claimed
from looktwice.training.learner import Learner, Reference
from looktwice.training.overview import show_overview
from looktwice.training.policy import improve
from looktwice.training.rollouts import roll_out, rollout_metrics, tell_failures
from looktwice.training.run import batch_order, begin, close_step, is_due, open_recorder, planned, save_final
from looktwice.training.sets import LengthReport, load_sets
from looktwice.training.start import check_processes
from looktwice.training.stopping import stop_requests

SHOWN = ("eval/accuracy", "reward/accuracy", "reward/total", "tool/valid_share", "group/dropped", "time/step_s")
NUMERICS = "numerics.json"
"""Of an exact run: what the bits of its first logprobs depend on, and the digest of it."""


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
