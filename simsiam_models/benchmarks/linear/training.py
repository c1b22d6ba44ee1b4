"""Trains linear classifiers on a frozen backbone.

Each process sends its share of a batch through the backbone. Then all processes gather the features of the whole batch
and take the same step. N processes therefore compute what one does, including the batch norm of the heads and the
short last batch, and no gradient is exchanged: the features of a batch are smaller than the heads of five feature maps.
"""
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...data import EvalImages, Transform, UnreadableError
from ...data.augment import send
from ...runtime.distributed import gather_rows
from ...runtime.lifecycle import Lifecycle
from ...runtime.precision import suggest_off
from ..features import CPU_BATCH
from ..metrics import right_within
from ..protocols import LinearProtocol
from ..samples import Pair
from .frozen import FrozenBackbone, explain_out_of_memory
from .heads import Heads, compute_lr, make_optimizer
from .images import ADVICE, Piece, TrainCrops, finish
from .protocol import ChosenProtocol

CHECK_EVERY = 50  # steps between checks of the loss; reading it makes the host wait for the device
KEYS = {'heads', 'optimizer', 'sums', 'history', 'seconds', 'epoch', 'step', 'run'}  # of a checkpoint


class LinearRun:
    """The parts of a run, and its results so far.

    `history` holds an entry per epoch: epoch, loss, lr, train_top1, and if it was evaluated, top1 and, from 6 classes
    on, top5. Accuracies are lists, in percent, with a number for each classifier. `micro_batch` images go through the
    backbone in one pass (default: 256, on a CPU 8). A checkpoint must agree with `identity` to continue this run.
    """

    def __init__(
        self, chosen: ChosenProtocol, frozen: FrozenBackbone, pair: Pair, life: Lifecycle, *, workers: int,
        seed: int = 0, micro_batch: int | None = None, identity: dict[str, Any],
    ) -> None:
        p, world = chosen.protocol, life.world
        micro_batch = micro_batch or (CPU_BATCH if world.device.type == 'cpu' else 256)
        mine = np.arange(world.rank, len(pair.test), world.size)
        batches = [mine[i:i + micro_batch] for i in range(0, len(mine), micro_batch)]
        self.chosen, self.frozen, self.life, self.identity = chosen, frozen, life, identity
        self.train_images = TrainCrops(pair.train, p, micro_batch, workers, seed, world)
        self.test_images = EvalImages(pair.test, batches, Transform(p.resize, p.image_size), workers, world.device)
        self.train_labels, self.test_labels = (np.asarray(x.labels, np.int64) for x in (pair.train, pair.test))
        self.classes, five = pair.classes, p.inputs == 'five'
        if five:
            check_batches(len(pair.train), p.batch_size, any(values == 1 for _, values in frozen.shapes))
        self.names = [f'feature{i + 1}' for i in range(len(frozen.shapes))] if five else ['']
        self.heads = Heads(frozen.shapes, pair.classes, five, p.init_std, seed).to(world.device)
        self.optimizer = make_optimizer(self.heads, p)
        # Over the images of this epoch: the loss, and each classifier's right answers. MPS has no float64.
        dtype = torch.float32 if world.device.type == 'mps' else torch.float64
        self.sums = torch.zeros(1 + len(self.names), dtype=dtype, device=world.device)
        self.history: list[dict[str, Any]] = []
        self.started = time.perf_counter()  # of a continued run: earlier by the seconds of the sessions before

    def save(self, epoch: int, step: int) -> None:
        """Writes a checkpoint; if that fails for now, keeps the previous one."""
        self.life.save(lambda: {
            'heads': self.heads.state_dict(), 'optimizer': self.optimizer.state_dict(), 'sums': self.sums.cpu(),
            'history': self.history, 'seconds': time.perf_counter() - self.started, 'run': self.identity,
            'epoch': epoch, 'step': step,
        }, epoch, step)

    def restore(self, state: dict[str, Any]) -> tuple[int, int]:
        """Restores a checkpoint; returns its epoch and the number of steps done in it."""
        self.heads.load_state_dict(state['heads'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.sums.copy_(state['sums'])
        self.history, self.started = state['history'], time.perf_counter() - state['seconds']
        epoch, step = state['epoch'], state['step']
        done = f'is finished after {epoch} epochs; --fresh trains again'
        if epoch < self.chosen.protocol.epochs:
            done = f'continues after {epoch} epochs' + f' and {step} steps' * bool(step)
        self.life.say(f'{self.chosen.label}: {self.life.newest} {done}')
        return epoch, step


def check_batches(n: int, batch: int, single: bool) -> None:
    """Raises ValueError if a batch of 1 image is too small for batch norm; `single`: a map has 1 value per channel."""
    if batch > 1 and not (single and 1 in (n, n % batch)):
        return
    if n < 2:
        raise ValueError(f'{n} training image: the batch norm of the classifiers needs 2 in a batch; add images')
    possible = next(size for size in range(max(2, batch), n + 1) if n % size != 1)
    raise ValueError(
        f'--batch-size {batch}: of {n} images {"the last" if batch > 1 else "each"} batch would hold 1, but the batch '
        f'norm of the classifiers needs 2; use --batch-size {possible}')


def train(run: LinearRun, state: dict[str, Any] | None = None) -> None:
    """Trains and evaluates until the last epoch, from the checkpoint `state` if there is one.

    Raises Stopped after a signal; FloatingPointError if the loss is not finite; RuntimeError if an image or a
    checkpoint fails.
    """
    p, label, life = run.chosen.protocol, run.chosen.label, run.life
    epoch, step = (0, 0) if state is None else run.restore(state)
    life.begin(epoch, step)
    while epoch < p.epochs:
        speed = train_one_epoch(run, epoch, step)
        lr, (loss, *right) = compute_lr(epoch, p), (run.sums / len(run.train_labels)).tolist()
        epoch, step = epoch + 1, 0
        entry = {'epoch': epoch, 'loss': loss, 'lr': lr, 'train_top1': [100 * r for r in right]}
        if epoch % p.eval_every == 0 or epoch == p.epochs or epoch in p.report_epochs:
            entry |= evaluate(run)
        run.history.append(entry)
        run.sums.zero_()
        run.save(epoch, step)
        columns = {'train_top1': 'train top-1', 'top1': 'top-1', 'top5': 'top-5'}.items()
        figures = (f'  {name} {" ".join(f"{v:.2f}" for v in entry[k])} %' for k, name in columns if k in entry)
        life.say(f'{label}: epoch {epoch}/{p.epochs}  loss {loss:.4f}{"".join(figures)}  lr {lr:.3g}  '
                 f'{speed:.0f} images/s')
        life.stop_if_signalled()
    life.finish()


def train_one_epoch(run: LinearRun, epoch: int, step: int) -> float:
    """Trains this epoch from `step` on; returns the images per second."""
    p, life, steps = run.chosen.protocol, run.life, len(run.train_images)
    run.heads.train()
    run.frozen.model.eval()
    for group in run.optimizer.param_groups:
        group['lr'] = compute_lr(epoch, p)
    started, images, batches = time.perf_counter(), 0, extract_batches(run, epoch, step)
    while (batch := life.world.all_or_none(lambda: next(batches, None))) is not None:
        train_step(run, *batch)
        step += 1
        images += len(batch[1])
        pause = any(life.agree(epoch * steps + step))
        if (pause or step == steps or step % CHECK_EVERY == 0) and not math.isfinite(run.sums[0]):
            raise FloatingPointError(
                f'protocol {run.chosen.label}: the loss is not finite in epoch {epoch + 1}, by step {step}; lower --lr '
                f'({p.lr:g}){suggest_off(run.frozen.amp)}')
        if pause and step < steps:
            run.save(epoch, step)
            life.stop_if_signalled()
    return images / (time.perf_counter() - started)


def extract_batches(run: LinearRun, epoch: int, step: int) -> Iterator[tuple[list[Tensor], np.ndarray]]:
    """Yields this process's features of each step from `step` on, and the rows of all processes in it."""
    pieces = []
    for piece, rows in run.train_images.epoch(epoch, step):
        pieces.append(extract(run, piece))
        if piece.last:
            yield [torch.cat(x) for x in zip(*pieces, strict=True)], rows
            pieces = []


def extract(run: LinearRun, piece: Piece) -> list[Tensor]:
    """Returns the features (n, D) of a piece for each classifier."""
    device, backbone = run.life.world.device, run.frozen.backbone
    if not len(piece.rows):
        return [torch.zeros(0, channels * values, device=device) for channels, values in run.frozen.shapes]
    advice = 'lower --micro-batch' if len(piece.rows) > 1 else 'use a smaller --model, or another --device'
    with explain_out_of_memory(f'in the backbone: {advice}'):
        return run.frozen.extract(finish(piece, device, backbone.mean, backbone.std))


def train_step(run: LinearRun, mine: list[Tensor], rows: np.ndarray) -> None:
    """Takes a step on the images `rows`; `mine` are the features of this process's share of them."""
    labels = send(run.train_labels[rows], run.sums)
    logits = run.heads([gather_rows(x, len(rows), run.life.world) for x in mine])
    loss = torch.stack([F.cross_entropy(y, labels) for y in logits]).sum()
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    run.optimizer.step()
    right = [right_within(y, labels, 1).to(run.sums) for y in logits]
    run.sums += torch.stack([loss.detach().to(run.sums) * len(rows), *right])


@torch.no_grad()
def evaluate(run: LinearRun) -> dict[str, list[float]]:
    """Returns the accuracy of each classifier of rank 0 on the test images, in percent; top-5 from 6 classes on."""
    world, images, ks = run.life.world, run.test_images, (1, 5) if run.classes > 5 else (1,)
    right = run.sums.new_zeros(len(ks), len(run.names))

    def count() -> None:
        for rows, pixels in images:
            if bad := [row for row in rows.tolist() if row in images.unreadable]:
                raise UnreadableError(f'{images.unreadable[bad[0]]}; {ADVICE}')
            scores, labels = run.heads(extract(run, Piece(rows, pixels))), send(run.test_labels[rows], run.sums)
            right.add_(torch.stack([torch.stack([right_within(y, labels, k) for y in scores]) for k in ks]))

    run.heads.eval()
    if world.size > 1:
        for x in run.heads.state_dict().values():
            dist.broadcast(x, 0)
    world.all_or_none(count)
    if world.size > 1:
        dist.all_reduce(right)
    return {f'top{k}': row for k, row in zip(ks, (100 * right / len(run.test_labels)).tolist(), strict=True)}


def summarize(history: list[dict[str, Any]], p: LinearProtocol, names: list[str]) -> dict[str, float]:
    """Returns the metrics of the classifiers `names` ([''] if there is only one), in percent.

    The epoch that the protocol reports, the best or the last, comes first, then the other one and its `report_epochs`.
    """
    evaluated = [entry for entry in history if 'top1' in entry]
    metrics: dict[str, float] = {}
    for i, name in enumerate(names):
        best = int(np.argmax([entry['top1'][i] for entry in evaluated]))  # the first of equals
        entries = {'best': evaluated[best], 'last': evaluated[-1]}
        entries |= {f'epoch{e["epoch"]}': e for e in evaluated if e['epoch'] in p.report_epochs}
        reported = entries.pop(p.reported)
        metrics[name or 'top1'] = reported['top1'][i]
        for which, entry in {'': reported, **entries}.items():
            for k in ('top1', 'top5'):
                if k in entry and (which or k == 'top5'):
                    metrics['_'.join(filter(None, (name, k, which)))] = entry[k][i]
    return metrics
