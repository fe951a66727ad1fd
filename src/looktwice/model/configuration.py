"""Checkpoint facts of Ovis2.5 under the field names of the released config.json."""

from __future__ import annotations

import math
import re
import shutil
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, Qwen3Config

NUM_INDICATORS = 4
IGNORE_INDEX = -100
"""The label of a token that is not trained, in transformers and here."""
OFFICIAL_TRAINER_TYPE = "ovis"
RELEASED_ARCHITECTURE = "Ovis2_5"
SERVING = Path(__file__).parents[1] / "serving"
SERVING_CONFIG, SERVING_MODEL = SERVING / "configuration_ovis2_5.py", SERVING / "modeling_ovis2_5.py"
COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels"),
    *("image_size", "patch_size", "hidden_stride"),
)
AUTO_MAP = {
    "AutoConfig": f"{SERVING_CONFIG.stem}.Ovis2_5_Config",
    "AutoModelForCausalLM": f"{SERVING_MODEL.stem}.Ovis2_5",
}
"""What transformers runs of a folder when it is told to trust it; the released names."""


class Siglip2NavitConfig(PretrainedConfig):
    """The vision tower. Defaults are those of the released 2B and 9B checkpoints."""

    model_type = "siglip2_navit"
    base_config_key = "vit_config"

    def __init__(
        self,
        hidden_size: int = 1152,
        intermediate_size: int = 4304,
        num_hidden_layers: int = 27,
        num_attention_heads: int = 16,
        num_channels: int = 3,
        num_patches: int = -1,
        image_size: int = 512,
        patch_size: int = 16,
        hidden_act: str = "gelu_pytorch_tanh",
        layer_norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        hidden_stride: int = 2,
        window_size: int = 112,
        fullatt_block_indexes: str | None = None,
        temporal_patch_size: int = 1,
        preserve_original_pe: bool = True,
        use_rope: bool = True,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.num_patches = num_patches
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.attention_dropout = attention_dropout
        self.hidden_stride = hidden_stride
        self.window_size = window_size
        self.fullatt_block_indexes = fullatt_block_indexes
        self.temporal_patch_size = temporal_patch_size
        self.preserve_original_pe = preserve_original_pe
        self.use_rope = use_rope
        self.initializer_range = initializer_range
        problem = self._problem()
        if problem:
            raise ValueError(f"vit_config: {problem}")

    def _problem(self) -> str | None:
        """Why the tower cannot be built as the released code would build it, if so."""
        for name in (*COUNTS, "num_patches", "window_size"):
            value = getattr(self, name)
            if type(value) is not int or (value < 1 and name in COUNTS):
                return f"{name} is {value!r}; it must be a whole number{' of at least 1' * (name in COUNTS)}"
        if self.temporal_patch_size != 1:
            return f"temporal_patch_size is {self.temporal_patch_size}; the patch embedding takes single frames, so 1"
        if self.hidden_size % self.num_attention_heads:
            return f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
        if self.use_rope and self.hidden_size // self.num_attention_heads % 4:
            width = self.hidden_size // self.num_attention_heads
            return f"use_rope needs heads whose width is a multiple of 4; hidden_size / num_attention_heads is {width}"
        if self.preserve_original_pe and self.num_patches > 0 and math.isqrt(self.num_patches) ** 2 != self.num_patches:
            return f"num_patches is {self.num_patches}; the position table is a square, so give a square number or -1"
        if not re.fullmatch(r"None|\d+(\|\d+)*", str(self.fullatt_block_indexes)):
            return f"fullatt_block_indexes is {self.fullatt_block_indexes!r}; give numbers such as '0|13|26', or null"
        is_windowed = not self.full_attention_layers.issuperset(range(self.num_hidden_layers))
        if is_windowed and self.window_side < 1:
            return f"window_size {self.window_size} is less than one visual token, {self.factor} pixels"
        return None

    @property
    def window_side(self) -> int:
        """Side of an attention window in patches."""
        return self.hidden_stride * (self.window_size // self.hidden_stride // self.patch_size)

    @property
    def position_table_side(self) -> int:
        """Rows, and columns, of the learned position table."""
        return math.isqrt(self.num_patches) if self.num_patches > 0 else self.image_size // self.patch_size

    @property
    def factor(self) -> int:
        """Side in pixels of the square that becomes one visual token."""
        return self.patch_size * self.hidden_stride

    @property
    def full_attention_layers(self) -> frozenset[int]:
        """Layers that attend over the whole frame; the others are limited to windows."""
        if self.fullatt_block_indexes is None:
            return frozenset(range(self.num_hidden_layers))
        return frozenset(int(index) for index in str(self.fullatt_block_indexes).split("|"))


class Ovis2_5Config(PretrainedConfig):
    """The whole model: `llm_config` (Qwen3), `vit_config`, the visual vocabulary and the ids of visual positions.

    The released config.json has no ids for visual positions; the defaults are those vLLM uses for this model.
    Whether embeddings are tied is decided by `llm_config` alone.
    """

    model_type = "ovis2_5"
    sub_configs = {"llm_config": Qwen3Config, "vit_config": Siglip2NavitConfig}
    attribute_map = {"text_config": "llm_config", "vision_config": "vit_config"}  # the names that TRL and others read

    def __init__(
        self,
        llm_config: dict | Qwen3Config | None = None,
        vit_config: dict | Siglip2NavitConfig | None = None,
        visual_vocab_size: int = 65536,
        image_placeholder_id: int = 151669,
        video_placeholder_id: int = 151670,
        image_token_id: int = 151671,
        image_start_token_id: int = 151672,
        image_end_token_id: int = 151673,
        video_start_token_id: int = 151674,
        video_end_token_id: int = 151675,
        **kwargs: Any,
    ) -> None:
        self.llm_config = _as_config(llm_config, Qwen3Config)
        self.vit_config = _as_config(vit_config, Siglip2NavitConfig)
        self.visual_vocab_size = visual_vocab_size
        self.image_placeholder_id = image_placeholder_id
        self.video_placeholder_id = video_placeholder_id
        self.image_token_id = image_token_id
        self.image_start_token_id = image_start_token_id
        self.image_end_token_id = image_end_token_id
        self.video_start_token_id = video_start_token_id
        self.video_end_token_id = video_end_token_id
        self.hidden_size = self.llm_config.hidden_size
        self.vocab_size = self.llm_config.vocab_size
        kwargs.pop("hidden_size", None)
        kwargs.pop("vocab_size", None)
        others = set(self.llm_config.layer_types or ()) - {"full_attention"}
        if others:
            # a packed row and the rollout cache know no other pattern
            raise ValueError(f"llm_config: layer_types has {', '.join(others)}; only full_attention is supported")
        kwargs["tie_word_embeddings"] = bool(self.llm_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Fields of a config.json; the official trainer's model type `ovis` is taken as `ovis2_5`."""
        fields, rest = super().get_config_dict(*args, **kwargs)
        if fields.get("model_type") == OFFICIAL_TRAINER_TYPE:
            fields["model_type"] = cls.model_type
        return fields, rest

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: the released spelling, which vLLM and the official code read too."""
        fields = super().to_diff_dict()
        fields |= {"architectures": [RELEASED_ARCHITECTURE], "auto_map": AUTO_MAP}
        fields.pop("quantization_config", None)  # weights are stored whole
        rope = dict(fields["llm_config"].pop("rope_parameters"))
        is_plain = rope.get("rope_type", "default") == "default"
        fields["torch_dtype"] = fields.get("dtype")  # as transformers 4 calls it
        fields["llm_config"]["architectures"] = ["Qwen3ForCausalLM"]
        fields["llm_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if is_plain else rope}
        return fields

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write config.json, and beside it the files that AUTO_MAP names."""
        super().save_pretrained(save_directory, *args, **kwargs)
        for file in (SERVING_CONFIG, SERVING_MODEL):
            shutil.copyfile(file, Path(save_directory) / file.name)

    @property
    def indicator_token_ids(self) -> tuple[int, int, int, int]:
        """Ids shown by the last four rows of the visual embedding table, in table order."""
        return (
            self.image_start_token_id,
            self.image_end_token_id,
            self.video_start_token_id,
            self.video_end_token_id,
        )

    @property
    def visual_token_ids(self) -> tuple[int, ...]:
        """Ids that stand for pictures: never sampled, never targets."""
        return (self.image_placeholder_id, self.video_placeholder_id, self.image_token_id, *self.indicator_token_ids)

    def get_text_config(self, *args: Any, **kwargs: Any) -> Qwen3Config:
        return self.llm_config


def _as_config(value: Any, config_class: type[PretrainedConfig]) -> Any:
    if isinstance(value, PretrainedConfig):
        return value
    fields = dict(value or {})
    fields.pop("model_type", None)
    # released files carry this flag as true, which would skip the choice of an attention implementation
    fields.pop("_attn_implementation_autoset", None)
    try:
        return config_class(**fields)
    except StrictDataclassError as error:  # no ValueError, which is what readers of a config look out for
        raise ValueError(f"{config_class.base_config_key or 'llm_config'}: {' '.join(str(error).split())}") from error
