"""Logprobs in chunks, and their gradients, against a plain log-softmax over all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from looktwice.model import logprobs as logprobs_module
from looktwice.model.logprobs import chunked_logprobs, logprob_sum

WORDS = 50


@pytest.fixture(autouse=True)
def chunks_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs_module, "LOGPROB_CHUNK", 3)


def inputs(num_rows: int, *, is_trained: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, 8, generator=generator, requires_grad=True)
    weight = torch.randn(WORDS, 8, generator=generator).requires_grad_(is_trained)
    return hidden, weight, torch.randint(0, WORDS, (num_rows,), generator=generator)


def plainly(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    every = torch.log_softmax((hidden @ weight.T).float() / temperature, -1)
    return every[torch.arange(len(targets)), targets], -(every.exp() * every).sum(-1).detach()


@pytest.mark.parametrize("num_rows", [0, 2, 7])
@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_gradients_are_those_of_a_plain_log_softmax(num_rows, is_trained, temperature):
    hidden, weight, targets = inputs(num_rows, is_trained=is_trained)
    trained = [hidden, weight] if is_trained else [hidden]
    wanted, wanted_entropy = plainly(hidden, weight, targets, temperature)
    logprobs, entropy = chunked_logprobs(hidden, weight, targets, temperature=temperature, with_entropy=True)
    torch.testing.assert_close(logprobs, wanted)
    assert entropy is not None and not entropy.requires_grad
    torch.testing.assert_close(entropy, wanted_entropy)
    factors = torch.linspace(-1, 2, num_rows)  # what a loss makes of each logprob, which differs in stage 2
    gradients = torch.autograd.grad((logprobs * factors).sum(), trained)
    torch.testing.assert_close(gradients, torch.autograd.grad((wanted * factors).sum(), trained))


@pytest.mark.parametrize("num_rows", [0, 2, 7])
@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_of_entropies_are_those_of_a_plain_softmax(num_rows, is_trained, temperature):
    hidden, weight, targets = inputs(num_rows, is_trained=is_trained)
    trained = [hidden, weight] if is_trained else [hidden]
    every = torch.log_softmax((hidden @ weight.T) / temperature, -1)
    factors = torch.linspace(-1, 2, num_rows)
    wanted = (every[torch.arange(num_rows), targets] * factors - (every.exp() * every).sum(-1) * factors.flip(0)).sum()
    logprobs, entropy = chunked_logprobs(hidden, weight, targets, temperature=temperature, entropy_gradient=True)
    assert entropy is not None
    found = (logprobs * factors + entropy * factors.flip(0)).sum()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, trained), torch.autograd.grad(wanted, trained))


@pytest.mark.parametrize("num_rows", [0, 2, 7])
@pytest.mark.parametrize("is_trained", [False, True])
def test_the_sum_and_its_gradients_are_those_of_the_logprobs(num_rows, is_trained):
    hidden, weight, targets = inputs(num_rows, is_trained=is_trained)
    trained = [hidden, weight] if is_trained else [hidden]
    wanted = plainly(hidden, weight, targets, 0.7)[0].sum()
    found = logprob_sum(hidden, weight, targets, temperature=0.7)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(-found / 3, trained), torch.autograd.grad(-wanted / 3, trained))


def test_a_sum_goes_backward_once():
    total = logprob_sum(*inputs(2))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backward once"):
        total.backward()


@pytest.mark.parametrize("score", [logprob_sum, lambda *given: chunked_logprobs(*given)[0].sum()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_gradients_are_near_those_of_float32_and_in_the_dtype_of_the_weights(score, dtype):
    hidden, weight, targets = inputs(7)
    wanted = torch.autograd.grad(plainly(hidden, weight, targets)[0].sum(), [hidden, weight])
    with torch.autocast("cpu", dtype):
        found = torch.autograd.grad(score(hidden, weight, targets), [hidden, weight])
    for gradient, expected in zip(found, wanted):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected, atol=0.05, rtol=0.05)


def test_a_gradient_of_a_sure_token_keeps_its_size_in_bfloat16():
    """(softmax - onehot) of a target of probability 0.999 is 0.001, which bfloat16 cannot hold beside 1."""
    hidden, weight, targets = torch.ones(1, 8, requires_grad=True), torch.zeros(WORDS, 8), torch.tensor([4])
    weight[4] = 1.375
    wanted = torch.autograd.grad(plainly(hidden, weight, targets)[0].sum(), hidden)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(logprob_sum(hidden, weight, targets), hidden)[0]
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0)


class Seen(TorchDispatchMode):
    """Counts the products and the exponentials, and notes the most rows of a tensor as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.exponentials = self.most_rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.products += name in ("mm", "addmm", "addmm_")
        self.exponentials += name in ("exp", "exp_")
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (WORDS,) and len(tensor) != 8:  # the weight
                self.most_rows = max(self.most_rows, tensor.numel() // WORDS)
        return out


@pytest.mark.parametrize(("is_summed", "is_trained", "products"), [(0, 0, 2), (1, 0, 2), (1, 1, 3), (0, 1, 4)])
def test_no_product_is_computed_twice_but_for_the_weights_of_single_logprobs(is_summed, is_trained, products):
    hidden, weight, targets = inputs(6, is_trained=bool(is_trained))
    with Seen() as seen:
        total = (logprob_sum if is_summed else lambda *given: chunked_logprobs(*given)[0].sum())(
            hidden, weight, targets
        )
        total.backward()
    # two chunks; a weight's gradient has the vocabulary first
    assert (seen.products, seen.exponentials) == (2 * products, 2 if products < 4 else 4)
    assert seen.most_rows == 3


def test_without_gradients_nothing_but_the_logits_is_computed():
    hidden, weight, targets = inputs(6)
    with Seen() as seen, torch.no_grad():
        logprob_sum(hidden, weight, targets)
        chunked_logprobs(hidden, weight, targets)
    assert seen.products == 4
