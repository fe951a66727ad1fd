"""Scorers against the numbers of their definitions."""

from __future__ import annotations

import pytest

from looktwice.benches import scorers
from looktwice.benches.item import Item, Said
from looktwice.geometry import Box, Size

PHOTO = Size(200, 100)


def item(*gold: str, options: tuple[str, ...] = (), **other: object) -> Item:
    return Item(images=(), question="Q", about="Q", gold=gold, options=options, **other)  # type: ignore[arg-type]


def said(text: str, **other: object) -> Said:
    return Said(text=text, image_size=PHOTO, seen_size=Size(100, 50), **other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("hello worl", "hello world", 1 - 1 / 11),
        ("ab", "ac", 0.5),
        ("abc", "xbz", 0.0),
        ("", "", 1.0),
        ("  Hello   WORLD ", "hello world", 1.0),
    ],
)
def test_anls_is_the_similarity_and_0_below_a_half(prediction: str, gold: str, score: float) -> None:
    assert scorers.similarity(prediction, [gold]) == pytest.approx(score, abs=1e-9)
    assert round(scorers.similarity("hello worl", ["no", "hello world"]), 4) == 0.9091


def test_anls_takes_the_best_gold_answer_of_what_was_said() -> None:
    verdict = scorers.anls(item("nothing", "42 km"), said("<think>Hm.</think><answer>42 km</answer>"))
    assert (verdict.score, verdict.prediction, verdict.by) == (1.0, "42 km", "anls")
    nothing = scorers.anls(item("42"), said("<think>42"))
    assert (nothing.score, nothing.prediction, nothing.by) == (0.0, None, "none")


@pytest.mark.parametrize(
    ("prediction", "gold", "is_right"),
    [
        ("95", "100", True),
        ("94.9", "100", False),
        ("105", "100", True),
        ("50%", "0.5", True),
        ("0.04", "0", False),
        ("0", "0", True),
        ("Blue ", "blue", True),
        ("dark blue", "blue", False),
        ("nan", "1", False),
        ("-95", "-100", True),
    ],
)
def test_relaxed_accuracy_takes_numbers_within_5_percent(prediction: str, gold: str, is_right: bool) -> None:
    assert scorers.relaxed(item(gold), said(f"<answer>{prediction}</answer>")).score == float(is_right)


OPTIONS = ("a red car", "a bus", "a tram", "a bike")


@pytest.mark.parametrize(
    ("text", "prediction", "by"),
    [
        ("B", "B", "lone"),
        ("(B).", "B", "lone"),
        ("**B**", "B", "lone"),
        ("Answer: B", "B", "lone"),
        ("It is a bus, I say", "B", "option_text"),
        ("A or B", None, "none"),
        ("a bus or a tram", None, "none"),
        ("b", None, "none"),
    ],
)
def test_hr_bench_takes_the_only_letter_else_the_only_text(text: str, prediction: str | None, by: str) -> None:
    verdict = scorers.only_letter(item("B", options=OPTIONS), said(text))
    assert (verdict.prediction, verdict.by, verdict.score) == (prediction, by, float(prediction == "B"))


@pytest.mark.parametrize(
    ("text", "prediction"),
    [("The best answer is (E)", "E"), ("The answer is B", "B"), ("D. red", "D"), ("none of them", None), ("F", None)],
)
def test_mme_realworld_takes_the_first_letter_after_the_phrase(text: str, prediction: str | None) -> None:
    verdict = scorers.first_letter(item("E", options=(*OPTIONS, "not there")), said(text))
    assert (verdict.prediction, verdict.score) == (prediction, float(prediction == "E"))


@pytest.mark.parametrize(("text", "score"), [("B", 1), ("B. bus", 1), ("C", 0), ("The answer is B", 0), ("Bus", 0)])
def test_science_qa_takes_the_letter_or_letter_and_period(text: str, score: float) -> None:
    assert scorers.starting_letter(item("B", options=OPTIONS), said(text)).score == score


@pytest.mark.parametrize(
    ("extracted", "options", "answer_type", "precision", "normalised"),
    [
        ("(B)", ("5", "7"), "text", "", "7"),
        ("b", ("5", "7"), "text", "", "7"),
        ("sevn", ("five", "seven"), "text", "", "seven"),
        ("3.9", (), "integer", "", "3"),
        ("1.257", (), "float", "2.0", "1.26"),
        ("2", (), "float", "1", "2.0"),
        ("many", (), "integer", "", None),
        ("[1, 2]", (), "list", "", "[1, 2]"),
    ],
)
def test_mathvista_normalises_by_the_type_of_the_answer(extracted, options, answer_type, precision, normalised) -> None:
    assert scorers.mathvista_normalised(extracted, options, answer_type, precision) == normalised
    facts = {"answer_type": answer_type, "precision": precision}
    asked = item(normalised or "4", options=options, facts=facts)
    assert scorers.mathvista(asked, said(f"<answer>{extracted}</answer>")).score == float(normalised is not None)


GOLD = Box(0, 0, 100, 50)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("<ref>cup</ref><box>(0.0,0.0),(0.5,0.5)</box>", GOLD),
        ('[{"bbox_2d": [0, 0, 100, 50], "label": "[1, 2, 3, 4]"}]', GOLD),
        ("[9, 9, 8, 8] then (0, 0, 100, 50)", GOLD),
        ("(0, 0), (100, 50)", GOLD),
        ("0 0 100 50", GOLD),
        ("[0.0, 0.0, 0.5, 0.5]", GOLD),
        ("[1, 1, 3, 3] then [0, 0, 100, 50]", GOLD),
    ],
)
def test_boxes_are_read_in_every_form_and_the_last_counts(text: str, box: Box) -> None:
    verdict = scorers.boxes(item("g", gold_boxes=(GOLD,)), said(text))
    assert verdict.prediction == "[" + ", ".join(f"{side:.1f}" for side in box) + "]"
    assert (verdict.score, verdict.measures["iou"]) == (1.0, 1.0)


def test_boxes_of_another_frame_become_original_pixels() -> None:
    verdict = scorers.boxes(item("g", gold_boxes=(GOLD,)), said("[0, 0, 50, 25]", box_frame="resized_px"))
    assert verdict.measures["iou"] == 1.0


def test_an_overlap_of_exactly_a_half_is_right_only_where_it_may_be_equal() -> None:
    verdict = scorers.boxes(item("g", gold_boxes=(GOLD,)), said("[0, 0, 50, 50]"))
    assert (verdict.score, verdict.measures) == (0.0, {"iou": 0.5, "iou_from_0.5": 1.0, "centre": 1.0})
    nothing = scorers.boxes(item("g", gold_boxes=(GOLD,)), said("there"))
    assert (nothing.by, nothing.measures) == ("none", {"iou": 0.0, "iou_from_0.5": 0.0, "centre": 0.0})


def test_tree_bench_takes_for_each_gold_box_the_best_of_crops_and_boxes() -> None:
    asked = item("B", options=OPTIONS, gold_boxes=(GOLD, Box(100, 50, 200, 100)))
    verdict = scorers.letter_and_boxes(asked, said("<box>(0.5,0.5),(1.0,1.0)</box> (B)", crops=(Box(0, 0, 50, 50),)))
    assert (verdict.score, verdict.measures["iou"]) == (1.0, pytest.approx((0.5 + 1.0) / 2, abs=0.01))


def test_ones_own_set_is_judged_by_the_rules_of_answers() -> None:
    verdict = scorers.text(item("3 cm", "three"), said("<answer>3.0 cm</answer>"))
    assert (verdict.score, verdict.by) == (1.0, "rules")
