"""`looktwice ask`: one question about a picture or a video, and the answer with its crops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from looktwice.cli.arguments import argument, read_command, write_json
from looktwice.config import InferenceConfig
from looktwice.errors import ConfigError
from looktwice.model.location import locate
from looktwice.paths import check_output_file, check_shown_file, expanded, place
from looktwice.processing.addresses import source_of


def run(words: Sequence[str]) -> None:
    """Ask a model about a picture or a video: looktwice ask photo.jpg "What does the sign say?"."""
    given, config = read_command(
        run,
        "ask",
        "PICTURE QUESTION",
        words,
        InferenceConfig,
        argument("image", nargs="?", help="picture or video to look at"),
        argument("text", nargs="?", metavar="question", help="what to ask about it"),
        argument("--image_path", help="the picture or video, as a flag"),
        argument("--question", help="the question, as a flag"),
        argument("--output_json", type=place, help="also write the answer to this file"),
    )
    if given["image_path"] and given["image"] and not given["question"] and not given["text"]:
        given["image"], given["text"] = None, given["image"]  # the one word that is left is the question
    if (given["image_path"] and given["image"]) or (given["question"] and given["text"]):
        raise ConfigError("a picture or a question is given twice, with a flag and without; leave one out")
    image, question = given["image_path"] or given["image"], given["question"] or given["text"]
    if not image or not question:
        raise ConfigError('a picture and a question are needed: looktwice ask photo.jpg "What does the sign say?"')
    shown_at = source_of(expanded(image))
    if isinstance(shown_at, Path):
        check_shown_file(shown_at)
    check_output_file(given["output_json"], "--output_json")
    locate(config.model_path)
    # what the model cannot read should not wait for it
    from looktwice.messages import check_question

    check_question(question)
    from looktwice.processing.images import image_size
    from looktwice.processing.video import is_video_file, open_video

    if isinstance(shown_at, Path) and is_video_file(shown_at):
        shown: dict[str, Any] = {"video": open_video(shown_at, config.num_frames)}
    else:
        image_size(shown_at)
        shown = {"image": shown_at}
    from looktwice.inference import OvisInference

    result = OvisInference(config).generate(question=question, **shown)
    if given["output_json"]:  # first: who reads what is printed may leave
        record = {"image_path": image, "question": question, "model_path": config.model_path, **result}
        write_json(given["output_json"], record)
    print_answer(result)


CUT = {
    "max_turns": "cut by --max_turns",
    "max_tokens": "cut by --max_new_tokens",
    "max_turn_tokens": "cut by --max_turn_tokens",
    "max_visual_tokens": "cut by --max_visual_tokens",
    "max_seconds": "cut by --max_seconds",
    "no_room": "cut: there is no memory for a longer cache; set --max_new_tokens or --max_pixels lower",
}


def print_answer(result: dict[str, Any]) -> None:
    if line := describe_sizes(result["picture"]):
        print(line)
    if thinking := result["parsed"]["think_content"]:
        print(f"thinking: {thinking}\n")
    for number, crop in enumerate(result["crops"], 1):
        print(f"crop {number}: {crop['box'] if crop['error'] is None else 'refused, ' + crop['error']}")
    print(f"answer: {result['parsed']['answer_content'] or result['response']}")
    if cut := CUT.get(result["stop_reason"]):
        print(f"({cut})")
    elif result["error"]:
        print(f"(ended by an error: {result['error']})")


def describe_sizes(shown: dict[str, Any] | None) -> str:
    """At which size the model saw the picture or video, where that is not the original one."""
    if shown is None or shown["original"] == shown["seen"]:
        return ""
    (width, height), (seen_width, seen_height) = shown["original"], shown["seen"]
    what = f"video: {shown['frames']} frames of" if "frames" in shown else "picture:"
    return f"{what} {width}x{height}, seen as {seen_width}x{seen_height}"
