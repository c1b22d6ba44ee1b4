"""Samples per second of the data pipeline and of the paper's own on the same JPEG files, from one interleaved run.

  python tests/perf/data.py                       512 generated JPEGs (500x375, about 110 KB), 0 and 2 workers
  python tests/perf/data.py --folder IMAGES --rounds 9

Prints medians over the rounds and their ratios. A sample is one file, read and decoded, and two finished 224-px views.
"""
import argparse
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from simsiam_models.data import Augmentation, FolderImages, TwoViews, kernel  # noqa: E402
from simsiam_models.data.augment import draw  # noqa: E402
from simsiam_models.data.readers.decode import decode  # noqa: E402

BATCH, PAPER = 64, "paper's pipeline"


def make_jpegs(folder: Path, n: int) -> Path:
    """Crops of scikit-learn's two photographs with noise: n files of 500x375 or 375x500, 4:2:0, about 110 KB each."""
    from sklearn.datasets import load_sample_image

    photos = [Image.fromarray(load_sample_image(name)) for name in ('china.jpg', 'flower.jpg')]
    rng = np.random.default_rng(0)
    (folder / 'images').mkdir(parents=True)
    for i in range(n):
        photo = photos[i % 2]
        width, height = (500, 375) if rng.random() < 0.8 else (375, 500)
        w = int(min(photo.width, photo.height * width / height) * rng.uniform(0.5, 1))
        h = w * height // width
        left, top = int(rng.integers(photo.width - w + 1)), int(rng.integers(photo.height - h + 1))
        photo = photo.crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.BICUBIC)
        noisy = np.asarray(photo) + rng.normal(0, rng.uniform(8, 18), (height, width, 3))
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        image.save(folder / 'images' / f'{i:05}.jpg', quality=93, subsampling=2)
    return folder


class Blur:
    """PIL's Gaussian blur with sigma uniform in 0.1 .. 2 (SimCLR, and SimSiam's released code)."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class Twice:
    def __init__(self, transform: Callable) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        return [self.transform(image), self.transform(image)]


def papers_pipeline(folder: Path, workers: int) -> DataLoader:
    """The paper's augmentation from torchvision's own operators on PIL images, as its released code runs them."""
    transform = transforms.Compose([
        transforms.RandomResizedCrop(224, scale=(0.2, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(0.2),
        transforms.RandomApply([Blur()], p=0.5),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    images: Dataset = datasets.ImageFolder(str(folder), Twice(transform))
    return DataLoader(
        images, BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0)


def ours(images: FolderImages, workers: int, crops_only: bool) -> Callable[[int], int]:
    views = TwoViews(images, Augmentation(), BATCH, workers=workers, on_device=crops_only)

    def run(epoch: int) -> int:
        return BATCH * sum(1 for _ in (views.batches(epoch) if crops_only else views.epoch(epoch)))

    return run


def papers(folder: Path, workers: int) -> Callable[[int], int]:
    loader = papers_pipeline(folder, workers)
    return lambda _: sum(len(x1) for (x1, _), _ in loader)


def interleaved(tasks: dict[str, Callable[[int], int]], rounds: int) -> dict[str, float]:
    """Median seconds per sample; a first round starts workers, fills caches, and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for epoch in range(rounds + 1):
        for name, run in tasks.items():
            start = time.perf_counter()
            n = run(epoch)
            seconds[name].append((time.perf_counter() - start) / n)
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}


def stages(images: FolderImages, n: int = 128) -> dict[str, Callable[[int], int]]:
    """The steps of one sample, each timed alone in one thread."""
    aug, n = Augmentation(), min(n, len(images))
    files = [bytearray(images.path(i).read_bytes()) for i in range(n)]
    decoded = [decode(f, '') for f in files]
    u, table = (np.concatenate(x) for x in zip(
        *((u, p.table()) for u, p in (draw(aug, 0, 0, np.arange(n), view) for view in (0, 1))), strict=True))
    both, rows = decoded + decoded, np.arange(2 * n)
    crops, floats = np.zeros((2 * n, 224, 224, 3), np.uint8), np.zeros((2 * n, 224, 224, 3), np.float32)

    def each(call: Callable[[int], object]) -> Callable[[int], int]:
        return lambda _: len([call(i) for i in range(n)])

    def once(call: Callable[[], object]) -> Callable[[int], int]:
        return lambda _: (call(), n)[1]

    return {
        'read': each(lambda i: images.path(i).read_bytes()),
        'decode': each(lambda i: decode(files[i], '')),
        'draw': once(lambda: [draw(aug, 0, 0, np.arange(n), view) for view in (0, 1)]),
        'two crops': once(lambda: kernel.cut_views(both, u, aug.rule(), None, crops, rows)),
        'two crops, finished': once(lambda: kernel.cut_views(both, u, aug.rule(), table, floats, rows))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=Path, help='one or more subfolders of images (default: 512 generated JPEGs)')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--workers', type=int, nargs='+', default=[0, 2])
    args = parser.parse_args()
    if kernel.load_library() is None:
        sys.exit('the kernel cannot be compiled here, so there is nothing to compare')
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or make_jpegs(Path(made), 512)
        images = FolderImages(folder)
        size = sum(images.path(i).stat().st_size for i in range(len(images))) / len(images)
        print(f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, '
              f'torch {torch.__version__}; {len(images)} files of {size / 1e3:.0f} kB; medians of {args.rounds} rounds')
        for workers in args.workers:
            m = interleaved({
                PAPER: papers(folder, workers), 'ours, complete': ours(images, workers, False),
                'ours, decode and two uint8 crops': ours(images, workers, True)}, args.rounds)
            print(f'\n{workers} workers                            samples/s   ms/sample  ratio')
            for name, seconds in m.items():
                print(f'{name:36}{1 / seconds:11.0f}{1e3 * seconds:12.2f}{m[PAPER] / seconds:7.2f}')
        print('\nstages, one thread                   ms/sample')
        for name, seconds in interleaved(stages(images), args.rounds).items():
            print(f'{name:36}{1e3 * seconds:10.3f}')


if __name__ == '__main__':
    main()
