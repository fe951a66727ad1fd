"""Model folders in and out: released layout or LoRA adapter, with every tensor accounted for."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from looktwice.config import Quantization
from looktwice.console import open_console
from looktwice.drafts import folder_draft
from looktwice.errors import CheckpointError, ConfigError
from looktwice.model.adapters import (
    PEFT_PREFIX,
    adapted_layers,
    base_of,
    merged,
    merged_parameters,
    trained_parameters,
    why_no_lora,
    with_adapter,
)
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.files import adapter_folder, check_base, tensor_files, weights_fingerprint
from looktwice.model.location import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_FINGERPRINT,
    OWN_FIELDS,
    TINY,
    WEIGHT_FILES,
    adapter_base,
    base_quantization,
    check_hub,
    locate,
)
from looktwice.model.modeling import RELEASED_PREFIXES, Ovis2_5ForConditionalGeneration
from looktwice.model.placement import placed_as
from looktwice.model.quantization import quantization_config, quantization_of

CHANGES_BASE_FOR_GOOD = ("pissa_niter", "corda", "loftq")
"""Starts of LoRA after which an adapter fits no base on disk. PEFT repeats plain PiSSA and OLoRA when it loads."""
MODEL_FILE = re.compile(r"(model.*|adapter_model)\.safetensors(\.index\.json)?|adapter_config\.json|trainer_state\.pt")
"""The files of which none may be left when a folder is replaced: a whole model is not read beside an adapter."""
MAX_SHARD_SIZE = "5GB"
"""That of the released folders."""
logger = logging.getLogger(__name__)


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
    if not os.path.isdir(folder):
        check_hub(folder, (*WEIGHT_FILES, ADAPTER_CONFIG))
    options = {
        "dtype": dtype,
        "device": device,
        "attn_implementation": attn_implementation,
        "quantization": quantization,
    }
    if (adapter := adapter_folder(folder)) is not None:
        return _load_adapter(adapter, **options)
    compute_dtype = torch.float32 if dtype == "auto" else dtype
    if os.path.isdir(folder):
        tensor_files(Path(folder))  # a broken file is named
    try:
        fields, _ = Ovis2_5Config.get_config_dict(folder)
        if "llm_config" not in fields:
            # the defaults would stand in for it: a model of many gigabytes, filled with random numbers
            raise CheckpointError(f"{name}: config.json has no llm_config, so this is not an Ovis2.5 model")
        config = Ovis2_5Config.from_pretrained(folder)
        with _without_report():
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
    model.name_or_path = name if name == TINY or not os.path.isdir(folder) else os.path.abspath(folder)
    model.weights_fingerprint = weights_fingerprint(name)
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers prints a table of missing and unexpected tensors; ours is one line."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with _bars(are_shown=open_console(stderr=True).is_interactive):
            yield
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def _bars(*, are_shown: bool) -> Iterator[None]:
    """Whether bars of transformers are shown, which are no part of what a finished command leaves on the screen."""
    previous = transformers_logging.set_tqdm_hook(
        lambda bar, args, settings: bar(*args, **{**settings, "disable": not are_shown, "leave": False})
    )
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


def _load_adapter(folder: Path, **options: Any) -> PeftModel:
    """The adapter on its base. Raises CheckpointError when it does not fit, or does what would go unnoticed here."""
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        tensors = {our_name(name): tensor for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items()}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a usable adapter ({type(error).__name__}: {error})") from error
    base_name = adapter_base(folder)
    _check_kind(folder, settings, options["quantization"])
    try:
        base = load_model(base_name, **options)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: the base of this adapter cannot be loaded ({error}); if it has moved, write its new place as "
            f"base_model_name_or_path into {folder / ADAPTER_CONFIG}"
        ) from error
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.base_model_name_or_path, config.inference_mode = base.name_or_path, False
        model = with_adapter(base_of(base), config)
        _check_layers(folder, model)
        wrong = sorted(tensors.keys() ^ get_peft_model_state_dict(model, save_embedding_layers=False).keys())
        if wrong:  # PEFT would leave a missing tensor fresh
            raise CheckpointError(f"{folder}: the adapter does not fit {base_name}; missing or unexpected: {wrong[:5]}")
        set_peft_model_state_dict(model, tensors)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(f"{folder}: the adapter does not fit {base_name}; {reason}") from error
    check_base(folder, base_of(model).weights_fingerprint)
    base_of(model).adapter_folder = str(folder.absolute())
    trained_over = base_quantization(folder)
    if trained_over != options["quantization"]:
        logger.warning(f"{folder}: trained over a base in {trained_over}, used over one in {options['quantization']}")
    return model


def our_name(name: str) -> str:
    """The name of an adapter's tensor, which may have been trained on the released code's modules."""
    for released, ours in RELEASED_PREFIXES.items():
        if name.startswith(start := PEFT_PREFIX + released):
            return PEFT_PREFIX + ours + name.removeprefix(start)
    return name


def _check_kind(folder: Path, settings: dict[str, Any], quantization: Quantization) -> None:
    """Refuse adapters that cannot be put on their base as they were."""
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder}: peft_type is {settings.get('peft_type')!r}; only LORA adapters are supported")
    start = str(settings.get("init_lora_weights"))
    if start.startswith(CHANGES_BASE_FOR_GOOD):
        raise CheckpointError(
            f"{folder}: the adapter started with {start}, which changed the base's weights by steps that cannot be "
            "repeated; save it anew with PEFT's path_initial_model_for_weight_conversion"
        )
    if start.startswith("pissa") and quantization != "none":
        raise ConfigError(
            f"{folder}: the adapter started with {start}, which takes part of the base's weights, and weights in "
            f"{quantization} cannot be taken apart; use quantization none, or export it and quantise the result"
        )


def _check_layers(folder: Path, model: PeftModel) -> None:
    for name in adapted_layers(model):
        if reason := why_no_lora(name):
            raise CheckpointError(f"{folder}: the adapter sits on {name}, where LoRA cannot go: {reason}")


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


def released_state(model: Ovis2_5ForConditionalGeneration) -> dict[str, Tensor]:
    """The weights under the names of released files; a head tied to the embeddings is not stored."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {released_name(name): tensor for name, tensor in state.items()}


