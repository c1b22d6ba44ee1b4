"""The nearest other images of each image: exact up to a million images, beyond that by faiss."""
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ...data.philox import permutation
from ...runtime.messages import require
from ..search import Rows, find_neighbours, normalize

LARGE = 1_000_000  # images above which faiss searches
QUERIES = 1 << 15  # queries at a time, which bounds the memory: 256 MB of copies for 2048 numbers
SAMPLE = 1000  # queries on which the recall of an approximate search is measured
RECALL = 0.95  # that an approximate search reaches on them
POINTS = 64  # images per list on which faiss trains; more make no difference

Found = tuple[np.ndarray, np.ndarray]  # (M, k) int64 rows and (M, k) float64 cosines, nearest first


def find_others(
    x: np.ndarray, k: int, device: torch.device, approximate: bool = False, say: Callable[[str], Any] = print,
) -> Found:
    """Finds the k nearest other rows of each of the rows (N, D) float32, k < N."""
    return drop_self(*find_nearest(x, x, k + 1, device, approximate, say=say))


def find_nearest(
    bank: np.ndarray, queries: np.ndarray, k: int, device: torch.device, approximate: bool = False, *,
    say: Callable[[str], Any] = print,
) -> Found:
    """Finds the k nearest of N rows for each query, nearest first: rows (M, k) int64 and cosines (M, k) float64.

    Up to LARGE rows the result is exact (see `search`). Beyond it, faiss compares all rows in float32; with
    `approximate`, faiss compares a part of them, and `say` gets the recall.

    Raises:
        RuntimeError: faiss is needed, but not installed.
        ValueError: the features are not finite.
    """
    if approximate or len(bank) > LARGE:
        return _find_by_faiss(bank, queries, k, device, approximate, say=say)
    parts = []
    with tqdm(total=len(queries), desc='search', unit=' images', disable=not sys.stderr.isatty()) as bar:
        for start in range(0, len(queries), QUERIES):
            some = queries[start:start + QUERIES]
            parts.append(find_neighbours(bank, some, k, device))
            bar.update(len(some))
    return np.concatenate([found for found, _ in parts]), np.concatenate([cosines for _, cosines in parts])


def drop_self(found: np.ndarray, cosines: np.ndarray) -> Found:
    """Removes each row from its own neighbours (N, k), or the last one where copies displaced it: (N, k - 1)."""
    own = found == np.arange(len(found))[:, None]
    own[~own.any(1), -1] = True
    return found[~own].reshape(len(found), -1), cosines[~own].reshape(len(found), -1)


def _find_by_faiss(
    bank: np.ndarray, queries: np.ndarray, k: int, device: torch.device, approximate: bool, *,
    say: Callable[[str], Any],
) -> Found:
    what = '--approximate' if approximate else f'a search of more than {LARGE:,} images'
    require(what, faiss='faiss-cpu')
    import faiss

    rows = _normalize(bank)
    asked = rows if queries is bank else _normalize(queries)
    if approximate:
        index = _build_lists(faiss, rows)
        sample = permutation(0, 0, len(asked))[:SAMPLE]
        truth, _ = find_neighbours(bank, queries[np.sort(sample)], k, device)
        recall = _widen(index, asked[np.sort(sample)], truth)
        say(f'approximate search: {index.nprobe} of {index.nlist} lists, recall {recall:.3f} of the {k} nearest, '
            f'measured on {len(truth)} images')
    else:
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
    cosines, found = index.search(asked, k)
    return _fill(found, cosines.astype(np.float64))


def _normalize(x: np.ndarray) -> np.ndarray:
    out = torch.empty(x.shape)
    normalize(Rows(x), 0, len(x), out)
    return out.numpy()


def _build_lists(faiss: ModuleType, rows: np.ndarray) -> Any:
    """Returns an inverted file with 4 sqrt(N) lists, as faiss's guidelines have it."""
    lists = max(1, min(round(4 * len(rows) ** 0.5), len(rows) // 39))  # faiss warns below 39 points per list
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(rows.shape[1]), rows.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    chosen = np.sort(permutation(0, 1, len(rows))[:POINTS * lists])
    index.train(rows[chosen])
    index.add(rows)
    return index


def _widen(index: Any, queries: np.ndarray, truth: np.ndarray) -> float:
    """Searches twice as many lists until the recall is RECALL; returns the recall."""
    index.nprobe = 1
    while True:
        _, found = index.search(queries, truth.shape[1])
        recall = float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, truth, strict=True)]))
        if recall >= RECALL or index.nprobe >= index.nlist:
            return recall
        index.nprobe = min(2 * index.nprobe, index.nlist)


def _fill(found: np.ndarray, cosines: np.ndarray) -> Found:
    """Repeats the last neighbour where the searched lists hold fewer than k (faiss returns -1)."""
    for row in np.flatnonzero((found < 0).any(1)):
        n = max(1, int((found[row] >= 0).sum()))
        found[row, n:], cosines[row, n:] = max(found[row, n - 1], 0), cosines[row, n - 1]
    return found, cosines
