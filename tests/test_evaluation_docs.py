"""docs/evaluation.md: its commands run as they stand, and its tables name all that there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tests.benches.samples import make

from looktwice.benches.catalogue import CATALOGUE
from looktwice.cli import main
from looktwice.evaluation.conditions import CONDITIONS
from looktwice.evaluation.result import lines_of

TEXT = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)


def cells(title: str) -> list[str]:
    """The first cells of the table with this first heading, each name in them."""
    body = TEXT[TEXT.index(f"| {title} |") :].split("\n\n")[0].splitlines()[2:]
    return re.findall(r"`([\w+]+)`", " ".join(row.split("|")[1] for row in body))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make(tmp_path / "benchmarks", "vstar", "hrbench4k", "docvqa", "mathvista")
    make(tmp_path, "jsonl")
    (tmp_path / "jsonl").rename(tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_one_after_the_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in BLOCKS[0].splitlines():
        words = shlex.split(command)[1:]
        is_comparison = words[1] == "compare"
        assert main([*words] if is_comparison else [*words, "--device", "cpu", "--max_new_tokens", "8"]) == 0
        told = capsys.readouterr().out
        if is_comparison:
            assert "jsonl crops: no sure difference" in told
        elif "--shard" in words:
            assert told == "parts.1-of-2.jsonl: 1 answer of part 1/2\n"
        else:
            assert f"result: {words[words.index('--out') + 1]}\n" in told and "with crops" in told
    [example] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(example, {})
    assert "Estimate(mean=0.0" in (told := capsys.readouterr().out) and "a.png" in told
    conditions = {line.get("condition") for line in lines_of(folder / "tiny.jsonl")}
    benches = {line.get("bench") for line in lines_of(folder / "public.jsonl")}
    assert conditions == {None, *CONDITIONS} and benches == {None, "vstar", "hrbench4k", "docvqa"}


def test_the_recipe_of_published_scores_runs_with_the_model_at_hand(folder: Path) -> None:
    [command] = BLOCKS[1].splitlines()
    left_out = ("vstar", "docvqa")  # each takes a picture of a million pixels
    words = [word.replace("AIDC-AI/Ovis2.5-9B", "tiny") for word in shlex.split(command)[1:] if word not in left_out]
    assert main([*words, "--device", "cpu", "--max_new_tokens", "2", "--limit", "1"]) == 0
    start, answer = lines_of(folder / "ovis.jsonl")
    pixels, bench = start["recipe"]["pixels"], start["recipe"]["benches"]["mathvista"]
    assert (pixels["image_min_pixels"], pixels["image_max_pixels"]) == (1024**2, 1792**2)
    assert bench["thinking"] is True and bench["suffix"] == "End your response with 'Final answer: '."
    assert answer["seen"][0][0] * answer["seen"][0][1] >= 1024**2


def test_every_benchmark_and_every_condition_is_in_its_table() -> None:
    assert cells("Name") == [*CATALOGUE]
    assert cells("Condition") == [*CONDITIONS]


def test_every_key_of_an_answer_is_in_the_table(folder: Path) -> None:
    words = shlex.split(BLOCKS[0].splitlines()[0])[1:]
    assert main([*words, "--device", "cpu", "--max_new_tokens", "2"]) == 0
    *_, answer = lines_of(folder / "tiny.jsonl")
    assert {*cells("Key of an answer")} == {*answer}
