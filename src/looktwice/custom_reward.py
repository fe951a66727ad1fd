"""A user's own reward, `path.py:function`: whatever it does, a run goes on or stops with a word."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from looktwice.errors import ConfigError, nearest, short
from looktwice.rewards import Played, Reward, failed

MARGIN_S = 5.0
"""What a loop of awaited rewards may take beyond all its limits before it is given up."""
HUNG = 3
"""Calls in a row that took too long, after which the others of the step are not made."""
FAILURES = (Exception, SystemExit, KeyboardInterrupt, asyncio.CancelledError)
"""What an awaited reward may raise: the last three would end the loop, and with it the rewards of all others."""
KNOWN_OF_ONE = ("question", "gold_boxes", "group")
KNOWN_OF_ALL = ("questions", "gold_boxes", "groups")
"""What else is known of rollouts, given to a function that has a parameter of that name."""


class TooSlow(Exception):
    """A call had no answer in its time; TimeoutError is what the called code may raise itself, for its own reasons."""


class CustomReward:
    """Calls a function with (trajectory, solution), which gives a finite number, or a mapping of named ones that are
    added up (`accuracy` among them is what groups are filtered by). The solution is a text, or a tuple of texts where
    the data lists several right answers. `question`, `gold_boxes` and `group` are given to a function that has
    parameters of these names.

    An `async` function is awaited for all rollouts of a step at once. One whose first parameter is `trajectories` gets
    lists (also as `questions`, `gold_boxes`, `groups`) and gives one, in `seconds` times their number. What raises,
    gives anything else or takes longer than `seconds` is tried `retries` times more, and then the reward of that
    rollout is failed, with the reason and, where the function's `file` is known, the line in it. Of the tries of a
    list the one counts that pays most rollouts, the last of several. All calls run in threads, where `signal` does not
    work.
    """

    def __init__(
        self, function: Callable[..., Any], *, seconds: float = 60.0, retries: int = 0, file: Path | None = None
    ) -> None:
        self.function = function
        self.seconds = seconds
        self.retries = retries
        self.file = file
        self._parameters = _parameters(function)
        self.takes_all = self._parameters[:1] == ["trajectories"]

    def __call__(self, rollouts: Sequence[Played]) -> list[Reward]:
        """The reward of each rollout."""
        if self.takes_all:
            return self._of_all(rollouts)
        if any(map(inspect.iscoroutinefunction, (self.function, type(self.function).__call__))):
            return self._awaited_of_all(rollouts)
        return self._in_turn(rollouts)

    def _in_turn(self, rollouts: Sequence[Played]) -> list[Reward]:
        rewards: list[Reward] = []
        num_hung = 0
        for one in rollouts:
            if num_hung == HUNG:
                error = TooSlow(f"not asked, since {HUNG} before took longer than {self.seconds:g} s")
                rewards.append(failed(error))
                continue
            reward, is_hung = self._of_one(one)
            rewards.append(reward)
            num_hung = num_hung + 1 if is_hung else 0
        return rewards

    def _of_one(self, one: Played) -> tuple[Reward, bool]:
        """The reward of a rollout, and whether the last try took too long."""
        failure: Exception | None = None
        for _ in range(1 + self.retries):
            try:
                return reward_of(within(partial(self._call, one), self.seconds)), False
            except Exception as error:
                failure = error
        return self._failed(failure), isinstance(failure, TooSlow)

    def _call(self, one: Played) -> Any:
        known = {name: getattr(one, name) for name in KNOWN_OF_ONE if name in self._parameters}
        return self.function(one.trajectory, one.solution, **known)

    def _failed(self, error: BaseException | None) -> Reward:
        """A failed reward that names the innermost line of the user's file, or that of the function itself."""
        if self.file is None:
            return failed(error)
        frames = traceback.extract_tb(error.__traceback__) if error else []
        own = [frame.lineno for frame in frames if Path(frame.filename) == self.file]
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        line = own[-1] if own else code and code.co_firstlineno
        return failed(error, f"{self.file.name}:{line}" if line else self.file.name)

    def _of_all(self, rollouts: Sequence[Played]) -> list[Reward]:
        tries: list[list[Reward]] = []
        for _ in range(1 + self.retries):
            tries.append(self._all_at_once(rollouts))
            if not num_failed(tries[-1]):
                break
        return min(reversed(tries), key=num_failed)

    def _all_at_once(self, rollouts: Sequence[Played]) -> list[Reward]:
        """One try of a function that takes all."""
        trajectories, solutions = [one.trajectory for one in rollouts], [one.solution for one in rollouts]
        columns = zip(KNOWN_OF_ALL, KNOWN_OF_ONE)
        known = {
            name: [getattr(one, of_one) for one in rollouts] for name, of_one in columns if name in self._parameters
        }

        def call() -> list[Any]:
            found = self.function(trajectories, solutions, **known)
            values = [*(asyncio.run(found) if inspect.iscoroutine(found) else found)]
            if len(values) != len(rollouts):
                raise ValueError(f"gave {len(values)} rewards for {len(rollouts)} trajectories")
            return values

        try:
            values = within(call, self.seconds * len(rollouts))
        except Exception as error:
            return [self._failed(error) for _ in rollouts]
        return [self._rewarded(value) for value in values]

    def _rewarded(self, value: Any) -> Reward:
        try:
            return reward_of(value)
        except Exception as error:
            return self._failed(error)

    def _awaited_of_all(self, rollouts: Sequence[Played]) -> list[Reward]:
        """In a loop of its own thread, since a notebook has one already; one that never awaits holds up the others."""
        limit = self.seconds * (1 + self.retries) * max(1, len(rollouts))
        try:
            return within(lambda: asyncio.run(self._at_once(rollouts)), limit + MARGIN_S)
        except Exception as error:
            return [self._failed(error) for _ in rollouts]

    async def _at_once(self, rollouts: Sequence[Played]) -> list[Reward]:
        return await asyncio.gather(*(self._awaited(one) for one in rollouts))

    async def _awaited(self, one: Played) -> Reward:
        failure: BaseException | None = None
        for _ in range(1 + self.retries):
            started = time.monotonic()
            try:
                async with asyncio.timeout(self.seconds) as limit:
                    value = await self._call(one)
                if time.monotonic() - started <= self.seconds:
                    return reward_of(value)
                failure = too_slow(self.seconds)  # it never awaited, or held on to what should have ended it
            except FAILURES as error:
                failure = too_slow(self.seconds) if limit.expired() else error
        return self._failed(failure)


