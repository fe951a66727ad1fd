"""The product's document: its defaults, its generation parameters and the files it names work as written."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from looktwice.cli import main
from looktwice.cli.train import train_configs
from looktwice.config import InferenceConfig
from looktwice.demo.task import DatasetFiles
from looktwice.errors import ConfigError
from looktwice.inference import OvisInference
from looktwice.rollout.crop_tool import CropTool

ROOT = Path(__file__).parents[1]
GENERATION = {
    "max_new_tokens": 3072,
    "temperature": 0.7,
    "top_p": 0.9,
    "do_sample": True,
    "enable_thinking": True,
    "enable_thinking_budget": True,
    "thinking_budget": 2048,
}
"""As the document writes it."""


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(name: str, *words: object) -> int:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        return end.value.code

    return run


@pytest.fixture
def documented_folder(dataset: DatasetFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test: data/train.jsonl, data/val.jsonl and data/images lie in it."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_bytes(dataset.train.read_bytes())
    (data / "val.jsonl").write_bytes(dataset.eval.read_bytes())
    (data / "images").symlink_to(dataset.train.parent)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- the training scripts without arguments

DEFAULTS = "documented defaults: --train_data data/train.jsonl --val_data data/val.jsonl --image_base_path data/images"


@pytest.mark.parametrize("script", ["train_sft.py", "train_ovis25.py"])
def test_the_documented_paths_are_the_defaults_and_named_first(
    script, documented_folder, run_script, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model_name", "tiny", "--stage", "sft", "--device", "cpu", "--max_steps", 1]
    assert run_script(script, *words) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[0] == f"{DEFAULTS} --batch_size 1 --gradient_accumulation_steps 8"
    assert " samples (batch size 1 x 8 accumulated)" in output.err
    assert (documented_folder / "outputs" / "sft" / "final_model" / "model.safetensors").is_file()


def test_stage_2_has_the_documented_defaults_too(
    documented_folder, model_folder, run_script, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--sft_checkpoint", model_folder, "--device", "cpu", "--max_steps", 1, "--max_new_tokens", 2]
    assert run_script("train_grpo.py", *words, "--num_generations", 2) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[0] == f"{DEFAULTS} --batch_size 1 --gradient_accumulation_steps 8"
    assert " samples (batch size 1 x 8 accumulated)" in output.err
    assert (documented_folder / "outputs" / "grpo" / "final_model").is_dir()


@pytest.mark.parametrize(
    ("missing", "flag"),
    [("train.jsonl", "train_data"), ("val.jsonl", "val_data"), ("images", "image_base_path")],
)
@pytest.mark.parametrize("script", ["train_sft.py", "train_grpo.py"])
def test_a_documented_path_that_is_not_there_is_named(
    script, missing, flag, documented_folder, run_script, capsys: pytest.CaptureFixture[str]
) -> None:
    (documented_folder / "data" / missing).unlink()
    assert run_script(script) == 1
    expected = f"looktwice: data/{missing}: not there, and it is the documented default of --{flag}; put it there, or"
    assert capsys.readouterr().err.startswith(expected)


def test_data_of_ones_own_are_not_mixed_with_the_documented_paths(documented_folder, capsys) -> None:
    _, _, data, sft, _ = train_configs(["--as_documented", "--stage", "sft", "--train_data", "my.jsonl"])
    assert (data.train_data_path, data.val_data_path, data.image_base_path) == ((Path("my.jsonl"),), None, Path("."))
    assert (sft.train_batch_size, sft.gradient_accumulation_steps) == (1, 8)
    assert capsys.readouterr().out == "documented defaults: --batch_size 1 --gradient_accumulation_steps 8\n"


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        ([], (1, 8)),
        (["--gradient_accumulation_steps", "16"], (1, 16)),
        (["--batch_size", "4", "--gradient_accumulation_steps", "4"], (4, 4)),
    ],
)
def test_flags_win_over_the_documented_batch(words, sizes, documented_folder) -> None:
    *_, sft, grpo = train_configs(["--as_documented", *words])
    for config in (sft, grpo):
        assert (config.train_batch_size, config.gradient_accumulation_steps) == sizes


def test_a_config_file_wins_over_the_documented_defaults(documented_folder) -> None:
    (documented_folder / "sft.json").write_text('{"gradient_accumulation_steps": 2}')
    (documented_folder / "data.json").write_text('{"train_data_path": "other.jsonl"}')
    *_, data, sft, _ = train_configs(["--as_documented", "--sft_config", "sft.json", "--data_config", "data.json"])
    assert (sft.train_batch_size, sft.gradient_accumulation_steps) == (1, 2)
    assert (data.train_data_path, data.val_data_path, data.image_base_path) == ((Path("other.jsonl"),), None, Path("."))


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--stage", "grpo", "--grpo_config", "g.json"], "--gradient_accumulation_steps 8"),
        (["--stage", "both", "--sft_config", "g.json"], "--gradient_accumulation_steps 8 --grpo_batch_size 1"),
        (["--stage", "both", "--grpo_batch_size", "2"], "--batch_size 1 --gradient_accumulation_steps 8"),
        (["--stage", "grpo", "--grpo_batch_size", "2"], "--gradient_accumulation_steps 8"),
    ],
)
def test_the_defaults_that_are_printed_are_those_that_hold(words, shown, documented_folder, capsys) -> None:
    (documented_folder / "g.json").write_text('{"train_batch_size": 2}')
    train_configs(["--as_documented", *words])
    assert capsys.readouterr().out == f"{DEFAULTS} {shown}\n"


def test_a_missing_stage_1_is_told_with_its_mend(documented_folder, run_script, capsys) -> None:
    assert run_script("train_grpo.py") == 1
    expected = "looktwice: outputs/sft/final_model: no such model folder; run stage 1 first, or name the model to start"
    assert capsys.readouterr().err.startswith(expected)


def test_looktwice_train_keeps_its_own_defaults() -> None:
    *_, data, sft, _ = train_configs([])
    assert (data.train_data_path, sft.train_batch_size, sft.gradient_accumulation_steps) == ((), 4, 1)


# -- generation parameters


@pytest.fixture(scope="module")
def inference(model_folder: Path) -> OvisInference:
    return OvisInference(InferenceConfig(model_path=str(model_folder), max_new_tokens=6, device="cpu"))


def test_the_documented_generation_parameters_are_taken_in_all_three_ways(
    inference, model_folder, image: Image.Image, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {**GENERATION, "max_new_tokens": 6, "seed": 0}
    in_call = inference.generate(image, "What is it?", **given)
    own = InferenceConfig(model_path=str(model_folder), device="cpu", **given)
    image.save(tmp_path / "a.png")
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    paths = ["--model_path", str(model_folder), "--output_json", str(tmp_path / "a.json"), "--device", "cpu"]
    assert main(["ask", str(tmp_path / "a.png"), "What is it?", *paths, *flags]) == 0
    responses = [answer["response"] for answer in (in_call, OvisInference(own).generate(image, "What is it?"))]
    responses.append(json.loads((tmp_path / "a.json").read_text())["response"])
    assert len(set(responses)) == 1
    assert responses[0] != inference.generate(image, "What is it?")["response"]


def test_do_sample_off_is_greedy_whatever_the_temperature(inference, image: Image.Image) -> None:
    greedy = inference.generate(image, "What is it?")
    assert inference.generate(image, "What is it?", do_sample=False, temperature=2.0) == greedy


def test_a_setting_of_one_call_does_not_stay(inference, image: Image.Image) -> None:
    before = inference.generate(image, "What is it?")
    assert inference.generate(image, "What is it?", max_new_tokens=2) != before
    assert inference.generate(image, "What is it?") == before


@pytest.mark.parametrize(
    ("values", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"do_sample": False, "temperature": 0}, 0.0),
    ],
)
def test_do_sample_decides_over_the_temperature(values, temperature) -> None:
    assert InferenceConfig(**values).sampling_temperature == temperature


def test_sampling_at_temperature_0_is_a_contradiction() -> None:
    with pytest.raises(ConfigError, match="temperature 0 is greedy and do_sample samples; leave one of them out"):
        InferenceConfig(do_sample=True, temperature=0)


@pytest.mark.parametrize(
    ("values", "budget"),
    [
        ({}, 2048),
        ({"enable_thinking_budget": False}, None),
        ({"thinking_budget": 5}, 5),
        ({"thinking_budget": None}, None),
    ],
)
def test_the_thinking_budget_can_be_switched_off(values, budget) -> None:
    assert InferenceConfig(**values).enforced_budget == budget


@pytest.mark.parametrize(
    ("config", "call", "temperature"),
    [
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0}, 0.0),
        ({"do_sample": False}, {"temperature": 0.7}, 0.7),
        ({"temperature": 0}, {"do_sample": True}, 1.0),
        ({"temperature": 0.7}, {"do_sample": True}, 0.7),
        ({"temperature": 0.7}, {"do_sample": False}, 0.0),
        ({"do_sample": True, "temperature": 0.7}, {"top_p": 0.5}, 0.7),
    ],
)
def test_what_is_given_in_a_call_wins_over_the_config(config, call, temperature) -> None:
    assert InferenceConfig(**config).answer(**call).sampling_temperature == temperature


def test_a_setting_of_loading_is_refused_in_a_call_with_its_place(inference, image: Image.Image) -> None:
    with pytest.raises(ConfigError, match=r"max_pixels is set when the model is loaded: InferenceConfig\(max_pixels="):
        inference.generate(image, "What is it?", max_pixels=100)


def test_an_unknown_generation_parameter_names_the_nearest(inference, image: Image.Image) -> None:
    with pytest.raises(ConfigError, match='unknown setting "temprature" of .* Did you mean "temperature"'):
        inference.generate(image, "What is it?", temprature=1)


# -- the files it names


def test_the_inference_script_judges_its_arguments_before_it_loads_anything() -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "inference.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "looktwice: a picture and a question are needed" in done.stderr and " torch" not in done.stderr


def test_the_crop_tool_can_be_imported_from_the_root() -> None:
    assert runpy.run_path(str(ROOT / "crop_tool.py"))["CropTool"] is CropTool


def test_requirements_install_the_package_with_what_training_needs() -> None:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-build-isolation"]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [*command, "-r", "requirements.txt"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Would install looktwice-" in done.stdout
