"""What two processes do together in stage 2, for `test_grpo_distributed.py`: the same script in each, as in `pair.py`.

`python pair_grpo.py FOLDER` reads `FOLDER/model` and `FOLDER/data`, and leaves its runs in `FOLDER/pair`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from looktwice.config import DataConfig, GRPOConfig, ModelConfig
from looktwice.data.order import BatchOrder
from looktwice.training.grpo import train_grpo

STEPS = (("picture", "text"), ("text", "idle"), ("idle", "idle picture"), ("picture", "picture"))
"""The prompts of each step, one a process; an idle one gets the same reward for whatever is answered."""
WAYS: dict[str, dict[str, Any]] = {
    "full": {"beta": 0.1, "freeze": ("vit",)},
    "lora": {"use_lora": True, "lora_r": 4, "scale_rewards": "batch", "num_iterations": 2},
}
RUN: dict[str, Any] = {
    "learning_rate": 1e-3,
    "warmup_ratio": 0,
    "max_steps": len(STEPS),
    "train_batch_size": 2,
    "num_generations": 3,
    "max_new_tokens": 5,
    "max_tokens_per_row": 200,
    "mask_truncated_completions": False,
    "save_steps": 2,
}
REWARD = """
def score(trajectory, solution):
    ids = [i for i, sampled in zip(trajectory.completion_ids, trajectory.is_sampled) if sampled]
    return sum(i % 2 == 0 for i in ids) / len(ids) if solution != "idle" else 0.5
"""


def write_data(folder: Path, pictures: list[Path]) -> None:
    """Prompts in such an order that each step is what STEPS says, and a reward."""
    folder.mkdir(exist_ok=True)
    kinds = [kind for step in STEPS for kind in step]
    order = BatchOrder(len(kinds), samples_per_step=2, num_epochs=1, max_steps=None, seed=GRPOConfig().seed)
    places = [place for step in range(len(STEPS)) for place in order[step]]
    rows: dict[int, dict[str, Any]] = {}
    for number, (place, kind) in enumerate(zip(places, kinds)):
        shown = "picture" in kind
        question = f"{'<image>' * shown}What is {number}?"
        rows[place] = {"messages": [{"role": "user", "content": question}]}
        rows[place] |= {"answer": "idle" if "idle" in kind else str(number)}
        rows[place] |= {"images": [str(pictures[number % len(pictures)])]} if shown else {}
    lines = [json.dumps(rows[place]) for place in sorted(rows)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "val.jsonl").write_text("\n".join(lines[:3]))
    (folder / "reward.py").write_text(REWARD)


def run(folder: Path, place: Path, way: str, **settings: Any) -> None:
    """A whole run, with an evaluation at its end."""
    data = DataConfig(train_data_path=folder / "data" / "train.jsonl", val_data_path=folder / "data" / "val.jsonl")
    start = {"sft_checkpoint_path": folder / "model", "reward": f"{folder / 'data' / 'reward.py'}:score"}
    config = GRPOConfig(output_dir=place, **{**RUN, **start, **WAYS[way], **settings})
    train_grpo(ModelConfig(device="cpu"), data, config)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for kind in ("ddp", "fsdp"):
        for way in WAYS:
            run(folder, folder / "pair" / f"{kind}-{way}", way, distributed=kind)
    resumed = {"resume_from_checkpoint": folder / "one" / "lora" / "checkpoint-2"}
    run(folder, folder / "pair" / "resumed", "lora", distributed="fsdp", **resumed)
