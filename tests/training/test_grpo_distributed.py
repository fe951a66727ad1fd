"""Stage 2 in two processes (gloo, on the CPU) against one: the same rollouts, metrics, weights and checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.training import pair_grpo as pair
from tests.training.processes import Ended, assert_same_weights, logged, run_two
from torch import Tensor

from looktwice.training.folder import STATE_FILE

APART = ("time/", "canary/", "perf/")
"""Areas whose metrics are a process's own."""
WITHIN = {"full": 1e-5, "lora": 1e-3}
"""AdamW makes a step of about the learning rate of any gradient, and LoRA's B is nothing but its first steps: where a
gradient is next to nothing its rounding shows there."""


@pytest.fixture(scope="module")
def both(model_folder, dataset, tmp_path_factory) -> Ended:
    """One process does its runs alone, then two do all of `pair_grpo.py`."""
    folder = tmp_path_factory.mktemp("grpo")
    shutil.copytree(model_folder, folder / "model")
    pair.write_data(folder / "data", sorted(dataset.train.parent.glob("*.png")))
    for way in pair.WAYS:
        pair.run(folder, folder / "one" / way, way)
    return run_two(Path(pair.__file__), folder, timeout=100)


def test_both_processes_come_to_their_end(both) -> None:
    assert both.codes == [0, 0], both.errors


@pytest.mark.parametrize("way", pair.WAYS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_of_two_processes_is_that_of_one(kind, way, both) -> None:
    found, expected = logged(both.folder / "pair" / f"{kind}-{way}"), logged(both.folder / "one" / way)
    assert len(found) == len(expected) == len(pair.STEPS)
    for line, wanted in zip(found, expected):
        names = [name for name in line if not name.startswith(APART)]
        assert names == [name for name in wanted if not name.startswith(APART)]
        assert [line[name] for name in names] == pytest.approx([wanted[name] for name in names], rel=1e-4, abs=1e-5)
    assert_same_weights(
        both.folder / "pair" / f"{kind}-{way}" / "final_model",
        both.folder / "one" / way / "final_model",
        within=WITHIN[way],
    )


@pytest.mark.parametrize("way", pair.WAYS)
def test_gradients_of_two_processes_are_those_of_one(way, both) -> None:
    found, wanted = (moments(both.folder / whose / "checkpoint-2") for whose in (f"pair/ddp-{way}", f"one/{way}"))
    assert torch.linalg.norm(found - wanted) <= 1e-5 * torch.linalg.norm(wanted)


def moments(checkpoint: Path) -> Tensor:
    """AdamW's means of gradients, of all parameters."""
    state = torch.load(checkpoint / STATE_FILE, weights_only=True)["optimizer"]["state"]
    return torch.cat([values["exp_avg"].flatten() for values in state.values()])


def test_a_step_may_have_no_signal_in_one_process_or_in_any(both) -> None:
    lines = logged(both.folder / "one" / "full")
    assert [line["group/dropped"] for line in lines] == [0, 0.5, 1, 0]
    assert ["optim/grad_norm" in line for line in lines] == [True, True, False, True]


def test_two_processes_go_on_from_the_checkpoint_of_one(both) -> None:
    resumed = both.folder / "pair" / "resumed"
    assert [line["step"] for line in logged(resumed)] == [3, 4]
    assert_same_weights(resumed / "final_model", both.folder / "one" / "lora" / "final_model", within=WITHIN["lora"])


def test_one_process_goes_on_from_the_checkpoint_of_two(both, tmp_path) -> None:
    checkpoint = both.folder / "pair" / "fsdp-full" / "checkpoint-2"
    assert (checkpoint / "__1_0.distcp").exists()
    pair.run(both.folder, tmp_path / "run", "full", resume_from_checkpoint=checkpoint)
    assert_same_weights(tmp_path / "run" / "final_model", both.folder / "one" / "full" / "final_model")
