"""Examples to packed batches: one row of tokens, one matrix of patches, no padding.

Legend: T tokens of the row, S segments, P patches, I distinct pictures, J places where a picture is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looktwice.model.configuration import IGNORE_INDEX
from looktwice.processing.images import PatchedImage
from looktwice.processing.processor import Example


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """`input_ids`, `position_ids`, `loss_mask` [1, T]; `cu_seqlens` [S + 1] int32; `pixel_values` [P, C * p * p] uint8;
    `image_grid_thw` [I, 3]; `image_index` [J]. A picture shown in several sequences is stored once.
    `num_shown` are the places of pictures in each segment; `examples` are what it was packed from, in order, and
    `where` the files and lines of their samples.

    A segment is a sequence, or where siblings share their prompt, that prompt or what follows it in one of them:
    `parents` [S] is the segment that each goes on after, -1 where it is none; None where nothing is shared.
    """

    input_ids: Tensor
    position_ids: Tensor
    loss_mask: Tensor
    cu_seqlens: Tensor
    parents: Tensor | None = None
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    image_index: Tensor | None
    num_shown: tuple[int, ...]
    examples: tuple[Example, ...]
    where: tuple[str, ...] = ()

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    def loss_sequence(self) -> Tensor:
        """Number of the example each trained token belongs to [N]."""
        segments = torch.arange(len(self.cu_seqlens) - 1)
        if self.parents is not None:
            segments = (~torch.isin(segments, self.parents)).cumsum(0) - 1
        return torch.repeat_interleave(segments, self.cu_seqlens.diff().long())[self.loss_mask[0]]

    def model_inputs(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Keyword arguments of the model's forward: patches and positions on `device`, to which the copy from pinned
        memory does not wait; all that decides shapes stays on the host, where reading it does not wait either."""
        others = ("examples", "num_shown", "where")
        inputs = {name: value for name, value in vars(self).items() if name not in others}
        for name in ("pixel_values", "position_ids"):
            inputs[name] = None if inputs[name] is None else inputs[name].to(device, non_blocking=True)
        return inputs

    def halves(self) -> list[PackedBatch]:
        """The sequences, of which there are several, in two rows: of about as many tokens, or of siblings."""
        if self.parents is not None:
            middle = len(self.examples) // 2
            return [pack(part, share_prompts=True) for part in (self.examples[:middle], self.examples[middle:])]
        ends = self.cu_seqlens.tolist()
        middle = min(range(1, len(ends) - 1), key=lambda number: abs(2 * ends[number] - ends[-1]))
        return [self._part(0, middle), self._part(middle, len(ends) - 1)]

    def _part(self, first: int, last: int) -> PackedBatch:
        """The sequences from number `first` to before `last`, with their pictures."""
        start, end = self.cu_seqlens[[first, last]].tolist()
        tokens = {name: getattr(self, name)[:, start:end] for name in ("input_ids", "position_ids", "loss_mask")}
        images: dict[str, Any] = {"pixel_values": None, "image_grid_thw": None, "image_index": None}
        shown = slice(sum(self.num_shown[:first]), sum(self.num_shown[:last]))
        if self.pixel_values is not None and self.image_grid_thw is not None and self.image_index is not None:
            numbers, places = self.image_index[shown].unique(return_inverse=True)
            if len(numbers):
                patches = self.pixel_values.split(self.image_grid_thw.prod(-1).tolist())
                images = {
                    "pixel_values": torch.cat([patches[number] for number in numbers.tolist()]),
                    "image_grid_thw": self.image_grid_thw[numbers],
                    "image_index": places,
                }
        return PackedBatch(
            **tokens,
            **images,
            cu_seqlens=self.cu_seqlens[first : last + 1] - start,
            num_shown=self.num_shown[first:last],
            examples=self.examples[first:last],
            where=self.where[first:last],
        )

    def pin_memory(self) -> PackedBatch:
        """The same in page-locked memory, from which copies to a GPU do not wait."""
        pinned: dict[str, Any] = {
            name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **pinned)


class Segment(NamedTuple):
    """Ids and trained marks of a part of a sequence whose first stands at place `start`, the pictures shown in it, and
    the segment of the row that it goes on after, or -1."""

    input_ids: list[int]
    loss_mask: list[bool]
    images: list[PatchedImage]
    start: int = 0
    parent: int = -1


def pack(examples: Sequence[Example], *, share_prompts: bool = False) -> PackedBatch:
    """One row of all examples, in order; with `share_prompts` neighbouring siblings have their prompt in it once."""
    segments = _segments(examples, share_prompts)
    shown = [image for segment in segments for image in segment.images]
    distinct: dict[int, int] = {}
    images: list[PatchedImage] = []
    for image in shown:
        if id(image) not in distinct:
            distinct[id(image)] = len(images)
            images.append(image)
    lengths = [len(segment.input_ids) for segment in segments]
    places = [torch.arange(segment.start, segment.start + length) for segment, length in zip(segments, lengths)]
    parents = [segment.parent for segment in segments]
    return PackedBatch(
        input_ids=torch.tensor([[token for segment in segments for token in segment.input_ids]]),
        position_ids=torch.cat(places)[None],
        loss_mask=torch.tensor([[flag for segment in segments for flag in segment.loss_mask]], dtype=torch.bool),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        parents=torch.tensor(parents) if max(parents) >= 0 else None,
        pixel_values=torch.cat([image.pixel_values for image in images]) if images else None,
        image_grid_thw=torch.tensor([image.grid_thw for image in images]) if images else None,
        image_index=torch.tensor([distinct[id(image)] for image in shown]) if images else None,
        num_shown=tuple(len(segment.images) for segment in segments),
        examples=tuple(examples),
        where=tuple(example.where for example in examples),
    )


