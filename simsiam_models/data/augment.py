"""SimSiam's augmentation: draws its random parameters and applies them to images.

The published list (paper, appendix A; FAIR and MMSelfSup release the same numbers): random resized crop, colour jitter,
grayscale, Gaussian blur, flip, normalise. On a CPU kernel.c does all of it, one view at a time. For a GPU the CPU cuts
the crops (uint8) and `finish` does the rest on whole batches, with separate parameters for each sample.
"""
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
Planes = Sequence[Tensor]  # red, green and blue, (B, S, S) each
MAX_SIGMA = kernel.MAX_SIGMA  # pixels, of a blur
GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision rounds it


@dataclass(frozen=True)
class Augmentation:
    """The published numbers, in order of application; probabilities and factors are defined as in torchvision."""

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
        """Returns (4,) float64, the limits of the crop for kernel.c: shares of the area, then width / height."""
        return np.array([*self.crop_scale, *self.crop_ratio])


@dataclass(frozen=True)
class Finish:
    """The parameters of each sample of a batch for all steps after the crop; arrays of length B."""

    jitter: np.ndarray  # bool
    order: np.ndarray  # (B, 4) brightness (0), contrast, saturation, hue (3): which comes 1st .. 4th
    factors: np.ndarray  # (B, 4) three factors and the hue shift
    gray: np.ndarray  # bool
    sigma: np.ndarray  # 0: no blur
    flip: np.ndarray  # bool

    def table(self) -> np.ndarray:
        """Returns (B, 12) float32: jitter, order, factors, gray, sigma, flip, as kernel.c reads them."""
        columns = [self.jitter, *self.order.T, *self.factors.T, self.gray, self.sigma, self.flip]
        return np.stack([c.astype(np.float32) for c in columns], 1)


def draw(aug: Augmentation, seed: int, epoch: int, indices: np.ndarray, view: int) -> tuple[np.ndarray, Finish]:
    """Returns the uniform numbers of the crops, (B, 22), for `crop_box`, and the parameters of the other steps."""
    crops, rest = np.split(uniforms(seed, epoch, indices, view, DRAWS), [CROP_DRAWS], axis=1)
    width = np.array([aug.brightness, aug.contrast, aug.saturation, aug.hue])
    centre = np.array([1.0, 1.0, 1.0, 0.0])
    low, high = aug.blur_sigma
    return crops, Finish(
        jitter=rest[:, 0] < aug.jitter_p,
        order=ORDERS[(rest[:, 1] * len(ORDERS)).astype(int)],
        # Factors are at least zero, as in torchvision's ColorJitter.
        factors=np.maximum(centre - width, [0, 0, 0, -0.5]) * (1 - rest[:, 2:6])
        + np.minimum(centre + width, [9, 9, 9, 0.5]) * rest[:, 2:6],
        gray=rest[:, 6] < aug.gray_p,
        sigma=np.where(rest[:, 7] < aug.blur_p, low + (high - low) * rest[:, 8], 0.0),
        flip=rest[:, 9] < aug.flip_p,
    )


