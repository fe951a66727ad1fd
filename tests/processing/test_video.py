"""Frames from lists and files, and a video as the model reads it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from looktwice.errors import ConfigError, ImageError
from looktwice.geometry import PixelPolicy, Size
from looktwice.messages import Conversation, VideoPart, user
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.processing.processor import Ovis2_5Processor
from looktwice.processing.video import is_video_file, open_video, read_frames

RELEASED = Path(__file__).parents[3] / "shared" / "ovis2_5_9b"

MakeVideo = Callable[..., Path]


def grey(level: int, width: int = 64, height: int = 48) -> Image.Image:
    return Image.new("RGB", (width, height), (level, level, level))


def levels(frames: list[Image.Image]) -> list[int]:
    """Which frame of a clip of `clip` each one is: frame n has the grey level 10 n + 20."""
    return [round((frame.getpixel((20, 20))[0] - 20) / 10) for frame in frames]  # type: ignore[index]


def clip(num_frames: int) -> list[Image.Image]:
    return [grey(10 * number + 20) for number in range(num_frames)]


@pytest.fixture
def write(tmp_path: Path) -> MakeVideo:
    """Writes frames as a video file of ten frames a second."""
    av = pytest.importorskip("av")

    def make(frames: list[Image.Image], name: str = "clip.mp4", codec: str = "mpeg4", rotation: int = 0) -> Path:
        with av.open(f"file:{tmp_path / name}", "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height = frames[0].size
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            if rotation:
                stream.set_display_rotation(rotation)
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())
        return tmp_path / name

    return make


# -- files


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.ts"])
def test_eight_frames_are_taken_at_the_released_places(write: MakeVideo, name: str) -> None:
    frames = read_frames(write(clip(20), name))
    assert levels(frames) == [0, 2, 5, 7, 10, 12, 15, 17]
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (64, 48))}


def test_another_number_of_frames_can_be_asked_for(write: MakeVideo) -> None:
    assert levels(read_frames(write(clip(20)), 3)) == [0, 6, 13]


def test_a_video_shorter_than_the_frames_asked_for_repeats_its_own(write: MakeVideo) -> None:
    assert levels(read_frames(write(clip(3)))) == [0, 0, 0, 1, 1, 1, 2, 2]


def test_frames_are_counted_where_the_file_does_not_say(write: MakeVideo) -> None:
    # a bare stream of pictures has neither duration nor frame count
    assert levels(read_frames(write(clip(20), "clip.mjpeg", "mjpeg"), 4)) == [0, 5, 10, 15]


def test_frames_are_counted_where_the_file_promises_more_than_it_holds(write: MakeVideo) -> None:
    path = write([Image.effect_noise((64, 48), 9 * number).convert("RGB") for number in range(20)], "clip.mkv")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    held = read_frames(path, 1000)
    num_held = len({frame.tobytes() for frame in held})
    assert 2 < num_held < 20
    assert held[0].tobytes() == held[1000 // num_held - 1].tobytes() != held[1000 // num_held + 1].tobytes()


@pytest.mark.parametrize(("rotation", "corner"), [(90, (2, 61)), (-90, (29, 2)), (180, (61, 29))])
def test_a_video_held_sideways_is_turned_upright(write: MakeVideo, rotation: int, corner: tuple[int, int]) -> None:
    frame = grey(0, 64, 32)
    frame.paste("white", (0, 0, 8, 8))
    [upright] = read_frames(write([frame, frame], rotation=rotation), 1)
    assert upright.size == ((64, 32) if rotation == 180 else (32, 64))
    bright = np.argwhere(np.asarray(upright)[..., 0] > 128)
    assert np.abs(bright - corner[::-1]).max() < 8


def test_a_colon_in_a_name_is_no_address(write: MakeVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(clip(2), "12:30.mp4")
    monkeypatch.chdir(path.parent)
    assert levels(read_frames(path.name, 2)) == [0, 1]


@pytest.mark.parametrize("content", [b"", b"hello, I am text", b"\0\0\0\x20ftypisom"])
def test_a_file_that_is_no_video_is_refused(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(ImageError, match=r"clip\.mp4: not a readable video \(.+\); replace or remove it"):
        read_frames(tmp_path / "clip.mp4")


def test_a_file_that_is_something_else_is_named_for_it(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "clip.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(ImageError, match=r"clip\.mp4: not a readable video \(a Git LFS pointer\)"):
        read_frames(tmp_path / "clip.mp4")
    with pytest.raises(ImageError, match=r"clip\.MP4: no such video; write .*clip\.mp4, which is there"):
        read_frames(tmp_path / "clip.MP4")


def test_a_damaged_video_is_refused(write: MakeVideo) -> None:
    path = write(clip(20))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=r"clip\.mp4: not a readable video"):
        read_frames(path)


def test_a_video_without_a_frame_is_refused(write: MakeVideo) -> None:
    path = write(clip(1), "clip.mkv")
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"\x1f\x43\xb6\x75") + 32])  # the frames' cluster begins and is cut off
    with pytest.raises(ImageError, match=r"clip\.mkv: the video has no frames; replace the file"):
        read_frames(path)


def test_a_file_with_sound_alone_is_refused(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "song.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
    with pytest.raises(ImageError, match=r"song\.wav: holds no video stream; give a video file"):
        read_frames(path)


@pytest.mark.parametrize("name", ["gone.mp4", "."])
def test_a_missing_video_is_named(name: str, tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(ImageError, match="no such video; check the path"):
        read_frames(tmp_path / name)


def test_without_pyav_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        ConfigError, match=r"clip\.mp4: reading a video file needs PyAV: pip install looktwice\[video\]"
    ):
        read_frames("clip.mp4")


def test_no_frames_cannot_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="num_frames is 0"):
        read_frames("clip.mp4", 0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("clip.mp4", True), ("a/clip.WEBM", True), (Path("clip.mov"), True), ("photo.jpg", False), ("mp4", False)],
)
def test_a_video_file_is_known_by_its_name(name: str | Path, expected: bool) -> None:
    assert is_video_file(name) is expected


# -- lists


def test_a_list_gives_all_its_frames_images_and_paths_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)  # it is not needed for a list
    grey(30).save(tmp_path / "one.png")
    assert levels(open_video([grey(20), tmp_path / "one.png", str(tmp_path / "one.png")])) == [0, 1, 1]


def test_an_empty_list_is_no_video() -> None:
    with pytest.raises(ImageError, match="the video is an empty list"):
        open_video([])


def test_a_file_gives_eight_frames(write: MakeVideo) -> None:
    assert levels(open_video(str(write(clip(16))))) == [0, 2, 4, 6, 8, 10, 12, 14]


# -- as the model reads it


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompt_ids(processor: Ovis2_5Processor, frames: list[Image.Image], thinking: bool = True) -> list[int]:
    conversation = Conversation(messages=(user("Describe this image.", VideoPart(source=frames)),))
    return processor.encode(conversation, purpose="prompt", thinking=thinking).input_ids


@pytest.mark.skipif(not RELEASED.is_dir(), reason="the released tokenizer is not here")
def test_a_prompt_with_a_video_has_the_released_ids() -> None:
    released = Ovis2_5Processor.from_pretrained(RELEASED)
    released.policy = PixelPolicy(video_min_pixels=448**2, video_max_pixels=448**2)
    ids = prompt_ids(released, [grey(0, 640, 480)] * 4, thinking=False)
    start, atom, end = 151674, 151671, 151675
    question = [198, 74785, 419, 2168, 13, 151645, 198]
    # the released rule gives 512 x 384 pixels, 16 x 12 atoms, for each of the four frames
    visual = [start, *[atom] * 4 * 192, end]
    assert ids == [151644, 872, 198, *visual, *question, 151644, 77091, 198, 151667, 271, 151668, 271]


@pytest.mark.parametrize("num_frames", [1, 3])
def test_a_video_is_start_all_atoms_and_end_without_separators(num_frames: int, processor: Ovis2_5Processor) -> None:
    config = processor.config
    video = processor.patch_video([noise(48, 32)] * num_frames)
    assert processor.image_ids(video) == [
        config.video_start_token_id,
        *[config.image_token_id] * video.num_tokens,
        config.video_end_token_id,
    ]
    assert video.num_tokens == num_frames * (video.size.width // 16) * (video.size.height // 16)


def test_the_rows_of_a_video_are_those_of_its_frames_one_after_the_other(processor: Ovis2_5Processor) -> None:
    frames = [noise(96, 64, seed) for seed in range(3)]
    video = processor.patch_video(frames)
    alone = [processor.patch(frame) for frame in frames]
    assert torch.equal(video.pixel_values, torch.cat([frame.pixel_values for frame in alone]))
    assert (video.grid_thw, video.size, video.is_video) == ((3, 8, 12), Size(96, 64), True)
    assert not any(frame.is_video for frame in alone)


def test_every_frame_gets_the_size_of_the_first(processor: Ovis2_5Processor) -> None:
    wide, tall = noise(96, 64), noise(64, 96)
    expected = processor.patch(tall.resize((96, 64), Image.Resampling.BILINEAR)).pixel_values
    assert torch.equal(processor.patch_video([wide, tall]).pixel_values[-len(expected) :], expected)


def test_frames_are_sized_by_the_bounds_of_videos(processor: Ovis2_5Processor) -> None:
    policy = PixelPolicy(image_min_pixels=0, video_min_pixels=0, video_max_pixels=32 * 32)
    small = Ovis2_5Processor(processor.tokenizer, processor.config, policy)
    assert small.patch_video([noise(200, 200)]).size == small.frame_size(Size(200, 200)) == Size(32, 32)
    assert small.overview_size(Size(200, 200)) == Size(192, 192)


def test_frames_do_not_see_each_other_in_the_tower(
    processor: Ovis2_5Processor, model: Ovis2_5ForConditionalGeneration
) -> None:
    frames = [noise(96, 64, seed) for seed in range(2)]
    together, *alone = processor.patch_video(frames), *(processor.patch(frame) for frame in frames)
    with torch.no_grad():
        features = [model.get_image_features(seen.pixel_values, torch.tensor([seen.grid_thw])) for seen in alone]
        video = model.get_image_features(together.pixel_values, torch.tensor([together.grid_thw]))
    torch.testing.assert_close(video, torch.cat(features), atol=1e-5, rtol=1e-5)


def test_a_folder_keeps_the_bounds_of_videos(processor: Ovis2_5Processor, tmp_path: Path) -> None:
    policy = PixelPolicy(video_min_pixels=5, video_max_pixels=6)
    Ovis2_5Processor(processor.tokenizer, processor.config, policy).save_pretrained(tmp_path)
    processor.config.save_pretrained(tmp_path)
    assert Ovis2_5Processor.from_pretrained(tmp_path).policy == policy


def test_a_folder_saved_without_bounds_of_videos_limits_frames_as_images(
    processor: Ovis2_5Processor, tmp_path: Path
) -> None:
    policy = PixelPolicy(image_min_pixels=64 * 64, image_max_pixels=96 * 96)
    Ovis2_5Processor(processor.tokenizer, processor.config, policy).save_pretrained(tmp_path)
    processor.config.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if "video_" not in line]
    file.write_text("\n".join(lines).replace("200704,\n    }", "200704\n    }"), encoding="utf-8")
    assert "video_" not in file.read_text(encoding="utf-8")
    loaded = Ovis2_5Processor.from_pretrained(tmp_path)
    assert loaded.policy.frame_bounds == (64 * 64, 96 * 96)
