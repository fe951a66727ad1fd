"""Where a model name points: a folder, a name of the hub, or the small model; and what a folder says unloaded."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

from looktwice.config import Quantization
from looktwice.errors import CheckpointError, short
from looktwice.paths import check_letters, expanded

TINY = "tiny"
CONNECT_SECONDS = 5
TINY_FOLDER = Path(__file__).parents[1] / "demo" / "tiny_model"
CONFIG = "config.json"
FINAL_MODEL = "final_model"
"""The folder of a finished run that holds its model."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")

OWN_FIELDS = "looktwice"
"""The place in an adapter folder's config.json for what PEFT does not store: `quantization`, how the base was quantised
while the adapter was trained, and `base_fingerprint`, which weights it had."""
BASE_FINGERPRINT = "base_fingerprint"


def locate(name: str) -> str:
    """The folder or hub name behind a model name: `tiny` is the model that comes with the package.

    Raises CheckpointError for a local folder that cannot hold a model, and for a name of the hub that cannot be had.
    """
    name = str(TINY_FOLDER) if name == TINY else expanded(name)
    check_letters(name)
    folder = Path(name)
    if os.path.isdir(folder):  # of a name that is too long Path.is_dir raises an error
        files = {path.name for path in folder.iterdir()}
        if not files & {ADAPTER_CONFIG, *WEIGHT_FILES}:
            hint = f"; name {folder / FINAL_MODEL}" if (folder / FINAL_MODEL).is_dir() else ""
            raise CheckpointError(f"{name}: no weights ({WEIGHT_FILES[0]} or {ADAPTER_CONFIG}) in this folder{hint}")
        if CONFIG not in files:
            raise CheckpointError(f"{name}: no {CONFIG} in this folder")
    elif os.path.isfile(folder):
        raise CheckpointError(f"{name}: no such model folder, but a file; name the folder that it lies in")
    elif any(map(os.path.exists, (folder, folder.parent))) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        name = short(name)
        raise CheckpointError(f"{name}: no such model folder; give a folder, a hub name (AIDC-AI/Ovis2.5-2B) or tiny")
    else:
        check_hub(name, (CONFIG, ADAPTER_CONFIG))
    return name


def check_hub(name: str, files: Sequence[str]) -> None:
    """Raise CheckpointError when none of a hub name's files is in the local cache and the hub cannot be reached.

    The hub's own client would go on trying for half a minute.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
            return
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        reach(constants.ENDPOINT)
    except HFValidationError as error:
        raise CheckpointError(f"{short(name)}: no such model folder, and no hub name; check the spelling") from error
    except ConnectionError as error:
        what = f"no such model folder, no {files[0]} in the hub's cache, and {error}"
        raise CheckpointError(f"{name}: {what}; give a model folder, or tiny") from error


@cache
def reach(address: str) -> None:
    """Raise ConnectionError when nothing answers there within CONNECT_SECONDS, asked as the hub's client asks."""
    from huggingface_hub.utils import get_session

    answers: list[str] = []

    def ask() -> None:
        try:
            get_session().head(address, timeout=CONNECT_SECONDS)
            answers.append("")
        except Exception as error:  # whichever HTTP library the hub's client is built on
            answers.append(str(error) or type(error).__name__)

    thread = Thread(target=ask, daemon=True)  # no timeout holds for the asking of a name server
    thread.start()
    thread.join(CONNECT_SECONDS)
    if problem := answers[0] if answers else f"no answer within {CONNECT_SECONDS} seconds":
        raise ConnectionError(f"{address} cannot be reached ({short(problem)})")


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
        return json.loads((folder / CONFIG).read_text(encoding="utf-8")).get(OWN_FIELDS, {})
    except (OSError, ValueError, AttributeError):
        return {}  # or a config.json that its readers will name


def base_quantization(folder: Path) -> Quantization:
    """How the base of an adapter was quantised while it was trained; `none` also where the folder does not say."""
    return own_fields(folder).get("quantization", "none")
