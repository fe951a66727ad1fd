"""Retractions: words after the letter of an option that deny it, doubt it or pick another one.

What stands there is most often the text of the option, which may hold any word: "(B) not visible", "(B) red or blue",
"(B) Solution C". So a word alone retracts nothing; where it stands does.
"""

from __future__ import annotations

import re

_JOINS = (
    *("or", "and", "nor", "not", "but", "so", "then", "also", "too", "else", "otherwise", "if", "both", "either"),
    *("maybe", "perhaps", "possibly", "probably", "actually", "rather", "instead", "vs", "versus"),
)
_PICKS = ("no", "wait", "is", "are", "be", "it's", "say", "pick", "choose", "answer", "option", "choice")
_VERB = (
    "(?:(?:is|was|are|be|may|might|could|can|would|will|must|should|has|does|did|seems|looks|appears)(?:n't)?"
    "|cannot|can't|won't)"
)
_RATED = (
    "(?:correct|right|best|true|valid|possible|likely|plausible|unlikely|wrong|incorrect|false|untrue|inaccurate|invalid"
    "|impossible|eliminated|excluded|rejected|ruled out|answer|option|choice|it)"
)
_RATING = rf"{_VERB}(?: [\w']+){{0,4}}? {_RATED}\b(?!-)"
_AFFIRMED = (
    "(?:is|must be|should be|would be|has to be)(?: (?:the|my|clearly|definitely|surely|most|likely|only|final))*"
    r"(?: (?:correct|right|best|true|answer|option|choice|it))+\b"
)
_BEFORE_A_PICK = re.compile(rf"(?:^\W*|[,;:/&|.!?]\s*|\b(?:{'|'.join((*_JOINS, *_PICKS))})\W+)$", re.IGNORECASE)
"""What makes a letter a pick: "so C", ", C". "Solution C" is a name."""
_PICKED = re.compile(
    r"(?<![\w'.&°-])(?:[A-H]|[b-h]|a(?=\W*$))(?![\w'+#°-]|[.&]\w|\s*[=<>^(])"
    rf"(?! (?!(?i:(?:{'|'.join(_JOINS)})\b|{_RATING}))[A-Za-z]{{2}})"
)
"""A letter that is none of "A cat", "D major", "F = ma"."""
_CJK_PICK = re.compile(r"[或和与者是选]\s*[A-Ha-h](?![A-Za-z0-9])")
_TOGETHER = re.compile(
    r"(?:(?:neither|both|either|between|all of|none of) {0}(?: (?:is|are) \w+)?|{0} only)".format(
        "[A-H](?:,? (?:and |or |nor |& )?[A-H])+"
    ),
    re.IGNORECASE,
)
"""The text of an option about others: "Neither A nor C"."""

_RETRACTIONS = tuple(
    re.compile(form, re.IGNORECASE)
    for form in (
        rf"^(?!{_AFFIRMED}){_RATING}",
        r"^(?:or|and|nor|but|maybe|perhaps|possibly|through|not$|to [a-h]\b|[✗✘❌✖])",
        r"^(?:does|do|did|would|will)(?:n't| not) (?:fit|match|work|apply|make sense|belong|seem|look)\b",
        r"\b(?:is|are|was|be|seems|looks)(?: \w+)? (?:wrong|incorrect)\b",
        r"(?:\bnot|n't|\bnever)(?: (?:the|a|an|my|really|quite|correct|right|best|final|true|this))*"
        r" (?:correct|right|best|answer|option|choice|this one)\b(?!-)",
        r"^(?:wait|actually|sorry|hmm)[,.;!?]",
        r"[.,;!?-]\s*(?:(?:wait|actually|sorry|hmm|i mean|on second thought)\b|no[,.;!?])",
        "^(?:不对|不正确|或|错的)|^不是(?:答案|正确|对|这个)?$|是错|是不对",
    )
)
_ASIDE = re.compile(r"(?::|\s-|(?=\s\())\s+\(?(?:wrong|incorrect|not sure|unsure|maybe|perhaps)[?.]?\)?", re.IGNORECASE)
"""After "B:" and "B -", or in brackets: what may be the text of an option after "B."."""


def is_retracted(letter: str, after: str, said: str) -> bool:
    """Whether an answer takes back its letter: by `said`, the words after it; `after` begins with the mark between."""
    if _TOGETHER.fullmatch(said):
        return letter in re.findall(r"\b[A-H]\b", said.upper())
    others = (other for other in _PICKED.finditer(said) if other[0].upper() != letter)
    is_other_picked = any(_BEFORE_A_PICK.search(said[: other.start()]) for other in others)
    is_taken_back = any(retraction.search(said) for retraction in _RETRACTIONS)
    return is_other_picked or is_taken_back or bool(_CJK_PICK.search(said) or _ASIDE.fullmatch(after))
