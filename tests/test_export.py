"""Exporting: what is written, what is checked, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from looktwice import export
from looktwice.cli import main
from looktwice.config import ExportConfig
from looktwice.errors import CheckpointError, ConfigError
from looktwice.export import (
    compare_answers,
    compare_tensors,
    describe,
    export_model,
    fixed_prompt,
    layers_under_lora,
    probe_logits,
    with_placeholder,
)
from looktwice.model.adapters import add_lora, base_of, merge, trained_parameters
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.weights import load_model, released_state, save_model
from looktwice.processing.processor import Example, Ovis2_5Processor

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
        (lambda state: state | {"vte.weight": state["vte.weight"] + 1}, "vte.weight is not what was to be written"),
        (lambda state: state | {"llm.extra": torch.zeros(1)}, "llm.extra was written and is no weight of the model"),
        (lambda state: {name: state[name] for name in state if name != "vte.weight"}, "vte.weight was not written"),
        (
            lambda state: state | {"vte.weight": state["vte.weight"].double()},
            "vte.weight is not what was to be written",
        ),
        (lambda state: state | {"vte.weight": state["vte.weight"] * math.inf}, "vte.weight has numbers too large for"),
    ],
)
def test_a_tensor_that_is_not_on_disk_as_meant_is_named(
    model: Ovis2_5ForConditionalGeneration, tmp_path: Path, change, message: str
) -> None:
    save_file(change(released_state(model)), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        compare_tensors(tmp_path, model, torch.float32)


def test_a_model_that_is_broken_is_told_from_a_broken_disk(
    model: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor, tmp_path: Path
) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.vte.weight[3, 5] = math.nan
    save_model(broken, tmp_path / "broken")
    processor.save_pretrained(tmp_path / "broken")
    with pytest.raises(CheckpointError, match="vte.weight holds numbers that are not finite; the model it came from"):
        export_model(str(tmp_path / "broken"), tmp_path / "out", CPU)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")])
def test_a_full_disk_leaves_nothing_and_is_named(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(export, "write_model", fail)
    with pytest.raises(CheckpointError, match=r"out: cannot be written \(.*No space left.*\); make room on the disk"):
        export_model(str(model_folder), tmp_path / "out", CPU)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["foo", "5", "0GB", "-1GB", "5 gigabytes", "MB"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match="max_shard_size is .*: give a whole or decimal number of KB, MB or GB"):
        ExportConfig(max_shard_size=size)


@pytest.mark.parametrize("size", ["5GB", "0.5GB", "500MB", "10KB"])
def test_a_size_with_its_unit_is_taken(size: str) -> None:
    assert ExportConfig(max_shard_size=size).max_shard_size == size


# -- a merge that is not one


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = {
    "llm": {"r": 2, "alpha": 4},
    "llm+vit": {"r": 2, "alpha": 4, "targets": "llm+vit"},
    "r=128": {"r": 128, "alpha": 256},
    "DoRA": {"r": 2, "alpha": 4, "use_dora": True},
    "rsLoRA": {"r": 4, "alpha": 4, "use_rslora": True},
}


def faint_adapter(base: Path, processor: Ovis2_5Processor, folder: Path, dtype: torch.dtype, **kind: Any) -> Path:
    """An adapter that changes logits by less than half precision rounds them."""
    adapted = add_lora(base_of(load_model(str(base), dtype=dtype)), **kind)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trained_parameters(adapted):
            if "lora_B" in name:
                parameter += 1e-4 * torch.randn(parameter.shape, generator=generator)
    save_model(adapted, folder)
    processor.save_pretrained(folder)
    return folder


def unload(model: PeftModel) -> Ovis2_5ForConditionalGeneration:
    """Not `merge`: the adapter is lost."""
    return model.unload()


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in the dtype that the folder is named after."""
    folder = tmp_path_factory.mktemp("base") / request.param
    export_model(str(model_folder), folder, ExportConfig(device="cpu", dtype=request.param, verify=False))
    return folder


