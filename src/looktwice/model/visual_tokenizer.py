"""From tower features to one language-model vector per visual token: head, softmax, visual embedding table.

Legend: A visual tokens, F features of a token (s^2 * tower width), V visual vocabulary, D language-model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from looktwice.model.configuration import NUM_INDICATORS, Siglip2NavitConfig
from looktwice.model.exact import alike
from looktwice.model.vision import VisionTower

HEAD_NORM_EPS = 1e-5
CHUNK = 512


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
    """Features [A, F] -> vectors [A, D], 512 tokens at a time, recomputed in backward where there is one.

    The softmax is 65,532 wide in released models. In bfloat16 a picture of 1792 x 1792 would take 2.0 GB at once, and
    takes 0.3 GB in chunks; with gradients of the features 2.8 and 0.5 (`benchmarks/visual_tokens.py`).
    """

    def embed(chunk: Tensor) -> Tensor:
        return table(tokenizer.probabilities(chunk))

    chunks = features.split(CHUNK)
    weights = (*tokenizer.head.parameters(), *table.parameters())
    has_backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (features, *weights))
    if not has_backward or len(chunks) == 1:
        return torch.cat([embed(chunk) for chunk in chunks])
    return torch.cat([checkpoint(embed, chunk, use_reentrant=False, context_fn=alike) for chunk in chunks])
