"""Surveys a data set: reads its images once, and counts what matters for training."""
import functools
import hashlib
import io
import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..data import Stream, UnreadableError
from ..data.philox import permutation
from ..data.readers.decode import decode
from ..data.readers.images import Images
from ..data.threads import run_in_order, split_range

SHARE = 8  # images that a thread takes at a time
CONSTANT = 0.01  # standard deviation of the pixels, of 0..1: about 2.5 of 255 levels
ELONGATED = 3.0  # long side / short side
BLOCK = 1 << 20  # pixels that are counted at a time
MAX_NAMED = 10  # unreadable files and duplicates that are named
ORIENTATION = 0x0112  # the EXIF tag
HAS_ORIENTATION = ('JPEG', 'MPO', 'TIFF', 'WEBP')  # formats with the tag in the header, so without decoding

ROW = np.dtype([
    ('index', 'i8'), ('width', 'i4'), ('height', 'i4'), ('bytes', 'i8'), ('digest', 'u8'), ('turned', '?'),
    ('gray', '?'), ('mean', 'f8', 3), ('square', 'f8', 3)])  # of x and x^2, x in 0..1
_LEVELS = np.arange(256) / 255


@dataclass(frozen=True)
class Survey:
    """The counts of a survey. Shares refer to the images that were read and could be decoded."""

    name: str
    notes: list[str]  # on what the reader left out
    images: int
    read: int  # decoded or not
    seconds: float
    files: bool  # False: the bytes are those of the pixels
    stream: bool
    classes: int | None
    smallest_class: tuple[str, int] | None
    largest_class: tuple[str, int] | None
    unreadable: int
    unreadable_first: list[str]
    duplicates: int  # images that repeat another one
    duplicates_first: list[tuple[str, str]]
    width: tuple[int, int, int]  # min, median, max
    height: tuple[int, int, int]
    short_side: tuple[int, int, int]
    bytes: int  # that were read
    grayscale: float
    constant: int
    elongated: int
    turned: int | None  # by EXIF; None without files
    mean: tuple[float, float, float]  # of pixels in 0..1; each image has the same weight
    std: tuple[float, float, float]
    complete: bool
    decoded: int
    short_sides: np.ndarray

    def smaller_than(self, size: int) -> float:
        """Returns the share of images whose short side is below `size`."""
        return float(np.mean(self.short_sides < size))

    def record(self, size: int) -> dict[str, Any]:
        """Returns the survey for JSON; `size`: of a view, in pixels."""
        record = {k: v for k, v in vars(self).items() if k != 'short_sides'}
        return {**record, 'view_size': size, 'smaller_than_view': self.smaller_than(size)}


def survey(images: Images | Stream, workers: int, seconds: float, sample: int | None = None) -> Survey:
    """Reads `sample` images, or as many as the seconds allow, in the order of a fixed permutation (or of the stream).

    Raises ValueError if no image could be decoded.
    """
    began = time.perf_counter()
    wanted = len(images) if sample is None else min(sample, len(images))
    reading = _Reading(images, math.inf if sample is not None else began + seconds)
    good = np.fromiter(filter(None, reading.rows(wanted, max(1, workers))), ROW)
    # The reasons, without the name of the buffer that PIL adds.
    bad = {i: re.sub(r' ?<_io\.BytesIO[^>]*>', '', reading.bad[i]) for i in sorted(reading.bad)}
    if not len(good):
        first = next(iter(bad.values()), 'the stream is empty')
        raise ValueError(f'{images.name}: none of {len(bad)} images can be read; the first: {first}')
    return _summarize(images, good, bad, time.perf_counter() - began)


class _Reading:
    """Reads images in threads until `end`, but at least the very first; `bad`: index -> why it cannot be decoded."""

    def __init__(self, images: Images | Stream, end: float) -> None:
        self.images, self.end = images, end
        self.bad: dict[int, str] = {}

    def rows(self, wanted: int, workers: int) -> Iterator[tuple[Any, ...] | None]:
        """Yields the fields of ROW for each image; None for an image that was not read or is unreadable."""
        bar = tqdm(total=wanted, unit='image', desc='reading', leave=False, disable=not sys.stderr.isatty())
        with bar, ThreadPoolExecutor(workers, 'simsiam-survey') as threads:
            for rows in run_in_order(threads, self._jobs(wanted, SHARE * workers)):
                bar.update(len(rows))
                yield from rows

    def _jobs(self, wanted: int, share: int) -> Iterator[tuple[list[Any], list[Callable[[], None]]]]:
        samples: Iterator[tuple[int, Any]]
        if isinstance(self.images, Stream):
            samples = enumerate(itertools.islice(self.images.samples(0, 0, 0), wanted))
        else:
            samples = ((i, i) for i in permutation(0, 0, len(self.images))[:wanted].tolist())
        first = True
        while (first or time.perf_counter() <= self.end) and (some := list(itertools.islice(samples, share))):
            rows: list[Any] = [None] * len(some)
            yield rows, [
                functools.partial(self._fill, rows, some, part, first and part.start == 0)
                for part in split_range(len(some), SHARE)]
            first = False

    def _fill(self, rows: list[Any], samples: list[tuple[int, Any]], part: slice, first: bool) -> None:
        for place in range(part.start, part.stop):
            if time.perf_counter() > self.end and not (first and place == 0):
                return
            index, sample = samples[place]
            try:
                pixels, data = self._fetch(sample, index)
            except UnreadableError as e:
                self.bad[index] = str(e)
                continue
            height, width, _ = pixels.shape
            rows[place] = index, width, height, *_describe_file(pixels, data), *_measure_colours(pixels)

    def _fetch(self, sample: int | bytes | np.ndarray, index: int) -> tuple[np.ndarray, bytes | None]:
        """Reads an index, or a sample of a stream; returns the pixels, and the bytes of the file if there is one."""
        if isinstance(sample, np.ndarray):
            return sample, None
        if isinstance(sample, int):
            pixels, path = cast(Images, self.images).read(sample), getattr(self.images, 'path', None)
            try:  # read a moment ago, so still in memory
                return pixels, None if path is None else path(sample).read_bytes()
            except OSError:
                return pixels, None
        return decode(sample, f'{self.images.name}: image {index}'), sample


