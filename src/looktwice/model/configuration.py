"""Checkpoint facts of Ovis2.5 under the field names of the released config.json."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, Qwen3Config

NUM_INDICATORS = 4


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
        kwargs["tie_word_embeddings"] = bool(self.llm_config.tie_word_embeddings)
        super().__init__(**kwargs)

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
    return config_class(**fields)
