"""Formats: each is recognised, what its rows become, and how each thing wrong with a row is named."""

from __future__ import annotations

import json
import logging
from base64 import b64decode
from pathlib import Path

import pytest
from PIL import Image

from looktwice.data.sample import Sample
from looktwice.errors import DataError, ImageError
from looktwice.formats import sample_file
from looktwice.formats.catalogue import FORMATS, detect
from looktwice.formats.sample_file import SampleFile, read_samples
from looktwice.formats.writing import write_rows
from looktwice.geometry import Box
from looktwice.messages import ImagePart, Message, TextPart, assistant, system, user
from looktwice.processing.images import image_size, open_image

FOLDER = Path(__file__).parent / "rows"
A, B = Path("p/a.png"), Path("p/b.png")
CALL = "<tool_call>[1, 2, 30, 40]</tool_call>"
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)


def untrained(text: str) -> Message:
    return Message(role="assistant", parts=(TextPart(text=text),), is_trained=False)


def messages_of(sample: Sample) -> list[Message]:
    return list(sample.conversation.messages)


# -- the same little file in every format

THOUGHT = "<think>\nCloser: <tool_call>[10, 20, 60.5, 80]</tool_call>\nIt is red.\n</think>\n\n<answer>red</answer>"


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_each_format_is_recognised_and_read(name: str) -> None:
    [path] = FOLDER.glob(f"{name}.*")
    file = SampleFile(path, "p")
    assert (file.format.name, len(file), file.num_samples) == (name, 2 if name != "documented" else 1, 2)
    first, second = read_samples(path, "p")
    assert messages_of(first) == [user("Which colour is the cup?", A), assistant(THOUGHT)]
    assert (first.solution, second.solution) == ("red", "two")
    assert [file.sample(0), file.sample(1)] == [first, second]
    with pytest.raises(IndexError):
        file.sample(2)


def test_samples_of_a_documented_row_are_counted_and_found(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = [{"image_path": "a.png", "QnA": [{"Q": f"{n}.{k}", "A3": "A"} for k in range(n)]} for n in (1, 3, 2)]
    path.write_text("\n".join(map(json.dumps, rows)))
    file = SampleFile(path, "p")
    assert (len(file), file.num_samples) == (3, 6)
    assert [file.sample(number).question for number in range(6)] == ["1.0", "3.0", "3.1", "3.2", "2.0", "2.1"]
    assert [sample.field for sample in file.samples_of(1)] == ["QnA[0].A3", "QnA[1].A3", "QnA[2].A3"]


def test_a_row_is_read_once_for_all_its_questions(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "d.jsonl"
    rows = [{"image_path": "a.png", "QnA": [{"Q": f"{n}.{k}", "A3": "A"} for k in range(3)]} for n in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    file = SampleFile(path, "p")
    read_rows = []
    read_row = file.read_row
    monkeypatch.setattr(file, "read_row", lambda row, reading: read_rows.append(row) or read_row(row, reading))
    numbers = [0, 4, 8, 5, 1, 2, 7, 3, 6]
    assert [file.sample(number).question for number in numbers] == [f"{n // 3}.{n % 3}" for n in numbers]
    assert read_rows == [0, 1, 2]


def test_no_more_samples_are_remembered_than_fit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sample_file, "SAMPLES_KEPT", 5)
    path = tmp_path / "d.jsonl"
    rows = [{"image_path": "a.png", "QnA": [{"Q": "Q", "A3": "A"}] * number} for number in (2, 2, 9, 1, 2)]
    path.write_text("\n".join(map(json.dumps, rows)))
    file = SampleFile(path, "p")
    kept = []
    for number in (0, 2, 0, 4, 13, 14):
        file.sample(number)
        kept.append([*file._kept])
    assert kept == [[0], [0, 1], [1, 0], [2], [2], [4]]


def test_a_broken_row_is_an_error_for_that_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "x"}]}\n{"messages": \n{"messages": []}\n')
    file = SampleFile(path, "p")
    assert (file.num_samples, file.sample(0).question) == (3, "x")
    with pytest.raises(DataError, match=r"d\.jsonl:2: broken JSON"):
        file.samples_of(1)
    with pytest.raises(DataError, match=r"d\.jsonl:3: messages\[0\]\.content: there is no user turn"):
        file.sample(2)


# -- detection


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ([{"conversations": []}, {"conversations": [], "images": ["a"]}], "sharegpt"),
        ([{"messages": []}, {"messages": [{"content": [{"type": "image_url"}]}]}], "openai"),
        ([{"messages": []}, {"messages": [], "images": []}], "swift"),
        ([{"image_path": "a", "question": "q", "answer": "a"}], "vlm_r3"),
        ([{"image_path": "a", "question": "q", "answer": "a", "QnA": []}], "documented"),
        ([], "documented"),
    ],
)
def test_a_file_is_known_by_its_first_rows(rows: list[dict[str, object]], name: str) -> None:
    assert detect(rows, "d").name == name


