"""Masks: PNG files whose pixels are the ids of classes, as numbers of a palette or as gray levels."""
import io
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from ...data.readers.decode import MAX_PIXELS, DataError, UnreadableError
from ...runtime.messages import one_line, short

SIGNATURE = b'\x89PNG\r\n\x1a\n'
IGNORED = 255  # the id of pixels that count nowhere
GRAY = 0  # of a PNG's types of colours
UNKNOWN = -1  # in a table of labels
REMEDY = f'save masks as PNG files whose gray levels or palette numbers are ids from 0 to 254 ({IGNORED}: ignored)'


@dataclass(frozen=True)
class Classes:
    """The classes of masks: their names, and their ids in the files."""

    names: list[str]
    ids: list[int]
    ignored: tuple[int, ...] = (IGNORED,)  # ids of pixels that count nowhere

    @cached_property
    def table(self) -> np.ndarray:
        """The label of each id, (256,) int16: the position of its class, IGNORED, or UNKNOWN."""
        table = np.full(256, UNKNOWN, np.int16)
        table[self.ids] = np.arange(len(self.ids))
        table[list(self.ignored)] = IGNORED
        return table


def read_header(data: bytes, name: str) -> tuple[int, int]:
    """Returns height and width of a PNG from its first bytes; raises DataError if it is of another format."""
    if data[:8] != SIGNATURE:
        raise DataError(f'{name}: {_name_format(data)}; {REMEDY}')
    if len(data) < 26:
        raise UnreadableError(f'{name}: cannot be read as a mask (cut off)')
    width, height = struct.unpack('>II', data[16:24])
    return height, width


def _name_format(data: bytes) -> str:
    if not data:
        return 'a mask of 0 bytes'
    if data[:3] == b'\xff\xd8\xff':
        return 'a mask saved as JPEG, which changes ids at the edges of classes'
    try:
        with Image.open(io.BytesIO(data)) as image:
            return f'a mask saved as {image.format}'
    # PIL raises almost anything for a broken file.
    except Exception:
        return 'a mask of an unknown format'


def decode_mask(data: bytes, name: str) -> np.ndarray:
    """Decodes a PNG to ids, (H, W) uint8: of a palette the numbers, whatever its colours, else the gray levels.

    Gray levels of 1, 2 and 4 bits are not scaled up. 16-bit ids are read as they stand; so are those of RGB pixels
    whose three channels are the same.

    Raises:
        DataError: it is not a PNG, has colours or transparency instead of ids, or ids above 255.
        UnreadableError: it cannot be decoded.
    """
    height, width = read_header(data, name)
    bits, kind = data[24], data[25]
    if height * width > MAX_PIXELS:
        raise UnreadableError(f'{name}: {width} x {height} pixels, more than {MAX_PIXELS:,}')
    if bits == 16 and kind != GRAY:
        raise DataError(f'{name}: a mask in colours of 16 bits; {REMEDY}')
    try:
        with Image.open(io.BytesIO(data)) as image:
            values = np.asarray(image)
    except MemoryError:
        raise
    # PIL raises almost anything for a broken file: OSError, SyntaxError, ValueError, ...
    except Exception as e:
        raise UnreadableError(f'{name}: cannot be read as a mask ({one_line(e, 300)})') from None
    if values.ndim == 3:
        values = _merge_channels(values, name)
    if kind == GRAY and bits in (2, 4):  # Pillow scales them to 0 .. 255
        values = values // (255 // (2**bits - 1))
    if values.dtype != np.uint8 and (most := int(values.max())) > IGNORED:
        raise DataError(f'{name}: a mask of {bits} bits with the id {most}; {REMEDY}')
    return np.ascontiguousarray(values, np.uint8)


def _merge_channels(values: np.ndarray, name: str) -> np.ndarray:
    """Returns (H, W) of gray or RGB pixels, with or without an opaque alpha channel, if they hold ids."""
    if values.shape[2] in (2, 4):
        if (values[..., -1] != 255).any():
            raise DataError(f'{name}: a mask with transparency; {REMEDY}')
        values = values[..., :-1]
    if (differs := (values != values[..., :1]).any(2)).any():
        y, x = np.argwhere(differs)[0]
        raise DataError(
            f'{name}: a mask in colours ({short(values[y, x].tolist())} at column {x}, row {y}), not in ids; {REMEDY}')
    return values[..., 0]
