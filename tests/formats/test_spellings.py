"""Rows of other trainers: what each becomes, and how what cannot be read is named."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from looktwice.data.sample import Sample
from looktwice.errors import DataError
from looktwice.messages import ImagePart, Message, TextPart, assistant, system, user

A, B = Path("p/a.png"), Path("p/b.png")


def messages_of(sample: Sample) -> list[Message]:
    return list(sample.conversation.messages)


def asked(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts)]


@pytest.mark.parametrize(
    ("row", "messages", "solution", "field"),
    [
        (
            {"prompt": asked("<image>Q"), "images": ["a.png"], "reward_model": {"style": "rule", "ground_truth": 7}},
            [user("Q", A)],
            "7",
            "prompt[0].content",
        ),
        ({"problem": "<image>Q", "images": ["a.png"], "answer": "7"}, [user("Q", A)], "7", "problem"),
        ({"question": "Q", "image": "a.png", "answer": "7"}, [user("Q", A)], "7", "question"),
        ({"prompt": "Q", "completion": "A", "image": "a.png"}, [user("Q", A), assistant("A")], "", "completion"),
        (
            {"prompt": asked("Q"), "completion": [{"role": "assistant", "content": "A"}], "images": ["a.png"]},
            [user("Q", A), assistant("A")],
            "",
            "completion[0].content",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "images": []},
            [Message(role="user", parts=(ImagePart(source=A),))],
            "",
            "prompt[0].content",
        ),
        (
            {"instruction": "Q", "input": "R", "output": "A", "system": "S", "images": ["a.png", "b.png"]},
            [system("S"), user("Q\nR", A, B), assistant("A")],
            "",
            "output",
        ),
        (
            {"query": "R <image>", "response": "B", "history": [["Q", "A"]], "images": ["a.png"]},
            [
                user("Q"),
                assistant("A"),
                Message(role="user", parts=(TextPart(text="R "), ImagePart(source=A))),
                assistant("B"),
            ],
            "",
            "response",
        ),
        (
            {"conversation": [{"human": "Q", "assistant": "A"}], "images": ["a.png"]},
            [user("Q", A), assistant("A")],
            "",
            "conversation[0].assistant",
        ),
        (
            {"texts": [{"user": q, "assistant": "A", "source": "s"} for q in "QR"], "images": ["a.png"]},
            [user("Q", A), assistant("A"), user("R"), assistant("A")],
            "",
            "texts[1].assistant",
        ),
    ],
)
def test_rows_of_other_trainers_are_read(row, messages, solution, field, read) -> None:
    for name in ("auto", "swift"):
        [sample] = read({**row, "id": 7}, data_format=name)
        assert messages_of(sample) == messages
        assert (sample.solution, sample.field, sample.extra) == (solution, field, {"id": 7})


def test_of_two_questions_the_one_that_is_not_read_is_named(read, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        [sample] = read({"problem": "P", "prompt": "Q", "image": "a.png", "output": "A", "response": "B"})
    assert (messages_of(sample), sample.extra) == ([user("Q", A), assistant("B")], {"problem": "P", "output": "A"})
    assert '1 x "problem" (' in caplog.text and '1 x "output" (' in caplog.text


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "Q", "chosen": "a", "rejected": "b"}, "chosen: preferences, as for DPO; keep the better answer"),
        ({"chosen": asked("Q", "A"), "rejected": asked("Q", "B")}, "chosen: preferences, as for DPO"),
        ({"messages": asked("Q", "A"), "rejected_response": "B"}, "rejected_response: preferences, as for DPO"),
        (
            {"conversations": [{"from": "human", "value": "Q"}], "rejected": {"from": "gpt"}},
            "rejected: preferences, as for DPO",
        ),
        ({"instruction": "Q", "output": "A", "kto_tag": True}, "kto_tag: answers labelled good or bad, as for KTO"),
        ({"messages": asked("Q", "A"), "label": False}, "label: answers labelled good or bad, as for KTO"),
        ({"prompt": "Q", "completions": ["a"], "labels": [True]}, "completions: steps of an answer with labels"),
        ({"text": "A cup."}, "text: plain text, as for pretraining; write a question and an answer"),
        ({"image": "a.png", "caption": "A cup."}, "caption: plain text, as for pretraining"),
        ({"prompt": asked("Q"), "reward_model": {}}, 'images: a row of verl without a picture; name it in "images"'),
        ({"instruction": "Q", "output": "A", "images": []}, "images: a row of alpaca without a picture"),
        ({"question": "Q", "answer": "A"}, "images: a row of VQA without a picture"),
        (
            {"prompt": asked("<image>Q"), "images": ["a"], "reward_model": {"ground_truth": ["a", ["b"]]}},
            "reward_model.ground_truth.1: a list where a text belongs",
        ),
        ({"query": ["Q"], "images": ["a"]}, "query: a list where a text belongs; give one text"),
        ({"instruction": "Q", "input": 3, "images": ["a"]}, "input: a number where a text belongs; write it in quotes"),
        ({"query": "Q", "history": ["R"], "images": ["a"]}, "history[0]: no question with its answer; write"),
        ({"query": "Q", "history": [["R", 1]], "images": ["a"]}, "history[0][1]: a number where a text belongs"),
        ({"query": "Q", "history": "R", "images": ["a"]}, "history: a text where a list belongs; write"),
        ({"texts": ["Q"], "images": ["a"]}, 'texts[0]: a text where an object belongs; write {"user": …, "assistant"'),
        ({"prompt": "<image><image>Q", "image": "a"}, "prompt: 2 <image> for 1 picture; write one where each"),
        ({"query": "Q", "response": "<tool_call>[1]", "image": "a"}, "response: <tool_call> is not closed"),
        ({"query": "Q", "videos": ["a.mp4"]}, "videos: videos and sounds cannot be trained on here"),
        ({"query": "Q", "image": "a", "objects": {"bbox": [[1, 2, 3, 4]]}}, "objects: boxes beside the messages"),
    ],
)
def test_a_bad_row_of_another_trainer_is_named(row: dict[str, object], problem: str, read) -> None:
    with pytest.raises(DataError) as caught:
        read(row)
    assert f"d.jsonl:1: {problem}" in str(caught.value)
    assert str(caught.value).startswith("1 problem in ")
