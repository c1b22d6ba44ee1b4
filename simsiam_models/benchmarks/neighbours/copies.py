"""Finds copies of images: identical, recompressed, resized, in another format, mirrored.

Candidates are the nearest images by features and, because weak features lose copies, by small gray thumbnails, also of
mirrored images. A candidate counts only if its pixels agree: both images are compared in colour at 64 x 64 px.
"""
import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch

from ...data.augment import resize
from ...data.evaluation import EvalImages, Transform
from ...data.readers.images import Images, stored_bytes
from ..search import find_neighbours
from .nearest import QUERIES

SIDE, NEAR = 16, 4  # pixels of a thumbnail; candidates by thumbnails, and as many by mirrored ones
LOOSE = 0.9  # correlation of two thumbnails below which the images are not compared any further
FINE = 64  # pixels at which two images are compared, or the short side of the smaller one
STRETCH = 4  # of the sides of an image: above, its long side counts; of the shapes of two: above, they are no copies
# Difference, in parts of the contrast, up to which an image is a copy. Measured on 341 photographs of clothes with five
# copies of each (same file, JPEG of quality 40, half size, PNG, mirrored): copies differ by up to 0.09, others by 0.49.
# A quarter of the size with quality 20 differs by more than this in 11 % of 300 of them.
LIMIT = 0.2
FLAT = 4.0  # gray levels: the least contrast that the difference is compared with
KEPT = 20_000  # images whose small versions are kept in memory (250 MB)


class Look(NamedTuple):
    """What is compared of an image."""

    small: np.ndarray  # (s, s, 3) uint8
    size: tuple[int, int]  # height, width
    pixels: bytes  # hash of the pixels
    file: bytes  # hash of the stored bytes; of the pixels if there are none
    bytes: int


class Copy(NamedTuple):
    """An image that is a copy of another one."""

    group: int
    row: int
    original: int
    kind: str
    difference: float  # in parts of the contrast; see `compare`


def look_at(images: Images, row: int) -> Look:
    """Reads an image; raises UnreadableError."""
    pixels, data = images.read(row), stored_bytes(images, row)
    short, long = sorted(pixels.shape[:2])
    side = min(FINE, long if long > STRETCH * short else short)
    hashed = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16)
    key = hashed.digest() + bytes(str(pixels.shape), 'ascii')
    file = key if data is None else hashlib.blake2b(data, digest_size=16).digest()
    return Look(_shrink(pixels, side), pixels.shape[:2], key, file, pixels.nbytes if data is None else len(data))


def _shrink(pixels: np.ndarray, side: int) -> np.ndarray:
    if pixels.shape[:2] == (side, side):
        return pixels
    small = np.empty((side, side, 3), np.uint8)
    resize(np.ascontiguousarray(pixels), side, side, 0, 0, small)
    return small


def compare(a: Look, b: Look) -> tuple[float, bool]:
    """Returns how far two images differ, and whether one is mirrored.

    The difference is the root mean square over pixels and channels, divided by the standard deviation of the pixels.
    """
    stretch = a.size[0] * b.size[1] / (a.size[1] * b.size[0])
    if max(stretch, 1 / stretch) > STRETCH:
        return math.inf, False
    side = min(len(a.small), len(b.small))
    x, y = (_shrink(look.small, side).astype(np.float32) for look in (a, b))
    contrast = max(FLAT, float(np.sqrt((x.var((0, 1)) + y.var((0, 1))).mean() / 2)))
    plain, mirrored = (float(np.sqrt(np.square(x - z).mean())) / contrast for z in (y, y[:, ::-1]))
    return min(plain, mirrored), mirrored < plain


def name_kind(a: Look, b: Look, mirrored: bool) -> str:
    """Returns how a copy differs from its original."""
    if a.file == b.file:
        return 'same file'
    if a.pixels == b.pixels:
        return 'same pixels'
    return 'mirrored' if mirrored else 'resized' if a.size != b.size else 'recompressed'


