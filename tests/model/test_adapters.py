"""What is trained."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from looktwice.errors import CheckpointError, ConfigError
from looktwice.model.adapters import (
    LLM_LINEARS,
    add_lora,
    base_of,
    check_same_adapter,
    for_inference,
    freeze,
    is_fresh,
    merge,
    merged,
    merged_parameters,
    part_of,
    part_sizes,
    trained_parameters,
)
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration


@pytest.fixture
def fresh(model: Ovis2_5ForConditionalGeneration) -> Ovis2_5ForConditionalGeneration:
    return copy.deepcopy(model)


def adapted_layers(model: nn.Module) -> list[str]:
    return [name for name, layer in base_of(model).named_modules() if hasattr(layer, "lora_A")]


# -- where LoRA goes


def test_lora_sits_on_the_seven_linear_layers_of_every_decoder_layer(fresh: Ovis2_5ForConditionalGeneration) -> None:
    names = adapted_layers(add_lora(fresh, r=2, alpha=4))
    assert len(names) == 7 * fresh.config.llm_config.num_hidden_layers
    assert [name for name in names if not name.startswith("model.language_model.layers.")] == []


def test_lora_on_the_tower_too_adds_the_six_linear_layers_of_its_layers(
    fresh: Ovis2_5ForConditionalGeneration,
) -> None:
    names = adapted_layers(add_lora(fresh, r=2, alpha=4, targets="llm+vit"))
    in_tower = [name for name in names if name.startswith("model.visual_tokenizer.vit.encoder.layers.")]
    assert len(in_tower) == 6 * fresh.config.vit_config.num_hidden_layers
    assert len(names) - len(in_tower) == 7 * fresh.config.llm_config.num_hidden_layers


def test_all_linear_layers_of_qwen3_are_the_seven(fresh: Ovis2_5ForConditionalGeneration) -> None:
    by_name = adapted_layers(add_lora(copy.deepcopy(fresh), r=2, alpha=4))
    assert adapted_layers(add_lora(fresh, r=2, alpha=4, targets="all-linear-llm")) == by_name


def test_an_expression_of_full_names_chooses_single_layers(fresh: Ovis2_5ForConditionalGeneration) -> None:
    names = adapted_layers(add_lora(fresh, r=2, alpha=4, targets=r"model\.language_model\.layers\.1\..*\.(q|v)_proj"))
    assert names == [f"model.language_model.layers.1.self_attn.{layer}_proj" for layer in "qv"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            "q_proj",
            "lora_targets: 'q_proj' names no layer; give llm, llm\\+vit, all-linear-llm or an expression of full",
        ),
        ("(", "lora_targets: '\\(' is not a regular expression"),
        (r"model\.vte", "hits model.vte, where LoRA cannot go: .* use --modules_to_save visual_table"),
        (r"model\.visual_tokenizer\.head\.0", "hits model.visual_tokenizer.head.0, .* --modules_to_save visual_head"),
        (".*head", "where LoRA cannot go"),
        ("lm_head", "hits lm_head, where LoRA cannot go: the loss reads its weight"),
        (r"model\.language_model\.norm", r"hits model.language_model.norm \(RMSNorm\); LoRA goes on linear"),
        (r".*patch_embedding", r"patch_embedding, where LoRA cannot go: its weights are read directly"),
        (r"model\.nothing", r"lora_targets: 'model\\.nothing' names no layer"),
    ],
)
def test_layers_that_cannot_carry_lora_are_refused_with_the_reason(
    model: Ovis2_5ForConditionalGeneration, targets: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        add_lora(model, r=2, alpha=4, targets=targets)


@pytest.mark.filterwarnings("error")
def test_lora_is_put_on_without_a_warning(fresh: Ovis2_5ForConditionalGeneration) -> None:
    add_lora(fresh, r=2, alpha=4, modules_to_save=["visual_table"])


# -- what trains


def test_only_lora_weights_are_trained(fresh: Ovis2_5ForConditionalGeneration) -> None:
    adapted = add_lora(fresh, r=2, alpha=4)
    assert [name for name, _ in trained_parameters(adapted) if "lora_" not in name] == []


def test_whole_parts_are_trained_beside_lora(fresh: Ovis2_5ForConditionalGeneration) -> None:
    adapted = add_lora(fresh, r=2, alpha=4, modules_to_save=["visual_head", "visual_table"])
    whole = {part_of(name) for name, _ in trained_parameters(adapted) if "lora_" not in name}
    assert whole == {"visual_head", "visual_table"}


def test_all_that_is_trained_over_a_bfloat16_base_is_float32(fresh: Ovis2_5ForConditionalGeneration) -> None:
    adapted = add_lora(fresh.to(torch.bfloat16), r=2, alpha=4, modules_to_save=["visual_head", "visual_table"])
    assert {parameter.dtype for _, parameter in trained_parameters(adapted)} == {torch.float32}
    assert base_of(adapted).lm_head.weight.dtype == torch.bfloat16


def test_parts_trained_whole_run_without_autocast_when_asked(fresh: Ovis2_5ForConditionalGeneration) -> None:
    adapted = add_lora(fresh.to(torch.bfloat16), r=2, alpha=4, modules_to_save=["visual_head", "visual_table"])
    patches, grid = torch.zeros(16, 3 * fresh.config.vit_config.patch_size**2), torch.tensor([[1, 4, 4]])
    with torch.no_grad():
        features = for_inference(adapted).get_image_features(patches, grid)
    assert (features.dtype, len(features)) == (torch.bfloat16, 4)


def test_freezing_leaves_the_other_parts(fresh: Ovis2_5ForConditionalGeneration) -> None:
    freeze(fresh, ["vit", "visual_head", "visual_table"])
    assert {part_of(name) for name, _ in trained_parameters(fresh)} == {"llm", "embeddings"}


def test_lora_of_a_frozen_part_is_not_trained(fresh: Ovis2_5ForConditionalGeneration) -> None:
    adapted = add_lora(fresh, r=2, alpha=4, targets="llm+vit")
    freeze(adapted, ["llm"])
    assert {part_of(name) for name, _ in trained_parameters(adapted)} == {"vit"}


def test_freezing_everything_is_refused(fresh: Ovis2_5ForConditionalGeneration) -> None:
    with pytest.raises(ConfigError, match="frozen nothing is trained"):
        freeze(fresh, ["vit", "visual_head", "visual_table", "llm", "embeddings"])


def test_every_parameter_belongs_to_a_part(model: Ovis2_5ForConditionalGeneration) -> None:
    sizes = {size.part: size.total for size in part_sizes(model)}
    assert sum(sizes.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert sizes["visual_table"] == model.model.vte.weight.numel()
    assert sizes["embeddings"] == 2 * model.lm_head.weight.numel()


def test_an_adapted_model_counts_with_its_adapters_and_without_copies_of_whole_parts(
    fresh: Ovis2_5ForConditionalGeneration,
) -> None:
    plain = sum(size.total for size in part_sizes(fresh))
    adapted = add_lora(fresh, r=2, alpha=4, targets="llm+vit", modules_to_save=["visual_head", "visual_table"])
    of_adapter = sum(parameter.numel() for name, parameter in adapted.named_parameters() if ".lora_" in name)
    assert sum(size.total for size in part_sizes(adapted)) == plain + of_adapter
    trained = sum(parameter.numel() for _, parameter in trained_parameters(adapted))
    assert sum(size.trained for size in part_sizes(adapted)) == trained


def test_a_parameter_of_no_part_is_named() -> None:
    with pytest.raises(CheckpointError, match="projector.weight belongs to no part"):
        part_of("projector.weight")


# -- adapters that exist


def test_the_base_of_an_adapted_model_is_the_network(fresh: Ovis2_5ForConditionalGeneration) -> None:
    assert base_of(add_lora(fresh, r=2, alpha=4)) is fresh


def test_the_base_of_a_plain_model_is_itself(model: Ovis2_5ForConditionalGeneration) -> None:
    assert base_of(model) is model


def test_another_kind_of_model_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="Linear"):
        base_of(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"r": 4}, "lora_r is 4, the adapter to go on from has 2; leave the setting out"),
        ({"targets": "llm+vit"}, "lora_targets is llm\\+vit, the adapter to go on from has other layers"),
        ({"use_dora": True}, "use_dora is True, the adapter to go on from has none"),
        ({"modules_to_save": ["visual_head"]}, "modules_to_save is .*, the adapter to go on from has {'visual_table'}"),
    ],
)
def test_settings_that_an_adapter_does_not_have_are_refused(
    fresh: Ovis2_5ForConditionalGeneration, given: dict, message: str
) -> None:
    adapted = add_lora(fresh, r=2, alpha=4, modules_to_save=["visual_table"])
    with pytest.raises(ConfigError, match=message):
        check_same_adapter(adapted, **given)


@pytest.mark.parametrize("targets", ["llm", "llm+vit", "all-linear-llm"])
def test_settings_that_an_adapter_has_pass(fresh: Ovis2_5ForConditionalGeneration, targets: str) -> None:
    settings = {"r": 2, "alpha": 4, "dropout": 0.1, "targets": targets, "modules_to_save": ["visual_head"]}
    check_same_adapter(add_lora(fresh, **settings), **settings)


# -- merging


def trained_by_chance(model: nn.Module) -> nn.Module:
    """The model with every trained weight moved."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in trained_parameters(model):
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(("use_dora", "use_rslora"), list(product([False, True], repeat=2)))
def test_a_merged_model_gives_the_logits_of_the_adapted_one(
    fresh: Ovis2_5ForConditionalGeneration, use_dora: bool, use_rslora: bool
) -> None:
    adapted = trained_by_chance(
        add_lora(fresh, r=2, alpha=4, targets="llm+vit", use_dora=use_dora, use_rslora=use_rslora)
    )
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        before = base_of(adapted)(ids).logits
        torch.testing.assert_close(merge(adapted)(ids).logits, before, atol=1e-4, rtol=1e-4)


