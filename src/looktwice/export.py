"""A trained model as a folder in the released layout: adapters merged, and everything read back and compared."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from peft.tuners import lora
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from looktwice.config import ExportConfig
from looktwice.errors import CheckpointError, ConfigError
from looktwice.geometry import PixelPolicy
from looktwice.messages import Conversation, user
from looktwice.model.adapters import adapted_layers, base_of, merge
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.location import locate
from looktwice.model.modeling import RELEASED_PREFIXES, Ovis2_5ForConditionalGeneration
from looktwice.model.weights import load_model, pick_device, released_state, write_model
from looktwice.paths import check_new_folder
from looktwice.processing.images import resize
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example, Ovis2_5Processor

QUESTION = "What is in the picture?"
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Difference of logits, as a share of the largest one, that a dtype may cause by rounding alone. That may be more than
an adapter does, so whether the adapter is in the weights is told by the weights."""
STARTS_IN_BASE = ("pissa", "olora")
"""Starts of LoRA that move part of the base into the adapter: without it such a model is no policy to compare with."""

NUM_COMPARED = 16
ANSWER_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}
"""Nats by which another runtime's logprobs may differ; in half precision single tokens differ by tenths."""
VLLM_ANSWER = Path(__file__).parent / "serving" / "vllm_answer.py"
VLLM_PIXELS = PixelPolicy(image_min_pixels=448**2, image_max_pixels=1792**2)
"""vLLM's own bounds, which a request cannot change."""
VLLM_MEND = (
    "install vllm there, or name the python of an environment that has it: --vllm_python PYTHON. To compare later, "
    "export without --verify_with now, and then: looktwice export FOLDER COPY --verify_with vllm --vllm_python PYTHON"
)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written. `logit_difference` from the model it came from and `adapter_effect`, the adapter's own change,
    are relative to the largest logit; `vllm_difference` is of logprobs in nats. None when nothing was compared."""

    folder: Path
    merged_adapter: bool
    num_tensors: int
    num_parameters: int
    source_dtype: torch.dtype
    dtype: torch.dtype
    num_files: int
    logit_difference: float | None = None
    adapter_effect: float | None = None
    vllm_difference: float | None = None


def export_model(model_path: str, folder: Path, config: ExportConfig) -> Exported:
    """Write a model folder or adapter as one whole model under the released names, with its processor.

    `folder` is filled only when all checks passed. Raises ConfigError when it cannot be written or vLLM cannot be
    asked, CheckpointError when writing fails or what is read back is not what was to be written.
    """
    target = Path(os.path.abspath(folder))
    check_new_folder(folder)
    if config.verify_with == "vllm":
        check_vllm(model_path, config)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # a folder that is there may be a disk of its own, or where the shell stands: it is filled, not replaced
        scratch = tempfile.TemporaryDirectory(dir=target if target.is_dir() else target.parent, prefix=".export-")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error})") from error
    with scratch:
        draft = Path(scratch.name) / target.name
        exported = _write(model_path, draft, config)
        if config.verify_with == "vllm":
            exported = replace(exported, vllm_difference=compare_with_vllm(draft, config, exported.dtype))
        if target in draft.parents:
            for path in draft.iterdir():
                path.rename(target / path.name)
        else:
            check_new_folder(folder)  # another export may have been faster
            draft.rename(target)
    return replace(exported, folder=folder)


def _write(model_path: str, folder: Path, config: ExportConfig) -> Exported:
    processor = Ovis2_5Processor.from_pretrained(locate(model_path))
    device = pick_device(config.device)
    source = load_model(model_path, dtype="auto", device=device)
    source_dtype = base_of(source).dtype
    dtype = source_dtype if config.dtype == "same" else getattr(torch, config.dtype)
    before = source_logits(source, fixed_prompt(processor)) if config.verify else None
    is_adapter = isinstance(source, PeftModel)
    if (widest := torch.promote_types(source_dtype, dtype)) != source_dtype:
        source.to(widest)  # merged there, the weights round once
    model = merge(source)
    nn.Module.to(model, dtype)
    del source
    try:
        folder.mkdir()
        write_model(model, folder, max_shard_size=config.max_shard_size)
        processor.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder.name}: cannot be written ({error}); make room on the disk, or give another folder"
        ) from error
    state = released_state(model)
    exported = Exported(
        folder=folder,
        merged_adapter=is_adapter,
        num_tensors=len(state),
        num_parameters=sum(tensor.numel() for tensor in state.values()),
        source_dtype=source_dtype,
        dtype=dtype,
        num_files=len(weight_files(folder)),
    )
    del model, state  # two models of 9B do not fit where one does
    return exported if before is None else _verify(exported, model_path, before, device)


def _verify(exported: Exported, model_path: str, before: SourceLogits, device: str) -> Exported:
    """Compare what was written with the model it came from, read anew: tensor by tensor, then by its logits."""
    compare_tensors(exported.folder, load_model(model_path, dtype="auto", device=device), exported.dtype)
    difference = compare_logits(exported, before, device)
    return replace(exported, logit_difference=difference, adapter_effect=before.adapter_effect)


def describe(exported: Exported) -> str:
    """What was written and checked, for people."""
    source_dtype, dtype = (str(each).removeprefix("torch.") for each in (exported.source_dtype, exported.dtype))
    written = (
        f"{exported.folder}: {'adapter merged, ' if exported.merged_adapter else ''}{exported.num_tensors} tensors, "
        f"{exported.num_parameters:,} parameters, {dtype}, "
        f"{exported.num_files} weight file{'s' if exported.num_files > 1 else ''}"
    )
    lines = [written]
    if exported.logit_difference is None:
        lines.append("not verified")
    else:
        merged = ", with the adapter in it" if exported.merged_adapter else ""
        converted = f", converted from {source_dtype} to {dtype}" if source_dtype != dtype else ""
        lines.append(
            f"verified: read back, every tensor is equal{merged}{converted}; logits on a fixed picture differ by "
            f"{exported.logit_difference:.1e} of the largest from those of the model it came from"
        )
    if exported.adapter_effect is not None:
        lines[-1] += f"; the adapter changes them by {exported.adapter_effect:.1e}"
    if exported.vllm_difference is not None:
        lines.append(f"vLLM gives the same greedy answer; its logprobs differ by {exported.vllm_difference:.1e} nats")
    return "\n".join(lines)


def fixed_image() -> Image.Image:
    """A picture that is the same everywhere."""
    rows, columns = np.indices((240, 320))
    pixels = np.stack([rows % 256, columns % 256, (rows * columns) // 64 % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def fixed_prompt(processor: Ovis2_5Processor) -> Example:
    return processor.encode(Conversation(messages=(user(QUESTION, fixed_image()),)), purpose="prompt")


@torch.no_grad()
def probe_logits(model: Ovis2_5ForConditionalGeneration, probe: Example) -> Tensor:
    """Logits of the prompt [T, V], float32, on the CPU."""
    inputs = pack([probe]).model_inputs(model.device)
    del inputs["loss_mask"]
    logits = model.eval()(**inputs).logits
    return logits[0].float().cpu()


class SourceLogits(NamedTuple):
    """Logits [T, V] of `probe` by the model as it is stored, and how much of them, relative to the largest, is its
    adapter's doing; None without an adapter, or where the model without it is no policy."""

    probe: Example
    logits: Tensor
    adapter_effect: float | None


