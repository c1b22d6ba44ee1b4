"""What an epoch of `simsiam linear --protocol auto` costs beside one that sends every image through the backbone again.

  python tests/perf/probe.py                                     ResNet-50, 224 px, 1000 classes, one thread
  python tests/perf/probe.py --model resnet18 --images 128 --rounds 9

per image, from one interleaved run:
again      JPEG file (500x375, about 110 KB) -> random resized crop -> frozen backbone -> step of one classifier, as the
           published protocols do each epoch (linear_training.LinearRun, batch 4096 cut to the images that there are)
cached     the probe's step on cached features: its grid of 16 classifiers together, and one classifier alone

Both are proportional to the number of images, so the ratio holds for ImageNet's 1,281,167; the hours are that product,
not measured. Features are random numbers of the backbone's width: their values cost nothing.
"""
import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from data import make_jpegs

from simsiam_models.benchmarks.backbone import load_backbone
from simsiam_models.benchmarks.linear.command import PROTOCOLS, probe
from simsiam_models.benchmarks.linear.probe import AutoProbe, Table, moments, train
from simsiam_models.benchmarks.linear.training import LinearRun
from simsiam_models.data import FolderImages
from simsiam_models.runtime.distributed import World

IMAGENET = 1_281_167
BAR = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='simsiam_resnet50')
    parser.add_argument('--images', type=int, default=64, help='JPEGs of a pass through the backbone')
    parser.add_argument('--rows', type=int, default=2048, help='cached features of an epoch')
    parser.add_argument('--classes', type=int, default=1000)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    backbone = load_backbone(f'{args.model}:random', device)
    rng = np.random.default_rng(0)
    table = Table(
        rng.normal(0, 1, (args.rows, backbone.num_features)).astype(np.float32),
        rng.integers(args.classes, size=args.rows), device)
    table.scale_by(*moments(table.array))
    p = AutoProbe(epochs=1)
    grid = [(lr, wd) for lr in p.lrs for wd in p.weight_decays]
    probe.steps_batch = lambda n, p: min(n, p.batch_size)  # as of ImageNet's images; of few it takes smaller batches

    with tempfile.TemporaryDirectory() as made:
        images = FolderImages(make_jpegs(Path(made) / 'jpegs', args.images))
        pair = SimpleNamespace(train=images, test=images, classes=args.classes, name='jpegs')
        run = LinearRun(
            PROTOCOLS['fair'], 'fair', backbone, pair, World(0, 1, device), 0, 'off', None, None, Path(made) / 'x.pth',
            {}, say=lambda text: None)

        def again() -> int:
            run.epoch += 1
            run.step = 0
            run._train_epoch()
            return args.images

        def cached(members: list[tuple[float, float]]) -> int:
            train(table, np.arange(args.rows), args.classes, members, p)
            return args.rows

        tasks = {
            'again: files, backbone, one classifier': again,
            f'cached: {len(grid)} classifiers': lambda: cached(grid),
            'cached: one classifier': lambda: cached(grid[:1])}
        seconds: dict[str, list[float]] = {name: [] for name in tasks}
        for _ in range(args.rounds + 1):  # the first round does not count
            for name, task in tasks.items():
                started = time.perf_counter()
                n = task()
                if device.type == 'cuda':
                    torch.cuda.synchronize(device)
                seconds[name].append((time.perf_counter() - started) / n)

    where = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{args.threads} thread(s)'
    print(f'{args.model}, {backbone.num_features} features, {args.classes} classes; {where}, '
          f'{platform.processor() or platform.machine()}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}; '
          f'medians of {args.rounds} interleaved rounds, {args.images} images and {args.rows} rows')
    first = statistics.median(seconds['again: files, backbone, one classifier'][1:])
    print(f'{"":42}{"ms/image":>10}{"(least .. most)":>22}{"ratio":>8}{"hours for ImageNet (product)":>30}')
    for name, times in seconds.items():
        m = statistics.median(times[1:])
        print(f'{name:42}{1e3 * m:10.3f}{f"({1e3 * min(times[1:]):.3f} .. {1e3 * max(times[1:]):.3f})":>22}'
              f'{first / m:8.1f}{m * IMAGENET / 3600:30.2f}')
    m = statistics.median(seconds[f'cached: {len(grid)} classifiers'][1:])
    epochs, grid_epochs = PROTOCOLS['fair'].epochs, AutoProbe().epochs
    print(f'bar: an epoch of the grid at least {BAR} x as quick: {"met" if first / m >= BAR else "NOT met"} '
          f'({first / m:.1f} x)')
    hours = first * IMAGENET / 3600
    print(f'whole, as products: fair {epochs} x {hours:.1f} h = {epochs * hours:.0f} h; '
          f'auto one pass {hours:.1f} h + {grid_epochs} x {m * IMAGENET / 3600:.2f} h')


if __name__ == '__main__':
    main()
