"""From a model of few layers to the whole one: what is alive at a moment grows by the same bytes with each layer.

Layers of a tower are alike, so a moment at a given distance from the first layer, or from the last, holds an amount
that is linear in the number of layers. Three rehearsals give it: of a few layers, of one more in the language model,
and of one more in the vision tower. Moments in between lie between those at both ends. `tests/planning/test_layers.py`
holds the result to the count of whole models, to the byte.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from looktwice.model.configuration import Ovis2_5Config
from looktwice.planning.live_bytes import KINDS, Kind, Moments, Operation

FEW = 2
"""Layers of a tower in the smallest model: the first and the last."""


class Peak(NamedTuple):
    """Bytes at the fullest moment, by what they are for, and the operation after which it was."""

    parts: dict[Kind, int]
    operation: Operation

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def peak_of(config: Ovis2_5Config, rehearse: Callable[[Ovis2_5Config], list[Moments]]) -> Peak:
    """The fullest moment of what `rehearse` does with a model of this config."""
    return whole_peak(config, [rehearse(small) for small in few_layers(config)])


def few_layers(config: Ovis2_5Config) -> list[Ovis2_5Config]:
    """The small models that tell of this one: of few layers, with one more in the language model, and with one more in
    the vision tower; without those that have as many as the whole."""
    llm, vit = _few(config)
    whole = num_layers(config)
    more = [(llm + 1, vit)] * (whole[0] > llm) + [(llm, vit + 1)] * (whole[1] > vit)
    return [with_layers(config, *numbers) for numbers in [(llm, vit), *more]]


def whole_peak(config: Ovis2_5Config, runs: Sequence[list[Moments]]) -> Peak:
    """The fullest moment of the whole model, from what was alive in those of `few_layers`, section by section."""
    further = [whole - few for whole, few in zip(num_layers(config), _few(config))]
    counts = [count for count in further if count]
    peaks = [extrapolated(parts, counts) for parts in zip(*runs, strict=True) if parts[0].operations]
    return max(peaks, key=lambda peak: peak.total)


def _few(config: Ovis2_5Config) -> tuple[int, int]:
    llm, vit = num_layers(config)
    return min(FEW, llm), min(FEW, vit) if has_equal_layers(config) else vit


def num_layers(config: Ovis2_5Config) -> tuple[int, int]:
    """Of the language model and of the vision tower."""
    return config.llm_config.num_hidden_layers, config.vit_config.num_hidden_layers


def has_equal_layers(config: Ovis2_5Config) -> bool:
    """Whether the tower's layers are alike, as those of released models are: none, or each, looks through a window."""
    vit = config.vit_config
    return len({number in vit.full_attention_layers for number in range(vit.num_hidden_layers)}) == 1


def with_layers(config: Ovis2_5Config, llm: int, vit: int) -> Ovis2_5Config:
    """The config with other numbers of layers."""
    changed = copy.deepcopy(config)
    kinds = changed.llm_config.layer_types or ["full_attention"]
    changed.llm_config.num_hidden_layers, changed.vit_config.num_hidden_layers = llm, vit
    changed.llm_config.layer_types = [kinds[number % len(kinds)] for number in range(llm)]
    return changed


def extrapolated(runs: Sequence[Moments], further: Sequence[int]) -> Peak:
    """The fullest moment of a section in the whole model: `runs` are that of few layers, and for each of the numbers of
    `further` layers that of one more of their kind."""
    few, *more = runs
    best, where = np.zeros(len(KINDS), dtype=np.int64), 0
    for pairs in product(*(_alignments(few.operations, run.operations) for run in more)):
        grown = few.live.copy()
        is_known = np.ones(len(few.live), dtype=bool)
        for run, (places, known), count in zip(more, pairs, further):
            grown += count * (run.live[places] - few.live)
            is_known &= known
        totals = np.where(is_known, grown.sum(1), -1)
        fullest = int(totals.argmax())
        if totals[fullest] > best.sum():
            best, where = grown[fullest], fullest
    parts = {kind: int(size) for kind, size in zip(KINDS, best)}
    return Peak(parts, few.operations[where])


def _alignments(few: Sequence[Operation], more: Sequence[Operation]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each moment of the shorter section its place in the longer one, counted from the start and from the end, and
    whether both did the same until there. Raises AssertionError where a moment has no place."""
    length, longer = len(few), len(more)
    from_start = next((place for place, (a, b) in enumerate(zip(few, more)) if a != b), length)
    from_end = next((place for place, (a, b) in enumerate(zip(reversed(few), reversed(more))) if a != b), length)
    assert from_start + from_end >= length, "layers do not repeat what they do"
    places = np.arange(length)
    if length == longer:
        return [(places, places < length)]
    return [
        (np.minimum(places, longer - 1), places < from_start),
        (np.maximum(places + longer - length, 0), places >= length - from_end),
    ]
