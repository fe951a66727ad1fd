"""How a run begins, closes its steps, and what it leaves; the same for both stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from looktwice.config import Config, GRPOConfig, ModelConfig, StageConfig
from looktwice.data.order import BatchOrder
from looktwice.errors import ConfigError
from looktwice.metrics import Recorder
from looktwice.model.adapters import part_sizes
from looktwice.training.learner import Learner, towers_of
from looktwice.training.start import FINAL_MODEL, state_file


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


def run_table(learner: Learner, order: BatchOrder, model: ModelConfig) -> Table:
    """What a run is about to do: steps and the samples of one, how it computes, and where it writes."""
    config, towers = learner.config, towers_of(learner.base)
    attention = {tower.config._attn_implementation.removeprefix("packed_") for tower in towers.values()}
    recomputed = " and ".join(name for name, tower in towers.items() if tower.gradient_checkpointing) or "none"
    is_auto = config.gradient_checkpointing == "auto" and not config.memory_efficient
    batch = f"batch size {config.train_batch_size} x {config.gradient_accumulation_steps} accumulated"
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("samples", f"{order.num_samples:,}")
    # the last step of a pass may be short
    limit = "up to " * (order.num_samples % order.samples_per_step > 0)
    table.add_row("steps", f"{order.total_steps:,} of {limit}{order.samples_per_step:,} samples ({batch})")
    if isinstance(config, GRPOConfig):
        table.add_row("rollouts", f"{config.num_generations} of each sample")
    table.add_row("attention", ", ".join(sorted(attention)) + " (auto)" * (model.attn_implementation == "auto"))
    table.add_row("gradient checkpointing", recomputed + " (auto)" * is_auto)
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
