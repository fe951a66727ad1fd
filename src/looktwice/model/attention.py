"""Packed attention: several sequences in one row, none of which sees another, with any attention implementation.

Legend: T tokens of the row, S sequences, H query heads, K key heads, D head width.
`cu_seqlens` [S + 1] holds where each sequence starts and, last, where the row ends. Where siblings share a prompt that
stands once in the row, it is a sequence, and so is what follows it in each of them; `parents` [S] is the one that each
sees besides itself, or -1.
"""

from __future__ import annotations

from inspect import signature
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import is_flash_attn_2_available
from transformers.utils.generic import is_flash_attention_requested

from looktwice.config import AttnImplementation
from looktwice.errors import ConfigError
from looktwice.model.precision import autocast_dtype

PACKED_SDPA = "packed_sdpa"
PACKED_VARLEN = "packed_varlen"


class PackedAttentionModel(PreTrainedModel):
    """A transformers model whose rows may be packed: when `sdpa` is chosen, it gets the SDPA that can do that."""

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        chosen = super().get_correct_attn_implementation(requested_attention, is_init_check)
        return PACKED_SDPA if chosen == "sdpa" else chosen


def pick_attention(name: AttnImplementation, device: str, *, is_bf16: bool) -> str:
    """The implementation of a setting, for a device of `pick_device`.

    `auto` is flash-attention where it can run: installed, on CUDA GPUs of compute capability 8 or above, in bfloat16;
    where it is not installed, torch's own copy of it.
    Raises ConfigError where it was asked for and cannot run, whatever is installed.
    """
    can_run = is_gpu(device) and is_bf16 and _least_capability(device) >= (8, 0)
    if name == "flash_attention_2" and not can_run:
        raise ConfigError(
            "flash_attention_2 runs in bfloat16, on a CUDA GPU of compute capability 8 or above; add --bf16 there, "
            "and use auto elsewhere"
        )
    if name != "auto":
        return name
    if not can_run:
        return "sdpa"
    return "flash_attention_2" if is_flash_attn_2_available() else PACKED_VARLEN if has_varlen() else "sdpa"


