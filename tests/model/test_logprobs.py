"""Logprobs in chunks against a plain log-softmax over all logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from looktwice.model.logprobs import LOGPROB_CHUNK, chunked_logprobs


@pytest.mark.parametrize("num_rows", [0, 5, LOGPROB_CHUNK + 3])
def test_chunked_logprobs_equal_a_plain_log_softmax(num_rows):
    hidden = torch.randn(num_rows, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(11, 8, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(num_rows) % 11
    expected = torch.log_softmax(hidden @ weight.T / 0.7, -1)
    logprobs, entropy = chunked_logprobs(hidden, weight, targets, temperature=0.7, with_entropy=True)
    torch.testing.assert_close(logprobs, expected[torch.arange(num_rows), targets])
    assert entropy is not None
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1).detach())
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    (wanted,) = torch.autograd.grad(expected[torch.arange(num_rows), targets].sum(), hidden)
    torch.testing.assert_close(gradient, wanted)


class Exponentials(TorchDispatchMode):
    """Counts the calls of exp, which only an entropy needs."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.exp.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("with_entropy", "count"), [(False, 0), (True, 2)])
def test_an_entropy_is_computed_once_a_chunk_and_only_when_asked_for(with_entropy, count):
    hidden = torch.randn(LOGPROB_CHUNK + 3, 8, requires_grad=True)
    targets = torch.zeros(len(hidden), dtype=torch.long)
    with Exponentials() as seen:
        logprobs, entropy = chunked_logprobs(hidden, torch.randn(11, 8), targets, with_entropy=with_entropy)
        logprobs.sum().backward()
    assert (seen.count, entropy is not None) == (count, with_entropy)


# -- advantages
