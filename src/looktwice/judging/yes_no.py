"""Yes and no, true and false: which gold answers are one of them, and what an answer may say beside it."""

from __future__ import annotations

import re

from looktwice.judging.wording import bare

_SUBJECT = "(?:it|they|he|she|there|this|that|these|those|i|we|you)"
_BETWEEN = rf"\s*(?:[,;!]|\.{{2,}})\s*|[.:]\s+|\s+-\s+|\s*[-.:]\s*(?=(?:{_SUBJECT}|the)[ '])|\s+(?={_SUBJECT}[ '])"
_STATED = re.compile(rf"(yes|no|true|false)(?:(?:{_BETWEEN})(?!\s)(.+))?")
"""The word, and what is said beside it. "No-one" is no no."""
_NUMBER = re.compile(r"no[.:]\s*(?:of\b|(?:\w )?\d|(?!(?:none|nothing|nobody|neither|never|not)$)\S+$)")
"""What "No." abbreviates: "No. 5", "No. of visitors", "No. Parking"."""
_PLAIN_GOLD = re.compile(rf"(yes|no|true|false)(?:,? {_SUBJECT} \w+(?: not|n't)?)?")
_MAX_CHARS = 48

_HEDGE = re.compile(
    r"\b(?:but|however|maybe|perhaps|possibly|unless|except|or|sometimes|occasionally|depends|depending|might|unsure"
    r"|unclear|uncertain|not sure|(?:hard|cannot|can't) (?:to )?(?:say|tell)|don't know|who knows)\b"
    rf"|(?<!\bas )\bif\b|\b(?:partly|partially)(?! \w)|\b(?:could|{_SUBJECT} may)(?! not\b)(?: be\b| \w+$|$)"
    r"|^(?:only )?when\b"
)
_NEGATION = re.compile(
    r"\b(?:not|never|cannot)\b|\b(?:is|are|was|were|do|does|did|has|have|had|ca|could|wo|would|should)n'?t\b"
)
_FALSITY = re.compile(r"\b(?:false|untrue|wrong|incorrect)\b(?! (?!because|since|as|and)[a-z])")
"""Not that of "the wrong way"."""
_ABSENCE = re.compile(r"\b(?:no|nope|nah|none|neither|nor|nothing|nobody|nowhere|hardly|barely)\b|^(?:zero|0)\b")
_ASSENT = re.compile(r"\b(?:yes|yeah|yep|yup)\b")
_AFFIRMATION = re.compile(
    rf"\b(?:true|correct)(?! \w)|\b(?:that is|that's) right\b|\b{_SUBJECT} (?:do|does|did)(?: have\b|$)"
    rf"|\b{_SUBJECT} (?:(?:is|are|was|were|am|has|have|had|can|will|would|should|must)(?: be)?)$"
)
"""What says yes, as "it is" does with nothing after it."""


def read_yes_no(text: str) -> str | None:
    """The word that a gold answer is, alone or with a short sentence ("Yes, it is."), or None."""
    stated = _PLAIN_GOLD.fullmatch(bare(text).casefold())
    return stated and stated[1]


def says(wanted: str, text: str) -> bool:
    """Whether an answer says yes, no, true or false, without taking it back as "No, it does" does."""
    text = bare(text).casefold()
    stated = None if _NUMBER.match(text) else _STATED.fullmatch(text)
    if stated is None or stated[1] != wanted or len(text) >= _MAX_CHARS:
        return False
    beside = stated[2] or ""
    is_negated, is_falsified = _NEGATION.search(beside), _FALSITY.search(beside)
    if wanted in ("yes", "true"):
        is_taken_back = is_negated or is_falsified or _ABSENCE.search(beside)
    else:  # "it isn't false" says yes, and "it is false" no
        is_affirmed = is_falsified if is_negated else _AFFIRMATION.search(beside)
        is_taken_back = is_affirmed or _ASSENT.search(beside)
    return not (is_taken_back or _HEDGE.search(beside))
