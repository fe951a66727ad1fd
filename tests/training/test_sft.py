"""Stage 1 from a model folder and a data file to a final model: what it logs, saves, and goes on from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from looktwice.config import DataConfig, ModelConfig, SFTConfig
from looktwice.data.examples import Encoder, encode_sample
from looktwice.errors import CheckpointError, DataError, TrainingError
from looktwice.formats.sample_file import read_samples
from looktwice.metrics import METRICS
from looktwice.model.vision import VisionTower
from looktwice.model.weights import load_model
from looktwice.processing.packing import pack
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.training import sets as sets_module
from looktwice.training.learner import Learner
from looktwice.training.sets import LengthReport
from looktwice.training.sft import evaluation_loss, timing, train_sft

Run = Callable[..., tuple[Path, list[dict[str, float]]]]


@pytest.fixture
def run(model_folder, dataset, tmp_path) -> Run:
    """Trains on the six samples of the data set; gives the final model's folder and the lines of the log."""

    paths = {"train_data_path": dataset.train, "image_base_path": dataset.train.parent}

    def train(name: str = "run", *, data: dict[str, object] | None = None, **settings: object) -> tuple[Path, list]:
        model = ModelConfig(model_name=str(model_folder), device="cpu")
        folder = tmp_path / name
        final = train_sft(model, DataConfig(**{**paths, **(data or {})}), SFTConfig(output_dir=folder, **settings))
        return final, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    train.data = paths  # type: ignore[attr-defined]
    return train


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_every_step_is_logged_with_what_the_table_of_metrics_explains(run) -> None:
    _, lines = run(num_train_epochs=1, train_batch_size=2)
    assert [line.pop("step") for line in lines] == [1, 2, 3]
    assert [line["epoch"] for line in lines] == pytest.approx([1 / 3, 2 / 3, 1])
    expected = {"loss", "epoch", "optim/lr", "optim/grad_norm", "perf/tokens_per_s", "time/step_s"}
    expected |= {"time/data_wait_share"}
    for line in lines:
        assert set(line) == expected and expected <= set(METRICS)
        assert line["loss"] > 0 and line["optim/grad_norm"] > 0 and line["perf/tokens_per_s"] > 0


def test_waiting_for_samples_counts_as_time_of_the_step() -> None:
    metrics = timing(num_tokens=300, waited=15.0, seconds=20.0)
    assert metrics == {"perf/tokens_per_s": 15.0, "time/step_s": 20.0, "time/data_wait_share": 0.75}


def test_fewer_lines_are_logged_and_shown_when_asked_but_the_first_and_the_last_always(run, capsys) -> None:
    _, lines = run(num_train_epochs=1, train_batch_size=1, max_steps=5, logging_steps=2)
    assert [line["step"] for line in lines] == [1, 2, 4, 5]
    assert re.findall(r"^step (\d)/5 ", capsys.readouterr().err, re.MULTILINE) == ["1", "2", "4", "5"]


def test_two_samples_are_learned_by_heart(run, dataset, tmp_path) -> None:
    two = tmp_path / "two.jsonl"
    two.write_text("".join(dataset.train.read_text().splitlines(keepends=True)[:2]))
    _, lines = run(
        data={"train_data_path": two}, num_train_epochs=30, train_batch_size=2, learning_rate=3e-3, warmup_ratio=0
    )
    assert lines[0]["loss"] > 5 and lines[-1]["loss"] < 0.5


def test_accumulation_logs_the_loss_and_gradient_of_one_large_batch(run) -> None:
    settings = {"max_steps": 2, "num_train_epochs": 0, "learning_rate": 1e-3}
    _, large = run("large", train_batch_size=4, **settings)
    _, small = run("small", train_batch_size=2, gradient_accumulation_steps=2, max_tokens_per_row=1, **settings)
    for name in ("loss", "optim/grad_norm"):
        assert [line[name] for line in small] == pytest.approx([line[name] for line in large], rel=1e-4)


def test_the_final_model_is_the_trained_one_and_can_be_loaded(run, model, model_folder) -> None:
    final, _ = run(max_steps=1, num_train_epochs=0)
    assert weights(final) != weights(model_folder)
    loaded = load_model(str(final))
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    settings = json.loads((final / "train_config.json").read_text())
    assert set(settings) == {"run", "ModelConfig", "DataConfig", "SFTConfig", "Files"}
    assert settings["SFTConfig"]["max_steps"] == 1


