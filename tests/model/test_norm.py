"""Our RMSNorm against transformers' own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.norm import RMSNorm, take_over_norms


def outcome(norm: Qwen3RMSNorm, hidden: Tensor) -> list[Tensor | None]:
    """Result, and gradients of input and weight where they are asked for."""
    hidden = hidden.detach().requires_grad_(hidden.requires_grad)
    norm.weight.grad = None
    out = norm(hidden)
    out.backward(torch.linspace(-1, 2, out.numel()).view_as(out).to(out.dtype))
    return [out, hidden.grad, norm.weight.grad]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("hidden_trains", "weight_trains"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 4, 16)])
def test_norm_and_gradients_are_those_of_transformers(
    shape: tuple[int, ...], hidden_trains: bool, weight_trains: bool, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    plain, ours = Qwen3RMSNorm(16, eps=1e-6).to(dtype), RMSNorm(16, eps=1e-6).to(dtype)
    for norm in (plain, ours):
        norm.weight.data.copy_(torch.linspace(0.5, 2, 16))
        norm.weight.requires_grad_(weight_trains)
    hidden = (3 * torch.randn(shape)).to(dtype).requires_grad_(hidden_trains)
    for found, wanted in zip(outcome(ours, hidden), outcome(plain, hidden), strict=True):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            size = float(wanted.detach().abs().max())
            torch.testing.assert_close(found, wanted, atol=tolerance * size, rtol=tolerance)


def test_every_norm_of_a_language_model_is_ours(model: Ovis2_5ForConditionalGeneration) -> None:
    norms = [module for module in model.model.language_model.modules() if isinstance(module, Qwen3RMSNorm)]
    assert len(norms) == 4 * model.config.llm_config.num_hidden_layers + 1
    assert {type(norm) for norm in norms} == {RMSNorm}


def test_a_norm_is_taken_over_with_its_weight_and_once() -> None:
    layers = torch.nn.Sequential(Qwen3RMSNorm(4), torch.nn.Linear(4, 4))
    weight = layers[0].weight
    take_over_norms(layers)
    take_over_norms(layers)
    assert type(layers[0]) is RMSNorm and layers[0].weight is weight


def test_a_second_gradient_is_refused_and_not_wrong() -> None:
    hidden = torch.randn(3, 16, requires_grad=True)
    [gradient] = torch.autograd.grad(RMSNorm(16)(hidden).square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
