"""Conversion: what comes back is what went in, and what a format cannot hold is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looktwice.cli import main
from looktwice.config import ConvertConfig
from looktwice.data.sample import Sample, joined
from looktwice.errors import DataError
from looktwice.formats.catalogue import FORMATS
from looktwice.formats.convert import convert_file
from looktwice.formats.reading import Fields, Reading
from looktwice.formats.sample_file import read_samples
from looktwice.formats.writing import Writing
from looktwice.geometry import BOX_FRAMES, Box
from looktwice.messages import Conversation, ImagePart, Message, TextPart, assistant, system, user

BASE = Path("pictures")
FULL = ("messages", "openai", "swift", "ovis", "sharegpt")
"""Formats of whole conversations."""

# -- any sample comes back from any format that can hold it

MARKS = (
    "<image>", "<image>\n", "<video>", "&lt;image>", "&amp;lt;image>", "&#123;", "&amp;#123;", "&", "\n", " ",
    "é\u2028", "<|im_end|>", "<ovis_visual_atom>", "{Crop", "{crop a [1, 2, 3, 4]}", "{", "}", "[",
    '{"bbox_2d": [1, 2, 3, 4]}', '"bbox_2d"', '{"label": "a", "bbox_2d": [1]}', "<think>", "</think>",
)  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(MARKS), st.text(max_size=3)), min_size=1, max_size=6).map("".join)
WORDS = TEXTS.filter(lambda text: text.strip())
USER_TEXTS = st.one_of(WORDS, st.just("<tool_call>"), st.just("</tool_call> <answer>"))
BOXES = st.tuples(*[st.one_of(st.integers(-9, 99), st.floats(0, 9))] * 4).map(
    lambda sides: Box(*map(float, (sides[0], sides[1], sides[0] + 1 + abs(sides[2]), sides[1] + 1 + abs(sides[3]))))
)
CALLS = st.one_of(
    st.sampled_from(["[1, 2, 30, 40]", "[1.50,2, 30,40]", "Crop a [1, 2, 30, 40]", "[.5, 0, 1, 1]", "[1, 2, 3e1, 40]"]),
    BOXES.map(lambda box: str([int(side) if side.is_integer() else side for side in box])),
    st.sampled_from(["image 2 [1, 2, 30, 40]", "image 0 [1, 2, 30, 40]", "Crop a in picture 3 [1.50, 2, 30, 40]"]),
).map(lambda box: f"<tool_call>{box}</tool_call>")
ANSWERS = st.lists(st.one_of(WORDS, CALLS), min_size=1, max_size=4).map("".join)
IMAGES = st.sampled_from(["a.png", "b c/ä.jpg", "/c.png"]).map(lambda name: ImagePart(source=BASE / name))
EXTRA = st.dictionaries(st.sampled_from(["id", "source", "note"]), st.one_of(st.integers(), TEXTS), max_size=2)


def message(role: str, parts: st.SearchStrategy, *, is_trained: bool = True) -> st.SearchStrategy:
    made = parts.map(lambda some: joined(Message(role=role, parts=tuple(some), is_trained=is_trained)))
    return made.filter(lambda one: any(isinstance(part, ImagePart) or part.text.strip() for part in one.parts))


def texts(of: st.SearchStrategy) -> st.SearchStrategy:
    return of.map(lambda text: TextPart(text=text))


USERS = message("user", st.lists(st.one_of(texts(USER_TEXTS), texts(TEXTS), IMAGES), min_size=1, max_size=4))
SYSTEMS = message("system", texts(USER_TEXTS).map(lambda part: [part]))
ASSISTANTS = message("assistant", texts(ANSWERS).map(lambda part: [part]))
UNTRAINED = message("assistant", texts(ANSWERS).map(lambda part: [part]), is_trained=False)
ILLUSTRATED = message("assistant", st.lists(st.one_of(texts(ANSWERS), IMAGES), min_size=1, max_size=3))
WHOLE = st.tuples(
    st.lists(SYSTEMS, max_size=1), st.lists(st.one_of(USERS, ASSISTANTS, UNTRAINED, ILLUSTRATED), max_size=3), USERS
).map(lambda parts: [*parts[0], *parts[1], parts[2]])
ONE_QUESTION = st.tuples(IMAGES, texts(USER_TEXTS.filter(str.strip)), ASSISTANTS).map(
    lambda parts: [Message(role="user", parts=parts[:2]), parts[2]]
)


def samples(messages: st.SearchStrategy) -> st.SearchStrategy[Sample]:
    return st.builds(
        Sample,
        conversation=messages.map(lambda some: Conversation(messages=tuple(some))),
        box_frame=st.sampled_from([None, *BOX_FRAMES]),
        solution=st.sampled_from(["red", "<image>", "a/b", ("cup", "mug")]),
        gold_box=st.one_of(st.none(), BOXES),
        where=st.just("d:1"),
        field=st.just(""),
        extra=EXTRA,
    )


def written(name: str, *given: Sample) -> tuple[list[dict[str, object]], Writing]:
    writing = Writing(image_base_path=BASE)
    return json.loads(json.dumps(FORMATS[name].write(given, writing))), writing


def read(name: str, rows: Sequence[dict[str, object]]) -> list[Sample]:
    """The samples of rows, without their place."""
    reading = Reading(image_base_path=BASE)
    fields = [Fields(row, known=(), where="d:1", path="", problems=reading.problems) for row in rows]
    found = [replace(sample, field="") for row in fields for sample in FORMATS[name].read(row, reading)]
    assert reading.problems == []
    assert not reading.ignored
    return found


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_one_question_about_one_image_comes_back_from_every_format(name: str, data: st.DataObject) -> None:
    sample = data.draw(samples(ONE_QUESTION))
    rows, writing = written(name, sample)
    assert read(name, rows) == [sample]
    assert not writing.left_out
    assert set(writing.lost.counts) <= {"the crops, which need files of their own here"}


@pytest.mark.parametrize("name", FORMATS)
def test_several_gold_boxes_come_back_from_every_format(name: str) -> None:
    image = Message(role="user", parts=(ImagePart(source=BASE / "a.png"), TextPart(text="What?")))
    conversation = Conversation(messages=(image, assistant("<answer>cup</answer>")))
    boxes = (Box(1.0, 2.0, 3.0, 4.0), Box(5.0, 6.0, 7.0, 8.5))
    sample = Sample(conversation=conversation, gold_box=boxes[0], more_gold_boxes=boxes[1:], where="d:1", field="")
    assert [one.gold_boxes for one in read(name, written(name, sample)[0])] == [boxes]


@pytest.mark.parametrize("name", FULL)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_conversation_comes_back_from_every_format_of_conversations(name: str, data: st.DataObject) -> None:
    sample = data.draw(samples(WHOLE))
    rows, writing = written(name, sample)
    if writing.left_out:
        assert (name, rows, list(writing.left_out.counts)) == ("openai", [], ["a picture in an assistant turn"])
        return
    if writing.lost:
        assert (name, list(writing.lost.counts)) == ("sharegpt", ["that an assistant turn is not trained"])
        messages = tuple(replace(message, is_trained=True) for message in sample.conversation.messages)
        sample = replace(sample, conversation=Conversation(messages=messages))
    assert read(name, rows) == [sample]


def test_an_answer_with_images_that_are_no_crops_needs_files_before_them_in_vlm_r3() -> None:
    call = "<tool_call>[1, 2, 30, 40]</tool_call>"
    shown = Message(
        role="assistant", parts=(TextPart(text="Here: "), ImagePart(source=BASE / "c.png"), TextPart(text=call))
    )
    sample = Sample(conversation=Conversation(messages=(user("Q", BASE / "a.png"), shown)), where="d:1", field="")
    rows, _ = written("vlm_r3", sample)
    assert rows[0]["response_list"] == ["Here: ", '{"bbox_2d": [1, 2, 30, 40]}']
    assert rows[0]["img_crop_list"] == ["c.png"]
    assert read("vlm_r3", rows) == [replace(sample, extra={"img_crop_list": ["c.png"]})]
    turned = replace(shown, parts=shown.parts[::-1])
    rows, writing = written(
        "vlm_r3", replace(sample, conversation=Conversation(messages=(user("Q", BASE / "a.png"), turned)))
    )
    assert (rows, list(writing.left_out.counts)) == ([], ["a picture in the answer after a crop that has no file"])


# -- what a format cannot hold

QUESTION, ANSWER = user("Q", BASE / "a.png"), assistant("A")


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("documented", (system("S"), QUESTION, ANSWER), "a system turn"),
        ("documented", (QUESTION, ANSWER, user("R"), ANSWER), "several turns"),
        ("documented", (QUESTION,), "a question without an answer"),
        ("documented", (user("Q"), ANSWER), "a question that is not one picture and then a text"),
        ("documented", (user("Q", "a.png", "b.png"), ANSWER), "a question that is not one picture and then a text"),
        ("documented", (user(" ", "a.png"), ANSWER), "a question without words"),
        ("vlm_r3", (user(" ", "a.png"), ANSWER), "a question without words"),
        ("vlm_r3", (QUESTION,), "a question without an answer"),
        ("vlm_r3", (system("S"), QUESTION, ANSWER), "a system turn"),
    ],
)
def test_samples_that_do_not_fit_are_left_out_by_reason(name: str, messages: tuple[Message, ...], reason: str) -> None:
    sample = Sample(conversation=Conversation(messages=messages), where="d:1", field="")
    rows, writing = written(name, sample)
    assert (rows, writing.left_out.counts, writing.left_out.places) == ([], {reason: 1}, {reason: ["d:1"]})


def test_what_a_written_sample_loses_is_said() -> None:
    sample = Sample(
        conversation=Conversation(messages=(QUESTION, replace(assistant("<answer>x</answer>"), is_trained=False))),
        where="d:1",
        field="",
        extra={"messages": 1, "Q": 2, "id": 3},
    )
    rows, writing = written("documented", sample)
    assert rows == [{"image_path": "a.png", "QnA": [{"id": 3, "Q": "Q", "A3": "<answer>x</answer>"}]}]
    assert set(writing.lost.counts) == {
        "that an assistant turn is not trained",
        "that the answer block is not the gold answer",
        'the field "Q", a name with a meaning here',
        'the field "messages", a name with a meaning here',
    }


def test_questions_of_one_row_stand_together_again() -> None:
    row = {"image_path": "a.png", "QnA": [{"Q": "Q", "A3": "A"}, {"Q": "R", "A3": "B"}]}
    rows, _ = written("documented", *read("documented", [row]))
    assert rows == [row]
    assert len(written("messages", *read("documented", [row]))[0]) == 2


@pytest.mark.parametrize("address", ["data:image/png;base64,iVBORw0KGgo=", "/elsewhere/a.png"])
def test_images_inside_the_row_and_absolute_paths_stay_as_they_are(address: str) -> None:
    row = {"image_path": address, "question": "Q", "answer": "A"}
    [sample] = read("vlm_r3", [row])
    for name in FULL:
        rows, _ = written(name, sample)
        assert address in json.dumps(rows)
        assert read(name, rows) == [sample]


# -- files and the command

ROW = {"image_path": "a.png", "id": 7, "QnA": [{"Q": "Q", "A3": "{Crop a [1, 2, 3, 4]} <answer>x</answer>"}]}
TWO_TURNS = {"messages": [{"role": name, "content": "x"} for name in ("user", "assistant", "user", "assistant")]}


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: object) -> Path:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".jsonl.gz"])
@pytest.mark.parametrize("name", [*FULL, "documented"])
def test_a_file_comes_back_through_another_format_and_container(name: str, suffix: str, file, tmp_path: Path) -> None:
    source, there, back = file(ROW, ROW), tmp_path / f"there{suffix}", tmp_path / "back.jsonl"
    done = convert_file(source, there, ConvertConfig(target_format=name))
    assert (done.source_format, done.num_rows, done.num_samples, done.num_written) == ("documented", 2, 2, 2)
    convert_file(there, back, ConvertConfig(target_format="documented"))
    read_again = [replace(sample, where="") for sample in read_samples(back, "")]
    assert read_again == [replace(sample, where="") for sample in read_samples(source, "")]


def test_nothing_is_written_when_something_would_be_lost(file, tmp_path: Path, capsys) -> None:
    question = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Q"}]
    one_question = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "A"}]}
    source, target = file(TWO_TURNS, TWO_TURNS, one_question), tmp_path / "out.jsonl"
    words = ["data", "convert", str(source), str(target), "--to", "documented"]
    assert main(words) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"looktwice: {target}: not written, as the format cannot hold everything; with")
    assert "left out:\n  2 x several turns" in message and f"({source}:1, {source}:2)" in message
    assert not target.exists()
    assert main([*words, "--allow_loss"]) == 0
    assert "left out:\n  2 x several turns" in capsys.readouterr().out
    assert len(target.read_text().splitlines()) == 1


def test_a_file_of_no_row_is_not_written(file, tmp_path: Path, capsys) -> None:
    source, target = file(TWO_TURNS, TWO_TURNS), tmp_path / "out.jsonl"
    assert main(["data", "convert", str(source), str(target), "--to", "documented", "--allow_loss"]) == 1
    assert f"{target}: not written, as no sample can stand in this format" in capsys.readouterr().err
    assert not target.exists()


def test_the_command_says_what_it_read_and_wrote(file, tmp_path: Path, capsys) -> None:
    assert main(["data", "convert", str(file(ROW)), str(tmp_path / "out.json"), "--to", "ovis"]) == 0
    assert capsys.readouterr().out == "read 1 row of the format documented: 1 sample\n1 row of the format ovis\n" + (
        f"read otherwise:\n  1 x crop commands are calls now, without their words ({tmp_path / 'in.jsonl'}:1)\n"
    )
    [row] = json.loads((tmp_path / "out.json").read_text())
    assert row["conversations"][0] == {"from": "human", "value": "<image>\nQ"}


def test_a_bad_row_and_a_file_onto_itself_are_refused(file, tmp_path: Path) -> None:
    source = file(ROW, {"image_path": "a.png", "QnA": [{"Q": "Q"}]})
    with pytest.raises(
        DataError, match=r"1 problem in .*in\.jsonl:\n  .*in\.jsonl:2: QnA\[0\]\.A3: the field is missing"
    ):
        convert_file(source, tmp_path / "out.jsonl", ConvertConfig())
    with pytest.raises(DataError, match="the file to read from"):
        convert_file(source, source, ConvertConfig())
    with pytest.raises(DataError, match="holds no records"):
        convert_file(file(), tmp_path / "out.jsonl", ConvertConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_names_that_mean_nothing_below_the_row_count_as_lost(file, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "x", "name": "Ann"}]}
    with pytest.raises(DataError, match='1 x "name" of a message'):
        convert_file(file(row), tmp_path / "out.jsonl", ConvertConfig())


def test_an_unknown_sub_command_names_the_nearest(capsys) -> None:
    assert main(["data", "convrt"]) == 1
    assert 'unknown command "convrt". Did you mean "convert"?' in capsys.readouterr().err
    assert main(["data"]) == 0
    assert "convert" in capsys.readouterr().out
