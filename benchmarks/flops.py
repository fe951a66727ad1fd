"""Arithmetic that a call really does, by torch's counter and what that leaves out on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def counted_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention of a call, backward included."""
    with FlopCounterMode(display=False, custom_mapping=NOT_COUNTED_BY_TORCH) as counter:
        call()
    return counter.get_total_flops()


def attention_flops(query: Any, key: Any, *given: Any, out_shape: Any = None, **more: Any) -> int:
    """Two products; torch counts those of a GPU's kernels alone."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * width


def attention_backward_flops(_: Any, query: Any, key: Any, *given: Any, **more: Any) -> int:
    """Five products: the scores once more, and four gradients."""
    return attention_flops(query, key) * 5 // 2


def added_product_flops(_: Any, left: Any, right: Any, *given: Any, out_shape: Any = None, **more: Any) -> int:
    """A product added to what is there; torch counts only those that write a new matrix."""
    return 2 * left[0] * left[1] * right[1]


NOT_COUNTED_BY_TORCH = {
    torch.ops.aten.addmm_: added_product_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}
