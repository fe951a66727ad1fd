"""What stands beside the text of an answer, as OpenAI's API and its followers write it: reasoning and calls of tools.

One answer, wrapped here:

    {"role": "assistant", "reasoning_content": "I look closer.", "tool_calls": [
        {"type": "function", "function": {"name": "crop", "arguments": "{\\"bbox_2d\\": [1, 2, 30, 40]}"}}]}
    {"role": "tool", "content": "…"}
    {"role": "assistant", "reasoning_content": "It is red.", "content": "<answer>red</answer>"}

It is read as one turn. The reasoning is its thinking, written as the chat template writes it; a call that holds a box
is a crop call, and the tool's turn makes place for the crop, which is cut anew:

    <think>\\nI look closer.\\n<tool_call>[1, 2, 30, 40]</tool_call>\\nIt is red.\\n</think>\\n\\n<answer>red</answer>

Any other call stops the row. Source: platform.openai.com, "Function calling"; api-docs.deepseek.com, "Reasoning model";
QwenLM/Qwen3, chat template.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from looktwice.calls import format_call
from looktwice.data.reasons import BOX_REASONS
from looktwice.errors import BoxError, short
from looktwice.formats.files import kind_of
from looktwice.formats.reading import Fields, Reading
from looktwice.geometry import check_box
from looktwice.messages import THINK_CLOSE, THINK_OPEN

_REASONING = ("reasoning_content", "reasoning", "thinking")
_BOXES = ("bbox_2d", "bbox", "box")
_FIRST_IMAGE = {"img_idx": 0, "image_index": 0, "image_idx": 0, "target_image": 1}
"""Arguments that number the picture to cut from, and how each numbers the first."""
_WORDS = ("label", "name", "description")
"""Arguments that say what is looked at."""
_ARGUMENTS = '{"bbox_2d": [x1, y1, x2, y2]}'
_CALL = f'{{"function": {{"name": "crop", "arguments": {_ARGUMENTS}}}}}'


class Beside(NamedTuple):
    """The thinking of a turn, "" without, and its crop calls as text."""

    thinking: str = ""
    calls: tuple[str, ...] = ()


def answers(turns: Iterable[Fields]) -> Iterator[list[Fields]]:
    """The turns without those of tools, each in a list of its own, or with the turns that continue its answer.

    An assistant's turn continues the one before, where the tools of that were answered.
    """
    answer: list[Fields] = []
    caller: Fields | None = None
    num_awaited = 0
    for fields in turns:
        role = fields.values.get("role")
        if role == "tool":
            if num_awaited <= 0:
                what = "a turn of a tool that no call waits for; write it after its call, or remove it"
                fields.note("role", "unknown_role", what)
            num_awaited -= 1
            continue
        _note_unanswered(caller, num_awaited)
        if not (caller and role == "assistant"):
            yield from [answer] if answer else []
            answer = []
        answer.append(fields)
        calls = fields.values.get("tool_calls") if role == "assistant" else None
        caller, num_awaited = (fields, len(calls)) if isinstance(calls, list) and calls else (None, 0)
    _note_unanswered(caller, num_awaited)
    yield from [answer] if answer else []


def _note_unanswered(caller: Fields | None, num_awaited: int) -> None:
    if caller and num_awaited > 0:
        what = 'a call without the turn of its tool; write {"role": "tool", …} after it, or remove the call'
        caller.note("tool_calls", "unknown_part", what)


def beside(fields: Fields, reading: Reading) -> Beside:
    """What an assistant's turn has beside its text; problems are noted."""
    fields.known = (*fields.known, *_REASONING, "tool_calls", "function_call")
    if fields.values.get("function_call"):
        fields.note("function_call", "unknown_part", f"a call in the old way; write it in tool_calls as {_CALL}")
    thinking = _thinking(fields)
    calls: tuple[str, ...] = ()
    if fields.values.get("tool_calls"):
        listed = enumerate(fields.objects("tool_calls", _CALL))
        calls = tuple(_call(fields, f"tool_calls[{index}]", call, reading) for index, call in listed if call)
        reading.changed.add("tool calls are crop calls now, and crops are cut anew", fields.where)
    if thinking:
        reading.changed.add("reasoning beside an answer is its thinking now", fields.where)
    return Beside(thinking, calls)


