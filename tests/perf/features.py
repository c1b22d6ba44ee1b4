"""Features per second: reading alone, the forward pass alone, and both together as `extract` runs them.

  OMP_NUM_THREADS=1 python tests/perf/features.py                     one core computes, the other one reads
  python tests/perf/features.py --device cuda --images 8192 --rounds 3

All times come from one interleaved run over generated JPEGs (tests/perf/data.py). The forward pass is the slower part
for ResNet-50, and reading is for a tiny network on small crops. At best, both together take as long as the slower part
alone. Together they need two cores, each alone needs one: on a loaded machine, compare processor times, not the clock.
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
from data import make_jpegs

from simsiam_models.benchmarks import features
from simsiam_models.benchmarks.backbone import load_backbone
from simsiam_models.data import FolderImages
from simsiam_models.data.evaluation import EvalImages, Transform


def tasks(
    images: FolderImages, name: str, size: int, workers: int, device: torch.device, amp: str,
) -> dict[str, Callable]:
    backbone, transform = load_backbone(f'{name}:random', device), Transform(round(size * 8 / 7), size)
    model = features.FeatureModel(backbone, amp, transform.crop)
    batch = features.CPU_BATCH if device.type == 'cpu' else 256
    batches = np.split(np.arange(len(images)), range(batch, len(images), batch))
    pixels = [x for _, x in EvalImages(images, batches[:4], transform, 0, device)]

    def reading() -> None:
        for _ in EvalImages(images, batches, transform, workers, device):
            pass

    def forward() -> None:
        for i in range(len(batches)):
            model(pixels[i % len(pixels)][:len(batches[i])], ['avgpool'])['avgpool'].cpu()

    def together() -> None:
        with tempfile.TemporaryDirectory() as cache:
            extraction = features.Extraction(cache, workers=workers, amp=amp)
            features.extract(backbone, images, ['avgpool'], transform, extraction)

    return {'reading alone': reading, 'forward alone': forward, 'extract': together}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--models', nargs='+', default=['simsiam_resnet50:224', 'lcnet_035:64'], metavar='NAME:PIXELS')
    parser.add_argument('--images', type=int, default=256)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--amp', default='off')
    args = parser.parse_args()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as made, open(os.devnull, 'w') as sys.stderr:
        images = FolderImages(make_jpegs(Path(made), args.images))
        for model in args.models:
            name, size = model.split(':')
            spent: dict[str, list[float]] = {}
            processors: dict[str, list[float]] = {}
            for _ in range(1 + args.rounds):
                for task, run in tasks(images, name, int(size), args.workers, device, args.amp).items():
                    start, begun = time.perf_counter(), time.process_time()
                    run()
                    if device.type == 'cuda':
                        torch.cuda.synchronize(device)
                    spent.setdefault(task, []).append(time.perf_counter() - start)
                    processors.setdefault(task, []).append(time.process_time() - begun)
            spent = {task: times[1:] for task, times in spent.items()}
            slower = [max(a, b) for a, b in zip(spent['reading alone'], spent['forward alone'], strict=True)]
            shares = [s / t for s, t in zip(slower, spent['extract'], strict=True)]
            print(f'{name} on {size} px, {args.images} images, {args.device}, {torch.get_num_threads()} torch threads, '
                  f'{args.workers} workers, amp {args.amp}, torch {torch.__version__}; medians of {args.rounds} '
                  f'interleaved rounds; load average at the end {os.getloadavg()[0]:.1f}')
            for task, times in spent.items():
                print(f'{task:16}{args.images / statistics.median(times):9.1f} images/s '
                      f'({args.images / max(times):.1f} .. {args.images / min(times):.1f})')
            print(f'extract / slower of the two alone, round by round: median {statistics.median(shares):.3f} '
                  f'({min(shares):.3f} .. {max(shares):.3f})')
            needed = {task: statistics.median(times[1:]) for task, times in processors.items()}
            extra = needed['extract'] / (needed['reading alone'] + needed['forward alone']) - 1
            print(f'processor time of extract beyond the sum of the two: {100 * extra:+.1f} %')


if __name__ == '__main__':
    main()
