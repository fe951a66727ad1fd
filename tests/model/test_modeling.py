"""The whole network: equal to the released implementation, packed equal to padded, and what it refuses."""

from __future__ import annotations

import copy
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.model import oracle
from tests.model.mixer import Mixer, image_inputs, padded_inputs
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import looktwice.model.logprobs
import looktwice.model.visual_tokenizer
from looktwice.geometry import Size, smart_resize
from looktwice.model.attention import packed_attention
from looktwice.model.configuration import IGNORE_INDEX, Ovis2_5Config
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.processing.images import normalise, open_image, patchify, resize
from looktwice.processing.packing import PackedBatch, collate_packed, pack
from looktwice.processing.processor import Example

SMALL_LLM: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
}
SMALL_VIT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 20,
    "window_size": 8,
}
GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
ALL_CASES, CASES_WITH_IMAGES = range(3), range(2)

# the golden vocabulary of 512 has no free ids, so visual positions get ids behind it
OUR_IDS = {-300: 514, -301: 515, -302: 516}
CONFIG_IDS = {
    "image_placeholder_id": 512,
    "video_placeholder_id": 513,
    "image_token_id": 514,
    "image_start_token_id": 515,
    "image_end_token_id": 516,
    "video_start_token_id": 517,
    "video_end_token_id": 518,
}


def load_golden(**options: Any) -> Ovis2_5ForConditionalGeneration:
    config = Ovis2_5Config.from_pretrained(GOLDEN, **CONFIG_IDS)
    return Ovis2_5ForConditionalGeneration.from_pretrained(GOLDEN, config=config, **options).eval()


@pytest.fixture(scope="module")
def golden() -> Ovis2_5ForConditionalGeneration:
    """The golden checkpoint. Tests must not change its weights."""
    return load_golden()


def expected(case: int) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"expected_{case}.safetensors")


def golden_inputs(case: int) -> dict[str, Any]:
    """The released implementation's own inputs, with our ids."""
    stored = expected(case)
    ids = stored["input_ids"]
    for theirs, ours in OUR_IDS.items():
        ids = torch.where(ids == theirs, ours, ids)
    return {
        "input_ids": ids[None],
        "labels": stored["labels"][None],
        "pixel_values": stored.get("pixel_values"),
        "image_grid_thw": stored.get("grid_thws"),
    }


def assert_equal_to_golden(actual: Tensor, wanted: Tensor) -> None:
    """Within 1e-4 of the tensor's largest value."""
    assert actual.shape == wanted.shape
    assert (actual - wanted).abs().max() <= 1e-4 * wanted.abs().max()


# -- equal to the released implementation


