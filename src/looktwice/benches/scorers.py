"""How right an answer is, by the published rule of each kind of benchmark. All take an Item and what was Said to it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from looktwice.answers import answers_match, extract_answer
from looktwice.benches.boxes import said_boxes
from looktwice.benches.extraction import picked_option, spoken
from looktwice.benches.item import Item, Said, Verdict
from looktwice.benches.vqa import vqa_accuracy
from looktwice.extras import require
from looktwice.geometry import Box, iou

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
_HR_REMOVED = str.maketrans("", "", ".()[],:;!*#{}")
_MME_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
    "Answer:",
    "Option:",
)


def letter(item: Item, said: Said) -> Verdict:
    """Right if the option that `picked_option` finds is the gold one."""
    pick = picked_option(said.text, item.options)
    return Verdict(score=float(pick.letter == item.gold[0]), prediction=pick.letter, by=pick.by)


def letter_and_boxes(item: Item, said: Said) -> Verdict:
    """`letter`, and under `iou` the mean over the gold boxes of the best IoU with a crop or a box of the text
    (TreeBench)."""
    verdict = letter(item, said)
    found = [*said.crops, *said_boxes(said)]
    overlaps = [max((iou(box, gold) for box in found), default=0.0) for gold in item.gold_boxes]
    measures = {"iou": sum(overlaps) / len(overlaps)} if overlaps else {}
    return Verdict(score=verdict.score, prediction=verdict.prediction, by=verdict.by, measures=measures)


def only_letter(item: Item, said: Said) -> Verdict:
    """HR-Bench: signs deleted, then the only option letter that stands as a word, else the only option text that the
    answer contains; otherwise none. Source: VLMEvalKit, `can_infer`."""
    answer = spoken(said.text) or ""
    words = {word for word in answer.translate(_HR_REMOVED).split() if word in item.letters and len(word) == 1}
    texts = [place for place, text in enumerate(item.options) if text and text.lower() in answer.lower()]
    if len(words) == 1:
        found, by = words.pop(), "lone"
    elif len(texts) == 1:
        found, by = item.letters[texts[0]], "option_text"
    else:
        return Verdict(score=0.0, prediction=None, by="none")
    return Verdict(score=float(found == item.gold[0]), prediction=found, by=by)


def first_letter(item: Item, said: Said) -> Verdict:
    """MME-RealWorld: phrases such as "The best answer is" deleted, then the first capital among the option letters.

    A text of more than ten words without one is no answer. Choosing "not in the image" is an answer as any other.
    """
    answer = spoken(said.text) or ""
    for prefix in _MME_PREFIXES:
        answer = answer.replace(prefix, "")
    found = re.search(f"[{item.letters}]", answer) if item.letters else None
    if found is None:
        return Verdict(score=0.0, prediction=None, by="none")
    return Verdict(score=float(found[0] == item.gold[0]), prediction=found[0], by="first_letter")


def starting_letter(item: Item, said: Said) -> Verdict:
    """ScienceQA: right if the answer equals the letter, or starts with the letter and a period."""
    answer = (spoken(said.text) or "").strip()
    found = answer[:1] if len(answer) == 1 or answer[1:2] == "." else ""
    if not found or found not in item.letters:
        return Verdict(score=0.0, prediction=None, by="none")
    return Verdict(score=float(found == item.gold[0]), prediction=found, by="start")


def text(item: Item, said: Said) -> Verdict:
    """One's own set: right if the short answer says the same as a gold answer (`answers.py`)."""
    prediction = extract_answer(said.text)
    by = "none" if prediction is None else "rules"
    return Verdict(score=float(answers_match(prediction, item.gold)), prediction=prediction, by=by)


def letter_or_text(item: Item, said: Said) -> Verdict:
    """`letter` where there are options, `text` where there are none."""
    return letter(item, said) if item.options else text(item, said)


def anls(item: Item, said: Said) -> Verdict:
    """DocVQA and InfographicVQA: the best normalised Levenshtein similarity of a gold answer."""
    prediction = extract_answer(said.text)
    score = 0.0 if prediction is None else similarity(prediction, item.gold)
    return Verdict(score=score, prediction=prediction, by="none" if prediction is None else "anls")


