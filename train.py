"""SimSiam pretraining (Chen & He, arXiv 2011.10566).

  python train.py                                           the built-in demonstration, minutes on two CPU cores
  python train.py FOLDER --recipe demo                      your own small images on a CPU
  torchrun --nproc-per-node 8 train.py IMAGENET             FAIR's 100 epochs, batch 512, on 8 GPUs: 68.1 % linear
                                                            top-1 is the published number
  python train.py IMAGENET --recipe in1k_bs256_ep200        MMSelfSup's 200 epochs (69.84 published); any process count
                                                            that divides the batch
  python train.py CIFAR10_FOLDER --recipe cifar10_ep800     paper, appendix D (91.8 published)

The same command continues a run that was stopped. OUTPUT/ ends with checkpoint.pth (model, optimizer, position),
log.jsonl (a line per interval), args.json (all arguments, resolved) and backbone/, which plain timm loads:
  timm.create_model('local-dir:OUTPUT/backbone', pretrained=True)
"""
import argparse
import copy
import dataclasses
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from simsiam_models import SimSiam, create_simsiam, simsiam_loss
from simsiam_models.data import TwoViews, UnreadableError, demo_images, open_folder
from simsiam_models.training import checkpoint
from simsiam_models.training.autoperf import Perf, choose_perf
from simsiam_models.training.distributed import (
    World,
    default_workers,
    join_world,
    mean_over_processes,
    synchronize_batchnorm,
)
from simsiam_models.training.monitor import KnnMonitor, Moment, Reading, is_collapsed
from simsiam_models.training.options import build_parser, resolve_recipe
from simsiam_models.training.precision import AMP, choose_amp
from simsiam_models.training.recipes import Recipe
from simsiam_models.training.runlog import RunLog
from simsiam_models.training.schedule import load_optimizer, make_optimizer, scaled_lr, set_lr
from simsiam_models.weights import export_backbone

# What may differ between a run and its continuation: nothing here changes what is learned.
FREE = {
    'output', 'device', 'workers', 'log_every', 'max_steps', 'compile', 'auto_perf', 'perf', 'processes', 'knn_data',
    'max_unreadable'}


def load_data(args: argparse.Namespace) -> tuple[Any, Any, str]:
    """Training images, labelled validation images or None, and a name for the run's folder."""
    if args.data is None:
        return *demo_images(), 'demo'
    train, val = open_folder(args.data)
    return train, val, Path(args.data).resolve().name


def load_monitor(args: argparse.Namespace, recipe: Recipe, train: Any, val: Any, world: World, workers: int):
    if args.knn_data is not None:
        train, val = open_folder(args.knn_data)
        if train.labels is None:
            raise ValueError(f'--knn-data {args.knn_data} has no class folders, so it has no labels')
    if train.labels is None or len(train) < 5:
        return None
    return KnnMonitor(
        train, val, recipe.augmentation.size, recipe.eval_resize, recipe.knn_k, recipe.knn_t, world, workers)


def make_model(recipe: Recipe, seed: int) -> SimSiam:
    torch.manual_seed(seed)
    try:
        return create_simsiam(
            recipe.model, dim=recipe.dim, pred_dim=recipe.pred_dim, proj_layers=recipe.proj_layers, **recipe.model_args)
    except (RuntimeError, TypeError) as e:  # timm: no such model, no such argument
        raise ValueError(
            f'--model {recipe.model} cannot be built ({e}); timm.list_models() names them all') from None


def compile_or_not(model: SimSiam, shape: tuple[int, ...], amp: str, perf: Perf, world: World, log: RunLog) -> None:
    """Compile in place where that works; a trial on a copy leaves the batch norm statistics alone.

    The trial has the run's own shape and precision, so that the run takes over what was compiled for it.
    """
    try:
        trial = copy.deepcopy(model)
        trial.compile()
        x = torch.zeros(shape, device=world.device).contiguous(memory_format=perf.memory_format)
        with torch.autocast(world.device.type, AMP[amp], enabled=amp != 'off'):
            outputs = trial(x, x)
        simsiam_loss(*(y.float() for y in outputs)).backward()
    except Exception as e:  # compilers fail in many ways, none of which should end the run
        log.say(f'--compile does not work here ({type(e).__name__}); going on without it')
        return
    model.compile()


