"""An evaluation from its files to its result: whole, interrupted, in parts, and with what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.benches.samples import make
from tests.conftest import ScriptedEngine

from looktwice.asking.asked import Asked
from looktwice.benches.files import BenchFiles, find_files
from looktwice.config import ALL_CONTROLS, EvalConfig
from looktwice.errors import ConfigError, DataError
from looktwice.evaluation.conditions import CONDITIONS
from looktwice.evaluation.result import Items, Result, lines_of
from looktwice.evaluation.run import Evaluation, Share, parts_of, rows_of
from looktwice.evaluation.summary import summary_of
from looktwice.inference import OvisInference
from looktwice.processing.images import image_size

SETTINGS = {"bench": ["jsonl"], "device": "cpu", "max_new_tokens": 200, "seed": 0}
Script = Callable[[Asked], str]


@pytest.fixture(scope="module")
def inference(model_folder) -> OvisInference:
    return OvisInference(EvalConfig(model_path=str(model_folder), **SETTINGS))


def crops_then_seven(asked: Asked) -> str:
    """Calls once, and says 7 where it then sees a crop."""
    return "<think>\n<tool_call>[100, 60, 140, 100]</tool_call>Hm.\n</think>\n\n<answer>7</answer><|im_end|>"


def says_seven(asked: Asked) -> str:
    return "<think>\nIt is 7.\n</think>\n\n<answer>7</answer><|im_end|>"


@pytest.fixture
def play(inference, monkeypatch) -> Callable[[Script], list[Asked]]:
    """Answers by a script in place of the model; gives the list of what is asked."""

    def by(script: Script) -> list[Asked]:
        seen: list[Asked] = []

        def finish(asked: Iterable[Asked]) -> Iterator[Asked]:
            for one in asked:
                if not one.is_over:  # or it was played with its siblings
                    scripts = [script(one)] * len(one.request.drivers)
                    ScriptedEngine(inference.processor, scripts).run([one.request])
                seen.append(one)
                yield one

        monkeypatch.setattr(inference, "finish", finish)
        return seen

    return by


@pytest.fixture
def data(tmp_path: Path, image) -> Path:
    """Five questions of one's own about one picture, the fourth with another answer."""
    image.save(tmp_path / "a.png")
    rows = []
    for n in range(1, 6):
        gold = {"answer": "8" if n == 4 else "7", "box": [99, 59, 141, 99]}
        rows.append({"image_path": "a.png", "QnA": [{"Q": f"Digit {n}?", "A3": "<answer>7</answer>", **gold}]})
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def evaluation(inference: OvisInference, data: Path, share: Share | None = None, **settings: Any) -> Evaluation:
    config = EvalConfig(**{**SETTINGS, "model_path": inference.config.model_path, "data": data, **settings})
    files = BenchFiles("jsonl", find_files("jsonl", data), [data])
    return Evaluation(config, inference, {"jsonl": files}, data / "result.jsonl", share or Share())


def test_a_result_holds_all_that_a_page_shows_of_each_answer(inference, data, play) -> None:
    play(crops_then_seven)
    evaluation(inference, data).run()
    start, *answers = lines_of(data / "result.jsonl")
    assert len(answers) == 5
    first = answers[0]
    assert first["images"] == [{"path": "a.png"}] and first["sizes"] == [[160, 120]]
    assert (first["question"], first["gold"], first["prediction"], first["score"]) == ("Digit 1?", ["7"], "7", 1.0)
    assert first["crops"][0]["box"] == [100, 60, 140, 100] and first["gold_boxes"] == [[99, 59, 141, 99]]
    assert (first["condition"], first["by"], first["stop_reason"]) == ("crops", "rules", "answered")
    assert "<tool_call>" in first["response"] and first["tokens"]["crops"] == 9
    recipe = start["recipe"]
    assert recipe["model"]["fingerprint"] and recipe["pixels"]["image_max_pixels"] and recipe["generation"]["max_turns"]
    assert recipe["benches"]["jsonl"]["thinking"] is True and recipe["benches"]["jsonl"]["scorer"] == "text"
    assert start["start"]["git"] and start["start"]["packages"]["torch"]


def test_all_ten_conditions_are_asked_in_one_run(inference, data, play) -> None:
    play(crops_then_seven)
    run = evaluation(inference, data, controls="all")
    run.run()
    found = summary_of(run.result, "jsonl")
    assert tuple(found.conditions) == CONDITIONS and {one.num_answers for one in found.conditions.values()} == {5}
    assert found.conditions["crops"].score.mean == 0.8 and found.grounding.coverage > 0.9
    assert found.helps is False


