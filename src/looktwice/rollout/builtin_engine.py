"""The built-in engine: all live rollouts advance together, each from its own place in one key-value cache.

A prompt and its picture are computed once for all siblings of a group; a crop continues from the cache with only its
own pixels.

Legend: B live rows, Q new tokens of a row, K key heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from looktwice.calls import TOOL_CALL_CLOSE
from looktwice.model.attention import PACKED_SDPA
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.processing.images import PatchedImage
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.rollout.engine import Request, Respond, Segment
from looktwice.rollout.sampling import Sampling, sample

PREFILL_TOKENS = 16384
"""Prompts are computed together up to this many tokens, padding counted: it bounds the memory of activations."""


class RowCache:
    """Keys and values of many rows, each with its own length. transformers' layers call `update`.

    New tokens are written at their row's own position, so rows of any length share one tensor without holes: what
    lies beyond a row's length is hidden by the causal mask and overwritten later.
    """

    def __init__(self, num_layers: int, *, num_rows: int) -> None:
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.num_rows = num_rows
        self.capacity = 0
        self.length = 0

    def aim(self, rows: list[int], positions: Tensor, length: int) -> None:
        """Where the next forward writes: `rows` [B], `positions` [B, Q]; it reads the first `length` places."""
        self.rows = torch.tensor(rows, device=positions.device)
        self.positions, self.length = positions, length
        self.is_prefix = rows == list(range(len(rows)))
        if (needed := int(positions.max()) + 1) > self.capacity:
            self.capacity = needed + max(64, needed // 4)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write [B, K, Q, D] and give back [B, K, length, D]."""
        return self._write(self.keys, key, layer), self._write(self.values, value, layer)

    def _write(self, store: list[Tensor | None], new: Tensor, layer: int) -> Tensor:
        old = store[layer]
        if old is None or old.shape[2] < self.capacity:
            grown = new.new_zeros(self.num_rows, new.shape[1], self.capacity, new.shape[3])
            if old is not None:
                grown[:, :, : old.shape[2]] = old
            store[layer] = old = grown
        # layers may be spread over several GPUs, and an index must be where its tensor is
        rows, positions = self.rows.to(old.device), self.positions.to(old.device)
        old[rows[:, None], :, positions] = new.transpose(1, 2)
        # the live rows are always the first ones, so decoding reads a view and copies nothing
        live = old[: len(rows)] if self.is_prefix else old[rows]
        return live[:, :, : self.length]

    def copy_row(self, source: int, targets: list[int], length: int) -> None:
        """Give rows `targets` the first `length` places of row `source`."""
        for store in (self.keys, self.values):
            for tensor in store:
                # a clone, because torch refuses to copy within one tensor when the row is full
                tensor[targets, :, :length] = tensor[source, :, :length].clone()  # type: ignore[index]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.length


