"""`looktwice plan` as a person types it, from a config alone."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from looktwice.cli import main
from looktwice.cli.train import train_configs
from looktwice.config import GRPOConfig
from looktwice.model.location import TINY_FOLDER
from looktwice.planning import plan
from looktwice.planning.plan import LORA


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small model's config without its weights, one layer a tower; fewer ways, measured here."""
    fields = json.loads((TINY_FOLDER / "config.json").read_text(encoding="utf-8"))
    for tower in ("llm_config", "vit_config"):
        fields[tower]["num_hidden_layers"] = 1
    fields["llm_config"]["layer_types"] = ["full_attention"]
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    monkeypatch.setattr(plan, "SHOWN", (LORA[32],))
    monkeypatch.setattr(plan, "DOCUMENTED", ())
    monkeypatch.setattr(plan, "BY_CHOICE", (LORA[32],))
    monkeypatch.setattr(plan, "SMALL_LORA", LORA[32])
    monkeypatch.setattr(plan, "MOST_TOKENS", 512)
    monkeypatch.setattr(plan, "processes", lambda: None)
    return tmp_path


SMALL = ["--max_tokens_per_row", "256", "--max_pixels", "4096", "--rollout_tokens", "128", "--rollout_batch_size", "2"]


def test_settings_that_fit_are_written_for_train(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, found = folder / "plan.yaml", folder / "found.json"
    words = ["plan", str(folder), "--gpu", "1GB", "--out", str(out), "--json", str(found), *SMALL]
    assert main(words) == 0
    assert "Proposed for 1.0 GB: LoRA r=32" in capsys.readouterr().out
    stage, model, data, sft, grpo = train_configs(["--config", str(out), "--train_data", "a.jsonl"])
    assert (stage, model.model_name, data.max_length) == ("both", str(folder), 512)
    assert sft.use_lora and sft.lora_r == grpo.lora_r == 32 and sft.max_tokens_per_row == 512
    assert sft.gradient_checkpointing == "all" and grpo.cache_tokens == 2 * 128
    assert grpo.learning_rate == GRPOConfig().learning_rate
    counted = json.loads(found.read_text(encoding="utf-8"))["bytes"]["sft LoRA r=32"]
    assert counted["all"] == sum(size for kind, size in counted.items() if kind != "all")


TEXT = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
[COMMANDS] = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("command", [line for line in COMMANDS.splitlines() if "plan" in line])
def test_the_commands_of_the_page_run(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    _, _, _, *options = shlex.split(command)
    assert main(["plan", str(folder), *SMALL, "--stage", "sft", *options, "--max_pixels", "4096"]) == 0
    assert Path("plan.yaml").is_file() == ("--out" in options)


def test_what_fits_nowhere_is_told_with_what_helps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--gpu", "1MB", "--stage", "sft", *SMALL]) == 1
    assert "nothing fits 0.001 GB; what helps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["tiny", "--out", "x.yaml"], "add its memory, --gpu 24GB"),
        (["tiny", "--gpu", "24"], "give a whole or decimal number"),
        (["./none"], "no such model folder"),
    ],
)
def test_bad_usage_is_told_at_once(words: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 1
    assert problem in capsys.readouterr().err
