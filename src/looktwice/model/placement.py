"""Where the values of a tensor are: whole in this process, or in shares over several (a DTensor)."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All values of a tensor. Of one in shares every process must ask, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_as(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, which every process has, as `other` of the same shape is placed; nothing is sent."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
