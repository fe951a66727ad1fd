"""A server that runs in a thread of the test, and an engine that plays written texts, id by id."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx2
import openai
import pytest
from PIL import Image

from looktwice.config import ServeConfig
from looktwice.engine.interface import Driver, Request, Segment
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.server.metrics import ServerMetrics
from looktwice.server.models import Models
from looktwice.server.running import Server, listen
from looktwice.server.service import Service


class PlayingEngine:
    """Plays one text to every rollout, an id a step, as an engine would sample it; `delay_s` before each step.

    `broken` is raised by the next step; `live` are the rollouts that have not ended.
    """

    def __init__(self, processor: Ovis2_5Processor, text: str, *, delay_s: float = 0.0) -> None:
        self.ids = processor.tokenizer.encode(text, add_special_tokens=False)
        self.delay_s = delay_s
        self.broken: Exception | None = None
        self.live: dict[int, dict] = {}
        self.cancelled: list[int] = []
        self.number = 0

    def submit(self, request: Request) -> list[int]:
        first = self.number
        for driver in request.drivers:
            told = {"driver": driver, "place": 0, "new": [], "left": request.max_new_tokens, "stops": request.stop_ids}
            self.live[self.number] = told
            self.number += 1
        return [*range(first, self.number)]

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)

    def step(self) -> bool:
        time.sleep(self.delay_s)
        if self.broken is not None:
            error, self.broken = self.broken, None
            raise error
        while self.cancelled:
            if row := self.live.pop(self.cancelled.pop(), None):
                self._respond(row, "cancelled")
        for number, row in [*self.live.items()]:
            try:
                is_over = not self._advance(row)
            except Exception as error:  # it ends its own rollout alone
                row["driver"].fail(error)
                is_over = True
            if is_over:
                del self.live[number]
        return bool(self.live)

    def _advance(self, row: dict) -> bool:
        token = self.ids[row["place"]]
        row["place"] += 1
        row["new"].append(token)
        row["left"] -= 1
        row["driver"].hear(token, -0.5)
        if token in row["stops"]:
            return self._respond(row, "stop_id")
        return self._respond(row, "length") if row["left"] <= 0 else True

    def _respond(self, row: dict, stop: str) -> bool:
        driver: Driver = row["driver"]
        logprobs = [-0.5] * len(row["new"])
        segment = Segment(ids=row["new"], logprobs=logprobs, drawn_logprobs=logprobs, stop=stop)  # type: ignore[arg-type]
        reply = driver.respond(segment)
        row["new"] = []
        if reply is None:
            return False
        row["left"] = reply.max_new_tokens
        return True


class Served:
    """A running server, its parts, and clients of it."""

    def __init__(self, server: Server, port: int) -> None:
        self.server, self.service, self.port = server, server.service, port
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
        self.http = httpx2.Client(base_url=self.url, timeout=60)

    @property
    def engine(self):  # type: ignore[no-untyped-def]
        [lane] = self.service.worker._lanes.values()
        return lane.engine


Serve = Callable[..., "contextmanager[Served]"]


@contextmanager
def served(models: Models, config: ServeConfig) -> Iterator[Served]:
    """A server of these models in a thread, ended afterwards."""
    metrics = ServerMetrics()
    where = listen(config)
    server = Server(config, Service(config, models, metrics), metrics)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [where]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    running = Served(server, where.getsockname()[1])
    try:
        yield running
    finally:
        running.client.close()
        running.http.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def tiny_models() -> Models:
    return Models(ServeConfig(device="cpu"))


@pytest.fixture(scope="session")
def tiny(tiny_models: Models) -> Iterator[Served]:
    """A server of the small model."""
    with served(tiny_models, ServeConfig(port=0, device="cpu", max_body="2MB", max_images=3)) as running:
        yield running


class PlayedModels:
    """The small model's processor, and an engine that plays a text."""

    def __init__(self, models: Models, text: str, **options: float) -> None:
        self.default, self.known, self.named = models.default, dict(models.known), models.named
        self.described = "played"
        self.open_engine = lambda: PlayingEngine(models.default.processor, text, **options)


@pytest.fixture
def play(tiny_models: Models) -> Callable[..., contextmanager[Served]]:
    """A server that answers each request with one text: play("<think>...", delay_s=0.1, max_queue=3)."""

    def begin(text: str, *, delay_s: float = 0.0, **settings: object) -> contextmanager[Served]:
        models = PlayedModels(tiny_models, text, delay_s=delay_s)
        config = ServeConfig(**{"port": 0, "device": "cpu", **settings})  # type: ignore[arg-type]
        return served(models, config)  # type: ignore[arg-type, return-value]

    return begin  # type: ignore[return-value]


def url_of(image: Image.Image) -> str:
    """A picture as a data: URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.fixture(scope="session")
def question(image: Image.Image) -> list[dict]:
    """Messages that ask about a picture of 160 x 120 pixels."""
    shown = {"type": "image_url", "image_url": {"url": url_of(image)}}
    return [{"role": "user", "content": [shown, {"type": "text", "text": "What does it say?"}]}]
