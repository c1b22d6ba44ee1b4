"""Backbone + classifier -> a trained classifier: optimizer, schedule, averaging, early stopping, checkpoints."""
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ...runtime import checkpoint
from ...runtime.distributed import World, gather_rows, mean_over_processes, parallel, synchronize_batchnorm
from ...runtime.precision import AMP
from .data import Loader, eval_batches, seed_everything, train_batches

# Of a checkpoint.
KEYS = {'model', 'ema', 'optimizer', 'scaler', 'epoch', 'history', 'best', 'stale', 'run', 'unreadable'}


@dataclass(frozen=True)
class Settings:
    """Every number that decides what is learned."""

    epochs: int
    batch_size: int  # over all processes
    optimizer: str
    lr: float  # as used, of the last layer (of the backbone, with head_multiplier)
    weight_decay: float
    momentum: float
    layer_decay: float | None  # each layer's rate is that of the next one times this
    head_multiplier: float | None  # instead: two groups, the classifier's rate is so many times the backbone's
    steps: tuple[int, ...] | None  # times 0.2 after each of these epochs; None: cosine to 0
    warmup_epochs: int
    smoothing: float
    mixup: float  # alpha, 0: none
    cutmix: float
    ema_decay: float  # 0: none
    patience: int  # epochs without a better validation top-1; 0: never stops early
    eval_every: int  # epochs; the last is always measured
    keep: str  # 'best' epoch on validation, or 'last'
    partial_batch: bool  # a last, smaller batch of the epoch trains, too
    image_size: int
    resize: int
    crop_scale: tuple[float, float]
    flip: float
    randaugment: str | None
    erase: float
    seed: int


def add_classifier(model: nn.Module, classes: int, seed: int) -> None:
    """A new last layer, N(0, 0.01) and bias 0; every parameter trains."""
    model.reset_classifier(classes)
    rng = torch.Generator().manual_seed(seed)
    for layer in classifier(model).modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            weight = torch.empty(layer.weight.shape).normal_(0, 0.01, generator=rng)
            with torch.no_grad():
                layer.weight.copy_(weight)
                if layer.bias is not None:
                    layer.bias.zero_()
    model.requires_grad_(True)


def classifier(model: nn.Module) -> nn.Module:
    """The last layer, or all of them where there is one for each token (deit_*_distilled, levit_*)."""
    last = model.get_classifier()
    return nn.ModuleList(last) if isinstance(last, (tuple, list)) else last


def make_optimizer(model: nn.Module, s: Settings) -> torch.optim.Optimizer:
    """Each group's `lr_scale` is what its rate is multiplied by.

    Raises:
        ValueError: timm has no such optimizer, or it needs what is not here: a library, a GPU, second derivatives.
    """
    if s.head_multiplier is not None:
        head = {id(p) for p in classifier(model).parameters()}
        groups = [
            dict(params=[p for p in model.parameters() if id(p) not in head], lr_scale=1.0),
            dict(params=[p for p in model.parameters() if id(p) in head], lr_scale=s.head_multiplier)]
        return torch.optim.SGD(groups, s.lr, s.momentum, weight_decay=s.weight_decay)
    try:
        optimizer = create_optimizer_v2(
            model, s.optimizer, s.lr, s.weight_decay, s.momentum, layer_decay=s.layer_decay)
        if getattr(optimizer, 'is_second_order', False):
            raise ValueError('it needs second derivatives, which are not computed here')
    except (ValueError, TypeError, ImportError, AssertionError) as e:
        raise ValueError(
            f'--opt {s.optimizer}: cannot be used ({" ".join(str(e).split())[:150]}); adamw or sgd') from None
    return optimizer


def lr_factor(s: Settings, step: int, steps: int) -> float:
    """Of the rate, at `step` of the run, with `steps` per epoch: warm-up from 1 / n, then cosine to 0, or steps."""
    if s.steps is not None:
        return 0.2 ** sum(step // steps >= e for e in s.steps)
    warm = s.warmup_epochs * steps
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, s.epochs * steps - warm)))