def test_parts_trained_whole_are_merged_in_the_dtype_of_the_base(fresh: Ovis2_5ForConditionalGeneration) -> None:
    adapted = trained_by_chance(add_lora(fresh.to(torch.bfloat16), r=2, alpha=4, modules_to_save=["visual_table"]))
    table = dict(trained_parameters(adapted))["base_model.model.model.vte.modules_to_save.default.weight"]
    merged = merge(adapted)
    assert torch.equal(merged.model.vte.weight, table.to(torch.bfloat16))
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def test_a_plain_model_is_merged_already(model: Ovis2_5ForConditionalGeneration) -> None:
    assert merge(model) is model


def test_an_adapter_that_is_not_finite_is_not_merged(fresh: Ovis2_5ForConditionalGeneration) -> None:
    adapted = get_peft_model(fresh, LoraConfig(r=2, target_modules=LLM_LINEARS))
    with torch.no_grad():
        next(parameter for _, parameter in trained_parameters(adapted)).fill_(torch.nan)
    with pytest.raises(CheckpointError, match="the adapter cannot be merged"):
        merge(adapted)


# -- merged for a while

IDS = torch.arange(10, 20)[None]
KINDS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"targets": "llm+vit", "modules_to_save": ["visual_table"]},
]


def tensors_of(model: nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    """Where every tensor of a model lies, and a copy of it."""
    return {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, tuple[int, torch.Tensor]]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, (place, tensor) in before.items():
        assert after[name].data_ptr() == place and torch.equal(after[name], tensor), name


def merged_layers(model: nn.Module) -> int:
    return sum(bool(getattr(layer, "merged", False)) for layer in model.modules())


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_a_model_merged_for_a_while_gives_the_same_logits_and_is_itself_again(fresh, settings) -> None:
    adapted = trained_by_chance(add_lora(fresh, r=2, alpha=4, **settings)).eval()
    before = tensors_of(adapted)
    with torch.no_grad():
        wanted = fresh(IDS).logits
        with merged(adapted):
            assert merged_layers(adapted) == len(adapted_layers(adapted))
            torch.testing.assert_close(fresh(IDS).logits, wanted, atol=1e-4, rtol=1e-4)
            assert not torch.equal(fresh(IDS).logits, wanted)
        assert torch.equal(fresh(IDS).logits, wanted)
    assert merged_layers(adapted) == 0
    assert_untouched(adapted, before)


def test_a_merged_layer_runs_its_base_alone(fresh) -> None:
    adapted = trained_by_chance(add_lora(fresh, r=2, alpha=4))
    runs: list[nn.Module] = []
    for name, layer in adapted.named_modules():
        if ".lora_A.default" in name or ".lora_B.default" in name:
            layer.register_forward_hook(lambda module, inputs, output: runs.append(module))
    with merged(adapted):
        fresh(IDS)
    assert runs == []
    fresh(IDS)
    assert len(runs) == 2 * len(adapted_layers(adapted))


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_a_bias_of_an_adapter_is_merged_where_the_base_has_one(fresh) -> None:
    vit_only = r"model\.visual_tokenizer\.vit\.encoder\.layers\..*\.fc1"
    config = LoraConfig(r=2, lora_alpha=4, target_modules=f"{vit_only}|{LLM_LINEARS}", lora_bias=True)
    adapted = trained_by_chance(get_peft_model(fresh, config)).eval()
    patches, grid = torch.ones(16, 3 * fresh.config.vit_config.patch_size**2), torch.tensor([[1, 4, 4]])
    before = tensors_of(adapted)
    with torch.no_grad():
        wanted = fresh.get_image_features(patches, grid), fresh(IDS).logits
        with merged(adapted):
            # no linear layer of Qwen3 has a bias
            assert merged_layers(adapted) == fresh.config.vit_config.num_hidden_layers
            torch.testing.assert_close((fresh.get_image_features(patches, grid), fresh(IDS).logits), wanted)
    assert_untouched(adapted, before)


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float32, 1e-6, 1e-8), (torch.bfloat16, 2**-8, 2e-4)])
def test_merged_weights_have_the_dtype_of_the_base_also_under_autocast(fresh, dtype, rtol, atol) -> None:
    adapted = trained_by_chance(add_lora(fresh.to(dtype), r=2, alpha=4, modules_to_save=["visual_table"]))
    layer = fresh.model.language_model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.float() + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    with torch.autocast("cpu", torch.bfloat16), merged(adapted), torch.no_grad():
        weight = layer.base_layer.weight
        assert weight.dtype == dtype
        torch.testing.assert_close(weight.float(), exact, atol=atol, rtol=rtol)
        assert fresh(IDS).logits.isfinite().all()
    assert {parameter.dtype for _, parameter in trained_parameters(adapted)} == {torch.float32}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_leaves_the_weights_as_they_were(fresh, error) -> None:
    adapted = trained_by_chance(add_lora(fresh, r=2, alpha=4))
    before = tensors_of(adapted)
    with pytest.raises(error), merged(adapted):
        raise error
    assert_untouched(adapted, before)


