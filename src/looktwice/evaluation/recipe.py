"""The recipe of a result: all that its numbers depend on, so that they can be made again or found not to compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from looktwice.benches.files import BenchFiles
from looktwice.config import AnswerConfig, EvalConfig
from looktwice.errors import ConfigError, short
from looktwice.evaluation.presets import wording_of
from looktwice.inference import OvisInference
from looktwice.model.files import weights_fingerprint
from looktwice.training.provenance import environment
from looktwice.training.record import fingerprint

THINKING = "enable_thinking"
"""The setting of an answer that each benchmark has for itself."""


def recipe_of(config: EvalConfig, inference: OvisInference, benches: Mapping[str, BenchFiles]) -> dict[str, Any]:
    """The recipe: model, pixels, how answers are generated, the judge, and for each benchmark its files and wording."""
    generation = config.answer(seed=config.seed)
    processor = inference.processor
    return {
        "model": {
            "name": config.model_path,
            "fingerprint": weights_fingerprint(config.model_path),
            "dtype": str(inference.model.dtype).removeprefix("torch."),
            "quantization": config.quantization,
        },
        "pixels": asdict(processor.policy),
        "box_frame": processor.box_frame,
        "generation": {name: _plain(generation, name) for name in AnswerConfig.model_fields if name != THINKING},
        "samples": config.samples,
        "preset": config.preset,
        "judge": {"url": config.judge, "model": config.judge_model} if config.judge else None,
        "benches": {name: bench_recipe(config, name, files) for name, files in benches.items()},
    }


def _plain(generation: AnswerConfig, name: str) -> Any:
    value = getattr(generation, name)
    return list(value) if isinstance(value, tuple) else value


def bench_recipe(config: EvalConfig, name: str, files: BenchFiles) -> dict[str, Any]:
    """What is asked of a benchmark and how."""
    thinking, suffix = wording_of(config, name)
    return {
        "files": {path.name: fingerprint(path) for path in files.paths},
        "rows": len(files),
        "limit": config.limit,
        "thinking": thinking,
        "suffix": suffix,
        "scorer": files.bench.score.__name__,
    }


def start_of(inference: OvisInference, benches: Mapping[str, BenchFiles], data: Path) -> dict[str, Any]:
    """On what and from where a result was made: of one start, and no part of the recipe."""
    device = str(next(inference.model.parameters()).device)
    places = {name: [str(path.absolute()) for path in files.paths] for name, files in benches.items()}
    folders = {name: [str(folder.absolute()) for folder in files.folders] for name, files in benches.items()}
    return {**environment(device), "data": str(data.absolute()), "places": places, "folders": folders}


def check_same(ours: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError, naming each difference, where a result was made by another recipe than this one.

    How much is asked is no difference (benchmarks, rows, samples), nor is a judge that only one of them has.
    """
    if told := differences(*binding(ours, theirs)):
        raise ConfigError(f"{where}: made by another recipe, so it is not gone on with; name another --out:", *told)


def binding(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of two recipes has to be the same for their answers to belong together."""
    shared = sorted(ours["benches"].keys() & theirs["benches"].keys())
    left_out = {"samples"} if ours["judge"] and theirs["judge"] else {"samples", "judge"}

    def of(recipe: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in recipe.items() if name not in left_out}
        benches = {name: {**recipe["benches"][name], "limit": None} for name in shared}
        return {**kept, "benches": benches}

    return of(ours), of(theirs)


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Each setting in which two recipes differ, as `name: theirs there, ours here`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = [*ours, *(name for name in theirs if name not in ours)]
        return [
            line
            for inner in names
            for line in differences(ours.get(inner), theirs.get(inner), f"{name}.{inner}" if name else inner)
        ]
    return [] if ours == theirs else [f"{name}: {short(repr(theirs))} there, {short(repr(ours))} here"]
