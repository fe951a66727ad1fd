"""Rolling out without an engine, as one would with transformers alone: every turn starts again from all that is there.

Each turn is one call of `model.generate` with the whole context of each row and all of its pictures. Sampling is on,
from the whole distribution, so logits processors are those that the model itself puts in: no visual id is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from trajectories import Script

from looktwice.engine.interface import Segment
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration


def one_at_a_time(model: Ovis2_5ForConditionalGeneration, scripts: Sequence[Script]) -> None:
    for script in scripts:
        while script.num_left:
            take_turn(model, [script])


def turn_by_turn(model: Ovis2_5ForConditionalGeneration, scripts: Sequence[Script]) -> None:
    """All that are not over in one batch, which waits for the longest turn in it."""
    while live := [script for script in scripts if script.num_left]:
        take_turn(model, live)


@torch.no_grad()
def take_turn(model: Ovis2_5ForConditionalGeneration, scripts: Sequence[Script]) -> None:
    """One turn of each, padded on the left; what a row writes beyond its turn is thrown away."""
    examples = [script.example for script in scripts]
    longest = max(len(example) for example in examples)
    padding = [longest - len(example) for example in examples]
    images = [image for example in examples for image in example.images]
    written = model.generate(
        torch.tensor([[0] * pad + example.input_ids for pad, example in zip(padding, examples)], device=model.device),
        attention_mask=torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=model.device),
        pixel_values=torch.cat([image.pixel_values for image in images]).to(model.device),
        image_grid_thw=torch.tensor([image.grid_thw for image in images], device=model.device),
        max_new_tokens=max(script.num_left for script in scripts),
        use_cache=True,
    )[:, longest:]
    for script, ids in zip(scripts, written.tolist()):
        script.respond(Segment(ids=ids[: script.num_left], logprobs=[], drawn_logprobs=[], stop="length"))
