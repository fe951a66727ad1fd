"""Peak memory of head, softmax and visual table for one picture of 1792 x 1792: chunked against all at once.

Sizes and dtype are those of the released 2B model. Each figure comes from a process of its own: how far its resident
memory rose above what it was with weights and features in place.
"""

from __future__ import annotations

import multiprocessing
import resource
from typing import NamedTuple

import torch
from measure import publish
from torch import Tensor

from looktwice.model.configuration import Siglip2NavitConfig
from looktwice.model.visual_tokenizer import VisualEmbedding, VisualTokenizer, embed_features

NUM_TOKENS, VISUAL_VOCAB_SIZE, WIDTH = (1792 // 32) ** 2, 65536, 2048
MODES = ("forward", "backward_frozen", "backward_trained")
"""Without gradients; with gradients of the features alone, as when LoRA trains the tower; with those of all weights.

The last holds 0.87 GB of weight gradients either way, and while chunks are summed another such matrix of the head.
"""


class Case(NamedTuple):
    mode: str
    is_chunked: bool


def measure(case: Case) -> float:
    """Gigabytes of memory beyond weights and features."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Siglip2NavitConfig(num_hidden_layers=0)
    with torch.device("meta"):
        tokenizer = VisualTokenizer(config, VISUAL_VOCAB_SIZE)
        table = VisualEmbedding(VISUAL_VOCAB_SIZE, WIDTH)
    for module in (tokenizer, table):
        module.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(case.mode == "backward_trained")
        for weight in module.parameters():
            torch.nn.init.uniform_(weight, -0.02, 0.02)
    features = torch.randn(NUM_TOKENS, config.hidden_size * config.hidden_stride**2).to(torch.bfloat16)
    features.requires_grad_(case.mode != "forward")
    embed = embed_features if case.is_chunked else embed_at_once

    before = peak_gigabytes()
    with torch.set_grad_enabled(case.mode != "forward"):
        vectors = embed(features, tokenizer, table)
    if case.mode != "forward":
        vectors.sum().backward()
    return peak_gigabytes() - before


def embed_at_once(features: Tensor, tokenizer: VisualTokenizer, table: VisualEmbedding) -> Tensor:
    return table(tokenizer.probabilities(features))


def peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    figures: dict[str, float] = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for mode in MODES:
            plain, chunked = pool.map(measure, [Case(mode, is_chunked=False), Case(mode, is_chunked=True)], chunksize=1)
            figures[f"{mode}_gb"] = round(chunked, 3)
            figures[f"{mode}_plain_gb_vs_chunked"] = round(plain / chunked, 3)
    publish(figures)


if __name__ == "__main__":
    main()
