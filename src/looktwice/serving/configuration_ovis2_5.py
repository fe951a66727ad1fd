"""Config classes of Ovis2.5 for runtimes that have the network built in but not its config, as vLLM.

A copy of this file stands in every exported folder and is read there without looktwice, so it imports transformers
alone. The fields and their values are those of config.json.
"""

from typing import Any

from transformers import PretrainedConfig, Qwen3Config


class Siglip2NavitConfig(PretrainedConfig):
    """The vision tower."""

    model_type = "siglip2_navit"


class Ovis2_5_Config(PretrainedConfig):
    """The whole model. `llm_config` and `vit_config` come as the dicts of config.json."""

    model_type = "ovis2_5"
    sub_configs = {"llm_config": Qwen3Config, "vit_config": Siglip2NavitConfig}

    def __init__(
        self, llm_config: dict[str, Any] | None = None, vit_config: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.llm_config = Qwen3Config(**(llm_config or {}))
        self.vit_config = Siglip2NavitConfig(**(vit_config or {}))
        super().__init__(**kwargs)
