"""Nearest neighbours: `benchmarks.search` against plain torch and faiss-cpu's exact flat index, interleaved.

  pip install faiss-cpu
  python tests/perf/knn.py                                              three shapes, one thread
  python tests/perf/knn.py --shapes 100000x2048x5000 --threads 2        rows x numbers x queries

Features are ReLUs of clustered Gaussians, written to a file and mapped, as `extract` leaves them. With `crowded` after
a shape, classes hold 50 rows, fewer than k, and every second row is a copy of another one.

`ours` takes the library that it finds faster; `ours, torch` and `ours, numpy` are told which. torch in one shot
(matrix product and topk) and faiss get rows that are already normalised and in memory, rank in float32 and do not mind
ties; `faiss from the file` normalises them itself. Seconds are those of all processors together, medians over rounds:
on a machine that others load too, those of the clock say little.
"""
import argparse
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from simsiam_models.benchmarks import search

SHAPES = '30000x2048x512', '30000x1024x1000', '30000x512x1000crowded'


def make(rng: np.random.Generator, centres: np.ndarray, n: int, path: Path) -> np.ndarray:
    x = np.lib.format.open_memmap(path, 'w+', np.float32, (n, centres.shape[1]))
    for i in range(0, n, 4096):
        of = centres[rng.integers(len(centres), size=len(x[i:i + 4096]))]
        x[i:i + 4096] = np.maximum(of / 2 + rng.standard_normal(of.shape, np.float32), 0)
    x.flush()
    return np.load(path, mmap_mode='r')


def list_tasks(bank: np.ndarray, queries: np.ndarray, k: int) -> dict[str, Callable[[], np.ndarray]]:
    import faiss

    rows, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    x, q = torch.from_numpy(rows), torch.from_numpy(asked)

    def ask_faiss(rows: np.ndarray, asked: np.ndarray) -> np.ndarray:
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
        return index.search(asked, k)[1]

    def ask_faiss_all() -> np.ndarray:
        copies = np.array(bank), np.array(queries)
        for copy in copies:
            faiss.normalize_L2(copy)
        return ask_faiss(*copies)

    def ask(name: str) -> np.ndarray:
        with patch.object(search, 'PRODUCTS', {name: search.PRODUCTS[name]}):
            return search.find_neighbours(bank, queries, k)[0]

    return {
        'ours': lambda: search.find_neighbours(bank, queries, k)[0], 'ours, torch': lambda: ask('torch'),
        'ours, numpy': lambda: ask('numpy'), 'torch in one shot': lambda: (q @ x.T).topk(k)[1].numpy(),
        'faiss': lambda: ask_faiss(rows, asked), 'faiss from the file': ask_faiss_all}


def measure(shape: str, k: int, rounds: int, folder: Path) -> None:
    n, width, m = map(int, re.findall(r'\d+', shape))
    rng, crowded = np.random.default_rng(0), shape.endswith('crowded')
    centres = rng.standard_normal((n // 50 if crowded else 200, width), np.float32)
    bank, queries = make(rng, centres, n, folder / f'bank{shape}'), make(rng, centres, m, folder / f'queries{shape}')
    if crowded:
        bank = np.array(bank)
        bank[1::2] = bank[::2]
    tasks = list_tasks(bank, queries, k)
    spent, found = {name: [] for name in tasks}, {}
    for _ in range(rounds):
        for name, run in tasks.items():
            start = time.process_time()
            found[name] = run()
            spent[name].append(time.process_time() - start)
    shared = np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found['ours'], found['faiss'], strict=True)])
    print(f'\n{shape}, k = {k}: {shared:.5f} of the neighbours are also those of faiss; load {os.getloadavg()[0]:.1f}')
    for name, seconds in spent.items():
        ratio = statistics.median(a / b for a, b in zip(spent['ours'], seconds, strict=True))
        print(f'  {name:20}{statistics.median(seconds):8.2f} s ({min(seconds):.2f} .. {max(seconds):.2f})'
              f'   ours / {name}: {ratio:.2f}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', nargs='+', default=SHAPES)
    parser.add_argument('--k', type=int, default=200)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    if args.threads != int(os.environ.get('OMP_NUM_THREADS', 0)):  # NumPy reads it when it starts
        os.environ['OMP_NUM_THREADS'] = str(args.threads)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    try:
        import faiss
    except ImportError:
        sys.exit('pip install faiss-cpu')
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    print(f'{args.threads} threads, torch {torch.__version__}, numpy {np.__version__}, faiss {faiss.__version__}, '
          f'medians of {args.rounds} interleaved rounds')
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            measure(shape, args.k, args.rounds, Path(folder))


if __name__ == '__main__':
    main()
