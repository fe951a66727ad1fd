"""Data files: what a record becomes, and how each thing wrong with a file or its pictures is named."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from looktwice.calls import parse_call, split_calls
from looktwice.data.sample import Sample
from looktwice.errors import DataError
from looktwice.formats.catalogue import FORMATS
from looktwice.formats.reading import number_text
from looktwice.formats.sample_file import read_samples
from looktwice.geometry import Box
from looktwice.messages import Conversation, assistant, user

REAL_SAMPLE = Path(__file__).parents[3] / "shared" / "sample_data" / "refcoco_sample.jsonl"

GOOD = {"Q": "What is it?", "A3": "<think>Hm.</think>\n\n<answer>a cup</answer>"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def read_one(tmp_path: Path) -> Callable[..., Sample]:
    def read(**fields: object) -> Sample:
        row = {"image_path": "x.jpg", "QnA": [{**GOOD, **fields}]}
        [sample] = read_samples(write(tmp_path / "d.jsonl", row), "pictures")
        return sample

    return read


@pytest.fixture
def problems_of(tmp_path: Path) -> Callable[[bytes | object], str]:
    """The problems of a file (bytes, or one row), without its folder."""

    def read(content: bytes | object) -> str:
        path = tmp_path / "d.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        with pytest.raises(DataError) as caught:
            read_samples(path, "pictures")
        return str(caught.value).replace(f"{tmp_path}/", "")

    return read


def response_to(answer: str, read_one: Callable[..., Sample]) -> str:
    """The response to an answer that is followed by an answer block."""
    block = "<answer>a cup</answer>"
    return read_one(A3=answer + block).response.removesuffix(block)


def test_a_row_gives_a_sample_for_each_question(tmp_path: Path) -> None:
    second = {"Q": "Where?", "A": "<answer>old</answer> no, <answer>\n left \n</answer>", "box": [1, 2, 3, 4.5]}
    third = {**GOOD, "A": "not read", "answer": " B ", "box": None}
    path = write(tmp_path / "d.jsonl", {"image_path": "a/x.jpg", "image_id": "7", "QnA": [GOOD, second, third]})
    first, middle, last = read_samples(path, tmp_path / "pictures")
    image = tmp_path / "pictures" / "a" / "x.jpg"
    response = "<think>Hm.</think>\n\n<answer>a cup</answer>"
    assert first == Sample(
        conversation=Conversation(messages=(user("What is it?", image), assistant(response))),
        solution="a cup",
        where=f"{path}:1",
        field="QnA[0].A3",
        extra={"image_id": "7"},
    )
    assert (first.image_paths, first.question, first.response) == ([image], "What is it?", response)
    assert (middle.solution, middle.gold_box, middle.field) == ("left", Box(1, 2, 3, 4.5), "QnA[1].A")
    assert (last.response, last.solution, last.gold_box) == (GOOD["A3"], "B", None)


def test_lines_are_counted_from_one_with_the_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    row = json.dumps({"image_path": "x.jpg", "QnA": [{**GOOD, "Q": "Ist es größer?\u2028"}]}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n\r\n  \n" + row.encode())
    samples = read_samples(path, "")
    assert [sample.where for sample in samples] == [f"{path}:1", f"{path}:4"]
    assert samples[1].question == "Ist es größer?\u2028"


@pytest.mark.parametrize(
    "written, expected",
    [
        ("{Crop cup 1 [10, 2.50, 30, 4e1]}", "<tool_call>[10, 2.50, 30, 4e1]</tool_call>"),
        ("a {Crop cup 1, the cup 2 [1,2 ,30,  40]} b", "a <tool_call>[1, 2, 30, 40]</tool_call> b"),
        ("{ CROP\ncup [\n1, 2,\n30, 40 ]\n}", "<tool_call>[1, 2, 30, 40]</tool_call>"),
        ("{crop[1, 2, 30, 40]}", "<tool_call>[1, 2, 30, 40]</tool_call>"),
        (
            "{Crop a [1, 2, 30, 40]} {Crop b [-5, 6, 7, 8]}",
            "<tool_call>[1, 2, 30, 40]</tool_call> <tool_call>[-5, 6, 7, 8]</tool_call>",
        ),
        (
            "{Crop a [1, 2, 30, 40], b [5, 6, 7, 8]}",
            "<tool_call>[1, 2, 30, 40]</tool_call><tool_call>[5, 6, 7, 8]</tool_call>",
        ),
    ],
)
def test_a_crop_command_becomes_calls(written: str, expected: str, read_one: Callable[..., Sample]) -> None:
    assert response_to(written, read_one) == expected


@pytest.mark.parametrize(
    "text",
    [
        "{Tool call}",
        "{Note: see [1]}",
        "{Crop the left part}",
        "{Cropped cup [1, 2, 30, 40]}",
        "Crop cup [1, 2, 30, 40]",
        "{}[]{",
        "{Crop is a tool",
        "<image> <|im_end|> <ovis_visual_atom> <think>",
        "<tool_call>[1.50,2, 30,40]</tool_call>",
        "<tool_call>Crop [1, 2, 30, 40]</tool_call>",
    ],
)
def test_all_other_text_is_kept(text: str, read_one: Callable[..., Sample]) -> None:
    assert response_to(text, read_one) == text


@pytest.mark.parametrize(
    "answer, problem",
    [
        ("{Crop a [1, 2, 30]}", 'crop command "{Crop a [1, 2, 30]}": a box has 4 numbers'),
        ("{Crop a [x, 2, 30, 40]}", "a box holds finite numbers, got ['x', 2.0, 30.0, 40.0]; mend the box"),
        ("{Crop a [1, 2, 30, NaN]}", "a box holds finite numbers"),
        ("{Crop a [30, 2, 1, 40]}", "a box runs from top-left to bottom-right"),
        ("{Crop a [1, 2, 1, 40]}", "a box runs from top-left to bottom-right"),
        ("{Crop a [1, 2, 30, 40], b [1]}", 'crop command "{Crop a [1, 2, 30, 40], b [1]}": a box has 4 numbers'),
        ("{Crop a [[1, 2, 30, 40]]}", "a bracket has no partner"),
        ("{Crop a [1, 2, 30, 40}", "a bracket has no partner"),
        ("{Crop a 1, 2, 30, 40]}", "a bracket has no partner"),
        ("{Crop a [1, 2, 30, 40]\nNow", "the brace is not closed; add the }"),
        ("<tool_call>[1, 2, 30]</tool_call>", "call 1: a box has 4 numbers"),
        ("{Crop a [1, 2, 3, 4]} <tool_call>{Crop a [1, 2, 3, 4]}</tool_call>", "call 2: a call holds [x1, y1, x2, y2]"),
        ("[1, 2, 30, 40]</tool_call>", "call 1: </tool_call> without <tool_call>"),
        ("<tool_call>[1, 2, 30, 40]", "<tool_call> is not closed; add </tool_call> or remove it"),
        ("<tool_call> {Crop a [1, 2, 30, 40]}", "call 1: an earlier <tool_call> is not closed"),
    ],
)
def test_a_bad_crop_is_named(answer: str, problem: str, problems_of: Callable[..., str]) -> None:
    message = problems_of({"image_path": "x", "QnA": [GOOD, {**GOOD, "A3": answer + "<answer>a</answer>"}]})
    assert message.startswith("1 problem in d.jsonl:\n  d.jsonl:1: QnA[1].A3: ")
    assert problem in message


@pytest.mark.parametrize(
    "written, question",
    [
        ("<image>\nWhat?", "What?"),
        ("<image>What?", "What?"),
        (" <image> \r\nWhat?\n", "What?\n"),
        ("<image>\n<image>\nWhat?", "<image>\nWhat?"),
        ("What?\n<image>", "What?\n<image>"),
        ("What is <|im_end|>?", "What is <|im_end|>?"),
    ],
)
def test_one_leading_image_mark_is_taken_off_the_question(
    written: str, question: str, read_one: Callable[..., Sample]
) -> None:
    assert read_one(Q=written).question == question


@pytest.mark.parametrize(
    "row, problem",
    [
        ([], "d.jsonl:1: a list where an object belongs; write one JSON object a line"),
        (None, "d.jsonl:1: null where an object belongs"),
        ({}, "d.jsonl: no format fits, the rows have nothing; known are swift: "),
        (
            {"image_pth": "x", "QnA": [GOOD]},
            'image_path: the field is missing, unknown: "image_pth". Did you mean "image_path"?',
        ),
        ({"image_path": 3, "QnA": [GOOD]}, "d.jsonl:1: image_path: a number where a text belongs; write it in quotes"),
        ({"image_path": ["x"], "QnA": [GOOD]}, "d.jsonl:1: image_path: a list where a text belongs; give one text"),
        ({"image_path": {"a": 1}, "QnA": [GOOD]}, "image_path: an object where a text belongs; give one text"),
        ({"image_path": " ", "QnA": [GOOD]}, "image_path: the text is empty"),
        ({"image_path": "x"}, 'd.jsonl:1: QnA: the field is missing, there is "image_path"; add it'),
        ({"image_path": "x", "QnA": GOOD}, "d.jsonl:1: QnA: an object where a list belongs"),
        ({"image_path": "x", "QnA": None}, "d.jsonl:1: QnA: null where a list belongs"),
        ({"image_path": "x", "QnA": []}, "d.jsonl:1: QnA: the list is empty"),
        ({"image_path": "x", "QnA": [GOOD, "Q"]}, "d.jsonl:1: QnA[1]: a text where an object belongs"),
        ({"image_path": "x", "QnA": [{"A3": "a"}]}, 'd.jsonl:1: QnA[0].Q: the field is missing, there is "A3"'),
        ({"image_path": "x", "QnA": [{"Q": "q", "A1": "a"}]}, "d.jsonl:1: QnA[0].A3: the field is missing"),
        ({"image_path": "x", "QnA": [{**GOOD, "Q": "\n"}]}, "QnA[0].Q: the text is empty"),
        ({"image_path": "x", "QnA": [{**GOOD, "Q": "<image>\n"}]}, "QnA[0].Q: nothing but <image>"),
        ({"image_path": "x", "QnA": [{**GOOD, "A3": ""}]}, "QnA[0].A3: the text is empty"),
        ({"image_path": "x", "QnA": [{**GOOD, "A3": ["a"]}]}, "QnA[0].A3: a list where a text belongs"),
        ({"image_path": "x", "QnA": [{**GOOD, "A3": "a\ud800"}]}, "QnA[0].A3: half of a surrogate pair"),
        ({"image_path": "x", "QnA": [{"Q": "q", "A3": "<answer>a"}]}, "A3: the <answer> block is empty"),
        ({"image_path": "x", "QnA": [{"Q": "q", "A3": "<answer> </answer>"}]}, "A3: the <answer> block is empty"),
        ({"image_path": "x", "QnA": [{**GOOD, "answer": True}]}, "QnA[0].answer: true or false where a text belongs"),
        ({"image_path": "x", "QnA": [{**GOOD, "answer": True}]}, 'belongs; write "yes" or "no"'),
        (
            {"image_path": "x", "QnA": [{**GOOD, "answer": {"a": "b"}}]},
            'answer: an object where a text belongs; write one text, or ["cup", "mug"] for either',
        ),
        (
            {"image_path": "x", "QnA": [{**GOOD, "answer": ["a", None]}]},
            "QnA[0].answer.1: null where a text belongs; write one text",
        ),
        ({"image_path": "x", "QnA": [{**GOOD, "answer": "<answer> </answer>"}]}, "QnA[0].answer: nothing in <answer>"),
        (
            {"image_path": "x", "QnA": [{"Q": "q", "A3": "<answer>\\boxed{}</answer>"}]},
            "A3: the <answer> block is empty",
        ),
        ({"image_path": "x", "QnA": [{**GOOD, "answer": ""}]}, "QnA[0].answer: the text is empty"),
        ({"image_path": "x", "QnA": [{**GOOD, "box": [1, 2, 3]}]}, "QnA[0].box: a box has 4 numbers"),
        ({"image_path": "x", "QnA": [{**GOOD, "box": [5, 2, 3, 4]}]}, "QnA[0].box: a box runs from top-left"),
        ({"image_path": "x", "QnA": [{**GOOD, "box": "1, 2, 3, 4"}]}, "QnA[0].box: a box has 4 numbers"),
        ({"image_path": "x", "QnA": [{**GOOD, "box": [1, 2, 3, float("nan")]}]}, "box: a box holds finite numbers"),
    ],
)
def test_a_bad_field_is_named(row: object, problem: str, problems_of: Callable[..., str]) -> None:
    assert problem in problems_of(row)


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", "d.jsonl: the file holds no records"),
        (b"\n \n", "d.jsonl: the file holds no records"),
        (b"\xef\xbb\xbf", "d.jsonl: the file holds no records"),
    ],
)
def test_a_file_without_a_row_is_named(content: bytes, problem: str, problems_of: Callable[..., str]) -> None:
    assert problem in problems_of(content)


def test_all_problems_are_counted_and_the_first_twenty_listed(tmp_path: Path) -> None:
    bad = {"QnA": [{"Q": "", "A3": "{Crop [1]} <answer>a</answer>"}]}
    path = write(tmp_path / "d.jsonl", {"image_path": "x", "QnA": [GOOD]}, *[bad] * 8)
    with pytest.raises(DataError) as caught:
        read_samples(path, "")
    head, *lines = str(caught.value).splitlines()
    assert head == f"24 problems in {path}, the first 20:"
    assert len(lines) == 20
    places = [re.escape(f"  {path}:2: {name}: ") for name in ("image_path", "QnA[0].Q", "QnA[0].A3")]
    assert all(re.match(place, line) for place, line in zip(places, lines))
    assert lines[3].startswith(f"  {path}:3: ")


def test_a_misspelt_optional_field_is_not_ignored_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "d.jsonl", {"image_path": "x", "QnA": [{**GOOD, "anwser": "B", "source": "web"}]})
    with caplog.at_level(logging.WARNING):
        read_samples(tmp_path / "d.jsonl", "")
    [record] = caplog.records
    assert record.getMessage().endswith('field "anwser" of 1 sample is ignored. Did you mean "answer"?')


@pytest.mark.skipif(not REAL_SAMPLE.exists(), reason="the sample of real records lies outside the project")
def test_all_real_records_are_read_completely() -> None:
    samples = read_samples(REAL_SAMPLE, "pictures")
    calls = [segment for sample in samples for segment in split_calls(sample.response)[:-1]]
    assert (len(samples), len({sample.image_paths[0] for sample in samples}), len(calls)) == (50, 10, 50)
    assert all(parse_call(call).box.area > 0 for call in calls)
    assert not any(re.search(r"\{\s*crop[^}]*\[", sample.response, re.IGNORECASE) for sample in samples)
    assert all(sample.solution and sample.solution in sample.response for sample in samples)
    assert sum("{" in sample.response for sample in samples) == 1  # braces that hold no crop


# -- gold answers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2, "2"),
        (2.0, "2"),
        (-0.5, "-0.5"),
        (1e-05, "0.00001"),
        (1.5e7, "15000000"),
        (0.10000000149011612, "0.1"),
        (12.34000015258789, "12.34"),
        (123456.7890625, "123456.7890625"),
        (16777217.0, "16777217"),
        (1e300, "1E+300"),
        (Decimal("2.50"), "2.5"),
    ],
)
def test_a_number_is_written_as_people_write_it(value: float | Decimal, text: str) -> None:
    assert number_text(value) == text


@pytest.mark.parametrize("missing", ["NaN", "null", "Infinity", "-Infinity", "1e999"])
def test_a_gold_answer_that_is_missing_is_no_answer(missing: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    question = json.dumps(GOOD)[:-1]
    path.write_text(f'{{"image_path": "x.jpg", "QnA": [{question}, "answer": {missing}}}]}}\n')
    [sample] = read_samples(path, "")
    assert (sample.solution, sample.extra) == ("a cup", {})


def test_values_that_are_missing_in_a_table_are_absent_and_numbers_stay_numbers(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    answers = arrow.array([0.1, float("nan"), None], arrow.float32())
    table = {
        "image_path": ["x.jpg"] * 3,
        "question": ["q"] * 3,
        "response_list": [["<answer>a cup</answer>"]] * 3,
        "answer": answers,
        "box": [[1.0, 2.0, 3.0, 4.0], [float("nan")] * 4, None],
        "score": [1.0, float("nan"), None],
    }
    parquet.write_table(arrow.table(table), tmp_path / "d.parquet")
    samples = read_samples(tmp_path / "d.parquet", "")
    assert [sample.solution for sample in samples] == ["0.1", "a cup", "a cup"]
    assert [sample.gold_box for sample in samples] == [Box(1, 2, 3, 4), None, None]
    assert [sample.extra for sample in samples] == [{"score": 1.0}, {}, {}]


def test_several_gold_answers_are_a_list_and_one_in_a_list_is_one(tmp_path: Path) -> None:
    row = {"image_path": "x", "QnA": [{**GOOD, "answer": value} for value in (["cup", 2, "cup"], ["mug"])]}
    samples = read_samples(write(tmp_path / "d.jsonl", row), "")
    assert [sample.solution for sample in samples] == [("cup", "2"), "mug"]


def test_several_gold_boxes_are_a_list_and_one_in_a_list_is_one(read_one: Callable[..., Sample]) -> None:
    one, other = [1, 2, 3, 4], [5, 6, 7, 8.5]
    found = [read_one(box=box).gold_boxes for box in (one, [one], [one, other], [None] * 4)]
    assert found == [(Box(1, 2, 3, 4),), (Box(1, 2, 3, 4),), (Box(1, 2, 3, 4), Box(5, 6, 7, 8.5)), ()]
    with pytest.raises(DataError, match="a box runs from top-left"):
        read_one(box=[one, [3, 2, 1, 4]])


def test_the_gold_answer_of_ms_swift_is_read_and_ours_goes_before_it(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "<image>What?"}], "images": ["x.jpg"]}
    rows = [{**row, "solution": "<answer>B</answer>"}, {**row, "solution": "B", "answer": "C"}]
    samples = read_samples(write(tmp_path / "d.jsonl", *rows), "")
    assert [sample.solution for sample in samples] == ["<answer>B</answer>", "C"]
    assert [sample.extra for sample in samples] == [{}, {}]


# -- fields that mean nothing

UNREAD: dict[str, dict[str, object]] = {
    "documented": {"image_path": "x.jpg", "QnA": [{"Q": "q", "A3": "a"}]},
    "messages": {"messages": [{"role": "user", "content": [{"type": "image", "image": "x.jpg"}]}]},
    "openai": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x.jpg"}}]}]},
    "swift": {"messages": [{"role": "user", "content": "q"}], "images": ["x.jpg"]},
    "ovis": {"conversations": [{"from": "human", "value": "<image>q"}], "image": "x.jpg"},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}], "images": ["x.jpg"]},
    "vlm_r3": {"image_path": "x.jpg", "question": "q", "answer": "a"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_field_of_a_row_that_means_nothing_is_named_and_goes_along(name: str, tmp_path: Path, caplog) -> None:
    row = UNREAD[name] | {"regions": [1, 2, 3, 4], "id": "7", "image_id": 7, "source": "web", "width": 3}
    with caplog.at_level(logging.WARNING):
        [sample] = read_samples(write(tmp_path / "d.jsonl", row), "", data_format=name)
    assert {"regions", "id"} <= sample.extra.keys()
    [record] = caplog.records
    place = f"{tmp_path}/d.jsonl:1" + (": QnA[0]" if name == "documented" else "")
    assert record.getMessage() == f'{tmp_path}/d.jsonl: ignored: 1 x "regions" ({place})'


def test_a_misspelt_field_of_a_row_with_questions_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_samples(write(tmp_path / "d.jsonl", {"image_path": "x.jpg", "bbox": [1, 2, 3, 4], "QnA": [GOOD]}), "")
    [record] = caplog.records
    assert record.getMessage().endswith('field "bbox" of 1 sample is ignored. Did you mean "box"?')


def test_an_answer_that_is_not_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"image_path": "x.jpg", "QnA": [{**GOOD, "A": "a cup"}]}
    with caplog.at_level(logging.WARNING):
        read_samples(write(tmp_path / "d.jsonl", row), "")
    assert [record.getMessage().split(" (")[0].split(": ", 1)[1] for record in caplog.records] == ['ignored: 1 x "A"']
