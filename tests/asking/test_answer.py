"""Answers: what a rollout said, as attributes and under the documented keys."""

from __future__ import annotations

import json
import pickle

import pytest
from PIL import Image

from looktwice.asking.answer import Answer, Seconds, answer_of, remembered
from looktwice.geometry import Box, Size
from looktwice.messages import question_about
from looktwice.rollout.trajectory import ToolCall, Trajectory

CALL = "<tool_call>image 2 [2, 4, 10, 12]</tool_call>"


def answer(**settings: object) -> Answer:
    cut = ToolCall(requested=Box(2, 4, 10, 12), box=Box(2, 4, 10, 12), size=Size(8, 8), error=None, image_number=2)
    trajectory = Trajectory(
        prompt_ids=[1, 2],
        completion_ids=[3, 4, 5],
        is_sampled=[True, False, True],
        image_sizes=(Size(20, 20), Size(30, 30)),
        text=f"<think>Hm. {CALL} <ref>cup</ref><box>(0.1,0.2),(0.5,0.6)</box></think>\n\nSo: <answer>red</answer>",
        calls=[cut],
        stop_reason="answered",
    )
    images = [Image.new("RGB", (20, 20), "red"), Image.new("RGB", (30, 30), "blue")]
    return answer_of(trajectory, history=question_about("What?", *images), **settings)


def test_attributes_and_keys_say_the_same() -> None:
    given = answer(num_crop_tokens=4)
    assert given.response == given["response"] and given.stop_reason == given["stop_reason"] == "answered"
    assert given.parsed.answer_content == given["parsed"]["answer_content"] == "red"
    assert given.parsed.think_content == given["parsed"]["think_content"]
    assert given["tool_calls"] == [{"text": CALL, "image": 2, "box": [2, 4, 10, 12]}]
    assert given.grounding[0].coordinates == pytest.approx((2, 4, 10, 12))
    assert given["grounding"] == given["parsed"]["grounding"] and given["grounding"][0]["phrase"] == "cup"
    assert given["tokens"] == {"prompt": 2, "written": 2, "crops": 4}
    assert json.loads(json.dumps(given)) == given


def test_a_crop_has_its_call_its_box_and_its_region_of_the_right_image() -> None:
    [crop] = answer().crops
    assert (crop.text, crop.image_number, crop.box) == (CALL, 2, Box(2, 4, 10, 12))
    assert crop.image.size == (8, 8) and crop.image.getpixel((0, 0)) == (0, 0, 255)


def test_what_was_said_has_no_thinking_no_calls_and_no_tags() -> None:
    assert answer().said == "So: red"


@pytest.mark.parametrize(
    ("response", "kept"),
    [
        ("<think>a</think>\n\n<answer>b</answer>", "<answer>b</answer>"),
        ("<think>a</think>b <tool_call>[1, 2, 3, 4]</tool_call> c", "b  c"),
        ("<think>a</think>b <tool_call>[1,", "b"),
        ("b </tool_call> c", "b  c"),
        ("<think>a", ""),
    ],
)
def test_a_history_keeps_what_followed_the_thinking(response: str, kept: str) -> None:
    assert remembered(response) == kept


def test_two_answers_are_equal_whatever_their_seconds() -> None:
    assert answer(seconds=Seconds(first=1.0, total=2.0)) == answer()
    assert answer(num_crop_tokens=1) != answer()


def test_an_answer_crosses_processes() -> None:
    sent = answer()
    got = pickle.loads(pickle.dumps(sent))
    assert got == sent and got.crops == sent.crops and got.said == sent.said
