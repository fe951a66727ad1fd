"""Adapters beside their model: several in one batch, loaded and removed while the server runs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from tests.engine.fake_vllm import FakeVllm, serving
from tests.server.conftest import Served, served
from tests.server.test_chat import LOOKS
from tests.server.test_service import is_empty, wait_for

from looktwice.config import ServeConfig
from looktwice.errors import CheckpointError
from looktwice.inference import OvisInference
from looktwice.model.adapter_bank import AdapterBank, why_alone
from looktwice.model.adapters import add_lora, base_of
from looktwice.model.weights import load_model, save_model
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.server.models import Models, default_name


def make_adapter(folder: Path, seed: int, **options: object) -> Path:
    """An adapter of the small model that changes what it says."""
    model = load_model("tiny")
    torch.manual_seed(seed)
    adapted = add_lora(base_of(model), r=4, alpha=8, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape))
    save_model(adapted, folder)
    OvisInference("tiny", device="cpu").processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    make_adapter(folder / "one", 1)
    make_adapter(folder / "two", 2, use_rslora=True)
    make_adapter(folder / "seeing", 3, targets="llm+vit")
    return folder


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Served]:
    adapters = {"one": str(folder / "one"), "seeing": str(folder / "seeing")}
    config = ServeConfig(port=0, device="cpu", adapters=adapters, adapter_folder=folder)
    with served(Models(config), config) as running:
        yield running


def ask(running: Served, model: str, question: list[dict], **options: object) -> str:
    told = running.client.chat.completions.create(model=model, messages=question, max_tokens=16, **options)  # type: ignore[call-overload]
    return told.choices[0].looktwice["response"]


def test_adapters_answer_as_alone_and_in_one_batch_with_their_model(running, folder, question, image) -> None:
    expected = {"tiny": OvisInference("tiny", device="cpu")}
    expected |= {name: OvisInference(folder / name, device="cpu") for name in ("one", "seeing")}
    alone = {
        name: inference.generate(image, "What does it say?", max_new_tokens=16).response
        for name, inference in expected.items()
    }
    assert len({*alone.values()}) == 3
    with ThreadPoolExecutor(6) as threads:
        names = ["tiny", "one", "seeing"] * 4
        told = [*threads.map(lambda name: ask(running, name, question), names)]
    assert told == [alone[name] for name in names]
    assert running.service.models.known["one"].lane == running.service.models.default.lane
    assert running.service.models.known["seeing"].lane == "seeing"


def test_the_models_are_listed_with_the_one_they_are_of(running) -> None:
    told = {model.id: model.parent for model in running.client.models.list()}
    assert told["tiny"] is None and told["one"] == "tiny"
    assert running.client.models.retrieve("one").id == "one"


def test_an_adapter_is_loaded_and_removed_while_the_server_runs(running, folder, question) -> None:
    load, remove = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    with pytest.raises(openai.NotFoundError):
        ask(running, "two", question)
    told = running.http.post(load, json={"lora_name": "two", "lora_path": "two"})
    assert told.status_code == 200 and told.json()["parent"] == "tiny"
    expected = OvisInference(folder / "two", device="cpu")
    shown = question[0]["content"][0]["image_url"]["url"]
    assert ask(running, "two", question) == expected.generate(shown, "What does it say?", max_new_tokens=16).response
    assert running.http.post(load, json={"lora_name": "two", "lora_path": "two"}).json()["error"]["code"] == "taken"
    before = ask(running, "tiny", question)
    assert running.http.post(remove, json={"lora_name": "two"}).json()["deleted"]
    assert ask(running, "tiny", question) == before
    with pytest.raises(openai.NotFoundError):
        ask(running, "two", question)
    assert running.http.post(remove, json={"lora_name": "tiny"}).status_code == 400


@pytest.mark.parametrize("path", ["..", "/", "none", "../adapters", "one/adapter_config.json", ".", ""])
def test_no_folder_outside_the_named_one_is_loaded(running, path) -> None:
    told = running.http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
    assert told.status_code == 400 and told.json()["error"]["code"] in ("no_such_folder", "unusable_model")


def test_without_a_folder_nothing_is_loaded_while_the_server_runs(tiny) -> None:
    told = tiny.http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "one"})
    assert told.status_code == 403 and "--adapter_folder" in told.json()["error"]["message"]


def test_answers_of_an_adapter_that_is_removed_fail_and_free_their_place(folder, question) -> None:
    config = ServeConfig(port=0, device="cpu", adapters={"one": str(folder / "one")}, adapter_folder=folder)
    with served(Models(config), config) as running:
        stream = running.client.chat.completions.create(
            model="one", messages=question, stream=True, temperature=50.0, max_tokens=2000
        )
        next(iter(stream))
        assert running.http.post("/v1/unload_lora_adapter", json={"lora_name": "one"}).json()["deleted"]
        with pytest.raises(openai.APIError, match="removed"):
            list(stream)
        wait_for(lambda: is_empty(running))
        assert ask(running, "tiny", question)


def test_an_adapter_that_changes_more_than_linear_layers_is_told_apart(folder) -> None:
    assert why_alone(folder / "one") is None and why_alone(folder / "two") is None
    assert why_alone(folder / "seeing") == "it changes how pictures are seen"
    with pytest.raises(CheckpointError, match="cannot share a model"):
        AdapterBank(base_of(load_model("tiny"))).read(folder / "seeing")
    with pytest.raises(CheckpointError, match="no usable adapter"):
        why_alone(folder)


def test_a_name_is_made_of_the_folder() -> None:
    assert default_name("outputs/grpo/final_model") == "grpo"
    assert default_name("AIDC-AI/Ovis2.5-2B") == "Ovis2.5-2B" and default_name("tiny") == "tiny"


class Written(FakeVllm):
    """Writes one text whatever it is asked, and goes on with it after a crop."""

    def __init__(self, processor: Ovis2_5Processor, text: str) -> None:
        super().__init__(processor.decode)
        before, call, after = text.partition("</tool_call>")
        self.parts = [processor.tokenizer.encode(part, add_special_tokens=False) for part in (before + call, after)]
        self.call_id = processor.template.token_id("</tool_call>")

    def _recorded(self, request: dict) -> list:
        part = self.parts[self.call_id in request["token_ids"]]
        watched = request["sampling_params"]["logprob_token_ids"]
        return [[token, -0.5, *([-9.0] * (len(watched) - 1))] for token in part]


def test_a_vllm_server_may_do_the_sampling(tiny_models, question) -> None:
    processor = tiny_models.default.processor
    with serving(Written(processor, LOOKS)) as fake:
        config = ServeConfig(port=0, engine="vllm", vllm_servers=(fake.address,))
        with served(Models(config), config) as running:
            told = running.client.chat.completions.create(model="tiny", messages=question).choices[0]
            assert told.message.content == "3" and told.looktwice["crops"][0]["box"] == [20, 30, 100, 90]
            stream = running.client.chat.completions.create(model="tiny", messages=question, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "3"
            form = {"type": "json_object"}
            with pytest.raises(openai.BadRequestError, match="of the built-in engine"):
                running.client.chat.completions.create(model="tiny", messages=question, response_format=form)
            wait_for(lambda: running.service.worker.num_open == 0)