def pretrain(args: argparse.Namespace, world: World) -> dict[str, Any]:
    """One run, or the rest of one; returns the last figures."""
    name, recipe = resolve_recipe(args)
    train, val, data_name = load_data(args)
    workers = default_workers(world.device) if args.workers is None else args.workers
    views = TwoViews(
        train, recipe.augmentation, recipe.batch_size, args.seed, world.rank, world.size, world.device, workers,
        args.max_unreadable)
    monitor = load_monitor(args, recipe, train, val, world, workers)
    model = make_model(recipe, args.seed)

    folder = Path(args.output or f'runs/{name}-{data_name}')
    log = RunLog(folder, world.main)
    shape = (recipe.batch_size // world.size, 3, recipe.augmentation.size, recipe.augmentation.size)
    record, continued = claim(args, name, recipe, model, shape, folder, world, log)
    amp, perf = decide_perf(args, recipe, model, shape, record, continued, folder, world, log)
    model.to(world.device, memory_format=perf.memory_format)
    synchronize_batchnorm(model, world)
    optimizer = make_optimizer(model, recipe)
    scaler = make_scaler(amp, world)
    state = checkpoint.load(folder, log.say) or {}
    if state:
        model.load_state_dict(state['model'])
        load_optimizer(optimizer, state['optimizer'])
        scaler.load_state_dict(state['scaler'])
    if perf.compile:
        compile_or_not(model, shape, amp, perf, world, log)
    net = model
    if world.size > 1:  # buffers need no broadcast: synchronised batch norm keeps them equal
        net = nn.parallel.DistributedDataParallel(
            model, [world.device] if world.device.type == 'cuda' else None, broadcast_buffers=False)

    run = Run(args, recipe, world, model, net, optimizer, scaler, amp, perf, views, monitor, folder, log)
    log.say(run.describe(name))
    knn = state.get('knn') or run.measure_before()
    figures = run.train(state.get('epoch', 0), state.get('step', 0), knn)
    log.close()
    if world.main and run.finished:
        export_backbone(
            model.backbone, folder / checkpoint.BACKBONE, recipe.model, recipe.model_args, recipe.augmentation.size,
            recipe.eval_resize)
        log.say(run.verdict(figures))
    return figures


def claim(
    args: argparse.Namespace, name: str, recipe: Recipe, model: SimSiam, shape: tuple[int, ...], folder: Path,
    world: World, log: RunLog,
) -> tuple[dict[str, Any], bool]:
    """Make the folder this run's; returns its recorded arguments, and whether it was this run's before.

    A continued run keeps the recorded precision.
    """
    known = args.amp == 'auto' and (folder / checkpoint.ARGS).exists()  # then what is recorded holds
    amp, claimed = 'off' if known else choose_amp(args.amp, world.device, model, shape), [None, False]
    if world.main:
        numbers = dataclasses.asdict(recipe)
        del numbers['about']
        record = {
            'recipe': name, 'data': args.data and str(Path(args.data).resolve()), 'seed': args.seed, 'amp': amp,
            **numbers, **{k: getattr(args, k) for k in FREE & set(vars(args))}, 'processes': world.size,
            'perf': None}
        old = checkpoint.claim_folder(folder, record, FREE | ({'amp'} if args.amp == 'auto' else set()))
        claimed = [old or record, old is not None]
        if old is not None:
            log.say(f'{folder} holds this run: continuing it')
    if world.size > 1:
        dist.broadcast_object_list(claimed)
    return claimed[0], claimed[1]


def decide_perf(
    args: argparse.Namespace, recipe: Recipe, model: SimSiam, shape: tuple[int, ...], record: dict[str, Any],
    continued: bool, folder: Path, world: World, log: RunLog,
) -> tuple[str, Perf]:
    """Precision, memory format and compilation: as recorded, else by --auto-perf, else the defaults."""
    amp = record['amp']
    if record.get('perf'):
        perf = Perf(**record['perf'])
        return amp, dataclasses.replace(perf, compile=perf.compile or args.compile and not args.auto_perf)
    if not args.auto_perf:
        return amp, Perf(compile=args.compile)
    chosen = [None]
    if world.main:
        amps = ('bfloat16', 'off') if args.amp == 'auto' and world.device.type == 'cpu' and not continued else (amp,)
        chosen = [choose_perf(
            model, shape, world.device, amps, lambda *how: trial_run(args, recipe, world.device, *how).trial_step,
            log.say)]
        checkpoint.amend_record(folder, {'amp': chosen[0][0], 'perf': dataclasses.asdict(chosen[0][1])})
    if world.size > 1:
        dist.broadcast_object_list(chosen)
    return chosen[0]


def make_scaler(amp: str, world: World) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(world.device.type, enabled=amp == 'float16')


def trial_run(
    args: argparse.Namespace, recipe: Recipe, device: torch.device, model: SimSiam, amp: str, perf: Perf) -> 'Run':
    """A run without data that only steps: what --auto-perf and tests/perf/step.py time."""
    world = World(0, 1, device)
    model.train()
    return Run(args, recipe, world, model, model, make_optimizer(model, recipe), make_scaler(amp, world), amp, perf)


@dataclasses.dataclass
class Run:
    """What the loop works on."""

    args: argparse.Namespace
    recipe: Recipe
    world: World
    model: SimSiam
    net: nn.Module
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    amp: str
    perf: Perf
    views: TwoViews | None = None
    monitor: KnnMonitor | None = None
    folder: Path | None = None
    log: RunLog | None = None
    finished: bool = True

    def describe(self, name: str) -> str:
        r, images = self.recipe, self.views.images
        parameters = sum(p.numel() for p in self.model.parameters())
        kind = f'{len(images.classes)} classes' if images.labels is not None else 'no labels'
        lines = [
            f'{images.name}: {len(images)} images, {kind}; {len(self.views)} steps per epoch',
            f'recipe {name}: {r.model}, {parameters:,} parameters, {r.epochs} epochs, batch {r.batch_size} '
            f'({r.batch_size // self.world.size} x {self.world.size} processes), lr {r.lr:g} per 256 samples = '
            f'{scaled_lr(r):g}, {self.world.device.type}, amp {self.amp}, {self.perf} -> {self.folder}']
        if self.monitor is None:
            lines.append('no class folders, so no kNN monitor; --knn-data DIR names a labelled folder')
        if r.batch_size >= 1024 and not r.warmup_epochs:
            lines.append('the paper warms up for 10 epochs at batches of 1024 and more: --warmup-epochs 10')
        if r.batch_size < 64:
            lines.append(f'batch norm sees {r.batch_size} samples; the paper tried no batch below 64')
        return '\n'.join(lines)

    def measure_before(self) -> dict[str, float]:
        """kNN accuracy of the untrained backbone, and of the pixels where images are small."""
        if self.monitor is None:
            return {}
        before = {'random': self.monitor.measure(self.model.backbone)}
        if self.recipe.augmentation.size <= 64:
            before['pixels'] = self.monitor.measure_pixels()
        text = ', '.join(f'{k} {v:.1f} %' for k, v in before.items())
        self.log.figures('', {'epoch': 0, 'knn': before}, f'before training, {self.monitor.describe()}: {text}')
        return before

    def train(self, epoch: int, step: int, knn: dict[str, float]) -> dict[str, Any]:
        """From step `step` of `epoch` to the end; a checkpoint is written after each epoch and at --max-steps."""
        r, steps, figures = self.recipe, len(self.views), {'knn': knn}
        self.log.start(r.epochs * steps, epoch * steps + step)
        while epoch < r.epochs:
            lr = set_lr(self.optimizer, epoch, r)
            step = self.train_epoch(epoch, step, lr, figures)
            if step == steps:
                epoch, step = epoch + 1, 0
                if self.monitor and (epoch == r.epochs or r.knn_every and epoch % r.knn_every == 0):
                    knn['trained'] = self.monitor.measure(self.model.backbone)
                    self.log.figures(
                        '', {'epoch': epoch, 'knn': knn['trained']},
                        f'epoch {epoch}: {self.monitor.describe()} {knn["trained"]:.1f} %')
            if self.world.main:
                checkpoint.save(self.folder, {
                    'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
                    'scaler': self.scaler.state_dict(), 'epoch': epoch, 'step': step, 'knn': knn})
            if step:
                self.finished = False
                self.log.say(f'stopped after {self.args.max_steps} steps; the same command without --max-steps goes on')
                break
        return figures

    def train_epoch(self, epoch: int, start: int, lr: float, figures: dict[str, Any]) -> int:
        """Steps `start` .. of one epoch; returns how many of its steps are done."""
        self.model.train()
        steps, last = len(self.views), self.args.max_steps
        losses, waited, pending = [], 0.0, None
        began, clock = Moment(self.world.device), time.perf_counter()
        for step, (x1, x2) in enumerate(self.views.epoch(epoch, start), start + 1):
            waited += time.perf_counter() - clock
            done = epoch * steps + step
            loss, z = self.train_step(x1, x2, done)
            losses.append(loss)
            self.log.step()
            if pending:  # this step is launched, so reading the one before does not hold it up
                self.report(figures, *pending)
                pending = None
            if step % self.args.log_every == 0 or step == steps or done == last:
                mean = mean_over_processes(torch.stack(losses).mean(), self.world)
                reading = Reading(mean, z)
                pending = reading, began, len(losses), waited, dict(epoch=epoch, step=step, lr=lr)
                losses, waited, began = [], 0.0, reading.moment
            if done == last or step == steps:
                self.report(figures, *pending)  # before a checkpoint is written
                return step
            clock = time.perf_counter()
        return steps

    def train_step(self, x1: torch.Tensor, x2: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step; loss and z stay on the device, so the host does not wait."""
        x1, x2 = (x.contiguous(memory_format=self.perf.memory_format) for x in (x1, x2))
        # Dropout and stochastic depth, where a backbone has them, are counted too.
        torch.manual_seed((self.args.seed * 1_000_003 + count) * self.world.size + self.world.rank)
        with torch.autocast(self.world.device.type, AMP[self.amp], enabled=self.amp != 'off'):
            p1, p2, z1, z2 = self.net(x1, x2)
        loss = simsiam_loss(p1.float(), p2.float(), z1.float(), z2.float())
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), z1

    def trial_step(self, x1: torch.Tensor, x2: torch.Tensor) -> None:
        self.train_step(x1, x2, 0)

    def report(
        self, f: dict[str, Any], reading: Reading, began: Moment, n: int, waited: float, where: dict[str, Any],
    ) -> None:
        """The figures of the n steps up to `reading` into f and the log."""
        measured = reading.read()
        seconds, steps = reading.moment.since(began), len(self.views)
        f.update(
            where, **measured, images_per_second=n * self.recipe.batch_size / seconds,
            waiting=min(1.0, waited / seconds))
        if not math.isfinite(f['loss']):
            raise FloatingPointError(
                f'the loss is {f["loss"]} at epoch {f["epoch"]}, step {f["step"]}: lower --lr ({self.recipe.lr:g}), or '
                f'use --amp off (now {self.amp}); the last checkpoint is kept')
        f['collapsed'] = is_collapsed(f['std'], f['rank'])
        text = (f'loss {f["loss"]:.4f}  std {f["std"]:.2f}  rank {f["rank"]:.0f}  lr {f["lr"]:.3g}  '
                f'{f["images_per_second"]:.0f} img/s  waiting {100 * f["waiting"]:.0f} %')
        if f['collapsed']:
            text += '  COLLAPSED'
        figures = {k: v for k, v in f.items() if k != 'knn'}
        self.log.figures(f'epoch {f["epoch"] + 1}/{self.recipe.epochs} step {f["step"]}/{steps}  ', figures, text)

    def verdict(self, f: dict[str, Any]) -> str:
        """The run in plain words."""
        lines, knn = [], f['knn']
        if f.get('collapsed'):
            lines.append(
                f'The outputs have collapsed (std x sqrt(d) {f["std"]:.2f}, effective rank {f["rank"]:.1f}): the '
                'backbone is of no use. Try a lower --lr and a batch of at least 64.')
        if self.views.unreadable:
            lines.append(f'{len(self.views.unreadable)} images could not be read and were replaced:')
            lines += [f'  {text}' for text in list(self.views.unreadable.values())[:5]]
        if 'trained' in knn:
            raw = f', raw pixels {knn["pixels"]:.1f} %' if 'pixels' in knn else ''
            gain = knn['trained'] - max(knn['random'], knn.get('pixels', 0.0))
            lines.append(
                f'{self.monitor.describe()}: trained backbone {knn["trained"]:.1f} %, random backbone '
                f'{knn["random"]:.1f} %{raw}: {gain:+.1f} points over the better of them, learned without labels.')
        lines.append(
            'The backbone is ready for timm: '
            f"timm.create_model('local-dir:{self.folder / checkpoint.BACKBONE}', pretrained=True)")
        return '\n'.join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = build_parser(__doc__).parse_args(argv)
    with join_world(args.device) as world:
        return pretrain(args, world)


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError, FloatingPointError, UnreadableError) as e:
        # All processes meet the same error, save for unreadable files.
        if os.environ.get('RANK', '0') == '0' or isinstance(e, UnreadableError):
            print(f'train.py: {e}', file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print('train.py: stopped; the same command goes on from the last checkpoint', file=sys.stderr)
        sys.exit(130)
