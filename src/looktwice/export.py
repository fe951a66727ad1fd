"""A trained model as a folder in the released layout: adapters merged, and everything read back and compared."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from looktwice.config import ExportConfig
from looktwice.errors import CheckpointError, ConfigError
from looktwice.geometry import PixelPolicy
from looktwice.messages import Conversation, user
from looktwice.model.adapters import base_of, merge
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.weights import load_model, locate, pick_device, released_state, save_model
from looktwice.processing.images import resize
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example, Ovis2_5Processor

QUESTION = "What is in the picture?"
MERGE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of logits before and after merging, as a share of the largest logit. Merging rounds each weight
once more in its dtype."""

NUM_COMPARED = 16
ANSWER_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}
"""Nats by which another runtime's logprobs may differ; in half precision single tokens differ by tenths."""
VLLM_ANSWER = Path(__file__).parent / "serving" / "vllm_answer.py"
VLLM_PIXELS = PixelPolicy(image_min_pixels=448**2, image_max_pixels=1792**2)
"""vLLM's own bounds, which a request cannot change."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written. `logit_difference` is relative to the largest logit, `vllm_difference` is of logprobs in nats;
    None when nothing was compared."""

    folder: Path
    merged_adapter: bool
    num_tensors: int
    num_parameters: int
    dtype: torch.dtype
    num_files: int
    logit_difference: float | None = None
    vllm_difference: float | None = None


def export_model(model_path: str, folder: Path, config: ExportConfig) -> Exported:
    """Write a model folder or adapter as one whole model under the released names, with its processor.

    `folder` appears only when all checks passed. Raises ConfigError when it cannot be written, CheckpointError when
    what is read back is not what was to be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: there is something already; give a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error})") from error
    with scratch:
        draft = Path(scratch.name) / folder.name
        exported = _write(model_path, draft, config)
        if config.verify_with == "vllm":
            exported = replace(exported, vllm_difference=compare_with_vllm(draft, config, exported.dtype))
        draft.replace(folder)
    return replace(exported, folder=folder)


def _write(model_path: str, folder: Path, config: ExportConfig) -> Exported:
    processor = Ovis2_5Processor.from_pretrained(locate(model_path))
    device = pick_device(config.device)
    loaded = load_model(
        model_path, dtype="auto" if config.dtype == "same" else getattr(torch, config.dtype), device=device
    )
    is_adapter = isinstance(loaded, PeftModel)
    probe = fixed_prompt(processor)
    logits_before = None
    if config.verify:
        base = base_of(loaded)
        # adapters are float32 over a base that may not be
        is_mixed = is_adapter and base.dtype != torch.float32
        with torch.autocast(base.device.type, base.dtype, enabled=is_mixed):
            logits_before = probe_logits(base, probe)
        del base
    model = merge(loaded)
    del loaded
    save_model(model, folder, max_shard_size=config.max_shard_size)
    processor.save_pretrained(folder)
    state = released_state(model)
    exported = Exported(
        folder=folder,
        merged_adapter=is_adapter,
        num_tensors=len(state),
        num_parameters=sum(tensor.numel() for tensor in state.values()),
        dtype=model.dtype,
        num_files=len(weight_files(folder)),
    )
    if logits_before is None:
        return exported
    compare_tensors(folder, state)
    tolerance = MERGE_TOLERANCE[model.dtype] if is_adapter else 0.0
    del model, state  # two models of 9B do not fit where one does
    difference = compare_logits(folder, probe, logits_before, device=device, tolerance=tolerance)
    return replace(exported, logit_difference=difference)


def describe(exported: Exported) -> str:
    """What was written and checked, for people."""
    written = (
        f"{exported.folder}: {'adapter merged, ' if exported.merged_adapter else ''}{exported.num_tensors} tensors, "
        f"{exported.num_parameters:,} parameters, {str(exported.dtype).removeprefix('torch.')}, "
        f"{exported.num_files} weight file{'s' if exported.num_files > 1 else ''}"
    )
    lines = [written]
    if exported.logit_difference is None:
        lines.append("not verified")
    else:
        what = "with the adapter apart" if exported.merged_adapter else "of the model it came from"
        lines.append(
            "verified: read back, every tensor is equal; logits on a fixed picture differ by "
            f"{exported.logit_difference:.1e} of the largest from those {what}"
        )
    if exported.vllm_difference is not None:
        lines.append(f"vLLM gives the same greedy answer; its logprobs differ by {exported.vllm_difference:.1e} nats")
    return "\n".join(lines)


def fixed_picture() -> Image.Image:
    """A picture that is the same everywhere."""
    rows, columns = np.indices((240, 320))
    pixels = np.stack([rows % 256, columns % 256, (rows * columns) // 64 % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def fixed_prompt(processor: Ovis2_5Processor) -> Example:
    return processor.encode(Conversation(messages=(user(QUESTION, fixed_picture()),)), purpose="prompt")


@torch.no_grad()
def probe_logits(model: Ovis2_5ForConditionalGeneration, probe: Example) -> Tensor:
    """Logits of the prompt [T, V], float32, on the CPU."""
    inputs = pack([probe]).model_inputs(model.device)
    del inputs["loss_mask"]
    logits = model.eval()(**inputs).logits
    return logits[0].float().cpu()


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def compare_tensors(folder: Path, state: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless the files of a folder hold exactly these tensors."""
    missing = set(state)
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                if name not in state:
                    raise CheckpointError(f"{path.name}: {name} was written and is no weight of the model")
                written, wanted = file.get_tensor(name), state[name].cpu()
                if written.dtype != wanted.dtype or not torch.equal(written, wanted):
                    raise CheckpointError(f"{path.name}: {name} is not what was written; check the disk")
                missing.discard(name)
    if missing:
        raise CheckpointError(f"{folder.name}: {sorted(missing)[0]} was not written")


