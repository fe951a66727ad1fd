"""Models without memory: tensors that know their shape, dtype and device alone, through which the real code runs.

A fake tensor makes fake ones of whatever meets it, so that nothing else has to change: rows stay real tensors on the
host, as they are beside a GPU, where the code may read what decides shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from looktwice.config import Quantization
from looktwice.errors import ConfigError
from looktwice.model import logprobs, visual_tokenizer
from looktwice.model.configuration import Ovis2_5Config
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.quantization import quantization_config

CHUNKS: tuple[dict[str, int], ...] = (
    *(visual_tokenizer.CHUNK, visual_tokenizer.BLOCK, visual_tokenizer.KEPT),
    *(logprobs.CHUNK_NUMBERS, logprobs.BLOCK_NUMBERS),
)
"""Sizes by device, of what is computed in parts; a device that is not there has its own default."""


class Guesses(TorchDispatchMode):
    """Answers where code reads a fake tensor: every number is 1, every truth true, and all tensors are equal. So sums
    are finite, a merged weight is sound, and float32 weights are those that bfloat16 holds, as released ones are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked for more often than anything is computed
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return torch.ones((), dtype=args[0].dtype).item()
        if func is torch.ops.aten.equal.default and any(isinstance(each, FakeTensor) for each in args):
            return True
        return func(*args, **(kwargs or {}))


@contextmanager
def guessing() -> Iterator[None]:
    """Inside, code may read fake tensors: see `Guesses`. Their own `tolist` would ask for each number."""
    with patch.object(FakeTensor, "tolist", lambda fake: np.ones(fake.shape).tolist()), Guesses():
        yield


@contextmanager
def faking() -> Iterator[None]:
    """Inside, tensors that are made are fake, and modules can be moved."""
    with FakeTensorMode(allow_non_fake_inputs=True), guessing(), patch.object(nn.Module, "_apply", _apply):
        yield


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What `Module.to` calls; PyTorch's own cannot swap fake parameters in place."""
    for each in module.modules():
        for name, weight in list(each._parameters.items()):
            if weight is not None:
                each._parameters[name] = nn.Parameter(change(weight.data), requires_grad=weight.requires_grad)
    return module


@contextmanager
def chunks_of_a_gpu() -> Iterator[None]:
    """Inside, what is computed in chunks is so in those of a GPU: fake tensors stand on the CPU, as only a torch that
    was built for CUDA has fake ones there."""
    with ExitStack() as stack:
        for sizes in CHUNKS:
            of_a_gpu = {"cpu": sizes["cuda"]} if "cuda" in sizes else {}
            others = {name: size for name, size in sizes.items() if name != "cpu"}
            stack.enter_context(patch.dict(sizes, others | of_a_gpu, clear=True))
        yield


def fake_model(
    config: Ovis2_5Config, *, dtype: torch.dtype, quantization: Quantization = "none"
) -> Ovis2_5ForConditionalGeneration:
    """The model of a config, its weights in `dtype`; quantised as loading would do it. Inside `faking` alone.

    Raises ConfigError for a quantisation other than nf4, or without bitsandbytes.
    """
    with patch.object(Ovis2_5ForConditionalGeneration, "init_weights"):  # they have no values
        model = Ovis2_5ForConditionalGeneration._from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa"
        )
    settings = quantization_config(quantization, dtype)
    if settings is not None:
        if quantization != "nf4":
            raise ConfigError(f"quantization {quantization} cannot be planned; give nf4, or none")
        _quantise(model, settings)
    return model


def _quantise(model: Ovis2_5ForConditionalGeneration, settings: Any) -> None:
    """Put bitsandbytes' layers in place, as transformers does before it loads; what they hold is made by the same
    function. Their own kind of parameter cannot be fake, so a plain one carries its marks."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or name.startswith(tuple(settings.llm_int8_skip_modules)):
            continue
        packed, state = quantize_4bit(linear.weight.data, compress_statistics=True, quant_type="nf4")
        layer: Any = Linear4bit.__new__(Linear4bit)
        layer.__dict__.update(vars(linear))
        layer._parameters = {"weight": nn.Parameter(packed, requires_grad=False), "bias": None}
        layer.compute_dtype, layer.compute_type_is_set = settings.bnb_4bit_compute_dtype, True
        layer.quant_state, layer.quant_storage = state, packed.dtype
        layer.support_avx512bf16_for_cpu = False
        for mark, value in (("quant_state", state), ("compress_statistics", True), ("quant_type", "nf4")):
            setattr(layer.weight, mark, value)
        layer.weight.bnb_quantized, layer.weight.quant_storage = True, packed.dtype
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    model.config.quantization_config = settings
