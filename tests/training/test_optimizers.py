"""AdamW in its kinds."""

from __future__ import annotations

import sys

import pytest
import torch

from looktwice.errors import ConfigError
from looktwice.training.optimizers import BITSANDBYTES, make_optimizer


def stepped(name: str) -> torch.Tensor:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 64 * 128).view(64, 128))
    groups = [{"params": [weight], "weight_decay": 0.1, "peak_lr": 0.01, "part": "llm"}]
    optimizer = make_optimizer(name, groups, 0.01)  # type: ignore[arg-type]
    assert {"peak_lr", "part"} < set(optimizer.param_groups[0])
    for number in range(3):
        weight.grad = torch.full_like(weight, 0.1 * (number - 0.5))
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("name", ["adamw_torch", *BITSANDBYTES])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_each_kind_steps_as_the_fused_one(name: str) -> None:
    if name in BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    torch.testing.assert_close(stepped(name), stepped("adamw_torch_fused"), atol=2e-3, rtol=0)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"optim paged_adamw_8bit needs bitsandbytes; pip install"):
        stepped("paged_adamw_8bit")
