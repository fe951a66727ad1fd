"""How a run starts and what it leaves, the same for both stages.

Everything a user can get wrong is found at the start, before anything long.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from rich.table import Table

from looktwice.config import Config, DataConfig, StageConfig
from looktwice.data.dataset import BatchOrder
from looktwice.data.records import Sample, check_pictures, read_samples
from looktwice.errors import ConfigError
from looktwice.metrics import Recorder
from looktwice.model.adapters import part_sizes
from looktwice.model.weights import locate
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.training.learner import FINAL_MODEL, Learner, state_file

T = TypeVar("T")


def load_processor(name: str, data: DataConfig) -> Ovis2_5Processor:
    """The checkpoint's processor, under the pixel bounds and box frame that the settings name."""
    processor = Ovis2_5Processor.from_pretrained(locate(name))
    given = {
        "image_min_pixels": data.min_pixels,
        "image_max_pixels": data.max_pixels,
        "crop_min_pixels": data.crop_min_pixels,
        "crop_max_pixels": data.crop_max_pixels,
    }
    processor.policy = processor.policy.override(**given)
    processor.box_frame = data.box_frame or processor.box_frame
    return processor


def load_samples(path: Path, data: DataConfig, processor: Ovis2_5Processor) -> list[Sample]:
    """All samples of a file, their pictures and boxes checked."""
    samples = read_samples(path, data.image_base_path)
    check_pictures(
        samples, min_side=processor.factor, box_frame=processor.box_frame, overview_size=processor.overview_size
    )
    return samples


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


def required(value: T | None, flag: str) -> T:
    """The value of a setting that has no default. Raises ConfigError naming its flag."""
    if value is None:
        raise ConfigError(f"{flag} is missing; give it on the command line or in a config file")
    return value