@pytest.mark.parametrize("case", CASES_WITH_IMAGES)
def test_images_become_the_golden_pixels(case: int) -> None:
    wanted = expected(case)
    record = CASES[case]
    patched = []
    for name in record["images"]:
        image = open_image(GOLDEN / name)
        size = smart_resize(
            Size(*image.size), factor=32, min_pixels=record["min_pixels"], max_pixels=record["max_pixels"]
        )
        patched.append(patchify(resize(image, size), patch_size=16, stride=2))
    assert [list(image.grid_thw) for image in patched] == wanted["grid_thws"].tolist()
    pixels = normalise(torch.cat([image.pixel_values for image in patched]))
    # (v / 255 - 0.5) / 0.5 and v / 127.5 - 1 differ in the last bit; one grey value is 0.0078
    torch.testing.assert_close(pixels, wanted["pixel_values"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", CASES_WITH_IMAGES)
@torch.no_grad()
def test_the_tower_gives_the_golden_features(golden: Ovis2_5ForConditionalGeneration, case: int) -> None:
    wanted = expected(case)
    features = golden.model.visual_tokenizer.vit(wanted["pixel_values"], wanted["grid_thws"])
    assert_equal_to_golden(features, wanted["vit_features"])


@pytest.mark.parametrize("case", CASES_WITH_IMAGES)
@torch.no_grad()
def test_features_become_the_golden_visual_tokens(golden: Ovis2_5ForConditionalGeneration, case: int) -> None:
    wanted = expected(case)
    visual_tokens = golden.model.visual_tokenizer.probabilities(wanted["vit_features"])
    assert_equal_to_golden(F.pad(visual_tokens, (0, 4)), wanted["visual_probs"])


@pytest.mark.parametrize("case", CASES_WITH_IMAGES)
@torch.no_grad()
def test_ids_and_images_merge_into_the_golden_embeddings(golden: Ovis2_5ForConditionalGeneration, case: int) -> None:
    inputs = golden_inputs(case)
    features = golden.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    embeds = golden.model.embed(inputs["input_ids"], features)
    assert_equal_to_golden(embeds[0], expected(case)["inputs_embeds"])


@pytest.mark.parametrize("case", ALL_CASES)
@torch.no_grad()
def test_the_model_gives_the_golden_logits(golden: Ovis2_5ForConditionalGeneration, case: int) -> None:
    logits = golden(**golden_inputs(case), return_logits=True).logits[0]
    assert_equal_to_golden(logits, expected(case)["logits"])


@pytest.mark.parametrize("case", ALL_CASES)
@torch.no_grad()
def test_the_model_gives_the_golden_loss(golden: Ovis2_5ForConditionalGeneration, case: int) -> None:
    assert_equal_to_golden(golden(**golden_inputs(case)).loss[None], expected(case)["loss"])


@pytest.mark.parametrize("case", ALL_CASES)
def test_the_loss_has_the_golden_gradients(case: int) -> None:
    model = load_golden()
    model(**golden_inputs(case)).loss.backward()
    parameters = dict(model.named_parameters())
    wanted = {name.removeprefix("grad."): value for name, value in expected(case).items() if name.startswith("grad.")}
    assert len(wanted) == 6
    for name, gradient in wanted.items():
        ours = parameters[oracle.our_name(name)].grad
        assert_equal_to_golden(torch.zeros_like(gradient) if ours is None else ours, gradient)


def test_saving_gives_the_released_tensors_back_bit_for_bit(
    golden: Ovis2_5ForConditionalGeneration, tmp_path: Path
) -> None:
    golden.save_pretrained(tmp_path)
    released, saved = load_file(GOLDEN / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert saved.keys() == released.keys()
    assert [name for name in released if not torch.equal(saved[name], released[name])] == []


def test_the_divisor_of_the_loss_can_be_given(golden: Ovis2_5ForConditionalGeneration) -> None:
    inputs = golden_inputs(0)
    num_trained = int((inputs["labels"] != IGNORE_INDEX).sum())
    with torch.no_grad():
        loss = golden(**inputs, num_items_in_batch=2 * num_trained).loss
    assert_equal_to_golden(2 * loss[None], expected(0)["loss"])


# -- packed, padded and alone


@pytest.fixture
def mix(model: Ovis2_5ForConditionalGeneration) -> Callable[..., list[Example]]:
    def make(*num_images: int, seed: int = 0) -> list[Example]:
        mixer = Mixer(model.config, seed)
        return [mixer.example(number) for number in num_images]

    return make


def without_mask(batch: PackedBatch) -> dict[str, Any]:
    inputs = batch.model_inputs()
    del inputs["loss_mask"]
    return inputs


@torch.no_grad()
def logits_alone(model: Ovis2_5ForConditionalGeneration, example: Example) -> Tensor:
    return model(input_ids=torch.tensor([example.input_ids]), **image_inputs([example])).logits[0]


MIXES = [(0, 0), (1, 0, 2), (0, 3, 1), (2, 2, 0, 1)]


@pytest.mark.parametrize("num_images", MIXES)
def test_packed_sequences_give_the_logits_they_give_alone(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]], num_images: tuple[int, ...]
) -> None:
    examples = mix(*num_images)
    with torch.no_grad():
        packed = model(**without_mask(pack(examples))).logits[0]
    alone = torch.cat([logits_alone(model, example) for example in examples])
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_images", MIXES)
def test_padded_rows_give_the_logits_they_give_alone(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]], num_images: tuple[int, ...], side: str
) -> None:
    examples = mix(*num_images)
    inputs = padded_inputs(examples, side)
    with torch.no_grad():
        padded = model(**inputs).logits
    alone = torch.cat([logits_alone(model, example) for example in examples])
    torch.testing.assert_close(padded[inputs["attention_mask"].bool()], alone, atol=2e-5, rtol=1e-5)


