"""Decodes image files to RGB pixels, and defines the errors of data that cannot be used."""
import errno
import functools
import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
from PIL import Image, UnidentifiedImageError

from ...runtime.messages import one_line, printable
from .budget import decode_in_turn
from .depth import to_rgb

try:  # libjpeg-turbo, which Pillow uses too, without Pillow's copies
    import simplejpeg
except ImportError:  # it has no wheel for this platform
    simplejpeg = None

MAX_PIXELS = 89_478_485  # of an image; above it, Pillow warns of a decompression bomb
PIL_BYTES = 11  # for each pixel that PIL decodes: its own 4, 1 more before it converts gray ones, and two copies of 3
FORMATS = (
    'JPEG', 'MPO', 'PNG', 'BMP', 'DIB', 'GIF', 'TIFF', 'WEBP', 'AVIF', 'HEIF', 'PPM', 'JPEG2000', 'ICO', 'TGA', 'PCX',
    'SGI', 'QOI')
FRAMES_BYTES = {'GIF': 18, 'WEBP': 25}  # the same where PIL keeps more than one frame; measured
JPEG_BYTES = 4  # the same for what simplejpeg decodes: its 3, and some for the decoder
_EXHAUSTED = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # the process lacks something; the file may be fine


class DataError(RuntimeError):
    """The data cannot be used; the message says why in one sentence, and is one line whatever the names of files."""

    def __str__(self) -> str:
        return printable(super().__str__())


class UnreadableError(DataError):
    """An image cannot be read or decoded."""


def import_library(name: str, users: str) -> ModuleType:
    """Imports a library of the extra `data`; raises DataError if it is missing. `users`: what needs it, plural."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f'{users} need the {name} library: pip install {name}') from None


@contextmanager
def explain_read_errors(name: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns these errors into UnreadableError for the image `name`, except for a lack of memory or file handles."""
    try:
        yield
    except errors as e:
        if isinstance(e, MemoryError) or getattr(e, 'errno', None) in _EXHAUSTED:
            raise
        file = str(getattr(e, 'filename', None) or '')
        reason = (getattr(e, 'strerror', None) or one_line(e)) + (f': {file}' if file not in name else '')
        raise UnreadableError(f'{name}: cannot be read ({reason})') from None


def decode(data: bytes | bytearray, name: str) -> np.ndarray:
    """Decodes to (H, W, 3) uint8, the pixels of PIL's convert('RGB'); `depth` scales samples of more than 8 bits.

    As in torchvision's ImageFolder, an orientation in the EXIF data is not applied. Transparency is dropped. Of several
    frames or pages, the first is read. Raises UnreadableError, which contains `name`, if the data cannot be decoded, if
    the range of its samples cannot be known, or if it has more than MAX_PIXELS.
    """
    try:
        if simplejpeg is not None and data[:3] == b'\xff\xd8\xff' and (pixels := _decode_jpeg(data)) is not None:
            return pixels
        with Image.open(io.BytesIO(data), formats=_list_formats()) as image:  # the header; rejects decompression bombs
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(
                    f'{width} x {height} pixels, more than {MAX_PIXELS:,}; downscale it, since views are far '
                    'smaller anyway')
            with decode_in_turn(width * height * FRAMES_BYTES.get(image.format, PIL_BYTES)):
                return to_rgb(image, data)
    except MemoryError:
        raise
    # PIL raises almost anything for a broken file: OSError, SyntaxError, ValueError, DecompressionBombError, ...
    except Exception as e:
        reason = _explain_unknown(data) if isinstance(e, UnidentifiedImageError) else one_line(e, 300)
        raise UnreadableError(f'{name}: cannot be read as an image ({reason})') from None


@functools.cache
def _list_formats() -> list[str]:
    """Returns the formats that PIL may read. It would hand PostScript, also in other files, to Ghostscript to run."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _explain_unknown(data: bytes | bytearray) -> str:
    if data[:4] == b'%!PS' or data[:4] == b'\xc5\xd0\xd3\xc6':
        return 'PostScript, a program; convert it to PNG or JPEG'
    if data[:4] in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'):
        return 'damaged, or a kind of TIFF that Pillow does not know; convert it to 8 bits per sample'
    return 'unknown format'


def _decode_jpeg(data: bytes | bytearray) -> np.ndarray | None:
    """Decodes an RGB or gray JPEG; returns None for all that PIL must judge: large, damaged, unusual."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if width * height > min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS) or colours in ('CMYK', 'YCCK'):
            return None
        with decode_in_turn(width * height * JPEG_BYTES):
            image: np.ndarray = simplejpeg.decode_jpeg(data, 'RGB')
            return image
    except (ValueError, KeyError):  # what libjpeg rejects or warns of; a subsampling that simplejpeg cannot name
        return None
