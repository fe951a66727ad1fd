"""What is trained."""

from __future__ import annotations

import copy

import pytest
from torch import nn

from looktwice.errors import CheckpointError
from looktwice.model.adapters import add_lora, base_of, describe_trained, freeze_vision, trained_parameters
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration

# PEFT asks transformers by an older name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def fresh(model: Ovis2_5ForConditionalGeneration) -> Ovis2_5ForConditionalGeneration:
    return copy.deepcopy(model)


def test_lora_sits_on_the_seven_linear_layers_of_every_decoder_layer(fresh: Ovis2_5ForConditionalGeneration) -> None:
    adapted = add_lora(fresh, r=2, alpha=4, dropout=0.0)
    names = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert len(names) == 7 * fresh.config.llm_config.num_hidden_layers
    assert [name for name in names if "model.language_model.layers." not in name] == []


def test_only_lora_weights_are_trained(fresh: Ovis2_5ForConditionalGeneration) -> None:
    adapted = add_lora(fresh, r=2, alpha=4, dropout=0.0)
    assert [name for name, _ in trained_parameters(adapted) if "lora_" not in name] == []


def test_freezing_vision_leaves_the_language_model_and_its_head(fresh: Ovis2_5ForConditionalGeneration) -> None:
    freeze_vision(fresh)
    trained = {name.split(".")[1] for name, _ in trained_parameters(fresh)}
    assert trained == {"language_model", "weight"}


def test_the_base_of_an_adapted_model_is_the_network(fresh: Ovis2_5ForConditionalGeneration) -> None:
    assert base_of(add_lora(fresh, r=2, alpha=4, dropout=0.0)) is fresh


def test_the_base_of_a_plain_model_is_itself(model: Ovis2_5ForConditionalGeneration) -> None:
    assert base_of(model) is model


def test_another_kind_of_model_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="Linear"):
        base_of(nn.Linear(1, 1))


def test_the_description_counts_trained_and_all_parameters() -> None:
    model = nn.Sequential(nn.Linear(99, 10, bias=False), nn.Linear(10, 1, bias=False))
    model[0].requires_grad_(False)
    assert describe_trained(model) == "training 10 of 1,000 parameters (1.00 %)"