def test_an_interrupt_while_merging_leaves_the_weights_as_they_were(fresh, monkeypatch) -> None:
    adapted = trained_by_chance(add_lora(fresh, r=2, alpha=4))
    before = tensors_of(adapted)
    layer = fresh.model.language_model.layers[1].mlp.up_proj
    plain = layer.merge

    def stopped(**options: Any) -> None:
        plain(**options)
        raise KeyboardInterrupt

    monkeypatch.setattr(layer, "merge", stopped)
    with pytest.raises(KeyboardInterrupt), merged(adapted):
        raise AssertionError("not reached")
    assert merged_layers(adapted) == 0
    assert_untouched(adapted, before)


def test_an_adapter_that_is_not_finite_is_not_merged_for_a_while_either(fresh) -> None:
    adapted = add_lora(fresh, r=2, alpha=4)
    with torch.no_grad():
        fresh.model.language_model.layers[1].mlp.up_proj.lora_B["default"].weight.fill_(torch.inf)
    before = tensors_of(adapted)
    with pytest.raises(CheckpointError, match="the adapter cannot be merged"), merged(adapted):
        raise AssertionError("not reached")
    assert_untouched(adapted, before)


def test_inside_another_block_merging_does_nothing(fresh) -> None:
    adapted = trained_by_chance(add_lora(fresh, r=2, alpha=4))
    before = tensors_of(adapted)
    with torch.no_grad(), merged(adapted):
        wanted = fresh(IDS).logits
        with merged(fresh):
            assert torch.equal(fresh(IDS).logits, wanted)
        assert torch.equal(fresh(IDS).logits, wanted)
    assert_untouched(adapted, before)