@dataclass(kw_only=True)
class Row:
    """A live rollout: its number, how many ids are in the cache, what it sampled since the last decision."""

    number: int
    budget: int
    length: int = 0
    next_id: int | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class BuiltinEngine:
    """Runs on the model itself, in eval mode and without gradients.

    `stop_ids` end a segment and stay in it. `forbidden_ids` are never sampled. `max_rows` rollouts live at a time;
    when one ends, a waiting one takes its place.
    """

    def __init__(
        self,
        model: Ovis2_5ForConditionalGeneration,
        *,
        sampling: Sampling,
        stop_ids: Sequence[int],
        forbidden_ids: Sequence[int],
        max_rows: int = 64,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model = model
        self.sampling = sampling
        self.stop_ids = frozenset(stop_ids)
        self.forbidden = torch.tensor(list(forbidden_ids), dtype=torch.long, device=model.device)
        self.max_rows = max_rows
        self.generator = generator

    @classmethod
    def for_answers(
        cls,
        model: Ovis2_5ForConditionalGeneration,
        processor: Ovis2_5Processor,
        sampling: Sampling,
        *,
        max_rows: int,
        seed: int | None,
    ) -> BuiltinEngine:
        """An engine whose segments end where look-twice answers need a decision: after a call, or with the turn.

        Without a seed it samples from torch's own generator, which a caller may seed by `torch.manual_seed`.
        """
        return cls(
            model,
            sampling=sampling,
            stop_ids=[processor.template.token_id(TOOL_CALL_CLOSE), *processor.end_ids],
            forbidden_ids=processor.config.visual_token_ids,
            max_rows=max_rows,
            generator=None if seed is None else torch.Generator(model.device).manual_seed(seed),
        )

    def run(self, requests: Sequence[Request], respond: Respond) -> None:
        with torch.no_grad(), _sampling_mode(self.model):
            _Run(self, requests, respond).finish()


class _Run:
    """The state of one `run`: waiting requests, live rows (the first rows of the cache), the cache."""

    def __init__(self, engine: BuiltinEngine, requests: Sequence[Request], respond: Respond) -> None:
        self.engine = engine
        self.model = engine.model
        self.device = engine.model.device
        self.respond = respond
        self.rows: list[Row] = []
        self.forced: dict[int, tuple[list[int], list[PatchedImage]]] = {}
        self.waiting: deque[tuple[int, Request]] = deque()
        number = 0
        for request in requests:
            # a group larger than the engine is admitted in parts, its prompt computed once for each
            for first in range(0, request.num_rollouts, engine.max_rows):
                part = replace(request, num_rollouts=min(engine.max_rows, request.num_rollouts - first))
                self.waiting.append((number + first, part))
            number += request.num_rollouts
        num_layers = self.model.config.llm_config.num_hidden_layers
        self.cache = RowCache(num_layers, num_rows=min(engine.max_rows, number))

    def finish(self) -> None:
        while self.waiting or self.rows:
            if self.forced:
                self._insert()
            elif self._has_room():
                self._admit()
            else:
                self._decode()
            self._settle()

    def _has_room(self) -> bool:
        return bool(self.waiting) and len(self.rows) + self.waiting[0][1].num_rollouts <= self.engine.max_rows

    def _admit(self) -> None:
        """Compute waiting prompts into free rows, and share each with its siblings."""
        groups: list[range] = []
        forced: dict[int, tuple[list[int], list[PatchedImage]]] = {}
        longest = 0
        while self._has_room():
            longest = max(longest, len(self.waiting[0][1].prompt))
            if forced and longest * (len(forced) + 1) > PREFILL_TOKENS:
                break
            number, request = self.waiting.popleft()
            group = range(len(self.rows), len(self.rows) + request.num_rollouts)
            groups.append(group)
            forced[group[0]] = (request.prompt.input_ids, request.prompt.images)
            self.rows += [Row(number=number + i, budget=request.max_new_tokens) for i in range(len(group))]
        logits = self._extend(forced)
        for group, group_logits in zip(groups, logits):
            length = self.rows[group[0]].length
            self.cache.copy_row(group[0], list(group[1:]), length)
            for place in group[1:]:
                self.rows[place].length = length
            self._sample(list(group), group_logits.expand(len(group), -1))

    def _insert(self) -> None:
        """Feed what was put into rows from outside: crops and tool texts."""
        forced, self.forced = self.forced, {}
        self._sample(list(forced), self._extend(forced))

    def _decode(self) -> None:
        ids = torch.tensor([[row.next_id] for row in self.rows], device=self.device)
        logits = self._forward(list(range(len(self.rows))), ids, None, [1] * len(self.rows))
        self._sample(list(range(len(self.rows))), logits)

    def _extend(self, forced: dict[int, tuple[list[int], list[PatchedImage]]]) -> Tensor:
        """Feed each row its pending sampled id and its forced ids; logits after the last of them [B, V]."""
        chunks = []
        for place, (ids, _) in forced.items():
            pending = self.rows[place].next_id
            chunks.append(ids if pending is None else [pending, *ids])
        longest = max(len(chunk) for chunk in chunks)
        padded = torch.tensor([chunk + [0] * (longest - len(chunk)) for chunk in chunks], device=self.device)
        images = [image for _, shown in forced.values() for image in shown]
        features = self._features(images) if images else None
        return self._forward(list(forced), padded, features, [len(chunk) for chunk in chunks])

    def _features(self, images: list[PatchedImage]) -> Tensor:
        pixels = torch.cat([image.pixel_values for image in images]).to(self.device)
        grids = torch.tensor([image.grid_thw for image in images], device=self.device)
        return self.model.get_image_features(pixels, grids)

    def _forward(self, places: list[int], ids: Tensor, features: Tensor | None, counts: list[int]) -> Tensor:
        """Feed ids [B, Q], of which `counts` are real, to the rows at `places`; logits after the last real one."""
        lengths = torch.tensor([self.rows[place].length for place in places], device=self.device)
        positions = lengths[:, None] + torch.arange(ids.shape[1], device=self.device)
        length = max(self.rows[place].length + count for place, count in zip(places, counts))
        self.cache.aim(places, positions, length)
        keys = torch.arange(length, device=self.device)
        mask = keys[None, None, None, :] <= positions[:, None, :, None]
        hidden = self.model.model.language_model(
            inputs_embeds=self.model.model.embed(ids, features),
            attention_mask={"full_attention": mask, "sliding_attention": mask},
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        for place, count in zip(places, counts):
            self.rows[place].length += count
        last = torch.tensor(counts, device=hidden.device) - 1
        rows = torch.arange(len(places), device=hidden.device)
        return self.model.lm_head(hidden[rows, last]).to(self.device)

    def _sample(self, places: list[int], logits: Tensor) -> None:
        engine = self.engine
        ids, logprobs = sample(logits, engine.sampling, engine.forbidden, engine.generator)
        for place, token, logprob in zip(places, ids.tolist(), logprobs.tolist()):
            row = self.rows[place]
            row.next_id = token
            row.ids.append(token)
            row.logprobs.append(logprob)

    def _settle(self) -> None:
        """Ask the caller about every row whose segment is complete; drop the rows that are over."""
        over: list[int] = []
        for place, row in enumerate(self.rows):
            is_stopped = bool(row.ids) and row.ids[-1] in self.engine.stop_ids
            if not is_stopped and len(row.ids) < row.budget:
                continue
            next_step = self.respond(row.number, Segment(ids=row.ids, logprobs=row.logprobs, is_stopped=is_stopped))
            if next_step is None:
                over.append(place)
                continue
            row.ids, row.logprobs, row.budget = [], [], next_step.max_new_tokens
            self.forced[place] = (next_step.ids, next_step.images)
        for place in reversed(over):
            self._drop(place)

    def _drop(self, place: int) -> None:
        """Free a row by moving the last live row into its place, so that live rows stay the first ones."""
        last = len(self.rows) - 1
        if place != last:
            self.cache.copy_row(last, [place], self.rows[last].length)
            self.rows[place] = self.rows[last]
            if last in self.forced:
                self.forced[place] = self.forced.pop(last)
        self.rows.pop()


@contextmanager
def _sampling_mode(model: Ovis2_5ForConditionalGeneration) -> Iterator[None]:
    """Eval mode, and the attention that takes the engine's masks."""
    was_training, text_config = model.training, model.config.llm_config
    attention = text_config._attn_implementation
    model.eval()
    text_config._attn_implementation = PACKED_SDPA
    try:
        yield
    finally:
        model.train(was_training)
        text_config._attn_implementation = attention
