"""The HTML page of a run's rollouts: thousands of them to filter and sort, siblings side by side, text by token.

What is shown is data inside the page, from which its script makes the rollouts that are in sight; so the page opens
at once, however many there are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from looktwice.answers import answers_match, extract_answer
from looktwice.config import GRPOConfig
from looktwice.errors import DataError, LooktwiceError, counted
from looktwice.formats.files import RowFile
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.report.album import Album
from looktwice.report.html import write_html
from looktwice.report.sample_view import pieces_of
from looktwice.rollout.trajectory import Trajectory
from looktwice.training.folder import CONFIG_FILE, checkpoints
from looktwice.training.trajectories import Recorded, read_trajectories, written_steps

ITEMS, SCRIPT = "items.js", "trajectories.js"
TEXT_BYTES = 8_000_000
LONGEST_TEXT = 4_000
FINAL = "final_model"
LEVELS = 9
SMALLEST_GAP, DECADES = 1e-6, 6
"""A gap of this is level 1, one of a nat level 9; below it is none."""

Line = dict[str, Any]


def write_trajectory_page(path: Path, places: Sequence[Path]) -> None:
    """Write the page of step files, or of folders of them, the last step first.

    Rollouts that have no room in the page are left out, those of the earliest steps first. Raises DataError where there
    are none, or for a file that is none of trajectories.
    """
    steps = step_files(places)
    run = next(iter(steps.values())).parent.parent
    processor = processor_of(run)
    groups, num_left_out = groups_within(steps, processor)
    if not groups:
        raise DataError(f"{places[0]}: its first group alone has no room on a page; look at it with shorter rollouts")
    lines = [line for group in groups for line in group["rollouts"]]
    images = add_images(groups)
    names = [*dict.fromkeys(name for line in lines for name in line["parts"])]
    write_html(
        path,
        "trajectories.html.jinja",
        scripts=(ITEMS, SCRIPT),
        title=f"Rollouts of {run.absolute().name}",
        lead=_lead(
            lines,
            {group["step"] for group in groups},
            num_left_out,
            images.num_left_out,
            has_tokens=processor is not None,
        ),
        data={"images": images.entries, "groups": groups, "terms": names, "hasTokens": processor is not None},
    )


def _lead(lines: Sequence[Line], steps: set[int], num_left_out: int, num_images: int, *, has_tokens: bool) -> str:
    last, first = max(steps), min(steps)
    which = f"step {first}" if first == last else f"{counted(len(steps), 'step')}, {first} to {last}"
    told = [f"{counted(len(lines), 'rollout')} of {which}"]
    if num_left_out:
        told.append(
            f"{num_left_out:,} rollouts of the earliest steps left out for the size of the page; name fewer steps"
        )
    if num_images:
        told.append(f"{num_images:,} pictures left out for the size of the page")
    if not has_tokens:
        told.append("the run folder has no model whose tokenizer could tell the tokens apart")
    return ". ".join(f"{one[:1].upper()}{one[1:]}" for one in told) + "."


def step_files(places: Sequence[Path]) -> dict[int, Path]:
    """The files by their steps, the last one first. Raises DataError where there are none, or two of one step."""
    found: dict[int, Path] = {}
    for place in places:
        named = written_steps(place if place.is_dir() else place.parent)
        for step, path in named.items():
            if place.is_dir() or path.name == place.name:
                if found.get(step, path) != path:
                    raise DataError(f"{path} and {found[step]} are of one step of two runs; give one run a page")
                found[step] = path
    if not found:
        raise DataError(f"{places[0]}: no step-N.jsonl.zst of a run; name a file or a folder of them")
    return dict(sorted(found.items(), reverse=True))


def processor_of(run: Path) -> Ovis2_5Processor | None:
    """That of the run's final model or last checkpoint, or of the model it began with; None where there is none."""
    folders = [run / FINAL, *reversed(checkpoints(run).values())]
    names = [str(folder) for folder in folders if (folder / "tokenizer.json").is_file()]
    try:
        if not names:
            names = [str(GRPOConfig.read(run / CONFIG_FILE)["sft_checkpoint_path"])]
        return Ovis2_5Processor.from_pretrained(names[0])
    except (LooktwiceError, OSError, KeyError, ValueError):
        return None


def groups_within(steps: dict[int, Path], processor: Ovis2_5Processor | None) -> tuple[list[Line], int]:
    """The groups whose texts have room, as the page takes them, and how many rollouts have none."""
    groups: list[Line] = []
    left, num_left_out = TEXT_BYTES, 0
    for step, path in steps.items():
        if left <= 0:
            num_left_out += len(RowFile(path))
            continue
        for recorded in read_trajectories(path):
            group = group_line(step, recorded, processor) if left > 0 else None
            left -= len(json.dumps(group)) if group else 0
            if group and left >= 0:
                groups.append(group)
            else:
                num_left_out += len(recorded)
    return groups, num_left_out


