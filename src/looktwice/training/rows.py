"""How many tokens a packed row holds by default: as many as the device has memory for, and no more than help.

Legend: D width, M width of the MLP, H query heads, K key heads, d width of a head; L layers.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from looktwice.config import StageConfig
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.precision import autocast_dtype
from looktwice.model.vision_cache import is_trained

HELPFUL = {"cpu": 1024, "cuda": 16384}
"""Tokens beyond which a row's arithmetic is no faster, on a CPU by `benchmarks/sft.py`: `speed_of_rows`."""
MOST = 16384
"""Tokens of a row at the most, of one of siblings too; a group that has more is as rare as it is slow anyway."""
FIXED = 4096
"""Tokens of a row at the most where runs are to be alike, whatever memory is free when they start."""
SHARE = 0.5
"""Of the free memory that a row's activations may take: gradients, the optimizer and chunks of logits need room."""


def default_tokens_per_row(model: Ovis2_5ForConditionalGeneration, *, is_fixed: bool = False) -> int:
    """Tokens of a row that fit and help; with `is_fixed` as many in each run."""
    helpful = helpful_tokens(model)
    return min(helpful, FIXED) if is_fixed else min(helpful, tokens_that_fit(model))


def helpful_tokens(model: Ovis2_5ForConditionalGeneration) -> int:
    """Tokens beyond which a row only takes memory.

    Every row makes a gradient of all trained weights anew. Two rows in one spare that, and take less memory as long as
    what backward needs of their tokens is less than that gradient: so it is with large vocabularies over few layers.
    """
    gradient = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    helpful = HELPFUL.get(model.device.type, HELPFUL["cpu"])
    return max(helpful, min(MOST, gradient // bytes_per_token(model)))


def tokens_that_fit(model: Ovis2_5ForConditionalGeneration) -> int:
    """Tokens of a row of the model as it is set up: its device, dtype, and the layers that are recomputed."""
    return max(1, int(SHARE * free_bytes(model.device) / bytes_per_token(model)))


def what_helps(model: Ovis2_5ForConditionalGeneration, config: StageConfig, num_tokens: int) -> str:
    """The settings that take less memory for a row of so many tokens, and about how much less."""
    present = bytes_per_token(model)
    less = bytes_per_token(model, recomputed=True)
    helps = []
    if less < present:
        helps.append(f"--gradient_checkpointing all (about {_gigabytes((present - less) * num_tokens)} less)")
    helps.append(f"--max_tokens_per_row {max(1, num_tokens // 4)} (about {_gigabytes(present * num_tokens // 2)} less)")
    if not any("lora_" in name for name, _ in model.named_parameters()):
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        helps.append(f"--use_lora (about {_gigabytes(trained * 12)} less)")
    if config.optim == "adamw_torch_fused":
        helps.append("--optim paged_adamw_8bit")
    return f"what helps: {', '.join([*helps, 'or a smaller --max_pixels'])}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def bytes_per_token(model: Ovis2_5ForConditionalGeneration, *, recomputed: bool = False) -> int:
    """What backward needs of a token, were it a visual one, estimated; also as if all layers were recomputed.

    A layer keeps about 10 D + 4 (H + K) d + 5 M numbers of a token, one that is recomputed its input alone. A visual
    token is s * s patches of the tower, which keeps nothing where it is frozen.
    """
    size = autocast_dtype(model.device, model.dtype).itemsize
    tower = model.model.visual_tokenizer.vit
    total = _kept(model.model.language_model, size, recomputed)
    if is_trained(tower):
        total += tower.config.hidden_stride**2 * _kept(tower, size, recomputed)
    return total


def _kept(tower: Any, size: int, recomputed: bool) -> int:
    """Bytes of a token or patch in a stack of layers, of which one at a time is whole when they are recomputed."""
    config = tower.config
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    heads = config.num_attention_heads + getattr(config, "num_key_value_heads", config.num_attention_heads)
    layer = 10 * config.hidden_size + 4 * heads * head_dim + 5 * config.intermediate_size
    if recomputed or tower.gradient_checkpointing:
        return size * (layer + config.num_hidden_layers * config.hidden_size)
    return size * layer * config.num_hidden_layers


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody holds."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch keeps for later is free too
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
