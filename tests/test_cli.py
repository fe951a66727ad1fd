"""The command line: each mistake a user can make gives one clear message, exit code 1, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import looktwice
from looktwice import cli, launch
from looktwice.cli import main
from looktwice.cli.train import command_of, train_configs
from looktwice.errors import short
from looktwice.inference import OvisInference
from looktwice.training import grpo, sft
from looktwice.training.learner import Learner

GOOD = {"Q": "What is it?", "A3": "<think>{Crop cup 1 [0, 0, 40, 40]}</think>\n\n<answer>cup</answer>"}
ROW = {"image_path": "cup.png", "QnA": [GOOD]}
ROOT = Path(__file__).parents[1]
NOT_READ = {
    "sft": ("sft_checkpoint", "grpo_output_dir"),
    "grpo": ("model_name", "sft_output_dir"),
    "both": ("sft_checkpoint",),
}


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test as soon as a model is loaded."""

    def load(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded before the mistake was found")

    monkeypatch.setattr(Learner, "load", load)
    monkeypatch.setattr(OvisInference, "__init__", load)


@pytest.fixture
def command(tmp_path: Path, model_folder: Path) -> Callable[..., list[str]]:
    """The words of a good `train` command on one good record; settings given replace or, as None, drop a flag."""
    Image.new("RGB", (160, 120), "red").save(tmp_path / "cup.png")
    (tmp_path / "data.jsonl").write_text(json.dumps(ROW) + "\n", encoding="utf-8")

    def words(stage: str = "sft", **settings: object) -> list[str]:
        values = {
            "model_name": model_folder,
            "sft_checkpoint": model_folder,
            "train_data": tmp_path / "data.jsonl",
            "image_base_path": tmp_path,
            "sft_output_dir": tmp_path / "out" / "sft",
            "grpo_output_dir": tmp_path / "out" / "grpo",
            "device": "cpu",
        }
        for name in NOT_READ[stage]:
            del values[name]
        values |= settings
        flags = [[f"--{name}", str(value)] for name, value in values.items() if value is not None]
        return ["train", "--stage", stage, *(word for flag in flags for word in flag)]

    return words


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """The message of a command that must fail, with `tmp_path` written as DIR."""

    def run(words: list[str]) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(words) == 1
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("looktwice: ") and output.err.count("looktwice: ") == 1
        assert "Traceback" not in output.err
        assert sorted(tmp_path.rglob("*")) == before
        return output.err.removeprefix("looktwice: ").replace(str(tmp_path), "DIR").rstrip("\n")

    return run


# -- mistakes in the data


@pytest.mark.parametrize(
    ("line", "where", "mend"),
    [
        (
            {**ROW, "image_path": "cups.png"},
            "picture: DIR/cups.png: no such picture",
            "check the path and --image_base",
        ),
        ({**ROW, "image_path": "text.png"}, "picture: DIR/text.png: not a readable picture", "name the file"),
        ('{"image_path": "cup.png", "QnA" []}', "broken JSON at column 33", "mend the line"),
        ({"QnA": [GOOD]}, "image_path: the field is missing", "add it"),
        ({"image_path": "cup.png", "QnA": [{"Q": "What?"}]}, "QnA[0].A3: the field is missing", "add it"),
        ({"image_path": "cup.png", "QnA": [{**GOOD, "A3": ""}]}, "QnA[0].A3: the text is empty", "remove the record"),
        (
            {"image_path": "cup.png", "QnA": [{**GOOD, "A3": "<answer></answer>"}]},
            "QnA[0].A3: ",
            "<answer>…</answer> with text in it",
        ),
        (
            {"image_path": "cup.png", "QnA": [{**GOOD, "A3": GOOD["A3"].replace("[0, 0, 40", "[200, 0, 240")}]},
            "QnA[0].A3: call 1 <tool_call>[200, 0, 240, 40]</tool_call> read as original_px: the box lies outside",
            "mend the box",
        ),
        (
            {"image_path": "cup.png", "QnA": [{**GOOD, "A3": GOOD["A3"].replace("[0, 0, 40", "[50, 0, 40")}]},
            'QnA[0].A3: crop command "{Crop cup 1 [50, 0, 40, 40]}"',
            "mend the box",
        ),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.usefixtures("no_model")
def test_a_bad_record_is_named_with_file_line_field_and_mend(
    stage, line, where, mend, command, refusal, tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    text = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(ROW)}\n\n{text}\n", encoding="utf-8")
    head, problem = refusal(command(stage)).splitlines()
    assert head.startswith("1 problem in ")
    assert problem.startswith(f"  DIR/data.jsonl:3: {where}")
    assert mend in problem


@pytest.mark.usefixtures("no_model")
def test_validation_data_is_checked_too(command, refusal, tmp_path) -> None:
    (tmp_path / "val.jsonl").write_text("{}\n", encoding="utf-8")
    assert "DIR/val.jsonl: no format fits" in refusal(command(val_data=tmp_path / "val.jsonl"))


@pytest.mark.usefixtures("no_model")
def test_a_missing_data_file_names_the_nearest_one(command, refusal, tmp_path) -> None:
    message = refusal(command(train_data=tmp_path / "dato.jsonl"))
    assert message == 'DIR/dato.jsonl: no such data file; check the path. Did you mean "data.jsonl"?'


# -- mistakes in settings


@pytest.mark.parametrize("stage", ["sft", "grpo", "both"])
@pytest.mark.usefixtures("no_model")
def test_missing_training_data_name_their_flag(stage, command, refusal) -> None:
    message = refusal(command(stage, train_data=None))
    assert message == "--train_data is missing; give it on the command line or in a config file"


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ((), "no weights (model.safetensors or adapter_config.json) in this folder"),
        (("config.json",), "no weights (model.safetensors or adapter_config.json) in this folder"),
        (("model.safetensors",), "no config.json in this folder"),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.usefixtures("no_model")
def test_a_folder_without_a_model_is_named_with_what_it_lacks(
    stage, files, problem, command, refusal, tmp_path: Path
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    given = {"sft": "model_name", "grpo": "sft_checkpoint"}[stage]
    assert refusal(command(stage, **{given: folder})) == f"DIR/empty: {problem}"


@pytest.mark.usefixtures("no_model")
def test_a_model_that_is_nowhere_is_named(command, refusal) -> None:
    assert refusal(command(model_name="./none")).startswith("./none: no such model folder; give a folder, a hub name")


@pytest.mark.usefixtures("no_model")
def test_an_unknown_flag_names_the_nearest_one(command, refusal) -> None:
    message = refusal([*command(), "--learning_rte", "1"])
    assert message == 'unknown argument --learning_rte. Did you mean "--learning_rate"?'


@pytest.mark.usefixtures("no_model")
def test_an_unknown_key_of_a_config_file_names_file_and_nearest_key(command, refusal, tmp_path) -> None:
    (tmp_path / "sft.json").write_text('{"learning_rte": 1}')
    message = refusal(command(sft_config=tmp_path / "sft.json"))
    assert message == 'DIR/sft.json: unknown setting "learning_rte" of SFTConfig. Did you mean "learning_rate"?'


@pytest.mark.usefixtures("no_model")
def test_a_wrong_value_is_named_with_what_it_takes(command, refusal) -> None:
    assert refusal(command(batch_size=0)).startswith(
        "train_batch_size (--batch_size) is '0': input should be greater than or equal"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_r": 4, "lora_alpha": 8}, "lora_r, lora_alpha: all weights are trained, without LoRA; add --use_lora"),
        ({"quantization": "nf4"}, "quantization nf4 trains adapters alone; add --use_lora"),
        (
            {"attn_implementation": "flex_attention"},
            "flex_attention has no backward on a CPU; use --attn_implementation",
        ),
    ],
)
def test_a_setting_that_does_not_go_with_the_start_is_refused(
    settings, message, command, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(**settings)) == 1
    assert capsys.readouterr().err.startswith(f"looktwice: {message}")
    assert not list((tmp_path / "out").glob("sft/*"))


@pytest.mark.parametrize("stage", ["grpo", "both"])
@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        (
            "robst",
            'reward is "robst"; give one of robust, paper, code, accuracy, or path.py:function. Did you mean "robust"?',
        ),
        ("none.py:score", "reward file none.py does not exist"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_a_bad_reward_is_found_before_either_stage(stage, reward, problem, command, refusal) -> None:
    assert refusal(command(stage, reward=reward)).startswith(problem)


@pytest.mark.parametrize("stage", ["grpo", "both"])
@pytest.mark.usefixtures("no_model")
def test_a_question_without_an_answer_to_judge_by_is_found_before_either_stage(
    stage, command, refusal, tmp_path: Path
) -> None:
    row = {"image_path": "cup.png", "QnA": [{"Q": "What is it?", "A3": "A cup."}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert 'DIR/data.jsonl:1: QnA[0].A3: no <answer> block and no field "answer"; add' in refusal(command(stage))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("stage", ["sft", "grpo", "both"])
def test_a_used_run_folder_is_refused_before_anything_is_loaded(stage, command, refusal, tmp_path, no_model) -> None:
    used = tmp_path / "out" / ("sft" if stage == "sft" else "grpo") / "final_model"
    used.mkdir(parents=True)
    assert refusal(command(stage)) == (
        f"DIR/out/{used.parent.name}: holds a run (final_model); go on with it: --resume, replace it: --overwrite, or "
        "give another folder"
    )


def test_the_stages_do_not_share_a_run_folder(command, refusal, tmp_path) -> None:
    message = refusal(command("both", sft_output_dir=tmp_path / "run", grpo_output_dir=tmp_path / "run"))
    assert message == "DIR/run: the run folder of both stages; give each its own"


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("variables", "settings", "told"),
    [
        (
            {"OMPI_COMM_WORLD_SIZE": "2"},
            {},
            "one of 2 processes (OMPI_COMM_WORLD_SIZE); start them with torchrun",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0"}, {}, "(WORLD_SIZE) without LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start them"),
        ({"WORLD_SIZE": "two"}, {}, "WORLD_SIZE is 'two'; it must be a number"),
        ({}, {"distributed": "fsdp"}, "distributed is fsdp, and one process has nobody to share the model with"),
        (TORCHRUN, {"device": "auto"}, "device is auto, and of several processes each takes the GPU of its local rank"),
        (
            TORCHRUN,
            {"distributed": "fsdp", "quantization": "nf4", "use_lora": True},
            "quantization nf4 does not go with fsdp; use --distributed ddp, or leave it out",
        ),
        (
            TORCHRUN,
            {"stage": "grpo", "distributed": "fsdp", "exact": True},
            "exact True does not go with fsdp; use --distributed ddp, or leave it out",
        ),
    ],
)
def test_several_processes_are_those_of_torchrun(variables, settings, told, command, refusal, monkeypatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert told in refusal(command(**settings))


def test_several_processes_go_on_by_the_command_of_torchrun(monkeypatch) -> None:
    words = ["--stage", "sft", "--overwrite"]
    assert command_of(words) == "looktwice train --stage sft"
    for name, value in (TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    assert command_of(words) == "torchrun --nproc_per_node 4 -m looktwice train --stage sft"


def test_an_error_that_all_processes_have_is_told_by_rank_0(command, monkeypatch, capsys) -> None:
    for name, value in (TORCHRUN | {"RANK": "1", "LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    waited: list[float] = []
    monkeypatch.setattr(launch.time, "sleep", waited.append)  # in which torchrun ends it
    assert main(command(stage="grpo", device="auto")) == 1
    assert waited == [launch.SECONDS_BEFORE_RANK_0]
    told = capsys.readouterr()
    assert told.err.startswith("looktwice: rank 1: device is auto, and of several processes") and told.out == ""


def test_a_run_without_steps_is_refused(command, refusal) -> None:
    assert "num_epochs is 0, so nothing would be trained" in refusal(command(num_epochs=0))


@pytest.mark.parametrize("save_steps", [2, 1])
def test_an_interrupted_run_says_what_is_kept_and_how_to_go_on(
    save_steps, command, tmp_path, monkeypatch, capsys
) -> None:
    def interrupt_at_the_second_step(*_: object) -> dict[str, float]:
        monkeypatch.setattr(sft, "train_step", raise_interrupt)
        return {}

    def raise_interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sft, "train_step", interrupt_at_the_second_step)
    words = command(max_steps=3, save_steps=save_steps)
    assert main([*words, "--overwrite"]) == 130
    kept = f"{tmp_path}/out/sft/checkpoint-1 is kept; go on with: looktwice {shlex.join(words)} --resume"
    nothing = f"nothing is kept, as {tmp_path}/out/sft holds no checkpoint yet; start anew with: looktwice "
    expected = kept if save_steps == 1 else f"{nothing}{shlex.join(words)} --overwrite"  # its log holds a step
    assert capsys.readouterr().err.endswith(f"looktwice: interrupted; {expected}\n")


HOW = [[], ["--overwrite"], ["--resume"], ["--resume", "a"], ["--resume=a"], ["--grpo-resume-from-checkpoint", "a"]]
HOW += [["--grpo_overwrite", "true"], ["--resume", "--grpo_resume", "--overwrite"]]


@pytest.mark.parametrize("how", HOW)
def test_the_command_that_goes_on_does_not_say_how_the_last_start_began(how) -> None:
    assert command_of(["--seed", "1", *how, "--lora_r", "4"]) == "looktwice train --seed 1 --lora_r 4"


@pytest.fixture
def signal_in_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[object, str, int], None]:
    """Makes the first call of a function of a module raise a signal before it does what it does."""

    def arrange(module: object, name: str, number: int) -> None:
        real = getattr(module, name)

        def raise_first(*args: object, **options: object) -> object:
            monkeypatch.setattr(module, name, real)
            signal.raise_signal(number)
            return real(*args, **options)

        monkeypatch.setattr(module, name, raise_first)

    return arrange


@pytest.mark.parametrize(
    ("number", "code", "told"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped by SIGTERM")],
)
def test_a_signal_lets_the_step_be_saved_and_the_command_that_is_told_goes_on(
    number, code, told, signal_in_step, command, tmp_path, capsys
) -> None:
    signal_in_step(sft, "train_step", number)
    words = command(max_steps=2, save_total_limit=0)
    assert main(words) == code
    line = capsys.readouterr().err.splitlines()[-1]
    kept = f"{tmp_path}/out/sft/checkpoint-1 is kept"
    assert line == f"looktwice: {told}; {kept}; go on with: looktwice {shlex.join(words)} --resume"
    assert main(shlex.split(line.partition("go on with: looktwice ")[2])) == 0
    log = (tmp_path / "out" / "sft" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in log] == [1, 2]


SHORT = {"max_steps": 1, "grpo_max_steps": 2, "num_generations": 2, "max_new_tokens": 4, "learning_rate": 1e-4}


@pytest.mark.parametrize(("module", "name"), [(sft, "train_step"), (sft, "save_final"), (grpo, "tell_failures")])
def test_both_stages_go_on_wherever_they_are_by_one_command(
    module, name, signal_in_step, command, tmp_path, capsys
) -> None:
    signal_in_step(module, name, signal.SIGTERM)
    words = command("both", **{**SHORT, "max_steps": 2})
    assert main(words) == 143
    told = capsys.readouterr().err.splitlines()[-1].partition("go on with: looktwice ")[2]
    assert told == f"{shlex.join(words)} --resume"
    assert main(shlex.split(told)) == 0
    lines = capsys.readouterr().out.splitlines()
    out = tmp_path / "out"
    done = f"stage 1 is done, all 2 steps: {out}/sft/final_model; more epochs or steps make it longer"
    assert (lines[0] == done) == (name != "train_step")
    for stage in ("sft", "grpo"):
        log = (out / stage / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in log] == [1, 2]
    model = (out / "sft" / "final_model" / "model.safetensors").stat()
    assert main(shlex.split(told)) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "stage 1 is done, all 2 steps",
        "stage 2 learnt nothing, no step had a gradient, all 2 steps",
    ]
    assert (out / "sft" / "final_model" / "model.safetensors").stat() == model


def test_a_stage_2_of_another_stage_1_is_refused_before_that_is_trained(command, refusal, tmp_path) -> None:
    (tmp_path / "out" / "grpo" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "out" / "grpo" / "checkpoint-1" / "train_config.json").write_text(
        '{"run": {"stage": "grpo", "order": {}, "step": 1, "files": {}}}'
    )
    message = refusal([*command("both"), "--resume"])
    assert message.startswith(
        "DIR/out/grpo/checkpoint-1: of a stage 2 that began from another model, as stage 1 is not"
    )


def test_stage_2_is_not_done_when_stage_1_has_trained_on(command, tmp_path, capsys) -> None:
    words = command("both", **{**SHORT, "grpo_max_steps": 1}, lr_scheduler_type="constant", warmup_ratio=0)
    assert main(words) == 0
    assert main([*words, "--resume", "--max_steps", "2"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith(
        "/grpo/checkpoint-1: its run started from another model; name that one to go on, or give another run folder"
    )
    assert main([*words, "--resume", "--max_steps", "2", "--grpo_output_dir", str(tmp_path / "new")]) == 0


def test_a_resume_of_both_is_of_stage_1_alone_where_it_names_a_checkpoint() -> None:
    both = ["--stage", "both"]
    resumes = {
        words: [str(config.resume_from_checkpoint) for config in train_configs([*both, *words.split()])[3:]]
        for words in (
            "--resume",
            "--resume a",
            "--grpo_resume",
            "--resume a --grpo_resume b",
            "--resume --grpo_resume b",
        )
    }
    assert [*resumes.values()] == [
        ["latest", "latest"],
        ["a", "None"],
        ["None", "latest"],
        ["a", "b"],
        ["latest", "b"],
    ]


def test_a_finished_run_is_made_longer_and_says_what_it_was_not_trained_with(command, tmp_path, capsys) -> None:
    words = command(max_steps=1, lr_scheduler_type="constant", warmup_ratio=0)
    assert main(words) == 0
    assert main([*words, "--resume", "--learning_rate", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"stage 1 is done, all 1 step: {tmp_path}/out/sft/final_model; not trained with learning_rate 2e-05 -> 1.0; "
        "more epochs or steps make it longer"
    )
    assert main([*words, "--resume", "--max_steps", "2"]) == 0
    log = (tmp_path / "out" / "sft" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in log] == [1, 2]


def test_a_run_killed_before_its_final_model_writes_it_alone(command, tmp_path, capsys) -> None:
    words = command(max_steps=1)
    assert main(words) == 0
    weights = tmp_path / "out" / "sft" / "final_model" / "model.safetensors"
    saved = weights.read_bytes()
    shutil.rmtree(weights.parent)
    assert main([*words, "--resume"]) == 0
    assert weights.read_bytes() == saved
    told = capsys.readouterr().out
    assert f"{tmp_path}/out/sft/checkpoint-1: going on with the final model alone\n" in told
    log = (tmp_path / "out" / "sft" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in log] == [1]


def test_a_model_that_was_being_replaced_starts_stage_2(command, tmp_path, model_folder) -> None:
    shutil.copytree(model_folder, tmp_path / ".final_model.replaced")
    words = command("grpo", **{name: SHORT[name] for name in ("num_generations", "max_new_tokens")}, max_steps=1)
    assert main([*words, "--sft_checkpoint", str(tmp_path / "final_model")]) == 0


def test_a_run_folder_that_cannot_be_made_is_named(command, refusal, tmp_path) -> None:
    (tmp_path / "file").touch()
    message = refusal(command(sft_output_dir=tmp_path / "file" / "run"))
    assert message.startswith("DIR/file/run: cannot be made as a run folder (")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["trian"], 'unknown command "trian". Did you mean "train"?'),
        (["ask"], "a picture and a question are needed: looktwice ask photo.jpg"),
        (["ask", "photo.jpg"], "a picture and a question are needed: looktwice ask photo.jpg"),
        (["ask", "none.jpg", "What?"], "none.jpg: no such picture"),
        (
            ["ask", "none.jpg", "What?", "--temprature", "1"],
            'unknown argument --temprature. Did you mean "--temperature"?',
        ),
        (["ask", "none.jpg", "What?", "--top_p", "0"], "top_p is '0': input should be greater than 0"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_a_wrong_command_is_named(words, problem, refusal) -> None:
    assert refusal(words).startswith(problem)


# -- what works


@pytest.mark.parametrize(
    "words",
    [["--bf16", "True"], ["--bf16=true"], ["--bf16", "1"], ["--bf16=yes"], ["--no-bf16", "false"], ["--no-bf16=0"]],
)
def test_a_switch_may_be_written_with_its_value(words) -> None:
    assert train_configs(["--stage", "sft", *words])[3].bf16 is True


@pytest.mark.parametrize("words", [["--bf16", "False"], ["--bf16=false"], ["--bf16", "0"], ["--no-bf16", "true"]])
def test_a_switch_may_be_written_off_with_its_value(words) -> None:
    assert train_configs(["--stage", "sft", "--bf16", *words])[3].bf16 is False


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["train", "--bf16=maybe"], "--bf16 is 'maybe'; write --bf16 or --no-bf16"),
        (["ask", "a.png", "Q", "--image_path", "b.png"], "a picture or a question is given twice"),
        (["ask", "a.png", "Q", "--question", "R"], "a picture or a question is given twice"),
        (["ask", "--image_path", "none.jpg", "What is it?"], "none.jpg: no such picture or video"),
        (["ask", "What is it? " * 40, "a.png"], "What is it? What is it?"),
        (
            ["hm"],
            'unknown command "hm". There are train, ask, chat, eval, report, serve, data, export, plan, doctor, demo.',
        ),
        (["train", "--min_pixels", "9", "--max_pixels", "5"], "min_pixels 9 is more than max_pixels 5; swap them"),
    ],
)
def test_what_can_be_meant_in_two_ways_is_refused(words, problem, refusal) -> None:
    assert refusal(words).startswith(problem)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"looktwice {looktwice.__version__}\n"


def test_a_log_has_whole_lines_in_their_order_and_no_bars_of_other_libraries() -> None:
    code = """
import sys
from looktwice.cli import main
main(["--version"])
from tqdm import tqdm
list(tqdm(range(3)))
print("later", file=sys.stderr)
"""
    outer = {name: value for name, value in os.environ.items() if name not in ("PYTHONUNBUFFERED", "TQDM_DISABLE")}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    log = subprocess.run([sys.executable, "-c", code], **both, env=outer, check=True)
    assert log.stdout.decode() == f"looktwice {looktwice.__version__}\nlater\n"


def test_both_stages_run_one_after_the_other(command, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    short = {"max_steps": 1, "num_generations": 2, "max_new_tokens": 4, "grpo_max_steps": 1}
    assert main(command("both", **short)) == 0
    out = tmp_path / "out"
    printed, log = capsys.readouterr()
    assert printed.splitlines() == [
        f"stage 1 is done: {out}/sft/final_model",
        f"stage 2 learnt nothing, no step had a gradient: {out}/grpo/final_model; it is no better than what it started "
        "from: group/, reward/, data/ and optim/ of metrics.jsonl say why",
    ]
    # off a terminal: no bar of ours or of another library, only whole lines
    assert "\r" not in log and "\x1b" not in log
    facts = (
        ["stage", "model", "trained", "samples", "steps", "effective"],
        ["attention", "gradient", "precision", "run"],
    )
    table = ["part", "vit", "visual_head", "visual_table", "llm", "embeddings", "all"]
    sft, grpo = ([*facts[0], *more, *facts[1], *table, "step"] for more in ([], ["rollouts"]))
    assert [line.split()[0] for line in log.splitlines()] == [*sft, *grpo]
    settings = json.loads((out / "grpo" / "final_model" / "train_config.json").read_text())
    assert settings["GRPOConfig"]["sft_checkpoint_path"] == f"{out}/sft/final_model"


SFT = ["train", "--stage", "sft", "--train_data", __file__, "--model_name", "tiny"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["train", "--stage", "sft"], "--train_data is missing"),
        (["train", "--stage", "sft", "--train_data", "none.jsonl"], "none.jsonl: no such data file"),
        (["train", "--stage", "sft", "--train_data", __file__, "--image_base_path", "none"], "--image_base_path none"),
        (["train", "--stage", "sft", "--train_data", __file__, "--model_name", "./none"], "./none: no such model"),
        (["train", "--stage", "grpo", "--train_data", __file__, "--sft_checkpoint", "./none"], "none: no such model"),
        (
            ["train", "--stage", "sft", "--train_data", __file__, "--model_name", "tiny", "--quantization", "nf4"],
            "quantization nf4 trains adapters alone",
        ),
        (["train", "--learning_rate", "fast"], "--learning_rate is 'fast'; it must be a number"),
        (["ask", "none.jpg", "What?"], "none.jpg: no such picture or video"),
        (["ask", __file__, "What?", "--model_path", "./none"], "./none: no such model folder"),
        (["export", "./none", "folder"], "./none: no such model folder"),
        (["eval", "tiny"], "--bench names no benchmark"),
        (["eval", "tiny", "--bench", "vstr"], "bench.0 is 'vstr': no benchmark is called so. Did you mean \"vstar\"?"),
        (["eval", "tiny", "--bench", "vstar", "--data", "none"], "--data none: no such folder or file"),
        (["eval", "./none", "--bench", "vstar", "--data", "/"], "./none: no such model folder"),
        (["eval", "tiny", "--bench", "vstar", "--samples", "3"], "samples is 3 and answers are greedy"),
        (["eval", "tiny", "--bench", "vstar", "--judge", "http://x/v1"], "judge and judge_model belong together"),
        (["report", "none", "--out", "p.html"], "none: no such run folder or file"),
        (["report", ".", "--out", "p.html"], ".: neither a run folder (no metrics.jsonl) nor one of trajectories"),
        (["report", "none"], "the following arguments are required: --out"),
        (["eval", "compare", "none.jsonl"], "the following arguments are required: B"),
        (["data", "check", __file__, "--model_name", "./none"], "./none: no such model folder"),
        (["data", "show", "none.jsonl"], "none.jsonl: no such data file"),
        (["data", "stats", "none.jsonl"], "none.jsonl: no such data file"),
        (["data", "convert", "none.jsonl", "other.jsonl"], "none.jsonl: no such data file"),
        (["train", "--stage", "sft", "--train_data", "/"], "/: a directory, not a data file"),
        ([*SFT, "--sft_output_dir", f"{__file__}/run"], f"{__file__}/run: cannot be made as a run folder ("),
        ([*SFT, "--resume_from_checkpoint", "none"], "none: no such folder to resume from"),
        ([*SFT, "--attn_implementation", "flex_attention", "--device", "cpu"], "flex_attention has no backward"),
        ([*SFT, "--attn_implementation", "flash_attention_2"], "flash_attention_2: flash-attn is not installed"),
        (
            ["train", "--stage", "grpo", "--train_data", __file__, "--sft_checkpoint", "tiny", "--reward", "robst"],
            'reward is "',
        ),
        ([*SFT[:2], "both", *SFT[3:], "--reward", "none.py:score"], "reward file none.py does not exist"),
        (["ask", "/", "What?"], "/: a folder, not a picture or video"),
        (["export", "tiny", "/"], "/: there is something already"),
        (["data", "check", __file__, "--image_base_path", "none"], "--image_base_path none: no such folder"),
        (["data", "check", __file__, "--fix", "/none/x.jsonl"], "/none/x.jsonl: there is no folder /none"),
        (["data", "show", __file__, "--image_base_path", "none"], "--image_base_path none: no such folder"),
        (["data", "stats", __file__, "--image_base_path", "none"], "--image_base_path none: no such folder"),
        (["data", "convert", __file__, "out.txt"], "out.txt: end the name in .parquet"),
        (["demo", "--output_dir", f"{__file__}/demo"], f"{__file__}/demo: cannot be made as a run folder ("),
    ],
)
def test_a_usage_error_is_told_before_torch_is_imported(words, problem) -> None:
    code = (
        "import sys\n"
        "from looktwice.cli import main\n"
        f"assert main({words!r}) == 1\n"
        "assert not {'torch', 'transformers', 'peft', 'numpy', 'PIL'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.startswith(f"looktwice: {problem}") and "Traceback" not in done.stderr
    assert done.returncode == 0


def test_the_package_is_a_command_too() -> None:
    done = subprocess.run([sys.executable, "-m", "looktwice", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"looktwice {looktwice.__version__}\n"


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from looktwice.cli import main\n"
        "for words in (['--help'], *([verb, '--help'] for verb in ('train', 'ask', 'eval', 'demo'))):\n"
        "    try:\n"
        "        assert main(words) == 0\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"looktwice {name} " in done.stdout for name in ("train", "ask", "eval", "demo"))


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(words, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert listed == ["train", "ask", "chat", "eval", "report", "serve", "data", "export", "plan", "doctor", "demo"]


def test_an_interrupt_ends_with_its_own_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "demo", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "looktwice: interrupted\n"


# -- terminals, pipes and full disks

ROW_LINE = json.dumps(ROW | {"QnA": [{**GOOD, "Q": "What is it, é 日本?"}]})


def shell(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which LT is the command; UNBUFFERED is off, as it is for users."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "", "LT": f"{sys.executable} -m looktwice", **variables}
    options = {"capture_output": True, "text": True, "errors": "replace", "timeout": 120}
    return subprocess.run(["bash", "-c", line], cwd=folder, env=environment, **options)


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    Image.new("RGB", (160, 120), "red").save(tmp_path / "cup.png")
    (tmp_path / "d.jsonl").write_text(ROW_LINE + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(("words", "unbuffered"), [("--help", "1"), ("--version", ""), ("train --help", "")])
def test_who_reads_may_leave(words, unbuffered, data_folder) -> None:
    done = shell(f"$LT {words} | true; exit ${{PIPESTATUS[0]}}", data_folder, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "words",
    [
        "data check d.jsonl --json result",
        "data show d.jsonl --model tiny --html result",
        "data stats d.jsonl --model tiny --html result",
        "data convert d.jsonl result.jsonl --to messages",
        "ask cup.png Q --model_path tiny --device cpu --max_new_tokens 1 --output_json result",
    ],
)
def test_a_result_is_written_though_who_reads_has_left(words, data_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.chdir(data_folder)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(words.split()) == 141
    [result] = data_folder.glob("result*")
    assert result.stat().st_size > 100


def test_a_run_goes_on_though_who_reads_its_output_has_left(command, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the lines of stdout nor the log on stderr end it."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", pipe)
        monkeypatch.setattr(sys, "stderr", full)
        assert main(command(max_steps=2)) == 0
        assert (sys.stdout, sys.stderr) == (pipe, full)
    log = (tmp_path / "out" / "sft" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in log] == [1, 2]
    assert (tmp_path / "out" / "sft" / "final_model").is_dir()


FULL = "looktwice: the output cannot be written (No space left on device); make room, or send it elsewhere\n"


@pytest.mark.parametrize(("words", "unbuffered"), [("--help", "1"), ("--version", ""), ("train --help", "")])
def test_a_full_output_is_told_in_one_line(words, unbuffered, data_folder) -> None:
    done = shell(f"$LT {words} > /dev/full", data_folder, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (1, FULL)


@pytest.mark.parametrize("verb", ["check d.jsonl", "show d.jsonl --model tiny", "stats d.jsonl --model tiny"])
def test_a_table_on_a_full_output_is_told_too(
    verb, data_folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data_folder)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["data", *verb.split()]) == 1
    assert capsys.readouterr().err.endswith(FULL)


def test_output_that_is_closed_is_no_error(data_folder) -> None:
    assert shell("$LT --version >&-", data_folder).returncode == 0
    assert shell("$LT nope 2>&-", data_folder).returncode == 1
    assert shell("$LT nope 2> /dev/full", data_folder).returncode == 1


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["data", "check", "d.jsonl"], "--json"),
        (["data", "show", "d.jsonl", "--model", "tiny"], "--html"),
        (["data", "stats", "d.jsonl", "--model", "tiny"], "--html"),
        (["ask", "cup.png", "Q", "--model_path", "tiny", "--device", "cpu", "--max_new_tokens", "1"], "--output_json"),
    ],
)
def test_a_result_on_a_full_disk_is_told_in_one_line(
    words, flag, data_folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data_folder)
    assert main([*words, flag, "/dev/full"]) == 1
    expected = "looktwice: /dev/full: cannot be written (No space left on device); make room, or give another path\n"
    assert capsys.readouterr().err.endswith(expected)


LETTERS = [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}]
LETTERS += [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]


@pytest.mark.parametrize("letters", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize(
    "words",
    [
        ["data", "check", "d\udce9.jsonl", "--json", "r\udce9.json", "--fix", "f\udce9.jsonl"],
        ["data", "show", "d\udce9.jsonl", "--model", "tiny", "--html", "r\udce9.html"],
        ["data", "stats", "d\udce9.jsonl", "--model", "tiny", "--html", "r\udce9.html"],
        ["data", "convert", "d\udce9.jsonl", "c\udce9.jsonl", "--to", "messages"],
    ],
)
def test_a_terminal_may_lack_letters_and_a_file_name_be_no_text(
    words, letters, data_folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data_folder / "d.jsonl").rename(data_folder / "d\udce9.jsonl")
    monkeypatch.chdir(data_folder)
    with open("terminal", "w", encoding=letters) as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert main(words) == 0
    assert r"d\udce9.jsonl" in (data_folder / "terminal").read_text(encoding=letters)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("ask $'no\\xe9.png' Q", "no\\udce9.png: no such picture or video"),
        ("ask cup.png $'caf\\xe9?' --model_path tiny", "the question holds '\\udce9', which is no letter of UTF-8"),
        ("ask cup.png Q --model_path $'m\\xe9'", "m\\udce9: the name is not UTF-8; rename it, or give another path"),
        ("export tiny $'m\\xe9'", "m\\udce9: the name is not UTF-8"),
        ("demo --output_dir $'m\\xe9'", "m\\udce9: the name is not UTF-8"),
        ("tr\\äin", 'unknown command "tr'),
    ],
)
@pytest.mark.parametrize("variables", [LETTERS[1], LETTERS[2]])
def test_what_is_no_text_is_told(words, problem, variables, data_folder) -> None:
    done = shell(f"$LT {words}", data_folder, **variables)
    assert done.returncode == 1 and done.stderr.startswith(f"looktwice: {problem}")


def test_an_error_of_the_system_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: object) -> None:
        raise PermissionError(13, "Permission denied", "a" * 500)

    monkeypatch.setitem(cli.VERBS, "demo", fail)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == f"looktwice: {short('a' * 500)}: Permission denied\n"


@pytest.mark.parametrize("folder", [".", "src", "src/looktwice", "tests"])
def test_the_package_is_a_command_wherever_one_stands(folder) -> None:
    done = subprocess.run([sys.executable, "-m", "looktwice"], cwd=ROOT / folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout[:16], done.stderr) == (0, "usage: looktwice", "")


# -- flags of other trainers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--per_device_train_batch_size=4"], "--per_device_train_batch_size. Here it is --batch_size."),
        (["train", "--model-name-or-path", "x"], "--model_name_or_path. Here it is --model_name."),
        (["train", "--output_dir", "x"], "--output_dir. Here it is --sft_output_dir or --grpo_output_dir."),
        (["train", "--deepspeed", "x"], "--deepspeed. Here it is --distributed."),
        (["train", "--nnodes", "2"], "--nnodes. There is none here: torchrun says how many processes train, see docs/"),
        (["train", "data.train_files=x"], "data.train_files. Here it is --train_data."),
        (["ask", "a.png", "Q", "--model", "tiny"], "--model. Here it is --model_path."),
        (["ask", "a.png", "Q", "--deepseed"], "--deepseed. See looktwice ask --help."),
        (["demo", "--output", "x"], '--output. Did you mean "--output_dir"?'),
    ],
)
def test_a_flag_of_another_trainer_names_what_does_it_here(words, message, refusal) -> None:
    assert refusal(words).startswith(f"unknown argument {message}")


def test_all_unknown_flags_are_told_at_once(refusal) -> None:
    told = refusal(["train", "--lr", "1e-4", "--half", "--foo", "--lora_rank", "8"]).splitlines()
    assert [line.split()[2] for line in told] == ["--lr.", "--half.", "--foo.", "--lora_rank."]


def test_the_last_of_a_flag_that_is_given_twice_holds() -> None:
    *_, sft, _ = train_configs(["--seed", "1", "--bf16", "--seed", "2", "--no-bf16"])
    assert (sft.seed, sft.bf16) == (2, False)


def test_flags_may_be_written_with_hyphens_and_file_names_stay(data_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, data, sft, _ = train_configs(["--train-data=a-b.jsonl", "--lora-r", "4"])
    assert (data.train_data_path, sft.lora_r) == ((Path("a-b.jsonl"),), 4)
    (data_folder / "--a-b.jsonl").write_text(ROW_LINE)
    monkeypatch.chdir(data_folder)
    assert main(["data", "check", "--", "--a-b.jsonl"]) == 0
