"""Rollouts made ahead: those of the next step, from the weights before the update that runs beside them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread

from looktwice.config import GRPOConfig
from looktwice.data.sample import Sample
from looktwice.model.vision_cache import VisionCache
from looktwice.rewards import RewardFunction
from looktwice.training.learner import Learner
from looktwice.training.phases import Phases
from looktwice.training.rollouts import MadeAhead, Rollout, make_rollouts, of_all, own_places
from looktwice.training.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts whose rollouts are being made, those of this process at `places`, and for what."""

    samples: Sequence[Sample]
    places: list[int]
    made: MadeAhead
    own: Future[list[list[Rollout]]]


class Ahead:
    """At most one batch at a time. Its rollouts are one update older than the weights that they train, which the
    importance ratio against their sampling logprobs corrects."""

    def __init__(self, learner: Learner, config: GRPOConfig, pay: RewardFunction, sampler: Sampler) -> None:
        self.learner, self.config, self.pay, self.sampler = learner, config, pay, sampler
        self.batch: Batch | None = None

    def begin(self, step: int, samples: Sequence[Sample]) -> None:
        """Make the rollouts of step `step`, counted from 0, in a thread, from the weights as they are now."""
        learner = self.learner
        with learner.world.whole_model(learner.model):
            self.sampler.take_weights(step - 1)
        batch = Batch(
            samples=samples,
            places=own_places(learner, samples, self.config),
            made=MadeAhead(step, learner.images_of_a_step(), Phases()),
            own=Future(),
        )
        # a daemon, so that a second Ctrl-C does not wait for it
        Thread(target=self._make, args=(batch,), name="looktwice-ahead", daemon=True).start()
        self.batch = batch

    def _make(self, batch: Batch) -> None:
        learner, config, pay, sampler = self.learner, self.config, self.pay, self.sampler
        try:
            batch.own.set_result(make_rollouts(learner, batch.samples, batch.places, config, pay, sampler, batch.made))
        except BaseException as error:
            batch.own.set_exception(error)

    def take(self) -> tuple[list[list[Rollout]], VisionCache | None] | None:
        """The groups of all processes that were made ahead, once they are done, and what keeps their pictures; None
        where none were begun. Raises what their making raised."""
        batch, self.batch = self.batch, None
        if batch is None:
            return None
        with self.learner.phases.during("waiting"):
            own = batch.own.result()
        self.learner.phases.add(batch.made.phases)
        return of_all(self.learner, batch.samples, batch.places, own), batch.made.images

    def wait(self) -> None:
        """Wait for what is being made, which stays."""
        if self.batch is not None:
            self.batch.own.exception()

    def drop(self) -> None:
        """Wait for what is being made, and forget it."""
        self.wait()
        self.batch = None
