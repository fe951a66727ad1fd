"""How a run begins, closes its steps, and what it leaves; the same for both stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from peft import PeftModel

from looktwice.config import LORA_KNOBS, Stage, StageConfig
from looktwice.data.mixture import Mixture
from looktwice.data.order import BatchOrder
from looktwice.errors import counted
from looktwice.metrics import Recorder
from looktwice.model.adapters import adapter_settings
from looktwice.model.files import weights_fingerprint
from looktwice.model.location import locate
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.trackers import TrackedRun, open_trackers
from looktwice.training.card import model_card
from looktwice.training.checkpoints import Checkpoints
from looktwice.training.determinism import deterministic
from looktwice.training.distributed import World
from looktwice.training.folder import (
    FINAL_MODEL,
    check_final_model,
    check_run,
    checkpoint_of,
    claimed,
    goes_on,
    is_finished,
    make_room,
)
from looktwice.training.learner import Learner
from looktwice.training.overview import show_overview
from looktwice.training.provenance import write_provenance
from looktwice.training.record import Record, Settings, fingerprint, plain
from looktwice.training.state import resume, save
from looktwice.training.stopping import StopRequest, stop_requests

DONE = "is done"
"""The outcome of a run that says nothing else of itself."""
STAGE_NAMES: dict[Stage, str] = {"sft": "stage 1", "grpo": "stage 2", "both": "both stages"}


def batch_order(sizes: Sequence[int], config: StageConfig, weights: Sequence[float] = ()) -> BatchOrder:
    """The order in which a stage goes through the samples of its files, of which `sizes` are the numbers."""
    mixture = Mixture(sizes, weights, seed=config.seed) if weights else None
    return BatchOrder(
        mixture.num_samples if mixture else sum(sizes),
        mixture=mixture,
        samples_per_step=config.train_batch_size * config.gradient_accumulation_steps,
        num_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        seed=config.seed,
    )


@contextmanager
def held(world: World, config: StageConfig) -> Iterator[StopRequest]:
    """What lasts as long as a run: its folder is its own, signals are noted, and sums are alike where that is asked."""
    with (
        claimed(config.output_dir) if world.is_main else nullcontext(),
        stop_requests() as stop,
        deterministic(config.deterministic),
    ):
        yield stop


def planned(stage: Stage, settings: Settings, order: BatchOrder, start: str) -> Record:
    """The record of a run that may start from the model `start`, and go on from its checkpoint if it names one; it
    `is_over` where the run has ended and its final model is there.

    Raises ConfigError and CheckpointError where the run folder, or the checkpoint, is not for this run.
    """
    _, _, config = settings
    check_run(config, start)
    # the files of a hub name may not be here yet
    weights = weights_fingerprint(start) if Path(locate(start)).is_dir() else None
    record = Record.of(stage, settings, num_samples=order.num_samples, total_steps=order.total_steps, start=weights)
    if is_finished(config, record):
        return replace(record, step=order.total_steps)
    if checkpoint := checkpoint_of(config):
        record.check_goes_on(Record.read(checkpoint), checkpoint, allow_changes=config.allow_changes)
    if checkpoint or goes_on(config):
        check_final_model(config, total_steps=order.total_steps)
    return record


def tell_finished(record: Record, settings: Settings) -> Path:
    """Say that the run had ended before, and which settings that are given now it was not trained with; give back its
    final model."""
    _, data, config = settings
    folder = config.output_dir / FINAL_MODEL
    # what LoRA is may have come with the adapter it started from
    given = (config.model_fields_set | data.model_fields_set) - {*LORA_KNOBS.values(), "use_lora"}
    ended = Record.read(folder)
    idle = [change for name, change in record.changes_since(ended) if name in given]
    told = f"; not trained with {', '.join(idle)}" if idle else ""
    print(
        f"{STAGE_NAMES[record.stage]} {ended.outcome or DONE}, all {counted(record.step, 'step')}: {folder}{told}; "
        "more epochs or steps make it longer"
    )
    return folder


def load_alike(
    name: str,
    settings: Settings,
    processor: Ovis2_5Processor,
    order: BatchOrder,
    world: World,
    *,
    is_exact: bool = False,
) -> Learner:
    """The learner of a run, of which all processes have the same model and the same data, or are told what differs."""
    model, data, config = settings
    learner = Learner.load(
        name, model, config, processor, total_steps=order.total_steps, is_exact=is_exact, world=world
    )
    world.check_alike("the model", lambda: learner.start)
    world.check_alike("--train_data", lambda: [*map(fingerprint, data.train_data_path)])
    return learner


def begin(learner: Learner, record: Record, settings: Settings, order: BatchOrder) -> Record:
    """Go on from the checkpoint, if one is named, make room in the run folder, and give the record of what trains."""
    record = replace(record, settings={**record.settings, **plain(as_trained(settings, learner))})
    if checkpoint := checkpoint_of(learner.config):
        saved = Record.read(checkpoint)
        resume(learner, checkpoint)
        place = f"step {learner.step + 1:,} of {order.total_steps:,}, epoch {order.epoch(learner.step):.2f}"
        print(f"{checkpoint}: going on with {place if learner.step < order.total_steps else 'the final model alone'}")
        for _, change in record.changes_since(saved):
            print(f"changed since then: {change}")
    elif goes_on(learner.config):
        print(f"{learner.config.output_dir}: no checkpoint yet, so the run starts with its first step")
    learner.world.wait_for_all()  # who reads what is removed has read it
    if learner.world.is_main:
        make_room(learner.config, checkpoint)
    return record


@contextmanager
def recorded(
    learner: Learner,
    record: Record,
    settings: Settings,
    order: BatchOrder,
    sizes: Sequence[int],
    *,
    shown: tuple[str, ...],
    title: str,
) -> Iterator[Recorder | None]:
    """Write down what runs here, show it, and give what records and shows its steps; None but in rank 0.

    `sizes` are the samples of each training file. Raises ConfigError for a tracker that cannot be opened.
    """
    if not learner.world.is_main:
        yield None
        return
    config = learner.config
    model, data, _ = settings
    *_, trained = as_trained(settings, learner)
    checkpoint = checkpoint_of(config) if learner.step else None
    changed = [change for _, change in record.changes_since(Record.read(checkpoint))] if checkpoint else []
    run = write_provenance(
        (model, data, trained), record.stage, sizes, str(learner.base.device), step=learner.step, changed=changed
    )
    tracked = TrackedRun(folder=config.output_dir, id=run["id"], settings=record.settings, start=learner.step)
    with Recorder(
        config.output_dir,
        total_steps=learner.total_steps,
        shown=shown,
        title=title,
        start=learner.step,
        trackers=open_trackers(config.report_to, tracked),
    ) as recorder:
        show_overview(recorder.console, learner, order, model)
        yield recorder


def as_trained(settings: Settings, learner: Learner) -> Settings:
    """The settings with what the model brings along: its base, and the adapter that goes on."""
    model, data, config = settings
    if isinstance(learner.model, PeftModel):
        has = {LORA_KNOBS[name]: value for name, value in adapter_settings(learner.model).items()}
        config = config.model_copy(update={"use_lora": True, **has})
    return model.model_copy(update={"model_name": str(learner.base.name_or_path)}), data, config


def is_due(learner: Learner, every: int) -> bool:
    """Whether what happens every so many steps happens now; the last step always counts."""
    return learner.step == learner.total_steps or learner.step % every == 0


def close_step(
    learner: Learner,
    recorder: Recorder | None,
    metrics: dict[str, float],
    saves: Checkpoints,
    stop: StopRequest,
    *,
    must_log: bool = False,
) -> bool:
    """Log and show a finished step, and write `checkpoint-N`, from which a run can go on, when one is due: whether one
    was.

    Of several processes only rank 0 has a recorder, and decides what is due; a signal to one of them is one to all.
    Raises Interrupted, with the step saved, where a signal asked the run to stop.
    """
    config, world = learner.config, learner.world
    if learner.guard.num_skipped:
        metrics["optim/skipped"] = float(learner.guard.num_skipped)
    if config.fp16:
        metrics["optim/overflows"] = float(learner.num_overflows)
    if learner.vision_cache:
        metrics |= learner.vision_cache.take_metrics()
    if recorder:
        recorder.advance(learner.step)
        has_rare_ones = any(name.startswith(("eval/", "canary/")) for name in metrics)
        if learner.step == 1 or must_log or has_rare_ones or is_due(learner, config.logging_steps):
            recorder.log(learner.step, metrics)
    stop.agree(world.gather)
    is_last = learner.step == learner.total_steps
    is_saved = world.from_main(lambda: saves.is_due(metrics)) or bool(stop.agreed and not is_last)
    if is_saved:
        if recorder:
            recorder.flush()
        with learner.phases.during("saving"):
            saves.save()
    if not is_last:
        stop.heed(is_done=False)
    return is_saved


def save_final(learner: Learner, record: Record, stop: StopRequest, *, alarms: Sequence[str] = ()) -> Path:
    """Write the final model, say so, and give back its folder; of a run that learnt nothing, or ends with alarms on,
    say that instead.

    Raises Interrupted afterwards where a signal asked the run to stop.
    """
    folder = learner.config.output_dir / FINAL_MODEL
    outcome, means = DONE, ""
    if not learner.has_learnt:
        outcome = "learnt nothing, no step had a gradient"
        means = (
            "; it is no better than what it started from: group/, reward/, data/ and optim/ of metrics.jsonl say why"
        )
    elif alarms:
        outcome, means = f"ended with alarms on ({', '.join(alarms)})", "; docs/method.md says what they mean"
    card = model_card(learner, record) if learner.world.is_main else None
    save(learner, folder, replace(record, outcome=outcome), with_optimizer=False, card=card)
    print(f"{STAGE_NAMES[record.stage]} {outcome}: {folder}{means}")
    stop.agree(learner.world.gather)
    stop.heed(is_done=True)
    return folder
