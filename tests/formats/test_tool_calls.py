"""Reasoning and tool calls beside the text of an answer: what they become, and what stops a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from looktwice.formats.reading import Reading
from looktwice.formats.sample_file import SampleFile
from looktwice.messages import Message

BOX = '{"bbox_2d": [1, 2, 30, 40]}'
CROP = "<tool_call>[1, 2, 30, 40]</tool_call>"
TOOL = {"role": "tool", "tool_call_id": "1", "content": "Here it is."}
ASKED = {
    "role": "user",
    "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "Q"}],
}
TOLD = {"role": "assistant", "content": "<answer>red</answer>"}


def calling(*arguments: object, content: object = None, **fields: object) -> dict[str, object]:
    calls = [{"id": "1", "type": "function", "function": {"name": "crop", "arguments": one}} for one in arguments]
    return {"role": "assistant", "content": content, "tool_calls": calls, **fields}


def read(tmp_path: Path, *messages: object, **fields: object) -> tuple[list[Message], Reading]:
    """The messages of a row, none where there is a problem, and what was noted of it."""
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": messages, **fields}))
    file = SampleFile(path, "p")
    reading = file.new_reading()
    samples = file.read_row(0, reading)
    return [message for sample in samples for message in sample.conversation.messages], reading


def text_of(message: Message) -> str:
    return "|".join(part.text for part in message.parts)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (
            [
                calling(BOX, reasoning_content="I look.\n"),
                TOOL,
                {**TOLD, "reasoning_content": "It is red."},
            ],
            f"<think>\nI look.\n{CROP}\nIt is red.\n</think>\n\n<answer>red</answer>",
        ),
        (
            [calling({"bbox": [1, 2, 30, 40], "label": "cup"}, content="Zoom. ", reasoning="I look."), TOOL, TOLD],
            f"<think>\nI look.\nZoom. {CROP}\n</think>\n\n<answer>red</answer>",
        ),
        ([calling({"box": [1, 2, 30, 40]}, content="Zoom: "), TOOL, TOLD], f"Zoom: {CROP}<answer>red</answer>"),
        ([calling(BOX, BOX), TOOL, TOOL, TOLD], f"{CROP}{CROP}<answer>red</answer>"),
        (
            [calling(BOX, thinking="a"), TOOL, calling(BOX), TOOL, TOLD],
            f"<think>\na\n{CROP}\n{CROP}\n</think>\n\n<answer>red</answer>",
        ),
        ([calling(BOX), TOOL], CROP),
        ([{**TOLD, "reasoning_content": "Hm."}], "<think>\nHm.\n</think>\n\n<answer>red</answer>"),
        ([{**TOLD, "reasoning_content": "Hm.", "reasoning": "Hm."}], "<think>\nHm.\n</think>\n\n<answer>red</answer>"),
        ([{**TOLD, "reasoning_content": "", "tool_calls": [], "function_call": None}], "<answer>red</answer>"),
    ],
)
def test_reasoning_is_the_thinking_and_calls_of_tools_are_crop_calls(answer, text, tmp_path) -> None:
    """In messages with their pictures in them, and in messages with pictures beside them."""
    for asked, fields in ((ASKED, {}), ({"role": "user", "content": "Q"}, {"images": ["a.png"]})):
        [_, told], reading = read(tmp_path, asked, *answer, **fields)
        assert (told.role, text_of(told)) == ("assistant", text)
        assert not reading.ignored and bool(reading.changed) == ("tool_calls" in str(answer[:-1]) or "Hm" in text)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"img_idx": 0}, ""),
        ({"target_image": 1}, ""),
        ({"image_index": None}, ""),
        ({"img_idx": 1}, "image 2 "),
        ({"image_index": 1.0}, "image 2 "),
        ({"target_image": 2, "image_idx": 1}, "image 2 "),
    ],
)
def test_a_call_of_a_tool_names_its_picture_as_the_call_does(named, words, tmp_path) -> None:
    [_, told], reading = read(tmp_path, ASKED, calling({"box": [1, 2, 30, 40], **named}), TOOL, TOLD)
    assert text_of(told) == f"<tool_call>{words}[1, 2, 30, 40]</tool_call><answer>red</answer>"
    assert not reading.ignored


def test_what_spells_a_place_in_reasoning_is_text(tmp_path) -> None:
    asked = {"role": "user", "content": "<image>Q"}
    [_, told], _ = read(tmp_path, asked, {**TOLD, "reasoning_content": "<image> &lt;image>"}, images=["a.png"])
    assert text_of(told).startswith("<think>\n<image> &lt;image>\n</think>")


def test_an_answer_goes_on_after_its_tool_and_no_further(tmp_path) -> None:
    messages, _ = read(tmp_path, ASKED, calling(BOX), TOOL, TOLD, {"role": "user", "content": "R"}, TOLD, TOLD)
    assert [message.role for message in messages] == ["user", "assistant", "user", "assistant", "assistant"]
    untrained, _ = read(tmp_path, ASKED, calling(BOX, weight=0), TOOL, {**TOLD, "weight": 0})
    assert not untrained[1].is_trained


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ([calling(BOX), TOLD], "messages[1].tool_calls: a call without the turn of its tool; write"),
        ([calling(BOX, BOX), TOOL, TOLD], "messages[1].tool_calls: a call without the turn of its tool"),
        ([calling(BOX)], "messages[1].tool_calls: a call without the turn of its tool"),
        ([TOOL, TOLD], "messages[1].role: a turn of a tool that no call waits for; write it after its call"),
        ([calling(BOX), TOOL, TOOL, TOLD], "messages[3].role: a turn of a tool that no call waits for"),
        ([calling('{"city": "Bonn"}'), TOOL, TOLD], "messages[1].tool_calls[0].function.arguments: no box among city,"),
        ([calling(BOX, {}), TOOL, TOOL, TOLD], "messages[1].tool_calls[1].function.arguments: no box among nothing"),
        ([calling({"bbox": [1, 2, 3, 4], "box": [1, 2, 3, 4]}), TOOL, TOLD], "arguments: 2 boxes, and crop calls"),
        ([calling('{"box": [9, 9, 1, 1]}'), TOOL, TOLD], "arguments: a box runs from top-left to bottom-right"),
        ([calling({"box": "1, 2, 3, 4"}), TOOL, TOLD], "arguments: a box has 4 numbers"),
        ([calling("{bbox_2d"), TOOL, TOLD], "arguments: no JSON (Expecting property name"),
        ([calling(None), TOOL, TOLD], 'arguments: null where an object belongs; write {"bbox_2d"'),
        ([{**calling(), "tool_calls": ["crop"]}, TOOL, TOLD], "messages[1].tool_calls[0]: a text where an object"),
        ([{**TOLD, "tool_calls": "crop"}], "messages[1].tool_calls: a text where a list belongs"),
        (
            [calling({"box": [1, 2, 3, 4], "img_idx": -1}), TOOL, TOLD],
            "arguments: img_idx is -1; count pictures from 0",
        ),
        ([calling({"box": [1, 2, 3, 4], "target_image": 0}), TOOL, TOLD], "target_image is 0; count pictures from 1"),
        ([calling({"box": [1, 2, 3, 4], "image_idx": "b"}), TOOL, TOLD], "arguments: image_idx is 'b'; count pictures"),
        (
            [calling({"box": [1, 2, 3, 4], "img_idx": 1, "target_image": 1}), TOOL, TOLD],
            "arguments: one box in pictures 2, 1; name one of them",
        ),
        (
            [{**TOLD, "function_call": {"name": "crop"}}],
            "messages[1].function_call: a call in the old way; write it in",
        ),
        (
            [{**TOLD, "content": "<think>a</think>b", "reasoning": "c"}],
            "messages[1].reasoning: the text has its own <th",
        ),
        (
            [{**TOLD, "reasoning_content": "a", "reasoning": "b"}],
            'messages[1].reasoning: another text than in "reasoni',
        ),
        ([{**TOLD, "reasoning_content": 3}], "messages[1].reasoning_content: a number where a text belongs"),
        ([calling(BOX, weight=0), TOOL, TOLD], "messages[1].role: the turns of one answer, trained in part; give all"),
    ],
)
def test_what_cannot_be_read_stops_the_row_by_name(answer, problem, tmp_path) -> None:
    messages, reading = read(tmp_path, ASKED, *answer)
    [found] = reading.problems
    assert problem in str(found) and not messages and found.is_fatal
    [partial] = reading.partial
    assert partial.sample.image_paths == [Path("p/a.png")]


def test_what_a_call_says_besides_its_box_is_noted(tmp_path) -> None:
    _, reading = read(tmp_path, ASKED, calling({"box": [1, 2, 3, 4], "label": "cup", "zoom": 2}), TOOL, TOLD)
    assert reading.ignored.lines() == [f'1 x "zoom" of a tool call ({tmp_path / "d.jsonl"}:1)']
