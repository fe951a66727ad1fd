"""The facts that numerics depend on, and the refusal of a pair that differs."""

from __future__ import annotations

import copy

import pytest
import torch

from looktwice.geometry import PixelPolicy
from looktwice.model.adapters import add_lora, trained_parameters
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.numerics import NumericsError, check_same_numerics, digest, numerics_of

POLICY = PixelPolicy()


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def test_the_same_model_has_the_same_facts_and_digest(model: Ovis2_5ForConditionalGeneration) -> None:
    ours, theirs = (numerics_of(m, POLICY, is_exact=True) for m in (model, copy.deepcopy(model)))
    check_same_numerics(ours, theirs)
    assert digest(ours) == digest(dict(reversed(theirs.items())))
    assert len(digest(ours)) == 64


def test_the_digest_is_that_of_the_sorted_facts() -> None:
    # printf '{"a": "1", "b": "2"}' | sha256sum
    assert digest({"b": "2", "a": "1"}) == "0e09eeab5bdeab40e2af08a4432d53de29fc2ba94dfa38fae0871d749681cf68"


def test_each_choice_changes_its_own_fact(model: Ovis2_5ForConditionalGeneration) -> None:
    network = copy.deepcopy(model)
    before = numerics_of(network, POLICY, is_exact=True)
    assert changed(before, numerics_of(network, POLICY, is_exact=False)) == {"exact", "attention"}
    assert changed(before, numerics_of(network, POLICY.override(crop_max_pixels=4096), is_exact=True)) == {"pixels"}
    with torch.autocast("cpu", torch.bfloat16):
        assert changed(before, numerics_of(network, POLICY, is_exact=True)) == {"autocast"}
    torch.set_num_threads(2)
    try:
        assert changed(before, numerics_of(network, POLICY, is_exact=True)) == {"threads"}
    finally:
        torch.set_num_threads(1)
    with torch.no_grad():
        network.lm_head.weight[-1, -1] += 1
    assert changed(before, numerics_of(network, POLICY, is_exact=True)) == {"weights"}


def test_an_adapter_is_told_by_its_weights_and_by_how_it_acts(model: Ovis2_5ForConditionalGeneration) -> None:
    adapted = add_lora(copy.deepcopy(model), r=2, alpha=2)
    before = numerics_of(adapted, POLICY, is_exact=True)
    assert changed(numerics_of(model, POLICY, is_exact=True), before) == {"adapter"}
    with adapted.disable_adapter():
        assert changed(before, numerics_of(adapted, POLICY, is_exact=True)) == {"adapter"}
    with torch.no_grad():
        next(weight for name, weight in trained_parameters(adapted) if "lora_B" in name).add_(1)
    trained = numerics_of(adapted, POLICY, is_exact=True)
    assert changed(before, trained) == {"adapter"}
    adapted.merge_adapter()
    assert changed(trained, numerics_of(adapted, POLICY, is_exact=True)) == {"adapter", "weights"}


def test_a_mismatch_names_what_differs() -> None:
    with pytest.raises(NumericsError) as caught:
        check_same_numerics({"threads": "1", "exact": "null"}, {"threads": "2", "exact": "null"})
    assert str(caught.value).splitlines()[1:] == ["  threads: sampler 2, trainer 1"]
