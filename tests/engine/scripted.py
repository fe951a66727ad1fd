"""A model without mathematics for the engine: logits are a function of the ids that stand in the pages."""

from __future__ import annotations

from collections.abc import Sequence as Some
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from looktwice.engine.builtin import BuiltinEngine
from looktwice.engine.cache import Cache
from looktwice.engine.interface import Continuation, Request, Segment, StopCause
from looktwice.engine.sampling import Sampling, draw, mixed_seed, uniforms
from looktwice.engine.scheduler import Feed
from looktwice.processing.processor import Example

VOCABULARY = 16
NOTHING = torch.tensor([], dtype=torch.long)


def logits_after(ids: Some[int]) -> Tensor:
    """Any function of all the ids will do; draws far apart from each other make near-ties impossible."""
    state = mixed_seed(*ids)
    return torch.from_numpy(np.random.default_rng(state).normal(size=VOCABULARY).astype(np.float32)) * 2


class ScriptedRunner:
    """Writes ids into the pages in the place of keys, and reads them back before it gives logits."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.features = type("NoPictures", (), {"num_encoded": 0})()
        self.written: list[int] = []

    def embed(self, feeds: Some[Feed]) -> None:
        pass

    def forward(self, feeds: list[Feed]) -> Tensor:
        rows = []
        for feed in feeds:
            sequence, size = feed.sequence, self.cache.page_size
            places = range(sequence.num_cached, sequence.num_cached + feed.count)
            pages = [sequence.pages[place // size] for place in places]
            shared = [page for page in pages if self.cache.holders[page] != 1]
            assert not shared, f"written while shared: {shared}"
            ids = torch.tensor([sequence.ids[place] for place in places], dtype=torch.float64)[None, :, None]
            offsets = torch.tensor([place % size for place in places])
            self.cache.write(0, ids, ids, torch.tensor(pages), offsets)
            is_sampled = feed.is_sampled
            sequence.num_cached += feed.count
            keys = self.cache.keys[0]
            assert keys is not None
            found = keys[torch.tensor(sequence.pages)].flatten()[: sequence.num_cached]
            assert found.int().tolist() == sequence.ids[: sequence.num_cached], "the pages hold something else"
            if is_sampled:
                rows.append(logits_after(sequence.ids))
        return torch.stack(rows) if rows else torch.empty(0, VOCABULARY)


@dataclass(kw_only=True)
class Plan:
    """A driver that goes on after set numbers of ids with set ids, and remembers all."""

    budgets: list[int]
    inserted: list[list[int]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    heard: list[int] = field(default_factory=list)
    stops: list[StopCause] = field(default_factory=list)
    error: Exception | None = None
    num_ended: int = 0

    def hear(self, token: int, logprob: float) -> None:
        self.heard.append(token)

    def respond(self, segment: Segment) -> Continuation | None:
        self.ids += segment.ids
        self.logprobs += segment.logprobs
        self.stops.append(segment.stop)
        place = len(self.stops)
        if place == len(self.budgets) or segment.stop in ("seconds", "no_room", "cancelled"):
            self.num_ended += 1
            return None
        self.ids += self.inserted[place - 1]
        return Continuation(ids=self.inserted[place - 1], max_new_tokens=self.budgets[place])

    def fail(self, error: Exception) -> None:
        self.error = error
        self.num_ended += 1


def request_for(prompt: Some[int], plans: Some[Plan], *, seed: int, **settings: object) -> Request:
    example = Example(input_ids=[*prompt], loss_mask=[False] * len(prompt))
    return Request(
        prompt=example,
        drivers=plans,
        max_new_tokens=plans[0].budgets[0],
        seed=seed,
        **settings,  # type: ignore[arg-type]
    )


class Shell(torch.nn.Module):
    """What the engine asks of a model beside its mathematics: one layer, no visual ids."""

    device, dtype = torch.device("cpu"), torch.float64
    config = SimpleNamespace(
        visual_token_ids=(),
        image_token_id=-1,
        vocab_size=VOCABULARY,
        llm_config=SimpleNamespace(num_hidden_layers=1, num_key_value_heads=1, head_dim=1, _attn_implementation="sdpa"),
    )

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        raise AssertionError("the scripted model sees no pictures")


def scripted_engine(**settings: object) -> BuiltinEngine:
    """The engine on the scripted model: all its rules, none of its mathematics."""
    engine = BuiltinEngine(Shell(), **settings)  # type: ignore[arg-type]
    engine.runner = ScriptedRunner(engine.cache)  # type: ignore[assignment]
    return engine


def alone(request: Request, place: int) -> list[int]:
    """The ids of one rollout of a request, drawn one by one without an engine."""
    plan: Plan = request.drivers[place]  # type: ignore[assignment]
    ids = [*request.prompt.input_ids]
    first = len(ids)
    for number, budget in enumerate(plan.budgets):
        for _ in range(budget):
            numbers = torch.from_numpy(uniforms([mixed_seed(request.seed, place)], [len(ids) - first]))
            ids.append(int(draw(logits_after(ids)[None].clone(), Sampling(), NOTHING, numbers).ids))
        if number + 1 < len(plan.budgets):
            ids += plan.inserted[number]
    return ids[first:]