def released_name(name: str) -> str:
    """The name that one of our tensors has in released files."""
    released, ours = next(pair for pair in RELEASED_PREFIXES.items() if name.startswith(pair[1]))
    return released + name.removeprefix(ours)


def load_trained(model: nn.Module, folder: Path) -> None:
    """Put what a saved folder holds in place of the trained weights, one tensor at a time.

    Raises CheckpointError, and changes nothing, when one is not there or a file is broken.
    """
    if isinstance(model, PeftModel):
        try:
            tensors = load_file(folder / ADAPTER_WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: cannot be read ({error})") from error
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
            tensor.copy_(placed_as(tensors[name], tensor))
        return
    files = tensor_files(folder)
    parameters = {released_name(name): parameter for name, parameter in trained_parameters(model)}
    if missing := sorted(parameters.keys() - files.keys()):
        raise CheckpointError(f"{folder}: no {missing[0]} in its weight files")
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as file, torch.no_grad():
            for name in parameters.keys() & file.keys():
                parameters[name].copy_(placed_as(file.get_tensor(name), parameters[name]))


def save_model(model: nn.Module, folder: str | Path, *, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Write weights under the released names, or the adapter with the name of its base model.

    Raises CheckpointError when the folder cannot be written.
    """
    with written_whole(Path(folder)) as draft:
        write_model(model, draft, max_shard_size=max_shard_size)


def write_model(
    model: nn.Module,
    folder: Path,
    *,
    max_shard_size: str = MAX_SHARD_SIZE,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """What `save_model` does, into a folder without weights; `weights` stand for the model's where given."""
    base = base_of(model)
    if isinstance(model, PeftModel):
        _write_adapter(model, base, folder, weights)
    else:
        with _bars(are_shown=False):  # a checkpoint is written while the bar of the run moves
            base.save_pretrained(folder, max_shard_size=max_shard_size, state_dict=weights)
    _open_to_readers(folder)


def save_merged(model: nn.Module, folder: Path) -> None:
    """Write config and weights of a model under the released names, adapters merged, and leave it as it is.

    Raises CheckpointError when the folder cannot be written, or an adapter cannot be merged.
    """
    config = base_of(model).config
    with merged(model), written_whole(folder) as draft:
        state = {released_name(name): tensor for name, tensor in merged_parameters(model)}
        if config.tie_word_embeddings:
            state.pop(released_name("lm_head.weight"), None)
        config.save_pretrained(draft)
        save_torch_state_dict(state, draft, max_shard_size=MAX_SHARD_SIZE)
        _open_to_readers(draft)


def _open_to_readers(folder: Path) -> None:
    """safetensors writes files for the owner alone; let them be read by whoever reads the others."""
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _write_adapter(
    model: PeftModel, base: Ovis2_5ForConditionalGeneration, folder: Path, weights: dict[str, Tensor] | None
) -> None:
    for adapter in model.peft_config.values():
        adapter.base_model_name_or_path = str(base.name_or_path)
        adapter.inference_mode = True
    model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template of a model card
    base.config.save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fields[OWN_FIELDS] = {"quantization": quantization_of(base)}
    if base.weights_fingerprint:
        fields[OWN_FIELDS][BASE_FINGERPRINT] = base.weights_fingerprint
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """An empty hidden folder beside `folder`: what is written there becomes `folder` in one step when all is done.

    What `folder` held before is replaced, but for files that are not of a model. Raises CheckpointError when it cannot
    be written; what was in `folder` before is then still there.
    """
    try:
        with folder_draft(folder, is_replaced=lambda name: MODEL_FILE.fullmatch(name) is not None) as draft:
            yield draft
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: cannot be written ({error}); make room on the disk, or give another folder. What was saved "
            "before is untouched"
        ) from error