def group_line(step: int, group: Sequence[Recorded], processor: Ovis2_5Processor | None) -> Line:
    """A group as the page takes it. `sources` name its pictures, for which `add_images` puts numbers."""
    first = group[0].played
    solution = first.solution
    return {
        "step": step,
        "group": first.group,
        "where": first.source,
        "question": first.question[:LONGEST_TEXT],
        "gold": solution if isinstance(solution, str) else " or ".join(solution),
        "goldBoxes": [[*box] for box in first.gold_boxes],
        "sources": [*group[0].images],
        "sizes": [[*size] for size in first.trajectory.image_sizes],
        "rollouts": [rollout_line(one, number, processor) for number, one in enumerate(group, 1)],
    }


def rollout_line(one: Recorded, number: int, processor: Ovis2_5Processor | None) -> Line:
    """A rollout as the page takes it; its `text` is a list of runs, see `runs_of`."""
    trajectory, reward = one.trajectory, one.reward
    answer = extract_answer(trajectory.text)
    gaps = gaps_of(one)
    return {
        "n": number,
        "right": bool(answers_match(answer, one.played.solution)),
        "answer": answer[:LONGEST_TEXT] if answer else None,
        "reward": None if reward.error else round(reward.total, 4),
        "failed": reward.error,
        "parts": {name: round(value, 4) for name, value in reward.parts.items()},
        "advantage": round(one.advantage, 4),
        "stop": trajectory.stop_reason,
        "error": trajectory.error,
        "tokens": trajectory.num_sampled,
        "visual": trajectory.num_visual_tokens,
        "gap": float(f"{max(gaps):.2g}") if gaps else None,
        "calls": [
            {
                "box": None if call.box is None else [*call.box],
                "asked": None if call.requested is None else [*call.requested],
                "size": None if call.size is None else [*call.size],
                "error": call.error,
                "image": call.image_number,
            }
            for call in trajectory.calls
        ],
        "text": list(runs_of(trajectory, gaps, processor)) if processor else [{"said": [trajectory.text]}],
    }


def gaps_of(one: Recorded) -> list[float]:
    """By how much trainer and sampler disagree about each sampled id, nats, before the first update; empty where the
    rollout was left out of training."""
    if not one.trainer_logprobs:
        return []
    sampled = one.trajectory.of_sampled(one.trajectory.sampling_logprobs)
    return [abs(trained - own) for trained, own in zip(one.trainer_logprobs[0], sampled)]


def runs_of(trajectory: Trajectory, gaps: Sequence[float], processor: Ovis2_5Processor) -> Iterator[Line]:
    """Text and crops in order.

    `said` are the pieces that the policy wrote, `sure` the probability of each in percent, `gap` a letter each with its
    level from 0 to 9; `put` is text of the tool or the template; `crop` stands where the next crop was put in.
    """
    start, end = processor.config.image_start_token_id, processor.config.image_end_token_id
    ids, sampled = trajectory.completion_ids, trajectory.is_sampled
    gap_at = _at_sampled(gaps, sampled)
    place = 0
    while place < len(ids):
        if ids[place] == start:
            place = ids.index(end, place) + 1 if end in ids[place:] else len(ids)
            yield {"crop": True}
            continue
        last = place
        while last < len(ids) and sampled[last] == sampled[place] and ids[last] != start:
            last += 1
        pieces = list(pieces_of(ids[place:last], sampled[place:last], processor))
        if not sampled[place]:
            yield {"put": "".join(piece.text for piece in pieces)}
        else:
            yield _said(pieces, trajectory.sampling_logprobs[place:last], gap_at[place:last] if gaps else [])
        place = last


def _said(pieces: Sequence[Any], logprobs: Sequence[float], gaps: Sequence[float]) -> Line:
    """A run of sampled pieces; one of several ids, such as a letter of several bytes, has the least sure of them."""
    sure, level, place = [], "", 0
    for piece in pieces:
        after = place + len(piece.ids)
        sure.append(round(100 * math.exp(min(logprobs[place:after]))))
        level += str(level_of(max(gaps[place:after]))) if gaps else ""
        place = after
    return {"said": [piece.text for piece in pieces], "sure": sure, "gap": level}


def level_of(gap: float) -> int:
    """A gap in nats as a level from 0 to 9, on a logarithmic scale from 1e-6 to 1."""
    if gap < SMALLEST_GAP:
        return 0
    return min(LEVELS, 1 + int(math.log10(gap / SMALLEST_GAP) / DECADES * (LEVELS - 1) + 1e-9))


def _at_sampled(values: Sequence[float], sampled: Sequence[bool]) -> list[float]:
    each = iter(values)
    return [next(each, 0.0) if flag else 0.0 for flag in sampled]


def add_images(groups: Sequence[Line]) -> Album:
    """The pictures and crops of all groups, their numbers put into the groups in place of the sources."""
    crops = {
        (str(group["sources"]), str(call["box"]), call["image"])
        for group in groups
        for line in group["rollouts"]
        for call in line["calls"]
        if call["box"]
    }
    wholes = {name for group in groups for name in group["sources"]}
    album = Album(len(crops) + len(wholes))
    for group in groups:
        sources = [Path(name) for name in group.pop("sources")]
        group["names"] = [source.name for source in sources]
        group["images"] = [album.whole(source) for source in sources]
        for line in group["rollouts"]:
            for call in line["calls"]:
                if call["box"] and 0 < call["image"] <= len(sources):
                    call["crop"] = album.crop(sources[call["image"] - 1], call["box"], call["size"])
    return album