def has_varlen(option: str = "enable_gqa") -> bool:
    """Whether this torch has attention over sequences of any lengths, with this option."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return option in signature(varlen_attn).parameters


def _least_capability(device: str) -> tuple[int, int]:
    """Of the GPU named, of the present one for `cuda`, or for `auto` of all that layers are spread over."""
    gpus = range(torch.cuda.device_count()) if device == "auto" else [device]
    return min((torch.cuda.get_device_capability(gpu) for gpu in gpus), default=(0, 0))


def is_gpu(device: str) -> bool:
    """Whether a device of `pick_device`, or `auto`, is a CUDA GPU."""
    return torch.cuda.is_available() if device == "auto" else device.startswith("cuda")


def packed_inputs(
    cu_seqlens: list[int], implementation: str, *, is_causal: bool, like: Tensor, parents: list[int] | None = None
) -> dict[str, Any]:
    """What an attention function of transformers must be given to keep the sequences of a row apart.

    `cu_seqlens` is a list, or every layer would wait for a GPU to hand the numbers over. Device and dtype of masks are
    those of `like`. Raises ValueError for an implementation that would let the sequences see each other, or one that
    cannot share prompts.
    """
    if implementation == PACKED_SDPA:
        return {"attention_mask": None, "cu_seq_lens_q": cu_seqlens, "parents": parents}
    if parents is not None and not shares_prompts(implementation):
        raise ValueError(f'"{implementation}" cannot share prompts; pack without, or choose "sdpa"')
    is_flash = is_flash_attention_requested(requested_attention_implementation=implementation)
    if is_flash or implementation == PACKED_VARLEN:
        # by `to`, which unlike `tensor` does not wait for the device
        starts = torch.tensor(cu_seqlens, dtype=torch.int32).to(like.device, non_blocking=True)
        longest = max(end - start for start, end in pairwise(cu_seqlens))
        inputs = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
        return {"attention_mask": None, **inputs, **_keys_of_segments(cu_seqlens, parents, like.device)}
    if implementation == "eager":
        return {"attention_mask": _additive_mask(cu_seqlens, parents, is_causal=is_causal, like=like)}
    if implementation == "flex_attention":
        return {"attention_mask": _block_mask(cu_seqlens, parents, is_causal=is_causal, device=like.device)}
    raise ValueError(
        f'packed rows need attention "sdpa", "eager", "flex_attention" or "flash_attention_2", not "{implementation}"'
    )


def shares_prompts(implementation: str) -> bool:
    """Whether siblings of a row may have their prompt in it once."""
    return implementation in (PACKED_SDPA, PACKED_VARLEN, "eager", "flex_attention")


def _keys_of_segments(cu_seqlens: list[int], parents: list[int] | None, device: torch.device) -> dict[str, Any]:
    """For varlen attention: the places `seen` [N] of the keys of each segment, those of its parent before its own, and
    where each begins. Nothing where none has a parent."""
    if parents is None:
        return {}
    spans = [*pairwise(cu_seqlens)]
    seen = [[spans[parent], own] if parent >= 0 else [own] for own, parent in zip(spans, parents)]
    lengths = [sum(end - start for start, end in both) for both in seen]
    places = torch.cat([torch.arange(start, end) for both in seen for start, end in both])
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return {
        "seen": places.to(device, non_blocking=True),
        "cu_seq_lens_k": starts.to(device, non_blocking=True),
        "max_length_k": max(lengths),
    }


def _owners(cu_seqlens: list[int], device: torch.device) -> Tensor:
    """Number of the sequence that each token belongs to: [T]."""
    starts = torch.tensor(cu_seqlens, device=device)
    return torch.repeat_interleave(torch.arange(len(starts) - 1, device=device), starts.diff())


def _ancestors(owners: Tensor, parents: list[int] | None) -> Tensor:
    """Number of the sequence that each token sees besides its own, or -1: [T]."""
    return torch.full_like(owners, -1) if parents is None else owners.new_tensor(parents)[owners]


def _additive_mask(cu_seqlens: list[int], parents: list[int] | None, *, is_causal: bool, like: Tensor) -> Tensor:
    """0 where a token sees another and a very low number elsewhere: [1, 1, T, T]."""
    owners = _owners(cu_seqlens, like.device)
    is_seen = owners[:, None] == owners
    if is_causal:
        is_seen = is_seen.tril()
    is_seen |= _ancestors(owners, parents)[:, None] == owners
    lowest = torch.finfo(like.dtype).min
    return torch.zeros(is_seen.shape, dtype=like.dtype, device=like.device).masked_fill(~is_seen, lowest)[None, None]


def _block_mask(
    cu_seqlens: list[int], parents: list[int] | None, *, is_causal: bool, device: torch.device
) -> BlockMask:
    owners = _owners(cu_seqlens, device)
    ancestors = _ancestors(owners, parents)

    def is_seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_same = owners[query] == owners[key]
        return (is_same & (query >= key) if is_causal else is_same) | (ancestors[query] == owners[key])

    # uncompiled, the mask is T x T before it becomes blocks; on a CPU compiling would take longer than attention
    is_compiled = device.type != "cpu"
    return create_block_mask(is_seen, None, None, len(owners), len(owners), device=device, _compile=is_compiled)


@torch.compiler.disable
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: list[int],
    *,
    scale: float,
    is_causal: bool,
    dropout: float = 0.0,
    parents: list[int] | None = None,
) -> Tensor:
    """Attention within each sequence of a packed row: [1, H, T, D], [1, K, T, D], [1, K, T, D] -> [1, H, T, D].

    A loop of SDPA over sequences: on CPU 2 to 13 times faster than padding or a block-diagonal mask, and it has no
    mask to get wrong. On a GPU `auto` chooses kernels that take the `cu_seqlens` instead.
    """
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    grouped = query.shape[1] != key.shape[1]
    keys, values = key.split(lengths, 2), value.split(lengths, 2)
    parts = []
    for q, k, v, parent in zip(query.split(lengths, 2), keys, values, parents or [-1] * len(lengths)):
        seen, causal = None, is_causal
        if parent >= 0:
            k, v = torch.cat([keys[parent], k], 2), torch.cat([values[parent], v], 2)
            # SDPA's own causal mask begins with the first key
            seen, causal = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(lengths[parent]), False
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, seen, is_causal=causal, scale=scale, dropout_p=dropout, enable_gqa=grouped
            )
        )
    return torch.cat(parts, 2)


def _packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: list[int] | None = None,
    parents: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: packed when `cu_seq_lens_q` is given, its own SDPA otherwise."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    out = packed_attention(
        query,
        key,
        value,
        cu_seq_lens_q,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        is_causal=bool(module.is_causal if is_causal is None else is_causal),
        dropout=dropout,
        parents=parents,
    )
    return out.transpose(1, 2).contiguous(), None


def _packed_varlen(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int = 0,
    max_length_k: int = 0,
    seen: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same by torch's flash-attention over sequences, in half precision on a CUDA GPU. Not yet run on one."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    from torch.nn.attention import varlen  # not in every torch that is taken

    # autocast does not know it; a norm's float32 weight leaves queries in float32
    dtype = autocast_dtype(query.device, query.dtype)
    queries, keys, values = (each[0].transpose(0, 1).to(dtype) for each in (query, key, value))
    if seen is not None:
        keys, values = keys.index_select(0, seen), values.index_select(0, seen)
    out: Any = varlen.varlen_attn(
        queries,
        keys,
        values,
        cu_seq_lens_q,
        cu_seq_lens_k,
        max_length_q,
        max_length_k,
        scale=scaling,
        window_size=(-1, 0) if (module.is_causal if is_causal is None else is_causal) else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None], None


AttentionInterface.register(PACKED_SDPA, _packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
AttentionInterface.register(PACKED_VARLEN, _packed_varlen)
AttentionMaskInterface.register(PACKED_VARLEN, sdpa_mask)
