"""Asking a model: one question or many at once, crops run inside, answers with thinking and every crop's box."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import islice, repeat
from os import PathLike
from typing import Any

import torch

from looktwice.answers import extract_answer, split_thinking
from looktwice.config import AnswerConfig, InferenceConfig
from looktwice.engine.builtin import BuiltinEngine
from looktwice.engine.sampling import Sampling, mixed_seed
from looktwice.errors import ConfigError
from looktwice.geometry import Size
from looktwice.grounding import parse_grounding
from looktwice.messages import Conversation, VideoPart, VideoSource, check_question, question_about
from looktwice.model.adapters import for_inference, merge
from looktwice.model.attention import is_gpu, pick_attention
from looktwice.model.location import locate
from looktwice.model.weights import load_model, pick_device
from looktwice.processing.images import PatchedImage
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.processing.shown import Shown, parts_shown
from looktwice.rollout.conversation import open_images
from looktwice.rollout.episode import Episode, EpisodeRules, Look, request_of, start_episodes
from looktwice.rollout.trajectory import Trajectory

Question = Conversation | tuple[Shown | list[Shown] | VideoPart | None, str]
"""A conversation that ends where the assistant is to answer, or what is shown and what is asked about it."""
AHEAD, HELD = 2, 16
"""How many times the live questions are begun, so that a free place is taken at once, and how many times they may wait
for a slow one before them."""
QUESTIONS_MEND = "give a list of pairs (picture, question), or of conversations"


class OvisInference:
    """A loaded model that answers questions about pictures and videos.

    A model's folder or name stands for a config of it; settings then come by name: OvisInference("tiny", device="cpu").
    Example: OvisInference(InferenceConfig(model_path="outputs/grpo/final_model")).generate(image, "What is this?")
    """

    def __init__(self, config: InferenceConfig | str | PathLike[str] | None = None, **settings: Any) -> None:
        """Load the model. Raises ConfigError for what is no config of one, and as `load_model` does."""
        if isinstance(config, (str, PathLike)) and "model_path" not in settings:
            settings["model_path"] = config
        elif config is not None and (settings or not isinstance(config, InferenceConfig)):
            what = "two configs are given" if settings else f"the config is of type {type(config).__name__}"
            raise ConfigError(f"{what}; give an InferenceConfig, or the model's folder and settings by name")
        self.config = config if isinstance(config, InferenceConfig) else InferenceConfig(**settings)
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
        image: Shown | list[Shown] | None = None,
        question: str = "",
        video: VideoSource | None = None,
        **generation: Any,
    ) -> dict[str, Any]:
        """The answer to one question about a picture, a list of them, a video, or nothing to look at.

        A picture is a path, a PIL picture, the bytes of a file, or an array of uint8 [height, width, channels], red
        first. `video` is a path, of which `num_frames` are seen, or a list of frames, which are all seen. Crops are cut
        from the picture that a call names (`image 2` before its box), else from the first, never from a video.
        `generation` are fields of AnswerConfig that hold for this call, such as `temperature=0.7`. Where it
        samples, each call draws anew, from torch's own generator, which `torch.manual_seed` sets; with a `seed` it
        repeats.

        Keys: `response` (all the model wrote), `parsed` (`think_content`, `answer_content`, `grounding`), `crops`
        (of each call `image`, the number of its picture counted from 1, `box` in original pixels of it, and `error`),
        `stop_reason`, `error` (what was raised, if that ended it), `picture` (what was shown first: sizes in pixels
        `original` and `seen`, `num_tokens`, and `frames` of a video; None without a picture).
        Raises ConfigError for a picture beside a video, without a question, for what is no picture, and for a wrong
        setting; ImageError for a picture or video that cannot be read.
        """
        if image is not None and video is not None:
            raise ConfigError("a picture and a video are both given; ask about one of them")
        shown = image if video is None else VideoPart(source=video)
        [answer] = self.generate_batch([(shown, question)], **generation)
        return answer

    def generate_batch(self, questions: Iterable[Question], **generation: Any) -> list[dict[str, Any]]:
        """Answers to many questions, all advancing together; a video is given as VideoPart in the picture's place.

        With a seed an answer is the same alone and beside any others, and the same question twice has one answer.
        """
        finished = self._finished(questions, None, self.config.answer(**generation))
        return [report(done.trajectory, *done.prompt.images[:1]) for done in finished]

    def play(self, questions: Iterable[Question], looks: Iterable[Look] | None = None) -> list[Trajectory]:
        """The finished rollouts of the questions; `looks`, one for each, stand in the crop tool's place."""
        return [done.trajectory for done in self._finished(questions, looks, self.config.answer())]

    def _finished(
        self, questions: Iterable[Question], looks: Iterable[Look] | None, generation: AnswerConfig
    ) -> Iterator[Episode]:
        """Episodes at their end, in order: `batch_size` advance together, and only the pictures of a few more are held
        in memory."""
        rules = EpisodeRules(
            max_turns=generation.max_turns,
            max_new_tokens=generation.max_new_tokens,
            thinking=generation.enable_thinking,
            thinking_budget=generation.enforced_budget,
            max_turn_tokens=generation.max_turn_tokens,
            max_visual_tokens=generation.max_visual_tokens,
            max_seconds=generation.max_seconds,
            stop_texts=generation.stop_texts,
        )
        if isinstance(questions, (str, bytes, Conversation)) or not isinstance(questions, Iterable):
            raise ConfigError(f"the questions are of type {type(questions).__name__}; {QUESTIONS_MEND}")
        sampling = Sampling(
            temperature=generation.sampling_temperature,
            top_p=generation.top_p,
            top_k=generation.top_k,
            min_p=generation.min_p,
            repetition_penalty=generation.repetition_penalty,
            presence_penalty=generation.presence_penalty,
        )
        size = self.config.batch_size
        engine = BuiltinEngine(self.model, max_rows=size, decode=self.processor.decode)
        seeds = seeds_of(generation.seed)
        conversations = (conversation_of(asked, generation.num_frames) for asked in questions)
        episodes = (
            start_episodes(prompt, self.processor, rules, look=look)[0]
            for prompt, look in zip(conversations, repeat(None) if looks is None else looks)
        )
        begun: deque[Episode] = deque()
        while True:
            num_live = sum(not episode.is_over for episode in begun)
            for episode in islice(episodes, max(0, min(AHEAD * size - num_live, HELD * size - len(begun)))):
                engine.submit(request_of([episode], sampling, seeds(episode.prompt)))
                begun.append(episode)
            if not begun:
                return
            if begun[0].is_over:
                yield begun.popleft()
            else:
                engine.step()


