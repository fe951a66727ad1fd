"""What plays the episodes of a run: the built-in engine on the policy or a copy of it, or vLLM servers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from uuid import uuid4

import torch
from torch import nn

from looktwice.config import GRPOConfig
from looktwice.engine.builtin import BuiltinEngine
from looktwice.engine.sampling import Sampling
from looktwice.model.adapters import merged
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.vision_cache import VisionCache, encoder
from looktwice.rollout.episode import Episode, play
from looktwice.training.folder import remove
from looktwice.training.learner import Learner

SERVED_WEIGHTS = "served_weights"
"""Folder in that of the run from which vLLM servers read the policy."""


class Sampler:
    """Samples from the policy of a learner as `take_weights` found it last: in one process from that itself, and where
    `is_apart` from a copy, so that an update may run at the same time.

    Raises ConfigError for a server that cannot be used.
    """

    def __init__(self, learner: Learner, config: GRPOConfig, *, is_apart: bool = False) -> None:
        self.learner, self.config = learner, config
        self.is_apart = is_apart
        self.copy: Ovis2_5ForConditionalGeneration | None = None
        self.run = ""
        self.servers = None
        if config.vllm_servers:
            from looktwice.engine.vllm import VllmEngine  # needs the extra

            rows = config.rollout_batch_size
            self.servers = VllmEngine(config.vllm_servers, learner.processor.config, max_rollouts=rows)
            # tells the weights of this run from those of another that the servers had
            self.run = learner.world.from_main(lambda: uuid4().hex[:8])

    def take_weights(self, step: int) -> None:
        """Sample from now on from the policy as it is before step `step`, counted from 0. All processes call this
        inside `World.whole_model`, and rank 0 gives the weights to the servers."""
        learner = self.learner
        if self.servers is not None:
            version = f"{self.run}-{step}"
            if learner.world.is_main:
                self.servers.push_weights(learner.model, self.config.output_dir / SERVED_WEIGHTS, version=version)
            learner.world.wait_for_all()
            if not learner.world.is_main:
                self.servers.note_weights(version)
        elif self.is_apart and self.copy is None:
            self.copy = copied(learner.base)
        elif self.copy is not None:
            with torch.no_grad():
                for own, live in zip(self.copy.parameters(), learner.base.parameters(), strict=True):
                    if live.requires_grad:
                        own.copy_(live)

    def play(
        self,
        groups: Sequence[Sequence[Episode]],
        config: GRPOConfig,
        seeds: Sequence[int],
        images: VisionCache | None,
    ) -> Mapping[str, str]:
        """Play groups of sibling episodes to their end; pictures come from `images` where those keep them.

        Gives what the bits of the logprobs depended on, under exact mode.
        """
        learner = self.learner
        sampling = Sampling(temperature=config.temperature, top_p=config.top_p, top_k=config.top_k)
        if self.servers is not None:
            play(self.servers, groups, sampling, seeds)
            return {}
        base = learner.base if self.copy is None else self.copy
        # a merged weight has other bits than a layer and its adapter
        with learner.precision(), nullcontext() if config.exact else merged(base):
            engine = BuiltinEngine(
                base,
                max_rows=config.rollout_batch_size,
                cache_tokens=config.cache_tokens,
                encode=encoder(base, images),
            )
            play(engine, groups, sampling, seeds)
            return learner.numerics() if config.exact else {}

    def close(self) -> None:
        """Remove the weights that servers have read."""
        if self.servers is not None and self.learner.world.is_main:
            remove(self.config.output_dir / SERVED_WEIGHTS)


def copied(base: Ovis2_5ForConditionalGeneration) -> Ovis2_5ForConditionalGeneration:
    """A model of its own with the same weights, which shares the memory of those that are not trained."""
    # a parameter of its own even so: merging an adapter puts another tensor into it
    shared = {
        id(weight): nn.Parameter(weight.data, requires_grad=False) if type(weight) is nn.Parameter else weight
        for weight in base.parameters()
        if not weight.requires_grad
    }
    return copy.deepcopy(base, shared)
