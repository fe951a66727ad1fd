"""What exact mode costs: CPU seconds of a packed row, an update and decoding, over those of plain mode.

The models are those of `models.py`. A row has eight questions with pictures of several sizes; an update is forward and
backward of it under LoRA; decoding stands for itself as a row of single tokens, attention over a long cache left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from measure import interleaved, median_ratio, publish
from models import build
from PIL import Image
from torch import Tensor

from looktwice.messages import question_about
from looktwice.model.adapters import add_lora, base_of
from looktwice.model.exact import ExactMode
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.weights import TINY, locate
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example, Ovis2_5Processor

MODELS = ("tiny", "body", "vocab")
SIZES = [(96, 64), (64, 128), (200, 150), (48, 48)] * 2
NUM_TRAINED, NUM_DECODED, NUM_STEPS = 40, 16, 5
REPEATS = 5


def main() -> None:
    processor = Ovis2_5Processor.from_pretrained(locate(TINY))
    examples = draw_examples(processor)
    figures: dict[str, float] = {"row_tokens": sum(map(len, examples))}
    for name in MODELS:
        for job, run in jobs(build(TINY if name == "tiny" else name, "cpu"), examples).items():
            figures[f"{name}.{job}_exact_vs_plain"] = cost(run)
    publish(figures)


def draw_examples(processor: Ovis2_5Processor) -> list[Example]:
    rng = np.random.default_rng(0)
    examples = []
    for size in SIZES:
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        conversation = question_about("What digit is on the red tile of this board? " * 3, image)
        example = processor.encode(conversation, purpose="prompt")
        example.loss_mask[-NUM_TRAINED:] = [True] * NUM_TRAINED
        examples.append(example)
    return examples


def jobs(model: Ovis2_5ForConditionalGeneration, examples: list[Example]) -> dict[str, Callable[[], None]]:
    adapted = add_lora(model, r=8, alpha=16).eval()
    row: dict[str, Tensor] = pack(examples).model_inputs()
    single = pack([Example(input_ids=[7], loss_mask=[False], images=[])] * NUM_DECODED).model_inputs()
    del single["loss_mask"]

    @torch.no_grad()
    def score() -> None:
        adapted(**row)

    @torch.no_grad()
    def decode() -> None:
        for _ in range(NUM_STEPS):
            base_of(adapted)(**single)

    def update() -> None:
        adapted.zero_grad()
        adapted(**row).logprobs.sum().backward()

    return {"packed_row": score, "update": update, f"decode_{NUM_DECODED}": decode}


def cost(run: Callable[[], None]) -> float:
    def run_exact() -> None:
        with ExactMode():
            run()

    run(), run_exact()  # the first time tries what the machine holds
    seconds = interleaved({"exact": run_exact, "plain": run}, repeats=REPEATS, clock=time.process_time)
    return median_ratio(seconds["exact"], seconds["plain"])


if __name__ == "__main__":
    main()
