"""SimSiam pretraining (Chen & He, arXiv 2011.10566).

  simsiam pretrain                                          the built-in demonstration, minutes on two CPU cores
  simsiam pretrain FOLDER --recipe small                    your own small images on a CPU
  simsiam pretrain IMAGENET --recipe in1k_bs256_ep200       MMSelfSup's 200 epochs (69.84 % linear top-1 published)
  simsiam pretrain CIFAR10_FOLDER --recipe cifar10_ep800    paper, appendix D (91.8 % published)
  torchrun --nproc-per-node 8 -m simsiam_models pretrain IMAGENET
                                                            FAIR's 100 epochs, batch 512, on 8 GPUs (68.1 % published);
                                                            any process count that divides the batch

In a clone, `python train.py ...` and `torchrun --nproc-per-node 8 train.py ...` do the same. `simsiam preflight DATA`
inspects the data first and recommends a command.

The same command continues a run that was stopped or killed; with --extend N it continues to N epochs, also a finished
run. --init-from FILE|TAG starts from trained weights. On SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) a run finishes its
step, writes a checkpoint and exits with 128 + the signal's number: 143, 138, 130. Exit code 1 means that the run
cannot continue as it is; one line says why.

At the end OUTPUT/ holds checkpoint.pth (model, optimizer, position), log.jsonl (a line per interval), args.json (all
arguments, resolved) and backbone/, which plain timm loads:
  timm.create_model('local-dir:OUTPUT/backbone', pretrained=True)
"""
import argparse
import dataclasses
import math
import os
import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..data import DataError, TwoViews
from ..runtime.checkpoint import LAST
from ..runtime.distributed import World, join_world
from ..runtime.lifecycle import Lifecycle, RunError
from ..runtime.log import RunLog, check_extras
from ..runtime.messages import printable
from ..runtime.precision import suggest_off
from ..runtime.signals import Signals, Stopped
from ..runtime.terminal import Parser
from ..weights import export_backbone
from ..weights.networks import BACKBONE
from .extension import recipe_at
from .initial import KEY as INITIAL
from .journal import Journal
from .options import add_flags, name_recipe, resolve_recipe
from .schedule import set_lr
from .setup import FREE, KEYS, claim, make_trainer, name_output, prepare
from .step import Trainer, train_step
from .summary import describe, describe_continuation, verdict


def build_parser(prog: str = 'simsiam pretrain') -> argparse.ArgumentParser:
    parser = Parser(prog)
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    add_flags(parser)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parses the command line and trains; returns the last figures."""
    return start(build_parser().parse_args(argv))


def start(args: argparse.Namespace) -> dict[str, Any]:
    """Trains in this process, or as one of torchrun's; returns the last figures."""
    with Signals() as signals, join_world(args.device) as world:
        return pretrain(args, world, signals)


def pretrain(args: argparse.Namespace, world: World, signals: Signals) -> dict[str, Any]:
    """Trains a new run, or the rest of one, and exports its backbone; returns the last figures."""
    name, recipe = resolve_recipe(args)
    check_extras(args.tensorboard, args.wandb)
    views, knn, model = world.all_or_none(lambda: prepare(args, recipe, world))
    folder = name_output(args, name)
    log = RunLog(folder, world.main)
    life = Lifecycle(
        folder / LAST, KEYS, world, signals, log.say, minutes=args.checkpoint_minutes,
        every_steps=args.checkpoint_steps, keep_last=args.keep_last, keep_every=args.keep_every)
    with life:
        record, state = claim(args, name, recipe, model, views.images, life)
        recipe = dataclasses.replace(recipe, epochs=record['epochs'])
        trainer = make_trainer(args, recipe, model, record, life, state is not None)
        max_steps = math.inf if args.max_steps is None else args.max_steps
        journal = Journal(log, trainer, len(views), knn, on_collapse=args.on_collapse, max_steps=max_steps)
        journal.start = 'initial' if INITIAL in record else 'random'
        life.on_restored = journal.restore
        log.say(describe(name, trainer, views, knn, folder))
        run = Pretraining(args, trainer, views, journal, life, record)
        epoch, step = begin(run, state)
        try:
            epoch, step = train(run, epoch, step)
        finally:
            log.close()
    if epoch == recipe.epochs and world.main:
        export_backbone(
            model.backbone, folder / BACKBONE, recipe.model, recipe.model_args, size=recipe.augmentation.size,
            resize=recipe.eval_resize, epochs=epoch)
        log.say(verdict(journal, views, folder))
    elif epoch < recipe.epochs:
        log.say(f'stopped after {epoch * len(views) + step} steps; the same command without --max-steps continues')
    return journal.figures


