"""Retractions: words after the letter of an option that deny it, doubt it or pick another one.

What stands there is most often the text of the option, which may hold any word: "(B) red or blue", "B. The clock is
wrong". So the letter stands unless the words begin by taking it back, or do so after a comma, a full stop and the like.
"""

from __future__ import annotations

import re

_END_OF_CLAUSE = re.compile(r"[,;]\s*|(?:[:.!?]|\s-)\s+")

_PADDING = "not|be|to be|been|a|an|the|my|in fact|indeed|most|more|less|first|second|also|really|[a-z]+ly"
_BAD = "wrong|incorrect|false|untrue|inaccurate|invalid|impossible|unlikely|eliminated|excluded|rejected|ruled out"
_OPEN = "possible|plausible|likely"
_RATING = rf"correct|right|best|true|it|{_BAD}|{_OPEN}"
_ENDED = r"(?= (?:because|since|as|for|here|than|one)\b|[^\w -]|$)"
_VERDICT = re.compile(
    "(?:not|(?:is|was|are|may|might|could|can|ca|would|will|wo|must|should|has|seems|looks|appears)(?:not|n't)?)"
    rf"(?: (?:{_PADDING}))*(?: (?:{_RATING}))*"
    rf"(?: (?:answer|option|choice|this one)\b| (?:{_RATING}){_ENDED})"
    r"|(?:does|did|would|will)(?:n't| not) (?:fit|match|apply|belong|make sense)\b|Not the (?:\w+ )?answer\b"
)
"""What is said of a letter, "is not the best answer". In a capital it is rather the text of an option: "Not true"."""
_DENIAL = re.compile(rf"[Nn]ot\b|n't|\b(?:second|{_BAD})\b")
_DOUBT = re.compile(rf"(?:may|might|could|can)\b|.*\b(?:{_OPEN})$")
_ADDITION = re.compile(r"(?:or|and|nor|but)\b|not$|wait,|[✗✘❌✖]")
_REVISION = re.compile("wait|no|sorry|hmm|actually|i mean|on second thought", re.IGNORECASE)
"""What stands between an answer and another, "red. No, blue", and not first or last: "B. No", "B. yes, no"."""
_ASIDE = re.compile(
    r"(?::|\s-)\s+(?:wrong|incorrect)|\s+\((?:wrong|incorrect|not sure|unsure|maybe|perhaps)[?.]?\)", re.IGNORECASE
)
"""After "B:" and "B -", or in brackets: what may be the text of an option after "B."."""

_LEADS = (
    *("or", "and", "nor", "but", "so", "then", "also", "else", "otherwise", "maybe", "perhaps", "possibly", "probably"),
    *("actually", "rather", "instead", "vs", "versus", "to", "through", "no", "wait", "it", "it's", "this", "that"),
    *("is", "was", "be", "may", "might", "could", "would", "should", "must", "i", "think", "say", "pick", "choose"),
    *("select", "go", "with", "the", "my", "final", "correct", "right", "best", "answer", "option", "choice"),
)
_PICK = re.compile(
    rf"[\s(\[\"'&+/-]*(?:(?:{'|'.join(_LEADS)})\W+)*"
    r"([A-H](?: (?:(?:or|and|not|vs|[&+]) )?[A-H]\b)*)(?:[\s)?!\"']*$| (?!is true)(.+))",
    re.IGNORECASE,
)
"""Letters with nothing beside them that matters, "so C", or a letter with what may be a verdict."""
_CJK = re.compile(
    r"[或和与者是选]\s*[A-Ha-h](?![A-Za-z0-9])|^(?:不对|不正确|或|错的|是错|是不对)|^不是(?:答案|正确|对|这个)?$"
)
_LETTERS = "[A-H](?:,? (?:and |or |nor |& )?[A-H])+"
_TOGETHER = re.compile(
    rf"(?:(?:neither|both|either|between|all of|none of) {_LETTERS}|{_LETTERS} only"
    r"|[A-H](?:, [A-H])*,? (?:and|&) [A-H])(?: (?:is|are) \w+)?",
    re.IGNORECASE,
)
"""The text of an option about others: "Neither A nor C", "A and C"."""


def is_retracted(letter: str, after: str, said: str) -> bool:
    """Whether an answer takes back its letter: by `said`, the words after it; `after` begins with the mark between."""
    if _TOGETHER.fullmatch(said) and not after.startswith(","):
        return letter in re.findall(r"\b[A-H]\b", said.upper())
    clauses = _END_OF_CLAUSE.split(said)
    return bool(
        _ADDITION.match(said)
        or any(map(_REVISION.fullmatch, clauses[1:-1]))
        or any(_is_denied(clause) or _is_other_picked(letter, clause) for clause in clauses)
        or _ASIDE.fullmatch(after)
        or _CJK.search(said)
    )


def _is_denied(clause: str) -> bool:
    """Whether words begin with a verdict on the letter before them that is not for it."""
    verdict = _VERDICT.match(clause)
    return verdict is not None and bool(_DENIAL.search(verdict[0]) or _DOUBT.match(verdict[0]))


def _is_other_picked(letter: str, clause: str) -> bool:
    """Whether words begin with another letter, alone or with a verdict for it: not "A cat" and "A is false"."""
    pick = _PICK.match(clause)
    if pick is None or set(re.findall(r"\b[A-H]\b", pick[1].upper())) <= {letter}:
        return False
    verdict = _VERDICT.match(pick[2] or "")
    return pick[2] is None or (verdict is not None and not _DENIAL.search(verdict[0]))
