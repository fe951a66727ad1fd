"""What a conversation may show."""

from __future__ import annotations

import pytest
from PIL import Image

from looktwice.errors import ConfigError
from looktwice.messages import Conversation, ImagePart, TextPart, VideoPart, user

IMAGE = Image.new("RGB", (4, 4))
VIDEO = VideoPart(source="clip.mp4")


def test_a_user_shows_images_and_videos_before_the_text() -> None:
    assert user("Q", IMAGE, "a.png").parts == (
        ImagePart(source=IMAGE),
        ImagePart(source="a.png"),
        TextPart(text="Q"),
    )
    assert user("Q", VIDEO).parts == (VIDEO, TextPart(text="Q"))


def test_a_conversation_lists_what_it_shows() -> None:
    with_images = Conversation(messages=(user("Q", "a.png"), user("R", "b.png")))
    assert (with_images.images, with_images.videos) == (["a.png", "b.png"], [])
    video = Conversation(messages=(user("Q", VIDEO), user("R")))
    assert (video.images, video.videos) == ([], ["clip.mp4"])


@pytest.mark.parametrize(
    ("shown", "count"),
    [((VIDEO, VIDEO), "2 videos and 0 pictures"), ((VIDEO, IMAGE), "1 videos and 1 pictures")],
)
def test_a_video_stands_alone(shown: tuple[object, ...], count: str) -> None:
    with pytest.raises(ConfigError, match=f"{count}; give pictures, or one video alone"):
        Conversation(messages=(user("Q", shown[0]), user("R", shown[1])))  # type: ignore[arg-type]
