"""Boxes, frames, sizes and the rule of the crop, against the published tables."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looktwice.errors import BoxError, ConfigError
from looktwice.geometry import (
    BOX_FRAMES,
    Box,
    BoxFrame,
    PixelPolicy,
    Size,
    check_box,
    crop_rectangle,
    crop_size,
    from_original,
    iou,
    num_visual_tokens,
    smart_resize,
    to_original,
    zoom_scale,
)

# -- sizes

MIN_PIXELS = 448**2
MAX_PIXELS = (1792**2, 1344 * 1792, 896**2, 448**2)
# (height, width) in; (height, width) out for each of MAX_PIXELS. Where the released code gives a side of 0, 32 stands,
# beside the longest side that keeps the picture within the limit.
RESIZED = [
    ((448, 448), [(448, 448), (448, 448), (448, 448), (448, 448)]),
    ((480, 640), [(480, 640), (480, 640), (480, 640), (384, 512)]),
    ((720, 1280), [(704, 1280), (704, 1280), (672, 1184), (320, 576)]),
    ((1080, 1920), [(1088, 1920), (1088, 1920), (672, 1184), (320, 576)]),
    ((2160, 3840), [(1344, 2368), (1152, 2048), (672, 1184), (320, 576)]),
    ((3000, 4000), [(1536, 2048), (1344, 1792), (768, 1024), (384, 512)]),
    ((1000, 1000), [(992, 992), (992, 992), (896, 896), (448, 448)]),
    ((100, 100), [(448, 448)] * 4),
    ((32, 32), [(448, 448)] * 4),
    ((1, 1), [(448, 448)] * 4),
    ((80, 48), [(608, 352)] * 4),
    ((20, 300), [(128, 1760)] * 4),
    ((10, 5000), [(32, 16000), (32, 16000), (32, 16000), (32, 6272)]),
    ((40, 10000), [(32, 8000), (32, 8000), (32, 8000), (32, 6272)]),
    ((32, 6400), [(32, 6400), (32, 6400), (32, 6400), (32, 6272)]),
]


@pytest.mark.parametrize(
    ("given_size", "max_pixels", "expected"),
    [(size, limit, result) for size, results in RESIZED for limit, result in zip(MAX_PIXELS, results)],
)
def test_smart_resize_follows_the_released_table(
    given_size: tuple[int, int], max_pixels: int, expected: tuple[int, int]
) -> None:
    size = Size(width=given_size[1], height=given_size[0])
    resized = smart_resize(size, factor=32, min_pixels=MIN_PIXELS, max_pixels=max_pixels)
    assert resized == Size(width=expected[1], height=expected[0])


def test_smart_resize_rounds_halves_to_even() -> None:
    # 48 / 32 is 1.5 and 80 / 32 is 2.5: both become 2
    assert smart_resize(Size(48, 80), factor=32, min_pixels=0, max_pixels=10**6) == Size(64, 64)


@pytest.mark.parametrize(
    ("given_size", "max_pixels", "resized"),
    [
        (Size(1, 5000), 896**2, Size(32, 25088)),
        (Size(5000, 1), 896**2, Size(25088, 32)),
        (Size(1, 5000), 448**2, Size(32, 6272)),
        (Size(1, 100_000), 448**2, Size(32, 6272)),
        (Size(100_000, 1), 448**2, Size(6272, 32)),
        (Size(9, 400), 64**2, Size(32, 128)),
        (Size(400, 9), 64**2, Size(128, 32)),
        (Size(9, 400), 32**2, Size(32, 32)),
        (Size(9, 400), 1, Size(32, 32)),
    ],
)
def test_an_extreme_shape_is_clamped_to_the_limit(given_size: Size, max_pixels: int, resized: Size) -> None:
    assert smart_resize(given_size, factor=32, min_pixels=0, max_pixels=max_pixels) == resized


side = st.integers(1, 10**6)


@given(side, side, st.integers(1, 10**7))
@settings(max_examples=200, deadline=None)
def test_a_resized_image_has_whole_tokens_and_stays_within_the_limit(width: int, height: int, limit: int) -> None:
    resized = smart_resize(Size(width, height), factor=32, min_pixels=0, max_pixels=limit)
    assert min(resized) >= 32
    assert resized.width % 32 == resized.height % 32 == 0
    assert resized.width * resized.height <= max(limit, 32**2)


@given(side, side, st.integers(1, 10**7))
@settings(max_examples=200, deadline=None)
def test_a_resized_image_reaches_the_fewest_pixels(width: int, height: int, fewest: int) -> None:
    resized = smart_resize(Size(width, height), factor=32, min_pixels=fewest, max_pixels=10**15)
    assert resized.width * resized.height >= fewest


def test_a_visual_token_stands_for_a_square_of_the_factor() -> None:
    assert num_visual_tokens(Size(640, 480), factor=32) == 300


# -- the crop


@pytest.mark.parametrize(
    ("area_ratio", "scale"),
    [(0.01, 2), (0.125, 2), (0.2, 1.8), (0.3125, 1.5), (0.4, 1.2667), (0.499, 1.0027), (0.5, 1), (1.0, 1)],
)
def test_zoom_scale_has_the_published_values(area_ratio: float, scale: float) -> None:
    assert zoom_scale(area_ratio) == pytest.approx(scale, abs=5e-5)


# the two examples worked out for VLM-R3; its right and bottom are inclusive, ours exclusive
@pytest.mark.parametrize(
    ("original", "resized", "box", "rectangle", "final"),
    [
        (Size(640, 480), Size(644, 476), Box(100, 100, 200, 180), (99, 100, 199, 182), Size(196, 168)),
        (Size(4032, 3024), Size(2044, 1540), Box(500, 400, 900, 700), (986, 785, 1776, 1375), Size(1036, 756)),
    ],
)
def test_a_box_is_cut_and_enlarged_as_in_the_worked_examples(
    original: Size, resized: Size, box: Box, rectangle: tuple[int, int, int, int], final: Size
) -> None:
    policy = PixelPolicy(crop_min_pixels=4 * 784, crop_max_pixels=1024 * 784)
    in_original = to_original(box, frame="resized_px", original=original, resized=resized)
    cut = crop_rectangle(in_original, original=original, min_side=28)
    assert (cut, crop_size(cut, original=original, factor=28, policy=policy)) == (rectangle, final)


def test_the_size_of_a_crop_does_not_depend_on_the_bounds_for_whole_images() -> None:
    policy = PixelPolicy(image_min_pixels=32**2, image_max_pixels=32**2, crop_min_pixels=64**2, crop_max_pixels=128**2)
    assert crop_size((0, 0, 64, 64), original=Size(640, 480), factor=32, policy=policy) == Size(128, 128)


def test_crop_rectangle_rounds_outwards() -> None:
    assert crop_rectangle(Box(10.9, 20.1, 50.1, 60.9), original=Size(100, 100), min_side=8) == (10, 20, 51, 61)


def test_crop_rectangle_keeps_whole_pixels_as_they_are() -> None:
    assert crop_rectangle(Box(10, 20, 50, 60), original=Size(100, 100), min_side=8) == (10, 20, 50, 60)


def test_crop_rectangle_clamps_to_the_image() -> None:
    assert crop_rectangle(Box(-5.5, -1e299, 1e299, 40), original=Size(100, 80), min_side=8) == (0, 0, 100, 40)


def test_crop_rectangle_enlarges_a_small_side_about_its_centre() -> None:
    assert crop_rectangle(Box(50, 20, 54, 60), original=Size(100, 100), min_side=8) == (48, 20, 56, 60)


@pytest.mark.parametrize(
    ("box", "rectangle"), [(Box(0, 0, 1, 1), (0, 0, 8, 8)), (Box(99, 79, 100, 80), (92, 72, 100, 80))]
)
def test_an_enlarged_side_is_shifted_inside(box: Box, rectangle: tuple[int, int, int, int]) -> None:
    assert crop_rectangle(box, original=Size(100, 80), min_side=8) == rectangle


def test_an_image_smaller_than_the_least_side_is_cut_whole() -> None:
    assert crop_rectangle(Box(1, 1, 2, 2), original=Size(5, 4), min_side=8) == (0, 0, 5, 4)


@pytest.mark.parametrize(
    "box",
    [Box(100, 10, 120, 20), Box(10, 80, 20, 90), Box(-20, 10, 0, 20), Box(10, -20, 20, 0), Box(200, 200, 300, 300)],
)
def test_a_box_that_does_not_touch_the_image_is_outside(box: Box) -> None:
    with pytest.raises(BoxError, match="100x80") as caught:
        crop_rectangle(box, original=Size(100, 80), min_side=8)
    assert caught.value.reason == "outside"


@pytest.mark.parametrize("box", [Box(0, 0, 2000, 1), Box(0, 0, 1, 2000)])
def test_a_box_a_hundred_times_longer_than_wide_is_too_thin(box: Box) -> None:
    with pytest.raises(BoxError) as caught:
        crop_rectangle(box, original=Size(2000, 2000), min_side=8)
    assert caught.value.reason == "too_thin"


def test_the_aspect_is_judged_after_enlarging() -> None:
    assert crop_rectangle(Box(0, 0, 800, 1), original=Size(2000, 2000), min_side=8) == (0, 0, 800, 8)


numbers = st.floats(-5000, 5000, allow_nan=False)


@given(numbers, numbers, st.floats(0.01, 5000), st.floats(0.01, 5000), st.integers(1, 3000), st.integers(1, 3000))
def test_a_rectangle_is_inside_the_image_and_at_least_the_least_side(
    x: float, y: float, width: float, height: float, image_width: int, image_height: int
) -> None:
    box = Box(x, y, x + width, y + height)
    try:
        left, top, right, bottom = crop_rectangle(box, original=Size(image_width, image_height), min_side=32)
    except BoxError as error:
        assert error.reason in ("outside", "too_thin")
        return
    assert 0 <= left < right <= image_width
    assert 0 <= top < bottom <= image_height
    assert right - left >= min(32, image_width)
    assert bottom - top >= min(32, image_height)


# -- frames


@pytest.mark.parametrize(
    ("frame", "box"),
    [
        ("original_px", Box(400, 150, 800, 300)),
        ("resized_px", Box(160, 48, 320, 96)),
        ("unit", Box(0.5, 0.25, 1.0, 0.5)),
        ("norm1000", Box(500, 250, 1000, 500)),
    ],
)
def test_every_frame_names_the_same_place(frame: BoxFrame, box: Box) -> None:
    found = to_original(box, frame=frame, original=Size(800, 600), resized=Size(320, 192))
    assert found == pytest.approx(Box(400, 150, 800, 300))


sizes = st.builds(Size, st.integers(1, 10_000), st.integers(1, 10_000))


@given(st.builds(Box, numbers, numbers, numbers, numbers), st.sampled_from(BOX_FRAMES), sizes, sizes)
def test_from_original_undoes_to_original(box: Box, frame: BoxFrame, original: Size, resized: Size) -> None:
    there = to_original(box, frame=frame, original=original, resized=resized)
    back = from_original(there, frame=frame, original=original, resized=resized)
    assert back == pytest.approx(box, rel=1e-9, abs=1e-9)


# -- boxes


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (Box(0, 0, 2, 2), Box(0, 0, 2, 2), 1.0),
        (Box(0, 0, 2, 2), Box(1, 0, 3, 2), 1 / 3),
        (Box(0, 0, 4, 4), Box(1, 1, 2, 2), 1 / 16),
        (Box(0, 0, 2, 2), Box(2, 0, 4, 2), 0.0),
        (Box(0, 0, 1, 1), Box(5, 5, 6, 6), 0.0),
        (Box(1, 1, 1, 1), Box(1, 1, 1, 1), 0.0),
        (Box(3, 3, 1, 1), Box(0, 0, 2, 2), 0.0),
    ],
)
def test_iou_is_the_shared_part_of_the_area(a: Box, b: Box, expected: float) -> None:
    assert iou(a, b) == pytest.approx(expected)


@given(st.builds(Box, numbers, numbers, numbers, numbers), st.builds(Box, numbers, numbers, numbers, numbers))
def test_iou_lies_between_0_and_1_and_is_symmetric(a: Box, b: Box) -> None:
    assert 0 <= iou(a, b) <= 1
    assert iou(a, b) == iou(b, a)


@pytest.mark.parametrize("values", [[1, 2, 3, 4], (1.0, 2.0, 3.0, 4.0), [1, 2.0, 3, 4.0]])
def test_four_finite_numbers_in_order_are_a_box(values: object) -> None:
    assert check_box(values) == Box(1.0, 2.0, 3.0, 4.0)


@pytest.mark.parametrize("values", [[1, 2, 3], [1, 2, 3, 4, 5], [], "1234", None, 7, {1: 1, 2: 2, 3: 3, 4: 4}])
def test_anything_but_four_values_has_the_wrong_length(values: object) -> None:
    with pytest.raises(BoxError, match="4 numbers") as caught:
        check_box(values)
    assert caught.value.reason == "wrong_length"


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, True, False, "4", None, [4], 10**400, -(10**400), 1e301, 4j]
)
@pytest.mark.parametrize("place", range(4))
def test_a_value_that_is_no_finite_number_is_refused(bad: object, place: int) -> None:
    values: list[object] = [1, 2, 3, 4]
    values[place] = bad
    with pytest.raises(BoxError, match="finite numbers") as caught:
        check_box(values)
    assert caught.value.reason == "not_a_number"


@pytest.mark.parametrize("values", [[3, 2, 1, 4], [1, 4, 3, 2], [1, 2, 1, 4], [1, 2, 3, 2]])
def test_a_box_without_area_or_with_swapped_corners_is_reversed(values: list[int]) -> None:
    with pytest.raises(BoxError) as caught:
        check_box(values)
    assert caught.value.reason == "reversed"


def test_the_message_about_a_huge_value_stays_short() -> None:
    with pytest.raises(BoxError) as caught:
        check_box([1, 2, 3, 10**4000])
    assert len(str(caught.value)) < 140


# -- the pixel policy


@pytest.mark.parametrize("kind", ["image", "crop", "video"])
@pytest.mark.parametrize(("low", "high"), [(200, 100), (-1, 100), (0, 0), (0, -5)])
def test_a_policy_whose_bounds_contradict_each_other_is_refused(kind: str, low: int, high: int) -> None:
    with pytest.raises(ConfigError, match=f"{kind}_min_pixels is {low} and {kind}_max_pixels is {high}"):
        PixelPolicy(**{f"{kind}_min_pixels": low, f"{kind}_max_pixels": high})


def test_a_policy_may_ask_for_one_exact_pixel_count() -> None:
    assert PixelPolicy(image_min_pixels=448**2, image_max_pixels=448**2).image_min_pixels == 448**2


def test_a_maximum_given_below_the_minimum_takes_the_minimum_along() -> None:
    policy = PixelPolicy(image_min_pixels=500, image_max_pixels=900)
    assert policy.override(image_max_pixels=300) == PixelPolicy(image_min_pixels=300, image_max_pixels=300)


def test_a_minimum_given_above_the_maximum_is_refused() -> None:
    with pytest.raises(ConfigError, match="image_min_pixels"):
        PixelPolicy(image_min_pixels=500, image_max_pixels=900).override(image_min_pixels=1000)


def test_the_frames_of_a_video_have_the_model_card_s_bounds() -> None:
    assert PixelPolicy(image_max_pixels=1792**2).frame_bounds == (448**2, 896**2)


def test_a_frame_never_gets_more_pixels_than_an_image() -> None:
    assert PixelPolicy(image_min_pixels=64**2, image_max_pixels=96**2).frame_bounds == (64**2, 96**2)
    assert PixelPolicy().override(image_max_pixels=128**2).frame_bounds == (128**2, 128**2)
