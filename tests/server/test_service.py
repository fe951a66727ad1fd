"""A server among many: clients that leave, queues, deadlines, crashes, its end; nothing of them may stay behind."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from looktwice.asking.asked import Asked
from looktwice.server.worker import Job

LONG = "<think>\n" + "I see. " * 60 + "</think>\n\n<answer>3</answer><|im_end|>"
CHAT = "/v1/chat/completions"


def wait_for(condition, seconds: float = 20.0) -> None:  # type: ignore[no-untyped-def]
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not come about"
        time.sleep(0.01)


def is_empty(running) -> bool:  # type: ignore[no-untyped-def]
    """Whether no answer is begun, and the engine holds nothing."""
    worker, engine = running.service.worker, running.engine
    is_idle = not any(lane.jobs for lane in worker._lanes.values())
    held = len(engine.live) if hasattr(engine, "live") else engine.cache.num_used + len(engine.scheduler.live)
    return worker.num_open == 0 and is_idle and held == running.service.pixels.held == 0


def raw_request(body: dict) -> bytes:
    text = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text


async def leave_or_stay(port: int, request: bytes, *, leaves: bool) -> bool:
    """Whether the stream came whole; who leaves does so after its first line of data."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    writer.write(request)
    is_whole = False
    async for line in reader:
        is_whole = is_whole or line.startswith(b"data: [DONE]")
        if leaves and line.startswith(b"data: "):
            break
    if leaves:
        writer.transport.abort()
    writer.close()
    return is_whole


def rush(port: int, request: bytes, count: int) -> list[bool]:
    async def go() -> list[bool]:
        return await asyncio.gather(*(leave_or_stay(port, request, leaves=n % 2 == 1) for n in range(count)))

    return asyncio.run(go())


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_of_two_hundred_clients_half_leave_and_nothing_stays(tiny, question) -> None:
    request = raw_request({"messages": question, "max_tokens": 12, "temperature": 2.0, "stream": True})
    held = []
    for _ in range(3):
        assert rush(tiny.port, request, 200) == [n % 2 == 0 for n in range(200)]
        wait_for(lambda: is_empty(tiny))
        wait_for(lambda: gc.collect() >= 0 and not any(type(one) in (Job, Asked) for one in gc.get_objects()))
        assert tiny.engine.cache.num_bytes == 0
        gc.collect()
        tasks = len(asyncio.all_tasks(tiny.service._loop))
        held.append((sys.getallocatedblocks(), resident_bytes(), tasks, threading.active_count()))
    # the first time everything is as large as it ever is; what is resident goes up and down by some 20 MB
    assert held[2][0] - held[1][0] < 2_000  # ten for each request
    assert held[2][1] - held[0][1] < 64 * 2**20
    assert held[2][2:] == held[0][2:]


def test_who_leaves_before_the_answer_is_whole_frees_the_place(play, question) -> None:
    with play(LONG, delay_s=0.01) as running:
        for is_streamed in (False, True):
            with socket.create_connection(("127.0.0.1", running.port)) as client:
                client.sendall(raw_request({"messages": question, "stream": is_streamed}))
                wait_for(lambda: running.engine.live)
            wait_for(lambda: is_empty(running), seconds=2)


