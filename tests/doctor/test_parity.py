"""All ways to compute, compared on the small model; and what is broken is told as broken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from looktwice.doctor import parity
from looktwice.doctor.parity import ENGINE, TRANSFORMERS, TRL, VLLM, Gap, Parity, compare, gap_of, gaps_of_logits
from looktwice.doctor.probes import TOKEN_KINDS, examples_of, kinds_of
from looktwice.errors import LooktwiceError
from looktwice.model.location import locate
from looktwice.processing.processor import Ovis2_5Processor


@pytest.fixture(scope="module")
def tiny_processor() -> Ovis2_5Processor:
    return Ovis2_5Processor.from_pretrained(locate("tiny"))


@pytest.fixture(scope="module")
def found() -> Parity:
    return compare("tiny", device="cpu")


def test_all_ways_agree_on_the_small_model(found: Parity) -> None:
    assert found.failed == {} and found.broken == []
    assert {gap.way for gap in found.gaps} == {ENGINE, TRANSFORMERS, TRL}
    for way in (TRANSFORMERS, TRL):
        assert [gap.kind for gap in found.gaps if gap.way == way] == [*TOKEN_KINDS]
    assert all(gap.num_tokens > 0 for gap in found.gaps)
    assert found.left_out.keys() == {VLLM}


def test_the_canaries_sing(found: Parity) -> None:
    assert found.canaries["canary/picture"] > 0.01 > found.canaries["canary/gap"]


def test_a_server_that_is_not_there_is_a_failure_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "find_spec", lambda name: None)
    found = compare("tiny", device="cpu", vllm=["http://127.0.0.1:9"])
    assert found.failed.keys() == {VLLM} and len(found.broken) == 1
    assert found.left_out.keys() == {TRL}


def test_each_id_has_its_kind(tiny_processor: Ovis2_5Processor) -> None:
    example = examples_of(tiny_processor)[-1]
    kinds = kinds_of(example, tiny_processor.config)
    image, crop = (each.num_tokens for each in example.images)
    assert (kinds.count("visual"), kinds.count("indicator"), kinds.count("crop")) == (image, 4, crop)
    assert kinds.index("visual") < kinds.index("crop") and kinds[0] == kinds[-1] == "text"


def test_a_change_at_crops_is_told_as_one_of_crops(tiny_processor: Ovis2_5Processor) -> None:
    example = examples_of(tiny_processor)[-1]
    place = kinds_of(example, tiny_processor.config).index("crop")
    ours = torch.randn(len(example), 476, generator=torch.Generator().manual_seed(0))
    theirs = ours.clone()
    theirs[place, 7] += 0.1 * ours.abs().max()
    gaps = gaps_of_logits("theirs", [ours], [(example.input_ids, theirs)], [example], tiny_processor)
    assert [gap.kind for gap in gaps if not gap.is_kept(torch.float32)] == ["crop"]
    assert next(gap for gap in gaps if gap.kind == "crop").logits == pytest.approx(0.1, rel=1e-3)


def test_other_ids_are_refused(tiny_processor: Ovis2_5Processor) -> None:
    with pytest.raises(LooktwiceError, match="templates differ"):
        gaps_of_logits("theirs", [], [([1, 2, 3], torch.zeros(3, 476))], [], tiny_processor)


def test_no_number_is_no_rounding() -> None:
    gap = gap_of("theirs", "text", [(0.0, 1e-6), (float("nan"), 2e-6)])
    assert not gap.is_kept(torch.bfloat16)
    assert replace(gap, logits=None).is_kept(torch.float32)
    assert not Gap("theirs", "text", 1, None, mean=0.05, worst=0.05).is_kept(torch.float32)
    assert Gap("theirs", "text", 1, None, mean=0.05, worst=0.05).is_kept(torch.bfloat16)
