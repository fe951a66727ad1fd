"""Asking a model from Python and from the repository's root scripts."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import looktwice
from looktwice import inference
from looktwice.asking.answer import answer_of
from looktwice.config import InferenceConfig, ModelConfig, SFTConfig
from looktwice.errors import CheckpointError, ConfigError, ImageError
from looktwice.geometry import Box, Size
from looktwice.inference import OvisInference
from looktwice.messages import VideoPart
from looktwice.model import attention
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.rollout.trajectory import ToolCall, Trajectory
from looktwice.training.learner import Learner
from looktwice.training.record import Record
from looktwice.training.state import save

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
    asked, seen = {"response", "parsed", "tool_calls", "grounding", "crops"}, {"picture", "tokens", "seconds"}
    assert set(answer) == {*asked, *seen, "stop_reason", "error"}
    assert set(answer["parsed"]) == {"think_content", "answer_content", "grounding"}
    assert answer["stop_reason"] == "max_tokens" and answer["response"]
    assert json.loads(json.dumps(answer)) == answer


def test_a_finished_rollout_is_reported_as_plain_data() -> None:
    trajectory = Trajectory(
        prompt_ids=[],
        image_sizes=(Size(200, 100),),
        text="<think>\nThe <ref>cup</ref><box>(0.1,0.2),(0.5,0.6)</box>.\n</think>\n\nSo: <answer>red</answer>",
        calls=[
            ToolCall(requested=Box(10.5, 5, 60, 55), box=Box(10, 5, 60, 55), size=Size(48, 48), error=None),
            ToolCall(requested=None, box=None, size=None, error="no_box"),
            ToolCall(requested=Box(1, 2, 3, 4), box=None, size=None, error="no_such_picture", image_number=3),
        ],
        stop_reason="answered",
    )
    answer = answer_of(trajectory)
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
        {"image": 1, "box": [10, 5, 60, 55], "requested": [10.5, 5, 60, 55], "size": [48, 48], "error": None},
        {"image": 1, "box": None, "requested": None, "size": None, "error": "no_box"},
        {"image": 3, "box": None, "requested": [1, 2, 3, 4], "size": None, "error": "no_such_picture"},
    ]
    assert answer["stop_reason"] == "answered"


def test_a_text_without_an_answer_has_an_empty_one() -> None:
    answer = answer_of(Trajectory(prompt_ids=[], text="<think>\nhm"))
    assert answer["parsed"] == {"think_content": "hm", "answer_content": "", "grounding": []}


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_greedy_answers_of_a_batch_are_those_given_one_by_one(batch_size, ask, questions) -> None:
    together = ask(batch_size=batch_size).batch_generate(questions)
    alone = ask()
    assert together == [alone.generate(image, question) for image, question in questions]


def test_an_image_can_be_given_in_any_usual_way(ask, image, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    image.save(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    inference = ask()
    ways = (
        image,
        path,
        str(path),
        "~/picture.png",
        path.read_bytes(),
        bytearray(path.read_bytes()),
        np.asarray(image),
        [image],
    )
    answers = [inference.generate(way, "What?") for way in ways]
    assert answers == answers[:1] * len(ways)
    assert answers[0] != inference.generate(None, "What?")


def test_several_images_are_seen_in_order(ask, image, tmp_path) -> None:
    inference, other = ask(max_new_tokens=1), image.rotate(180)
    shown = ([image], [image, np.asarray(other)], [other, image], (image, image, other))
    answers = [inference.batch_generate([(one, "What?")])[0] for one in shown]
    prompts = [inference.play([(one, "What?")])[0] for one in shown]
    assert [trajectory.prompt_ids.count(inference.processor.config.image_token_id) for trajectory in prompts] == [
        30,
        60,
        60,
        90,
    ]
    assert len({trajectory.sampling_logprobs[0] for trajectory in prompts}) == 4
    assert all(answer["picture"]["num_tokens"] == 30 for answer in answers)


def test_frames_can_be_arrays(ask, image) -> None:
    inference, frames = ask(max_new_tokens=1), [image, image.rotate(180)]
    stacked = np.stack([np.asarray(frame) for frame in frames])
    assert inference.generate(video=stacked, question="What?") == inference.generate(video=frames, question="What?")


def test_a_model_is_named_by_its_folder_alone(model_folder, image) -> None:
    by_config = OvisInference(InferenceConfig(model_path=model_folder, device="cpu", max_new_tokens=4))
    for given in (str(model_folder), model_folder):
        inference = OvisInference(given, device="cpu", max_new_tokens=4)
        assert inference.generate(image, "What?") == by_config.generate(image, "What?")


@pytest.mark.parametrize(
    ("config", "settings", "problem"),
    [
        ({"model_path": "tiny"}, {}, "the config is of type dict; give an InferenceConfig, or the model's folder and"),
        (SFTConfig(), {}, "the config is of type SFTConfig; give an InferenceConfig"),
        (InferenceConfig(), {"device": "cpu"}, "two configs are given; give an InferenceConfig"),
        ("tiny", {"model_path": "tiny"}, "two configs are given; give an InferenceConfig"),
        ("tiny", {"devise": "cpu"}, 'unknown setting "devise" of InferenceConfig. Did you mean "device"?'),
    ],
)
def test_what_is_no_config_is_told(config, settings, problem) -> None:
    with pytest.raises(ConfigError) as caught:
        OvisInference(config, **settings)
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize("settings", [{"temperature": 2.0}, {"do_sample": True}])
def test_sampled_answers_are_drawn_anew_at_each_call(settings, ask, image) -> None:
    inference = ask(**settings)
    assert len({inference.generate(image, "What?")["response"] for _ in range(3)}) == 3
    assert len({inference.generate(image, "What?", seed=5)["response"] for _ in range(3)}) == 1


def test_what_a_script_seeds_repeats_as_a_whole(ask, image) -> None:
    inference = ask(temperature=2.0)

    def run() -> list[str]:
        torch.manual_seed(0)
        return [inference.generate(image, "What?")["response"] for _ in range(2)]

    first = run()
    assert run() == first and first[0] != first[1]


def test_a_seeded_call_leaves_the_seed_of_a_script_alone(ask, image) -> None:
    inference = ask(temperature=2.0)
    before = torch.get_rng_state()
    inference.generate(image, "What?", seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("settings", [{"temperature": 1e-40}, {"temperature": 1.0, "top_p": 1e-300}])
def test_the_sharpest_sampling_is_greedy(settings, ask, image) -> None:
    assert ask(**settings).generate(image, "What?") == ask().generate(image, "What?")


def test_sampled_answers_repeat_with_the_seed(ask, questions) -> None:
    first, again, other = (ask(temperature=1.0, seed=seed).batch_generate(questions) for seed in (0, 0, 1))
    assert first == again != other


# -- what was shown


def test_siblings_are_asked_once_and_end_in_order_beside_others(ask, image) -> None:
    model = ask(batch_size=1, max_new_tokens=3)  # so that the group does not fit into what is begun at a time
    settings = {"temperature": 2.0, "seed": 1}
    siblings = model.ask_times((image, "What?"), [None] * 4, **settings)
    alone = model.ask((image, "Why?"), **settings)
    done = list(model.finish([*siblings, alone]))
    assert done == [*siblings, alone]
    assert [one.answer.tokens.written for one in done] == [3] * 5
    assert len({one.answer.response for one in siblings}) > 1


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
    together = ask().batch_generate([*questions, (VideoPart(source=video), "What happens?")])
    alone = ask()
    assert together[-1] == alone.generate(video=video, question="What happens?")
    assert together[:-1] == [alone.generate(shown, question) for shown, question in questions]


def test_an_image_beside_a_video_is_refused(ask, image) -> None:
    with pytest.raises(ConfigError, match="a picture and a video are both given"):
        ask().generate(image, "What?", video=[image])


@pytest.mark.parametrize(
    ("question", "problem"),
    [
        ("", "there is no question; give one as `question`"),
        (" \n", "there is no question; give one as `question`"),
        (None, "there is no question; give one as `question`"),
        (["What?"], "the question is of type list; give a text"),
        (b"What?", "the question is of type bytes; give a text"),
        ("caf\udce9?", r"the question holds '\udce9', which is no letter of UTF-8; write it anew"),
    ],
)
def test_a_question_is_a_text(question, problem, ask, image) -> None:
    with pytest.raises(ConfigError) as caught:
        ask().generate(image, question)
    assert str(caught.value) == problem


PIXELS = np.zeros((4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("shown", "problem"),
    [
        (
            {"image": {}},
            "the picture is of type dict; give a path, a PIL picture, a file's bytes, or an array of uint8",
        ),
        ({"image": torch.zeros(3, 4, 5)}, "the picture is of type Tensor; give a path"),
        ({"image": [None]}, "the picture is of type NoneType; give a path"),
        ({"image": []}, "the list of pictures is empty; leave it out"),
        ({"image": PIXELS / 255}, "the picture is an array of float64 [4, 5, 3]; give uint8 [height, width] or"),
        ({"image": PIXELS.transpose(2, 0, 1)}, "the picture is an array of uint8 [3, 4, 5]; give uint8"),
        ({"image": PIXELS[:0]}, "the picture is an array of uint8 [0, 5, 3]; give uint8"),
        ({"image": Image.new("RGB", (0, 5))}, "the picture has 0x5 pixels; give one that has some"),
        ({"image": "clip.mp4"}, "clip.mp4: a video; give it as `video`"),
        ({"image": [VideoPart(source=[PIXELS])]}, "the picture is of type VideoPart; give a path"),
        ({"video": PIXELS}, "the video is of type ndarray; give a path, or a list of pictures"),
        ({"video": Image.new("RGB", (5, 5))}, "the video is of type Image; give a path, or a list of pictures"),
        ({"video": [1]}, "the picture is of type int; give a path"),
    ],
)
def test_what_cannot_be_shown_is_told(shown, problem, ask) -> None:
    with pytest.raises(ConfigError) as caught:
        ask().generate(question="What?", **shown)
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize("raw", [b"", b"no picture"])
def test_bytes_that_are_no_picture_are_told(raw, ask) -> None:
    with pytest.raises(ImageError, match="not a readable picture|without a base64 picture"):
        ask().generate(raw, "What?")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"temperature": math.nan}, "temperature is nan: input should be a finite number"),
        ({"temperature": math.inf}, "temperature is inf: input should be a finite number"),
        ({"temperature": -1}, "temperature is -1: input should be greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature is 'hot': input should be a valid number"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: input should be greater than or equal to 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5: input should be a valid integer"),
        ({"max_new_tokens": True}, "max_new_tokens is True: give a number"),
        ({"seed": 2**70}, "seed is 1180591620717411303424: input should be less than"),
        ({"temprature": 1}, 'unknown setting "temprature" of AnswerConfig. Did you mean "temperature"?'),
        ({"device": "cpu"}, "device is set when the model is loaded: InferenceConfig(device=...)"),
    ],
)
def test_a_wrong_setting_of_a_call_is_told(settings, problem, ask, image) -> None:
    with pytest.raises(ConfigError) as caught:
        ask().generate(image, "What?", **settings)
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize("questions", [None, "What?", ["What?"], [("a.png",)], [{"question": "What?"}], 3])
def test_what_is_no_list_of_questions_is_told(questions, ask) -> None:
    with pytest.raises(
        ConfigError, match=r"of type \w+; give a list of pairs \(picture, question\), or of conversations"
    ):
        ask().batch_generate(questions)


def test_questions_may_come_one_by_one(ask, questions) -> None:
    inference = ask(batch_size=2)
    assert inference.batch_generate(iter(questions)) == inference.batch_generate(questions)


def test_no_questions_have_no_answers(ask) -> None:
    assert ask().batch_generate([]) == []


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
    save(learner, tmp_path, Record(stage="sft", order={}, settings={}), with_optimizer=False)
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


@pytest.mark.parametrize(
    ("settings", "is_installed", "picked"),
    [
        ({}, True, "flash_attention_2"),
        ({}, False, "packed_varlen"),
        ({"bf16": False}, True, "sdpa"),
        ({"attn_implementation": "eager"}, True, "eager"),
    ],
)
def test_on_a_gpu_flash_attention_is_used_by_itself_where_it_is_installed(
    settings, is_installed, picked, model_folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: is_installed)
    monkeypatch.setattr(inference, "load_model", lambda _, **options: asked.update(options))
    monkeypatch.setattr(inference, "merge", lambda model: model)
    OvisInference(InferenceConfig(model_path=str(model_folder), **settings))
    assert (asked["device"], asked["attn_implementation"]) == ("cuda", picked)


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


def test_limits_and_penalties_of_a_call_reach_its_decoding(ask, image) -> None:
    inference = ask(temperature=1.0, max_new_tokens=12)
    free = inference.generate(image, "What?", seed=5)
    assert inference.generate(image, "What?", seed=5, max_turn_tokens=3)["stop_reason"] == "max_turn_tokens"
    text = free["response"][2:5]
    stopped = inference.generate(image, "What?", seed=5, stop_texts=[text])
    assert stopped["stop_reason"] == "stop_text" and stopped["response"].endswith(text)
    for setting in ({"min_p": 1.0}, {"repetition_penalty": 5.0}, {"presence_penalty": 50.0}):
        assert inference.generate(image, "What?", seed=5, **setting)["response"] != free["response"]
    assert inference.generate(image, "What?", seed=5, max_seconds=60)["response"] == free["response"]
