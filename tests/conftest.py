"""Shared fixtures: a fresh tiny model of the real architecture, saved once, a small data set, a scripted engine."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pty
import select
import signal
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from looktwice.demo.task import DatasetFiles, make_dataset
from looktwice.demo.tiny import build_config, build_model, build_processor, build_tokenizer
from looktwice.engine.interface import Continuation, Driver, Request, Segment
from looktwice.engine.sampling import Sampling
from looktwice.messages import question_about
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.rollout.episode import Episode, EpisodeRules, play, start_episodes

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """Ctrl-C as in a terminal, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def plain_console() -> Iterator[None]:
    """What a terminal or a continuous integration sets is no matter of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Callable[[], str]]]:
    """Makes stderr a terminal of 80 columns, and gives a function that gives what was written to it since."""
    read_end, write_end = pty.openpty()
    termios.tcsetwinsize(write_end, (24, 80))
    with os.fdopen(read_end, "rb", buffering=0) as screen, os.fdopen(write_end, "w") as stream:

        def written() -> str:
            stream.flush()
            text = b""
            while select.select([screen], [], [], 0)[0]:
                text += screen.read(65536)
            return text.decode()

        def open_it() -> Callable[[], str]:
            # in the test, since pytest sets stderr anew after the fixtures
            monkeypatch.setattr(sys, "stderr", stream)
            monkeypatch.setenv("COLUMNS", "80")  # rich asks descriptor 2
            monkeypatch.setenv("TERM", "xterm-256color")
            return written

        yield open_it


@pytest.fixture(scope="session")
def processor() -> Ovis2_5Processor:
    tokenizer = build_tokenizer()
    return build_processor(tokenizer, build_config(tokenizer))


@pytest.fixture(scope="session")
def model(processor: Ovis2_5Processor) -> Ovis2_5ForConditionalGeneration:
    """Random weights; tests must not change them."""
    return build_model(processor.config, seed=0).eval()


@pytest.fixture(scope="session")
def model_folder(
    model: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetFiles:
    return make_dataset(tmp_path_factory.mktemp("dataset"), num_train=6, num_rl=4, num_eval=4, seed=0)


@pytest.fixture(scope="session")
def image() -> Image.Image:
    """160 x 120 pixels of noise: every region differs from every other."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8))


class ScriptedEngine:
    """Plays written texts, one a rollout, as an engine would sample them: up to a stop id or the length limit.

    The text goes on after each decision, whatever was inserted. `continuations` are the decisions, by rollout. The
    logprob of the n-th id of a rollout is -n / 1000, that of the drawn distribution -n / 500.
    """

    def __init__(self, processor: Ovis2_5Processor, scripts: Sequence[str]) -> None:
        template = processor.template
        self.scripts = [processor.tokenizer.encode(script, add_special_tokens=False) for script in scripts]
        self.stop_ids = {template.token_id("</tool_call>"), *processor.end_ids}
        self.requests: list[Request] = []
        self.continuations: list[list[Continuation | None]] = [[] for _ in scripts]

    def run(self, requests: Sequence[Request]) -> None:
        self.requests += requests
        numbers = count()
        for request in requests:
            for driver in request.drivers:
                self._play(next(numbers), request.max_new_tokens, driver)

    def _play(self, number: int, budget: int, driver: Driver) -> None:
        script, place = self.scripts[number], 0
        while True:
            first = place
            while place < first + budget and not (place > first and script[place - 1] in self.stop_ids):
                assert place < len(script), "the script ended before the rollout did"
                place += 1
            ids = script[first:place]
            logprobs = [-n / 1000 for n in range(first, place)]
            drawn_logprobs = [-n / 500 for n in range(first, place)]
            for token, logprob in zip(ids, logprobs):
                driver.hear(token, logprob)
            stop = "stop_id" if ids[-1] in self.stop_ids else "length"
            step = driver.respond(Segment(ids=ids, logprobs=logprobs, drawn_logprobs=drawn_logprobs, stop=stop))
            self.continuations[number].append(step)
            if step is None:
                return
            budget = step.max_new_tokens


PlayScripts = Callable[..., tuple[list[Episode], ScriptedEngine]]


@pytest.fixture(scope="session")
def play_scripts(processor: Ovis2_5Processor, image: Image.Image) -> PlayScripts:
    """Plays sibling episodes about `image` (or what is `shown` instead), one for each script, to their end."""

    def run(
        *scripts: str,
        shown: Image.Image | Path | Sequence[Image.Image | Path] | None = image,
        question: str = "What is it?",
        **options: object,
    ) -> tuple[list[Episode], ScriptedEngine]:
        look = options.pop("look", None)
        rules = EpisodeRules(**options)  # type: ignore[arg-type]
        prompt = question_about(question, *([] if shown is None else shown if isinstance(shown, Sequence) else [shown]))
        episodes = start_episodes(prompt, processor, rules, count=len(scripts), look=look)  # type: ignore[arg-type]
        engine = ScriptedEngine(processor, scripts)
        play(engine, [episodes], Sampling(), [0])
        return episodes, engine

    return run
