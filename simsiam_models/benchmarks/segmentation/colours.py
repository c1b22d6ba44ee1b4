"""Photometric distortion as mmsegmentation's: on 8-bit pixels, each step truncated to 8 bits, the hue from 0 to 179."""
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_SHIFT = 12  # bits of the fixed-point reciprocals of OpenCV's 8-bit conversion
_LEVELS = np.maximum(np.arange(256), 1)
_PER_VALUE = np.where(np.arange(256), np.rint((255 << _SHIFT) / _LEVELS), 0).astype(np.int32)
_PER_RANGE = np.where(np.arange(256), np.rint((180 << _SHIFT) / (6 * _LEVELS)), 0).astype(np.int32)
# Of each sixth of the circle, where red, green and blue come from: value, lowest, falling, rising.
_SECTORS = np.array([[0, 3, 1], [2, 0, 1], [1, 0, 3], [1, 2, 0], [3, 1, 0], [0, 1, 2]])


class Distortion(NamedTuple):
    """The changes of one image; None: no change."""

    brightness: float | None = None  # levels that are added
    contrast: float | None = None  # a factor
    saturation: float | None = None  # a factor
    hue: int | None = None  # levels of 180 that are added
    contrast_first: bool = True  # before saturation and hue, or behind them


def draw_distortion(
    u: Sequence[float], brightness: float, contrast: tuple[float, float], saturation: tuple[float, float], hue: int,
) -> Distortion:
    """Returns changes from nine uniform numbers: for each a coin and its amount, and one for the order.

    Args:
        brightness, hue: the most that is added or subtracted; hue includes -hue, but not +hue.
        contrast, saturation: ranges of the factors.
    """
    def between(x: float, low: float, high: float) -> float:
        return low + (high - low) * x

    return Distortion(
        between(u[1], -brightness, brightness) if u[0] < 0.5 else None,
        between(u[4], *contrast) if u[3] < 0.5 else None, between(u[6], *saturation) if u[5] < 0.5 else None,
        int(u[8] * 2 * hue) - hue if u[7] < 0.5 else None, u[2] < 0.5)


def distort(image: np.ndarray, d: Distortion) -> np.ndarray:
    """Changes the colours of an image (H, W, 3) uint8, RGB."""
    if d.brightness is not None:
        image = scale(image, 1.0, d.brightness)
    if d.contrast is not None and d.contrast_first:
        image = scale(image, d.contrast)
    if d.saturation is not None:
        hsv = to_hsv(image)
        hsv[..., 1] = scale(hsv[..., 1], d.saturation)
        image = from_hsv(hsv)
    if d.hue is not None:
        hsv = to_hsv(image)
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + d.hue) % 180
        image = from_hsv(hsv)
    if d.contrast is not None and not d.contrast_first:
        image = scale(image, d.contrast)
    return image


def scale(values: np.ndarray, factor: float, added: float = 0.0) -> np.ndarray:
    """Returns values * factor + added, uint8: clipped to 0 .. 255 and truncated, not rounded."""
    table = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(added)
    scaled: np.ndarray = table.clip(0, 255).astype(np.uint8)[values]
    return scaled


def to_hsv(image: np.ndarray) -> np.ndarray:
    """Returns hue 0 .. 179, saturation and value 0 .. 255 of RGB, (H, W, 3) uint8, with OpenCV's rounding."""
    r, g, b = np.moveaxis(image, 2, 0).astype(np.int32)
    value = np.maximum(np.maximum(r, g), b)
    spread = value - np.minimum(np.minimum(r, g), b)
    hue = np.where(value == r, g - b, np.where(value == g, b - r + 2 * spread, r - g + 4 * spread))
    half = 1 << _SHIFT - 1
    hue = hue * _PER_RANGE[spread] + half >> _SHIFT
    hue += 180 * (hue < 0)
    return np.stack([hue, spread * _PER_VALUE[value] + half >> _SHIFT, value], 2).astype(np.uint8)


def from_hsv(hsv: np.ndarray) -> np.ndarray:
    """Returns RGB, (H, W, 3) uint8, of what `to_hsv` returns; truncated, as OpenCV does where it takes many pixels."""
    shares = np.take(_make_shares(), hsv[..., 0].astype(np.int32) << 8 | hsv[..., 1], 0)
    value = hsv[..., 2:].astype(np.float32) * np.float32(1 / 255)
    rgb: np.ndarray = (value * shares * np.float32(255)).astype(np.uint8)
    return rgb


@functools.cache
def _make_shares() -> np.ndarray:
    """Returns the shares of the value that red, green and blue have, (180 * 256, 3), by hue and saturation."""
    hue = np.arange(180, dtype=np.float32)[:, None] * np.float32(6 / 180)
    saturation = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    sector = np.floor(hue)
    part, sector = hue - sector, sector.astype(np.int64)

    def fade(by: np.ndarray) -> np.ndarray:  # rounded once, as by OpenCV's fused multiply-add
        faded: np.ndarray = (1 - saturation.astype(np.float64) * by).astype(np.float32)
        return faded

    one = np.ones_like(part)
    choices = np.stack(np.broadcast_arrays(one, fade(one), fade(part), fade(one - part)), 2)  # (180, 256, 4)
    return np.take_along_axis(choices, _SECTORS[sector], 2).reshape(-1, 3)
