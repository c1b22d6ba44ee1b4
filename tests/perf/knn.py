"""Nearest neighbours: `benchmarks.search` against faiss-cpu's exact flat index, in one interleaved run.

  pip install faiss-cpu
  python tests/perf/knn.py                         100,000 x 2048 against 5,000 queries, k = 200, all cores
  python tests/perf/knn.py --bank 20000 --queries 1000 --threads 1

Features are ReLUs of clustered Gaussians, written to a file and mapped, as `extract` leaves them. faiss gets rows that
are already normalised and in memory; its time covers add and search. Seconds are those of the clock and those of all
processors together. On a machine that others load too, only the second number is meaningful.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from simsiam_models.benchmarks.search import find_neighbours


def make(rng: np.random.Generator, centres: np.ndarray, n: int, path: Path) -> np.ndarray:
    x = np.lib.format.open_memmap(path, 'w+', np.float32, (n, centres.shape[1]))
    for i in range(0, n, 4096):
        of = centres[rng.integers(len(centres), size=len(x[i:i + 4096]))]
        x[i:i + 4096] = np.maximum(of / 2 + rng.standard_normal(of.shape, np.float32), 0)
    x.flush()
    return np.load(path, mmap_mode='r')


def timed(run: Callable[[], np.ndarray]) -> tuple[float, float, np.ndarray]:
    clock, processors = time.perf_counter(), time.process_time()
    found = run()
    return time.perf_counter() - clock, time.process_time() - processors, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--bank', type=int, default=100_000)
    parser.add_argument('--queries', type=int, default=5_000)
    parser.add_argument('--width', type=int, default=2048)
    parser.add_argument('--k', type=int, default=200)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    args = parser.parse_args()
    try:
        import faiss
    except ImportError:
        sys.exit('pip install faiss-cpu')
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((200, args.width), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        bank = make(rng, centres, args.bank, Path(folder) / 'bank.npy')
        queries = make(rng, centres, args.queries, Path(folder) / 'queries.npy')
        rows, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))

        def by_faiss() -> np.ndarray:
            index = faiss.IndexFlatIP(args.width)
            index.add(rows)
            return index.search(asked, args.k)[1]

        tasks = {
            'faiss flat': by_faiss, 'neighbours': lambda: find_neighbours(bank, queries, args.k)[0]}
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
        found = {}
        for _ in range(args.rounds):
            for name, run in tasks.items():
                clock, processors, found[name] = timed(run)
                spent[name].append((clock, processors))
    shared = np.mean([len(np.intersect1d(a, b)) / args.k for a, b in zip(*found.values(), strict=True)])
    print(f'{args.bank} x {args.width} against {args.queries}, k={args.k}, {args.threads} threads, torch '
          f'{torch.__version__}, faiss {faiss.__version__}; {args.rounds} interleaved rounds; load average '
          f'{os.getloadavg()[0]:.1f}; {shared:.5f} of the neighbours are the same')
    for i, kind in enumerate(('clock', 'processors')):
        ratios = [a[i] / b[i] for a, b in zip(spent['faiss flat'], spent['neighbours'], strict=True)]
        for name, times in spent.items():
            seconds = [t[i] for t in times]
            print(f'{name:12}{kind:12}{statistics.median(seconds):8.2f} s ({min(seconds):.2f} .. {max(seconds):.2f})')
        print(f'faiss / neighbours, round by round: median {statistics.median(ratios):.2f} '
              f'({min(ratios):.2f} .. {max(ratios):.2f})')


if __name__ == '__main__':
    main()
