"""Brings samples that are not plain 8-bit ones to 8 bits, by the range that the file declares.

    kind                        range
    16-bit gray PNG             0..65535; with an sBIT chunk of b bits, 0..2^b - 1 if the samples were not scaled up
    PGM, PPM                    0..maxval
    JPEG 2000                   0..2^bits - 1
    TIFF, 9 to 16 bits          S[Min,Max]SampleValue or [Min,Max]SampleValue, or else 0..2^bits - 1
    TIFF, signed, 32 bits       S[Min,Max]SampleValue or [Min,Max]SampleValue; a minimum that is missing is 0
    16-bit RGB, RGBA, CMYK      0..65535; Pillow reads the high bytes

Where none is declared, the range cannot be known, and guessing it from the pixels of each image would scale the images
of a data set differently. So such a file is refused, and so is one of 16 bits that uses at most NARROW of them: its
samples most likely have fewer bits than it says. Black in a TIFF that declares white as zero becomes white.
"""
import struct
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from PIL import Image

NARROW = 12  # bits
_BITS, _COMPRESSION, _PHOTOMETRIC, _PLANES, _FORMAT = 258, 259, 262, 284, 339  # TIFF tags
_MINIMA, _MAXIMA = (340, 280), (341, 281)  # S[Min,Max]SampleValue, of any type, before [Min,Max]SampleValue
_UNSIGNED, _SIGNED = 1, 2  # values of _FORMAT
_BLOCK = 1 << 22  # samples that are scaled at a time
_REMEDY = 'convert the images to 8 bits, all by the same range'


def to_rgb(image: Image.Image, data: bytes | bytearray) -> np.ndarray:
    """Returns (H, W, 3) uint8. `data`: the file. Raises ValueError if the range of its samples cannot be known."""
    tags = cast(Any, image).tag_v2 if image.format == 'TIFF' else {}
    signed_bytes = image.mode == 'L' and _read(tags, _FORMAT, _UNSIGNED) == _SIGNED
    if image.mode[0] in 'IF' or signed_bytes:
        image = Image.fromarray(_scale(image, data, tags))
    elif _sample_bits(image, data, tags) == 16:
        if _read(tags, _PLANES, 1) == 2 and _read(tags, _COMPRESSION, 1) == 1:
            raise ValueError(f'16 bits per sample in separate planes, which Pillow misreads; {_REMEDY}')
        colours = zip(image.getbands(), np.atleast_2d(image.getextrema()), strict=True)
        _refuse_narrow(max(high for band, (_, high) in colours if band not in 'Aa') << 8 | 255)
    if image.mode == 'P':
        image.info.pop('transparency', None)  # it changes no colour, but Pillow would warn of it
    return np.array(image if image.mode == 'RGB' else image.convert('RGB'))  # convert would copy


def _read(tags: Mapping[int, Any], tag: int, default: Any) -> Any:
    """Returns the value of a TIFF tag, the first if it has several."""
    value = tags.get(tag, default)
    return value[0] if isinstance(value, tuple) and value else value


def _sample_bits(image: Image.Image, data: bytes | bytearray, tags: Mapping[int, Any]) -> int:
    """Returns the bits per sample of a PNG or TIFF; 8 for other formats, whose colours Pillow scales."""
    return data[24] if image.format == 'PNG' else _read(tags, _BITS, 8)


def _scale(image: Image.Image, data: bytes | bytearray, tags: Mapping[int, Any]) -> np.ndarray:
    """Scales a gray image to (H, W) uint8."""
    values = np.asarray(image)
    if image.mode == 'L':
        values = values.view(np.int8)
    elif _read(tags, _BITS, 0) == 32 and _read(tags, _FORMAT, _UNSIGNED) == _UNSIGNED:
        values = values.view(np.uint32)
    low, high = _find_range(image, data, tags, values)
    if not low <= values.min() <= values.max() <= high:
        raise ValueError(
            f'samples from {values.min():g} to {values.max():g}, outside the declared range from {low:g} to {high:g}; '
            f'{_REMEDY}')
    out, rows = np.empty(values.shape, np.uint8), max(1, _BLOCK // values.shape[1])
    for i in range(0, len(values), rows):
        block = values[i:i + rows]
        out[i:i + rows] = block >> 8 if (low, high) == (0, 65535) else (block - float(low)) * (255 / (high - low)) + 0.5
    return 255 - out if tags and _read(tags, _PHOTOMETRIC, 0) == 0 else out


def _find_range(
    image: Image.Image, data: bytes | bytearray, tags: Mapping[int, Any], values: np.ndarray,
) -> tuple[float, float]:
    if image.format in ('PPM', 'JPEG2000') and image.mode[0] == 'I':  # Pillow scales their samples to 16 bits
        return 0, 65535
    bits, kind = _read(tags, _BITS, 16), values.dtype.kind
    if image.format == 'TIFF' and image.mode != 'L' and kind != 'u' and _is_misread(tags, data):
        raise ValueError(f'a compressed big-endian TIFF, whose samples Pillow misreads; {_REMEDY}')
    high = next((_read(tags, tag, 0) for tag in _MAXIMA if tag in tags), None)
    if high is not None:
        low = next((_read(tags, tag, 0) for tag in _MINIMA if tag in tags), 0)
        if not low < high < float('inf'):
            raise ValueError(f'its declared range, {low} to {high}, is invalid; {_REMEDY}')
        return low, high
    if not image.mode.startswith('I;16') and image.format != 'PNG':  # older versions of Pillow read such a PNG as I
        what = {'f': 'floating-point', 'i': 'signed', 'u': 'unsigned'}[kind]
        raise ValueError(
            f'{values.dtype.itemsize * 8 if kind != "i" or not tags else bits}-bit {what} samples without a declared '
            f'range; {_REMEDY}, or declare it (in a TIFF: SMinSampleValue, SMaxSampleValue)')
    if image.format == 'PNG' and (significant := _read_significant_bits(data)):
        # Samples that were scaled up, as they should be, are multiples of 2^(16 - b), rounded.
        scaled = values.max() >= 1 << significant or not (values % (1 << 16 - significant) > 1).any()
        return 0, (1 << 16 if scaled else 1 << significant) - 1
    if bits == 16:
        _refuse_narrow(int(values.max()))
    return 0, (1 << bits) - 1


def _refuse_narrow(largest: int) -> None:
    """Raises ValueError if the largest of an image's 16-bit samples leaves it black or nearly so."""
    if 0 < largest < 1 << NARROW:
        raise ValueError(
            f'16 bits per sample, but none above {largest}: nearly black if divided by 65535, and no other range is '
            f'declared; {_REMEDY}')


def _is_misread(tags: Mapping[int, Any], data: bytes | bytearray) -> bool:
    """Whether libtiff swaps bytes that Pillow swaps again, as in its modes I and F."""
    return _read(tags, _COMPRESSION, 1) != 1 and data[:2] == b'MM'


def _read_significant_bits(data: bytes | bytearray) -> int:
    """Returns the bits of the samples that a gray PNG declares in its sBIT chunk, 0 without one."""
    at = 8
    while at + 9 <= len(data):
        size, kind = struct.unpack_from('>I4s', data, at)
        if kind == b'sBIT':
            return data[at + 8] if data[at + 8] <= 16 else 0
        if kind == b'IDAT':
            break
        at += size + 12
    return 0
