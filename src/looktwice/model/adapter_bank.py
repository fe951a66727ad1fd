"""LoRA adapters that share one model in one pass: the tokens of each are given what their own adapter adds.

Legend: T tokens of a pass, r rank, I and O widths of a linear layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from looktwice.errors import CheckpointError, short
from looktwice.model.adapters import PEFT_PREFIX, part_of
from looktwice.model.files import check_base
from looktwice.model.location import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.weights import our_name

PLAIN: dict[str, Any] = {
    "use_dora": False,
    "modules_to_save": None,
    "bias": "none",
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}
"""Settings of an adapter that does nothing but add B A x at linear layers."""
PLAIN_STARTS = (True, "gaussian", "default")
"""Starts of LoRA that leave the base as it is."""


class LowRank(NamedTuple):
    """What an adapter adds at a layer: `up` [O, r] of `down` [r, I] of the input, its scale in `up`."""

    down: Tensor
    up: Tensor


Adapter = dict[str, LowRank]
"""What an adapter adds, by the full name of the layer."""


class AdapterBank:
    """Adapters of one model by name, and which tokens are whose. The model itself stays as it is.

    Only adapters that add to linear layers of the language model can share a pass (`why_alone`): pictures are encoded
    once for all. What is added is what PEFT computes, so an answer is the same as with that adapter alone.
    """

    def __init__(self, model: Ovis2_5ForConditionalGeneration) -> None:
        self.model = model
        self._adapters: dict[str, Adapter] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._groups: list[tuple[str, Tensor | slice]] = []

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def read(self, folder: Path) -> Adapter:
        """An adapter from its folder, for `add`. Raises CheckpointError when it does not fit the model, or cannot share
        it with others."""
        if reason := why_alone(folder):
            raise CheckpointError(f"{folder}: this adapter cannot share a model with others ({reason})")
        check_base(folder, self.model.weights_fingerprint)
        layers = dict(self.model.named_modules())
        found = {path: self._fitting(pair, layers.get(path), folder, path) for path, pair in _pairs(folder).items()}
        if not found:
            raise CheckpointError(f"{folder}: no LoRA weights in {ADAPTER_WEIGHTS}")
        return found

    def add(self, name: str, adapter: Adapter) -> None:
        """Know an adapter by this name from now on; not while a pass runs."""
        self._adapters[name] = adapter
        layers = dict(self.model.named_modules())
        for path in adapter.keys() - self._hooks.keys():
            self._hooks[path] = layers[path].register_forward_hook(self._hook(path))

    def remove(self, name: str) -> None:
        """Forget an adapter; not while a pass runs, and its tokens must not be fed any more."""
        del self._adapters[name]
        used = {path for adapter in self._adapters.values() for path in adapter}
        for path in [path for path in self._hooks if path not in used]:
            self._hooks.pop(path).remove()

    @contextmanager
    def routed(self, feeds: Sequence[tuple[str | None, int]]) -> Iterator[None]:
        """Inside, the tokens of a pass [T] are of these adapters, each for so many tokens, None of none."""
        names = {name for name, _ in feeds if name is not None}
        if len(names) == 1 and all(name in names for name, _ in feeds):
            self._groups = [(*names, slice(None))]  # type: ignore[list-item]
        elif names:
            owners = [name for name, count in feeds for _ in range(count)]
            places = {name: [place for place, owner in enumerate(owners) if owner == name] for name in sorted(names)}
            self._groups = [(name, torch.tensor(at, device=self.model.device)) for name, at in places.items()]
        try:
            yield
        finally:
            self._groups = []

    def _fitting(self, pair: LowRank, layer: nn.Module | None, folder: Path, path: str) -> LowRank:
        """The two matrices where the layer is, in the dtype that the model computes in."""
        shape = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
        if shape != (pair.up.shape[0], pair.down.shape[1]):
            raise CheckpointError(f"{folder}: the adapter does not fit the model at {short(path)}")
        assert layer is not None
        device = next(layer.parameters()).device
        return LowRank(*(matrix.to(device, self.model.dtype) for matrix in pair))

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def add(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            for name, where in self._groups:
                if (pair := self._adapters[name].get(path)) is not None:
                    fed = inputs[0][:, where].to(pair.down.dtype)
                    output[:, where] += F.linear(F.linear(fed, pair.down), pair.up).to(output.dtype)
            return output

        return add


def why_alone(folder: Path) -> str | None:
    """Why an adapter needs a model of its own, None where it can share one. Raises CheckpointError for a folder that
    holds no adapter."""
    settings = _settings(folder)
    if settings.get("peft_type") != "LORA":
        return f"it is of kind {settings.get('peft_type')!r}"
    for name, plain in PLAIN.items():
        if settings.get(name) not in (plain, None, False, {}, []):
            return f"{name} is {short(str(settings[name]))}"
    if settings.get("init_lora_weights", True) not in PLAIN_STARTS:
        return f"it started with {short(str(settings['init_lora_weights']))}, which changes the model"
    parts = {part_of(path + ".weight") for path in _pairs(folder)}
    return "it changes how pictures are seen" if parts - {"llm"} else None


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no usable adapter ({type(error).__name__})") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: it holds no settings")
    return settings


def _pairs(folder: Path) -> dict[str, LowRank]:
    """The two matrices of an adapter's file for each layer, by its full name in the model."""
    settings = _settings(folder)
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        rank, alpha = float(settings["r"]), float(settings["lora_alpha"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: no usable adapter ({type(error).__name__})") from error
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    pairs: dict[str, LowRank] = {}
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            up = tensors.get(name.replace(".lora_A.", ".lora_B."))
            if up is None or up.shape[1] != down.shape[0]:
                raise CheckpointError(f"{folder}: {short(name)} has no fitting lora_B")
            path = our_name(name).removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")
            pairs[path] = LowRank(down, up * scale)
    return pairs