def test_pixel_bounds_and_box_frame_of_the_run_are_saved_with_the_model(run, dataset, tmp_path) -> None:
    row = json.loads(dataset.train.read_text().splitlines()[0])
    row["QnA"][0]["A3"] = "{Crop it [0.1, 0.1, 0.5, 0.5]} <answer>1</answer>"
    path = tmp_path / "unit.jsonl"
    path.write_text(json.dumps(row))
    data = {"train_data_path": path, "box_frame": "unit", "max_pixels": 64 * 64, "crop_max_pixels": 32 * 32}
    final, _ = run(data=data, max_steps=1)
    processor = Ovis2_5Processor.from_pretrained(final)
    assert processor.box_frame == "unit"
    assert (processor.policy.image_max_pixels, processor.policy.crop_max_pixels) == (64 * 64, 32 * 32)


def test_a_resumed_run_ends_in_the_weights_and_the_log_of_an_uninterrupted_one(run, tmp_path) -> None:
    settings = {"num_train_epochs": 2, "train_batch_size": 2, "learning_rate": 1e-3, "save_steps": 2}
    whole, expected = run("whole", **settings)
    assert sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    resumed, lines = run("resumed", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-4", **settings)
    assert weights(resumed) == weights(whole)
    assert [line["step"] for line in lines] == [5, 6]
    for name in ("loss", "optim/lr", "optim/grad_norm", "epoch"):
        assert [line[name] for line in lines] == [line[name] for line in expected[4:]]


def test_a_run_resumed_in_its_own_folder_logs_each_step_once(run, tmp_path) -> None:
    final, _ = run(max_steps=3, save_steps=1)
    _, lines = run(max_steps=3, resume_from_checkpoint=final.parent / "checkpoint-2")
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_a_run_goes_on_only_with_the_batches_it_began_with_unless_told(run) -> None:
    run(max_steps=2, save_steps=1, train_batch_size=2)
    with pytest.raises(CheckpointError, match=r"checkpoint-2: .*batch_size was 2 and is 1"):
        run(max_steps=2, resume_from_checkpoint="latest", train_batch_size=1)
    run(max_steps=3, resume_from_checkpoint="latest", train_batch_size=1, allow_changes=True)


def test_a_run_goes_on_only_from_the_model_it_began_with(run, model_folder, tmp_path) -> None:
    final, _ = run(max_steps=2, save_steps=1, learning_rate=1e-3)
    with pytest.raises(CheckpointError, match="checkpoint-2: its run started from another model"):
        train_sft(
            ModelConfig(model_name=str(final), device="cpu"),
            DataConfig(**run.data),
            SFTConfig(output_dir=tmp_path / "other", max_steps=2, resume_from_checkpoint=final.parent),
        )


def test_where_a_run_goes_on_is_told_first(run, tmp_path, capsys) -> None:
    run(max_steps=3, save_steps=1, train_batch_size=2)
    capsys.readouterr()
    run(max_steps=3, resume_from_checkpoint=tmp_path / "run" / "checkpoint-2", train_batch_size=2, learning_rate=1e-6)
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"{tmp_path}/run/checkpoint-2: going on with step 3 of 3, epoch 0.67",
        "changed since then: learning_rate 2e-05 -> 1e-06",
    ]
    first, second = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert (first["changed"], second["changed"]) == ([], ["learning_rate 2e-05 -> 1e-06"])


@pytest.mark.parametrize(("eval_steps", "evaluated"), [(None, [3, 6]), (2, [2, 4, 6]), (5, [5, 6])])
def test_the_validation_loss_is_logged_when_asked_and_at_the_end(eval_steps, evaluated, run, dataset) -> None:
    settings = {"num_train_epochs": 2, "train_batch_size": 2, "eval_steps": eval_steps}
    _, lines = run(data={"val_data_path": dataset.eval}, **settings)
    assert [line["step"] for line in lines if "eval/loss" in line] == evaluated


def test_a_vision_cache_changes_no_loss_and_later_epochs_skip_the_tower(run, tmp_path, monkeypatch) -> None:
    passes: list[int] = []
    forward = VisionTower.forward

    def counted(tower: VisionTower, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        passes.append(len(grids))
        return forward(tower, pixels, grids)

    monkeypatch.setattr(VisionTower, "forward", counted)
    settings = {"num_train_epochs": 2, "train_batch_size": 6, "learning_rate": 1e-3, "freeze": "vit"}
    _, plain = run("plain", **settings)
    for name, more in (("memory", {}), ("disk", {"vision_cache_dir": tmp_path / "cache"})):
        passes.clear()
        _, lines = run(name, vision_cache="1GB", **settings, **more)
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in plain], rel=1e-5)
        assert len(passes) == 1
        assert [line["perf/vision_cache_hits"] for line in lines] == [0, 1]
        assert lines[0]["memory/vision_cache_gb"] == lines[1]["memory/vision_cache_gb"] > 0
    assert list((tmp_path / "cache").rglob("*.safetensors"))


