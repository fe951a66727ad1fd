"""Stage 2: R-GRPO. Groups of rollouts with executed crops, rewards, group advantages, clipped policy update."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from looktwice.config import DataConfig, GRPOConfig, ModelConfig
from looktwice.custom_reward import load_reward
from looktwice.data.order import BatchOrder
from looktwice.data.sample import Sample
from looktwice.errors import TrainingError
from looktwice.metrics import LOG_FILE
from looktwice.model.exact import without_dropout
from looktwice.model.numerics import as_json
from looktwice.paths import write_result
from looktwice.processing.processor import Ovis2_5Processor, load_processor
from looktwice.report.rollout_page import write_rollout_page
from looktwice.rewards import RewardFunction
from looktwice.training.alarms import Watch, read_history
from looktwice.training.canaries import check_rollouts
from looktwice.training.checkpoints import Checkpoints
from looktwice.training.determinism import deterministic
from looktwice.training.folder import ROLLOUT_PAGES, TRAJECTORIES, checkpoint_of, claimed
from looktwice.training.learner import Learner, Reference
from looktwice.training.overview import show_overview
from looktwice.training.policy import carries_signal, improve
from looktwice.training.rollouts import Rollout, roll_out, tell_failures
from looktwice.training.run import batch_order, begin, close_step, is_due, open_recorder, planned, save_final
from looktwice.training.sets import LengthReport, fitted, load_sets
from looktwice.training.start import check_processes
from looktwice.training.stopping import stop_requests
from looktwice.training.telemetry import rollout_metrics
from looktwice.training.trajectories import drop_later, write_trajectories
from looktwice.training.validation import validate

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
        if dropped := without_dropout(learner.model):
            print(f"stage 2 goes on without the adapter's dropout of {dropped}: what is sampled has none")
        reference = learner.freeze_reference() if config.beta > 0 else None
        checkpoint = checkpoint_of(config)
        record = begin(learner, record, settings, order)
        history = read_history(checkpoint.parent / LOG_FILE, last=learner.step) if checkpoint else []
        drop_later(config.output_dir / TRAJECTORIES, learner.step)
        watch = Watch(config.alarms, config.stop_on_alarm, history)
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
                with learner.phases.of("data"):
                    prompts = fitted([samples[number] for number in order[learner.step]], processor, data, lengths)
                metrics: dict[str, float] = {}
                if prompts:
                    # once a run, also after a resume: three forwards of one rollout
                    more = partial(further, learner.step, order, samples, config, processor, data, lengths)
                    metrics = train_step(
                        learner,
                        prompts,
                        config,
                        pay,
                        reference,
                        more,
                        with_canaries=not is_checked,
                        folder=config.output_dir,
                    )
                    is_checked = True
                learner.step += 1
                metrics |= {"epoch": order.epoch(learner.step), "time/step_s": time.perf_counter() - started}
                if held_out and is_due(learner, eval_every):
                    with learner.phases.of("eval"):
                        metrics |= validate(learner, held_out, data, config, lengths)
                metrics |= lengths.metrics | learner.phases.take(is_sampled_here=not config.vllm_servers)
                alarms, told = watch.note(learner.step, metrics)
                close_step(learner, recorder, metrics | alarms, saves, stop, must_log=bool(told))
                for line in told:
                    print(line)
                heed_alarms(learner, watch, saves)
        lengths.show()
        return save_final(learner, record, stop, alarms=watch.on)


def heed_alarms(learner: Learner, watch: Watch, saves: Checkpoints) -> None:
    """Raise TrainingError where an alarm is on that is to end the run, with the step saved; after the last step there
    is nothing left to end."""
    reason = learner.world.from_main(lambda: watch.reason_to_stop)
    if reason is None or learner.step == learner.total_steps:
        return
    if learner.config.save_total_limit and not learner.world.from_main(saves.place.exists):
        saves.save()
    kept = (
        f"; {saves.place} is kept: --resume goes on, without --stop_on_alarm" if learner.config.save_total_limit else ""
    )
    raise TrainingError(f"step {learner.step}: stopped by alarm {reason}{kept}")


def train_step(
    learner: Learner,
    prompts: Sequence[Sample],
    config: GRPOConfig,
    pay: RewardFunction,
    reference: Reference | None,
    more: Callable[[int, int], list[Sample]],
    *,
    with_canaries: bool,
    folder: Path | None = None,
) -> dict[str, float]:
    """Rollouts of the prompts, their rewards, and the update on those that carry signal.

    With `refill_batches` groups without signal are replaced by those of `more` prompts. Into the run folder, where
    there is one, all are written as far as the settings ask for it.
    """
    with learner.images_kept():
        groups = roll_out(learner, prompts, config, pay)
        tell_failures(groups)
        metrics = rollout_metrics(groups)
        if with_canaries:
            episodes = [rollout.episode for group in groups for rollout in group]
            metrics |= check_rollouts(learner, episodes, temperature=config.temperature)
        refilled = refill(learner, groups, config, pay, more)
        update = improve(learner, [*groups, *refilled], config, reference)
        if config.refill_batches:
            dropped = sum(not carries_signal(group, config) for group in groups) / len(groups)
            update |= {"group/dropped": dropped, "group/refilled": float(len(refilled))}
        metrics |= update
    if folder:
        with learner.phases.of("saving"):
            write_rollouts(folder, learner, [*groups, *refilled], config)
    num_rollouts = sum(map(len, groups))
    for name, phase, tokens in (("sampled", "rollout", "num_tokens"), ("trained", "update", "trained_tokens")):
        if seconds := learner.phases.seconds.get(phase):
            metrics[f"perf/{name}_tokens_per_s"] = num_rollouts * metrics[f"rollout/{tokens}"] / seconds
    return metrics


def refill(
    learner: Learner,
    groups: Sequence[Sequence[Rollout]],
    config: GRPOConfig,
    pay: RewardFunction,
    more: Callable[[int, int], list[Sample]],
) -> list[list[Rollout]]:
    """Groups with signal of further prompts, as many as the step's own lack, or `refill_batches` found (DAPO, arXiv
    2503.14476)."""
    found: list[list[Rollout]] = []
    num_played = len(groups)
    num_wanted = sum(not carries_signal(group, config) for group in groups)
    for batch in range(config.refill_batches):
        if len(found) == num_wanted:
            break
        prompts = more(batch, num_wanted - len(found))
        others = roll_out(learner, prompts, config, pay, first=num_played)
        num_played += len(prompts)
        found += [group for group in others if carries_signal(group, config)]
    return found


def further(
    step: int,
    order: BatchOrder,
    samples: Sequence[Sample],
    config: GRPOConfig,
    processor: Ovis2_5Processor,
    data: DataConfig,
    lengths: LengthReport,
    batch: int,
    count: int,
) -> list[Sample]:
    """So many prompts of the batches with which a step is refilled: those of the order behind the end of the run, so
    that they too follow from seed and step."""
    place = order.total_steps + step * config.refill_batches + batch
    return fitted([samples[number] for number in order[place][:count]], processor, data, lengths)


def write_rollouts(folder: Path, learner: Learner, groups: Sequence[Sequence[Rollout]], config: GRPOConfig) -> None:
    """Leave the rollouts of the coming step in the run folder: for machines of each step, for people now and then."""
    step = learner.step + 1
    if config.keep_trajectories:
        keep = config.keep_trajectories
        write_trajectories(folder / TRAJECTORIES, step, groups, run_seed=config.seed, keep=keep)
    every = config.rollout_page_steps
    if every and (step in (1, learner.total_steps) or step % every == 0):
        write_rollout_page(folder / ROLLOUT_PAGES / f"step-{step}.html", step, groups)
