"""Trains linear classifiers on a frozen backbone.

Each process sends its share of a batch through the backbone. Then all processes gather the features of the whole batch
and take the same step. So N processes compute what one does, including the batch norm of the heads and the short last
batch, and no gradient is exchanged: the features of a batch are smaller than the heads of five feature maps.
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
    """The parts of a run, and its results so far. Its position is `epoch` and `step`, the steps done in this epoch.

    `history` holds an entry per epoch: epoch, loss, lr, train_top1, and if it was evaluated, top1 and, from 6 classes
    on, top5. Accuracies are lists, in percent, with a number for each classifier.

    Args:
        workers: threads that read images.
        micro_batch: images in one pass through the backbone; None: 256, on a CPU 8.
        identity: what a checkpoint must agree with to continue this run.
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

    @property
    def seconds(self) -> float:
        """The time that training and evaluation have taken, in all sessions."""
        return time.perf_counter() - self.started

    def state_dict(self) -> dict[str, Any]:
        return {
            'heads': self.heads.state_dict(), 'optimizer': self.optimizer.state_dict(), 'sums': self.sums.cpu(),
            'history': self.history, 'seconds': self.seconds, 'run': self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.heads.load_state_dict(state['heads'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.sums.copy_(state['sums'])
        self.history = state['history']
        self.started = time.perf_counter() - state['seconds']


def check_batches(n: int, batch: int, single: bool) -> None:
    """Raises ValueError if n images end in a batch that leaves the batch norm of the heads one value per channel.

    Args:
        single: one of the pooled feature maps has one value per channel.
    """
    if batch > 1 and not (single and 1 in (n, n % batch)):
        return
    if n < 2:
        raise ValueError(f'{n} training image: the batch norm of the classifiers needs 2 in a batch; add images')
    possible = next(size for size in range(max(2, batch), n + 1) if n % size != 1)
    raise ValueError(
        f'--batch-size {batch}: of {n} images {"the last" if batch > 1 else "each"} batch would hold 1, but the batch '
        f'norm of the classifiers needs 2; use --batch-size {possible}')


def train(run: LinearRun, state: dict[str, Any] | None = None) -> None:
    """Trains and evaluates until the last epoch.

    Args:
        state: the checkpoint to continue from.

    Raises:
        Stopped: a signal came; a checkpoint holds every step.
        RuntimeError: the loss is not finite, an image cannot be read, or no checkpoint could be written for too long.
    """
    p, label, life = run.chosen.protocol, run.chosen.label, run.life
    epoch, step = restore(run, state)
    while epoch < p.epochs:
        speed = train_one_epoch(run, epoch, step)
        run.history.append(finish_epoch(run, epoch))
        run.sums.zero_()
        epoch, step = epoch + 1, 0
        save(run, epoch, step)
        life.say(format_epoch(run.history[-1], p, label, speed))
        life.stop_if_signalled()
    life.finish()


def restore(run: LinearRun, state: dict[str, Any] | None) -> tuple[int, int]:
    """Restores a checkpoint if there is one; returns epoch and step."""
    epoch = step = 0
    if state is not None:
        run.load_state_dict(state)
        epoch, step = state['epoch'], state['step']
        what = f'{run.chosen.label}: {run.life.newest}'
        if epoch == run.chosen.protocol.epochs:
            run.life.say(f'{what} is finished after {epoch} epochs; --fresh trains again')
        else:
            run.life.say(f'{what} continues after {epoch} epochs' + f' and {step} steps' * bool(step))
    run.life.begin(epoch, step)
    return epoch, step


def train_one_epoch(run: LinearRun, epoch: int, step: int) -> float:
    """Trains this epoch from `step` on; returns the images per second."""
    life, steps = run.life, len(run.train_images)
    run.heads.train()
    run.frozen.model.eval()
    for group in run.optimizer.param_groups:
        group['lr'] = compute_lr(epoch, run.chosen.protocol)
    started, images, batches = time.perf_counter(), 0, extract_batches(run, epoch, step)
    while (batch := life.world.all_or_none(lambda: next(batches, None))) is not None:
        train_step(run, *batch)
        step += 1
        images += len(batch[1])
        pause = life.agree(epoch * steps + step)
        if step == steps or step % CHECK_EVERY == 0 or any(pause):
            check_loss(run, epoch, step)
        if step < steps and any(pause):
            save(run, epoch, step)
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
    with explain_out_of_memory():
        return run.frozen.extract(finish(piece, device, backbone.mean, backbone.std, backbone.bgr))


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


def check_loss(run: LinearRun, epoch: int, step: int) -> None:
    """Raises RuntimeError if the loss of this epoch is not finite."""
    if not math.isfinite(float(run.sums[0])):
        raise RuntimeError(
            f'protocol {run.chosen.label}: the loss is not finite in epoch {epoch + 1}, by step {step}; lower --lr '
            f'({run.chosen.protocol.lr:g}), or use --amp off (now {run.frozen.amp})')


def finish_epoch(run: LinearRun, epoch: int) -> dict[str, Any]:
    """Returns the epoch's entry of the history; evaluates the classifiers if that is due."""
    p, done = run.chosen.protocol, epoch + 1
    loss, *right = (run.sums / len(run.train_labels)).tolist()
    entry = {'epoch': done, 'loss': loss, 'lr': compute_lr(epoch, p), 'train_top1': [100 * r for r in right]}
    if done % p.eval_every == 0 or done == p.epochs or done in p.report_epochs:
        entry |= evaluate(run)
    return entry


@torch.no_grad()
def evaluate(run: LinearRun) -> dict[str, list[float]]:
    """Returns the accuracy of each classifier on the test images, in percent.

    All processes use the classifiers of rank 0. Top-5 accuracy is left out up to 5 classes, where it is trivial.
    """
    world, ks = run.life.world, (1, 5) if run.classes > 5 else (1,)
    run.heads.eval()
    if world.size > 1:
        for x in run.heads.state_dict().values():
            dist.broadcast(x, 0)
    right = world.all_or_none(lambda: count_right(run, ks))
    if world.size > 1:
        dist.all_reduce(right)
    return {f'top{k}': row for k, row in zip(ks, (100 * right / len(run.test_labels)).tolist(), strict=True)}


def count_right(run: LinearRun, ks: tuple[int, ...]) -> Tensor:
    """Counts this process's test images whose label is among the k highest scores; returns (len(ks), classifiers).

    Raises:
        UnreadableError: an image cannot be read.
    """
    right = run.sums.new_zeros(len(ks), len(run.names))
    for rows, pixels in run.test_images:
        if bad := [row for row in rows.tolist() if row in run.test_images.unreadable]:
            raise UnreadableError(f'{run.test_images.unreadable[bad[0]]}; {ADVICE}')
        labels = send(run.test_labels[rows], run.sums)
        for i, scores in enumerate(run.heads(extract(run, Piece(rows, pixels)))):
            right[:, i] += torch.stack([right_within(scores, labels, k) for k in ks])
    return right


def save(run: LinearRun, epoch: int, step: int) -> None:
    """Writes a checkpoint; if that fails for now, the one before is kept."""
    run.life.save(lambda: {**run.state_dict(), 'epoch': epoch, 'step': step}, epoch, step)


def summarize(history: list[dict[str, Any]], p: LinearProtocol, names: list[str]) -> dict[str, float]:
    """Returns the metrics of each classifier, in percent.

    The protocol reports either the best or the last epoch. The metrics of this epoch come first, then those of the
    other one, then those of its `report_epochs`.

    Args:
        names: of the classifiers; [''] if there is only one.
    """
    evaluated = [entry for entry in history if 'top1' in entry]
    metrics: dict[str, float] = {}
    for i, name in enumerate(names):
        best = max(evaluated, key=lambda entry, i=i: entry['top1'][i])  # the first of equal ones
        entries = {'best': best, 'last': evaluated[-1]}
        entries |= {f'epoch{e["epoch"]}': e for e in evaluated if e['epoch'] in p.report_epochs}
        reported = entries.pop(p.reported)
        metrics[name or 'top1'] = reported['top1'][i]
        for which, entry in {'': reported, **entries}.items():
            for k in ('top1', 'top5'):
                if k in entry and (which or k == 'top5'):
                    metrics['_'.join(filter(None, (name, k, which)))] = entry[k][i]
    return metrics


def format_epoch(entry: dict[str, Any], p: LinearProtocol, label: str, images_per_second: float) -> str:
    """Returns an epoch's entry as one line."""
    text = f'{label}: epoch {entry["epoch"]}/{p.epochs}  loss {entry["loss"]:.4f}'
    for key, name in (('train_top1', 'train top-1'), ('top1', 'top-1'), ('top5', 'top-5')):
        if key in entry:
            text += f'  {name} {" ".join(f"{v:.2f}" for v in entry[key])} %'
    return f'{text}  lr {entry["lr"]:.3g}  {images_per_second:.0f} images/s'
