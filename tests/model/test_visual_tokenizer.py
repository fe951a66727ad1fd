"""Features to probability rows to language-model vectors."""

from __future__ import annotations

import pytest
import torch

import looktwice.model.visual_tokenizer
from looktwice.model.configuration import Siglip2NavitConfig
from looktwice.model.visual_tokenizer import VisualEmbedding, VisualTokenizer, embed_features


@pytest.fixture(scope="module")
def tokenizer() -> VisualTokenizer:
    config = Siglip2NavitConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32
    )
    torch.manual_seed(0)
    return VisualTokenizer(config, visual_vocab_size=14)


@pytest.fixture
def table() -> VisualEmbedding:
    torch.manual_seed(1)
    return VisualEmbedding(14, 6)


def test_a_visual_token_is_a_probability_row_without_the_indicators(tokenizer: VisualTokenizer) -> None:
    rows = tokenizer.probabilities(torch.randn(3, 32))
    assert rows.shape == (3, 10)
    torch.testing.assert_close(rows.sum(-1), torch.ones(3))


def test_probabilities_keep_the_dtype_of_the_head(tokenizer: VisualTokenizer) -> None:
    features = torch.randn(3, 32, dtype=torch.float64)
    head = tokenizer.head.double()
    try:
        assert tokenizer.probabilities(features).dtype == torch.float64
    finally:
        head.float()


def test_the_table_looks_ids_up(table: VisualEmbedding) -> None:
    assert torch.equal(table(torch.tensor([13, 0])), table.weight[[13, 0]])


def test_the_table_mixes_its_rows_by_probability(table: VisualEmbedding) -> None:
    row = torch.zeros(1, 10)
    row[0, 2], row[0, 5] = 0.25, 0.75
    torch.testing.assert_close(table(row)[0], 0.25 * table.weight[2] + 0.75 * table.weight[5])


@pytest.mark.parametrize("with_gradients", [False, True])
def test_features_are_embedded_alike_in_one_chunk_or_many(
    tokenizer: VisualTokenizer, table: VisualEmbedding, monkeypatch: pytest.MonkeyPatch, with_gradients: bool
) -> None:
    features = torch.randn(7, 32)
    with torch.set_grad_enabled(with_gradients):
        whole = embed_features(features, tokenizer, table)
        monkeypatch.setattr(looktwice.model.visual_tokenizer, "CHUNK", 3)
        torch.testing.assert_close(embed_features(features, tokenizer, table), whole)
