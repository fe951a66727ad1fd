"""AdamW in its kinds, by the names that transformers has for them."""

from __future__ import annotations

from typing import Any

import torch

from looktwice.config import Optimizer
from looktwice.errors import ConfigError

BITSANDBYTES: dict[Optimizer, str] = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
}
"""Classes of bitsandbytes: moments in 8 bits (arXiv 2110.02861), or in host memory until they are needed (paged)."""


def make_optimizer(name: Optimizer, groups: list[dict[str, Any]], learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer of a setting over parameter groups. Raises ConfigError where bitsandbytes is needed and missing."""
    if name not in BITSANDBYTES:
        return torch.optim.AdamW(groups, lr=learning_rate, fused=name == "adamw_torch_fused")
    try:
        from bitsandbytes import optim  # an extra
    except ImportError as error:
        raise ConfigError(f"optim {name} needs bitsandbytes; pip install 'looktwice[quant]'") from error
    return getattr(optim, BITSANDBYTES[name])(groups, lr=learning_rate)