def test_rows_of_no_format_or_of_several_are_refused(read) -> None:
    with pytest.raises(
        DataError, match='no format fits, the rows have "title", "tags"; known are .*ovis: conv'
    ) as caught:
        read({"title": 1, "tags": [{"name": 2}]})
    assert "is the list" not in str(caught.value)
    with pytest.raises(DataError, match='If the rows are the list under "data", write it alone into a file'):
        read({"tags": [], "data": [{"messages": []}]})
    with pytest.raises(DataError, match=r"several formats \(1 messages, 1 documented\); split the file, or name one"):
        read({"messages": []}, {"QnA": []})
    with pytest.raises(DataError, match='"oviss" is no format; .* Did you mean "ovis"'):
        read({"messages": []}, data_format="oviss")


# -- documented


def test_a_named_key_holds_the_answer(read) -> None:
    row = {"image_path": "a.png", "QnA": [{"Q": "Q", "A3": "three", "A1": "one"}]}
    [sample] = read(row, answer_key="A1")
    assert (sample.response, sample.field, sample.extra) == ("one", "QnA[0].A1", {"A3": "three"})
    with pytest.raises(DataError, match=r"QnA\[0\]\.A2: the field is missing"):
        read(row, answer_key="A2")


def test_a_field_of_row_and_question_keeps_the_questions_and_says_so(read, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        [sample] = read({"image_path": "a.png", "id": 1, "QnA": [{"Q": "Q", "A3": "A", "id": 2}]})
    assert sample.extra == {"id": 2}
    assert 'ignored: 1 x "id" of the row' in caplog.text


def test_gold_fields_may_stand_in_the_row(read, caplog) -> None:
    alone = {"image_path": "a.png", "box_frame": "unit", "answer": "b", "QnA": [{"Q": "Q", "A": "A"}]}
    several = {**alone, "QnA": [{"Q": "Q", "A": "A"}, {"Q": "R", "A": "A", "box_frame": "norm1000"}]}
    with caplog.at_level(logging.WARNING):
        samples = read(alone, several)
    assert [(one.box_frame, one.solution) for one in samples] == [("unit", "b"), ("unit", ""), ("norm1000", "")]
    assert 'ignored: 1 x "answer" of a row with several questions' in caplog.text
    with pytest.raises(DataError, match=r"QnA\[0\]\.box_frame: 'nonsense' is no frame"):
        read({**alone, "box_frame": "nonsense"})


def test_an_escaped_command_is_text(read) -> None:
    [sample] = read(
        {"image_path": "a.png", "QnA": [{"Q": "Q", "A3": "&#123;Crop a [1, 2, 3, 4]} &amp;#123;crop &#123;"}]}
    )
    assert sample.response == "{Crop a [1, 2, 3, 4]} &#123;crop &#123;"


# -- messages


def test_images_may_stand_in_any_turn_and_several_in_one(read) -> None:
    [sample] = read(
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "a.png"},
                        {"type": "text", "text": "This"},
                        {"type": "text", "text": "and"},
                        {"type": "image", "image": "/b.png"},
                    ],
                },
                {"role": "assistant", "content": "<answer>1</answer>", "train": False},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///c%20d.png"}}]},
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "<answer>2"}, {"type": "text", "text": "</answer>"}],
                },
            ],
            "box": [1, 2, 3, 4],
            "answer": "zwei",
            "id": 7,
        }
    )
    assert messages_of(sample) == [
        system("Be brief."),
        Message(role="user", parts=(ImagePart(source=A), TextPart(text="This\nand"), ImagePart(source=Path("/b.png")))),
        untrained("<answer>1</answer>"),
        Message(role="user", parts=(ImagePart(source=Path("/c d.png")),)),
        assistant("<answer>2</answer>"),
    ]
    assert sample.prompt.messages == sample.conversation.messages[:-1]
    assert (sample.solution, sample.gold_box, sample.extra, sample.field) == (
        "zwei",
        Box(1, 2, 3, 4),
        {"id": 7},
        "messages[4].content",
    )
    assert sample.image_paths == [A, Path("/b.png"), Path("/c d.png")]


