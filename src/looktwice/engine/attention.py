"""Attention of one pass over the pages of the cache, as transformers' layers call it.

A pass is one flat row of tokens: first those that feed one id, then chunks of several ids of one sequence each. Single
tokens read in one of two ways. Usually rows of about one length are put together, their pages copied side by side.
Where siblings share so long a prompt that reading it for each of them costs more, all read page by page: a shared page
once for its readers, the parts of each row put together at the end.

Legend: T tokens of a pass, B of them single, N pages, G rows that read a page, H query heads, K key heads, R = H / K,
P tokens of a page, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from looktwice.engine.cache import Cache
from looktwice.model.exact import exact_attention, exact_decode_attention, is_exact

PAGED = "looktwice_paged"
HIDDEN = -1e30
"""Added to the score of a place that holds nothing; finite, so that what nobody reads gives no NaN."""


class Reads(NamedTuple):
    """Pages [N] and the rows that read each [N, G], B where there is none; `hidden` [N, P] is added to their scores."""

    pages: Tensor
    rows: Tensor
    hidden: Tensor


class Rows(NamedTuple):
    """Single tokens `start` to `end` of a pass, n of them, that read m pages each: `pages` [n * K * m] are places among
    the pages of all heads, and `hidden` [n, 1, 1, m * P] is added to their scores."""

    start: int
    end: int
    pages: Tensor
    hidden: Tensor


class Chunk(NamedTuple):
    """Tokens `start` to `end` of a pass, of one sequence that has `num_before` ids in its `pages` [K * m], which are
    places among the pages of all heads; if there are any, `seen` marks the keys that each token sees."""

    start: int
    end: int
    pages: Tensor
    num_before: int
    seen: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Where each token of a pass is stored [T], and what it reads: single tokens by `rows` or by `reads`."""

    cache: Cache
    pages: Tensor
    offsets: Tensor
    num_single: int
    rows: list[Rows]
    reads: list[Reads]
    chunks: list[Chunk]


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    paged: Pass,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, H, T, D], [1, K, T, D] -> [1, T, H, D]."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    cache, device = paged.cache, key.device
    # layers may be spread over several GPUs, and an index must be where its tensor is
    cache.write(layer, key[0], value[0], paged.pages.to(device), paged.offsets.to(device))
    keys, values = cache.keys[layer], cache.values[layer]
    assert keys is not None and values is not None
    if is_exact():
        return _read_alone(query[0].transpose(0, 1), keys, values, paged.chunks, scaling)[None], None
    by_token = query[0].transpose(0, 1)
    parts = [_read_rows(by_token[rows.start : rows.end], keys, values, rows, scaling) for rows in paged.rows]
    if paged.reads:
        parts.append(_read_pages(by_token[: paged.num_single], keys, values, paged.reads, scaling))
    for chunk in paged.chunks:
        new = slice(chunk.start, chunk.end)
        queries, k, v, seen = query[:, :, new], key[:, :, new], value[:, :, new], None
        if chunk.seen is not None:
            seen = chunk.seen.to(device)
            k, v = (_side_by_side(store, chunk.pages, 1)[:, :, : seen.shape[1]] for store in (keys, values))
        out = F.scaled_dot_product_attention(
            queries, k, v, attn_mask=seen, is_causal=seen is None, scale=scaling, enable_gqa=True
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)[None], None


def _side_by_side(store: Tensor, pages: Tensor, num_rows: int) -> Tensor:
    """The pages [n * K * m] of each row in their order: [*, K, P, D] -> [n, K, m * P, D]."""
    num_keys, width = store.shape[1], store.shape[3]
    found = store.flatten(0, 1).index_select(0, pages.to(store.device))
    return found.view(num_rows, num_keys, -1, width)


