"""The conditions that a question is asked under: with crops, and the controls that say what the crops are worth.

Each control takes away, or puts in the place of the crop, one thing that could explain a gain without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from PIL import Image

from looktwice.asking.asked import Asked, begin
from looktwice.benches.item import Item
from looktwice.calls import TOOL_CALL_CLOSE, TOOL_CALL_OPEN
from looktwice.config import ALL_CONTROLS, AnswerConfig
from looktwice.engine.sampling import mixed_seed
from looktwice.evaluation.controls import Control as LookControl
from looktwice.evaluation.controls import control_look
from looktwice.geometry import MAX_RESIZE_ASPECT, Size, hull, num_visual_tokens
from looktwice.inference import OvisInference, seeds_of
from looktwice.messages import Conversation, ImagePart, Part, TextPart
from looktwice.processing.images import open_image, resize
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.rollout.conversation import in_model_frame
from looktwice.rollout.episode import Look

CROPS = "crops"
CONDITIONS: tuple[str, ...] = (CROPS, *ALL_CONTROLS)
WORDS: dict[str, str] = {
    CROPS: "with crops",
    "no_crop": "without: a call is refused, the answer follows",
    "random_crop": "another place of equal area",
    "blank_crop": "grey of equal size",
    "gold_crop": "the gold crop, whatever is called for",
    "call_without_result": "the call without its result",
    "result_without_call": "the result without the call",
    "more_pixels": "no crop, more pixels: equal visual tokens",
    "question_only": "the question without the picture",
    "text_only": "thinking in text alone",
}
LOOKS: tuple[str, ...] = get_args(LookControl)
FOLLOWS_CROPS = ("result_without_call", "more_pixels")
"""Made of the crops that the model asked for, so they need its answer with crops first."""
SHARING = (CROPS, "no_crop", "blank_crop", "gold_crop", "question_only", "text_only")
"""Those under which all samples of a question have one prompt, and what answers a call has no state."""
ANY_SIZE = {"image_min_pixels": 1, "image_max_pixels": 2**40}
"""Bounds under which a picture whose sides are whole visual tokens stays as large as it is."""


def copies(condition: str, answered: Mapping[str, Any], generation: AnswerConfig) -> bool:
    """Whether an answer under a control is known unasked: the model called for nothing in its answer with crops, so
    that the control would change nothing.

    `answered` is that answer's line in a result. Without calls at all a call can only be banned without effect where
    answers are greedy and think.
    """
    if condition in (CROPS, "question_only") or answered["crops"]:
        return False
    return condition != "text_only" or (not generation.sampling_temperature and generation.enable_thinking)


def is_possible(item: Item, condition: str) -> bool:
    """Whether an item has what the condition needs."""
    if condition == "gold_crop":
        return bool(item.gold_boxes) or item.gold_image is not None
    return condition in (CROPS, "question_only", "text_only") or bool(item.images)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How one item is asked: the generation, a line added to the question, and a seed."""

    generation: AnswerConfig
    suffix: str | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class Begun:
    """An item on its way through an engine, with the sizes of its pictures, original and as the model sees them, and
    the visual tokens of all that its prompt shows."""

    asked: Asked
    image_sizes: tuple[Size, ...]
    seen_sizes: tuple[Size, ...]
    num_overview_tokens: int


def begin_item(
    inference: OvisInference,
    item: Item,
    condition: str,
    setting: Setting,
    answered: Mapping[str, Any] | None = None,
    *,
    count: int = 1,
) -> list[Begun]:
    """Begin an item `count` times under a condition, as siblings that share their prompt; more than once only under
    those of SHARING. `answered` is its line with crops, for those of FOLLOWS_CROPS.

    Raises ImageError for a picture that cannot be read, DataError for an item that lacks what the condition needs.
    """
    processor = inference.processor
    conversation = in_model_frame(item.asked, item.box_frame, processor)
    if setting.suffix:
        conversation = _with_suffix(conversation, setting.suffix)
    images = [open_image(source) for source in conversation.images]
    sizes = tuple(Size(*image.size) for image in images)
    shown, look = images, _look_of(condition, processor, item, setting.seed)
    generation = setting.generation
    if condition == "question_only":
        shown = []
    elif condition == "text_only":
        generation = generation.model_copy(update={"enable_thinking": True})
    elif condition in FOLLOWS_CROPS:
        assert answered is not None
        make = _with_results if condition == "result_without_call" else _with_more_pixels
        shown, processor = make(images, answered, processor), processor.at(processor.policy.override(**ANY_SIZE))
    siblings = begin(
        _showing(conversation, shown),
        processor,
        generation,
        seed_of=seeds_of(setting.seed),
        tells=[None] * count,
        look=look,
    )
    if condition == "text_only":
        tags = (TOOL_CALL_OPEN, TOOL_CALL_CLOSE)  # the closing one alone is a call too, one that cannot be read
        banned = frozenset(processor.template.token_id(tag) for tag in tags)
        request = replace(siblings[0].request, banned_ids=banned)
        for asked in siblings:
            asked.request = request
    seen = tuple(processor.overview_size(Size(*image.size)) for image in shown)
    num_tokens = sum(num_visual_tokens(size, factor=processor.factor) for size in seen)
    return [
        Begun(asked=asked, image_sizes=sizes, seen_sizes=seen[: len(sizes)], num_overview_tokens=num_tokens)
        for asked in siblings
    ]


