"""Attention of one pass over the pages of the cache, as transformers' layers call it.

A pass is one flat row of tokens, cut into parts: a reader for each says what its tokens read, and how. Which reader
that is, `reading.py` decides.

Legend: T tokens of a pass, n of them in a part, N pages, P tokens of a page, H query heads, K key heads, R = H / K,
D head width, M pages of the longest row, g groups of siblings, G the largest of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from looktwice.engine.cache import Cache
from looktwice.model.exact import exact_attention, exact_decode_attention, is_exact
from looktwice.model.precision import autocast_dtype

PAGED = "looktwice_paged"
HIDDEN = -1e30
"""Added to the score of a place that holds nothing; finite, so that what nobody reads gives no NaN."""


class Reader(Protocol):
    """Attention of the tokens `start` to `end` of a pass."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...

    def read(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """[n, H, D] over the pages [N, K, P, D] of a layer -> [n, H, D]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Pass:
    """At which of `offsets` [T] in which of `pages` [T] the keys of each token are stored, and who reads what."""

    cache: Cache
    pages: Tensor
    offsets: Tensor
    readers: list[Reader]


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
    queries, key, value = (_in_compute_dtype(heads[0]) for heads in (query, key, value))
    # layers may be spread over several GPUs, and an index must be where its tensor is
    paged.cache.write(layer, key, value, paged.pages.to(key.device), paged.offsets.to(key.device))
    keys, values = paged.cache.keys[layer], paged.cache.values[layer]
    assert keys is not None and values is not None
    queries = queries.transpose(0, 1)
    parts = [reader.read(queries[reader.start : reader.end], keys, values, scaling) for reader in paged.readers]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _in_compute_dtype(heads: Tensor) -> Tensor:
    """What attention is computed in and the cache holds: the dtype of autocast, as SDPA has it in training."""
    return heads if is_exact() else heads.to(autocast_dtype(heads.device, heads.dtype))


class Prompts(NamedTuple):
    """Pages that g groups of siblings share, read once for all siblings: `pages` [g * K * M], of which `hidden`
    [g, 1, 1, M * P] hides what shorter prompts lack. `readers` [g * G] are the rows of each group, one of them again
    where it has fewer than G; `rows` [m] are the same rows once each, `places` [m] where they stand in `readers`."""

    pages: Tensor
    hidden: Tensor
    readers: Tensor
    rows: Tensor
    places: Tensor


class Rows(NamedTuple):
    """Rows `start` to `end` of those with one token, n of them, that read m pages each: `pages` [n * K * m], put side
    by side, and `hidden` [n, 1, 1, m * P], which is added to their scores."""

    start: int
    end: int
    pages: Tensor
    hidden: Tensor


@dataclass(frozen=True, kw_only=True)
class Singles:
    """Rows of one token, those of about one length together; prompts that they share they read besides, on a CPU."""

    start: int
    end: int
    rows: list[Rows]
    prompts: Prompts | None

    def read(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        num_rows, num_heads, width = query.shape
        num_keys = keys.shape[1]
        # the queries of a key head are tokens of one sequence to it
        query = query.reshape(num_rows, num_keys, num_heads // num_keys, width)
        attend = _attend if self.prompts is None else _attend_weighed
        parts = []
        for rows in self.rows:
            k, v = (side_by_side(store, rows.pages, rows.end - rows.start) for store in (keys, values))
            parts.append(attend(query[rows.start : rows.end], k, v, rows.hidden, scaling))
        out, weight = (torch.cat(found) for found in zip(*parts))
        if self.prompts is not None:
            readers = self.prompts.rows
            shared, its_weight = _read_prompts(query, keys, values, self.prompts, scaling)
            share = (its_weight - weight.index_select(0, readers)).sigmoid_()[..., None].to(out)
            out.index_copy_(0, readers, out.index_select(0, readers).lerp_(shared, share))
        return out.flatten(1, 2)


def _read_prompts(
    query: Tensor, keys: Tensor, values: Tensor, prompts: Prompts, scaling: float
) -> tuple[Tensor, Tensor]:
    """The rows that share a prompt over its pages: [n, K, R, D] -> [m, K, R, D], log-sum-exps [m, K, R]."""
    _, num_keys, repeats, width = query.shape
    num_groups = len(prompts.hidden)
    # siblings are tokens of one sequence to their prompt
    by_group = query.index_select(0, prompts.readers).view(num_groups, -1, num_keys, repeats, width).transpose(1, 2)
    k, v = (side_by_side(store, prompts.pages, num_groups) for store in (keys, values))
    out, weight = _attend_weighed(by_group.reshape(num_groups, num_keys, -1, width), k, v, prompts.hidden, scaling)
    out = out.view(by_group.shape).transpose(1, 2).reshape(-1, num_keys, repeats, width)
    weight = weight.view(by_group.shape[:-1]).transpose(1, 2).reshape(-1, num_keys, repeats)
    return out.index_select(0, prompts.places), weight.index_select(0, prompts.places)


def _attend(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=hidden.to(query), scale=scaling)
    return out, out.new_empty(len(out))


def _attend_weighed(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """What SDPA calls on a CPU, which tells the log-sum-exp of each query's scores as well."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=hidden.to(query), scale=scaling
    )


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Tokens of one sequence that has its `pages` [K * M], after `num_before` others. If there are any, `seen`
    [n, num_before + n] marks the keys that each token sees."""

    start: int
    end: int
    pages: Tensor
    num_before: int
    seen: Tensor | None

    def read(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        num_keys = self.num_before + len(query)
        k, v = (side_by_side(store, self.pages)[:, :, :num_keys] for store in (keys, values))
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            k,
            v,
            attn_mask=None if self.seen is None else self.seen.to(query.device),
            is_causal=self.seen is None,
            scale=scaling,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)


@dataclass(frozen=True, kw_only=True)
class Varlen:
    """Rows of one token or more over their `pages` [S, M] by torch's own paged attention, on a GPU. Not run there yet.

    Of each of S rows: where its tokens begin in the part and, last, where they end, `cu_seqlens` [S + 1], and how many
    ids it has, `used` [S]; all three int32.
    """

    start: int
    end: int
    cu_seqlens: Tensor
    used: Tensor
    pages: Tensor
    longest_query: int
    longest: int

    def read(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        from torch.nn.attention import varlen  # not in every torch that is taken

        device = query.device
        out = varlen.varlen_attn(
            query,
            keys.transpose(1, 2),
            values.transpose(1, 2),
            self.cu_seqlens.to(device),
            None,
            self.longest_query,
            self.longest,
            scale=scaling,
            window_size=(-1, 0),
            enable_gqa=True,
            seqused_k=self.used.to(device),
            block_table=self.pages.to(device),
        )
        assert isinstance(out, Tensor)
        return out


@dataclass(frozen=True, kw_only=True)
class Alone:
    """Exact mode: rows of one token or more, no sum of which depends on another row; those of one token come first.

    Of each row: where its tokens begin and, last, where they end, its pages [K * M], and how many ids were before them.
    """

    start: int
    end: int
    starts: list[int]
    pages: list[Tensor]
    num_before: list[int]

    def read(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        cached = [[side_by_side(store, pages)[0].transpose(0, 1) for store in (keys, values)] for pages in self.pages]
        num_single = sum(end - start == 1 for start, end in pairwise(self.starts))
        parts = []
        if num_single:
            k, v = (pad_sequence(list(stores), batch_first=True) for stores in zip(*cached[:num_single]))
            positions = torch.tensor(self.num_before[:num_single], device=keys.device)
            parts.append(exact_decode_attention(query[:num_single], k, v, positions, scale=scaling))
        spans = [*pairwise(self.starts)]
        for (start, end), before, (k, v) in [*zip(spans, self.num_before, cached)][num_single:]:
            positions = torch.arange(before, before + end - start, device=keys.device)
            parts.append(exact_attention(query[start:end], k, v, positions, scale=scaling))
        return torch.cat(parts)


def side_by_side(store: Tensor, pages: Tensor, num_rows: int = 1) -> Tensor:
    """The pages of each row in their order, `pages` [n * K * M] being places among the pages of all heads:
    [N, K, P, D] -> [n, K, M * P, D]."""
    num_keys, width = store.shape[1], store.shape[3]
    found = store.flatten(0, 1).index_select(0, pages.to(store.device))
    return found.view(num_rows, num_keys, -1, width)


AttentionInterface.register(PAGED, paged_attention)
AttentionMaskInterface.register(PAGED, sdpa_mask)
