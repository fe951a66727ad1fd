"""Learners of both stages, rollouts as if one had sampled them, and whole runs under a reward of a user."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.training.scripted import CUT, Group, paid, rollout_of
from tests.training.updates import RECORD, LoadLearner

from looktwice.config import DataConfig, GRPOConfig, ModelConfig, SFTConfig
from looktwice.data.examples import encode_sample
from looktwice.formats.sample_file import read_samples
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example
from looktwice.training.grpo import train_grpo
from looktwice.training.learner import Learner
from looktwice.training.rollouts import Rollout
from looktwice.training.state import save

EVEN_IDS = """
def score(trajectory, solution):
    ids = [i for i, sampled in zip(trajectory.completion_ids, trajectory.is_sampled) if sampled]
    return sum(i % 2 == 0 for i in ids) / len(ids)

def nothing(trajectory, solution):
    return 0.0

def fails_on_odd(trajectory, solution):
    return 1 / (1 - trajectory.completion_ids[0] % 2)
"""


@pytest.fixture
def load(model_folder, processor) -> Callable[..., Learner]:
    def make(**settings: object) -> Learner:
        config = GRPOConfig(**{"max_grad_norm": 0, "warmup_ratio": 0, **settings})
        return Learner.load(
            str(model_folder), ModelConfig(device="cpu"), config, processor, total_steps=10, is_exact=config.exact
        )

    return make


@pytest.fixture
def rollouts_of(play_scripts) -> Callable[..., list[list[Rollout]]]:
    """Groups of scripted rollouts, as if the model of the learner had sampled them."""

    def make(learner: Learner, *groups: Group) -> list[list[Rollout]]:
        made = []
        for group in groups:
            episodes = [play_scripts(script, max_new_tokens=20 if script is CUT else 200)[0][0] for script, _ in group]
            with torch.no_grad():
                logprobs = iter(learner.score(pack([episode.example for episode in episodes])).logprobs.tolist())
            for episode in episodes:
                trajectory = episode.trajectory
                trajectory.sampling_logprobs = [next(logprobs) if flag else 0.0 for flag in trajectory.is_sampled]
            made.append([rollout_of(episode, paid(total)) for episode, (_, total) in zip(episodes, group)])
        return made

    return make


@pytest.fixture
def run(model_folder, dataset, tmp_path):
    """Runs R-GRPO under a user's reward on the four prompts; gives the final folder and the lines of the log."""
    (tmp_path / "reward.py").write_text(EVEN_IDS)

    def train(name: str = "run", *, reward: str = "score", **settings: object) -> tuple[Path, list[dict[str, float]]]:
        folder = tmp_path / name
        config = GRPOConfig(
            **{
                "sft_checkpoint_path": model_folder,
                "output_dir": folder,
                "reward": f"{tmp_path / 'reward.py'}:{reward}",
                "num_train_epochs": 0,
                "train_batch_size": 2,
                "num_generations": 4,
                "max_new_tokens": 6,
                "mask_truncated_completions": False,
                "warmup_ratio": 0,
                **settings,
            }
        )
        data = DataConfig(train_data_path=dataset.rl, image_base_path=dataset.rl.parent)
        final = train_grpo(ModelConfig(device="cpu"), data, config)
        return final, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return train


@pytest.fixture
def load_sft(model_folder, processor) -> LoadLearner:
    def make(
        *, name: object = model_folder, total_steps: int = 10, quantization: str | None = None, **settings: object
    ) -> Learner:
        model_config = ModelConfig(device="cpu", **({} if quantization is None else {"quantization": quantization}))
        return Learner.load(str(name), model_config, SFTConfig(**settings), processor, total_steps=total_steps)

    return make


@pytest.fixture(scope="module")
def examples(dataset, processor) -> list[Example]:
    samples = read_samples(dataset.train, dataset.train.parent)[:4]
    return [encode_sample(sample, processor, max_length=1000) for sample in samples]


@pytest.fixture
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")


@pytest.fixture
def quantised_adapter(bitsandbytes, load_sft, tmp_path) -> Path:
    """A checkpoint of an adapter over a base in nf4."""
    save(load_sft(quantization="nf4", use_lora=True, lora_r=4), tmp_path / "adapter", RECORD, with_optimizer=True)
    return tmp_path / "adapter"
