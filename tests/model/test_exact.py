"""Exact mode: a sequence scored alone, among others, or token by token from a cache gives the same bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tests.model.mixer import Mixer
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from looktwice.errors import ConfigError
from looktwice.model import exact, logprobs, visual_tokenizer
from looktwice.model.adapters import add_lora, base_of, trained_parameters
from looktwice.model.exact import (
    ExactError,
    ExactMode,
    check_exact,
    exact_attention,
    exact_decode_attention,
    without_dropout,
)
from looktwice.model.logprobs import token_logprobs
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example
from looktwice.training.trainable import recompute_layers

TEMPERATURE = 0.7
LOOP = "exact_test_loop"


@contextmanager
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def adapted(model: Ovis2_5ForConditionalGeneration) -> PeftModel:
    """The tiny model under an adapter of both towers that does something."""
    torch.manual_seed(0)
    adapted = add_lora(copy.deepcopy(model), r=4, alpha=8, targets="llm+vit")
    with torch.no_grad():
        for _, weight in trained_parameters(adapted):
            weight += 0.02 * torch.randn_like(weight)
    return adapted.eval()


@pytest.fixture(scope="module")
def examples(model: Ovis2_5ForConditionalGeneration) -> list[Example]:
    """Text only, one picture, several, the same picture twice, and one longer than a block of keys."""
    mixer = Mixer(model.config, seed=3)
    drawn = [mixer.example(num_images) for num_images in (0, 1, 3, 2, 1)]
    mixer.append_image(drawn[3], drawn[3].images[0])
    while len(drawn[4]) < exact.KEY_BLOCK + 20:
        mixer.append_image(drawn[4], mixer.image())
        mixer._append_text(drawn[4])
    for example in drawn:
        example.loss_mask = [False] + [True] * (len(example) - 1)
    return drawn


@torch.no_grad()
def score(model: torch.nn.Module, examples: list[Example]) -> list[Tensor]:
    """Logprobs of each example, all in one packed row, as training computes them."""
    with ExactMode():
        scores = model(**pack(examples).model_inputs(), temperature=TEMPERATURE).logprobs
    return list(scores.split([sum(example.loss_mask) for example in examples]))


class Loop:
    """What an engine does: pieces of any trajectories side by side in one flat row, keys and values kept for each."""

    def __init__(self, model: torch.nn.Module, examples: list[Example]) -> None:
        self.model = base_of(model)
        self.examples = examples
        self.cached: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in examples]
        self.fed = [0] * len(examples)
        self.logits: list[dict[int, Tensor]] = [{} for _ in examples]
        self.features = [self._features(example) for example in examples]
        self.pieces: list[tuple[int, slice]] = []

    def _features(self, example: Example) -> Tensor | None:
        """One picture at a time."""
        parts = [
            self.model.get_image_features(image.pixel_values, torch.tensor([image.grid_thw]))
            for image in example.images
        ]
        return torch.cat(parts) if parts else None

    def step(self, counts: dict[int, int]) -> None:
        """Feed the next `counts` ids of each of these trajectories."""
        self.pieces = [(number, slice(self.fed[number], self.fed[number] + n)) for number, n in counts.items()]
        ids = [token for number, place in self.pieces for token in self.examples[number].input_ids[place]]
        positions = torch.cat([torch.arange(place.start, place.stop) for _, place in self.pieces])
        features = [rows for number, place in self.pieces for rows in self._shown(number, place)]
        config = self.model.config.llm_config
        before, config._attn_implementation = config._attn_implementation, LOOP
        try:
            hidden = self.model.model.language_model(
                inputs_embeds=self.model.model.embed(torch.tensor([ids]), torch.stack(features) if features else None),
                attention_mask={"full_attention": None},
                position_ids=positions[None],
                use_cache=False,
                loop=self,
            ).last_hidden_state[0]
        finally:
            config._attn_implementation = before
        logits = self.model.lm_head(hidden).split([place.stop - place.start for _, place in self.pieces])
        for (number, place), rows in zip(self.pieces, logits):
            self.logits[number] |= dict(zip(range(place.start, place.stop), rows))
            self.fed[number] = place.stop

    def _shown(self, number: int, place: slice) -> list[Tensor]:
        """Vectors of the visual tokens of a piece."""
        atoms = [token == self.model.config.image_token_id for token in self.examples[number].input_ids]
        first = sum(atoms[: place.start])
        features = self.features[number]
        return [] if features is None else list(features[first : first + sum(atoms[place])])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[T, H, D], [T, K, D], [T, K, D] -> [T, H, D]; what decodes does so together."""
        borders = list(pairwise([0, *accumulate(place.stop - place.start for _, place in self.pieces)]))
        out = torch.empty_like(query)
        decoding = []
        for (number, place), (first, end) in zip(self.pieces, borders):
            new = (key[first:end], value[first:end])
            old = self.cached[number].get(layer)
            keys, values = new if old is None else (torch.cat(pair) for pair in zip(old, new))
            self.cached[number][layer] = keys, values
            if end - first == 1:
                decoding.append((first, place.start, keys, values))
            else:
                positions = torch.arange(place.start, place.stop)
                out[first:end] = exact_attention(query[first:end], keys, values, positions, scale=scale)
        if decoding:
            rows, places, all_keys, all_values = zip(*decoding)
            keys, values = (
                torch.nn.utils.rnn.pad_sequence(list(cached), batch_first=True) for cached in (all_keys, all_values)
            )
            positions = torch.tensor(places)
            out[list(rows)] = exact_decode_attention(query[list(rows)], keys, values, positions, scale=scale)
        return out

    def forget(self, number: int) -> None:
        self.cached[number], self.fed[number] = {}, 0

    def logprobs(self, number: int) -> Tensor:
        """Of every id but the first: each row of logits scored by itself."""
        ids = torch.tensor(self.examples[number].input_ids)
        rows = [self.logits[number][place][None] for place in range(len(ids) - 1)]
        return torch.cat([token_logprobs(row, ids[place + 1, None], TEMPERATURE) for place, row in enumerate(rows)])


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, *, scaling: float, loop: Loop, **_: Any
) -> tuple[Tensor, None]:
    by_token = [x[0].transpose(0, 1) for x in (query, key, value)]
    return loop.attend(module.layer_idx, *by_token, scaling)[None], None


