"""The models that a server has: one, and perhaps adapters of it, each under the name that requests give."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looktwice.config import ServeConfig
from looktwice.engine.interface import Engine
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.location import FINAL_MODEL, locate
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.server.refusal import Refusal

if TYPE_CHECKING:
    from looktwice.inference import OvisInference

BASE = "base"
"""The lane of the engine in which the model itself answers."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A name that requests give, and the lane that answers to it."""

    name: str
    lane: str = BASE
    parent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def plain(self) -> dict[str, Any]:
        """What /v1/models says of it."""
        told = {"id": self.name, "object": "model", "created": self.created, "owned_by": "looktwice"}
        return {**told, "parent": self.parent}


class Models:
    """The model and its adapters. Raises as `OvisInference` does."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.inference: OvisInference | None = None
        if config.engine == "vllm":
            self.processor = Ovis2_5Processor.from_pretrained(locate(config.model_path))
            self.processor.policy = self.processor.policy.override(image_max_pixels=config.max_pixels)
        else:
            from looktwice.inference import OvisInference

            self.inference = OvisInference(config)
            self.processor = self.inference.processor
        # from now on its tokenizer is only read, so that threads may share it
        self.processor.template.encode("a")
        self.default = ServedModel(name=config.served_model_name or default_name(config.model_path))
        self.known: dict[str, ServedModel] = {self.default.name: self.default}

    @property
    def described(self) -> str:
        """Which model this is and where it computes, in a line."""
        if self.inference is not None:
            return self.inference.described
        return f"{self.default.name} on vLLM at {', '.join(self.config.vllm_servers)}"

    def open_engine(self) -> Engine:
        """A new engine of the model."""
        if self.inference is not None:
            return self.inference.engine()
        from looktwice.engine.vllm import VllmEngine

        assert isinstance(self.processor.config, Ovis2_5Config)
        return VllmEngine(self.config.vllm_servers, self.processor.config, max_rollouts=self.config.batch_size)

    def named(self, name: str | None) -> ServedModel:
        """The model of this name. Raises Refusal where there is none."""
        if name is None:
            return self.default
        if name not in self.known:
            raise Refusal(
                f"no model {name!r} here; there are {', '.join(self.known)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return self.known[name]


def default_name(path: str) -> str:
    """The name of a model where nobody gives one: the last part of its folder or hub name; of a run's final model that
    of the run."""
    parts = Path(path).parts
    last = parts[-2] if len(parts) > 1 and parts[-1] == FINAL_MODEL else parts[-1]
    return last or path
