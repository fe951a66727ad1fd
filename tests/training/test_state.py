"""What is saved goes on exactly, and what does not fit is refused."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import pytest
import torch
from tests.training.updates import RECORD, update

from looktwice.errors import CheckpointError
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.weights import is_adapter, load_model
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example
from looktwice.training.folder import STATE_FILE
from looktwice.training.record import Record
from looktwice.training.state import resume, save


def test_an_optimizer_of_bitsandbytes_goes_on(load_sft, examples, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    learner, resumed = load_sft(optim="adamw_8bit"), load_sft(optim="adamw_8bit")
    update(learner, examples[:1])
    save(learner, tmp_path / "saved", RECORD, with_optimizer=True)
    resume(resumed, tmp_path / "saved")
    for each in (learner, resumed):
        each.step = 1
        update(each, examples[:1])
    assert all(map(torch.equal, learner.parameters, resumed.parameters))


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize(("first", "second"), [("adamw_torch", "adamw_8bit"), ("adamw_8bit", "adamw_torch_fused")])
def test_a_checkpoint_goes_on_with_its_kind_of_optimizer(first, second, load_sft, examples, tmp_path) -> None:
    learner = load_sft(optim=first)
    update(learner, examples)
    save(learner, tmp_path / "checkpoint-1", Record(stage="sft", order={}, settings={}), with_optimizer=True)
    resume(load_sft(optim=first), tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match=r"optim was adamw\w* and is adamw\w*; resume with the same settings"):
        resume(load_sft(optim=second), tmp_path / "checkpoint-1")


def test_a_run_over_a_quantised_base_is_not_resumed_over_a_whole_one(quantised_adapter, load_sft) -> None:
    with pytest.raises(CheckpointError, match="quantization was nf4 and is none; resume with the same settings"):
        resume(load_sft(use_lora=True, lora_r=4), quantised_adapter)


@pytest.fixture
def file_limit() -> Callable[[int], AbstractContextManager[None]]:
    """No file can grow beyond so many kilobytes."""

    @contextmanager
    def limit(kilobytes: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 * kilobytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


def logits(model: torch.nn.Module, example: Example) -> torch.Tensor:
    inputs = pack([example]).model_inputs()
    del inputs["loss_mask"]
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("settings", [{}, {"use_lora": True, "lora_r": 4}])
def test_a_saved_model_gives_the_same_logits_and_has_its_record(settings, load_sft, examples, tmp_path) -> None:
    learner = load_sft(learning_rate=0.01, warmup_ratio=0, **settings)
    start = logits(learner.model, examples[0])
    update(learner, examples[:1])
    save(learner, tmp_path, RECORD, with_optimizer=False)
    trained = logits(learner.model, examples[0])
    assert (trained - start).abs().max() > 0.01
    torch.testing.assert_close(logits(load_model(str(tmp_path)), examples[0]), trained, atol=1e-5, rtol=0)
    assert Record.read(tmp_path) == replace(RECORD, files=Record.read(tmp_path).files)
    assert not (tmp_path / "trainer_state.pt").exists()


def test_a_whole_model_saved_over_an_adapter_replaces_it(load_sft, tmp_path) -> None:
    save(load_sft(use_lora=True, lora_r=4), tmp_path, RECORD, with_optimizer=False)
    save(load_sft(), tmp_path, RECORD, with_optimizer=False)
    assert not is_adapter(str(tmp_path))


@pytest.mark.parametrize("settings", [{}, {"use_lora": True, "lora_r": 4}])
def test_a_resumed_learner_makes_the_same_next_update(settings, load_sft, examples, tmp_path) -> None:
    settings = {"learning_rate": 0.01, "warmup_ratio": 0, **settings}
    learner = load_sft(**settings)
    update(learner, examples[:1])
    learner.step = 1
    save(learner, tmp_path, RECORD, with_optimizer=True)
    resumed = load_sft(**settings)
    resume(resumed, tmp_path)
    assert resumed.step == 1
    for one in (learner, resumed):
        update(one, examples[1:2])
    for expected, parameter in zip(learner.parameters, resumed.parameters, strict=True):
        assert torch.equal(parameter, expected)


def test_a_resumed_learner_knows_its_scale_and_how_long_rows_may_be(load_sft, examples, tmp_path) -> None:
    learner = load_sft(fp16=True)
    update(learner, examples[:1])
    learner.scaler.update(new_scale=512.0)
    learner.tokens_that_fit, learner.max_tokens_per_row, learner.num_overflows = 100, 200, 3
    save(learner, tmp_path, RECORD, with_optimizer=True)
    resumed, other = load_sft(fp16=True), load_sft(max_tokens_per_row=300)
    resume(resumed, tmp_path)
    assert (resumed.scaler.get_scale(), resumed.tokens_that_fit, resumed.max_tokens_per_row) == (512.0, 100, 200)
    assert resumed.num_overflows == 3
    resume(other, tmp_path)
    assert other.max_tokens_per_row == 300


@pytest.mark.parametrize("has_learnt", [True, False])
def test_a_resumed_learner_knows_whether_it_has_learnt(has_learnt, load_sft, examples, tmp_path) -> None:
    learner, resumed = load_sft(), load_sft()
    learner.update(learner.rows(examples[:1]), lambda scores, row: has_learnt * scores.logprobs.mean())
    save(learner, tmp_path, RECORD, with_optimizer=True)
    resume(resumed, tmp_path)
    assert resumed.has_learnt == has_learnt


def test_a_checkpoint_that_does_not_say_has_learnt_where_updates_were_taken(load_sft, examples, tmp_path) -> None:
    learner = load_sft()
    update(learner, examples[:1])
    save(learner, tmp_path, RECORD, with_optimizer=True)
    state = torch.load(tmp_path / STATE_FILE)
    del state["has_learnt"]
    torch.save(state, tmp_path / STATE_FILE)
    resumed = load_sft()
    resume(resumed, tmp_path)
    assert resumed.has_learnt


def test_a_folder_without_the_optimizer_cannot_be_resumed(load_sft, tmp_path) -> None:
    learner = load_sft()
    save(learner, tmp_path, RECORD, with_optimizer=False)
    with pytest.raises(CheckpointError, match=r"trainer_state\.pt: no usable state; resume from another checkpoint"):
        resume(learner, tmp_path)


@pytest.mark.parametrize(
    ("saved", "present", "difference"),
    [
        ({}, {"use_lora": True}, "use_lora was False and is True"),
        ({"use_lora": True, "lora_r": 4}, {"use_lora": True, "lora_r": 8}, "lora_r was 4 and is 8"),
        ({"use_lora": True, "lora_alpha": 4}, {"use_lora": True, "lora_alpha": 8}, "lora_alpha was 4 and is 8"),
        ({"use_lora": True}, {"use_lora": True, "use_rslora": True}, "use_rslora was False and is True"),
        ({}, {"freeze": "visual_table"}, "visual_table was trained and is frozen"),
        ({"freeze": "visual_table"}, {}, "visual_table was frozen and is trained"),
    ],
)
def test_a_checkpoint_of_another_training_is_not_resumed(saved, present, difference, load_sft, tmp_path) -> None:
    save(load_sft(**saved), tmp_path, RECORD, with_optimizer=True)
    learner = load_sft(**present)
    before = [parameter.clone() for parameter in learner.parameters]
    with pytest.raises(CheckpointError, match=f"{difference}; resume with the same settings"):
        resume(learner, tmp_path)
    assert all(torch.equal(old, new) for old, new in zip(before, learner.parameters))


def test_a_resumed_learner_takes_the_present_rates_and_decay(load_sft, examples, tmp_path) -> None:
    learner = load_sft(learning_rate=0.01, weight_decay=0.1)
    update(learner, examples[:1])
    save(learner, tmp_path, RECORD, with_optimizer=True)
    resumed = load_sft(learning_rate=0.002, weight_decay=0.3, part_learning_rates={"vit": 0.001})
    resume(resumed, tmp_path)
    groups = resumed.optimizer.param_groups
    assert {(group["part"] == "vit", group["peak_lr"]) for group in groups} == {(True, 0.001), (False, 0.002)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}


def test_resuming_loads_no_second_model(load_sft, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, resumed = load_sft(), load_sft()
    save(learner, tmp_path, RECORD, with_optimizer=True)
    monkeypatch.setattr(Ovis2_5ForConditionalGeneration, "from_pretrained", None)
    resume(resumed, tmp_path)


@pytest.mark.parametrize("content", [b"", b"no state", None])
def test_a_broken_optimizer_state_is_named(content, load_sft, tmp_path) -> None:
    learner = load_sft()
    save(learner, tmp_path, RECORD, with_optimizer=True)
    file = tmp_path / "trainer_state.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
    with pytest.raises(CheckpointError, match=r"trainer_state\.pt: no usable state; resume from another checkpoint"):
        resume(learner, tmp_path)


@pytest.mark.parametrize("kilobytes", [10, 5000, 10000])
def test_a_disk_that_fills_up_while_saving_leaves_the_checkpoint_before(
    kilobytes, load_sft, examples, tmp_path, file_limit
) -> None:
    """At the weights, and at the optimizer's state after them."""
    learner = load_sft()
    update(learner, examples[:1])
    save(learner, tmp_path, RECORD, with_optimizer=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    update(learner, examples[:1])
    with file_limit(kilobytes), pytest.raises(CheckpointError, match=r"cannot be written \(.*; make room on the disk"):
        save(learner, tmp_path, RECORD, with_optimizer=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
