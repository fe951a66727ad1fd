"""What is written whole or not at all: a draft beside its place, which takes that place in one step.

A process that is killed at any instant, or a disk that fills up, leaves what was there before or what was to come.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished"
"""How the name of a file or a folder ends that is still being written; it begins with a dot."""
REPLACED = ".replaced"
"""How the name of a folder ends that another takes the place of, where the two cannot be exchanged in one step."""
AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Source: renameat2(2) of Linux."""
CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


@contextmanager
def file_draft(path: Path) -> Iterator[Path]:
    """A place beside `path`: the file that is written there becomes `path` when the block ends.

    Raises OSError when it cannot be written; what was at `path` before is then still there.
    """
    draft = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        yield draft
        _flush(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def folder_draft(folder: Path, *, is_replaced: Callable[[str], bool]) -> Iterator[Path]:
    """An empty hidden folder beside `folder`, which becomes `folder` when the block ends.

    Of a folder that is there, what `is_replaced` says no of by its name goes along, unless the draft has its own.
    Raises OSError when it cannot be written; what was in `folder` before is then still there.
    """
    folder = folder.absolute()
    draft = folder.with_name(f".{folder.name}{UNFINISHED}")
    try:
        settle(folder)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        if folder.exists():
            for path in folder.iterdir():
                if not (is_replaced(path.name) or (draft / path.name).exists()):
                    _copy(path, draft / path.name)
        for path in (*draft.rglob("*"), draft):
            _flush(path)
        _replace(folder, draft)
        _flush(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def settle(folder: Path) -> None:
    """End the replacing of a folder where a process was killed between its two steps."""
    replaced = folder.with_name(f".{folder.name}{REPLACED}")
    if not replaced.exists():
        return
    if folder.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(folder)


def settle_all(parent: Path) -> None:
    """`settle` for every folder in `parent`."""
    for replaced in parent.glob(f".*{REPLACED}"):
        settle(parent / replaced.name.removeprefix(".").removesuffix(REPLACED))


def _replace(folder: Path, draft: Path) -> None:
    if not folder.exists():
        draft.rename(folder)
    elif not _exchange(folder, draft):
        replaced = folder.with_name(f".{folder.name}{REPLACED}")
        folder.rename(replaced)
        draft.rename(folder)
        shutil.rmtree(replaced)


def _exchange(one: Path, other: Path) -> bool:
    """Give two folders each other's names at once; False where system or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one))


def _copy(path: Path, place: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, place, symlinks=True)
    else:
        shutil.copy2(path, place, follow_symlinks=False)


def _flush(path: Path) -> None:
    """Have the disk hold what was written, or a power failure would leave a whole name for half a file."""
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without
            raise
    finally:
        os.close(descriptor)
