"""What a run says before its first step: what it is about to do, and what trains."""

from __future__ import annotations

from typing import get_args

from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import nn

from looktwice.config import GRPOConfig, ModelConfig, Part
from looktwice.data.order import BatchOrder
from looktwice.errors import counted
from looktwice.model.adapters import adapted_layers, adapter_settings, part_sizes
from looktwice.model.quantization import quantization_of
from looktwice.training.learner import Learner
from looktwice.training.trainable import towers_of


def show_overview(console: Console, learner: Learner, order: BatchOrder, model: ModelConfig) -> None:
    """Say what is about to happen: the run in words, then what trains in numbers."""
    facts = run_facts(learner, order, model)
    console.out("\n".join(f"{name:{max(map(len, facts))}}  {fact}" for name, fact in facts.items()))
    console.print(trained_table(learner))


def run_facts(learner: Learner, order: BatchOrder, model: ModelConfig) -> dict[str, str]:
    """What a run is about to do: with which model, on how much in which steps, how it computes, and where it writes."""
    config, world, towers = learner.config, learner.world, towers_of(learner.base)
    attention = {tower.config._attn_implementation.removeprefix("packed_") for tower in towers.values()}
    recomputed = " and ".join(name for name, tower in towers.items() if tower.gradient_checkpointing) or "none"
    is_auto = config.gradient_checkpointing == "auto" and not config.memory_efficient
    precision, quantization = "bfloat16" if config.bf16 else "float32", quantization_of(learner.base)
    size, epochs = min(order.samples_per_step, order.num_samples), order.epoch(order.total_steps)
    # the last step of a pass may be short
    limit = "all " if size == order.num_samples else "up to " * (order.num_samples % size > 0)
    batch = f"batch size {config.train_batch_size} x {config.gradient_accumulation_steps} accumulated"
    idle = "; some stand idle, as a step has fewer samples: raise --batch_size" * (size < world.size)
    facts = {"stage": "1 (SFT)", "model": model.model_name}
    rollouts = {}
    if isinstance(config, GRPOConfig):
        facts = {"stage": "2 (R-GRPO)", "model": str(config.sft_checkpoint_path)}
        rollouts = {"rollouts": f"{config.num_generations} of each sample"}
    return {
        **facts,
        "trained": what_trains(learner.model),
        "samples": f"{order.num_samples:,}",
        "steps": f"{order.total_steps:,}, {epochs:.3g} epoch{'' if epochs == 1 else 's'}",
        "effective batch": f"{limit}{counted(size, 'sample')} ({batch})",
        **({} if world.size == 1 else {"processes": f"{world.size}, {world.kind}{idle}"}),
        **rollouts,
        "attention": ", ".join(sorted(attention)) + " (auto)" * (model.attn_implementation == "auto"),
        "gradient checkpointing": recomputed + " (auto)" * is_auto,
        **({} if config.vision_cache is None else {"vision cache": vision_cache_fact(learner)}),
        "precision": precision if quantization == "none" else f"{precision}, language model in {quantization}",
        "run folder": str(config.output_dir),
    }


def vision_cache_fact(learner: Learner) -> str:
    """What the vision cache keeps, how much of it, and where."""
    cache, config = learner.vision_cache, learner.config
    assert cache is not None
    kept = "features of the tower" if cache.kind == "tower_features" else "vectors of pictures"
    found = f", with {counted(len(cache.known), 'picture')} of earlier runs" if cache.known else ""
    return f"{kept}, up to {config.vision_cache} in {config.vision_cache_dir or 'memory'}{found}"


def what_trains(model: nn.Module) -> str:
    """What is trained, in words."""
    trained = [size.part for size in part_sizes(model) if size.trained]
    if not isinstance(model, PeftModel):
        return "all weights" if len(trained) == len(get_args(Part)) else f"all weights of {', '.join(trained)}"
    adapter = adapter_settings(model)
    kind = "DoRA" if adapter["use_dora"] else "rsLoRA" if adapter["use_rslora"] else "LoRA"
    layers = counted(len(adapted_layers(model)), "layer")
    whole = [part for part in adapter["modules_to_save"] if part in trained]
    also = f"; all weights of {', '.join(whole)}" if whole else ""
    return f"{kind} of rank {adapter['r']}, alpha {adapter['alpha']}, on {layers}{also}"


def trained_table(learner: Learner) -> Table:
    """What trains: parameters of each part with its adapters, how many of them are trained, which share that is, and
    their peak learning rate."""
    rates = {group["part"]: f"{group['peak_lr']:g}" for group in learner.optimizer.param_groups}
    sizes = part_sizes(learner.model)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("part")
    for title in ("parameters", "trained", "share", "learning rate"):
        table.add_column(title, justify="right")
    for part, total, trained in sizes:
        table.add_row(*_counts(part, total, trained), rates.get(part, "frozen"))
    all_total, all_trained = sum(size.total for size in sizes), sum(size.trained for size in sizes)
    table.add_row(*_counts("all", all_total, all_trained), style="bold")
    return table


def _counts(name: str, total: int, trained: int) -> tuple[str, ...]:
    return name, f"{total:,}", f"{trained:,}", f"{100 * trained / total:.2f} %"
