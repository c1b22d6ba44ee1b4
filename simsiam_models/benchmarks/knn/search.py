"""Exact nearest neighbours by cosine, and the votes of the k nearest.

Nothing is approximate: neighbours are those of the float64 cosine of the float32 features. Among equal cosines the row
with the lower index comes first, among equal sums of votes the lower class.

How: a float32 product of normalised rows finds candidates, and float64 ranks them. Each product is off by at most
e = (D + 8) 2^-24, the worst that a sum of D products in any order can do, so whoever is less than 2 e below the k-th
is a candidate too. Where the processor multiplies bfloat16 much faster (AMX), that finds the candidates; what was
rounded off each row is measured, and e grows by it (Cauchy-Schwarz). A query with more candidates than are kept is
looked for again in float32, and one with more even there (collapsed features) is ranked in float64 from the start. No
chunk size, no library and no order of additions can therefore change a neighbour.
"""
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from .candidates import BANK_BYTES, QUERIES, Rows, adds_halves_in_float32, candidates, each_alone, length, quickest

EXTRA = 64  # candidates beyond k


def neighbours(
    bank: Rows | np.ndarray, queries: Rows | np.ndarray, k: int, device: torch.device | str = 'cpu',
    bank_bytes: int | None = None, block: int = QUERIES, extra: int = EXTRA, product: str = 'auto',
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of the bank for every query: indices (M, k) int64 and cosines (M, k) float64, nearest first.

    Bank and queries may be mapped from files. For N, M rows of d numbers the CPU's memory beyond them is at most
    4 M d + 12 M kept + 16 M k + 8 N + bank_bytes, and block (32 KiB + 128 kept) for each thread, where kept = k + extra
    candidates, and 2 k + extra by bfloat16: 1.6 GiB for ImageNet (N = 1,281,167, M = 50,000, d = 2048, k = 200) on 8
    threads. A GPU holds queries, candidates, bank_bytes (1 GiB there) and block x bank_bytes / 4 d products.

    Args:
        bank: (N, d) float32, k <= N.
        queries: (M, d).
        bank_bytes, block, extra: bytes of the bank at a time, most queries in one product, candidates beyond k.
        product: 'float32', on a CPU also 'onednn' and 'bfloat16', or 'auto': what a short timing says. The result is
            the same.
    """
    bank, queries = (x if isinstance(x, Rows) else Rows(x) for x in (bank, queries))
    device = torch.device(device)
    if bank.width != queries.width:
        raise ValueError(f'features of {bank.width} and {queries.width} numbers have no cosine')
    if product not in ('auto', 'float32', 'onednn', 'bfloat16'):
        raise ValueError(f"product={product!r}: 'auto', 'float32', 'onednn' or 'bfloat16'")
    if not 1 <= k <= len(bank):
        raise ValueError(f'k={k}: the bank has {len(bank)} images; use 1 to {len(bank)}')
    found, cosines = np.empty((len(queries), k), np.int64), np.empty((len(queries), k))
    with each_alone() as threads:
        if product == 'auto':
            product = quickest(bank.width) if device.type == 'cpu' else 'float32'
        if product == 'bfloat16' and not adds_halves_in_float32():
            product = 'float32'
        left = np.arange(len(queries))
        for one in ('bfloat16', 'float32') if product == 'bfloat16' else (product,):
            if len(left):
                kept = min(k + extra + k * (one == 'bfloat16'), len(bank))
                left = left[_search(
                    bank, queries, left, k, kept, device, bank_bytes, block, one, found, cosines, threads)]
        if len(left):
            _rank_all(bank, queries, left, k, found, cosines, threads)
    return found, cosines


def _search(
    bank: Rows, queries: Rows, which: np.ndarray, k: int, kept: int, device: torch.device, bank_bytes: int | None,
    block: int, product: str, found: np.ndarray, cosines: np.ndarray, threads: ThreadPoolExecutor,
) -> np.ndarray:
    """Fill in the neighbours of these queries; returns the positions in `which` of those with too many candidates."""
    queries = queries.only(which)
    values, rows, off, bank_lengths, lengths = candidates(
        bank, queries, kept, device, bank_bytes, block, product, threads)
    crowded: list[int] = []

    def rank(start: int) -> None:
        asked = queries.slice(start, start + 64).astype(np.float64)
        for i in range(start, min(start + 64, len(queries))):
            enough = values[i] >= np.partition(values[i], kept - k)[kept - k] - 2 * off[i]
            if enough.all() and kept < len(bank):
                crowded.append(i)
                continue
            near = np.sort(rows[i][enough])
            dots = bank.dots(near, asked[i - start])
            found[which[i]], cosines[which[i]] = _ranked(near, dots / (bank_lengths[near] * lengths[i]), k)

    list(threads.map(rank, range(0, len(queries), 64)))
    return np.sort(np.array(crowded, np.int64))


def _ranked(rows: np.ndarray, cosines: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """rows ascending: the stable order puts the lower index first among equals."""
    order = np.argsort(-cosines, kind='stable')[:k]
    return rows[order], cosines[order]


def _rank_all(
    bank: Rows, queries: Rows, crowded: np.ndarray, k: int, found: np.ndarray, cosines: np.ndarray,
    threads: ThreadPoolExecutor,
) -> None:
    """Queries whose neighbours are too close for float32: every row of the bank in float64, some queries at a time."""
    print(
        f'knn: {len(crowded)} of {len(queries)} queries have so many neighbours as near as the {k}-th that float32 '
        'cannot tell which these are (collapsed features, or copies of images); ranking them in float64, slower',
        file=sys.stderr)
    size = max(1, BANK_BYTES // (8 * bank.width))
    together = max(1, BANK_BYTES // (8 * len(bank)))
    for first in range(0, len(crowded), together):
        group = crowded[first:first + together]
        table, lengths = np.empty((len(group), len(bank))), np.empty(len(bank))
        asked = queries.pick(group).astype(np.float64)

        for start in range(0, len(bank), size):
            rows = np.arange(start, min(start + size, len(bank)))
            lengths[rows] = length(bank.pick(rows).astype(np.float64))
            table[:, rows] = np.array(list(threads.map(lambda query: bank.dots(rows, query), asked)))  # noqa: B023
        for i, row, own in zip(group, table, length(asked), strict=True):
            row /= lengths * own
            rows = np.flatnonzero(row >= np.partition(row, len(row) - k)[len(row) - k])
            found[i], cosines[i] = _ranked(rows, row[rows], k)


def hits(
    found: np.ndarray, cosines: np.ndarray, bank_labels: np.ndarray, labels: np.ndarray, ks: Sequence[int], t: float,
    classes: int,
) -> np.ndarray:
    """How many queries each k gets right: (len(ks), 2), top-1 and top-min(5, k), as MMSelfSup's protocol has it.

    Each of the k nearest adds exp(s / t) to its class; a class without neighbours has the sum 0. Among equal sums the
    lower class comes first.

    Args:
        found, cosines: (M, K), nearest first; k is cut down to K.
        bank_labels, labels: (N,), (M,) whole numbers from 0.
    """
    right = np.zeros((len(ks), 2), np.int64)
    block = max(1, (1 << 22) // classes)  # 32 MiB of sums
    for i in range(0, len(found), block):
        s, y = cosines[i:i + block], labels[i:i + block].astype(np.int64)
        weights = np.exp((s - s[:, :1]) / t)  # less the largest, which moves no rank: exp(1 / 0.001) is too large
        of = bank_labels[found[i:i + block]].astype(np.int64)  # (m, K)
        sums, mine, done = np.zeros((len(s), classes)), np.arange(len(s)), 0
        for j in np.argsort(ks, kind='stable'):
            for column in range(done, min(ks[j], s.shape[1])):  # one neighbour of each query at a time
                sums[mine, of[:, column]] += weights[:, column]
            done = max(done, min(ks[j], s.shape[1]))
            own = sums[mine, y][:, None]
            before = (sums > own).sum(1) + ((sums == own) & (np.arange(classes) < y[:, None])).sum(1)
            right[j] += (before < 1).sum(), (before < min(5, ks[j])).sum()
    return right
