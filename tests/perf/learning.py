"""What is learned from small pictures in equal time: the recipe `small`, FAIR's way of training and lightly's.

  python tests/perf/learning.py                              seeds 0, 1, 2; each way gets as long as the recipe takes
  python tests/perf/learning.py --seeds 0 --seconds 120      a budget for each way, our epochs fitted to it, too
  python tests/perf/learning.py --seeds 1 --epochs 25 13 11  the epochs of an earlier timing: load does not matter

DATA is a folder of CIFAR-10 as Parquet, by default cifar10 in $SIMSIAM_TEST_DATA (or ../shared/data): the first 1,000
training and 200 test pictures of each class. All ways train the recipe's network with its widths of the heads, batch,
rate, momentum and weight decay, in fp32, and are judged by one weighted kNN on all these pictures, k and T as in the
recipe.

ours       the recipe: kernel, train_step, constant rate of the predictor
FAIR       plain SimSiam in contiguous memory, torch's SGD, loss.item() after each step, and the paper's transforms
           (torchvision on PIL images, without blur) in a DataLoader
lightly    lightly's SimSiamTransform (without blur), heads (of three layers) and loss, if installed; torch's SGD, all
           rates decay

Steps of all ways with their data are timed first, in turns; FAIR and lightly take the faster number of workers. Each
way then trains as many epochs as fit the time, with a cosine of that length. Keep the machine quiet for the timing; the
training may take longer without any effect on its result.
"""
import argparse
import dataclasses
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from simsiam_models import simsiam_loss
from simsiam_models.data import MemoryImages, TwoViews, open_data
from simsiam_models.runtime.distributed import World, default_workers
from simsiam_models.training.monitor import KnnMonitor
from simsiam_models.training.recipes import RECIPES, Recipe
from simsiam_models.training.schedule import scaled_lr, set_lr
from simsiam_models.training.setup import make_model
from simsiam_models.training.step import Trainer, train_step

try:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
    from lightly.transforms import SimSiamTransform
    MISSING = ''
except ImportError as e:
    MISSING = str(e)

CPU = torch.device('cpu')
ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get('SIMSIAM_TEST_DATA', ROOT.parent / 'shared' / 'data')) / 'cifar10'
ROUNDS, WARM, TIMED = 3, 2, 8  # of the timing; steps in a round
WORKERS = 0, 2  # of the DataLoader of FAIR and lightly: both are timed
PER_CLASS = 1000, 200  # training and test pictures


@dataclasses.dataclass
class Way:
    """One way of training: the backbone, its optimizer, and a step on a batch of an endless or known loader."""

    backbone: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Tensor, Tensor], object]
    epoch: Callable[[int], Iterator[tuple[Tensor, Tensor]]]  # by number from 0


Build = Callable[[Recipe, MemoryImages, int, int], Way]  # the recipe, the pictures, the seed, the number of workers


class Pictures(Dataset):
    """Two views of a picture, as a transform makes them."""

    def __init__(self, images: MemoryImages, two_views: Callable[[Image.Image], list[Tensor]]) -> None:
        self.images, self.two_views = images, two_views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.two_views(Image.fromarray(self.images.read(index)))


def first_of_each_class(data: Path) -> list[MemoryImages]:
    """Returns the training and the test part, decoded."""
    parts = []
    for images, n in zip(open_data(str(data)), PER_CLASS, strict=False):
        if images is None or images.labels is None:
            sys.exit(f'{data} must hold a training and a test part with labels')
        rows = np.sort(np.concatenate([np.flatnonzero(images.labels == c)[:n] for c in np.unique(images.labels)]))
        parts.append(MemoryImages(
            np.stack([images.read(int(i)) for i in rows]), images.labels[rows], images.classes, images.name))
    return parts


def ours(recipe: Recipe, images: MemoryImages, seed: int, workers: int) -> Way:
    model = make_model(recipe, seed).train().to(memory_format=torch.channels_last)
    trainer = Trainer(model, recipe, World(0, 1, CPU), 'off', seed=seed)
    views = TwoViews(images, recipe.augmentation, recipe.batch_size, seed=seed, workers=default_workers(CPU))
    return Way(model.backbone, trainer.optimizer, lambda x1, x2: train_step(trainer, x1, x2), views.epoch)


