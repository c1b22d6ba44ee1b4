"""Samples of more than 8 bits are scaled by the range that the file declares; without one, the image is refused."""
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from simsiam_models.data import UnreadableError
from simsiam_models.data.readers.decode import decode

RAMP = np.linspace(0, 1, 60).reshape(6, 10)
MIN, MAX, SMIN, SMAX = 280, 281, 340, 341  # tags of TIFF
SHORT, LONG, SSHORT, SLONG, FLOAT = 3, 4, 8, 9, 11  # types of TIFF's tags
CODES = {SHORT: 'H', LONG: 'I', SSHORT: 'h', SLONG: 'i', FLOAT: 'f'}


def tiff(pixels: np.ndarray, order: str = '<', *more: tuple, photometric: int = 1, compress: bool = False,
         planes: bool = False, bits: int | None = None) -> bytes:
    """A TIFF of (H, W) or (H, W, C), by hand; `more`: tags as (tag, type, values)."""
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    whole = pixels.transpose(2, 0, 1) if planes else pixels[None]
    strips = [part.astype(part.dtype.newbyteorder(order)).tobytes() for part in whole]
    strips = [zlib.compress(strip) if compress else strip for strip in strips]
    starts = [8 + sum(map(len, strips[:i])) for i in range(len(strips))]
    kind, bits = {'u': 1, 'i': 2, 'f': 3}[pixels.dtype.kind], bits or 8 * pixels.dtype.itemsize
    width = pixels.shape[1] * 8 * pixels.dtype.itemsize // bits if channels == 1 else pixels.shape[1]
    tags = sorted([
        (256, LONG, [width]), (257, LONG, [len(pixels)]), (258, SHORT, [bits] * channels),
        (259, SHORT, [8 if compress else 1]), (262, SHORT, [photometric]), (273, LONG, starts),
        (277, SHORT, [channels]), (278, LONG, [len(pixels)]), (279, LONG, list(map(len, strips))),
        (284, SHORT, [2 if planes else 1]), (339, SHORT, [kind] * channels), *more])
    at = 8 + sum(map(len, strips))
    at += at % 2
    entries, tail = struct.pack(order + 'H', len(tags)), b''
    for tag, type_, values in tags:
        value = struct.pack(f'{order}{len(values)}{CODES[type_]}', *values)
        if len(value) > 4:
            place, tail = at + 6 + 12 * len(tags) + len(tail), tail + value + bytes(len(value) % 2)
            value = struct.pack(order + 'I', place)
        entries += struct.pack(order + 'HHI', tag, type_, len(values)) + value.ljust(4, b'\0')
    head = struct.pack(order + '2sHI', b'II' if order == '<' else b'MM', 42, at)
    return (head + b''.join(strips)).ljust(at, b'\0') + entries + bytes(4) + tail


def png(pixels: np.ndarray, significant: int | None = None) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, 'PNG')
    data = out.getvalue()
    if significant is None:
        return data
    body = b'sBIT' + bytes([significant])
    return data[:33] + struct.pack('>I', 1) + body + struct.pack('>I', zlib.crc32(body)) + data[33:]


