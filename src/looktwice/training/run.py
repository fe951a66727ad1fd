"""The start of a run, shared by both stages: everything a user can get wrong is found here, before anything long."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from looktwice.config import DataConfig, StageConfig
from looktwice.data.records import Sample, check_pictures, read_samples
from looktwice.errors import ConfigError
from looktwice.geometry import PixelPolicy
from looktwice.model.weights import locate
from looktwice.processing.processor import Ovis2_5Processor

T = TypeVar("T")


def load_processor(name: str, data: DataConfig) -> Ovis2_5Processor:
    """The checkpoint's processor, under the pixel bounds and box frame that the settings name."""
    processor = Ovis2_5Processor.from_pretrained(locate(name))
    given = {
        "image_min_pixels": data.min_pixels,
        "image_max_pixels": data.max_pixels,
        "crop_min_pixels": data.crop_min_pixels,
        "crop_max_pixels": data.crop_max_pixels,
    }
    processor.policy = override_pixels(processor.policy, **given)
    processor.box_frame = data.box_frame or processor.box_frame
    return processor


def override_pixels(policy: PixelPolicy, **given: int | None) -> PixelPolicy:
    """The policy with the bounds that are given; a minimum left out never stands above a maximum that is given."""
    values = policy.to_dict() | {name: value for name, value in given.items() if value is not None}
    for kind in ("image", "crop"):
        if given.get(f"{kind}_min_pixels") is None:
            values[f"{kind}_min_pixels"] = min(values[f"{kind}_min_pixels"], values[f"{kind}_max_pixels"])
    return PixelPolicy(**values)


def load_samples(path: Path, data: DataConfig, processor: Ovis2_5Processor) -> list[Sample]:
    """All samples of a file, their pictures and boxes checked."""
    samples = read_samples(path, data.image_base_path)
    check_pictures(
        samples, min_side=processor.factor, box_frame=processor.box_frame, overview_size=processor.overview_size
    )
    return samples


def prepare_output(config: StageConfig) -> None:
    """Make sure the run folder can be written. Raises ConfigError when it cannot."""
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{config.output_dir}: cannot be made as a run folder ({error})") from error


def required(value: T | None, flag: str) -> T:
    """The value of a setting that has no default. Raises ConfigError naming its flag."""
    if value is None:
        raise ConfigError(f"{flag} is missing; give it on the command line or in a config file")
    return value
