"""Finds images that are both in the training part and in the test part, byte for byte.

Sizes are compared first: they are in the listing of a tar, and cost one `stat` for each file. Of the images whose size
occurs in both parts, 64 bytes from the middle are read, and the whole image only if these are equal, too.
Other encodings of the same picture are not found.
"""
import functools
import hashlib
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np

from ..data import UnreadableError
from ..data.readers.images import Images, name_of, stored_bytes, stored_sizes
from ..data.threads import split_range
from ..runtime.messages import printable

MAX_READ = 100_000  # images that are read in part; where more have a size of both parts, some are not compared
MIDDLE = 64  # bytes
THREADS, SHARE = 8, 64  # SHARE: images that a thread takes at a time


def report_shared(train: Images, test: Images, say: Callable[[str], Any]) -> dict[str, Any]:
    """Prints how many test images are also training images, and the first; returns the same for a record."""
    found = find_shared(train, test)
    compared, n = found['compared'], len(test)
    part = '' if compared == n else f' (compared: {compared:,} of {n:,})'
    if not compared:
        say('whether test images are also training images is unknown: their bytes were not compared')
    elif found['shared']:
        other = f', {found["other_label"]:,} of them with another label' if found['other_label'] else ''
        say(f'{found["shared"]:,} of {n:,} test images are also training images, byte for byte{other}{part}, so '
            f'the result is better than on new images; the first: {" is ".join(map(printable, found["first"]))}')
    elif part:
        say(f'no test image is also a training image, byte for byte{part}')
    return found


def find_shared(train: Images, test: Images) -> dict[str, Any]:
    """Counts the test images that are also training images; `compared`: of how many that is known.

    `first` names the first one and the training image.
    """
    found: dict[str, Any] = {'compared': 0, 'shared': 0, 'other_label': 0, 'first': []}
    chosen = _choose_rows(train, test)
    if chosen is None:
        return found
    rows, sizes, compared = chosen

    with ThreadPoolExecutor(THREADS, 'simsiam-compare') as threads:
        for whole in (False, True):
            keys = list[list[tuple[int, bytes] | None]]()
            for images, side, size in zip((train, test), rows, sizes, strict=True):
                parts = [side[part] for part in split_range(len(side), SHARE)]
                look = functools.partial(_look, images, size, whole)
                keys.append(list(itertools.chain.from_iterable(threads.map(look, parts))))
            both = ({*keys[0]} & {*keys[1]}) - {None}
            rows = [side[np.array([key in both for key in part], bool)]
                    for side, part in zip(rows, keys, strict=True)]
    keys = [[key for key in side if key in both] for side in keys]
    first = dict(zip(reversed(keys[0]), reversed(rows[0].tolist()), strict=True))
    pairs = [(first[key], row) for key, row in zip(keys[1], rows[1].tolist(), strict=True)]
    found |= {'compared': compared, 'shared': len(pairs)}
    if pairs:
        found['first'] = [name_of(test, pairs[0][1]), name_of(train, pairs[0][0])]
    if pairs and train.labels is not None and test.labels is not None:
        found['other_label'] = sum(int(train.labels[a]) != int(test.labels[b]) for a, b in pairs)
    return found


def _look(images: Images, sizes: np.ndarray, whole: bool, rows: np.ndarray) -> list[tuple[int, bytes] | None]:
    """Returns the size of each image, and some of its bytes or the hash of all; None if it cannot be read."""
    found = list[tuple[int, bytes] | None]()
    for row, size in zip(rows.tolist(), sizes[rows].tolist(), strict=True):
        data = b''
        with suppress(UnreadableError):
            data = (stored_bytes(images, row) if whole else stored_bytes(images, row, size // 2, MIDDLE)) or b''
        found.append((size, hashlib.blake2b(data, digest_size=16).digest() if whole else bytes(data)) if data else None)
    return found


def _choose_rows(train: Images, test: Images) -> tuple[list[np.ndarray], list[np.ndarray], int] | None:
    """Returns, for both parts, the rows to read and all sizes; and how many test images are compared with that."""
    rows = [np.arange(len(images)) for images in (train, test)]
    given = [stored_sizes(images, side) for images, side in zip((train, test), rows, strict=True)]
    sizes = [x for x in given if x is not None]
    if len(sizes) < len(given):
        if len(train) + len(test) > MAX_READ or not all(map(_is_at_hand, (train, test))):
            return None
        return rows, [np.zeros(len(side), np.int64) for side in rows], len(test)
    values, costs = np.unique(np.concatenate(sizes), return_counts=True)
    values, costs = (x[(values > 0) & np.isin(values, sizes[0]) & np.isin(values, sizes[1])] for x in (values, costs))
    order = np.argsort(costs, kind='stable')  # rare sizes first: they decide most test images per image read
    read, skipped = np.split(values[order], [np.searchsorted(np.cumsum(costs[order]), MAX_READ, 'right')])
    rows = [np.flatnonzero(np.isin(x, read)) for x in sizes]
    return rows, sizes, len(test) - int(np.isin(sizes[1], skipped).sum())


def _is_at_hand(images: Images) -> bool:
    """Returns whether the source gives the bytes of its images."""
    try:
        return stored_bytes(images, 0) is not None
    except UnreadableError:
        return True
