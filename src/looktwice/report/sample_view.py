"""What the model sees of a sample, as plain data: turns of text in pieces of tokens, pictures, crops and trained marks.

Everything is read off the Example that training would use: its ids, its trained marks, its patched pictures.
Legend: P patches, p their side, R and C patches of a picture from top to bottom and from left to right, s the stride.
"""

from __future__ import annotations

import codecs
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from PIL import Image
from transformers.convert_slow_tokenizer import bytes_to_unicode

from looktwice.calls import TOOL_CALL_CLOSE
from looktwice.config import ShowConfig
from looktwice.data.examples import encode_sample, processor_for
from looktwice.data.lengths import NUM_MARKS, cut_of, fit_lengths, purposes_of
from looktwice.data.problems import View, refuse
from looktwice.data.sample import Sample
from looktwice.errors import DataError, LooktwiceError
from looktwice.formats.sample_file import SampleFile
from looktwice.geometry import Box, Size
from looktwice.messages import ImageSource, Role
from looktwice.processing.images import PatchedImage, image_size, name_of
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.rollout.conversation import encode_conversation, in_model_frame, open_images

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
"""The byte behind each character of a byte-level vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Whole characters: one token, or the few tokens over which a character is split."""

    text: str
    ids: tuple[int, ...]
    is_trained: bool

    @property
    def shown(self) -> str:
        """The text with its ends of lines marked, and control characters as their pictures, so that all are seen."""
        return self.text.translate(_VISIBLE)