def similarity(prediction: str, golds: Sequence[str]) -> float:
    """ANLS: the best over the gold answers of 1 - distance / length of the longer, 0 below 0.5.

    Both in lower case, trimmed, with single spaces; two empty texts are equal. Source: DocVQA, arXiv 2007.00398.
    Example: similarity("hello worl", ["hello world"]) == 1 - 1 / 11
    """
    said = " ".join(prediction.lower().split())
    best = max(_levenshtein().normalized_similarity(said, " ".join(gold.lower().split())) for gold in golds)
    return best if best >= ANLS_THRESHOLD else 0.0


def of_ten(item: Item, said: Said) -> Verdict:
    """TextVQA: `vqa_accuracy`."""
    prediction = extract_answer(said.text)
    score = 0.0 if prediction is None else vqa_accuracy(prediction, item.gold)
    return Verdict(score=score, prediction=prediction, by="none" if prediction is None else "vqa")


def relaxed(item: Item, said: Said) -> Verdict:
    """ChartQA: a number within 5 % of the gold one, otherwise the same text in any case."""
    prediction = extract_answer(said.text)
    score = 0.0 if prediction is None else float(any(nearly(prediction, gold) for gold in item.gold))
    return Verdict(score=score, prediction=prediction, by="none" if prediction is None else "relaxed")


def nearly(prediction: str, gold: str) -> bool:
    """Relaxed accuracy: numbers within 5 % of the gold one, percentages as fractions; a gold 0 and texts are equal or
    not. Source: ChartQA, arXiv 2203.10244.

    Example: nearly("95", "100") and not nearly("94.9", "100")
    """
    said, wanted = _number(prediction), _number(gold)
    if said is not None and wanted:
        return abs(said - wanted) <= RELAXED_TOLERANCE * abs(wanted) + 1e-12
    return prediction.strip().lower() == gold.strip().lower()


def _number(written: str) -> float | None:
    written = written.strip()
    try:
        number = float(written.rstrip("%")) / (100 if written.endswith("%") else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def mathvista(item: Item, said: Said) -> Verdict:
    """MathVista: what was extracted, normalised by the type of the answer, equals the gold answer.

    A choice goes by letter or by the nearest option text; an integer is `int(float(x))`, a float is rounded to the
    precision of the question, a list is a text.
    """
    extracted = extract_answer(said.text)
    if extracted is None:
        return Verdict(score=0.0, prediction=None, by="none")
    prediction = mathvista_normalised(
        extracted, item.options, item.facts.get("answer_type", "text"), item.facts.get("precision", "")
    )
    return Verdict(score=float(prediction == item.gold[0]), prediction=prediction, by="mathvista")


def mathvista_normalised(extracted: str, options: Sequence[str], answer_type: str, precision: str) -> str | None:
    """An extracted answer as MathVista compares it, None where it is none of its type."""
    written = extracted.strip()
    if options:
        found = re.search(r"\(([A-Za-z])\)", written) or re.fullmatch(r"([A-Za-z])\.?", written)
        place = ord(found[1].upper()) - ord("A") if found else -1
        if 0 <= place < len(options):
            return options[place]
        return min(options, key=lambda option: _levenshtein().distance(option, written))
    try:
        if answer_type == "integer":
            return str(int(float(written)))
        if answer_type == "float":
            return str(round(float(written), int(float(precision or 0))))
    except (ValueError, OverflowError):
        return None
    return written


def boxes(item: Item, said: Said) -> Verdict:
    """RefCOCO: right if the box of the answer and the gold one have an IoU above 0.5 (`iou`); `iou_from_0.5` counts 0.5
    itself too, as some harnesses do, and `centre` tells whether the centre of the box lies in the gold one."""
    found = said_boxes(said)
    if not found:
        none = {"iou": 0.0, "iou_from_0.5": 0.0, "centre": 0.0}
        return Verdict(score=0.0, prediction=None, by="none", measures=none)
    box, gold = found[-1], item.gold_boxes[0]
    overlap = iou(box, gold)
    measures = {"iou": overlap, "iou_from_0.5": float(overlap >= 0.5), "centre": float(_has_centre(gold, box))}
    written = ", ".join(f"{side:.1f}" for side in box)
    return Verdict(score=float(overlap > 0.5), prediction=f"[{written}]", by="box", measures=measures)


def _has_centre(gold: Box, box: Box) -> bool:
    x, y = (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2
    return gold.x1 <= x <= gold.x2 and gold.y1 <= y <= gold.y2


def _levenshtein() -> Any:
    return require("rapidfuzz.distance.Levenshtein", extra="eval", needed_by="an evaluation")
