"""Logprobs of tokens from hidden states, without ever holding all logits.

Legend: N tokens, V vocabulary, D model width, C tokens of a chunk.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from looktwice.model.exact import is_exact
from looktwice.model.precision import autocast_dtype

LOGPROB_CHUNK = 256
"""Tokens whose logits exist at a time."""
CHUNK_NUMBERS = {"cpu": 10**7}
"""Logits that exist at a time, if more than those of a token: on a CPU those of 65 tokens of 151,936 words, 40 MB."""
BLOCK_NUMBERS = {"cpu": 3 * 10**5}
"""Logits that are made weights at a time: so few stay in a processor's cache meanwhile."""


def distribution_logprobs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Logprobs of every word, which sampling and training share: logits [N, V] -> [N, V], float32.

    `log_softmax`, because its result for a row is the same in any number of rows; `logsumexp` of one long row is not.
    """
    logits = logits.float()
    return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Logprob of one id a row: logits [N, V], ids [N] -> [N], float32."""
    return distribution_logprobs(logits, temperature).gather(1, ids[:, None])[:, 0]


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Logprob of each target, and if asked for entropy of its distribution: [N, D], [V, D], [N] -> [N], [N], float32.

    Logits exist for a chunk of rows at a time. The gradient of a row's logprob is computed with it and kept, [N, D];
    that of the weight needs the logits once more in backward. The entropy carries a gradient with `entropy_gradient`
    alone, which is computed and kept in the same way.
    """
    kept = (torch.is_grad_enabled(), torch.is_grad_enabled() and entropy_gradient)
    with_entropy = with_entropy or entropy_gradient
    logprobs, entropy = _Logprobs.apply(hidden, weight, targets, temperature, with_entropy, kept)
    return logprobs, entropy if with_entropy else None


def logprob_sum(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The sum of `chunked_logprobs` [], whose gradients are all computed with it: nothing is computed twice.

    It can go backward once.
    """
    return _LogprobSum.apply(hidden, weight, targets, temperature, torch.is_grad_enabled())


def _cast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of autocast, where it is on: once, and not for each chunk."""
    device = hidden.device
    return hidden.to(autocast_dtype(device, hidden.dtype)), weight.to(autocast_dtype(device, weight.dtype))


class _Chunk(NamedTuple):
    """Scores of a chunk: exp(logit - highest) [C, V] in float32, and what they add up to [C, 1]; then its logprobs, and
    its entropies if asked for, [C]."""

    weights: Tensor
    total: Tensor
    logprobs: Tensor
    entropy: Tensor | None


class _Scorer:
    """Computes chunks one after the other in the same memory, which costs less than asking for it each time."""

    def __init__(self, head: Tensor, temperature: float, *, size: int, with_entropy: bool = False) -> None:
        self.head = head
        self.temperature = temperature
        self.with_entropy = with_entropy
        self.size = min(max(1, size), LOGPROB_CHUNK, _rows_of(CHUNK_NUMBERS, head))
        self.block = min(self.size, _rows_of(BLOCK_NUMBERS, head))
        self.logits = head.new_empty(self.size, len(head))
        self.scores = self.logits if head.dtype == torch.float32 else torch.empty_like(self.logits, dtype=torch.float32)

    def __call__(self, rows: Tensor, ids: Tensor) -> _Chunk:
        if is_exact():
            return self._exactly(rows, ids)
        logits = torch.mm(rows, self.head.T, out=self.logits[: len(rows)])
        scores = logits if logits.dtype == torch.float32 else self.scores[: len(rows)].copy_(logits)
        blocks = zip(scores.split(self.block), ids.split(self.block))
        total, logprobs, entropy = zip(*(self._weigh(*block) for block in blocks))
        return _Chunk(scores, torch.cat(total), torch.cat(logprobs), torch.cat(entropy) if self.with_entropy else None)

    def _weigh(self, scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Make weights of the scores where they are; total, logprobs and entropy as in `_Chunk`."""
        if self.temperature != 1:
            scores.div_(self.temperature)
        chosen = scores.gather(1, ids[:, None])
        highest = scores.amax(-1, keepdim=True)
        shifted = scores.sub_(highest)
        shares = shifted.exp() if self.with_entropy else shifted.exp_()
        total = shares.sum(-1, keepdim=True)
        logprobs = (chosen - highest - total.log())[:, 0]
        if not self.with_entropy:
            return total, logprobs, None
        entropy = (total.log() - shifted.mul_(shares).sum(-1, keepdim=True) / total)[:, 0]
        scores.copy_(shares)
        return total, logprobs, entropy

    def _exactly(self, rows: Tensor, ids: Tensor) -> _Chunk:
        """By the operations that the sampler uses, in products of exact mode, which choose where they write."""
        logprobs = distribution_logprobs(F.linear(rows, self.head), self.temperature)
        chosen = logprobs.gather(1, ids[:, None])[:, 0]
        weights = logprobs.exp()
        entropy = -(weights * logprobs).sum(-1) if self.with_entropy else None
        return _Chunk(weights, torch.ones_like(weights[:, :1]), chosen, entropy)

    def places(self, count: int) -> list[slice]:
        """The chunks of so many tokens."""
        return [slice(start, min(start + self.size, count)) for start in range(0, count, self.size)]

    def entropy_slopes(self, chunk: _Chunk) -> Tensor:
        """Gradients of the entropies by the logits, -p (log p + H) / temperature [C, V], in the head's dtype."""
        assert chunk.entropy is not None
        shares = chunk.weights / chunk.total
        by_logit = torch.special.entr(shares).sub_(shares.mul_(chunk.entropy[:, None])).div_(self.temperature)
        return by_logit.to(self.logits.dtype)

    def slopes(self, chunk: _Chunk, ids: Tensor) -> Tensor:
        """Gradients of the logprobs by the logits, (onehot - softmax) / temperature [C, V], in the head's dtype; the
        chunk's scores are used up."""
        # subtracted before anything is rounded
        weights = chunk.weights.scatter_add_(1, ids[:, None], -chunk.total)
        return torch.mul(weights, -1 / (self.temperature * chunk.total), out=self.logits[: len(ids)])


