"""Who may be among the nearest: products of normalised rows by float32 or bfloat16, and how far off these can be."""
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import kernel

BANK_BYTES = 64 << 20  # of the bank at a time, on a CPU
GPU_BYTES = 1 << 30
QUERIES, COLUMNS = 1024, 512  # rows and columns of one product on a CPU: what it gives is still in the cache when read
TAU = 2.0**-24  # half the distance from 1 to the next float32
HALF = 2.0**-8  # the same of bfloat16
LEAST, MOST = 1e-30, 1e30  # lengths of features; shorter ones count as 0


class Rows:
    """Rows of an (N, D) float32 array, which may be mapped from a file; `keep` picks some of them."""

    def __init__(self, array: np.ndarray, keep: np.ndarray | None = None) -> None:
        if array.ndim != 2 or array.dtype != np.float32 or not array.flags.c_contiguous:
            raise ValueError(f'features {array.shape} {array.dtype}: they must be (N, D) float32, in C order')
        self.array, self.keep = array, keep
        self.width = array.shape[1]

    def __len__(self) -> int:
        return len(self.array) if self.keep is None else len(self.keep)

    def slice(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop] if self.keep is None else self.array[self.keep[start:stop]]

    def only(self, rows: np.ndarray) -> 'Rows':
        """These rows, in this order."""
        return Rows(self.array, rows if self.keep is None else self.keep[rows])

    def pick(self, rows: np.ndarray) -> np.ndarray:
        return self.array[rows if self.keep is None else self.keep[rows]]

    def dots(self, rows: np.ndarray, query: np.ndarray) -> np.ndarray:
        """Products (n,) of these rows with a query (D,), in float64; of equal rows they are equal, bit for bit."""
        rows = rows if self.keep is None else self.keep[rows]
        if kernel.library() is not None:
            return kernel.dots(self.array, rows, query)
        parts = (self.array[rows[i:i + 32]].astype(np.float64) for i in range(0, len(rows), 32))  # stay in the cache
        return np.concatenate([np.einsum('nd,d->n', part, query) for part in parts])


def length(rows: np.ndarray) -> np.ndarray:
    """(n, d) float64 -> (n,). Equal rows have equal lengths, bit for bit: the order of additions depends on d alone."""
    return np.maximum(np.sqrt(np.einsum('nd,nd->n', rows, rows)), LEAST)


class Unit:
    """Rows divided by their lengths, for products: `table` (n, d) float32 or bfloat16.

    `lengths` (n,) is float64; `lost` (n,) the length of what bfloat16 rounded off each row.
    """

    def __init__(self, rows: int, width: int, half: bool) -> None:
        self.table = torch.empty(rows, width, dtype=torch.bfloat16 if half else torch.float32)
        self.lengths, self.lost = np.empty(rows), np.zeros(rows, np.float32)

    def read(self, source: Rows, start: int, n: int, threads: ThreadPoolExecutor) -> Tensor:
        """The rows start .. start + n of `source`, in the first n rows of the table."""
        def work(first: int) -> None:
            wide = np.empty((32, source.width))  # stays in the cache
            for i in range(first, min(first + 512, n), 32):
                part = slice(i, min(i + 32, n))
                rows = wide[:part.stop - i]
                np.copyto(rows, source.slice(start + i, start + part.stop))
                self.lengths[part] = length(rows)
                with np.errstate(invalid='ignore'):  # judged below
                    rows *= 1 / self.lengths[part, None]
                x = torch.from_numpy(rows)
                self.table[part] = x
                if self.table.dtype == torch.bfloat16:
                    self.lost[part] = (x - self.table[part]).norm(dim=1).numpy()

        list(threads.map(work, range(0, n, 512)))
        if not bool((self.lengths[:n] < MOST).all()):
            raise ValueError('the features hold NaN, infinity or numbers near it: check the weights, or use --amp off')
        return self.table[:n]


