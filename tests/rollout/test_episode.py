"""The rules of the crop loop under a scripted engine: when a crop follows, when an answer is over, who wrote what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from PIL import Image

from looktwice.engine.interface import Continuation, Segment
from looktwice.engine.sampling import Sampling
from looktwice.errors import ConfigError, DataError
from looktwice.geometry import Size
from looktwice.messages import Conversation, VideoPart, assistant, question_about, user
from looktwice.processing.chat_template import EARLY_STOP
from looktwice.rollout.crop_tool import Observation, refusal
from looktwice.rollout.episode import Episode, EpisodeRules, Watcher, play, start_episodes
from looktwice.rollout.trajectory import StopReason, ToolCall, Trajectory

CALL = "<tool_call>[0, 0, 40, 40]</tool_call>"
OTHER_CALL = "<tool_call>[40, 20, 150, 70]</tool_call>"
ANSWER = "<answer>7</answer><|im_end|>"
OUTSIDE = "<tool_call>[500, 500, 600, 600]</tool_call>"


def ids_of(text: str, processor) -> list[int]:
    return processor.tokenizer.encode(text, add_special_tokens=False)


def outcome(episode: Episode) -> tuple[StopReason, int, list[str | None]]:
    """Why it stopped, its completions, and the error of each call (None for a crop)."""
    trajectory = episode.trajectory
    return trajectory.stop_reason, trajectory.num_turns, [call.error for call in trajectory.calls]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (f"It is {ANSWER}", ("answered", 1, [])),
        (f"<think>\n{CALL} so\n</think>\n\n{ANSWER}", ("answered", 2, [None])),
        (f"{CALL} and {OTHER_CALL} and {CALL} {ANSWER}", ("answered", 4, [None, None, None])),
        (f"{CALL}{OTHER_CALL}{ANSWER}", ("answered", 3, [None, None])),
        ("I do not know.<|im_end|>", ("no_answer", 1, [])),
        ("I do not know.<|endoftext|>", ("no_answer", 1, [])),
        (f"{CALL} still not.<|im_end|>", ("no_answer", 2, [None])),
        ("<answer>7<|im_end|>", ("no_answer", 1, [])),
        (f"<tool_call>look there</tool_call> {ANSWER}", ("answered", 2, ["no_box"])),
        (f"left</tool_call> {ANSWER}", ("answered", 2, ["no_box"])),
        (f"<tool_call>[1, 2, 3]</tool_call> {ANSWER}", ("answered", 2, ["wrong_length"])),
        (f"<tool_call>[40, 0, 0, 40]</tool_call> {CALL} {ANSWER}", ("answered", 3, ["reversed", None])),
        (f"<tool_call>[NaN, 0, 9, 40]</tool_call> {CALL} {ANSWER}", ("answered", 3, ["not_a_number", None])),
        (f"{OUTSIDE} {OUTSIDE} {CALL} {ANSWER}", ("answered", 4, ["outside", "outside", None])),
    ],
)
def test_a_script_ends_as_its_rules_say(script, expected, play_scripts) -> None:
    [episode], _ = play_scripts(script)
    assert outcome(episode) == expected


def test_a_box_that_is_too_thin_is_refused_and_can_be_mended(play_scripts) -> None:
    strip = Image.new("RGB", (2000, 16))
    [episode], _ = play_scripts(f"<tool_call>[0, 0, 2000, 16]</tool_call> {CALL} {ANSWER}", shown=strip)
    assert outcome(episode) == ("answered", 3, ["too_thin", None])


def test_a_crop_follows_its_call_at_once_and_the_text_goes_on_behind_it(play_scripts, processor) -> None:
    [episode], engine = play_scripts(f"See {CALL} seven {ANSWER}")
    overview, crop = episode.example.images
    assert episode.trajectory.completion_ids == [
        *ids_of(f"See {CALL}", processor),
        *processor.image_ids(crop),
        *ids_of(f" seven {ANSWER}", processor),
    ]
    inserted, end = engine.continuations[0]
    assert (inserted.ids, inserted.images, end) == (processor.image_ids(crop), [crop], None)
    assert overview is episode.prompt.images[0] and crop is not overview


def test_a_refusal_follows_its_call_as_tool_text(play_scripts, processor) -> None:
    [episode], engine = play_scripts(f"{OUTSIDE} {ANSWER}")
    text = "<tool_response>The box lies outside the picture.</tool_response>"
    assert engine.continuations[0][0].ids == ids_of(text, processor)
    assert engine.continuations[0][0].images == []
    assert len(episode.example.images) == 1
    assert episode.trajectory.text == f"{OUTSIDE}{text} <answer>7</answer>"


def test_the_call_that_reaches_the_turn_limit_gets_no_crop(play_scripts) -> None:
    [episode], engine = play_scripts(CALL * 9, max_turns=3)
    assert outcome(episode) == ("max_turns", 3, [None, None])
    assert episode.trajectory.text == CALL * 3
    assert engine.continuations[0][-1] is None
    assert episode.trajectory.is_sampled[-1]


def test_an_answer_as_the_last_allowed_turn_counts(play_scripts) -> None:
    [episode], _ = play_scripts(f"{CALL}{CALL}{ANSWER}", max_turns=3)
    assert outcome(episode) == ("answered", 3, [None, None])


def test_a_call_cut_by_the_length_limit_is_not_run(play_scripts) -> None:
    [episode], _ = play_scripts(CALL + ANSWER, max_new_tokens=6)
    assert outcome(episode) == ("max_tokens", 0, [])
    assert CALL.startswith(episode.trajectory.text) and episode.trajectory.text


def test_a_call_that_uses_the_last_tokens_is_run_but_nothing_is_sampled_after_it(play_scripts, processor) -> None:
    [episode], engine = play_scripts(CALL + ANSWER, max_new_tokens=len(ids_of(CALL, processor)))
    assert outcome(episode) == ("max_tokens", 1, [None])
    assert engine.continuations == [[None]]


@pytest.mark.parametrize("between", ["", " or better "])
def test_an_answer_wins_over_a_call_behind_it(between, play_scripts) -> None:
    [episode], engine = play_scripts(f"<answer>7</answer>{between}{CALL} more")
    assert outcome(episode) == ("answered", 1, [])
    assert engine.continuations == [[None]]


def test_max_new_tokens_counts_sampled_ids_and_not_crops(play_scripts, processor) -> None:
    script = f"{CALL} {CALL} {ANSWER}"
    num_written = len(ids_of(script, processor))
    [episode], engine = play_scripts(script, max_new_tokens=num_written)
    assert outcome(episode) == ("answered", 3, [None, None])
    assert sum(episode.trajectory.is_sampled) == num_written < len(episode.trajectory.completion_ids)
    num_first = len(ids_of(CALL, processor))
    assert engine.continuations[0][0].max_new_tokens == num_written - num_first
    [cut], _ = play_scripts(script, max_new_tokens=num_written - 1)
    assert outcome(cut) == ("max_tokens", 2, [None, None])


def test_a_call_without_an_image_is_refused(play_scripts) -> None:
    [episode], _ = play_scripts(f"{CALL} {ANSWER}", shown=None)
    assert outcome(episode) == ("answered", 2, ["no_picture"])
    assert episode.example.images == []


def test_a_call_may_name_any_picture_of_the_conversation(processor, image, play_scripts) -> None:
    other = image.rotate(90, expand=True)
    script = f"<tool_call>image 2 [60, 100, 110, 150]</tool_call><tool_call>image 3 [0, 0, 40, 40]</tool_call>{ANSWER}"
    [episode], _ = play_scripts(script, shown=[image, other])
    assert outcome(episode) == ("answered", 3, [None, "no_such_picture"])
    assert [call.image_number for call in episode.trajectory.calls] == [2, 3]
    assert episode.trajectory.image_sizes == (Size(160, 120), Size(120, 160))
    expected = processor.patch(other.crop((60, 100, 110, 150)).resize((48, 48), Image.Resampling.BILINEAR))
    assert episode.example.images[2].pixel_values.tolist() == expected.pixel_values.tolist()


def test_a_picture_that_is_asked_about_later_cannot_be_cut_yet(processor, image) -> None:
    early = (user("Q", image), assistant("<tool_call>image 2 [0, 0, 40, 40]</tool_call> A"), user("R", image))
    with pytest.raises(DataError, match=r"^message 2: crop call refused: .*There is no picture with this number"):
        start_episodes(Conversation(messages=early), processor, EpisodeRules())


def test_a_call_about_a_video_is_refused_and_the_answer_follows(play_scripts, image) -> None:
    video = VideoPart(source=[image, image.rotate(180)])
    [episode], engine = play_scripts(f"{CALL} {ANSWER}", shown=video)
    assert outcome(episode) == ("answered", 2, ["video"])
    assert engine.continuations[0][0].images == []
    text = "<tool_response>A video cannot be cropped.</tool_response>"
    assert episode.trajectory.text == f"{CALL}{text} <answer>7</answer>"


def test_a_video_is_shown_as_one_span_of_all_its_frames(play_scripts, image, processor) -> None:
    [episode], _ = play_scripts(ANSWER, shown=VideoPart(source=[image] * 3))
    [video] = episode.example.images
    assert video.grid_thw[0] == 3
    start = episode.prompt.input_ids.index(processor.config.video_start_token_id)
    assert episode.prompt.input_ids[start : start + video.num_tokens + 2] == processor.image_ids(video)
    assert (episode.images, episode.trajectory.image_size) == ([], Size(160, 120))


# -- thinking budget


def test_thinking_that_reaches_its_budget_is_closed_and_the_answer_follows(play_scripts, processor) -> None:
    thought = "<think>\nI see red A, blue B, green C"
    budget = len(ids_of(thought, processor))
    [episode], engine = play_scripts(thought + ANSWER, thinking_budget=budget)
    closing = ids_of(EARLY_STOP, processor)
    assert engine.requests[0].max_new_tokens == budget
    assert engine.continuations[0][0] == Continuation(ids=closing, max_new_tokens=1024 - budget - len(closing))
    assert episode.trajectory.completion_ids == ids_of(thought, processor) + closing + ids_of(ANSWER, processor)
    assert episode.trajectory.is_sampled[budget : budget + len(closing)] == [False] * len(closing)
    assert outcome(episode) == ("answered", 1, [])


def test_a_crop_while_thinking_leaves_what_remains_of_the_budget(play_scripts, processor) -> None:
    first = f"<think>\n{CALL}"
    spent = len(ids_of(first, processor))
    [episode], engine = play_scripts(f"{first} one two three four{ANSWER}", thinking_budget=spent + 3)
    crop, closing, _ = engine.continuations[0]
    assert crop.max_new_tokens == 3
    assert closing.ids == ids_of(EARLY_STOP, processor)
    assert outcome(episode) == ("answered", 2, [None])


def test_a_crop_that_comes_as_the_budget_ends_is_looked_at_for_one_id_before_thinking_is_closed(
    play_scripts, processor
) -> None:
    first = f"<think>\n{CALL}"
    [episode], engine = play_scripts(f"{first} one two{ANSWER}", thinking_budget=len(ids_of(first, processor)))
    crop, closing, _ = engine.continuations[0]
    assert crop.max_new_tokens == 1
    assert closing.ids == ids_of(EARLY_STOP, processor)
    assert outcome(episode) == ("answered", 2, [None])


@pytest.mark.parametrize("thought", ["<think>\nhm\n</think>", ""])
def test_no_budget_is_enforced_outside_a_think_block(thought, play_scripts, processor) -> None:
    script = f"{thought}so it is {ANSWER}"
    for budget in range(len(ids_of(f"{thought}so", processor)), len(ids_of(script, processor))):
        [episode], _ = play_scripts(script, thinking_budget=budget)
        assert episode.trajectory.completion_ids == ids_of(script, processor)
        assert all(episode.trajectory.is_sampled)


def test_no_budget_is_enforced_with_thinking_off(play_scripts) -> None:
    [episode], engine = play_scripts(f"<think>\nall the same {ANSWER}", thinking=False, thinking_budget=2)
    assert engine.requests[0].max_new_tokens == 1024
    assert all(episode.trajectory.is_sampled)


def test_the_text_that_closes_thinking_counts_towards_max_new_tokens(play_scripts, processor) -> None:
    closing = ids_of(EARLY_STOP, processor)
    [episode], engine = play_scripts("<think>\nwell, well, well", thinking_budget=3, max_new_tokens=3 + len(closing))
    assert outcome(episode) == ("max_tokens", 0, [])
    assert episode.trajectory.completion_ids[3:] == closing
    assert engine.continuations == [[None]]


@pytest.mark.parametrize("thought", ["<think>\nhm\n</think>\n\n", ""])
def test_a_call_that_the_budget_cuts_in_two_is_run_whole(thought, play_scripts, processor) -> None:
    budget = len(ids_of(f"{thought}<tool_call>[0, 0", processor))
    [episode], _ = play_scripts(f"{thought}{CALL} {ANSWER}", thinking_budget=budget)
    assert outcome(episode) == ("answered", 2, [None])


def test_an_answer_that_the_budget_cuts_in_two_still_wins_over_a_call(play_scripts, processor) -> None:
    budget = len(ids_of("<answer>7</ans", processor))
    [episode], _ = play_scripts(f"<answer>7</answer> {CALL} more", thinking_budget=budget)
    assert outcome(episode) == ("answered", 1, [])


def test_a_call_that_was_open_when_thinking_was_closed_is_refused(play_scripts, processor) -> None:
    start = "<think>\n<tool_call>[0, 0"
    budget = len(ids_of(start, processor))
    [episode], _ = play_scripts(f"{start}, 40, 40]</tool_call>{ANSWER}", thinking_budget=budget)
    assert outcome(episode) == ("answered", 2, ["no_box"])


# -- the record

SCRIPTS = [
    ANSWER,
    f"<think>\n{CALL} {OUTSIDE} {OTHER_CALL}\n</think>\n\n{ANSWER}",
    f"<think>\n{CALL}{CALL}{CALL} and on and on and on",
    CALL * 8,
    "<think>\none two three four five six seven <tool_call>[0, 0, 4",
]
RULES = {"max_turns": 8, "max_new_tokens": 200, "thinking_budget": 60}


def played(script: str, play_scripts) -> Episode:
    script += " and so on" * 200  # more than any limit allows
    [episode], _ = play_scripts(script, **RULES)
    return episode


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_example_is_the_prompt_and_the_completion_trained_where_sampled(script, play_scripts) -> None:
    episode = played(script, play_scripts)
    trajectory = episode.trajectory
    assert episode.example.input_ids == trajectory.prompt_ids + trajectory.completion_ids
    assert episode.example.loss_mask == [False] * len(trajectory.prompt_ids) + trajectory.is_sampled


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_mask_counts_exactly_the_ids_the_engine_reported(script, play_scripts, processor) -> None:
    trajectory = played(script, play_scripts).trajectory
    written = ids_of(script + " and so on" * 200, processor)
    logprobs = trajectory.sampling_logprobs, trajectory.drawn_logprobs
    record = zip(trajectory.completion_ids, *logprobs, trajectory.is_sampled, strict=True)
    sampled = [(token, plain, drawn) for token, plain, drawn, is_sampled in record if is_sampled]
    assert sampled == [(written[n], -n / 1000, -n / 500) for n in range(len(sampled))]


@pytest.mark.parametrize("script", SCRIPTS)
def test_visual_atoms_equal_the_rows_of_the_images(script, play_scripts, processor) -> None:
    episode = played(script, play_scripts)
    num_crops = sum(call.is_valid for call in episode.trajectory.calls)
    assert len(episode.example.images) == 1 + num_crops
    num_rows = sum(len(image.pixel_values) for image in episode.example.images) // processor.stride**2
    assert episode.example.input_ids.count(processor.config.image_token_id) == num_rows


def test_the_text_of_a_rollout_has_neither_crops_nor_turn_ends(play_scripts) -> None:
    [episode], _ = play_scripts(f"See {CALL} {ANSWER}")
    assert episode.trajectory.text == f"See {CALL} <answer>7</answer>"


def test_siblings_share_no_state(play_scripts) -> None:
    (first, second), engine = play_scripts(f"{CALL}{OTHER_CALL}{ANSWER}", f"<think>\n{ANSWER}")
    assert outcome(first) == ("answered", 3, [None, None]) and outcome(second) == ("answered", 1, [])
    assert (len(first.example.images), len(second.example.images), len(first.prompt.images)) == (3, 1, 1)
    assert second.example.input_ids == second.prompt.input_ids + second.trajectory.completion_ids
    assert [len(request.drivers) for request in engine.requests] == [2]


def test_rollouts_are_numbered_through_the_groups(processor, image, play_scripts) -> None:
    engine = type(play_scripts(ANSWER)[1])(processor, [f"{letter} {ANSWER}" for letter in "abc"])
    groups = [
        start_episodes(question_about("What?", image), processor, EpisodeRules(), count=2),
        start_episodes(question_about("Why?"), processor, EpisodeRules()),
    ]
    play(engine, groups, Sampling(), [0, 1])
    texts = [[episode.trajectory.text[0] for episode in group] for group in groups]
    assert texts == [["a", "b"], ["c"]]


def test_the_calls_are_answered_by_the_tool_given(play_scripts) -> None:
    seen: list[tuple[str, object]] = []

    def look(call_text: str, images: Sequence[Image.Image]) -> Observation:
        seen.append((call_text, images))
        return refusal("switched_off", None)

    [episode], _ = play_scripts(f"First {CALL} then {OTHER_CALL}{ANSWER}", look=look)
    assert outcome(episode) == ("answered", 3, ["switched_off", "switched_off"])
    assert [text for text, _ in seen] == [f"First {CALL}", f" then {OTHER_CALL}"]
    assert all(images is episode.images for _, images in seen)


def test_a_refusal_that_closes_thinking_itself_is_not_followed_by_another_closing(play_scripts) -> None:
    closing = "\n</think>\n\n<answer>"

    def look(call_text: str, images: Sequence[Image.Image]) -> Observation:
        refused = refusal("switched_off", None)
        return replace(refused, text=refused.text + closing)

    [episode], _ = play_scripts(f"<think>\n{CALL}7</answer><|im_end|>", look=look)
    assert episode.trajectory.text.endswith(f"</tool_response>{closing}7</answer>")


# -- limits, watchers and what ends a rollout from outside


def test_a_turn_that_reaches_its_limit_ends_the_answer(play_scripts, processor) -> None:
    first = len(ids_of(f"See {CALL}", processor))
    [cut], engine = play_scripts(f"See {CALL} {ANSWER}", max_turn_tokens=first)
    assert outcome(cut)[0] == "answered"
    [cut], engine = play_scripts(f"See {CALL} {'on and on ' * 9}{ANSWER}", max_turn_tokens=first)
    assert outcome(cut) == ("max_turn_tokens", 1, [None])
    assert engine.continuations[0][0].max_new_tokens == first
    assert cut.trajectory.is_truncated


def test_a_crop_beyond_the_visual_tokens_ends_the_answer_before_it(play_scripts) -> None:
    [free], _ = play_scripts(f"{CALL}{OTHER_CALL}{ANSWER}")
    _, first, second = (image.num_tokens for image in free.example.images)
    [cut], _ = play_scripts(f"{CALL}{OTHER_CALL}{ANSWER}", max_visual_tokens=first + second - 1)
    assert outcome(cut) == ("max_visual_tokens", 2, [None, "too_many_tokens"])
    assert len(cut.example.images) == 2
    [enough], _ = play_scripts(f"{CALL}{OTHER_CALL}{ANSWER}", max_visual_tokens=first + second)
    assert outcome(enough) == ("answered", 3, [None, None])


@pytest.mark.parametrize(
    ("stop", "reason"), [("seconds", "max_seconds"), ("no_room", "no_room"), ("cancelled", "cancelled")]
)
def test_what_the_engine_cuts_keeps_what_was_sampled(stop, reason, play_scripts, processor) -> None:
    [episode], _ = play_scripts(ANSWER)
    cut = Episode(episode.prompt, episode.images, processor, EpisodeRules())
    ids = ids_of("I see red", processor)
    logprobs = [-0.5] * len(ids)
    assert cut.respond(Segment(ids=ids, logprobs=logprobs, drawn_logprobs=logprobs, stop=stop)) is None
    assert outcome(cut) == (reason, 0, [])
    assert cut.is_over and cut.trajectory.text == "I see red" and cut.trajectory.is_truncated


def test_a_stop_text_ends_the_answer_as_complete(play_scripts, processor) -> None:
    [episode], _ = play_scripts(ANSWER)
    stopped = Episode(episode.prompt, episode.images, processor, EpisodeRules(stop_texts=("STOP",)))
    ids = ids_of("I see STOP", processor)
    stopped.respond(Segment(ids=ids, logprobs=[0.0] * len(ids), drawn_logprobs=[0.0] * len(ids), stop="stop_text"))
    assert outcome(stopped) == ("stop_text", 1, []) and not stopped.trajectory.is_truncated


def test_an_error_ends_the_rollout_with_its_reason(play_scripts) -> None:
    [episode], _ = play_scripts(ANSWER)
    episode.fail(ZeroDivisionError("in\nthe tool"))
    assert (episode.trajectory.stop_reason, episode.trajectory.error) == ("error", "ZeroDivisionError: in the tool")


def test_an_episode_asks_the_engine_for_what_its_rules_say(play_scripts, processor) -> None:
    _, engine = play_scripts(ANSWER, max_seconds=2.5, stop_texts=("STOP",), max_new_tokens=70)
    [request] = engine.requests
    tokens = processor.tokenizer.convert_ids_to_tokens(sorted(request.stop_ids))
    assert sorted(tokens) == ["</tool_call>", "<|endoftext|>", "<|im_end|>"]
    assert (request.max_seconds, request.stop_texts, request.max_new_tokens) == (2.5, ("STOP",), 70)


def test_a_watcher_is_told_what_happens_in_its_order(processor, image, play_scripts) -> None:
    told: list[str] = []

    class Notes(Watcher):
        def token(self, token: int, logprob: float) -> None:
            if told[-1:] != ["token"]:
                told.append("token")

        def crop_begun(self, call_text: str) -> None:
            told.append(call_text)

        def crop_done(self, call: ToolCall) -> None:
            told.append(str(call.error))

        def finished(self, trajectory: Trajectory) -> None:
            told.append(trajectory.stop_reason)

    [episode] = start_episodes(question_about("What?", image), processor, EpisodeRules(), watchers=[Notes()])
    play(type(play_scripts(ANSWER)[1])(processor, [f"{CALL}{OUTSIDE}{ANSWER}"]), [[episode]], Sampling(), [0])
    assert told == ["token", CALL, "None", "token", OUTSIDE, "outside", "token", "answered"]


@pytest.mark.parametrize(
    "rules",
    [
        {"max_turns": 0},
        {"max_new_tokens": 0},
        {"thinking_budget": 0},
        {"max_turn_tokens": 0},
        {"max_visual_tokens": 0},
        {"max_seconds": 0.0},
        {"stop_texts": ("",)},
    ],
)
def test_a_limit_below_one_is_refused_by_name(rules) -> None:
    with pytest.raises(ConfigError, match=next(iter(rules))):
        EpisodeRules(**rules)


def test_an_episode_goes_on_from_earlier_turns_with_their_crops(processor, image) -> None:
    other = image.rotate(180)
    earlier = (user("Q", image, other), assistant(f"{CALL} A"), user("R"))
    [episode] = start_episodes(Conversation(messages=earlier), processor, EpisodeRules())
    assert processor.decode(episode.prompt.input_ids) == (
        f"<|im_start|>user\n\n\nQ<|im_end|>\n<|im_start|>assistant\n{CALL} A<|im_end|>\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [one.size for one in episode.prompt.images[:2]] == [processor.overview_size(Size(160, 120))] * 2
    assert len(episode.prompt.images) == 3 and not any(episode.prompt.loss_mask)
    assert [one.tobytes() for one in episode.images] == [image.tobytes(), other.tobytes()]
