"""Model folders in and out, and every way in which one can be wrong."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from looktwice.errors import CheckpointError, ConfigError
from looktwice.model.adapters import LLM_LINEARS, PEFT_PREFIX, add_lora, trained_parameters
from looktwice.model.files import weights_fingerprint
from looktwice.model.location import locate
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.weights import load_model, load_trained, released_name, save_merged, save_model
from looktwice.processing.processor import Ovis2_5Processor

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
Tensors = dict[str, Tensor]


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model folder, to be spoiled."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def saved_adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on the model folder whose weights are not the fresh ones."""
    adapted = add_lora(load_model(str(model_folder)), r=2, alpha=4, dropout=0.0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.5)
    path = tmp_path_factory.mktemp("adapter")
    save_model(adapted, path)
    return path


@pytest.fixture
def adapter_folder(saved_adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_adapter, tmp_path / "adapter"))


def rewrite(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert [name for name in ours.keys() | theirs.keys() if not torch.equal(ours[name], theirs[name])] == []


# -- whole models


def test_a_released_folder_is_loaded_with_every_tensor() -> None:
    model = load_model(str(GOLDEN))
    released = load_file(GOLDEN / "model.safetensors")
    assert sum(weight.numel() for weight in model.parameters()) == sum(value.numel() for value in released.values())
    assert torch.equal(model.get_parameter("lm_head.weight"), released["llm.lm_head.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_loaded_again_as_it_was(
    model: Ovis2_5ForConditionalGeneration, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(model).to(dtype)
    save_model(model, tmp_path)
    again = load_model(str(tmp_path), dtype=dtype).state_dict()
    assert [name for name, value in model.state_dict().items() if not torch.equal(again[name], value)] == []


def test_off_a_terminal_no_bar_is_shown(model_folder: Path, tmp_path: Path, capsys) -> None:
    save_model(load_model(str(model_folder)), tmp_path)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_bar_is_shown_while_a_model_is_loaded_but_not_across_that_of_a_run(
    model_folder: Path, tmp_path: Path, open_terminal
) -> None:
    written = open_terminal()
    model = load_model(str(model_folder))
    assert "Loading weights: " in (shown := written()) and "\n" not in shown
    save_model(model, tmp_path)
    assert written() == ""


def test_of_bitsandbytes_only_warnings_that_mean_nothing_here_are_silenced() -> None:
    def warns(name: str) -> bool:
        return logging.getLogger(name).isEnabledFor(logging.WARNING)

    assert not warns("bitsandbytes.backends.cpu.ops") and not warns("bitsandbytes.autograd._functions")
    assert warns("bitsandbytes.cextension")  # such as that it was built without a GPU


def test_a_model_is_saved_in_the_dtype_it_has(model: Ovis2_5ForConditionalGeneration, tmp_path: Path) -> None:
    save_model(copy.deepcopy(model).to(torch.bfloat16), tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_a_model_with_tied_embeddings_is_saved_without_a_head_and_loaded_again(
    model: Ovis2_5ForConditionalGeneration, tmp_path: Path
) -> None:
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = config.llm_config.tie_word_embeddings = True
    tied = Ovis2_5ForConditionalGeneration(config)
    save_model(tied, tmp_path)
    assert "llm.lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = load_model(str(tmp_path))
    assert again.get_parameter("lm_head.weight") is again.get_parameter("model.language_model.embed_tokens.weight")
    assert torch.equal(again.get_parameter("lm_head.weight"), tied.get_input_embeddings().weight)
    save_merged(tied, tmp_path / "merged")
    assert (
        load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()
    )


def test_an_adapted_model_is_saved_merged_under_the_released_names(model_folder: Path, tmp_path: Path) -> None:
    adapted = add_lora(load_model(str(model_folder)), r=2, alpha=4)
    with torch.no_grad():
        for _, parameter in trained_parameters(adapted):
            parameter += 0.01
    save_merged(adapted, tmp_path)
    again = load_model(str(tmp_path))
    assert isinstance(adapted, PeftModel)  # and as it was
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, adapted.get_base_model()(ids).logits, atol=1e-4, rtol=1e-4)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_a_model_is_loaded_in_the_dtype_asked_for(model_folder: Path) -> None:
    model = load_model(str(model_folder), dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "./nowhere", "~/model", "a/b/c"])
def test_a_name_that_is_neither_folder_nor_hub_name_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such model folder"):
        locate(name)


def test_a_file_is_not_a_model_folder(model_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model folder"):
        load_model(str(model_folder / "config.json"))


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights \(model.safetensors or adapter_config.json\)"):
        load_model(str(folder))


def test_a_folder_without_a_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config.json in this folder"):
        load_model(str(folder))


def test_a_broken_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cannot be loaded as an Ovis2.5 model"):
        load_model(str(folder))


def test_the_config_of_another_model_is_refused_before_anything_is_built(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen3", "hidden_size": 4096}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"no llm_config, so this is not an Ovis2.5 model"):
        load_model(str(folder))


def test_a_truncated_weight_file_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"model.safetensors: a broken weight file .*; copy or download it again"):
        load_model(str(folder))


@pytest.mark.parametrize("text", ["{}", "[]", '{"weight_map": 1}', "{", '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_refused(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json: no usable index of weights"):
        load_model(str(folder))


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(
        folder / "model.safetensors", lambda tensors: {k: v for k, v in tensors.items() if k != "llm.model.norm.weight"}
    )
    with pytest.raises(CheckpointError, match=r"missing_keys: model.language_model.norm.weight"):
        load_model(str(folder))


def test_weights_that_do_not_fit_are_told_by_the_error_alone(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda tensors: tensors | {"extra.weight": torch.zeros(2)})
    printed: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = printed.append  # type: ignore[method-assign]
    theirs = logging.getLogger("transformers")
    level = theirs.level
    theirs.addHandler(handler)
    try:
        with pytest.raises(CheckpointError, match="extra.weight"):
            load_model(str(folder))
    finally:
        theirs.removeHandler(handler)
    assert ([record.getMessage() for record in printed], theirs.level) == ([], level)


def test_an_unexpected_tensor_is_named(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda tensors: tensors | {"extra.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"unexpected_keys: extra.weight"):
        load_model(str(folder))


def test_a_misshaped_tensor_is_named_with_both_shapes(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda tensors: tensors | {"vte.weight": torch.zeros(7, 128)})
    with pytest.raises(CheckpointError, match=r"model.vte.weight.*\[7, 128\].*\[260, 128\]"):
        load_model(str(folder))


# -- where a model is found


def put_into_cache(folder: Path, cache: Path, name: str) -> None:
    """Lay a model folder into a hub cache as a download would."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


def run_offline(cache: Path, code: str) -> str:
    """What a fresh interpreter prints that has only a hub cache and no network."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_hub_names_are_read_from_the_cache_alone_when_offline(
    model_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    settings = adapter_folder / "adapter_config.json"
    fields = json.loads(settings.read_text(encoding="utf-8")) | {"base_model_name_or_path": "someone/model"}
    settings.write_text(json.dumps(fields), encoding="utf-8")
    put_into_cache(model_folder, tmp_path / "cache", "someone/model")
    put_into_cache(adapter_folder, tmp_path / "cache", "someone/adapter")
    code = """
from looktwice.errors import CheckpointError
from looktwice.model.weights import is_adapter, load_model
from looktwice.processing.processor import Ovis2_5Processor
for name in ("someone/model", "someone/adapter"):
    print(type(load_model(name)).__name__, is_adapter(name), Ovis2_5Processor.from_pretrained("someone/model").factor)
try:
    load_model("someone/absent")
except CheckpointError as error:
    print(str(error)[:15])
"""
    assert run_offline(tmp_path / "cache", code).splitlines() == [
        "Ovis2_5ForConditionalGeneration False 16",
        "PeftModelForCausalLM True 16",
        "someone/absent:",
    ]


def test_a_sharded_folder_is_loaded_by_its_index(model: Ovis2_5ForConditionalGeneration, tmp_path: Path) -> None:
    save_model(model, tmp_path, max_shard_size="2MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 3
    assert_same_weights(load_model(str(tmp_path)), model)


def test_a_shard_that_is_gone_is_named(model: Ovis2_5ForConditionalGeneration, tmp_path: Path) -> None:
    save_model(model, tmp_path, max_shard_size="2MB")
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors"):
        load_model(str(tmp_path))


def test_a_shard_that_is_cut_off_is_named(model: Ovis2_5ForConditionalGeneration, tmp_path: Path) -> None:
    save_model(model, tmp_path, max_shard_size="2MB")
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors: a broken weight file"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("max_shard_size", ["5GB", "2MB"])
def test_trained_weights_are_read_tensor_by_tensor(
    model: Ovis2_5ForConditionalGeneration, tmp_path: Path, max_shard_size: str
) -> None:
    save_model(model, tmp_path, max_shard_size=max_shard_size)
    other = copy.deepcopy(model)
    other.model.vte.requires_grad_(False)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_trained(other, tmp_path)
    assert not other.model.vte.weight.any()  # it is not trained
    for name, parameter in trained_parameters(other):
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_trained_weights_stay_as_they_are_when_a_tensor_is_missing(
    model: Ovis2_5ForConditionalGeneration, folder: Path
) -> None:
    rewrite(
        folder / "model.safetensors",
        lambda tensors: {name: tensor + 1 for name, tensor in tensors.items() if name != "vte.weight"},
    )
    other = copy.deepcopy(model)
    with pytest.raises(CheckpointError, match=r"no vte\.weight in its weight files"):
        load_trained(other, folder)
    assert_same_weights(other, model)


def test_a_save_that_fails_leaves_what_was_there(
    model: Ovis2_5ForConditionalGeneration, saved_adapter: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def no_room(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Ovis2_5ForConditionalGeneration, "save_pretrained", no_room)
    with pytest.raises(CheckpointError, match=r"model: cannot be written \(.*No space left on device\); make room"):
        save_model(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_named(model: Ovis2_5ForConditionalGeneration, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/model: cannot be written"):
        save_model(model, tmp_path / "file" / "model")


def test_a_folder_of_the_official_trainer_is_loaded(model: Ovis2_5ForConditionalGeneration, folder: Path) -> None:
    file = folder / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8")) | {"model_type": "ovis", "architectures": ["Ovis"]}
    file.write_text(json.dumps(fields), encoding="utf-8")
    assert_same_weights(load_model(str(folder)), model)


def test_remote_code_in_a_folder_is_not_run(model: Ovis2_5ForConditionalGeneration, folder: Path) -> None:
    for name in ("configuration_ovis2_5", "modeling_ovis2_5"):
        (folder / f"{name}.py").write_text("raise SystemExit('remote code was run')\n", encoding="utf-8")
    file = folder / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields["auto_map"] = {
        "AutoConfig": "configuration_ovis2_5.Ovis2_5_Config",
        "AutoModelForImageTextToText": "modeling_ovis2_5.Ovis2_5",
    }
    file.write_text(json.dumps(fields), encoding="utf-8")
    assert_same_weights(load_model(str(folder)), model)
    assert_same_weights(AutoModelForImageTextToText.from_pretrained(folder), model)
    Ovis2_5Processor.from_pretrained(folder)


# -- how a model is loaded


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_model_is_loaded_where_asked(device: str, model_folder: Path) -> None:
    assert {parameter.device.type for parameter in load_model(str(model_folder), device=device).parameters()} == {"cpu"}


def test_the_stored_dtype_is_kept_on_request(model: Ovis2_5ForConditionalGeneration, tmp_path: Path) -> None:
    save_model(copy.deepcopy(model).to(torch.bfloat16), tmp_path)
    assert {parameter.dtype for parameter in load_model(str(tmp_path), dtype="auto").parameters()} == {torch.bfloat16}


def test_each_tower_can_have_its_own_attention(model_folder: Path) -> None:
    loaded = load_model(str(model_folder), attn_implementation={"llm_config": "eager", "vit_config": "sdpa"})
    assert loaded.model.language_model.config._attn_implementation == "eager"
    assert loaded.model.visual_tokenizer.vit.config._attn_implementation != "eager"


def test_the_generation_settings_travel_with_the_weights(folder: Path, tmp_path: Path) -> None:
    settings = {"do_sample": True, "temperature": 0.6, "eos_token_id": [462, 460], "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_model(load_model(str(folder)), tmp_path / "again")
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text(encoding="utf-8"))
    assert {name: written[name] for name in settings} == settings


# -- adapters


def test_an_adapter_names_its_base(saved_adapter: Path, model_folder: Path) -> None:
    config = json.loads((saved_adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(model_folder)


def test_an_adapter_of_a_base_given_by_a_relative_path_names_it_in_full(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parent)
    save_model(add_lora(load_model(model_folder.name), r=2, alpha=4, dropout=0.0), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(model_folder)


def test_an_adapter_is_saved_without_the_weights_of_its_base(saved_adapter: Path) -> None:
    tensors = load_file(saved_adapter / "adapter_model.safetensors")
    assert [name for name in tensors if "lora_" not in name] == []


def test_an_adapter_is_loaded_on_its_base_and_ready_to_train(saved_adapter: Path) -> None:
    adapted = load_model(str(saved_adapter))
    assert isinstance(adapted, PeftModel)
    trained = [weight for name, weight in adapted.named_parameters() if "lora_B" in name and weight.requires_grad]
    assert len(trained) == 28
    assert all(bool((weight == 0.5).all()) for weight in trained)


def test_saving_an_adapter_does_not_stop_its_training(model_folder: Path, tmp_path: Path) -> None:
    adapted = add_lora(load_model(str(model_folder)), r=2, alpha=4, dropout=0.0)
    save_model(adapted, tmp_path)
    assert any(weight.requires_grad for weight in adapted.parameters())


def test_an_adapter_without_weights_is_refused(adapter_folder: Path) -> None:
    (adapter_folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not a usable adapter .*adapter_model.safetensors"):
        load_model(str(adapter_folder))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_missing_tensor_of_an_adapter_is_named(adapter_folder: Path) -> None:
    rewrite(adapter_folder / "adapter_model.safetensors", lambda tensors: dict(list(tensors.items())[1:]))
    with pytest.raises(CheckpointError, match=r"missing or unexpected: .*layers.0.mlp.down_proj.lora_A.weight"):
        load_model(str(adapter_folder))


def test_parts_trained_whole_come_back_in_full_precision_over_a_bfloat16_base(
    model_folder: Path, tmp_path: Path
) -> None:
    adapted = add_lora(
        load_model(str(model_folder), dtype=torch.bfloat16), r=2, alpha=4, modules_to_save=["visual_table"]
    )
    with torch.no_grad():
        for _, parameter in trained_parameters(adapted):
            parameter += 1e-6
    save_model(adapted, tmp_path)
    again = dict(trained_parameters(load_model(str(tmp_path), dtype=torch.bfloat16)))
    for name, parameter in trained_parameters(adapted):
        assert torch.equal(again.pop(name), parameter), name
    assert not again


def test_a_part_that_an_adapter_lacks_is_named(model_folder: Path, tmp_path: Path) -> None:
    save_model(add_lora(load_model(str(model_folder)), r=2, alpha=4, modules_to_save=["visual_table"]), tmp_path)
    rewrite(
        tmp_path / "adapter_model.safetensors",
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "vte" not in name},
    )
    with pytest.raises(CheckpointError, match=r"missing or unexpected: .*vte.weight"):
        load_model(str(tmp_path))


def test_an_adapter_with_the_released_codes_names_is_loaded(model_folder: Path, tmp_path: Path) -> None:
    adapted = add_lora(load_model(str(model_folder)), r=2, alpha=4, modules_to_save=["visual_table"])
    save_model(adapted, tmp_path)
    rewrite(
        tmp_path / "adapter_model.safetensors",
        lambda tensors: {
            PEFT_PREFIX + released_name(name.removeprefix(PEFT_PREFIX)): tensor for name, tensor in tensors.items()
        },
    )
    assert all(".llm." in name or ".vte." in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert_same_weights(load_model(str(tmp_path)), adapted)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ("lm_head", "sits on lm_head, where LoRA cannot go: the loss reads its weight in chunks"),
        (r".*tokenizer\.head\.0", "sits on model.visual_tokenizer.head.0, where LoRA cannot go: .*modules_to_save"),
    ],
)
def test_an_adapter_on_a_layer_that_cannot_carry_it_is_refused(
    model_folder: Path, tmp_path: Path, layers: str, reason: str
) -> None:
    base = load_model(str(model_folder))
    save_model(get_peft_model(base, LoraConfig(r=2, target_modules=f"{LLM_LINEARS}|{layers}")), tmp_path)
    with pytest.raises(CheckpointError, match=reason):
        load_model(str(tmp_path))


def test_an_unexpected_tensor_of_an_adapter_is_named(adapter_folder: Path) -> None:
    rewrite(adapter_folder / "adapter_model.safetensors", lambda tensors: tensors | {"extra": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"missing or unexpected: .*extra"):
        load_model(str(adapter_folder))


def test_a_misshaped_tensor_of_an_adapter_is_named(adapter_folder: Path) -> None:
    rewrite(
        adapter_folder / "adapter_model.safetensors",
        lambda tensors: tensors | {name: torch.zeros(3, 3) for name in list(tensors)[:1]},
    )
    with pytest.raises(CheckpointError, match=r"size mismatch for .*layers.0.mlp.down_proj.lora_A"):
        load_model(str(adapter_folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a usable adapter"),
        ("{}", "not a usable adapter .*base_model_name_or_path"),
        ('{"base_model_name_or_path": null}', "base_model_name_or_path is empty"),
    ],
)
def test_an_adapter_that_does_not_name_its_base_is_refused(adapter_folder: Path, text: str, message: str) -> None:
    (adapter_folder / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_model(str(adapter_folder))


def test_an_adapter_whose_base_is_gone_names_both_and_the_mend(adapter_folder: Path) -> None:
    file = adapter_folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}), encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        load_model(str(adapter_folder))
    message = str(caught.value)
    assert message.startswith(f"{adapter_folder}: the base of this adapter cannot be loaded (/gone/base: no such model")
    assert message.endswith(f"write its new place as base_model_name_or_path into {file}")


@pytest.mark.parametrize("kind", ["FOO", "IA3", None])
def test_an_adapter_of_another_kind_is_refused(adapter_folder: Path, kind: str | None) -> None:
    file = adapter_folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"peft_type": kind}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"peft_type is {kind!r}; only LORA adapters are supported"):
        load_model(str(adapter_folder))


def test_an_adapter_that_took_from_its_base_does_not_go_on_a_quantised_one(adapter_folder: Path) -> None:
    file = adapter_folder / "adapter_config.json"
    fields = json.loads(file.read_text(encoding="utf-8")) | {"init_lora_weights": "pissa"}
    file.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(ConfigError, match="started with pissa, .* use quantization none, or export it"):
        load_model(str(adapter_folder), quantization="nf4")


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "loftq"])
def test_an_adapter_whose_base_cannot_be_rebuilt_is_refused(adapter_folder: Path, start: str) -> None:
    file = adapter_folder / "adapter_config.json"
    fields = json.loads(file.read_text(encoding="utf-8")) | {"init_lora_weights": start}
    file.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"started with {start}, which changed the base's weights"):
        load_model(str(adapter_folder))


# -- written at once, readable by all, and known again


def test_a_folder_appears_by_one_rename_of_all_its_files(
    model: Ovis2_5ForConditionalGeneration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed: list[tuple[Path, set[str]]] = []
    rename = Path.rename

    def noted(self: Path, target: Path) -> Path:
        renamed.append((target, {path.name for path in self.iterdir()}))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", noted)
    save_model(model, tmp_path / "new")
    assert renamed == [(tmp_path / "new", {path.name for path in (tmp_path / "new").iterdir()})]


def test_weight_files_can_be_read_by_all_who_can_read_the_others(
    model: Ovis2_5ForConditionalGeneration, saved_adapter: Path, tmp_path: Path
) -> None:
    save_model(model, tmp_path / "sharded", max_shard_size="2MB")
    for folder in (tmp_path / "sharded", saved_adapter):
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_weights_have_one_fingerprint_however_they_are_cut_into_files(
    model: Ovis2_5ForConditionalGeneration, tmp_path: Path
) -> None:
    for name, size in (("whole", "5GB"), ("sharded", "2MB")):
        save_model(model, tmp_path / name, max_shard_size=size)
    assert weights_fingerprint(str(tmp_path / "whole")) == weights_fingerprint(str(tmp_path / "sharded"))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.vte.weight", "model.language_model.norm.weight"])
def test_a_tensor_that_was_trained_changes_the_fingerprint(
    name: str, model: Ovis2_5ForConditionalGeneration, tmp_path: Path
) -> None:
    save_model(model, tmp_path / "before")
    trained = copy.deepcopy(model)
    trained.get_parameter(name).data += 1e-3
    save_model(trained, tmp_path / "after")
    assert weights_fingerprint(str(tmp_path / "before")) != weights_fingerprint(str(tmp_path / "after"))


@pytest.mark.parametrize("load", [load_model, Ovis2_5ForConditionalGeneration.from_pretrained])
def test_an_adapter_is_not_put_on_a_base_that_was_changed(
    load: Callable[[str], object], model: Ovis2_5ForConditionalGeneration, tmp_path: Path
) -> None:
    save_model(model, tmp_path / "base")
    save_model(add_lora(load_model(str(tmp_path / "base")), r=2, alpha=4), tmp_path / "adapter")
    load(str(tmp_path / "adapter"))
    other = copy.deepcopy(model)
    other.get_parameter("model.vte.weight").data += 1
    save_model(other, tmp_path / "base")
    with pytest.raises(CheckpointError, match="adapter: its base .*/base has other weights than when the adapter was"):
        load(str(tmp_path / "adapter"))
    file = tmp_path / "adapter" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"looktwice": {}}))
    load(str(tmp_path / "adapter"))  # an adapter made elsewhere says nothing of its base
