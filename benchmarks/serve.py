"""The server under load: how many requests a second it answers, how soon the first token comes, what it costs.

    python benchmarks/serve.py [--json FILE] [--model tiny]

A server of the model runs in a process of its own on the loopback. 1, 8, 32 and 64 clients ask it at a time, each its
next question when the last is answered, about a picture that no other has, and read the stream. The engine alone
answers the same questions, pictures decoded and prompts written, 32 at a time; both take turns, so that a busy moment
of the machine hits both. One thread computes in either.

`requests_per_s` are of the wall and mean something on two idle cores. The seconds of the processor, of which
`cpu_32_vs_1` and `cpu_server_vs_engine` are ratios, do on a busy machine too; they leave out that a server reads
pictures while it computes.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from measure import parser, publish

from looktwice.demo.task import make_dataset

CLIENTS = {1: 16, 8: 48, 32: 128, 64: 192}
"""Clients at a time, and questions in all."""
MEASURED = 32
NUM_REPEATS = 3
NUM_IMAGES = 64
SKILL = "List the tiles."
"""What the built-in model writes longest about: about thirty tokens. Any other is asked the demo's own questions."""
MAX_TOKENS = 128
Question = tuple[str, str]
"""A picture's address and what is asked about it."""
GOALS = {
    "throughput_32_vs_1": "at least 5",
    "server_vs_engine": "at least 0.8",
    "errors": "exactly 0",
}


@dataclass(frozen=True)
class Timed:
    """One request: seconds until the first text, None where there was none, and whether it was answered whole."""

    first_s: float | None
    is_whole: bool


@dataclass(frozen=True)
class Turn:
    """So many requests, the seconds that went by, and the seconds of the processor that their answering took."""

    count: int
    wall_s: float
    processor_s: float
    told: list[Timed]

    @property
    def rate(self) -> float:
        return self.count / self.wall_s

    @property
    def cpu_ms(self) -> float:
        return 1000 * self.processor_s / self.count