def source_logits(source: nn.Module, probe: Example) -> SourceLogits:
    """Raises CheckpointError for an adapter whose merged weights cannot be verified."""
    base = base_of(source)
    if not isinstance(source, PeftModel):
        return SourceLogits(probe, probe_logits(base, probe), None)
    layers_under_lora(source)  # one that cannot be verified is refused now
    # adapters are float32 over a base that may not be
    with torch.autocast(base.device.type, base.dtype, enabled=base.dtype != torch.float32):
        logits = probe_logits(base, probe)
        settings: Any = source.peft_config[source.active_adapter]
        if str(settings.init_lora_weights).startswith(STARTS_IN_BASE):
            return SourceLogits(probe, logits, None)
        with source.disable_adapter():
            return SourceLogits(probe, logits, relative_difference(probe_logits(base, probe), logits))


def relative_difference(after: Tensor, before: Tensor) -> float:
    """The largest difference as a share of the largest value before."""
    return float((after - before).abs().max() / before.abs().max())


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def compare_tensors(folder: Path, source: nn.Module, dtype: torch.dtype) -> None:
    """Raise CheckpointError unless the files of a folder hold exactly the tensors of `source`, cast to `dtype`; where
    it has an adapter, the weight and its change within the rounding of `dtype`."""
    adapted = layers_under_lora(source)
    wanted = whole_tensors(source)
    missing = set(wanted)
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                where = f"{path.name}: {name}"
                if name not in wanted:
                    raise CheckpointError(f"{where} was written and is no weight of the model")
                written, tensor = file.get_tensor(name), wanted[name].cpu()
                if not tensor.isfinite().all():
                    raise CheckpointError(
                        f"{where} holds numbers that are not finite; the model it came from is broken"
                    )
                if not written.isfinite().all():
                    raise CheckpointError(f"{where} has numbers too large for {dtype}; export with --dtype bfloat16")
                if name in adapted and written.dtype == dtype:
                    check_merged(where, written, adapted[name])
                elif written.dtype != dtype or not torch.equal(written, tensor.to(dtype)):
                    raise CheckpointError(f"{where} is not what was to be written; check the disk")
                missing.discard(name)
    if missing:
        raise CheckpointError(f"{folder.name}: {sorted(missing)[0]} was not written")


