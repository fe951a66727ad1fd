"""Model folders in and out: released layout or LoRA adapter, with every tensor accounted for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from looktwice.config import Quantization
from looktwice.errors import CheckpointError, ConfigError
from looktwice.model.adapters import base_of
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.modeling import RELEASED_PREFIXES, Ovis2_5ForConditionalGeneration
from looktwice.model.quantization import quantization_config

TINY = "tiny"
TINY_FOLDER = Path(__file__).parents[1] / "demo" / "tiny_model"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CHANGES_BASE_FOR_GOOD = ("pissa_niter", "corda", "loftq")
"""Starts of LoRA after which an adapter fits no base on disk. PEFT repeats plain PiSSA and OLoRA when it loads."""
MAX_SHARD_SIZE = "5GB"
"""That of the released folders."""
QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def locate(name: str) -> str:
    """The folder or hub name behind a model name: `tiny` is the model that comes with the package.

    Raises CheckpointError for a local folder that cannot hold a model.
    """
    if name == TINY:
        name = str(TINY_FOLDER)
    folder = Path(name)
    if folder.is_dir():
        files = {path.name for path in folder.iterdir()}
        if not files & {ADAPTER_CONFIG, *WEIGHT_FILES}:
            raise CheckpointError(f"{name}: no weights ({WEIGHT_FILES[0]} or {ADAPTER_CONFIG}) in this folder")
        if "config.json" not in files:
            raise CheckpointError(f"{name}: no config.json in this folder")
    elif folder.exists() or folder.parent.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name}: no such model folder; give a folder, a hub name (AIDC-AI/Ovis2.5-2B) or tiny")
    return name


def adapter_folder(name: str) -> Path | None:
    """The local folder of a LoRA adapter, or None when the name stands for a whole model."""
    if Path(name).is_dir():
        return Path(name) if (Path(name) / ADAPTER_CONFIG).is_file() else None
    try:
        if cached_file(name, ADAPTER_CONFIG, **QUIET) is None:
            return None
        weights = cached_file(name, ADAPTER_WEIGHTS, **QUIET)
    except (OSError, ValueError):
        return None  # what is wrong with the name is told by the loading of a whole model
    return None if weights is None else Path(weights).parent


def is_adapter(name: str) -> bool:
    """Whether a model name stands for a LoRA adapter rather than a whole model."""
    return adapter_folder(locate(name)) is not None


def load_model(
    name: str,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    device: str = "cpu",
    attn_implementation: str | dict[str, str] = "sdpa",
    quantization: Quantization = "none",
) -> nn.Module:
    """An Ovis2.5 model, or with an adapter folder its base model under that adapter (trainable).

    `dtype` "auto" is the stored one, `device` "auto" spreads the layers over all GPUs; `attn_implementation` is one
    for both towers or {"llm_config": ..., "vit_config": ...}. Hub names are read from the local cache alone when
    HF_HUB_OFFLINE is set. Raises CheckpointError when files are missing or a tensor is missing, unexpected or
    mis-shaped; remote code is never run.
    """
    folder = locate(name)
    options = {
        "dtype": dtype,
        "device": device,
        "attn_implementation": attn_implementation,
        "quantization": quantization,
    }
    if (adapter := adapter_folder(folder)) is not None:
        return _load_adapter(adapter, **options)
    compute_dtype = torch.float32 if dtype == "auto" else dtype
    try:
        fields, _ = Ovis2_5Config.get_config_dict(folder)
        if "llm_config" not in fields:
            # the defaults would stand in for it: a model of many gigabytes, filled with random numbers
            raise CheckpointError(f"{name}: config.json has no llm_config, so this is not an Ovis2.5 model")
        config = Ovis2_5Config.from_pretrained(folder)
        loaded: Any = Ovis2_5ForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map="auto" if device == "auto" else {"": device},
            attn_implementation=attn_implementation,
            quantization_config=quantization_config(quantization, compute_dtype),
            ignore_mismatched_sizes=True,  # a mis-shaped tensor is then reported by name, in `info`
            output_loading_info=True,
            trust_remote_code=False,
        )
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{attn_implementation}: {reason}; install looktwice[flash] or use sdpa") from error
    except (OSError, ValueError, SafetensorError, HFValidationError, HfHubHTTPError) as error:
        raise CheckpointError(f"{name}: cannot be loaded as an Ovis2.5 model ({error})") from error
    model, info = loaded
    problems = [f"{kind}: {', '.join(sorted(map(str, names))[:5])}" for kind, names in info.items() if names]
    if problems:
        raise CheckpointError(f"{name}: the weights do not fit config.json; {'; '.join(problems)}")
    model.name_or_path = name if name == TINY or not os.path.isdir(name) else os.path.abspath(name)
    return model


def _load_adapter(folder: Path, **options: Any) -> PeftModel:
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base_name = settings["base_model_name_or_path"]
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            stored = set(file.keys())
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a usable adapter ({type(error).__name__}: {error})") from error
    if not base_name:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is empty; name the base model there")
    start = str(settings.get("init_lora_weights"))
    if start.startswith(CHANGES_BASE_FOR_GOOD):
        raise CheckpointError(
            f"{folder}: the adapter started with {start}, which changed the base's weights by steps that cannot be "
            "repeated; save it anew with PEFT's path_initial_model_for_weight_conversion"
        )
    base = load_model(base_name, **options)
    try:
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(f"{folder}: the adapter does not fit {base_name}; {reason}") from error
    # PEFT only warns when a tensor is missing, and leaves it fresh
    wrong = sorted(stored ^ set(get_peft_model_state_dict(model, save_embedding_layers=False)))
    if wrong:
        raise CheckpointError(f"{folder}: the adapter does not fit {base_name}; missing or unexpected: {wrong[:5]}")
    return model


def pick_device(name: str | None) -> str:
    """The torch device of a setting, or `auto`: as named, else cuda when there is one, else cpu.

    Raises ConfigError for a device that is not there.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "auto":
        return name
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}); choose cpu, or leave it out") from error
    return name


def _clear_weights(folder: Path) -> None:
    """Remove weights of an earlier save, so that a folder never holds an adapter beside a whole model."""
    stale = [folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS, *(folder / name for name in WEIGHT_FILES)]
    for path in [*stale, *folder.glob("model-*.safetensors")]:
        path.unlink(missing_ok=True)


def released_state(model: Ovis2_5ForConditionalGeneration) -> dict[str, Tensor]:
    """The weights under the names of released files; a head tied to the embeddings is not stored."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {
        released + name.removeprefix(ours): tensor
        for name, tensor in state.items()
        for released, ours in RELEASED_PREFIXES.items()
        if name.startswith(ours)
    }


def save_model(model: nn.Module, folder: str | Path, *, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Write weights under the released names, or the adapter with the name of its base model."""
    base = base_of(model)
    _clear_weights(Path(folder))
    if isinstance(model, PeftModel):
        for adapter in model.peft_config.values():
            adapter.base_model_name_or_path = str(base.name_or_path)
            adapter.inference_mode = True
        model.save_pretrained(str(folder), save_embedding_layers=False)
        base.config.save_pretrained(folder)
        (Path(folder) / "README.md").unlink(missing_ok=True)  # PEFT's empty template of a model card
    else:
        base.save_pretrained(folder, max_shard_size=max_shard_size)
