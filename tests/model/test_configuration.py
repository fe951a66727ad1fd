"""Checkpoint facts read from config.json."""

from __future__ import annotations

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


def test_visual_ids_are_those_after_the_released_tokenizer() -> None:
    assert Ovis2_5Config().visual_token_ids == tuple(range(151669, 151676))


def test_a_saved_config_reads_back_the_same(tmp_path: Path) -> None:
    config = Ovis2_5Config(
        llm_config={"hidden_size": 64, "rope_theta": 12345.0},
        vit_config={"hidden_size": 48, "fullatt_block_indexes": "0|1"},
        visual_vocab_size=128,
        image_token_id=7,
    )
    config.save_pretrained(tmp_path)
    again = Ovis2_5Config.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert (again.llm_config.rope_parameters["rope_theta"], again.image_token_id) == (12345.0, 7)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the released files are not here")
def test_the_released_config_is_read_in_full() -> None:
    config = Ovis2_5Config.from_pretrained(SHARED)
    llm, vit = config.llm_config, config.vit_config
    assert (config.hidden_size, config.visual_vocab_size, config.tie_word_embeddings) == (4096, 65536, False)
    assert (llm.num_hidden_layers, llm.num_key_value_heads, llm.head_dim) == (36, 8, 128)
    assert llm.rope_parameters["rope_theta"] == 1000000
    assert (vit.hidden_size, vit.num_hidden_layers, vit.intermediate_size) == (1152, 27, 4304)
    assert vit.full_attention_layers == frozenset(range(27))