def crop_box(aug: Augmentation, u: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """Maps 22 uniform numbers and an image size to (left, top, right, bottom), as torchvision's RandomResizedCrop."""
    log_low, log_high = math.log(aug.crop_ratio[0]), math.log(aug.crop_ratio[1])
    for t in range(CROP_TRIES):
        area = width * height * (aug.crop_scale[0] + (aug.crop_scale[1] - aug.crop_scale[0]) * u[2 * t])
        ratio = math.exp(log_low + (log_high - log_low) * u[2 * t + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(u[-2] * (width - w + 1)), int(u[-1] * (height - h + 1))
            break
    else:  # the widest or tallest box that the ratio admits, in the centre
        w = min(width, max(1, round(height * aug.crop_ratio[1])))
        h = min(height, max(1, round(width / aug.crop_ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def crop(image: Image.Image, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """Cuts and resizes (bilinear, antialiased) an RGB image -> (size, size, 3) uint8."""
    return np.asarray(image.crop(box).resize((size, size), Image.Resampling.BILINEAR))


def cut_crops(
    images: list[np.ndarray], u: np.ndarray, aug: Augmentation, out: np.ndarray, rows: np.ndarray,
    table: np.ndarray | None = None,
) -> None:
    """Cuts image i by the numbers u[i] and writes the crop to out[rows[i]]; by kernel.c if available, else by PIL.

    Args:
        images: n of (H, W, 3) uint8.
        u: (n, 22) float64, from `draw`.
        out: (N, S, S, 3), C order; uint8, or float32 with a table.
        rows: (n,) indices into `out`.
        table: (n, 12), rows of `Finish.table`: apply all other steps, too. Only kernel.c can.
    """
    if kernel.load_library() is not None:
        return kernel.cut_views(images, u, aug.rule(), table, out, rows)
    for image, numbers, row in zip(images, u, rows, strict=True):
        height, width, _ = image.shape
        out[row] = crop(Image.fromarray(image), crop_box(aug, numbers, width, height), aug.size)


def short_side(image: np.ndarray, resize: int) -> tuple[int, int]:
    """Width and height of an (H, W, 3) image after torchvision's Resize: the long side is rounded down."""
    h, w = image.shape[:2]
    return (resize, int(resize * h / w)) if w <= h else (int(resize * w / h), resize)


def resize(image: np.ndarray, width: int, height: int, left: int, top: int, out: np.ndarray) -> None:
    """Resizes to width x height (bilinear, antialiased) and writes the window at (left, top) to `out` (h, w, 3).

    The result equals PIL's bit for bit if PIL resizes the rows first, then the columns, as its releases up to 12 do.
    PIL 13 resizes some images in the other order, which changes pixels by one level.
    """
    if kernel.load_library() is not None:
        return kernel.resize(image, width, height, left, top, out)
    rows = Image.fromarray(image).resize((width, image.shape[0]), Image.Resampling.BILINEAR)
    whole = np.asarray(rows.resize((width, height), Image.Resampling.BILINEAR))
    out[:] = whole[top:top + out.shape[0], left:left + out.shape[1]]


class Sent(NamedTuple):
    """The parameters of N samples on their device; blurred samples are the rows `rows`."""

    table: Tensor  # (N, 12), see `Finish.table`
    rows: Tensor  # (n,) int64
    taps: Tensor  # (n, R + 2), see `blur`
    beyond: Tensor  # (n, R + 2)


def send_parameters(table: np.ndarray, to: Tensor) -> Sent:
    """Sends the (N, 12) `Finish.table` to the device of `to`, with what the blur needs, in one copy."""
    rows = np.flatnonzero(table[:, 10])
    arrays = [table, rows, *_weigh(table[rows, 10])]
    flat = send(np.concatenate([a.astype(np.float32).ravel() for a in arrays]), to)  # exact for rows below 2^24
    pieces: tuple[Tensor, ...] = flat.split([a.size for a in arrays])
    on_device = [x.view(a.shape) for x, a in zip(pieces, arrays, strict=True)]
    return Sent(on_device[0], on_device[1].long(), *on_device[2:])


def finish(images: Tensor, params: Finish | Sent, colours: Callable[..., Tensor] | None = None) -> Tensor:
    """Jitters, grays, blurs, flips and normalises (B, 3, S, S) uint8 on any device -> (B, 3, S, S) float32.

    The host does not wait for the device. `colours` may be a compiled `finish_colours`. The blur comes last because
    the flip and the normalisation, which fit into the same pass as the colours, commute with it: a Gaussian is
    symmetric, and its weights add up to one.
    """
    sent = send_parameters(params.table(), images) if isinstance(params, Finish) else params
    x = (colours or finish_colours)(images, sent.table, _statistics(images.device))
    if len(sent.rows):
        x[sent.rows] = _convolve(x[sent.rows], sent.taps, sent.beyond)
    return x


def finish_colours(images: Tensor, table: Tensor, statistics: Tensor) -> Tensor:
    """Does what `finish` does, except for the blur; `statistics` (2, 3): mean and standard deviation per channel."""
    flipped = torch.where(table[:, 11].view(-1, 1, 1, 1) > 0, images.flip(-1), images)
    planes = _jitter_and_gray(flipped.unbind(1), table)
    return _join([(x - mean) / std for x, mean, std in zip(planes, *statistics, strict=True)])


def normalize(x: Tensor) -> Tensor:
    """Normalises colours in [0, 1] to mean 0 and standard deviation 1 per channel, by ImageNet's statistics."""
    statistics: Tensor = _statistics(x.device).view(2, 3, 1, 1)
    return (x - statistics[0]) / statistics[1]


@functools.cache
def _statistics(device: torch.device) -> Tensor:
    """Returns ImageNet's mean and standard deviation, (2, 3), sent to the device once."""
    with torch.inference_mode(False):  # later calls may be outside of it
        return torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD], device=device)


def send(array: np.ndarray, to: Tensor) -> Tensor:
    """Copies an array to the device of `to`, on CUDA asynchronously."""
    x = torch.from_numpy(array)
    return x.pin_memory().to(to.device, non_blocking=True) if to.is_cuda else x.to(to.device)


def jitter_and_gray(images: Tensor, table: Tensor) -> Tensor:
    """Maps (B, 3, S, S) uint8 and a (B, 12) `Finish.table` to colours in [0, 1], as torchvision does on floats."""
    return _join(_jitter_and_gray(images.unbind(1), table))


def _join(planes: Planes) -> Tensor:
    return torch.stack(tuple(planes), -1).permute(0, 3, 1, 2)  # (B, 3, S, S), channels last


def _jitter_and_gray(planes: Planes, table: Tensor) -> Planes:
    """Applies the operators in each sample's own order, without a branch that depends on it.

    Only contrast needs more than its own pixel: the mean gray of the image at its place in the order. So there are two
    passes over the pixels, which torch.compile fuses: the operators before contrast, and those after it.
    """
    jitter, order, factors, gray = table[:, 0] > 0, table[:, 1:5], table[:, 5:9], table[:, 9].view(-1, 1, 1) > 0
    # The place of each operator.
    at: list[Any] = [sum(place * (order[:, place] == op) for place in range(1, 4)) for op in range(4)]
    x = _change([x.float() / 255 for x in planes], at, factors, [jitter & (place < at[1]) for place in at])
    x = _blend(x, _gray(x).mean((1, 2), keepdim=True), _choose(factors[:, 1], jitter))
    x = _change(x, at, factors, [jitter & (place > at[1]) for place in at])
    luma = _gray(x)
    return [torch.where(gray, luma, plane) for plane in x]


def _change(x: Planes, at: list[Tensor], factors: Tensor, on: list[Tensor]) -> Planes:
    """Applies brightness, saturation and hue in the order of their places `at` (B,), each to the samples in `on` (B,).

    Every order of the three is a part of this sequence; what comes out of place has the factor 1.
    """
    (b, _, s, hue), (b_on, _, s_on, hue_on) = at, on
    x = _brighten(x, factors, b_on & (b < s) & (b < hue))
    x = _saturate(x, factors, s_on & (s < hue))
    x = _brighten(x, factors, b_on & (s < b) & (b < hue))
    turned = _turn(x, factors[:, 3].view(-1, 1, 1))
    x = [torch.where(hue_on.view(-1, 1, 1), new, old) for new, old in zip(turned, x, strict=True)]
    x = _brighten(x, factors, b_on & (hue < b) & (b < s))
    x = _saturate(x, factors, s_on & (hue < s))
    return _brighten(x, factors, b_on & (s < b) & (hue < b))


def _choose(factor: Tensor, on: Tensor) -> Tensor:
    return torch.where(on, factor, torch.ones_like(factor)).view(-1, 1, 1)


def _brighten(x: Planes, factors: Tensor, on: Tensor) -> Planes:
    factor = _choose(factors[:, 0], on)
    return [(factor * plane).clamp(0, 1) for plane in x]


def _saturate(x: Planes, factors: Tensor, on: Tensor) -> Planes:
    return _blend(x, _gray(x), _choose(factors[:, 2], on))


def _blend(x: Planes, other: Tensor, factor: Tensor) -> Planes:
    return [(factor * plane + (1 - factor) * other).clamp(0, 1) for plane in x]


def _gray(x: Planes) -> Tensor:
    return GRAY[0] * x[0] + GRAY[1] * x[1] + GRAY[2] * x[2]


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shifts the hue of (B, 3, S, S) colours in [0, 1] by `shift` (B, 1, 1, 1) of the circle, exactly in HSV."""
    return _join(_turn(x.unbind(1), shift.squeeze(1)))


def _turn(x: Planes, shift: Tensor) -> Planes:
    r, g, b = x
    value, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = value - low
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    hue = torch.where(
        value == r, (g - b) / safe, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))  # in sixths
    hue = hue + 6 * shift
    turned = [(hue + n) % 6 for n in (5.0, 3.0, 1.0)]  # colour(n) = V - C max(0, min(k, 4 - k, 1)), k = (n + H) mod 6
    return [value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in turned]


def blur(x: Tensor, sigma: np.ndarray) -> Tensor:
    """Blurs (B, 3, S, S) with a Gaussian of `sigma` (B,) pixels per sample; edge pixels repeat, as in PIL.

    The kernel is the true Gaussian, cut off at 4 sigma; PIL approximates it by a cascade of box filters.
    """
    return _convolve(x, *(send(w.astype(np.float32), x) for w in _weigh(sigma)))


def _weigh(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the kernels' weights at the distances 0 .. R + 1, and at each distance and beyond, (B, R + 2) each."""
    sigma = sigma.astype(np.float64)[:, None]
    reach = np.ceil(4 * sigma)
    o = np.arange(int(reach.max(initial=0)) + 2)
    taps = np.exp(-0.5 * (o / sigma) ** 2) * (o <= reach)
    taps /= 2 * taps.sum(1, keepdims=True) - taps[:, :1]
    return taps, taps[:, ::-1].cumsum(1)[:, ::-1]


def _convolve(x: Tensor, taps: Tensor, beyond: Tensor) -> Tensor:
    size, last = x.shape[-1], taps.shape[1] - 1
    i = torch.arange(size, device=x.device)
    m = taps[:, (i[:, None] - i).abs().clamp_max(last)]  # (B, S, S)
    m[:, :, 0] = beyond[:, i.clamp_max(last)]  # the edge pixel stands for all beyond it
    m[:, :, -1] = beyond[:, (size - 1 - i).clamp_max(last)]
    m = torch.ones_like(m)[:, None] if size == 1 else m[:, None]
    return m @ x @ m.transpose(-1, -2)
