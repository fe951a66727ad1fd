"""Both engines hold to one contract: the built-in one on the tiny model, vLLM on answers recorded about it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.engine.contract import EngineContract, crop, prompt, tiny_processor
from tests.engine.fake_vllm import FakeVllm, serving

from looktwice.engine.builtin import BuiltinEngine
from looktwice.engine.vllm import VllmEngine
from looktwice.model.location import TINY
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.weights import load_model

__all__ = ["crop", "prompt", "tiny_processor"]


@pytest.fixture(scope="module")
def tiny_model() -> Ovis2_5ForConditionalGeneration:
    return load_model(TINY).eval()  # type: ignore[return-value]


class TestBuiltin(EngineContract):
    @pytest.fixture
    def engine(self, tiny_model, tiny_processor) -> BuiltinEngine:
        return BuiltinEngine(tiny_model, decode=tiny_processor.decode)


class TestVllm(EngineContract):
    @pytest.fixture
    def engine(self, tiny_processor) -> Iterator[VllmEngine]:
        with serving(FakeVllm(tiny_processor.decode)) as fake:
            yield VllmEngine([fake.address], tiny_processor.config)
