"""Files of questions: in order, resumable, bad rows told and passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from looktwice.asking.question_file import QuestionFile
from looktwice.cli import main
from looktwice.errors import ConfigError
from looktwice.inference import OvisInference

ROWS: list[object] = [
    {"image_path": "a.png", "question": "What is it?", "id": 7},
    {"image_path": "none.png", "question": "What is it?"},
    "{broken",
    {"images": ["a.png", "b.png"], "question": "Which?", "system": "Be short."},
    {"question": "No picture?"},
    {"question": 5},
]


@pytest.fixture(scope="module")
def inference(model_folder: Path) -> OvisInference:
    return OvisInference(model_folder, device="cpu", max_new_tokens=4)


@pytest.fixture
def folder(tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> Path:
    image.save(tmp_path / "a.png")
    image.rotate(180).save(tmp_path / "b.png")
    write(tmp_path / "q.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, rows: list[object]) -> None:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def opened(folder: Path, **options) -> QuestionFile:
    values = {"image_base_path": folder, "model_path": "m", **options}
    return QuestionFile(folder / "q.jsonl", folder / "out" / "a.jsonl", **values)


def test_each_row_has_its_line_in_order_and_bad_rows_say_why(folder, inference) -> None:
    file = opened(folder)
    file.answer_all(inference)
    lines = read(file.out)
    assert [line["row"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["asked"] for line in lines] == [row if isinstance(row, dict) else None for row in ROWS]
    assert [line["error"] and line["error"].split("; ")[0] for line in lines] == [
        None,
        f"{folder}/q.jsonl:2: {folder}/none.png: no such picture or video",
        f"{folder}/q.jsonl:3: broken JSON at column 2 (Expecting property name enclosed in double quotes)",
        None,
        None,
        f"{folder}/q.jsonl:6: the question is of type int",
    ]
    assert {**inference.generate("a.png", "What is it?"), "seconds": None} == {
        **{name: lines[0][name] for name in inference.generate("a.png", "What is it?")},
        "seconds": None,
    }
    assert (file.num_failed, file.num_left) == (3, 3)
    assert file.summary == f"{file.out}: 3 of 6 rows answered"


def test_a_second_run_asks_what_failed_and_what_is_new(folder, inference) -> None:
    opened(folder).answer_all(inference)
    before = {line["row"]: line for line in read(folder / "out" / "a.jsonl") if line["error"] is None}
    Image.new("RGB", (40, 40)).save(folder / "none.png")
    write(folder / "q.jsonl", [*ROWS, {"question": "One more?"}])
    file = opened(folder)
    assert file.num_left == 4
    file.answer_all(inference)
    lines = {line["row"]: line for line in read(file.out)}
    assert len(read(file.out)) == len(lines) == 7 and {row: lines[row] for row in before} == before
    assert [row for row, line in lines.items() if line["error"]] == [3, 6]


def test_half_a_line_is_asked_again(folder, inference) -> None:
    write(folder / "q.jsonl", [ROWS[0], ROWS[4]])
    file = opened(folder)
    file.answer_all(inference)
    whole = file.out.read_text()
    file.out.write_text(whole[:-20])
    again = opened(folder)
    assert again.num_left == 1
    again.answer_all(inference)
    assert [line["row"] for line in read(again.out)] == [1, 2] and again.num_left == 0


def test_what_was_answered_stays_when_the_run_is_interrupted(folder, inference, monkeypatch) -> None:
    write(folder / "q.jsonl", [ROWS[0], ROWS[4]])
    file, finish = opened(folder), inference.finish

    def interrupted(asked):
        yield next(finish(asked))
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt, match="1 of 2 rows answered; the same command goes on"):
        file.answer_all(inference)
    assert [line["row"] for line in read(file.out)] == [1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda folder: write(folder / "q.jsonl", [ROWS[4]]), "a.jsonl:1: row 1 of .*q.jsonl is another one now"),
        (lambda folder: write(folder / "out" / "a.jsonl", [{"row": 1}]), "a.jsonl:1: not a line of answers to --batch"),
        (lambda folder: {"model_path": "n"}, "a.jsonl:1: an answer of m"),
    ],
)
def test_answers_to_something_else_are_not_added_to(change, problem, folder, inference) -> None:
    write(folder / "q.jsonl", [ROWS[0]])
    opened(folder).answer_all(inference)
    options = change(folder) or {}
    with pytest.raises(ConfigError, match=f"{problem}; name another --out"):
        opened(folder, **options)


def test_two_processes_do_not_write_at_once(folder, inference) -> None:
    file, other = opened(folder), opened(folder)
    with file.file.writing(list), pytest.raises(ConfigError, match="another process is writing there"):
        other.answer_all(inference)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, "there is no question; give one as `question`"),
        ({"question": " "}, "there is no question; give one as `question`"),
        ({"question": "Q", "image": "a.png", "video": "b"}, "image and video are given; leave one out"),
        ({"question": "Q", "image": 5}, "image is a number; give a path"),
        ({"question": "Q", "video": ["a"]}, "video is a list; give a path"),
        ({"question": "Q", "system": 5}, "system is a number; give a text"),
        ({"question": "Q", "image": "https://example.com/a.png"}, "https://example.com/a.png is a web address"),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(row, problem, folder, inference) -> None:
    write(folder / "q.jsonl", [row])
    file = opened(folder)
    file.answer_all(inference)
    [line] = read(file.out)
    assert problem in line["error"] and file.num_failed == 1


def test_off_a_terminal_progress_is_a_line_now_and_then(folder, inference, monkeypatch, capsys) -> None:
    monkeypatch.setattr("looktwice.asking.progress.TOLD_EVERY", 0.0)
    write(folder / "q.jsonl", [ROWS[0], ROWS[1], ROWS[4]])
    opened(folder).answer_all(inference)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("row 1/3  failed 0  elapsed 0:00:0")
    assert "  left 0:00:0" in lines[-1]


# -- the command


def test_the_command_answers_a_file_and_says_how_many_failed(folder, model_folder, capsys) -> None:
    words = ["--batch", "q.jsonl", "--out", "a.jsonl", "--model_path", str(model_folder), "--device", "cpu"]
    assert main(["ask", *words, "--max_new_tokens", "2"]) == 1
    told = capsys.readouterr()
    assert told.out == "a.jsonl: 3 of 6 rows answered\n"
    assert told.err.endswith("3 rows could not be answered; the same command tries again\n")
    write(folder / "q.jsonl", [ROWS[0]])
    assert main(["ask", *words[:2], "--out", "b.jsonl", *words[4:], "--max_new_tokens", "2"]) == 0
    assert capsys.readouterr().out == "b.jsonl: 1 of 1 row answered\n"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--batch", "q.jsonl"], "--batch names the questions and --out the answers; give both"),
        (["--out", "a.jsonl"], "--batch names the questions and --out the answers; give both"),
        (["--batch", "no.jsonl", "--out", "a.jsonl"], "no.jsonl: no such data file"),
        (["--batch", "q.jsonl", "--out", "q.jsonl"], "--out q.jsonl: a file that is read"),
        (["a.png", "Q", "--batch", "q.jsonl", "--out", "a.jsonl"], "a picture or a question beside --batch"),
        (["--save", "a.png", "--batch", "q.jsonl", "--out", "a.jsonl"], "--save beside --batch; leave it out"),
        (["a.png", "Q", "--image_base_path", "."], "--image_base_path is of --batch"),
    ],
)
def test_what_makes_no_sense_is_refused(words, problem, folder, capsys) -> None:
    assert main(["ask", *words, "--model_path", "tiny"]) == 1
    assert problem in capsys.readouterr().err