def _describe_file(pixels: np.ndarray, data: bytes | None) -> tuple[int, int, bool]:
    """Returns the size, a hash of the bytes (of the pixels if there is no file), and whether EXIF turns the image."""
    content, turned = memoryview(np.ascontiguousarray(pixels).data if data is None else data), False
    if data is not None:
        # PIL raises anything on a broken EXIF block; the image itself was decoded.
        with suppress(Exception), Image.open(io.BytesIO(data)) as header:
            turned = header.format in HAS_ORIENTATION and header.getexif().get(ORIENTATION, 1) not in (0, 1)
    digest = hashlib.blake2b(content, digest_size=8, key=repr(pixels.shape).encode())
    return content.nbytes, int.from_bytes(digest.digest(), 'little'), turned


def _measure_colours(pixels: np.ndarray) -> tuple[bool, np.ndarray, np.ndarray]:
    """Returns whether the image is gray, and the exact means of x and x^2 per channel, from counts of 256 levels."""
    counts, gray, rows = np.zeros((3, 256), np.int64), True, max(1, BLOCK // pixels.shape[1])
    for i in range(0, len(pixels), rows):  # bincount takes 8 bytes for each pixel
        block = pixels[i:i + rows]
        counts += np.stack([np.bincount(block[..., c].ravel(), minlength=256) for c in range(3)])
        gray = gray and (block == block[..., :1]).all()
    n = counts[0].sum()
    return bool(gray), counts @ _LEVELS / n, counts @ _LEVELS**2 / n


def _summarize(images: Images | Stream, good: np.ndarray, bad: dict[int, str], seconds: float) -> Survey:
    short, long = np.minimum(good['width'], good['height']), np.maximum(good['width'], good['height'])
    mean, square = good['mean'].mean(0), good['square'].mean(0)
    deviation = np.sqrt(np.maximum(good['square'] - good['mean'] ** 2, 0))
    classes = smallest = largest = None
    if images.labels is not None:
        classes, sizes = len(images.classes), np.bincount(images.labels, minlength=len(images.classes))
        smallest, largest = ((images.classes[i], int(sizes[i])) for i in (sizes.argmin(), sizes.argmax()))
    repeats, stream = _find_duplicates(good), isinstance(images, Stream)
    files = stream or hasattr(images, 'path')
    return Survey(
        name=images.name, notes=list(getattr(images, 'notes', [])), images=len(images), read=len(good) + len(bad),
        seconds=seconds, files=files, stream=stream,
        classes=classes, smallest_class=smallest, largest_class=largest, unreadable=len(bad),
        unreadable_first=list(bad.values())[:MAX_NAMED], duplicates=len(repeats),
        duplicates_first=[(_name(images, a), _name(images, b)) for a, b in repeats[:MAX_NAMED]],
        width=_range(good['width']), height=_range(good['height']), short_side=_range(short),
        bytes=int(good['bytes'].sum()), grayscale=float(good['gray'].mean()),
        constant=int((deviation.max(1) < CONSTANT).sum()), elongated=int((long > ELONGATED * short).sum()),
        turned=int(good['turned'].sum()) if files else None,
        mean=tuple(mean.tolist()), std=tuple(np.sqrt(np.maximum(square - mean**2, 0)).tolist()),
        complete=len(good) + len(bad) == len(images), decoded=len(good), short_sides=short)


def _find_duplicates(good: np.ndarray) -> list[tuple[int, int]]:
    """Returns (image, first image with the same bytes) for each image that repeats one, in the order of the data."""
    g = good[np.lexsort((good['index'], good['digest'], good['bytes']))]
    same = (g['digest'][1:] == g['digest'][:-1]) & (g['bytes'][1:] == g['bytes'][:-1])
    first = np.maximum.accumulate(np.where(np.r_[True, ~same], np.arange(len(g)), 0))
    at = np.flatnonzero(np.r_[False, same])
    return sorted(zip(g['index'][at].tolist(), g['index'][first[at]].tolist(), strict=True))


def _range(x: np.ndarray) -> tuple[int, int, int]:
    return int(x.min()), int(np.median(x)), int(x.max())


def _name(images: Images | Stream, index: int) -> str:
    source: Any = images
    if not hasattr(source, 'path'):
        return f'image {index}'
    path = source.path(index)
    return str(path.relative_to(source.root) if path.is_relative_to(source.root) else path)
