"""The models that a server has: one, and perhaps adapters of it, each under the name that requests give."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from looktwice.config import InferenceConfig, ServeConfig
from looktwice.engine.interface import Engine
from looktwice.engine.vllm import VllmEngine
from looktwice.inference import OvisInference
from looktwice.model.adapter_bank import Adapter, AdapterBank, why_alone
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.files import check_base
from looktwice.model.location import FINAL_MODEL, locate
from looktwice.model.weights import is_adapter
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.server.refusal import Refusal

BASE = "/base"
"""The lane of the engine in which the model itself answers: no adapter has such a name."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A name that requests give: the lane of the engine that answers to it, and the adapter there, if it shares one."""

    name: str
    processor: Ovis2_5Processor
    lane: str = BASE
    adapter: str | None = None
    parent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def plain(self) -> dict[str, Any]:
        """What /v1/models says of it."""
        told = {"id": self.name, "object": "model", "created": self.created, "owned_by": "looktwice"}
        return {**told, "parent": self.parent}


class Models:
    """The model and its adapters. Raises as `OvisInference` does.

    Adapters that add to linear layers of the language model alone share one batch with the model and with each other:
    each token is given what its own adapter adds. Any other (DoRA, parts trained whole, the vision tower) has a copy of
    the model and an engine of its own, whose passes take turns with the others'.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.inference: OvisInference | None = None
        if config.engine == "vllm":
            processor = Ovis2_5Processor.from_pretrained(locate(config.model_path))
            processor.policy = processor.policy.override(image_max_pixels=config.max_pixels)
        else:
            self.inference = OvisInference(config)
            self.bank = AdapterBank(self.inference.model)
            processor = self.inference.processor
        name = config.served_model_name or default_name(config.model_path)
        self.default = ServedModel(name=name, processor=_shared(processor))
        self.known: dict[str, ServedModel] = {name: self.default}

    @property
    def described(self) -> str:
        """Which model this is and where it computes, in a line."""
        if self.inference is not None:
            return self.inference.described
        return f"{self.default.name} on vLLM at {', '.join(self.config.vllm_servers)}"

    def open_engine(self) -> Engine:
        """A new engine of the model."""
        if self.inference is not None:
            return self.inference.engine(adapters=self.bank)
        config = self.default.processor.config
        assert isinstance(config, Ovis2_5Config)
        return VllmEngine(self.config.vllm_servers, config, max_rollouts=self.config.batch_size)

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

    def read_adapter(self, name: str, folder: Path) -> Loaded:
        """An adapter from its folder; nothing has changed yet. Raises Refusal for a name that is taken, or of another
        kind of engine; CheckpointError for an adapter that does not fit."""
        if name in self.known:
            raise Refusal(f"there is a model {name!r} already; unload it first", param="lora_name", code="taken")
        if self.inference is None or is_adapter(self.config.model_path):
            what = "vLLM" if self.inference is None else "a model that is an adapter itself"
            raise Refusal(f"adapters cannot be loaded beside {what}; serve their base", code="unsupported")
        parent = self.default.name
        if why_alone(folder) is None:
            model = ServedModel(name=name, processor=self.default.processor, adapter=name, parent=parent)
            return Loaded(model=model, shared=self.bank.read(folder))
        check_base(folder, self.inference.model.weights_fingerprint)
        settings = self.config.model_dump(exclude_unset=True, include={*InferenceConfig.model_fields})
        alone = OvisInference(InferenceConfig(**{**settings, "model_path": str(folder)}))
        model = ServedModel(name=name, processor=_shared(alone.processor), lane=name, parent=parent)
        return Loaded(model=model, alone=alone)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """An adapter that was read: what it adds to the shared model, or the model of its own."""

    model: ServedModel
    shared: Adapter | None = None
    alone: OvisInference | None = None


def _shared(processor: Ovis2_5Processor) -> Ovis2_5Processor:
    """A processor whose tokenizer is only read from now on, so that threads may share it."""
    processor.template.encode("a")
    return processor


def default_name(path: str) -> str:
    """The name of a model where nobody gives one: the last part of its folder or hub name; of a run's final model that
    of the run."""
    parts = Path(path).parts
    last = parts[-2] if len(parts) > 1 and parts[-1] == FINAL_MODEL else parts[-1]
    return last or path