class Pretraining(NamedTuple):
    """The parts of a run. Functions pass its position separately: `epoch`, and `step`, the steps done in this epoch."""

    args: argparse.Namespace
    trainer: Trainer
    views: TwoViews
    journal: Journal
    life: Lifecycle
    record: dict[str, Any]  # the arguments, as in args.json


def begin(run: Pretraining, state: dict[str, Any] | None) -> tuple[int, int]:
    """Restores a checkpoint, or writes the first one; returns epoch and step.

    Raises:
        RunError: the first checkpoint cannot be written.
    """
    args, trainer, views, journal, life, record = run
    epoch, step = (0, 0) if state is None else (state['epoch'], state['step'])
    if state is not None:
        trainer.load_state_dict(state)
        journal.load_state_dict(state)
        views.unreadable = state['unreadable']
        if epoch < trainer.recipe.epochs:
            journal.log.say(describe_continuation(epoch, step, life.world.size, state['processes']))
    journal.log.resume(0 if state is None else state['log_bytes'])
    done = epoch * len(views) + step
    life.world.broadcast_from_main(lambda: journal.log.attach(args.tensorboard, args.wandb, record, done))
    if state is None:
        journal.measure_before()
    if not life.world.broadcast_from_main(life.newest.exists) and not save(run, epoch, step):
        raise RunError(f'no checkpoint can be written to {life.folder}')
    life.begin(epoch, step)
    journal.log.start(journal.total, done)
    return epoch, step


def train(run: Pretraining, epoch: int, step: int) -> tuple[int, int]:
    """Trains to the end, or to --max-steps; returns the epoch and step reached.

    Raises:
        Stopped: a signal arrived; a checkpoint holds every step.
        RunError, FloatingPointError: the run failed; the last good checkpoint is kept.
    """
    steps, max_steps = len(run.views), math.inf if run.args.max_steps is None else run.args.max_steps
    while epoch < run.trainer.recipe.epochs and epoch * steps + step < max_steps:
        step = train_one_epoch(run, epoch, step, int(min(steps, max_steps - epoch * steps)))
        if step == steps:
            finish_epoch(run, epoch)
            epoch, step = epoch + 1, 0
        save(run, epoch, step)
        run.life.stop_if_signalled()
    run.life.finish()
    return epoch, step


def train_one_epoch(run: Pretraining, epoch: int, step: int, last: int) -> int:
    """Trains this epoch from `step` to `last`; returns the number of steps done in it."""
    args, trainer, views, journal, life, record = run
    trainer.model.train()
    set_lr(trainer.optimizer, epoch, recipe_at(epoch, trainer.recipe, record))
    for x1, x2 in journal.measure_waiting(life.interruptible(views.epoch(epoch, step))):
        loss, p1, z1 = train_step(trainer, x1, x2, epoch * len(views) + step + 1)
        step += 1
        journal.add_step(loss)  # reads the figures before this step, which keeps the device busy meanwhile
        pause = life.agree(epoch * len(views) + step, journal.failed)
        if step % args.log_every == 0 or step == last:
            journal.end_interval(epoch, step, x1, p1, z1)
        if any(pause) or step == last:
            journal.flush()
        if step == last or pause.failed:
            break
        if pause.due or pause.signal:
            save(run, epoch, step)
            life.stop_if_signalled()
    journal.flush()
    if life.agree(epoch * len(views) + step, journal.failed).failed:
        raise RunError(f'{journal.diagnosis or "the outputs have collapsed"}; the last checkpoint is kept')
    return step


