"""Who may ask: hosts, pages of elsewhere, keys, sizes; and errors in OpenAI's form."""

from __future__ import annotations

import http.client
import json
import logging
from pathlib import Path

import openai
import pytest

from looktwice.config import ServeConfig
from looktwice.errors import ConfigError
from looktwice.server.guard import is_known, read_keys

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def test_only_this_machine_is_listened_to_unless_told_otherwise() -> None:
    assert ServeConfig().host == "127.0.0.1"


@pytest.mark.parametrize(
    "headers, code",
    [
        ({"Host": "evil.example"}, "host"),
        ({"Host": "evil.example:8000"}, "host"),
        ({"Host": "169.254.169.254"}, "host"),
        ({"Host": "[bad"}, "host"),
        ({"Origin": "https://evil.example"}, "origin"),
        ({"Origin": "null"}, "origin"),
        ({"Origin": "http://127.0.0.1:1"}, "origin"),
        ({"Origin": "http://[bad"}, "origin"),
    ],
)
def test_pages_of_elsewhere_and_names_that_are_not_ours_are_refused(tiny, headers, code) -> None:
    told = tiny.http.post(CHAT, json=HELLO, headers=headers)
    assert told.status_code == 403 and told.json()["error"]["code"] == code


def test_our_own_page_may_ask_and_no_other_is_told_it_may(tiny) -> None:
    told = tiny.http.post(CHAT, json=HELLO, headers={"Origin": tiny.url})
    assert told.status_code == 200 and "access-control-allow-origin" not in told.headers
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert tiny.http.options(CHAT, headers=asked).status_code == 403


def test_pages_that_are_named_may_ask(play) -> None:
    with play("Hi.<|im_end|>", allow_origins=("https://good.example",)) as running:
        told = running.http.post(CHAT, json=HELLO, headers={"Origin": "https://good.example"})
        assert told.headers["access-control-allow-origin"] == "https://good.example" and told.status_code == 200
        assert running.http.post(CHAT, json=HELLO, headers={"Origin": "https://evil.example"}).status_code == 403


def test_a_key_is_needed_where_keys_are_and_stands_in_no_log(play, tmp_path: Path, caplog) -> None:
    (tmp_path / "keys").write_text("first-key\nsecond-key\n")
    with caplog.at_level(logging.DEBUG), play("Hi.<|im_end|>", api_key_file=tmp_path / "keys") as running:
        assert running.http.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert running.http.get(path).status_code == 401
        told = running.http.post(CHAT, json=HELLO, headers={"Authorization": "Bearer first-ke"})
        assert told.status_code == 401 and told.json()["error"]["type"] == "authentication_error"
        with pytest.raises(openai.AuthenticationError):
            running.client.models.list()
        assert [model.id for model in running.client.with_options(api_key="second-key").models.list()] == ["tiny"]
        asked = running.client.with_options(api_key="second-key").chat.completions
        assert asked.create(model="tiny", messages=[{"role": "user", "content": "a-private-word"}]).choices
    assert "POST /v1/chat/completions 200" in caplog.text
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("looktwice"))
    assert not any(secret in ours for secret in ("first-ke", "second-key", "a-private-word"))


def test_the_key_of_the_environment_counts_and_a_file_without_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LOOKTWICE_API_KEY", "one")
    [key] = read_keys(None)
    assert is_known("one", [key]) and not is_known("on", [key]) and not is_known("", [key])
    (tmp_path / "keys").write_text(" \n")
    with pytest.raises(ConfigError, match="no key in it"):
        read_keys(tmp_path / "keys")


def test_a_body_is_json_and_says_so(tiny) -> None:
    assert tiny.http.post(CHAT, content=json.dumps(HELLO), headers={"Content-Type": "text/plain"}).status_code == 415
    told = tiny.http.post(CHAT, content="{", headers={"Content-Type": "application/json"})
    assert told.status_code == 400 and told.json()["error"]["code"] == "invalid_json"
    told = tiny.http.post(CHAT, content="[" * 100_000, headers={"Content-Type": "application/json"})
    assert told.status_code == 400


def test_a_body_that_is_too_large_is_refused_however_it_comes(tiny) -> None:
    head = {"Content-Type": "application/json"}
    told = tiny.http.post(CHAT, content=b" " * 2_000_001, headers=head)
    assert told.status_code == 413 and told.json()["error"]["code"] == "body_too_large"
    connection = http.client.HTTPConnection("127.0.0.1", tiny.port, timeout=20)
    connection.request("POST", CHAT, (b" " * 100_000 for _ in range(30)), head, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    connection.putrequest("POST", CHAT)
    for name, value in {**head, "Content-Length": "9" * 19}.items():
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize(
    "change, param, said",
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"temprature": 1}, "temprature", 'unknown field temprature. Did you mean "temperature"?'),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 100}, "n", "at most 16"),
        ({"max_tokens": 10**6}, "max_tokens", "at most 8,192"),
        ({"top_logprobs": 2, "logprobs": True}, "top_logprobs", "the logprob of what was drawn alone"),
        ({"stream_options": {}}, "stream_options", "without stream"),
        ({"tools": [{}]}, "tools", "there is none here; leave it out"),
        ({"stop": [""]}, "stop", "stop: Input should be"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "end with one of the user"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages.0", "without content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", "half a letter"),
        ({"min_pixels": 10**6, "max_pixels": 10**4}, "max_pixels", "min_pixels is 1000000"),
        ({"crops": False, "max_crops": 2}, "crops", "leave one out"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "is missing"),
    ],
)
def test_a_malformed_request_is_told_what_is_wrong(tiny, change, param, said) -> None:
    body = json.dumps(HELLO | change)
    told = tiny.http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    error = told.json()["error"]
    assert told.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"].startswith(param) and said in error["message"]


def test_a_bug_is_told_in_the_same_form_and_its_words_stand_in_no_log(tiny, monkeypatch, caplog) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("with a secret")

    monkeypatch.setattr("looktwice.server.chat.task_of", broken)
    told = tiny.http.post(CHAT, json=HELLO)
    assert told.status_code == 500 and told.json()["error"]["type"] == "server_error"
    assert "RuntimeError" in caplog.text and "secret" not in caplog.text + told.text


def test_what_is_not_there_is_told_in_the_same_form(tiny) -> None:
    with pytest.raises(openai.NotFoundError, match="there are tiny"):
        tiny.client.chat.completions.create(model="other", messages=HELLO["messages"])
    for path, status in (("/v1/none", 404), (CHAT, 405)):
        told = tiny.http.get(path)
        assert told.status_code == status and {*told.json()["error"]} == {"message", "type", "param", "code"}
