"""What happens before anything is trained or measured: reading a checkpoint, and opening a folder for the first time.

  python tests/perf/startup.py

A file in the layout of FAIR's, 153 MB, is read by `torch.load(weights_only=True)` and by `weights.reading`, which also
verifies checksums; each time in a fork, because a process that reads a file again already has the memory. Folders of
1,000 and 10,000 empty image files in 10 and 100 classes are listed by torchvision's ImageFolder and opened by
`open_data` without a stored listing, which it then stores. The files are in the cache of the operating system.
Milliseconds are those of the processor and of the clock, medians over interleaved rounds.
"""
import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torchvision
from torchvision.datasets import ImageFolder

from simsiam_models import create_simsiam
from simsiam_models.data.opening import open_data
from simsiam_models.weights.reading import read


def measure(run: Callable[[Path], Any], folder: Path) -> tuple[float, float]:
    """Returns the milliseconds of the processor and of the clock."""
    processor, clock = time.process_time(), time.perf_counter()
    run(folder)
    return 1e3 * (time.process_time() - processor), 1e3 * (time.perf_counter() - clock)


def measure_in_fork(run: Callable[[Path], Any], folder: Path) -> tuple[float, float]:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context('fork').Process(target=lambda: theirs.send(measure(run, folder)))
    process.start()
    theirs.close()
    times: tuple[float, float] = ours.recv()  # EOFError: it failed
    process.join()
    return times


def race(
    title: str, rounds: int, tasks: dict[str, Callable[[Path], Any]], folder: Path,
    measure: Callable[[Callable[[Path], Any], Path], tuple[float, float]] = measure,
) -> None:
    """Times each task with a new, empty folder for what it stores."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    for i in range(rounds):
        for name, run in tasks.items():
            os.environ['SIMSIAM_CACHE'] = str(folder / f'cache {title} {i}')
            spent[name].append(measure(run, folder))
    first = next(iter(spent.values()))
    for name, times in spent.items():
        ratio = statistics.median(a[0] / b[0] for a, b in zip(times, first, strict=True))
        texts = [f'{statistics.median(x):7.1f} ({min(x):.1f} .. {max(x):.1f})' for x in zip(*times, strict=True)]
        print(f'{title:14}{name:14}processor {texts[0]:28}clock {texts[1]:28}{ratio:.2f}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=21)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = {f'module.{key}': value for key, value in create_simsiam('simsiam_resnet50').state_dict().items()}
        torch.save({'epoch': 100, 'arch': 'resnet50', 'state_dict': weights}, folder / 'x.pth')
        for n in (1000, 10_000):
            for i in range(n):
                path = folder / str(n) / f'n{i % (n // 100):08}' / f'n{i % (n // 100):08}_{i}.JPEG'
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        time.sleep(3)  # the listing of a folder that has just changed is not stored
        print(f'torch {torch.__version__}, torchvision {torchvision.__version__}; {args.rounds} rounds, milliseconds; '
              f'load {os.getloadavg()[0]:.1f}; the last column: processor, relative to the first of each')
        race('153 MB', args.rounds, {
            'torch.load': lambda at: torch.load(at / 'x.pth', map_location='cpu', weights_only=True),
            'ours': lambda at: read(at / 'x.pth')}, folder, measure_in_fork)
        for n in ('1000', '10000'):
            race(f'{n} files', args.rounds, {
                'ImageFolder': lambda at, n=n: ImageFolder(at / n), 'ours': lambda at, n=n: open_data(at / n)}, folder)
        print(f'load {os.getloadavg()[0]:.1f}')


if __name__ == '__main__':
    main()
