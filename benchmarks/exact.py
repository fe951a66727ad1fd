"""What exact mode costs: CPU seconds of a packed row, an update and decoding, over those of plain mode.

The models are those of `models.py`. A row has eight questions with pictures of several sizes; an update is forward and
backward of it under LoRA. Rollouts sample 12 ids of each of the eight prompts twice in the built-in engine, adapters
apart.
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

from looktwice.engine.builtin import BuiltinEngine
from looktwice.engine.interface import Request, Segment
from looktwice.messages import question_about
from looktwice.model.adapters import add_lora, base_of
from looktwice.model.exact import ExactMode
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.weights import TINY, locate
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example, Ovis2_5Processor

MODELS = ("tiny", "body", "vocab")
SIZES = [(96, 64), (64, 128), (200, 150), (48, 48)] * 2
NUM_TRAINED, NUM_SAMPLED = 40, 12
REPEATS = 3


class Ended:
    """The driver of a rollout of one segment."""

    def hear(self, token: int, logprob: float) -> None:
        pass

    def respond(self, segment: Segment) -> None:
        return None

    def fail(self, error: Exception) -> None:
        raise error


def main() -> None:
    torch.set_num_threads(1)
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

    @torch.no_grad()
    def score() -> None:
        adapted(**row)

    def roll_out() -> None:
        requests = [
            Request(prompt=example, drivers=[Ended(), Ended()], max_new_tokens=NUM_SAMPLED) for example in examples
        ]
        BuiltinEngine(base_of(adapted)).run(requests)

    def update() -> None:
        adapted.zero_grad()
        adapted(**row).logprobs.sum().backward()

    return {"packed_row": score, "update": update, "rollouts": roll_out}


def cost(run: Callable[[], None]) -> float:
    def run_exact() -> None:
        with ExactMode():
            run()

    run(), run_exact()  # the first time tries what the machine holds
    seconds = interleaved({"exact": run_exact, "plain": run}, repeats=REPEATS, clock=time.process_time)
    return median_ratio(seconds["exact"], seconds["plain"])


if __name__ == "__main__":
    main()
