"""Anything at all may be sent: no answer is a 5xx, and each error is in OpenAI's form.

A longer run: LOOKTWICE_FUZZ=500 pytest tests/server/test_fuzz.py
"""

from __future__ import annotations

import json
import os

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("LOOKTWICE_FUZZ", "12"))
QUIET = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[*HealthCheck],
)
POSTS = ["/v1/chat/completions", "/v1/responses", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
ERROR = {"message", "type", "param", "code"}


def check(told) -> None:  # type: ignore[no-untyped-def]
    assert told.status_code < 500, (told.status_code, told.content[:300])
    if told.status_code >= 400:
        assert {*told.json()["error"]} == ERROR and told.json()["error"]["message"]


def quick(body):  # type: ignore[no-untyped-def]
    """The same request, but for what would only cost time."""
    if isinstance(body, dict):
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n"):
            if isinstance(body.get(name), int) and body[name] > 2:
                body[name] = 2
        if not any(isinstance(body.get(name), int) for name in ("max_tokens", "max_completion_tokens")):
            body["max_output_tokens" if "input" in body else "max_tokens"] = 2
    return body


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_bodies_of_the_served_schema_and_near_it_are_answered(tiny, path, mode) -> None:
    schema = schemathesis.openapi.from_dict(tiny.http.get("/openapi.json").json())
    cases = schema[path]["POST"].as_strategy(generation_mode=mode)

    @seed(0)
    @QUIET
    @given(case=cases)
    def send(case) -> None:  # type: ignore[no-untyped-def]
        check(tiny.http.post(path, json=quick(case.body) if isinstance(case.body, (dict, list)) else None))

    send()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
TAGS = ["<think>", "</think>", "<tool_call>[1,2,3,4]</tool_call>", "<|im_end|>", "\x00"]
ADDRESSES = ["data:,", "data:image/png;base64,AAAA", "http://a", "file:///etc/passwd", "", "//", "\udcff"]
TEXT = st.text(max_size=30) | st.sampled_from(TAGS)
URLS = st.sampled_from(ADDRESSES) | TEXT
PARTS = st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXT})
    | st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": URLS})}),
    max_size=3,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "developer"]), "content": TEXT | PARTS | JSON}
    ),
    max_size=3,
).map(lambda before: [*before, {"role": "user", "content": "Hi"}])
FIELDS = st.fixed_dictionaries(
    {"messages": MESSAGES, "max_tokens": st.just(2)},
    optional={
        "temperature": st.floats(0, 3) | JSON,
        "top_p": st.floats(0, 1) | JSON,
        "seed": st.integers() | JSON,
        "stop": st.lists(TEXT, max_size=5) | JSON,
        "stream": st.booleans(),
        "logprobs": st.booleans(),
        "thinking_budget": st.integers(-1, 3),
        "max_crops": st.integers(-1, 3) | JSON,
        "min_pixels": st.integers(),
        "max_pixels": st.integers(),
        "return_token_ids": st.booleans(),
        "repetition_penalty": st.floats() | JSON,
        "response_format": JSON
        | st.fixed_dictionaries(
            {"type": st.just("json_schema"), "json_schema": st.fixed_dictionaries({"name": TEXT, "schema": JSON})}
        ),
    },
)


def test_bodies_that_pass_the_schema_and_go_deeper_are_answered(tiny) -> None:
    @seed(1)
    @settings(QUIET, max_examples=5 * EXAMPLES)
    @given(body=FIELDS)
    def send(body) -> None:  # type: ignore[no-untyped-def]
        head = {"Content-Type": "application/json"}
        check(tiny.http.post("/v1/chat/completions", content=json.dumps(body), headers=head))

    send()
    assert tiny.http.get("/health").status_code == 200


def test_bytes_that_are_no_json_are_answered(tiny) -> None:
    kinds = st.sampled_from(["application/json", "application/json; charset=utf-16", "a/b"])

    @seed(2)
    @QUIET
    @given(content=st.binary(max_size=200), kind=kinds)
    def send(content: bytes, kind: str) -> None:
        check(tiny.http.post("/v1/chat/completions", content=content, headers={"Content-Type": kind}))

    send()
