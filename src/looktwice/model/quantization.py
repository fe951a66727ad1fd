"""Weights of the language model in 4 or 8 bits (QLoRA, arXiv 2305.14314), through bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from looktwice.config import Quantization
from looktwice.errors import ConfigError

UNQUANTISED = ["model.visual_tokenizer", "model.vte", "lm_head"]
"""By full path, or they would not be found. The softmax over visual words and its table lose too much in few bits."""


def quantization_config(kind: Quantization, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How transformers quantises while it loads, None for not at all.

    Raises ConfigError when bitsandbytes is not installed.
    """
    if kind == "none":
        return None
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantization {kind} needs bitsandbytes; pip install 'looktwice[quant]'")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=UNQUANTISED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=UNQUANTISED,
    )


def quantization_of(model: PreTrainedModel) -> Quantization:
    """How a loaded model is quantised."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return "none"
    return "nf4" if config.load_in_4bit else "int8"
