"""`looktwice data check`: each bad row and picture of the folder bad gets its verdict, and training agrees."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from looktwice import cli
from looktwice.checking import check as check_module
from looktwice.checking.check import CHUNK, Judge, Verdict, judge
from looktwice.checking.fix import Fixed, fix
from looktwice.config import CheckConfig, DataConfig, Stage
from looktwice.data import image_files
from looktwice.data.examples import Encoder
from looktwice.data.reasons import BOX_REASONS, REASONS
from looktwice.errors import DataError, LooktwiceError
from looktwice.formats.files import RowFile
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.training import sets
from looktwice.training.distributed import World
from looktwice.training.sets import fitted

BAD = Path(__file__).parent / "bad"
REAL_SAMPLE = Path(__file__).parents[3] / "shared" / "sample_data" / "refcoco_sample.jsonl"
CASES: dict[str, dict[str, Any]] = {
    case["name"]: case for case in map(json.loads, (BAD / "cases.jsonl").read_text().splitlines())
}
BY_DECODING = ("picture: a wrong checksum",)
"""Found by `--decode` alone."""
AT_START = ("set: all too long, and to be left out",)
"""What no single sample shows."""

ROTATED = 6
GOOD = {"Q": "What is it?", "A3": "<think>Hm. {Crop cup [10, 10, 90, 90]}</think>\n\n<answer>a cup</answer>"}


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures whose bytes matter, and some whose size does."""
    folder = tmp_path_factory.mktemp("pictures")
    shutil.copytree(BAD / "pictures", folder, dirs_exist_ok=True)
    sizes = {"good.png": (200, 150), "b.png": (200, 150), "strip.png": (3000, 40), "large.png": (1700, 1600)}
    for name, size in sizes.items():
        Image.new("RGB", size, "teal").save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    Image.new("RGB", (200, 150)).save(folder / "rotated.jpg", exif=exif)
    return folder


def write(path: Path, rows: list[object]) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def row(**fields: object) -> dict[str, object]:
    return {"image_path": "good.png", "QnA": [{**GOOD, **fields}]}


@pytest.fixture
def files_of(tmp_path: Path) -> Callable[[dict[str, Any]], tuple[Path, Path | None]]:
    """Training file and validation file of a case."""

    def files(case: dict[str, Any]) -> tuple[Path, Path | None]:
        held_out = write(tmp_path / "val.jsonl", case["val"]) if "val" in case else None
        return (
            BAD / "files" / case["file"] if "file" in case else write(tmp_path / "train.jsonl", case["rows"])
        ), held_out

    return files


@pytest.fixture
def judged(tmp_path: Path, image_folder: Path, processor: Ovis2_5Processor) -> Callable[..., Verdict]:
    def judged(*rows: object, with_processor: bool = True, **options: object) -> Verdict:
        config = CheckConfig(image_base_path=image_folder, **options)
        return judge([write(tmp_path / "d.jsonl", list(rows))], config, processor if with_processor else None)

    return judged


def placed(processor: Ovis2_5Processor, case: dict[str, Any]) -> Ovis2_5Processor:
    """The processor as the settings of a case make it."""
    other = processor.at(processor.policy)
    other.box_frame = case.get("options", {}).get("box_frame", processor.box_frame)
    return other


