"""Questions on their way: what is told while an answer is written, streams, chats, and many on one engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from looktwice.asking.asked import Asked, begin
from looktwice.asking.events import Cropped, Done, Event, Said, Thinking
from looktwice.config import AnswerConfig
from looktwice.engine.sampling import Sampling
from looktwice.errors import ConfigError, ImageError
from looktwice.inference import OvisInference
from looktwice.messages import question_about
from looktwice.rollout.episode import play

SCRIPT = "<think>\nHm. <tool_call>[2, 4, 60, 80]</tool_call>\nIt is red.\n</think>\n\n<answer>red</answer><|im_end|>"


@pytest.fixture(scope="module")
def inference(model_folder: Path) -> OvisInference:
    return OvisInference(model_folder, device="cpu", max_new_tokens=12)


@pytest.fixture
def scripted(processor, image):
    """The events of a scripted answer."""

    def run(script: str, **settings: object) -> tuple[Asked, list[Event]]:
        from tests.conftest import ScriptedEngine

        events: list[Event] = []
        question, generation = question_about("What?", image), AnswerConfig(**settings)
        [asked] = begin(question, processor, generation, seed_of=len, tells=[events.append])
        play(ScriptedEngine(processor, [script]), [[asked.episode]], Sampling(), [0])
        return asked, events

    return run


def texts(events: list[Event], kind: type) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def test_events_come_in_the_order_in_which_the_model_writes(scripted) -> None:
    asked, events = scripted(SCRIPT)
    kinds = [event.kind for event in events]
    assert list(dict.fromkeys(kinds)) == ["thinking", "crop", "answer", "done"] and kinds.count("done") == 1
    assert texts(events, Thinking) == "\nHm. \nIt is red.\n"
    assert texts(events, Said).strip() == "red" == asked.answer.said
    place = kinds.index("crop")
    assert texts(events[:place], Thinking) == "\nHm. " and kinds[place + 1] == "thinking"
    assert events[-1].answer is asked.answer


def test_a_crop_is_told_with_its_box_and_its_region(scripted, image: Image.Image) -> None:
    _, events = scripted(SCRIPT)
    [crop] = [event.crop for event in events if isinstance(event, Cropped)]
    assert crop.box == (2, 4, 60, 80) and crop.text == "<tool_call>[2, 4, 60, 80]</tool_call>"
    assert crop.image.tobytes() == image.crop((2, 4, 60, 80)).tobytes()


def test_a_refused_crop_is_told_with_its_reason(scripted) -> None:
    _, events = scripted(SCRIPT.replace("[2, 4, 60, 80]", "nothing"))
    [crop] = [event.crop for event in events if isinstance(event, Cropped)]
    assert (crop.box, crop.error, crop.image) == (None, "no_box", None)


def test_the_text_that_closes_thinking_is_told(scripted) -> None:
    _, events = scripted("<think>\nHm, hm, hm, hm, hm.<answer>red</answer><|im_end|>", thinking_budget=4)
    assert "Considering the limited time by the user" in texts(events, Thinking)


def test_an_answer_has_its_times_and_the_history_to_go_on_with(scripted) -> None:
    asked, _ = scripted(SCRIPT, system="Be short.")
    assert asked.answer.seconds.total >= 0
    roles = [message.role for message in asked.answer.history.messages]
    assert roles == ["system", "user", "assistant"]
    assert asked.answer.history.messages[-1].parts[0].text == "<answer>red</answer>"


@pytest.mark.parametrize(("limit", "reason"), [(0, "switched_off"), (1, "no_more_crops")])
def test_beyond_the_limit_of_crops_a_call_is_refused_and_the_answer_follows(scripted, limit, reason) -> None:
    call = "<tool_call>[2, 4, 60, 80]</tool_call>"
    script = "<think>\n" + call * (limit + 1) + "<answer>red</answer><|im_end|>"
    asked, events = scripted(script, max_crops=limit)
    assert [call.error for call in asked.answer.crops] == [None] * limit + [reason]
    assert "Considering the limited time by the user" in asked.answer.response
    assert asked.answer.parsed.answer_content == "red" == texts(events, Said).strip()


def test_a_stream_gives_what_generate_gives(inference, image) -> None:
    *events, done = inference.stream(image, "What is it?")
    assert isinstance(done, Done) and done.answer == inference.generate(image, "What is it?")
    assert texts(events, Said).strip() == done.answer.said
    assert done.answer.seconds.first <= done.answer.seconds.total


def test_a_stream_judges_its_arguments_at_once(inference) -> None:
    with pytest.raises(ConfigError, match="there is no question"):
        inference.stream()
    with pytest.raises(ImageError, match=r"none\.png: no such picture"):
        inference.stream("none.png", "What?")
    with pytest.raises(ConfigError, match='unknown setting "temprature"'):
        inference.stream(None, "What?", temprature=1)


def test_who_stops_listening_stops_the_model(inference, image) -> None:
    events = inference.stream(image, "What is it?", max_new_tokens=1000)
    next(events)
    events.close()
    assert inference.generate(image, "What is it?") == inference.generate(image, "What is it?")


def test_many_share_one_engine_and_each_hears_its_own(inference, image) -> None:
    questions = [(image, "What is it?"), (None, "And this?"), (image.rotate(90), "Which?")]
    heard: list[list[Event]] = [[] for _ in questions]
    asked = [inference.ask(one, events.append) for one, events in zip(questions, heard)]
    engine = inference.engine(max_rows=2)
    numbers = [number for one in asked for number in engine.submit(one.request)]
    engine.cancel(numbers[1])
    while engine.step():
        pass
    assert [events[-1].kind for events in heard] == ["done"] * 3
    assert [one.answer.stop_reason for one in asked] == ["max_tokens", "cancelled", "max_tokens"]
    assert [asked[place].answer for place in (0, 2)] == [inference.generate(*questions[place]) for place in (0, 2)]


def test_siblings_are_submitted_once_and_drawn_each_by_itself(inference, image) -> None:
    heard: list[list[Event]] = [[], []]
    one, other = inference.ask_times((image, "What?"), [each.append for each in heard], temperature=2.0, seed=1)
    assert one.request is other.request
    engine = inference.engine()
    engine.submit(one.request)
    while engine.step():
        pass
    assert one.answer.response != other.answer.response
    assert [each[-1].answer for each in heard] == [one.answer, other.answer]


def test_a_listener_that_raises_ends_its_own_answer_alone(inference, image) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("gone")

    asked = [inference.ask((image, "What?"), broken), inference.ask((image, "What?"))]
    engine = inference.engine()
    for one in asked:
        engine.submit(one.request)
    while engine.step():
        pass
    assert asked[0].answer.stop_reason == "error" and "gone" in asked[0].answer.error
    assert asked[1].answer.stop_reason == "max_tokens"


def test_a_chat_goes_on_with_its_history(inference, image) -> None:
    first = inference.chat("What is it?", image)
    second = inference.chat("And this?", [image.rotate(90)], history=first.history)
    assert [message.role for message in second.history.messages] == ["user", "assistant"] * 2
    assert len(second.history.images) == 2
    assert second.tokens.prompt > first.tokens.prompt + 30
    assert second != inference.chat("And this?", [image.rotate(90)])


def test_what_is_no_history_is_told(inference) -> None:
    with pytest.raises(ConfigError, match="the history is of type list; give `history` of the answer before"):
        inference.chat("What?", history=[])


def test_a_system_message_is_written_once(inference, image) -> None:
    first = inference.chat("What?", image, system="Be short.")
    second = inference.chat("What?", history=first.history, system="Be long.")
    assert [message.role for message in second.history.messages].count("system") == 1


@pytest.mark.parametrize("kind", ["box", "point"])
def test_grounding_asks_in_the_words_of_the_released_models(inference, image, kind) -> None:
    answer = inference.generate_with_grounding(image, "red cup", kind)
    words = {"box": "bounding box", "point": "point"}[kind]
    question = f"Find the <ref>red cup</ref> in the image. Please provide the {words} coordinates."
    assert answer.history.messages[0].parts[-1].text == question


@pytest.mark.parametrize(
    ("phrase", "kind", "problem"),
    [("cup", "circle", "the kind of grounding is 'circle'; give box or point"), ("", "box", "there is no question")],
)
def test_what_is_no_grounding_is_told(inference, image, phrase, kind, problem) -> None:
    with pytest.raises(ConfigError, match=problem):
        inference.generate_with_grounding(image, phrase, kind)


def test_the_model_is_described_in_a_line(inference, model_folder) -> None:
    assert inference.described.startswith(f"{model_folder}: ")
    assert inference.described.endswith("M parameters, float32 on cpu")


def test_what_is_said_has_its_ids_and_nothing_else_has(scripted) -> None:
    asked, events = scripted(SCRIPT)
    said = [event for event in events if isinstance(event, Said)]
    decode = asked.episode.processor.decode
    told = "".join(decode([token for token, _ in event.tokens]) for event in said)
    assert texts(events, Said).strip() in told and "think" not in told and "tool_call" not in told
    written = asked.episode.trajectory
    logprobs = dict(zip(written.completion_ids, written.sampling_logprobs))
    assert all(logprobs[token] == pytest.approx(logprob, abs=1) for event in said for token, logprob in event.tokens)
