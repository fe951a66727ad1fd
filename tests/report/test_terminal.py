"""Samples and tables in the terminal: plain as text, trained tokens by their style."""

from __future__ import annotations

import io
from dataclasses import replace

from PIL import Image
from rich.console import Console

from looktwice.checking.check import Verdict
from looktwice.data.problems import PLACES_SHOWN, Problem
from looktwice.data.reasons import REASONS
from looktwice.geometry import Size
from looktwice.report.sample_view import ImageView, Piece, SampleView, TurnView
from looktwice.report.tables import Table
from looktwice.report.terminal import TRAINED_STYLES, sample_lines, sequence_text, titled, verdict_lines

IMAGE = ImageView(number=1, original=Size(64, 48), rectangle=None, num_tokens=14, image=Image.new("RGB", (64, 48)))
CROP = ImageView(
    number=1, original=Size(9, 8), rectangle=(1, 2, 10, 10), num_tokens=6, image=Image.new("RGB", (32, 32))
)
VIEW = SampleView(
    where="a.jsonl:1",
    place="QnA[0].A",
    turns=(
        TurnView(
            role="user",
            parts=(
                Piece(text="user", ids=(1, 2), is_trained=False),
                IMAGE,
                Piece(text="\n[b]?", ids=(3,), is_trained=False),
            ),
        ),
        TurnView(
            role="assistant",
            parts=(
                Piece(text="Look", ids=(4,), is_trained=True),
                CROP,
                Piece(text=" é", ids=(5, 6), is_trained=True),
                Piece(text="!", ids=(7,), is_trained=True),
            ),
        ),
    ),
)


def test_the_gold_answer_stands_below() -> None:
    assert printed(*sample_lines(replace(VIEW, solution="red"))).endswith("two marks.\nGold answer: red")


def printed(*parts: object, width: int = 90) -> str:
    console = Console(file=io.StringIO(), width=width, no_color=True)
    for part in parts:
        console.print(part, crop=False)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def test_a_sample_is_its_place_its_sequence_and_its_tokens_by_turn() -> None:
    assert printed(*sample_lines(VIEW)) == (
        "a.jsonl:1  QnA[0].A\n"
        "user[picture 1 64x48, seen as 64x48: 12 tokens]↵\n"
        "[b]?Look[crop 1 1,2-10,10 → 9x8, seen as 32x32: 4 tokens] é!\n"
        "turn       text  pictures  crops  all  trained\n"
        "user          3        14      0   17        0\n"
        "assistant     4         0      6   10        4\n"
        "all           7        14      6   27        4\n"
        "14.8 % of the tokens are trained. Pictures and crops with their two marks."
    )


def test_trained_tokens_and_no_others_have_the_shades_of_trained_tokens_in_turn() -> None:
    text = sequence_text(VIEW)
    styled = {text.plain[span.start : span.end]: span.style for span in text.spans}
    trained = {part: style for part, style in styled.items() if style in TRAINED_STYLES}
    assert list(trained) == ["Look", " é", "!"]
    assert trained[" é"] != trained["!"]


def test_a_sample_that_cannot_be_trained_says_why() -> None:
    view = SampleView(where="a.jsonl:2", place="", problem="a.jsonl:2: [red]no picture[/]; mend")
    assert printed(*sample_lines(view)) == "a.jsonl:2\na.jsonl:2: [red]no picture[/]; mend"


def test_a_note_stands_above_the_sequence() -> None:
    view = SampleView(where="a.jsonl:2", place="", turns=VIEW.turns, note="pictures shrunk")
    assert printed(*sample_lines(view)).splitlines()[:2] == ["a.jsonl:2", "pictures shrunk"]


def test_a_table_without_titles_of_columns_has_none() -> None:
    table = Table(title="Set", header=("", ""), rows=(("rows", "7"),), note="Counted.")
    assert printed(*titled([table])) == "\nSet\nrows  7\nCounted."


PLACE = "/".join(["a_long_name_of_a_folder"] * 5)


def test_the_place_of_a_sample_is_never_broken() -> None:
    view = SampleView(where=f"{PLACE}.jsonl:1", place="QnA[0].A", problem=f"{PLACE}/1.png: no such picture; mend")
    assert printed(*sample_lines(view), width=40).splitlines() == [f"{view.where}  QnA[0].A", view.problem]


def test_a_table_of_texts_is_never_broken() -> None:
    table = Table(title="Left", header=("what",), rows=((f"1 x {PLACE}",),), note="Why.")
    assert printed(*titled([table]), width=40).splitlines() == ["", "Left", f"1 x {PLACE}", "Why."]


def test_each_reason_of_a_verdict_has_its_count_its_mend_and_whole_places() -> None:
    verdict = Verdict()
    for number in range(PLACES_SHOWN + 1):
        where = f"{PLACE}.jsonl:{number}"
        for _ in range(number + 1):
            verdict.add(Problem(reason="picture_missing", where=where, field="picture", what=f"{number}.png: none"))
    verdict.add(Problem(reason="no_call", where=f"{PLACE}.jsonl:9", field="", what="no call"))
    lines = printed(*verdict_lines(verdict), width=40).splitlines()
    assert lines == [
        "reason           training  count",
        "picture_missing  stops        10",
        "    no file at the path of a picture; check the path and --image_base_path",
        f"    {PLACE}.jsonl:0: picture: 0.png: none",
        f"    {PLACE}.jsonl:1: picture: 1.png: none (in 2 rows)",
        f"    {PLACE}.jsonl:2: picture: 2.png: none (in 3 rows)",
        "    ...",
        "no_call          note          1",
        f"    {REASONS['no_call'].meaning}; {REASONS['no_call'].mend}",
        f"    {PLACE}.jsonl:9: no call",
    ]


def test_a_verdict_without_reasons_has_no_lines() -> None:
    assert list(verdict_lines(Verdict())) == []
