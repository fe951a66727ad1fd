"""Features to probability rows to language-model vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(looktwice.model.visual_tokenizer.CHUNK, "cpu", 3)
    monkeypatch.setitem(looktwice.model.visual_tokenizer.BLOCK, "cpu", 2)
    monkeypatch.setitem(looktwice.model.visual_tokenizer.KEPT, "cpu", 2)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_features_are_embedded_alike_in_one_chunk_or_many(
    tokenizer: VisualTokenizer, table: VisualEmbedding, monkeypatch: pytest.MonkeyPatch, with_gradients: bool
) -> None:
    features = torch.randn(7, 32)
    with torch.set_grad_enabled(with_gradients):
        whole = embed_features(features, tokenizer, table)
        small_chunks(monkeypatch)
        torch.testing.assert_close(embed_features(features, tokenizer, table), whole)


def gradients_of(embed: Callable[[Tensor], Tensor], features: Tensor, *modules: torch.nn.Module) -> list[Tensor]:
    """The vectors, then gradients of the features and of every weight that is trained."""
    features = features.clone().requires_grad_()
    weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    vectors = embed(features)
    return [vectors, *torch.autograd.grad(vectors.float().square().sum(), [features, *weights])]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("is_trained", [False, True])
def test_chunks_give_vectors_and_gradients_of_the_plain_product(
    monkeypatch: pytest.MonkeyPatch, is_trained: bool, dtype: torch.dtype, tolerance: float
) -> None:
    small_chunks(monkeypatch)
    head, table = make_head(num_words=50, width=20)
    head.to(dtype).requires_grad_(is_trained)
    table.to(dtype).requires_grad_(is_trained)
    features = torch.randn(11, 32).to(dtype)
    plain = gradients_of(lambda x: table(head.probabilities(x)), features, head.head, table)
    chunked = gradients_of(lambda x: embed_features(x, head, table), features, head.head, table)
    assert len(chunked) == (6 if is_trained else 2)
    for found, wanted in zip(chunked, plain, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, atol=tolerance * float(wanted.detach().abs().max()), rtol=tolerance)


def make_head(*, num_words: int, width: int) -> tuple[VisualTokenizer, VisualEmbedding]:
    config = Siglip2NavitConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32
    )
    torch.manual_seed(0)
    return VisualTokenizer(config, num_words + 4), VisualEmbedding(num_words + 4, width)


class MostRows(TorchDispatchMode):
    """The most rows that any tensor as wide as the visual vocabulary had, weights and their gradients aside."""

    def __init__(self, num_words: int, others: set[int]) -> None:
        super().__init__()
        self.num_words, self.others, self.found = num_words, others, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self.num_words in tensor.shape:
                rows = tensor.numel() // self.num_words
                self.found = max(self.found, 0 if rows in self.others else rows)
        return out


def test_scores_that_are_kept_are_not_used_up_by_a_backward() -> None:
    head, table = make_head(num_words=50, width=20)
    features = torch.randn(11, 32, requires_grad=True)
    total = embed_features(features, head, table).square().sum()
    once = torch.autograd.grad(total, [features, *head.head.parameters()], retain_graph=True)
    again = torch.autograd.grad(total, [features, *head.head.parameters()])
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("is_trained", [False, True])
def test_no_tensor_ever_holds_the_visual_words_of_all_tokens(monkeypatch: pytest.MonkeyPatch, is_trained: bool) -> None:
    small_chunks(monkeypatch)
    head, table = make_head(num_words=50, width=20)
    head.requires_grad_(is_trained)
    table.requires_grad_(is_trained)
    # 1: a norm's weight, 32: the head, 20: the table
    with MostRows(num_words=50, others={1, 32, 20}) as forward, torch.no_grad():
        embed_features(torch.randn(11, 32), head, table)
    with MostRows(num_words=50, others={1, 32, 20}) as both:
        gradients_of(lambda x: embed_features(x, head, table), torch.randn(11, 32), head.head, table)
    assert (forward.found, both.found) == (3, 3)


def test_frozen_weights_over_frozen_features_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    head, table = make_head(num_words=50, width=20)
    head.requires_grad_(False)
    table.requires_grad_(False)
    assert not embed_features(torch.randn(11, 32), head, table).requires_grad


@pytest.mark.parametrize("is_trained", [False, True])
def test_nothing_as_wide_as_the_visual_words_is_kept_for_backward(
    monkeypatch: pytest.MonkeyPatch, is_trained: bool
) -> None:
    small_chunks(monkeypatch)
    head, table = make_head(num_words=50, width=20)
    head.requires_grad_(is_trained)
    table.requires_grad_(is_trained)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embed_features(torch.randn(11, 32, requires_grad=True), head, table)
    weights = {id(weight) for module in (head, table) for weight in module.parameters()}
    assert [tensor.shape for tensor in kept if 50 in tensor.shape and id(tensor) not in weights] == []


@pytest.mark.parametrize("frozen", ["head", "table", "both"])
def test_frozen_parts_get_no_gradient_and_leave_the_others_as_they_are(frozen: str) -> None:
    head, table = make_head(num_words=50, width=20)
    head.requires_grad_(frozen == "table")
    table.requires_grad_(frozen == "head")
    features = torch.randn(11, 32)
    plain = gradients_of(lambda x: table(head.probabilities(x)), features, head.head, table)
    found = gradients_of(lambda x: embed_features(x, head, table), features, head.head, table)
    assert len(found) == {"head": 3, "table": 5, "both": 2}[frozen]
    torch.testing.assert_close(found, plain)


def test_under_autocast_gradients_are_those_of_the_plain_product() -> None:
    head, table = make_head(num_words=50, width=20)
    features = torch.randn(11, 32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients_of(lambda x: table(head.probabilities(x)), features, head.head, table)
        found = gradients_of(lambda x: embed_features(x, head, table), features, head.head, table)
    for ours, wanted in zip(found, plain, strict=True):
        assert ours.dtype == wanted.dtype
        torch.testing.assert_close(ours, wanted, atol=2e-2 * float(wanted.detach().abs().max()), rtol=2e-2)


def test_without_gradients_no_scores_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    head, table = make_head(num_words=50, width=20)
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda self, **options: kept.append(self) or clone(self, **options))
    with torch.no_grad():
        embed_features(torch.randn(5, 32), head, table)
    assert kept == []
    embed_features(torch.randn(5, 32), head, table)
    assert len(kept) == 1
