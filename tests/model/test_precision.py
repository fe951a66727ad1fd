"""The dtype of autocast, where it is on."""

from __future__ import annotations

import torch

from looktwice.model.precision import autocast_dtype


def test_autocast_decides_where_it_is_on() -> None:
    cpu = torch.device("cpu")
    assert autocast_dtype(cpu, torch.float32) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype(cpu, torch.float32) == torch.bfloat16
