"""What the last bits of a result depend on: facts that sampler and trainer must have in common, and their digest."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from looktwice.errors import LooktwiceError
from looktwice.geometry import PixelPolicy
from looktwice.model.adapters import base_of
from looktwice.model.exact import KEY_BLOCK, PIECE, TILES
from looktwice.model.quantization import quantization_of

LIBRARIES = ("torch", "transformers", "peft", "numpy", "pillow")
KERNEL_VARIABLES = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Environment variables by which kernels are chosen."""
BLOCK = 1024
"""Numbers in each of the three blocks that stand for a weight; a training step changes nearly all."""
_ADAPTER = re.compile(r"\.(lora_\w+|modules_to_save)\.")


class NumericsError(LooktwiceError):
    """Sampler and trainer do not compute alike."""


def numerics_of(model: nn.Module, policy: PixelPolicy, *, is_exact: bool) -> dict[str, str]:
    """The facts of a model, with or without adapters, on this machine as it is set now.

    Facts change with the thing: versions, device and threads, kernels, dtypes, weights, adapters, sizes of pictures.
    Weights are read in blocks, so that it costs milliseconds.
    """
    base = base_of(model)
    device = base.device
    is_cpu = device.type == "cpu"
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    matmul = torch.backends.cuda.matmul
    facts = {
        "versions": {name: version(name) for name in LIBRARIES},
        "device": f"{platform.machine()} {_cpu_name()}" if is_cpu else torch.cuda.get_device_name(device),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads() if is_cpu else None,
        "build": hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:16],
        "environment": {name: os.environ[name] for name in KERNEL_VARIABLES if name in os.environ},
        "dtypes": sorted({str(weight.dtype) for weight in base.parameters()}),
        "autocast": str(autocast),
        "products": [
            torch.get_float32_matmul_precision(),
            matmul.allow_bf16_reduced_precision_reduction,
            matmul.allow_fp16_reduced_precision_reduction,
        ],
        "attention": [  # an engine may call the attention of the language model by a name of its own
            "exact" if is_exact else base.config.llm_config._attn_implementation,
            base.config.vit_config._attn_implementation,
        ],
        "exact": {"tiles": TILES, "key_block": KEY_BLOCK, "piece": PIECE} if is_exact else None,
        "quantization": quantization_of(base),
        "weights": _fingerprint(base, is_adapter=False),
        "adapter": [_fingerprint(base, is_adapter=True), *_adapter_states(base)],
        "pixels": asdict(policy),
    }
    return {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}


def digest(facts: Mapping[str, str]) -> str:
    """SHA-256 of all facts, whatever their order: what goes beside a rollout."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()


def as_json(facts: Mapping[str, str]) -> str:
    """The facts and their digest, as a file holds them."""
    told = {"digest": digest(facts), "facts": {name: json.loads(value) for name, value in facts.items()}}
    return json.dumps(told, indent=2) + "\n"


def check_same_numerics(trainer: Mapping[str, str], sampler: Mapping[str, str]) -> None:
    """Raise NumericsError naming each fact that is not the same on both sides."""
    differing = [name for name in sorted({*trainer, *sampler}) if trainer.get(name) != sampler.get(name)]
    if differing:
        raise NumericsError(
            "sampler and trainer do not compute alike, so exact mode cannot hold; make these the same:",
            *(f"  {name}: sampler {sampler.get(name)}, trainer {trainer.get(name)}" for name in differing),
        )


def _cpu_name() -> str:
    """The model of the CPU, by which MKL chooses its kernels; empty where the system does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            told = dict(line.split(":", 1) for line in lines if ":" in line)
    except OSError:
        return platform.processor()
    names = {key.strip(): value.strip() for key, value in told.items()}
    return " ".join(names.get(key, "") for key in ("model name", "cpu family", "model", "stepping"))


def _fingerprint(model: nn.Module, *, is_adapter: bool) -> str:
    """Hash over names, dtypes, shapes and three blocks of each weight, of adapters or of all else."""
    total = hashlib.blake2b(digest_size=8)
    for name, weight in model.named_parameters():
        if bool(_ADAPTER.search(f".{name}")) == is_adapter:
            total.update(f"{name.replace('.base_layer', '')} {weight.dtype} {list(weight.shape)}".encode())
            for block in _blocks(weight.detach()):
                total.update(block.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return total.hexdigest()


def _blocks(weight: Tensor) -> Iterator[Tensor]:
    flat = weight.reshape(-1)
    for start in (0, max(0, (len(flat) - BLOCK) // 2), max(0, len(flat) - BLOCK)):
        yield flat[start : start + BLOCK]


def _adapter_states(model: nn.Module) -> list[Any]:
    """How the adapters act, each way once: their scalings, whether they are merged, whether they are off."""
    states = {
        json.dumps([layer.scaling, layer.merged, layer.disable_adapters], sort_keys=True)
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
    }
    return sorted(states)
