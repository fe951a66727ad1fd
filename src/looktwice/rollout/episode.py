"""The rules of one look-twice answer: when to crop, when to stop. Knows messages and boxes, no tensors.

An engine samples a Segment; the episode records it and says how to go on, or that the answer is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from looktwice.calls import TOOL_CALL_CLOSE
from looktwice.errors import ConfigError
from looktwice.geometry import Size
from looktwice.messages import ANSWER_CLOSE, THINK_CLOSE, THINK_OPEN, Conversation
from looktwice.processing.chat_template import EARLY_STOP
from looktwice.processing.images import PatchedImage
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.rollout.conversation import encode_conversation, open_images
from looktwice.rollout.crop_tool import CropTool, Observation, observed
from looktwice.rollout.engine import Continuation, Engine, Request, Segment
from looktwice.rollout.trajectory import StopReason, Trajectory


@dataclass(frozen=True, kw_only=True)
class EpisodeRules:
    """Limits of one answer. `max_turns` counts completions, the answer included; None for a budget is no budget.

    `max_new_tokens` and `thinking_budget` count sampled ids and the text that closes thinking, not crops.
    """

    max_turns: int = 6
    max_new_tokens: int = 1024
    thinking: bool = True
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.thinking_budget is not None and self.thinking_budget < 1:
            raise ConfigError(f"thinking_budget is {self.thinking_budget}; it must be 1 or more, or left out")


class Look(Protocol):
    """Answers a call: CropTool.look, or one of the controls of an evaluation."""

    def __call__(self, call_text: str, image: Image.Image | None) -> Observation: ...


class Episode:
    """One rollout in progress. `example` is everything so far, trained where sampled; `trajectory` is its record.

    Crops are cut from `image`; a video has none, and gives the size of its frames as `frame_size`.
    """

    def __init__(
        self,
        prompt: Example,
        image: Image.Image | None,
        processor: Ovis2_5Processor,
        rules: EpisodeRules,
        look: Look | None = None,
        frame_size: Size | None = None,
    ) -> None:
        self.image = image
        self.processor = processor
        self.rules = rules
        self.look = look or CropTool(processor).look
        self.prompt = prompt
        self.example = prompt.copy()
        self.trajectory = Trajectory(
            prompt_ids=list(prompt.input_ids), image_size=frame_size if image is None else Size(*image.size)
        )
        template = processor.template
        self.call_close_id = template.token_id(TOOL_CALL_CLOSE)
        self.think_open_id = template.token_id(THINK_OPEN)
        self.think_close_id = template.token_id(THINK_CLOSE)
        self.is_thinking = rules.thinking
        self.spent = 0
        # sampled since the last insertion: the thinking budget may cut a call or an answer into two segments
        self.recent_ids: list[int] = []

    def allowance(self) -> int:
        """Ids to sample before the next decision: what is left of the answer, or of the thinking budget."""
        left = self.rules.max_new_tokens - self.spent
        if self.is_thinking and self.rules.thinking_budget is not None:
            left = min(left, self.rules.thinking_budget - self.spent)
        return left

    def respond(self, segment: Segment) -> Continuation | None:
        """Record a segment; say how to go on, or None when the answer is over."""
        self._note(segment.ids, segment.logprobs, is_sampled=True)
        self.trajectory.num_turns += segment.is_stopped
        self.is_thinking = self.is_thinking and self.think_close_id not in segment.ids
        if not segment.is_stopped:
            return self._after_length_limit()
        text = self.processor.decode(self.recent_ids)
        if segment.ids[-1] == self.call_close_id and ANSWER_CLOSE not in text:
            return self._crop(text)
        self._finish("answered" if ANSWER_CLOSE in self._text() else "no_answer")
        return None

    def _crop(self, text: str) -> Continuation | None:
        if self.trajectory.num_turns >= self.rules.max_turns:
            self._finish("max_turns")
            return None
        observation = self.look(text, self.image)
        self.trajectory.calls.append(observation.call)
        ids, images = observed(observation, self.processor)
        self._note(ids, [0.0] * len(ids), is_sampled=False)
        self.example.images += images
        return self._continue(ids, images)

    def _after_length_limit(self) -> Continuation | None:
        if self.spent >= self.rules.max_new_tokens:
            self._finish("max_tokens")
            return None
        budget_is_spent = self.is_thinking and self.think_open_id in self.trajectory.completion_ids
        self.is_thinking = False
        if not budget_is_spent:  # thinking ended by itself, or the answer came without any
            return self._continue([], [])
        ids = self.processor.template.encode(EARLY_STOP)
        self._note(ids, [0.0] * len(ids), is_sampled=False)
        self.spent += len(ids)
        return self._continue(ids, [])

    def _continue(self, ids: list[int], images: list[PatchedImage]) -> Continuation | None:
        if self.spent >= self.rules.max_new_tokens:
            self._finish("max_tokens")
            return None
        return Continuation(ids=ids, images=images, max_new_tokens=max(1, self.allowance()))

    def _note(self, ids: list[int], logprobs: list[float], *, is_sampled: bool) -> None:
        self.example.append(ids, is_trained=is_sampled)
        self.trajectory.completion_ids += ids
        self.trajectory.is_sampled += [is_sampled] * len(ids)
        self.trajectory.sampling_logprobs += logprobs
        self.spent += len(ids) if is_sampled else 0
        self.recent_ids = self.recent_ids + ids if is_sampled else []

    def _text(self) -> str:
        end_ids = set(self.processor.end_ids)
        return self.processor.decode([i for i in self.trajectory.completion_ids if i not in end_ids])

    def _finish(self, reason: StopReason) -> None:
        self.trajectory.stop_reason = reason
        self.trajectory.text = self._text()


def start_episodes(
    prompt: Conversation,
    processor: Ovis2_5Processor,
    rules: EpisodeRules,
    *,
    count: int = 1,
    look: Look | None = None,
) -> list[Episode]:
    """`count` sibling episodes of a conversation that ends where the assistant is to answer.

    Crops are cut from the first picture. Earlier answers keep their calls, followed by their crops.
    """
    opened = open_images(prompt)
    image: Image.Image | None = next(iter(opened.images), None)  # type: ignore[assignment]
    frame_size = None
    if opened.videos:
        frame_size = Size(*opened.videos[0][0].size)  # type: ignore[index, union-attr]
        look = look or CropTool(processor, is_video=True).look
    example = encode_conversation(opened, processor, purpose="prompt", thinking=rules.thinking)
    return [Episode(example, image, processor, rules, look, frame_size) for _ in range(count)]


def play(engine: Engine, groups: Sequence[Sequence[Episode]]) -> None:
    """Play groups of sibling episodes, which share one prompt, to their end."""
    episodes = [episode for group in groups for episode in group]
    requests = [
        Request(prompt=group[0].prompt, num_rollouts=len(group), max_new_tokens=group[0].allowance())
        for group in groups
    ]
    engine.run(requests, lambda number, segment: episodes[number].respond(segment))