class _Logprobs(torch.autograd.Function):
    """Each logprob, and entropy, with the gradient of its row; see `chunked_logprobs`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
        kept: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        rows, head = _cast(hidden, weight)
        scorer = _Scorer(head, temperature, size=len(rows), with_entropy=with_entropy)
        logprobs = rows.new_empty(len(rows), dtype=torch.float32)
        entropy = torch.zeros_like(logprobs)
        by_row, by_row_of_entropy = (
            torch.empty_like(rows) if is_kept and ctx.needs_input_grad[0] else None for is_kept in kept
        )
        for place in scorer.places(len(rows)):
            chunk = scorer(rows[place], targets[place])
            logprobs[place] = chunk.logprobs
            if chunk.entropy is not None:
                entropy[place] = chunk.entropy
            if by_row_of_entropy is not None:
                torch.mm(scorer.entropy_slopes(chunk), head, out=by_row_of_entropy[place])
            if by_row is not None:
                torch.mm(scorer.slopes(chunk, targets[place]), head, out=by_row[place])
        ctx.temperature, ctx.dtype, ctx.has_entropy = temperature, head.dtype, kept[1]
        inputs = (hidden, weight, targets) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(by_row, by_row_of_entropy, *inputs)
        if not kept[1]:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, entropy_grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        by_row, by_row_of_entropy, *inputs = ctx.saved_tensors
        by_hidden = None if by_row is None else by_row * grad[:, None]
        if by_hidden is not None and by_row_of_entropy is not None:
            by_hidden.addcmul_(by_row_of_entropy, entropy_grad[:, None].to(by_hidden.dtype))
        by_head = None
        if inputs:
            hidden, weight, targets = inputs
            scorer = _Scorer(weight.to(ctx.dtype), ctx.temperature, size=len(targets), with_entropy=ctx.has_entropy)
            by_head = WeightGradient(weight)
            for place in scorer.places(len(targets)):
                rows = hidden[place].to(ctx.dtype)
                chunk = scorer(rows, targets[place])
                if ctx.has_entropy:
                    by_head.add(scorer.entropy_slopes(chunk), rows * entropy_grad[place, None])
                by_head.add(scorer.slopes(chunk, targets[place]), rows * grad[place, None])
        return (by_hidden, None if by_head is None else by_head.value, *[None] * 4)


class _LogprobSum(torch.autograd.Function):
    """The sum of logprobs with all its gradients; see `logprob_sum`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, with_gradients: bool
    ) -> Tensor:
        rows, head = _cast(hidden, weight)
        scorer = _Scorer(head, temperature, size=len(rows))
        total = rows.new_zeros((), dtype=torch.float32)
        by_row = torch.empty_like(rows) if with_gradients and ctx.needs_input_grad[0] else None
        by_head = WeightGradient(weight) if with_gradients and ctx.needs_input_grad[1] else None
        for place in scorer.places(len(rows)):
            chunk = scorer(rows[place], targets[place])
            total += chunk.logprobs.sum()
            if by_row is not None or by_head is not None:
                slopes = scorer.slopes(chunk, targets[place])
            if by_row is not None:
                torch.mm(slopes, head, out=by_row[place])
            if by_head is not None:
                by_head.add(slopes, rows[place])
        ctx.gradients = by_row, None if by_head is None else by_head.value
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("a sum of logprobs goes backward once; compute it again")
        # where it is, since a second one of the head would take as much memory as its weight
        return (*(None if each is None else each.mul_(grad) for each in gradients), None, None, None)


def _rows_of(numbers: dict[str, int], head: Tensor) -> int:
    """Tokens whose logits are so many numbers, or as many tokens as there are."""
    return max(1, numbers.get(head.device.type, sys.maxsize) // len(head))


class WeightGradient:
    """The gradient of a weight [V, D] over chunks, in the dtype of the weight; rows past those given get none."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.sum: Tensor | None = None

    def add(self, slopes: Tensor, rows: Tensor) -> None:
        """Add slopes^T @ rows of a chunk: [C, V], [C, D]."""
        rows, num_words = rows.to(slopes.dtype), slopes.shape[1]
        if self.sum is None:
            self.sum = torch.empty_like(self.weight)
            self.sum[num_words:] = 0
            if slopes.dtype == self.sum.dtype:
                torch.mm(slopes.T, rows, out=self.sum[:num_words])
            else:
                self.sum[:num_words] = torch.mm(slopes.T, rows)
        elif slopes.dtype == self.sum.dtype:
            self.sum[:num_words].addmm_(slopes.T, rows)
        else:
            self.sum[:num_words] += torch.mm(slopes.T, rows)

    @property
    def value(self) -> Tensor:
        return torch.zeros_like(self.weight) if self.sum is None else self.sum
