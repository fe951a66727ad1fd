"""Bytes that a LoRA step of the 9B shape holds at its peak, counted on fake tensors of the whole step with vision.

    python benchmarks/memory.py [--json FILE]

A row of 2,048 tokens with one picture of 896 x 896 pixels; bfloat16 weights, float32 adapters, all layers recomputed,
as the documented LoRA command runs on a GPU. The step is the trainer's own: forward, summed logprobs, backward, AdamW.
What an allocator adds, and what a GPU's context takes, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from live_bytes import LiveBytes
from measure import parser, publish
from models import config_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from looktwice.model.adapters import add_lora, cast_by_autocast, trained_parameters
from looktwice.model.logprobs import logprob_sum
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.training.learner import recompute_layers

RANKS = (128, 64, 32)
NUM_TOKENS, SIDE = 2048, 896
GOALS = {"r128_gigabytes": "at most 26", "r64_gigabytes": "at most 22.5", "r32_gigabytes": "at most 20"}


def main() -> None:
    arguments = parser().parse_args()
    nn.Module._apply = apply_in_place  # type: ignore[method-assign]
    figures = {}
    for rank in RANKS:
        total, weights = peak_of_step(rank)
        figures[f"9b_lora.r{rank}_gigabytes"] = total / 1e9
        figures[f"9b_lora.r{rank}_weights_gigabytes"] = weights / 1e9
    publish(figures, arguments, GOALS)


def peak_of_step(rank: int) -> tuple[int, int]:
    """Of the second step, when the optimizer has its state; and what lives between steps."""
    config = config_of("9B")
    config.vit_config.patch_size, config.vit_config.num_patches = 16, -1
    config.vit_config._attn_implementation = config.llm_config._attn_implementation = "packed_sdpa"
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(with_present=False) as memory:
        torch.set_default_dtype(torch.bfloat16)
        model = Ovis2_5ForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
        adapted = add_lora(model, r=rank, alpha=2 * rank)
        cast_by_autocast(adapted)
        recompute_layers(model, "all")
        optimizer = torch.optim.AdamW([weight for _, weight in trained_parameters(adapted)], fused=True)
        adapted.train()
        for _ in range(2):
            memory.peak = memory.live
            with torch.autocast("cpu", torch.bfloat16):
                total = summed_logprobs(model)
            (-total).backward()
            del total
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return memory.peak, memory.live


def summed_logprobs(model: Ovis2_5ForConditionalGeneration) -> Tensor:
    """The model's forward over one sequence, a picture first, the second half of its text trained. Fake tensors have no
    values, so what is read from ids and masks is given here."""
    vit, inner = model.config.vit_config, model.model
    side = SIDE // vit.patch_size
    pixels = torch.zeros(side * side, 3 * vit.patch_size**2, dtype=torch.uint8)
    image = inner.get_image_features(pixels, Grid(1, side, side))
    num_words = NUM_TOKENS - len(image)
    words = inner.language_model.embed_tokens(torch.zeros(num_words, dtype=torch.long))
    hidden = inner.language_model(
        inputs_embeds=torch.cat([image.to(words), words])[None],
        attention_mask={"full_attention": None},
        position_ids=torch.arange(NUM_TOKENS)[None],
        use_cache=False,
        cu_seq_lens_q=[0, NUM_TOKENS],
    ).last_hidden_state
    targets = torch.zeros(num_words // 2, dtype=torch.long)
    return logprob_sum(hidden[0, -len(targets) :], model.lm_head.weight, targets)


class Grid(NamedTuple):
    """`image_grid_thw` of one picture, readable among fake tensors."""

    t: int
    h: int
    w: int

    def tolist(self) -> list[tuple[int, int, int]]:
        return [tuple(self)]


def apply_in_place(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """PEFT moves its adapters by `to`, and torch cannot swap fake parameters in place."""
    for each in module.modules():
        for name, weight in list(each._parameters.items()):
            if weight is not None:
                each._parameters[name] = nn.Parameter(change(weight.data), requires_grad=weight.requires_grad)
    return module


if __name__ == "__main__":
    main()