def said(content: object) -> dict[str, object]:
    asked = [{"type": "image", "image": "good.png"}, {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": content}]}


def test_a_lost_picture_is_told_with_the_path_at_which_it_is(judged: Callable[..., Verdict]) -> None:
    lost = ("GOOD.png", "/good.png", "C:\\me\\good.png", "good%2Epng")
    rows = [{"image_path": path, "QnA": [GOOD]} for path in lost]
    found = judged(*rows, with_processor=False).first["picture_missing"]
    assert len(found) == len(lost)
    for problem in found:
        assert re.search(r"no such picture; write \S+good\.png, which is there \(", str(problem))


# -- the set


@pytest.mark.parametrize("name", CASES)
def test_each_bad_row_and_image_gets_its_verdict(name, files_of, image_folder, processor) -> None:
    case = CASES[name]
    path, held_out = files_of(case)
    config = CheckConfig(image_base_path=image_folder, val_data_path=held_out, **case.get("options", {}))
    verdict = judge([path], config, placed(processor, case))
    assert dict(verdict.counts) == case["expect"], verdict.first
    assert verdict.would_train == (not any(REASONS[reason].is_fatal for reason in case["expect"]))


@pytest.mark.parametrize("num_checked_at_start", [2000, 0])
@pytest.mark.parametrize("name", CASES)
def test_training_refuses_what_is_fatal_and_nothing_else(
    name, num_checked_at_start, files_of, image_folder, processor, monkeypatch
) -> None:
    """Both ways: the whole set before the start, and a large one sample by sample."""
    if name in AT_START and not num_checked_at_start:
        pytest.skip("no single sample shows it")
    case = CASES[name]
    path, held_out = files_of(case)
    options = dict(case.get("options", {}))
    stage = options.pop("stage", "sft")
    options.pop("decode", None)
    data = DataConfig(train_data_path=path, val_data_path=held_out, image_base_path=image_folder, **options)
    ready = placed(processor, case)
    monkeypatch.setattr(sets, "CHECKED_AT_START", num_checked_at_start)

    def load(stage: Stage) -> None:
        train, more, *_ = sets.load_sets(data, ready, stage)
        encoder = Encoder(processor=ready, max_length=data.max_length, length_policy=data.length_policy)
        for sample in [*train, *more]:
            if stage == "sft":
                encoder(sample)
            else:
                fitted([sample], ready, data, SimpleNamespace(world=World(), note=lambda refits: None))

    judged = judge(
        [path], CheckConfig(image_base_path=image_folder, val_data_path=held_out, **case.get("options", {})), ready
    )
    fatal = [problem for reason in judged.reasons for problem in judged.first[reason] if problem.is_fatal]
    refusals = []
    for each in ("sft", "grpo") if stage == "both" else (stage,):
        try:
            load(each)
        except LooktwiceError as error:
            refusals.append(str(error))
    assert bool(refusals) == bool(fatal)
    # before the start all are named, later at least the one the run stops at
    told = [any(problem.what in refusal for refusal in refusals) for problem in fatal]
    assert all(told) if num_checked_at_start else any(told) or not fatal


def test_every_reason_has_a_bad_row_and_every_bad_row_a_reason() -> None:
    told_elsewhere = {"gold_mathematics"}  # where an extra is missing: tests/data/test_problems.py
    assert {reason for case in CASES.values() for reason in case["expect"]} == set(REASONS) - told_elsewhere
    assert len(CASES) >= 60


def test_every_image_and_file_of_the_set_is_used() -> None:
    text = (BAD / "cases.jsonl").read_text()
    kept = [path.name for folder in ("files", "pictures") for path in (BAD / folder).iterdir()]
    assert [name for name in kept if name not in text] == []


@pytest.mark.parametrize("name", BY_DECODING)
def test_a_header_alone_does_not_tell(name, files_of, image_folder, processor) -> None:
    path, _ = files_of(CASES[name])
    assert judge([path], CheckConfig(image_base_path=image_folder), processor).would_train


def test_codes_of_boxes_are_in_the_table() -> None:
    assert set(BOX_REASONS.values()) <= REASONS.keys()


@pytest.mark.skipif(not REAL_SAMPLE.exists(), reason="the sample file lies beside the repository")
def test_the_documented_sample_lacks_its_images_and_nothing_else(processor, tmp_path) -> None:
    verdict = judge([REAL_SAMPLE], CheckConfig(image_base_path=tmp_path), processor)
    assert dict(verdict.counts) == {"picture_missing": verdict.num_samples}
    assert len(RowFile(REAL_SAMPLE)) == verdict.num_rows


# -- what a verdict says


def test_a_good_set_has_no_findings(judged) -> None:
    verdict = judged(row(), row(Q="Where?"))
    assert (verdict.num_rows, verdict.num_samples, verdict.num_images) == (2, 2, 1)
    assert not verdict.counts and verdict.would_train
    assert str(verdict) == "training would run: 2 samples in 2 rows, and nothing was found"
    assert set(verdict.formats.values()) == {"documented"}


def test_a_problem_reads_as_place_field_and_mend(judged) -> None:
    [problem] = judged(row(A3="{Crop cup [10, 10, 90]}")).first["box_wrong_length"]
    assert str(problem).split("/")[-1] == (
        'd.jsonl:1: QnA[0].A3: crop command "{Crop cup [10, 10, 90]}": a box has 4 numbers [x1, y1, x2, y2], '
        "got [10.0, 10.0, 90.0]; mend the box or remove the command"
    )


def test_fatal_reasons_come_first_then_the_frequent_ones(judged) -> None:
    verdict = judged(row(A3="A cup."), row(Q="Whose?", A3="A."), row(A3="{Crop [1]}"), row(Q=""))
    assert verdict.reasons[-1] == "no_answer_block" and verdict.counts["no_answer_block"] == 2
    assert "2 places to mend or leave out, in 4 rows with 2 readable samples" in str(verdict)


def test_what_is_not_checked_without_a_flag_is_said(judged) -> None:
    assert set(judged(row(), with_processor=False).unchecked) == {"--model_name", "--decode"}
    assert judged(row(), decode=True).unchecked == {}


def test_an_image_is_known_again_under_another_path_and_its_copy_when_decoded(judged, image_folder) -> None:
    (image_folder / "link.png").symlink_to(image_folder / "good.png")
    shutil.copy(image_folder / "good.png", image_folder / "copy.png")
    names = ("good.png", str(image_folder / "good.png"), "link.png", "copy.png")
    rows = [{**row(), "image_path": name} for name in names]
    assert judged(*rows).counts == {"duplicate": 2}
    assert judged(*rows, decode=True).counts == {"duplicate": 3}


def test_workers_find_what_one_process_finds(tmp_path, image_folder, processor) -> None:
    cases = [one for one in CASES.values() if "file" not in one and "options" not in one and "val" not in one]
    rows = [one for case in cases for one in case["rows"] if "QnA" in one]
    training = write(tmp_path / "d.jsonl", [*rows, *({**row(Q=f"Number {n}?"), "anwser": n} for n in range(2 * CHUNK))])
    held_out = write(tmp_path / "val.jsonl", [row(), row(Q="Another?")])

    def found(num_workers: int) -> dict[str, object]:
        config = CheckConfig(image_base_path=image_folder, val_data_path=held_out, num_workers=num_workers)
        return judge([training], config, processor).as_json()

    alone = found(0)
    assert found(2) == alone
    assert {"leaked_question", "leaked_picture", "duplicate", "picture_missing"} <= alone["reasons"].keys()


def test_what_workers_saw_is_known_again_in_a_small_file(tmp_path, image_folder, processor, monkeypatch) -> None:
    monkeypatch.setattr(check_module, "ROWS_FOR_WORKERS", 3)
    training = write(tmp_path / "d.jsonl", [row(Q=f"Number {n}?") for n in range(3)])
    held_out = write(tmp_path / "val.jsonl", [row(Q="Number 1?")])
    for decode in (False, True):
        config = CheckConfig(image_base_path=image_folder, val_data_path=held_out, decode=decode)
        assert judge([training], config, processor).counts == {"leaked_question": 1, "leaked_picture": 1}


def test_an_image_that_cannot_be_used_is_listed_once_with_its_rows(judged, tmp_path, image_folder, capsys) -> None:
    lost = [{**row(Q=f"Number {n}?"), "image_path": name} for n in range(4) for name in ("absent.png", "gone.png")]
    lost.append({"image_path": "absent.png", "QnA": [{**GOOD, "Q": "This?"}, {**GOOD, "Q": "That?"}]})
    verdict = judged(*lost)
    assert verdict.counts["picture_missing"] == 9
    absent, gone = verdict.as_json()["reasons"]["picture_missing"]["first"]
    assert ("absent.png" in absent["what"], absent["rows"], gone["rows"]) == (True, 5, 4)
    assert check(tmp_path / "d.jsonl", "--image_base_path", image_folder) == 1
    assert capsys.readouterr().out.count("(in 5 rows)") == 1


def test_a_misspelt_field_is_noted_where_other_rows_have_it_right(judged) -> None:
    verdict = judged(row(answer="a cup"), row(Q="Where?", anser="there"))
    [problem] = verdict.first["ignored_field"]
    assert problem.what == 'field "anser" of 1 sample is ignored. Did you mean "answer"?'


def test_what_is_wrong_with_a_question_has_its_place(judged) -> None:
    verdict = judged(row(Q="What does <image> mean?"), row(Q="What does <image> mean?"))
    assert {problem.field for problems in verdict.first.values() for problem in problems} == {"QnA[0]"}
    assert dict(verdict.counts) == {"spells_placeholder": 2, "duplicate": 1}


def test_a_file_longer_than_a_chunk_is_judged_to_its_end(judged) -> None:
    rows = [row(Q=f"What is number {number}?") for number in range(CHUNK + 2)]
    verdict = judged(*rows, rows[0])
    assert (verdict.num_samples, dict(verdict.counts)) == (CHUNK + 3, {"duplicate": 1})
    [problem] = verdict.first["duplicate"]
    assert problem.where.endswith(f":{CHUNK + 3}") and problem.what.endswith("d.jsonl:1")


def test_the_machine_readable_form_holds_counts_and_places(judged) -> None:
    found = judged(row(A3="A cup.")).as_json()
    assert found["would_train"] is True
    [place] = found["reasons"]["no_answer_block"]["first"]
    assert place["where"].endswith("d.jsonl:1") and place["field"] == "QnA[0].A3"
    json.dumps(found)


def test_an_image_is_opened_once_for_all_its_questions(judged, monkeypatch) -> None:
    opened = []
    read_header = image_files.read_header
    monkeypatch.setattr(
        image_files, "read_header", lambda source, **how: opened.append(source) or read_header(source, **how)
    )
    judged(row(), row(Q="Where?"), {**row(Q="Whose?"), "image_path": "./good.png"})
    assert len(opened) == 1


# -- the command


def check(*arguments: object) -> int:
    return cli.main(["data", "check", *map(str, arguments)])


def test_the_command_ends_with_0_when_training_would_run(tmp_path, image_folder, capsys) -> None:
    report = tmp_path / "report.json"
    path = write(tmp_path / "d.jsonl", [row()])
    assert check(path, "--image_base_path", image_folder, "--model_name", "tiny", "--json", report) == 0
    assert capsys.readouterr().out.endswith("training would run: 1 sample in 1 row, and nothing was found\n")
    assert json.loads(report.read_text())["would_train"] is True


def test_the_command_ends_with_1_when_training_would_stop(tmp_path, image_folder, capsys) -> None:
    path = write(tmp_path / "d.jsonl", [row(), row(A3="{Crop [1]}")])
    assert check(path, "--image_base_path", image_folder) == 1
    out, error = capsys.readouterr()
    assert "box_wrong_length" in out and "not checked without --model_name" in out
    verdict = "training would stop: 1 place to mend or leave out, in 2 rows with 1 readable sample\n"
    assert out.endswith(verdict) and error == ""


@pytest.mark.parametrize("flag", ["--json", "--fix"])
@pytest.mark.parametrize("name", ["d.jsonl", "val.jsonl"])
def test_a_result_is_written_over_no_file_that_is_read(flag, name, tmp_path, image_folder, capsys) -> None:
    path, held_out = write(tmp_path / "d.jsonl", [row()]), write(tmp_path / "val.jsonl", [row()])
    words = (path, "--val_data", held_out, "--image_base_path", image_folder, flag, tmp_path / name)
    assert check(*words) == 1
    assert f"{flag} {tmp_path / name}: a file that is read; give another path" in capsys.readouterr().err
    assert [one.values for one in RowFile(tmp_path / name)] == [row()]


def test_several_files_cannot_be_fixed_into_one(tmp_path, capsys) -> None:
    assert check("a.jsonl", "b.jsonl", "--fix", tmp_path / "c.jsonl") == 1
    assert "--fix writes a copy of one file, 2 are given" in capsys.readouterr().err


DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^looktwice (data check .*)$", DOCS, re.MULTILINE)


def test_the_documented_commands_work(tmp_path, image_folder, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(image_folder, "pictures")
    write(Path("train.jsonl"), [row()])
    write(Path("val.jsonl"), [{**row(), "image_path": "b.png"}])
    write(Path("broken.jsonl"), [row(), row(A3="{Crop [1]}")])
    assert [cli.main(shlex.split(command)) for command in COMMANDS] == [0, 0, 1]
    assert json.loads(Path("found.json").read_text())["samples"] == 2
    assert [one.values for one in RowFile("clean.jsonl")] == [row()]


def test_every_reason_is_documented_as_it_is() -> None:
    written = re.findall(r"^\| `(\w+)` \| (stops|note) \| (.*?) \| (.*?) \|$", DOCS, re.MULTILINE)
    assert written == [
        (name, "stops" if reason.is_fatal else "note", reason.meaning, reason.mend) for name, reason in REASONS.items()
    ]


# -- the cleaned copy


def fixed_rows(
    rows: list[object], tmp_path: Path, image_folder: Path, processor: Ovis2_5Processor
) -> list[dict[str, Any]]:
    config = CheckConfig(image_base_path=image_folder)
    fixed(write(tmp_path / "d.jsonl", rows), tmp_path / "out.jsonl", config, processor)
    assert judge([tmp_path / "out.jsonl"], config, processor).would_train
    return [one.values for one in RowFile(tmp_path / "out.jsonl")]


def fixed(path: Path, target: Path, config: CheckConfig, processor: Ovis2_5Processor | None = None) -> Fixed:
    going, fatal = Judge(config, processor), defaultdict(list)
    going.judge([path], fatal)
    return fix(going, fatal, target)


def report_of(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out.jsonl.report.json").read_text())


def test_bad_rows_are_left_out_and_reported(tmp_path, image_folder, processor) -> None:
    rows = [row(), '{"image_path": ', {**row(), "image_path": "absent.png"}, row(Q="Where?")]
    assert fixed_rows(rows, tmp_path, image_folder, processor) == [rows[0], rows[3]]
    report = report_of(tmp_path)
    assert (report["rows"], report["rows_written"], report["mended"]) == (4, 2, [])
    assert [one["reason"] for one in report["left_out"]] == ["broken_json", "picture_missing"]


def test_a_bad_question_leaves_its_row_and_the_others_stay(tmp_path, image_folder, processor) -> None:
    other = {**GOOD, "Q": "Where?"}
    bad = {**GOOD, "A3": "{Crop cup [500, 500, 600, 600]} <answer>a</answer>"}
    [kept] = fixed_rows([{"image_path": "good.png", "QnA": [GOOD, bad, other]}], tmp_path, image_folder, processor)
    assert kept["QnA"] == [GOOD, other]
    assert [one["field"] for one in report_of(tmp_path)["left_out"]] == ["QnA[1].A3"]


@pytest.mark.parametrize(
    ("written", "mended"),
    [
        (
            {"A3": "{Crop cup [190, 140, 150, 100]} <answer>a</answer>"},
            "{Crop cup [150, 100, 190, 140]} <answer>a</answer>",
        ),
        ({"box": [190, 140, 150, 100]}, [150, 100, 190, 140]),
    ],
)
def test_corners_that_can_be_read_in_no_other_way_are_put_in_order(
    written, mended, tmp_path, image_folder, processor
) -> None:
    [kept] = fixed_rows([row(**written)], tmp_path, image_folder, processor)
    assert kept["QnA"][0][next(iter(written))] == mended
    [mend] = report_of(tmp_path)["mended"]
    assert mend["what"].startswith("corners put in order")


@pytest.mark.parametrize(("number", "is_mended"), [(1, False), (2, True), (3, False)])
def test_corners_are_put_in_order_on_the_picture_that_the_call_names(
    number, is_mended, tmp_path, image_folder, processor
) -> None:
    asked = [{"type": "image", "image": name} for name in ("good.png", "large.png")]
    call = "<tool_call>Crop cup in image NUMBER [1690, 1590, 1500, 1000]</tool_call> <answer>a</answer>"
    bad = said(call.replace("NUMBER", str(number)))
    bad["messages"][0]["content"][:1] = asked
    kept = fixed_rows([bad, said("<answer>a</answer>")], tmp_path, image_folder, processor)
    assert len(kept) == 1 + is_mended
    assert is_mended == ("in image 2 [1500, 1000, 1690, 1590]" in kept[0]["messages"][1]["content"])


@pytest.mark.parametrize(
    "box", ["[100, 50, 30, 40]", "[120, 80, 100, 90]", "[190, 140, 190, 100]", "[390, 140, 150, 100]"]
)
def test_a_box_with_another_reading_is_left_out(box, tmp_path, image_folder, processor) -> None:
    rows = [row(A3=f"{{Crop cup {box}}} <answer>a</answer>"), row()]
    assert fixed_rows(rows, tmp_path, image_folder, processor) == [rows[1]]


REVERSED = "<tool_call>[190, 140, 150, 100]</tool_call>"
SORTED = "<tool_call>[150, 100, 190, 140]</tool_call>"


@pytest.mark.parametrize(
    ("bad", "mended"),
    [
        (said(f"{REVERSED} <answer>[90, 80, 30, 20]</answer>"), said(f"{SORTED} <answer>[90, 80, 30, 20]</answer>")),
        (
            said([{"type": "text", "text": REVERSED}, {"type": "text", "text": "<answer>a</answer>"}]),
            said([{"type": "text", "text": SORTED}, {"type": "text", "text": "<answer>a</answer>"}]),
        ),
        (
            said([{"type": "crop", "box": [190, 140, 150, 100]}, {"type": "text", "text": "<answer>a</answer>"}]),
            said([{"type": "crop", "box": [150, 100, 190, 140]}, {"type": "text", "text": "<answer>a</answer>"}]),
        ),
        (
            row(A3=f"{{Crop a [190, 140, 150, 100]}} [9, 8, 3, 2] {REVERSED} <answer>a</answer>"),
            row(A3=f"{{Crop a [150, 100, 190, 140]}} [9, 8, 3, 2] {SORTED} <answer>a</answer>"),
        ),
    ],
)
def test_corners_are_put_in_order_in_calls_alone_wherever_they_stand(
    bad, mended, tmp_path, image_folder, processor
) -> None:
    assert fixed_rows([bad], tmp_path, image_folder, processor) == [mended]


def test_a_row_whose_box_can_be_mended_and_whose_image_is_missing_is_left_out(
    tmp_path, image_folder, processor
) -> None:
    bad = said(f"{REVERSED} <answer>a</answer>")
    bad["messages"][0]["content"].append({"type": "image", "image": "absent.png"})
    good = said("<answer>a</answer>")
    assert fixed_rows([bad, good], tmp_path, image_folder, processor) == [good]


def test_a_box_is_read_in_the_frame_of_its_own_question(tmp_path, image_folder, processor) -> None:
    in_thousandths = {**GOOD, "Q": "Where?", "A3": f"{REVERSED} <answer>a</answer>", "box_frame": "norm1000"}
    rows = [{"image_path": "good.png", "QnA": [GOOD, in_thousandths]}]
    # as thousandths the numbers fit as corner and size too
    assert fixed_rows(rows, tmp_path, image_folder, processor) == [row()]
    assert report_of(tmp_path)["mended"] == []


@pytest.mark.parametrize("other", [None, 5, [1], [None, "a"], True])
def test_what_is_no_text_beside_a_box_stops_no_mending(other, tmp_path, image_folder, processor) -> None:
    box = '{"bbox_2d": [190, 140, 150, 100]} <answer>a</answer>'
    rows = [{"image_path": "good.png", "question": "What?", "response_list": some} for some in ([other, box], [box])]
    [kept] = fixed_rows(rows, tmp_path, image_folder, processor)
    assert kept["response_list"] == ['{"bbox_2d": [150, 100, 190, 140]} <answer>a</answer>']


def test_a_box_in_a_field_with_a_dot_in_its_name_is_left_as_it_is(tmp_path, image_folder, processor) -> None:
    config = CheckConfig(image_base_path=image_folder, answer_key="a.1")
    rows = [{"image_path": "good.png", "QnA": [{"Q": "What?", "a.1": text}]} for text in (REVERSED, "A cup.")]
    done = fixed(write(tmp_path / "d.jsonl", rows), tmp_path / "out.jsonl", config, processor)
    assert (done.num_written, len(done.mended)) == (1, 0)


def test_a_question_that_is_left_out_counts_as_that_alone(tmp_path, image_folder, processor) -> None:
    both = {**GOOD, "Q": "Where?", "A3": f"{REVERSED} <answer>", "box": [190, 140, 150, 100]}
    mendable = {**GOOD, "Q": "Whose?", "A3": f"{REVERSED} <answer>a</answer>"}
    [kept] = fixed_rows([{"image_path": "good.png", "QnA": [both, mendable]}], tmp_path, image_folder, processor)
    assert kept["QnA"] == [{**mendable, "A3": f"{SORTED} <answer>a</answer>"}]
    report = report_of(tmp_path)
    assert [one["field"] for one in report["mended"]] == ["QnA[1].A3"]
    assert {one["field"] for one in report["left_out"]} == {"QnA[0].A3", "QnA[0].box"}


def test_a_copy_that_lost_the_sign_of_its_format_says_how_to_read_it(tmp_path, image_folder) -> None:
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "<answer>a cup</answer>"}]
    rows = [{"image": "good.png", "conversations": turns}, {"images": ["absent.png"], "conversations": turns}]
    path = write(tmp_path / "d.jsonl", rows)
    done = fixed(path, tmp_path / "out.jsonl", CheckConfig(image_base_path=image_folder))
    assert str(done).endswith("; read it with --from sharegpt")
    config = CheckConfig(image_base_path=image_folder, source_format="sharegpt")
    assert judge([tmp_path / "out.jsonl"], config).would_train


def test_a_byte_order_mark_and_blank_lines_are_not_copied(tmp_path, image_folder, processor) -> None:
    config = CheckConfig(image_base_path=image_folder)
    fixed(BAD / "files" / "byte_order_mark_and_blank_lines.jsonl", tmp_path / "out.jsonl", config, processor)
    text = (tmp_path / "out.jsonl").read_bytes()
    assert text.startswith(b"{") and b"\n\n" not in text and text.count(b"\n") == 2


def test_nothing_is_written_when_no_row_is_left(tmp_path, image_folder, processor) -> None:
    with pytest.raises(DataError, match="no row would be left"):
        fixed_rows([row(A3="{Crop [1]}")], tmp_path, image_folder, processor)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_sample_too_long_for_both_stages_counts_once(judged) -> None:
    long = row(Q="What " * 300, answer="a cup")
    verdict = judged(row(), long, stage="both", max_length=200, length_policy="drop")
    assert dict(verdict.counts) == {"over_length": 2}


def test_a_set_that_is_too_long_as_a_whole_is_not_fixed(tmp_path, image_folder, processor) -> None:
    config = CheckConfig(image_base_path=image_folder, max_length=5, length_policy="drop")
    with pytest.raises(DataError, match=r"no row would be left: .*every sample is longer than max_length 5"):
        fixed(write(tmp_path / "d.jsonl", [row()]), tmp_path / "out.jsonl", config, processor)


def test_the_file_itself_is_not_overwritten(tmp_path, image_folder) -> None:
    path = write(tmp_path / "d.jsonl", [row()])
    with pytest.raises(DataError, match="name another one"):
        fixed(path, path, CheckConfig(image_base_path=image_folder))


def test_a_file_that_cannot_be_read_is_not_fixed(tmp_path) -> None:
    with pytest.raises(DataError, match="no such data file"):
        fixed(tmp_path / "absent.jsonl", tmp_path / "out.jsonl", CheckConfig())
