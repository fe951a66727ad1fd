"""Pure functions of logprobs and rewards: losses, KL, aggregation, advantages.

Legend: T packed tokens, N trained tokens of a pack, S sequences, V vocabulary, D model width, G rollouts of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGPROB_CHUNK = 1024


def chunked_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logprob of each target and entropy of its distribution, float32: [N, D], [V, D], [N] -> [N], [N].

    Logits exist for 1024 rows at a time and are recomputed in backward. The entropy carries no gradient.
    """

    def score(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = F.log_softmax(F.linear(rows, weight).float() / temperature, dim=-1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, ids[:, None])[:, 0], entropy

    keep = torch.is_grad_enabled() and len(targets) > LOGPROB_CHUNK
    parts = [
        checkpoint(score, rows, ids, use_reentrant=False) if keep else score(rows, ids)
        for rows, ids in zip(hidden.split(LOGPROB_CHUNK), targets.split(LOGPROB_CHUNK))
    ]
    logprobs, entropy = zip(*parts) if parts else ((hidden.sum(-1)[:0].float(),), (hidden.new_zeros(0).float(),))
    return torch.cat(logprobs), torch.cat(entropy)