def test_a_crop_part_is_a_call_and_says_its_frame(read) -> None:
    crop = {"type": "crop", "box": [1, 2.50, 30, 40], "frame": "norm1000"}
    content = [{"type": "text", "text": "Look: "}, crop, {"type": "text", "text": " red"}]
    [sample] = read({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": content}]})
    assert sample.response == "Look: <tool_call>[1, 2.5, 30, 40]</tool_call> red"
    assert sample.box_frame == "norm1000"


def test_a_crop_part_names_its_picture_by_number(read) -> None:
    crop = {"type": "crop", "box": [1, 2, 30, 40], "image_number": 2}
    [sample] = read({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": [crop]}]})
    assert sample.response == "<tool_call>image 2 [1, 2, 30, 40]</tool_call>"


def test_the_caller_says_the_frame_where_the_row_does_not(read) -> None:
    row = {"messages": [{"role": "user", "content": "Q"}]}
    frames = [sample.box_frame for sample in read(row, {**row, "box_frame": "unit"}, box_frame="norm1000")]
    assert frames == ["norm1000", "unit"]


def test_a_conversation_that_ends_in_a_question_is_a_prompt_as_a_whole(read) -> None:
    [sample] = read({"messages": [{"role": "user", "content": "Q"}], "answer": "7"})
    assert (sample.prompt, sample.response, sample.solution) == (sample.conversation, "", "7")


def user_row(content: object, **fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}], **fields}


def said(content: object, **fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": content, **fields}]}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": 5}, "messages: a number where a list belongs"),
        ({"messages": "hi"}, 'messages: a text where a list belongs; write [{"role": "user", "content": …}]'),
        ({"messages": ["hi"]}, "messages[0]: a text where an object belongs"),
        ({"messages": [{"role": "usr", "content": "x"}]}, 'messages[0].role: "usr" is no role; write one of system, '),
        ({"messages": [{"content": "x"}]}, "messages[0].role: the field is missing"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages[0].content: there is no user turn"),
        (user_row(""), "messages[0].content: the text is empty"),
        (user_row(None), "messages[0].content: null where a text belongs"),
        (user_row([]), "messages[0].content: the message is empty"),
        (user_row([{"type": "text", "text": " "}]), "messages[0].content: the message is empty"),
        (user_row([{"text": "x"}]), "messages[0].content[0].type: the field is missing"),
        (
            user_row([{"type": "video", "video": "x"}]),
            'content[0].type: "video" cannot stand here; write one of text, ',
        ),
        (user_row([{"type": "crop", "box": [1, 2, 3, 4]}]), 'content[0].type: "crop" cannot stand here'),
        (user_row([{"type": "image", "image": 3}]), "content[0].image: a number where a text belongs"),
        (user_row([{"type": "image", "path": "a.png"}]), "content[0].image: the field is missing"),
        (
            user_row([{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}]),
            "content[0].image_url.url: https://x.org/a.png is a web address; download the picture and write its path",
        ),
        (
            user_row([{"type": "image", "image": "data:image/png,x"}]),
            "content[0].image: a data: URL without a base64",
        ),
        (said([{"type": "crop", "box": [3, 2, 1, 4]}]), "messages[1].content[0].box: a box runs from top-left"),
        (said([{"type": "crop", "box": "here"}]), "messages[1].content[0].box: a box has 4 numbers"),
        (said([{"type": "crop"}]), "messages[1].content[0].box: the field is missing"),
        (
            said([{"type": "crop", "box": [1, 2, 3, 4], "frame": "px"}]),
            "content[0].frame: 'px' is no frame; write one of",
        ),
        (said("<tool_call>[1]</tool_call>"), "messages[1].content: call 1: a box has 4 numbers"),
        (said("x", train="no"), "messages[1].train: 'no'; write false or true"),
        (said("<answer>x"), "messages[1].content: the <answer> block is empty or not closed"),
        (user_row("x", box=[1]), "box: a box has 4 numbers"),
        (user_row("x", box_frame="units"), "box_frame: 'units' is no frame; write one of original_px, "),
        (
            {**said([{"type": "crop", "box": [1, 2, 3, 4], "frame": "unit"}]), "box_frame": "norm1000"},
            "box_frame: boxes in 2 frames (norm1000, unit); write all in one",
        ),
    ],
)
def test_a_bad_message_is_named(row: dict[str, object], problem: str, read) -> None:
    with pytest.raises(DataError) as caught:
        read(row)
    head, line = str(caught.value).splitlines()
    assert head.startswith("1 problem in ")
    assert f"d.jsonl:1: {problem}" in line or (problem.startswith("content") and problem in line)


