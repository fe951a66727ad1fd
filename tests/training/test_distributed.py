"""Two processes (gloo, on the CPU) against one: the same losses, weights and checkpoints; and how a run of two ends."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.training.processes import Ended, assert_same_weights, logged, run_two
from torch.distributed import HashStore

from looktwice.cli.train import train_configs
from looktwice.config import SFTConfig
from looktwice.data.lengths import Refit, sequence_lengths
from looktwice.data.order import BatchOrder, balanced
from looktwice.errors import ConfigError
from looktwice.formats.sample_file import read_samples
from looktwice.inference import OvisInference
from looktwice.launch import Launch, RankError
from looktwice.messages import question_about
from looktwice.training import distributed
from looktwice.training.distributed import DistributedError, Replicated, World
from looktwice.training.folder import checkpoints
from looktwice.training.join import tell_once
from looktwice.training.sets import LengthReport
from looktwice.training.shares import Shares, costs_of
from looktwice.training.watchdog import Watchdog

SCRIPT = Path(__file__).with_name("pair.py")
FAULTS = ("pair/faults/0.json", "pair/faults/1.json", "one/faults/0.json")


def load_pair() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pair", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pair = load_pair()


@pytest.fixture(scope="module")
def both(model_folder, dataset, tmp_path_factory) -> Ended:
    """One process does what it does alone, then two do all of `pair.py`."""
    folder = tmp_path_factory.mktemp("distributed")
    shutil.copytree(model_folder, folder / "model")
    shutil.copytree(dataset.train.parent, folder / "data")
    rows = [
        {"messages": [{"role": "user", "content": f"{n} + {n}?"}, {"role": "assistant", "content": f"{2 * n}" * n}]}
        for n in range(1, 5)
    ]
    (folder / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for way in pair.WAYS:
        pair.take_steps(World(), folder, way, folder / "one" / "steps" / way)
    pair.meet_faults(World(), folder, folder / "one" / "faults")
    for way in ("full", "lora"):
        pair.run(folder, folder / "one" / way, save_steps=1, **pair.WAYS[way])
    return run_two(SCRIPT, folder)


@pytest.mark.parametrize("way", pair.WAYS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_whatever_rows_each_has(kind, way, both) -> None:
    found, expected = both.folder / "pair" / f"{kind}-{way}", both.folder / "one" / "steps" / way
    losses, wanted = (json.loads((folder / "logged.json").read_text()) for folder in (found, expected))
    within = 1e-2 if way == "fp16" else 1e-5  # rows of other lengths are rounded otherwise
    for step, values in losses.items():
        assert values == pytest.approx(wanted[step], rel=within), step
    assert_same_weights(found, expected, within=within)


@pytest.mark.parametrize(("name", "way"), [("ddp", "full"), ("fsdp", "full"), ("fsdp_lora", "lora")])
def test_a_run_of_two_processes_is_that_of_one(name, way, both) -> None:
    found, expected = logged(both.folder / "pair" / name), logged(both.folder / "one" / way)
    for key in ("step", "loss", "optim/grad_norm", "optim/lr", "epoch", "eval/loss"):
        assert [line.get(key) for line in found] == [
            value and pytest.approx(value, rel=1e-5) for value in (line.get(key) for line in expected)
        ]
    assert_same_weights(both.folder / "pair" / name / "final_model", both.folder / "one" / way / "final_model")


@pytest.mark.parametrize(("name", "way"), [("ddp", "full"), ("fsdp", "full"), ("fsdp_lora", "lora")])
def test_two_processes_go_on_from_the_checkpoint_of_one(name, way, both) -> None:
    resumed = both.folder / "pair" / f"{name}-resumed"
    assert [line["step"] for line in logged(resumed)] == [3]
    assert_same_weights(resumed / "final_model", both.folder / "one" / way / "final_model")


@pytest.mark.parametrize(("name", "way"), [("ddp", "full"), ("fsdp", "full"), ("fsdp_lora", "lora")])
def test_one_process_goes_on_from_the_checkpoint_of_two(name, way, both, tmp_path) -> None:
    checkpoint = both.folder / "pair" / name / "checkpoint-2"
    assert (checkpoint / "__1_0.distcp").exists() == name.startswith("fsdp")
    pair.run(both.folder, tmp_path / "run", resume_from_checkpoint=checkpoint, **pair.WAYS[way])
    assert_same_weights(tmp_path / "run" / "final_model", both.folder / "one" / way / "final_model")


def test_the_model_of_a_sharded_run_answers(both, image) -> None:
    model = OvisInference(str(both.folder / "pair" / "fsdp_lora" / "final_model"), device="cpu")
    assert model.generate(image, "What is it?", max_new_tokens=4)["response"]


def test_memory_that_runs_out_in_one_process_splits_its_rows_alone(both) -> None:
    first, second, alone = (json.loads((both.folder / path).read_text()) for path in FAULTS)
    assert first["loss"] == second["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert first["splits"] == second["splits"] >= 1 > alone["splits"]


def test_a_loss_of_one_process_that_is_no_number_is_left_out_or_stops_both(both) -> None:
    for path in FAULTS[:2]:
        told = json.loads((both.folder / path).read_text())
        assert told["is_left_out"]
        assert "loss nan, gradient norm nan after 1 that were left out; in 1 row on rank 1 of" in told["error"]
        assert "data:1" in told["error"] and "data:0" not in told["error"]


def test_a_signal_to_one_process_stops_both_with_their_step_saved(both) -> None:
    folder = both.folder / "pair" / "stopped"
    assert [path.name for path in checkpoints(folder).values()] == ["checkpoint-1"]
    assert [line["step"] for line in logged(folder)] == [1] and not (folder / "final_model").exists()


def test_an_error_of_one_process_ends_both_and_is_told_once(both) -> None:
    assert both.codes == [1, 1]
    assert both.errors[1].count("looktwice: rank 1: row 7: broken") == 1
    assert "looktwice: " not in both.errors[0] and "Traceback" not in both.errors[0] + both.errors[1]


def test_the_first_error_is_told_with_its_rank_and_those_that_follow_are_not() -> None:
    store = HashStore()
    first, second = (Watchdog(store, rank, 2, timeout=60) for rank in range(2))
    lost = RuntimeError("[/src/pair.cc:1] Connection closed by peer [::1]:2. Look at gloo there.")
    with pytest.raises(DistributedError, match=r"^rank 0 starting: .* \(Connection closed by peer \[::1\]:2\)"):
        tell_once(lost, first)
    with pytest.raises(SystemExit):
        tell_once(ConfigError("what follows from it"), second)
    with pytest.raises(RankError, match="^rank 1: a mistake"):
        tell_once(ConfigError("a mistake"), Watchdog(HashStore(), 1, 2, timeout=60))


def test_what_differs_between_machines_is_told(monkeypatch) -> None:
    world = Replicated(Launch(1, 2, 1), Watchdog(HashStore(), 1, 2, timeout=60))
    monkeypatch.setattr(world, "from_main", lambda function: "abc")
    world.check_alike("the model", lambda: "abc")
    with pytest.raises(DistributedError, match=r"the model of rank 1 \(.*\) is not that of rank 0 \(abd, not abc\)"):
        world.check_alike("the model", lambda: "abd")


def test_each_process_takes_the_gpu_of_its_number(monkeypatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(distributed, "pick_device", lambda named: named or "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    first, third = (Replicated(Launch(n, 3, n), Watchdog(HashStore(), n, 3, timeout=60)) for n in (1, 2))
    assert (first.device(None), first.device("cpu"), taken) == ("cuda:1", "cpu", [1])
    with pytest.raises(ConfigError, match="process 3 of this machine finds 2 GPUs; start one process a GPU"):
        third.device(None)


def test_gradients_are_summed_in_buckets_of_one_dtype(monkeypatch) -> None:
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 16)
    sizes = [torch.zeros(2), torch.zeros(2), torch.zeros(9), torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)]
    assert [[len(gradient) for gradient in bucket] for bucket in distributed.buckets(sizes)] == [[2, 2], [9], [1], [1]]


def test_the_commands_of_the_page_on_scaling_parse() -> None:
    page = (SCRIPT.parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in re.findall(r"```bash\n(.*)\n```", page)]
    assert len(commands) == 9
    for words in commands:
        stage, *_, sft, grpo = train_configs(words[words.index("train") + 1 :])
        assert ((sft if stage == "sft" else grpo).distributed == "fsdp") == ("fsdp" in words)
        assert (words[0] == "torchrun") == ("-m" in words)


# -- Shares


class OfTwo(World):
    """The second of two processes."""

    rank, size = 1, 2

    def share(self, costs: Sequence[float]) -> list[int]:
        return balanced(costs, 2)[1]


def test_a_process_gets_samples_of_about_half_the_tokens_in_batches(dataset, processor) -> None:
    samples = read_samples(dataset.train, dataset.train.parent)
    order = BatchOrder(6, samples_per_step=6, num_epochs=1, max_steps=None, seed=0)
    lengths = sequence_lengths(samples, processor)
    [*batches] = Shares(samples, order, processor, OfTwo(), batch_size=2).batches(0)
    own = [number for batch in batches for number in batch]
    assert all(len(batch) <= 2 for batch in batches) and 0 < len(own) < 6
    others = sum(lengths) - sum(lengths[number] for number in own)
    assert sum(lengths[number] for number in own) == pytest.approx(others, abs=max(lengths))
    alone = Shares(samples, order, processor, World(), batch_size=4).batches(0)
    assert [number for batch in alone for number in batch] == order[0]


def test_samples_that_cannot_be_measured_are_dealt_out_by_number(dataset, processor) -> None:
    samples = read_samples(dataset.train, dataset.train.parent)
    broken = replace(samples[0], conversation=question_about("What?", Path("gone.png")))
    assert costs_of([broken, *samples[1:4]], processor) == [1, 1, 1, 1]


def test_what_each_process_met_is_written_by_rank_0(tmp_path, dataset) -> None:
    sample = read_samples(dataset.train, dataset.train.parent)[0]

    class OfBoth(World):
        size = 2

        def gather(self, items: Sequence[Any]) -> list[Any]:
            return [*items, *items]

    report = LengthReport(SFTConfig(output_dir=tmp_path), OfBoth())
    report.note([Refit(sample=sample, num_tokens=99, policy=None)])
    assert not (tmp_path / "left_out.jsonl").exists() and not report.metrics
    report.collect()
    assert len((tmp_path / "left_out.jsonl").read_text().splitlines()) == 1
    assert report.metrics == {"data/too_long": 1.0}
    assert report.met == []
