"""The data pipeline against FAIR's (the paper's), Albumentations and DALI on the same JPEG files, interleaved.

  python tests/perf/data.py                       the ImageNet photographs of SIMSIAM_TEST_DATA, or generated JPEGs
  python tests/perf/data.py --folder IMAGES --rounds 9
  taskset -c 0 python tests/perf/data.py          one core: all threads and processes share it

Prints medians over the rounds and their ratios. A sample is one file, read and decoded, and two finished 224-px views.
CPU time is stated where all work is done in this process, that is, with 0 workers; on a machine with other load, only
its ratios mean something. Albumentations and DALI take part if they are installed (albumentations; nvidia-dali-cuda130,
which runs on a CPU, too).
"""
import argparse
import os
import platform
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from simsiam_models.data import Augmentation, FolderImages, TwoViews, kernel  # noqa: E402
from simsiam_models.data.augment import draw  # noqa: E402
from simsiam_models.data.readers.decode import decode  # noqa: E402

BATCH, PAPER = 64, "paper's pipeline"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_jpegs(folder: Path, n: int) -> Path:
    """Crops of scikit-learn's two photographs with noise: n files of 500x375 or 375x500, about 110 KB each.

    Every fourth is 4:2:0, the others 4:4:4, as in ImageNet.
    """
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
        noisy = np.asarray(photo) + rng.normal(0, rng.uniform(5, 13), (height, width, 3))
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        image.save(folder / 'images' / f'{i:05}.jpg', quality=93, subsampling=0 if i % 4 else 2)
    return folder


def find_jpegs(folder: Path) -> Path:
    """Unpacks the real photographs into `folder`; generates 512 files where there are none."""
    tar = Path(os.environ.get('SIMSIAM_TEST_DATA', ROOT.parent / 'shared' / 'data')) / 'imagenet400.tar'
    if not tar.is_file():
        return make_jpegs(folder, 512)
    with tarfile.open(tar) as f:
        f.extractall(folder / 'images', filter='data')
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
        transforms.Normalize(MEAN, STD)])
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


def read_by_opencv(path: str) -> np.ndarray:
    import cv2

    return cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)


class TakeImage:
    """Albumentations' calling convention as a plain function of an image."""

    def __init__(self, chain: Callable) -> None:
        self.chain = chain

    def __call__(self, image: np.ndarray) -> torch.Tensor:
        return self.chain(image=image)['image']


def albumentations(folder: Path, workers: int) -> Callable[[int], int]:
    """The same list from Albumentations' operators, with the antialiased resize (INTER_AREA) of the others."""
    import albumentations as A
    import cv2
    from albumentations.pytorch import ToTensorV2

    cv2.setNumThreads(0)
    chain = A.Compose([
        A.RandomResizedCrop((224, 224), scale=(0.2, 1.0), interpolation=cv2.INTER_AREA),
        A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=0.8), A.ToGray(p=0.2),
        A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5), A.HorizontalFlip(p=0.5),
        A.Normalize(MEAN, STD), ToTensorV2()])
    images = datasets.ImageFolder(str(folder), Twice(TakeImage(chain)), loader=read_by_opencv)
    loader = DataLoader(
        images, BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0)
    return lambda _: sum(len(x1) for (x1, _), _ in loader)


def dali(folder: Path, workers: int) -> Callable[[int], int]:
    """The same list from DALI's operators on the CPU, one order of the colours; it decodes once for both views."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=BATCH, num_threads=max(1, workers), device_id=None)
    def chain() -> tuple:
        files, _ = fn.readers.file(file_root=str(folder), random_shuffle=True, name='files')
        image = fn.decoders.image(files, device='cpu')
        return tuple(view(image) for _ in range(2))

    def view(image: object) -> object:
        def uniform(low: float, high: float, p: float = 1, otherwise: float = 0) -> object:
            on = fn.random.coin_flip(probability=p)
            return on * fn.random.uniform(range=(low, high)) + (1 - on) * otherwise

        x = fn.random_resized_crop(image, size=224, random_area=(0.2, 1.0))
        jitter = fn.random.coin_flip(probability=0.8)
        colour = fn.random.coin_flip(probability=0.8)  # gray: no saturation
        factor = [jitter * fn.random.uniform(range=(0.6, 1.4)) + (1 - jitter) for _ in range(3)]
        x = fn.color_twist(
            x, brightness=factor[0], contrast=factor[1], saturation=factor[2] * colour,
            hue=jitter * fn.random.uniform(range=(-36.0, 36.0)))
        x = fn.gaussian_blur(x, sigma=uniform(0.1, 2.0, 0.5, 1e-3))
        return fn.crop_mirror_normalize(
            x, mirror=fn.random.coin_flip(), mean=[255 * m for m in MEAN], std=[255 * s for s in STD],
            output_layout='CHW')

    pipeline = chain()
    pipeline.build()
    steps = pipeline.epoch_size('files') // BATCH
    return lambda _: BATCH * len([pipeline.run() for _ in range(steps)])


def interleaved(tasks: dict[str, Callable[[int], int]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median wall and CPU seconds per sample; a first round starts workers, fills caches, and does not count."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    for epoch in range(rounds + 1):
        for name, run in tasks.items():
            wall, cpu = time.perf_counter(), time.process_time()
            n = run(epoch)
            seconds[name].append(((time.perf_counter() - wall) / n, (time.process_time() - cpu) / n))
    return {name: tuple(map(statistics.median, zip(*s[1:], strict=True))) for name, s in seconds.items()}


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
        sys.exit('the kernel is not built here, so there is nothing to compare')
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or find_jpegs(Path(made))
        images = FolderImages(folder)
        size = sum(images.path(i).stat().st_size for i in range(len(images))) / len(images)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        print(f'{platform.processor() or platform.machine()}, {cores} cores, load {os.getloadavg()[0]:.1f}, '
              f'torch {torch.__version__}; {len(images)} files of {size / 1e3:.0f} kB; medians of {args.rounds} rounds')
        for workers in args.workers:
            tasks = {
                PAPER: papers(folder, workers), 'ours, complete': ours(images, workers, False),
                'ours, decode and two uint8 crops': ours(images, workers, True)}
            for name, make in {'albumentations': albumentations, 'dali': dali}.items():
                with suppress(ImportError):
                    tasks[name] = make(folder, workers)
            m = interleaved(tasks, args.rounds)
            print(f'\n{workers} workers                            samples/s   ms/sample  ratio' + (
                '' if workers else '      CPU ms  ratio'))
            for name, (wall, cpu) in m.items():
                print(f'{name:36}{1 / wall:11.0f}{1e3 * wall:12.2f}{m[PAPER][0] / wall:7.2f}' + (
                    '' if workers else f'{1e3 * cpu:12.2f}{m[PAPER][1] / cpu:7.2f}'))
        print('\nstages, one thread                   ms/sample      CPU ms')
        for name, (wall, cpu) in interleaved(stages(images), args.rounds).items():
            print(f'{name:36}{1e3 * wall:10.3f}{1e3 * cpu:12.3f}')


if __name__ == '__main__':
    main()
