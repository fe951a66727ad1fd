"""The rules of one look-twice answer: when to crop, when to stop. Knows messages and boxes, no tensors.

An engine samples a Segment; the episode records it and says how to go on, or that the answer is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from PIL import Image

from looktwice.calls import TOOL_CALL_CLOSE
from looktwice.engine.interface import Continuation, Engine, Request, Segment, StopCause
from looktwice.engine.sampling import Sampling
from looktwice.errors import ConfigError, one_line
from looktwice.geometry import Size
from looktwice.messages import ANSWER_CLOSE, THINK_CLOSE, THINK_OPEN, Conversation
from looktwice.processing.chat_template import EARLY_STOP
from looktwice.processing.images import PatchedImage
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.rollout.conversation import encode_conversation, open_images
from looktwice.rollout.crop_tool import CropTool, Observation, observed, refusal, written_call
from looktwice.rollout.trajectory import StopReason, ToolCall, Trajectory


@dataclass(frozen=True, kw_only=True)
class EpisodeRules:
    """Limits of one answer; None is no limit. `max_turns` counts completions, the answer included.

    `max_new_tokens` and `thinking_budget` count sampled ids and the text that closes thinking, not crops, and
    `max_turn_tokens` those of one turn; `max_visual_tokens` counts the atoms of all crops, `max_seconds` from the first
    id on. A text of `stop_texts` ends the answer. After `max_crops` crops a call is refused and thinking is closed, so
    that the answer follows.
    """

    max_turns: int = 6
    max_crops: int | None = None
    max_new_tokens: int = 1024
    thinking: bool = True
    thinking_budget: int | None = None
    max_turn_tokens: int | None = None
    max_visual_tokens: int | None = None
    max_seconds: float | None = None
    stop_texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("thinking_budget", "max_turn_tokens", "max_visual_tokens"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise ConfigError(f"{name} is {limit}; it must be 1 or more, or left out")
        if self.max_crops is not None and self.max_crops < 0:
            raise ConfigError(f"max_crops is {self.max_crops}; it must be 0 or more, or left out")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ConfigError(f"max_seconds is {self.max_seconds}; it must be above 0, or left out")
        if "" in self.stop_texts:
            raise ConfigError("stop_texts holds an empty text, which ends everything; leave it out")


CUT: dict[StopCause, StopReason] = {"seconds": "max_seconds", "no_room": "no_room", "cancelled": "cancelled"}
"""Why the engine ends a rollout, and how a trajectory says it."""
NO_MORE = ("switched_off", "no_more_crops")
"""Why a call is refused by the rules of an episode: no crops at all, or all of them taken."""


class Look(Protocol):
    """Answers a call: CropTool.look, or one of the controls of an evaluation."""

    def __call__(self, call_text: str, images: Sequence[Image.Image]) -> Observation: ...


class Watcher:
    """Whoever follows a rollout as it happens. Each method does nothing here; what one raises ends the rollout."""

    def token(self, token: int, logprob: float) -> None:
        """An id was sampled; its logprob is of the plain distribution."""

    def crop_begun(self, call_text: str) -> None:
        """A call was written, in the text that ends with it."""

    def crop_done(self, call: ToolCall) -> None:
        """Its region was cut, or refused."""

    def thinking_closed(self, text: str) -> None:
        """Its thinking reached the budget, or a call the limit of crops, and this text was put in to close it."""

    def finished(self, trajectory: Trajectory) -> None:
        """The rollout is over, whatever the reason."""


class Episode:
    """One rollout in progress, the driver of an engine. `example` is everything so far, trained where sampled;
    `trajectory` is its record.

    Crops are cut from `images`; a video has none, and gives the size of its frames as `frame_size`.
    """

    def __init__(
        self,
        prompt: Example,
        images: Sequence[Image.Image],
        processor: Ovis2_5Processor,
        rules: EpisodeRules,
        look: Look | None = None,
        frame_size: Size | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self.watcher = watcher or Watcher()
        self.images = images
        self.processor = processor
        self.rules = rules
        self.look = look or CropTool(processor).look
        self.prompt = prompt
        self.example = prompt.sibling()
        image_sizes = tuple(Size(*image.size) for image in images) if frame_size is None else (frame_size,)
        self.trajectory = Trajectory(prompt_ids=list(prompt.input_ids), image_sizes=image_sizes)
        template = processor.template
        self.call_close_id = template.token_id(TOOL_CALL_CLOSE)
        self.think_open_id = template.token_id(THINK_OPEN)
        self.think_close_id = template.token_id(THINK_CLOSE)
        self.is_thinking = rules.thinking
        self.spent = self.spent_in_turn = 0
        # sampled since the last insertion: the thinking budget may cut a call or an answer into two segments
        self.recent_ids: list[int] = []
        self.num_visual_tokens = 0
        self.is_over = False

    def allowance(self) -> int:
        """Ids to sample before the next decision: what is left of the answer, of the turn, or of thinking."""
        left = self.rules.max_new_tokens - self.spent
        if self.rules.max_turn_tokens is not None:
            left = min(left, self.rules.max_turn_tokens - self.spent_in_turn)
        if self.is_thinking and self.rules.thinking_budget is not None:
            left = min(left, self.rules.thinking_budget - self.spent)
        return left

    def hear(self, token: int, logprob: float) -> None:
        self.watcher.token(token, logprob)

    def fail(self, error: Exception) -> None:
        """End here for what was raised; what the watcher raises now is lost."""
        self.trajectory.error = one_line(f"{type(error).__name__}: {error}")
        with suppress(Exception):
            self._finish("error")

    def respond(self, segment: Segment) -> Continuation | None:
        """Record a segment; say how to go on, or None when the answer is over."""
        self._note(segment.ids, segment)
        self.trajectory.num_turns += segment.is_stopped
        if segment.stop in CUT:
            self._finish(CUT[segment.stop])
            return None
        self.is_thinking = self.is_thinking and self.think_close_id not in segment.ids
        if not segment.is_stopped:
            return self._after_length_limit()
        text = self.processor.decode(self.recent_ids)
        if segment.stop == "stop_text":
            self._finish("stop_text")
            return None
        if segment.ids[-1] == self.call_close_id and ANSWER_CLOSE not in text:
            return self._crop(text)
        self._finish("answered" if ANSWER_CLOSE in self._text() else "no_answer")
        return None

    def _crop(self, text: str) -> Continuation | None:
        if self.trajectory.num_turns >= self.rules.max_turns:
            self._finish("max_turns")
            return None
        self.watcher.crop_begun(text)
        observation = self._look(text)
        ids, images = observed(observation, self.processor)
        self.num_visual_tokens += sum(image.num_tokens for image in images)
        if self.rules.max_visual_tokens is not None and self.num_visual_tokens > self.rules.max_visual_tokens:
            self.trajectory.calls.append(replace(observation.call, box=None, size=None, error="too_many_tokens"))
            self.watcher.crop_done(self.trajectory.calls[-1])
            self._finish("max_visual_tokens")
            return None
        self.trajectory.calls.append(observation.call)
        self.watcher.crop_done(observation.call)
        self._note(ids)
        self.is_thinking = self.is_thinking and self.think_close_id not in ids
        self.spent_in_turn = 0
        if observation.call.error in NO_MORE and self._is_thinking_open():
            ids = [*ids, *self._close_thinking()]
        self.example.images += images
        return self._continue(ids, images)

    def _look(self, text: str) -> Observation:
        limit = self.rules.max_crops
        if limit is None or sum(call.is_valid for call in self.trajectory.calls) < limit:
            return self.look(text, self.images)
        return refusal(NO_MORE[limit > 0], written_call(text))

    def _after_length_limit(self) -> Continuation | None:
        if reached := self._reached():
            self._finish(reached)
            return None
        budget_is_spent = self._is_thinking_open()
        self.is_thinking = False
        # else thinking ended by itself, or the answer came without any
        return self._continue(self._close_thinking() if budget_is_spent else [], [])

    def _is_thinking_open(self) -> bool:
        return self.is_thinking and self.think_open_id in self.trajectory.completion_ids

    def _close_thinking(self) -> list[int]:
        """Put in the text that closes thinking, and give back its ids."""
        self.is_thinking = False
        ids = self.processor.template.encode(EARLY_STOP)
        self._note(ids)
        self.spent += len(ids)
        self.spent_in_turn += len(ids)
        self.watcher.thinking_closed(EARLY_STOP)
        return ids

    def _reached(self) -> StopReason | None:
        """The limit of tokens that is used up, if any."""
        if self.spent >= self.rules.max_new_tokens:
            return "max_tokens"
        limit = self.rules.max_turn_tokens
        return "max_turn_tokens" if limit is not None and self.spent_in_turn >= limit else None

    def _continue(self, ids: list[int], images: list[PatchedImage]) -> Continuation | None:
        if reached := self._reached():
            self._finish(reached)
            return None
        return Continuation(ids=ids, images=images, max_new_tokens=max(1, self.allowance()))

    def _note(self, ids: list[int], segment: Segment | None = None) -> None:
        """Record ids, with the segment that sampled them if any did."""
        is_sampled = segment is not None
        self.example.append(ids, is_trained=is_sampled)
        self.trajectory.completion_ids += ids
        self.trajectory.is_sampled += [is_sampled] * len(ids)
        self.trajectory.sampling_logprobs += segment.logprobs if segment else [0.0] * len(ids)
        self.trajectory.drawn_logprobs += segment.drawn_logprobs if segment else [0.0] * len(ids)
        if is_sampled:
            self.spent += len(ids)
            self.spent_in_turn += len(ids)
        self.recent_ids = self.recent_ids + ids if is_sampled else []

    def _text(self) -> str:
        end_ids = set(self.processor.end_ids)
        return self.processor.decode([i for i in self.trajectory.completion_ids if i not in end_ids])

    def _finish(self, reason: StopReason) -> None:
        self.trajectory.stop_reason = reason
        self.trajectory.text = self._text()
        self.trajectory.num_visual_tokens = sum(image.num_tokens for image in self.example.images)
        if not self.is_over:
            self.is_over = True
            self.watcher.finished(self.trajectory)


def start_episodes(
    prompt: Conversation,
    processor: Ovis2_5Processor,
    rules: EpisodeRules,
    *,
    count: int = 1,
    look: Look | None = None,
    watchers: Sequence[Watcher] = (),
) -> list[Episode]:
    """`count` sibling episodes of a conversation that ends where the assistant is to answer, with a watcher each if
    there are any.

    Crops are cut from the pictures of the conversation. Earlier answers keep their calls, followed by their crops.
    """
    opened = open_images(prompt)
    images: list[Image.Image] = opened.images  # type: ignore[assignment]
    frame_size = None
    if opened.videos:
        frame_size = Size(*opened.videos[0][0].size)  # type: ignore[index, union-attr]
        look = look or CropTool(processor, is_video=True).look
    example = encode_conversation(opened, processor, purpose="prompt", thinking=rules.thinking)
    followed = watchers or [Watcher() for _ in range(count)]
    if len(followed) != count:
        raise ValueError(f"{len(followed)} watchers for {count} episodes; give one each, or none")
    return [Episode(example, images, processor, rules, look, frame_size, watcher) for watcher in followed]


def request_of(group: Sequence[Episode], sampling: Sampling, seed: int) -> Request:
    """What an engine is asked for sibling episodes: segments end after a call and with the turn."""
    first = group[0]
    return Request(
        prompt=first.prompt,
        drivers=group,
        max_new_tokens=first.allowance(),
        sampling=sampling,
        seed=seed,
        stop_ids=frozenset([first.call_close_id, *first.processor.end_ids]),
        stop_texts=first.rules.stop_texts,
        max_seconds=first.rules.max_seconds,
    )


def play(engine: Engine, groups: Sequence[Sequence[Episode]], sampling: Sampling, seeds: Sequence[int]) -> None:
    """Play groups of sibling episodes, which share one prompt and one seed, to their end."""
    engine.run([request_of(group, sampling, seed) for group, seed in zip(groups, seeds, strict=True)])