# -- ovis and sharegpt


def turns(*values: tuple[str, str], **fields: object) -> dict[str, object]:
    return {"conversations": [{"from": name, "value": value} for name, value in values], **fields}


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("<image>\nQ", (ImagePart(source=A), TextPart(text="Q"))),
        ("<image>Q", (ImagePart(source=A), TextPart(text="Q"))),
        ("Q\n<image>", (TextPart(text="Q"), ImagePart(source=A))),
        ("Q <image> R", (TextPart(text="Q "), ImagePart(source=A), TextPart(text=" R"))),
        ("<image>\n&lt;image> &amp;lt;image>", (ImagePart(source=A), TextPart(text="<image> &lt;image>"))),
        ("<image>", (ImagePart(source=A),)),
    ],
)
def test_placeholders_are_places_of_images_on_lines_of_their_own(value: str, parts: tuple[object, ...], read) -> None:
    [sample] = read(turns(("human", value), ("gpt", "A"), image="a.png"))
    assert messages_of(sample)[0] == Message(role="user", parts=parts)


def test_ignored_turns_are_kept_and_not_trained(read) -> None:
    [sample] = read(
        turns(
            ("system", "S"),
            ("human", "<image>\nQ"),
            ("ignored_gpt", "A"),
            ("human", "R <image>"),
            ("gpt", CALL),
            image=["a.png", "b.png"],
            id=7,
        )
    )
    assert messages_of(sample) == [
        system("S"),
        user("Q", A),
        untrained("A"),
        Message(role="user", parts=(TextPart(text="R "), ImagePart(source=B))),
        assistant(CALL),
    ]
    assert sample.extra == {"id": 7}


def test_sharegpt_puts_images_without_a_place_before_the_first_question(read) -> None:
    row = turns(("human", "Q"), ("gpt", "A"), images=["a.png", "b.png"], system="S")
    [sample] = read(row)
    assert messages_of(sample) == [system("S"), user("Q", A, B), assistant("A")]
    with pytest.raises(DataError, match=r"conversations: 0 <image> for 2 pictures; write one .*, and &lt;image> for"):
        read(row, data_format="ovis")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (turns(("human", "<image>"), ("gpt", "A")), "conversations: 1 <image> for 0 pictures"),
        (
            turns(("human", "Q"), ("gpt", "A"), video="v.mp4"),
            "video: videos and sounds cannot be trained on here; remove the row",
        ),
        (turns(("human", "<video> Q"), ("gpt", "A")), "conversations[0].value: <video> for a video; write &lt;video>"),
        (
            turns(("tool", "Q")),
            'conversations[0].from: "tool" is no role; write one of system, human, user, gpt, assistant, ignored_gpt',
        ),
        (turns(("gpt", "A")), "conversations[0].value: there is no user turn"),
        (turns(("human", " ")), "conversations[0].value: the text is empty"),
        (turns(("human", "<image>Q"), image=7), "image: a number where a text belongs"),
        (turns(("human", "<image><image>"), image=["a", ""]), "image[1]: the text is empty"),
        (turns(("human", "<image>"), image="a", images=["b"]), 'images: beside "image"; write all pictures in one'),
        (turns(("human", "Q"), ("gpt", "<tool_call>")), "conversations[1].value: <tool_call> is not closed"),
        ({"conversations": [{"from": "human"}]}, "conversations[0].value: the field is missing"),
        ({"conversations": {}}, "conversations: an object where a list belongs"),
    ],
)
def test_a_bad_turn_is_named(row: dict[str, object], problem: str, read) -> None:
    with pytest.raises(DataError) as caught:
        read(row)
    assert f"d.jsonl:1: {problem}" in str(caught.value)
    assert str(caught.value).startswith("1 problem in ")