def _segments(examples: Sequence[Example], share_prompts: bool) -> list[Segment]:
    """A segment an example, or where siblings share their prompt, that prompt and then a segment each.

    The last id of the prompt stands in each sibling, whose first own id it predicts.
    """
    segments: list[Segment] = []
    for siblings in groups_of(examples) if share_prompts else [[one] for one in examples]:
        prompt = siblings[0].prompt
        if prompt is None or len(siblings) == 1 or len(prompt) == 1:
            segments += [Segment(one.input_ids, one.loss_mask, one.images) for one in siblings]
            continue
        parent, start, num_images = len(segments), len(prompt) - 1, len(prompt.images)
        segments.append(Segment(prompt.input_ids[:start], prompt.loss_mask[:start], prompt.images))
        segments += [
            Segment(one.input_ids[start:], one.loss_mask[start:], one.images[num_images:], start, parent)
            for one in siblings
        ]
    return segments


def groups_of(examples: Sequence[Example]) -> list[list[Example]]:
    """Neighbours that begin with the same prompt together, each other example by itself."""
    return [[*group] for _, group in groupby(examples, key=lambda one: id(one if one.prompt is None else one.prompt))]


def pack_rows(examples: Sequence[Example], max_tokens: int, *, sibling_tokens: int | None = None) -> list[PackedBatch]:
    """The examples in as few rows as the limit allows, the longest first; see `split_by_tokens`.

    With `sibling_tokens` siblings share their prompt, in rows of so many tokens even where others have fewer.
    """
    units = [[one] for one in examples]
    if sibling_tokens is not None:
        units = [part for group in groups_of(examples) for part in _parts(group, sibling_tokens)]
    places = split_by_tokens([_num_tokens(unit) for unit in units], max_tokens)
    return [
        pack([one for place in row for one in units[place]], share_prompts=sibling_tokens is not None) for row in places
    ]


def _parts(siblings: list[Example], max_tokens: int) -> list[list[Example]]:
    """Siblings in as many parts as fit a row each."""
    parts = [siblings[:1]]
    for one in siblings[1:]:
        if _num_tokens([*parts[-1], one]) <= max_tokens:
            parts[-1].append(one)
        else:
            parts.append([one])
    return parts


def _num_tokens(siblings: list[Example]) -> int:
    """Tokens of siblings in one row that have their prompt once."""
    prompt = siblings[0].prompt
    shared = 0 if prompt is None else (len(siblings) - 1) * (len(prompt) - 1)
    return sum(map(len, siblings)) - shared


def split_rows(rows: Sequence[PackedBatch], max_tokens: int | None) -> list[PackedBatch]:
    """The rows, those of more tokens in halves until they are short enough or one sequence; None is no limit."""
    split: list[PackedBatch] = []
    for row in rows:
        if max_tokens is None or row.num_tokens <= max_tokens or len(row.num_shown) == 1:
            split.append(row)
        else:
            split += split_rows(row.halves(), max_tokens)
    return split


def collate_packed(examples: Sequence[Example]) -> dict[str, Tensor]:
    """One packed row as keyword arguments of the model, `labels` [1, T] among them: the `data_collator` of
    transformers' Trainer over Examples, and the last step of one for TRL's SFTTrainer.

    A sequence's first token is never trained, so no label is predicted across the border of two sequences.
    """
    batch = pack(examples)
    starts = batch.cu_seqlens[:-1].long()
    labels = batch.input_ids.masked_fill(~batch.loss_mask, IGNORE_INDEX).index_fill(1, starts, IGNORE_INDEX)
    inputs = {name: value for name, value in batch.model_inputs().items() if value is not None}
    del inputs["loss_mask"]
    return {**inputs, "labels": labels}


def split_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Places of the lengths grouped into rows of at most `max_tokens`; a longer one gets its own row.

    First fit decreasing: the longest sample first, each into the first row with room. The longest row comes first, so
    that memory that does not suffice is told at once.

    Example: split_by_tokens([3, 5, 2, 4], 8) == [[0, 1], [2, 3]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        length = lengths[place]
        for row, free in enumerate(room):
            if length <= free:
                rows[row].append(place)
                room[row] -= length
                break
        else:
            rows.append([place])
            room.append(max_tokens - length)
    return [sorted(row) for _, row in sorted(zip(room, rows), key=lambda filled: filled[0])]
