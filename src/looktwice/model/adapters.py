"""What is trained: LoRA on the language model, or all weights with parts frozen."""

from __future__ import annotations

from collections.abc import Iterator

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from looktwice.errors import CheckpointError
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration

LANGUAGE_MODEL_LINEARS = r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"
"""By full path: a bare suffix such as q_proj would also hit the vision tower."""


def add_lora(model: Ovis2_5ForConditionalGeneration, *, r: int, alpha: int, dropout: float) -> PeftModel:
    """The model with fresh LoRA adapters on the language model's linear layers; only they are trained."""
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=LANGUAGE_MODEL_LINEARS, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def freeze_vision(model: Ovis2_5ForConditionalGeneration) -> None:
    """Keep tower, visual head and visual table as they are."""
    for part in (model.model.visual_tokenizer, model.model.vte):
        part.requires_grad_(False)


def base_of(model: nn.Module) -> Ovis2_5ForConditionalGeneration:
    """The network itself, with its LoRA layers if it has any."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, Ovis2_5ForConditionalGeneration):
        raise CheckpointError(f"the model is a {type(base).__name__}; looktwice trains Ovis2.5")
    return base


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def describe_trained(model: nn.Module) -> str:
    """One line: how many parameters train, of how many."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for _, parameter in trained_parameters(model))
    return f"training {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)"