def whole_tensors(source: nn.Module) -> dict[str, Tensor]:
    """The weights by released name, those of whole parts as trained and those under LoRA as they were without it."""
    return {
        re.sub(r"\.base_layer|\.modules_to_save\.\w+", "", name): tensor
        for name, tensor in released_state(base_of(source)).items()
        if not re.search(r"\.lora_|\.original_module\.", name)
    }


def layers_under_lora(source: nn.Module) -> dict[str, lora.Linear]:
    """The layers that carry LoRA, by the released names of their weights.

    Raises CheckpointError for an adapter other than LoRA, rsLoRA and DoRA on linear layers.
    """
    layers = {}
    for name in adapted_layers(source):
        layer = base_of(source).get_submodule(name)
        if not isinstance(layer, lora.Linear) or is_other_variant(layer):
            raise CheckpointError(
                f"{name}: this kind of adapter cannot be verified, only LoRA, rsLoRA and DoRA; export with --no-verify"
            )
        released, ours = next(pair for pair in RELEASED_PREFIXES.items() if name.startswith(pair[1]))
        layers[f"{released}{name.removeprefix(ours)}.weight"] = layer
    return layers


def is_other_variant(layer: lora.Linear) -> bool:
    (adapter,) = layer.active_adapters
    return layer.lora_bias[adapter] or (adapter in layer.lora_variant and adapter not in layer.lora_magnitude_vector)


def check_merged(where: str, written: Tensor, layer: lora.Linear) -> None:
    """Raise CheckpointError unless `written` is the layer's weight with its adapter, up to rounding."""
    linear: Any = layer.get_base_layer()
    wanted = merged_weight(layer)
    change = wanted - linear.weight.detach().float()
    limits = torch.finfo(written.dtype)
    # change and sum each round once, at half an eps; the floors are of float32 products and of numbers near zero
    room = max(limits.eps, 1e-6) * (wanted.abs() + change.abs())
    room += 1e-5 * change.abs().max() + limits.smallest_normal * limits.eps
    off = (written.to(wanted.device).float() - wanted).abs()
    if not (off <= room).all():
        raise CheckpointError(
            f"{where} is not the weight with its adapter merged, off by up to {float(off.max()):.1e} where the adapter "
            f"changes it by up to {float(change.abs().max()):.1e}; try another release of peft"
        )


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """The weight [out, in] that a LoRA layer stands for, float32: W + s B A; with DoRA its rows at their magnitudes.

    Source: arXiv 2106.09685 (LoRA), 2402.09353 (DoRA, eq. 5).
    """
    (adapter,) = layer.active_adapters
    change = layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()
    weight = layer.get_base_layer().weight.float() + layer.scaling[adapter] * change
    if adapter not in layer.lora_magnitude_vector:
        return weight
    return layer.lora_magnitude_vector[adapter].weight.float()[:, None] * weight / weight.norm(dim=1, keepdim=True)


def compare_logits(exported: Exported, before: SourceLogits, device: str) -> float:
    """Load the folder, ask it the fixed question, and give the largest difference of logits over the largest logit.

    Raises CheckpointError when that is more than rounding explains, or when the saved processor writes another prompt.
    """
    folder = exported.folder
    again = fixed_prompt(Ovis2_5Processor.from_pretrained(folder))
    is_same_image = torch.equal(again.images[0].pixel_values, before.probe.images[0].pixel_values)
    if again.input_ids != before.probe.input_ids or not is_same_image:
        raise CheckpointError(f"{folder.name}: the saved processor writes another prompt than the one it came from")
    after = probe_logits(base_of(load_model(str(folder), dtype="auto", device=device)), before.probe)
    difference = relative_difference(after, before.logits)
    if not difference <= (allowed := allowed_difference(exported)):
        mend = "export with --dtype float32" if allowed and exported.dtype != torch.float32 else "try --device cpu"
        raise CheckpointError(
            f"{folder.name}: its logits differ by {difference:.1e} of the largest from those before, allowed is "
            f"{allowed:.0e}; {mend}"
        )
    return difference


