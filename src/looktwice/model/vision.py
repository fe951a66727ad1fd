"""The NaViT tower: patches of many pictures of any size in, features before the visual head out.

Legend: P patches of all pictures, I pictures (a video is one), W tower width, p patch side, s hidden stride.
Rows run frame by frame, and inside a frame in blocks of s x s patches (top-left, top-right, bottom-left, bottom-right).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

from looktwice.model.attention import PackedAttentionModel, packed_inputs
from looktwice.model.configuration import Siglip2NavitConfig
from looktwice.processing.images import normalise

ROPE_THETA = 10000.0


class VisionEmbeddings(nn.Module):
    """Patch projection plus, if the config has one, the learned position table, resized to each picture's grid."""

    def __init__(self, config: Siglip2NavitConfig) -> None:
        super().__init__()
        self.stride = config.hidden_stride
        self.side = config.position_table_side
        self.patch_embedding = (
            nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
            if config.num_patches > 0
            else nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size)
        )
        self.position_embedding = (
            nn.Embedding(self.side**2, config.hidden_size) if config.preserve_original_pe else None
        )

    def forward(self, pixel_values: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
        """pixel_values [P, C * p * p], uint8 or already normalised floats, -> [P, W].

        A convolution of kernel = stride is one matrix product.
        """
        weight = self.patch_embedding.weight
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalise(pixel_values)
        patches = F.linear(pixel_values.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)
        if self.position_embedding is None:
            return patches
        return patches + self._positions(self.position_embedding.weight, grids)

    def _positions(self, table: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
        table = table.view(self.side, self.side, -1).permute(2, 0, 1)[None]
        resized: dict[tuple[int, int], Tensor] = {}
        for _, h, w in grids:
            if (h, w) not in resized:
                grown = F.interpolate(table, size=(h, w), mode="bicubic", align_corners=False)[0]
                resized[h, w] = grown.flatten(1).T[block_order(h, w, self.stride, table.device)]
        return torch.cat([resized[h, w] for t, h, w in grids for _ in range(t)])


class VisionAttention(nn.Module):
    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config: Siglip2NavitConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, packed: dict[str, Any], rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """hidden [P, W] -> [P, W]; patches attend within their own segment of what `packed_inputs` was given."""
        query, key, value = (
            proj(hidden).view(-1, self.num_heads, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rope is not None:
            query, key = rotate(query, *rope), rotate(key, *rope)
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, _ = attend(self, query, key, value, scaling=self.head_dim**-0.5, is_causal=False, **packed)
        return self.out_proj(out.reshape(hidden.shape))


class VisionMLP(nn.Module):
    def __init__(self, config: Siglip2NavitConfig) -> None:
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(hidden)))


class VisionLayer(GradientCheckpointingLayer):
    def __init__(self, config: Siglip2NavitConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, hidden: Tensor, packed: dict[str, Any], rope: tuple[Tensor, Tensor] | None) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), packed, rope)
        return hidden + self.mlp(self.layer_norm2(hidden))


class VisionEncoder(nn.Module):
    def __init__(self, config: Siglip2NavitConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([VisionLayer(config) for _ in range(config.num_hidden_layers)])


class VisionTower(PackedAttentionModel):
    """SigLIP2-NaViT. `post_layernorm` is stored in released checkpoints and not used (using it is a known bug).

    A transformers model of its own, so that attention and gradient checkpointing can be chosen for the tower alone.
    It is part of the whole model, which draws its weights and loads them: hence no `post_init` here.
    """

    config_class = Siglip2NavitConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisionLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: Siglip2NavitConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """[P, C * p * p], [I, 3] -> state after the last layer, s * s patches side by side [P / s^2, s^2 * W].

        Patches are uint8, as our own processor gives them, or floats normalised to [-1, 1], as Hugging Face callers do.
        """
        config = self.config
        grids = [tuple(grid) for grid in image_grid_thw.tolist()]
        frames = [h * w for t, h, w in grids for _ in range(t)]
        if sum(frames) != len(pixel_values):
            raise ValueError(f"image_grid_thw describes {sum(frames)} patches, pixel_values has {len(pixel_values)}")
        hidden = self.embeddings(pixel_values, grids)
        rope = self._rope(grids, hidden) if config.use_rope else None
        attends_fully = [index in config.full_attention_layers for index in range(config.num_hidden_layers)]
        segments, order = {True: cumulative(frames)}, None
        if not all(attends_fully):
            segments[False], order = self._windows(grids, hidden.device)
            hidden = hidden[order]
            rope = None if rope is None else (rope[0][order], rope[1][order])
        packed = {
            is_full: packed_inputs(segments[is_full], config._attn_implementation, is_causal=False, like=hidden)
            for is_full in set(attends_fully)
        }
        for layer, is_full in zip(self.encoder.layers, attends_fully):
            hidden = layer(hidden, packed[is_full], rope)
        if order is not None:
            hidden = hidden[order.argsort()]
        return hidden.view(-1, config.hidden_stride**2 * config.hidden_size)

    def _rope(self, grids: list[tuple[int, int, int]], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [P, 1, head_dim]: the first half of the angles counts grid rows, the second grid columns."""
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        quarter = head_dim // 4
        frequencies = ROPE_THETA ** (-torch.arange(quarter, device=hidden.device, dtype=torch.float32) / quarter)
        rows, columns = self._grid_positions(grids, hidden.device)
        angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)
        angles = torch.cat([angles, angles], dim=1)[:, None]
        return angles.cos(), angles.sin()

    def _grid_positions(self, grids: list[tuple[int, int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
        places = []
        for t, h, w in grids:
            place = block_order(h, w, self.config.hidden_stride, device)
            places.append(torch.stack([place // w, place % w]).repeat(1, t))
        rows, columns = torch.cat(places, dim=1)
        return rows, columns

    def _windows(self, grids: list[tuple[int, int, int]], device: torch.device) -> tuple[list[int], Tensor]:
        """Where each window starts once the patches are put in window order, and that order [P]."""
        side = self.config.window_side
        rows, columns = self._grid_positions(grids, device)
        patches = torch.tensor([h * w for t, h, w in grids for _ in range(t)], device=device)
        frame = torch.repeat_interleave(torch.arange(len(patches), device=device), patches)
        across = max(math.ceil(w / side) for _, _, w in grids)
        down = max(math.ceil(h / side) for _, h, _ in grids)
        window = (frame * down + rows // side) * across + columns // side
        order = window.argsort(stable=True)
        _, lengths = window[order].unique_consecutive(return_counts=True)
        return cumulative(lengths.tolist()), order


def block_order(h: int, w: int, stride: int, device: torch.device | None = None) -> Tensor:
    """Row-major index of the patch at each place of the block order [h * w]."""
    index = torch.arange(h * w, device=device).view(h // stride, stride, w // stride, stride)
    return index.transpose(1, 2).flatten()


def cumulative(lengths: list[int]) -> list[int]:
    """[3, 2] -> [0, 3, 5]."""
    total, starts = 0, [0]
    for length in lengths:
        total += length
        starts.append(total)
    return starts


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding in float32: x [P, heads, head_dim], cos and sin [P, 1, head_dim]."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
