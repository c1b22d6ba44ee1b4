"""Times the training step alone, the data alone, and both together; on a GPU also the bound set by its memory.

  python tests/perf/together.py                                      CPU: ResNet-50, 224 px, batch 16, generated JPEGs
  python tests/perf/together.py --device cuda --batch 512 --workers 16 --steps 20 --compile

All three are measured in one interleaved run. Prints samples (pairs of views) per second, the time spent waiting for
data, and the cost of data on top of the step. On CUDA, also prints the share of the augmentation in the step, the copy
rate of the card, and the shortest possible step: ResNet-50 moves 380 to 480 MB per 224-pixel view, forward and
backward, so a pair takes at least twice that divided by the copy rate.
"""
import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from data import make_jpegs
from torch import Tensor

from simsiam_models.data import Images, MemoryImages, TwoViews, open_data
from simsiam_models.data.augment import finish
from simsiam_models.runtime.distributed import World, synchronize
from simsiam_models.runtime.precision import choose_amp
from simsiam_models.training.recipes import RECIPES, Recipe
from simsiam_models.training.setup import make_model
from simsiam_models.training.step import Perf, Trainer, time_step, train_step

MB_PER_VIEW = (380, 480)  # activations of ResNet-50 at 224 px, forward and backward


def forever(views: TwoViews) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while True:
        yield from views.epoch(epoch)
        epoch += 1


class Repeated:
    """Images, again and again, so that there are `least` of them."""

    def __init__(self, images: Images, least: int) -> None:
        self.images, self.n = images, max(least, len(images))
        self.name, self.labels, self.classes, self.digest = images.name, None, [], images.digest

    def __len__(self) -> int:
        return self.n

    def read(self, index: int) -> np.ndarray:
        return self.images.read(index % len(self.images))


def open_images(source: Path | None, made: Path, batch: int) -> Repeated:
    """64 batches of images, or more: of anything that `simsiam pretrain` reads, or of generated JPEGs."""
    return Repeated(open_data(str(source or make_jpegs(made, min(256, 4 * batch))))[0], 64 * batch)


def make_noise(n: int, size: int) -> MemoryImages:
    """Small images in memory, as CIFAR's."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)
    return MemoryImages(pixels, None, [], f'{n} images of noise')


class Bench:
    """The timed tasks: each does `steps` steps and returns its seconds and those it waited for data."""

    def __init__(
        self, images: Images, recipe: Recipe, device: str, *, workers: int, steps: int, amp: str = 'auto',
        perf: Perf = Perf(),  # noqa: B008 - frozen
    ) -> None:
        self.device, self.steps, self.batch = torch.device(device), steps, recipe.batch_size
        model = make_model(recipe, 0).to(self.device, memory_format=perf.memory_format)
        shape = (self.batch, 3, recipe.augmentation.size, recipe.augmentation.size)
        self.amp = choose_amp(amp, self.device, model, shape)
        if perf.compile:
            model.compile()
        self.trainer = Trainer(model.train(), recipe, World(0, 1, self.device), self.amp, perf)
        self.views = TwoViews(images, recipe.augmentation, self.batch, device=self.device, workers=workers)
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
        """Seconds per batch for the part of the augmentation that runs on the device; 0 if the kernel does it all."""
        batch = next(self.views.batches(0))
        x, sent = self.views._copy(batch)
        if sent is None:
            return 0.0
        return median_time(lambda *_: finish(x, sent, self.views._colours), (x, x))

    def measure(self, rounds: int) -> dict[str, Any]:
        """Returns samples per second of each task, the share of waiting, the cost of data, and on a card the rest."""
        tasks = {'step alone': self.step_alone, 'data alone': self.data_alone, 'together': self.together}
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
        for _ in range(rounds + 1):  # the first round is warm-up
            for name, task in tasks.items():
                spent[name].append(task())
        median = {name: statistics.median(s for s, _ in times[1:]) for name, times in spent.items()}
        # Compares within a round, so that a busy moment of the machine affects both.
        pairs = zip(spent['step alone'][1:], spent['together'][1:], strict=True)
        found = {
            'amp': self.amp, 'perf': str(self.trainer.perf), 'rounds': rounds, 'steps': self.steps,
            'samples_per_s': {name: self.batch * self.steps / s for name, s in median.items()},
            'waiting': statistics.median(w / s for s, w in spent['together'][1:]),
            'cost_of_data': statistics.median(both / alone for (alone, _), (both, _) in pairs) - 1,
            'step_s': median['step alone'] / self.steps}
        found['augmentation_s'] = self.augmentation()
        if self.device.type == 'cuda':
            found['peak_bytes'] = torch.cuda.max_memory_allocated(self.device)
        return found


def median_time(call: Callable[[Tensor, Tensor], object], on: tuple[Tensor, Tensor]) -> float:
    """Median seconds of ten calls on two tensors, after two that warm up."""
    return statistics.median([time_step(call, on) for _ in range(12)][2:])


def copy_rate(device: torch.device, size: int = 1 << 31) -> float:
    """Bytes that a copy of `size` bytes reads and writes per second."""
    x = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * size / median_time(lambda source, target: target.copy_(source), (x, y))


def memory_bound(batch: int, size: int, rate: float) -> tuple[float, float]:
    """Seconds of the shortest possible step of ResNet-50, for the lower and the higher count of its bytes."""
    return tuple(batch * 2 * mb * 1e6 * (size / 224) ** 2 / rate for mb in MB_PER_VIEW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=Path, help='images, or whatever simsiam pretrain reads (default: JPEGs)')
    parser.add_argument('--recipe', choices=RECIPES, default='in1k_bs512_ep100')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--size', type=int, default=224, help='pixels')
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--steps', type=int, default=2, help='per round')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--amp', default='auto')
    parser.add_argument('--compile', action='store_true')
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    recipe = dataclasses.replace(
        recipe, batch_size=args.batch, augmentation=dataclasses.replace(recipe.augmentation, size=args.size))
    with tempfile.TemporaryDirectory() as made:
        images = open_images(args.folder, Path(made), args.batch)
        bench = Bench(
            images, recipe, args.device, workers=args.workers, steps=args.steps, amp=args.amp,
            perf=Perf(compile=args.compile))
        found = bench.measure(args.rounds)
        card = torch.cuda.get_device_name(bench.device) if bench.device.type == 'cuda' else f'{os.cpu_count()} cores'
        print(f'{recipe.model}, {args.size} px, batch {args.batch}, amp {bench.amp}, {args.workers} threads for data, '
              f'{card}, torch {torch.__version__},\nload {os.getloadavg()[0]:.1f}; medians of {args.rounds} rounds of '
              f'{args.steps} steps')
        for name, rate in found['samples_per_s'].items():
            print(f'{name:12}{rate:10.1f} samples/s')
        print(f'data on top of the step: {100 * found["cost_of_data"]:+.1f} %; waiting for data: '
              f'{100 * found["waiting"]:.1f} %')
        if bench.device.type == 'cuda':
            step, rate = found['step_s'], copy_rate(bench.device)
            print(f'augmentation on the card: {100 * found["augmentation_s"] / step:.1f} % of the step')
            low, high = memory_bound(args.batch, args.size, rate)
            print(f'copy rate {rate / 1e12:.2f} TB/s: a step takes at least {1e3 * low:.0f} to {1e3 * high:.0f} ms; it '
                  f'took {1e3 * step:.0f} ms ({100 * low / step:.0f} to {100 * high / step:.0f} % of what memory '
                  'allows)')
            print(f'peak memory {found["peak_bytes"] / 2**30:.1f} GiB')


if __name__ == '__main__':
    main()
