"""Surveys a data set: reads its images once, and counts what matters for training."""
import functools
import hashlib
import io
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..data import Stream, UnreadableError
from ..data.philox import permutation
from ..data.readers.decode import decode
from ..data.readers.images import Images
from ..data.threads import run_in_order

SHARE = 8  # images that a thread takes at a time
CONSTANT = 0.01  # standard deviation of the pixels, of 0..1: about 2.5 of 255 levels
ELONGATED = 3.0  # long side / short side
MAX_NAMED = 10  # unreadable files and duplicates that are named
ORIENTATION = 0x0112  # the EXIF tag
HAS_ORIENTATION = ('JPEG', 'MPO', 'TIFF', 'WEBP')  # formats with the tag in the header, so without decoding

UNREAD, UNREADABLE, READ = 0, 1, 2
ROW = np.dtype([
    ('index', 'i8'), ('state', 'u1'), ('width', 'i4'), ('height', 'i4'), ('bytes', 'i8'), ('digest', 'u8'),
    ('turned', '?'), ('gray', '?'), ('mean', 'f8', 3), ('square', 'f8', 3)])  # of x and x^2, x in 0..1
_LEVELS = np.arange(256) / 255


@dataclass(frozen=True)
class Survey:
    """The counts. Shares refer to the images that were read and could be decoded."""

    name: str
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
    short_sides: np.ndarray

    @property
    def complete(self) -> bool:
        return self.read == self.images

    @property
    def decoded(self) -> int:
        return self.read - self.unreadable

    def smaller_than(self, size: int) -> float:
        """The share of images whose short side is below `size`."""
        return float(np.mean(self.short_sides < size))

    def record(self, size: int) -> dict[str, Any]:
        """The survey for JSON; `size`: of a view, in pixels."""
        record = {**asdict(self), 'complete': self.complete, 'decoded': self.decoded}
        del record['short_sides']
        return {**record, 'view_size': size, 'smaller_than_view': self.smaller_than(size)}


def survey(images: Images | Stream, workers: int, seconds: float, sample: int | None = None) -> Survey:
    """Reads images in the order of a fixed permutation: `sample` of them, or as many as the seconds allow.

    A stream has its first images read.

    Raises:
        ValueError: no image could be decoded.
    """
    began = time.perf_counter()
    wanted = len(images) if sample is None else min(sample, len(images))
    reading = _Reading(images, began + seconds if sample is None else None)
    rows = np.concatenate(list(reading.rows(wanted, max(1, workers))))
    rows = rows[rows['state'] != UNREAD]
    good = rows[rows['state'] == READ]
    if not len(good):
        first = _clean(reading.bad[min(reading.bad)]) if reading.bad else 'the stream is empty'
        raise ValueError(f'{images.name}: none of {len(rows)} images can be read; the first: {first}')
    return _summarize(images, rows, good, reading.bad, time.perf_counter() - began)


class _Reading:
    """Reads images in threads; from `end` on they stay UNREAD, except for the very first."""

    def __init__(self, images: Images | Stream, end: float | None) -> None:
        self.images, self.end, self.bad = images, end, {}  # bad: index -> why it cannot be decoded

    def rows(self, wanted: int, workers: int) -> Iterator[np.ndarray]:
        bar = tqdm(total=wanted, unit='image', desc='reading', leave=False, disable=not sys.stderr.isatty())
        with bar, ThreadPoolExecutor(workers, 'simsiam-survey') as threads:
            for rows in run_in_order(threads, self._jobs(wanted, SHARE * workers)):
                bar.update(len(rows))
                yield rows

    def _jobs(self, wanted: int, share: int) -> Iterator[tuple[np.ndarray, list[Callable[[], None]]]]:
        stream = isinstance(self.images, Stream)
        order = np.arange(wanted) if stream else permutation(0, 0, len(self.images))[:wanted]
        samples = self.images.samples(0, 0, 0) if stream else iter(order.tolist())
        for first in range(0, wanted, share):
            if first and self._is_late():
                return
            some = list(itertools.islice(samples, min(share, wanted - first)))
            rows = np.zeros(len(some), ROW)
            rows['index'] = order[first:first + len(some)]
            yield rows, [
                functools.partial(self._fill, rows[i:i + SHARE], some[i:i + SHARE], first + i == 0)
                for i in range(0, len(some), SHARE)]

    def _is_late(self) -> bool:
        return self.end is not None and time.perf_counter() > self.end

    def _fill(self, rows: np.ndarray, samples: list[Any], first: bool) -> None:
        for i, sample in enumerate(samples):
            if self._is_late() and not (first and i == 0):
                return
            index = int(rows[i]['index'])
            try:
                pixels, data = self._fetch(sample, index)
            except UnreadableError as e:
                self.bad[index], rows[i]['state'] = str(e), UNREADABLE
                continue
            rows[i] = (
                index, READ, pixels.shape[1], pixels.shape[0], *_describe_file(pixels, data), *_measure_colours(pixels))

    def _fetch(self, sample: int | bytes | np.ndarray, index: int) -> tuple[np.ndarray, bytes | None]:
        """An index, or a sample of a stream -> pixels, and the bytes of the file if there is one."""
        if isinstance(sample, np.ndarray):
            return sample, None
        if isinstance(sample, int):
            pixels = self.images.read(sample)
            try:  # read a moment ago, so still in memory
                return pixels, self.images.path(sample).read_bytes() if _has_files(self.images) else None
            except OSError:
                return pixels, None
        return decode(sample, f'{self.images.name}: image {index}'), sample