def main() -> None:
    options = parser()
    options.add_argument("--model", default="tiny", help="model folder; tiny is the built-in one")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_dataset(Path(folder), num_train=1, num_rl=1, num_eval=NUM_IMAGES, seed=0)
        questions = read_questions(Path(folder), is_skill=arguments.model == "tiny")
    server = subprocess.Popen(
        [sys.executable, "-m", "looktwice", "serve", arguments.model, "--port", "0", "--device", "cpu"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        figures = measured(server, arguments.model, questions)
    finally:
        server.terminate()
        server.wait(30)
    publish(figures, arguments, GOALS)


def read_questions(folder: Path, *, is_skill: bool) -> list[Question]:
    """The demo's questions about pictures of its own, or the one about a skill in their place."""
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    images = [base64.b64encode((folder / row["image_path"]).read_bytes()).decode() for row in rows]
    asked = [SKILL if is_skill else row["QnA"][0]["Q"] for row in rows]
    return [(f"data:image/png;base64,{image}", question) for image, question in zip(images, asked)]


def address_of(server: subprocess.Popen[str]) -> str:
    """Where a server listens, once it says so; what it says after that is read and dropped."""
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.fullmatch(r"(http://\S+)\s*", line):
            break
    else:
        raise RuntimeError("the server has ended")
    subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
    return found[1]


def measured(server: subprocess.Popen[str], model: str, questions: Sequence[Question]) -> dict[str, float]:
    """All figures: medians over repeats in which every number of clients, and the engine alone, have their turn."""
    address = address_of(server)
    inference = engine_alone(model)
    bodies = [body_of(*question) for question in questions]
    asyncio.run(rush(address, bodies[:8], 8))
    turns: dict[int, list[Turn]] = {number: [] for number in CLIENTS}
    alone: list[Turn] = []
    for _ in range(NUM_REPEATS):
        for number, count in CLIENTS.items():
            places = [place % len(bodies) for place in range(count)]
            turns[number].append(turn_of(server.pid, address, [bodies[place] for place in places], number))
            if number == MEASURED:
                alone.append(turn_alone(inference, [questions[place] for place in places]))
    figures: dict[str, float] = {}
    for number, found in turns.items():
        firsts = [one.first_s for turn in found for one in turn.told if one.first_s is not None]
        figures[f"requests_per_s_{number}"] = statistics.median(turn.rate for turn in found)
        figures[f"cpu_ms_per_request_{number}"] = statistics.median(turn.cpu_ms for turn in found)
        figures |= {f"ttft_ms_p50_{number}": 1000 * statistics.median(firsts), f"ttft_ms_p95_{number}": p95(firsts)}
    many, one = turns[MEASURED], turns[1]
    return figures | {
        "engine_requests_per_s": statistics.median(turn.rate for turn in alone),
        "engine_cpu_ms_per_request": statistics.median(turn.cpu_ms for turn in alone),
        "cpu_32_vs_1": statistics.median(a.cpu_ms / b.cpu_ms for a, b in zip(one, many)),
        "cpu_server_vs_engine": statistics.median(a.cpu_ms / b.cpu_ms for a, b in zip(alone, many)),
        "throughput_32_vs_1": statistics.median(a.rate / b.rate for a, b in zip(many, one)),
        "server_vs_engine": statistics.median(a.rate / b.rate for a, b in zip(many, alone)),
        "ttft_ms_p50": figures[f"ttft_ms_p50_{MEASURED}"],
        "ttft_ms_p95": figures[f"ttft_ms_p95_{MEASURED}"],
        "errors": float(sum(not told.is_whole for found in turns.values() for turn in found for told in turn.told)),
    }


def turn_of(pid: int, address: str, bodies: Sequence[bytes], num_clients: int) -> Turn:
    """The server under so many clients."""
    started, spent = time.perf_counter(), processor_s(pid)
    told = asyncio.run(rush(address, bodies, num_clients))
    return Turn(len(bodies), time.perf_counter() - started, processor_s(pid) - spent, told)


def processor_s(pid: int) -> float:
    """Seconds that all threads of a process have computed, from Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def p95(seconds: Sequence[float]) -> float:
    """Milliseconds that 95 of 100 do not pass."""
    return 1000 * statistics.quantiles(seconds, n=20)[-1]


def engine_alone(model: str):  # type: ignore[no-untyped-def]
    """The model with an engine of as many rows as there are clients."""
    import torch

    from looktwice.inference import OvisInference

    torch.set_num_threads(1)
    return OvisInference(model, device="cpu", batch_size=MEASURED, max_new_tokens=MAX_TOKENS)


def turn_alone(inference, questions: Sequence[Question]) -> Turn:  # type: ignore[no-untyped-def]
    """The engine without a server."""
    started, spent = time.perf_counter(), time.process_time()
    answers = inference.batch_generate(questions)
    assert all(answer.error is None for answer in answers)
    return Turn(len(answers), time.perf_counter() - started, time.process_time() - spent, [])


def body_of(url: str, question: str) -> bytes:
    shown = {"type": "image_url", "image_url": {"url": url}}
    messages = [{"role": "user", "content": [shown, {"type": "text", "text": question}]}]
    return json.dumps({"messages": messages, "max_tokens": MAX_TOKENS, "stream": True}).encode()


async def rush(address: str, bodies: Sequence[bytes], num_clients: int) -> list[Timed]:
    """Ask all, `num_clients` at a time."""
    waiting = iter(bodies)

    async def client() -> list[Timed]:
        return [await ask(address, body) for body in waiting]

    return [one for told in await asyncio.gather(*(client() for _ in range(num_clients))) for one in told]


async def ask(address: str, body: bytes) -> Timed:
    """Send one request and read its stream to the end."""
    parts = urlsplit(address)
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=2**22)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    first, is_whole = None, False
    async for line in reader:
        if first is None and ((b'"content":"' in line and b'"content":""' not in line) or b'"reasoning":"' in line):
            first = time.perf_counter() - started
        is_whole = is_whole or line.startswith(b"data: [DONE]")
        assert not line.startswith(b"HTTP/1.1") or b" 200 " in line, line
        is_whole = is_whole and b'"error"' not in line
    writer.close()
    return Timed(first, is_whole)


if __name__ == "__main__":
    main()
