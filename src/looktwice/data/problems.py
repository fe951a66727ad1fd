"""Problems: what is wrong at one place of the data, and the judging of a sample by its turns, pictures and boxes.

`data check` tells every problem, training stops at those that are fatal.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from looktwice.answers import find_answer_block, golds
from looktwice.calls import TOOL_CALL_CLOSE, TOOL_CALL_OPEN, format_call, parse_call, split_calls
from looktwice.config import SampleConfig, Stage
from looktwice.data.image_files import ImageFacts, Source, decoded, inspect_all, measured
from looktwice.data.near_calls import near_calls
from looktwice.data.reasons import BOX_REASONS, REASONS
from looktwice.data.sample import Sample, text_of
from looktwice.errors import BoxError, DataError, counted, one_line, short
from looktwice.geometry import Box, BoxFrame, PixelPolicy, Size, crop_rectangle, iou, to_original
from looktwice.judging.mathematics import is_installed
from looktwice.judging.verdict import needs_mathematics
from looktwice.messages import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN, ImagePart, Message, TextPart
from looktwice.neighbours import nearby
from looktwice.processing.chat_template import TURN_CLOSE, TURN_OPEN
from looktwice.processing.images import ImageHeader, name_of
from looktwice.processing.processor import TEXT_END, VISUAL_TOKENS, Ovis2_5Processor
from looktwice.rewards import can_be_earned

MAX_PROBLEMS_SHOWN = 20
PLACES_SHOWN = 3
SLACK_PX = 1.0
"""How far a box may reach over its picture before it is noted."""
MIN_SIDE_PX = 2
"""Shortest side of a box that is taken for pixels."""
WHOLE_SHARE = 0.98
"""Share of the picture from which on a crop counts as the whole of it."""
SPECIAL_TEXTS = (TURN_OPEN, TURN_CLOSE, TEXT_END, *(token for token in VISUAL_TOKENS if "_" in token))
PLACEHOLDERS = (*(token for token in VISUAL_TOKENS if "_" not in token), "<audio>", "<img>")
"""What formats write in a text for something that is shown, and this one may not."""
_TOOL_TEXT = re.compile(r"</?\s?(?:tool|function)[_ -]?(?:response|result|output)s?\s?>|</?observation>", re.IGNORECASE)
"""The tags around what a tool says."""
_NOT_A_NUMBER = re.compile(r"nan|NaN|NAN|NaT|<NA>|#N/A")
"""What programs write for a value that is not there, and nobody else does."""
_MISSING = re.compile(r"null|NULL|None|undefined|-?inf|-?Infinity")
"""What programs write for such a value, and people for others."""
_SLASH = re.compile(r"[^\W\d_]\s+/\s+[^\W\d_]")
"""How several answers were written into one text."""
_COLLECTION = re.compile(r"[\[{].*[\"'].*[\]}]", re.DOTALL)
_TOLD_BY_READERS = (
    *(BOX_REASONS[reason] for reason in ("no_box", "wrong_length", "not_a_number", "reversed")),
    "call_without_picture",
    "no_such_picture",
)
"""What is wrong with a call that cannot be parsed, or whose picture may be the one that could not be read."""
RELEASED_FACTOR = 32
"""Pixels a side of a visual token of the released models."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing wrong at one place; as a text it is the message a user reads.

    `reason` is a key of REASONS, `where` the file and its row, `field` the place in the row ("" for all of it), `what`
    what was seen there, `own_mend` a mend that fits better than the one of the reason. Each is one line, whatever
    stands in the data.
    """

    reason: str
    where: str
    field: str
    what: str
    own_mend: str = ""

    def __post_init__(self) -> None:
        for name in ("where", "field", "what", "own_mend"):
            object.__setattr__(self, name, one_line(getattr(self, name)))

    @classmethod
    def told(cls, words: str, *, reason: str, where: str, field: str) -> Problem:
        """A problem in words that end in its mend: "the message is empty; fill it in or remove it"."""
        what, _, mend = words.rpartition("; ")
        return cls(reason=reason, where=where, field=field, what=what or mend, own_mend=mend if what else "")

    @property
    def is_fatal(self) -> bool:
        return REASONS[self.reason].is_fatal

    @property
    def mend(self) -> str:
        return self.own_mend or REASONS[self.reason].mend

    @property
    def place(self) -> str:
        """Where it is and what was seen, with a mend of its own."""
        words = "; ".join(text for text in (self.what, self.own_mend) if text)
        return ": ".join(text for text in (self.where, self.field, words) if text)

    @property
    def cause(self) -> tuple[str, ...]:
        """Equal for problems that are one: of a picture that cannot be used, wherever it is named."""
        return (self.reason, self.what) if self.field == "picture" else (self.reason, self.what, self.where, self.field)

    def __str__(self) -> str:
        return self.place if self.own_mend else f"{self.place}; {self.mend}"


class Partial(NamedTuple):
    """A sample of which something could not be read, for what else is wrong with it."""

    sample: Sample
    has_all_turns: bool


def raise_if_any(problems: Sequence[Problem], subject: object) -> None:
    """Raise one DataError about `subject` that counts the problems and lists the first 20, one cause once."""
    if not problems:
        return
    rows: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
    for problem in problems:
        rows[problem.cause].add(problem.where)
    first = {problem.cause: problem for problem in reversed(problems)}
    lines = [f"{first[cause]}{in_rows(len(places))}" for cause, places in rows.items()]
    shown = f", the first {MAX_PROBLEMS_SHOWN}" if len(lines) > MAX_PROBLEMS_SHOWN else ""
    head = f"{counted(len(lines), 'problem')} in {subject}{shown}:"
    raise DataError(head, *(f"  {line}" for line in lines[:MAX_PROBLEMS_SHOWN]))


def in_rows(number: int) -> str:
    """How many rows have one problem, said where there are several."""
    return f" (in {counted(number, 'row')})" if number > 1 else ""


class Tally:
    """How often each thing happened, and where first."""

    def __init__(self) -> None:
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.places: defaultdict[str, list[str]] = defaultdict(list)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, what: str, where: str) -> None:
        what = one_line(what, 200)
        self.counts[what] += 1
        # one more than is shown, which tells whether there are more
        if where not in self.places[what] and len(self.places[what]) <= PLACES_SHOWN:
            self.places[what].append(where)

    def update(self, other: Tally) -> None:
        """Add what another one counted later."""
        for what, count in other.counts.items():
            for where in other.places[what]:
                self.add(what, where)
            self.counts[what] += count - len(other.places[what])

    def lines(self) -> list[str]:
        """One line for each thing, the most frequent first: `3 x an untrained turn (a.jsonl:1, a.jsonl:4, ...)`."""
        ordered = sorted(self.counts.items(), key=lambda item: -item[1])
        return [f"{count} x {what} ({self._first_places(what)})" for what, count in ordered]

    def _first_places(self, what: str) -> str:
        places = self.places[what]
        return ", ".join([*places[:PLACES_SHOWN], "..."] if len(places) > PLACES_SHOWN else places)


@dataclass(frozen=True, kw_only=True)
class View:
    """How pictures are seen: by a processor, or where none is named by the released models' defaults."""

    policy: PixelPolicy
    factor: int = RELEASED_FACTOR
    box_frame: BoxFrame = "original_px"
    special_texts: tuple[str, ...] = SPECIAL_TEXTS

    @classmethod
    def of(cls, processor: Ovis2_5Processor) -> View:
        special = {*SPECIAL_TEXTS, *processor.tokenizer.all_special_tokens} - {*PLACEHOLDERS}
        return cls(
            policy=processor.policy,
            factor=processor.factor,
            box_frame=processor.box_frame,
            special_texts=tuple(sorted(special)),
        )

    @classmethod
    def by_default(cls, config: SampleConfig) -> View:
        """What the settings make of the defaults."""
        return cls(policy=PixelPolicy().override(**config.pixel_bounds), box_frame=config.box_frame or "original_px")

    def overview_size(self, original: Size) -> Size:
        return self.policy.overview_size(original, factor=self.factor)


