"""How long a packed row is by default: what the memory at hand takes, and no longer than helps."""

from __future__ import annotations

import copy

import pytest
import torch

from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.training import rows
from looktwice.training.rows import HELPFUL, bytes_per_token, default_tokens_per_row, helpful_tokens
from looktwice.training.trainable import recompute_layers


def test_a_row_is_as_long_as_helps_where_memory_is_plenty(model: Ovis2_5ForConditionalGeneration, monkeypatch) -> None:
    monkeypatch.setattr(rows, "free_bytes", lambda device: 10**15)
    assert default_tokens_per_row(model) == HELPFUL["cpu"]


@pytest.mark.parametrize(("tokens", "length"), [(1500, 1500), (10**6, rows.MOST), (10, HELPFUL["cpu"])])
def test_a_row_is_longer_where_a_gradient_of_all_weights_is_larger_than_its_activations(
    model: Ovis2_5ForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, tokens: int, length: int
) -> None:
    gradient = sum(weight.nbytes for weight in model.parameters())
    monkeypatch.setattr(rows, "bytes_per_token", lambda model: gradient // tokens)
    assert helpful_tokens(model) == pytest.approx(length, abs=2)


@pytest.mark.parametrize(("tokens", "length"), [(100, 50), (0.5, 1)])
def test_a_row_takes_half_of_the_free_memory(model, monkeypatch, tokens: float, length: int) -> None:
    monkeypatch.setattr(rows, "free_bytes", lambda device: int(tokens * bytes_per_token(model)) + 1)
    assert default_tokens_per_row(model) == length


def test_recomputed_layers_frozen_towers_and_bfloat16_need_less_of_a_token(model) -> None:
    model = copy.deepcopy(model)
    sizes = [bytes_per_token(model)]
    with torch.autocast("cpu", torch.bfloat16):
        assert bytes_per_token(model) == sizes[0] / 2
    model.model.visual_tokenizer.vit.requires_grad_(False)
    sizes.append(bytes_per_token(model))
    recompute_layers(model, "all")
    sizes.append(bytes_per_token(model))
    assert sizes[0] > sizes[1] > 2 * sizes[2] > 0
