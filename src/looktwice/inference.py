"""Asking a model: one question or many at once, crops run inside, answers with thinking and every crop's box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from peft import PeftModel

from looktwice.answers import extract_answer, split_thinking
from looktwice.config import InferenceConfig
from looktwice.geometry import Size
from looktwice.grounding import parse_grounding
from looktwice.messages import ImageSource
from looktwice.model.adapters import base_of
from looktwice.model.weights import load_model, locate
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.rollout.builtin_engine import BuiltinEngine
from looktwice.rollout.episode import Episode, EpisodeRules, Look, play, start_episodes
from looktwice.rollout.sampling import Sampling
from looktwice.training.learner import pick_device
from looktwice.training.run import override_pixels

Question = tuple[ImageSource | None, str]


class OvisInference:
    """A loaded model that answers questions about pictures.

    Example: OvisInference(InferenceConfig(model_path="outputs/grpo/final_model")).generate(image, "What is this?")
    """

    def __init__(self, config: InferenceConfig | None = None) -> None:
        self.config = config or InferenceConfig()
        self.processor = Ovis2_5Processor.from_pretrained(locate(self.config.model_path))
        self.processor.policy = override_pixels(self.processor.policy, image_max_pixels=self.config.max_pixels)
        model = load_model(
            self.config.model_path,
            dtype=torch.bfloat16 if self.config.bf16 else torch.float32,
            device=pick_device(self.config.device),
            attn_implementation=self.config.attn_implementation,
        )
        self.model = base_of(model.merge_and_unload() if isinstance(model, PeftModel) else model)

    def generate(self, image: ImageSource | None, question: str) -> dict[str, Any]:
        """The answer to one question; `image` is a path, a PIL picture or None.

        Keys: `response` (all the model wrote), `parsed` (`think_content`, `answer_content`, `grounding`), `crops`
        (each call's `box` in original pixels and `error`), `stop_reason`.
        """
        return self.generate_batch([(image, question)])[0]

    def generate_batch(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Answers to many questions, all advancing together."""
        return [report(episode) for episode in self.play(questions)]

    def play(self, questions: Sequence[Question], look: Look | None = None) -> list[Episode]:
        """The finished episodes of the questions; `look` replaces the crop tool."""
        rules = EpisodeRules(
            max_turns=self.config.max_turns,
            max_new_tokens=self.config.max_new_tokens,
            thinking=self.config.enable_thinking,
            thinking_budget=self.config.thinking_budget,
        )
        groups = [start_episodes(image, text, self.processor, rules, look=look) for image, text in questions]
        engine = BuiltinEngine.for_answers(
            self.model,
            self.processor,
            Sampling(temperature=self.config.temperature, top_p=self.config.top_p, top_k=self.config.top_k),
            max_rows=self.config.batch_size,
            seed=self.config.seed,
        )
        play(engine, groups)
        return [episode for (episode,) in groups]


def report(episode: Episode) -> dict[str, Any]:
    """What a finished episode says, as plain data."""
    trajectory = episode.trajectory
    thinking, _ = split_thinking(trajectory.text)
    size = Size(*episode.image.size) if episode.image is not None else None
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
