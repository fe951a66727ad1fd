"""Checkpoint facts read from config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from looktwice.model.configuration import Ovis2_5Config, Siglip2NavitConfig

SHARED = Path(__file__).parents[3] / "shared" / "ovis2_5_9b"


def test_only_the_language_model_decides_whether_embeddings_are_tied() -> None:
    untied = Ovis2_5Config(llm_config={"tie_word_embeddings": False}, tie_word_embeddings=True)
    tied = Ovis2_5Config(llm_config={"tie_word_embeddings": True}, tie_word_embeddings=False)
    assert (untied.tie_word_embeddings, tied.tie_word_embeddings) == (False, True)


def test_width_and_vocabulary_are_those_of_the_language_model() -> None:
    config = Ovis2_5Config(llm_config={"hidden_size": 64, "vocab_size": 99}, hidden_size=4096, vocab_size=7)
    assert (config.hidden_size, config.vocab_size) == (64, 99)


def test_a_visual_token_is_a_square_of_32_pixels_by_default() -> None:
    assert Siglip2NavitConfig().factor == 32


@pytest.mark.parametrize(("indexes", "layers"), [(None, {0, 1, 2, 3}), ("0", {0}), ("1|3", {1, 3}), (2, {2})])
def test_full_attention_layers_are_read_from_a_string(indexes: str | int | None, layers: set[int]) -> None:
    config = Siglip2NavitConfig(num_hidden_layers=4, fullatt_block_indexes=indexes)
    assert config.full_attention_layers == layers


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"vit_config": {"hidden_size": "96"}},
            "vit_config: hidden_size is '96'; it must be a whole number of at least 1",
        ),
        ({"vit_config": {"patch_size": 0}}, "vit_config: patch_size is 0; it must be a whole number of at least 1"),
        ({"vit_config": {"window_size": None}}, "vit_config: window_size is None; it must be a whole number$"),
        ({"llm_config": {"hidden_size": "96"}}, "llm_config: .*'hidden_size' expected int, got str"),
    ],
)
def test_a_number_of_another_kind_is_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ovis2_5Config(**fields)


def test_visual_ids_are_those_after_the_released_tokenizer() -> None:
    assert Ovis2_5Config().visual_token_ids == tuple(range(151669, 151676))


def test_a_saved_config_reads_back_the_same(tmp_path: Path) -> None:
    config = Ovis2_5Config(
        llm_config={"hidden_size": 64, "rope_theta": 12345.0, "architectures": ["Qwen3ForCausalLM"]},
        vit_config={"hidden_size": 64, "fullatt_block_indexes": "0|1"},
        visual_vocab_size=128,
        image_token_id=7,
    )
    config.save_pretrained(tmp_path)
    again = Ovis2_5Config.from_pretrained(tmp_path)
    auto_map = {
        "AutoConfig": "configuration_ovis2_5.Ovis2_5_Config",
        "AutoModelForCausalLM": "modeling_ovis2_5.Ovis2_5",
    }
    assert again.to_dict() == config.to_dict() | {"architectures": ["Ovis2_5"], "auto_map": auto_map}
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        *(f"{value.split('.')[0]}.py" for value in auto_map.values()),
    }
    assert (again.llm_config.rope_parameters["rope_theta"], again.image_token_id) == (12345.0, 7)


def test_a_saved_config_is_spelled_as_the_released_one(tmp_path: Path) -> None:
    Ovis2_5Config(llm_config={"rope_theta": 12345.0}).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (written["architectures"], written["model_type"]) == (["Ovis2_5"], "ovis2_5")
    assert (written["llm_config"]["rope_theta"], written["llm_config"]["rope_scaling"]) == (12345.0, None)
    assert "rope_parameters" not in written["llm_config"]


def test_scaled_positions_survive_saving(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    Ovis2_5Config(llm_config={"rope_theta": 12345.0, "rope_scaling": rope}).save_pretrained(tmp_path)
    again = Ovis2_5Config.from_pretrained(tmp_path).llm_config.rope_parameters
    assert {name: again[name] for name in rope} == rope and again["rope_theta"] == 12345.0


@pytest.mark.parametrize("model_type", ["ovis2_5", "ovis"])
def test_the_model_type_of_the_official_trainer_is_known(model_type: str, tmp_path: Path) -> None:
    Ovis2_5Config(visual_vocab_size=128).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": model_type}), encoding="utf-8")
    config = Ovis2_5Config.from_pretrained(tmp_path)
    assert (config.model_type, config.visual_vocab_size) == ("ovis2_5", 128)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the released files are not here")
def test_the_released_config_is_read_in_full() -> None:
    config = Ovis2_5Config.from_pretrained(SHARED)
    llm, vit = config.llm_config, config.vit_config
    assert (config.hidden_size, config.visual_vocab_size, config.tie_word_embeddings) == (4096, 65536, False)
    assert (llm.num_hidden_layers, llm.num_key_value_heads, llm.head_dim) == (36, 8, 128)
    assert llm.rope_parameters["rope_theta"] == 1000000
    assert (vit.hidden_size, vit.num_hidden_layers, vit.intermediate_size) == (1152, 27, 4304)
    assert vit.full_attention_layers == frozenset(range(27))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temporal_patch_size": 2}, "temporal_patch_size is 2"),
        ({"hidden_size": 50}, "no multiple of num_attention_heads 16"),
        ({"hidden_size": 96}, "hidden_size / num_attention_heads is 6"),
        ({"num_patches": 10}, "num_patches is 10"),
        ({"fullatt_block_indexes": "0,1"}, "fullatt_block_indexes is '0,1'"),
        ({"fullatt_block_indexes": "0", "window_size": 24}, "less than one visual token, 32 pixels"),
    ],
)
def test_a_tower_that_cannot_be_as_the_released_code_builds_it_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"vit_config: .*{message}"):
        Siglip2NavitConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 96, "use_rope": False},
        {"num_patches": 10, "preserve_original_pe": False},
        {"fullatt_block_indexes": None, "window_size": 24},
        {"num_hidden_layers": 2, "fullatt_block_indexes": "0|1", "window_size": 24},
    ],
)
def test_a_field_that_is_not_used_may_have_any_value(fields: dict) -> None:
    Siglip2NavitConfig(**fields)


def test_a_language_model_with_sliding_windows_is_refused() -> None:
    fields = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    with pytest.raises(ValueError, match="layer_types has sliding_attention"):
        Ovis2_5Config(llm_config=fields)
