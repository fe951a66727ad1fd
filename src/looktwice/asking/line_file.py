"""A file of JSON lines that one process adds to and a later one goes on with: each is written at once and whole."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from looktwice.drafts import file_draft
from looktwice.errors import ConfigError

Add = Callable[[Mapping[str, Any]], None]
"""Writes one line more."""


class LineFile:
    """The file at `path`, which need not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def texts(self) -> Iterator[tuple[int, str]]:
        """The whole lines that are there, with their numbers from 1; half of one is none."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8", errors="surrogateescape") as file:
            for count, text in enumerate(file, 1):
                if not text.endswith("\n"):
                    return  # a process was killed while it wrote
                yield count, text

    @contextmanager
    def writing(self, kept: Callable[[], Iterable[Mapping[str, Any]]]) -> Iterator[Add]:
        """Adding lines, for this process alone. What stands there is first reduced to the lines of `kept`.

        Raises ConfigError when another process writes there.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = self._claimed()
        try:
            size = sum(len(f"{json.dumps(line)}\n") for line in kept())
            if size != os.fstat(descriptor).st_size:  # lines that are not kept, or half a line
                with file_draft(self.path) as draft, draft.open("w", encoding="utf-8") as file:
                    file.writelines(f"{json.dumps(line)}\n" for line in kept())
                os.close(descriptor)
                descriptor = self._claimed()
            yield lambda line: _write(descriptor, line)
        finally:
            os.close(descriptor)

    def check_free(self) -> None:
        """Raise ConfigError when another process writes there."""
        if self.path.exists():
            os.close(self._claimed())

    def _claimed(self) -> int:
        """The file, open at its end for this process alone."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ConfigError(f"{self.path}: another process is writing there; wait for it, or name another") from error
        return descriptor


def _write(descriptor: int, line: Mapping[str, Any]) -> None:
    os.write(descriptor, f"{json.dumps(line)}\n".encode())