def test_an_answer_without_a_call_is_not_asked_for_again(inference, data, play) -> None:
    asked = play(says_seven)
    run = evaluation(inference, data, controls=["no_crop", "gold_crop", "question_only"])
    run.run()
    assert len(asked) == 10  # with crops and without the picture
    copied = [line["condition"] for line in run.result.answers.values() if line["copied_from"] == "crops"]
    assert sorted(copied) == ["gold_crop"] * 5 + ["no_crop"] * 5
    assert Result([run.out]).answers == run.result.answers


def test_a_second_run_asks_only_what_is_missing_and_half_a_line_is_none(inference, data, play) -> None:
    def stops(asked: Asked) -> str:
        if len(seen) == 3:
            raise KeyboardInterrupt
        return says_seven(asked)

    seen = play(stops)
    with pytest.raises(KeyboardInterrupt, match="3 answers; the same command goes on"):
        evaluation(inference, data).run()
    out = data / "result.jsonl"
    with out.open("a") as file:
        file.write('{"bench": "jsonl", "id"')
    asked = play(says_seven)
    run = evaluation(inference, data)
    run.run()
    assert len(asked) == 2 and len(run.result.answers) == 5
    assert len(Result([out]).answers) == 5 and len(Result([out]).starts) == 2
    evaluation(inference, data).run()
    assert len(asked) == 2


def test_another_recipe_does_not_go_on_with_a_result(inference, data, play) -> None:
    play(says_seven)
    evaluation(inference, data).run()
    with pytest.raises(ConfigError, match=r"another recipe(.|\n)*max_new_tokens: 200 there, 100 here"):
        evaluation(inference, data, max_new_tokens=100)
    evaluation(inference, data, controls=["blank_crop"], limit=2)  # more or less of the same recipe is welcome
    evaluation(inference, data, judge="http://127.0.0.1:1/v1", judge_model="m")
    (data / "eval.jsonl").write_text((data / "eval.jsonl").read_text() + "\n")
    with pytest.raises(ConfigError, match=r"benches.jsonl.files.eval.jsonl"):
        evaluation(inference, data)


def test_processes_share_the_questions_and_a_run_without_parts_joins_them(inference, data, play) -> None:
    asked = play(says_seven)
    for index in range(2):
        part = evaluation(inference, data, Share(index=index, count=2))
        part.run()
        assert len(part.result.answers) == (3, 2)[index]
    assert [path.name for path in parts_of(data / "result.jsonl")] == ["result.1-of-2.jsonl", "result.2-of-2.jsonl"]
    whole = evaluation(inference, data)
    whole.run()
    assert len(asked) == 5 and len(whole.result.answers) == 5
    assert parts_of(data / "result.jsonl") == [] and len(Result([whole.out]).answers) == 5


def test_parts_that_are_still_written_are_not_joined(inference, data, play) -> None:
    play(says_seven)
    part = evaluation(inference, data, Share(index=0, count=2))
    part.run()
    whole = evaluation(inference, data)
    with part.file.writing(lambda: part.result.lines()), pytest.raises(ConfigError, match="another process is writing"):
        whole.run()
    assert part.file.path.exists()


def test_what_fails_is_named_counts_nowhere_and_is_asked_again(inference, data, play, image) -> None:
    rows = (data / "eval.jsonl").read_text().splitlines()
    rows[1] = rows[1].replace("a.png", "gone.png")
    rows[2] = '{"image_path": "a.png", "QnA": [{"Q": "Digit 3?"}]}'
    (data / "eval.jsonl").write_text("\n".join(rows) + "\n")
    asked = play(says_seven)
    run = evaluation(inference, data)
    run.run()
    assert (len(asked), run.num_failed, len(run.result.failed)) == (3, 2, 2)
    told = {key.id: line["error"] for key, line in run.result.failed.items()}
    assert "gone.png" in told["2"] and "eval.jsonl:3" in told["3"]
    image.save(data / "gone.png")
    again = evaluation(inference, data)
    again.run()
    assert len(asked) == 4 and [*again.result.failed] == [key for key in run.result.failed if key.id == "3"]