def test_an_adapter_that_is_switched_off_is_not_merged(fresh) -> None:
    adapted = trained_by_chance(add_lora(fresh, r=2, alpha=4))
    before = tensors_of(adapted)
    with torch.no_grad(), adapted.disable_adapter():
        wanted = fresh(IDS).logits
        with merged(adapted):
            assert torch.equal(fresh(IDS).logits, wanted)
    assert_untouched(adapted, before)


def test_quantised_layers_run_as_they_are(fresh) -> None:
    adapted = trained_by_chance(add_lora(fresh, r=2, alpha=4))
    quantised = fresh.model.language_model.layers[0].self_attn.q_proj
    # the mark of bitsandbytes' weights is an integer dtype
    quantised.base_layer.weight = nn.Parameter(quantised.base_layer.weight.to(torch.uint8), requires_grad=False)
    with merged(adapted):
        assert not quantised.merged
        assert merged_layers(adapted) == len(adapted_layers(adapted)) - 1


def test_a_plain_model_runs_merged_as_ever(model) -> None:
    with merged(model), torch.no_grad():
        assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_training_goes_on_after_merging_as_without_it(model, settings) -> None:
    trained = []
    for is_merged in (False, True):
        torch.manual_seed(0)
        adapted = trained_by_chance(add_lora(copy.deepcopy(model), r=2, alpha=4, **settings))
        if is_merged:
            with torch.no_grad(), merged(adapted):
                adapted(IDS)
        optimizer = torch.optim.AdamW([parameter for _, parameter in trained_parameters(adapted)], lr=1e-3)
        adapted(IDS, labels=IDS).loss.backward()
        optimizer.step()
        trained.append(adapted.state_dict())
    assert all(torch.equal(trained[0][name], tensor) for name, tensor in trained[1].items())


def test_an_adapter_is_fresh_until_a_b_of_it_is_not_zero(fresh) -> None:
    adapted = add_lora(fresh, r=2, alpha=4)
    assert is_fresh(adapted)
    with torch.no_grad():
        fresh.model.language_model.layers[1].mlp.up_proj.lora_B["default"].weight[0, 0] = 1e-6
    assert not is_fresh(adapted)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_the_parameters_of_a_merged_model_are_named_as_without_its_adapter(fresh, settings) -> None:
    adapted = trained_by_chance(add_lora(fresh, r=2, alpha=4, **settings))
    with merged(adapted):
        state = dict(merged_parameters(adapted))
    wanted = dict(merge(adapted).named_parameters(remove_duplicate=False))
    assert state.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())


def test_parameters_are_not_told_of_a_layer_that_is_not_merged(fresh) -> None:
    with pytest.raises(CheckpointError, match="q_proj: this kind of layer cannot be merged"):
        dict(merged_parameters(add_lora(fresh, r=2, alpha=4)))
