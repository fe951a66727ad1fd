"""The pages of `data show` and `data stats`, and the commands that write them."""

from __future__ import annotations

import base64
import io
import json
import re
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
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.report.data_page import write_samples_page
from looktwice.report.sample_view import ImageView, SampleView, view_file

CALL = "<tool_call>[0, 0, 48, 60]</tool_call>"
OTHER_CALL = "<tool_call>image 2 [60, 100, 110, 150]</tool_call>"


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


def page_of(tmp_path: Path, image: Image.Image, processor: Ovis2_5Processor, *rows: list[dict[str, object]]) -> Page:
    """The page of rows about one picture, each with these questions."""
    image.save(tmp_path / "b.png")
    lines = [json.dumps({"image_path": "b.png", "QnA": asked}) for asked in rows]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n")
    views = list(view_file(SampleFile(tmp_path / "b.jsonl", tmp_path), processor, ShowConfig(num_samples=9)))
    write_samples_page(tmp_path / "b.html", title="b.jsonl", lead="lead", views=views)
    return Page(tmp_path / "b.html")


# -- data show


def test_what_the_model_sees_stands_beside_the_picture_and_after_each_call(
    page: Page, views: list[SampleView], image: Image.Image
) -> None:
    whole, first, second = [one for turn in views[0].turns for one in turn.images]
    picture, *shown = [image_in(one["src"]) for one in page.of_tag("img")]
    assert picture.size == image.size
    for found, expected in zip(shown, (whole.image, first.image, second.image), strict=True):
        assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert len(page.of_class("crop")) == 2


def test_small_pictures_are_enlarged_with_hard_pixels_in_whole_steps(page: Page) -> None:
    shown = [(one["width"], one["height"], one["class"]) for one in page.of_tag("img")]
    # the overview of 96 x 80 three times as large, the picture of 160 x 120 as wide as that, crops of 48 x 48 twice
    assert shown == [("288", "216", "pixels"), ("288", "240", "pixels"), *[("96", "96", "pixels")] * 2]


def test_every_picture_says_in_words_what_it_shows(page: Page) -> None:
    assert [one["alt"] for one in page.of_tag("img")] == [
        "the whole picture, gold box, box of crop 1, 2",
        "the whole picture as the model sees it",
        *["the crop as the model sees it"] * 2,
    ]


def test_people_read_no_tags_and_no_box_twice(page: Page) -> None:
    said = page.text[page.text.index('<div class="said">') : page.text.index("<details>")]
    assert not re.search(r"&lt;/?(think|answer|tool_call)|im_start", said)
    assert said.count("[0, 0, 48, 60]") == 2  # two calls
    assert [text for _, text in page.of_class("thinking")] == ["1 < 2 & <b>", "dann"]
    assert [text for _, text in page.of_class("answer")] == ["谢"]


def test_a_box_that_is_cut_otherwise_than_it_is_written_is_told_with_both(
    tmp_path: Path, image: Image.Image, processor: Ovis2_5Processor
) -> None:
    page = page_of(tmp_path, image, processor, [{"Q": "Wo?", "A3": "<tool_call>[100.5, 0, 200, 60]</tool_call>"}])
    assert "crop 1: [100.5, 0, 200, 60], cut 100,0,160,60, 60 x 60, seen as" in page.text


def test_a_picture_stands_once_above_all_its_questions(
    tmp_path: Path, image: Image.Image, processor: Ovis2_5Processor
) -> None:
    asked = [
        {"Q": "One?", "A3": f"{CALL} a", "box": [10, 20, 50, 80]},
        {"Q": "Two?", "A3": f"{CALL} b <tool_call>[60, 0, 108, 60]</tool_call>", "box": [60, 0, 108, 60]},
    ]
    page = page_of(tmp_path, image, processor, asked)
    assert len(page.of_class("card")) == 1 and len(page.of_class("question")) == 2
    assert len(page.of_class("picture")) == 2 and len(page.of_class("crop")) == 3
    # crops are numbered by question, equal boxes drawn once
    labels = [text for tag, _, text in page.elements if tag == "b"]
    assert labels == ["1", "1.1, 2.1", "2", "2.2"]
    assert "crop 2.1: [0, 0, 48, 60]" in page.text


def test_each_picture_of_a_conversation_has_its_place_in_the_words(
    tmp_path: Path, image: Image.Image, processor: Ovis2_5Processor
) -> None:
    image.save(tmp_path / "a.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png")
    turns = [
        {"from": "human", "value": "<image> left, <image> right, <image> left again?"},
        {"from": "gpt", "value": "Yes."},
    ]
    row = {"id": "1", "image": ["a.png", "b.png", "a.png"], "conversations": turns}
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    views = list(view_file(SampleFile(tmp_path / "c.jsonl", tmp_path), processor, ShowConfig()))
    write_samples_page(tmp_path / "c.html", title="c", lead="", views=views)
    page = Page(tmp_path / "c.html")
    assert len(page.of_class("picture")) == 4
    # the one that is shown twice stands there once
    assert "picture 1, picture 3: " in page.text
    assert [text for _, text in page.of_class("chip")][:3] == ["picture 1", "picture 2", "picture 3"]
    assert [text for _, text in page.of_class("text")] == ["left,", "right,", "left again?", "Yes."]


def test_the_rows_of_a_page_are_numbered_whatever_pictures_their_boxes_are_of(
    tmp_path: Path, image: Image.Image, processor: Ovis2_5Processor
) -> None:
    page = page_of(tmp_path, image, processor, *([{"Q": "Wo?", "A3": CALL}] for _ in range(3)))
    assert [attributes["id"] for attributes, _ in page.of_class("card")] == ["row-1", "row-2", "row-3"]


