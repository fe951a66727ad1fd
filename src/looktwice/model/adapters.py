"""What is trained: LoRA on chosen linear layers, or whole parts of the model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, get_args

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from looktwice.config import LORA_KNOBS, Part, WholePart
from looktwice.errors import CheckpointError, ConfigError
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration

LLM_LINEARS = r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"
VIT_LINEARS = r"model\.visual_tokenizer\.vit\.encoder\.layers\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
ALL_LINEAR = "all-linear-llm"
LORA_TARGETS = {
    "llm": LLM_LINEARS,
    "llm+vit": f"{LLM_LINEARS}|{VIT_LINEARS}",
    ALL_LINEAR: r"model\.language_model\..*",
}
"""By full path: a bare suffix such as q_proj would also hit the vision tower. In Qwen3 the last is the same as the
first; it also takes linear layers under other names."""

NO_LORA = {
    "model.visual_tokenizer.head": "the visual head is trained whole or not at all; use --modules_to_save visual_head",
    "model.vte": "it mixes its rows by probability, and LoRA only looks rows up; use --modules_to_save visual_table",
    "model.visual_tokenizer.vit.embeddings": "its weights are read directly, and the adapter would be missed",
    "lm_head": "the loss reads its weight in chunks and would miss the adapter",
}
PART_PREFIXES: dict[Part, tuple[str, ...]] = {
    "vit": ("model.visual_tokenizer.vit.",),
    "visual_head": ("model.visual_tokenizer.head.",),
    "visual_table": ("model.vte.",),
    "llm": ("model.language_model.layers.", "model.language_model.norm."),
    "embeddings": ("model.language_model.embed_tokens.", "lm_head."),
}
WHOLE_MODULES: dict[WholePart, str] = {"visual_head": "model.visual_tokenizer.head", "visual_table": "model.vte"}
INSIDE_ADAPTER = re.compile(r"\.(base_layer|lora_\w+|modules_to_save|original_module)(\.|$)")
ADAPTER_TENSOR = re.compile(r"\.(lora_\w+|modules_to_save)\.")
"""What an adapter's file holds."""
UNUSED_COPY = re.compile(r"\.original_module(\.|$)")
"""What PEFT keeps of a part that is trained whole, as it was."""
PEFT_PREFIX = "base_model.model."


class PartSize(NamedTuple):
    """Parameters of one part with its adapters, and those of them that are trained. Quantised ones count as what they
    stand for, a part that is trained whole counts once."""

    part: Part
    total: int
    trained: int


def add_lora(
    model: Ovis2_5ForConditionalGeneration,
    *,
    r: int,
    alpha: int,
    dropout: float = 0.0,
    targets: str = "llm",
    use_dora: bool = False,
    use_rslora: bool = False,
    modules_to_save: Sequence[WholePart] = (),
) -> PeftModel:
    """The model with fresh LoRA adapters on `targets` (a key of LORA_TARGETS or a regular expression of full module
    names); they and the whole parts of `modules_to_save` are trained, nothing else is.

    Raises ConfigError when the expression names no layer or one that LoRA cannot be put on.
    """
    pattern = _layer_pattern(model, targets)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=pattern,
        use_dora=use_dora,
        use_rslora=use_rslora,
        modules_to_save=[WHOLE_MODULES[part] for part in modules_to_save] or None,
        task_type="CAUSAL_LM",
    )
    return with_adapter(model, config)


def with_adapter(model: Ovis2_5ForConditionalGeneration, config: PeftConfig) -> PeftModel:
    """The model under the fresh adapter of a PEFT config. All that is trained is float32, whatever the base is: in
    bfloat16 most steps of an optimizer would round to nothing."""
    with warnings.catch_warnings():
        # PEFT asks transformers by an older name
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        adapted: Any = get_peft_model(model, config)
    for _, parameter in trained_parameters(adapted):
        parameter.data = parameter.data.float()
    return adapted


