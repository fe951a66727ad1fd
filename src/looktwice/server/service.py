"""A request from its task to its answers: its place, its pictures, its prompt, its deadline; on the event loop."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import TypeVar

from looktwice.asking.asked import Asked, begin
from looktwice.asking.events import Cropped, Done
from looktwice.config import ServeConfig, number_of_bytes
from looktwice.errors import LooktwiceError
from looktwice.geometry import Box
from looktwice.inference import seeds_of
from looktwice.server.grammar import Grammars, JsonMask
from looktwice.server.metrics import ServerMetrics
from looktwice.server.models import BASE, Loaded, Models, ServedModel
from looktwice.server.refusal import Refusal, refusal_of
from looktwice.server.shown_images import ImageRules, Pixels, path_below
from looktwice.server.task import Task
from looktwice.server.trace import place_of, small_image
from looktwice.server.worker import Failed, Job, Told, Worker

NUM_READERS = 2
"""Threads that decode pictures and write prompts."""
NUM_WAITERS = 16
"""Threads that wait for the web or load adapters, so that readers do not."""
MOST_ADAPTERS = 64
"""Adapters that are known at a time; each takes memory until it is removed."""
MOST_CRASHES = 3
"""Passes that fail one after the other before the server calls itself unwell."""
T = TypeVar("T")


class Reply:
    """A request that is being answered: iterate over what is told, and `close` it at the end, whatever happens."""

    def __init__(self, task: Task, model: ServedModel, worker: Worker, pixels: Pixels, seconds: float) -> None:
        self.task = task
        self.model = model
        self.worker = worker
        self.id = uuid.uuid4().hex
        self.created = int(time.time())
        self.deadline = asyncio.get_running_loop().time() + seconds
        self.is_late = False
        self.mail: asyncio.Queue[list[Told]] = asyncio.Queue()
        self.job = Job(
            count=task.count,
            lane=model.lane,
            adapter=model.adapter,
            is_streamed=task.is_streamed,
            mail=self.mail.put_nowait,
        )
        self.num_over = 0
        self.crop_images: dict[tuple[int, Box | None], str | None] | None = {} if task.crop_images else None
        self.pixels = pixels
        self.num_pixels = 0
        self.is_closed = False

    @property
    def asked(self) -> Sequence[Asked]:
        return self.job.asked

    async def __aiter__(self) -> AsyncIterator[Told]:
        """All that is told, until each answer has told its last. Raises Refusal for an answer that failed."""
        while self.num_over < self.task.count:
            for told in await self._next():
                self.num_over += told.is_last
                if isinstance(told.event, Failed):
                    status = HTTPStatus.INTERNAL_SERVER_ERROR if told.event.is_our_fault else HTTPStatus.BAD_REQUEST
                    raise Refusal(told.event.message, status=status)
                if isinstance(told.event, Done) and told.event.answer.stop_reason == "error":
                    raise Refusal("this answer could not be finished; ask again", status=500, code="answer_failed")
                if self.crop_images is not None and isinstance(told.event, Cropped):
                    image = await asyncio.to_thread(small_image, told.event.crop)
                    self.crop_images[place_of(told.event.crop)] = image
                yield told

    async def _next(self) -> list[Told]:
        if not self.is_late:
            try:
                async with asyncio.timeout_at(self.deadline):
                    return await self.mail.get()
            except TimeoutError:
                self.is_late = True
                self.worker.cancel(self.job)
        return await self.mail.get()

    def close(self) -> None:
        """Free what the request holds, if it is not over."""
        if self.num_over < self.task.count:
            self.worker.cancel(self.job)
        self.is_closed = True
        self.give_pixels_back()

    def take_pixels(self, count: int) -> None:
        """Have room for so many decoded pixels; a reader's thread calls it. Raises Refusal where there is none."""
        self.pixels.take(count, of_request=self.num_pixels)
        self.num_pixels += count
        if self.is_closed:  # it took too long, and nobody closes it again
            self.give_pixels_back()
            raise Refusal("the request is over", status=408)

    def give_pixels_back(self) -> None:
        count, self.num_pixels = self.num_pixels, 0
        self.pixels.give_back(count)


