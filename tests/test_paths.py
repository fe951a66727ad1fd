"""Places that a user names: each that cannot be used is told with its mend."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from looktwice.errors import ConfigError, DataError, ImageError, LooktwiceError
from looktwice.paths import (
    check_data_file,
    check_image_folder,
    check_new_folder,
    check_output_file,
    check_run_folder,
    check_shown_file,
    check_target,
)


def test_a_target_is_found_bad_before_anything_is_written(tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    source.touch()
    with pytest.raises(DataError, match=r"d\.txt: end the name in"):
        check_target(tmp_path / "d.txt", source, overwrite=False)
    with pytest.raises(DataError, match=r"there is no folder .*none; make it"):
        check_target(tmp_path / "none" / "d.jsonl", source, overwrite=False)
    with pytest.raises(DataError, match=r"d\.jsonl: the file to read from; name another"):
        check_target(source, source, overwrite=True)
    check_target(tmp_path / "e.jsonl", tmp_path / "absent.jsonl", overwrite=False)
    with pytest.raises(DataError, match="something already; name another file, or replace it: --overwrite"):
        check_target(source, tmp_path / "absent.jsonl", overwrite=False)
    check_target(source, tmp_path / "absent.jsonl", overwrite=True)


def test_a_data_file_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").touch()
    check_data_file(tmp_path / "data.jsonl")
    with pytest.raises(
        DataError, match=r"dato\.jsonl: no such data file; check the path\. Did you mean \"data\.jsonl\""
    ):
        check_data_file(tmp_path / "dato.jsonl")
    with pytest.raises(DataError, match="a directory, not a data file"):
        check_data_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="a pipe or a device, not a data file"):
        check_data_file(tmp_path / "pipe")


def test_a_run_folder_is_one_or_can_become_one(tmp_path: Path) -> None:
    check_run_folder(tmp_path)
    check_run_folder(tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=r"cannot be made as a run folder \(.*file is no folder\); give another"):
            check_run_folder(place)


def test_a_new_folder_is_new_or_empty(tmp_path: Path) -> None:
    check_new_folder(tmp_path)
    check_new_folder(tmp_path / "new")
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="there is something already; give a new folder"):
            check_new_folder(place)


def test_a_result_is_written_over_no_file_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").touch()
    check_output_file(None, "--json")
    check_output_file(tmp_path / "new" / "r.json", "--json", [tmp_path / "d.jsonl", None])
    with pytest.raises(ConfigError, match=r"--json .*d\.jsonl: a file that is read; give another path"):
        check_output_file(tmp_path / "d.jsonl", "--json", [tmp_path / "d.jsonl"])
    with pytest.raises(ConfigError, match="--json .*: cannot be written; give another path"):
        check_output_file(tmp_path, "--json")


def test_a_shown_file_that_is_not_there_is_named_with_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "Cat.JPG").touch()
    check_shown_file(tmp_path / "Cat.JPG")
    with pytest.raises(ImageError, match=r"cat\.jpg: no such picture or video; write .*Cat\.JPG, which is there"):
        check_shown_file(tmp_path / "cat.jpg")
    with pytest.raises(ImageError, match="no such picture or video; check the path"):
        check_shown_file(tmp_path / "dog.jpg")


@pytest.mark.parametrize("name", ["x" * 8_000_000, "x" * 300, "a\0b", "a b\n" * 90_000])
def test_a_name_that_nothing_can_have_is_told_in_a_line(name: str) -> None:
    path = Path(f"{name}.jsonl")
    checks = (
        lambda: check_data_file(path),
        lambda: check_image_folder(path),
        lambda: check_shown_file(path),
        lambda: check_target(path, Path("d.jsonl"), overwrite=False),
        lambda: check_output_file(path, "--html"),
        lambda: check_run_folder(path),
        lambda: check_new_folder(path),
    )
    for check in checks:
        with pytest.raises(LooktwiceError) as caught:
            check()
        assert len(str(caught.value)) <= 700
        assert "\n" not in str(caught.value)
