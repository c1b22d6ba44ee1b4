"""The way of pixels into a network that detects or segments: read, resized, normalised."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from ..data.augment import resize
from ..data.readers.decode import decode


def read_image(image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """Returns (H, W, 3) uint8, RGB, of a file, a PIL image or such an array; raises ValueError for anything else."""
    if isinstance(image, (str, Path)):
        return decode(Path(image).read_bytes(), str(image))
    if isinstance(image, Image.Image):
        return np.asarray(image.convert('RGB'))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return image
    raise ValueError(f'an image is a file, a PIL image or an array (H, W, 3) of uint8, not {type(image).__name__}')


def fit_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """Returns height and width whose short side is `short`, or whose long side is `long` if that is smaller.

    >>> fit_size(375, 500, 800, 1333), fit_size(300, 1000, 800, 1333)
    ((800, 1067), (400, 1333))
    """
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: np.ndarray, height: int, width: int, variant: str = 'mmdet') -> Tensor:
    """Returns an image (H, W, 3) uint8 at another size, (3, height, width) uint8.

    Both variants interpolate linearly: 'mmdet', as mmseg, between the nearest pixels, as OpenCV does, but rounded as
    torch does, which makes some pixels differ by one level; 'detectron2' with antialiasing, as PIL does.
    """
    if variant == 'detectron2':
        out = np.empty((height, width, 3), np.uint8)
        resize(image, width, height, 0, 0, out)
        return torch.from_numpy(out).permute(2, 0, 1)
    pixels = np.array(image) if not image.flags.writeable or min(image.strides) < 0 else image  # torch takes no other
    resized: Tensor = tv.resize(torch.from_numpy(pixels).permute(2, 0, 1), [height, width], antialias=False)
    return resized


def nearest(new: int, old: int) -> np.ndarray:
    """Returns (new,) int64: for each pixel of a row, the pixel of a row of `old` that INTER_NEAREST of OpenCV takes."""
    step = 1 / (new / old)  # not old / new: the last bit decides where the product is an integer
    places: np.ndarray = np.minimum(np.floor(np.arange(new) * step).astype(np.int64), old - 1)
    return places


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns a mask (H, W) at another size, (height, width)."""
    resized: np.ndarray = mask[nearest(height, mask.shape[0])][:, nearest(width, mask.shape[1])]
    return resized


class Normalizer:
    """Turns (3, H, W) uint8 into floats on the device, with the backbone's mean and std."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.mean, self.std = ((255 * torch.tensor(x, device=device)).view(3, 1, 1) for x in (mean, std))

    def __call__(self, image: Tensor) -> Tensor:
        return (image.to(self.mean.device, non_blocking=True).float() - self.mean) / self.std