def test_an_image_shown_in_two_sequences_needs_to_be_stored_only_once(model: Ovis2_5ForConditionalGeneration) -> None:
    mixer = Mixer(model.config, seed=0)
    shared, other = mixer.image(), mixer.image()
    first, second = Example(), Example()
    for example, images in ((first, [shared, other]), (second, [shared])):
        for image in images:
            mixer.append_image(example, image)
            example.append([5, 6, 7], is_trained=True)
    once = pack([first, second])
    twice = without_mask(once) | {
        "pixel_values": torch.cat([image.pixel_values for image in (shared, other, shared)]),
        "image_grid_thw": torch.tensor([image.grid_thw for image in (shared, other, shared)]),
        "image_index": None,
    }
    assert len(once.image_grid_thw) == 2
    with torch.no_grad():
        torch.testing.assert_close(model(**without_mask(once)).logits, model(**twice).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [3, 1024])
def test_the_logprobs_of_a_pack_are_those_of_its_logits(
    model: Ovis2_5ForConditionalGeneration,
    mix: Callable[..., list[Example]],
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
) -> None:
    monkeypatch.setattr(looktwice.model.logprobs, "LOGPROB_CHUNK", chunk)
    batch = pack(mix(1, 0, 2))
    with torch.no_grad():
        output = model(**batch.model_inputs(), temperature=0.7, with_entropy=True)
        logits = model(**without_mask(batch)).logits[0]
    places = batch.loss_mask[0].nonzero()[:, 0]
    wanted = F.log_softmax(logits[places - 1] / 0.7, dim=-1)
    chosen = wanted.gather(1, batch.input_ids[0, places][:, None])[:, 0]
    torch.testing.assert_close(output.logprobs, chosen, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(output.entropy, -(wanted.exp() * wanted).sum(-1), atol=2e-5, rtol=1e-5)


def test_nothing_but_logprobs_is_kept_when_only_they_are_asked_for(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]]
) -> None:
    with torch.no_grad():
        output = model(**pack(mix(0)).model_inputs())
    assert (output.logits, output.entropy) == (None, None)


IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize(
    ("asked", "num_kept"), [({}, 0), ({"return_logits": True}, 4), ({"logits_to_keep": 1}, 1), ({"labels": None}, 4)]
)
def test_beside_a_loss_logits_exist_only_when_they_are_asked_for(
    model: Ovis2_5ForConditionalGeneration, asked: dict[str, Any], num_kept: int
) -> None:
    with torch.no_grad():
        output = model(**{"input_ids": IDS, "labels": IDS, **asked})
    assert (0 if output.logits is None else output.logits.shape[1]) == num_kept
    assert (output.loss is None) == ("labels" in asked)


def test_with_labels_no_tensor_holds_the_words_of_all_tokens(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looktwice.model.logprobs, "LOGPROB_CHUNK", 3)
    with WidestRows(model.config.vocab_size) as seen:
        model(**collate_packed(mix(0, 0))).loss.backward()
    model.zero_grad()
    assert seen.most == 3


