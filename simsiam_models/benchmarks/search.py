"""Exact nearest neighbours by cosine, and the votes of the k nearest.

Nothing is approximate: the neighbours are those of the float64 cosine of the float32 features. Among equal cosines the
row with the lower index comes first, among equal sums of votes the lower class.

A float32 product of normalised rows finds candidates, and float64 ranks them. The product is off by at most
e = (D + 8) 2^-24, the worst case for a sum of D products in any order, so every row whose product is less than 2 e
below the k-th largest is a candidate. A query with more candidates than are kept (collapsed features) is compared with
the whole bank in float64. Neither the size of a chunk nor a library nor the order of additions can change a neighbour.
"""
import functools
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

CHUNK, GPU_CHUNK = 2048, 1 << 17  # rows of the bank in one product
QUERIES = 1024  # queries in one product
EXTRA = 64  # candidates kept beyond k
ROUNDING = 2.0**-24  # half the distance from 1 to the next float32
SHORTEST, LONGEST = 1e-30, 1e30  # lengths of features; a shorter row counts as zeros
WIDE_ROWS = 64  # rows converted to float64 at a time
RANKED = 64  # queries that a thread ranks at a time
TABLE_BYTES = 64 << 20  # cosines with the whole bank that are held at a time


class Rows:
    """Rows of an (N, D) float32 array, which may be mapped from a file; `keep` selects some of them."""

    def __init__(self, array: np.ndarray, keep: np.ndarray | None = None) -> None:
        if array.ndim != 2 or array.dtype != np.float32:
            raise ValueError(f'features {array.shape} {array.dtype}: they must be (N, D) float32')
        self.array, self.keep, self.width = array, keep, array.shape[1]

    def __len__(self) -> int:
        return len(self.array if self.keep is None else self.keep)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return self.array[rows if self.keep is None else self.keep[rows]]


