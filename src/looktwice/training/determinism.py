"""The same bits in each run of a computation, on one machine with one set of versions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
FIXED_WORKSPACE = ":4096:8"
"""Source: torch's notes on reproducibility; read by cuBLAS when it is first used."""


@contextmanager
def deterministic(is_on: bool) -> Iterator[None]:
    """Every operation of torch gives the same bits in each run, or raises that it cannot; without TF32.

    Has no effect when it is off. What was set before holds again afterwards, but for the workspace of cuBLAS.
    """
    if not is_on:
        yield
        return
    os.environ.setdefault(CUBLAS, FIXED_WORKSPACE)
    was_on, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    precision = torch.get_float32_matmul_precision()
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was_on, warn_only=warned)
            torch.set_float32_matmul_precision(precision)
