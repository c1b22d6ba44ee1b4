"""What the collapse doctor says of runs that go wrong for known reasons, and of runs that do not.

  python tests/perf/collapse.py --seeds 2 --steps 120 --jobs 2        about 13 minutes on two busy cores

Each case below trains the demo recipe's small network on the demonstration data and on scikit-learn's handwritten
digits, with a reading every 10 steps. The doctor's thresholds were chosen on seeds 0 and 1, so the default starts at 2.
A run with a cause counts as what most of its named readings say; a healthy run counts as an alarm if any reading does.
"""
import argparse
import collections
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from simsiam_models import SimSiam, create_simsiam, simsiam_loss
from simsiam_models.data import MemoryImages, TwoViews, demo_images
from simsiam_models.training.doctor import Diagnosis, Doctor
from simsiam_models.training.monitor import Reading
from simsiam_models.training.recipes import RECIPES, Recipe
from simsiam_models.training.schedule import make_optimizer

EVERY = 10  # steps between readings
HEALTHY = 'healthy'
FIGURES = ['loss', 'std', 'rank', 'p_std', 'p_rank', 'cosine', 'pixels', 'constant_channels']


class Leaky(SimSiam):
    """Forgets the stop-gradient."""

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z1, z2 = self.encode(x1), self.encode(x2)
        return self.predictor(z1), self.predictor(z2), z1, z2


def leaky_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    return -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2


def leak(model: SimSiam) -> None:
    model.__class__ = Leaky


def break_weight(model: SimSiam) -> None:
    with torch.no_grad():
        model.projector[0].weight[0, 0] = torch.nan


def black(images: np.ndarray) -> np.ndarray:
    return np.zeros_like(images)


def own_colour(images: np.ndarray) -> np.ndarray:
    return np.broadcast_to(images.mean((1, 2), keepdims=True).astype(np.uint8), images.shape).copy()


def first_only(images: np.ndarray) -> np.ndarray:
    return np.broadcast_to(images[:1], images.shape).copy()


@dataclasses.dataclass(frozen=True)
class Case:
    cause: str  # the diagnosis that is right
    what: str
    batch: int = 64
    lr: float = RECIPES['demo'].lr  # per 256 samples; 0.4
    change: Callable[[SimSiam], None] | None = None
    loss: Callable[..., Tensor] = simsiam_loss
    spoil: Callable[[np.ndarray], np.ndarray] | None = None
    weak: bool = False  # augmentation
    model: str = 'resnet18'
    model_args: dict | None = None  # None: the demo recipe's
    late: Callable[[SimSiam], None] | None = None  # a change at half time


OWN: dict = {}
CASES = [
    *[Case(HEALTHY, f'batch {b}', batch=b) for b in (16, 32, 64, 128, 256)],
    Case(HEALTHY, 'lr 0.05', lr=0.05),
    Case(HEALTHY, 'lr 1.2', lr=1.2),
    Case(HEALTHY, 'weak augmentation', weak=True),
    Case(HEALTHY, 'z with a gradient that the loss stops', change=leak),
    Case(HEALTHY, 'twice as wide', model_args={**RECIPES['demo'].model_args, 'channels': [32, 64, 128, 256]}),
    Case(HEALTHY, 'resnet10t', model='resnet10t', model_args=OWN),
    *[Case(HEALTHY, f'{m}, lr 0.05', model=m, model_args=OWN, lr=0.05) for m in (
        'mobilenetv3_small_050', 'test_efficientnet', 'test_convnext', 'test_vit')],
    Case('unknown cause', 'no stop-gradient, batch 64', change=leak, loss=leaky_loss),
    Case('unknown cause', 'no stop-gradient, batch 32', batch=32, change=leak, loss=leaky_loss),
    Case('unknown cause', 'no stop-gradient, batch 128', batch=128, change=leak, loss=leaky_loss),
    *[Case('learning rate too high', f'lr {lr}', lr=lr) for lr in (4, 12, 40)],
    *[Case('batch too small', f'batch {b}', batch=b) for b in (2, 4)],
    Case('constant images', 'black', spoil=black),
    Case('constant images', 'each its own colour', spoil=own_colour),
    Case('not finite', 'a weight becomes NaN', late=break_weight),
    Case('unknown cause', 'mobilenetv3 at lr 0.4, which suits it badly', model='mobilenetv3_small_050', model_args=OWN),
    Case('(one image only)', 'no diagnosis is meant for it', spoil=first_only),
]


