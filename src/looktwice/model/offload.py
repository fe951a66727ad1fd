"""Activations in host memory between forward and backward, for rows that would not fit otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SMALLEST = 2**16
"""Numbers of a tensor below which moving it costs more than it spares."""

Packed = Tensor | tuple[torch.device, Tensor]


@contextmanager
def activations_on_host(model: nn.Module) -> Iterator[None]:
    """Inside, what autograd keeps for backward goes to host memory, pinned beside a GPU; weights stay where they are.

    With all layers recomputed that is one input a layer. Not yet run on a GPU.
    """
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def to_host(tensor: Tensor) -> Packed:
        if tensor.numel() < SMALLEST or tensor.untyped_storage().data_ptr() in weights:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=tensor.is_cuda)

    def back(packed: Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(to_host, back):
        yield
