"""The weight files of a model folder: which there are, and which weights they hold, without loading them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from looktwice.errors import CheckpointError
from looktwice.model.location import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_FINGERPRINT,
    WEIGHT_FILES,
    adapter_base,
    local_adapter,
    locate,
    own_fields,
)

QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
BLOCK = 4096


def adapter_folder(name: str) -> Path | None:
    """The local folder of a LoRA adapter, or None when the name stands for a whole model."""
    if Path(name).is_dir():
        return local_adapter(name)
    try:
        if cached_file(name, ADAPTER_CONFIG, **QUIET) is None:
            return None
        weights = cached_file(name, ADAPTER_WEIGHTS, **QUIET)
    except (OSError, ValueError):
        return None  # what is wrong with the name is told by the loading of a whole model
    return None if weights is None else Path(weights).parent


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a whole model's folder. Raises CheckpointError naming a file that is broken."""
    path = folder / WEIGHT_FILES[0]
    if path.is_file():
        return dict.fromkeys(_tensor_names(path), path)
    index = folder / WEIGHT_FILES[1]
    try:
        files = {
            name: folder / file for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: no usable index of weights ({type(error).__name__}: {error})") from error
    for path in sorted(set(files.values())):
        _tensor_names(path)
    return files


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: a broken weight file ({error}); copy or download it again") from error


def weights_fingerprint(name: str) -> str | None:
    """Which weights a model name stands for: a hash over the dtype, the shape and three blocks of each tensor of its
    files, an adapter's own or a whole model's, however these are cut into files.

    Reads 12 KiB a tensor. None for a hub name without safetensors. Raises CheckpointError when a file is broken.
    """
    if (adapter := adapter_folder(locate(name))) is not None:
        return _fingerprint([adapter / ADAPTER_WEIGHTS])
    folder = locate(name)
    if not Path(folder).is_dir():
        found = [path for file in WEIGHT_FILES if (path := cached_file(folder, file, **QUIET)) is not None]
        if not found:
            return None
        folder = str(Path(found[0]).parent)
    return _fingerprint(sorted(set(tensor_files(Path(folder)).values())))


def _fingerprint(paths: Iterable[Path]) -> str:
    tensors = {}
    for path in paths:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
            for name in header.keys() - {"__metadata__"}:
                first, end = (start + offset for offset in header[name]["data_offsets"])
                digest = hashlib.blake2b(f"{name} {header[name]['dtype']} {header[name]['shape']}".encode())
                for place in (first, (first + end - BLOCK) // 2, end - BLOCK):
                    file.seek(max(first, place))
                    digest.update(file.read(min(BLOCK, end - file.tell())))
                tensors[name] = digest.digest()
    return hashlib.blake2b(b"".join(tensors[name] for name in sorted(tensors)), digest_size=8).hexdigest()


def check_base(folder: Path, fingerprint: str | None) -> None:
    """Raise CheckpointError when an adapter was trained over other weights than those of this fingerprint."""
    known = own_fields(folder).get(BASE_FINGERPRINT)
    if known and fingerprint and known != fingerprint:
        raise CheckpointError(
            f"{folder}: its base {adapter_base(folder)} has other weights than when the adapter was trained; name the "
            f"right base as base_model_name_or_path in {folder / ADAPTER_CONFIG}, or, where only the dtype changed, "
            f"remove {BASE_FINGERPRINT} from {folder / 'config.json'}"
        )