def test_other_names_of_the_two_speakers_are_read_too(read) -> None:
    [sample] = read(turns(("user", "Q"), ("assistant", "A")))
    row = {"conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    assert messages_of(sample) == messages_of(read(row)[0]) == [user("Q"), assistant("A")]
    with pytest.raises(DataError, match=r"conversations\[1\]\.content: the text is empty"):
        read({"conversations": [row["conversations"][0], {"role": "assistant", "content": ""}]})


# -- swift


def beside(*contents: object, **fields: object) -> dict[str, object]:
    roles = ("user", "assistant") * 2
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    return {"messages": messages, "images": ["a.png", "b.png"], **fields}


def test_images_beside_the_messages_go_to_their_places(read) -> None:
    untold, told, listed = read(
        beside("Q", "A", system="S", objects={"ref": [], "bbox": []}),
        beside("<image>Q", "See <image>", "&lt;image>?", CALL, id=7),
        beside([{"type": "image"}, {"type": "text", "text": "<image>"}, {"type": "image", "image": None}], "A"),
    )
    assert messages_of(untold) == [system("S"), user("Q", A, B), assistant("A")]
    shown = Message(role="assistant", parts=(TextPart(text="See "), ImagePart(source=B)))
    assert messages_of(told) == [user("Q", A), shown, user("<image>?"), assistant(CALL)]
    assert told.extra == {"id": 7}
    parts = (ImagePart(source=A), TextPart(text="<image>"), ImagePart(source=B))
    assert messages_of(listed) == [Message(role="user", parts=parts), assistant("A")]


@pytest.mark.parametrize("mark", ["loss", "train", "weight"])
def test_a_message_without_loss_is_not_trained(mark: str, read) -> None:
    row = beside("Q", "A")
    row["messages"][1][mark] = 0
    [sample] = read(row)
    assert messages_of(sample) == [user("Q", A, B), untrained("A")]


def test_fields_of_a_part_that_mean_nothing_are_named(read, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        read(beside([{"type": "text", "text": "Q", "weight": 3}], "A"))
    assert 'ignored: 1 x "weight" of a part of type text' in caplog.text


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (beside("<image> Q", "A"), "messages: 1 <image> for 2 pictures; write one where each belongs"),
        (beside("Q", "A", objects={"bbox": [[1, 2, 3, 4]]}), "objects: boxes beside the messages are not read"),
        (beside("Q", "A", videos=["v.mp4"]), "videos: videos and sounds cannot be trained on here"),
        (beside([{"type": "image", "image": "a.png"}], "A"), "messages[0].content[0].type: the row names its pictures"),
        (beside([{"type": "audio"}], "A"), 'messages[0].content[0].type: "audio" cannot stand here; write one of text'),
        ({**beside("<audio>Q", "A"), "images": None, "audios": ["a.wav"]}, "audios: videos and sounds cannot"),
        (beside([], "A"), "messages[0].content: the message is empty"),
        (beside([{"type": "text", "text": " "}], "A"), "messages[0].content: the message is empty"),
        (beside([{"type": "text"}], "A"), "messages[0].content[0].text: the field is missing"),
        (beside("Q", "A", images=[{"url": "a.png"}]), "images[0]: an object where a text belongs"),
        (beside("Q", "A", images=[{"bytes": None, "path": None}]), "images[0].path: null where a text belongs"),
    ],
)
def test_a_bad_row_with_images_beside_it_is_named(row: dict[str, object], problem: str, read) -> None:
    with pytest.raises(DataError) as caught:
        read(row)
    assert f"d.jsonl:1: {problem}" in str(caught.value)
    assert str(caught.value).startswith("1 problem in ")