def find_copies(images: Images, found: np.ndarray, device: torch.device, workers: int) -> tuple[list[Copy], list[str]]:
    """Finds the copies among images whose nearest ones are `found` (N, k).

    Returns:
        The copies by group, and why images could not be read. Of a group, the image with the most pixels, then the most
        bytes, is the original, which is not in the list.
    """
    thumbnails, unreadable = make_thumbnails(images, workers)
    look = functools.lru_cache(KEPT)(functools.partial(look_at, images))
    pairs = list_candidates(thumbnails, found, device)
    if unreadable:
        pairs = pairs[~np.isin(pairs, list(unreadable)).any(1)]
    links = [(i, j) for i, j in pairs.tolist() if compare(look(i), look(j))[0] <= LIMIT]
    copies = []
    for number, group in enumerate(join(links), 1):
        looks = {row: look(row) for row in group}
        original = max(group, key=lambda row: (np.prod(looks[row].size), looks[row].bytes, -row))
        for row in group:
            if row != original:
                difference, mirrored = compare(looks[row], looks[original])
                kind = name_kind(looks[row], looks[original], mirrored)
                copies.append(Copy(number, row, original, kind, difference))
    return copies, list(unreadable.values())


def make_thumbnails(images: Images, workers: int) -> tuple[np.ndarray, dict[int, str]]:
    """Returns gray thumbnails (N, SIDE, SIDE) float32, and the images that cannot be read (row -> reason)."""
    batches = [np.arange(i, min(i + 256, len(images))) for i in range(0, len(images), 256)]
    loader = EvalImages(images, batches, Transform(SIDE, SIDE, 'squash'), workers)
    out = np.empty((len(images), SIDE, SIDE), np.float32)
    for rows, pixels in loader:
        out[rows] = pixels.numpy().mean(3)
    return out, loader.unreadable


def list_candidates(thumbnails: np.ndarray, found: np.ndarray, device: torch.device) -> np.ndarray:
    """Returns pairs (P, 2) of rows, each once and the lower row first, whose thumbnails correlate."""
    n = len(thumbnails)
    plain, mirrored = (
        (x - x.mean((1, 2), keepdims=True)).reshape(n, -1) for x in (thumbnails, thumbnails[:, :, ::-1]))
    k, sides = min(NEAR + 1, n), [found]
    for queries in (plain, mirrored):
        sides.append(np.concatenate([
            find_neighbours(plain, queries[i:i + QUERIES], k, device)[0] for i in range(0, n, QUERIES)]))
    ends = np.concatenate([side.ravel() for side in sides])
    starts = np.concatenate([np.repeat(np.arange(n), side.shape[1]) for side in sides])
    keys = np.unique(np.minimum(starts, ends) * n + np.maximum(starts, ends))
    pairs = np.stack([keys // n, keys % n], 1)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    alike = np.concatenate([_correlate(plain, mirrored, pairs[i:i + QUERIES]) >= LOOSE
                            for i in range(0, len(pairs), QUERIES)] or [np.zeros(0, bool)])
    return np.asarray(pairs[alike])


def _correlate(plain: np.ndarray, mirrored: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Returns the larger correlation (P,) of each pair, plain or mirrored; 1 for two images of one gray."""
    a, b = plain[pairs[:, 0]], pairs[:, 1]
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(plain[b], axis=1)
    products = np.maximum(np.einsum('pd,pd->p', a, plain[b]), np.einsum('pd,pd->p', a, mirrored[b]))
    flat = np.maximum(np.abs(a).max(1), np.abs(plain[b]).max(1)) < FLAT
    return np.where(flat, 1, products / np.maximum(lengths, 1e-6))


def join(links: list[tuple[int, int]]) -> list[list[int]]:
    """Returns the groups of rows that links connect, each in order, by their first rows."""
    root: dict[int, int] = {}

    def find(row: int) -> int:
        while root.setdefault(row, row) != row:
            root[row] = row = root[root[row]]
        return row

    for i, j in links:
        a, b = find(i), find(j)
        root[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for row in sorted(root):
        groups.setdefault(find(row), []).append(row)
    return list(groups.values())
