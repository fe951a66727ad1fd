"""Measures of data files: the numbers of the sequences themselves, from headers alone, and what packing saves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from looktwice.checking.statistics import (
    Statistics,
    percentile,
    rows_to_measure,
    simulate_packing,
)
from looktwice.data.examples import encode_sample
from looktwice.formats.sample_file import SampleFile
from looktwice.geometry import Size
from looktwice.processing.processor import Ovis2_5Processor

CALL = "<tool_call>[0, 0, 48, 60]</tool_call>"


def row(*contents: object, train: bool = True) -> dict[str, object]:
    roles = ("user", "assistant") * 3
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    if not train:
        messages[1]["train"] = False
    return {"messages": messages}


def question(image: str = "a.png") -> list[dict[str, str]]:
    return [{"type": "image", "image": image}, {"type": "text", "text": "Wo?"}]


@pytest.fixture
def file(tmp_path: Path, image: Image.Image) -> SampleFile:
    image.save(tmp_path / "a.png")
    rows = [
        row(question(), f"Look {CALL}{CALL} <answer>hier</answer>"),
        row(question(), f"Ich weiß {CALL}", "Sicher?", "<think>ja</think>Ja.", train=False),
        row(question("missing.png"), "a"),
        row(question(), "<tool_call>[900, 900, 990, 990]</tool_call>"),
        row("Text alone?", "Yes."),
    ]
    lines = [*map(json.dumps, rows), "{"]
    (tmp_path / "d.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return SampleFile(tmp_path / "d.jsonl", tmp_path)


@pytest.fixture
def statistics(file: SampleFile, processor: Ovis2_5Processor) -> Statistics:
    found = Statistics()
    found.read(file, range(len(file)), processor)
    return found


def test_each_sample_is_measured_as_it_is_encoded(
    statistics: Statistics, file: SampleFile, processor: Ovis2_5Processor
) -> None:
    samples = [file.sample(number) for number in (0, 1, 4)]
    examples = [encode_sample(sample, processor, max_length=9999) for sample in samples]
    assert statistics.lengths == [len(example) for example in examples]
    assert [one.num_trained_tokens for one in statistics.measures] == [sum(example.loss_mask) for example in examples]
    visual = [sum(image.num_tokens + 2 for image in example.images) for example in examples]
    assert [one.num_visual_tokens for one in statistics.measures] == visual


def test_turns_crops_and_images_are_counted(statistics: Statistics) -> None:
    assert [one.num_turns for one in statistics.measures] == [2, 4, 2]
    assert [one.crops_per_answer for one in statistics.measures] == [(2,), (1, 0), (0,)]
    assert statistics.crops_per_answer == [2, 1, 0, 0]
    assert statistics.image_sizes == [Size(160, 120)] * 2


def test_what_cannot_be_measured_is_counted_by_cause_with_its_place(statistics: Statistics, file: SampleFile) -> None:
    assert statistics.num_rows == 6
    assert sorted(statistics.unmeasured.lines()) == [
        f"1 x a call that cannot be run ({file.path}:4)",
        f"1 x a picture that cannot be opened ({file.path}:3)",
        f"1 x a row that cannot be read ({file.path}:6)",
    ]


def test_no_image_is_decoded(file: SampleFile, processor: Ovis2_5Processor, tmp_path: Path) -> None:
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    found = Statistics()
    found.read(file, [0], processor)
    assert len(found.measures) == 1


def test_padding_is_counted_batch_by_batch_in_the_order_of_training() -> None:
    packing = simulate_packing([2, 4], batch_size=2, max_tokens_per_row=6, seed=0)
    assert (packing.num_tokens, packing.num_padded, packing.num_packed_rows) == (6, 8, 1)
    assert packing.padding_share == 0.25
    assert simulate_packing([2, 4], batch_size=1, max_tokens_per_row=6, seed=0).padding_share == 0
    assert simulate_packing([2, 4], batch_size=2, max_tokens_per_row=5, seed=0).num_packed_rows == 2


@given(lengths=st.lists(st.integers(1, 50), max_size=20), batch_size=st.integers(1, 6))
def test_packing_never_costs_more_than_padding(lengths: list[int], batch_size: int) -> None:
    packing = simulate_packing(lengths, batch_size=batch_size, max_tokens_per_row=50, seed=0)
    assert packing.num_tokens == sum(lengths) <= packing.num_padded
    assert 0 <= packing.padding_share < 1


def test_a_percentile_is_a_value_that_occurs() -> None:
    assert [percentile([10, 1, 3, 2], share) for share in (0, 0.5, 0.9, 1)] == [1, 2, 10, 10]
    assert percentile([], 0.5) == 0


def test_rows_to_measure_are_all_or_a_random_part_in_order() -> None:
    assert list(rows_to_measure(3, None, 0)) == list(rows_to_measure(3, 5, 0)) == [0, 1, 2]
    picked = rows_to_measure(1000, 10, 0)
    assert len(set(picked)) == 10 and list(picked) == sorted(picked)
    assert list(picked) == list(rows_to_measure(1000, 10, 0)) != list(rows_to_measure(1000, 10, 1))
