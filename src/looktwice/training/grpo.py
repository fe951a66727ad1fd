"""Stage 2: R-GRPO. Groups of rollouts with executed crops, rewards, group advantages, clipped policy update."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from looktwice.config import DataConfig, GRPOConfig, ModelConfig
from looktwice.data.order import BatchOrder
from looktwice.data.sample import Sample
from looktwice.errors import TrainingError
from looktwice.metrics import LOG_FILE, read_log
from looktwice.model.exact import without_dropout
from looktwice.model.numerics import as_json
from looktwice.paths import write_result
from looktwice.processing.processor import Ovis2_5Processor, load_processor
from looktwice.report.rollout_page import write_rollout_page
from looktwice.rewarding.paying import load_rewards
from looktwice.rewards import RewardFunction
from looktwice.training.ahead import Ahead
from looktwice.training.alarms import Watch
from looktwice.training.canaries import check_rollouts
from looktwice.training.checkpoints import Checkpoints
from looktwice.training.distributed import World
from looktwice.training.folder import ROLLOUT_PAGES, TRAJECTORIES, checkpoint_of
from looktwice.training.join import joined
from looktwice.training.learner import Learner, Reference
from looktwice.training.policy import carries_signal, improve
from looktwice.training.rollouts import Rollout, know_of_all, roll_out, tell_failures
from looktwice.training.run import (
    batch_order,
    begin,
    close_step,
    held,
    is_due,
    load_alike,
    planned,
    recorded,
    save_final,
    tell_finished,
)
from looktwice.training.sampler import Sampler
from looktwice.training.sets import LengthReport, Prompts, begin_report, load_sets
from looktwice.training.telemetry import rollout_metrics, token_rates
from looktwice.training.trajectories import drop_later, write_trajectories
from looktwice.training.validation import validate

SHOWN = ("eval/accuracy", "reward/accuracy", "reward/total", "tool/valid_share", "group/dropped", "time/step_s")
NUMERICS = "numerics.json"
"""Of an exact run: what the bits of its first logprobs depend on, and the digest of it."""


def train_grpo(model: ModelConfig, data: DataConfig, config: GRPOConfig) -> Path:
    """Run R-GRPO from the SFT checkpoint and give back the folder of the final model.

    Under torchrun every process calls this, and rank 0 alone writes and shows.
    """
    with joined(model, config) as world:
        return train_in(world, model, data, config)


def train_in(world: World, model: ModelConfig, data: DataConfig, config: GRPOConfig) -> Path:
    """`train_grpo` as one of the processes of a world."""
    start = str(config.sft_checkpoint_path)
    processor = load_processor(start, data)
    samples, held_out, refits, sizes = load_sets(data, processor, "grpo")
    pay = load_rewards(config)
    order = batch_order(sizes, config, data.train_weights)
    settings = (model, data, config)
    check_servers(config, processor)
    with held(world, config) as stop:
        record = world.from_main(lambda: planned("grpo", settings, order, start))
        if record.is_over:
            return tell_finished(record, settings)
        learner = load_alike(start, settings, processor, order, world, is_exact=config.exact)
        if dropped := without_dropout(learner.model):
            print(f"stage 2 goes on without the adapter's dropout of {dropped}: what is sampled has none")
        reference = learner.freeze_reference() if config.beta > 0 else None
        checkpoint = checkpoint_of(config)
        record = begin(learner, record, settings, order)
        watch = begin_watch(learner, config, checkpoint)
        lengths = begin_report(config, world, refits)
        with (
            recorded(learner, record, settings, order, sizes, shown=SHOWN, title="R-GRPO") as recorder,
            closing(Sampler(learner, config, is_apart=config.one_step_off)) as sampler,
        ):
            saves = Checkpoints(learner, record, order)
            asked = Prompts(samples, order, processor, data, lengths)
            ahead = Ahead(learner, config, pay, sampler) if config.one_step_off else None
            stage = Stage2(learner, config, pay, reference, asked, sampler, ahead)
            eval_every = config.eval_steps or order.steps_per_epoch
            stop.arm()
            while learner.step < order.total_steps:
                metrics = train_step(stage, order, saves)
                if held_out and is_due(learner, eval_every):
                    metrics |= stage.validate(held_out, data, lengths)
                lengths.collect()
                metrics |= lengths.metrics | learner.phases.take(is_sampled_here=not config.vllm_servers)
                alarms, told = watch.note(learner.step, metrics)
                is_saved = close_step(learner, recorder, metrics | alarms, saves, stop, must_log=bool(told))
                for line in told:
                    print(line)
                heed_alarms(learner, watch, saves)
                if ahead and is_saved:
                    ahead.drop()
        lengths.show()
        return save_final(learner, record, stop, alarms=watch.on)


def check_servers(config: GRPOConfig, processor: Ovis2_5Processor) -> None:
    """Raise ConfigError for a vLLM server that cannot be used, before a model is loaded."""
    if config.vllm_servers:
        from looktwice.engine.vllm import VllmEngine  # needs the extra

        VllmEngine(config.vllm_servers, processor.config)


def begin_watch(learner: Learner, config: GRPOConfig, checkpoint: Path | None) -> Watch:
    """The alarms of a run, which know what its log says if it goes on; of what a run leaves beside the log, what it
    takes anew is dropped, and under exact mode it is written down what its bits depend on."""
    history = read_log(checkpoint.parent / LOG_FILE, last=learner.step) if checkpoint else []
    if learner.world.is_main:
        drop_later(config.output_dir / TRAJECTORIES, learner.step)
        if config.exact:
            write_result(config.output_dir / NUMERICS, as_json(learner.numerics()))
    return Watch(config.alarms, config.stop_on_alarm, history)


def train_step(stage: Stage2, order: BatchOrder, saves: Checkpoints) -> dict[str, float]:
    """One step of the run; where none of its prompts fits, nothing is done."""
    learner = stage.learner
    learner.world.at("rollouts", learner.step + 1)
    started = time.perf_counter()
    with learner.phases.during("data"):
        prompts, coming = stage.prompts.of(learner.step), stage.coming(saves)
    metrics: dict[str, float] = {}
    if prompts:
        metrics = stage.step(prompts, coming=coming)
        stage.write(learner.config.output_dir)
    learner.step += 1
    return metrics | {"epoch": order.epoch(learner.step), "time/step_s": time.perf_counter() - started}


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


@dataclass
class Stage2:
    """What the steps of a run have in common, and a step. All processes call its methods at the same time."""

    learner: Learner
    config: GRPOConfig
    pay: RewardFunction
    reference: Reference | None
    prompts: Prompts
    sampler: Sampler
    ahead: Ahead | None = None
    is_checked: bool = False
    """Whether the canaries were looked at: once a run, also after a resume; they are three forwards of one rollout."""
    groups: list[list[Rollout]] = field(default_factory=list)
    """The rollouts of the last step, those of further prompts last."""

    def coming(self, saves: Checkpoints) -> list[Sample]:
        """The prompts whose rollouts are to be made ahead during the coming step. After a checkpoint there are none, so
        that a run that goes on from it does the same."""
        after = self.learner.step + 1
        is_ahead = self.ahead and after < self.learner.total_steps and not saves.is_planned(after)
        return self.prompts.of(after) if is_ahead else []

    def step(self, prompts: Sequence[Sample], *, coming: Sequence[Sample] = ()) -> dict[str, float]:
        """Rollouts of the prompts, their rewards, and the update on those that carry signal.

        Where rollouts are made `ahead`, those of the `coming` prompts are begun before the update. With
        `refill_batches` groups without signal are replaced by those of further prompts.
        """
        learner, config = self.learner, self.config
        groups, images = (self.ahead.take() if self.ahead else None) or (None, None)
        with learner.images_kept(images):
            groups = groups or roll_out(learner, prompts, config, self.pay, self.sampler)
            tell_failures(groups)
            metrics = rollout_metrics(groups)
            if not self.is_checked:
                canaries = self.canaries(groups)
                self.is_checked = bool(canaries)
                metrics |= canaries
            refilled = self.refill(groups)
            if self.ahead and coming:
                self.ahead.begin(learner.step + 1, coming)
            self.groups = [*groups, *refilled]
            metrics |= improve(learner, self.groups, config, self.reference)
        # or they live on through the next rollouts, as large as the trained weights
        learner.optimizer.zero_grad(set_to_none=True)
        if config.refill_batches:
            own, further = (sum(carries_signal(group, config) for group in some) for some in (groups, refilled))
            metrics |= {"group/dropped": 1 - own / len(groups), "group/refilled": float(further)}
        return metrics | token_rates(self.groups, metrics["rollout/trained_tokens"], learner.phases.seconds)

    def refill(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Rollout]]:
        """Groups of further prompts, until as many carry signal as the step's own lack, in `refill_batches` at most
        (DAPO, arXiv 2503.14476)."""
        learner, config = self.learner, self.config
        played: list[list[Rollout]] = []
        for batch in range(config.refill_batches):
            num_lacking = len(groups) - sum(carries_signal(group, config) for group in (*groups, *played))
            if not num_lacking:
                break
            more = self.prompts.further(learner.step, batch, per_step=config.refill_batches, count=num_lacking)
            others = roll_out(learner, more, config, self.pay, self.sampler, first=len(groups) + len(played))
            tell_failures(others, may_stop=False)
            played += others
        return played

    def canaries(self, groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
        """What the canaries say in the first process that has a rollout; each looks at one of its own."""
        learner = self.learner
        own = [rollout for group in groups for rollout in group if rollout.is_own]
        with learner.world.whole_model(learner.model):
            seen = check_rollouts(learner, own, temperature=self.config.temperature) if own else {}
        return next(filter(None, learner.world.gather([seen])), {})

    def validate(self, held_out: Sequence[Sample], data: DataConfig, lengths: LengthReport) -> dict[str, float]:
        """The metrics of the validation questions, while nothing is made ahead."""
        if self.ahead:
            self.ahead.wait()
        with self.learner.phases.during("eval"):
            return validate(self.learner, held_out, data, self.config, lengths, self.sampler)

    def write(self, folder: Path) -> None:
        """Leave the rollouts of the coming step in the run folder: for machines of each step, for people now and then.

        Of several processes rank 0 writes: trajectories of all, and a page of the rollouts whose pictures it has.
        """
        learner, config, step = self.learner, self.config, self.learner.step + 1
        with learner.phases.during("saving"):
            if keep := config.keep_trajectories:
                know_of_all(learner.world, self.groups)
                if learner.world.is_main:
                    write_trajectories(folder / TRAJECTORIES, step, self.groups, keep=keep)
            every = config.rollout_page_steps
            own = [group for group in self.groups if all(rollout.is_own for rollout in group)]
            if own and learner.world.is_main and every and (step in (1, learner.total_steps) or step % every == 0):
                write_rollout_page(folder / ROLLOUT_PAGES / f"step-{step}.html", step, own, learner.processor)
