"""Adapters in one pass: each token gets what its own adapter adds, as PEFT computes it alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from looktwice.errors import CheckpointError
from looktwice.model.adapter_bank import AdapterBank, why_alone
from looktwice.model.adapters import add_lora
from looktwice.model.weights import save_model


def saved(model, folder: Path, seed: int, **options) -> tuple[Path, object]:
    adapted = add_lora(copy.deepcopy(model), r=4, alpha=16, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    save_model(adapted, folder)
    return folder, adapted.eval()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_each_token_gets_what_its_own_adapter_adds(model, tmp_path: Path, options) -> None:
    model = copy.deepcopy(model)
    bank = AdapterBank(model)
    one, with_one = saved(model, tmp_path / "one", 1, **options)
    two, with_two = saved(model, tmp_path / "two", 2, **options)
    bank.add("one", bank.read(one))
    bank.add("two", bank.read(two))
    path = "model.language_model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(path)
    fed = torch.randn(1, 9, layer.in_features)
    with torch.no_grad():
        plain = layer(fed)
        with bank.routed([("one", 2), (None, 3), ("two", 1), ("one", 3)]):
            routed = layer(fed)
        with bank.routed([("one", 4), ("one", 5)]):
            only = layer(fed)
        first, second = (one.base_model.model.get_submodule(path)(fed) for one in (with_one, with_two))
    expected = torch.cat([first[:, :2], plain[:, 2:5], second[:, 5:6], first[:, 6:]], 1)
    torch.testing.assert_close(routed, expected)
    torch.testing.assert_close(only, first)
    assert not torch.allclose(first, plain)
    with torch.no_grad():
        assert torch.equal(layer(fed), plain)
    bank.remove("one")
    bank.remove("two")
    assert not layer._forward_hooks


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ("visual_head",)}, "modules_to_save is"),
        ({"targets": "llm+vit"}, "it changes how pictures are seen"),
    ],
)
def test_an_adapter_that_does_more_cannot_share(model, tmp_path: Path, options, reason) -> None:
    folder, _ = saved(model, tmp_path / "a", 1, **options)
    assert reason in (why_alone(folder) or "")
    with pytest.raises(CheckpointError, match="cannot share a model"):
        AdapterBank(model).read(folder)


def test_an_adapter_of_another_model_is_refused(model, tmp_path: Path) -> None:
    folder, _ = saved(model, tmp_path / "a", 1)
    smaller = copy.deepcopy(model)
    smaller.model.language_model.layers[0].self_attn.q_proj = torch.nn.Linear(8, 8)
    with pytest.raises(CheckpointError, match="does not fit the model at"):
        AdapterBank(smaller).read(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "init_lora_weights": "pissa"}))
    assert "started with pissa" in (why_alone(folder) or "")
