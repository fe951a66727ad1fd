"""The pages of `data show` and `data stats`, and the commands that write them."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from looktwice.cli import main
from looktwice.config import ShowConfig
from looktwice.demo.task import DatasetFiles
from looktwice.formats.sample_file import SampleFile
from looktwice.geometry import Size
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.report.data_page import shown_width, write_samples_page
from looktwice.report.html import MAX_IMAGE_BYTES, image_uri
from looktwice.report.sample_view import ImageView, SampleView, view_file

CALL = "<tool_call>[0, 0, 48, 60]</tool_call>"


class Page(HTMLParser):
    """The elements of a page: (name, attributes, text up to the next tag)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str], str]] = []
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, ""))

    def handle_endtag(self, tag: str) -> None:
        self.elements.append(("", {}, ""))

    def handle_data(self, data: str) -> None:
        if self.elements:
            tag, attributes, text = self.elements[-1]
            self.elements[-1] = (tag, attributes, text + data)

    def of_class(self, name: str) -> list[tuple[dict[str, str], str]]:
        return [(attrs, text) for _, attrs, text in self.elements if name in attrs.get("class", "").split()]

    def of_tag(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes, _ in self.elements if tag == name]


def image_in(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


@pytest.fixture
def file(tmp_path: Path, image: Image.Image) -> SampleFile:
    image.save(tmp_path / "a.png")
    answer = f"<think>1 < 2 & <b> {CALL} dann {CALL}</think><answer>谢</answer>"
    good = {"image_path": "a.png", "QnA": [{"Q": "Wo?", "A3": answer, "box": [10, 20, 50, 80]}]}
    lost = {"image_path": "<gone>.png", "QnA": [{"Q": "Wo?", "A3": "da"}]}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(lost)}\n")
    return SampleFile(tmp_path / "a.jsonl", tmp_path)


@pytest.fixture
def views(file: SampleFile, processor: Ovis2_5Processor) -> list[SampleView]:
    return list(view_file(file, processor, ShowConfig()))


@pytest.fixture
def page(views: list[SampleView], tmp_path: Path) -> Page:
    write_samples_page(tmp_path / "new" / "p.html", title="a.jsonl", lead="lead", views=views)
    return Page(tmp_path / "new" / "p.html")


# -- data show


def test_every_image_and_crop_is_in_the_page_as_the_model_sees_it(page: Page, views: list[SampleView]) -> None:
    images = [image for turn in views[0].turns for image in turn.images]
    shown = page.of_tag("img")
    assert [image_in(one["src"]).size for one in shown] == [image.seen for image in images]
    assert np.array_equal(np.asarray(image_in(shown[0]["src"])), np.asarray(images[0].image))
    assert len(page.of_class("crop")) == 2


def test_the_page_needs_nothing_else(page: Page) -> None:
    assert not page.of_tag("script") and not page.of_tag("link")
    assert "http" not in page.text and "url(" not in page.text


def test_calls_and_gold_box_stand_on_the_first_image_where_they_are(page: Page) -> None:
    calls = [attributes for attributes, _ in page.of_class("call")]
    assert [(one["x"], one["y"], one["width"], one["height"]) for one in calls] == [("0", "0", "48", "60")] * 2
    [(gold, _)] = [one for one in page.of_class("gold") if "x" in one[0]]
    assert (float(gold["x"]), float(gold["y"]), float(gold["width"]), float(gold["height"])) == (10, 20, 40, 60)
    assert page.of_tag("svg")[0]["viewbox"] == "0 0 160 120"
    assert [text for _, text in page.of_class("number")] == ["1", "2"]


def test_tokens_joined_are_the_text_and_trained_ones_are_marked(page: Page, views: list[SampleView]) -> None:
    legend, tokens = page.of_class("token")[:4], page.of_class("token")[4:]
    assert [text for _, text in legend] == ["trai", "ned", "se", "en"]
    pieces = [part for turn in views[0].turns for part in turn.parts if not isinstance(part, ImageView)]
    assert [text for _, text in tokens] == [piece.shown for piece in pieces]
    assert [attributes["title"] for attributes, _ in tokens] == [" ".join(map(str, piece.ids)) for piece in pieces]
    assert ["trained" in attributes["class"] for attributes, _ in tokens] == [piece.is_trained for piece in pieces]


