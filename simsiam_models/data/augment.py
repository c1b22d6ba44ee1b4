"""SimSiam's augmentation: which numbers it draws, and what they do to an image.

The published list (paper, appendix A; FAIR and MMSelfSup release the same numbers): random resized crop, colour jitter,
grayscale, Gaussian blur, flip, normalise. On a CPU kernel.c does all of it, one view at a time. For a GPU the CPU cuts
the crop (uint8), and `finish` does the rest on whole batches, with parameters of its own for each sample.
"""
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from . import kernel
from .philox import uniforms

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

    def rule(self) -> np.ndarray:
        """(4,) float64, what kernel.c asks of the crop."""
        return np.array([*self.crop_scale, *self.crop_ratio])


@dataclass(frozen=True)
class Finish:
    """What happens to each sample of a batch behind the crop; arrays of length B."""

    jitter: np.ndarray  # bool
    order: np.ndarray  # (B, 4) which of brightness, contrast, saturation, hue comes 1st..4th
    factors: np.ndarray  # (B, 4) three factors and the hue shift
    gray: np.ndarray  # bool
    sigma: np.ndarray  # 0 where there is no blur
    flip: np.ndarray  # bool

    def table(self) -> np.ndarray:
        """(B, 12) float32: jitter, order, factors, gray, sigma, flip; the rows that kernel.c reads."""
        columns = [self.jitter, *self.order.T, *self.factors.T, self.gray, self.sigma, self.flip]
        return np.stack([c.astype(np.float32) for c in columns], 1)


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


def short_side(image: np.ndarray, resize: int) -> tuple[int, int]:
    """Width and height of an (H, W, 3) image whose short side is to be `resize`.

    As torchvision's Resize has it: the short side is exact, the long one is cut down to a whole number.
    """
    h, w = image.shape[:2]
    return (resize, int(resize * h / w)) if w <= h else (int(resize * w / h), resize)


def resize(image: np.ndarray, width: int, height: int, left: int, top: int, out: np.ndarray) -> None:
    """Resize to width x height (bilinear, antialiased), of which `out` (h, w, 3) is the window at (left, top).

    To the bit what PIL makes of it along the rows first, then along the columns, as its releases to 12 do. PIL 13 takes
    some images the other way round, which moves pixels by one level.
    """
    if kernel.library() is not None:
        kernel.resize(image, width, height, left, top, out)
        return
    rows = Image.fromarray(image).resize((width, image.shape[0]), Image.Resampling.BILINEAR)
    whole = np.asarray(rows.resize((width, height), Image.Resampling.BILINEAR))
    out[:] = whole[top:top + out.shape[0], left:left + out.shape[1]]


def finish(images: Tensor, params: Finish, colours: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """(B, 3, S, S) uint8 on any device -> (B, 3, S, S) float32, jittered, grayed, blurred, flipped, normalised.

    Makes the host wait for nothing. `colours` may be a compiled `jitter_and_gray`.
    """
    table = send(params.table(), images)
    x = (colours or jitter_and_gray)(images, table)
    on = np.flatnonzero(params.sigma)
    if len(on):
        rows = send(on, images)
        x[rows] = blur(x[rows], params.sigma[on])
    x = torch.where(table[:, 11].view(-1, 1, 1, 1) > 0, x.flip(-1), x)
    return normalize(x)


def normalize(x: Tensor) -> Tensor:
    """[0, 1] colours -> ImageNet mean 0, standard deviation 1, per channel."""
    mean, std = (
        send(np.array(v, np.float32).reshape(3, 1, 1), x) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (x - mean) / std


def send(array: np.ndarray, to: Tensor) -> Tensor:
    """To the device of `to`; on CUDA without waiting for it."""
    x = torch.from_numpy(array)
    return x.pin_memory().to(to.device, non_blocking=True) if to.is_cuda else x.to(to.device)


def _gray(x: Tensor) -> Tensor:
    r, g, b = x.unbind(1)
    return (GRAY[0] * r + GRAY[1] * g + GRAY[2] * b).unsqueeze(1)  # (B, 1, S, S)


def jitter_and_gray(images: Tensor, table: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 and (B, 12), `Finish.table` -> colours in [0, 1], computed as torchvision does on float.

    Each sample has its own order of the four operators, and no branch depends on it: the three that blend (brightness,
    contrast, saturation) get three places before hue and three behind it, and do nothing where they are not called for.
    """
    x = images.float() / 255
    jitter, order, factors, gray = table[:, 0] > 0, table[:, 1:5], table[:, 5:9], table[:, 9] > 0
    hue_at = (order == 3).float().argmax(1)
    for place in range(3):
        x = _blend(x, order[:, place], factors, jitter & (place < hue_at))
    turned = shift_hue(x, factors[:, 3].view(-1, 1, 1, 1))
    x = torch.where(jitter.view(-1, 1, 1, 1), turned, x)
    for place in range(1, 4):
        x = _blend(x, order[:, place], factors, jitter & (place > hue_at))
    return torch.where(gray.view(-1, 1, 1, 1), _gray(x), x)


def _blend(x: Tensor, op: Tensor, factors: Tensor, on: Tensor) -> Tensor:
    """Operator op (B,) where on (B,): blend with black (0), with the mean gray (1), or with the gray image (2)."""
    factor = factors.gather(1, op.long()[:, None]).squeeze(1)
    factor = torch.where(on, factor, torch.ones_like(factor)).view(-1, 1, 1, 1)
    op, other = op.view(-1, 1, 1, 1), _gray(x)
    other = torch.where(op == 1, other.mean((1, 2, 3), keepdim=True), other)
    other = torch.where(op == 0, torch.zeros_like(other), other)
    return (factor * x + (1 - factor) * other).clamp(0, 1)


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
    reach = np.ceil(4 * sigma)
    o = np.arange(int(reach.max()) + 2)
    taps = np.exp(-0.5 * (o / sigma[:, None]) ** 2) * (o <= reach[:, None])  # (B, R + 2), whatever the others' sigma
    taps /= 2 * taps.sum(1, keepdims=True) - taps[:, :1]
    beyond = taps[:, ::-1].cumsum(1)[:, ::-1]  # what lies at distance o and farther
    taps, beyond = send(taps.astype(np.float32), x), send(beyond.astype(np.float32), x)
    i = torch.arange(size, device=x.device)
    last = len(o) - 1
    m = taps[:, (i[:, None] - i).abs().clamp_max(last)]  # (B, S, S)
    m[:, :, 0] = beyond[:, i.clamp_max(last)]  # the edge stands for all that lies behind it
    m[:, :, -1] = beyond[:, (size - 1 - i).clamp_max(last)]
    if size == 1:
        m = torch.ones_like(m)
    m = m[:, None]
    return m @ x @ m.transpose(-1, -2)
