"""The fine-tuning loop, which reads from `fit` down: fit -> train_one_epoch -> train_step."""
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ...runtime.distributed import World, gather_rows, mean_over_processes, parallel, synchronize_batchnorm
from ...runtime.lifecycle import Lifecycle
from ...runtime.messages import one_line
from ...runtime.precision import autocast, make_scaler
from .data import Loader, plan_eval_batches, plan_train_batches, seed_generators
from .model import Classifier
from .optimizer import make_optimizer, set_lr
from .settings import Settings

# The entries of a checkpoint.
KEYS = {
    'model', 'ema', 'optimizer', 'scaler', 'epoch', 'step', 'losses', 'seconds', 'history', 'best', 'unreadable', 'run'}
UNREADABLE = -1  # takes the place of a predicted class


class ClassifierTrainer:
    """A classifier with its optimizer, loss scaler and averaged weights, on the device of `world`.

    `measured` is the network that is validated and exported: the average of the weights, or `model` itself without one.

    Args:
        images: number of training images.
        amp: precision of the forward pass, a key of precision.AMP.
    """

    def __init__(self, model: nn.Module, classes: int, s: Settings, images: int, world: World, amp: str) -> None:
        self.settings, self.world, self.amp = s, world, amp
        self.model = synchronize_batchnorm(model, world)
        self.ema = ModelEmaV3(self.model, s.ema_decay, use_warmup=True) if s.ema_decay else None
        self.measured = self.ema.module if self.ema else self.model
        self.optimizer, self.scaler = make_optimizer(self.model, s), make_scaler(world.device, amp)
        self.mixup = Mixup(
            s.mixup, s.cutmix, label_smoothing=s.smoothing, num_classes=classes) if s.mixup or s.cutmix else None
        self.loss = SoftTargetCrossEntropy() if self.mixup else nn.CrossEntropyLoss(label_smoothing=s.smoothing)
        self.steps = -(-images // s.batch_size) if s.partial_batch else images // s.batch_size  # per epoch
        shape = 2, 3, s.image_size, s.image_size
        self.net = parallel(self.model, lambda net: net(torch.zeros(shape, device=world.device)).sum(), world)

    def state_dict(self) -> dict[str, Any]:
        return {
            'model': self.model.state_dict(), 'ema': self.ema.module.state_dict() if self.ema else None,
            'optimizer': self.optimizer.state_dict(), 'scaler': self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state['model'])
        if self.ema:
            self.ema.module.load_state_dict(state['ema'])
        self.optimizer.load_state_dict(state['optimizer'])
        if state['scaler']:  # empty if the checkpoint was written in another precision
            self.scaler.load_state_dict(state['scaler'])


@dataclass
class Finetuning:
    """The parts of a run, and the position that it has reached."""

    trainer: ClassifierTrainer
    train: Loader
    val: Loader
    life: Lifecycle
    classifier: Classifier
    identity: dict[str, Any]  # a checkpoint of another identity is refused
    epoch: int = 0  # finished epochs
    step: int = 0  # steps done in the next epoch
    seconds: float = 0.0  # spent on these steps
    history: list[dict[str, Any]] = field(default_factory=list)  # an entry per finished epoch
    best: dict[str, Any] | None = None  # the epoch that is kept: epoch, top1, weights, predicted

    def __post_init__(self) -> None:
        self.loss = torch.zeros((), device=self.life.world.device)  # sum over these steps, on this process


def resume(run: Finetuning, free: set[str] = frozenset()) -> None:
    """Restores the newest checkpoint if there is one.

    Args:
        free: entries of `identity` that may differ.

    Raises:
        ValueError: the checkpoint belongs to another run, or does not fit this one.
    """
    state = run.life.resume(run.identity, free)
    if state is None:
        return
    world = run.life.world
    try:
        run.trainer.load_state_dict(state)
        run.epoch, run.step, run.seconds = state['epoch'], state['step'], state['seconds']
        run.history, run.best = state['history'], state['best']
        run.train.unreadable, run.val.unreadable = state['unreadable']
        losses = state['losses']  # by rank; another number of processes keeps their mean
        run.loss.fill_(losses[world.rank] if len(losses) == world.size else sum(losses) / len(losses))
    except (TypeError, KeyError, AttributeError, ValueError, RuntimeError) as e:
        raise ValueError(
            f'{run.life.newest}: the checkpoint does not fit this run ({one_line(e, 150)}); remove the folder or give '
            'another --output') from None
    run.life.say(f'continuing after epoch {run.epoch}{f", step {run.step}" if run.step else ""}')


def fit(run: Finetuning) -> None:
    """Trains to the last epoch, or until the validation top-1 has not risen for `patience` epochs.

    Raises:
        Stopped: a signal came; a checkpoint holds every step.
        RunError: no checkpoint can be written; the last one is kept.
        RuntimeError: the loss is not finite; the last checkpoint is kept.
    """
    s, life = run.trainer.settings, run.life
    life.begin(run.epoch, run.step)
    while not is_over(run):
        known = len(run.train.unreadable), len(run.val.unreadable)
        finish_epoch(run, train_one_epoch(run))
        report_unreadable(run, *known)
        life.stop_if_signalled()
    life.finish()
    if (loss := run.history[-1]['loss']) > 0.9 * (guess := math.log(len(run.classifier.classes))):
        life.say(
            f'little was learned: the training loss, {loss:.2f}, is near that of a guess, {guess:.2f}; a higher --lr, '
            'more --epochs or less augmentation may help')
    if run.epoch < s.epochs:
        life.say(f'stopped early: validation top-1 did not rise for {s.patience} epochs')


def is_over(run: Finetuning) -> bool:
    """Returns whether the last epoch, or the end of the patience, is reached."""
    s = run.trainer.settings
    impatient = s.patience and run.best is not None and run.epoch - run.best['epoch'] >= s.patience
    return run.epoch >= s.epochs or bool(impatient)


def train_one_epoch(run: Finetuning) -> float:
    """Trains the rest of this epoch; returns the mean loss of all its steps.

    Raises:
        RuntimeError: the loss is not finite.
    """
    trainer, world = run.trainer, run.life.world
    s, start = trainer.settings, time.monotonic() - run.seconds
    trainer.net.train()
    keys = plan_train_batches(len(run.train.samples), s.batch_size, run.epoch, s.seed, world, s.partial_batch)
    for x, y in run.train.load(keys[run.step:]):
        run.loss += train_step(trainer, x, y, run.epoch, run.step)
        run.step += 1
        run.seconds = time.monotonic() - start
        save_if_due(run)
    run.train.join(world)
    loss = mean_over_processes(run.loss / trainer.steps, world).item()
    run.seconds = time.monotonic() - start
    check_loss(run, loss)
    return loss


def train_step(trainer: ClassifierTrainer, x: Tensor, y: Tensor, epoch: int, step: int) -> Tensor:
    """One optimizer step on images (B, 3, S, S) and labels (B,); `step` counts the steps of the epoch from 0.

    Returns:
        The loss. It stays on the device, so the host does not wait.
    """
    s, world = trainer.settings, trainer.world
    total = epoch * trainer.steps + step
    seed_generators(s.seed, epoch, step * world.size + world.rank, view=1)  # of mixup and dropout
    if trainer.mixup:
        x, y = trainer.mixup(x, y)
    set_lr(trainer.optimizer, s, total, trainer.steps)
    with autocast(world.device, trainer.amp):
        out = trainer.net(x.contiguous(memory_format=torch.channels_last))
    loss = trainer.loss(out.float(), y)
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.scaler.scale(loss).backward()
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    if trainer.ema:
        trainer.ema.update(trainer.model, total + 1)
    return loss.detach()


def finish_epoch(run: Finetuning, loss: float) -> None:
    """Validates if it is due, keeps the best weights, saves, exports them, and logs the epoch."""
    s, epoch = run.trainer.settings, run.epoch + 1
    speed = run.trainer.steps * s.batch_size / run.seconds if run.seconds else 0.0
    start = time.monotonic() - run.seconds
    row, text, improved = {'epoch': epoch, 'loss': loss}, f'epoch {epoch}/{s.epochs}: loss {loss:.4f}', False
    if epoch % s.eval_every == 0 or epoch == s.epochs:
        predicted = predict(run)
        row |= measure_accuracy(predicted, run.val.samples.labels)
        improved = s.keep == 'last' or run.best is None or row['top1'] > run.best['top1']
        text += f', validation top-1 {row["top1"]:.2f} %{" (best)" if improved and s.keep == "best" else ""}'
    if improved:
        weights = {k: v.detach().cpu().clone() for k, v in run.trainer.measured.state_dict().items()}
        run.best = {'epoch': epoch, 'top1': row['top1'], 'weights': weights, 'predicted': predicted}
    row['seconds'] = time.monotonic() - start
    run.history.append(row)
    run.epoch, run.step, run.seconds = epoch, 0, 0.0
    run.loss.zero_()
    save(run)
    if improved and run.life.world.main:
        export_best(run)
    run.life.say(f'{text}, {speed:.0f} images/s in training')


def export_best(run: Finetuning) -> None:
    """Exports the best weights so far. A failure is only reported: the end of the run exports them again."""
    try:
        run.classifier.export(run.best['weights'])
    except OSError as e:
        run.life.say(f'the best weights so far cannot be exported to {run.life.folder} ({e.strerror or e}); the run '
                     'goes on and exports them at its end')


@torch.no_grad()
def predict(run: Finetuning) -> Tensor:
    """Measures the validation images.

    Returns:
        (N, 2) on the CPU of every process: the predicted class, and whether the label is among the first 5; UNREADABLE
        in both for images that cannot be read.
    """
    trainer, val, world = run.trainer, run.val, run.life.world
    n, batch = len(val.samples), trainer.settings.batch_size
    common = -(-(n // world.size) // batch)  # batches that every process has
    trainer.measured.eval()
    rows = []
    for i, (x, y) in enumerate(val.load(plan_eval_batches(n, batch, world))):
        with autocast(world.device, trainer.amp):
            out = trainer.measured(x.contiguous(memory_format=torch.channels_last)).float()
        first = out.topk(min(5, out.shape[1])).indices
        rows.append(torch.stack([first[:, 0], (first == y[:, None]).any(1).long()], 1))
        if i < common:  # validation may take longer than a scheduler waits after its signal
            save_if_due(run)
    val.join(world)
    mine = torch.cat(rows) if rows else torch.zeros(0, 2, dtype=torch.long, device=world.device)
    predicted = gather_rows(mine, n, world).cpu()
    predicted[list(val.unreadable)] = UNREADABLE
    return predicted


def measure_accuracy(predicted: Tensor, labels: Any) -> dict[str, float]:
    """Returns top-1 and top-5 in percent of the readable images, from `predict`."""
    readable = predicted[:, 0] != UNREADABLE
    right = predicted[readable, 0] == torch.as_tensor(labels)[readable]
    return {
        'top1': 100 * right.double().mean().item(), 'top5': 100 * predicted[readable, 1].double().mean().item()}


def save_if_due(run: Finetuning) -> None:
    """Writes a checkpoint when one is due; stops the run on a signal."""
    pause = run.life.agree(run.epoch * run.trainer.steps + run.step)
    if pause.due or pause.signal:
        save(run)
        run.life.stop_if_signalled()


def save(run: Finetuning) -> None:
    """Writes a checkpoint. If that fails for now, the one before is kept.

    Raises:
        RuntimeError: the loss is not finite, or no checkpoint could be written for too long.
    """
    for loader in (run.train, run.val):
        loader.join(run.life.world)
    losses = run.life.world.gather(run.loss.item())
    check_loss(run, sum(losses))
    run.life.save(lambda: {
        **run.trainer.state_dict(), 'epoch': run.epoch, 'step': run.step, 'losses': losses, 'seconds': run.seconds,
        'history': run.history, 'best': run.best, 'unreadable': [run.train.unreadable, run.val.unreadable],
        'run': run.identity}, run.epoch, run.step)


def check_loss(run: Finetuning, loss: float) -> None:
    """Raises RuntimeError if the loss is not finite."""
    if not math.isfinite(loss):
        raise RuntimeError(f'the loss of epoch {run.epoch + 1} is {loss}; lower --lr, or use --amp off')


def report_unreadable(run: Finetuning, train: int, val: int) -> None:
    """Reports unreadable images if there are more than `train` and `val` of them."""
    reasons = [*run.train.unreadable.values(), *run.val.unreadable.values()]
    if len(reasons) > train + val:
        run.life.say(
            f'so far {len(run.train.unreadable)} training and {len(run.val.unreadable)} validation images cannot be '
            f'read: others replace the former, the accuracy leaves out the latter; the first: {reasons[0]}')