def test_updates_that_overflow_float16_are_counted(run, model_folder, monkeypatch) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**40))
    final, lines = run(max_steps=2, num_train_epochs=0, fp16=True)
    assert [line["optim/overflows"] for line in lines] == [1, 2]
    assert weights(final) == weights(model_folder)


def test_workers_give_the_validation_loss_that_one_process_gives(run, dataset) -> None:
    settings = {"max_steps": 1, "num_train_epochs": 0, "train_batch_size": 2}
    data = {"val_data_path": dataset.eval}
    [[alone], [together]] = [run(str(n), data=data, num_workers=n, **settings)[1] for n in (0, 2)]
    assert together["eval/loss"] == alone["eval/loss"]


def test_the_validation_loss_is_the_mean_over_all_trained_tokens(run, dataset, model, processor) -> None:
    _, [line] = run(
        data={"val_data_path": dataset.eval}, max_steps=1, num_train_epochs=0, learning_rate=0, train_batch_size=3
    )
    logprobs = []
    for sample in read_samples(dataset.eval, dataset.eval.parent):
        with torch.no_grad():
            example = encode_sample(sample, processor, max_length=1000)
            logprobs.append(model(**pack([example]).model_inputs()).logprobs)
    assert line["eval/loss"] == pytest.approx(-float(torch.cat(logprobs).mean()), rel=1e-5)


