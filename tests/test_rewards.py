"""Reward terms, presets and a user's own function."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looktwice.geometry import Box, Size
from looktwice.processing.chat_template import EARLY_STOP
from looktwice.rewards import CODE, PAPER, REWARD_PRESETS, ROBUST, Played, PresetReward, can_be_earned, score
from looktwice.rollout.trajectory import ToolCall, Trajectory

CROP = ToolCall(requested=Box(10, 20, 110, 90), box=Box(10, 20, 110, 90), size=Size(192, 128), error=None)
OTHER_CROP = ToolCall(requested=Box(0, 0, 50, 50), box=Box(0, 0, 50, 50), size=Size(96, 96), error=None)
REFUSED = ToolCall(requested=Box(110, 90, 10, 20), box=None, size=None, error="reversed")

JSON_BOX = '{"bbox_2d": [10, 20, 110, 90]}'
OUR_BOX = "<tool_call>[10, 20, 110, 90]</tool_call>"
NAMED_BOX = "<tool_call>Crop [10, 20, 110, 90]</tool_call>"

VECTORS = [
    (
        "<think>The sign is small, so I look closer. BOX\nThe letters read STOP clearly.</think><answer>STOP</answer>",
        (0.5, 0.5, 0.10),
    ),
    ("<think>BOX\nThe letters read STOP clearly.</think><answer>STOP</answer>", (0.5, 0.5, 0.0)),
    ("<think>I know it.</think><answer>STOP</answer>", (0.5, 0.0, 0.10)),
    ("<think>Look. THREE\nDone now, it says STOP.</think><answer>STOP</answer>", (0.5, 0.5, 0.05)),
    (
        "<think>Small, so I look closer. REVERSED\nThe letters read STOP.</think><answer>STOP</answer> Done.",
        (0.0, 0.5, 0.10),
    ),
    (
        "<think>The sign is small, so I look closer. NAN\nThe letters read STOP clearly.</think><answer>STOP</answer>",
        (0.5, 0.5, 0.10),
    ),
    ("<answer>x</answer> then <answer>STOP</answer>", (0.5, 0.0, 0.0)),
]


def rollout(text, *calls):
    return Trajectory(prompt_ids=[], text=text, calls=list(calls))


@pytest.mark.parametrize("box", [JSON_BOX, OUR_BOX, NAMED_BOX])
@pytest.mark.parametrize(("completion", "expected"), VECTORS)
def test_code_preset_gives_the_released_codes_rewards(completion, expected, box):
    numbers = "10, 20, 110, 90"
    text = (
        completion.replace("BOX", box)
        .replace("THREE", box.replace(numbers, "10, 20, 110"))
        .replace("REVERSED", box.replace(numbers, "110, 90, 10, 20"))
        .replace("NAN", box.replace(numbers, "NaN, 90, 10, 20"))
    )
    parts = score(rollout(text), "STOP", CODE).parts
    assert parts["accuracy"] == 1
    assert (parts["format"], parts["region"], parts["length"]) == pytest.approx(expected)


def test_the_same_box_of_two_pictures_is_two_regions():
    preset = replace(PAPER, region_cap=2.0)
    text = "<think>Hm.</think><answer>STOP</answer>"
    for other, region in ((CROP, 0.5), (replace(CROP, image_number=2), 1.0)):
        assert score(rollout(text, CROP, other), "STOP", preset).parts["region"] == region


@pytest.mark.parametrize("preset", [PAPER, ROBUST])
@pytest.mark.parametrize(("completion", "expected"), VECTORS)
def test_no_written_box_earns_region_without_a_crop(completion, expected, preset):
    text = completion.replace("BOX", OUR_BOX).replace("REVERSED", OUR_BOX)
    assert score(rollout(text, REFUSED), "STOP", preset).parts["region"] == 0


@pytest.mark.parametrize(
    "text",
    [
        'closer look {"bbox_2d": [10, 20} and so on',
        f'closer look {JSON_BOX} and so on {{"bbox": [1, 2, 3, 4]}}',
        "closer look <tool_call>the sign</tool_call> and so on",
        "closer look <tool_call>[10, 20, up, 90]</tool_call>",
        "closer look " + '{"bbox_2d": ' + "[" * 100_000 + "}",
    ],
)
def test_code_preset_pays_no_region_when_a_box_does_not_parse(text):
    assert score(rollout(f"{text}<answer>STOP</answer>"), "STOP", CODE).parts["region"] == 0


def test_code_preset_skips_empty_pieces_between_boxes_but_not_at_the_ends():
    inside = f"<think>ten letters {OUR_BOX} {OUR_BOX} ten letters</think><answer>STOP</answer>"
    assert score(rollout(inside), "STOP", CODE).parts["length"] == pytest.approx(0.1)
    at_end = f"<think>ten letters {OUR_BOX}</think><answer>STOP</answer>"
    assert score(rollout(at_end), "STOP", CODE).parts["length"] == 0


def test_code_preset_gates_only_the_region():
    reward = score(rollout(VECTORS[0][0].replace("BOX", OUR_BOX)), "GO", CODE)
    assert reward.parts == pytest.approx({"accuracy": 0, "format": 0.5, "length": 0.1, "region": 0})


HUNDRED = "The sign stands far away, and its letters are too small to be read, so I look at it closer than that"
RIGHT = f"<think>\n{HUNDRED}{OUR_BOX}</think>\n\n<answer>STOP</answer>"


@pytest.mark.parametrize("preset", [PAPER, ROBUST])
def test_right_rollout_earns_every_term(preset):
    reward = score(rollout(RIGHT, CROP), "stop", preset)
    assert reward.parts == pytest.approx({"accuracy": 1, "format": 1, "length": 0.1, "region": 0.5})
    assert reward.total == pytest.approx(2.6)
    assert reward.error is None


def test_wrong_rollout_keeps_format_and_length_in_paper_and_nothing_in_robust():
    wrong = rollout(RIGHT, CROP)
    assert score(wrong, "GO", PAPER).parts == pytest.approx({"accuracy": 0, "format": 1, "length": 0.1, "region": 0})
    assert score(wrong, "GO", ROBUST).total == 0


def test_robust_is_the_default():
    assert score(rollout(RIGHT, CROP), "GO").total == 0


@pytest.mark.parametrize(
    ("calls", "region"), [((), 0), ((REFUSED,), 0), ((CROP,), 0.5), ((CROP, OTHER_CROP), 0.5), ((REFUSED, CROP), 0.5)]
)
def test_region_pays_valid_crops_up_to_the_cap(calls, region):
    assert score(rollout(RIGHT, *calls), "STOP").parts["region"] == region


def test_region_counts_a_box_once():
    preset = replace(ROBUST, region_cap=10.0)
    assert score(rollout(RIGHT, CROP, CROP, OTHER_CROP), "STOP", preset).parts["region"] == 1.0


@pytest.mark.parametrize(
    ("text", "num_chars"),
    [
        ("<think>twelve chars</think><answer>STOP</answer>", 12),
        ("<think>  twelve \n\n chars </think><answer>STOP</answer>", 12),
        (f"<think>twelve {OUR_BOX}chars</think><answer>STOP</answer>", 12),
        ("<think>twelve <tool_response>Too thin.</tool_response>chars</think><answer>STOP</answer>", 12),
        (f"<think>twelve chars{EARLY_STOP}<answer>STOP</answer>", 12),
        ("<answer>STOP</answer>", 0),
        (f"<think>{' '.join(map(str, range(999)))}</think><answer>STOP</answer>", 250),
    ],
)
def test_length_counts_the_reasoning_the_model_wrote(text, num_chars):
    assert score(rollout(text), "STOP").parts["length"] == pytest.approx(num_chars / 1000)


@pytest.mark.parametrize(
    ("text", "format_term"),
    [
        ("<think>x</think><answer>STOP</answer>", 1),
        ("\n<think>\nx\n</think>\n\n<answer>\nSTOP\n</answer>\n", 1),
        ("x</think><answer>STOP</answer>", 1),
        ("<answer>STOP</answer>", 0),
        ("<think>x</think>STOP", 0),
        ("<think>x</think><answer> </answer>", 0),
        ("<think>x<answer>STOP</answer>", 0),
        ("<think>x</think><answer>STOP</answer> Done.", 0),
        ("<think>x</think> So: <answer>STOP</answer>", 0),
        ("<think>x</think></think><answer>STOP</answer>", 0),
        ("<think>x <answer>STOP</answer></think><answer>STOP</answer>", 0),
        ("<think>x</think><answer>GO</answer><answer>STOP</answer>", 0),
        ("<think>a <think>x</think><answer>STOP</answer>", 0),
    ],
)
def test_format_is_thinking_then_one_answer_and_nothing_else(text, format_term):
    assert score(rollout(text), "STOP", PAPER).parts["format"] == format_term


texts = st.lists(
    st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "STOP", " ", OUR_BOX, JSON_BOX, "{", "}", "look"])
).map("".join)
calls = st.lists(st.sampled_from([CROP, OTHER_CROP, REFUSED]))


@given(texts, calls, st.sampled_from(["STOP", "GO"]), st.sampled_from(sorted(REWARD_PRESETS)))
def test_every_rollout_is_paid_within_the_bounds(text, calls, solution, name):
    [reward] = PresetReward(REWARD_PRESETS[name])([Played(rollout(text, *calls), solution)])
    assert 0 <= reward.total <= {"paper": 2.75, "robust": 2.75, "code": 2.1, "accuracy": 1}[name]
    assert reward.total == pytest.approx(sum(reward.parts.values()))
    assert reward.accuracy in (0, 1)
    if reward.accuracy == 0:
        assert reward.parts["region"] == 0
        assert name != "robust" or reward.total == 0


@pytest.mark.parametrize(
    ("solution", "is_earnable"),
    [
        ("a cup", True),
        ("<think>Hm.</think><answer>$7$</answer>", True),
        ("x" * 1000, True),
        ("x" * 1001, False),
        (("cup", "x" * 1001), True),
        ("<answer>a cup", False),
        ("a cup</answer>", False),
    ],
)
def test_a_gold_answer_can_be_earned_where_saying_it_is_right(solution, is_earnable):
    assert can_be_earned(solution) is is_earnable


@given(st.text(max_size=40).filter(lambda text: text.split()))
def test_whatever_text_can_be_earned(solution):
    assert can_be_earned(solution)


# -- what robust does not pay

SEEN = Size(400, 300)


@pytest.mark.parametrize(
    ("box", "region"),
    [(Box(0, 0, 400, 300), 0.0), (Box(0, 0, 400, 151), 0.0), (Box(0, 0, 400, 150), 0.5), (Box(0, 0, 1, 1), 0.5)],
)
def test_a_crop_of_more_than_half_of_its_picture_is_no_region_in_robust(box, region):
    crop = replace(CROP, box=box, image_number=2)
    trajectory = replace(rollout(RIGHT, crop), image_sizes=(Size(4000, 3000), SEEN))
    assert score(trajectory, "STOP", ROBUST).parts["region"] == region
    assert score(trajectory, "STOP", PAPER).parts["region"] == 0.5


@pytest.mark.parametrize(
    ("thinking", "num_chars"),
    [
        ("a" * 250, 16),
        ("aA" * 125, 16),
        (f"{HUNDRED} " * 2, 116),
        ("What is written on the sign at the corner?", 0),
        ("Look: What is written on the sign at the corner?", 21),
        ("sign", 0),
    ],
)
def test_reasoning_that_repeats_itself_or_the_question_is_not_paid_in_robust(thinking, num_chars):
    text = f"<think>{thinking}</think><answer>STOP</answer>"
    question = "What is written on the  sign at the corner?"
    assert score(rollout(text), "STOP", ROBUST, question=question).parts["length"] == pytest.approx(num_chars / 1000)
    full = min(0.25, len(thinking.strip()) / 1000)
    assert score(rollout(text), "STOP", PAPER, question=question).parts["length"] == pytest.approx(full)


def test_accuracy_pays_nothing_but_the_right_answer():
    assert score(rollout(RIGHT, CROP), "STOP", REWARD_PRESETS["accuracy"]).total == 1
    assert score(rollout("STOP"), "STOP", REWARD_PRESETS["accuracy"]).total == 1


def test_what_a_term_measured_is_kept_beside_what_it_paid():
    reward = score(rollout(RIGHT, CROP), "GO", ROBUST)
    assert reward.raw == {"accuracy": 0, "format": 1, "length": 100, "region": 1}
    assert set(reward.parts.values()) == {0}


def test_a_rollout_without_a_verdict_has_no_reward():
    [reward] = PresetReward(verdicts=lambda played: [TimeoutError("no verdict")])([Played(rollout(RIGHT), "STOP")])
    assert (reward.error, str(reward.total)) == ("TimeoutError: no verdict", "nan")
