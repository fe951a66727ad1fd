"""Several rewards and terms, each with its weight and its name, added up to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from looktwice.answers import answers_right
from looktwice.rewarding.terms import TERMS, Siblings
from looktwice.rewards import Played, Reward, RewardFunction, failed

RIGHT_FROM = 0.5
"""An accuracy of so much counts as right where a term asks."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of several rewards, each of which has another `name`."""

    name: str
    pay: RewardFunction
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class CombinedReward:
    """The weighted sum of rewards and terms. A rollout that one of them fails has failed.

    Parts of the first reward keep their names; those of another stand behind its name and a dot, as do those of the
    first that are called like another reward or a term. Where two are still called alike the rollout has failed.
    Groups are filtered by the first reward's accuracy, or by its total where it has none, before any weight.
    """

    sources: Sequence[Source]
    terms: Mapping[str, float] = field(default_factory=dict)
    max_new_tokens: int = 0

    def __call__(self, rollouts: Sequence[Played]) -> list[Reward]:
        columns = [source.pay(rollouts) for source in self.sources]
        rewards = [self._joined(row) for row in zip(*columns)]
        return self._with_terms(rollouts, rewards) if self.terms else rewards

    @cached_property
    def _taken(self) -> frozenset[str]:
        """Names that no part of the first reward has for itself."""
        return frozenset([*(source.name for source in self.sources[1:]), *self.terms])

    def _joined(self, rewards: Sequence[Reward]) -> Reward:
        """What the sources paid one rollout, as one reward."""
        parts: dict[str, float] = {}
        raw: dict[str, float] = {}
        weights: dict[str, float] = {}
        for number, (source, reward) in enumerate(zip(self.sources, rewards)):
            if reward.error:
                where = f"{source.name}: " if len(self.sources) > 1 else ""
                return Reward(total=reward.total, error=f"{where}{reward.error}")
            for part, value in reward.terms.items():
                name = part if not number and part and part not in self._taken else _qualified(source.name, part)
                if name in parts or name in self.terms:
                    return failed(ValueError(f'two parts are called "{name}"; rename one of them'))
                parts[name] = source.weight * value
                raw[name] = reward.raw.get(part, value)
                weights[name] = abs(source.weight) * reward.weights.get(part, 1.0)
        raw["accuracy"] = rewards[0].accuracy
        total = sum(source.weight * reward.total for source, reward in zip(self.sources, rewards))
        return Reward(total=total, parts=parts, raw=raw, weights=weights)

    def _with_terms(self, rollouts: Sequence[Played], rewards: list[Reward]) -> list[Reward]:
        """The rewards with the terms of each group added."""
        groups: dict[int, list[int]] = {}
        for place, one in enumerate(rollouts):
            groups.setdefault(one.group, []).append(place)
        for places in groups.values():
            siblings = Siblings(
                rollouts=[rollouts[place] for place in places],
                is_right=[_is_right(rollouts[place], rewards[place]) for place in places],
                max_new_tokens=self.max_new_tokens,
            )
            found = {name: TERMS[name](siblings) for name in self.terms}
            for number, place in enumerate(places):
                rewards[place] = self._added(rewards[place], {name: values[number] for name, values in found.items()})
        return rewards

    def _added(self, reward: Reward, terms: Mapping[str, float]) -> Reward:
        if reward.error:
            return reward
        paid = {name: self.terms[name] * value for name, value in terms.items()}
        return Reward(
            total=reward.total + sum(paid.values()),
            parts={**reward.parts, **paid},
            raw={**reward.raw, **terms},
            weights={**reward.weights, **{name: abs(weight) for name, weight in self.terms.items()}},
        )


def _qualified(source: str, part: str) -> str:
    return f"{source}.{part}" if part else source


def _is_right(one: Played, reward: Reward) -> bool:
    """By the reward's own accuracy, else by the rules."""
    if "accuracy" in reward.parts:
        return reward.accuracy >= RIGHT_FROM
    return answers_right(one.trajectory.text, one.solution)