_VISIBLE: dict[int, int | str] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_VISIBLE |= {0x7F: 0x2421, 0x0A: "↵\n", **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


@dataclass(frozen=True, kw_only=True)
class ImageView:
    """A picture or a crop in its place. `original` is its size in the file, or that of the cut `rectangle`.

    `source` is the picture's path or address, None for a crop. `number` counts pictures, and apart from them crops,
    from 1; a crop is cut from picture `cut_from`. `num_tokens` counts its two marks too. `image` is made of the patches
    that the model reads.
    """

    number: int
    source: ImageSource | None = None
    original: Size
    rectangle: tuple[int, int, int, int] | None
    cut_from: int = 1
    num_tokens: int
    image: Image.Image

    @property
    def is_crop(self) -> bool:
        return self.rectangle is not None

    @property
    def seen(self) -> Size:
        return Size(*self.image.size)

    @property
    def num_atoms(self) -> int:
        """Its tokens without the two marks."""
        return self.num_tokens - NUM_MARKS

    @property
    def name(self) -> str:
        return f"{'crop' if self.is_crop else 'picture'} {self.number}"

    @property
    def caption(self) -> str:
        """Such as `crop 1 234,0-545,287 → 311x287, seen as 320x288: 90 tokens`, marks not counted.

        A crop of another picture than the first says so: `crop 1 of picture 2 234,0-…`.
        """
        (width, height), (seen_width, seen_height) = self.original, self.seen
        place = f"{name_of(self.source)} " if self.source else ""
        if self.rectangle:
            x1, y1, x2, y2 = self.rectangle
            place = f"{f'of picture {self.cut_from} ' * (self.cut_from > 1)}{x1},{y1}-{x2},{y2} → "
        return f"{self.name} {place}{width}x{height}, seen as {seen_width}x{seen_height}: {self.num_atoms} tokens"


@dataclass(frozen=True, kw_only=True)
class TurnView:
    """One turn with all that the template writes around it."""

    role: Role
    parts: tuple[Piece | ImageView, ...]

    @property
    def images(self) -> list[ImageView]:
        return [part for part in self.parts if isinstance(part, ImageView)]

    @property
    def num_text_tokens(self) -> int:
        return sum(len(part.ids) for part in self.parts if isinstance(part, Piece))

    @property
    def num_image_tokens(self) -> int:
        return sum(image.num_tokens for image in self.images if not image.is_crop)

    @property
    def num_crop_tokens(self) -> int:
        return sum(image.num_tokens for image in self.images if image.is_crop)

    @property
    def num_tokens(self) -> int:
        return self.num_text_tokens + self.num_image_tokens + self.num_crop_tokens

    @property
    def num_trained(self) -> int:
        return sum(len(part.ids) for part in self.parts if isinstance(part, Piece) and part.is_trained)


@dataclass(frozen=True, kw_only=True)
class SampleView:
    """One sample as the model sees it, or, with `problem`, the reason why it cannot be trained.

    `gold_boxes` are in original pixels of the first picture; `note` says what else was done with the sample.
    """

    where: str
    place: str
    turns: tuple[TurnView, ...] = ()
    gold_boxes: tuple[Box, ...] = ()
    solution: str = ""
    note: str = ""
    problem: str = ""

    @property
    def whole_images(self) -> list[ImageView]:
        return [image for turn in self.turns for image in turn.images if not image.is_crop]

    @property
    def crops(self) -> list[ImageView]:
        return [image for turn in self.turns for image in turn.images if image.is_crop]

    @property
    def num_tokens(self) -> int:
        return sum(turn.num_tokens for turn in self.turns)

    @property
    def num_trained(self) -> int:
        return sum(turn.num_trained for turn in self.turns)

    @property
    def trained_share(self) -> float:
        return self.num_trained / self.num_tokens if self.turns else 0.0


def view_file(file: SampleFile, processor: Ovis2_5Processor, config: ShowConfig) -> Iterator[SampleView]:
    """The samples that the settings choose: the first ones, those of one row, or those of rows picked at random.

    A row that cannot be read counts as one sample. Raises DataError when the row that is named is not there.
    """
    views = (view for row in rows_to_show(file, config) for view in _views_of(file, row, processor, config))
    return islice(views, None if config.row else config.num_samples)


def rows_to_show(file: SampleFile, config: ShowConfig) -> Sequence[int]:
    """Places of the rows, counted from 0. Raises DataError when the row that is named is not there."""
    rows = range(len(file))
    if config.seed is not None:
        return random.Random(config.seed).sample(rows, min(len(rows), config.num_samples))
    if config.row is None:
        return rows
    ends = (f":{config.row}", f":row {config.row}")
    found = [row for row in rows if file.rows.where(row).endswith(ends)]
    if not found:
        last = f"; the last is {file.rows.where(len(file) - 1)}" if len(file) else ""
        raise DataError(f"{file.path}: no row {config.row}{last}")
    return found


def _views_of(file: SampleFile, row: int, processor: Ovis2_5Processor, config: ShowConfig) -> Iterator[SampleView]:
    try:
        samples = file.samples_of(row)
    except DataError as error:
        yield SampleView(where=file.rows.where(row), place="", problem=str(error))
        return
    for sample in samples:
        yield view_sample(sample, processor, config)


def view_sample(sample: Sample, processor: Ovis2_5Processor, config: ShowConfig) -> SampleView:
    """The sample as training sees it under the settings; what makes it unusable becomes its `problem`."""
    note = ""
    try:
        refuse([sample], sample.where, stage=config.stage, view=View.of(processor))
        sample, note = _fitted(sample, processor, config)
        example = _encoded(sample, processor, config)
        turns = turns_of(example, sample, processor_for(sample, processor))
    except LooktwiceError as error:
        return SampleView(where=sample.where, place=sample.field, problem=str(error))
    return SampleView(
        where=sample.where,
        place=sample.field,
        turns=turns,
        gold_boxes=sample.gold_boxes,
        solution=sample.solution if isinstance(sample.solution, str) else " or ".join(sample.solution),
        note=note,
    )


def _encoded(sample: Sample, processor: Ovis2_5Processor, config: ShowConfig) -> Example:
    """What training sees: the whole sequence, or in stage 2 the prompt that rollouts start from."""
    if config.stage == "sft":
        return encode_sample(sample, processor, max_length=config.max_length)
    prompt = in_model_frame(open_images(sample.prompt), sample.box_frame, processor)
    return encode_conversation(prompt, processor_for(sample, processor), purpose="prompt")


def _fitted(sample: Sample, processor: Ovis2_5Processor, config: ShowConfig) -> tuple[Sample, str]:
    """The sample as `length_policy` leaves it, and what was done. Raises DataError when it is left out."""
    kept, refits = fit_lengths(
        [sample],
        processor,
        max_length=config.max_length,
        length_policy=config.length_policy,
        purpose=purposes_of(config.stage)[0],
    )
    if not refits:
        return sample, ""
    note = f"{refits[0].num_tokens} tokens, more than max_length {config.max_length}: {refits[0].outcome}"
    if not kept:
        raise DataError(f"{sample.where}: {note}")
    return kept[0], note


def turns_of(example: Example, sample: Sample, processor: Ovis2_5Processor) -> tuple[TurnView, ...]:
    """The Example of a sample cut into its turns; `processor` has the pixel bounds of the sample.

    A picture right after `</tool_call>` is the crop of that call: outside an assistant's turn the template writes a
    newline before each picture.
    """
    sizes = [image_size(source) for source in sample.image_paths]
    turns: list[list[Piece | ImageView]] = []
    num_images = num_crops = 0
    for part in parts_of(example, processor):
        if isinstance(part, Piece):
            if part.ids[0] == processor.template.turn_open_id:
                turns.append([])
            turns[-1].append(part)
            continue
        before = turns[-1][-1]
        cut = None
        if isinstance(before, Piece) and before.text == TOOL_CALL_CLOSE:
            num_crops += 1
            said = "".join(piece.text for piece in turns[-1] if isinstance(piece, Piece))
            cut = cut_of(said, processor, sizes[:num_images])
            x1, y1, x2, y2 = cut.rectangle
            original = Size(x2 - x1, y2 - y1)
        else:
            original = sizes[num_images]
            num_images += 1
        turns[-1].append(
            ImageView(
                number=num_crops if cut else num_images,
                source=None if cut else sample.image_paths[num_images - 1],
                original=original,
                rectangle=cut.rectangle if cut else None,
                cut_from=cut.image_number if cut else 1,
                num_tokens=part.num_tokens + NUM_MARKS,
                image=image_of(part, processor.patch_size, processor.stride),
            )
        )
    # a prompt ends where the next answer begins
    roles: list[Role] = [*(message.role for message in sample.conversation.messages), "assistant"]
    return tuple(TurnView(role=role, parts=tuple(parts)) for role, parts in zip(roles, turns))


def parts_of(example: Example, processor: Ovis2_5Processor) -> Iterator[Piece | PatchedImage]:
    """Text and pictures of an Example in order; the texts joined are `processor.decode` of its ids."""
    images = iter(example.images)
    place = 0
    while place < len(example):
        if example.input_ids[place] == processor.config.image_start_token_id:
            image = next(images)
            place += image.num_tokens + NUM_MARKS
            yield image
            continue
        try:
            end = example.input_ids.index(processor.config.image_start_token_id, place)
        except ValueError:
            end = len(example)
        yield from pieces_of(example.input_ids[place:end], example.loss_mask[place:end], processor)
        place = end


def pieces_of(ids: list[int], loss_mask: list[bool], processor: Ovis2_5Processor) -> Iterator[Piece]:
    """Ids of text as pieces of whole characters, none of them part trained, part not."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    added = processor.tokenizer.added_tokens_decoder
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    first, text = 0, ""
    for place, (token_id, token) in enumerate(zip(ids, tokens), 1):
        raw = token.encode() if token_id in added else bytes(BYTE_OF[character] for character in token)
        is_last = place == len(ids)
        text += decoder.decode(raw, final=is_last)
        if is_last or not decoder.getstate()[0]:
            yield Piece(text=text, ids=tuple(ids[first:place]), is_trained=loss_mask[first])
            first, text = place, ""


def image_of(image: PatchedImage, patch_size: int, stride: int) -> Image.Image:
    """The picture back from its patches [P, 3 * p * p] uint8, the inverse of `patchify`."""
    _, rows, columns = image.grid_thw
    p, s = patch_size, stride
    patches = image.pixel_values.numpy().reshape(rows // s, columns // s, s, s, 3, p, p)
    pixels = patches.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * p, columns * p, 3)
    return Image.fromarray(pixels)