class WidestRows(TorchDispatchMode):
    """The most rows that a tensor as wide as the vocabulary had."""

    def __init__(self, num_words: int) -> None:
        super().__init__()
        self.num_words, self.most = num_words, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # a transposed weight is as wide and no logits
        if isinstance(out, Tensor) and out.shape[-1:] == (self.num_words,) and out.is_contiguous():
            self.most = max(self.most, out.numel() // self.num_words)
        return out


def test_the_summed_logprobs_are_their_sum(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]]
) -> None:
    inputs = pack(mix(1, 0)).model_inputs()
    with torch.no_grad():
        total = model(**inputs, summed=True).logprobs
        torch.testing.assert_close(total, model(**inputs).logprobs.sum()[None])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"loss_mask": IDS > 6}, "loss_mask marks places of input_ids"),
        ({"input_ids": IDS.repeat(2, 1), "loss_mask": IDS.repeat(2, 1) > 6}, r"loss_mask is \[2, 4\], .*of one row"),
        ({"input_ids": IDS, "loss_mask": (IDS > 6)[:, :3]}, r"loss_mask is \[1, 3\], input_ids \[1, 4\]"),
        ({"input_ids": IDS, "loss_mask": IDS < 7}, "marks the first token of a sequence"),
        ({"input_ids": IDS, "loss_mask": IDS == 7, "cu_seqlens": torch.tensor([0, 2, 4])}, "marks the first token"),
        ({}, "give input_ids or inputs_embeds"),
        ({"input_ids": IDS, "pixel_values": torch.zeros(4, 588)}, "pixel_values come with image_grid_thw"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused(
    model: Ovis2_5ForConditionalGeneration, inputs: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def gradients(model: Ovis2_5ForConditionalGeneration, batch: PackedBatch) -> dict[str, Tensor]:
    """Of the summed loss, in training mode, with the model left as it was."""
    model.train()
    model.zero_grad()
    (-model(**batch.model_inputs()).logprobs.sum()).backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    model.eval()
    return found


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-4)


def test_gradients_do_not_depend_on_where_chunks_end(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = copy.deepcopy(model), pack(mix(2, 1, 0))
    whole = gradients(model, batch)
    monkeypatch.setattr(looktwice.model.logprobs, "LOGPROB_CHUNK", 3)
    monkeypatch.setitem(looktwice.model.visual_tokenizer.CHUNK, "cpu", 2)
    assert_same_gradients(gradients(model, batch), whole)


def test_a_pack_gives_the_sum_of_the_gradients_of_its_sequences(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]]
) -> None:
    model, examples = copy.deepcopy(model), mix(1, 2)
    together = gradients(model, pack(examples))
    parts = [gradients(model, pack([example])) for example in examples]
    assert_same_gradients(together, {name: parts[0][name] + parts[1][name] for name in parts[0]})


def tower_of(model: Ovis2_5ForConditionalGeneration, name: str) -> PreTrainedModel:
    towers = {"llm": model.model.language_model, "vit": model.model.visual_tokenizer.vit, "both": model}
    return towers[name]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("tower", ["llm", "vit", "both"])
def test_gradient_checkpointing_recomputes_the_layers_of_its_tower_and_gives_the_same_gradients(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]], tower: str
) -> None:
    model, batch = copy.deepcopy(model), pack(mix(1, 0))
    kept = gradients(model, batch)
    tower_of(model, tower).gradient_checkpointing_enable()
    calls = Counter[str]()
    layers = {
        "llm": model.model.language_model.layers,
        "vit": model.model.visual_tokenizer.vit.encoder.layers,
    }
    for name, stack in layers.items():
        for layer in stack:
            layer.self_attn.register_forward_hook(lambda *_, name=name: calls.update([name]))
    assert_same_gradients(gradients(model, batch), kept)
    passes = {name: calls[name] / len(stack) for name, stack in layers.items()}
    assert passes == {name: 2 if tower in (name, "both") else 1 for name in layers}


# -- equal to a plain re-implementation, for configs that were never released


