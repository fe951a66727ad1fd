"""What looks like a call and is none is found, and ordinary text is left alone."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looktwice.data.near_calls import near_calls

WRITTEN = (
    "<crop>[10, 20, 60, 80]</crop>",
    "<crop>10,20,60,80</crop>",
    "<crop>(10,20)(60,80)</crop>",
    "<crop>[10%, 20%, 60%, 80%]</crop>",
    "<crop>[10, 20, 60, 80]",
    "<CROP> [10, 20, 60, 80] </CROP>",
    "<zoom>[10, 20, 60, 80]</zoom>",
    "<image_crop>[10, 20, 60, 80]</image_crop>",
    "<region>[10, 20, 60, 80]</region>",
    "<bbox>10 20 60 80</bbox>",
    "<TOOL_CALL>[10, 20, 60, 80]</TOOL_CALL>",
    "<Tool_Call>cup [10, 20, 60, 80]</Tool_Call>",
    "<tool-call>[10, 20, 60, 80]</tool-call>",
    "<toolcall>[10, 20, 60, 80]</toolcall>",
    "< tool_call >[10, 20, 60, 80]< /tool_call >",
    "<function_call>crop [10, 20, 60, 80]</function_call>",
    '<tool>{"name": "crop", "args": [10, 20, 60, 80]}</tool>',
    "<tool><name>crop</name><args>[10, 20, 60, 80]</args></tool>",
    "<crop><x1>10</x1><y1>20</y1><x2>60</x2><y2>80</y2></crop>",
    '<crop x1="10" y1="20" x2="60" y2="80"/>',
    '<crop box="10,20,60,80">',
    "<|box_start|>(10,20),(60,80)<|box_end|>",
    "<|tool_call|>[10, 20, 60, 80]",
    "&lt;tool_call&gt;[10, 20, 60, 80]&lt;/tool_call&gt;",
    "\uff1ccrop\uff1e\uff3b10\uff0c20\uff0c60\uff0c80\uff3d\uff1c/crop\uff1e",
    "\u3010crop\u3011[10, 20, 60, 80]",
    "[Crop tile [10, 20, 60, 80]]",
    "(Crop cup [10, 20, 60, 80])",
    "[CROP:10,20,60,80]",
    "[CROP](10, 20, 60, 80)",
    "[tool_call] [10, 20, 60, 80]",
    "[tool_call] crop [10, 20, 60, 80] [/tool_call]",
    "crop(10, 20, 60, 80)",
    "crop(x1=10, y1=20, x2=60, y2=80)",
    "crop[10, 20, 60, 80]",
    "crop = [10, 20, 60, 80]",
    "image.crop((10, 20, 60, 80))",
    "zoom_in(bbox=[10, 20, 60, 80])",
    'image_zoom_in_tool(label="cup", bbox_2d=[10, 20, 60, 80])',
    "@crop[10, 20, 60, 80]",
    "\\crop{10,20,60,80}",
    "{Crop cup (10, 20, 60, 80)}",
    "{Crop cup [10, 20, 60, 80}",
    "{Zoom cup [10, 20, 60, 80]}",
    "{Look at cup [10, 20, 60, 80]}",
    "{crop: [10, 20, 60, 80]}",
    '{"bbox_2d": [10, 20, 60, 80]}',
    '{"bbox_2d": [10, 20, 60, 80], "label": "cup"}',
    '{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [10, 20, 60, 80]}}',
    '{"name": "look", "arguments": {"x1": 10, "y1": 20, "x2": 60, "y2": 80}}',
    '{"x1": 10, "y1": 20, "x2": 60, "y2": 80}',
    '```json\n{"tool": "crop", "box": [10, 20, 60, 80]}\n```',
    "```python\nimg.crop((10, 20, 60, 80))\n```",
    "Crop cup 1 [10, 20, 60, 80]",
    "I look closer. Crop cup 1 [10, 20, 60, 80] The left one.",
    "crop: [10, 20, 60, 80]",
    "crop: x=10, y=20, w=60, h=80",
    "Crop 10, 20, 60, 80",
    "crop {10, 20, 60, 80}",
    "[[crop]] [10, 20, 60, 80]",
    "<crop/> [10, 20, 60, 80]",
    '{\n  "name": "crop",\n  "box": [\n          10,\n          20,\n          60,\n          80\n  ]\n}',
    "<|tool_call_begin|>crop<|tool_sep|>[10, 20, 60, 80]<|tool_call_end|>",
    '<grounding>{"bbox_2d": [10, 20, 60, 80], "source": "original_image"}</grounding>',
    "<code>image.crop((10, 20, 60, 80))</code>",
    "<tool_code>crop_image(0, 10, 20, 60, 80)</tool_code>",
    "{{crop 10 20 60 80}}",
    "<crop>10,20 to 60,80</crop>",
    "<crop>10-20-60-80</crop>",
    "{Crop cup from 10,20 to 60,80}",
    "crop(10-20, 60-80)",
    "<loc_10><loc_20><loc_60><loc_80>",
    "<crop><box>(10,20),(60,80)</box></crop>",
    "{Crop <box>(10,20),(60,80)</box>}",
    "crop(box=<box>(10,20),(60,80)</box>)",
    "```tool_call\n[10, 20, 60, 80]\n```",
    "'crop [10, 20, 60, 80]'",
    "Action: crop [10, 20, 60, 80]",
    "Action: crop\nAction Input: [10, 20, 60, 80]",
    "Tool: crop\nbox: [10, 20, 60, 80]",
    "<answer>{Crop cup [10, 20, 60, 80)}</answer>",
    "<answer><crop>[10, 20, 60, 80]</crop></answer>",
)
ORDINARY = (
    "the box [10, 20, 60, 80] of the sign",
    "The sign lies at (10, 20, 60, 80).",
    "I crop the sign. It lies at [10, 20, 60, 80] in the picture.",
    "I will look at the region [10, 20, 60, 80] more closely.",
    "The crop (10, 20, 60, 80) shows a cup.",
    "In the crop, the numbers 1, 2, 3, 4 are readable.",
    "The cropped area at [10, 20, 60, 80] shows it.",
    "Zooming in on [10, 20, 60, 80], I see a cup.",
    "The bounding box is [10, 20, 60, 80].",
    "bbox: [10, 20, 60, 80]",
    "The tool shows 1, 2, 3, 4.",
    "the years 2019, 2020, 2021, 2022 and 2023",
    "Crop yields in 2019, 2020, 2021, 2022 rose.",
    "from 10-20, 30-40, 50-60 and 70-80",
    "On 12/05/2020, 13/05/2020 and at 10:20, 11:30",
    "IP 192.168.0.1, 10.0.0.1, 10.0.0.2, 10.0.0.3",
    "1. one\n2. two\n3. three\n4. four",
    "| a | 1 | 2 | 3 | 4 |",
    "<table><tr><td>1</td><td>2</td><td>3</td><td>4</td></tr></table>",
    '<rect x="10" y="20" width="60" height="80"/>',
    "the set {1, 2, 3, 4}",
    "$\\{1, 2, 3, 4\\}$",
    "\\text{mean of [1, 2, 3, 4]} = 2.5",
    "f(1, 2, 3, 4) = max(1, 2, 3, 4)",
    "rgba(255, 0, 0, 1)",
    "itertools.product([16, 32, 64, 128])",
    "matrix [[1, 2], [3, 4]]",
    '{"2019": [1, 2, 3, 4]}',
    "x < y and z in 1, 2, 3, 4 > 0",
    "{Note: see [1]}",
    "{Crop the left part}",
    "<ref>cup</ref><box>(0.1,0.2),(0.3,0.4)</box>",
    "<ref>cups</ref>[<box>(0.401,0.526),(0.430,0.557)</box>,<box>(0.489,0.494),(0.516,0.526)</box>]",
    "<BOX>[0.1, 0.2, 0.3, 0.4]</BOX>",
    "The crop <box>(0.1,0.2),(0.3,0.4)</box> and the <ref>zoom lens</ref><box>(0.1,0.2),(0.3,0.4)</box>",
    "<point>(0.1,0.2)</point>, <point>(0.3,0.4)</point>",
    "<answer>[10, 20, 60, 80]</answer>",
    '<answer>{"bbox_2d": [10, 20, 60, 80], "label": "cup"}</answer>',
    "<think>[10, 20, 60, 80] is the place.</think>",
    "The call <tool_call>[10, 20, 60, 80]</tool_call> shows 1, 2, 3, 4.",
    "<tool_call>[10, 20, 60, 80]</tool_call><tool_call>Crop cup [1, 2, 3, 4]</tool_call>",
)


@pytest.mark.parametrize("written", WRITTEN)
def test_what_looks_like_a_call_is_found_once(written: str) -> None:
    assert len(near_calls(f"Hm.\n{written}\n")) == 1
    assert len(near_calls(written)) == 1


@pytest.mark.parametrize("written", ORDINARY)
def test_ordinary_text_is_left_alone(written: str) -> None:
    assert near_calls(written) == []
    assert near_calls(f"<think>Hm. {written}") == []


def test_the_piece_that_looks_like_a_call_is_given_whole() -> None:
    text = 'I see. <crop>[10, 20, 60, 80]</crop> and {"bbox_2d": [1, 2, 3, 4]} there.'
    assert near_calls(text) == ["<crop>[10, 20, 60, 80]</crop>", '{"bbox_2d": [1, 2, 3, 4]}']


words = st.text(st.characters(categories=["Ll", "Zs"]), max_size=30)
sides = st.one_of(st.integers(-99, 9999), st.floats(0, 999).map(lambda side: round(side, 3)))


@given(words, st.lists(sides, min_size=4, max_size=4), st.sampled_from(["[%s]", "(%s)", "%s"]), words)
def test_whatever_the_numbers_a_tag_is_found_and_prose_is_not(before, box, brackets, after) -> None:
    numbers = brackets % ", ".join(map(str, box))
    assert len(near_calls(f"{before} <crop>{numbers}</crop> {after}")) == 1
    assert near_calls(f"{before} <box>{numbers}</box> {after}") == []
    assert near_calls(f"the sign at {numbers}, {after}") == []


@pytest.mark.parametrize("text", ["[", "<", "{", "1, ", " ", "crop", "crop(", "1,2,3,4 ", "\\text{", "<crop>1,2,3,4"])
def test_repeated_marks_take_linear_time(text: str) -> None:
    start = time.process_time()
    near_calls(text * 4000)
    assert time.process_time() - start < 1.0


def test_the_time_is_in_proportion_to_what_is_found() -> None:
    started = time.process_time()
    assert len(near_calls("<crop>1-2 to 3-4</crop> <answer>no [1, 2, 3, 4]</answer>\n" * 10_000)) == 10_000
    assert time.process_time() - started < 7
