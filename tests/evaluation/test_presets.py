"""The recipe of published scores."""

from __future__ import annotations

from typing import get_args

import pytest

from looktwice.config import EvalConfig, PresetName
from looktwice.evaluation.presets import PRESETS, with_preset, wording_of


def test_every_preset_has_a_name() -> None:
    assert {"none", *PRESETS} == {*get_args(PresetName)}


@pytest.mark.parametrize(
    ("bench", "thinking", "has_suffix"),
    [("mathvista", True, True), ("vstar", False, True), ("docvqa", False, False), ("jsonl", False, False)],
)
def test_thinking_and_wording_go_by_the_benchmark(bench: str, thinking: bool, has_suffix: bool) -> None:
    found = wording_of(EvalConfig(preset="ovis2.5-9b"), bench)
    assert found == (thinking, "End your response with 'Final answer: '." if has_suffix else None)


def test_what_is_given_goes_before_the_preset() -> None:
    config = with_preset(EvalConfig(preset="ovis2.5-2b", max_pixels=10**6, enable_thinking=True, suffix="Be brief."))
    assert (config.min_pixels, config.max_pixels) == (1024**2, 10**6)
    assert wording_of(config, "docvqa") == (True, "Be brief.")
    assert wording_of(EvalConfig(), "mathvista") == (True, None)
    plain = EvalConfig()
    assert with_preset(plain) is plain
