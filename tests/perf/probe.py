"""Times an epoch of `simsiam linear --protocol auto` beside one that sends every image through the backbone.

  python tests/perf/probe.py                                     ResNet-50, 224 px, 1000 classes, one thread
  python tests/perf/probe.py --model resnet18 --images 128 --rounds 9

Milliseconds per image, from one interleaved run:
images     JPEG file (500x375, about 110 KB) -> random resized crop -> frozen backbone -> step of one classifier, as in
           each epoch of the published protocols (training.train_one_epoch; the batch of 4096 is cut to the images)
cached     a step on cached features: the grid of 16 classifiers together, and one classifier alone

Both are proportional to the number of images, so the ratio holds for ImageNet's 1,281,167; the hours are that product,
not measured. The features are random numbers of the backbone's width: their values do not affect the time.
"""
import argparse
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from data import make_jpegs

from simsiam_models.benchmarks.backbone import Backbone, load_backbone
from simsiam_models.benchmarks.linear import probe_fit
from simsiam_models.benchmarks.linear.frozen import FrozenBackbone
from simsiam_models.benchmarks.linear.probe_features import ScaledFeatures, compute_moments
from simsiam_models.benchmarks.linear.probe_fit import AutoProbe, train_grid
from simsiam_models.benchmarks.linear.protocol import ChosenProtocol
from simsiam_models.benchmarks.linear.training import KEYS, LinearRun, train_one_epoch
from simsiam_models.benchmarks.protocols import LINEAR
from simsiam_models.data import FolderImages
from simsiam_models.runtime.distributed import World, default_workers, synchronize
from simsiam_models.runtime.lifecycle import Lifecycle
from simsiam_models.runtime.messages import silent
from simsiam_models.runtime.signals import Signals

IMAGENET = 1_281_167
BAR = 50
MEMBERS = [(lr, wd) for lr in AutoProbe().lrs for wd in AutoProbe().weight_decays]
GRID = f'cached: {len(MEMBERS)} classifiers'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='simsiam_resnet50')
    parser.add_argument('--images', type=int, default=64, help='JPEGs of an epoch through the backbone')
    parser.add_argument('--rows', type=int, default=2048, help='cached features of an epoch')
    parser.add_argument('--classes', type=int, default=1000)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    backbone = load_backbone(f'{args.model}:random', device)
    with tempfile.TemporaryDirectory() as folder:
        tasks = {'images: files, backbone, one classifier': make_epoch(args, backbone, Path(folder))}
        tasks |= make_cached_epochs(args, backbone.num_features, device)
        seconds = measure(tasks, args.rounds, device)
    where = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{args.threads} thread(s)'
    print(f'{args.model}, {backbone.num_features} features, {args.classes} classes; {where}, '
          f'{platform.processor() or platform.machine()}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}; '
          f'medians of {args.rounds} interleaved rounds, {args.images} images and {args.rows} rows')
    report(seconds)


def make_epoch(args: argparse.Namespace, backbone: Backbone, folder: Path) -> Callable[[], int]:
    """An epoch of protocol fair; like the others, it returns the number of images."""
    images = FolderImages(make_jpegs(folder / 'jpegs', args.images))
    pair = SimpleNamespace(train=images, test=images, classes=args.classes, name='jpegs')
    device = torch.device(args.device)
    life = Lifecycle(folder / 'x.pth', KEYS, World(0, 1, device), Signals(), silent)
    run = LinearRun(
        ChosenProtocol(LINEAR['fair'], {}), FrozenBackbone(backbone, LINEAR['fair'], device), pair, life,
        workers=default_workers(device), identity={})
    epochs = itertools.count(1)

    def train_epoch() -> int:
        train_one_epoch(run, next(epochs), 0)
        return args.images
    return train_epoch


def make_cached_epochs(args: argparse.Namespace, dim: int, device: torch.device) -> dict[str, Callable[[], int]]:
    """An epoch of the whole grid, and one of its first member."""
    rng = np.random.default_rng(0)
    features = ScaledFeatures(
        rng.normal(0, 1, (args.rows, dim)).astype(np.float32), rng.integers(args.classes, size=args.rows), device)
    features.scale_by(*compute_moments(features.array))
    p = AutoProbe(epochs=1)
    probe_fit.choose_batch_size = lambda n, p: min(n, p.batch_size)  # as for ImageNet; smaller for few images

    def train(members: list[tuple[float, float]]) -> int:
        train_grid(features, np.arange(args.rows), args.classes, members, p)
        return args.rows

    return {GRID: lambda: train(MEMBERS), 'cached: one classifier': lambda: train(MEMBERS[:1])}


def measure(tasks: dict[str, Callable[[], int]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Returns the seconds per image of each task in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds + 1):
        for name, task in tasks.items():
            started = time.perf_counter()
            n = task()
            synchronize(device)
            seconds[name].append((time.perf_counter() - started) / n)
    return {name: times[1:] for name, times in seconds.items()}  # the first round warms up


def report(seconds: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first, grid = next(iter(medians.values())), medians[GRID]
    print(f'{"":42}{"ms/image":>10}{"(least .. most)":>22}{"ratio":>8}{"hours for ImageNet (product)":>30}')
    for name, times in seconds.items():
        m = medians[name]
        print(f'{name:42}{1e3 * m:10.3f}{f"({1e3 * min(times):.3f} .. {1e3 * max(times):.3f})":>22}'
              f'{first / m:8.1f}{m * IMAGENET / 3600:30.2f}')
    print(f'bar: an epoch of the grid at least {BAR} x as fast: {"met" if first / grid >= BAR else "NOT met"} '
          f'({first / grid:.1f} x)')
    hours, epochs = first * IMAGENET / 3600, LINEAR['fair'].epochs
    print(f'whole, as products: fair {epochs} x {hours:.1f} h = {epochs * hours:.0f} h; '
          f'auto one pass {hours:.1f} h + {AutoProbe().epochs} x {grid * IMAGENET / 3600:.2f} h')


if __name__ == '__main__':
    main()