def test_under_another_name_images_beside_the_messages_are_refused_not_lost(read) -> None:
    with pytest.raises(DataError, match=r"images: beside the messages, .*; give --from swift"):
        read(beside("Q", "A"), data_format="messages")


# -- vlm_r3


def record(*segments: object, **fields: object) -> dict[str, object]:
    return {"image_path": "a.png", "question": "Q", "response_list": list(segments), **fields}


def test_a_box_becomes_a_call_and_the_files_of_crops_go_along(read) -> None:
    box = '{"bbox_2d": [1, 2, 30, 40]}'
    [sample] = read(record(f"Look {box}\n", "red", img_crop_list=["c.png"], source="gqa"))
    assert messages_of(sample) == [user("Q", A), assistant(f"Look {CALL}\nred")]
    assert sample.extra == {"img_crop_list": ["c.png"], "source": "gqa"}
    assert sample.box_frame is None


def test_an_image_without_a_box_stays_an_image_and_segments_without_one_are_parted(read) -> None:
    [sample] = read(record("one", "two", "three", img_crop_list=["b.png"]))
    parts = (TextPart(text="one"), ImagePart(source=B), TextPart(text="two\nthree"))
    assert messages_of(sample)[1] == Message(role="assistant", parts=parts)


def test_an_rl_record_has_no_answer_to_train_on(read) -> None:
    [sample] = read({"image_path": "a.png", "question": "Q", "answer": "7", "source": "gqa"})
    assert (messages_of(sample), sample.solution, sample.extra) == ([user("Q", A)], "7", {"source": "gqa"})


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (record('{"bbox_2d": [1, 2]}'), 'response_list[0]: "{"bbox_2d": [1, 2]}": a box has 4 numbers'),
        (record('{"label": "a", "bbox_2d": [1, 2, 3, 4]}'), "response_list[0]: "),
        (record("a", 3), "response_list[1]: a number where a text belongs"),
        (record(), "response_list: the list is empty"),
        (record("a", img_crop_list=["b", "c"]), "img_crop_list: 2 pictures for 1 segments; leave out the others"),
        (record("a", img_crop_list="b"), "img_crop_list: a text where a list belongs"),
        (record("a", img_crop_list=["http://x"]), "img_crop_list[0]: http://x is a web address"),
        ({"image_path": "a.png", "question": " ", "answer": "7"}, "question: the text is empty"),
        ({"image_path": "a.png", "question": "q", "answer": " "}, "answer: the text is empty"),
    ],
)
def test_a_bad_record_is_named(row: dict[str, object], problem: str, read) -> None:
    with pytest.raises(DataError) as caught:
        read(row)
    assert f"d.jsonl:1: {problem}" in str(caught.value)
    assert str(caught.value).startswith("1 problem in ")


# -- pictures inside the row


def test_images_as_hugging_face_stores_them_in_parquet_are_read(tmp_path: Path) -> None:
    raw = b64decode(PIXEL.partition(",")[2])
    write_rows(
        tmp_path / "d.parquet",
        [
            {**beside("Q", "A"), "images": [{"bytes": raw, "path": None}, {"bytes": b"no picture", "path": "x"}]},
            {**beside("Q", "A"), "images": [{"bytes": b"", "path": "a.png"}]},
        ],
    )
    held, named = read_samples(tmp_path / "d.parquet", "p")
    assert held.image_paths == [PIXEL, "data:image/unknown;base64,bm8gcGljdHVyZQ=="]
    assert named.image_paths == [A]


def test_an_image_may_stand_in_the_row_itself(read) -> None:
    [sample] = read(user_row([{"type": "image_url", "image_url": {"url": PIXEL}}]))
    assert sample.image_paths == [PIXEL]
    assert image_size(PIXEL) == (1, 1)
    assert isinstance(open_image(PIXEL), Image.Image)
    [broken] = read(user_row([{"type": "image_url", "image_url": "data:image/png;base64,iVBORw0K"}]))
    with pytest.raises(ImageError, match=r"data:image/png;base64,iVBORw0K.*: not a readable picture"):
        open_image(broken.image_paths[0])
