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
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

CHUNK, GPU_CHUNK = 4096, 1 << 17  # rows of the bank in one product
QUERIES = 1024  # queries in one product
PRODUCTS = {'torch': F.linear, 'numpy': lambda a, b: torch.from_numpy(a.numpy() @ b.numpy().T)}
ROW = 0xffffffff  # of a key
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

    def widen(self, rows: np.ndarray, narrow: np.ndarray, wide: np.ndarray) -> np.ndarray:
        """Returns rows (n,) in float64: a part of `wide`, which is written to, as is `narrow`, float32 (both >= n)."""
        narrow, wide = narrow[:len(rows)], wide[:len(rows)]
        np.take(self.array, rows if self.keep is None else self.keep[rows], 0, narrow, 'clip')  # 'raise' copies it
        np.copyto(wide, narrow)
        return wide


def dot(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Multiplies rows (n, D) with a query (D,) to (n,), all float64. Equal rows have equal products, bit for bit."""
    # Unlike a matrix product, it adds every row in the same order.
    products: np.ndarray = np.einsum('nd,d->n', rows, query)
    return products


def length(rows: np.ndarray) -> np.ndarray:
    """Returns the Euclidean lengths (n,) of rows (n, D), all float64. Equal rows have equal lengths, bit for bit."""
    lengths: np.ndarray = np.maximum(np.sqrt(np.einsum('nd,nd->n', rows, rows)), SHORTEST)
    return lengths


def error_bound(width: int) -> float:
    """Returns how far a float32 product of two normalised rows of `width` numbers can be from their cosine."""
    return (width + 8) * ROUNDING  # each of the factors is off by two roundings, and the sum by one for each addition


def normalize(source: Rows, start: int, stop: int, out: torch.Tensor) -> np.ndarray:
    """Writes the rows start .. stop - 1, divided by their lengths, to `out` (n, D) float32; returns the lengths (n,).

    Raises:
        ValueError: a row is not finite, or so long that it must be a mistake.
    """
    lengths, wide, unit = np.empty(stop - start), np.empty((WIDE_ROWS, source.width)), out.numpy()
    for i in range(start, stop, WIDE_ROWS):
        rows, part = source[i:min(i + WIDE_ROWS, stop)], slice(i - start, min(i + WIDE_ROWS, stop) - start)
        np.copyto(wide[:len(rows)], rows)
        lengths[part] = length(wide[:len(rows)])
        if not (lengths[part] < LONGEST).all():
            raise ValueError('the features hold NaN, infinity or numbers near it: check the weights, or use --amp off')
        np.multiply(rows, (1 / lengths[part, None]).astype(np.float32), out=unit[part])
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
    best = torch.full((len(queries), kept), NOTHING, device=device)
    lengths, multiply = np.empty(len(bank)), choose_product(device)
    with full_matmul_precision():
        for start in range(0, len(bank), chunk):
            stop = min(start + chunk, len(bank))
            lengths[start:stop] = normalize(bank, start, stop, table)
            x = table[:stop - start].to(device)
            for i in range(0, len(queries), block):
                part = slice(i, i + block)
                best[part] = merge_largest(best[part], multiply(normalized[part], x), start)
    products = torch.empty(best.shape)
    for i in range(0, len(queries), block):
        products[i:i + block] = unpack(best[i:i + block])
    best &= ROW  # in place: all copies would be most of the memory
    return products.numpy(), best.cpu().numpy(), lengths, query_lengths


def choose_product(device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Returns a function of (m, d) and (c, d) to (m, c), all float32.

    On a CPU, torch's or NumPy's library may be up to 1.3 times as fast. Each computes one product, then
    the one with the faster last time is used.
    """
    if device.type != 'cpu':
        return F.linear
    spent = dict.fromkeys(PRODUCTS, 0.0)  # seconds per element of its last product

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        name, start = min(spent, key=spent.__getitem__), time.perf_counter()
        out = PRODUCTS[name](a, b)
        spent[name] = (time.perf_counter() - start) / max(1, out.numel())
        return out

    return multiply


def pack(products: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Returns int64 keys that sort as the float32 products do; their lower 32 bits, ROW, are the rows."""
    bits = products.view(torch.int32)
    return (bits ^ (bits >> 31 & 0x7fffffff)).long() << 32 | rows  # the bits of negative numbers sort in reverse


def unpack(keys: torch.Tensor) -> torch.Tensor:
    """Returns the float32 products of keys."""
    bits = (keys >> 32).int()
    return (bits ^ (bits >> 31 & 0x7fffffff)).view(torch.float32)


NOTHING = int(pack(torch.tensor([-torch.inf]), torch.zeros(1, dtype=torch.int64)))  # below every product


def merge_largest(best: torch.Tensor, products: torch.Tensor, start: int) -> torch.Tensor:
    """Returns the largest keys (m, kept), the least one first, of `best` (m, kept) and of products (m, c).

    `start` is the row of the first column. topk over all columns would take up to half the time of the product itself,
    while few products exceed the least key.
    """
    (m, c), kept = products.shape, best.shape[1]
    at = find_above(products, unpack(best[:, :1]))
    if len(at) > products.numel() // 4:
        values, columns = products.topk(min(kept, c), sorted=False)
        return keep_largest(torch.cat([best, pack(values, columns + start)], 1), kept)
    row = at // c
    counts = torch.bincount(row, minlength=m)
    place = torch.arange(kept, kept + len(at), device=at.device) - (counts.cumsum(0) - counts)[row]
    keys = best.new_full((m, kept + int(counts.max())), NOTHING)
    keys[:, :kept] = best
    keys[row, place] = pack(products.take(at), at - row * c + start)
    return keep_largest(keys, kept)


# On a CPU, NumPy does what these two need several times as fast as torch.
def find_above(products: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Returns the positions in the flattened products (m, c) of those above a limit (m, 1)."""
    if products.device.type != 'cpu':
        return (products > limit).flatten().nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(products.numpy() > limit.numpy()))


def keep_largest(keys: torch.Tensor, kept: int) -> torch.Tensor:
    """Returns the `kept` largest keys of each row, the least one first; may change `keys`."""
    if keys.device.type != 'cpu':
        return keys.gather(1, unpack(keys).topk(kept).indices.flip(1))
    first = keys.shape[1] - kept
    keys.numpy().partition(first, 1)
    return keys[:, first:]


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
    4 M d + 12 M kept + 16 M k + 8 N + 4 chunk d + block (16 chunk + 128 kept) bytes, where kept = k + extra, 12 kept d
    for each thread, and buffers of the matrix libraries: 0.9 GiB for ImageNet (N = 1,281,167, M = 50,000, d = 2048,
    k = 200) on 8 threads. A GPU holds queries, candidates, a chunk and its products.

    Args:
        bank: (N, d) float32, k <= N.
        queries: (M, d) float32.
        chunk, block: rows of the bank (default: 4096; 131,072 on a GPU) and queries in one product.
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

    def rank_candidates(start: int) -> np.ndarray:
        """Ranks the candidates of RANKED queries; returns the queries with more candidates than were kept."""
        some = slice(start, start + RANKED)
        limits = np.partition(products[some], kept - k, 1)[:, kept - k, None] - 2 * error_bound(bank.width)
        near, asked = products[some] >= limits, queries[some].astype(np.float64)
        crowded = near.all(1) & (kept < len(bank))
        narrow, wide = (np.empty((kept, bank.width), kind) for kind in (np.float32, np.float64))
        for i in np.flatnonzero(~crowded):
            own, j = np.sort(rows[start + i][near[i]]), start + i
            dots = dot(bank.widen(own, narrow, wide), asked[i])
            found[j], cosines[j] = rank(own, dots / (lengths[own] * query_lengths[j]), k)
        return start + np.flatnonzero(crowded)

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
