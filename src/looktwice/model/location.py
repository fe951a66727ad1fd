"""Where a model name points: a folder, a name of the hub, or the small model that comes with the package."""

from __future__ import annotations

from pathlib import Path

from looktwice.errors import CheckpointError

TINY = "tiny"
TINY_FOLDER = Path(__file__).parents[1] / "demo" / "tiny_model"
ADAPTER_CONFIG = "adapter_config.json"
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
