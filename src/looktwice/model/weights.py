"""Model folders in and out: released layout or LoRA adapter, with every tensor accounted for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from looktwice.errors import CheckpointError, ConfigError
from looktwice.model.adapters import base_of
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration

TINY = "tiny"
TINY_FOLDER = Path(__file__).parents[1] / "demo" / "tiny_model"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
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


def is_adapter(name: str) -> bool:
    """Whether a model name stands for a LoRA adapter rather than a whole model."""
    return (Path(locate(name)) / ADAPTER_CONFIG).is_file()


def load_model(
    name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", attn_implementation: str = "sdpa"
) -> nn.Module:
    """An Ovis2.5 model, or with an adapter folder its base model under that adapter (trainable).

    Raises CheckpointError when files are missing or a tensor is missing, unexpected or mis-shaped; remote code is
    never run.
    """
    folder = locate(name)
    if is_adapter(name):
        return _load_adapter(Path(folder), dtype=dtype, device=device, attn_implementation=attn_implementation)
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
            attn_implementation=attn_implementation,
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
    return model.to(device)


def _load_adapter(folder: Path, **options: Any) -> PeftModel:
    try:
        base_name = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            stored = set(file.keys())
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a usable adapter ({type(error).__name__}: {error})") from error
    if not base_name:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is empty; name the base model there")
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
    """The torch device of a setting: as named, else cuda when there is one, else cpu.

    Raises ConfigError for a device that is not there.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
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


def save_model(model: nn.Module, folder: str | Path) -> None:
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
        base.save_pretrained(folder)
