"""What was paid or judged before, in memory or in an SQLite file that further runs share."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from threading import Lock
from typing import Any

from looktwice.errors import ConfigError
from looktwice.rewards import Played, Reward, RewardFunction

IN_MEMORY = "memory"
WAIT_S = 30.0
"""For another process that writes."""


class Cache:
    """Values of JSON under keys, in memory or in a file, for any thread. Raises ConfigError where the file cannot be
    used."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._lock = Lock()
        place = ":memory:" if where == IN_MEMORY else where
        try:
            self._base = sqlite3.connect(place, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
            self._base.execute("CREATE TABLE IF NOT EXISTS paid (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def all_of(
        self, keys: Sequence[str], make: Callable[[Sequence[int]], Sequence[Any]], keeps: Callable[[Any], bool]
    ) -> list[Any]:
        """The value of each key: what is known, and what `make` gives for the places of the others, each key once.

        What `keeps` is true of is known from now on.
        """
        known = {key: value for key in dict.fromkeys(keys) if (value := self._read(key)) is not None}
        missing: dict[str, int] = {}
        for place, key in enumerate(keys):
            if key not in known:
                missing.setdefault(key, place)
        made = dict(zip(missing, make([*missing.values()]) if missing else []))
        for key, value in made.items():
            if keeps(value):
                self._write(key, value)
        return [known[key] if key in known else made[key] for key in keys]

    def _read(self, key: str) -> Any:
        try:
            with self._lock:
                row = self._base.execute("SELECT value FROM paid WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        return None if row is None else json.loads(row[0])

    def _write(self, key: str, value: Any) -> None:
        try:
            with self._lock:
                self._base.execute("INSERT OR REPLACE INTO paid VALUES (?, ?)", (key, json.dumps(value)))
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: sqlite3.Error) -> ConfigError:
        return ConfigError(
            f"{self._where}: cannot hold the cache of rewards ({error}); name another with --reward_cache"
        )


def key_of(*facts: object) -> str:
    """A key that stands for facts of plain data."""
    return sha256(json.dumps(facts, sort_keys=True, default=str).encode(errors="surrogatepass")).hexdigest()


@dataclass(frozen=True, kw_only=True)
class CachedReward:
    """A reward that is asked once for the same question, text and calls of a rollout, or never where a cache knows it.

    `fingerprint` tells the function from others and from what it was before it was changed. What failed is asked again.
    """

    pay: RewardFunction
    cache: Cache
    fingerprint: str

    def __call__(self, rollouts: Sequence[Played]) -> list[Reward]:
        found = self.cache.all_of(
            [self._key(one) for one in rollouts],
            lambda places: [_written(reward) for reward in self.pay([rollouts[place] for place in places])],
            keeps=lambda written: written["error"] is None,
        )
        return [Reward(**written) for written in found]

    def _key(self, one: Played) -> str:
        trajectory = one.trajectory
        calls = [asdict(call) for call in trajectory.calls]
        return key_of(self.fingerprint, one.source, one.question, one.solution, trajectory.text, calls)


def _written(reward: Reward) -> Mapping[str, Any]:
    return {
        "total": reward.total,
        "parts": dict(reward.parts),
        "raw": dict(reward.raw),
        "error": reward.error,
        "weights": dict(reward.weights),
    }
