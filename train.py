"""SimSiam pretraining (Chen & He, arXiv 2011.10566).

  python train.py                                           the built-in demonstration, minutes on two CPU cores
  python train.py FOLDER --recipe demo                      your own small images on a CPU
  torchrun --nproc-per-node 8 train.py IMAGENET             FAIR's 100 epochs, batch 512, on 8 GPUs: 68.1 % linear
                                                            top-1 is the published number
  python train.py IMAGENET --recipe in1k_bs256_ep200        MMSelfSup's 200 epochs (69.84 published); any process count
                                                            that divides the batch
  python train.py CIFAR10_FOLDER --recipe cifar10_ep800     paper, appendix D (91.8 published)

`simsiam preflight DATA` looks at the data first and recommends a command.

The same command continues a run that was stopped or killed. SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) finish the step, write
a checkpoint and exit with 128 + the signal's number: 143, 138, 130. Exit code 1: one line says why it cannot go on.

OUTPUT/ ends with checkpoint.pth (model, optimizer, position), log.jsonl (a line per interval), args.json (all
arguments, resolved) and backbone/, which plain timm loads:
  timm.create_model('local-dir:OUTPUT/backbone', pretrained=True)
"""
import argparse
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

from simsiam_models import SimSiam, simsiam_loss
from simsiam_models.data import DataError, TwoViews, open_data
from simsiam_models.runtime import checkpoint
from simsiam_models.runtime.distributed import (
    World,
    default_workers,
    join_world,
    mean_over_processes,
    parallel,
    synchronize_batchnorm,
)
from simsiam_models.runtime.files import write_atomically
from simsiam_models.runtime.log import RunLog, check_extras
from simsiam_models.runtime.precision import AMP
from simsiam_models.runtime.signals import Signals, Stopped
from simsiam_models.training.autoperf import Perf
from simsiam_models.training.doctor import Diagnosis, Doctor
from simsiam_models.training.monitor import KnnMonitor, Moment, Reading, is_collapsed
from simsiam_models.training.options import ROLLBACKS, build_parser, resolve_recipe
from simsiam_models.training.recipes import Recipe
from simsiam_models.training.schedule import load_optimizer, make_optimizer, set_lr
from simsiam_models.training.setup import (
    FREE,
    claim,
    compile_or_not,
    decide_perf,
    load_monitor,
    make_model,
    make_scaler,
)
from simsiam_models.training.summary import clock_time, describe, describe_continuation, verdict
from simsiam_models.weights import export_backbone

ROLL_BACK, COLLAPSED, UNSAVED = 1, 2, 3  # what can be the trouble with a run, in the order of priority
MENDABLE = {'learning rate too high', 'not finite', 'unknown cause'}  # maybe by half the learning rate


class RunError(RuntimeError):
    """The run cannot go on as it is."""


