"""How the tokens of a pass read the cache: which reader of `attention.py` has them, made from the rows' pages.

Rows of one token are put side by side, and on a CPU siblings read their prompt together. On a GPU, in half precision,
torch's own paged attention reads for all rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence as Some
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from looktwice.engine.attention import HIDDEN, Alone, Chunk, Prompts, Reader, Rows, Singles, Varlen
from looktwice.engine.scheduler import Feed
from looktwice.engine.state import Sequence
from looktwice.model.attention import has_varlen
from looktwice.model.exact import is_exact

PAGED_TOKENS = 256
"""Tokens of a page must be a multiple of it for torch's paged attention."""
SHARED_TOKENS = 128
"""Tokens of a prompt that siblings share, from which on they read it together; below that it gains nothing."""
PADDED_PAGES = 64
"""Pages that rows put together may read for nothing, before the shorter ones are read by themselves."""


class Reading:
    """Makes the readers of passes over a cache of pages of `page_size` tokens with `num_keys` key heads."""

    def __init__(self, *, page_size: int, num_keys: int, device: torch.device) -> None:
        self.page_size = page_size
        self.num_keys = num_keys
        self.device = device
        is_gpu = device.type == "cuda"
        self.has_paged_attention = (
            is_gpu
            and has_varlen("block_table")
            and torch.cuda.get_device_capability(device) >= (8, 0)
            and not page_size % PAGED_TOKENS
        )

    def readers(self, feeds: list[Feed], dtype: torch.dtype) -> list[Reader]:
        """Who reads what, of feeds in `reading_order`, when attention is computed in `dtype`."""
        if is_exact():
            return [self._alone(feeds)]
        if self.has_paged_attention and dtype in (torch.bfloat16, torch.float16):
            return [self._varlen(feeds)]
        singles = [feed.sequence for feed in feeds if feed.count == 1]
        found: list[Reader] = [self._singles(singles)] if singles else []
        start = len(singles)
        for feed in feeds[start:]:
            found.append(self._chunk(feed, start))
            start += feed.count
        return found

    def _singles(self, rows: list[Sequence]) -> Singles:
        groups = self._groups(rows) if self.device.type == "cpu" else []
        firsts = [0] * len(rows)
        for group in groups:
            for place in group:
                firsts[place] = rows[place].num_shared
        own = [row.pages[first:] for row, first in zip(rows, firsts)]
        lengths = [row.num_cached + 1 - first * self.page_size for row, first in zip(rows, firsts)]
        parts, start, padded = [], 0, 0
        for place, pages in enumerate(own):
            padded += abs(len(own[start]) - len(pages))
            if padded > PADDED_PAGES:
                parts.append((start, place))
                start, padded = place, 0
        parts.append((start, len(rows)))
        return Singles(
            start=0,
            end=len(rows),
            rows=[Rows(*part, *self._side_by_side(own[slice(*part)], lengths[slice(*part)])) for part in parts],
            prompts=self._prompts(rows, groups) if groups else None,
        )

    def _groups(self, rows: list[Sequence]) -> list[list[int]]:
        """Places of the rows that read a prompt together."""
        siblings: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            if row.num_shared and row.num_shared * self.page_size >= SHARED_TOKENS:
                siblings.setdefault(row.pages[0], []).append(place)
        return [group for group in siblings.values() if len(group) > 1]

    def _prompts(self, rows: list[Sequence], groups: list[list[int]]) -> Prompts:
        shared = [rows[group[0]].pages[: rows[group[0]].num_shared] for group in groups]
        widest = max(map(len, groups))
        readers = [group + group[:1] * (widest - len(group)) for group in groups]
        places = [number * widest + place for number, group in enumerate(groups) for place in range(len(group))]
        return Prompts(
            *self._side_by_side(shared, [len(pages) * self.page_size for pages in shared]),
            readers=self._to(np.concatenate(readers)),
            rows=self._to(np.concatenate(groups)),
            places=self._to(np.array(places)),
        )

    def _side_by_side(self, pages: Some[list[int]], lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Places of the pages of n rows [n * K * m], and what hides what is behind their lengths [n, 1, 1, m * P]."""
        widest = max(map(len, pages))
        padded = np.array([some + [0] * (widest - len(some)) for some in pages])
        places = np.arange(widest * self.page_size)
        hidden = np.where(places < np.array(lengths)[:, None], 0.0, HIDDEN).astype(np.float32)
        return self._of_heads(padded), self._to(hidden[:, None, None])

    def _of_heads(self, pages: np.ndarray) -> Tensor:
        """Pages [n, m] as places among the pages of all heads [n * K * m], a row's head by head."""
        return self._to((pages[:, None] * self.num_keys + np.arange(self.num_keys)[:, None]).ravel())

    def _chunk(self, feed: Feed, start: int) -> Chunk:
        before, seen = feed.sequence.num_cached, None
        if before:
            seen = torch.ones(feed.count, before + feed.count, dtype=torch.bool, device=self.device).tril(before)
        pages = self._of_heads(np.array([feed.sequence.pages]))
        return Chunk(start=start, end=start + feed.count, pages=pages, num_before=before, seen=seen)

    def _varlen(self, feeds: list[Feed]) -> Varlen:
        counts = [feed.count for feed in feeds]
        used = [feed.sequence.num_cached + feed.count for feed in feeds]
        widest = max(len(feed.sequence.pages) for feed in feeds)
        pages = [feed.sequence.pages + [0] * (widest - len(feed.sequence.pages)) for feed in feeds]
        cu_seqlens = [0, *accumulate(counts)]
        return Varlen(
            start=0,
            end=cu_seqlens[-1],
            cu_seqlens=self._to(np.array(cu_seqlens, dtype=np.int32)),
            used=self._to(np.array(used, dtype=np.int32)),
            pages=self._to(np.array(pages, dtype=np.int32)),
            longest_query=max(counts),
            longest=max(used),
        )

    def _alone(self, feeds: list[Feed]) -> Alone:
        starts = [0, *accumulate(feed.count for feed in feeds)]
        return Alone(
            start=0,
            end=starts[-1],
            starts=starts,
            pages=[self._of_heads(np.array([feed.sequence.pages])) for feed in feeds],
            num_before=[feed.sequence.num_cached for feed in feeds],
        )

    def _to(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)


def reading_order(feeds: Some[Feed]) -> list[Feed]:
    """Feeds of one id first, those with the most pages of their own first of all."""
    return sorted(feeds, key=lambda feed: (feed.count > 1, feed.sequence.num_shared - len(feed.sequence.pages)))
