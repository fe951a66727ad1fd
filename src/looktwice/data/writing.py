"""Samples on their way into a file: what all formats write alike, and what the target cannot hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from looktwice.answers import find_answer_block
from looktwice.data.sample import Sample
from looktwice.data.tally import Tally
from looktwice.messages import ANSWER_OPEN, ImagePart, Message, TextPart
from looktwice.processing.images import DATA_URL

FORMAT_FIELDS = ("QnA", "messages", "conversations", "response_list")
"""The fields by which a row's format is known."""


@dataclass(kw_only=True)
class Writing:
    """Where pictures are, and what went missing: of samples that were written, and samples left out."""

    image_base_path: Path
    lost: Tally = field(default_factory=Tally)
    left_out: Tally = field(default_factory=Tally)

    def lose(self, sample: Sample, what: str) -> None:
        self.lost.add(what, sample.where)

    def leave_out(self, sample: Sample, why: str) -> None:
        self.left_out.add(why, sample.where)

    def picture(self, source: object) -> str:
        """The text of a path: from `image_base_path` where it lies below it. A data: URL stands as it is."""
        if not isinstance(source, Path):
            return str(source)
        path = source.relative_to(self.image_base_path) if source.is_relative_to(self.image_base_path) else source
        written = path.as_posix()
        return f"./{written}" if written.startswith(DATA_URL) else written

    def gold(self, sample: Sample) -> dict[str, object]:
        """The optional fields of a sample, without an answer that a reader finds in the response by itself."""
        fields: dict[str, object] = {}
        found = find_answer_block(sample.response)
        if sample.solution and (sample.solution != found):
            fields["answer"] = sample.solution
        elif not sample.solution and (found is not None or ANSWER_OPEN in sample.response):
            self.lose(sample, "that the answer block is not the gold answer")
        if sample.gold_box:
            fields["box"] = [_number(side) for side in sample.gold_box]
        if sample.box_frame:
            fields["box_frame"] = sample.box_frame
        return fields

    def with_extra(self, row: dict[str, object], sample: Sample, known: Sequence[str]) -> dict[str, object]:
        """The row with the fields that had no meaning; one whose name has a meaning here is lost."""
        clashing = sample.extra.keys() & {*known, *FORMAT_FIELDS}
        for name in sorted(clashing):
            self.lose(sample, f'the field "{name}", a name with a meaning here')
        return {**{name: value for name, value in sample.extra.items() if name not in clashing}, **row}

    def is_one_question(self, sample: Sample, *, needs_answer: bool, may_answer_show: bool = False) -> bool:
        """Whether a format of one picture, one question and one answer can hold the sample; else it is left out.

        `may_answer_show`: an answer may show pictures that are not the crops of its calls.
        """
        first, *rest = sample.conversation.messages
        roles = [message.role for message in rest]
        if first.role == "system":
            self.leave_out(sample, "a system turn")
        elif first.role != "user" or roles not in ([], ["assistant"]):
            self.leave_out(sample, "several turns")
        elif needs_answer and not roles:
            self.leave_out(sample, "a question without an answer")
        elif not _are(first, ImagePart, TextPart):
            self.leave_out(sample, "a question that is not one picture and then a text")
        elif rest and not may_answer_show and not _are(rest[0], TextPart):
            self.leave_out(sample, "a picture in the answer that is not the crop of a call")
        else:
            if rest and not rest[0].is_trained:
                self.lose(sample, "that an assistant turn is not trained")
            return True
        return False


def _are(message: Message, *kinds: type) -> bool:
    """Whether the parts of a message are of these kinds, one of each."""
    return tuple(map(type, message.parts)) == kinds


def _number(value: float) -> float | int:
    return int(value) if value.is_integer() else value
