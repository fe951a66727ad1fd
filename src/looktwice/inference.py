"""Asking a model: one question or many at once, crops run inside, answers with thinking and every crop's box."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from looktwice.answers import extract_answer, split_thinking
from looktwice.config import AnswerConfig, InferenceConfig
from looktwice.errors import ConfigError
from looktwice.geometry import Size
from looktwice.grounding import parse_grounding
from looktwice.messages import Conversation, ImageSource, VideoPart, VideoSource, question_about
from looktwice.model.adapters import for_inference, merge
from looktwice.model.attention import is_gpu, pick_attention
from looktwice.model.location import locate
from looktwice.model.weights import load_model, pick_device
from looktwice.processing.images import PatchedImage
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.rollout.builtin_engine import BuiltinEngine
from looktwice.rollout.conversation import open_images
from looktwice.rollout.episode import Episode, EpisodeRules, Look, play, start_episodes
from looktwice.rollout.sampling import Sampling
from looktwice.rollout.trajectory import Trajectory

Question = Conversation | tuple[ImageSource | VideoPart | None, str]
"""A conversation that ends where the assistant is to answer, or what is shown and what is asked about it."""


class OvisInference:
    """A loaded model that answers questions about pictures and videos.

    Example: OvisInference(InferenceConfig(model_path="outputs/grpo/final_model")).generate(image, "What is this?")
    """

    def __init__(self, config: InferenceConfig | None = None) -> None:
        self.config = config or InferenceConfig()
        self.processor = Ovis2_5Processor.from_pretrained(locate(self.config.model_path))
        self.processor.policy = self.processor.policy.override(image_max_pixels=self.config.max_pixels)
        device = pick_device(self.config.device)
        is_bf16 = is_gpu(device) if self.config.bf16 is None else self.config.bf16
        dtype = torch.bfloat16 if is_bf16 else torch.float32
        model = load_model(
            self.config.model_path,
            dtype=dtype,
            device=device,
            attn_implementation=pick_attention(self.config.attn_implementation, device, is_bf16=is_bf16),
            quantization=self.config.quantization,
        )
        # an adapter merged into quantised weights would be rounded away
        self.model = merge(model) if self.config.quantization == "none" else for_inference(model)

    def generate(
        self,
        image: ImageSource | None = None,
        question: str = "",
        video: VideoSource | None = None,
        **generation: Any,
    ) -> dict[str, Any]:
        """The answer to one question about a picture (a path or a PIL picture), a video, or neither.

        `video` is a path, of which `num_frames` are seen, or a list of frames, which are all seen. Crops are cut from
        pictures only. `generation` are fields of AnswerConfig that hold for this call, such as `temperature=0.7`.

        Keys: `response` (all the model wrote), `parsed` (`think_content`, `answer_content`, `grounding`), `crops`
        (each call's `box` in original pixels and `error`), `stop_reason`, `picture` (what was shown: sizes in pixels
        `original` and `seen`, `num_tokens`, and `frames` of a video; None without a picture).
        Raises ConfigError for a picture beside a video, without a question, and for a wrong setting.
        """
        if not question:
            raise ConfigError("there is no question; give one as `question`")
        if image is not None and video is not None:
            raise ConfigError("a picture and a video are both given; ask about one of them")
        return self.generate_batch([(image if video is None else VideoPart(source=video), question)], **generation)[0]

    def generate_batch(self, questions: Sequence[Question], **generation: Any) -> list[dict[str, Any]]:
        """Answers to many questions, all advancing together; a video is given as VideoPart in the picture's place."""
        finished = self._finished(questions, None, self.config.answer(**generation))
        return [report(done.trajectory, *done.prompt.images[:1]) for done in finished]

    def play(self, questions: Sequence[Question], look: Look | None = None) -> list[Trajectory]:
        """The finished rollouts of the questions; `look` replaces the crop tool."""
        return [done.trajectory for done in self._finished(questions, look, self.config.answer())]

    def _finished(
        self, questions: Sequence[Question], look: Look | None, generation: AnswerConfig
    ) -> Iterator[Episode]:
        """Episodes at their end: `batch_size` advance together, and only their pictures are held in memory."""
        rules = EpisodeRules(
            max_turns=generation.max_turns,
            max_new_tokens=generation.max_new_tokens,
            thinking=generation.enable_thinking,
            thinking_budget=generation.enforced_budget,
        )
        size = self.config.batch_size
        engine = BuiltinEngine.for_answers(
            self.model,
            self.processor,
            Sampling(temperature=generation.sampling_temperature, top_p=generation.top_p, top_k=generation.top_k),
            max_rows=size,
            seed=generation.seed,
        )
        for first in range(0, len(questions), size):
            batch = [conversation_of(asked, generation.num_frames) for asked in questions[first : first + size]]
            groups = [start_episodes(prompt, self.processor, rules, look=look) for prompt in batch]
            play(engine, groups)
            yield from (episode for (episode,) in groups)


def conversation_of(asked: Question, num_frames: int) -> Conversation:
    """A question as the conversation that asks it, decoded: of a video file, the frames that are seen."""
    if not isinstance(asked, Conversation):
        shown, text = asked
        asked = question_about(text, *([] if shown is None else [shown]))
    return open_images(asked, num_frames=num_frames)


def report(trajectory: Trajectory, seen: PatchedImage | None = None) -> dict[str, Any]:
    """What a finished rollout says, as plain data; `seen` is the picture or video of its prompt."""
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
        "picture": None if seen is None or size is None else _sizes(size, seen),
    }


def _sizes(original: Size, seen: PatchedImage) -> dict[str, Any]:
    sizes = {"original": list(original), "seen": list(seen.size), "num_tokens": seen.num_tokens}
    return {**sizes, "frames": seen.grid_thw[0]} if seen.is_video else sizes