def cast_by_autocast(model: nn.Module) -> None:
    """Leave it to autocast to cast what adapters are given, from now on: PEFT would make a float32 copy for each, which
    autocast casts back, and backward keeps a copy of every layer's input in place of the one that layers share."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.cast_input_dtype_enabled = False  # type: ignore[assignment]


def for_inference(model: nn.Module) -> Ovis2_5ForConditionalGeneration:
    """The network with its adapters in place; parts that were trained whole in the dtype of the base, so that it runs
    without autocast."""
    base = base_of(model)
    for module in base.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.to(base.dtype)
    return base


def _layer_pattern(model: nn.Module, targets: str) -> str:
    """The expression of the linear layers that `targets` stands for."""
    layers = dict(model.named_modules())
    chosen = layers_named(model, targets)
    if not chosen:
        raise ConfigError(
            f"lora_targets: '{targets}' names no layer; give {', '.join(LORA_TARGETS)} or an expression of full names "
            "such as model.language_model.layers.0.self_attn.q_proj"
        )
    for name in chosen:
        if reason := why_no_lora(name):
            raise ConfigError(f"lora_targets: '{targets}' hits {name}, where LoRA cannot go: {reason}")
        if not isinstance(layers[name], nn.Linear):
            raise ConfigError(
                f"lora_targets: '{targets}' hits {name} ({type(layers[name]).__name__}); LoRA goes on linear layers"
            )
    return "|".join(map(re.escape, chosen)) if targets == ALL_LINEAR else LORA_TARGETS.get(targets, targets)


def why_no_lora(name: str) -> str | None:
    """Why the layer of this name cannot carry LoRA, if so."""
    return next((why for start, why in NO_LORA.items() if f"{name}.".startswith(f"{start}.")), None)


def adapted_layers(model: nn.Module) -> list[str]:
    """Full names of the layers that carry an adapter."""
    return [name for name, layer in base_of(model).named_modules() if isinstance(layer, BaseTunerLayer)]


def layers_named(model: nn.Module, targets: str) -> list[str]:
    """Full names of the layers that `targets` stands for, in a plain model or under adapters."""
    try:
        pattern = re.compile(LORA_TARGETS.get(targets, targets))
    except re.error as error:
        raise ConfigError(f"lora_targets: '{targets}' is not a regular expression ({error})") from error
    kinds = (nn.Linear, BaseTunerLayer) if targets == ALL_LINEAR else nn.Module
    return [
        name
        for name, layer in model.named_modules()
        if pattern.fullmatch(name) and isinstance(layer, kinds) and not INSIDE_ADAPTER.search(name)
    ]


def adapter_settings(model: PeftModel) -> dict[str, Any]:
    """The arguments of `add_lora` that the adapter of a model was made with."""
    adapter: Any = model.peft_config[model.active_adapter]
    pattern = adapter.target_modules
    if not isinstance(pattern, str):  # PEFT's list of names, each the whole one or its end
        pattern = rf"(.*\.)?({'|'.join(map(re.escape, sorted(pattern)))})"
    return {
        "r": adapter.r,
        "alpha": adapter.lora_alpha,
        "dropout": adapter.lora_dropout,
        "targets": next((name for name, known in LORA_TARGETS.items() if known == pattern), pattern),
        "use_dora": adapter.use_dora,
        "use_rslora": adapter.use_rslora,
        "modules_to_save": tuple(
            part for part, name in WHOLE_MODULES.items() if name in (adapter.modules_to_save or ())
        ),
    }


def check_same_adapter(model: PeftModel, **given: Any) -> None:
    """Refuse settings of `add_lora` that the adapter of a loaded model does not have. Raises ConfigError."""
    base = base_of(model)
    has = {**adapter_settings(model), "targets": adapted_layers(model)}
    has["modules_to_save"] = set(has["modules_to_save"])
    as_compared: dict[str, Callable[[Any], Any]] = {
        "targets": lambda targets: layers_named(base, targets),
        "modules_to_save": set,
    }
    for name, value in given.items():
        if as_compared.get(name, lambda value: value)(value) != has[name]:
            found = "other layers" if name == "targets" else has[name] or "none"
            raise ConfigError(
                f"{LORA_KNOBS[name]} is {value}, the adapter to go on from has {found}; leave the setting out"
            )


def freeze(model: nn.Module, parts: Sequence[Part]) -> None:
    """Keep these parts as they are. Raises ConfigError when nothing is left to train."""
    for name, parameter in model.named_parameters():
        if part_of(name) in parts:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"freeze: with {', '.join(parts)} frozen nothing is trained")


def part_of(name: str) -> Part:
    """The part that a parameter belongs to, by its name in the model or under PEFT."""
    name = name.removeprefix(PEFT_PREFIX)
    for part, prefixes in PART_PREFIXES.items():
        if name.startswith(prefixes):
            return part
    raise CheckpointError(f"{name} belongs to no part of an Ovis2.5 model ({', '.join(PART_PREFIXES)})")


def part_sizes(model: nn.Module) -> list[PartSize]:
    """Parameters of each part, and how many are trained."""
    sizes: dict[Part, list[int]] = {part: [0, 0] for part in get_args(Part)}
    for name, parameter in model.named_parameters():
        quantised = getattr(parameter, "quant_state", None)
        count = parameter.numel() if quantised is None else quantised.shape.numel()
        sizes[part_of(name)][0] += count * (UNUSED_COPY.search(name) is None)
        sizes[part_of(name)][1] += count * parameter.requires_grad
    return [PartSize(part, total, trained) for part, (total, trained) in sizes.items()]


def merge(model: nn.Module) -> Ovis2_5ForConditionalGeneration:
    """The network with its adapters merged into the weights, in the dtype of the base; a plain model as it is.

    Raises CheckpointError when a merged weight is not finite.
    """
    if not isinstance(model, PeftModel):
        return base_of(model)
    dtype = base_of(model).dtype
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise CheckpointError(f"the adapter cannot be merged: {error}") from error
    for parameter in merged.parameters():  # whole parts were trained in float32; rotary buffers stay in it
        parameter.data = parameter.data.to(dtype)
    return base_of(merged)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside, adapted layers compute with their merged weight, in the dtype of the base, and no work of the adapter;
    afterwards, also after an error or Ctrl-C, the very tensors of before are in their places. Parts that are trained
    whole, and a plain model, run as ever; inside another block this one does nothing.

    Layers whose weights are quantised, where what an adapter adds would be rounded away, and layers without a bias
    under an adapter that has one run as they are. In bfloat16 a merged weight is rounded once more, to 1/256 of itself.
    Costs the memory of the adapted weights once more while it lasts, and the products of all adapters at its start.
    Its weights lie elsewhere each time, so a CUDA graph captured inside is good for this block alone.

    Raises CheckpointError when a merged weight is not finite.
    """
    base = base_of(model)
    layers = [layer for layer in base.modules() if isinstance(layer, BaseTunerLayer) and _can_be_merged(layer)]
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        _merge_layers(layers, kept, device_type=base.device.type)
        yield
    finally:
        # the originals are put back, not reckoned back: W + d - d is not W
        for parameter, original in kept:
            parameter.data = original
        for layer in layers:
            layer.merged_adapters.clear()