def fair(recipe: Recipe, images: MemoryImages, seed: int, workers: int) -> Way:
    """Trains as the paper's released code does; the transforms have the paper's numbers, not the recipe's."""
    model = make_model(recipe, seed).train()
    optimizer = make_sgd(recipe, [
        dict(params=[*model.backbone.parameters(), *model.projector.parameters()], fix_lr=False),
        dict(params=model.predictor.parameters(), fix_lr=True)])
    transform = transforms.Compose([
        transforms.RandomResizedCrop(recipe.augmentation.size, scale=(0.2, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(0.2),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    loader = make_loader(Pictures(images, lambda x: [transform(x), transform(x)]), recipe, workers)

    def step(x1: Tensor, x2: Tensor) -> float:
        return take_step(optimizer, simsiam_loss(*model(x1, x2)))

    return Way(model.backbone, optimizer, step, lambda epoch: iter(loader))


def lightlys(recipe: Recipe, images: MemoryImages, seed: int, workers: int) -> Way:
    torch.manual_seed(seed)
    backbone = timm.create_model(recipe.model, num_classes=0, **recipe.model_args)
    projector = SimSiamProjectionHead(backbone.num_features, recipe.dim, recipe.dim)
    predictor = SimSiamPredictionHead(recipe.dim, recipe.pred_dim, recipe.dim)
    criterion, both = NegativeCosineSimilarity(), nn.ModuleList([backbone, projector, predictor]).train()
    optimizer = make_sgd(recipe, [dict(params=both.parameters(), fix_lr=False)])
    transform = SimSiamTransform(input_size=recipe.augmentation.size, gaussian_blur=0.0)
    loader = make_loader(Pictures(images, transform), recipe, workers)

    def step(x1: Tensor, x2: Tensor) -> float:
        z1, z2 = projector(backbone(x1)), projector(backbone(x2))
        p1, p2 = predictor(z1), predictor(z2)
        return take_step(optimizer, (criterion(p1, z2.detach()) + criterion(p2, z1.detach())) / 2)

    return Way(backbone, optimizer, step, lambda epoch: iter(loader))


def make_sgd(recipe: Recipe, groups: list[dict]) -> torch.optim.SGD:
    return torch.optim.SGD(groups, scaled_lr(recipe), momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def make_loader(pictures: Pictures, recipe: Recipe, workers: int) -> DataLoader:
    return DataLoader(
        pictures, recipe.batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)


def take_step(optimizer: torch.optim.SGD, loss: Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def seconds_per_step(way: Way) -> float:
    """Returns the median seconds of a step with its data; trains the network, so build it anew afterwards."""
    times, batches = [time.perf_counter()], itertools.chain.from_iterable(map(way.epoch, itertools.count()))
    for x1, x2 in itertools.islice(batches, WARM + TIMED):
        way.step(x1, x2)
        times.append(time.perf_counter())
    return statistics.median(np.diff(times)[WARM:])


def fit_epochs(ways: dict[str, Build], recipe: Recipe, images: MemoryImages, seconds: float | None) -> list[int]:
    """Times steps of all ways in turns; returns how many epochs of each fit `seconds`, by default the recipe's own."""
    cases = [(name, n) for name in ways for n in (WORKERS if name != 'ours' else WORKERS[:1])]
    times: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for _ in range(ROUNDS):
        for name, workers in cases:
            times[name, workers].append(seconds_per_step(ways[name](recipe, images, 0, workers)))
    median = {case: statistics.median(found) for case, found in times.items()}
    print('ms per step: ' + ', '.join(
        f'{name} {1000 * spent:.0f}' + (f' ({workers} workers)' if name != 'ours' else '')
        for (name, workers), spent in median.items()) + f'; load {os.getloadavg()[0]:.1f}', flush=True)
    steps = len(images) // recipe.batch_size
    seconds = seconds or recipe.epochs * steps * median['ours', 0]
    best = [min(spent for (of, _), spent in median.items() if of == name) for name in ways]
    print(f'budget {seconds:.0f} s')
    return [max(1, round(seconds / spent / steps)) for spent in best]


def train(way: Way, recipe: Recipe) -> float:
    """Trains all epochs of the recipe; returns the seconds."""
    start = time.perf_counter()
    for epoch in range(recipe.epochs):
        set_lr(way.optimizer, epoch, recipe)
        for x1, x2 in way.epoch(epoch):
            way.step(x1, x2)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path, nargs='?', metavar='DATA', default=DATA)
    parser.add_argument('--recipe', default='small', choices=list(RECIPES))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--seconds', type=float, help='for each way (default: as long as the whole recipe takes)')
    parser.add_argument('--epochs', type=int, nargs='+', help='of each way; nothing is timed')
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe, (images, test) = RECIPES[args.recipe], first_of_each_class(args.data)
    monitor = KnnMonitor(images, test, recipe, World(0, 1, CPU), size=sys.maxsize)
    print(f'{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads, torch {torch.__version__}; '
          f'{images.name}: {len(images):,} and {len(test):,} pictures; recipe {args.recipe}, {monitor.describe()}')
    before = [monitor.measure_before(make_model(recipe, seed).backbone, pixels=True) for seed in args.seeds]
    print(f'raw pixels {before[0]["pixels"]:.1f} %; untrained ' + ', '.join(f'{b["random"]:.1f} %' for b in before))
    ways = {'ours': ours, 'FAIR': fair, **({} if MISSING else {'lightly': lightlys})}
    if MISSING:
        print(f'lightly is left out ({MISSING}); pip install lightly')
    epochs = args.epochs or fit_epochs(ways, recipe, images, args.seconds)
    if len(epochs) != len(ways):
        parser.error(f'--epochs takes {len(ways)} numbers: {", ".join(ways)}')
    print(f'\n{"way":8} {"seed":>4} {"epochs":>7} {"seconds":>8} {"kNN %":>7}   load')
    found: dict[str, list[float]] = {name: [] for name in ways}
    for seed in args.seeds:
        for (name, build), n in zip(ways.items(), epochs, strict=True):
            fitted = dataclasses.replace(recipe, epochs=n, warmup_epochs=min(recipe.warmup_epochs, n - 1))
            way = build(fitted, images, seed, WORKERS[0])
            seconds = train(way, fitted)
            accuracy = monitor.measure(way.backbone)
            found[name].append(accuracy)
            print(f'{name:8} {seed:4} {n:7} {seconds:8.0f} {accuracy:7.1f}   {os.getloadavg()[0]:.1f}', flush=True)
    print('\nmeans: ' + ', '.join(f'{name} {statistics.mean(values):.1f} %' for name, values in found.items()))


if __name__ == '__main__':
    main()
