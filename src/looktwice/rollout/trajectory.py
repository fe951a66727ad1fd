"""What one rollout left behind: ids as sampled, who wrote each, the crops, why it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from looktwice.geometry import Box, Size, iou

Value = TypeVar("Value")
StopReason = Literal[
    "answered",
    "no_answer",
    "stop_text",
    "max_turns",
    "max_tokens",
    "max_turn_tokens",
    "max_visual_tokens",
    "max_seconds",
    "no_room",
    "cancelled",
    "error",
]
"""answered: ended its turn with an answer; no_answer: ended without one; stop_text: wrote a text that was to end it;
the max_ name the limit that cut it; no_room: longer than the engine's whole cache; cancelled: by its owner; error: the
crop tool or a callback raised."""
COMPLETE: tuple[StopReason, ...] = ("answered", "no_answer", "stop_text")


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """One executed or refused crop call. Rewards and metrics read this record, never the text.

    `requested` is the box as written, in the frame of the model (None when it was not four numbers); `box` is what
    was cut, in whole original pixels (None when refused); `error` is the reason code of a refusal, else None;
    `size` is the size the crop was resized to. `image_number` is the picture of the conversation as the call names it,
    counted from 1: 1 where it names none or cannot be read, and of a refused call perhaps one that is not there.
    """

    requested: Box | None
    box: Box | None
    size: Size | None
    error: str | None
    image_number: int = 1

    @property
    def is_valid(self) -> bool:
        return self.error is None


@dataclass(kw_only=True)
class Trajectory:
    """One rollout. `completion_ids` [N] hold everything after the prompt: sampled text, crops, tool text.

    `is_sampled` [N] is True where the policy wrote the id, False where the tool did; both kinds of logprobs [N] are 0
    where it is False: `sampling_logprobs` of the plain distribution at the sampling temperature, which training
    computes, `drawn_logprobs` of the one really drawn from (after penalties, truncation and banned ids).
    `text` is the completion as text, crops left out. `calls` are the crop calls in order.
    `image_sizes` are those of the upright originals in order, or of a video's first frame. `num_visual_tokens` counts
    those of the prompt and of all crops. `error` is what was raised when that ended it.
    """

    prompt_ids: list[int]
    image_sizes: tuple[Size, ...] = ()
    completion_ids: list[int] = field(default_factory=list)
    is_sampled: list[bool] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    drawn_logprobs: list[float] = field(default_factory=list)
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    stop_reason: StopReason = "max_tokens"
    error: str | None = None
    num_turns: int = 0
    num_visual_tokens: int = 0

    @property
    def image_size(self) -> Size | None:
        """The size of the first picture or of the video; None without either."""
        return self.image_sizes[0] if self.image_sizes else None

    @property
    def is_truncated(self) -> bool:
        return self.stop_reason not in COMPLETE

    @property
    def num_sampled(self) -> int:
        return sum(self.is_sampled)

    @property
    def has_crop(self) -> bool:
        return any(call.is_valid for call in self.calls)

    def of_sampled(self, values: Sequence[Value]) -> list[Value]:
        """Of values [N] those where the policy wrote the id."""
        return [value for value, flag in zip(values, self.is_sampled) if flag]

    def share_of_image(self, call: ToolCall) -> float:
        """The share of its picture's area that a crop shows; 0 where there is no crop or no picture of that number."""
        if call.box is None or not 0 < call.image_number <= len(self.image_sizes):
            return 0.0
        width, height = self.image_sizes[call.image_number - 1]
        return call.box.area / (width * height)


def gold_overlaps(trajectories: Sequence[Trajectory], gold_boxes: Sequence[Sequence[Box]]) -> list[float]:
    """IoU of every crop with the nearest of its trajectory's gold boxes, in original pixels; none where there are none.

    Gold boxes lie in the first picture, so a crop of another one overlaps them by 0.
    """
    return [
        max(iou(call.box, box) for box in boxes) if call.image_number == 1 else 0.0
        for trajectory, boxes in zip(trajectories, gold_boxes)
        if boxes
        for call in trajectory.calls
        if call.box is not None
    ]
