"""The fine-tuning loop, which reads from `fit` down: fit -> train_one_epoch -> train_step."""
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ...runtime.distributed import World, gather_rows, mean_over_processes, parallel, synchronize_batchnorm
from ...runtime.lifecycle import Lifecycle
from ...runtime.messages import one_line
from ...runtime.precision import autocast, make_scaler, suggest_off
from ..protocols import SEMI_LR_GAMMA
from .data import Loader, plan_eval_batches, plan_train_batches, seed_generators
from .model import Classifier, find_last_layers
from .settings import Settings

# The entries of a checkpoint.
KEYS = set('model ema optimizer scaler epoch step losses seconds history best unreadable run'.split())
UNREADABLE = -1  # stands for the predicted class of an unreadable image


def make_optimizer(model: nn.Module, s: Settings) -> torch.optim.Optimizer:
    """Returns the optimizer, or raises ValueError; the `lr_scale` of each group is a factor of its learning rate."""
    if s.head_multiplier is not None:
        head = {id(p) for p in find_last_layers(model).parameters()}
        groups = [
            dict(params=[p for p in model.parameters() if id(p) not in head], lr_scale=1.0),
            dict(params=[p for p in model.parameters() if id(p) in head], lr_scale=s.head_multiplier)]
        return torch.optim.SGD(groups, s.lr, s.momentum, weight_decay=s.weight_decay)
    try:
        optimizer = create_optimizer_v2(model, s.optimizer, s.lr, s.weight_decay, s.momentum, layer_decay=s.layer_decay)
        if getattr(optimizer, 'is_second_order', False):
            raise ValueError('it needs second derivatives, which this loop does not compute')
    except (ValueError, TypeError, ImportError, AssertionError) as e:
        raise ValueError(f'--opt {s.optimizer}: cannot be used ({one_line(e, 150)}); use adamw or sgd') from None
    return optimizer


def compute_lr_factor(s: Settings, step: int, steps: int) -> float:
    """Returns the rate's factor, with `steps` per epoch: warm-up, then cosine to 0; or drops after epochs `s.steps`."""
    if s.steps is not None:
        return SEMI_LR_GAMMA ** sum(step // steps >= e for e in s.steps)
    warm = s.warmup_epochs * steps
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, s.epochs * steps - warm)))


