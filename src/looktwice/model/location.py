"""Where a model name points: a folder, a name of the hub, or the small model; and what a folder says unloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from looktwice.config import Quantization
from looktwice.errors import CheckpointError
from looktwice.paths import expanded

TINY = "tiny"
TINY_FOLDER = Path(__file__).parents[1] / "demo" / "tiny_model"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")

BASE_FINGERPRINT = "base_fingerprint"
UNFINISHED = ".unfinished"
"""How the name of a folder ends that is still being written."""
OWN_FIELDS = "looktwice"
"""The place in an adapter folder's config.json for what PEFT does not store: `quantization`, how the base was quantised
while the adapter was trained, and `base_fingerprint`, which weights it had."""


def locate(name: str) -> str:
    """The folder or hub name behind a model name: `tiny` is the model that comes with the package.

    Raises CheckpointError for a local folder that cannot hold a model.
    """
    name = str(TINY_FOLDER) if name == TINY else expanded(name)
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


def local_adapter(folder: str | Path) -> Path | None:
    """The folder, where it holds a LoRA adapter rather than a whole model."""
    return Path(folder) if (Path(folder) / ADAPTER_CONFIG).is_file() else None


def adapter_base(folder: Path) -> str:
    """The name of the base model of an adapter's folder. Raises CheckpointError when the folder does not say."""
    file = folder / ADAPTER_CONFIG
    try:
        name = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: not a usable adapter ({type(error).__name__}: {error})") from error
    if not name:
        raise CheckpointError(f"{file}: base_model_name_or_path is empty; name the base model there")
    return name


def own_fields(folder: Path) -> dict[str, Any]:
    """What looktwice stored of an adapter beside PEFT's settings; empty of an adapter made elsewhere."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get(OWN_FIELDS, {})
    except (OSError, ValueError, AttributeError):
        return {}  # or a config.json that its readers will name


def base_quantization(folder: Path) -> Quantization:
    """How the base of an adapter was quantised while it was trained; `none` also where the folder does not say."""
    return own_fields(folder).get("quantization", "none")
