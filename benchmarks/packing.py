"""One SFT step of the tiny model on 32 samples: packed rows against one sample a row and against a padded batch."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from measure import medians, publish
from torch import Tensor

from looktwice.data.examples import encode_sample
from looktwice.demo.task import make_dataset
from looktwice.formats.sample_file import read_samples
from looktwice.model.adapters import base_of
from looktwice.model.weights import TINY, load_model, locate
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example, Ovis2_5Processor

NUM_SAMPLES = 32


def main() -> None:
    processor = Ovis2_5Processor.from_pretrained(locate(TINY))
    model = base_of(load_model(TINY)).train()
    with tempfile.TemporaryDirectory() as folder:
        files = make_dataset(Path(folder), num_train=NUM_SAMPLES, num_rl=1, num_eval=1)
        samples = read_samples(files.train, folder)
        examples = [encode_sample(sample, processor, max_length=1024) for sample in samples]
    # samples differ in length as real ones do: every other one shows its question alone
    examples = [cut(example) if number % 2 else example for number, example in enumerate(examples)]

    def rows_of(size: int) -> None:
        model.zero_grad()
        for first in range(0, len(examples), size):
            logprobs = model(**pack(examples[first : first + size]).model_inputs()).logprobs
            (-logprobs.sum()).backward()

    def padded() -> None:
        model.zero_grad()
        model(**pad(examples)).loss.backward()

    seconds = medians(
        {"packed": lambda: rows_of(NUM_SAMPLES), "one_by_one": lambda: rows_of(1), "padded": padded}, repeats=5
    )
    num_tokens = sum(len(example) for example in examples)
    publish(
        {
            "packed_tokens_per_s": num_tokens / seconds["packed"],
            "one_by_one_vs_packed": seconds["one_by_one"] / seconds["packed"],
            "padded_vs_packed": seconds["padded"] / seconds["packed"],
        }
    )


def cut(example: Example) -> Example:
    """The sample up to its first picture and the few tokens after it, all of them trained."""
    end = next(place for place, trained in enumerate(example.loss_mask) if trained)
    mask = [False] * (end - 4) + [True] * 4
    return Example(input_ids=example.input_ids[:end], loss_mask=mask, images=example.images[:1])


def pad(examples: list[Example]) -> dict[str, Tensor]:
    longest = max(len(example) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.tensor(example.input_ids)
        trained = torch.tensor(example.loss_mask)
        labels[row, : len(example)] = torch.where(trained, ids[row, : len(example)], -100)
        mask[row, : len(example)] = 1
    images = [image for example in examples for image in example.images]
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask,
        "pixel_values": torch.cat([image.pixel_values for image in images]),
        "image_grid_thw": torch.tensor([image.grid_thw for image in images]),
    }


if __name__ == "__main__":
    main()
