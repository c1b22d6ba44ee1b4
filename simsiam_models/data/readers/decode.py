"""The bytes of an image file -> RGB pixels."""
import io

import numpy as np
import torch
import torchvision  # noqa: F401 - registers torch.ops.image
from PIL import Image, UnidentifiedImageError

# torchvision 0.29 announces that its decoders will go (its Python function warns); PIL's take a sixth longer.
_JPEG = getattr(torch.ops.image, 'decode_jpeg', None)
_UNCHANGED = 0  # torchvision.io.ImageReadMode: the file's own channels


class DataError(RuntimeError):
    """The data cannot be used as they are, or not any more; one sentence says why."""


class UnreadableError(DataError):
    """An image file could not be decoded."""


def decode(data: bytes | bytearray, name: str) -> np.ndarray:
    """-> (H, W, 3) uint8, the pixels that PIL's convert('RGB') gives; 16-bit grayscale is scaled to 8 bits.

    An orientation in the EXIF data is not applied, as in torchvision's ImageFolder. Transparency is dropped.

    Raises:
        UnreadableError: `name` cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:  # reads the header, and refuses decompression bombs
            if _JPEG is not None and image.format == 'JPEG' and (pixels := _decode_jpeg(data)) is not None:
                return pixels
            if image.mode.startswith('I;16'):  # convert() would cut at 255: all white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.array(image.convert('RGB'))
    # PIL raises nearly anything on a broken file (OSError, SyntaxError, ValueError, DecompressionBombError, ...).
    except Exception as e:
        reason = 'of no known kind' if isinstance(e, UnidentifiedImageError) else e
        raise UnreadableError(f'{name}: cannot be read as an image ({reason})') from None


def _decode_jpeg(data: bytes | bytearray) -> np.ndarray | None:
    """By libjpeg-turbo through torchvision, which PIL uses too; None for what PIL had better decide."""
    raw = torch.frombuffer(data if isinstance(data, bytearray) else bytearray(data), dtype=torch.uint8)
    try:
        x = _JPEG(raw, _UNCHANGED)  # (C, H, W), in memory (H, W, C)
    except RuntimeError:
        return None
    if x.shape[0] == 1:
        return x.permute(1, 2, 0).expand(-1, -1, 3).numpy()
    return x.permute(1, 2, 0).numpy() if x.shape[0] == 3 else None  # 4: CMYK
