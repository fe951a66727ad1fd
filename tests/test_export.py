"""Exporting: what is written, what is checked, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from looktwice import export
from looktwice.cli import main
from looktwice.config import ExportConfig
from looktwice.errors import CheckpointError, ConfigError
from looktwice.export import compare_tensors, describe, export_model, fixed_prompt, probe_logits
from looktwice.model.adapters import add_lora, base_of, trained_parameters
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.weights import load_model, released_state, save_model
from looktwice.processing.processor import Ovis2_5Processor

# PEFT asks transformers by an older name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

CPU = ExportConfig(device="cpu")


@pytest.fixture(scope="module")
def adapter(model_folder: Path, processor: Ovis2_5Processor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter with one part trained whole."""
    adapted = add_lora(load_model(str(model_folder)), r=2, alpha=4, modules_to_save=["visual_table"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in trained_parameters(adapted):
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("adapter")
    save_model(adapted, folder)
    processor.save_pretrained(folder)
    return folder


def test_a_whole_model_is_copied_bit_for_bit(model_folder: Path, tmp_path: Path) -> None:
    exported = export_model(str(model_folder), tmp_path / "out", CPU)
    assert (exported.merged_adapter, exported.logit_difference) == (False, 0.0)
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, exported.folder))
    assert [name for name in before | after if not torch.equal(before[name], after[name])] == []


def test_an_adapter_is_merged_and_answers_as_before(adapter: Path, tmp_path: Path) -> None:
    exported = export_model(str(adapter), tmp_path / "out", CPU)
    assert exported.merged_adapter and exported.logit_difference is not None and exported.logit_difference < 1e-5
    probe = fixed_prompt(Ovis2_5Processor.from_pretrained(exported.folder))
    adapted, merged = (probe_logits(base_of(load_model(str(path))), probe) for path in (adapter, exported.folder))
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    assert not (exported.folder / "adapter_config.json").exists()


def test_the_dtype_and_the_largest_file_are_as_asked(adapter: Path, tmp_path: Path) -> None:
    config = ExportConfig(device="cpu", dtype="bfloat16", max_shard_size="1MB")
    exported = export_model(str(adapter), tmp_path / "out", config)
    assert (exported.dtype, exported.num_files) == (torch.bfloat16, 3)
    index = json.loads((exported.folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(index["weight_map"]) == exported.num_tensors


def test_tied_embeddings_are_written_once(
    model: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor, tmp_path: Path
) -> None:
    config = copy.deepcopy(model.config)
    config.llm_config.tie_word_embeddings = config.tie_word_embeddings = True
    save_model(Ovis2_5ForConditionalGeneration(config), tmp_path / "tied")
    processor.save_pretrained(tmp_path / "tied")
    exported = export_model(str(tmp_path / "tied"), tmp_path / "out", CPU)
    assert exported.num_tensors == len(model.state_dict()) - 1
    assert "llm.lm_head.weight" not in load_file(exported.folder / "model.safetensors")


def test_pixel_policy_and_box_frame_travel(model_folder: Path, processor: Ovis2_5Processor, tmp_path: Path) -> None:
    exported = export_model(str(model_folder), tmp_path / "out", CPU)
    again = Ovis2_5Processor.from_pretrained(exported.folder)
    assert (again.policy, again.box_frame) == (processor.policy, processor.box_frame)


# -- refusals


def test_a_folder_with_something_in_it_is_not_touched(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="there is something already; give a new folder"):
        export_model(str(model_folder), tmp_path, CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_adapter_key_that_is_not_used_stops_the_export(adapter: Path, tmp_path: Path) -> None:
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.language_model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 128)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing or unexpected: .*layers.9.self_attn"):
        export_model(str(tmp_path), tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()


def test_logits_that_come_back_otherwise_leave_no_folder(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = iter([0.0, 1.0])
    real = export.probe_logits
    monkeypatch.setattr(export, "probe_logits", lambda model, probe: real(model, probe) + next(seen))
    with pytest.raises(CheckpointError, match="its logits differ by .* of the largest from those before"):
        export_model(str(model_folder), tmp_path / "out", CPU)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"vte.weight": state["vte.weight"] + 1}, "vte.weight is not what was written"),
        (lambda state: state | {"llm.extra": torch.zeros(1)}, "llm.extra was not written"),
        (lambda state: {name: state[name] for name in state if name != "vte.weight"}, "vte.weight was written and is"),
        (lambda state: state | {"vte.weight": state["vte.weight"].double()}, "vte.weight is not what was written"),
    ],
)
def test_a_tensor_that_is_not_on_disk_as_meant_is_named(
    model: Ovis2_5ForConditionalGeneration, model_folder: Path, change, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        compare_tensors(model_folder, change(released_state(model)))


# -- the command


def test_the_command_says_what_was_written_and_checked(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(model_folder), str(tmp_path / "out"), "--verify", "--device", "cpu"]) == 0
    written, verified = capsys.readouterr().out.splitlines()
    assert written == f"{tmp_path / 'out'}: 88 tensors, 1,260,960 parameters, float32, 1 weight file"
    assert verified.startswith(
        "verified: read back, every tensor is equal; logits on a fixed picture differ by 0.0e+00"
    )


def test_an_export_without_checks_says_so(model_folder: Path, tmp_path: Path) -> None:
    exported = export_model(str(model_folder), tmp_path / "out", ExportConfig(device="cpu", verify=False))
    assert describe(exported).endswith("not verified")