class Best:
    """The largest cosines so far of some queries, and the rows of the bank they belong to, in no order."""

    def __init__(self, queries: Tensor, kept: int) -> None:
        self.queries = queries  # (m, d), float32 or bfloat16
        self.values = torch.full((len(queries), kept), -torch.inf, device=queries.device)
        self.rows = torch.zeros(len(queries), kept, dtype=torch.int64, device=queries.device)

    def add(self, bank: Tensor, start: int, multiply: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        """bank (c, d), whose first row has the number `start`."""
        if bank.device.type != 'cpu':
            self._select(F.linear(self.queries, bank), start)
            return
        m, kept = self.values.shape
        product, hits, counts = torch.empty(m * COLUMNS), [], np.zeros(m, np.int64)
        least = self.values.amin(1, keepdim=True)
        for first in range(0, len(bank), COLUMNS):
            part = bank[first:first + COLUMNS]
            s = product[:m * len(part)].view(m, -1)
            multiply(self.queries, part, s)
            at = None if bool((least == -torch.inf).any()) else np.flatnonzero((s > least).numpy())
            if at is None or len(at) > s.numel() // 8:
                self._select(s, start + first)
                least = self.values.amin(1, keepdim=True)
                continue
            row, column = np.divmod(at, len(part))  # few; to find these is quicker than to select
            hits.append((row, column + (start + first), s.numpy().reshape(-1)[at]))
            counts += np.bincount(row, minlength=m)
            if counts.max() > kept:
                self._insert(*(np.concatenate(x) for x in zip(*hits, strict=True)), counts)
                hits, counts[:], least = [], 0, self.values.amin(1, keepdim=True)
        if hits:
            self._insert(*(np.concatenate(x) for x in zip(*hits, strict=True)), counts)

    def _select(self, s: Tensor, start: int) -> None:
        new, at = s.topk(min(self.values.shape[1], s.shape[1]), sorted=False)
        self._keep(new, at + start)

    def _insert(self, queries: np.ndarray, rows: np.ndarray, values: np.ndarray, counts: np.ndarray) -> None:
        """Of any number for each query: side by side in a table, whose rest is never chosen."""
        order = np.argsort(queries.astype(np.uint16), kind='stable')  # by radix, as numbers this small are
        place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        new = torch.full((len(counts), int(counts.max())), -torch.inf)
        at = torch.zeros(new.shape, dtype=torch.int64)
        new.numpy()[queries[order], place] = values[order]
        at.numpy()[queries[order], place] = rows[order]
        self._keep(new, at)

    def _keep(self, new: Tensor, at: Tensor) -> None:
        self.values, chosen = torch.cat([self.values, new], 1).topk(self.values.shape[1], sorted=False)
        self.rows = torch.cat([self.rows, at], 1).gather(1, chosen)


def candidates(
    bank: Rows, queries: Rows, kept: int, device: torch.device, bank_bytes: int | None, block: int, product: str,
    threads: ThreadPoolExecutor,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Those whose products with a query are the `kept` largest.

    Returns:
        Products (M, kept) float32 and their rows (M, kept), in no order; how far each query's may be off (M,); the
        lengths of the bank's and of the queries' rows.
    """
    half = product == 'bfloat16'
    multiply = {'onednn': by_onednn, 'bfloat16': by_halves}.get(product, by_default)
    size = max(1, (bank_bytes or (GPU_BYTES if device.type == 'cuda' else BANK_BYTES)) // (4 * bank.width))
    asked, unit = Unit(len(queries), queries.width, half), Unit(min(size, len(bank)), bank.width, half)
    x = asked.read(queries, 0, len(queries), threads).to(device)
    rounds = -(-len(x) // (block * threads._max_workers)) * threads._max_workers
    best = [Best(part, kept) for part in x.split(-(-len(x) // rounds))]
    lengths, lost = np.empty(len(bank)), 0.0
    for start in range(0, len(bank), size):
        n = min(size, len(bank) - start)
        b = unit.read(bank, start, n, threads).to(device)
        lengths[start:start + n], lost = unit.lengths[:n], max(lost, float(unit.lost[:n].max()))
        list((threads.map if device.type == 'cpu' else map)(lambda one: one.add(b, start, multiply), best))  # noqa: B023
    values, rows = (np.concatenate([getattr(one, name).cpu().numpy() for one in best]) for name in ('values', 'rows'))
    # D products of numbers that are off by 2 units each, added in any order.
    off = np.full(len(x), (bank.width + 8) * TAU)
    if half:  # |q b - q' b'| <= |q - q'| |b| + |q'| |b - b'|; then the product itself is rounded
        off = 1.01 * (off + asked.lost + lost) + HALF * np.abs(values).max(1)
    return values, rows, off, lengths, asked.lengths


def by_default(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a, b.T, out=out)


def by_onednn(a: Tensor, b: Tensor, out: Tensor) -> None:
    out.copy_(F.linear(a.to_mkldnn(), b.to_mkldnn()).to_dense())


def by_halves(a: Tensor, b: Tensor, out: Tensor) -> None:
    out.copy_(torch.mm(a.bfloat16(), b.bfloat16().T))


def adds_halves_in_float32() -> bool:
    """Of oneDNN it is known; what torch does without it may add in bfloat16."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def quickest(width: int) -> str:
    """The product to take on this CPU, by a short timing; none changes a neighbour.

    bfloat16, with its longer list of candidates, where it is twice as fast, as with AMX. oneDNN is several times faster
    than MKL on some processors, and torch takes MKL for float32.
    """
    if not torch.backends.mkldnn.is_available():
        return 'float32'
    ways = {'float32': by_default, 'onednn': by_onednn}
    if adds_halves_in_float32():
        ways['bfloat16'] = by_halves
    spent = dict.fromkeys(ways, 1e9)
    x, out = torch.ones(COLUMNS, width), torch.empty(COLUMNS, COLUMNS)
    halves = x.bfloat16()
    for _ in range(6):
        for name, multiply in ways.items():
            y = halves if name == 'bfloat16' else x
            start = time.perf_counter()
            multiply(y, y, out)
            spent[name] = min(spent[name], time.perf_counter() - start)
    best = min(('float32', 'onednn'), key=lambda name: spent[name])
    return 'bfloat16' if 2 * spent.get('bfloat16', 1e9) < spent[best] else best


@contextmanager
def each_alone() -> Iterator[ThreadPoolExecutor]:
    """As many as torch has. Each multiplies by itself, in float32, whatever was allowed before: the bound rests on it.

    One product by several threads would leave them idle in all that follows it.
    """
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(before, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            yield threads
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)
