"""The judge over the network, asked through a small server of this process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from looktwice.config import GRPOConfig
from looktwice.rewarding.judge import KEY_VARIABLE
from looktwice.rewarding.paying import load_rewards
from looktwice.rewards import Played
from looktwice.rollout.trajectory import Trajectory


class Server:
    """Replies in turn with what it was given: texts of a model, (status, body), or seconds to be silent."""

    def __init__(self) -> None:
        self.replies: list[object] = []
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # who asked has gone away
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"]))
        with self.lock:
            self.asked.append({"path": request.path, **json.loads(body)})
            self.keys.append(request.headers["Authorization"])
            reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        if isinstance(reply, float):
            time.sleep(reply)
            reply = "CORRECT"
        status, sent = reply if isinstance(reply, tuple) else (200, None)
        choice = {"message": {"content": reply}, "finish_reason": "stop"}
        with self.lock:
            self.busy -= 1
        request.send_response(status)
        if 300 <= status < 400:
            request.send_header("Location", f"{self.url}/elsewhere")
        request.end_headers()
        request.wfile.write((json.dumps({"choices": [choice]}) if sent is None else sent).encode())


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=lambda: server.http.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()


def answered(answer: str) -> Trajectory:
    return Trajectory(prompt_ids=[], text=f"<think>I look.</think><answer>{answer}</answer>")


def pay(server, *answers, gold="the red cup", **settings):
    config = GRPOConfig(judge_url=server.url, judge_model="m", **{"reward_seconds": 20, **settings})
    return load_rewards(config)([Played(answered(answer), gold, "What is it?") for answer in answers])


@pytest.mark.parametrize(
    ("reply", "accuracy"),
    [("CORRECT", 1.0), ("Incorrect.", 0.0), ("<think>It is not INCORRECT</think>\n**Correct**", 1.0)],
)
def test_what_the_rules_do_not_call_right_is_asked_of_the_judge(server, reply, accuracy) -> None:
    server.replies = [reply]
    [reward] = pay(server, "a crimson mug")
    assert (reward.error, reward.accuracy) == (None, accuracy)
    [asked] = server.asked
    assert (asked["path"], asked["model"], asked["temperature"]) == ("/v1/chat/completions", "m", 0)
    [message] = asked["messages"]
    assert '"answer": "a crimson mug"' in message["content"] and '"What is it?"' in message["content"]
    assert "I look." not in message["content"] and isinstance(message["content"], str)


@pytest.mark.parametrize(
    ("answer", "gold", "accuracy"),
    [
        ("The red cup", "the red cup", 1.0),
        ("C", "B", 0.0),
        ("6", "5", 0.0),
        ("x" * 301, "the red cup", 0.0),
        ("", "the red cup", 0.0),
    ],
)
def test_what_the_rules_decide_is_not_asked(server, answer, gold, accuracy) -> None:
    server.replies = ["CORRECT" if accuracy == 0 else "INCORRECT"]
    [reward] = pay(server, answer, gold=gold)
    assert (reward.error, reward.accuracy, server.asked) == (None, accuracy, [])


def test_always_asks_of_every_answer_but_one_that_is_too_long(server) -> None:
    server.replies = ["INCORRECT"]
    rewards = pay(server, "The red cup", "x" * 301, judge_asked="always")
    assert ([reward.accuracy for reward in rewards], len(server.asked)) == ([0.0, 0.0], 1)


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ("I cannot judge that.", "JudgeError: the judge gave no verdict but"),
        ("CORRECT or INCORRECT", "JudgeError: the judge gave no verdict but"),
        (None, "JudgeError: the judge gave no verdict but"),
        ((200, "{}"), "JudgeError: the judge's reply holds no choice: {}"),
        ((200, "nonsense"), "JudgeError: http://127.0.0.1"),
        ((500, "out of memory"), "JudgeError: http://127.0.0.1"),
        ((302, ""), "JudgeError: http://127.0.0.1"),
    ],
)
def test_a_judge_that_gives_no_verdict_fails_the_reward_and_is_no_zero(server, reply, error) -> None:
    server.replies = [reply]
    [reward] = pay(server, "a mug", reward_retries=1)
    assert reward.error.startswith(error)
    assert str(reward.total) == "nan"
    assert len(server.asked) == 2


def test_a_judge_that_is_silent_or_not_there_fails_the_reward(server) -> None:
    server.replies = [0.5]
    assert "no verdict in 0.1 s" in pay(server, "a mug", reward_seconds=0.1)[0].error
    server.url = "http://127.0.0.1:9/v1"
    assert "http://127.0.0.1:9/v1: URLError" in pay(server, "a mug")[0].error


def test_a_timeout_of_the_network_is_told_as_itself(server, monkeypatch) -> None:
    class Opener:
        def open(self, *_: object, **__: object) -> None:
            raise TimeoutError(110, "Connection timed out")

    monkeypatch.setattr("looktwice.rewarding.judge.build_opener", lambda *_: Opener())
    assert "/v1: TimeoutError: [Errno 110] Connection timed out" in pay(server, "a mug")[0].error


def test_a_second_try_is_made(server) -> None:
    server.replies = [(503, "busy"), "CORRECT"]
    assert pay(server, "a mug", reward_retries=1)[0].accuracy == 1.0


def test_siblings_with_one_answer_share_a_verdict_and_a_cache_keeps_it(server, tmp_path) -> None:
    server.replies = ["CORRECT"]
    for _ in range(2):
        rewards = pay(server, "a mug", "a mug", reward_cache=str(tmp_path / "paid.sqlite"))
    assert [reward.accuracy for reward in rewards] == [1.0, 1.0]
    assert len(server.asked) == 1


def test_only_so_many_are_asked_at_a_time(server) -> None:
    server.replies = [0.05]
    rewards = pay(server, *(f"mug {number}" for number in "abcdef"), judge_concurrency=2)
    assert {reward.accuracy for reward in rewards} == {1.0}
    assert server.most_busy == 2


def test_the_key_comes_from_the_environment_and_is_never_told(server, monkeypatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sesame")
    server.replies = [(401, "bad key sesame")]
    [reward] = pay(server, "a mug")
    assert server.keys == ["Bearer sesame"]
    assert "bad key ***" in reward.error and "sesame" not in reward.error
