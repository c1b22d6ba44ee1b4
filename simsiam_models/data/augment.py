"""SimSiam's augmentation: which numbers it draws, and what they do to an image.

The published list (paper, appendix A; FAIR and MMSelfSup release the same numbers): random resized crop, colour jitter,
grayscale, Gaussian blur, flip, normalise. The crop is cut per image on the CPU (PIL, uint8); all else runs on whole
batches, wherever the batch is, with parameters of its own for each sample.
"""
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from .counted import uniforms

CROP_TRIES = 10  # torchvision's RandomResizedCrop gives up after ten boxes that do not fit
CROP_DRAWS = 2 * CROP_TRIES + 2
DRAWS = CROP_DRAWS + 10
ORDERS = np.array(list(itertools.permutations(range(4))))  # of brightness, contrast, saturation, hue
GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision rounds it


@dataclass(frozen=True)
class Augmentation:
    """The published numbers, in the order an image meets them; probabilities and factors are torchvision's."""

    size: int = 224  # pixels
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    jitter_p: float = 0.8
    brightness: float = 0.4  # factor ~ U(1 - x, 1 + x)
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1  # shift ~ U(-x, x) of the hue circle
    gray_p: float = 0.2
    blur_p: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    flip_p: float = 0.5


@dataclass(frozen=True)
class Finish:
    """What happens to each sample of a batch behind the crop; arrays of length B."""

    jitter: np.ndarray  # bool
    order: np.ndarray  # (B, 4) which of brightness, contrast, saturation, hue comes 1st..4th
    factors: np.ndarray  # (B, 4) three factors and the hue shift
    gray: np.ndarray  # bool
    sigma: np.ndarray  # 0 where there is no blur
    flip: np.ndarray  # bool


def draw(aug: Augmentation, seed: int, epoch: int, indices: np.ndarray, view: int) -> tuple[np.ndarray, Finish]:
    """-> the crops' uniform numbers (B, 22), for `crop_box`, and the parameters of the rest."""
    u = uniforms(seed, epoch, indices, view, DRAWS)
    rest = u[:, CROP_DRAWS:]
    spread = np.array([aug.brightness, aug.contrast, aug.saturation, aug.hue])
    centre = np.array([1.0, 1.0, 1.0, 0.0])
    low, high = aug.blur_sigma
    return u[:, :CROP_DRAWS], Finish(
        jitter=rest[:, 0] < aug.jitter_p,
        order=ORDERS[(rest[:, 1] * len(ORDERS)).astype(int)],
        # Factors below zero are zero, as in torchvision's ColorJitter.
        factors=np.maximum(centre - spread, [0, 0, 0, -0.5]) * (1 - rest[:, 2:6])
        + np.minimum(centre + spread, [9, 9, 9, 0.5]) * rest[:, 2:6],
        gray=rest[:, 6] < aug.gray_p,
        sigma=np.where(rest[:, 7] < aug.blur_p, low + (high - low) * rest[:, 8], 0.0),
        flip=rest[:, 9] < aug.flip_p,
    )


