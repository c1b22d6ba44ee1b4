"""Training a linear classifier, or five, on a frozen backbone.

Of several processes each sends its share of the images through the backbone; then all take the same step on the whole
batch's features, which are gathered: a step of N processes is the step of one, batch norm of the heads and short last
batches included, and no gradient is exchanged (features of a batch are smaller than the heads of five taps).
"""
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...data.augment import send
from ...runtime import checkpoint
from ...runtime.checkpoint import differences, write_atomically
from ...runtime.distributed import World, default_workers, gather_rows
from ...runtime.precision import AMP, full_precision
from ...runtime.signals import Signals, Stopped
from ..backbone import Backbone, fits_protocol, pooled, taps, weights_digest
from ..features import CPU_BATCH
from ..metrics import right_within
from ..protocols import LinearProtocol
from .heads import Heads, lr_at, make_optimizer
from .images import CentreCrops, Piece, TrainCrops, to_device
from .protocol import NUMBERS

CHECK_EVERY = 50  # steps after which the loss is looked at; reading it makes the host wait
SAVE_EVERY = 600.0  # seconds, within an epoch
KEYS = {'heads', 'optimizer', 'epoch', 'step', 'sums', 'seen', 'history', 'identity', 'seconds'}  # of a checkpoint


@contextmanager
def backbone_fits() -> Iterator[None]:
    """Around what sends images through the backbone. Raises RuntimeError where the memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise RuntimeError(
            f'out of memory ({str(e).split(". ")[0]}) in the backbone: lower --micro-batch') from None


@torch.no_grad()
def tap_shapes(
    backbone: Backbone, p: LinearProtocol, device: torch.device) -> tuple[list[tuple[int, int]], str | None]:
    """(channels, values per channel) of each tap, and how taps are pooled.

    'mmselfsup' is the protocol's pooling, of the maps of a ResNet at 224 px; others are pooled 'adaptive'. The average
    pool (None) is the network's own.

    Raises:
        ValueError: the backbone does not take images of this size, or gives no row for each.
    """
    x = torch.zeros(1, 3, p.image_size, p.image_size, device=device)
    try:
        if p.inputs == 'avgpool':
            y = backbone.model(x)
            if y.ndim != 2:
                raise ValueError(f'--model {backbone.name} gives {tuple(y.shape)}, not (B, D)')
            return [(y.shape[1], 1)], None
        maps = taps(backbone, x)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(
            f'--model {backbone.name} does not take images of {p.image_size} pixels ({e}); give another '
            '--image-size') from None
    fits = fits_protocol(maps)
    shapes = [(m.shape[1], y.shape[1] // m.shape[1]) for m, y in zip(maps, pooled(maps, not fits), strict=True)]
    return shapes, 'mmselfsup' if fits else 'adaptive'


def check_batches(n: int, batch: int, single: bool) -> None:
    """Batch norm of the heads needs two values of a channel; `single`: some tap has one for each image.

    Raises:
        ValueError: a batch of one image.
    """
    if batch > 1 and not (single and 1 in (n, n % batch)):
        return
    if n < 2:
        raise ValueError(f'{n} training image, and batch norm of the classifiers needs 2 in a batch; add images')
    fits = next(size for size in range(max(2, batch), n + 1) if n % size != 1)
    raise ValueError(
        f'--batch-size {batch}: of {n} images {"the last" if batch > 1 else "each"} batch would hold 1, and batch norm '
        f'of the classifiers needs 2; use --batch-size {fits}')


class LinearRun:
    """One linear evaluation, or the rest of one: `resume`, `train`, `check_frozen`, `metrics`.

    `label` names the protocol in every line that holds a number. Of `history` each entry is an epoch: loss, lr,
    train_top1, and top1 (and top5 from 6 classes on; fewer make it trivial) where it was evaluated, lists over taps.
    """

    def __init__(
        self, protocol: LinearProtocol, label: str, backbone: Backbone, pair: Any, world: World, seed: int, amp: str,
        micro: int | None, workers: int | None, path: Path, identity: dict[str, Any], signals: Signals | None = None,
        say: Callable[[str], Any] = print,
    ) -> None:
        self.p, self.label, self.backbone, self.world, self.amp = protocol, label, backbone, world, amp
        self.classes, self.path, self.identity, self.say = pair.classes, path, identity, say
        self.signals = signals or Signals()
        workers = default_workers(world.device) if workers is None else workers
        micro = micro or (CPU_BATCH if world.device.type == 'cpu' else 256)
        self.train_images = TrainCrops(
            pair.train, protocol, micro, world.device, workers, seed, world.rank, world.size)
        self.test_images = CentreCrops(pair.test, protocol, micro, world.device, workers)
        self.labels = [np.asarray(x.labels).astype(np.int64) for x in (pair.train, pair.test)]
        self.model = backbone.model.eval().requires_grad_(False)
        self.shapes, self.pooling = tap_shapes(backbone, protocol, world.device)
        self.names = [f'feature{i + 1}' for i in range(len(self.shapes))] if protocol.inputs == 'five' else ['']
        if protocol.inputs == 'five':
            check_batches(len(pair.train), protocol.batch_size, any(values == 1 for _, values in self.shapes))
        self.heads = Heads(
            self.shapes, self.classes, protocol.inputs == 'five', protocol.init_std, seed).to(world.device)
        self.optimizer = make_optimizer(self.heads, protocol)
        self.wide = torch.float32 if world.device.type == 'mps' else torch.float64  # of sums; MPS has no other
        self.epoch = self.step = 0
        self.history: list[dict[str, Any]] = []
        self.sums = torch.zeros(1 + len(self.names), dtype=self.wide, device=world.device)  # loss; right per tap
        self.seen, self.seconds_before, self.started = 0, 0.0, time.perf_counter()
        self.saved = time.monotonic()

    # What the heads see.

    @torch.no_grad()
    def features(self, x: Tensor) -> list[Tensor]:
        """(n, 3, S, S) -> (n, D) float32 per tap."""
        with torch.autocast(self.world.device.type, AMP[self.amp], enabled=self.amp != 'off'), full_precision():
            if self.p.inputs == 'avgpool':
                return [self.model(x).float()]
            maps = taps(self.backbone, x)
        return pooled(maps, self.pooling == 'adaptive')

    def _piece(self, piece: Piece) -> list[Tensor]:
        if not len(piece.rows):
            return [torch.zeros(0, c * n, device=self.world.device) for c, n in self.shapes]
        with backbone_fits():
            return self.features(
                to_device(piece, self.world.device, self.backbone.mean, self.backbone.std, self.backbone.bgr))

    # The loop.

    def train(self) -> None:
        """To the last epoch.

        Raises:
            Stopped: a signal came; the checkpoint holds this very step.
            RuntimeError: the loss is no number, or an image cannot be read; on every process.
        """
        self.started, self.saved = time.perf_counter(), time.monotonic()
        while self.epoch < self.p.epochs:
            self.signals.deferred = True
            self._train_epoch()
            entry = self._read_sums()
            done = self.epoch + 1
            if done % self.p.eval_every == 0 or done == self.p.epochs or done in self.p.report_epochs:
                entry.update(self.evaluate())
            self.history.append(entry)
            self.epoch, self.step = done, 0
            self.sums.zero_()
            self.seen = 0
            self.save()
            self.say(self._line(entry))
            if stop := self.world.all_reduce_max([self.signals.number])[0]:
                raise Stopped(stop)
        self.signals.deferred = False

    def _train_epoch(self) -> None:
        self.heads.train()
        self.model.eval()
        lr = lr_at(self.epoch, self.p)
        for group in self.optimizer.param_groups:
            group['lr'] = lr
        self.clock, self.seen_now, steps = time.perf_counter(), 0, self._steps()
        while (step := self.world.all_or_none(lambda: next(steps, None))) is not None:
            self._step(*step)
            self.step += 1
            if self.step % CHECK_EVERY == 0:
                self._finite()
            due = self.world.main and time.monotonic() - self.saved >= SAVE_EVERY
            stop, due = self.world.all_reduce_max([self.signals.number, int(due)])
            if (stop or due) and self.step < len(self.train_images):
                self._finite()
                self.save()
                if stop:
                    raise Stopped(stop)
        self.seconds_epoch = time.perf_counter() - self.clock

    def _steps(self) -> Iterator[tuple[list[Tensor], np.ndarray]]:
        """The rest of the epoch: what this process has of a step's features, and the step's rows of all processes."""
        parts = []
        for piece, rows in self.train_images.epoch(self.epoch, self.step):
            parts.append(self._piece(piece))
            if piece.last:
                yield [torch.cat(x) for x in zip(*parts, strict=True)], rows
                parts = []

    def _step(self, mine: list[Tensor], rows: np.ndarray) -> None:
        labels = send(self.labels[0][rows], self.sums)
        logits = self.heads([gather_rows(x, len(rows), self.world) for x in mine])
        losses = torch.stack([F.cross_entropy(y, labels) for y in logits])
        self.optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        self.optimizer.step()
        with torch.no_grad():
            right = [right_within(y, labels, 1) for y in logits]
            self.sums += torch.stack([losses.sum().to(self.wide) * len(rows), *(r.to(self.wide) for r in right)])
        self.seen += len(rows)
        self.seen_now += len(rows)

    def _finite(self) -> None:
        if not math.isfinite(float(self.sums[0])):
            raise RuntimeError(
                f'protocol {self.label}: the loss is not a number any more in epoch {self.epoch + 1}, by step '
                f'{self.step}; lower --lr ({self.p.lr:g}), or use --amp off (now {self.amp})')

    def _read_sums(self) -> dict[str, Any]:
        self._finite()
        loss, *right = (self.sums / self.seen).tolist()
        return {'epoch': self.epoch + 1, 'loss': loss, 'lr': lr_at(self.epoch, self.p),
                'train_top1': [100 * r for r in right]}

    @torch.no_grad()
    def evaluate(self) -> dict[str, list[float]]:
        """Percent on the test images, per tap; the classifier is rank 0's on every process."""
        self.heads.eval()
        ks = (1, 5) if self.classes > 5 else (1,)
        if self.world.size > 1:
            for x in self.heads.state_dict().values():
                dist.broadcast(x, 0)
        right = self.world.all_or_none(lambda: self._right(ks))
        if self.world.size > 1:
            dist.all_reduce(right)
        return {f'top{k}': row for k, row in zip(ks, (100 * right / len(self.labels[1])).tolist(), strict=True)}

    def _right(self, ks: Sequence[int]) -> Tensor:
        """(len(ks), taps): how many of this process's test images have their label among the k highest scores."""
        right = torch.zeros(len(ks), len(self.names), dtype=self.wide, device=self.world.device)
        for piece in self.test_images.pieces(self.world.rank, self.world.size):
            labels = send(self.labels[1][piece.rows], self.sums)
            for tap, scores in enumerate(self.heads(self._piece(piece))):
                right[:, tap] += torch.stack([right_within(scores, labels, k) for k in ks])
        return right

    def check_frozen(self) -> None:
        """Raises RuntimeError where any tensor of the backbone is not what it was, bit for bit."""
        if weights_digest(self.model) != self.backbone.digest:
            raise RuntimeError(
                f'protocol {self.label}: the backbone {self.backbone.name} changed while its classifier was trained, '
                'so this is no linear evaluation; no number is given')

    # What comes of it.

    def metrics(self) -> dict[str, float]:
        """Percent, of each tap: what the protocol reports, then the other of best and last epoch."""
        evaluated = [e for e in self.history if 'top1' in e]
        best = self.best_epochs()
        out: dict[str, float] = {}
        for tap, name in enumerate(self.names):
            entries = {'best': evaluated[best[tap]], 'last': evaluated[-1]}
            entries |= {f'epoch{e["epoch"]}': e for e in evaluated if e['epoch'] in self.p.report_epochs}
            shown = entries.pop(self.p.reported)
            out[name or 'top1'] = shown['top1'][tap]
            for which, entry in {'': shown, **entries}.items():
                for k in ('top1', 'top5'):
                    if k in entry and (which or k == 'top5'):
                        out['_'.join(filter(None, (name, k, which)))] = entry[k][tap]
        return out

    def best_epochs(self) -> list[int]:
        """Of each tap which of the evaluations is the best, the first of equals."""
        evaluated = [e['top1'] for e in self.history if 'top1' in e]
        return [max(range(len(evaluated)), key=lambda i, tap=tap: evaluated[i][tap]) for tap in range(len(self.names))]

    @property
    def seconds(self) -> float:
        """Of training and evaluating, also before it was continued."""
        return self.seconds_before + time.perf_counter() - self.started

    def _line(self, entry: dict[str, Any]) -> str:
        def percent(values: list[float]) -> str:
            return ' '.join(f'{v:.2f}' for v in values) + ' %'

        text = (f'{self.label}: epoch {entry["epoch"]}/{self.p.epochs}  loss {entry["loss"]:.4f}  train top-1 '
                f'{percent(entry["train_top1"])}')
        for k in (1, 5):
            if f'top{k}' in entry:
                text += f'  top-{k} {percent(entry[f"top{k}"])}'
        return f'{text}  lr {entry["lr"]:.3g}  {self.seen_now / self.seconds_epoch:.0f} images/s'

    # Checkpoints.

    def save(self) -> None:
        """Raises OSError where it cannot be written; the one before is kept."""
        def write() -> None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            state = {
                'heads': self.heads.state_dict(), 'optimizer': self.optimizer.state_dict(), 'epoch': self.epoch,
                'step': self.step, 'sums': self.sums.cpu(), 'seen': self.seen, 'history': self.history,
                'identity': self.identity, 'seconds': self.seconds}
            write_atomically(self.path, lambda f: torch.save(state, f))

        self.world.broadcast_from_main(write)
        self.saved = time.monotonic()

    def resume(self) -> None:
        """From the checkpoint at `path`, if there is one.

        Raises:
            ValueError: it cannot be read, or belongs to another run.
        """
        def read() -> dict[str, Any] | None:
            if not os.path.exists(self.path):
                return None
            try:
                state = checkpoint.read(self.path, KEYS)
                said = differences(_told(state['identity']), _told(self.identity), set())
            except (ValueError, TypeError, AttributeError, KeyError) as e:
                raise ValueError(f'{e}; remove it, or start anew with --fresh') from None
            if said:
                raise ValueError(f'{self.path} belongs to another run ({said}); start anew with --fresh')
            return state

        state = self.world.broadcast_from_main(read)
        if state is None:
            return
        try:
            self.heads.load_state_dict(state['heads'])
            self.optimizer.load_state_dict(state['optimizer'])
            self.sums.copy_(state['sums'])
            self.epoch, self.step, self.seen = (int(state[key]) for key in ('epoch', 'step', 'seen'))
            self.history, self.seconds_before = list(state['history']), float(state['seconds'])
            if len(self.history) != self.epoch:
                raise ValueError(f'{len(self.history)} epochs are told of {self.epoch}')
        except (TypeError, KeyError, AttributeError, ValueError, RuntimeError) as e:
            raise ValueError(
                f'{self.path} does not fit this run ({" ".join(str(e).split())[:150]}); remove it, or start anew with '
                '--fresh') from None
        if self.epoch == self.p.epochs:
            self.say(f'{self.label}: {self.path} is finished, {self.epoch} epochs; --fresh trains anew')
            return
        self.say(
            f'{self.label}: continuing {self.path} after {self.epoch} epochs' + (f' and {self.step} steps' * bool(
                self.step)))


def _told(identity: dict[str, Any]) -> dict[str, Any]:
    """Its parts by name, the numbers of the protocol as the flags that give them; without what follows from these."""
    numbers = {
        f'--{k.replace("_", "-")}' if k in NUMBERS else f'protocol {k}': v for k, v in identity['protocol'].items()
        if k not in ('scaled_lr', 'changed', 'name')}
    return {**numbers, 'weights': identity['weights'], 'data': identity['data']}
