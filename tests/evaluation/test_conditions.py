"""Under each condition one thing is taken away, and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from PIL import Image
from tests.conftest import ScriptedEngine

from looktwice.benches.item import Item
from looktwice.config import ALL_CONTROLS, AnswerConfig, InferenceConfig
from looktwice.errors import DataError
from looktwice.evaluation import conditions
from looktwice.evaluation.conditions import (
    CONDITIONS,
    CROPS,
    WORDS,
    Begun,
    Setting,
    copies,
    is_possible,
    size_of_tokens,
)
from looktwice.geometry import Box, Size, num_visual_tokens
from looktwice.inference import OvisInference

CALL = "<tool_call>[100, 60, 140, 100]</tool_call>"
SCRIPT = f"<think>\nLook. {CALL}\nIt says 7.\n</think>\n\n<answer>7</answer><|im_end|>"
GENERATION = AnswerConfig(max_new_tokens=200)
SETTING = Setting(generation=GENERATION, suffix=None, seed=0)
CROP = {"image": 1, "box": [100, 60, 140, 100], "size": [48, 48], "error": None}
ANSWERED = {"crops": [CROP], "tokens": {"crops": 9}}


@pytest.fixture(scope="module")
def inference(model_folder) -> OvisInference:
    return OvisInference(InferenceConfig(model_path=str(model_folder), device="cpu"))


@pytest.fixture
def item(image) -> Item:
    return Item(
        id="1",
        images=(image,),
        question="What?",
        about="What?",
        gold=("7",),
        gold_boxes=(Box(10, 20, 60, 70),),
        group="1",
    )


def begin_item(*asked: object) -> Begun:
    [begun] = conditions.begin_item(*asked)  # type: ignore[arg-type]
    return begun


def answered(inference: OvisInference, begun: Begun, script: str = SCRIPT) -> Begun:
    ScriptedEngine(inference.processor, [script]).run([begun.asked.request])
    return begun


def prompt_of(begun: Begun, inference: OvisInference) -> tuple[str, list[tuple[int, ...]]]:
    example = begun.asked.episode.prompt
    return inference.processor.decode(example.input_ids), [image.grid_thw for image in example.images]


def test_there_are_ten_conditions_each_in_words() -> None:
    assert len(CONDITIONS) == 10 and tuple(WORDS) == CONDITIONS == (CROPS, *ALL_CONTROLS)


@pytest.mark.parametrize("condition", [name for name in CONDITIONS if name not in ("question_only", "more_pixels")])
def test_the_question_and_its_picture_stay_as_they_are(condition, inference, item) -> None:
    text, images = prompt_of(begin_item(inference, item, condition, SETTING, ANSWERED), inference)
    plain_text, plain_images = prompt_of(begin_item(inference, item, CROPS, SETTING), inference)
    text, plain_text = (re.sub("\n+", "\n", one) for one in (text, plain_text))  # one for each picture
    assert text == plain_text and images[:1] == plain_images
    assert len(images) == (2 if condition == "result_without_call" else 1)


def test_without_the_picture_only_the_question_is_left(inference, item) -> None:
    begun = answered(inference, begin_item(inference, item, "question_only", SETTING))
    assert prompt_of(begun, inference)[1] == [] and begun.num_overview_tokens == 0
    assert begun.asked.answer.crops[0].error == "switched_off"


def test_the_result_without_the_call_is_the_crop_at_the_size_of_a_crop(inference, item, image) -> None:
    begun = begin_item(inference, item, "result_without_call", SETTING, ANSWERED)
    shown = begun.asked.episode.prompt.images
    tool = answered(inference, begin_item(inference, item, CROPS, SETTING)).asked.episode.example.images
    assert [one.key for one in shown] == [one.key for one in tool]
    assert answered(inference, begun).asked.answer.crops[0].error == "switched_off"


def test_the_call_without_its_result_is_followed_by_nothing_and_a_second_one_by_the_answer(inference, item) -> None:
    script = f"<think>\n{CALL}Hm. {CALL}7</answer><|im_end|>"
    begun = answered(inference, begin_item(inference, item, "call_without_result", SETTING), script)
    answer = begun.asked.answer
    assert [crop.error for crop in answer.crops] == ["no_result", "switched_off"]
    assert f"{CALL}Hm. {CALL}<tool_response>" in answer.response
    assert answer.response.endswith("</tool_response>\n</think>\n\n<answer>7</answer>")
    assert answer.tokens.crops == 0


def test_more_pixels_take_as_many_visual_tokens_as_picture_and_crops(inference, item) -> None:
    plain = begin_item(inference, item, CROPS, SETTING)
    more = begin_item(inference, item, "more_pixels", SETTING, ANSWERED)
    wanted = plain.num_overview_tokens + 9
    assert wanted <= more.num_overview_tokens <= wanted + 5
    assert (
        begin_item(inference, item, "more_pixels", SETTING, {**ANSWERED, "tokens": {"crops": 0}}).seen_sizes
        == plain.seen_sizes
    )


@pytest.mark.parametrize("original", [Size(4000, 300), Size(30, 40), Size(640, 480), Size(900, 7000)])
@pytest.mark.parametrize("num_tokens", [1, 37, 500])
def test_a_size_of_so_many_tokens_has_no_fewer_and_few_more(original: Size, num_tokens: int) -> None:
    found = num_visual_tokens(size_of_tokens(original, num_tokens, 32), factor=32)
    longest = max(original) / min(original)
    assert num_tokens <= found < num_tokens + (num_tokens * longest) ** 0.5 + 1


def test_a_size_of_many_tokens_keeps_the_shape() -> None:
    width, height = size_of_tokens(Size(4000, 3000), 1000, 32)
    assert width / height == pytest.approx(4 / 3, rel=0.05) and num_visual_tokens(Size(width, height), factor=32) < 1030


def test_thinking_in_text_alone_cannot_write_a_call(inference, item) -> None:
    setting = Setting(generation=GENERATION.model_copy(update={"enable_thinking": False}), suffix=None, seed=0)
    begun = begin_item(inference, item, "text_only", setting)
    template = inference.processor.template
    tags = {template.token_id("<tool_call>"), template.token_id("</tool_call>")}
    assert begun.asked.request.banned_ids == tags and begun.asked.episode.is_thinking
    assert begin_item(inference, item, CROPS, SETTING).asked.request.banned_ids == frozenset()


def test_the_gold_crop_holds_all_gold_boxes_or_is_the_picture_that_the_set_gives(inference, item, image) -> None:
    two = replace(item, gold_boxes=(*item.gold_boxes, Box(80, 0, 100, 30)))
    begun = answered(inference, begin_item(inference, two, "gold_crop", SETTING))
    assert begun.asked.answer.crops[0].box == Box(10, 0, 100, 70)
    given = replace(item, gold_boxes=(), gold_image=Image.new("RGB", (40, 40), "red"))
    begun = answered(inference, begin_item(inference, given, "gold_crop", SETTING))
    assert begun.asked.answer.crops[0].error is None and len(begun.asked.episode.example.images) == 2
    nothing = replace(item, gold_boxes=())
    assert not is_possible(nothing, "gold_crop") and is_possible(nothing, "blank_crop")
    with pytest.raises(DataError, match="a gold crop needs the box"):
        begin_item(inference, nothing, "gold_crop", SETTING)


def test_a_line_is_added_to_the_question(inference, item) -> None:
    setting = Setting(generation=GENERATION, suffix="End with 'Final answer: '.", seed=0)
    text, _ = prompt_of(begin_item(inference, item, CROPS, setting), inference)
    assert "What?\nEnd with 'Final answer: '.<|im_end|>" in text


def test_an_answer_without_calls_is_known_under_all_controls_that_change_calls() -> None:
    silent = {"crops": []}
    known = {name for name in CONDITIONS if copies(name, silent, GENERATION)}
    assert known == {*CONDITIONS} - {CROPS, "question_only"}
    assert not any(copies(name, ANSWERED, GENERATION) for name in CONDITIONS)
    drawn = GENERATION.model_copy(update={"temperature": 1.0})
    assert not copies("text_only", silent, drawn) and copies("no_crop", silent, drawn)


@pytest.mark.parametrize("condition", conditions.SHARING)
def test_samples_share_one_request(condition: str, inference, item) -> None:
    siblings = conditions.begin_item(inference, item, condition, SETTING, ANSWERED, count=3)
    [request] = {id(one.asked.request): one.asked.request for one in siblings}.values()
    assert list(request.drivers) == [one.asked.episode for one in siblings]
