"""What a run is refused for before anything heavy is imported: what is not there, and settings that do not fit."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from looktwice.config import LORA_KNOBS, DataConfig, GRPOConfig, ModelConfig, StageConfig, check_rewards
from looktwice.errors import ConfigError
from looktwice.launch import Launch, launched
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
    if check_processes(model, config).rank == 0:  # which alone writes there
        check_place(config, name)
    if isinstance(config, GRPOConfig):
        check_rewards(config)
    check_trackers(config.report_to)
    check_attention(model, model.device or "")
    folder = locate(name)
    if Path(folder).is_dir():  # of a hub name it is known later whether it is an adapter
        check_start(name, local_adapter(folder), model, config)


def check_processes(model: ModelConfig, config: StageConfig) -> Launch:
    """Who this process is among those of the run. Raises ConfigError for what several processes, or one, cannot do."""
    launch = launched()
    is_sharded = config.distributed == "fsdp"
    if launch.size == 1:
        if is_sharded:
            raise ConfigError(
                "distributed is fsdp, and one process has nobody to share the model with; start several with torchrun "
                "--nproc_per_node N -m looktwice train ..., or leave it out"
            )
        return launch
    if is_sharded:
        whole = {"quantization": model.quantization != "none"}
        whole["offload_activations"] = config.offload_activations
        whole["optim"] = config.optim not in ("adamw_torch", "adamw_torch_fused")
        whole["exact"] = isinstance(config, GRPOConfig) and config.exact
        for name in filter(whole.get, whole):
            value = model.quantization if name == "quantization" else getattr(config, name)
            raise ConfigError(f"{name} {value} does not go with fsdp; use --distributed ddp, or leave it out")
    if model.device not in (None, "cpu", "cuda"):
        raise ConfigError(
            f"device is {model.device}, and of several processes each takes the GPU of its local rank; leave it out"
        )
    return launch


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
