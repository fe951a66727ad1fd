"""The documented path from end to end on the built-in tiny model: SFT, R-GRPO, the command line, Python.

`make test` runs it, and so does `python test_ovis_integration.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from looktwice.demo.task import make_dataset

ROOT = Path(__file__).parent
QUICK = ("--device", "cpu", "--max_steps", "1", "--gradient_accumulation_steps", "2")
PYTHON_LINES = """
from inference import OvisInference
from config import InferenceConfig
from PIL import Image

config = InferenceConfig(model_path="outputs/grpo/final_model", device="cpu", max_new_tokens=8)
inference = OvisInference(config)
result = inference.generate(
    image=Image.open("test.jpg"),
    question="What do you see in this image?"
)

print("Response:", result['response'])
print("Thinking:", result['parsed']['think_content'])
print("Answer:", result['parsed']['answer_content'])
"""
"""Those of the document, on a CPU and with a short answer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user stands: data/train.jsonl, data/val.jsonl and data/images lie there, and a picture."""
    folder = tmp_path_factory.mktemp("documented")
    files = make_dataset(folder / "data" / "images", num_train=4, num_rl=1, num_eval=2, seed=0)
    files.train.rename(folder / "data" / "train.jsonl")
    files.eval.rename(folder / "data" / "val.jsonl")
    Image.new("RGB", (160, 120), "red").save(folder / "test.jpg")
    return folder


@pytest.fixture(scope="module")
def sft_model(folder: Path) -> Path:
    run(folder, ROOT / "train_sft.py", "--model_name", "tiny", "--use_lora", "--lora_r", "4", "--bf16", *QUICK)
    return folder / "outputs" / "sft" / "final_model"


@pytest.fixture(scope="module")
def grpo_model(folder: Path, sft_model: Path) -> Path:
    short = ("--num_generations", "2", "--max_new_tokens", "8")
    run(folder, ROOT / "train_grpo.py", "--beta", "0.1", *short, *QUICK)
    return folder / "outputs" / "grpo" / "final_model"


def run(folder: Path, *words: str | Path) -> str:
    """What a Python program prints that is run there and ends well."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_stage_1_leaves_an_adapter(sft_model: Path) -> None:
    assert (sft_model / "adapter_model.safetensors").is_file()


def test_stage_2_goes_on_from_it(grpo_model: Path) -> None:
    assert (grpo_model / "adapter_model.safetensors").is_file()


def test_the_trained_model_answers_on_the_command_line(folder: Path, grpo_model: Path) -> None:
    question = ("--question", "What objects can you see in this image?", "--max_new_tokens", "8")
    asked = ("--model_path", grpo_model, "--image_path", "test.jpg", *question, "--temperature", "0.7")
    run(folder, ROOT / "inference.py", *asked, "--device", "cpu", "--output_json", "output.json")
    record = json.loads((folder / "output.json").read_text(encoding="utf-8"))
    assert record["response"] and {"think_content", "answer_content"} <= record["parsed"].keys()


def test_the_documented_python_lines_run(folder: Path, grpo_model: Path) -> None:
    lines = run(folder, "-c", PYTHON_LINES).splitlines()
    assert lines[0].startswith("Response: ") and lines[-1].startswith("Answer:")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
