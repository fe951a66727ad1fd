"""What data costs before and between the steps: opening a set, its first batch, preparing a picture, workers."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from functools import partial
from operator import attrgetter
from pathlib import Path

import numpy as np
from measure import medians, publish
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import looktwice
from looktwice.checking.check import judge
from looktwice.config import CheckConfig
from looktwice.data.examples import Encoder, Packer
from looktwice.data.loader import prepare_batches
from looktwice.data.order import BatchOrder
from looktwice.data.sample import Sample
from looktwice.formats.files import RowFile
from looktwice.formats.sample_file import SampleFile, read_samples
from looktwice.geometry import Size
from looktwice.processing.image_processor import Ovis2_5ImageProcessor
from looktwice.processing.images import open_image
from looktwice.processing.processor import Ovis2_5Processor

TINY_MODEL = Path(looktwice.__file__).parent / "demo" / "tiny_model"
NUM_ROWS = 1_000_000
NUM_ROWS_OF_SET = 100_000
NUM_IMAGES = 8
NUM_ROWS_CHECKED = 2_000
REPEATS_OF_CHECK = 5
SAMPLES_PER_STEP = 16
NUM_LARGE, LARGE_BATCH, REPEATS_OF_WORKERS = 160, 4, 5
SIZES = (Size(640, 480), Size(640, 427), Size(480, 640), Size(500, 375), Size(1024, 768))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        opened = in_fresh_process("open_rows", write_set(folder / "rows.jsonl", NUM_ROWS))
        for number in range(NUM_IMAGES):
            write_photo(folder / f"{number}.jpg", Size(640, 480))
        first_batch = in_fresh_process("first_batch", write_set(folder / "set.jsonl", NUM_ROWS_OF_SET))
        publish(
            {
                "open_1m_rows_s": opened["seconds"],
                "open_1m_rows_mb": opened["megabytes"],
                "first_batch_s": first_batch["finished"] - first_batch["started"],
                "preprocess_vs_pillow": preprocess_vs_pillow(folder),
                **workers_vs_plain(folder),
                **check_rows_per_s(folder),
            }
        )


def in_fresh_process(function: str, path: Path) -> dict[str, float]:
    """What a function of this file prints about the file, in a new interpreter; and when that was `started`."""
    # as a command that trains does: what the workers import is imported while this process imports the rest
    code = f"from looktwice.data.loader import warm_up; warm_up(); import data; data.{function}({str(path)!r})"
    command = [sys.executable, "-c", code]
    started = time.time()
    done = subprocess.run(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True)
    return {**json.loads(done.stdout), "started": started}


def open_rows(path: str) -> None:
    before, started = memory_mb("VmRSS"), time.perf_counter()
    rows = RowFile(path)
    seconds = time.perf_counter() - started
    assert len(rows) == NUM_ROWS and rows[NUM_ROWS - 1].values
    print(json.dumps({"seconds": seconds, "megabytes": memory_mb("VmHWM") - before}))


def memory_mb(name: str) -> float:
    """A figure of this process as Linux tells it, such as VmHWM, the most memory it ever held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def first_batch(path: str) -> None:
    samples = SampleFile(path, Path(path).parent)
    order = BatchOrder(samples.num_samples, samples_per_step=SAMPLES_PER_STEP, num_epochs=1, max_steps=None, seed=0)
    processor = Ovis2_5Processor.from_pretrained(TINY_MODEL)
    encoder = Encoder(processor=processor, max_length=4096, length_policy="error")
    steps = ([samples.sample(number) for number in order[step]] for step in range(order.total_steps))
    with closing(prepare_batches(encoder, steps, join=Packer(max_tokens_per_row=16384), num_workers=2)) as batches:
        batch = next(batches)
        finished = time.time()
    assert sum(row.num_loss_tokens for row in batch.rows)
    print(json.dumps({"finished": finished}))


