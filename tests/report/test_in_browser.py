"""The pages in a headless browser: what they show, that nothing said runs, and how fast 2,000 rollouts open."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.report.test_evaluation_page import answer, write_own
from tests.report.test_run_page import GRPO, HOSTILE, run_folder
from tests.report.test_trajectory_page import rollout_of, write_step

from looktwice.processing.processor import Ovis2_5Processor
from looktwice.report.evaluation_page import write_evaluation_page
from looktwice.report.run_page import write_run_page
from looktwice.report.trajectory_page import write_trajectory_page

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as player:
        yield player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page without a network; at the end nothing may have gone wrong or been asked for."""
    wrong: list[str] = []
    contexts = []

    def begin(path: Path, size: dict[str, int] = DESKTOP) -> Any:
        context = browser.new_context(viewport=size, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append("a dialog"), dialog.dismiss()))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("requestfailed", lambda request: wrong.append(request.url[:80]))
        page.goto(path.as_uri())
        return page

    yield begin
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory, processor: Ovis2_5Processor, model_folder: Path) -> Path:
    """A page of 2,000 rollouts in 250 groups, each of which has a picture of its own; step 2 has one wrong rollout."""
    folder = tmp_path_factory.mktemp("rollouts")
    (folder / "final_model").symlink_to(model_folder)
    for step in (1, 2):
        lines = []
        for group in range(125):
            path = folder / f"{step}-{group}.png"
            Image.new("RGB", (160, 120), (group, 2 * group % 256, 100 * step)).save(path, compress_level=1)
            lines += [{**rollout_of(processor, path, group), "reward": place / 8} for place in range(8)]
        if step == 2:
            lines[5] |= {"text": "<answer>4</answer>", "calls": [], "reward": -1.0}
        write_step(folder, step, *lines)
    write_trajectory_page(folder / "page.html", [folder / "trajectories"])
    return folder / "page.html"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two runs."""
    folder = tmp_path_factory.mktemp("runs")
    write_run_page(folder / "page.html", [run_folder(folder / "a", GRPO), run_folder(folder / "b", GRPO)])
    return folder / "page.html"


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory, image: Image.Image) -> Path:
    """A page of two results on three questions, of which the second one's answers differ."""
    folder = tmp_path_factory.mktemp("evaluations")
    image.save(folder / "a.png")
    row = {"image_path": "a.png", "QnA": [{"Q": "Digit?", "A3": "<answer>7</answer>", "answer": "7"}]}
    (folder / "eval.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    for name, scores in {"first": (1.0, 0.0, 0.0), "second": (1.0, 1.0, 0.0)}.items():
        lines = [answer(f"{number}", score) for number, score in enumerate(scores, 1)]
        write_own(folder / f"{name}.jsonl", [*lines, answer("1", 0.0, "no_crop")], folder)
    write_evaluation_page(folder / "page.html", [folder / "first.jsonl", folder / "second.jsonl"])
    return folder / "page.html"


def test_2000_rollouts_open_in_less_than_three_seconds(rollouts: Path, open_page: Callable[..., Any]) -> None:
    assert rollouts.stat().st_size < 20_000_000
    seconds = []
    for _ in range(2):  # what else the machine does counts for nothing
        began = time.perf_counter()
        page = open_page(rollouts)
        page.wait_for_selector("article")
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 3
    assert page.inner_text("#count") == "2,000 of 2,000 rollouts, 1,999 right"
    assert page.locator("article").count() < 20  # the others are made when one comes to them


def test_more_rollouts_are_made_as_one_reads_on(rollouts: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(rollouts)
    before = page.locator("article").count()
    page.locator("article").last.scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    assert page.locator("article").count() > before


def test_rollouts_are_filtered_and_ordered(rollouts: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(rollouts)
    page.select_option("[name=verdict]", "wrong")
    assert page.inner_text("#count") == "1 of 2,000 rollouts, 0 right"
    assert "Step 2, group 1, rollout 6" in page.inner_text("article")
    page.select_option("[name=verdict]", "")
    page.select_option("[name=order]", "worst")
    assert "-1.000" in page.locator("article table").first.inner_text()
    page.fill("[name=least]", "0.875")
    assert page.inner_text("#count").startswith("250 of 2,000")
    page.select_option("[name=step]", "1")
    assert page.inner_text("#count").startswith("125 of 2,000")
    page.click("button[type=reset]")
    page.select_option("[name=calls]", "0")
    assert page.inner_text("#count").startswith("1 of 2,000")


def test_siblings_stand_side_by_side_and_text_is_coloured(rollouts: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(rollouts)
    page.select_option("[name=view]", "groups")
    sections = page.locator("article").first.locator(".siblings section")
    assert sections.count() == 8
    assert sections.nth(0).bounding_box()["y"] == sections.nth(1).bounding_box()["y"]
    colour = "getComputedStyle(document.querySelector('article .tk')).backgroundColor"
    plain = page.evaluate(colour)
    page.select_option("[name=colour]", "gap")
    assert page.evaluate(colour) != plain
    assert "probability 50 %, gap about" in page.locator("article .tk").first.get_attribute("title")


def test_what_a_model_said_is_text_and_never_runs(rollouts: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(rollouts)
    assert HOSTILE in page.locator("article").first.inner_text()
    assert page.locator("img[onerror]").count() == 0 and page.evaluate("typeof owned") == "undefined"


def test_a_script_that_got_in_would_not_run(runs: Path, browser: Any) -> None:
    other = runs.with_name("other.html")
    other.write_text(runs.read_text().replace("</body>", "<script>window.owned = 1</script></body>"))
    page = browser.new_page()
    page.goto(other.as_uri())
    assert page.evaluate("typeof owned") == "undefined" and page.evaluate("typeof Plotly") == "object"
    page.close()


def test_curves_are_drawn_and_told_on_hovering(runs: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(runs)
    chart = page.locator("figure", has_text="Loss").first
    lines = chart.locator(".scatterlayer path.js-line")
    lines.first.wait_for(state="attached")
    assert lines.count() == 2
    chart.locator(".nsewdrag").first.hover()
    page.locator(".hoverlayer text").first.wait_for()


def test_curves_are_smoothed_as_one_likes(runs: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(runs)
    page.locator(".scatterlayer").first.wait_for(state="attached")
    drawn = "JSON.stringify(document.querySelector('.plot').data[0].y)"
    assert page.evaluate(drawn) == "[0.1,0.2,0.30000000000000004]"
    page.select_option("#smoothing", "5")
    assert json.loads(page.evaluate(drawn)) == [pytest.approx(0.2)] * 3  # two values before and two after


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_page_fits_the_screen(
    size: dict[str, int], rollouts: Path, runs: Path, evaluations: Path, open_page: Callable[..., Any]
) -> None:
    for path in (rollouts, runs, evaluations):
        page = open_page(path, size)
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1"), path


def test_differences_stand_first_and_answers_are_filtered(evaluations: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(evaluations)
    heads = page.locator("article h2")
    assert [heads.nth(place).inner_text() for place in range(3)] == ["jsonl, 2, a", "jsonl, 3, b", "jsonl, 1, a"]
    assert HOSTILE in page.locator("article").first.inner_text()
    page.select_option("[name=verdict]", "differ")
    assert page.inner_text("#count") == "1 of 3 questions"
    page.select_option("[name=verdict]", label="only second right")
    assert page.inner_text("#count") == "1 of 3 questions"
    page.click("button[type=reset]")
    page.locator("article summary", has_text="controls").click()
    assert "without: a call is refused" in page.locator(".controls").inner_text()


def test_levels_of_gaps_are_told_as_they_were_reckoned(rollouts: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(rollouts)
    title = page.locator("article .tk").first.get_attribute("title")
    told = float(title.rpartition("about ")[2].removesuffix(" nats"))
    assert math.isclose(math.log10(told), math.log10(0.01), abs_tol=0.8)
