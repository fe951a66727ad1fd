"""Asking a model from Python and from the repository's root scripts."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import looktwice
from looktwice import inference
from looktwice.config import InferenceConfig, ModelConfig, SFTConfig
from looktwice.errors import CheckpointError, ConfigError, ImageError
from looktwice.geometry import Box, Size
from looktwice.inference import OvisInference, report
from looktwice.messages import VideoPart
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.rollout.trajectory import ToolCall, Trajectory
from looktwice.training.learner import Learner
from looktwice.training.record import Record

ROOT = Path(__file__).parents[1]


@pytest.fixture
def ask(model_folder: Path):
    def make(**settings: object) -> OvisInference:
        values = {"model_path": str(model_folder), "max_new_tokens": 12, "device": "cpu", **settings}
        return OvisInference(InferenceConfig(**values))

    return make


@pytest.fixture
def questions(image: Image.Image) -> list[tuple[Image.Image | None, str]]:
    return [(image, "What is it?"), (None, "And without a picture?"), (image.crop((0, 0, 50, 90)), "Which digit?")]


def test_an_answer_has_the_documented_keys(ask, image) -> None:
    answer = ask().generate(image=image, question="What is it?")
    assert set(answer) == {"response", "parsed", "crops", "stop_reason", "picture"}
    assert set(answer["parsed"]) == {"think_content", "answer_content", "grounding"}
    assert answer["stop_reason"] == "max_tokens" and answer["response"]
    assert json.loads(json.dumps(answer)) == answer


def test_a_finished_rollout_is_reported_as_plain_data() -> None:
    trajectory = Trajectory(
        prompt_ids=[],
        image_size=Size(200, 100),
        text="<think>\nThe <ref>cup</ref><box>(0.1,0.2),(0.5,0.6)</box>.\n</think>\n\nSo: <answer>red</answer>",
        calls=[
            ToolCall(requested=Box(10.5, 5, 60, 55), box=Box(10, 5, 60, 55), size=Size(48, 48), error=None),
            ToolCall(requested=None, box=None, size=None, error="no_box"),
        ],
        stop_reason="answered",
    )
    answer = report(trajectory)
    assert answer["response"] == trajectory.text
    assert answer["parsed"]["think_content"] == "The <ref>cup</ref><box>(0.1,0.2),(0.5,0.6)</box>."
    assert answer["parsed"]["answer_content"] == "red"
    [found] = answer["parsed"]["grounding"]
    written = "(0.1,0.2),(0.5,0.6)"
    assert found == {
        "phrase": "cup",
        "kind": "box",
        "coordinates": pytest.approx((20, 20, 100, 60)),
        "written": written,
    }
    assert answer["crops"] == [
        {"box": [10, 5, 60, 55], "requested": [10.5, 5, 60, 55], "size": [48, 48], "error": None},
        {"box": None, "requested": None, "size": None, "error": "no_box"},
    ]
    assert answer["stop_reason"] == "answered"


def test_a_text_without_an_answer_has_an_empty_one() -> None:
    answer = report(Trajectory(prompt_ids=[], text="<think>\nhm"))
    assert answer["parsed"] == {"think_content": "hm", "answer_content": "", "grounding": []}


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_greedy_answers_of_a_batch_are_those_given_one_by_one(batch_size, ask, questions) -> None:
    together = ask(batch_size=batch_size).generate_batch(questions)
    alone = ask()
    assert together == [alone.generate(image, question) for image, question in questions]


def test_an_image_can_be_a_path_or_a_decoded_one(ask, image, tmp_path) -> None:
    image.save(tmp_path / "picture.png")
    inference = ask()
    answers = [inference.generate(source, "What?") for source in (image, tmp_path / "picture.png")]
    assert answers[0] == answers[1]
    assert answers[0] != inference.generate(None, "What?")


def test_sampled_answers_repeat_with_the_seed(ask, questions) -> None:
    first, again, other = (ask(temperature=1.0, seed=seed).generate_batch(questions) for seed in (0, 0, 1))
    assert first == again != other


# -- what was shown


def test_an_answer_says_at_which_size_the_image_was_seen(ask, image) -> None:
    inference = ask(max_new_tokens=1)
    assert inference.generate(image, "What?")["picture"] == {
        "original": [160, 120],
        "seen": [96, 80],
        "num_tokens": 30,
    }
    assert inference.generate(None, "What?")["picture"] is None


@pytest.mark.parametrize(
    ("size", "seen"), [((1, 5000), [16, 576]), ((5000, 1), [576, 16]), ((9, 400), [16, 576]), ((1, 100_000), [16, 576])]
)
def test_an_image_of_an_extreme_shape_is_clamped_and_answered(ask, size, seen) -> None:
    answer = ask(max_new_tokens=2).generate(Image.new("RGB", size, "red"), "What?")
    assert answer["picture"] == {"original": list(size), "seen": seen, "num_tokens": 36}
    assert answer["response"]


def test_a_video_is_seen_with_all_its_frames(ask, image) -> None:
    frames = [image.rotate(90 * turns) for turns in range(3)]
    answer = ask(max_new_tokens=1).generate(video=frames, question="What happens?")
    assert answer["picture"] == {"original": [160, 120], "seen": [96, 80], "num_tokens": 90, "frames": 3}
    assert json.loads(json.dumps(answer)) == answer


def test_the_order_of_frames_and_the_kind_of_what_is_shown_matter(ask, image) -> None:
    inference = ask(max_new_tokens=1)
    other = image.rotate(180)

    def first_logprob(shown: Image.Image | VideoPart) -> float:
        [trajectory] = inference.play([(shown, "What?")])
        return trajectory.sampling_logprobs[0]

    seen = [image, *(VideoPart(source=frames) for frames in ([image], [image, other], [other, image]))]
    assert len({first_logprob(shown) for shown in seen}) == 4


def test_a_batch_mixes_images_and_videos(ask, questions, image) -> None:
    video = [image, image.rotate(180)]
    together = ask().generate_batch([*questions, (VideoPart(source=video), "What happens?")])
    alone = ask()
    assert together[-1] == alone.generate(video=video, question="What happens?")
    assert together[:-1] == [alone.generate(shown, question) for shown, question in questions]


def test_an_image_beside_a_video_is_refused(ask, image) -> None:
    with pytest.raises(ConfigError, match="a picture and a video are both given"):
        ask().generate(image, "What?", video=[image])


def test_a_question_is_needed(ask, image) -> None:
    with pytest.raises(ConfigError, match="there is no question"):
        ask().generate(image)


def test_no_questions_have_no_answers(ask) -> None:
    assert ask().generate_batch([]) == []


def test_settings_reach_the_episode(ask, image) -> None:
    inference = ask(max_new_tokens=5, enable_thinking=False, max_pixels=64 * 64)
    [trajectory] = inference.play([(image, "What?")])
    assert sum(trajectory.is_sampled) == 5
    assert inference.processor.decode(trajectory.prompt_ids).endswith("<think>\n\n</think>\n\n")
    size = inference.processor.overview_size(Size(*image.size))
    assert size.width * size.height <= 64 * 64
    assert trajectory.prompt_ids.count(inference.processor.config.image_token_id) == size.width * size.height // 16**2


def test_an_adapter_folder_answers_as_the_model_under_training(ask, model_folder, image, tmp_path) -> None:
    processor = Ovis2_5Processor.from_pretrained(model_folder)
    config = SFTConfig(use_lora=True, lora_r=4)
    learner = Learner.load(str(model_folder), ModelConfig(device="cpu"), config, processor, total_steps=1)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in learner.parameters:
            parameter.normal_(0, 0.2)
    learner.save(tmp_path, Record(stage="sft", order={}, settings={}), with_optimizer=False)
    adapted = ask(model_path=str(tmp_path))
    answer = adapted.generate(image, "What is it?")
    adapted.model = learner.base
    assert adapted.generate(image, "What is it?") == answer
    assert ask().generate(image, "What is it?") != answer


def test_bfloat16_answers(ask, image) -> None:
    inference = ask(bf16=True)
    assert inference.model.lm_head.weight.dtype == torch.bfloat16
    assert inference.generate(image, "What is it?")["response"]


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_model_spread_over_gpus_is_bfloat16(model_folder, monkeypatch: pytest.MonkeyPatch, has_gpu: bool) -> None:
    asked = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(inference, "load_model", lambda _, **options: asked.update(options))
    monkeypatch.setattr(inference, "merge", lambda model: model)
    OvisInference(InferenceConfig(model_path=str(model_folder), device="auto"))
    assert (asked["device"], asked["dtype"]) == ("auto", torch.bfloat16 if has_gpu else torch.float32)


def test_a_missing_image_or_model_is_named(ask) -> None:
    with pytest.raises(ImageError, match=r"none\.png: no such picture"):
        ask().generate("none.png", "What?")
    with pytest.raises(CheckpointError, match="no such model folder"):
        ask(model_path="./none")


# -- the root scripts and the package


def test_the_documented_imports_of_the_root_scripts_work() -> None:
    inference, config = (runpy.run_path(str(ROOT / name)) for name in ("inference.py", "config.py"))
    assert inference["OvisInference"] is OvisInference
    assert config["InferenceConfig"] is InferenceConfig


def test_the_package_gives_its_public_names_when_asked() -> None:
    assert looktwice.OvisInference is OvisInference
    for name in looktwice.__all__:
        assert getattr(looktwice, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'OvisInferense'"):
        looktwice.OvisInferense  # noqa: B018


def run_script(name: str, arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    return end.value.code


def test_the_inference_script_prints_the_answer_and_writes_it_as_json(
    model_folder, image, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image.save(tmp_path / "picture.png")
    flags = {
        "model_path": model_folder,
        "image_path": tmp_path / "picture.png",
        "question": "What is it?",
        "max_new_tokens": 6,
        "output_json": tmp_path / "new" / "answer.json",
        "device": "cpu",
    }
    arguments = [word for name, value in flags.items() for word in (f"--{name}", value)]
    assert run_script("inference.py", arguments, monkeypatch) == 0
    record = json.loads((tmp_path / "new" / "answer.json").read_text(encoding="utf-8"))
    assert (record["question"], record["image_path"]) == ("What is it?", str(tmp_path / "picture.png"))
    assert record["model_path"] == str(model_folder) and record["stop_reason"] == "max_tokens"
    printed = capsys.readouterr().out
    assert printed.startswith("picture: 160x120, seen as 96x80\n")
    assert f"answer: {record['parsed']['answer_content']}" in printed
    assert printed.endswith("(cut by --max_new_tokens)\n")


def test_the_inference_script_looks_at_a_video_file(
    model_folder, image, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    arguments = [path, "What happens?", "--model_path", model_folder, "--max_new_tokens", 2, "--device", "cpu"]
    assert run_script("inference.py", arguments, monkeypatch) == 0
    assert capsys.readouterr().out.startswith("video: 8 frames of 160x120, seen as 96x80\n")


@pytest.mark.parametrize("script", ["train_ovis25.py", "train_sft.py", "train_grpo.py"])
def test_the_training_scripts_are_the_train_command(
    script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(script, ["--no_such_flag"], monkeypatch) == 1
    assert capsys.readouterr().err.startswith("looktwice: unknown argument --no_such_flag.")


# -- ways to compute


@pytest.mark.parametrize(
    "settings", [{"attn_implementation": "eager"}, {"quantization": "nf4"}, {"quantization": "int8"}, {"bf16": True}]
)
def test_the_tiny_model_reads_a_card_however_it_computes(settings, image: Image.Image) -> None:
    if "quantization" in settings:
        pytest.importorskip("bitsandbytes")
    question = "What digit is on the red tile?"
    plain, other = (
        OvisInference(InferenceConfig(model_path="tiny", device="cpu", max_new_tokens=8, **chosen)).generate(
            image, question
        )
        for chosen in ({}, settings)
    )
    assert other["response"] == plain["response"]