def test_the_samples_of_a_question_are_siblings_and_drawn_by_their_number(inference, data, play) -> None:
    asked = play(says_seven)
    settings = {"samples": 3, "temperature": 1.0, "limit": 2, "controls": ["random_crop", "no_crop"]}
    run = evaluation(inference, data, **settings)
    run.run()
    keys = sorted((key.id, key.sample) for key in run.result.answers if key.condition == "crops")
    assert keys == [(row, n) for row in "12" for n in range(3)]
    assert [len(one.request.drivers) for one in asked] == [3] * 6
    out = data / "result.jsonl"
    kept = [line for line in lines_of(out) if line.get("sample") != 1]
    out.write_text("".join(json.dumps(line) + "\n" for line in kept))
    again = evaluation(inference, data, **settings)
    again.run()
    assert len(asked) == 12 and again.result.answers.keys() == run.result.answers.keys()
    assert len(list(lines_of(out))) == 2 + 18


def test_samples_under_a_control_with_chance_have_their_own_seeds(inference, data, play) -> None:
    asked = play(crops_then_seven)
    evaluation(inference, data, samples=3, temperature=1.0, limit=2, controls=["random_crop"]).run()
    controlled = asked[6:]
    assert len(controlled) == 6 and [len(one.request.drivers) for one in controlled] == [1] * 6
    assert len({one.request.seed for one in controlled}) == 6
    lines = lines_of(data / "result.jsonl")
    controls = [line for line in lines if line.get("condition") == "random_crop"]
    assert len({line["crops"][0]["box"][0] for line in controls}) > 3


def test_fewer_rows_are_spread_over_all_with_their_neighbours() -> None:
    assert rows_of(3, 5) == rows_of(3, None) == [0, 1, 2]
    assert rows_of(100, 8) == [0, 1, 2, 3, 48, 49, 50, 51]
    assert rows_of(10, 2) == [0, 1] and rows_of(10, 9) == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_a_judge_decides_in_the_end_and_its_verdict_is_kept(inference, data, play, monkeypatch) -> None:
    rows = (data / "eval.jsonl").read_text().replace('"answer": "7"', '"answer": "a small dog"')
    (data / "eval.jsonl").write_text(rows)
    play(says_seven)
    replies = iter([True, RuntimeError("down"), False, True])
    monkeypatch.setattr("looktwice.evaluation.run.Judge.__call__", lambda self, asked: [next(replies) for _ in asked])
    judge = {"judge": "http://127.0.0.1:1/v1", "judge_model": "m"}
    run = evaluation(inference, data, **judge)
    run.run()
    assert [line["score"] for line in run.result.of("jsonl", "crops")] == [1.0, None, 0.0, 0.0, 1.0]
    kept = Result([run.out]).of("jsonl", "crops")
    assert [line["by"] for line in kept] == ["judge", "undecided", "judge", "rules", "judge"]
    assert kept[0]["ruled"] == {"score": 0.0, "by": "rules"}
    replies = iter([True])
    again = evaluation(inference, data, **judge)
    again.run()
    assert again.result.of("jsonl", "crops")[1]["score"] == 1.0
    replies = iter([True, True, False, True])
    more = evaluation(inference, data, controls=["no_crop"], **judge)  # copies of answers that were judged
    more.run()
    assert [line["score"] for line in Result([run.out]).of("jsonl", "no_crop")] == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_a_page_reads_the_pictures_of_an_answer_from_the_files_again(inference, tmp_path, play) -> None:
    play(says_seven)
    paths = find_files("hrbench4k", make(tmp_path, "hrbench4k"))
    config = EvalConfig(**{**SETTINGS, "bench": ["hrbench4k"], "model_path": inference.config.model_path})
    run = Evaluation(config, inference, {"hrbench4k": BenchFiles("hrbench4k", paths, [tmp_path])}, tmp_path / "a.jsonl")
    run.run()
    items, lines = Items(Result([run.out])), run.result.of("hrbench4k", "crops")
    assert [line["images"] for line in lines] == [[{"path": None}]] * 3
    sizes = [[[*image_size(source)] for source in items.of(line).images] for line in lines]
    assert sizes == [line["sizes"] for line in lines] == [[[160, 120]]] * 3
    with pytest.raises(DataError, match="another question than when it was asked"):
        items.of({**lines[0], "about": "Which?"})


def test_controls_need_no_name_of_their_own() -> None:
    assert EvalConfig(controls="all").controls == ALL_CONTROLS