def reward_of(value: Any) -> Reward:
    """What a function gave, as a reward. Raises TypeError and ValueError for what is none."""
    parts = value if isinstance(value, Mapping) else {}
    for name, number in parts.items() if parts else [("", value)]:
        where = f"{short(str(name))}: " if parts else ""
        if not isinstance(number, Real):
            raise TypeError(f"{where}returned {type(number).__name__}, not a number")
        if not math.isfinite(number):
            raise ValueError(f"{where}returned {float(number)}, not a finite number")
    if not parts:
        return Reward(total=float(value))
    numbers = {str(name): float(number) for name, number in parts.items()}
    if len(numbers) < len(parts):  # as 1 and "1" are
        raise ValueError(f"several parts are called alike: {', '.join(map(repr, parts))}")
    total = sum(numbers.values())
    if not math.isfinite(total):
        raise ValueError(f"the parts add up to {total}, not a finite number")
    return Reward(total=total, parts=numbers, raw=numbers)


def num_failed(rewards: Sequence[Reward]) -> int:
    return sum(reward.error is not None for reward in rewards)


def too_slow(seconds: float) -> TooSlow:
    return TooSlow(f"took longer than {seconds:g} s")


def within(call: Callable[[], Any], seconds: float) -> Any:
    """What a call gives, in a thread that is left behind when it takes longer.

    Raises TooSlow then, what the call raises, and RuntimeError in place of what would end the process.
    """
    told: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def work() -> None:
        try:
            told.put((call(), None))
        except BaseException as error:
            told.put((None, error))

    Thread(target=work, daemon=True).start()
    try:
        value, error = told.get(timeout=seconds)
    except Empty:
        raise too_slow(seconds) from None
    if error is None:
        return value
    if isinstance(error, Exception):
        raise error
    raise RuntimeError(f"raised {type(error).__name__}({error})")


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return [*inspect.signature(function).parameters]
    except (TypeError, ValueError):  # some built-in functions tell none
        return []


def load_function(path: Path, name: str) -> Callable[..., Any]:
    """The function of a Python file. Raises ConfigError when file or function cannot be used."""
    module_name = f"looktwice_user_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"reward file {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickling look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except SystemExit as error:
        del sys.modules[module_name]
        raise ConfigError(
            f"reward file {path} ends the program while it is imported ({error!r}); put what only a script does "
            'under if __name__ == "__main__":'
        ) from error
    except BaseException as error:  # pytest's Skipped and asyncio's CancelledError are no Exceptions
        del sys.modules[module_name]
        raise ConfigError(f"reward file {path} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise ConfigError(f'reward file {path} has no function "{name}".{nearest(name, functions)}')
    function = getattr(module, name)
    if not callable(function):
        raise ConfigError(f'"{name}" in reward file {path} is a {type(function).__name__}, not a function')
    return function
