"""What the deterministic mode switches, and that it switches back."""

from __future__ import annotations

import os

import torch

from looktwice.training.determinism import deterministic


def settings() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    on = torch.are_deterministic_algorithms_enabled()
    return on, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.get_float32_matmul_precision()


def test_the_mode_holds_inside_its_block_and_nowhere_else(monkeypatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = settings()
    with deterministic(False):
        assert settings() == before
    with deterministic(True):
        assert settings() == (True, False, True, False, "highest")
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert settings() == before
