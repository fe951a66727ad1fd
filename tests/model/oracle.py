"""The whole forward of Ovis2.5 once more, as plain as it can be written, for tests to compare with.

It reads tensors under their released names and follows the description of the released network: one sequence at a
time, patch by patch where that is clearest, dense masks, no packing, no cache, no code of the package.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

RELEASED_PREFIXES = {
    "llm.model.": "model.language_model.",
    "llm.lm_head.": "lm_head.",
    "visual_tokenizer.vit.vision_model.": "model.visual_tokenizer.vit.",
    "visual_tokenizer.head.": "model.visual_tokenizer.head.",
    "vte.": "model.vte.",
}
Weights = dict[str, Tensor]
Grid = tuple[int, int, int]


def our_name(released: str) -> str:
    prefix = next(prefix for prefix in RELEASED_PREFIXES if released.startswith(prefix))
    return RELEASED_PREFIXES[prefix] + released.removeprefix(prefix)


def released_name(ours: str) -> str:
    prefix, found = next(pair for pair in RELEASED_PREFIXES.items() if ours.startswith(pair[1]))
    return prefix + ours.removeprefix(found)


def logits(weights: Weights, config: Any, input_ids: list[int], pixels: Tensor | None, grids: list[Grid]) -> Tensor:
    """Logits [T, V] of one sequence: `pixels` [P, C * p * p] uint8 are the patches of all its pictures, in order."""
    hidden = embeddings(weights, config, input_ids, pixels, grids)
    hidden = decoder(weights, config.llm_config, hidden)
    tied = config.llm_config.tie_word_embeddings
    return hidden @ weights["llm.model.embed_tokens.weight" if tied else "llm.lm_head.weight"].T


def embeddings(weights: Weights, config: Any, input_ids: list[int], pixels: Tensor | None, grids: list[Grid]) -> Tensor:
    table, first = weights["vte.weight"], config.visual_vocab_size - 4
    indicators = [
        config.image_start_token_id,
        config.image_end_token_id,
        config.video_start_token_id,
        config.video_end_token_id,
    ]
    atoms = iter(visual_embeddings(weights, config, pixels, grids) if pixels is not None else [])
    rows = []
    for token in input_ids:
        if token == config.image_token_id:
            rows.append(next(atoms))
        elif token in indicators:
            rows.append(table[first + indicators.index(token)])
        else:
            rows.append(weights["llm.model.embed_tokens.weight"][token])
    assert next(atoms, None) is None
    return torch.stack(rows)


def visual_embeddings(weights: Weights, config: Any, pixels: Tensor, grids: list[Grid]) -> Tensor:
    block = config.vit_config.hidden_stride**2
    blocks = []
    for frame_pixels, (h, w) in frames(pixels / 127.5 - 1, grids):
        features = tower(weights, config.vit_config, frame_pixels, h, w)
        blocks.append(features.reshape(len(features) // block, -1))
    scores = torch.cat(blocks) @ weights["visual_tokenizer.head.0.weight"].T
    centred = scores - scores.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normed = normed * weights["visual_tokenizer.head.1.weight"] + weights["visual_tokenizer.head.1.bias"]
    odds = (normed - normed.amax(-1, keepdim=True)).exp()
    visual_tokens = F.pad(odds / odds.sum(-1, keepdim=True), (0, 4))
    return visual_tokens @ weights["vte.weight"]


def frames(pixels: Tensor, grids: list[Grid]) -> list[tuple[Tensor, tuple[int, int]]]:
    """A video is seen frame by frame, as so many pictures."""
    sizes = [(h, w) for t, h, w in grids for _ in range(t)]
    return list(zip(pixels.split([h * w for h, w in sizes]), sizes))


def tower(weights: Weights, config: Any, pixels: Tensor, h: int, w: int) -> Tensor:
    """State after the last layer, before `post_layernorm`, of one frame: [h * w, C * p * p] -> [h * w, W]."""
    name = "visual_tokenizer.vit.vision_model."
    stride, heads = config.hidden_stride, config.num_attention_heads
    places = [
        (block_row + i, block_column + j)
        for block_row in range(0, h, stride)
        for block_column in range(0, w, stride)
        for i in range(stride)
        for j in range(stride)
    ]
    projection = weights[f"{name}embeddings.patch_embedding.weight"]
    hidden = pixels @ projection.reshape(len(projection), -1).T + weights[f"{name}embeddings.patch_embedding.bias"]
    if config.preserve_original_pe:
        table = weights[f"{name}embeddings.position_embedding.weight"]
        side = math.isqrt(len(table))
        grown = F.interpolate(table.reshape(side, side, -1).permute(2, 0, 1)[None], size=(h, w), mode="bicubic")[0]
        hidden = hidden + torch.stack([grown[:, row, column] for row, column in places])

    head_dim = config.hidden_size // heads
    quarter = head_dim // 4
    frequencies = [10000 ** (-j / quarter) for j in range(quarter)]
    angles = torch.tensor([[r * f for f in frequencies] + [c * f for f in frequencies] for r, c in places])

    blocks_across = config.window_size // stride // config.patch_size
    window_of = [
        (r // stride // blocks_across, c // stride // blocks_across) if blocks_across else 0 for r, c in places
    ]
    same_window = torch.tensor([[a == b for b in window_of] for a in window_of])
    everything = torch.ones_like(same_window)
    listed = config.fullatt_block_indexes
    full_layers = range(config.num_hidden_layers) if listed is None else [int(n) for n in str(listed).split("|")]

    for number in range(config.num_hidden_layers):
        layer = f"{name}encoder.layers.{number}."
        normed = layer_norm(weights, f"{layer}layer_norm1", hidden, config.layer_norm_eps)
        query, key, value = (
            linear(weights, f"{layer}self_attn.{kind}_proj", normed).reshape(-1, heads, head_dim).transpose(0, 1)
            for kind in "qkv"
        )
        if config.use_rope:
            query, key = rotate(query, angles), rotate(key, angles)
        mask = everything if number in full_layers else same_window
        mixed = attention(query, key, value, mask).transpose(0, 1).flatten(1)
        hidden = hidden + linear(weights, f"{layer}self_attn.out_proj", mixed)
        normed = layer_norm(weights, f"{layer}layer_norm2", hidden, config.layer_norm_eps)
        inner = F.gelu(linear(weights, f"{layer}mlp.fc1", normed), approximate="tanh")
        hidden = hidden + linear(weights, f"{layer}mlp.fc2", inner)
    return hidden


def decoder(weights: Weights, config: Any, hidden: Tensor) -> Tensor:
    heads, key_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta, half = config.rope_parameters["rope_theta"], head_dim // 2
    angles = torch.tensor([[place * theta ** (-j / half) for j in range(half)] for place in range(len(hidden))])
    causal = torch.ones(len(hidden), len(hidden), dtype=torch.bool).tril()
    for number in range(config.num_hidden_layers):
        layer = f"llm.model.layers.{number}."
        normed = rms_norm(weights, f"{layer}input_layernorm", hidden, config.rms_norm_eps)
        query = linear(weights, f"{layer}self_attn.q_proj", normed).reshape(-1, heads, head_dim)
        key = linear(weights, f"{layer}self_attn.k_proj", normed).reshape(-1, key_heads, head_dim)
        value = linear(weights, f"{layer}self_attn.v_proj", normed).reshape(-1, key_heads, head_dim)
        query = rotate(
            rms_norm(weights, f"{layer}self_attn.q_norm", query, config.rms_norm_eps).transpose(0, 1), angles
        )
        key = rotate(rms_norm(weights, f"{layer}self_attn.k_norm", key, config.rms_norm_eps).transpose(0, 1), angles)
        shared = [head * key_heads // heads for head in range(heads)]
        mixed = attention(query, key[shared], value.transpose(0, 1)[shared], causal).transpose(0, 1).flatten(1)
        hidden = hidden + linear(weights, f"{layer}self_attn.o_proj", mixed)
        normed = rms_norm(weights, f"{layer}post_attention_layernorm", hidden, config.rms_norm_eps)
        gate = F.silu(linear(weights, f"{layer}mlp.gate_proj", normed))
        inner = gate * linear(weights, f"{layer}mlp.up_proj", normed)
        hidden = hidden + linear(weights, f"{layer}mlp.down_proj", inner)
    return rms_norm(weights, "llm.model.norm", hidden, config.rms_norm_eps)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """[heads, T, head_dim] three times, mask [T, T] -> [heads, T, head_dim]."""
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs (k, k + half) of x [heads, T, head_dim] turned by angles [T, half]."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def layer_norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def rms_norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]
