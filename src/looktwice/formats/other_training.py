"""Rows for another kind of training, which are refused by name: preferences, labelled answers, steps."""

from __future__ import annotations

from collections.abc import Mapping

from looktwice.formats.reading import Fields

_PREFERENCES = "preferences, as for DPO; keep the better answer as the answer"
_LABELS = "answers labelled good or bad, as for KTO; keep the rows of the good ones, without the label"
_STEPS = "steps of an answer with labels, as for a process reward; write one answer"
_SIGNS = {
    "chosen": _PREFERENCES,
    "rejected": _PREFERENCES,
    "rejected_response": _PREFERENCES,
    "rejected_messages": _PREFERENCES,
    "rejected_images": _PREFERENCES,
    "kto_tag": _LABELS,
    "label": _LABELS,
    "completions": _STEPS,
}
"""Fields of TRL, LLaMA-Factory and ms-swift, and what a row that has one is for."""


def sign_of(values: Mapping[str, object]) -> str | None:
    """The field that shows a row to be for another kind of training; None without one."""
    given = (name for name in _SIGNS if values.get(name) is not None)
    # a label may be anything else; that of an answer is true or false
    return next((name for name in given if name != "label" or isinstance(values[name], bool)), None)


def note_other_training(row: Fields) -> None:
    """Note what a row is for where that is not ours."""
    if name := sign_of(row.values):
        row.note(name, "other_training", _SIGNS[name])
