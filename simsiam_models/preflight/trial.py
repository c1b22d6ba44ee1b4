"""Tries a run for about a minute: measures data and step speed, memory, and whether the outputs collapse."""
import copy
import functools
import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..data import Images, TwoViews
from ..runtime.distributed import World, synchronize
from ..runtime.precision import TRIAL, choose_amp, fewest_samples, has_bfloat16
from ..simsiam import SimSiam
from ..training.doctor import Doctor
from ..training.monitor import Reading
from ..training.recipes import Recipe
from ..training.schedule import set_lr
from ..training.setup import make_model
from ..training.step import Trainer, time_step, train_step
from .load import find_disturbance, read_clock

PROBE = 2  # samples of the first, careful steps


@dataclass
class Trial:
    """The results of a short training; None: not measured."""

    parameters: int
    batch: int  # that fits
    state_bytes: int  # of a checkpoint: weights, statistics, momentum
    backbone_bytes: int
    amp: str = 'off'
    data_rate: float = math.nan  # images/s of the data alone
    step_seconds: float = math.nan  # of the step alone
    timed_batch: int = 0  # below `batch`: the step was timed with fewer samples, and scaled up
    rate: float | None = None  # images/s of both together
    waiting: float | None = None
    memory: int | None = None  # bytes, peak
    steps: int = 0
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    collapsed: bool | None = None
    diagnosis: str | None = None
    memory_of: str = 'of this process'
    disturbance: float | None = None  # share of the processor's time, see `load.find_disturbance`
    notes: list[str] = field(default_factory=list)

    @property
    def run_seconds(self) -> float:
        """Returns the seconds per step of a run."""
        return self.batch / self.rate if self.rate else max(self.step_seconds, self.batch / self.data_rate)


def make_trainer(model: SimSiam, recipe: Recipe, device: torch.device, amp: str) -> Trainer:
    """Returns a trainer like that of `simsiam pretrain`, in a single process."""
    model.to(device).to(memory_format=torch.channels_last).train()
    return Trainer(model, recipe, World(0, 1, device), amp)


def peak_memory(device: torch.device) -> int | None:
    """Returns the peak bytes that torch held on a CUDA card; elsewhere the largest size of this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def free_memory() -> float:
    """Returns the bytes of host memory that this process may still allocate; infinite if the system does not say."""
    free = math.inf
    with suppress(OSError, StopIteration, ValueError):
        lines = Path('/proc/meminfo').read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable'))
        group = Path('/sys/fs/cgroup')  # of a container
        limit, used = ((group / name).read_text().strip() for name in ('memory.max', 'memory.current'))
        free = min(free, int(limit) - int(used))  # ValueError: the limit is 'max'
    return free


def saved_bytes(trainer: Trainer, views: tuple[Tensor, Tensor]) -> int:
    """Returns the bytes that the forward passes keep for the backward pass, without the weights."""
    own = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        train_step(trainer, *views)
    return sum(n for at, n in kept.items() if at not in own)


def run_trial(images: Images, recipe: Recipe, device: torch.device, workers: int, seconds: float) -> Trial:
    """Measures a run of `recipe` for about `seconds`; halves the batch until it fits, or raises ValueError."""
    began, clock = time.perf_counter(), read_clock()
    end = began + seconds
    model = make_model(recipe, 0)
    t = Trial(
        sum(p.numel() for p in model.parameters()), recipe.batch_size,
        sum(x.nbytes for x in [*model.parameters(), *model.buffers(), *model.parameters()]),  # the last: momentum
        sum(x.nbytes for x in [*model.backbone.parameters(), *model.backbone.buffers()]))
    trainer = _probe(t, copy.deepcopy(model), recipe, device, end)
    t.data_rate = _measure_data(images, trainer, workers, t.batch, 0.2 * (end - time.perf_counter()))
    left = end - time.perf_counter()
    hopeless = 4 * (t.batch / t.data_rate + t.step_seconds) > left  # of training at all
    _time_steps(t, trainer, (0.9 if hopeless else 0.3) * left, 0.15 * left)
    del trainer
    gc.collect()
    if device.type == 'cuda':
        t.memory_of = 'held by torch on the card'
        torch.cuda.empty_cache()
    first = t.batch / t.data_rate + t.step_seconds
    while t.timed_batch >= t.batch and 2 * first < end - time.perf_counter():
        recipe = replace(recipe, batch_size=t.batch)  # the learning rate follows
        try:
            _train(t, make_trainer(copy.deepcopy(model), recipe, device, t.amp), images, workers, end)
            break
        except torch.cuda.OutOfMemoryError:  # the batch that is being fetched needs memory, too
            _halve(t)
            t.step_seconds /= 2
    t.memory, t.seconds = peak_memory(device), time.perf_counter() - began
    t.disturbance = find_disturbance(clock, read_clock())
    return t


def _probe(t: Trial, model: SimSiam, recipe: Recipe, device: torch.device, end: float) -> Trainer:
    """Takes the first steps with a few samples: finds what fits, and which precision to use."""
    trainer, n, size = make_trainer(model, recipe, device, 'off'), min(PROBE, t.batch), recipe.augmentation.size
    views = make_noise(n, size, device)
    per_sample = saved_bytes(trainer, views) / n
    step, spent, most = functools.partial(train_step, trainer), list[float](), 0.05 * (end - time.perf_counter())
    while not spent or len(spent) < 3 and sum(spent) < most:  # one busy moment must not decide what follows
        spent.append(time_step(step, views))
    once = min(spent)
    if device.type == 'cpu':
        _halve_to_fit(t, per_sample)
    t.step_seconds, t.timed_batch = once * t.batch / n, n
    shape = t.batch, 3, size, size
    needed = TRIAL + 6 * once / n * fewest_samples(shape)  # what choose_amp takes on a CPU
    if device.type != 'cpu' or not has_bfloat16() or needed < (end - time.perf_counter()) / 4:
        t.amp = choose_amp('auto', device, model, shape)
    else:
        t.notes.append('no time to try bfloat16, so amp off')
    return make_trainer(model, recipe, device, t.amp)


def make_noise(n: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns two views of n random samples, (n, 3, size, size) each."""
    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    return x, x.flip(3)


