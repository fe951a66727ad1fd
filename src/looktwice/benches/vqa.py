"""The accuracy of VQA and TextVQA: a short answer against those of ten people.

Source: the EvalAI processor of VQA, as public harnesses have it, its quirks included: each is part of the numbers that
are published. One of them cannot show: a comma between digits would change how signs are taken out, but all commas have
gone before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_ARTICLES = ("a", "an", "the")
_WORDS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've"
)
"""Contractions that are put back where one of their apostrophes is missing."""


def _without_one(word: str) -> list[str]:
    places = [place for place, letter in enumerate(word) if letter == "'"]
    return [word[:place] + word[place + 1 :] for place in places]


_CONTRACTIONS = {written: word for word in _WORDS.split() for written in _without_one(word)} | {
    "somebody'd": "somebodyd"
}


def normalised(answer: str) -> str:
    """An answer as it is compared: lower case, numbers as digits, no articles, punctuation gone or a space.

    Example: normalised("The two-way street's 1,000 signs.") == "2 way street 's 1000 signs"
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = re.sub(r"[\n\t]", " ", text).strip()
    given = text
    for sign in _PUNCTUATION:
        touches_space = f"{sign} " in given or f" {sign}" in given
        text = text.replace(sign, "" if touches_space else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", text).split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The mean, over the answers with one left out each time, of min(1, matches / 3).

    Of ten answers, 0, 1, 2, 3 and 4 or more matches give 0, 0.3, 0.6, 0.9 and 1.
    """
    said = normalised(prediction)
    same = [normalised(answer) == said for answer in answers]
    matches = sum(same)
    return sum(min(1.0, (matches - is_same) / 3) for is_same in same) / len(same)