def refuse(
    samples: Sequence[Sample],
    subject: object,
    *,
    stage: Stage,
    view: View,
    decode: bool = False,
    known: Sequence[Problem] = (),
    partial: Sequence[Partial] = (),
) -> Counter[str]:
    """Raise one DataError about `subject` that counts all that is fatal in samples and lists the first 20.

    `known` are problems found before, `partial` the samples that have them. Gives back how often there is what is not
    fatal, by reason. With `decode` each picture is decoded to its end, once;
    without it headers are believed, since who uses the samples decodes them.
    """
    of_partial = (one.sample for one in partial)
    sources = list(dict.fromkeys(source for sample in (*samples, *of_partial) for source in sample.image_paths))
    facts_of = dict(zip(sources, inspect_all(sources, decoded if decode else measured))).__getitem__
    problems = [
        *known,
        *(one for part in partial for one in partial_problems(part, stage=stage, view=view, facts_of=facts_of)),
        *(one for sample in samples for one in sample_problems(sample, stage=stage, view=view, facts_of=facts_of)),
    ]
    raise_if_any([problem for problem in problems if problem.is_fatal], subject)
    return Counter(problem.reason for problem in problems)


def sample_problems(
    sample: Sample, *, stage: Stage, view: View, facts_of: Callable[[Source], ImageFacts]
) -> Iterator[Problem]:
    """All that can be said of one sample, by what its rows are for and what is known of its pictures."""
    yield from turn_problems(sample, stage, view)
    yield from image_problems(sample, facts_of)
    headers = [facts_of(source).header for source in sample.image_paths]
    yield from call_box_problems(sample, view, headers)
    if headers and headers[0]:
        yield from gold_problems(sample, headers[0])


