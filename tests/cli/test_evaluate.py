"""`looktwice eval` as a command: what it says in the end, and its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.benches.samples import make, write_jsonl

from looktwice.cli import evaluate, main
from looktwice.evaluation.result import Result
from looktwice.launch import Launch

SETTINGS = ("--device", "cpu", "--max_new_tokens", "4")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(make(tmp_path, "vstar"))
    return tmp_path


def test_the_result_of_a_model_goes_to_a_file_of_its_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "tiny", "--bench", "vstar", *SETTINGS]) == 0
    out = capsys.readouterr().out
    assert "V*Bench by category" in out and "relative_position" in out
    assert out.endswith("result: outputs/eval/tiny.jsonl\n")
    assert len(Result([Path("outputs/eval/tiny.jsonl")]).answers) == 2


def test_a_question_that_fails_is_named_and_the_code_is_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "vstar" / "direct_attributes" / "sa_1.jpg").write_text("no picture")
    assert main(["eval", "tiny", "--bench", "vstar", "--out", "a.jsonl", *SETTINGS]) == 1
    told = capsys.readouterr()
    assert "vstar 1 crops: " in told.out and "sa_1.jpg" in told.out and "result: a.jsonl" in told.out
    assert told.err.endswith("1 question failed; the same command asks them again\n")


def test_a_run_that_evaluated_nothing_never_says_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": "gone.jpg", "text": "Q\n(A) a\n(B) b", "label": "A", "category": "x"}] * 2
    write_jsonl(folder / "vstar" / "test_questions.jsonl", rows)
    assert main(["eval", "tiny", "--bench", "vstar", "--out", "a.jsonl", *SETTINGS]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "a.jsonl: no question was answered, so nothing was evaluated" in told.err and "gone.jpg" in told.err


def test_the_processes_of_torchrun_share_the_questions_and_the_first_one_tells_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "tiny", "--bench", "vstar", "--out", "a.jsonl", *SETTINGS]

    def others_run() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "launched", lambda: Launch(1, 2, 1, 2))
            patch.setattr(evaluate, "_wait_for_all", lambda: None)
            assert main(words) == 0
        assert sorted(path.name for path in folder.glob("a.*")) == ["a.1-of-2.jsonl", "a.2-of-2.jsonl"]

    monkeypatch.setattr(evaluate, "launched", lambda: Launch(0, 2, 0, 2))
    monkeypatch.setattr(evaluate, "_wait_for_all", others_run)
    assert main(words) == 0
    assert capsys.readouterr().out.count("result: a.jsonl") == 1
    assert [path.name for path in folder.glob("a.*")] == ["a.jsonl"]
    assert len(Result([folder / "a.jsonl"]).answers) == 2
    assert main([*words, "--shard", "1/2"]) == 1
    assert "--shard under torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--bench", "vstar", "vstar:other.jsonl"], "--bench names vstar twice"),
        (["--bench", "docvqa"], "no file of DocVQA (val*.json"),
        (["--bench", "vstar", "--model_path", "tiny"], "the model is named twice"),
        (["--bench", "vstar", "--out", "vstar"], "--out vstar: cannot be written"),
    ],
)
def test_what_cannot_be_done_is_told_before_a_model_is_loaded(
    words: list[str], problem: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("looktwice.cli.ask.load", lambda config: pytest.fail("the model was loaded"))
    assert main(["eval", "tiny", *words]) == 1
    assert problem in capsys.readouterr().err