def test_neighbouring_tokens_have_different_shades(page: Page) -> None:
    shades = ["odd" in attributes["class"].split() for attributes, _ in page.of_class("token")]
    assert all(one != other for one, other in pairwise(shades[-6:]))


def test_a_sample_that_cannot_be_trained_stands_there_with_its_reason(page: Page) -> None:
    [(_, problem)] = page.of_class("problem")
    assert "<gone>.png: no such picture" in problem


@pytest.mark.parametrize("mode", ["noise", "plain"])
def test_an_image_in_a_page_is_limited_in_bytes(mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (896, 896, 3), dtype=np.uint8)
    uri = image_uri(Image.fromarray(pixels) if mode == "noise" else Image.new("RGB", (896, 896), "red"))
    assert len(base64.b64decode(uri.partition(",")[2])) <= MAX_IMAGE_BYTES
    assert uri.startswith(f"data:image/{'jpeg' if mode == 'noise' else 'png'};base64,")
    assert image_in(uri).size == ((448, 448) if mode == "noise" else (896, 896))


@pytest.mark.parametrize(
    ("seen", "is_crop", "width"),
    [
        (Size(400, 300), False, 400),
        (Size(960, 480), False, 480),
        (Size(440, 880), False, 220),
        (Size(96, 96), False, 240),
        (Size(48, 48), True, 96),
        (Size(512, 256), True, 288),
        (Size(32, 3200), False, 4),
        (Size(16, 16000), True, 1),
    ],
)
def test_images_are_fitted_to_the_page(seen: Size, is_crop: bool, width: int) -> None:
    rectangle = (0, 0, 1, 1) if is_crop else None
    image = Image.new("RGB", seen)
    view = ImageView(number=1, original=seen, rectangle=rectangle, num_tokens=3, image=image)
    assert shown_width(view) == width


# -- the commands


def test_show_prints_samples_and_writes_the_page(
    dataset: DatasetFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "show", str(dataset.train), "-n", "2", "--model_name", "tiny"]
    folder = ["--image_base_path", str(dataset.train.parent), "--html", str(tmp_path / "p.html")]
    assert main([*words, *folder]) == 0
    said = capsys.readouterr().out
    assert f"{dataset.train}: format documented" in said.splitlines()[0]
    assert said.count("% of the tokens are trained") == 2
    assert len(Page(tmp_path / "p.html").of_tag("img")) == 4


def test_show_refuses_a_row_and_a_seed_together(dataset: DatasetFiles, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(dataset.train), "--row", "1", "--seed", "2", "--model_name", "tiny"]) == 1
    assert "--row names a row and --seed picks at random; give one of them" in capsys.readouterr().err


def test_stats_prints_tables_and_writes_the_page(
    dataset: DatasetFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "stats", str(dataset.train), str(dataset.eval), "--model_name", "tiny", "--sample", "3"]
    folder = ["--image_base_path", str(dataset.train.parent), "--html", str(tmp_path / "s.html")]
    assert main([*words, *folder]) == 0
    said = capsys.readouterr().out
    assert f"{dataset.train}: format documented, 3 of 6 rows" in said
    assert "padding saved by packing" in said
    page = Page(tmp_path / "s.html")
    assert len(page.of_tag("svg")) == 3 and page.of_tag("rect") and page.of_tag("circle")
    assert "http" not in page.text


def test_stats_of_a_set_without_any_image_say_so(
    dataset: DatasetFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "stats", str(dataset.train), "--model_name", "tiny", "--image_base_path", str(tmp_path)]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert "6 x a picture that cannot be opened" in captured.out
    assert "no sample could be measured" in captured.err