def pretrain(args: argparse.Namespace, world: World, signals: Signals) -> dict[str, Any]:
    """One run, or the rest of one; returns the last figures."""
    name, recipe = resolve_recipe(args)
    check_extras(args.tensorboard, args.wandb)
    views, monitor, model = world.all_or_none(lambda: prepare(args, recipe, world))

    folder = Path(args.output or f'runs/{name}-{data_name(args.data)}')
    log = RunLog(folder, world.main)
    shape = (recipe.batch_size // world.size, 3, recipe.augmentation.size, recipe.augmentation.size)
    record, state = claim(args, name, recipe, model, shape, views.images, folder, world, log)
    amp, perf = decide_perf(
        args, model, shape, record, state is not None, folder,
        lambda *how: trial_run(args, recipe, world.device, *how).trial_step, world, log)
    model.to(world.device, memory_format=perf.memory_format)
    synchronize_batchnorm(model, world)
    if perf.compile:
        compile_or_not(model, shape, amp, perf, world.device, log.say)
    blank = torch.zeros(2, *shape[1:], device=world.device)
    net = parallel(model, lambda net: simsiam_loss(*net(blank, blank)), world)
    run = Run(
        args, recipe, world, model, net, make_optimizer(model, recipe),
        make_scaler(amp, world), amp, perf, views, monitor, folder, log, signals,
        Doctor(model, recipe.lr, recipe.batch_size), {**{k: v for k, v in record.items() if k not in FREE}, 'amp': amp})
    log.say(describe(run, name))
    if state is not None:
        run.restore(state)
        log.say(describe_continuation(run, state['processes']))
    log.resume(state['log_bytes'] if state is not None else 0)
    world.broadcast_from_main(lambda: log.attach(args.tensorboard, args.wandb, record, run.done))
    if state is None:
        run.measure_before()
        saved = run.save()
        if not world.broadcast_from_main(lambda: saved):
            raise RunError(f'no checkpoint can be written to {folder}')
    try:
        run.train()
    finally:
        log.close()
    if world.main and run.finished:
        export_backbone(
            model.backbone, folder / checkpoint.BACKBONE, recipe.model, recipe.model_args, recipe.augmentation.size,
            recipe.eval_resize)
        log.say(verdict(run))
    return run.figures


def prepare(args: argparse.Namespace, recipe: Recipe, world: World) -> tuple[TwoViews, KnnMonitor | None, SimSiam]:
    train, val = open_data(args.data, args.images_per_epoch)
    workers = default_workers(world.device) if args.workers is None else args.workers
    views = TwoViews(
        train, recipe.augmentation, recipe.batch_size, args.seed, world.rank, world.size, world.device, workers,
        args.max_unreadable)
    return views, load_monitor(args, recipe, train, val, world, workers), make_model(recipe, args.seed)


def data_name(data: str | None) -> str:
    """For the name of the run's folder."""
    if data is None:
        return 'demo'
    return Path(data).resolve().name if Path(data).exists() else ''.join(c if c.isalnum() else '-' for c in data)


def trial_run(
    args: argparse.Namespace, recipe: Recipe, device: torch.device, model: SimSiam, amp: str, perf: Perf) -> 'Run':
    """A run without data that only steps: what --auto-perf and tests/perf/step.py time."""
    world = World(0, 1, device)
    model.train()
    return Run(args, recipe, world, model, model, make_optimizer(model, recipe), make_scaler(amp, world), amp, perf)


@dataclasses.dataclass
class Run:
    """What the loop works on, and where it is."""

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
    signals: Signals | None = None
    doctor: Doctor | None = None
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)  # what a checkpoint belongs to

    epoch: int = 0
    step: int = 0  # steps of this epoch that are done
    lr_scale: float = 1.0  # halved by each rollback
    rollbacks: int = 0
    figures: dict[str, Any] = dataclasses.field(default_factory=lambda: {'knn': {}})
    diagnosis: Diagnosis | None = None
    trouble: int = 0
    saved_at: float = 0.0  # when the newest checkpoint was written, time.monotonic()
    tried_at: float = 0.0
    saved: tuple[int, int] | None = None  # epoch and step that it holds
    healthy: bool = True  # no collapse at the last reading
    saved_healthy: bool = True  # the newest checkpoint is
    known_unreadable: dict[int, str] = dataclasses.field(default_factory=dict)  # over all processes

    @property
    def done(self) -> int:
        """Optimizer steps so far."""
        return self.epoch * len(self.views) + self.step

    @property
    def finished(self) -> bool:
        return self.epoch == self.recipe.epochs

    def measure_before(self) -> None:
        """kNN accuracy of the untrained backbone, and of the pixels where images are small."""
        if self.monitor is None:
            return
        before = {'random': self.monitor.measure(self.model.backbone)}
        if self.recipe.augmentation.size <= 64:
            before['pixels'] = self.monitor.measure_pixels()
        text = ', '.join(f'{k} {v:.1f} %' for k, v in before.items())
        self.log.figures('', {'epoch': 0, 'knn': before}, f'before training, {self.monitor.describe()}: {text}')
        self.figures['knn'] = before

    def train(self) -> None:
        """To the end, or to --max-steps.

        Raises:
            Stopped: a signal came; a checkpoint of this very step is written.
            RunError: the run is in trouble; the last good checkpoint is kept.
        """
        steps, last = len(self.views), self.args.max_steps
        self.log.start(self.recipe.epochs * steps, self.done)
        while not self.finished and (last is None or self.done < last):
            self.signals.deferred = True
            if self.step < steps:
                self.train_epoch()
            signal, _, trouble = self.world.all_reduce_max(self.wishes())
            if trouble == ROLL_BACK:
                self.roll_back()
                continue
            if trouble == UNSAVED:
                saved = self.save()
                if self.world.broadcast_from_main(lambda saved=saved: saved):
                    continue
            if trouble:
                raise RunError(self.reason(trouble))
            if self.step == steps and not signal:
                self.end_epoch()
            saved = self.save()
            if self.trouble == ROLL_BACK:  # no numbers any more, which every process sees
                self.roll_back()
                continue
            if signal:
                if not self.world.broadcast_from_main(lambda saved=saved: saved):
                    raise RunError('stopped by a signal without a new checkpoint; the one before is kept')
                raise Stopped(signal)
        self.signals.deferred = False
        if not self.world.broadcast_from_main(lambda: self.saved == (self.epoch, self.step)):
            raise RunError(
                'the last checkpoint could not be written; make room, and the same command goes on from the one before')
        if not self.finished:
            self.log.say(f'stopped after {self.done} steps; the same command without --max-steps goes on')

    def train_epoch(self) -> None:
        """The rest of this epoch, or up to --max-steps, a signal or trouble."""
        self.model.train()
        lr = set_lr(self.optimizer, self.epoch, self.recipe, self.lr_scale)
        steps, last = len(self.views), self.args.max_steps
        losses, waited, pending = [], 0.0, None
        began, clock = Moment(self.world.device), time.perf_counter()
        for x1, x2 in self.views.epoch(self.epoch, self.step):
            waited += time.perf_counter() - clock
            loss, p1, z1 = self.train_step(x1, x2, self.done + 1)
            self.step += 1
            losses.append(loss)
            self.log.step()
            if pending:  # this step is launched, so reading the one before does not hold it up
                self.report(*pending)
                pending = None
            signal, due, trouble = self.world.all_reduce_max(self.wishes())
            ending = self.step == steps or self.done == last
            if self.step % self.args.log_every == 0 or ending:
                mean = mean_over_processes(torch.stack(losses).mean(), self.world)
                reading = Reading(mean, x1, p1, z1, self.model)
                where = dict(epoch=self.epoch, step=self.step, lr=lr)
                pending = reading, began, len(losses), waited, where, self.done
                losses, waited, began = [], 0.0, reading.moment
            if ending or signal or trouble or due:  # before a checkpoint is written
                if pending:
                    self.report(*pending)
                    pending = None
                if ending or signal or trouble:
                    return
                self.save()
            clock = time.perf_counter()

    def train_step(
        self, x1: torch.Tensor, x2: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One optimizer step; loss, p1 and z1 stay on the device, so the host does not wait."""
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
        return loss.detach(), p1.detach(), z1

    def trial_step(self, x1: torch.Tensor, x2: torch.Tensor) -> None:
        self.train_step(x1, x2, 0)

    def report(
        self, reading: Reading, began: Moment, n: int, waited: float, where: dict[str, Any], done: int) -> None:
        """The figures of the n steps up to `reading` into self.figures and the log."""
        f, steps = self.figures, len(self.views)
        measured = reading.read()
        seconds = reading.moment.since(began)
        f.update(
            where, **measured, images_per_second=n * self.recipe.batch_size / seconds,
            waiting=min(1.0, waited / seconds))
        if not math.isfinite(f['loss']) and self.args.on_collapse != 'rollback':
            raise FloatingPointError(
                f'the loss is {f["loss"]} at epoch {f["epoch"]}, step {f["step"]}: lower --lr ({self.recipe.lr:g}), or '
                f'use --amp off (now {self.amp}); the last checkpoint is kept')
        f['collapsed'] = is_collapsed(f['std'], f['rank'], f['samples'])
        before, self.diagnosis = self.diagnosis, self.doctor.examine(f)
        self.healthy = self.diagnosis is None or not self.diagnosis.collapsed
        f['diagnosis'] = self.diagnosis and self.diagnosis.name
        left = (self.recipe.epochs * steps - done) * seconds / n
        text = (f'loss {f["loss"]:.4f}  std {f["std"]:.2f}  rank {f["rank"]:.0f}  lr {f["lr"]:.3g}  '
                f'{f["images_per_second"]:.0f} img/s  waiting {100 * f["waiting"]:.0f} %  left {clock_time(left)}')
        if f['collapsed']:
            text += '  COLLAPSED'
        figures = {k: v for k, v in f.items() if k != 'knn'}
        self.log.figures(f'epoch {f["epoch"] + 1}/{self.recipe.epochs} step {f["step"]}/{steps}  ', figures, text, done)
        now = self.diagnosis
        if now and (before is None or (before.name, before.collapsed) != (now.name, now.collapsed)):
            self.log.say(str(now))
        if self.world.main and self.doctor.confirmed and self.args.on_collapse != 'warn':
            able = self.diagnosis.name in MENDABLE and self.rollbacks < ROLLBACKS
            self.trouble = ROLL_BACK if able and self.args.on_collapse == 'rollback' else COLLAPSED

    def reason(self, trouble: int) -> str:
        if trouble == UNSAVED:
            return (
                f'no checkpoint could be written for {3 * self.args.checkpoint_minutes:g} minutes; make room in '
                f'{self.folder}, and the same command goes on from the newest one')
        advice = '; half the learning rate did not help' if self.rollbacks else ''
        return f'{self.diagnosis or "the outputs have collapsed"}{advice}; the last healthy checkpoint is kept'

    def wishes(self) -> list[int]:
        """A signal's number, whether a checkpoint is due, and the trouble: what each process has to say."""
        due, trouble = 0, self.trouble
        if self.world.main:
            now, patience = time.monotonic(), 60 * self.args.checkpoint_minutes
            due = int(now - self.tried_at > patience or bool(
                self.args.checkpoint_steps and self.done % self.args.checkpoint_steps == 0))
            if self.tried_at > self.saved_at and now - self.saved_at > 3 * patience:
                trouble = trouble or UNSAVED
        return [self.signals.number, due, trouble]

    def end_epoch(self) -> None:
        """All steps of an epoch are done: count unreadable images, measure kNN where it is due."""
        r, epoch = self.recipe, self.epoch + 1
        self.gather_unreadable()
        measure = self.monitor and (epoch == r.epochs or r.knn_every and epoch % r.knn_every == 0)
        if measure:
            saved = self.save()  # measuring may take longer than a scheduler waits
            if self.world.all_reduce_max(self.wishes())[0]:
                return
            self.signals.deferred = not saved
        if self.known_unreadable:
            n = len(self.known_unreadable)
            self.log.figures(
                '', {'epoch': epoch, 'unreadable': n, 'images': len(self.views.images)},
                f'epoch {epoch}: {n} of {len(self.views.images)} images are unreadable so far and were replaced; '
                f'{self.folder / checkpoint.UNREADABLE} names them', self.done)
        if measure:
            knn = self.figures['knn']
            knn['trained'] = self.monitor.measure(self.model.backbone)
            self.signals.deferred = True
            self.log.figures(
                '', {'epoch': epoch, 'knn': knn['trained']},
                f'epoch {epoch}: {self.monitor.describe()} {knn["trained"]:.1f} %', self.done)
        self.epoch, self.step = epoch, 0

    def gather_unreadable(self) -> None:
        """What any process could not read; rank 0 writes it down.

        Raises:
            UnreadableError: together they found more than is allowed.
        """
        found = dict(self.known_unreadable)
        for part in self.world.gather(self.views.unreadable):
            found.update(part)
        if len(found) == len(self.known_unreadable):
            return
        self.known_unreadable = found
        if self.world.main:
            text = ''.join(f'{found[i]}\n' for i in sorted(found))
            try:
                write_atomically(self.folder / checkpoint.UNREADABLE, lambda f: f.write(os.fsencode(text)))
            except OSError as e:
                self.log.say(f'{self.folder / checkpoint.UNREADABLE} cannot be written ({e.strerror})')
        self.views.judge(found, self.epoch)

    def save(self) -> bool:
        """Write a checkpoint, on rank 0; False where that is not possible: the one before is kept."""
        self.gather_unreadable()
        if not torch.stack([p.isfinite().all() for p in self.model.parameters()]).all():  # one wait for the device
            if self.args.on_collapse != 'rollback':
                raise FloatingPointError(
                    f'weights are no numbers any more at epoch {self.epoch}, step {self.step}: lower --lr '
                    f'({self.recipe.lr:g}), or use --amp off (now {self.amp}); the last checkpoint is kept')
            self.trouble = ROLL_BACK if self.rollbacks < ROLLBACKS else COLLAPSED
            return False
        if not self.world.main:
            return True
        self.tried_at = time.monotonic()
        every = self.args.keep_every
        keep = self.epoch if every and self.step == 0 and self.epoch and self.epoch % every == 0 else 0
        try:
            checkpoint.save(self.folder, {
                'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
                'scaler': self.scaler.state_dict(), 'epoch': self.epoch, 'step': self.step, 'knn': self.figures['knn'],
                'lr_scale': self.lr_scale, 'rollbacks': self.rollbacks, 'doctor': self.doctor.state_dict(),
                'unreadable': self.known_unreadable, 'log_bytes': self.log.size(), 'run': self.identity,
                'processes': self.world.size, 'healthy': self.healthy,
            }, self.args.keep_last, keep, pin=self.saved_healthy and not self.healthy)
        except OSError as e:
            self.log.say(
                f'no checkpoint written to {self.folder} ({e.strerror or e}); the one before is kept, the next try is '
                f'in {self.args.checkpoint_minutes:g} minutes or after this epoch')
            return False
        self.saved_at, self.saved_healthy, self.saved = self.tried_at, self.healthy, (self.epoch, self.step)
        return True

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state['model'])
        load_optimizer(self.optimizer, state['optimizer'])
        self.scaler.load_state_dict(state['scaler'])
        self.epoch, self.step, self.figures['knn'] = state['epoch'], state['step'], state['knn']
        self.rollbacks = state['rollbacks']
        self.scale_lr(state['lr_scale'])
        self.doctor.load_state_dict(state['doctor'])
        self.known_unreadable, self.healthy = state['unreadable'], state['healthy']
        self.saved_healthy, self.saved = self.healthy, (self.epoch, self.step)
        self.saved_at = self.tried_at = time.monotonic()

    def scale_lr(self, scale: float) -> None:
        self.lr_scale, self.doctor.lr = scale, self.recipe.lr * scale

    def roll_back(self) -> None:
        """To the newest healthy checkpoint, at half the learning rate."""
        scale, rollbacks, diagnosis = self.lr_scale / 2, self.rollbacks + 1, self.diagnosis
        state = self.world.broadcast_from_main(lambda: checkpoint.load(self.folder, self.log.say, healthy=True))
        if state is None:
            raise RunError(f'{self.folder} holds no healthy checkpoint to go back to')
        self.restore(state)
        self.saved_healthy = False  # the newest is not; the healthy one has its own name
        self.rollbacks, self.trouble, self.diagnosis = rollbacks, 0, None
        self.scale_lr(scale)
        self.log.say(
            f'rollback {rollbacks} of {ROLLBACKS} ({diagnosis.name if diagnosis else "not finite"}): from epoch '
            f'{self.epoch}, step {self.step} on, at {scale:g} of the learning rate')
        self.log.move(self.done)
        self.save()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = build_parser(__doc__).parse_args(argv)
    with Signals() as signals, join_world(args.device) as world:
        return pretrain(args, world, signals)