class Service:
    """What the endpoints share: the models, the worker, and whether the server still takes requests."""

    def __init__(self, config: ServeConfig, models: Models, metrics: ServerMetrics) -> None:
        self.config = config
        self.models = models
        self.metrics = metrics
        self.worker = Worker(metrics, self._post, max_open=config.batch_size + config.max_queue)
        self.worker.add_lane(BASE, models.open_engine)
        for name, folder in config.adapters.items():
            self._know(models.read_adapter(name, Path(folder)))
        self.rules = ImageRules(
            max_bytes=number_of_bytes(config.max_body),
            max_pixels=config.max_image_pixels,
            allow_http=config.allow_http,
            folder=config.image_folder,
        )
        self.pixels = Pixels(config.max_image_pixels)
        self.loading = asyncio.Lock()
        self.grammars = Grammars()
        self.readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="looktwice-reader")
        self.waiters = ThreadPoolExecutor(NUM_WAITERS, thread_name_prefix="looktwice-waiter")
        self.is_draining = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to answer. Call it on the event loop."""
        self._loop = asyncio.get_running_loop()
        self.worker.start()

    def stop(self) -> None:
        """Stop to answer; what is unfinished fails."""
        self.worker.close()
        for threads in (self.readers, self.waiters):
            threads.shutdown(wait=False, cancel_futures=True)

    @property
    def is_well(self) -> bool:
        return self.worker.is_running and self.worker.num_crashes < MOST_CRASHES

    async def begin(self, task: Task) -> Reply:
        """Have a task answered. Raises Refusal when there is no place, or the task cannot be begun."""
        if self.is_draining or not self.worker.is_running:
            raise Refusal("the server is stopping; ask another one", status=503, headers={"Retry-After": "30"})
        model = self.models.named(task.model)
        reply = Reply(task, model, self.worker, self.pixels, self.config.request_seconds)
        if not self.worker.reserve(task.count):
            raise Refusal(
                f"{self.worker.num_open} answers are begun or wait already; ask again later",
                status=HTTPStatus.TOO_MANY_REQUESTS,
                code="queue_full",
                headers={"Retry-After": str(self._seconds_to_wait())},
            )
        try:
            async with asyncio.timeout_at(reply.deadline):
                if task.has_web_images and self.rules.allow_http:
                    task = await self._in_thread(self.waiters, lambda: task.fetched(self.rules))
                reply.job.asked = await self._in_thread(self.readers, lambda: self._read(task, reply))
        except BaseException as error:
            self.worker.give_back(task.count)
            reply.is_closed = True
            reply.give_pixels_back()
            if isinstance(error, TimeoutError):
                raise Refusal("the pictures of the request take too long", status=408, code="slow_images") from error
            raise
        self.worker.submit(reply.job)
        return reply

    def _read(self, task: Task, reply: Reply) -> list[Asked]:
        """Decode the pictures of a task and write its prompt: the work of a reader's thread."""
        conversation = task.conversation(replace(self.rules, take=reply.take_pixels))
        own = reply.model.processor
        policy = task.policy(own.policy)
        processor = own if policy == own.policy else own.at(policy)
        tells = [reply.job.tell(number) for number in range(task.count)]
        asked = begin(conversation, processor, task.generation, seed_of=seeds_of(task.generation.seed), tells=tells)
        if (length := len(asked[0].request.prompt)) > self.config.max_prompt_tokens:
            raise Refusal(
                f"the prompt has {length:,} tokens, more than {self.config.max_prompt_tokens:,}; "
                "shorten it, or lower max_pixels",
                code="context_length_exceeded",
            )
        masks: tuple[JsonMask, ...] = ()
        if task.schema is not None:
            masks = tuple(self.grammars.mask(task.schema, processor, task.generation) for _ in asked)
        request = replace(asked[0].request, adapter=reply.model.adapter, masks=masks)
        for one in asked:
            one.request = request
        return asked

    async def load_adapter(self, name: str, written: str) -> None:
        """Know an adapter by a name from now on. Raises Refusal when it cannot be had."""
        folder = self._adapter_folder(written)
        async with self.loading:  # one after the other: each may be as large as the model
            if name not in self.models.known and len(self.models.known) > MOST_ADAPTERS:
                raise Refusal(f"{MOST_ADAPTERS} adapters are there already; remove one", code="too_many_adapters")
            loaded = await self._in_thread(self.waiters, lambda: self.models.read_adapter(name, folder))
            await asyncio.wrap_future(self.worker.call(lambda: self._know(loaded)))

    def _know(self, loaded: Loaded) -> None:
        """Have an adapter that was read answer from now on; between two passes."""
        if loaded.model.name in self.models.known:
            return  # another request was faster
        if loaded.shared is not None:
            self.models.bank.add(loaded.model.name, loaded.shared)
        elif loaded.alone is not None:
            self.worker.add_lane(loaded.model.lane, loaded.alone.engine)
        self.models.known[loaded.model.name] = loaded.model

    async def remove_adapter(self, name: str) -> None:
        """Forget an adapter; its unfinished answers fail. Raises Refusal for what is no adapter."""
        self._adapter_folder(".")
        model = self.models.named(name)
        if model is self.models.default:
            raise Refusal("that is the model itself; stop the server to be rid of it", param="lora_name")

        def remove() -> None:
            if self.models.known.pop(name, None) is None:
                return  # another request was faster
            if model.adapter is None:
                self.worker.remove_lane(model.lane)
            else:
                self.worker.end_jobs(model.lane, model.adapter)
                self.models.bank.remove(name)

        await asyncio.wrap_future(self.worker.call(remove))

    def _adapter_folder(self, written: str) -> Path:
        """The folder that a request names. Raises Refusal where it may not, or there is none."""
        root = self.config.adapter_folder
        if root is None:
            mend = "start it with --adapter_folder"
            raise Refusal(f"this server loads no adapters while it runs; {mend}", status=403, code="no_adapters")
        path = root if written == "." else path_below(root, written)
        if path is None or not path.is_dir():
            raise Refusal("no such folder below --adapter_folder", param="lora_path", code="no_such_folder")
        return path

    async def _in_thread(self, threads: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        """What comes of a function in another thread; our own errors as refusals."""
        assert self._loop is not None
        try:
            return await self._loop.run_in_executor(threads, function)
        except LooktwiceError as error:
            raise refusal_of(error) from error

    def _seconds_to_wait(self) -> int:
        """A guess at when a place is free: half of what answers take."""
        seconds = self.metrics.mean_answer_seconds
        return max(1, math.ceil(seconds / 2))

    def _post(self, news: list[tuple[Job, list[Told]]]) -> None:
        """Hand what happened in a pass to the event loop: the worker's thread calls it."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, news)


def _deliver(news: list[tuple[Job, list[Told]]]) -> None:
    for job, told in news:
        job.mail(told)
