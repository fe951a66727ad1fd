"""`looktwice ask`: one question about pictures or a video, and the answer with its crops; or a file of questions."""

from __future__ import annotations

import os
import sys
from argparse import SUPPRESS, BooleanOptionalAction
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looktwice.cli.arguments import Argument, argument, read_command, write_json
from looktwice.config import InferenceConfig
from looktwice.errors import ConfigError, counted
from looktwice.model.location import locate
from looktwice.paths import check_data_file, check_output_file, check_shown_file, expanded, place
from looktwice.processing.addresses import source_of

if TYPE_CHECKING:
    from looktwice.asking.answer import Answer
    from looktwice.inference import OvisInference

THINKING = argument(
    "--thinking",
    dest="enable_thinking",
    action=BooleanOptionalAction,
    default=SUPPRESS,
    help="short for --enable_thinking",
)
OWN: tuple[Argument, ...] = (
    argument("words", nargs="*", metavar="picture", help="pictures or a video to look at; the question comes last"),
    argument("--image_path", action="append", default=[], help="the picture or video, as a flag; one for each"),
    argument("--question", help="the question, as a flag"),
    argument("--output_json", type=place, help="also write the answer to this file"),
    argument("--save", type=place, help="draw crops, boxes and points on the picture, into this file"),
    argument("--batch", type=place, help="answer the questions of this file (JSON lines)"),
    argument("--out", type=place, help="file of the answers to --batch; a second run goes on with it"),
    argument("--image_base_path", type=place, help="folder that the pictures of --batch are relative to"),
    THINKING,
)


def run(words: Sequence[str]) -> int:
    """Ask a model about pictures or a video: looktwice ask photo.jpg "What does the sign say?"."""
    given, config = read_command(run, "ask", "PICTURE... QUESTION", words, InferenceConfig, *OWN)
    if given["batch"] or given["out"]:
        return _ask_file(given, config)
    if given["image_base_path"]:
        raise ConfigError("--image_base_path is of --batch; write the whole path of a picture")
    shown, question = _named(given)
    sources = [source_of(expanded(image)) for image in shown]
    for source in sources:
        if isinstance(source, Path):
            check_shown_file(source)
    check_output_file(given["output_json"], "--output_json", _paths(sources))
    check_output_file(given["save"], "--save", _paths(sources))
    locate(config.model_path)
    # what the model cannot read should not wait for it
    from looktwice.messages import check_question

    check_question(question)
    what = shown_with(sources, config.num_frames)
    if given["save"]:
        _check_drawing(given["save"], what)

    def keep(answer: Answer) -> None:
        record = {"image_path": shown[0] if len(shown) == 1 else shown, "question": question}
        if given["output_json"]:
            write_json(given["output_json"], {**record, "model_path": config.model_path, **answer})
        if given["save"]:
            save_drawing(answer, given["save"])

    show_answer(load(config), keep, question=question, **what)
    return 0


def _named(given: dict[str, Any]) -> tuple[list[str], str]:
    """The pictures and the question that the words and the flags name. Raises ConfigError where one is missing."""
    images, words, question = given["image_path"], given["words"], given["question"]
    if not question and words:
        *words, question = words
    is_asked_twice = given["question"] and len(words) > 1 and not os.path.exists(expanded(words[-1]))
    if (images and words) or is_asked_twice:
        raise ConfigError("a picture or a question is given twice, with a flag and without; leave one out")
    if not (images or words) or not question:
        raise ConfigError('a picture and a question are needed: looktwice ask photo.jpg "What does the sign say?"')
    return images or words, question


def _paths(sources: Sequence[str | Path]) -> list[Path | None]:
    return [source for source in sources if isinstance(source, Path)]


def shown_with(sources: Sequence[str | Path], num_frames: int) -> dict[str, Any]:
    """Pictures or one video as `generate` takes them. Raises ImageError for what cannot be read, ConfigError for a
    video beside something else."""
    from looktwice.processing.images import image_size
    from looktwice.processing.video import is_video_file, open_video

    videos = [source for source in sources if isinstance(source, Path) and is_video_file(source)]
    if videos and len(sources) > 1:
        raise ConfigError(f"{videos[0]}: a video beside something else; ask about pictures, or one video alone")
    if videos:
        return {"video": open_video(videos[0], num_frames)}
    for source in sources:
        image_size(source)
    return {"image": list(sources)} if sources else {}


def load(config: InferenceConfig) -> OvisInference:
    """The model, and on stderr what it is and where it computes."""
    from looktwice.console import open_console
    from looktwice.inference import OvisInference

    inference = OvisInference(config)
    open_console(stderr=True).out(inference.described)
    return inference


def show_answer(inference: OvisInference, keep: Callable[[Answer], None], **asked: Any) -> None:
    """Ask what `stream` takes, keep the answer and show it: on a terminal while it is written, else when it is whole.

    It is kept before it is printed: who reads what is printed may leave.
    """
    from looktwice.asking.events import Done
    from looktwice.console import open_console, say
    from looktwice.report.live_answer import LiveAnswer, plain_lines

    console = open_console()
    if console.is_interactive:
        keep(LiveAnswer(console).follow(inference.stream(**asked)))
        return
    *_, done = inference.stream(**asked)
    assert isinstance(done, Done)
    keep(done.answer)
    for line in plain_lines(done.answer):
        say(line)


def _check_drawing(path: Path, what: dict[str, Any]) -> None:
    from PIL import Image

    if "video" in what:
        raise ConfigError("--save draws on pictures, and this is a video; leave it out")
    if path.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"--save {path}: not the name of a picture; end it in .png or .jpg")


def save_drawing(answer: Answer, path: Path) -> None:
    """Write the annotated pictures; those after the first beside it, with their number."""
    from looktwice.report.drawing import annotated

    path.parent.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(annotated(answer), 1):
        image.save(path if number == 1 else path.with_stem(f"{path.stem}-{number}"))


def _ask_file(given: dict[str, Any], config: InferenceConfig) -> int:
    """Answer a file of questions; 1 where some rows could not be answered."""
    batch, out = given["batch"], given["out"]
    if not (batch and out):
        raise ConfigError("--batch names the questions and --out the answers; give both")
    for name in ("words", "image_path", "question", "output_json", "save"):
        if given[name]:
            raise ConfigError(
                f"{'a picture or a question' if name == 'words' else f'--{name}'} beside --batch; leave it out"
            )
    check_data_file(batch)
    check_output_file(out, "--out", [batch])
    locate(config.model_path)
    from looktwice.asking.question_file import QuestionFile

    file = QuestionFile(batch, out, image_base_path=given["image_base_path"] or Path(), model_path=config.model_path)
    if file.num_left:
        file.answer_all(load(config))
    print(file.summary)
    if file.num_failed:
        print(f"{counted(file.num_failed, 'row')} could not be answered; the same command tries again", file=sys.stderr)
    return 1 if file.num_failed else 0
