"""What a run is refused for before anything heavy is imported: what is not there, and settings that do not fit."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from looktwice.config import LORA_KNOBS, DataConfig, GRPOConfig, ModelConfig, StageConfig, check_reward
from looktwice.errors import ConfigError
from looktwice.model.location import base_quantization, local_adapter, locate
from looktwice.paths import check_data_file, check_image_folder
from looktwice.trackers import check_trackers
from looktwice.training.folder import check_place

T = TypeVar("T")


def check_request(name: str, model: ModelConfig, data: DataConfig, config: StageConfig) -> None:
    """Refuse a stage that cannot start from the model `name`, or lacks its data.

    Raises ConfigError, DataError or CheckpointError.
    """
    for path in (*required(data.train_data_path, "--train_data"), data.val_data_path):
        if path is not None:
            check_data_file(path)
    check_image_folder(data.image_base_path)
    if config.vision_cache_dir is not None and config.vision_cache is None:
        raise ConfigError("vision_cache_dir: nothing is kept there; add the most it may hold, --vision_cache 8GB")
    check_one_process()
    check_place(config, name)
    if isinstance(config, GRPOConfig):
        check_reward(config.reward)
    check_trackers(config.report_to)
    check_attention(model, model.device or "")
    folder = locate(name)
    if Path(folder).is_dir():  # of a hub name it is known later whether it is an adapter
        check_start(name, local_adapter(folder), model, config)


def check_one_process() -> None:
    """Raise ConfigError where a launcher has started several processes, each of which would train on everything."""
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        if os.environ.get(name, "1") not in ("", "0", "1"):
            raise ConfigError(
                f"started as one of {os.environ[name]} processes ({name}); looktwice trains in one: start it by "
                "itself, without torchrun or another launcher"
            )


def check_start(name: str, adapter: Path | None, model_config: ModelConfig, config: StageConfig) -> None:
    """Refuse settings that do not go with the model to start from, an adapter or a whole one. Raises ConfigError."""
    quantization = model_config.quantization
    is_lora_off = "use_lora" in config.model_fields_set and not config.use_lora
    if adapter is None:
        if quantization != "none" and not config.use_lora:
            raise ConfigError(f"quantization {quantization} trains adapters alone; add --use_lora")
        idle = [knob for knob in LORA_KNOBS.values() if knob in config.model_fields_set]
        if idle and not config.use_lora and not is_lora_off:
            raise ConfigError(
                f"{', '.join(idle)}: all weights are trained, without LoRA; add --use_lora, or leave it out"
            )
        return
    if is_lora_off:
        raise ConfigError(
            f"use_lora is off, but {name} is an adapter, which goes on; leave it out, or train all weights of the "
            f"merged model: looktwice export {name} FOLDER"
        )
    trained_over = base_quantization(adapter)
    if trained_over != quantization and "quantization" not in model_config.model_fields_set:
        raise ConfigError(
            f"{name} was trained over a base in {trained_over}; add --quantization {trained_over}, or "
            f"--quantization {quantization} to go on over the whole base"
        )


def required(value: T, flag: str) -> T:
    """The value of a setting that has no default. Raises ConfigError naming its flag."""
    if value in (None, ()):
        raise ConfigError(f"{flag} is missing; give it on the command line or in a config file")
    return value


def check_attention(model: ModelConfig, device: str) -> None:
    """Raise ConfigError for an attention that cannot train on the device."""
    if model.attn_implementation == "flex_attention" and device.startswith("cpu"):
        raise ConfigError("flex_attention has no backward on a CPU; use --attn_implementation sdpa")
    if model.attn_implementation == "flash_attention_2" and find_spec("flash_attn") is None:
        raise ConfigError("flash_attention_2: flash-attn is not installed; install looktwice[flash] or use auto")