def _halve_to_fit(t: Trial, per_sample: float) -> None:
    """Halves the batch until it fits: a CPU process that runs out of memory is killed, so this must be computed."""
    free = 0.9 * free_memory()
    while t.batch * per_sample + t.state_bytes > free:
        if t.batch <= 2:
            raise ValueError(
                f'one step of 2 samples needs {(2 * per_sample + t.state_bytes) / 1e9:.1f} GB, and {free / 1e9:.1f} GB '
                'is free: choose another --recipe')
        t.notes.append(f'batch {t.batch} does not fit into {free / 1e9:.1f} GB of free memory: halved')
        t.batch //= 2


def _measure_data(images: Images, trainer: Trainer, workers: int, batch: int, seconds: float) -> float:
    """Measures images/s of reading, cropping and finishing, with nothing else running."""
    device = trainer.world.device
    # The survey has judged the unreadable images; here they must not end the measurement.
    views = TwoViews(
        images, trainer.recipe.augmentation, min(batch, 64) if device.type == 'cpu' else batch, device=device,
        workers=workers, max_unreadable=1.0)
    done, began, cold = 0, time.perf_counter(), device.type == 'cuda'
    for x1, _ in itertools.chain.from_iterable(map(views.epoch, itertools.count())):
        if cold:  # the first batch compiles the augmentation
            synchronize(device)
            began, cold = time.perf_counter(), False
            continue
        done += len(x1)
        if time.perf_counter() > began + seconds:
            break
    synchronize(device)
    return done / (time.perf_counter() - began)


def _halve(t: Trial) -> None:
    """Halves the batch after a card ran out of memory."""
    if t.batch <= 2:
        raise ValueError('a step of 2 samples does not fit the card: choose another --recipe')
    gc.collect()
    torch.cuda.empty_cache()
    t.notes.append(f'batch {t.batch} does not fit the card: halved')
    t.batch //= 2
    t.steps, t.first = 0, {}


def _time_steps(t: Trial, trainer: Trainer, seconds: float, repeating: float) -> None:
    """Times the step: on a CPU with more and more samples, as time allows; on a card with the whole batch at once."""
    device, began, step = trainer.world.device, time.perf_counter(), functools.partial(train_step, trainer)
    n = t.batch if device.type != 'cpu' else t.timed_batch
    while device.type != 'cpu' or 2 * t.step_seconds * n / t.batch < seconds - (time.perf_counter() - began):
        views = make_noise(n, trainer.recipe.augmentation.size, device)
        try:
            spent = [time_step(step, views) for _ in range(2)]
        except torch.cuda.OutOfMemoryError:
            trainer.optimizer.zero_grad(set_to_none=True)
            _halve(t)
            n = t.batch
            continue
        while n == t.batch and len(spent) < 30 and sum(spent) < repeating:
            spent.append(time_step(step, views))
        t.step_seconds, t.timed_batch = statistics.median(spent[1:]) * t.batch / n, n
        if n == t.batch:
            return
        n = min(2 * n, t.batch)


def _train(t: Trial, trainer: Trainer, images: Images, workers: int, end: float) -> None:
    """Trains the first steps of the run itself until `end`; the first one is not timed."""
    recipe, device = trainer.recipe, trainer.world.device
    views = TwoViews(images, recipe.augmentation, t.batch, device=device, workers=workers, max_unreadable=1.0)

    def load_batches() -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in range(recipe.epochs):
            set_lr(trainer.optimizer, epoch, recipe)
            yield from views.epoch(epoch)

    waited = began = clock = 0.0
    with tqdm(total=recipe.epochs * len(views), unit='step', leave=False, disable=not sys.stderr.isatty()) as bar:
        for x1, x2 in load_batches():
            if t.steps:
                waited += time.perf_counter() - clock
            loss, p1, z1 = train_step(trainer, x1, x2)
            t.steps += 1
            if t.steps == 1:
                t.first = Reading(loss, x1, p1, z1, trainer.model).read()  # waits for the device
                began = time.perf_counter()
            bar.update()
            clock = time.perf_counter()
            if clock > end:
                break
    synchronize(device)
    spent = time.perf_counter() - began
    t.last = Reading(loss, x1, p1, z1, trainer.model).read()
    diagnosis = Doctor(recipe.lr, t.batch, len(images), t.amp).examine(t.last)
    t.collapsed = diagnosis is not None and diagnosis.collapsed
    t.diagnosis = None if diagnosis is None else str(diagnosis)
    if t.steps > 1:
        t.rate, t.waiting = (t.steps - 1) * t.batch / spent, waited / spent
