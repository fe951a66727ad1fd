"""Where the values of a tensor are: whole in this process, or in shares over several (a DTensor)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All values of a tensor. Of one in shares every process must ask, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def exchange(parameter: nn.Parameter, other: Tensor) -> Tensor:
    """Give a parameter the values of another tensor placed alike, and give back its own. Of one in shares values are
    copied, since FSDP reads the memory that it once gave out."""
    if not isinstance(parameter.data, DTensor):
        own, parameter.data = parameter.data, other
        return own
    assert isinstance(other, DTensor)
    live, values = parameter.data.to_local(), other.to_local()
    own_values = live.clone()
    live.copy_(values)
    values.copy_(own_values)
    return other


def placed_as(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, which every process has, as `other` of the same shape is placed; nothing is sent."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