@st.composite
def configs(draw: st.DrawFn) -> Ovis2_5Config:
    patch_size, stride, num_layers = (draw(st.sampled_from(values)) for values in ((4, 8, 14), (1, 2, 3), (1, 2, 3)))
    listed = draw(st.none() | st.sets(st.integers(0, 3), min_size=1))
    key_heads, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    vit_heads, vit_head_dim = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([4, 8, 12]))
    return Ovis2_5Config(
        llm_config={
            "vocab_size": 60,
            "hidden_size": draw(st.sampled_from([8, 12])),
            "intermediate_size": 16,
            "num_hidden_layers": draw(st.sampled_from([1, 2])),
            "num_attention_heads": key_heads * group,
            "num_key_value_heads": key_heads,
            "head_dim": draw(st.sampled_from([4, 8])),
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            "tie_word_embeddings": draw(st.booleans()),
            "pad_token_id": 0,
        },
        vit_config={
            "hidden_size": vit_heads * vit_head_dim,
            "intermediate_size": 20,
            "num_hidden_layers": num_layers,
            "num_attention_heads": vit_heads,
            "patch_size": patch_size,
            "hidden_stride": stride,
            "image_size": patch_size * draw(st.sampled_from([2, 5])),
            "num_patches": draw(st.sampled_from([-1, -1, 9])),
            "window_size": patch_size * stride * draw(st.sampled_from([1, 2])) + draw(st.sampled_from([0, 3])),
            "fullatt_block_indexes": None if listed is None else "|".join(map(str, sorted(listed))),
            "use_rope": draw(st.sampled_from([True, True, False])),
            "preserve_original_pe": draw(st.sampled_from([True, True, False])),
        },
        visual_vocab_size=24,
        **dict(zip(CONFIG_IDS, range(53, 60))),
    )


def small_config(*, is_tied: bool = False, fullatt_block_indexes: str | None = None) -> Ovis2_5Config:
    return Ovis2_5Config(
        llm_config=SMALL_LLM | {"tie_word_embeddings": is_tied},
        vit_config=SMALL_VIT | {"fullatt_block_indexes": fullatt_block_indexes},
        visual_vocab_size=24,
        **dict(zip(CONFIG_IDS, range(53, 60))),
    )


def implementations(model: Ovis2_5ForConditionalGeneration) -> tuple[str, str]:
    towers = (model.model.language_model, model.model.visual_tokenizer.vit)
    return tuple(tower.config._attn_implementation for tower in towers)  # type: ignore[return-value]


def build(config: Ovis2_5Config, seed: int) -> Ovis2_5ForConditionalGeneration:
    """Weights spread wide enough that every part of the network shows in the logits."""
    torch.manual_seed(seed)
    model = Ovis2_5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_norm = weight.ndim == 1 and name.endswith("weight")
            weight.normal_(1.0 if is_norm else 0.0, 0.3)
    return model


def released_weights(model: Ovis2_5ForConditionalGeneration) -> oracle.Weights:
    return {oracle.released_name(name): weight.detach().clone() for name, weight in model.named_parameters()}


def oracle_logits(weights: oracle.Weights, config: Ovis2_5Config, example: Example) -> Tensor:
    pixels = image_inputs([example]).get("pixel_values")
    return oracle.logits(weights, config, example.input_ids, pixels, [image.grid_thw for image in example.images])