def test_more_than_the_queue_holds_is_refused_and_told_when_to_come_again(play, question) -> None:
    with play(LONG, delay_s=0.02, batch_size=1, max_queue=1) as running:
        asked = {"model": "tiny", "messages": question}
        streams = [running.client.chat.completions.create(**asked, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as refused:
            running.client.chat.completions.create(**asked)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert refused.value.body["code"] == "queue_full"  # type: ignore[index]
        for stream in streams:
            stream.close()
        wait_for(lambda: is_empty(running))
        assert running.client.chat.completions.create(**asked, max_tokens=2).choices


def test_a_request_ends_when_its_seconds_are_over(play, question) -> None:
    with play(LONG, delay_s=0.02, request_seconds=0.3) as running:
        told = running.client.chat.completions.create(model="tiny", messages=question)
        assert told.choices[0].finish_reason == "length" and told.choices[0].message.reasoning.startswith("I see.")


def test_an_engine_that_breaks_fails_what_it_had_and_is_begun_anew(play, question, caplog) -> None:
    with play(LONG, delay_s=0.01) as running, ThreadPoolExecutor() as threads:
        asked = {"model": "tiny", "messages": question}
        whole = threads.submit(running.client.chat.completions.create, **asked)
        stream = running.client.chat.completions.create(**asked, stream=True)
        wait_for(lambda: len(running.engine.live) == 2)
        running.engine.broken = RuntimeError("out of memory, with a secret")
        with pytest.raises(openai.InternalServerError):
            whole.result()
        with pytest.raises(openai.APIError, match="the engine broke"):
            list(stream)
        assert "secret" not in caplog.text
        assert running.client.chat.completions.create(**asked, max_tokens=3).choices
        assert is_empty(running) and running.http.get("/health").status_code == 200


def test_a_server_whose_engine_cannot_be_begun_anew_says_so(play, question, monkeypatch) -> None:
    def gone() -> None:
        raise RuntimeError("no memory is left")

    with play(LONG, delay_s=0.01) as running:
        [lane] = running.service.worker._lanes.values()
        stream = running.client.chat.completions.create(model="tiny", messages=question, stream=True)
        monkeypatch.setattr(lane, "open", gone)
        running.engine.broken = RuntimeError("the device is gone")
        with pytest.raises(openai.APIError, match="the engine broke|stops"):
            list(stream)
        wait_for(lambda: running.http.get("/health").status_code == 503)
        with pytest.raises(openai.InternalServerError) as refused:
            running.client.chat.completions.create(model="tiny", messages=question)
        assert refused.value.status_code == 503 and running.service.worker.num_open == 0


def test_an_answer_that_breaks_hurts_no_other(play, question, monkeypatch) -> None:
    """A crop that raises ends its own answer; one beside it, in the same passes, is whole."""
    text = "<think>\n<tool_call>[20, 30, 100, 90]</tool_call>It says 3.\n</think>\n\n<answer>3</answer><|im_end|>"
    real = Asked.crop_done
    broken: list[Asked] = []

    def crop_done(self: Asked, call: object) -> None:
        if not broken:
            broken.append(self)
            raise RuntimeError("a crop that breaks")
        real(self, call)  # type: ignore[arg-type]

    monkeypatch.setattr(Asked, "crop_done", crop_done)
    with play(text, delay_s=0.005) as running, ThreadPoolExecutor() as threads:
        one = [threads.submit(running.client.chat.completions.create, model="tiny", messages=question) for _ in "ab"]
        told = [future.exception() or future.result() for future in one]
        assert sorted(type(answer).__name__ for answer in told) == ["ChatCompletion", "InternalServerError"]
        assert is_empty(running)


def test_many_reading_threads_share_one_tokenizer(tiny, question) -> None:
    def ask(number: int) -> str:
        asked = [{"role": "user", "content": f"What is {number}? " * 20}, *question]
        return tiny.client.chat.completions.create(model="tiny", messages=asked, max_tokens=3).choices[0].finish_reason

    with ThreadPoolExecutor(16) as threads:
        assert {*threads.map(ask, range(48))} <= {"stop", "length"}


def test_numbers_are_told_to_prometheus(tiny, question) -> None:
    tiny.client.chat.completions.create(model="tiny", messages=question, max_tokens=3)
    text = tiny.http.get("/metrics").text
    told = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(told['looktwice_tokens_total{kind="written"}']) >= 3
    assert float(told["looktwice_first_token_seconds_count"]) >= 1
    assert float(told['looktwice_requests_total{endpoint="/v1/chat/completions",status="200"}']) >= 1
    assert float(told["looktwice_running_answers"]) == 0


def test_what_a_server_is_told_to_end_it_finishes_and_takes_no_more(play, question) -> None:
    with play(LONG, delay_s=0.01) as running, ThreadPoolExecutor() as threads:
        asked = {"model": "tiny", "messages": question}
        future = threads.submit(running.client.chat.completions.create, **asked)
        wait_for(lambda: running.engine.live)
        running.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.InternalServerError) as refused:
            running.client.chat.completions.create(**asked)
        assert refused.value.status_code == 503 and "retry-after" in refused.value.response.headers
        assert running.http.get("/health").status_code == 503
        assert future.result().choices[0].finish_reason == "stop"
        wait_for(lambda: running.server.should_exit)


def test_what_comes_after_the_worker_ended_is_told_so(play) -> None:
    with play("<answer>3</answer><|im_end|>") as running:
        worker = running.service.worker
        told: list[object] = []
        worker.close()
        assert worker.reserve(1)
        worker.submit(Job(count=1, lane="base", is_streamed=False, mail=told.extend))
        assert worker.call(lambda: 5).result(timeout=5) == 5
        assert worker.num_open == 0
