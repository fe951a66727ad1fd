"""Files and folders that are written whole or not at all, at whatever instant the process is killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from looktwice import drafts
from looktwice.drafts import file_draft, folder_draft, settle_all

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "shutil.rmtree")


def killed_at_each_operation(work: Callable[[], None]) -> Iterator[int]:
    """Runs the work in processes of which the n-th is killed before its n-th operation on files, until one ends."""
    for number in range(1, 100):
        child = os.fork()
        if not child:
            left = number

            def count(event: str, _: object) -> None:
                nonlocal left
                if event in FILE_EVENTS and (left := left - 1) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            work()
            os.kill(os.getpid(), signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        yield number
        if os.WTERMSIG(status) == signal.SIGTERM:
            return
    pytest.fail("it never ends")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def save(folder: Path, text: str) -> None:
    with folder_draft(folder, is_replaced=lambda name: name in ("weights", "state")) as draft:
        (draft / "weights").write_text(text)
        if text == "old":
            (draft / "state").write_text(text)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_the_old_or_the_new_one_whenever_the_process_is_killed(can_exchange, tmp_path, monkeypatch) -> None:
    if not can_exchange:
        monkeypatch.setattr(drafts, "_exchange", lambda *_: False)
    folder, notes = tmp_path / "final_model", "mine"
    old, new = ({"notes": notes, "state": "old", "weights": "old"}, {"notes": notes, "weights": "new"})
    seen = []
    save(folder, "old")
    (folder / "notes").write_text(notes)
    for _ in killed_at_each_operation(lambda: save(folder, "new")):
        if not can_exchange:
            settle_all(tmp_path)  # as the next run does first
        assert contents(folder) in (old, new)
        seen.append(contents(folder))
        if seen[-1] == new:
            save(folder, "old")
            (folder / "notes").write_text(notes)
    assert old in seen and seen[-1] == new and len(seen) > 8
    assert [path.name for path in tmp_path.iterdir()] == ["final_model"]


def test_a_replacing_that_was_cut_in_two_is_ended_by_the_next_save(tmp_path) -> None:
    save(tmp_path / "model", "old")
    (tmp_path / "model" / "notes").write_text("mine")
    (tmp_path / "model").rename(tmp_path / ".model.replaced")
    save(tmp_path / "model", "new")
    assert contents(tmp_path / "model") == {"notes": "mine", "weights": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_is_the_old_or_the_new_one_whenever_the_process_is_killed(tmp_path) -> None:
    def work() -> None:
        with file_draft(tmp_path / "log") as draft:
            draft.write_text("new")

    (tmp_path / "log").write_text("old")
    seen = [(tmp_path / "log").read_text() for _ in killed_at_each_operation(work)]
    assert seen[0] == "old" and seen[-1] == "new" and set(seen) == {"old", "new"}


def test_what_fails_leaves_what_was_there(tmp_path) -> None:
    save(tmp_path / "model", "old")
    with pytest.raises(ZeroDivisionError), folder_draft(tmp_path / "model", is_replaced=lambda _: True) as draft:
        (draft / "weights").write_text("new")
        raise ZeroDivisionError
    assert contents(tmp_path / "model") == {"state": "old", "weights": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
