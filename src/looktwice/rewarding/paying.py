"""The reward of a run, put together from its settings."""

from __future__ import annotations

from pathlib import Path

from looktwice.config import GRPOConfig, check_reward
from looktwice.custom_reward import CustomReward, load_function
from looktwice.errors import ConfigError
from looktwice.rewarding.cache import Cache, CachedReward, key_of
from looktwice.rewarding.combined import CombinedReward, Source
from looktwice.rewarding.judge import Judge
from looktwice.rewards import REWARD_PRESETS, ROBUST, PresetReward, RewardFunction, by_rules


def load_rewards(config: GRPOConfig) -> RewardFunction:
    """What pays the rollouts of a run. Raises ConfigError where a name, file, function or cache cannot be used."""
    cache = Cache(config.reward_cache) if config.reward_cache else None
    weights = config.reward_weights or (1.0,) * len(config.reward)
    sources = [
        Source(name=name, pay=load_reward(spec, config, cache), weight=weight)
        for spec, name, weight in zip(config.reward, names_of(config), weights)
    ]
    if len(sources) == 1 and weights == (1.0,) and not config.reward_terms:
        return sources[0].pay
    return CombinedReward(
        sources=sources,
        terms={name: weight for name, weight in config.reward_terms.items()},
        max_new_tokens=config.max_new_tokens,
    )


def names_of(config: GRPOConfig) -> list[str]:
    """What each reward is called among several: the preset or the function, with its number where another, a term, or
    a part of the presets is called so; what a run calls `accuracy` is the first reward's."""
    plain = [spec.rpartition(":")[2] for spec in config.reward]
    names: list[str] = []
    for number, name in enumerate(plain, 1):
        is_part = number > 1 and name in ROBUST.largest
        if plain.count(name) > 1 or name in config.reward_terms or is_part:
            name = f"{name}_{number}"
        while name in names:
            name = f"{name}_{number}"
        names.append(name)
    return names


def load_reward(spec: str, config: GRPOConfig, cache: Cache | None) -> RewardFunction:
    """A single reward: that of a preset's name, or of `path.py:function` of the user."""
    check_reward(spec)
    if spec in REWARD_PRESETS:
        return PresetReward(REWARD_PRESETS[spec], judge_of(config, cache) if config.judge_url else by_rules)
    path, _, name = spec.rpartition(":")
    file = Path(path).absolute()
    function = load_function(Path(path), name)
    pay = CustomReward(function, file=file, seconds=config.reward_seconds, retries=config.reward_retries)
    if cache is None:
        return pay
    if pay.takes_all:
        raise ConfigError(
            f"{path}: {name} takes all trajectories of a step, so what it gives for one may depend on the others; "
            "leave --reward_cache out, or take one trajectory"
        )
    return CachedReward(pay=pay, cache=cache, fingerprint=key_of(file.read_bytes().hex(), name))


def judge_of(config: GRPOConfig, cache: Cache | None) -> Judge:
    """The judge that the settings name."""
    assert config.judge_url and config.judge_model
    return Judge(
        url=config.judge_url,
        model=config.judge_model,
        asked=config.judge_asked,
        seconds=config.reward_seconds,
        retries=config.reward_retries,
        concurrency=config.judge_concurrency,
        cache=cache,
    )