def seeds_of(seed: int | None) -> Callable[[Example], int]:
    """The seed of a prompt: of its ids and pictures and nothing else when a seed is given, else always another one,
    from torch's own generator."""
    if seed is None:
        return lambda prompt: int(torch.randint(2**62, ()))
    return lambda prompt: mixed_seed(seed, repr(prompt.input_ids).encode(), *(image.key for image in prompt.images))


def conversation_of(asked: Question, num_frames: int) -> Conversation:
    """A question as the conversation that asks it, decoded: of a video file, the frames that are seen.

    Raises ConfigError for what is no question, ImageError for a picture or video that cannot be read.
    """
    if not isinstance(asked, Conversation):
        if not isinstance(asked, (tuple, list)) or len(asked) != 2:
            raise ConfigError(f"a question is of type {type(asked).__name__}; {QUESTIONS_MEND}")
        shown, text = asked
        check_question(text)
        asked = question_about(text, *parts_shown(shown))
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
                "image": call.image_number,
                "box": None if call.box is None else [int(side) for side in call.box],
                "requested": None if call.requested is None else list(call.requested),
                "size": None if call.size is None else list(call.size),
                "error": call.error,
            }
            for call in trajectory.calls
        ],
        "stop_reason": trajectory.stop_reason,
        "error": trajectory.error,
        "picture": None if seen is None or size is None else _sizes(size, seen),
    }


def _sizes(original: Size, seen: PatchedImage) -> dict[str, Any]:
    sizes = {"original": list(original), "seen": list(seen.size), "num_tokens": seen.num_tokens}
    return {**sizes, "frames": seen.grid_thw[0]} if seen.is_video else sizes
