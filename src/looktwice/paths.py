"""Places that a user names: what is wrong with one is told before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from looktwice.errors import ConfigError, DataError, ImageError, nearest, short_path
from looktwice.neighbours import nearby

KINDS = (".jsonl", ".json", ".parquet")
COMPRESSIONS = (".gz", ".zst")


def expanded(value: Any) -> Any:
    """The text of a path, or of another name that may be one, with `~` as the user's home; other values stay."""
    return os.path.expanduser(value) if isinstance(value, (str, os.PathLike)) else value


def place(text: str) -> Path:
    """A path that a user writes on the command line."""
    return Path(expanded(text))


def check_data_file(path: Path) -> None:
    """Raise DataError, naming the nearest file beside it, when there is no file to read rows from."""
    if not os.path.exists(path):
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such data file; check the path.{nearest(path.name, siblings)}")
    if path.is_dir():
        raise DataError(f"{path}: a directory, not a data file; name a .jsonl file in it")
    if not path.is_file():
        raise DataError(f"{path}: a pipe or a device, not a data file; write its rows into a file first")


def check_image_folder(path: Path) -> None:
    """Raise ConfigError when there is no folder of pictures."""
    if not os.path.isdir(path):
        raise ConfigError(f"--image_base_path {path}: no such folder; name the one of the pictures")


def check_shown_file(path: Path) -> None:
    """Raise ImageError when there is no file to show, whatever it holds."""
    if not os.path.exists(path):
        raise ImageError(f"{short_path(path)}: no such picture or video; {nearby(path) or 'check the path'}", "missing")
    if path.is_dir():
        raise ImageError(f"{path}: a folder, not a picture or video; name the file", "missing")


def write_result(path: Path, text: str) -> None:
    """Write a text as UTF-8, in a new folder if need be. Raises ConfigError when it cannot be written.

    Half letters, as in file names that are no UTF-8, are written as JSON writes them.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); make room, or give another path") from error


def append_line(path: Path, line: str) -> None:
    """Add a line to a log of a run. Raises ConfigError when it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); make room, then go on with --resume"
        ) from error


def kind_of_name(path: Path) -> tuple[str, str]:
    """Kind and compression of a data file to be written, as its name ends. Raises DataError for another name."""
    name = path.name.lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    kind = Path(name.removesuffix(compression)).suffix
    if kind not in KINDS or (kind == ".parquet" and compression):
        raise DataError(f"{path}: end the name in .parquet, or in .jsonl or .json, these also with .gz or .zst")
    return kind, compression


def check_target(target: Path, source: Path, *, overwrite: bool) -> None:
    """Raise DataError when a data file could not be written there, or would be written over the one that is read, or
    over another one without `overwrite`."""
    kind_of_name(target)
    check_name(target, str(target))
    if not target.absolute().parent.is_dir():
        raise DataError(f"{target}: there is no folder {target.parent}; make it, or name another place")
    if target.exists() and source.exists() and target.samefile(source):
        raise DataError(f"{target}: the file to read from; name another one to write to")
    if os.path.lexists(target) and not overwrite:
        raise DataError(f"{target}: there is something already; name another file, or replace it: --overwrite")


def check_name(path: Path, subject: str) -> None:
    """Raise ConfigError for a name that nothing can have, such as one that is too long."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{subject}: no name for a file or folder ({reason}); give another one") from error


def check_output_file(path: Path | None, flag: str, inputs: Iterable[Path | None] = ()) -> None:
    """Make sure that a result can be written there, and over no file that is read. Raises ConfigError when not."""
    if path is None:
        return
    check_name(path, f"{flag} {path}")
    is_there = os.path.exists(path)  # of a name that is too long Path.exists raises an error
    if is_there and any(one and os.path.exists(one) and one.samefile(path) for one in inputs):
        raise ConfigError(f"{flag} {path}: a file that is read; give another path")
    folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if os.path.isdir(path) or not folder.is_dir() or not os.access(path if is_there else folder, os.W_OK):
        raise ConfigError(f"{flag} {path}: cannot be written; give another path")


def check_letters(path: str | Path) -> None:
    """Raise ConfigError for a name that is not UTF-8, which libraries of weights cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{path}: the name is not UTF-8; rename it, or give another path") from error


def check_run_folder(folder: Path) -> None:
    """Raise ConfigError when a run cannot write there. Nothing is made yet."""
    check_name(folder, str(folder))
    check_letters(folder)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = f"{there} is no folder" if not there.is_dir() else f"no right to write in {there}"
        raise ConfigError(f"{folder}: cannot be made as a run folder ({reason}); give another one")


def check_new_folder(folder: Path, *, otherwise: str = "") -> None:
    """Raise ConfigError when there is something already; `otherwise` is what else a user can do."""
    check_name(folder, str(folder))
    check_letters(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: there is something already; give a new folder{otherwise}")
