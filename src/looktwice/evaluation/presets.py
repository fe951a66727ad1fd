"""How published scores were made: pixels, thinking and wording of each benchmark."""

from __future__ import annotations

from dataclasses import dataclass

from looktwice.config import EvalConfig

FINAL_ANSWER = "End your response with 'Final answer: '."
_WORDED = frozenset(
    ["vstar", "hrbench4k", "hrbench8k", "mme_realworld", "mme_realworld_lite", "treebench", "scienceqa", "mathvista"]
) | {"mmvp", "cvbench"}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Bounds of a whole picture, the benchmarks that are asked with thinking, and those that get `suffix` as their last
    line."""

    min_pixels: int
    max_pixels: int
    thinking: frozenset[str]
    suffix: str
    with_suffix: frozenset[str]


_OVIS2_5 = Preset(
    min_pixels=1024**2,
    max_pixels=1792**2,
    thinking=frozenset(["mathvista"]),
    suffix=FINAL_ANSWER,
    with_suffix=_WORDED,
)
PRESETS: dict[str, Preset] = {"ovis2.5-2b": _OVIS2_5, "ovis2.5-9b": _OVIS2_5}
"""Source: VLMEvalKit, vlmeval/vlm/ovis/ovis.py. Of the benchmarks with thinking there only MathVista is one of ours, at
both sizes; choices, yes or no and mathematics get the suffix."""


def with_preset(config: EvalConfig) -> EvalConfig:
    """The settings with the pixel bounds of their preset, where they name none themselves."""
    preset = PRESETS.get(config.preset)
    if preset is None:
        return config
    own = {"min_pixels": preset.min_pixels, "max_pixels": preset.max_pixels}
    return config.model_copy(update={name: value for name, value in own.items() if getattr(config, name) is None})


def wording_of(config: EvalConfig, bench: str) -> tuple[bool, str | None]:
    """Whether a benchmark is asked with thinking, and the line added to its questions: by the settings that are given,
    else by the preset."""
    preset = PRESETS.get(config.preset)
    if preset is None:
        return config.enable_thinking, config.suffix
    thinking = config.enable_thinking if "enable_thinking" in config.model_fields_set else bench in preset.thinking
    return thinking, config.suffix or (preset.suffix if bench in preset.with_suffix else None)
