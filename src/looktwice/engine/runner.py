"""The computing of the engine: one pass of the model over what the scheduler chose.

Legend: T tokens of a pass, A visual tokens of a picture, S sampled rows, D model width, V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Some
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from looktwice.engine.attention import Pass
from looktwice.engine.cache import Cache
from looktwice.engine.reading import Reading, reading_order
from looktwice.engine.scheduler import Feed
from looktwice.engine.state import Sequence
from looktwice.model.adapter_bank import AdapterBank
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.precision import autocast_dtype
from looktwice.processing.images import PatchedImage

MOST_PATCHES = 16384
"""Patches that the tower reads at once: it bounds the memory of its activations."""


Encode = Callable[[Tensor, Tensor], Tensor]


class ImageFeatures:
    """Vectors of pictures by content, the longest unused forgotten first, `max_bytes` of them at most.

    `encode` makes vectors [A, D] of pictures [P, C * p * p], [I, 3] on the host.
    """

    def __init__(self, encode: Encode, *, max_bytes: int) -> None:
        self.encode = encode
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
        pixels = torch.cat([image.pixel_values for image in images])
        features = self.encode(pixels, torch.tensor([image.grid_thw for image in images]))
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

    def __init__(
        self,
        model: Ovis2_5ForConditionalGeneration,
        cache: Cache,
        features: ImageFeatures,
        adapters: AdapterBank | None = None,
    ) -> None:
        self.model = model
        self.adapters = adapters or AdapterBank(model)
        self.cache = cache
        self.features = features
        num_keys = model.config.llm_config.num_key_value_heads
        self.reading = Reading(page_size=cache.page_size, num_keys=num_keys, device=model.device)
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
        ordered = reading_order(feeds)
        paged, positions = self._pass(ordered)
        with self.adapters.routed([(feed.sequence.adapter, feed.count) for feed in ordered]):
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

    def _pass(self, feeds: list[Feed]) -> tuple[Pass, Tensor]:
        """Where the tokens go and what they read, and their positions [T]."""
        size, device = self.cache.page_size, self.model.device
        places = [np.arange(feed.sequence.num_cached, feed.sequence.num_cached + feed.count) for feed in feeds]
        pages = [np.array(feed.sequence.pages)[at // size] for feed, at in zip(feeds, places)]
        positions = np.concatenate(places)
        stored = torch.from_numpy(np.stack([np.concatenate(pages), positions % size, positions])).to(device)
        readers = self.reading.readers(feeds, autocast_dtype(device, self.model.dtype))
        return Pass(cache=self.cache, pages=stored[0], offsets=stored[1], readers=readers), stored[2]