def crop_box(aug: Augmentation, u: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """22 uniform numbers and an image's size -> (left, top, right, bottom), by torchvision's RandomResizedCrop rule."""
    log_low, log_high = math.log(aug.crop_ratio[0]), math.log(aug.crop_ratio[1])
    for t in range(CROP_TRIES):
        area = width * height * (aug.crop_scale[0] + (aug.crop_scale[1] - aug.crop_scale[0]) * u[2 * t])
        ratio = math.exp(log_low + (log_high - log_low) * u[2 * t + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(u[-2] * (width - w + 1)), int(u[-1] * (height - h + 1))
            return left, top, left + w, top + h
    # The widest or tallest box that the ratio admits, in the middle.
    w = min(width, max(1, round(height * aug.crop_ratio[1])))
    h = min(height, max(1, round(width / aug.crop_ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def crop(image: Image.Image, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """Cut and resize (bilinear, antialiased) an RGB image -> (size, size, 3) uint8."""
    return np.asarray(image.crop(box).resize((size, size), Image.Resampling.BILINEAR))


def finish(images: Tensor, params: Finish) -> Tensor:
    """(B, 3, S, S) uint8 on any device -> (B, 3, S, S) float32, jittered, grayed, blurred, flipped, normalised.

    Colours are computed as torchvision does on float images: in [0, 1], clamped after each operator.
    """
    x = images.float() / 255
    on = np.flatnonzero(params.jitter)
    if len(on):
        rows = _at(on, x)
        x[rows] = _jitter(x[rows], params.order[on], params.factors[on])
    rows = _at(np.flatnonzero(params.gray), x)
    x[rows] = _gray(x[rows]).expand(-1, 3, -1, -1)
    on = np.flatnonzero(params.sigma)
    if len(on):
        rows = _at(on, x)
        x[rows] = blur(x[rows], params.sigma[on])
    rows = _at(np.flatnonzero(params.flip), x)
    x[rows] = x[rows].flip(-1)
    return normalize(x)


def normalize(x: Tensor) -> Tensor:
    """[0, 1] colours -> ImageNet mean 0, standard deviation 1, per channel."""
    mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (x - mean) / std


def _at(rows: np.ndarray, x: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(x.device)


def _gray(x: Tensor) -> Tensor:
    r, g, b = x.unbind(1)
    return (GRAY[0] * r + GRAY[1] * g + GRAY[2] * b).unsqueeze(1)  # (B, 1, S, S)


def _jitter(x: Tensor, order: np.ndarray, factors: np.ndarray) -> Tensor:
    f = torch.from_numpy(factors.astype(np.float32)).to(x.device).view(-1, 4, 1, 1, 1)
    for step in range(4):
        done = torch.empty_like(x)
        for op in range(4):
            rows = np.flatnonzero(order[:, step] == op)
            if not len(rows):
                continue
            on = _at(rows, x)
            y, a = x[on], f[on, op]
            if op == 3:
                done[on] = shift_hue(y, a)
                continue
            # Blend with black, with the mean gray, or with the gray image.
            other = 0.0 if op == 0 else _gray(y).mean((1, 2, 3), keepdim=True) if op == 1 else _gray(y)
            done[on] = (a * y + (1 - a) * other).clamp(0, 1)
        x = done
    return x


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of (B, 3, S, S) colours in [0, 1] by `shift` (B, 1, 1, 1) of the circle, in HSV, exactly."""
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    hue = torch.where(
        value == r, (g - b) / safe, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))  # in sixths
    hue = hue + 6 * shift.squeeze(1)
    channels = []
    for n in (5.0, 3.0, 1.0):  # colour(n) = V - C max(0, min(k, 4 - k, 1)), k = (n + H) mod 6
        k = (hue + n) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def blur(x: Tensor, sigma: np.ndarray) -> Tensor:
    """Gaussian blur of (B, 3, S, S) with a standard deviation in pixels per sample; edge pixels repeat, as in PIL.

    The kernel is the true Gaussian, cut at 4 sigma; PIL's is a cascade of box filters that approximates it.
    """
    size = x.shape[-1]
    radius = math.ceil(4 * float(sigma.max()))
    offset = np.arange(-radius, radius + 1)
    taps = np.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    taps[np.abs(offset) > np.ceil(4 * sigma)[:, None]] = 0  # whatever the other samples' sigma
    taps /= taps.sum(1, keepdims=True)  # (B, 2 radius + 1)
    band = np.zeros((len(sigma), size, size))
    rows = np.arange(size)
    for i, o in enumerate(offset):
        np.add.at(band, (slice(None), rows, np.clip(rows + o, 0, size - 1)), taps[:, i, None])
    m = torch.from_numpy(band.astype(np.float32)).to(x.device)[:, None]  # (B, 1, S, S)
    return m @ x @ m.transpose(-1, -2)
