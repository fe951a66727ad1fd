"""The computing of the engine: one pass of the model over what the scheduler chose.

Legend: T tokens of a pass, N pages, G rows that read a page, P tokens of a page, D model width, V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Some
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from looktwice.engine.attention import HIDDEN, Chunk, Pass, Reads, Rows
from looktwice.engine.cache import Cache
from looktwice.engine.scheduler import Feed
from looktwice.engine.state import Sequence
from looktwice.model.exact import is_exact
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.processing.images import PatchedImage

MOST_PATCHES = 16384
"""Patches that the tower reads at once: it bounds the memory of its activations."""
SHARED_TOKENS = 512
"""Tokens of a prompt that siblings share, from which on it is read once for all of them: below that, reading page by
page costs more than reading it again."""
PADDED_PAGES = 64
"""Pages that rows put together may read for nothing, before the shorter ones are read by themselves."""


class ImageFeatures:
    """Vectors of pictures by content, the longest unused forgotten first, `max_bytes` of them at most."""

    def __init__(self, model: Ovis2_5ForConditionalGeneration, *, max_bytes: int) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self.num_encoded = 0
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()

    def of(self, images: Some[PatchedImage]) -> dict[bytes, Tensor]:
        """The vectors [A, D] of each picture; equal pictures are encoded once."""
        found = {image.key: self._known[image.key] for image in images if image.key in self._known}
        missing = {image.key: image for image in images if image.key not in found}
        for batch in _batches([*missing.values()]):
            found |= zip([image.key for image in batch], self._encode(batch))
        for key, features in found.items():
            self._known[key] = features
            self._known.move_to_end(key)
        while sum(features.nbytes for features in self._known.values()) > self.max_bytes:
            self._known.popitem(last=False)
        return found

    def _encode(self, images: list[PatchedImage]) -> Some[Tensor]:
        self.num_encoded += len(images)
        pixels = torch.cat([image.pixel_values for image in images]).to(self.model.device)
        grids = torch.tensor([image.grid_thw for image in images], device=self.model.device)
        features = self.model.get_image_features(pixels, grids)
        if len(images) == 1:
            return [features]
        # copies, so that a forgotten picture's memory is free although those of its batch are kept
        return [one.clone() for one in features.split([image.num_tokens for image in images])]


def _batches(images: list[PatchedImage]) -> Iterator[list[PatchedImage]]:
    batch: list[PatchedImage] = []
    for image in images:
        if batch and sum(len(one.pixel_values) for one in [*batch, image]) > MOST_PATCHES:
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch


class Runner:
    """Feeds what a pass feeds to the model, and advances the sequences."""

    def __init__(self, model: Ovis2_5ForConditionalGeneration, cache: Cache, features: ImageFeatures) -> None:
        self.model = model
        self.cache = cache
        self.features = features
        self.visual_ids = frozenset(model.config.visual_token_ids)

    def embed(self, feeds: Some[Feed]) -> None:
        """Give the sequences that feed pictures or several ids the vectors of all their pending ids."""
        pending = [
            feed.sequence
            for feed in feeds
            if feed.sequence.embeds is None
            and (feed.sequence.num_pending > 1 or feed.sequence.ids[-1] in self.visual_ids)
        ]
        shown = {sequence: self._pending_images(sequence) for sequence in pending}
        features = self.features.of([image for images in shown.values() for image in images])
        for sequence, images in shown.items():
            ids = torch.tensor([sequence.ids[sequence.num_cached :]], device=self.model.device)
            vectors = torch.cat([features[image.key] for image in images]) if images else None
            sequence.embeds = self.model.model.embed(ids, vectors)[0]
            sequence.embeds_start = sequence.num_cached

    def _pending_images(self, sequence: Sequence) -> list[PatchedImage]:
        """The pictures whose atoms are not in the cache; a picture is there as a whole, or not at all."""
        cached = sequence.ids[: sequence.num_cached].count(self.model.config.image_token_id)
        starts = accumulate((image.num_tokens for image in sequence.images), initial=0)
        return [image for image, start in zip(sequence.images, starts) if start >= cached]

    def forward(self, feeds: list[Feed]) -> Tensor:
        """Feed the ids; logits [S, V] after the last id of each sampled feed, in order. `embed` comes before it."""
        single = sorted((feed for feed in feeds if feed.count == 1), key=lambda feed: -len(feed.sequence.pages))
        ordered = [*single, *(feed for feed in feeds if feed.count > 1)]
        # under exact mode every feed is a chunk: nobody reads for its siblings
        paged, positions = self._pass(ordered, 0 if is_exact() else len(single))
        hidden = self.model.model.language_model(
            inputs_embeds=self._vectors(ordered)[None],
            # a mapping keeps transformers from building a mask
            attention_mask={"full_attention": None, "sliding_attention": None},
            position_ids=positions[None],
            use_cache=False,
            paged=paged,
        ).last_hidden_state[0]
        ends = dict(zip(ordered, accumulate(feed.count for feed in ordered)))
        last = [ends[feed] - 1 for feed in feeds if feed.is_sampled]
        for feed in feeds:
            feed.sequence.num_cached += feed.count
            if not feed.sequence.num_pending:
                feed.sequence.embeds = None
        rows = torch.tensor(last, dtype=torch.long, device=hidden.device)
        return self.model.lm_head(hidden[rows]).to(self.model.device)

    def _vectors(self, feeds: list[Feed]) -> Tensor:
        """Vectors of all fed ids [T, D]: sampled ids are looked up at once."""
        looked_up = [feed for feed in feeds if feed.sequence.embeds is None]
        table = self.model.get_input_embeddings()
        ids = torch.tensor([feed.sequence.ids[-1] for feed in looked_up], dtype=torch.long, device=self.model.device)
        found = table(ids)
        if len(looked_up) == len(feeds):
            return found
        upcoming = iter(found.split(1))
        parts = []
        for feed in feeds:
            sequence = feed.sequence
            if sequence.embeds is None:
                parts.append(next(upcoming))
            else:
                start = sequence.num_cached - sequence.embeds_start
                parts.append(sequence.embeds[start : start + feed.count])
        return torch.cat([part.to(found) for part in parts])

    def _pass(self, feeds: list[Feed], num_single: int) -> tuple[Pass, Tensor]:
        """Where the tokens go and what they read, and their positions [T]."""
        size, device = self.cache.page_size, self.model.device
        places = [np.arange(feed.sequence.num_cached, feed.sequence.num_cached + feed.count) for feed in feeds]
        pages = [np.array(feed.sequence.pages)[at // size] for feed, at in zip(feeds, places)]
        positions = np.concatenate(places)
        stored = torch.from_numpy(np.stack([np.concatenate(pages), positions % size, positions])).to(device)
        chunks, start = [], num_single
        for feed in feeds[num_single:]:
            own = torch.from_numpy(self._of_heads(np.array([feed.sequence.pages]))).to(device)
            seen = self._seen(feed) if feed.sequence.num_cached else None
            chunks.append(Chunk(start, start + feed.count, own, feed.sequence.num_cached, seen))
            start += feed.count
        singles = [feed.sequence for feed in feeds[:num_single]]
        groups = self._groups(singles)
        paged = Pass(
            cache=self.cache,
            pages=stored[0],
            offsets=stored[1],
            num_single=num_single,
            rows=[] if groups else self._rows(singles),
            reads=self._reads(singles, groups) if groups else [],
            chunks=chunks,
        )
        return paged, stored[2]

    def _seen(self, feed: Feed) -> Tensor:
        """Which of all keys each id of a chunk sees."""
        before = feed.sequence.num_cached
        everything = torch.ones(feed.count, before + feed.count, dtype=torch.bool, device=self.model.device)
        return everything.tril(before)

    def _rows(self, singles: list[Sequence]) -> list[Rows]:
        """Rows of about one length together; they come with the longest first."""
        found, start, padded = [], 0, 0
        for place, row in enumerate(singles):
            padded += len(singles[start].pages) - len(row.pages)
            if padded > PADDED_PAGES:
                found.append(self._side_by_side(singles[start:place], start))
                start, padded = place, 0
        if singles:
            found.append(self._side_by_side(singles[start:], start))
        return found

    def _side_by_side(self, rows: list[Sequence], start: int) -> Rows:
        widest, size, device = len(rows[0].pages), self.cache.page_size, self.model.device
        pages = np.array([row.pages + [0] * (widest - len(row.pages)) for row in rows])
        lengths = np.array([row.num_cached + 1 for row in rows])
        hidden = np.where(np.arange(widest * size) < lengths[:, None], 0.0, HIDDEN).astype(np.float32)
        return Rows(
            start,
            start + len(rows),
            torch.from_numpy(self._of_heads(pages)).to(device),
            torch.from_numpy(hidden[:, None, None]).to(device),
        )

    def _of_heads(self, pages: np.ndarray) -> np.ndarray:
        """Pages [n, m] as places among the pages of all K heads [n * K * m], a row's head by head."""
        num_keys = self.model.config.llm_config.num_key_value_heads
        return (pages[:, None] * num_keys + np.arange(num_keys)[:, None]).ravel()

    def _groups(self, rows: list[Sequence]) -> dict[int, list[int]]:
        """Siblings by the first page of their prompt, where reading it once for all of them pays."""
        siblings: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            if row.num_shared:
                siblings.setdefault(row.pages[0], []).append(place)
        return {
            first: places
            for first, places in siblings.items()
            if len(places) > 1 and rows[places[0]].num_shared * self.cache.page_size >= SHARED_TOKENS
        }

    def _reads(self, rows: list[Sequence], groups: dict[int, list[int]]) -> list[Reads]:
        """What rows that feed one id read page by page: pages of groups once for all siblings, the others by row."""
        firsts = [row.num_shared if row.pages[0] in groups else 0 for row in rows]
        reads = [self._own_reads(rows, firsts)]
        by_size: dict[int, list[list[int]]] = {}
        for places in groups.values():
            # groups of about one size go together: what is short of it reads for nobody
            by_size.setdefault((len(places) - 1).bit_length(), []).append(places)
        return reads + [self._shared_reads(rows, same) for same in by_size.values()]

    def _own_reads(self, rows: list[Sequence], firsts: list[int]) -> Reads:
        """Each row's pages but its first few, one reader a page."""
        size = self.cache.page_size
        pages = np.concatenate([row.pages[first:] for row, first in zip(rows, firsts)]).astype(np.int64)
        counts = [len(row.pages) - first for row, first in zip(rows, firsts)]
        readers = np.repeat(np.arange(len(rows)), counts)
        filled = np.full(len(pages), size)
        ends = np.cumsum(counts) - 1
        filled[ends] = [row.num_cached % size + 1 for row in rows]
        return self._reads_of(pages, readers[:, None], filled)

    def _shared_reads(self, rows: list[Sequence], groups: list[list[int]]) -> Reads:
        widest = max(map(len, groups))
        pages = [page for places in groups for page in rows[places[0]].pages[: rows[places[0]].num_shared]]
        readers = [
            places + [len(rows)] * (widest - len(places))
            for places in groups
            for _ in range(rows[places[0]].num_shared)
        ]
        return self._reads_of(np.array(pages), np.array(readers), np.full(len(pages), self.cache.page_size))

    def _reads_of(self, pages: np.ndarray, readers: np.ndarray, filled: np.ndarray) -> Reads:
        device = self.model.device
        hidden = np.where(np.arange(self.cache.page_size) < filled[:, None], 0.0, HIDDEN).astype(np.float32)
        return Reads(
            torch.from_numpy(pages).to(device),
            torch.from_numpy(readers).to(device),
            torch.from_numpy(hidden).to(device),
        )
