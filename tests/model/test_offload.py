"""Activations on the host: the same gradients, and weights are not moved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from looktwice.model import offload
from looktwice.model.offload import activations_on_host


def test_gradients_are_the_same_and_only_large_activations_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 50)
    copied: list[torch.Size] = []
    plain = torch.empty_like

    def empty_like(tensor: torch.Tensor, **options: object) -> torch.Tensor:
        copied.append(tensor.shape)
        return plain(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    model, x = nn.Sequential(nn.Linear(10, 20), nn.SiLU(), nn.Linear(20, 10), nn.SiLU()), torch.randn(4, 10)
    with activations_on_host(model):
        total = model(x).sum()
    found = torch.autograd.grad(total, list(model.parameters()))
    assert copied and set(copied) == {torch.Size([4, 20])}
    wanted = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted))