def test_a_box_stands_on_the_picture_that_its_call_names(
    tmp_path: Path, image: Image.Image, processor: Ovis2_5Processor
) -> None:
    image.save(tmp_path / "a.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png")
    turns = [{"from": "human", "value": "<image><image>What?"}, {"from": "gpt", "value": f"{CALL} {OTHER_CALL}"}]
    row = {"id": "1", "image": ["a.png", "b.png"], "box": [10, 20, 50, 80], "conversations": turns}
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    views = list(view_file(SampleFile(tmp_path / "c.jsonl", tmp_path), processor, ShowConfig()))
    write_samples_page(tmp_path / "c.html", title="c", lead="", views=views)
    page = Page(tmp_path / "c.html")
    alts = [one["alt"] for one in page.of_tag("img") if "box" in one["alt"]]
    assert alts == ["the whole picture, gold box, box of crop 1", "the whole picture, box of crop 2"]
    assert "crop 2: image 2 [60, 100, 110, 150], 50 x 50, seen as" in page.text
    first, second = views[0].crops
    assert first.caption.startswith("crop 1 0,0-48,60 →")
    assert second.caption.startswith("crop 2 of picture 2 60,100-110,150 → 50x50,")


def test_many_samples_have_a_list_of_contents(
    tmp_path: Path, image: Image.Image, processor: Ovis2_5Processor, page: Page
) -> None:
    assert not page.of_tag("nav")
    many = page_of(tmp_path, image, processor, *[[{"Q": f"Number {number}?", "A3": "No."}] for number in range(4)])
    links = [(attributes["href"], text.strip()) for tag, attributes, text in many.elements if tag == "a"]
    assert [href for href, _ in links] == [f"#row-{number}" for number in range(1, 5)]
    assert [attributes["id"] for attributes in many.of_tag("article")] == [href[1:] for href, _ in links]
    assert "Number 3?</li>" in many.text


def test_a_picture_of_thousands_of_pixels_becomes_a_thumbnail(tmp_path: Path, processor: Ovis2_5Processor) -> None:
    large = Image.effect_noise((3000, 2000), 60).convert("RGB")
    page = page_of(tmp_path, large, processor, [{"Q": "Wo?", "A3": f"{CALL} a"}])
    thumbnail = page.of_tag("img")[0]
    assert image_in(thumbnail["src"]).size == (int(thumbnail["width"]), int(thumbnail["height"])) == (336, 224)
    assert len(page.text) < 150_000


def test_the_page_needs_nothing_else(page: Page) -> None:
    assert not page.of_tag("script") and not page.of_tag("link")
    assert "://" not in page.text and "url(" not in page.text


def test_calls_and_gold_box_stand_on_the_first_image_where_they_are(page: Page) -> None:
    gold, crop = [attributes for attributes, _ in page.of_class("mark")]
    assert "gold" in gold["class"] and "gold" not in crop["class"]
    # top, right, bottom, left: [10, 20, 50, 80] and [0, 0, 48, 60] of 160 x 120
    assert gold["style"] == "inset:16.67% 68.75% 33.33% 6.25%"
    assert crop["style"] == "inset:0.00% 70.00% 50.00% 0.00%"
    assert [text for tag, _, text in page.elements if tag == "b"] == ["1, 2"]


def test_boxes_have_a_white_halo_inside_and_outside(page: Page) -> None:
    rule = re.search(r"\.mark \{(.*?)\}", page.text)
    assert rule and "border: 3px solid" in rule[1]
    assert "outline: 2px solid #fff" in rule[1] and "box-shadow: inset 0 0 0 1.5px #fff" in rule[1]


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
    assert len(Page(tmp_path / "p.html").of_tag("img")) == 6


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
    assert f"{dataset.train}: format documented, 3 of 3 rows measured, picked from 6" in said
    assert "padding saved by packing" in said
    page = Page(tmp_path / "s.html")
    figures = [json.loads(text) for tag, kind, text in page.elements if kind.get("type") == "application/json"]
    assert [figure["data"][0]["type"] for figure in figures] == ["histogram", "bar", "scatter"]
    assert sum(figures[0]["data"][0]["y"]) == 6 and len(page.of_class("plot")) == 3


def test_stats_say_how_many_rows_were_measured_and_end_with_1_where_one_was_not(
    dataset: DatasetFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d.jsonl"
    good = dataset.train.read_text().splitlines()[0]
    lost = re.sub('"image_path": "[^"]*"', '"image_path": "absent.png"', good)
    path.write_text("\n".join([good, "{", lost, '{"image_path": "x", "QnA": []}']))
    words = ["data", "stats", str(path), "--model_name", "tiny", "--image_base_path", str(dataset.train.parent)]
    assert main([*words, "--html", str(tmp_path / "s.html")]) == 1
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == f"{path}: format documented, 1 of 4 rows measured"
    assert last == "3 of 4 rows could not be measured; `looktwice data check` says what is wrong with each"
    assert "1 of 4 rows measured" in Page(tmp_path / "s.html").text


def test_stats_of_a_set_without_any_image_say_so(
    dataset: DatasetFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "stats", str(dataset.train), "--model_name", "tiny", "--image_base_path", str(tmp_path)]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert "6 x a picture that cannot be opened" in captured.out
    assert "no sample could be measured" in captured.err
