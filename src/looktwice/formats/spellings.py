"""Rows of other trainers: a field for the question and one for the answer in place of messages, pictures beside them.

One row of each kind, wrapped here:

    verl      {"prompt": [{"role": "user", "content": "<image>What?"}], "images": ["x.jpg"],
               "reward_model": {"ground_truth": "cup"}}
    EasyR1    {"problem": "<image>What?", "images": ["x.jpg"], "answer": "cup"}
    TRL       {"prompt": "What?", "completion": "A cup.", "image": "x.jpg"}, or either as a list of messages
    alpaca    {"instruction": "What?", "input": "", "output": "A cup.", "images": ["x.jpg"]}
    ms-swift  {"query": "What?", "response": "A cup.", "history": [["Who?", "He."]], "images": ["x.jpg"]}
    VQA       {"question": "What?", "answer": "cup", "image": "x.jpg"}
    Cauldron  {"texts": [{"user": "What?", "assistant": "A cup."}], "images": ["x.jpg"]}

Turns and pictures are read by the rules of the format swift; messages that name their own pictures by those of the
format messages. A row without a picture, or for another kind of training, is refused by name.

Source: verl, docs/preparation/prepare_data.rst and examples/data_preprocess/geo3k.py; hiyouga/EasyR1, README.md;
huggingface/trl, "Dataset formats"; hiyouga/LLaMA-Factory, data/README.md; modelscope/ms-swift, "Custom dataset";
HuggingFaceM4/the_cauldron.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from looktwice.data.sample import Sample
from looktwice.formats import chat
from looktwice.formats.conversations import MEDIA_FIELDS, SWIFT, is_swift, note_objects, read_swift, read_turns
from looktwice.formats.files import kind_of
from looktwice.formats.other_training import note_other_training, sign_of
from looktwice.formats.reading import GROUND_TRUTH, Fields, Reading
from looktwice.formats.writing import FORMAT_FIELDS

_PAIRS = {"texts": ("user", "assistant"), "conversation": ("human", "assistant")}
"""Lists of questions with their answers, and the names of the two."""
_KINDS = {
    "prompt": "TRL",
    "problem": "EasyR1",
    "instruction": "alpaca",
    "query": "ms-swift",
    "question": "VQA",
    "texts": "Cauldron",
    "conversation": "ms-swift",
}
"""Fields that hold a question, or pairs, and whose they are; of several the first is read, as of answers."""
_ANSWERS = ("completion", "response", "output")
_PLAIN_TEXTS = ("text", "caption")
_MESSAGES = ("prompt", "completion")
"""Fields that may be a list of messages."""
_ROLES = ("user", "assistant")
_MESSAGE = '{"role": "user", "content": …}'


def fits(values: Mapping[str, object]) -> bool:
    """Whether a row has messages and beside them what they show, or its question in a field of its own."""
    return is_swift(values) or _is_spelled(values)


def _is_spelled(values: Mapping[str, object]) -> bool:
    if _given(values, (*FORMAT_FIELDS, "image_path")):
        return False
    return bool(_given(values, (*_KINDS, *_PLAIN_TEXTS))) or sign_of(values) is not None


def _given(values: Mapping[str, object], names: Iterable[str]) -> list[str]:
    return [name for name in names if values.get(name) is not None]


def read(row: Fields, reading: Reading) -> list[Sample]:
    """The sample of a row, however it is spelled."""
    if not _is_spelled(row.values):
        return read_swift(row, reading)
    questions, answers = _given(row.values, _KINDS), _given(row.values, _ANSWERS)
    note_other_training(row)
    if not questions and row.is_good:
        [text, *_] = _given(row.values, _PLAIN_TEXTS)
        row.note(text, "other_training", "plain text, as for pretraining; write a question and an answer")
    if not row.is_good:
        return []
    _note_missing_image(row, questions[0])
    note_objects(row)
    told = [questions[0], *answers[:1]]
    row.known = (*told, "reward_model", *chat.KNOWN)
    row.values = _with_ground_truth(row.values)
    if not _has_media(row) and all(isinstance(row.values[name], list) and name in _MESSAGES for name in told):
        return chat.read_lists(row, reading, told)
    row.known = (*row.known, *SWIFT.known, "history", *(["input"] if questions[0] == "instruction" else []))
    turns = [*_history(row), *(turn for role, name in zip(_ROLES, told) for turn in _turns(row, role, name))]
    return read_turns(row, turns, reading, replace(SWIFT, turns=questions[0]))


def _note_missing_image(row: Fields, question: str) -> None:
    if not _has_media(row) and not _shows_images(row, question):
        kind = "verl" if row.is_given("reward_model") else _KINDS[question]
        words = f'a row of {kind} without a picture; name it in "images", or write what needs none as messages'
        row.note("images", "missing_field", words)


def _has_media(row: Fields) -> bool:
    return any(row.values.get(name) for name in MEDIA_FIELDS)


def _shows_images(row: Fields, name: str) -> bool:
    """Whether a field lists messages one of which holds a picture."""
    return any(
        isinstance(part, dict) and part.get("type") in ("image", "image_url")
        for message in _listed(row.values[name])
        for part in _listed(message.get("content") if isinstance(message, dict) else None)
    )


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _with_ground_truth(values: Mapping[str, object]) -> Mapping[str, object]:
    """The row with verl's gold answer as a field of its own."""
    rule = values.get("reward_model")
    return {**values, GROUND_TRUTH: rule.get("ground_truth")} if isinstance(rule, dict) else values


def _history(row: Fields) -> Iterator[Fields | None]:
    """The turns before the question, as [question, answer] each."""
    history = row.values.get("history") or []
    if not isinstance(history, list):
        row.note("history", "wrong_type", f'{kind_of(history)} where a list belongs; write [["…", "…"]]')
        return
    for index, pair in enumerate(history):
        place = f"history[{index}]"
        if isinstance(pair, list) and len(pair) == len(_ROLES):
            for number, role in enumerate(_ROLES):
                yield _text_turn(row, role, f"{place}[{number}]", pair[number])
        else:
            row.note(place, "wrong_type", 'no question with its answer; write ["…", "…"]')
            yield None


def _turns(row: Fields, role: str, name: str) -> Iterator[Fields | None]:
    """The turns of one field: a text, a list of messages, or a list of pairs."""
    value = row.values[name]
    if name in _PAIRS:
        for index, pair in enumerate(row.objects(name, f'{{"{_PAIRS[name][0]}": …, "{_PAIRS[name][1]}": …}}')):
            for speaker, field in zip(_ROLES, _PAIRS[name]):
                yield _text_turn(row, speaker, f"{name}[{index}].{field}", pair.get(field)) if pair else None
    elif isinstance(value, list) and name in _MESSAGES:
        for index, values in enumerate(row.objects(name, _MESSAGE)):
            path = f"{name}[{index}]."
            yield None if values is None else row.inside(values, known=(SWIFT.text,), path=path)
    elif name == "instruction" and row.values.get("input") and (more := row.text("input")):
        yield _text_turn(row, role, name, f"{value}\n{more}" if isinstance(value, str) else value)
    else:
        yield _text_turn(row, role, name, value)


def _text_turn(row: Fields, role: str, place: str, text: object) -> Fields:
    return row.inside({SWIFT.role: role, place: text}, known=(place,), path="")
