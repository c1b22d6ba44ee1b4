"""Times the training step alone, the data alone, and both together; on a GPU also the bound set by its memory.

  python tests/perf/together.py                                      CPU: ResNet-50, 224 px, batch 16, generated JPEGs
  python tests/perf/together.py --device cuda --batch 512 --workers 16 --steps 20 --compile

All three are measured in one interleaved run. Prints samples (pairs of views) per second, the time spent waiting for
data, and the cost of data on top of the step. On CUDA, also prints the share of the augmentation in the step, the copy
rate of the card, and the shortest possible step: ResNet-50 moves 380 to 480 MB per 224-pixel view, forward and
backward, so a pair takes at least twice that divided by the copy rate.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from data import make_jpegs
from torch import Tensor

from simsiam_models import create_simsiam
from simsiam_models.data import Augmentation, FolderImages, TwoViews
from simsiam_models.runtime.distributed import World, synchronize
from simsiam_models.runtime.precision import choose_amp
from simsiam_models.training.recipes import Recipe
from simsiam_models.training.step import Perf, Trainer, train_step

MB_PER_VIEW = (380, 480)  # activations of ResNet-50 at 224 px, forward and backward


def forever(views: TwoViews) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while True:
        yield from views.epoch(epoch)
        epoch += 1


class Bench:
    """The timed tasks: each does `steps` steps and returns its seconds and those it waited for data."""

    def __init__(self, args: argparse.Namespace, images: FolderImages) -> None:
        self.device, self.steps = torch.device(args.device), args.steps
        aug = Augmentation(size=args.size)
        recipe = Recipe('', model=args.model, batch_size=args.batch, augmentation=aug)
        perf = Perf(compile=args.compile)
        model = create_simsiam(args.model).to(self.device, memory_format=perf.memory_format)
        shape = (args.batch, 3, args.size, args.size)
        self.amp = choose_amp(args.amp, self.device, model, shape)
        if args.compile:
            model.compile()
        self.trainer = Trainer(model.train(), recipe, World(0, 1, self.device), self.amp, perf)
        self.views = TwoViews(images, aug, args.batch, device=self.device, workers=args.workers)
        self.fixed = tuple(x.clone() for x in next(self.views.epoch(0)))
        self.stream = forever(self.views)

    def step_alone(self) -> tuple[float, float]:
        start = time.perf_counter()
        for i in range(self.steps):
            train_step(self.trainer, *self.fixed, i)
        synchronize(self.device)
        return time.perf_counter() - start, 0.0

    def data_alone(self) -> tuple[float, float]:
        start, stream = time.perf_counter(), forever(self.views)  # a new stream: nothing is filled ahead
        for _ in range(self.steps):
            next(stream)
        synchronize(self.device)
        seconds = time.perf_counter() - start
        stream.close()
        return seconds, 0.0

    def together(self) -> tuple[float, float]:
        start, waited = time.perf_counter(), 0.0
        for i in range(self.steps):
            clock = time.perf_counter()
            x1, x2 = next(self.stream)
            waited += time.perf_counter() - clock
            train_step(self.trainer, x1, x2, i)
        synchronize(self.device)
        return time.perf_counter() - start, waited

    def augmentation(self) -> float:
        """Seconds per batch for the part of the augmentation that runs on the device."""
        batch = next(self.views.batches(0))
        self.views.finish(batch)
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(10):
            self.views.finish(batch)
        synchronize(self.device)
        return (time.perf_counter() - start) / 10


def copy_rate(device: torch.device) -> float:
    """Bytes that a copy of 2 GiB reads and writes per second."""
    x = torch.empty(1 << 31, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    seconds = []
    for _ in range(12):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        y.copy_(x)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * x.numel() / statistics.median(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=Path, help='images (default: generated JPEGs, four batches)')
    parser.add_argument('--model', default='simsiam_resnet50')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--size', type=int, default=224, help='pixels')
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--steps', type=int, default=2, help='per round')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--amp', default='auto')
    parser.add_argument('--compile', action='store_true')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        images = FolderImages(args.folder or make_jpegs(Path(made), 4 * args.batch))
        bench = Bench(args, images)
        tasks = {'step alone': bench.step_alone, 'data alone': bench.data_alone, 'together': bench.together}
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
        for _ in range(args.rounds + 1):  # the first round is warm-up
            for name, task in tasks.items():
                spent[name].append(task())
        n = args.batch * args.steps
        card = torch.cuda.get_device_name(bench.device) if bench.device.type == 'cuda' else f'{os.cpu_count()} cores'
        print(f'{args.model}, {args.size} px, batch {args.batch}, amp {bench.amp}, {args.workers} threads for data, '
              f'{card}, torch {torch.__version__},\nload {os.getloadavg()[0]:.1f}; medians of {args.rounds} rounds of '
              f'{args.steps} steps')
        median = {name: statistics.median(s for s, _ in times[1:]) for name, times in spent.items()}
        for name, seconds in median.items():
            print(f'{name:12}{n / seconds:10.1f} samples/s')
        # Compares within a round, so that a busy moment of the machine affects both.
        pairs = zip(spent['step alone'][1:], spent['together'][1:], strict=True)
        cost = statistics.median(both / alone for (alone, _), (both, _) in pairs)
        waiting = statistics.median(w / s for s, w in spent['together'][1:])
        print(f'data on top of the step: {100 * (cost - 1):+.1f} %; waiting for data: {100 * waiting:.1f} %')
        if bench.device.type == 'cuda':
            rate, step = copy_rate(bench.device), median['step alone'] / args.steps
            print(f'augmentation on the card: {100 * bench.augmentation() / step:.1f} % of the step')
            step *= 1e3
            low, high = (args.batch * 2 * mb * 1e9 * (args.size / 224) ** 2 / rate for mb in MB_PER_VIEW)  # ms
            print(f'copy rate {rate / 1e12:.2f} TB/s: a step takes at least {low:.0f} to {high:.0f} ms; it took '
                  f'{step:.0f} ms ({100 * low / step:.0f} to {100 * high / step:.0f} % of what memory allows)')
            print(f'peak memory {torch.cuda.max_memory_allocated(bench.device) / 2**30:.1f} GiB')


if __name__ == '__main__':
    main()