class ClassifierTrainer:
    """A classifier with its optimizer, loss scaler and averaged weights, on the device of `world`.

    `measured` is the network that is validated and exported: the average of the weights, or `model` itself without one.
    `images` is the number of training images; `amp`, the precision of the forward pass, is a key of precision.AMP.
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


def resume(run: Finetuning, free: set[str]) -> None:
    """Restores the newest checkpoint if there is one, or raises ValueError; `free` entries of `identity` may differ."""
    if (state := run.life.resume(run.identity, free)) is None:
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
    run.life.say(f'{run.life.folder} holds this run, and it is finished' if is_finished(run) else
                 f'continuing after epoch {run.epoch}{f", step {run.step}" if run.step else ""}')


def is_finished(run: Finetuning) -> bool:
    s = run.trainer.settings
    return run.epoch >= s.epochs or bool(s.patience and run.best and run.epoch - run.best['epoch'] >= s.patience)


def fit(run: Finetuning) -> None:
    """Trains to the last epoch or the end of the patience. After Stopped or an error there is a checkpoint."""
    s, life, train, val = run.trainer.settings, run.life, run.train, run.val
    life.begin(run.epoch, run.step)
    while not is_finished(run):
        known = len(train.unreadable) + len(val.unreadable)
        finish_epoch(run, train_one_epoch(run))
        reasons = [*train.unreadable.values(), *val.unreadable.values()]
        if len(reasons) > known:
            life.say(
                f'so far {len(train.unreadable)} training and {len(val.unreadable)} validation images cannot be read: '
                f'other images replace the former, and the accuracy omits the latter; the first: {reasons[0]}')
        life.stop_if_signalled()
    life.finish()
    if (loss := run.history[-1]['loss']) > 0.9 * (guess := math.log(len(run.classifier.classes))):
        life.say(
            f'little was learned: the training loss, {loss:.2f}, is near that of a guess, {guess:.2f}; a higher --lr, '
            'more --epochs or less augmentation may help')
    if run.epoch < s.epochs:
        life.say(f'stopped early: validation top-1 did not rise for {s.patience} epochs')


def train_one_epoch(run: Finetuning) -> float:
    """Trains the rest of this epoch; returns the mean loss of all its steps."""
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
    """Takes a step on images (B, 3, S, S), labels (B,); returns the loss on the device, so the host does not wait."""
    s, world, optimizer = trainer.settings, trainer.world, trainer.optimizer
    total = epoch * trainer.steps + step
    seed_generators(s.seed, epoch, step * world.size + world.rank, view=1)  # of mixup and dropout
    if trainer.mixup:
        x, y = trainer.mixup(x, y)
    lr = s.lr * compute_lr_factor(s, total, trainer.steps)
    for group in optimizer.param_groups:
        group['lr'] = lr * group.get('lr_scale', 1.0)
    with autocast(world.device, trainer.amp):
        out = trainer.net(x.contiguous(memory_format=torch.channels_last))
    loss = trainer.loss(out.float(), y)
    optimizer.zero_grad(set_to_none=True)
    trainer.scaler.scale(loss).backward()
    trainer.scaler.step(optimizer)
    trainer.scaler.update()
    if trainer.ema:
        trainer.ema.update(trainer.model, total + 1)
    detached: Tensor = loss.detach()
    return detached


def finish_epoch(run: Finetuning, loss: float) -> None:
    """Validates if it is due, keeps the best weights, saves, exports them, and logs the epoch."""
    s, life, epoch = run.trainer.settings, run.life, run.epoch + 1
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
    if improved and life.world.main:
        try:
            run.classifier.export(weights)
        except OSError as e:
            life.say(
                f'the best weights so far cannot be exported to {life.folder} ({e.strerror or e}); the run continues '
                'and exports them at its end')
    life.say(f'{text}, {speed:.0f} images/s in training')


@torch.no_grad()
def predict(run: Finetuning) -> Tensor:
    """Returns (N, 3) integers, on every process.

    They are the predicted class of each image, whether the label is in the first 5, and the probability of the
    predicted class in millionths.
    """
    trainer, val, world = run.trainer, run.val, run.life.world
    n, batch = len(val.samples), trainer.settings.batch_size
    common = -(-(n // world.size) // batch)  # batches that every process has
    trainer.measured.eval()
    rows = [torch.zeros(0, 3, dtype=torch.long, device=world.device)]  # all that a process without images has
    for i, (x, y) in enumerate(val.load(plan_eval_batches(n, batch, world))):
        with autocast(world.device, trainer.amp):
            out = trainer.measured(x.contiguous(memory_format=torch.channels_last)).float()
        first = out.topk(min(5, out.shape[1])).indices
        score = (1e6 * out.softmax(1).amax(1)).round().long()
        rows.append(torch.stack([first[:, 0], (first == y[:, None]).any(1).long(), score], 1))
        if i < common:  # validation may take longer than a scheduler waits after its signal
            save_if_due(run)
    val.join(world)
    predicted = gather_rows(torch.cat(rows), n, world).cpu()
    predicted[list(val.unreadable)] = UNREADABLE
    return predicted


def measure_accuracy(predicted: Tensor, labels: Any) -> dict[str, float]:
    """Returns top-1 and top-5 in percent of the readable images, from `predict`."""
    readable = predicted[:, 0] != UNREADABLE
    right = predicted[readable, 0] == torch.as_tensor(labels)[readable]
    return {'top1': 100 * right.double().mean().item(), 'top5': 100 * predicted[readable, 1].double().mean().item()}


def save_if_due(run: Finetuning) -> None:
    """Writes a checkpoint when one is due; stops the run on a signal."""
    pause = run.life.agree(run.epoch * run.trainer.steps + run.step)
    if pause.due or pause.signal:
        save(run)
        run.life.stop_if_signalled()


def save(run: Finetuning) -> None:
    """Writes a checkpoint, unless the loss is not finite. If that fails for now, the previous one is kept."""
    world = run.life.world
    run.train.join(world)
    run.val.join(world)
    losses = world.gather(run.loss.item())
    check_loss(run, sum(losses))
    run.life.save(lambda: {
        **run.trainer.state_dict(), 'epoch': run.epoch, 'step': run.step, 'losses': losses, 'seconds': run.seconds,
        'history': run.history, 'best': run.best, 'unreadable': [run.train.unreadable, run.val.unreadable],
        'run': run.identity}, run.epoch, run.step)


def check_loss(run: Finetuning, loss: float) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f'the loss of epoch {run.epoch + 1} is {loss}; lower --lr{suggest_off(run.trainer.amp)}')
