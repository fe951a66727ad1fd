"""Packed attention against one masked product."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from looktwice.model.attention import packed_attention


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_key_heads", [1, 2, 4])
def test_no_sequence_sees_another(is_causal: bool, num_key_heads: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, 9, 8)
    key, value = torch.randn(1, num_key_heads, 9, 8), torch.randn(1, num_key_heads, 9, 8)
    owner = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])
    mask = owner[:, None] == owner[None]
    if is_causal:
        mask = mask.tril()
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    cu_seqlens = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    packed = packed_attention(query, key, value, cu_seqlens, scale=0.3, is_causal=is_causal)
    torch.testing.assert_close(packed, wanted)
