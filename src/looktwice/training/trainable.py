"""A loaded model made trainable under the settings of a stage: adapters, frozen parts, precisions, recomputing."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn

from looktwice.config import LORA_KNOBS, VISION_PARTS, Part, StageConfig
from looktwice.errors import ConfigError
from looktwice.model.adapters import (
    add_lora,
    base_of,
    cast_by_autocast,
    check_same_adapter,
    freeze,
    part_of,
    trained_parameters,
)
from looktwice.model.exact import alike
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration


def made_trainable(model: nn.Module, config: StageConfig, *, is_on_gpu: bool) -> nn.Module:
    """A loaded model under the settings: with adapters, frozen parts, precisions and recomputed layers; one that comes
    with an adapter keeps it."""
    if isinstance(model, PeftModel):
        check_same_adapter(model, **lora_settings(config, only_given=True))
    elif config.use_lora:
        model = add_lora(base_of(model), **lora_settings(config))
    freeze(model, config.frozen_parts)
    if compute_dtype(config) != torch.float32:
        cast_by_autocast(model)
    if not isinstance(model, PeftModel):
        halve_frozen(model, compute_dtype(config))
    towers = "all" if config.memory_efficient else config.gradient_checkpointing
    if towers == "auto":
        towers = "all" if is_on_gpu else "none"
    recompute_layers(base_of(model), towers)
    if config.torch_compile:
        compile_layers(base_of(model))
    return model


def parameter_groups(model: nn.Module, config: StageConfig) -> list[dict[str, Any]]:
    """The optimizer's groups: trained parameters by part, matrices apart from the rest, which has no weight decay.

    Raises ConfigError for a learning rate of a part that is not trained.
    """
    groups: dict[tuple[Part, bool], list[nn.Parameter]] = {}
    for name, parameter in trained_parameters(model):
        groups.setdefault((part_of(name), parameter.ndim >= 2), []).append(parameter)
    rates = config.part_learning_rates
    for part in rates:
        if part not in {trained for trained, _ in groups}:
            raise ConfigError(f"part_learning_rates: {part} is not trained; leave it out, or train it")
    return [
        {
            "params": parameters,
            "part": part,
            "peak_lr": rates.get(part, config.learning_rate),
            "weight_decay": config.weight_decay if is_matrix else 0.0,
        }
        for (part, is_matrix), parameters in groups.items()
    ]


def towers_of(model: Ovis2_5ForConditionalGeneration) -> dict[str, Any]:
    """The two stacks of layers, by the names that settings have for them."""
    return {"llm": model.model.language_model, "vit": model.model.visual_tokenizer.vit}


def recompute_layers(model: Ovis2_5ForConditionalGeneration, towers: str) -> None:
    """Keep only the inputs of each layer of `llm`, `vit` or `all`, and recompute the rest in backward."""
    for name, tower in towers_of(model).items():
        if towers in (name, "all"):
            # transformers renamed it in 5.23; the older name warns from then on
            enable = getattr(tower, "activation_checkpointing_enable", None) or tower.gradient_checkpointing_enable
            enable({"use_reentrant": False, "context_fn": alike})


def compute_dtype(config: StageConfig) -> torch.dtype:
    """What layers compute in; sums, softmax and losses are float32 whatever it is."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32


def halve_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parts of the vision side in the compute dtype, where that holds all weights of a part exactly, as it does
    those of released checkpoints in bfloat16; a CPU does not take a part in two dtypes."""
    parts: dict[Part, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(part_of(name), []).append(parameter)
    for part in VISION_PARTS:
        weights = parts[part]
        is_frozen = not any(weight.requires_grad for weight in weights)
        if is_frozen and all(torch.equal(weight.to(dtype).to(weight.dtype), weight) for weight in weights):
            for weight in weights:
                weight.data = weight.data.to(dtype)


def compile_layers(model: Ovis2_5ForConditionalGeneration) -> None:
    """Compile each layer of the language model, in place: names of weights stay. Attention over the sequences of a row
    is left out, or every other row would be compiled anew."""
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=True)


def lora_settings(config: StageConfig, *, only_given: bool = False) -> dict[str, Any]:
    """The arguments of `add_lora`: all, or those that were set and not left at their defaults."""
    return {
        argument: getattr(config, name)
        for argument, name in LORA_KNOBS.items()
        if not only_given or name in config.model_fields_set
    }