def digit_images() -> MemoryImages:
    """1797 handwritten digits, 32 px RGB."""
    digits = load_digits()
    images = [np.asarray(Image.fromarray((x * 255 / 16).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC))
              for x in digits.images]
    rgb = np.repeat(np.stack(images)[..., None], 3, -1).copy()
    return MemoryImages(rgb, digits.target, [str(i) for i in range(10)], 'digits')


def recipe_of(case: Case, data: str) -> Recipe:
    recipe = RECIPES['demo']
    aug = recipe.augmentation
    if data == 'digits':
        aug = dataclasses.replace(aug, hue=0.1, crop_scale=(0.6, 1.0), flip_p=0.0, gray_p=0.0)
    if case.weak:
        aug = dataclasses.replace(aug, jitter_p=0.0, gray_p=0.0, crop_scale=(0.8, 1.0))
    return dataclasses.replace(recipe, augmentation=aug, batch_size=case.batch, lr=case.lr)


def train(
    case: Case, data: str, seed: int, steps: int, every: int = EVERY,
) -> Iterator[tuple[int, dict[str, float], Diagnosis | None, Doctor]]:
    """Step, figures, diagnosis and the doctor at each reading of one run."""
    recipe = recipe_of(case, data)
    images = demo_images()[0] if data == 'demo' else digit_images()
    if case.spoil:
        images = MemoryImages(case.spoil(images.images), images.labels, images.classes, images.name)
    torch.manual_seed(seed)
    args = recipe.model_args if case.model_args is None else case.model_args
    model = create_simsiam(
        case.model, dim=recipe.dim, pred_dim=recipe.pred_dim, proj_layers=recipe.proj_layers, **args).train()
    if case.change:
        case.change(model)
    optimizer = make_optimizer(model, recipe)
    doctor = Doctor(recipe.lr, recipe.batch_size)
    views = TwoViews(images, recipe.augmentation, recipe.batch_size, seed=seed)
    batches = (x for epoch in range(steps) for x in views.epoch(epoch))
    losses = []
    for step, (x1, x2) in zip(range(1, steps + 1), batches, strict=False):
        if case.late and step == steps // 2:
            case.late(model)
        p1, p2, z1, z2 = model(x1, x2)
        loss = case.loss(p1, p2, z1, z2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % every == 0:
            figures = Reading(torch.stack(losses).mean(), x1, p1, z1, model).read()
            losses = []
            yield step, figures, doctor.examine(figures), doctor


@dataclasses.dataclass
class Outcome:
    case: int
    data: str
    seed: int
    figures: list[dict[str, float]]
    names: list[str | None]
    collapsed: list[bool]
    confirmed: int | None  # step

    @property
    def said(self) -> str:
        named = [n for n in self.names if n]
        return collections.Counter(named).most_common(1)[0][0] if named else HEALTHY

    def first(self, name: str) -> int | None:
        """Step of the first reading that says so."""
        return (self.names.index(name) + 1) * EVERY if name in self.names else None


def outcome(job: tuple[int, str, int, int]) -> Outcome:
    torch.set_num_threads(1)
    case, data, seed, steps = job
    figures, names, collapsed, confirmed = [], [], [], None
    for step, f, diagnosis, doctor in train(CASES[case], data, seed, steps):
        figures.append(f)
        names.append(diagnosis and diagnosis.name)
        collapsed.append(bool(diagnosis and diagnosis.collapsed))
        confirmed = confirmed or (step if doctor.confirmed else None)
    return Outcome(case, data, seed, figures, names, collapsed, confirmed)


def three(values: list[float], form: str = '.3g') -> str:
    values = [v for v in values if v == v]
    if not values:
        return '-'
    return ' / '.join(f'{v:{form}}' for v in (min(values), statistics.median(values), max(values)))


def print_confusion(runs: list[Outcome]) -> None:
    causes = list(dict.fromkeys(case.cause for case in CASES))
    columns = [c for c in causes if not c.startswith('(')]
    print('\nConfusion table: rows true cause, columns what the doctor said, counts of runs')
    print(f'{"":28}' + ''.join(f'{c:>24}' for c in columns) + f'{"n":>6}')
    for cause in causes:
        own = [r for r in runs if CASES[r.case].cause == cause]
        counts = collections.Counter(r.said for r in own)
        print(f'{cause:28}' + ''.join(f'{counts[c] or ".":>24}' for c in columns) + f'{len(own):>6}')


def print_cases(runs: list[Outcome]) -> None:
    print('\nPer case and data: runs named rightly; first step named; readings with another name; step at which a '
          'collapse is confirmed')
    for i, case in enumerate(CASES):
        for data in ('demo', 'digits'):
            own = [r for r in runs if r.case == i and r.data == data]
            if not own:
                continue
            right = sum(r.said == case.cause for r in own)
            first = [s for r in own if (s := r.first(case.cause)) is not None]
            other = collections.Counter(n for r in own for n in r.names if n not in (None, case.cause))
            print(f'{case.cause:28} {case.what:44} {data:7} {right}/{len(own)}  first {three(first, ".0f"):16} '
                  f'confirmed {three([r.confirmed for r in own if r.confirmed], ".0f"):16} {dict(other) or ""}')


def print_ranges(runs: list[Outcome], last: bool) -> None:
    print(f'\nmin / median / max over {"the last reading of each run" if last else "all readings"}')
    for cause in dict.fromkeys(CASES[r.case].cause for r in runs):
        own = [r for r in runs if CASES[r.case].cause == cause]
        seen = [f for r in own for f in (r.figures[-1:] if last else r.figures)]
        text = '   '.join(f'{k} {three([f[k] for f in seen])}' for k in FIGURES)
        print(f'{cause:28} n={len(seen):<5} {text}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=2, help='how many')
    parser.add_argument('--first-seed', type=int, default=2)
    parser.add_argument('--steps', type=int, default=120)
    parser.add_argument('--data', nargs='+', default=['demo', 'digits'], choices=['demo', 'digits'])
    parser.add_argument('--only', default='', help='causes that begin so')
    parser.add_argument('--what', default='', help='cases that are called so')
    parser.add_argument('--jobs', type=int, default=1, help='processes of one thread each')
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    jobs = [(i, data, seed, args.steps) for seed in seeds for i, case in enumerate(CASES) for data in args.data
            if case.cause.startswith(args.only) and args.what in ('', case.what)]
    started = time.monotonic()
    with ProcessPoolExecutor(args.jobs) as pool:
        runs = []
        for run in pool.map(outcome, jobs):
            runs.append(run)
            case = CASES[run.case]
            print(f'{len(runs)}/{len(jobs)} {case.cause}, {case.what}, {run.data}, seed {run.seed}: '
                  f'{run.said}', file=sys.stderr, flush=True)
    print(f'{len(runs)} runs of {args.steps} steps, seeds {list(seeds)}, a reading every {EVERY} steps; torch '
          f'{torch.__version__}, CPU, {args.jobs} processes of one thread, {time.monotonic() - started:.0f} s; load '
          f'average at the end {os.getloadavg()[0]:.1f}')
    print_confusion(runs)
    known = [r for r in runs if not CASES[r.case].cause.startswith('(')]
    alarms = [r for r in known if CASES[r.case].cause == HEALTHY and r.said != HEALTHY]
    ill = [r for r in known if CASES[r.case].cause != HEALTHY]
    print(f'\nfalse alarms: {len(alarms)} of {len(known) - len(ill)} healthy runs; misses (nothing said): '
          f'{sum(r.said == HEALTHY for r in ill)} of {len(ill)}; wrong name: '
          f'{sum(r.said not in (HEALTHY, CASES[r.case].cause) for r in ill)} of {len(ill)}')
    for r in alarms:
        print(f'  {CASES[r.case].what}, {r.data}, seed {r.seed}: {r.names}')
    print_cases(runs)
    print_ranges(runs, last=True)
    print_ranges(runs, last=False)


if __name__ == '__main__':
    main()
