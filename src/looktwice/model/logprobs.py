"""Logprobs of tokens from hidden states, without ever holding all logits.

Legend: N tokens, V vocabulary, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from looktwice.model.exact import alike

LOGPROB_CHUNK = 1024


def distribution_logprobs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Logprobs of every word, which sampling and training share: logits [N, V] -> [N, V], float32.

    `log_softmax`, because its result for a row is the same in any number of rows; `logsumexp` of one long row is not.
    """
    return F.log_softmax(logits.float() / temperature, dim=-1)


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Logprob of one id a row: logits [N, V], ids [N] -> [N], float32."""
    return distribution_logprobs(logits, temperature).gather(1, ids[:, None])[:, 0]


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logprob of each target, and if asked for entropy of its distribution: [N, D], [V, D], [N] -> [N], [N], float32.

    Logits exist for 1024 rows at a time and are recomputed in backward. The entropy carries no gradient.
    """

    def score(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        logprobs = distribution_logprobs(F.linear(rows, weight), temperature)
        chosen = logprobs.gather(1, ids[:, None])[:, 0]
        if not with_entropy:
            return chosen, None
        # after all that backward needs: recomputation stops before it comes here
        with torch.no_grad():
            return chosen, -(logprobs.exp() * logprobs).sum(-1)

    keep = torch.is_grad_enabled() and len(targets) > LOGPROB_CHUNK
    # an empty split is one empty chunk, so there is always something to join
    parts = [
        checkpoint(score, rows, ids, use_reentrant=False, context_fn=alike) if keep else score(rows, ids)
        for rows, ids in zip(hidden.split(LOGPROB_CHUNK), targets.split(LOGPROB_CHUNK))
    ]
    logprobs, entropies = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None
