"""looktwice: train and run Ovis2.5 models that look twice. Names are loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from looktwice.config import InferenceConfig as InferenceConfig
    from looktwice.inference import OvisInference as OvisInference
    from looktwice.model.configuration import Ovis2_5Config as Ovis2_5Config
    from looktwice.model.modeling import Ovis2_5ForConditionalGeneration as Ovis2_5ForConditionalGeneration
    from looktwice.processing.processor import Ovis2_5Processor as Ovis2_5Processor
    from looktwice.rollout.crop_tool import CropTool as CropTool
    from looktwice.rollout.trajectory import Trajectory as Trajectory
    from looktwice.training.grpo import train_grpo as train_grpo
    from looktwice.training.sft import train_sft as train_sft

__version__ = "0.2.0"

_HOMES = {
    "CropTool": "rollout.crop_tool",
    "InferenceConfig": "config",
    "Ovis2_5Config": "model.configuration",
    "Ovis2_5ForConditionalGeneration": "model.modeling",
    "Ovis2_5Processor": "processing.processor",
    "OvisInference": "inference",
    "Trajectory": "rollout.trajectory",
    "train_grpo": "training.grpo",
    "train_sft": "training.sft",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module looktwice has no attribute {name!r}")
    return getattr(import_module(f"looktwice.{_HOMES[name]}"), name)