def partial_problems(
    partial: Partial, *, stage: Stage, view: View, facts_of: Callable[[Source], ImageFacts]
) -> Iterator[Problem]:
    """What else is fatal in a sample of which something could not be read, and does not follow from that."""
    told = _TOLD_BY_READERS if partial.has_all_turns else (*_TOLD_BY_READERS, "no_target", "no_gold_answer")
    if partial.sample.conversation.messages:
        for problem in sample_problems(partial.sample, stage=stage, view=view, facts_of=facts_of):
            if problem.is_fatal and problem.reason not in told:
                yield problem


def turn_problems(sample: Sample, stage: Stage, view: View) -> Iterator[Problem]:
    """What is wrong with the turns of a sample and their texts."""
    messages = sample.conversation.messages
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[place % 2] for place, role in enumerate(turns)):
        yield problem_of(sample, "role_order", f"the turns are {', '.join(roles)}")
    elif stage == "sft" and "assistant" in roles and roles[-1] != "assistant":
        yield problem_of(sample, "role_order", "the last question has no answer")
    if stage != "grpo" and not any(message.role == "assistant" and message.is_trained for message in messages):
        yield problem_of(sample, "no_target", "no assistant turn is trained")
    if stage != "sft" and not sample.solution:
        yield problem_of(sample, "no_gold_answer", 'no <answer> block and no field "answer"')
    elif roles[-1] == "assistant" and find_answer_block(sample.response) is None:
        yield problem_of(sample, "no_answer_block", "no <answer>…</answer> in the answer")
    if stage != "sft" and sample.solution:
        yield from gold_answer_problems(sample, view)
    for number, message in enumerate(messages, 1):
        place = f"message {number}: " if number < len(messages) else ""
        yield from text_problems(sample, message, view)
        if message.role == "assistant":
            for reason, what in _answer_faults(text_of(message)):
                yield problem_of(sample, reason, place + what)