def finish_epoch(run: Pretraining, epoch: int) -> None:
    """Reports unreadable images, and measures the kNN accuracy if it is due."""
    trainer, views, journal, life = run.trainer, run.views, run.journal, run.life
    epochs, every = trainer.recipe.epochs, trainer.recipe.knn_every
    due = journal.knn and (epoch + 1 == epochs or every and (epoch + 1) % every == 0)
    journal.gather_unreadable(views, epoch)
    if due:
        saved = save(run, epoch, len(views))  # measuring may take longer than a scheduler waits after its signal
        life.stop_if_signalled()
        life.signals.deferred = not saved
    journal.report_unreadable(epoch + 1, views)
    if due:
        journal.measure_knn(epoch + 1)
        life.signals.deferred = True


def save(run: Pretraining, epoch: int, step: int) -> bool:
    """Writes a checkpoint; returns False if that fails for now; the previous one is then kept.

    Raises:
        FloatingPointError: a weight is not a finite number.
        RunError: no checkpoint could be written for too long.
    """
    _, trainer, views, journal, life, record = run
    journal.gather_unreadable(views, epoch)
    if not trainer.is_finite():
        raise FloatingPointError(
            f'a weight is not a finite number at epoch {epoch}, step {step}: lower --lr ({trainer.recipe.lr:g})'
            f'{suggest_off(trainer.amp)}; the last checkpoint is kept')
    identity = {**{k: v for k, v in record.items() if k not in FREE}, 'amp': trainer.amp}
    return life.save(lambda: {
        **trainer.state_dict(), **journal.state_dict(), 'epoch': epoch, 'step': step, 'unreadable': views.unreadable,
        'run': identity, 'processes': life.world.size}, epoch, step)


def another_is_gone(e: RuntimeError) -> bool:
    """Returns whether this process stopped because another one is gone."""
    return int(os.environ.get('WORLD_SIZE', 1)) > 1 and (
        isinstance(e, dist.DistError) or any(word in str(e) for word in ('gloo', 'NCCL', 'Connection')))


def run(args: argparse.Namespace) -> int:
    """Trains, or prints one line on why it cannot continue; returns the exit code, or exits with a signal's."""
    try:
        start(args)
        return 0
    except torch.OutOfMemoryError as e:
        complain(args, f'out of memory: lower --batch-size, or use more processes or --amp ({e})')
    except DataError as e:  # what only this process reads
        complain(args, str(e))
    except (ValueError, OSError, MemoryError, FloatingPointError, RunError) as e:
        if is_main():  # all processes raise the same
            complain(args, str(e) or 'out of memory')
    except Stopped as e:
        if is_main():
            complain(args, f'{e}; {describe_rest(args)}')
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(e.code)  # a thread that waits for a stream would delay a plain exit
    except RuntimeError as e:
        if not another_is_gone(e):
            raise
        complain(args, f'another process of this run is gone, so this one ends too ({str(e).splitlines()[0]})')
    return 1


def describe_rest(args: argparse.Namespace) -> str:
    """Returns what the same command does after a signal has stopped it."""
    if (name_output(args, name_recipe(args)) / LAST).exists():
        return 'the same command continues from the last checkpoint'
    return 'there is no checkpoint yet, so the same command starts from the beginning'


def is_main() -> bool:
    return os.environ.get('RANK', '0') == '0'


def complain(args: argparse.Namespace, text: str) -> None:
    print(f'{args.prog}: {printable(text)}', file=sys.stderr)