def _merge_layers(layers: Sequence[Any], kept: list[tuple[nn.Parameter, Tensor]], *, device_type: str) -> None:
    """Give each layer a merged weight of its own; what was there before is noted in `kept` first."""
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        for layer in layers:
            kept += [(parameter, parameter.data) for parameter in layer.get_base_layer().parameters()]
            try:
                layer.merge(safe_merge=True)  # "safe" is into a new tensor
            except ValueError as error:
                raise CheckpointError(f"the adapter cannot be merged: {error}") from error


def _can_be_merged(layer: Any) -> bool:
    linear = layer.get_base_layer()
    lacks_bias = getattr(linear, "bias", None) is None and any(layer.lora_bias.values())
    return linear.weight.is_floating_point() and not (lacks_bias or layer.merged or layer.disable_adapters)


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Inside `merged`: the weights of a model without its adapters, by their names there, in the dtype of the base.

    Raises CheckpointError for an adapted layer that is not merged.
    """
    dtype = base_of(model).dtype
    return ((name, tensor.detach().to(dtype)) for name, tensor in _parameters_under(base_of(model), ""))


def _parameters_under(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, BaseTunerLayer):
        if not module.merged:
            raise CheckpointError(f"{prefix.removesuffix('.')}: this kind of layer cannot be merged; train it whole")
        module = module.get_base_layer()
    elif isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save[module.active_adapters[0]]
    yield from module.named_parameters(prefix.removesuffix("."), recurse=False)
    for name, child in module.named_children():
        yield from _parameters_under(child, f"{prefix}{name}.")


def is_fresh(model: nn.Module) -> bool:
    """Whether every LoRA B of a model is zero, as before its first step, so that its adapter changes nothing yet."""
    return not any(parameter.any() for name, parameter in model.named_parameters() if ".lora_B." in name)


def base_of(model: nn.Module) -> Ovis2_5ForConditionalGeneration:
    """The network itself, with its LoRA layers if it has any."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, Ovis2_5ForConditionalGeneration):
        raise CheckpointError(f"the model is a {type(base).__name__}; looktwice trains Ovis2.5")
    return base


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