def _thinking(fields: Fields) -> str:
    given = [name for name in _REASONING if fields.values.get(name) not in (None, "")]
    texts = {name: fields.any_text(name) or "" for name in given}
    if len(set(texts.values())) > 1:
        fields.note(given[1], "unknown_part", f'another text than in "{given[0]}"; keep one of them')
    thinking = next(iter(texts.values()), "").strip("\n")
    content = str(fields.values.get("content"))
    if thinking and (THINK_OPEN in content or THINK_CLOSE in content):
        fields.note(given[0], "unknown_part", f"the text has its own {THINK_OPEN}; keep one of the two")
    return thinking


def _call(fields: Fields, place: str, call: object, reading: Reading) -> str:
    """The text of a call, "" where a problem was noted."""
    function = call.get("function", call) if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    place = f"{place}.function.arguments"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            fields.note(place, "call_without_box", f"no JSON ({error}); write {_ARGUMENTS}")
            return ""
    if not isinstance(arguments, dict):
        fields.note(place, "call_without_box", f"{kind_of(arguments)} where an object belongs; write {_ARGUMENTS}")
        return ""
    boxes = [name for name in _BOXES if arguments.get(name) is not None]
    if len(boxes) != 1:
        seen = f"{len(boxes)} boxes" if boxes else f"no box among {short(', '.join(arguments)) or 'nothing'}"
        fields.note(
            place, "call_without_box", f"{seen}, and crop calls alone are read; write {_ARGUMENTS}, or remove the row"
        )
        return ""
    for name in arguments.keys() - {*_BOXES, *_FIRST_IMAGE, *_WORDS}:
        reading.ignored.add(f'"{name}" of a tool call', fields.where)
    box = arguments[boxes[0]]
    try:
        check_box(box)
    except BoxError as error:
        fields.note(place, BOX_REASONS[error.reason], f"{error}; mend the box or remove the row")
        return ""
    return format_call(box, _image_number(fields, place, arguments))


def _image_number(fields: Fields, place: str, arguments: Mapping[str, object]) -> int:
    """The picture that the arguments of a call name, counted from 1; 1 where they name none or a problem was noted."""
    numbers: list[int] = []
    for name, first in _FIRST_IMAGE.items():
        value = arguments.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and value >= first:
            numbers.append(value - first + 1)
        elif value is not None:
            fields.note(place, "no_such_picture", f"{name} is {short(repr(value))}; count pictures from {first}")
    if len(set(numbers)) > 1:
        fields.note(place, "no_such_picture", f"one box in pictures {', '.join(map(str, numbers))}; name one of them")
    return numbers[0] if numbers else 1


def around(turns: Sequence[Beside]) -> list[tuple[str, str]]:
    """What stands before and after the text of each turn of one answer; its thinking goes on up to the last text."""
    written: list[tuple[str, str]] = []
    is_thinking = False
    for turn in turns:
        before = "" if is_thinking or not turn.thinking else f"{THINK_OPEN}\n"
        before += f"{turn.thinking}\n" if turn.thinking else ""
        is_thinking = is_thinking or bool(turn.thinking)
        is_last = len(written) == len(turns) - 1
        before += f"{THINK_CLOSE}\n\n" if is_thinking and is_last else ""
        written.append((before, "".join(turn.calls) + ("\n" if is_thinking and not is_last else "")))
    return written


def are_trained(turns: Sequence[Fields], marks: Sequence[bool]) -> bool:
    """Whether one answer is trained, of which each turn says so for itself."""
    if len(set(marks)) > 1:
        what = "the turns of one answer, trained in part; give all of them the same mark"
        turns[0].note("role", "unknown_part", what)
    return all(marks)
