"""Peaks of models of many layers, told from few: the same bytes as of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from looktwice.config import ModelConfig, SFTConfig
from looktwice.model.configuration import Ovis2_5Config
from looktwice.planning.layers import extrapolated, few_layers, has_equal_layers, num_layers, peak_of, with_layers
from looktwice.planning.live_bytes import KINDS, Moments
from looktwice.planning.plan import config_of
from looktwice.planning.rehearsal import Load, sft

LOAD = Load(tokens=128, image_tokens=16)
STEPS: dict[str, Callable[[Ovis2_5Config], list[Moments]]] = {
    "SFT of all weights": partial(sft, model=ModelConfig(), stage=SFTConfig(), load=LOAD),
    "SFT of LoRA in both towers, recomputed": partial(
        sft,
        model=ModelConfig(),
        stage=SFTConfig(use_lora=True, lora_targets="llm+vit", gradient_checkpointing="all", bf16=True),
        load=LOAD,
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_peak_told_from_few_layers_is_that_of_the_whole_model(name: str) -> None:
    config = with_layers(config_of("tiny")[0], 4, 3)
    whole = max(moments.live.sum(1).max() for moments in STEPS[name](config) if moments.operations)
    assert peak_of(config, STEPS[name]).total == whole


def moments(operations: str, *bytes_of_each: int) -> Moments:
    live = np.zeros((len(bytes_of_each), len(KINDS)), dtype=np.int64)
    live[:, KINDS.index("activations")] = bytes_of_each
    return Moments([(letter, 0) for letter in operations], live)


def test_a_moment_grows_with_its_distance_from_the_end() -> None:
    few, more = moments("aLLz", 1, 3, 5, 4), moments("aLLLz", 1, 3, 5, 7, 4)
    peak = extrapolated([few, more], [4])
    assert (peak.total, peak.operation) == (5 + 4 * 2, ("L", 0))


def test_what_holds_more_before_the_layers_stays_the_peak() -> None:
    few, more = moments("aLLz", 20, 3, 5, 4), moments("aLLLz", 20, 3, 5, 7, 4)
    assert extrapolated([few, more], [4]).operation == ("a", 0)


def test_sections_that_do_not_repeat_a_layer_are_refused() -> None:
    few, more = moments("aLbz", 1, 1, 1, 1), moments("aMMMz", 1, 1, 1, 1, 1)
    with pytest.raises(AssertionError):
        extrapolated([few, more], [1])


def test_a_tower_with_windows_in_some_layers_has_no_equal_ones() -> None:
    config, _ = config_of("tiny")
    assert has_equal_layers(config)
    config.vit_config.fullatt_block_indexes = "0"
    assert not has_equal_layers(config)
    assert num_layers(with_layers(config, 3, 7)) == (3, 7)


def test_small_models_are_as_many_as_towers_have_further_layers() -> None:
    config, _ = config_of("tiny")
    sizes = {2: [(2, 2), (3, 2)], 3: [(2, 2), (3, 2), (2, 3)]}
    for vit, wanted in sizes.items():
        assert [num_layers(small) for small in few_layers(with_layers(config, 4, vit))] == wanted
