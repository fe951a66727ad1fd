"""Logprobs of tokens from hidden states, without ever holding all logits.

Legend: N tokens, V vocabulary, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGPROB_CHUNK = 1024


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logprob of each target, and if asked for entropy of its distribution: [N, D], [V, D], [N] -> [N], [N], float32.

    Logits exist for 1024 rows at a time and are recomputed in backward. The entropy carries no gradient.
    """

    def score(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        logprobs = F.log_softmax(F.linear(rows, weight).float() / temperature, dim=-1)
        chosen = logprobs.gather(1, ids[:, None])[:, 0]
        if not with_entropy:
            return chosen, None
        # after all that backward needs: recomputation stops before it comes here
        with torch.no_grad():
            return chosen, -(logprobs.exp() * logprobs).sum(-1)

    keep = torch.is_grad_enabled() and len(targets) > LOGPROB_CHUNK
    # an empty split is one empty chunk, so there is always something to join
    parts = [
        checkpoint(score, rows, ids, use_reentrant=False) if keep else score(rows, ids)
        for rows, ids in zip(hidden.split(LOGPROB_CHUNK), targets.split(LOGPROB_CHUNK))
    ]
    logprobs, entropies = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None