def random_mix(config: Ovis2_5Config, num_frames: list[list[int]], seed: int) -> list[Example]:
    """One example for each list, with a picture or video of so many frames for each number."""
    mixer = Mixer(config, seed)
    examples = []
    for numbers in num_frames:
        example = mixer.example(0)
        for number in numbers:
            mixer.append_image(example, mixer.image(number))
            example.append([3, 4], is_trained=True)
        examples.append(example)
    return examples


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    config=configs(),
    num_frames=st.lists(st.lists(st.sampled_from([1, 1, 1, 2, 3]), max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
@torch.no_grad()
def test_alone_packed_and_padded_give_the_logits_of_the_plain_network(
    config: Ovis2_5Config, num_frames: list[list[int]], seed: int
) -> None:
    model, examples = build(config, seed), random_mix(config, num_frames, seed)
    wanted = torch.cat([oracle_logits(released_weights(model), config, example) for example in examples])
    tolerance = 1e-4 * float(wanted.abs().max())
    alone = torch.cat([logits_alone(model, example) for example in examples])
    torch.testing.assert_close(alone, wanted, atol=tolerance, rtol=1e-4)
    packed = model(**without_mask(pack(examples))).logits[0]
    torch.testing.assert_close(packed, wanted, atol=tolerance, rtol=1e-4)
    for side in ("left", "right"):
        inputs = padded_inputs(examples, side)
        padded = model(**inputs).logits[inputs["attention_mask"].bool()]
        torch.testing.assert_close(padded, wanted, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("listed", [None, "0"])
def test_gradients_are_those_of_the_plain_network(is_tied: bool, listed: str | None) -> None:
    config = small_config(is_tied=is_tied, fullatt_block_indexes=listed)
    model = build(config, seed=0)
    examples = random_mix(config, [[1, 2], [], [1]], seed=0)
    weights = {name: weight.requires_grad_() for name, weight in released_weights(model).items()}
    wanted = torch.cat([oracle_logits(weights, config, example) for example in examples])
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    (wanted * direction).sum().backward()
    (model(**without_mask(pack(examples))).logits[0] * direction).sum().backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert_same_gradients(
        found, {oracle.our_name(name): weight.grad for name, weight in weights.items() if weight.grad is not None}
    )


# -- every attention implementation


def uncompiled_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes half a minute; the arithmetic is the same without."""

    def plain(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options: Any) -> Any:
        return flex_attention(query, key, value, **options)

    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", plain)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("listed", [None, "0"])
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@torch.no_grad()
def test_packed_rows_give_the_logits_of_sdpa_with_any_attention(
    implementation: str, listed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    uncompiled_flex(monkeypatch)
    config = small_config(fullatt_block_indexes=listed)
    model = build(config, seed=0)
    batch = pack(random_mix(config, [[1, 2], [], [1]], seed=0))
    wanted = model(**without_mask(batch)).logits
    model.set_attn_implementation(implementation)
    assert implementations(model) == (implementation, implementation)
    torch.testing.assert_close(model(**without_mask(batch)).logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_give_the_logits_of_sdpa_with_eager_attention(side: str) -> None:
    config = small_config()
    model = build(config, seed=0)
    inputs = padded_inputs(random_mix(config, [[1, 2], [], [1]], seed=0), side)
    is_real = inputs["attention_mask"].bool()
    wanted = model(**inputs).logits[is_real]
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs).logits[is_real], wanted, atol=1e-4, rtol=1e-4)


def test_eager_attention_has_the_gradients_of_sdpa() -> None:
    config = small_config(fullatt_block_indexes="0")
    model = build(config, seed=0)
    batch = pack(random_mix(config, [[1, 2], [], [1]], seed=0))
    wanted = gradients(model, batch)
    model.set_attn_implementation("eager")
    assert_same_gradients(gradients(model, batch), wanted)


@torch.no_grad()
def test_flash_attention_gets_the_sequences_and_segments_of_both_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs on GPUs only. In its place stands one that notes its arguments and computes the same by SDPA."""
    config = small_config(fullatt_block_indexes="0")
    model = build(config, seed=0)
    examples = random_mix(config, [[2], []], seed=0)
    batch = pack(examples)
    wanted = model(**without_mask(batch)).logits
    calls: list[dict[str, Any]] = []

    def varlen_kernel(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = packed_attention(
            *heads_first,
            options["cu_seqlens_q"].tolist(),
            scale=options["softmax_scale"],
            is_causal=options["causal"],
        )
        return out[0].transpose(0, 1)

    everything = defaultdict(lambda: True)
    functions = (None, varlen_kernel, None, None, None)
    process = partial(flash_utils._process_flash_attention_kwargs, supports_mapping=everything)
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *_, **__: (functions, (process, None)))
    for part in (config.llm_config, config.vit_config):
        part._attn_implementation_internal = "flash_attention_2"
    torch.testing.assert_close(model(**without_mask(batch)).logits, wanted, atol=1e-4, rtol=1e-4)

    _, h, w = examples[0].images[0].grid_thw
    full_layer, windowed_layer, llm_layer, *_ = calls
    assert full_layer["cu_seqlens_q"].tolist() == [0, h * w, 2 * h * w]
    assert len(windowed_layer["cu_seqlens_q"]) > 3
    assert llm_layer["cu_seqlens_q"].tolist() == batch.cu_seqlens.tolist()
    assert [call["causal"] for call in calls] == [False, False, True, True]
    for call, head_dim in zip(calls, [8, 8, 4, 4]):
        starts = call["cu_seqlens_q"]
        assert starts.dtype == torch.int32 and torch.equal(call["cu_seqlens_k"], starts)
        assert call["max_seqlen_q"] == call["max_seqlen_k"] == int(starts.diff().max())
        assert call["softmax_scale"] == head_dim**-0.5
        assert call["dropout_p"] == 0.0 and "window_size" not in call


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        ("sdpa", ("packed_sdpa", "packed_sdpa")),
        ("eager", ("eager", "eager")),
        ({"llm_config": "flex_attention", "vit_config": "eager"}, ("flex_attention", "eager")),
        ({"vit_config": "eager"}, ("packed_sdpa", "eager")),
    ],
)
def test_attention_is_chosen_for_both_towers_or_for_each(chosen: str | dict[str, str], found: tuple[str, str]) -> None:
    assert implementations(load_golden(attn_implementation=chosen)) == found
    later = load_golden()
    later.set_attn_implementation(chosen)
    assert implementations(later) == found


def test_going_back_to_sdpa_packs_again() -> None:
    config = small_config()
    model = build(config, seed=0)
    batch = pack(random_mix(config, [[1], []], seed=0))
    with torch.no_grad():
        wanted = model(**without_mask(batch)).logits
        model.set_attn_implementation("eager")
        model.set_attn_implementation("sdpa")
        assert torch.equal(model(**without_mask(batch)).logits, wanted)


# -- what is refused, and what is allowed


def test_more_visual_tokens_than_images_give_is_an_error(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]]
) -> None:
    inputs = without_mask(pack(mix(1)))
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, 0] = model.config.image_token_id
    with pytest.raises(ValueError, match=r"\d+ visual tokens in input_ids, \d+ in the pictures"):
        model(**inputs)


