"""Asking a model: one question or many at once, crops run inside, answers with thinking and every crop's box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from peft import PeftModel

from looktwice.answers import extract_answer, split_thinking
from looktwice.config import InferenceConfig
from looktwice.grounding import parse_grounding
from looktwice.messages import ImageSource
from looktwice.model.adapters import base_of
from looktwice.model.weights import load_model, locate, pick_device
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.rollout.builtin_engine import BuiltinEngine
from looktwice.rollout.episode import EpisodeRules, Look, play, start_episodes
from looktwice.rollout.sampling import Sampling
from looktwice.rollout.trajectory import Trajectory

Question = tuple[ImageSource | None, str]


class OvisInference:
    """A loaded model that answers questions about pictures.

    Example: OvisInference(InferenceConfig(model_path="outputs/grpo/final_model")).generate(image, "What is this?")
    """

    def __init__(self, config: InferenceConfig | None = None) -> None:
        self.config = config or InferenceConfig()
        self.processor = Ovis2_5Processor.from_pretrained(locate(self.config.model_path))
        self.processor.policy = self.processor.policy.override(image_max_pixels=self.config.max_pixels)
        device = pick_device(self.config.device)
        is_bf16 = device.startswith("cuda") if self.config.bf16 is None else self.config.bf16
        dtype = torch.bfloat16 if is_bf16 else torch.float32
        model = load_model(self.config.model_path, dtype=dtype, device=device)
        self.model = base_of(model.merge_and_unload() if isinstance(model, PeftModel) else model)

    def generate(self, image: ImageSource | None, question: str) -> dict[str, Any]:
        """The answer to one question; `image` is a path, a PIL picture or None.

        Keys: `response` (all the model wrote), `parsed` (`think_content`, `answer_content`, `grounding`), `crops`
        (each call's `box` in original pixels and `error`), `stop_reason`.
        """
        return self.generate_batch([(image, question)])[0]

    def generate_batch(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Answers to many questions, all advancing together."""
        return [report(trajectory) for trajectory in self.play(questions)]

    def play(self, questions: Sequence[Question], look: Look | None = None) -> list[Trajectory]:
        """The finished rollouts of the questions; `look` replaces the crop tool.

        `batch_size` questions advance together, and only their pictures are held in memory.
        """
        config = self.config
        rules = EpisodeRules(
            max_turns=config.max_turns,
            max_new_tokens=config.max_new_tokens,
            thinking=config.enable_thinking,
            thinking_budget=config.thinking_budget,
        )
        engine = BuiltinEngine.for_answers(
            self.model,
            self.processor,
            Sampling(temperature=config.temperature, top_p=config.top_p, top_k=config.top_k),
            max_rows=config.batch_size,
            seed=config.seed,
        )
        finished: list[Trajectory] = []
        for first in range(0, len(questions), config.batch_size):
            batch = questions[first : first + config.batch_size]
            groups = [start_episodes(image, text, self.processor, rules, look=look) for image, text in batch]
            play(engine, groups)
            finished += [episode.trajectory for (episode,) in groups]
        return finished


def report(trajectory: Trajectory) -> dict[str, Any]:
    """What a finished rollout says, as plain data."""
    thinking, _ = split_thinking(trajectory.text)
    size = trajectory.image_size
    return {
        "response": trajectory.text,
        "parsed": {
            "think_content": thinking,
            "answer_content": extract_answer(trajectory.text) or "",
            "grounding": [asdict(found) for found in parse_grounding(trajectory.text, size)] if size else [],
        },
        "crops": [
            {
                "box": None if call.box is None else [int(side) for side in call.box],
                "requested": None if call.requested is None else list(call.requested),
                "size": None if call.size is None else list(call.size),
                "error": call.error,
            }
            for call in trajectory.calls
        ],
        "stop_reason": trajectory.stop_reason,
    }