def workers_vs_plain(folder: Path) -> dict[str, float]:
    """Large pictures a second from two workers, in times of a plain DataLoader's over /dev/shm, and what an item costs
    the process that asks. From the first batch on; medians of interleaved repeats."""
    for number in range(NUM_IMAGES):
        write_photo(folder / f"{number}.jpg", Size(896, 896))
    path = write_set(folder / "large.jsonl", NUM_LARGE)
    processor = Ovis2_5Processor.from_pretrained(TINY_MODEL)
    processor.policy = processor.policy.override(image_max_pixels=896 * 896)
    encoder = Encoder(processor=processor, max_length=100_000, length_policy="error")
    samples = read_samples(path, folder)
    batches = [samples[first : first + LARGE_BATCH] for first in range(0, NUM_LARGE, LARGE_BATCH)]
    packer = Packer(max_tokens_per_row=100_000)
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    costs = []
    for _ in range(REPEATS_OF_WORKERS):
        for name, seconds in rates.items():
            ours = prepare_batches(encoder, batches, join=packer, num_workers=2, where=attrgetter("where"))
            plain = DataLoader(
                Encoded(encoder),
                batch_sampler=batches,
                collate_fn=packer,
                num_workers=2,
                multiprocessing_context="forkserver",
            )
            with closing(ours) as prepared:
                iterator = prepared if name == "ours" else iter(plain)
                next(iterator)
                started, cpu_started = time.perf_counter(), time.process_time()
                num_items = sum(len(batch.rows[0].cu_seqlens) - 1 for batch in iterator)
                seconds.append(num_items / (time.perf_counter() - started))
                costs += [1000 * (time.process_time() - cpu_started) / num_items] if name == "ours" else []
    medians_of = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "workers_items_per_s": medians_of["ours"],
        "workers_vs_plain": medians_of["ours"] / medians_of["plain"],
        "workers_ms_an_item_in_the_asking_process": statistics.median(costs),
    }


class Encoded(Dataset):
    """A plain map-style dataset."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __getitem__(self, sample: Sample) -> object:
        return self.encoder(sample)


def preprocess_vs_pillow(folder: Path) -> float:
    """Median over pictures of the time from file to patches, in times of Pillow's own decoding and resizing."""
    processor = Ovis2_5ImageProcessor()
    ratios = []
    for size in SIZES:
        path = write_photo(folder / f"{size.width}x{size.height}.jpg", size)
        seconds = medians(
            {
                "pillow": partial(decode_and_resize, path, processor.overview_size(size)),
                "full": lambda path=path: processor.patch_image(open_image(path)),
            },
            repeats=40,
        )
        ratios.append(seconds["full"] / seconds["pillow"])
    return statistics.median(ratios)


def decode_and_resize(path: Path, size: Size) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB").resize(size, Image.Resampling.BILINEAR)


def check_rows_per_s(folder: Path) -> dict[str, float]:
    """Rows that `data check` judges in a second of processor time, each with a picture file of its own.

    With the tiny model's tokenizer, and without a model, where nothing is tokenised.
    """
    photo = (folder / "0.jpg").read_bytes()
    for number in range(NUM_ROWS_CHECKED):
        (folder / f"checked{number}.jpg").write_bytes(photo)
    path = write_set(folder / "checked.jsonl", NUM_ROWS_CHECKED, image_name="checked{}.jpg")
    config = CheckConfig(image_base_path=folder)
    figures = {}
    for name, processor in (
        ("check_rows_per_s_per_core", Ovis2_5Processor.from_pretrained(TINY_MODEL)),
        ("check_rows_per_s_per_core_without_model", None),
    ):
        seconds = []
        for _ in range(REPEATS_OF_CHECK):
            started = time.process_time()  # of all threads, and what else runs here does not count
            verdict = judge([path], config, processor)
            seconds.append(time.process_time() - started)
        assert verdict.num_images == NUM_ROWS_CHECKED and not verdict.counts
        figures[name] = NUM_ROWS_CHECKED / statistics.median(seconds)
    return figures


def write_set(path: Path, num_rows: int, image_name: str | None = None) -> Path:
    """Rows of the documented form, about 500 bytes each, that share a few pictures, or have their own."""
    thought = "The cup stands on the left. " * 8
    answer = f"<think>\n{thought}{{Crop cup 1 [40, 60, 200, 220]}} It is red.\n</think>\n\n<answer>red</answer>"
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            # equal texts would be tokenised once
            question = {
                "Q": f"What colour is the cup of picture {number}?",
                "A3": answer.replace("The cup", f"Cup {number}"),
            }
            row = {
                "image_path": image_name.format(number) if image_name else f"{number % NUM_IMAGES}.jpg",
                "image_id": f"{number:012}",
                "QnA": [question],
            }
            file.write(json.dumps(row) + "\n")
    return path


def write_photo(path: Path, size: Size) -> Path:
    """A picture with soft shapes and grain, which makes a JPEG about as large as a photograph's."""
    random = np.random.default_rng(0)
    shapes = random.integers(0, 256, (size.height // 16, size.width // 16, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(shapes).resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
    grainy = soft + random.integers(-12, 13, soft.shape, dtype=np.int16)
    Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return path


if __name__ == "__main__":
    main()