def gold_answer_problems(sample: Sample, view: View) -> Iterator[Problem]:
    """What keeps a gold answer, judged as the reward judges it, from ever being given, or is not what was meant."""
    tags = (TOOL_CALL_OPEN, TOOL_CALL_CLOSE, THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
    for gold in golds(sample.solution):
        tokens = [token for token in (*view.special_texts, *tags) if token in gold]
        if tokens or not can_be_earned(gold):
            reason, what = "gold_unreachable", f"it has {', '.join(tokens)}" if tokens else f"{len(gold):,} characters"
        elif _NOT_A_NUMBER.fullmatch(gold):
            reason, what = "gold_missing", "what programs write for a value that is not there"
        elif _MISSING.fullmatch(gold) or _COLLECTION.fullmatch(gold):
            reason, what = "gold_unlikely", "no answer in words or numbers"
        elif _SLASH.search(gold):
            reason, what = "gold_slash", "one answer, slash and all"
        elif needs_mathematics(gold) and not is_installed():
            reason, what = "gold_mathematics", "an expression"
        else:
            continue
        what = f'the gold answer "{short(gold)}": {what}'
        yield Problem(reason=reason, where=sample.where, field=question_field(sample), what=what)


def text_problems(sample: Sample, message: Message, view: View) -> Iterator[Problem]:
    text = text_of(message)
    field = sample.field if message.role == "assistant" else question_field(sample)
    for reason, tokens in (("spells_token", view.special_texts), ("spells_placeholder", PLACEHOLDERS)):
        if spelled := [token for token in tokens if token in text]:
            what = f"the {message.role} writes {', '.join(spelled)}"
            yield Problem(reason=reason, where=sample.where, field=field, what=what)
    if message.role != "system" and (tags := _TOOL_TEXT.findall(text)):
        what = f"the {message.role} writes {', '.join(dict.fromkeys(tags))}"
        yield Problem(reason="tool_text", where=sample.where, field=field, what=what)


def _answer_faults(text: str) -> Iterator[tuple[str, str]]:
    """Code and words of what is wrong with the text of an assistant, in which what is a call in the format is one."""
    yield from (("no_call", f'"{short(written)}"') for written in near_calls(text))
    opened, closed = text.count(THINK_OPEN), text.count(THINK_CLOSE)
    if opened != closed or opened > 1 or (opened and text.index(THINK_OPEN) > text.index(THINK_CLOSE)):
        yield "think_not_closed", f"{opened} {THINK_OPEN} and {closed} {THINK_CLOSE}"
    _, *after = re.split(ANSWER_CLOSE, text, flags=re.IGNORECASE)
    if any(TOOL_CALL_OPEN in piece for piece in after):
        yield "after_answer", f"a call after {ANSWER_CLOSE}"
    elif after and after[-1].strip():
        yield "after_answer", f'"{short(after[-1])}"'


def image_problems(sample: Sample, facts_of: Callable[[Source], ImageFacts]) -> Iterator[Problem]:
    for source in dict.fromkeys(sample.image_paths):
        facts = facts_of(source)
        if facts.header is None:
            what, mend = facts.what, facts.mend if facts.reason == "picture_other" else ""
            if facts.reason == "picture_missing" and isinstance(source, Path):
                what, mend = "no such picture", nearby(source, sample.image_folder)
            what = f"{name_of(source)}: {what}"
            yield Problem(reason=facts.reason, where=sample.where, field="picture", what=what, own_mend=mend)
        elif facts.header.has_frames:
            yield Problem(reason="picture_frames", where=sample.where, field="picture", what=name_of(source))


def call_box_problems(sample: Sample, view: View, headers: Sequence[ImageHeader | None]) -> Iterator[Problem]:
    """What is wrong with the calls of a sample; `headers` are those of its pictures, None where one cannot be used."""
    frame = sample.box_frame or view.box_frame
    for number, (text, num_shown) in enumerate(calls_of(sample), 1):
        try:
            call = parse_call(text)
            header = call.pick(headers[:num_shown])
        except BoxError as error:
            yield problem_of(sample, BOX_REASONS[error.reason], f"call {number}: {error}")
            continue
        name = f"call {number} {format_call(*call)} read as {frame}"
        for reason, what in _call_faults(call.box, frame, header, view) if header else ():
            yield problem_of(sample, reason, f"{name}: {what}")


def gold_problems(sample: Sample, header: ImageHeader) -> Iterator[Problem]:
    """What is wrong with the gold boxes of a sample, if it has any, on its first picture."""
    field = ".".join(filter(None, (question_field(sample), "box")))
    for box in sample.gold_boxes:
        for reason, what in _gold_faults(box, header):
            yield Problem(reason=reason, where=sample.where, field=field, what=f"{_written(box)}: {what}")


def _call_faults(requested: Box, frame: BoxFrame, header: ImageHeader, view: View) -> Iterator[tuple[str, str]]:
    """Code and words of what is wrong with the box of a call."""
    size = header.size
    box = to_original(requested, frame=frame, original=size, resized=view.overview_size(size))
    name = f"the picture of {size.width}x{size.height}"
    try:
        left, top, right, bottom = crop_rectangle(box, original=size, min_side=view.factor)
    except BoxError as error:
        yield BOX_REASONS[error.reason], str(error)
    else:
        if (over := overhang(box, size)) > SLACK_PX:
            yield "box_partly_outside", f"it reaches {over:.0f} pixels over {name}"
        if (right - left) * (bottom - top) >= WHOLE_SHARE * size.width * size.height:
            yield "box_whole_picture", f"it shows all of {name}"
    yield from _rotation_faults(box, header)
    if frame != "unit" and min(requested) >= 0 and max(requested) <= 1:
        yield "box_looks_unit", "no number is above 1"
    limit = {"unit": 1.0, "norm1000": 1000.0}.get(frame)
    are_sides_px = min(requested.x2 - requested.x1, requested.y2 - requested.y1) >= MIN_SIDE_PX
    if limit and max(requested) > limit * 1.05 and are_sides_px and overhang(requested, size) <= SLACK_PX:
        yield "box_looks_px", f"a number is above {limit:.0f}, and as pixels the box lies inside {name}"


def _gold_faults(box: Box, header: ImageHeader) -> Iterator[tuple[str, str]]:
    """Code and words of what is wrong with a gold box, which is in original pixels."""
    size = header.size
    name = f"the picture of {size.width}x{size.height}"
    if iou(box, Box(0, 0, *size)) == 0:
        yield "gold_box_outside", f"it lies outside {name}"
    elif (over := overhang(box, size)) > SLACK_PX:
        yield "box_partly_outside", f"it reaches {over:.0f} pixels over {name}"
    yield from _rotation_faults(box, header)
    if min(box) >= 0 and max(box) <= 1:
        yield "box_looks_unit", "no number is above 1"


def _rotation_faults(box: Box, header: ImageHeader) -> Iterator[tuple[str, str]]:
    stored, size = header.stored, header.size
    if stored != size and overhang(box, size) > SLACK_PX >= overhang(box, stored):
        yield (
            "box_rotated",
            f"it fits {stored.width}x{stored.height}, the picture upright is {size.width}x{size.height}",
        )


class CallText(NamedTuple):
    """A text that ends in a call, and how many pictures of the conversation are shown before it."""

    text: str
    num_shown: int


def calls_of(sample: Sample) -> list[CallText]:
    """The calls of all answers, in order."""
    calls: list[CallText] = []
    num_shown = 0
    for message in sample.conversation.messages:
        for part in message.parts:
            if isinstance(part, ImagePart):
                num_shown += 1
            elif isinstance(part, TextPart) and message.role == "assistant":
                calls += [CallText(text, num_shown) for text in split_calls(part.text)[:-1]]
    return calls


def question_field(sample: Sample) -> str:
    """The place of a documented question in its row, such as `QnA[0]`; of another format "", the row itself."""
    question, _, _ = sample.field.rpartition(".")
    return question if question.startswith("QnA") else ""


def problem_of(sample: Sample, reason: str, what: str) -> Problem:
    return Problem(reason=reason, where=sample.where, field=sample.field, what=what)


def overhang(box: Box, size: Size) -> float:
    """How many pixels a box reaches over a picture, at most 0 for one that does not."""
    return max(-box.x1, -box.y1, box.x2 - size.width, box.y2 - size.height)


def _written(box: Box) -> str:
    return f"[{', '.join(f'{side:g}' for side in box)}]"
