"""A file that is not there is found under a neighbouring spelling."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from looktwice.neighbours import nearby

ACCENTED = "caf\u00e9.png"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder; pictures are below `data/images`."""
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    for name in ("cat.JPG", "a b.png", "x&y.png", " led.png", unicodedata.normalize("NFD", ACCENTED), "dog.webp"):
        (images / name).touch()
    (images / "Sub").mkdir()
    (images / "Sub" / "x.png").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("written", "there", "how"),
    [
        ("data/images/cat.jpg", "data/images/cat.JPG", "in another spelling"),
        ("data/images/CAT.jpeg", "data/images/cat.JPG", "in another spelling"),
        ("data/images/dog.jpg", "data/images/dog.webp", "in another spelling"),
        ("data/images/cat", "data/images/cat.JPG", "in another spelling"),
        ("Data/IMAGES/sub/X.png", "data/images/Sub/x.png", "in another spelling"),
        (f"data/images/{ACCENTED}", ascii(f"data/images/{unicodedata.normalize('NFD', ACCENTED)}"), "in another"),
        ("data/images/led.png", "'data/images/ led.png'", "in another spelling"),
        ("data/images/cat.JPG \n", "data/images/cat.JPG", "in another spelling"),
        ('"data/images/cat.JPG"', "data/images/cat.JPG", "without blanks or quotes at the ends"),
        ("data\\images\\Sub\\x.png", "data/images/Sub/x.png", "with / for \\"),
        ("data/images/a%20b.png", "data/images/a b.png", "without escapes"),
        ("data/images/x&amp;y.png", "data/images/x&y.png", "without escapes"),
        ("data/images/dog.webp?size=9#top", "data/images/dog.webp", "without what stands behind ? or #"),
        ("data/images/images/cat.JPG", "data/images/cat.JPG", "with a folder named once"),
        ("data/images/data/images/cat.JPG", "data/images/cat.JPG", "with a folder named once"),
        ("/data/images/cat.JPG", "data/images/cat.JPG", "taken from "),
        ("/home/me/project/data/images/cat.JPG", "data/images/cat.JPG", "taken from "),
        ("elsewhere/data/images/cat.JPG", "data/images/cat.JPG", "taken from "),
    ],
)
def test_a_file_under_a_neighbouring_spelling_is_named(written: str, there: str, how: str, folder: Path) -> None:
    mend = nearby(written)
    assert mend.startswith(f"write {there}, which is there ({how}")
    assert "\n" not in mend


def test_a_path_from_the_root_is_looked_for_in_the_folder_of_pictures(folder: Path) -> None:
    assert nearby("/Sub/x.png", folder / "data/images").startswith("write data/images/Sub/x.png, which is there")
    assert nearby("/Sub/x.png") == ""
    assert "with / for" in nearby("data/images/C:\\pics\\cat.jpg", folder / "data/images")


@pytest.mark.parametrize("written", ["data/images/cow.jpg", "none/at/all.png", "", ".", "/", "x" * 3000, "a\0b", "\\"])
def test_where_there_is_no_neighbour_nothing_is_said(written: str, folder: Path) -> None:
    assert nearby(written) == ""


def test_a_link_that_leads_nowhere_and_a_web_address_are_named(folder: Path) -> None:
    (folder / "annexed.jpg").symlink_to(".git/annex/objects/xy")
    assert nearby("annexed.jpg") == "it is a link to .git/annex/objects/xy, which is not there; copy the file itself"
    assert "looks like a web address" in nearby("base/www.example.com/a.png")


def test_a_text_that_is_too_long_for_a_path_is_told_to_be_one() -> None:
    assert nearby("x" * 9000) == "no path has 9,000 letters, and no picture begins so in base64; write either"


def test_a_folder_that_was_changed_is_read_again(folder: Path) -> None:
    assert nearby("data/images/new.png") == ""
    (folder / "data/images/NEW.png").touch()
    os.utime(folder / "data/images", (0, 0))
    assert "data/images/NEW.png" in nearby("data/images/new.png")


def test_a_path_of_hundreds_of_folders_is_not_searched_for() -> None:
    assert list(nearby("a/" * 1500 + "x.png")) == []