class Training:
    """One run; `fit` trains it to its end. `model` is what trains, `measured` what is validated and exported."""

    def __init__(
        self, model: nn.Module, classes: int, s: Settings, train: Loader, val: Loader, folder: Path, world: World,
        amp: str, run: dict[str, Any], say: Callable[[str], Any], export: Callable[[nn.Module], Any],
    ) -> None:
        self.s, self.train, self.val, self.folder, self.world, self.amp = s, train, val, folder, world, amp
        self.run, self.say, self.export, self.classes = run, say, export, classes
        self.model = synchronize_batchnorm(model, world)
        self.ema = ModelEmaV3(self.model, s.ema_decay, use_warmup=True) if s.ema_decay else None
        self.measured = self.ema.module if self.ema else self.model
        self.optimizer = make_optimizer(self.model, s)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=amp == 'float16')
        self.mixup = Mixup(
            s.mixup, s.cutmix, label_smoothing=s.smoothing, num_classes=classes) if s.mixup or s.cutmix else None
        self.loss = SoftTargetCrossEntropy() if self.mixup else nn.CrossEntropyLoss(label_smoothing=s.smoothing)
        self.steps = len(train_batches(len(train.samples), s.batch_size, 0, s.seed, world, s.partial_batch))
        self.epoch, self.history, self.best, self.stale = 0, [], None, 0
        self._resume()
        shape = 2, 3, s.image_size, s.image_size
        self.parallel = parallel(self.model, lambda net: net(torch.zeros(shape, device=world.device)).sum(), world)

    @property
    def over(self) -> bool:
        return self.epoch >= self.s.epochs or bool(self.s.patience) and self.stale >= self.s.patience

    def fit(self) -> None:
        """To the last epoch, or to the end of the patience; then `measured` holds the weights that are kept."""
        told = self._unreadable
        while not self.over:
            start = time.monotonic()
            loss = self._train_epoch()
            speed = self.steps * self.s.batch_size / (time.monotonic() - start)
            self.epoch += 1
            row = {'epoch': self.epoch, 'loss': loss}
            improved = False
            if self.epoch % self.s.eval_every == 0 or self.epoch == self.s.epochs:
                row |= self.accuracy(self.predict())
                improved = self.s.keep == 'last' or self.best is None or row['top1'] > self.best['top1']
                self.stale = 0 if improved else self.stale + 1
            row['seconds'] = time.monotonic() - start
            self.history.append(row)
            if improved:
                weights = {k: v.detach().cpu().clone() for k, v in self.measured.state_dict().items()}
                self.best = {'epoch': self.epoch, 'top1': row['top1'], 'weights': weights}
            if self.world.main:
                checkpoint.save(self.folder, self._state())
                if improved:
                    self.export(self.measured)
            self.say(f'{self._line(row, improved)}, {speed:.0f} images/s in training')
            if self._unreadable != told:
                told = train, val = self._unreadable
                self.say(
                    f'so far {train} training and {val} validation images cannot be read: another stands in for the '
                    'former, the latter count as a black one')
        if (loss := self.history[-1]['loss']) > 0.9 * (guess := math.log(self.classes)):
            self.say(
                f'little was learned: the training loss, {loss:.2f}, is near that of a guess, {guess:.2f}; a higher '
                '--lr, more --epochs or less augmentation may help')
        if self.epoch < self.s.epochs:
            self.say(f'stopped early: validation top-1 did not rise for {self.s.patience} epochs')
        self.measured.load_state_dict(self.best['weights'])

    @property
    def _unreadable(self) -> tuple[int, int]:
        return len(self.train.unreadable), len(self.val.unreadable)

    def _line(self, row: dict[str, Any], improved: bool) -> str:
        text = f'epoch {row["epoch"]}/{self.s.epochs}: loss {row["loss"]:.4f}'
        if 'top1' in row:
            text += f', validation top-1 {row["top1"]:.2f} %{" (best)" if improved and self.s.keep == "best" else ""}'
        return text

    def _train_epoch(self) -> float:
        """The mean loss.

        Raises:
            RuntimeError: it is not finite.
        """
        self.parallel.train()
        s, world = self.s, self.world
        keys = train_batches(len(self.train.samples), s.batch_size, self.epoch, s.seed, world, s.partial_batch)
        total = torch.zeros((), device=world.device)
        for i, (x, y) in enumerate(self.train.batches(keys)):
            step = self.epoch * self.steps + i
            seed_everything(s.seed, self.epoch, i * world.size + world.rank, view=1)  # of mixup and dropout
            if self.mixup:
                x, y = self.mixup(x, y)
            for group in self.optimizer.param_groups:
                group['lr'] = s.lr * lr_factor(s, step, self.steps) * group.get('lr_scale', 1.0)
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(world.device.type, AMP[self.amp], enabled=self.amp != 'off'):
                out = self.parallel(x)
            loss = self.loss(out.float(), y)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.ema:
                self.ema.update(self.model, step + 1)
            total += loss.detach()
        self.train.join(world)
        mean = mean_over_processes(total / len(keys), world).item()
        if not math.isfinite(mean):
            raise RuntimeError(
                f'the loss of epoch {self.epoch + 1} is {mean}; a lower --lr, or --amp off, keeps it finite')
        return mean

    @torch.no_grad()
    def predict(self) -> Tensor:
        """(N, 2) of the validation images, on every process: the class, and whether the label is among the first 5."""
        self.measured.eval()
        rows = []
        for x, y in self.val.batches(eval_batches(len(self.val.samples), self.s.batch_size, self.world)):
            with torch.autocast(self.world.device.type, AMP[self.amp], enabled=self.amp != 'off'):
                out = self.measured(x.contiguous(memory_format=torch.channels_last)).float()
            first = out.topk(min(5, out.shape[1])).indices
            rows.append(torch.stack([first[:, 0], (first == y[:, None]).any(1).long()], 1))
        self.val.join(self.world)
        mine = torch.cat(rows) if rows else torch.zeros(0, 2, dtype=torch.long, device=self.world.device)
        return gather_rows(mine, len(self.val.samples), self.world).cpu()

    def accuracy(self, predicted: Tensor) -> dict[str, float]:
        """Percent."""
        right = predicted[:, 0] == torch.as_tensor(self.val.samples.labels)
        return {'top1': 100 * right.double().mean().item(), 'top5': 100 * predicted[:, 1].double().mean().item()}

    def _state(self) -> dict[str, Any]:
        return {
            'model': self.model.state_dict(), 'ema': self.ema.module.state_dict() if self.ema else None,
            'optimizer': self.optimizer.state_dict(), 'scaler': self.scaler.state_dict(), 'epoch': self.epoch,
            'history': self.history, 'best': self.best, 'stale': self.stale, 'run': self.run,
            'unreadable': [self.train.unreadable, self.val.unreadable]}

    def _resume(self) -> None:
        free = {'model', 'processes', 'validation', 'amp'}  # held against args.json before
        state = self.world.broadcast_from_main(
            lambda: checkpoint.load(self.folder, self.say, self.run, free, keys=KEYS))
        if state is None:
            return
        try:
            self._take(state)
        except (TypeError, KeyError, AttributeError, ValueError, RuntimeError) as e:
            raise ValueError(
                f'{self.folder}: the checkpoint does not fit this run ({" ".join(str(e).split())[:150]}); remove the '
                'folder or give another --output') from None
        self.say(f'continuing after epoch {self.epoch}')

    def _take(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state['model'])
        if self.ema:
            self.ema.module.load_state_dict(state['ema'])
        self.optimizer.load_state_dict(state['optimizer'])
        if state['scaler']:  # empty where the run began in another precision
            self.scaler.load_state_dict(state['scaler'])
        self.epoch, self.history, self.best, self.stale = (state[k] for k in ('epoch', 'history', 'best', 'stale'))
        self.train.unreadable, self.val.unreadable = state['unreadable']


def confusion(labels: np.ndarray, predicted: Tensor) -> dict[tuple[int, int], int]:
    """(label, what was predicted) -> how often, of the pairs that occur: of many classes few do."""
    pairs, counts = np.unique(np.stack([labels, predicted.numpy()], 1), axis=0, return_counts=True)
    return {(i, j): n for (i, j), n in zip(pairs.tolist(), counts.tolist(), strict=True)}