def compare_logits(folder: Path, probe: Example, before: Tensor, *, device: str, tolerance: float) -> float:
    """Load the folder, ask it the fixed question, and give the largest difference of logits over the largest logit.

    Raises CheckpointError when it exceeds `tolerance`, or when the saved processor writes another prompt.
    """
    again = fixed_prompt(Ovis2_5Processor.from_pretrained(folder))
    is_same_picture = torch.equal(again.images[0].pixel_values, probe.images[0].pixel_values)
    if again.input_ids != probe.input_ids or not is_same_picture:
        raise CheckpointError(f"{folder.name}: the saved processor writes another prompt than the one it came from")
    after = probe_logits(base_of(load_model(str(folder), dtype="auto", device=device)), probe)
    difference = float((after - before).abs().max() / before.abs().max())
    if not difference <= tolerance:
        raise CheckpointError(
            f"{folder.name}: its logits differ by {difference:.1e} of the largest from those before, allowed is "
            f"{tolerance:.0e}; export with --dtype float32, or train further in this dtype"
        )
    return difference


def compare_with_vllm(folder: Path, config: ExportConfig, dtype: torch.dtype) -> float:
    """Let vLLM answer the fixed question greedily; the largest difference of its logprobs from ours, in nats.

    Raises ConfigError when vLLM is not there or cannot know this model's ids, CheckpointError when it fails or
    answers otherwise.
    """
    python = str(config.vllm_python or sys.executable)
    if _runs([python, "-c", "import vllm"]).returncode != 0:
        raise ConfigError(
            f"{python} has no vLLM; install vllm there, or name the python of an environment that has it: --vllm_python"
        )
    processor = Ovis2_5Processor.from_pretrained(folder)
    if processor.config.visual_token_ids != Ovis2_5Config().visual_token_ids:
        raise ConfigError("vLLM knows the released vocabulary alone, and this model has other ids for pictures")
    processor.policy = VLLM_PIXELS
    prompt = fixed_prompt(processor)
    with tempfile.TemporaryDirectory() as scratch:
        request, answer, shown = (Path(scratch) / name for name in ("request.json", "answer.json", "picture.png"))
        resize(fixed_picture(), prompt.images[0].size).save(shown)
        fields = {
            "input_ids": with_placeholder(prompt.input_ids, processor.config),
            "pictures": [str(shown)],
            "max_new_tokens": NUM_COMPARED,
            "stop_ids": processor.end_ids,
            "dtype": str(dtype).removeprefix("torch."),
        }
        request.write_text(json.dumps(fields), encoding="utf-8")
        done = _runs([python, str(VLLM_ANSWER), str(folder), str(request), str(answer)])
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
        raise ConfigError(f"{command[0]} has no vLLM ({error.strerror}); name another python: --vllm_python") from error
