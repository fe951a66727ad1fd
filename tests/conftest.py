"""Shared fixtures: a fresh tiny model of the real architecture, saved once, and a small data set."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

from looktwice.demo.task import DatasetFiles, make_dataset
from looktwice.demo.tiny import build_config, build_model, build_processor, build_tokenizer
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.processing.processor import Ovis2_5Processor

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processor() -> Ovis2_5Processor:
    tokenizer = build_tokenizer()
    return build_processor(tokenizer, build_config(tokenizer))


@pytest.fixture(scope="session")
def model(processor: Ovis2_5Processor) -> Ovis2_5ForConditionalGeneration:
    """Random weights; tests must not change them."""
    return build_model(processor.config, seed=0).eval()


@pytest.fixture(scope="session")
def model_folder(
    model: Ovis2_5ForConditionalGeneration, processor: Ovis2_5Processor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetFiles:
    return make_dataset(tmp_path_factory.mktemp("dataset"), num_train=6, num_rl=4, num_eval=4, seed=0)
