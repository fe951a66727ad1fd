"""The dtype that operations compute in."""

from __future__ import annotations

import torch


def autocast_dtype(device: torch.device, own: torch.dtype) -> torch.dtype:
    """That of autocast where it is on for the device, else `own`."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else own