def test_visual_tokens_without_images_are_an_error(model: Ovis2_5ForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="1 visual tokens in input_ids, 0 in the pictures"):
        model(input_ids=torch.tensor([[5, model.config.image_token_id, 6]]))


def test_patches_that_do_not_fit_the_grid_are_an_error(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]]
) -> None:
    inputs = without_mask(pack(mix(1)))
    inputs["pixel_values"] = inputs["pixel_values"][:-4]
    with pytest.raises(ValueError, match="image_grid_thw describes"):
        model(**inputs)


def test_a_packed_row_refuses_a_cache(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]]
) -> None:
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([[5, 6]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="uses no cache"):
        model(**without_mask(pack(mix(0))), past_key_values=cache)


def test_a_packed_row_makes_no_cache_even_when_asked(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]]
) -> None:
    with torch.no_grad():
        assert model(**without_mask(pack(mix(0, 0))), use_cache=True).past_key_values is None


def test_a_pack_of_two_rows_is_refused(model: Ovis2_5ForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="one row"):
        model(input_ids=torch.tensor([[5, 6], [7, 8]]), cu_seqlens=torch.tensor([0, 2], dtype=torch.int32))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_frozen_embeddings_with_input_gradients_train(
    model: Ovis2_5ForConditionalGeneration, mix: Callable[..., list[Example]], is_checkpointed: bool
) -> None:
    model, batch = copy.deepcopy(model), pack(mix(1, 0))
    wanted = gradients(model, batch)
    model.get_input_embeddings().requires_grad_(False)
    model.enable_input_require_grads()
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    found = gradients(model, batch)
    del wanted["model.language_model.embed_tokens.weight"]
    assert_same_gradients(found, wanted)
