"""What a saved folder says of its run, and which runs may go on from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from looktwice.config import DataConfig, ModelConfig, SFTConfig
from looktwice.errors import CheckpointError, ConfigError
from looktwice.training import record as record_module
from looktwice.training.record import Record, fingerprint

CHECKPOINT = Path("checkpoint-4")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("{}\n")
    return path


def record(data: Path, *, num_samples: int = 40, total_steps: int = 10, **settings: object) -> Record:
    configs = (ModelConfig(), DataConfig(train_data_path=data), SFTConfig(**settings))
    return Record.of("sft", configs, num_samples=num_samples, total_steps=total_steps)


def saved(here: Record, folder: Path, step: int = 4) -> Record:
    folder.mkdir(exist_ok=True)
    here.write(folder, step=step)
    return Record.read(folder)


def test_validation_data_that_changed_are_told(data, tmp_path) -> None:
    def of(rows: str) -> Record:
        data.write_text(rows)
        configs = (ModelConfig(), DataConfig(train_data_path=data, val_data_path=data), SFTConfig())
        return Record.of("sft", configs, num_samples=1, total_steps=1)

    before = saved(of("{}"), tmp_path / "saved")
    assert list(of("{}").changes_since(before)) == []
    [(name, change)] = of("[]").changes_since(before)
    assert name == "val_data" and change.startswith("val_data ") and " -> " in change


def test_what_was_written_is_read(data, tmp_path) -> None:
    (tmp_path / "saved").mkdir()
    file = tmp_path / "saved" / "model.safetensors"
    file.write_bytes(b"12345")
    read = saved(record(data), tmp_path / "saved")
    assert (read.stage, read.step, read.files) == ("sft", 4, {"model.safetensors": (5, fingerprint(file))})
    assert read.order == record(data).order


DAMAGE = {None: "missing, was saved with 5 bytes", b"123": "3 bytes, was saved with 5 bytes"}
DAMAGE[b"12325"] = "damaged: other bytes than were saved, though as many"


@pytest.mark.parametrize(("content", "found"), [*DAMAGE.items()])
def test_a_folder_of_which_a_file_is_not_as_it_was_saved_is_named(content, found, data, tmp_path) -> None:
    file = tmp_path / "saved" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"12345")
    saved(record(data), file.parent)
    file.unlink()
    if content:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"model.safetensors: {found}; copy the folder again"):
        Record.of_whole(file.parent)
    assert Record.read(file.parent).step == 4


def test_a_folder_that_says_sizes_alone_is_judged_by_them(data, tmp_path) -> None:
    """As those that were saved before there were fingerprints."""
    file = tmp_path / "saved" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"12345")
    saved(record(data), file.parent)
    path = file.parent / "train_config.json"
    fields = json.loads(path.read_text())
    fields["run"]["files"] = {"model.safetensors": 5}
    path.write_text(json.dumps(fields))
    file.write_bytes(b"abcde")
    assert Record.of_whole(file.parent).files == {"model.safetensors": (5, None)}
    file.write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="3 bytes, was saved with 5 bytes"):
        Record.of_whole(file.parent)


def test_a_file_that_people_edit_has_only_to_be_json(data, tmp_path) -> None:
    """Our messages advise writing the new place of a base into adapter_config.json."""
    file = tmp_path / "saved" / "adapter_config.json"
    file.parent.mkdir()
    file.write_text('{"base_model_name_or_path": "old"}')
    there = saved(record(data), file.parent)
    file.write_text('{"base_model_name_or_path": "a new place"}')
    assert Record.of_whole(file.parent) == there
    file.write_text('{"base_model_name_or_path": "a new')
    with pytest.raises(CheckpointError, match="adapter_config.json: no whole JSON any more"):
        Record.of_whole(file.parent)
    file.unlink()
    with pytest.raises(CheckpointError, match="adapter_config.json: missing"):
        Record.of_whole(file.parent)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"run": {"step": 1}}'])
def test_a_folder_without_a_record_is_named(content, tmp_path) -> None:
    if content is not None:
        (tmp_path / "train_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="does not say what run it is of"):
        Record.read(tmp_path)


@pytest.mark.parametrize(
    ("settings", "difference", "price"),
    [
        ({"train_batch_size": 2}, "batch_size was 4 and is 2", "samples are seen again or never"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 and is 2", "samples are"),
        ({"seed": 1}, "seed was 42 and is 1", "samples are"),
        ({"num_samples": 39}, "samples was 40 and is 39", "samples are"),
        ({"num_samples": 39, "total_steps": 20}, "samples was 40 and is 39; steps was 10 and is 20", "samples are"),
        ({"total_steps": 20}, "steps was 10 and is 20", "the learning rate goes on by another schedule"),
    ],
)
def test_a_step_that_means_something_else_is_refused_by_name_or_accepted(
    settings, difference, price, data, tmp_path
) -> None:
    there, here = saved(record(data), tmp_path / "saved"), record(data, **settings)
    with pytest.raises(CheckpointError, match=f"{difference}.*accept with --allow_changes that {price}"):
        here.check_goes_on(there, CHECKPOINT, allow_changes=False)
    here.check_goes_on(there, CHECKPOINT, allow_changes=True)


def test_other_data_are_refused_and_the_same_at_another_place_are_not(data, tmp_path) -> None:
    there = saved(record(data), tmp_path / "saved")
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(data.read_bytes())
    record(moved).check_goes_on(there, CHECKPOINT, allow_changes=False)
    moved.write_text("[]\n")
    with pytest.raises(CheckpointError, match="train_data was [0-9a-f]+ and is"):
        record(moved).check_goes_on(there, CHECKPOINT, allow_changes=False)


def test_nothing_is_trained_beyond_the_end_whatever_is_allowed(data, tmp_path) -> None:
    there = saved(record(data), tmp_path / "saved", step=12)
    with pytest.raises(ConfigError, match="saved after step 12, and this run ends with step 10"):
        record(data).check_goes_on(there, CHECKPOINT, allow_changes=True)


def test_from_the_last_step_a_run_goes_on_to_its_final_model(data, tmp_path) -> None:
    there = saved(record(data), tmp_path / "saved", step=10)
    record(data).check_goes_on(there, CHECKPOINT, allow_changes=False)
    assert there.is_over and not saved(record(data), tmp_path / "saved", step=9).is_over


def test_other_batches_are_told_before_the_end_that_they_bring(data, tmp_path) -> None:
    there = saved(record(data), tmp_path / "saved", step=8)
    with pytest.raises(CheckpointError, match="batch_size was 4 and is 8; steps was 10 and is 5. Go on with the same"):
        record(data, train_batch_size=8, total_steps=5).check_goes_on(there, CHECKPOINT, allow_changes=False)


@pytest.mark.parametrize(
    ("settings", "step", "is_allowed"),
    [
        ({"lr_scheduler_type": "constant"}, 2, True),
        ({"lr_scheduler_type": "constant"}, 1, False),  # the warm-up of 20 steps has 2
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0}, 1, True),
        ({"lr_scheduler_type": "cosine"}, 2, False),
        ({"lr_scheduler_type": "constant", "train_batch_size": 2}, 2, False),
    ],
)
def test_more_steps_need_no_leave_where_the_learning_rate_stays_what_it_is(
    settings, step, is_allowed, data, tmp_path
) -> None:
    there = saved(record(data, **{**settings, "train_batch_size": 4}), tmp_path / "saved", step=step)
    here = record(data, total_steps=20, **settings)
    if is_allowed:
        return here.check_goes_on(there, CHECKPOINT, allow_changes=False)
    with pytest.raises(CheckpointError, match="steps was 10 and is 20. Go on with the same, or accept"):
        here.check_goes_on(there, CHECKPOINT, allow_changes=False)


def test_a_checkpoint_of_the_other_stage_is_refused_whatever_is_allowed(data, tmp_path) -> None:
    there = saved(Record(stage="grpo", order=record(data).order, settings={}), tmp_path / "saved")
    with pytest.raises(CheckpointError, match="of stage grpo, this run is sft"):
        record(data).check_goes_on(there, CHECKPOINT, allow_changes=True)


def test_a_checkpoint_of_another_start_is_refused_whatever_is_allowed(data, tmp_path) -> None:
    def of(start: str | None) -> Record:
        configs = (ModelConfig(), DataConfig(train_data_path=data), SFTConfig())
        return Record.of("sft", configs, num_samples=1, total_steps=10, start=start)

    there = saved(of("a"), tmp_path / "saved")
    of("a").check_goes_on(there, CHECKPOINT, allow_changes=False)
    of(None).check_goes_on(there, CHECKPOINT, allow_changes=False)  # a hub name, whose files are not known
    with pytest.raises(CheckpointError, match="checkpoint-4: its run started from another model"):
        of("b").check_goes_on(there, CHECKPOINT, allow_changes=True)


def test_other_settings_are_told(data, tmp_path) -> None:
    there = saved(record(data, learning_rate=1e-3, output_dir="one"), tmp_path / "saved")
    here = record(data, learning_rate=1e-4, output_dir="two", overwrite=True)
    assert list(here.changes_since(there)) == [("learning_rate", "learning_rate 0.001 -> 0.0001")]


def test_a_large_file_is_told_apart_by_its_size_and_blocks_all_over_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(record_module, "HASHED_WHOLE", 10)
    monkeypatch.setattr(record_module, "BLOCK", 4)
    monkeypatch.setattr(record_module, "NUM_BLOCKS", 3)
    file = tmp_path / "large"
    seen = set()
    for content in (b"0" * 20, b"0" * 21, b"1" + b"0" * 19, b"0" * 9 + b"1" + b"0" * 10, b"0" * 19 + b"1"):
        file.write_bytes(content)
        seen.add(fingerprint(file))
    assert len(seen) == 5
