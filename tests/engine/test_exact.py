"""The engine under exact mode: what it notes while sampling is what training computes, to the last bit."""

from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image

from looktwice.engine.builtin import BuiltinEngine
from looktwice.engine.interface import Continuation, Request, Segment
from looktwice.engine.sampling import Sampling
from looktwice.messages import question_about
from looktwice.model.adapters import add_lora, base_of, trained_parameters
from looktwice.model.exact import ExactMode
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.rollout.crop_tool import CropTool, observed
from looktwice.rollout.episode import EpisodeRules, start_episodes

TEMPERATURE = 0.8
CALLS = ("<tool_call>[0, 0, 48, 48]</tool_call>", "<tool_call>[40, 20, 160, 110]</tool_call>")


class Looker:
    """A rollout that samples `budgets` ids at a time, with a crop before each but the first."""

    def __init__(self, prompt: Example, budgets: list[int], processor: Ovis2_5Processor, image: Image.Image) -> None:
        self.example = prompt.copy()
        self.example.loss_mask = [False] * len(prompt)
        self.budgets, self.processor, self.image = budgets, processor, image
        self.logprobs: list[float] = []
        self.num_segments = 0

    def hear(self, token: int, logprob: float) -> None:
        pass

    def fail(self, error: Exception) -> None:
        raise error

    def respond(self, segment: Segment) -> Continuation | None:
        self.example.append(segment.ids, is_trained=True)
        self.logprobs += segment.logprobs
        self.num_segments += 1
        if self.num_segments == len(self.budgets):
            return None
        look = CropTool(self.processor).look(CALLS[self.num_segments % 2], [self.image])
        ids, images = observed(look, self.processor)
        self.example.append(ids, is_trained=False)
        self.example.images += images
        return Continuation(ids=ids, images=images, max_new_tokens=self.budgets[self.num_segments])


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_rows": 3}, {"max_pass_tokens": 24}, {"cache_tokens": 192}],
    ids=["all at once", "three rows", "small chunks", "preemptions"],
)
def test_the_gap_of_sampler_and_trainer_is_zero(
    model: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor, image: Image.Image, settings: dict[str, int]
) -> None:
    torch.manual_seed(0)
    adapted = add_lora(copy.deepcopy(model), r=4, alpha=8, targets="llm+vit").eval()
    with torch.no_grad():
        for _, weight in trained_parameters(adapted):
            weight += 0.02 * torch.randn_like(weight)
    asked = [
        question_about("What is it?", image),
        question_about("Which digit is on the red tile?"),
        question_about("Hm?", image),
    ]
    prompts = [start_episodes(prompt, processor, EpisodeRules())[0].prompt for prompt in asked]
    groups = [[Looker(prompt, [9, 5, 7][: 1 + n % 3], processor, image) for n in range(4)] for prompt in prompts]
    requests = [
        Request(
            prompt=prompt,
            drivers=group,
            max_new_tokens=9,
            sampling=Sampling(temperature=TEMPERATURE, top_p=0.9),
            seed=n,
        )
        for n, (prompt, group) in enumerate(zip(prompts, groups))
    ]
    engine = BuiltinEngine(base_of(adapted), **settings)
    lookers = [looker for group in groups for looker in group]
    with ExactMode():
        engine.run(requests)
        with torch.no_grad():
            inputs = pack([looker.example for looker in lookers]).model_inputs()
            scored = adapted(**inputs, temperature=TEMPERATURE).logprobs
    assert bool(engine.stats.num_preemptions) == ("cache_tokens" in settings)
    noted = torch.tensor([logprob for looker in lookers for logprob in looker.logprobs])
    assert len(noted) > 100 and float((noted - scored).abs().max()) == 0.0