def _read_rows(query: Tensor, keys: Tensor, values: Tensor, rows: Rows, scaling: float) -> Tensor:
    """One token a row over the pages of the row: [n, H, D] -> [n, H, D]; heads of a key head are its queries."""
    num_rows, num_heads, width = query.shape
    num_keys = keys.shape[1]
    out = F.scaled_dot_product_attention(
        query.reshape(num_rows, num_keys, num_heads // num_keys, width),
        _side_by_side(keys, rows.pages, num_rows),
        _side_by_side(values, rows.pages, num_rows),
        attn_mask=rows.hidden.to(query),
        scale=scaling,
    )
    return out.flatten(1, 2)


def _read_alone(query: Tensor, keys: Tensor, values: Tensor, chunks: list[Chunk], scaling: float) -> Tensor:
    """The attention of exact mode, where each token has a chunk: [T, H, D], [*, K, P, D] -> [T, H, D]. Chunks of one
    id come first, and go together."""
    cached = [[_side_by_side(store, chunk.pages, 1)[0].transpose(0, 1) for store in (keys, values)] for chunk in chunks]
    num_single = sum(chunk.end - chunk.start == 1 for chunk in chunks)
    parts = []
    if num_single:
        k, v = (pad_sequence(list(stores), batch_first=True) for stores in zip(*cached[:num_single]))
        positions = torch.tensor([chunk.num_before for chunk in chunks[:num_single]], device=keys.device)
        parts.append(exact_decode_attention(query[:num_single], k, v, positions, scale=scaling))
    for chunk, (k, v) in zip(chunks[num_single:], cached[num_single:]):
        positions = torch.arange(chunk.num_before, chunk.num_before + chunk.end - chunk.start, device=keys.device)
        parts.append(exact_attention(query[chunk.start : chunk.end], k, v, positions, scale=scaling))
    return torch.cat(parts)


def _read_pages(query: Tensor, keys: Tensor, values: Tensor, reads: list[Reads], scaling: float) -> Tensor:
    """One token a row over its pages: [B, H, D], [*, K, P, D] -> [B, H, D].

    Each page gives a part of the sum; parts of a row are put together under the row's largest score.
    """
    num_rows, num_heads, width = query.shape
    num_keys = keys.shape[1]
    repeats = num_heads // num_keys
    # one row more, for readers that are not there
    padded = F.pad(query.view(num_rows, num_keys, repeats, width), (0, 0, 0, 0, 0, 0, 0, 1))
    top = query.new_full((num_rows + 1, num_keys, repeats), HIDDEN, dtype=torch.float32)
    scored = []
    for pages, rows, hidden in reads:
        rows, hidden = rows.to(keys.device), hidden.to(keys.device)
        pages = pages.to(keys.device)
        num_pages, group = rows.shape
        readers = rows.flatten()
        queries = padded.index_select(0, readers).view(num_pages, group, num_keys, repeats, width).transpose(1, 2)
        queries = queries.reshape(num_pages * num_keys, group * repeats, width)
        score = _product(queries, _flat(keys, pages).transpose(1, 2)).mul_(scaling)
        score = score.view(num_pages, num_keys, group, repeats, -1).add_(hidden[:, None, None, None])
        best = score.amax(-1).transpose(1, 2).reshape(-1, num_keys, repeats)
        top.scatter_reduce_(0, readers[:, None, None].expand_as(best), best, "amax")
        scored.append((pages, readers, score))
    mass = torch.zeros_like(top)
    sums = top.new_zeros(*top.shape, width)
    for pages, readers, score in scored:
        num_pages, _, group, _, size = score.shape
        weights = score.sub_(
            top.index_select(0, readers).view(num_pages, group, num_keys, repeats).transpose(1, 2)[..., None]
        ).exp_()
        mass.index_add_(0, readers, weights.sum(-1).transpose(1, 2).reshape(-1, num_keys, repeats))
        found = _product(weights.view(num_pages * num_keys, group * repeats, size), _flat(values, pages))
        found = found.view(num_pages, num_keys, group, repeats, width).transpose(1, 2)
        sums.index_add_(0, readers, found.reshape(-1, num_keys, repeats, width))
    return (sums[:-1] / mass[:-1, ..., None]).to(query).flatten(1, 2)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A batched matrix product in float32: scores rounded to bfloat16 would be off by hundredths."""
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda and right.dtype != torch.float32:
            return torch.bmm(left.to(right), right, out_dtype=torch.float32)
        return torch.bmm(left.float(), right.float())


def _flat(store: Tensor, pages: Tensor) -> Tensor:
    """Pages [N] of [*, K, P, D] as so many matrices [N * K, P, D]."""
    return store.index_select(0, pages).flatten(0, 1)


AttentionInterface.register(PAGED, paged_attention)
AttentionMaskInterface.register(PAGED, sdpa_mask)
