"""The page in a headless browser: upload, ask, see where the model looks, stop, ask again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

CALL = "<tool_call>red tile [20, 30, 100, 90]</tool_call>"
LOOKS = f"<think>\nLeft. {CALL}It says 3.\n</think>\n\n<answer>3</answer><|im_end|>"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as player:
        yield player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture
def open_page(browser, tmp_path: Path, image: Image.Image) -> Iterator[Callable]:
    """Opens the page of a running server; at the end nothing may have gone wrong in it."""
    image.save(tmp_path / "it's.png")
    wrong: list[str] = []
    contexts = []

    def begin(running, size: dict[str, int] = DESKTOP, key: str = ""):
        context = browser.new_context(viewport=size, reduced_motion="reduce")
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(running.url)
        if key:
            until(page, "document.querySelector('#served').textContent.includes('wants an API key')")
            page.fill("[name=key]", key)
            page.press("[name=key]", "Tab")
        page.wait_for_selector("[name=model] option", state="attached")
        return page

    yield begin
    for context in contexts:
        context.close()
    assert wrong == []


def until(page, condition: str) -> None:
    """Wait until this JavaScript is true; the browser's own way needs `eval`, which the page forbids."""
    for _ in range(400):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"{condition} did not come true")


def ask(page, question: str, picture: Path | None = None) -> None:
    if picture is not None:
        page.set_input_files("#files", picture)
        page.wait_for_selector("#shown img")
    page.fill("#question", question)
    page.press("#question", "Enter")


def wait_for_end(page, count: int = 1) -> None:
    until(page, f"document.querySelectorAll('.actions:not([hidden])').length == {count}")
    page.wait_for_selector("#stop:disabled")


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_a_question_shows_where_the_model_looks_and_what_it_says(play, open_page, tmp_path: Path, size) -> None:
    with play(LOOKS) as running:
        page = open_page(running, size)
        ask(page, "What does it say?", tmp_path / "it's.png")
        wait_for_end(page)
        frame, mark = page.locator(".frame").bounding_box(), page.locator(".mark").bounding_box()
        assert page.inner_text(".answer") == "3"
        assert page.text_content(".thinking p") == "Left. It says 3." and not page.is_visible(".thinking p")
        assert page.inner_text(".crops li") == "1: red tile [20, 30, 100, 90]"
        assert page.evaluate("document.querySelector('.crops img').naturalWidth") == 80
        # 20, 30, 100, 90 of 160 x 120 pixels
        assert mark["x"] - frame["x"] == pytest.approx(20 / 160 * frame["width"], abs=1.5)
        assert mark["height"] == pytest.approx(60 / 120 * frame["height"], abs=1.5)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_an_answer_is_stopped_by_a_key_and_asked_again(play, open_page) -> None:
    with play(LOOKS, delay_s=0.05) as running:
        page = open_page(running)
        ask(page, "What does it say?")
        until(page, "document.querySelector('.thinking p').textContent.includes('Left')")
        page.keyboard.press("Escape")
        wait_for_end(page)
        assert page.inner_text(".state") == "stopped" and page.inner_text(".answer") == ""
        running.engine.delay_s = 0
        page.click(".again")
        until(page, "document.querySelector('.answer').textContent == '3'")
        wait_for_end(page)
        assert not running.engine.live
        assert page.inner_text(".crops li").startswith("1: refused")  # there is no picture


def test_two_models_answer_side_by_side_and_a_conversation_goes_on(play, open_page, tmp_path: Path) -> None:
    bodies: list[dict] = []
    with play(LOOKS) as running:
        models = running.service.models
        models.known["second"] = replace(models.default, name="second")
        page = open_page(running)
        page.on("request", lambda request: bodies.append(json.loads(request.post_data)) if request.post_data else None)
        page.select_option("[name=other]", "second")
        page.fill("[name=seed]", "7")
        ask(page, "What does it say?", tmp_path / "it's.png")
        wait_for_end(page, 2)
        assert page.locator(".panel h3").all_inner_texts() == ["tiny", "second"]
        left, right = page.evaluate(
            "[...document.querySelectorAll('.panel')].map(one => [one.offsetTop, one.offsetLeft])"
        )
        assert left[0] == right[0] and left[1] < right[1]
        page.select_option("[name=other]", "")
        ask(page, "And now?")
        wait_for_end(page, 3)
        page.click(".turn:last-child .json")
        until(page, "document.querySelector('.turn:last-child .state').textContent == 'copied'")
        copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert [body["model"] for body in bodies] == ["tiny", "second", "tiny"]
    assert [message["role"] for message in bodies[-1]["messages"]] == ["user", "assistant", "user"]
    assert bodies[-1]["messages"][1]["content"] == "3" and bodies[-1]["seed"] == 7
    assert copied["content"] == "3" and copied["crops"][0]["box"] == [20, 30, 100, 90]


def test_what_a_model_writes_is_text_and_nothing_else(play, open_page) -> None:
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    with play(f"<think>\n{hostile}\n</think>\n\n<answer>{hostile}</answer><|im_end|>") as running:
        page = open_page(running)
        page.on("dialog", lambda dialog: pytest.fail("a script ran"))
        ask(page, f"{hostile}?")
        wait_for_end(page)
        assert page.inner_text(".answer") == hostile and page.inner_text(".asked") == f"{hostile}?"
        assert page.locator("#thread img, #thread script").count() == 0


def test_a_server_with_keys_asks_for_one(play, open_page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOKTWICE_API_KEY", "secret")
    with play(LOOKS) as running:
        page = open_page(running, key="secret")
        ask(page, "What does it say?")
        wait_for_end(page)
        assert page.inner_text(".answer") == "3"
        page.click(".curl")
        until(page, "document.querySelector('.state').textContent == 'copied'")
        command = page.evaluate("navigator.clipboard.readText()")
    assert "$LOOKTWICE_API_KEY" in command and "secret" not in command


def test_history_leads_back_to_an_earlier_conversation(play, open_page) -> None:
    with play(LOOKS) as running:
        page = open_page(running)
        for number, question in enumerate(("First?", "Second?"), 1):
            ask(page, question)
            wait_for_end(page, number)
            page.click("#new")
        assert page.locator("#history button").all_inner_texts() == ["Second?", "First?"]
        assert page.is_visible("#empty") and not page.is_visible(".turn")
        page.click("#history button:has-text('First?')")
        assert page.locator(".turn:visible .asked").all_inner_texts() == ["First?"]