def _describe_file(pixels: np.ndarray, data: bytes | None) -> tuple[int, int, bool]:
    """The size, a hash of the bytes, and whether EXIF turns the image; of the pixels if there is no file."""
    turned = False
    if data is not None:
        try:
            with Image.open(io.BytesIO(data)) as header:
                turned = header.format in HAS_ORIENTATION and header.getexif().get(ORIENTATION, 1) not in (0, 1)
        except Exception:  # PIL raises anything on a broken EXIF block; the image itself was decoded
            pass
    content = np.ascontiguousarray(pixels) if data is None else data
    digest = hashlib.blake2b(content, digest_size=8, key=repr(pixels.shape).encode())
    return memoryview(content).nbytes, int.from_bytes(digest.digest(), 'little'), turned


def _has_files(images: Images | Stream) -> bool:
    return hasattr(images, 'path')


def _measure_colours(pixels: np.ndarray) -> tuple[bool, np.ndarray, np.ndarray]:
    """Whether the image is gray, and the exact means of x and x^2 per channel, from counts of 256 levels."""
    counts = np.stack([np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(3)])  # (3, 256)
    r, g, b = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    gray = (counts == counts[0]).all() and (r == g).all() and (g == b).all()
    n = r.size
    return bool(gray), counts @ _LEVELS / n, counts @ _LEVELS**2 / n


def _summarize(
    images: Images | Stream, rows: np.ndarray, good: np.ndarray, bad: dict[int, str], seconds: float,
) -> Survey:
    short, long = np.minimum(good['width'], good['height']), np.maximum(good['width'], good['height'])
    mean, square = good['mean'].mean(0), good['square'].mean(0)
    deviation = np.sqrt(np.maximum(good['square'] - good['mean'] ** 2, 0))
    classes, sizes = None, None
    if images.labels is not None:
        sizes = np.bincount(images.labels, minlength=len(images.classes))
        classes = [(images.classes[i], int(sizes[i])) for i in (int(sizes.argmin()), int(sizes.argmax()))]
    repeats = _find_duplicates(good)
    return Survey(
        name=images.name, images=len(images), read=len(rows), seconds=seconds,
        files=_has_files(images) or isinstance(images, Stream), stream=isinstance(images, Stream),
        classes=None if classes is None else len(images.classes),
        smallest_class=classes and classes[0], largest_class=classes and classes[1],
        unreadable=len(bad), unreadable_first=[_clean(bad[i]) for i in sorted(bad)[:MAX_NAMED]],
        duplicates=len(repeats),
        duplicates_first=[(_name(images, a), _name(images, b)) for a, b in repeats[:MAX_NAMED]],
        width=_range(good['width']), height=_range(good['height']), short_side=_range(short),
        bytes=int(good['bytes'].sum()), grayscale=float(good['gray'].mean()),
        constant=int((deviation.max(1) < CONSTANT).sum()), elongated=int((long > ELONGATED * short).sum()),
        turned=int(good['turned'].sum()) if _has_files(images) or isinstance(images, Stream) else None,
        mean=tuple(mean.tolist()), std=tuple(np.sqrt(np.maximum(square - mean**2, 0)).tolist()), short_sides=short)


def _find_duplicates(good: np.ndarray) -> list[tuple[int, int]]:
    """(image, the first image with the same bytes) for each image that repeats one, in the order of the data."""
    order = np.lexsort((good['index'], good['digest'], good['bytes']))
    g = good[order]
    same = (g['digest'][1:] == g['digest'][:-1]) & (g['bytes'][1:] == g['bytes'][:-1])
    first = np.maximum.accumulate(np.where(np.r_[True, ~same], np.arange(len(g)), 0))
    at = np.flatnonzero(np.r_[False, same])
    return sorted(zip(g['index'][at].tolist(), g['index'][first[at]].tolist(), strict=True))


def _clean(text: str) -> str:
    """Removes the name of the buffer, which PIL adds."""
    return re.sub(r' ?<_io\.BytesIO[^>]*>', '', text)


def _range(x: np.ndarray) -> tuple[int, int, int]:
    return int(x.min()), int(np.median(x)), int(x.max())


def _name(images: Images, index: int) -> str:
    if not _has_files(images):
        return f'image {index}'
    path = images.path(index)
    root = getattr(images, 'root', None)
    return str(path.relative_to(root) if root is not None and path.is_relative_to(root) else path)
