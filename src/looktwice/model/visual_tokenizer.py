"""From tower features to one language-model vector per visual token: head, softmax, visual embedding table.

Legend: A visual tokens, F features of a token (s^2 * tower width), V visual vocabulary, D language-model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from looktwice.model.configuration import NUM_INDICATORS, Siglip2NavitConfig
from looktwice.model.exact import is_exact
from looktwice.model.logprobs import WeightGradient
from looktwice.model.precision import autocast_dtype
from looktwice.model.vision import VisionTower

HEAD_NORM_EPS = 1e-5
CHUNK = {"cpu": 96, "cuda": 512}
"""Visual tokens whose scores exist at a time. On a CPU 96 are about as fast a token as 512; those of 96 are 25 MB."""
BLOCK = {"cpu": 8, "cuda": 512}
"""Of them those that norm and softmax take at a time: 8 stay in a processor's cache, where both are 3 to 8 times as
fast as over a chunk."""
KEPT = {"cpu": 4}
"""Chunks whose scores are kept for backward, which computes the others anew: 100 MB spare 2 F V products a token."""


class VisualTokenizer(nn.Module):
    """Tower and head. A visual token is a probability row over V - 4 visual words."""

    def __init__(self, config: Siglip2NavitConfig, visual_vocab_size: int) -> None:
        super().__init__()
        self.vit = VisionTower(config)
        num_words = visual_vocab_size - NUM_INDICATORS
        self.head = nn.Sequential(
            nn.Linear(config.hidden_size * config.hidden_stride**2, num_words, bias=False),
            nn.LayerNorm(num_words, eps=HEAD_NORM_EPS),
        )

    def probabilities(self, features: Tensor) -> Tensor:
        """Features [A, F] -> visual_tokens [A, V - 4], softmax in float32, in the dtype of the head."""
        scores = self.head(features)
        return scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)


class VisualEmbedding(nn.Embedding):
    """The visual table: a lookup for ids, a matrix product for probability rows."""

    def forward(self, visual_tokens: Tensor) -> Tensor:
        """Integer ids [...] -> [..., D]; probabilities [A, V - 4] -> [A, D]."""
        if visual_tokens.is_floating_point():
            return visual_tokens @ self.weight[: visual_tokens.shape[-1]]
        return super().forward(visual_tokens)


def embed_features(features: Tensor, tokenizer: VisualTokenizer, table: VisualEmbedding) -> Tensor:
    """Features [A, F] -> vectors [A, D]. Scores of a chunk of tokens exist at a time, and of a few until backward,
    which computes the others anew.

    The softmax is 65,532 wide in released models. In bfloat16 a picture of 1792 x 1792 would take 2.0 GB at once
    (`benchmarks/visual_tokens.py`).
    """
    # by name, which also finds the copy that PEFT trains of the head
    linear, norm = (getattr(tokenizer.head, place) for place in ("0", "1"))
    device = linear.weight.device
    weights = linear.weight, norm.weight, norm.bias, table.weight.to(device)
    return _Mixture.apply(features.to(device), *weights, torch.is_grad_enabled())


class _Mixture(torch.autograd.Function):
    """Head, norm, softmax and table in one, chunk by chunk in the same memory."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, words: Tensor, scale: Tensor, shift: Tensor, rows: Tensor, is_trained: bool
    ) -> Tensor:
        ctx.save_for_backward(features, words, scale, shift, rows)
        ctx.dtype = dtype = autocast_dtype(features.device, words.dtype)
        features, words, mixed = features.to(dtype), words.to(dtype), rows[: len(words)].to(dtype)
        chunks = features.split(CHUNK.get(features.device.type, len(features)))
        memory = features.new_empty(len(chunks[0]), len(words))
        vectors, ctx.kept = [], []
        num_kept = KEPT.get(features.device.type, 0) if is_trained and any(ctx.needs_input_grad) else 0
        for number, chunk in enumerate(chunks):
            scores = memory[: len(chunk)]
            if is_exact():
                scores.copy_(F.linear(chunk, words))
            else:
                torch.mm(chunk, words.T, out=scores)
            if number < num_kept:
                ctx.kept.append(scores.clone())
            for block in scores.split(BLOCK.get(features.device.type, len(scores))):
                block.copy_(_probabilities(block, scale, shift))
            vectors.append(scores @ mixed)
        return torch.cat(vectors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        features, words, scale, shift, rows = ctx.saved_tensors
        needed, dtype, precise = ctx.needs_input_grad, ctx.dtype, torch.promote_types(words.dtype, torch.float32)
        inputs, head, mixed, grad = (each.to(dtype) for each in (features, words, rows[: len(words)], grad))
        leaves = [each.detach().to(precise).requires_grad_() for each in (scale, shift)]
        by_features, by_words, by_rows = torch.empty_like(inputs), WeightGradient(words), WeightGradient(rows)
        by_norm = [torch.zeros_like(each) for each in leaves]
        size = CHUNK.get(grad.device.type, len(grad))
        scores, slopes = (head.new_empty(min(size, len(grad)), len(head)) for _ in range(2))
        for start in range(0, len(grad), size):
            place = slice(start, min(start + size, len(grad)))
            chunk = scores[: len(grad[place])]
            if start // size < len(ctx.kept):
                chunk.copy_(ctx.kept[start // size])
            else:
                torch.mm(inputs[place], head.T, out=chunk)
            by_chunk = torch.mm(grad[place], mixed.T, out=slopes[: len(chunk)])
            width = BLOCK.get(grad.device.type, size)
            for block, by_block in zip(chunk.split(width), by_chunk.split(width)):
                leaf = block.to(precise, copy=True).requires_grad_()
                with torch.enable_grad():
                    found = _probabilities(leaf, *leaves)
                by_leaf, *sums = torch.autograd.grad(found, [leaf, *leaves], by_block.to(precise))
                block.copy_(found.detach())
                by_block.copy_(by_leaf)
                for total, each in zip(by_norm, sums):
                    total += each
            if needed[0]:
                torch.mm(by_chunk, head, out=by_features[place])
            if needed[1]:
                by_words.add(by_chunk, inputs[place])
            if needed[4]:
                by_rows.add(chunk, grad[place])
        by_scale, by_shift = (total.to(scale.dtype) for total in by_norm)
        return (
            by_features.to(features.dtype) if needed[0] else None,
            by_words.value if needed[1] else None,
            by_scale if needed[2] else None,
            by_shift if needed[3] else None,
            by_rows.value if needed[4] else None,
            None,
        )


def _probabilities(scores: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(scores, scale.shape, scale, shift, HEAD_NORM_EPS).softmax(-1, dtype=torch.float32)