def dot(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Multiplies rows (n, D) with a query (D,) to (n,), all float64. Equal rows have equal products, bit for bit."""
    return np.einsum('nd,d->n', rows, query)  # unlike a matrix product, it adds every row in the same order


def length(rows: np.ndarray) -> np.ndarray:
    """Returns the Euclidean lengths (n,) of rows (n, D), all float64. Equal rows have equal lengths, bit for bit."""
    return np.maximum(np.sqrt(np.einsum('nd,nd->n', rows, rows)), SHORTEST)


def error_bound(width: int) -> float:
    """Returns how far a float32 product of two normalised rows of `width` numbers can be from their cosine."""
    return (width + 8) * ROUNDING  # each of the factors is off by one rounding, and the sum by one for each addition


def normalize(source: Rows, start: int, stop: int, out: torch.Tensor) -> np.ndarray:
    """Writes the rows start .. stop - 1, divided by their lengths, to `out` (n, D) float32; returns the lengths (n,).

    Raises:
        ValueError: a row is not finite, or so long that it must be a mistake.
    """
    lengths = np.empty(stop - start)
    for i in range(start, stop, WIDE_ROWS):
        part = slice(i - start, min(i + WIDE_ROWS, stop) - start)
        wide = source[i:min(i + WIDE_ROWS, stop)].astype(np.float64)
        lengths[part] = length(wide)
        if not (lengths[part] < LONGEST).all():
            raise ValueError('the features hold NaN, infinity or numbers near it: check the weights, or use --amp off')
        wide /= lengths[part, None]
        out[part] = torch.from_numpy(wide)
    return lengths


@contextmanager
def full_matmul_precision() -> Iterator[None]:
    """Multiplies float32 matrices in float32, whatever was allowed before: the error bound depends on it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def find_candidates(
    bank: Rows, queries: Rows, kept: int, device: torch.device, *, chunk: int | None = None, block: int = QUERIES,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Finds the rows of the bank whose float32 products with a query are the `kept` largest.

    Returns:
        The products (M, kept) float32 and their rows (M, kept) int64, in no order; the lengths of the bank's rows (N,)
        and of the queries (M,).
    """
    chunk = min(len(bank), chunk or (CHUNK if device.type == 'cpu' else GPU_CHUNK))
    normalized, table = torch.empty(len(queries), queries.width), torch.empty(chunk, bank.width)
    query_lengths = normalize(queries, 0, len(queries), normalized)
    normalized = normalized.to(device)
    products = torch.full((len(queries), kept), -torch.inf, device=device)
    rows = torch.zeros(len(queries), kept, dtype=torch.int64, device=device)
    lengths = np.empty(len(bank))
    with full_matmul_precision():
        for start in range(0, len(bank), chunk):
            stop = min(start + chunk, len(bank))
            lengths[start:stop] = normalize(bank, start, stop, table)
            x = table[:stop - start].to(device)
            for i in range(0, len(queries), block):
                part = slice(i, i + block)
                new, columns = select_largest(
                    F.linear(normalized[part], x), products[part].amin(1, keepdim=True), kept)
                products[part], chosen = torch.cat([products[part], new], 1).topk(kept, sorted=False)
                rows[part] = torch.cat([rows[part], columns + start], 1).gather(1, chosen)
    return products.cpu().numpy(), rows.cpu().numpy(), lengths, query_lengths


def select_largest(products: torch.Tensor, limit: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects the values above `limit` (m, 1) in each row of `products` (m, c), at least the `kept` largest.

    Returns the values and their columns. topk over all columns would take up to half the time of the product itself,
    while few values exceed the limit.
    """
    above = products > limit
    counts = above.sum(1, dtype=torch.int32)
    most = int(counts.max())
    if most > products.shape[1] // 8:
        return products.topk(min(kept, products.shape[1]), sorted=False)
    row, column = above.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    values = products.new_full((len(products), most), -torch.inf)
    columns = column.new_zeros(values.shape)
    values[row, place], columns[row, place] = products[row, column], column
    return values, columns


def rank(rows: np.ndarray, cosines: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k nearest; `rows` ascend, so the stable order puts the lower index first among equal cosines."""
    order = np.argsort(-cosines, kind='stable')[:k]
    return rows[order], cosines[order]


def find_neighbours(
    bank: Rows | np.ndarray, queries: Rows | np.ndarray, k: int, device: torch.device | str = 'cpu', *,
    chunk: int | None = None, block: int = QUERIES, extra: int = EXTRA,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k nearest rows of the bank for each query, nearest first: indices (M, k) int64, cosines (M, k) float64.

    Bank and queries may be mapped from files. For N and M rows of d numbers the memory beyond them is at most
    4 M d + 12 M kept + 16 M k + 8 N + 4 chunk d + block (16 chunk + 128 kept) bytes, where kept = k + extra, and each
    thread converts kept rows to float64, plus buffers of the matrix library: 0.8 GiB for ImageNet (N = 1,281,167,
    M = 50,000, d = 2048, k = 200) on 8 threads. A GPU holds queries, candidates, a chunk and its products.

    Args:
        bank: (N, d) float32, k <= N.
        queries: (M, d) float32.
        chunk, block: rows of the bank (default: 2048; 131,072 on a GPU) and queries in one product.
        extra: candidates kept beyond k.

    Raises:
        ValueError: the features do not fit together or are not finite, or k is not in 1 .. N.
    """
    bank, queries = (x if isinstance(x, Rows) else Rows(x) for x in (bank, queries))
    if bank.width != queries.width:
        raise ValueError(f'features of {bank.width} and {queries.width} numbers have no cosine')
    if not 1 <= k <= len(bank):
        raise ValueError(f'k={k}: the bank has {len(bank)} images; use 1 to {len(bank)}')
    kept = min(k + extra, len(bank))
    products, rows, lengths, query_lengths = find_candidates(
        bank, queries, kept, torch.device(device), chunk=chunk, block=block)
    found, cosines = np.empty((len(queries), k), np.int64), np.empty((len(queries), k))

    def rank_candidates(start: int) -> list[int]:
        """Ranks the candidates of RANKED queries; returns the queries with more candidates than were kept."""
        crowded = []
        for i in range(start, min(start + RANKED, len(queries))):
            near = products[i] >= np.partition(products[i], kept - k)[kept - k] - 2 * error_bound(bank.width)
            if near.all() and kept < len(bank):
                crowded.append(i)
                continue
            candidates, query = np.sort(rows[i][near]), queries[i:i + 1].astype(np.float64)[0]
            dots = dot(bank[candidates].astype(np.float64), query)
            found[i], cosines[i] = rank(candidates, dots / (lengths[candidates] * query_lengths[i]), k)
        return crowded

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        crowded = [i for part in threads.map(rank_candidates, range(0, len(queries), RANKED)) for i in part]
        for i, dots in multiply_with_all(bank, queries, crowded, threads):
            all_cosines = dots / (lengths * query_lengths[i])
            near = np.flatnonzero(all_cosines >= np.partition(all_cosines, len(bank) - k)[len(bank) - k])
            found[i], cosines[i] = rank(near, all_cosines[near], k)
    return found, cosines


def multiply_with_all(
    bank: Rows, queries: Rows, which: Sequence[int], threads: ThreadPoolExecutor,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each query in `which` and its float64 products (N,) with the whole bank; prints a line if there is any."""
    if which:
        print(
            f'{len(which)} of {len(queries)} queries have more neighbours than float32 can tell apart (collapsed '
            'features, or copies of images); ranking them in float64, slower', file=sys.stderr)
    size = max(1, TABLE_BYTES // (8 * len(bank)))  # queries
    for first in range(0, len(which), size):
        some = np.array(which[first:first + size])
        wide, table = queries[some].astype(np.float64), np.empty((len(some), len(bank)))
        for start in range(0, len(bank), WIDE_ROWS):
            part = bank[start:start + WIDE_ROWS].astype(np.float64)
            table[:, start:start + len(part)] = list(threads.map(functools.partial(dot, part), wide))
        yield from zip(some, table, strict=True)


def count_hits(
    found: np.ndarray, cosines: np.ndarray, bank_labels: np.ndarray, labels: np.ndarray, *, ks: Sequence[int], t: float,
    classes: int,
) -> np.ndarray:
    """Counts the queries that each k classifies correctly, by MMSelfSup's protocol.

    Returns (len(ks), 2): top-1 and top-min(5, k). Each of the k nearest adds exp(s / t) to its class; a class without
    neighbours has the sum 0. Among equal sums the lower class comes first.

    Args:
        found, cosines: (M, K), nearest first; a larger k counts as K.
        bank_labels, labels: (N,), (M,) whole numbers from 0.
    """
    right = np.zeros((len(ks), 2), np.int64)
    block = max(1, (1 << 22) // classes)  # 32 MiB of sums
    for i in range(0, len(found), block):
        s, y = cosines[i:i + block], labels[i:i + block].astype(np.int64)
        weights = np.exp((s - s[:, :1]) / t)  # relative to the largest, which keeps the order: exp(1 / 0.001) overflows
        votes = bank_labels[found[i:i + block]].astype(np.int64)  # (m, K)
        sums, mine, done = np.zeros((len(s), classes)), np.arange(len(s)), 0
        for j in np.argsort(ks, kind='stable'):
            for column in range(done, min(ks[j], s.shape[1])):  # one neighbour of each query at a time
                sums[mine, votes[:, column]] += weights[:, column]
            done = max(done, min(ks[j], s.shape[1]))
            own = sums[mine, y][:, None]
            before = (sums > own).sum(1) + ((sums == own) & (np.arange(classes) < y[:, None])).sum(1)
            right[j] += (before < 1).sum(), (before < min(5, ks[j])).sum()
    return right