@pytest.mark.parametrize(
    ("base", "kind"),
    [*(("bfloat16", kind) for kind in KINDS), ("float16", "llm"), ("float32", "llm")],
    indirect=["base"],
)
def test_a_merge_passes_and_one_that_lost_the_adapter_does_not(
    base: Path, kind: str, processor: Ovis2_5Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = faint_adapter(base, processor, tmp_path / "adapter", DTYPES[base.name], **KINDS[kind])
    exported = export_model(str(adapter), tmp_path / "out", CPU)
    assert (exported.merged_adapter, exported.dtype) == (True, DTYPES[base.name])
    monkeypatch.setattr(export, "merge", unload)
    with pytest.raises(CheckpointError, match="is not the weight with its adapter merged, off by up to"):
        export_model(str(adapter), tmp_path / "lost", CPU)
    assert not (tmp_path / "lost").exists()


def test_a_part_trained_whole_that_was_lost_is_named(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_table(model: PeftModel) -> Ovis2_5ForConditionalGeneration:
        before = base_of(model).model.vte.original_module.weight.detach().clone()
        merged = merge(model)
        merged.model.vte.weight.data.copy_(before)
        return merged

    monkeypatch.setattr(export, "merge", without_table)
    with pytest.raises(CheckpointError, match="vte.weight is not what was to be written"):
        export_model(str(adapter), tmp_path / "out", CPU)


def test_merging_before_converting_rounds_weights_once(adapter: Path, tmp_path: Path) -> None:
    precise, rounded = (
        load_file(
            export_model(str(adapter), tmp_path / dtype, ExportConfig(device="cpu", dtype=dtype)).folder
            / "model.safetensors"
        )
        for dtype in ("float32", "bfloat16")
    )
    assert [name for name in precise if not torch.equal(precise[name].bfloat16(), rounded[name])] == []


def test_a_model_kept_in_half_precision_merges_in_float32_when_that_is_asked_for(
    model_folder: Path, processor: Ovis2_5Processor, tmp_path: Path
) -> None:
    export_model(str(model_folder), tmp_path / "half", ExportConfig(device="cpu", dtype="bfloat16", verify=False))
    adapter = faint_adapter(tmp_path / "half", processor, tmp_path / "adapter", torch.bfloat16, **KINDS["llm"])
    exported = export_model(str(adapter), tmp_path / "out", ExportConfig(device="cpu", dtype="float32"))
    name = "llm.model.layers.0.self_attn.q_proj.weight"
    merged = load_file(exported.folder / "model.safetensors")[name]
    assert not torch.equal(merged, merged.bfloat16().float())


def test_an_adapter_of_another_kind_is_refused_before_the_work(
    model_folder: Path, processor: Ovis2_5Processor, tmp_path: Path
) -> None:
    settings = LoraConfig(r=2, target_modules=r".*language_model.layers.0.*o_proj", lora_bias=True)
    base = base_of(load_model(str(model_folder)))
    base.model.language_model.layers[0].self_attn.o_proj.bias = torch.nn.Parameter(torch.zeros(128))
    layer = get_peft_model(base, settings)
    with pytest.raises(CheckpointError, match="this kind of adapter cannot be verified.*; export with --no-verify"):
        layers_under_lora(layer)


# -- what conversion costs


def test_the_difference_of_a_conversion_is_told(model_folder: Path, tmp_path: Path) -> None:
    exported = export_model(str(model_folder), tmp_path / "out", ExportConfig(device="cpu", dtype="bfloat16"))
    assert exported.logit_difference is not None and 1e-4 < exported.logit_difference < 5e-2
    assert "every tensor is equal, converted from float32 to bfloat16; logits" in describe(exported)


def test_what_the_adapter_does_is_told_beside_what_the_merge_does(adapter: Path, tmp_path: Path) -> None:
    exported = export_model(str(adapter), tmp_path / "out", CPU)
    assert exported.adapter_effect is not None and exported.adapter_effect > 0.01
    assert describe(exported).endswith(f"; the adapter changes them by {exported.adapter_effect:.1e}")


@pytest.mark.parametrize(("dtype", "mend"), [("same", "try --device cpu"), ("bfloat16", "export with --dtype float32")])
def test_a_refusal_never_advises_what_is_already_so(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, mend: str
) -> None:
    seen = iter([0.0, 1.0])
    real = export.probe_logits
    monkeypatch.setattr(export, "probe_logits", lambda model, probe: real(model, probe) + next(seen))
    with pytest.raises(CheckpointError, match=f"from those before, allowed is .*; {mend}$"):
        export_model(str(model_folder), tmp_path / "out", ExportConfig(device="cpu", dtype=dtype))


# -- where it is written


def test_an_empty_folder_is_filled_also_when_it_is_the_current_one(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exported = export_model(str(model_folder), Path("."), CPU)
    assert exported.folder == Path(".")
    assert {"config.json", "model.safetensors"} <= {path.name for path in Path(".").iterdir()}
    assert not list(tmp_path.glob(".export-*"))


# -- another runtime's answer


@pytest.fixture
def prompt(processor: Ovis2_5Processor) -> Example:
    return fixed_prompt(processor)


def greedy(model: Ovis2_5ForConditionalGeneration, prompt: Example, count: int) -> tuple[list[int], list[float]]:
    """Our own greedy ids, one forward pass each, and their logprobs."""
    sequence, logprobs = prompt.copy(), []
    for _ in range(count):
        best = probe_logits(model, sequence)[-1].log_softmax(-1).max(0)
        sequence.append([int(best.indices)], is_trained=True)
        logprobs.append(float(best.values))
    return sequence.input_ids[len(prompt) :], logprobs


def test_an_answer_like_ours_passes_with_its_difference(
    model: Ovis2_5ForConditionalGeneration, prompt: Example
) -> None:
    ids, logprobs = greedy(model, prompt, 4)
    shifted = [value + 5e-4 for value in logprobs]
    assert compare_answers(model, prompt, ids, shifted) == pytest.approx(5e-4, rel=0.05)


def test_logprobs_unlike_ours_are_refused(model: Ovis2_5ForConditionalGeneration, prompt: Example) -> None:
    ids, logprobs = greedy(model, prompt, 2)
    with pytest.raises(CheckpointError, match="the greedy answers differ: logprobs by up to 0.1 nats"):
        compare_answers(model, prompt, ids, [logprobs[0], logprobs[1] - 0.1])


def test_an_id_that_is_not_the_best_is_refused(model: Ovis2_5ForConditionalGeneration, prompt: Example) -> None:
    best, second = probe_logits(model, prompt)[-1].log_softmax(-1).topk(2).values.tolist()
    ids = probe_logits(model, prompt)[-1].topk(2).indices.tolist()[1:]
    with pytest.raises(CheckpointError, match=f"its ids are up to {best - second:.2g} nats behind our best"):
        compare_answers(model, prompt, ids, [second])


def test_an_image_is_one_placeholder_in_the_prompt_of_vllm(processor: Ovis2_5Processor, prompt: Example) -> None:
    ids = with_placeholder(prompt.input_ids, processor.config)
    assert ids.count(processor.config.image_placeholder_id) == 1
    assert len(ids) == len(prompt) - prompt.images[0].num_tokens - 1
    assert not {processor.config.image_token_id, processor.config.image_start_token_id} & set(ids)


def test_a_python_without_vllm_is_named(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ExportConfig(device="cpu", verify_with="vllm", vllm_python=tmp_path / "python")
    monkeypatch.setattr(export, "load_model", None)  # asked for before any work
    with pytest.raises(
        ConfigError, match="python has no vLLM .*; install vllm there, or name .*: --vllm_python PYTHON"
    ):
        export_model(str(model_folder), tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_a_missing_vllm_names_the_command_for_later(model_folder: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    python.chmod(0o755)
    config = ExportConfig(device="cpu", verify_with="vllm", vllm_python=python)
    with pytest.raises(ConfigError, match="To compare later, .*: looktwice export FOLDER COPY --verify_with vllm"):
        export_model(str(model_folder), tmp_path / "out", config)


def test_a_model_with_its_own_ids_is_nothing_for_vllm(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n", encoding="utf-8")
    python.chmod(0o755)
    config = ExportConfig(device="cpu", verify_with="vllm", vllm_python=python)
    monkeypatch.setattr(export, "load_model", None)  # asked for before any work
    with pytest.raises(ConfigError, match="vLLM knows the released vocabulary alone"):
        export_model(str(model_folder), tmp_path / "out", config)


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