AttentionInterface.register(LOOP, _attend)


@torch.no_grad()
def sample_again(model: torch.nn.Module, examples: list[Example], seed: int) -> list[Tensor]:
    """The logprobs of a loop with a random schedule: steps of one, chunks of any size, and a cache lost midway."""
    rng = np.random.default_rng(seed)
    with ExactMode():
        loop = Loop(model, examples)
        num_preemptions = 2
        while live := [n for n, example in enumerate(examples) if loop.fed[n] < len(example)]:
            chosen = rng.permutation(live)[: rng.integers(1, len(live) + 1)].tolist()
            counts = {n: 1 if rng.random() < 0.7 else int(rng.integers(1, 40)) for n in chosen}
            loop.step({n: min(count, len(examples[n]) - loop.fed[n]) for n, count in counts.items()})
            if num_preemptions and rng.random() < 0.1:
                loop.forget(int(rng.choice(chosen)))
                num_preemptions -= 1
        return [loop.logprobs(n) for n in range(len(examples))]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert [float((a - b).abs().max()) for a, b in zip(actual, expected)] == [0.0] * len(expected)


def test_a_packed_row_scores_a_sequence_as_alone(adapted: PeftModel, examples: list[Example]) -> None:
    alone = [score(adapted, [example])[0] for example in examples]
    assert_same_bits(score(adapted, examples), alone)
    assert_same_bits(score(adapted, examples[::-1])[::-1], alone)


@pytest.mark.parametrize("seed", range(2))
def test_decoding_from_a_cache_scores_a_sequence_as_training_does(
    adapted: PeftModel, examples: list[Example], seed: int
) -> None:
    assert_same_bits(sample_again(adapted, examples, seed), score(adapted, examples))


def test_two_threads_give_the_bits_of_one(adapted: PeftModel, examples: list[Example]) -> None:
    few = examples[:2]
    expected = score(adapted, few)
    with two_threads():
        assert_same_bits(score(adapted, few), expected)
        assert_same_bits(sample_again(adapted, few, seed=0), expected)


def test_a_picture_has_the_same_features_beside_any_others(adapted: PeftModel, examples: list[Example]) -> None:
    images = [image for example in examples for image in example.images][:6]
    network = base_of(adapted)
    with torch.no_grad(), ExactMode():
        alone = [network.get_image_features(x.pixel_values, torch.tensor([x.grid_thw])) for x in images]
        together = network.get_image_features(
            torch.cat([image.pixel_values for image in images]), torch.tensor([image.grid_thw for image in images])
        )
    assert_same_bits(list(together.split([image.num_tokens for image in images])), alone)