def allowed_difference(exported: Exported) -> float:
    """Nothing for a copy, else rounding."""
    if not exported.merged_adapter and exported.source_dtype == exported.dtype:
        return 0.0
    return max(ROUNDING[exported.source_dtype], ROUNDING[exported.dtype])


def check_vllm(model_path: str, config: ExportConfig) -> None:
    """Raise ConfigError when vLLM is not there or cannot know this model's ids."""
    python = vllm_python(config)
    if _runs([python, "-c", "import vllm"]).returncode != 0:
        raise ConfigError(f"{python} has no vLLM; {VLLM_MEND}")
    if Ovis2_5Config.from_pretrained(locate(model_path)).visual_token_ids != Ovis2_5Config().visual_token_ids:
        raise ConfigError(
            "vLLM knows the released vocabulary alone, and this model has other ids for pictures; "
            "leave out --verify_with"
        )


def vllm_python(config: ExportConfig) -> str:
    return str(config.vllm_python or sys.executable)


def compare_with_vllm(folder: Path, config: ExportConfig, dtype: torch.dtype) -> float:
    """Let vLLM answer the fixed question greedily; the largest difference of its logprobs from ours, in nats.

    Raises CheckpointError when it fails or answers otherwise.
    """
    processor = Ovis2_5Processor.from_pretrained(folder)
    processor.policy = VLLM_PIXELS
    prompt = fixed_prompt(processor)
    with tempfile.TemporaryDirectory() as scratch:
        request, answer, shown = (Path(scratch) / name for name in ("request.json", "answer.json", "picture.png"))
        resize(fixed_image(), prompt.images[0].size).save(shown)
        fields = {
            "input_ids": with_placeholder(prompt.input_ids, processor.config),
            "pictures": [str(shown)],
            "max_new_tokens": NUM_COMPARED,
            "stop_ids": processor.end_ids,
            "dtype": str(dtype).removeprefix("torch."),
        }
        request.write_text(json.dumps(fields), encoding="utf-8")
        done = _runs([vllm_python(config), str(VLLM_ANSWER), str(folder), str(request), str(answer)])
        if done.returncode != 0:
            raise CheckpointError(f"vLLM cannot answer from this model: {done.stderr.strip()[-800:]}")
        theirs = json.loads(answer.read_text(encoding="utf-8"))
    model = base_of(load_model(str(folder), dtype=dtype, device=pick_device(config.device)))
    return compare_answers(model, prompt, theirs["ids"], theirs["logprobs"])


def compare_answers(
    model: Ovis2_5ForConditionalGeneration, prompt: Example, ids: Sequence[int], logprobs: Sequence[float]
) -> float:
    """The largest difference in nats between the logprobs of another runtime's greedy answer and ours of it.

    Raises CheckpointError above the tolerance, or when an id is not our best one up to the tolerance.
    """
    sequence = prompt.copy()
    sequence.append(list(ids), is_trained=True)
    ours = probe_logits(model, sequence)[len(prompt) - 1 : -1].log_softmax(-1)
    chosen = ours.gather(1, torch.tensor(ids)[:, None])[:, 0]
    tolerance = ANSWER_TOLERANCE[model.dtype]
    difference = float((chosen - torch.tensor(logprobs)).abs().max())
    behind = float((ours.amax(-1) - chosen).max())
    if not max(difference, behind) <= tolerance:
        raise CheckpointError(
            f"the greedy answers differ: logprobs by up to {difference:.2g} nats, and its ids are up to {behind:.2g} "
            f"nats behind our best; allowed is {tolerance:g}"
        )
    return difference


def with_placeholder(ids: Sequence[int], config: Ovis2_5Config) -> list[int]:
    """The prompt as vLLM takes it: one <image> id where a picture's ids stand."""
    place = ids.index(config.image_start_token_id)
    words = [i for i in ids if i not in config.visual_token_ids]
    return [*words[:place], config.image_placeholder_id, *words[place:]]


def _runs(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(f"{command[0]} has no vLLM ({error.strerror}); {VLLM_MEND}") from error
