"""Pictures of requests: how large they may be, and that nothing outside the served folder is read."""

from __future__ import annotations

import os
from base64 import b64decode
from pathlib import Path

import openai
import pytest
from PIL import Image
from tests.server.conftest import url_of

from looktwice.server.refusal import Refusal
from looktwice.server.shown_images import ImageRules, Pixels, file_below, shown_image

RULES = ImageRules(max_bytes=10_000, max_pixels=10_000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "inside"
    (inside / "deep").mkdir(parents=True)
    Image.new("RGB", (20, 10), "red").save(inside / "deep" / "red.png")
    (tmp_path / "secret.png").write_bytes((inside / "deep" / "red.png").read_bytes())
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "loop.png").symlink_to(inside / "loop.png")
    (inside / "up").symlink_to(tmp_path)
    os.mkfifo(inside / "pipe.png")
    return inside


@pytest.mark.parametrize("name", ["deep/red.png", "./deep/../deep/red.png", "file://deep/red.png", "deep/r%65d.png"])
def test_a_file_of_the_folder_is_shown(folder, name) -> None:
    name = name if name.startswith("file://") or "%" not in name else f"file://{name}"
    rules = ImageRules(max_bytes=10_000, max_pixels=10_000, folder=folder)
    assert shown_image(name, rules).size == (20, 10)


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "link.png", "up/secret.png", "loop.png", "pipe.png", "deep", ".", "", "/etc/passwd", "none.png"]
    + ["deep/../../secret.png", "a\0b", "x" * 5000, "/proc/self/environ"],
)
def test_nothing_else_is_read_and_all_is_refused_in_the_same_words(folder, name) -> None:
    with pytest.raises(Refusal, match="no such picture file in the served folder"):
        file_below(folder, name, max_bytes=10_000)


def test_a_file_that_is_too_large_is_refused(folder) -> None:
    with pytest.raises(Refusal, match="larger than 10 bytes"):
        file_below(folder, "deep/red.png", max_bytes=10)


@pytest.mark.parametrize(
    "url, code",
    [
        ("http://example.org/a.png", "no_http"),
        ("HTTPS://example.org/a.png", "no_http"),
        ("file:///etc/passwd", "no_files"),
        ("/etc/passwd", "no_files"),
        ("data:image/png;base64,####", "invalid_image"),
        ("data:text/plain;base64,aGVsbG8=", "invalid_image"),
        ("data:,", "invalid_image"),
    ],
)
def test_what_may_not_be_shown_is_refused(url, code) -> None:
    with pytest.raises(Refusal) as refusal:
        shown_image(url, RULES)
    assert refusal.value.code == code


def test_a_picture_is_measured_before_it_is_decoded(monkeypatch) -> None:
    url = url_of(Image.new("1", (1000, 500)))
    monkeypatch.setattr("looktwice.server.shown_images.open_image", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(Refusal, match="1000x500 pixels"):
        shown_image(url, RULES)


def test_a_picture_of_the_web_is_fetched_where_that_is_allowed(play, image, monkeypatch) -> None:
    raw = b64decode(url_of(image).partition(",")[2])
    fetched: list[str] = []

    def fetch(url: str, *, max_bytes: int) -> bytes:
        fetched.append(url)
        return raw

    monkeypatch.setattr("looktwice.server.shown_images.fetch", fetch)
    shown = {"type": "image_url", "image_url": {"url": "https://public.example/a.png"}}
    asked = {"model": "tiny", "messages": [{"role": "user", "content": [shown, {"type": "text", "text": "What?"}]}]}
    with play("Red.<|im_end|>", allow_http=True) as running:
        told = running.client.chat.completions.create(**asked)
    assert told.choices[0].looktwice["picture"]["original"] == [160, 120]
    assert fetched == ["https://public.example/a.png"]
    with play("Red.<|im_end|>") as running, pytest.raises(openai.BadRequestError, match="--allow_http"):
        running.client.chat.completions.create(**asked)


def test_a_request_with_too_many_pictures_is_refused(tiny, image) -> None:
    shown = {"type": "image_url", "image_url": {"url": url_of(image)}}
    with pytest.raises(openai.BadRequestError, match="4 pictures, more than 3"):
        tiny.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [shown] * 4}])


def test_decoded_pixels_are_bounded_for_a_request_and_for_all() -> None:
    pixels = Pixels(10)
    pixels.take(40, of_request=0)
    with pytest.raises(Refusal, match="more than 40 pixels together"):
        pixels.take(1, of_request=40)
    for _ in range(3):
        pixels.take(40, of_request=0)
    with pytest.raises(Refusal, match="too many pictures are shown at a time") as refused:
        pixels.take(1, of_request=0)
    assert refused.value.status == 429
    pixels.give_back(40)
    pixels.take(40, of_request=0)