def _look_of(condition: str, processor: Ovis2_5Processor, item: Item, seed: int) -> Look | None:
    """What answers a call; None is the crop tool."""
    if condition in (CROPS, "text_only"):
        return None
    name: Any = condition if condition in LOOKS else "no_crop"
    is_gold = condition == "gold_crop"
    gold_image = open_image(item.gold_image) if is_gold and item.gold_image is not None else None
    chance = mixed_seed(seed, item.id.encode())
    return control_look(name, processor, chance, hull(item.gold_boxes) if is_gold else None, gold_image)


def _with_results(
    images: Sequence[Image.Image], answered: Mapping[str, Any], processor: Ovis2_5Processor
) -> list[Image.Image]:
    """The pictures at the size at which they are seen, and after them the crops of an answer at that of the crops."""
    overviews = [resize(image, processor.overview_size(Size(*image.size))) for image in images]
    crops = [
        resize(images[crop["image"] - 1], Size(*crop["size"]), tuple(crop["box"]))
        for crop in answered["crops"]
        if crop["box"] is not None
    ]
    return overviews + crops


def _with_more_pixels(
    images: Sequence[Image.Image], answered: Mapping[str, Any], processor: Ovis2_5Processor
) -> list[Image.Image]:
    """The pictures so large that they take as many visual tokens as pictures and crops of an answer did, or the few
    more that whole rows and columns need."""
    factor = processor.factor
    overviews = [processor.overview_size(Size(*image.size)) for image in images]
    counts = [num_visual_tokens(size, factor=factor) for size in overviews]
    scale = 1 + answered["tokens"]["crops"] / sum(counts)
    if scale == 1:
        return [resize(image, size) for image, size in zip(images, overviews)]
    sizes = [
        size_of_tokens(Size(*image.size), math.ceil(count * scale), factor) for image, count in zip(images, counts)
    ]
    return [resize(image, size) for image, size in zip(images, sizes)]


def size_of_tokens(original: Size, num_tokens: int, factor: int) -> Size:
    """The size nearest to a picture's shape among those of at least so many visual tokens and no row or column more
    than they need."""
    shape = min(max(original.width / original.height, 1 / MAX_RESIZE_ASPECT), MAX_RESIZE_ASPECT)
    rows = math.sqrt(num_tokens / shape)
    grids = [(count, math.ceil(num_tokens / count)) for count in {max(1, math.floor(rows)), math.ceil(rows)}]
    kept = [grid for grid in grids if max(grid) <= MAX_RESIZE_ASPECT * min(grid)]
    height, width = min(kept or grids, key=lambda grid: abs(math.log(grid[1] / grid[0] / shape)))
    return Size(width * factor, height * factor)


def _showing(conversation: Conversation, images: Sequence[Image.Image]) -> Conversation:
    """The same conversation with these pictures in place of its own; those beyond follow the last one, and where there
    are fewer, the places of the others are gone."""
    coming = list(images)
    num_own = len(conversation.images)
    messages = []
    for message in conversation.messages:
        parts: list[Part] = []
        for part in message.parts:
            if not isinstance(part, ImagePart):
                parts.append(part)
                continue
            num_own -= 1
            taken, coming = (coming[:1], coming[1:]) if num_own else (coming, [])
            parts += [ImagePart(source=image) for image in taken]
        messages.append(replace(message, parts=tuple(parts)))
    return Conversation(messages=tuple(messages))


def _with_suffix(conversation: Conversation, suffix: str) -> Conversation:
    """The same conversation with a line added to its last question."""
    *before, last = conversation.messages
    *parts, end = last.parts
    text = end.text if isinstance(end, TextPart) else ""
    kept = parts if isinstance(end, TextPart) else [*parts, end]
    joined = TextPart(text=f"{text}\n{suffix}".lstrip("\n"))
    return Conversation(messages=(*before, replace(last, parts=(*kept, joined))))