def gradients(model: PeftModel, examples: list[Example], *, is_exact: bool) -> dict[str, Tensor]:
    model.zero_grad()
    inputs = pack(examples).model_inputs()
    with ExactMode() if is_exact else nullcontext():
        scores = model(**inputs).logprobs
    scores.sum().backward()
    return {name: weight.grad.clone() for name, weight in trained_parameters(model) if weight.grad is not None}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_gradients_are_those_of_plain_training(
    adapted: PeftModel, examples: list[Example], recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(adapted).train()
    if recompute:
        monkeypatch.setattr(logprobs, "LOGPROB_CHUNK", 64)
        monkeypatch.setitem(visual_tokenizer.CHUNK, "cpu", 8)
        recompute_layers(base_of(model), "all")
    plain, ours = (gradients(model, examples, is_exact=flag) for flag in (False, True))
    assert ours.keys() == plain.keys() and len(plain) > 50
    for name, expected in plain.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()), msg=name)


def test_a_query_comes_to_the_same_whatever_follows_its_keys() -> None:
    query, keys, values = torch.randn(3, 300, 4, 16).unbind()
    keys, values = keys[:, :2], values[:, :2]
    places = torch.arange(300)
    together = exact_attention(query, keys, values, places, scale=0.25)
    plain = F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (query, keys, values)), is_causal=True, scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(together, plain.transpose(0, 1))
    for place in (0, 1, 126, 127, 128, 200, 299):
        alone = exact_attention(
            query[place, None], keys[: place + 1], values[: place + 1], places[place, None], scale=0.25
        )
        assert torch.equal(alone[0], together[place])


def test_padded_rows_are_refused() -> None:
    query = torch.randn(2, 2, 5, 8)
    with ExactMode(), pytest.raises(ExactError, match="cu_seqlens"):
        F.scaled_dot_product_attention(query, query, query, is_causal=True)


def test_a_machine_whose_products_look_at_their_neighbours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(rows: Tensor, matrix: Tensor, sizes: tuple[int, ...]) -> Tensor:
        return rows @ matrix + sizes[0] * 1e-7

    monkeypatch.setattr(exact, "_tile_sizes", exact._tile_sizes.__wrapped__)
    monkeypatch.setattr(exact, "_tiled_product", product)
    with ExactMode(), pytest.raises(ExactError, match=r"matrix products of a shape \(.*OMP_NUM_THREADS=1"):
        F.linear(torch.ones(3, 8), torch.ones(5, 8))


@pytest.mark.parametrize("odd", [8, 16, 32])
def test_tiles_in_which_a_processor_sums_up_otherwise_are_left_out(odd, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def product(rows: Tensor, matrix: Tensor, sizes: tuple[int, ...]) -> Tensor:
        used.append(sizes)
        return rows @ matrix + (1e-3 if odd in sizes else 0.0)

    monkeypatch.setattr(exact, "_tile_sizes", exact._tile_sizes.__wrapped__)
    monkeypatch.setattr(exact, "_tiled_product", product)
    with ExactMode():
        F.linear(torch.ones(3, 8), torch.ones(5, 8))
    assert odd not in used[-1] and used[-1][0] == 256


def test_a_machine_whose_reductions_look_at_their_neighbours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_HELD", set())
    monkeypatch.setattr(exact, "_silu", lambda x: F.silu(x) + 1e-7 * len(x))
    with pytest.raises(ExactError, match="reductions and activations"):
        ExactMode().__enter__()


def test_what_exact_mode_does_not_hold_for_is_refused(model: Ovis2_5ForConditionalGeneration) -> None:
    check_exact(model)
    with pytest.raises(ConfigError, match="float32 on a CPU, the model in bfloat16"):
        check_exact(copy.deepcopy(model).bfloat16())
    with pytest.raises(ConfigError, match="leave bf16"):
        check_exact(model, is_bf16=True)
    adapted = add_lora(copy.deepcopy(model), r=2, alpha=2, dropout=0.1)
    assert (without_dropout(adapted), without_dropout(adapted)) == (0.1, 0.0)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match='takes attn_implementation "sdpa", .* has "eager"'):
        check_exact(eager)
