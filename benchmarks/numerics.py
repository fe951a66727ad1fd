"""How far results differ that should be equal: golden outputs, packed rows, the cache, recomputed layers, merged LoRA.

Differences of logits are shares of the largest logit, those of logprobs are in nats, those of gradients are shares of
the largest gradient of the same weight. Golden outputs are float32, so bf16 is compared with float32 there.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
from measure import publish
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from looktwice.doctor.parity import Script
from looktwice.engine.builtin import BuiltinEngine
from looktwice.engine.interface import Request
from looktwice.messages import Conversation, user
from looktwice.model.adapters import add_lora, base_of, merge, trained_parameters
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.weights import TINY, load_model, locate
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example, Ovis2_5Processor

GOLDEN = Path(__file__).parents[1] / "tests" / "data" / "golden"
VISUAL_IDS = {-300: 514, -301: 515, -302: 516}
"""The golden files use the released negative ids; their vocabulary of 512 words ends before ours begin."""
CONFIG_IDS = {
    "image_placeholder_id": 512,
    "video_placeholder_id": 513,
    "image_token_id": 514,
    "image_start_token_id": 515,
    "image_end_token_id": 516,
    "video_start_token_id": 517,
    "video_end_token_id": 518,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_ROWS, TURN_TOKENS = 8, 24


def main() -> None:
    processor = Ovis2_5Processor.from_pretrained(locate(TINY))
    examples = draw_examples(processor)
    figures: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        model = base_of(load_model(TINY, dtype=dtype)).eval()
        figures[f"golden_logits_{name}"] = golden_difference(dtype)
        figures[f"packed_vs_alone_logprobs_{name}"] = packed_difference(model, examples)
        figures[f"padded_vs_alone_logits_{name}"] = padded_difference(model, examples)
        worst, mean = cache_difference(model, processor, examples)
        figures[f"cache_vs_recomputed_logprobs_{name}"] = worst
        figures[f"cache_vs_recomputed_logprobs_mean_{name}"] = mean
        figures[f"recomputed_layers_gradients_{name}"] = checkpointing_difference(model, examples)
        figures[f"merged_vs_adapter_logits_{name}"] = merging_difference(model, examples[0])
    publish(figures)


def draw_examples(processor: Ovis2_5Processor) -> list[Example]:
    """Questions about pictures of several sizes, and one without; the last 20 tokens count as trained."""
    rng = np.random.default_rng(0)
    sizes = [(96, 64), (64, 128), (200, 150), (48, 48), (160, 160), (300, 90), (64, 64), None]
    examples = []
    for number, size in enumerate(sizes):
        images = [] if size is None else [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))]
        question = "What digit is on the red tile of this board? " * (1 + number % 3)
        conversation = Conversation(messages=(user(question, *images),))
        example = processor.encode(conversation, purpose="prompt")
        example.loss_mask[-20:] = [True] * 20
        examples.append(example)
    return examples


def relative(actual: Tensor, wanted: Tensor) -> float:
    return float((actual.float() - wanted.float()).abs().max() / wanted.float().abs().max())


@torch.no_grad()
def golden_difference(dtype: torch.dtype) -> float:
    """Worst case of the released implementation's logits."""
    config = Ovis2_5Config.from_pretrained(GOLDEN, **CONFIG_IDS)
    model = Ovis2_5ForConditionalGeneration.from_pretrained(GOLDEN, config=config, dtype=dtype).eval()
    worst = 0.0
    for case in range(len(json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8")))):
        stored = load_file(GOLDEN / f"expected_{case}.safetensors")
        ids = stored["input_ids"]
        for theirs, ours in VISUAL_IDS.items():
            ids = torch.where(ids == theirs, ours, ids)
        images = {"pixel_values": stored.get("pixel_values"), "image_grid_thw": stored.get("grid_thws")}
        worst = max(worst, relative(model(ids[None], **images).logits[0], stored["logits"]))
    return worst


def logprobs(model: Ovis2_5ForConditionalGeneration, examples: list[Example]) -> Tensor:
    return model(**pack(examples).model_inputs()).logprobs


@torch.no_grad()
def packed_difference(model: Ovis2_5ForConditionalGeneration, examples: list[Example]) -> float:
    alone = torch.cat([logprobs(model, [example]) for example in examples])
    return float((logprobs(model, examples) - alone).abs().max())


@torch.no_grad()
def padded_difference(model: Ovis2_5ForConditionalGeneration, examples: list[Example]) -> float:
    """A left-padded batch, as `generate` makes it."""
    longest = max(len(example) for example in examples)
    ids = torch.tensor([[0] * (longest - len(example)) + example.input_ids for example in examples])
    mask = torch.tensor([[0] * (longest - len(example)) + [1] * len(example) for example in examples])
    images = [image for example in examples for image in example.images]
    padded = model(
        ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        pixel_values=torch.cat([image.pixel_values for image in images]),
        image_grid_thw=torch.tensor([image.grid_thw for image in images]),
    ).logits
    worst = 0.0
    for row, example in enumerate(examples):
        inputs = pack([example]).model_inputs()
        del inputs["loss_mask"]
        worst = max(worst, relative(padded[row, -len(example) :], model(**inputs).logits[0]))
    return worst


@torch.no_grad()
def cache_difference(
    model: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor, examples: list[Example]
) -> tuple[float, float]:
    """Logprobs noted while sampling through crops, against those of the finished sequence in one pass."""
    crop = next(example.images[0] for example in examples if example.images)
    prompts = [example.copy() for example in examples]
    for prompt in prompts:
        prompt.loss_mask = [False] * len(prompt)
    scripts = [Script(prompt, crop, processor, turn_tokens=TURN_TOKENS) for prompt in prompts]
    engine = BuiltinEngine(model, max_rows=len(prompts))
    engine.run([Request(prompt=one.prompt, drivers=[one], max_new_tokens=TURN_TOKENS) for one in scripts])
    finished, noted = [one.finished for one in scripts], [one.noted for one in scripts]
    difference = (logprobs(model, finished) - torch.tensor([value for row in noted for value in row])).abs()
    return float(difference.max()), float(difference.mean())


def checkpointing_difference(model: Ovis2_5ForConditionalGeneration, examples: list[Example]) -> float:
    """Gradients with all layers of both towers recomputed, against without."""

    def gradients(recompute: bool) -> dict[str, Tensor]:
        trained = copy.deepcopy(model).train()
        if recompute:
            trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        (-logprobs(trained, examples).mean()).backward()
        return {name: weight.grad for name, weight in trained.named_parameters() if weight.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    return max(relative(recomputed[name], plain[name]) for name in plain if plain[name].abs().max() > 0)


@torch.no_grad()
def merging_difference(model: Ovis2_5ForConditionalGeneration, example: Example) -> float:
    torch.manual_seed(0)
    adapted = add_lora(copy.deepcopy(model), r=16, alpha=32)
    for _, weight in trained_parameters(adapted):
        weight += 0.01 * torch.randn_like(weight)
    inputs = pack([example]).model_inputs()
    del inputs["loss_mask"]
    with torch.autocast("cpu", model.dtype, enabled=model.dtype != torch.float32):
        before = base_of(adapted)(**inputs).logits
    return relative(merge(adapted)(**inputs).logits, before)


if __name__ == "__main__":
    main()