def another_is_gone(e: RuntimeError) -> bool:
    """Whether this process stopped because it lost one of the others."""
    return int(os.environ.get('WORLD_SIZE', 1)) > 1 and (
        isinstance(e, dist.DistError) or any(word in str(e) for word in ('gloo', 'NCCL', 'Connection')))


if __name__ == '__main__':
    try:
        main()
    except torch.OutOfMemoryError as e:
        print(f'train.py: out of memory: lower --batch-size, or use more processes or --amp ({e})', file=sys.stderr)
        sys.exit(1)
    except (ValueError, OSError, FloatingPointError, RunError, DataError) as e:
        # All processes meet the same error, save for what they read.
        if os.environ.get('RANK', '0') == '0' or isinstance(e, DataError):
            print(f'train.py: {e}', file=sys.stderr)
        sys.exit(1)
    except Stopped as e:
        if os.environ.get('RANK', '0') == '0':
            print(f'train.py: {e}; the same command goes on from the last checkpoint', file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(e.code)  # a thread that waits for a stream would hold a plain exit up
    except RuntimeError as e:
        if not another_is_gone(e):
            raise
        why = str(e).splitlines()[0]
        print(f'train.py: another process of this run is gone; this one ends too ({why})', file=sys.stderr)
        sys.exit(1)