def png_rgb16(pixels: np.ndarray) -> bytes:
    """A PNG of (H, W, C) uint16, by hand: PIL writes none."""
    height, width, channels = pixels.shape

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in pixels)
    head = struct.pack('>2I5B', width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


def pgm(top: int, kind: str = 'P5') -> bytes:
    values = np.round(RAMP * top).astype(int)
    if kind == 'P6':
        values = np.repeat(values[..., None], 3, 2)
    head = f'{kind}\n# made by hand\n10 6\n{top}\n'.encode()
    return head + (' '.join(map(str, values.ravel())).encode() if kind == 'P2' else
                   values.astype('>u2' if top > 255 else 'u1').tobytes())


def assert_ramp(data: bytes, name: str = 'x', white_is_zero: bool = False) -> None:
    got = decode(data, name)
    assert got.shape == (6, 10, 3) and got.dtype == np.uint8 and (got == got[..., :1]).all()
    want = 1 - RAMP if white_is_zero else RAMP
    assert np.abs(got[..., 0] - 255 * want).max() <= 1


# A declared range


@pytest.mark.parametrize('kind', ['P5', 'P2', 'P6'])
@pytest.mark.parametrize('top', [15, 255, 1000, 1023, 4095, 65535])
def test_a_pgm_or_ppm_is_scaled_by_its_maxval(kind, top):
    got = decode(pgm(top, kind), 'x')
    assert np.abs(got[..., 0] - 255 * np.round(RAMP * top) / top).max() <= 1


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('compress', [False, True])
@pytest.mark.parametrize('top', [65535, 4095, 1000])
def test_a_16_bit_tiff_is_scaled_by_its_declared_maximum_or_else_by_65535(order, compress, top):
    pixels = np.round(RAMP * top).astype(np.uint16)
    for tag in (MAX, SMAX):
        assert_ramp(tiff(pixels, order, (tag, SHORT, [top]), compress=compress))
    if top == 65535:
        assert_ramp(tiff(pixels, order, compress=compress))


def test_the_whole_range_of_16_bits_keeps_the_high_bytes():
    # Numbers of earlier releases depend on these pixels.
    pixels = np.arange(0, 65536, 16, np.uint16).reshape(64, 64)
    for data in (png(pixels), tiff(pixels), tiff(pixels, '>')):
        assert np.array_equal(decode(data, 'x')[..., 0], pixels >> 8)


def test_a_12_bit_tiff_is_scaled_by_its_bits():
    values = np.round(RAMP * 4095).astype(int)
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    assert_ramp(tiff(packed.astype(np.uint8).reshape(6, 15), bits=12))


@pytest.mark.parametrize('pixels, tags', [
    ((RAMP * 10**6).astype(np.int32), [(SMAX, SLONG, [10**6])]),
    ((RAMP * 3000 - 1000).astype(np.int32), [(SMIN, SLONG, [-1000]), (SMAX, SLONG, [2000])]),
    ((RAMP * 4 * 10**9).astype(np.uint32), [(SMAX, LONG, [4 * 10**9])]),
    ((RAMP * 3000 - 1000).astype(np.int16), [(SMIN, SSHORT, [-1000]), (SMAX, SSHORT, [2000])]),
    (RAMP.astype(np.float32), [(SMAX, FLOAT, [1.0])]),
    ((RAMP * 2 - 1).astype(np.float32), [(SMIN, FLOAT, [-1.0]), (SMAX, FLOAT, [1.0])]),
    ((RAMP * 255).astype(np.float32), [(MIN, SHORT, [0]), (MAX, SHORT, [255])]),
], ids=['int32', 'int32 below 0', 'uint32', 'int16', 'float 0..1', 'float -1..1', 'float 0..255'])
def test_signed_and_32_bit_tiffs_are_scaled_by_their_declared_range(pixels, tags):
    assert_ramp(tiff(pixels, '<', *tags))
    if pixels.dtype != np.uint32:  # PIL knows no big-endian one
        assert_ramp(tiff(pixels, '>', *tags))


@pytest.mark.parametrize('pixels', [
    np.round(RAMP * 255).astype(np.uint8), np.round(RAMP * 65535).astype(np.uint16), RAMP.astype(np.float32)],
    ids=['8', '16', 'float'])
@pytest.mark.parametrize('compress', [False, True])
def test_black_is_white_in_a_tiff_that_says_white_is_zero(pixels, compress):
    more = [(SMAX, FLOAT, [1.0])] if pixels.dtype == np.float32 else []
    assert_ramp(tiff(pixels, '<', *more, photometric=0, compress=compress), white_is_zero=True)


def test_one_bit_images_are_black_and_white():
    bits = RAMP > 0.5
    packed = np.packbits(bits, 1)
    for photometric in (0, 1):
        data = tiff(packed, bits=1, photometric=photometric)
        got = decode(data, 'x')[:, :10, 0]
        assert np.array_equal(got, np.where(bits == bool(photometric), 255, 0))


@pytest.mark.parametrize('significant', [10, 12, 14])
def test_a_png_with_significant_bits_is_scaled_by_them_only_if_it_was_not_scaled_before(significant):
    top = (1 << significant) - 1
    values = np.round(RAMP * top).astype(int)
    assert_ramp(png(values.astype(np.uint16), significant))
    assert_ramp(png(np.round(values * 65535 / top).astype(np.uint16), significant))
    dark = values // 20
    for scaled in (dark << 16 - significant, np.round(dark * 65535 / top).astype(int)):
        assert np.array_equal(decode(png(scaled.astype(np.uint16), significant), 'x')[..., 0], scaled >> 8)


# No declared range


@pytest.mark.parametrize('dtype', [np.int8, np.int16, np.int32, np.uint32, np.float32])
@pytest.mark.parametrize('top', [1, 100])
def test_a_range_that_is_not_declared_is_not_guessed(dtype, top):
    with pytest.raises(UnreadableError, match='x.tif: .* without a declared range; convert the images to 8 bits'):
        decode(tiff((RAMP * top).astype(dtype)), 'x.tif')


def test_floats_of_other_formats_are_refused():
    with pytest.raises(UnreadableError, match='floating-point samples without a declared range'):
        decode(b'Pf\n10 6\n-1.0\n' + RAMP.astype('<f4').tobytes(), 'x.pgm')
    out = io.BytesIO()
    Image.fromarray(RAMP.astype(np.float32)).save(out, 'TIFF')
    with pytest.raises(UnreadableError, match='floating-point samples without a declared range'):
        decode(out.getvalue(), 'x.tif')


@pytest.mark.parametrize('top', [1, 255, 1023, 4095])
def test_16_bits_of_which_few_are_used_are_refused(top):
    gray = np.round(RAMP * top).astype(np.uint16)
    colour = np.repeat(gray[..., None], 3, 2)
    alpha = np.concatenate([colour, np.full((6, 10, 1), 65535, np.uint16)], 2)
    files = [png(gray), tiff(gray), tiff(gray, '>', compress=True), png_rgb16(colour), png_rgb16(alpha),
             png_rgb16(alpha[..., 2:]), tiff(colour, photometric=2), tiff(colour, '>', photometric=2, compress=True)]
    for data in files:
        with pytest.raises(UnreadableError, match='16 bits per sample, but none above .* convert the images to 8 bits'):
            decode(data, 'x')


def test_16_bit_colours_keep_the_high_bytes():
    colour = np.random.default_rng(0).integers(0, 65536, (6, 10, 3), np.uint16)
    alpha = np.concatenate([colour, np.zeros((6, 10, 1), np.uint16)], 2)
    files = [png_rgb16(colour), png_rgb16(alpha)] + [
        tiff(colour, order, photometric=2, compress=compress) for order in '<>' for compress in (False, True)]
    for data in files:
        assert np.array_equal(decode(data, 'x'), colour >> 8)


def test_black_is_black_in_any_range():
    assert not decode(png(np.zeros((6, 10), np.uint16)), 'x').any()


@pytest.mark.parametrize('wrong', [1.01, -0.01, np.nan, np.inf])
def test_samples_outside_the_declared_range_are_refused(wrong):
    values = RAMP.astype(np.float32)
    values[2, 3] = wrong
    with pytest.raises(UnreadableError, match='outside the declared range from 0 to 1'):
        decode(tiff(values, '<', (SMAX, FLOAT, [1.0])), 'x')


@pytest.mark.parametrize('top', [0.0, -1.0, float('inf'), float('nan')])
def test_a_declared_range_that_is_none_is_refused(top):
    with pytest.raises(UnreadableError, match='its declared range, 0 to .*, is invalid'):
        decode(tiff(RAMP.astype(np.float32), '<', (SMAX, FLOAT, [top])), 'x')


# What PIL misreads


def test_16_bit_planes_are_read_right_or_refused():
    colour = np.random.default_rng(0).integers(0, 65536, (6, 10, 3), np.uint16)
    assert np.array_equal(decode(tiff(colour, photometric=2, planes=True, compress=True), 'x'), colour >> 8)
    with pytest.raises(UnreadableError, match='16 bits per sample in separate planes'):
        decode(tiff(colour, photometric=2, planes=True), 'x')


@pytest.mark.parametrize('dtype', [np.int16, np.int32, np.float32])
def test_bytes_in_the_wrong_order_are_refused(dtype):
    data = tiff((RAMP * 100).astype(dtype), '>', (SMIN, SHORT, [0]), (SMAX, SHORT, [100]), compress=True)
    with pytest.raises(UnreadableError, match='compressed big-endian TIFF'):
        decode(data, 'x')


def test_a_tiff_that_pil_does_not_know_is_called_one():
    with pytest.raises(UnreadableError, match='a kind of TIFF that Pillow does not know; convert it to 8 bits'):
        decode(tiff(RAMP), 'x')  # float64


# Other modes


def test_colours_behind_transparency_and_the_first_frame_are_read():
    colour = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)
    for mode in ('RGBA', 'LA'):
        image = Image.fromarray(colour).convert(mode)
        image.putalpha(0)
        out = io.BytesIO()
        image.save(out, 'PNG')
        want = Image.fromarray(colour).convert(mode[:-1]).convert('RGB')
        assert np.array_equal(decode(out.getvalue(), 'x'), np.asarray(want))
    for format_ in ('GIF', 'TIFF'):
        frames, out = [Image.fromarray(colour).quantize(32), Image.new('P', (10, 6))], io.BytesIO()
        frames[0].save(out, format_, save_all=True, append_images=frames[1:])
        assert np.array_equal(decode(out.getvalue(), 'x'), np.asarray(frames[0].convert('RGB')))