def test_the_validation_loss_is_the_same_at_any_batch_size(run, dataset) -> None:
    """Token-weighted: the samples have unlike numbers of trained tokens."""
    settings = {"data": {"val_data_path": dataset.eval}, "max_steps": 1, "num_train_epochs": 0, "learning_rate": 0}
    losses = [
        run(f"run-{size}-{row}", train_batch_size=size, max_tokens_per_row=row, **settings)[1][0]["eval/loss"]
        for size, row in ((1, 16384), (3, 16384), (4, 16384), (4, 200))
    ]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_dropout_is_off_in_the_validation_loss(model_folder, dataset, processor) -> None:
    config = SFTConfig(use_lora=True, lora_r=4, lora_dropout=0.5)
    learner = Learner.load(str(model_folder), ModelConfig(device="cpu"), config, processor, total_steps=1)
    with torch.no_grad():
        for parameter in learner.parameters:
            parameter.normal_(0, 0.1)
    learner.model.train()
    samples = read_samples(dataset.eval, dataset.eval.parent)[:1]
    encoder = Encoder(processor=processor, max_length=1000, length_policy="error")
    first, second = (evaluation_loss(learner, samples, encoder, LengthReport(config), num_workers=0) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("settings", [{"bf16": True}, {"bf16": True, "use_lora": True, "lora_r": 4}])
def test_bfloat16_logs_nearly_the_loss_of_float32(settings, run) -> None:
    shared = {"max_steps": 1, "num_train_epochs": 0}
    _, [plain] = run("plain", **shared)
    _, [half] = run("half", **shared, **settings)
    assert half["loss"] == pytest.approx(plain["loss"], rel=0.02)


def test_a_sample_longer_than_max_length_is_named(run) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:\d: QnA\[0\]\.A3: \d+ tokens, more than max_length 100"):
        run(data={"max_length": 100}, max_steps=1)


def test_a_length_is_found_before_the_model_is_loaded_and_leaves_no_run_folder(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Learner, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(DataError, match=r"^6 problems in lengths"):
        run(data={"max_length": 100})
    assert not (tmp_path / "run").exists()


def test_samples_left_out_for_their_length_are_counted_and_listed(run, capsys) -> None:
    final, lines = run(data={"max_length": 151, "length_policy": "drop"}, num_train_epochs=1, train_batch_size=1)
    left_out = [json.loads(line) for line in (final.parent / "left_out.jsonl").read_text().splitlines()]
    assert 0 < len(left_out) < 6 and len(lines) == 6 - len(left_out)
    assert all(one["tokens"] > 151 and one["reason"] == "too_long" for one in left_out)
    assert {one["outcome"] for one in left_out} == {"left out"}
    assert left_out[0]["where"].endswith("train.jsonl:2") and left_out[0]["field"] == "QnA[0].A3"
    assert f"longer than max_length: {len(left_out)} samples left out" in capsys.readouterr().out


def test_samples_whose_images_were_shrunk_are_trained_and_listed(run, capsys) -> None:
    final, lines = run(
        data={"max_length": 145, "length_policy": "shrink_images"}, num_train_epochs=1, train_batch_size=1
    )
    shrunk = [json.loads(line) for line in (final.parent / "left_out.jsonl").read_text().splitlines()]
    assert len(lines) == len(shrunk) == 6
    assert all(one["outcome"].startswith("pictures shrunk to at most ") for one in shrunk)
    assert "6 samples with smaller pictures" in capsys.readouterr().out


def test_a_text_that_is_too_long_by_itself_is_named_when_images_may_shrink(run) -> None:
    with pytest.raises(DataError, match="however small its pictures; raise"):
        run(data={"max_length": 60, "length_policy": "shrink_images"})


def test_a_run_without_a_sample_left_says_so(run) -> None:
    with pytest.raises(DataError, match="every sample is longer than max_length 100"):
        run(data={"max_length": 100, "length_policy": "drop"})


# -- losses that are no numbers


@pytest.fixture
def broken_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the gradient of these steps no number."""

    def arrange(*steps: int) -> None:
        real = nn.utils.clip_grad_norm_

        def break_it(parameters: list[nn.Parameter], limit: float) -> torch.Tensor:
            counted.append(0)
            if len(counted) in steps:
                parameters[0].grad.fill_(torch.nan)
            return real(parameters, limit)

        counted: list[int] = []
        monkeypatch.setattr(nn.utils, "clip_grad_norm_", break_it)

    return arrange


def test_a_gradient_that_is_no_number_stops_the_run_and_names_its_samples(broken_at, run, dataset) -> None:
    broken_at(2)
    with pytest.raises(TrainingError, match=r"^step 2: loss \d.*, gradient norm nan; in 1 row of ") as stopped:
        run(train_batch_size=2, num_train_epochs=1)
    assert len(re.findall(r"train\.jsonl:\d", str(stopped.value))) == 2


def test_updates_that_are_left_out_are_counted_and_the_run_goes_on(broken_at, run, model_folder, capsys) -> None:
    broken_at(1, 2)
    final, lines = run(train_batch_size=2, num_train_epochs=1, skip_nonfinite=2)
    assert [line.get("optim/skipped") for line in lines] == [1, 2, 2]
    assert ["optim/grad_norm" in line for line in lines] == [False, False, True]
    assert capsys.readouterr().out.count("is left out: loss ") == 2
    assert weights(final) != weights(model_folder)


def test_more_of_them_in_a_row_than_allowed_stop_the_run_also_over_a_resume(broken_at, run) -> None:
    broken_at(1, 2)
    settings = {"train_batch_size": 2, "num_train_epochs": 1, "skip_nonfinite": 1, "save_steps": 1}
    for how in ({}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(TrainingError, match="step 2: .* gradient norm nan after 1 that were left out"):
            run(**settings, **how)
        broken_at(1)


# -- several files


@pytest.fixture
def halves(dataset, tmp_path) -> tuple[Path, Path]:
    """The six samples in two files, of two and of four."""
    rows = dataset.train.read_text().splitlines(keepends=True)
    for name, part in (("a.jsonl", rows[:2]), ("b.jsonl", rows[2:])):
        (tmp_path / name).write_text("".join(part))
    return tmp_path / "a.jsonl", tmp_path / "b.jsonl"


def test_several_files_train_as_one_file_of_all_rows_and_are_named(halves, run, capsys) -> None:
    whole, expected = run("whole", train_batch_size=4, num_train_epochs=2)
    capsys.readouterr()
    parts, lines = run("parts", data={"train_data_path": halves}, train_batch_size=4, num_train_epochs=2)
    assert weights(parts) == weights(whole)
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    printed = capsys.readouterr().out
    assert all(f"{path}: {count} samples x 1 in an epoch\n" in printed for path, count in zip(halves, (2, 4)))


@pytest.mark.parametrize("is_large", [False, True])
def test_weights_say_how_often_the_samples_of_a_file_come(is_large, halves, run, monkeypatch) -> None:
    if is_large:
        monkeypatch.setattr(sets_module, "CHECKED_AT_START", 1)
    data = {"train_data_path": halves, "train_weights": (2, 0.5)}
    _, lines = run(data=data, train_batch_size=1, num_train_epochs=1)
    assert len(lines) == 2 * 2 + 2


def test_a_run_goes_on_only_with_the_weights_it_began_with(halves, run) -> None:
    data = {"train_data_path": halves}
    run(data={**data, "train_weights": (1, 1)}, max_steps=2, save_steps=1)
    for weights, is_now in (((1, 2), r"\[1.0, 2.0\]"), ((), "None")):
        with pytest.raises(CheckpointError, match=rf"train_weights was \[1.0, 1.0\] and is {is_now}"):
            run(data={**data, "train_weights": weights}, max_steps=2, resume_from_checkpoint="latest")


# -- sets too large to be checked before the start


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three samples count as many."""
    monkeypatch.setattr(sets_module, "CHECKED_AT_START", 3)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_large_set_is_read_as_it_goes_with_the_same_result(num_workers, run, model_folder, monkeypatch) -> None:
    settings = {"num_train_epochs": 2, "train_batch_size": 4}
    large, lines = run("large", num_workers=num_workers, **settings)
    monkeypatch.setattr(sets_module, "CHECKED_AT_START", 1000)
    small, _ = run("small", **settings)
    assert weights(large) == weights(small) != weights(model_folder)
    assert len(lines) == 4


@pytest.mark.usefixtures("large")
def test_the_first_samples_of_a_large_set_are_checked_before_the_model_is_loaded(run, dataset, tmp_path) -> None:
    rows = dataset.train.read_text().splitlines()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([rows[0], "{", *rows[1:]]))
    with pytest.raises(DataError, match=r"bad\.jsonl:2: broken JSON"):
        run(data={"train_data_path": bad})
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("large")
def test_a_later_row_of_a_large_set_is_named_in_its_turn(run, dataset, tmp_path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([*dataset.train.read_text().splitlines(), "{"]))
    with pytest.raises(DataError, match=r"bad\.jsonl:7: broken JSON"):
        run(data={"train_data_path": bad}, train_batch_size=7)


@pytest.mark.usefixtures("large")
def test_validation_samples_of_a_large_set_that_are_too_long_are_listed_too(run, dataset, capsys) -> None:
    data = {"max_length": 151, "length_policy": "drop", "val_data_path": dataset.train}
    final, lines = run(data=data, max_steps=1, num_train_epochs=0, train_batch_size=1)
    left_out = [json.loads(line) for line in (final.parent / "left_out.jsonl").read_text().splitlines()]
    assert lines[0]["data/too_long"] == len(left_out) > 1
    assert "eval/loss" in lines[0]
    with pytest.raises(DataError, match=r"train\.jsonl: each of the first 3 samples is longer than max_length 100"):
        run(data={**data, "max_length": 100})


def test_samples_left_out_are_listed_once_in_a_run_that_goes_on(run, tmp_path) -> None:
    settings = {"num_train_epochs": 1, "train_batch_size": 1, "save_steps": 1}
    data = {"max_length": 151, "length_policy": "drop"}
    final, lines = run(data=data, **settings)
    listed = (final.parent / "left_out.jsonl").read_text()
    with (final.parent / "left_out.jsonl").open("a") as file:
        file.write('a note\n{"where": "cut sho')
    run(data=data, resume_from_checkpoint=tmp_path / "run" / "checkpoint-1", **settings)
    assert (final.parent / "left_out.jsonl").read_text() == f"{listed}a note\n"
    assert {line["data/too_long"] for line in lines} == {listed.count("\n")}


@pytest.mark.usefixtures("large")
def test_the_first_bad_rows_of_a_large_set_are_named_together(run, dataset, tmp_path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(["{", "[", *dataset.train.read_text().splitlines()]))
    with pytest.raises(DataError, match=r"(?s)^2 problems in .*bad\.jsonl:1: .*bad\.jsonl:2: "):
        run(data={"train_data_path": bad})


@pytest.mark.usefixtures("large")
def test_samples_of_a_large_set_that_are_too_long_are_left_out_once_and_listed(run, capsys) -> None:
    data = {"max_length": 151, "length_policy": "drop"}
    final, lines = run(data=data, num_train_epochs=2, train_batch_size=6)
    left_out = (final.parent / "left_out.jsonl").read_text().splitlines()
    assert 0 < len(left_out) < 6 and len(lines) == 2
    assert f"{len(left_out)} samples left out" in capsys.readouterr().out
