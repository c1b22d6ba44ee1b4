"""Photometric distortion, step by step: 8 bits after each, truncated."""
import colorsys

import numpy as np
import pytest

from simsiam_models.benchmarks.segmentation.colours import (
    Distortion,
    distort,
    draw_distortion,
    from_hsv,
    scale,
    to_hsv,
)


@pytest.fixture(scope='module')
def image() -> np.ndarray:
    """Every third level of each channel, in all combinations."""
    levels = np.arange(0, 256, 3, dtype=np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels, indexing='ij'), 3).reshape(len(levels), -1, 3)


def pixel(*values: int) -> np.ndarray:
    return np.array([[values]], np.uint8)


def test_brightness_adds_and_truncates_and_clips():
    out = distort(pixel(10, 250, 3), Distortion(brightness=7.9))
    assert out.tolist() == [[[17, 255, 10]]]
    assert distort(pixel(10, 250, 3), Distortion(brightness=-7.9)).tolist() == [[[2, 242, 0]]]


def test_contrast_multiplies_and_truncates_and_clips():
    assert distort(pixel(11, 200, 1), Distortion(contrast=1.5)).tolist() == [[[16, 255, 1]]]
    assert scale(np.arange(256, dtype=np.uint8), 0.7).tolist() == [
        int(np.float32(v) * np.float32(0.7)) for v in range(256)]


def test_contrast_is_applied_before_or_behind_saturation_as_drawn():
    before = from_hsv(_saturate(scale(pixel(200, 100, 50), 1.4), 0.5))
    behind = scale(from_hsv(_saturate(pixel(200, 100, 50), 0.5)), 1.4)
    changes = {'contrast': 1.4, 'saturation': 0.5}
    assert np.array_equal(distort(pixel(200, 100, 50), Distortion(**changes, contrast_first=True)), before)
    assert np.array_equal(distort(pixel(200, 100, 50), Distortion(**changes, contrast_first=False)), behind)
    assert not np.array_equal(before, behind)


def _saturate(image: np.ndarray, factor: float) -> np.ndarray:
    hsv = to_hsv(image)
    hsv[..., 1] = scale(hsv[..., 1], factor)
    return hsv


def test_hue_goes_around_a_circle_of_180_levels():
    assert to_hsv(pixel(255, 0, 0)).tolist() == [[[0, 255, 255]]]
    back = distort(pixel(255, 0, 0), Distortion(hue=-18))
    assert to_hsv(back).tolist() == [[[162, 255, 255]]]
    assert distort(pixel(90, 90, 90), Distortion(hue=17)).tolist() == [[[90, 90, 90]]]  # gray has no hue


def test_hue_saturation_and_value_are_those_of_colorsys_rounded(image: np.ndarray):
    rows = image.reshape(-1, 3)[::37]
    expected = np.array([colorsys.rgb_to_hsv(*(rows[i] / 255)) for i in range(len(rows))])
    found = to_hsv(rows[None])[0].astype(float)
    hue = np.abs(found[:, 0] - expected[:, 0] * 180)
    assert np.minimum(hue, 180 - hue).max() <= 0.6  # OpenCV's reciprocals have 12 bits
    assert np.abs(found[:, 1] - expected[:, 1] * 255).max() <= 0.51
    assert np.array_equal(found[:, 2], rows.max(1))


def test_rgb_is_that_of_colorsys_truncated():
    rng = np.random.default_rng(0)
    hsv = np.stack([rng.integers(0, 180, 3000), *rng.integers(0, 256, (2, 3000))], 1).astype(np.uint8)
    expected = np.array([colorsys.hsv_to_rgb(h / 180, s / 255, v / 255) for h, s, v in hsv.tolist()]) * 255
    found = from_hsv(hsv[None])[0].astype(float)
    assert ((found <= expected + 1e-3) & (found > expected - 1 - 1e-3)).all()


def test_both_conversions_are_opencvs_to_the_bit(image: np.ndarray):
    cv2 = pytest.importorskip('cv2', reason='OpenCV is not installed')
    assert np.array_equal(to_hsv(image), cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    hsv = to_hsv(image)
    assert np.array_equal(from_hsv(hsv), cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def test_each_change_has_a_probability_of_a_half_and_its_published_range():
    rng = np.random.default_rng(0)
    drawn = [draw_distortion(u, 32, (0.5, 1.5), (0.5, 1.5), 18) for u in rng.random((4000, 9))]
    ranges = {'brightness': (-32, 32), 'contrast': (0.5, 1.5), 'saturation': (0.5, 1.5), 'hue': (-18, 17)}
    for name, (low, high) in ranges.items():
        values = [getattr(d, name) for d in drawn if getattr(d, name) is not None]
        assert abs(len(values) / 4000 - 0.5) < 0.03
        assert low <= min(values) < low + 0.05 * (high - low) and high - 0.05 * (high - low) < max(values) <= high
    assert {d.hue for d in drawn} - {None} == {*range(-18, 18)}
    assert abs(sum(d.contrast_first for d in drawn) / 4000 - 0.5) < 0.03


def test_without_changes_an_image_stays_as_it_is(image: np.ndarray):
    assert np.array_equal(distort(image, Distortion()), image)
