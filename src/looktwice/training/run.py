"""How a run starts and what it leaves, the same for both stages.

Everything a user can get wrong is found at the start, before anything long.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, overload

from rich.table import Table

from looktwice.config import Config, DataConfig, Stage, StageConfig
from looktwice.data.lengths import Refit, fit_lengths, purposes_of
from looktwice.data.order import BatchOrder
from looktwice.data.problems import View, refuse
from looktwice.data.sample import Sample
from looktwice.errors import ConfigError, DataError
from looktwice.formats.sample_file import SampleFile
from looktwice.metrics import Recorder
from looktwice.model.adapters import part_sizes
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.training.learner import FINAL_MODEL, Learner, state_file, towers_of
from looktwice.training.start import required

LEFT_OUT = "left_out.jsonl"
"""In the run folder: the samples that were too long, one a line, and what was done with each."""

CHECKED_AT_START = 2000
"""Samples that are read, decoded and measured before the model is loaded; a larger set would keep it waiting."""


class LargeSet(Sequence[Sample]):
    """The samples of a file that is too large to be checked before the start, each read when it is asked for."""

    def __init__(self, file: SampleFile) -> None:
        self.file = file

    def __len__(self) -> int:
        return self.file.num_samples

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> list[Sample]: ...
    def __getitem__(self, place: int | slice) -> Sample | list[Sample]:
        if isinstance(place, slice):
            return [self.file.sample(number) for number in range(*place.indices(len(self)))]
        return self.file.sample(place)


class Sets(NamedTuple):
    """Samples to train on, samples held out to validate, and what became of those that were too long."""

    train: Sequence[Sample]
    held_out: Sequence[Sample]
    refits: list[Refit]


def load_sets(data: DataConfig, processor: Ovis2_5Processor, stage: Stage) -> Sets:
    """Training and validation samples: all checked and fitted to `max_length`, or of a large file the first ones.

    Raises DataError and ImageError for what training would stop at.
    """
    train, refits = load_samples(required(data.train_data_path, "--train_data"), data, processor, stage)
    held_out, more = load_samples(data.val_data_path, data, processor, stage) if data.val_data_path else ([], [])
    return Sets(train, held_out, [*refits, *more])


def load_samples(
    path: Path, data: DataConfig, processor: Ovis2_5Processor, stage: Stage
) -> tuple[Sequence[Sample], list[Refit]]:
    """The samples of a file and what became of those that were too long; of a large file that is seen later."""
    file = SampleFile.of(path, data)
    is_large = file.num_samples > CHECKED_AT_START
    samples = file.read(limit=CHECKED_AT_START)
    notes = refuse(samples, path, stage=stage, view=View.of(processor), decode=True)
    if notes:
        listed = ", ".join(f"{count} x {reason}" for reason, count in notes.most_common())
        print(f"{path}: to look at: {listed}; `looktwice data check` says where and what")
    [purpose] = purposes_of(stage)
    kept, refits = fit_lengths(
        samples, processor, max_length=data.max_length, length_policy=data.length_policy, purpose=purpose
    )
    if samples and not kept:
        which = f"each of the first {CHECKED_AT_START:,} samples" if is_large else "every sample"
        raise DataError(f"{path}: {which} is longer than max_length {data.max_length}; raise it")
    if is_large:
        print(
            f"{path}: {file.num_samples:,} samples; the first {CHECKED_AT_START:,} are checked now, the others when "
            "their turn comes; `looktwice data check` judges all"
        )
        return LargeSet(file), []
    return kept, refits


class LengthReport:
    """What `length_policy` left out or shrank, written into the run folder as it happens, each sample once."""

    def __init__(self, config: StageConfig) -> None:
        self.path = config.output_dir / LEFT_OUT
        if not config.resume_from_checkpoint:
            self.path.unlink(missing_ok=True)
        self.seen: set[tuple[str, str]] = set()
        whole, _, cut = (self.path.read_text(encoding="utf-8") if self.path.exists() else "").rpartition("\n")
        for line in filter(None, whole.split("\n")):
            row = json.loads(line)
            self.seen.add((row["where"], row["field"]))
        if cut:  # the run was stopped while it wrote
            self.path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
        self.counts: Counter[str] = Counter()
        self.shown: Counter[str] = Counter()

    def note(self, refits: Iterable[Refit]) -> None:
        for refit in refits:
            place = (refit.sample.where, refit.sample.field)
            if place not in self.seen:
                self.seen.add(place)
                self.counts["left out" if refit.policy is None else "with smaller pictures"] += 1
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(refit.as_json(), ensure_ascii=False) + "\n")

    @property
    def metrics(self) -> dict[str, float]:
        """How many samples are listed by now, where any is."""
        return {"data/too_long": float(len(self.seen))} if self.seen else {}

    def show(self) -> None:
        """Print the counts that are new since they were printed last."""
        for outcome, count in (self.counts - self.shown).items():
            print(f"longer than max_length: {count} sample{'s' * (count > 1)} {outcome}; see {self.path}")
        self.shown = self.counts.copy()


def prepare_output(config: StageConfig) -> None:
    """Make sure that the run folder can be written, and a run to go on from is there.

    Raises ConfigError or CheckpointError when not.
    """
    if config.resume_from_checkpoint:
        state_file(config.resume_from_checkpoint)
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{config.output_dir}: cannot be made as a run folder ({error})") from error


def batch_order(num_samples: int, config: StageConfig) -> BatchOrder:
    """The order in which a stage goes through its samples."""
    return BatchOrder(
        num_samples,
        samples_per_step=config.train_batch_size * config.gradient_accumulation_steps,
        num_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        seed=config.seed,
    )


def run_table(learner: Learner, order: BatchOrder) -> Table:
    """What a run is about to do: steps and the samples of one, how it computes, and where it writes."""
    config, towers = learner.config, towers_of(learner.base)
    attention = {name: tower.config._attn_implementation.removeprefix("packed_") for name, tower in towers.items()}
    recomputed = [name for name, tower in towers.items() if tower.gradient_checkpointing]
    batch = f"batch size {config.train_batch_size} x {config.gradient_accumulation_steps} accumulated"
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("samples", f"{order.num_samples:,}")
    table.add_row("steps", f"{order.total_steps:,} of {order.samples_per_step} samples ({batch})")
    table.add_row("attention", ", ".join(sorted({*attention.values()})))
    table.add_row("gradient checkpointing", " and ".join(recomputed) or "none")
    table.add_row("precision", "bfloat16" if config.bf16 else "float32")
    table.add_row("run folder", str(config.output_dir))
    return table


def trained_table(learner: Learner) -> Table:
    """What trains: parameters of each part, how many of them are trained, and their peak learning rate."""
    rates = {group["part"]: group["peak_lr"] for group in learner.optimizer.param_groups}
    sizes = part_sizes(learner.model)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("part")
    for title in ("parameters", "trained", "learning rate"):
        table.add_column(title, justify="right")
    for part, total, trained in sizes:
        rate = f"{rates[part]:g}" if trained else "frozen"
        table.add_row(part, f"{total:,}", f"{trained:,}", rate)
    all_total, all_trained = sum(size.total for size in sizes), sum(size.trained for size in sizes)
    table.add_row("all", f"{all_total:,}", f"{all_trained:,}", f"{100 * all_trained / all_total:.2f} %", style="bold")
    return table


def is_due(learner: Learner, every: int) -> bool:
    """Whether what happens every so many steps happens now; the last step always counts."""
    return learner.step == learner.total_steps or learner.step % every == 0


def close_step(learner: Learner, recorder: Recorder, metrics: dict[str, float], resolved: Sequence[Config]) -> None:
    """Log and show a finished step, and write `checkpoint-N`, from which a run can go on, when one is due."""
    config = learner.config
    if is_due(learner, config.logging_steps) or any(name.startswith("eval/") for name in metrics):
        recorder.log(learner.step, metrics)
    recorder.advance(learner.step, metrics)
    is_last = learner.step == learner.total_steps
    if config.save_steps and learner.step % config.save_steps == 0 and not is_last:
        learner.save(config.output_dir / f"checkpoint-{learner.step}", resolved, with_optimizer=True)


def save_final(learner: Learner, resolved: Sequence[Config]) -> Path:
    """Write the final model and give back its folder."""
    folder = learner.config.output_dir / FINAL_MODEL
    learner.save(folder, resolved, with_optimizer=False)
    return folder
