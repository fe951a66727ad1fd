"""What a run folder says of its run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from looktwice.cli.train import train_configs
from looktwice.config import DataConfig, ModelConfig, SFTConfig
from looktwice.training.provenance import git_commit, read_run, write_provenance
from looktwice.training.record import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    for name in ("a.jsonl", "b.jsonl", "val.jsonl"):
        (tmp_path / name).write_text(name)
    (tmp_path / "run").mkdir()
    data = DataConfig(
        train_data_path=[tmp_path / "a.jsonl", tmp_path / "b.jsonl"],
        train_weights=(2, 0.5),
        val_data_path=tmp_path / "val.jsonl",
    )
    config = SFTConfig(output_dir=tmp_path / "run", use_lora=True, lora_r=4, part_learning_rates={"llm": 1e-5})
    return ModelConfig(model_name="tiny"), data, config


def test_the_settings_in_the_folder_give_the_same_run_again(settings, tmp_path) -> None:
    model, data, config = settings
    resumed = config.model_copy(update={"resume_from_checkpoint": Path("latest"), "overwrite": True})
    write_provenance((model, data, resumed), "sft", [3, 4], "cpu", step=0)
    file = str(tmp_path / "run" / "config.yaml")
    words = [word for kind in ("model", "data", "sft") for word in (f"--{kind}_config", file)]
    stage, *again, _ = train_configs(["--stage", "sft", *words])
    assert [one.model_dump() for one in again] == [one.model_dump() for one in settings]
    assert list(yaml.safe_load(Path(file).read_text())) == ["ModelConfig", "DataConfig", "SFTConfig"]


def test_each_file_of_data_is_named_with_its_fingerprint(settings) -> None:
    data = write_provenance(settings, "sft", [3, 4], "cpu", step=0)["data"]
    train, held_out = data["train"], data["validation"]
    assert [(Path(file["path"]).name, file["samples"], file["weight"]) for file in train] == [
        ("a.jsonl", 3, 2),
        ("b.jsonl", 4, 0.5),
    ]
    assert len({file["fingerprint"] for file in [*train, held_out]}) == 3
    assert Path(held_out["path"]).name == "val.jsonl"


def test_a_run_that_goes_on_keeps_its_id_and_adds_a_start_and_a_new_one_does_not(settings, tmp_path) -> None:
    first = write_provenance(settings, "sft", [3, 4], "cpu", step=0)
    second = write_provenance(settings, "sft", [3, 4], "cpu", step=7, changed=["learning_rate 1 -> 2"])
    assert second["id"] == first["id"] and [start["step"] for start in second["starts"]] == [0, 7]
    assert [start["changed"] for start in second["starts"]] == [[], ["learning_rate 1 -> 2"]]
    assert {"looktwice", "torch", "peft"} <= second["starts"][0]["packages"].keys()
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == second == read_run(tmp_path / "run")
    assert write_provenance(settings, "sft", [3, 4], "cpu", step=0)["id"] != first["id"]


def test_the_commit_of_the_code_is_named_and_whether_files_differ(tmp_path) -> None:
    assert git_commit(tmp_path) is None
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    commit = git_commit(tmp_path)
    assert commit is not None and len(commit) == 40
    (tmp_path / "file").touch()
    subprocess.run(["git", "-C", tmp_path, "add", "file"], check=True)
    assert git_commit(tmp_path) == f"{commit}-dirty"


@pytest.mark.parametrize("size", ["1", "4"])
def test_the_number_of_processes_is_told_of_each_start(size, settings, monkeypatch) -> None:
    for name, value in {
        "WORLD_SIZE": size,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    [start] = write_provenance(settings, "sft", [3, 4], "cpu", step=0)["starts"]
    assert start["processes"] == int(size)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_run_file_that_is_not_there_or_broken_says_nothing(content, tmp_path) -> None:
    if content:
        (tmp_path / "run.json").write_text(content)
    assert read_run(tmp_path) == {}
