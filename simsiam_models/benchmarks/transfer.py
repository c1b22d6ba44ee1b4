"""Trains a network for a number of iterations: the loop of detection and segmentation, which reads from `fit` down."""
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..runtime.distributed import World, mean_over_processes, parallel, synchronize_batchnorm
from ..runtime.lifecycle import Lifecycle
from ..runtime.log import RunLog
from ..runtime.messages import clock_time, one_line
from ..runtime.precision import autocast, make_scaler, suggest_off

# The entries of a checkpoint.
KEYS = set('model optimizer scaler step sums counted history seconds unreadable log_bytes run'.split())


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What the optimizer, SGD, does in each iteration."""

    iterations: int
    batch_size: int  # over all processes
    lr: float
    momentum: float
    weight_decay: float
    decay_norms: bool = True  # weight decay on the parameters of batch norms
    warmup: int = 0  # iterations, linear from warmup_ratio * lr
    warmup_ratio: float = 0.001
    lr_steps: tuple[int, ...] = ()  # iterations after which the rate is multiplied by lr_gamma
    lr_gamma: float = 0.1
    power: float = 0.0  # instead of steps: the rate is (lr - floor) * (1 - i / iterations) ** power + floor
    floor: float = 0.0
    eval_every: int  # iterations; the last one is always evaluated
    log_every: int = 50


def compute_lr(s: Schedule, step: int) -> float:
    """Returns the learning rate of iteration `step`, counted from 0."""
    if s.power:
        return (s.lr - s.floor) * float((1 - step / s.iterations) ** s.power) + s.floor
    lr = s.lr * s.lr_gamma ** sum(step >= at for at in s.lr_steps)
    if step < s.warmup:
        lr *= 1 - (1 - step / s.warmup) * (1 - s.warmup_ratio)
    return lr


class Batches(Protocol):
    """Training batches. `unreadable` names the images that cannot be read, index -> reason."""

    unreadable: dict[int, str]

    def load(self, step: int) -> Iterator[Any]: ...  # this process's share of each iteration's batch, from `step` on

    def join(self) -> None: ...  # gathers `unreadable` from all processes


class TransferTrainer:
    """A network whose forward pass returns a dict of losses, with its optimizer and loss scaler.

    Args:
        model: on the device of `world`; its forward pass takes what `example` returns, and the loop's batches.
        weights: factors of the losses, where they are not 1.
        example: returns the arguments of a forward pass on made-up input.
        amp: a key of precision.AMP.
    """

    def __init__(
        self, model: nn.Module, schedule: Schedule, world: World, amp: str, example: Callable[[], tuple[Any, ...]], *,
        weights: dict[str, float] | None = None,
    ) -> None:
        self.schedule, self.world, self.amp, self.weights = schedule, world, amp, weights or {}
        self.model = synchronize_batchnorm(model, world)
        self.optimizer, self.scaler = make_optimizer(self.model, schedule), make_scaler(world.device, amp)
        self.net = parallel(self.model, lambda net: sum(net(*example()).values()), world)

    def state_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k).state_dict() for k in ('model', 'optimizer', 'scaler')}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state['model'])
        self.optimizer.load_state_dict(state['optimizer'])
        if state['scaler']:  # empty if the checkpoint was written in another precision
            self.scaler.load_state_dict(state['scaler'])

    def step(self, inputs: tuple[Any, ...], step: int) -> dict[str, Tensor]:
        """Takes an optimizer step; returns the losses, on the device, without their weights."""
        lr = compute_lr(self.schedule, step)
        for group in self.optimizer.param_groups:
            group['lr'] = lr
        with autocast(self.world.device, self.amp):
            losses = self.net(*inputs)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(sum(self.weights.get(name, 1.0) * loss for name, loss in losses.items())).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return {name: loss.detach() for name, loss in losses.items()}


def make_optimizer(model: nn.Module, s: Schedule) -> torch.optim.Optimizer:
    """Returns SGD on every parameter of the model."""
    norms = {id(p) for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}
    without = [] if s.decay_norms else [p for p in model.parameters() if id(p) in norms]
    skipped = {id(p) for p in without}
    groups: list[dict[str, Any]] = [{'params': [p for p in model.parameters() if id(p) not in skipped]}]
    if without:
        groups.append({'params': without, 'weight_decay': 0.0})
    return torch.optim.SGD(groups, s.lr, s.momentum, weight_decay=s.weight_decay)


@dataclass
class Transfer:
    """The parts of a run, and the position that it has reached."""

    trainer: TransferTrainer
    batches: Batches
    make_inputs: Callable[[Any, int], tuple[Any, ...]]  # a batch and its iteration -> the arguments of the network
    evaluate: Callable[['Transfer'], dict[str, Any]]  # on all processes; returns an entry of `history`, with 'metrics'
    life: Lifecycle
    log: RunLog
    identity: dict[str, Any]  # a checkpoint of another identity is refused
    step: int = 0  # iterations done
    seconds: float = 0.0  # spent on them
    history: list[dict[str, Any]] = field(default_factory=list)  # an entry per evaluation
    counted: int = 0  # iterations since the last line of the log
    names: list[str] = field(default_factory=list)  # of the losses
    sums: Tensor | None = None  # of the losses of these iterations, on this process


def resume(run: Transfer, free: set[str]) -> None:
    """Restores the newest checkpoint if there is one, or raises ValueError; `free` entries of `identity` may differ."""
    state, world = run.life.resume(run.identity, free), run.life.world
    run.log.resume(0 if state is None else state['log_bytes'])
    if state is None:
        return
    try:
        run.trainer.load_state_dict(state)
        run.step, run.seconds, run.history, run.counted = (
            state[key] for key in ('step', 'seconds', 'history', 'counted'))
        run.batches.unreadable = state['unreadable']
        run.names, parts = state['sums']  # of each process; another number of processes keeps their mean
        if run.counted:
            mine = parts[world.rank] if len(parts) == world.size else [sum(x) / len(x) for x in zip(*parts)]  # noqa: B905 - of equal lengths
            run.sums = torch.tensor(mine, device=world.device)
    except (TypeError, KeyError, AttributeError, ValueError, RuntimeError, IndexError) as e:
        raise ValueError(
            f'{run.life.newest}: the checkpoint does not fit this run ({one_line(e, 150)}); remove the folder or give '
            'another --output') from None
    run.life.say(f'continuing after iteration {run.step} of {run.trainer.schedule.iterations}')


def fit(run: Transfer) -> None:
    """Trains to the last iteration. After Stopped or RuntimeError there is a checkpoint."""
    s, life = run.trainer.schedule, run.life
    life.begin(0, run.step)
    run.log.start(s.iterations, run.step)
    try:
        while True:
            if run.step and (run.step % s.eval_every == 0 or run.step == s.iterations):
                finish_interval(run)
            if run.step == s.iterations:
                break
            train_until(run, min(s.iterations, (run.step // s.eval_every + 1) * s.eval_every))
            save(run)
            life.stop_if_signalled()
        life.finish()
    finally:
        run.log.close()


def train_until(run: Transfer, last: int) -> None:
    """Trains to iteration `last`, or to a signal that comes while it waits for images."""
    trainer, life = run.trainer, run.life
    trainer.net.train()
    clock, waited, began = time.monotonic(), 0.0, (time.monotonic(), run.step)
    for batch in life.interruptible(run.batches.load(run.step)):
        waited += time.monotonic() - clock
        losses = trainer.step(run.make_inputs(batch, run.step), run.step)
        add_losses(run, losses)
        run.step += 1
        run.seconds += time.monotonic() - clock
        clock = time.monotonic()
        run.log.step()
        pause = life.agree(run.step)
        if run.step % trainer.schedule.log_every == 0 or run.step == last:
            log_losses(run, began, waited)
            waited, began = 0.0, (time.monotonic(), run.step)
        if run.step == last:
            break
        if pause.due or pause.signal:
            save(run)
            life.stop_if_signalled()
    run.batches.join()


def add_losses(run: Transfer, losses: dict[str, Tensor]) -> None:
    run.names = list(losses)
    values = torch.stack([losses[name].float() for name in run.names])
    run.sums = values if run.sums is None or not run.counted else run.sums + values
    run.counted += 1


def log_losses(run: Transfer, began: tuple[float, int], waited: float) -> None:
    """Writes a line of the log; `began`: time and iteration of the last line, or of this start."""
    s, world = run.trainer.schedule, run.life.world
    sums = cast(Tensor, run.sums)
    means = dict(zip(run.names, mean_over_processes(sums / run.counted, world).tolist(), strict=True))
    run.counted = 0
    total = sum(run.trainer.weights.get(name, 1.0) * x for name, x in means.items())
    check_loss(run, total)
    seconds, steps = max(time.monotonic() - began[0], 1e-9), run.step - began[1]
    speed, lr = steps * s.batch_size / seconds, compute_lr(s, run.step - 1)
    left = clock_time((s.iterations - run.step) * seconds / steps)
    parts = ', '.join(f'{name.removeprefix("loss_")} {x:.3f}' for name, x in means.items())
    run.log.figures(
        f'iteration {run.step}/{s.iterations}: ',
        {'step': run.step, 'loss': total, **means, 'lr': lr, 'images_per_second': speed, 'waiting': waited / seconds},
        f'loss {total:.3f} ({parts}), lr {lr:.3g}, {speed:.1f} images/s, waiting {waited / seconds:.0%}, {left} left',
        run.step)


def finish_interval(run: Transfer) -> None:
    """Evaluates, unless a run before a restart has done so at this iteration."""
    if run.history and run.history[-1]['step'] == run.step:
        return
    life, start = run.life, time.monotonic()
    life.signals.deferred = life.saved != life.position  # evaluating may take longer than a scheduler waits
    run.trainer.model.eval()
    entry = {'step': run.step, **run.evaluate(run)}
    run.trainer.model.train()
    life.signals.deferred = True
    entry['seconds'] = time.monotonic() - start
    run.history.append(entry)
    run.log.figures(
        '', {'step': run.step, **entry['metrics']}, f'iteration {run.step}: ' + ', '.join(
            f'{name} {value:.2f}' for name, value in entry['metrics'].items()), run.step)
    if run.batches.unreadable:
        reasons = list(run.batches.unreadable.values())
        life.say(f'{len(reasons)} training images cannot be read; others replace them; the first: {reasons[0]}')
    save(run)
    life.stop_if_signalled()


def save(run: Transfer) -> None:
    """Writes a checkpoint, unless the loss is not finite. If that fails for now, the previous one is kept."""
    world = run.life.world
    run.batches.join()
    parts = world.gather(run.sums.tolist() if run.sums is not None and run.counted else [])
    check_loss(run, sum(map(sum, parts)))
    run.life.save(lambda: {
        **run.trainer.state_dict(), 'step': run.step, 'sums': (run.names, parts), 'counted': run.counted,
        'history': run.history, 'seconds': run.seconds, 'unreadable': run.batches.unreadable,
        'log_bytes': run.log.size(), 'run': run.identity}, 0, run.step)


def check_loss(run: Transfer, loss: float) -> None:
    if not math.isfinite(loss):
        raise RuntimeError(
            f'the loss is {loss} by iteration {run.step}; lower --lr ({run.trainer.schedule.lr:g})'
            f'{suggest_off(run.trainer.amp)}')


@torch.no_grad()
def measure_batch_norms(run: Transfer, iterations: int) -> None:
    """Sets the running statistics of the batch norms to their means over so many training batches (precise BN)."""
    norms = [m for m in run.trainer.model.modules() if isinstance(m, _BatchNorm)]
    momenta = [m.momentum for m in norms]
    run.trainer.model.train()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the mean over all batches
    for step, batch in zip(range(run.step, run.step + iterations), run.batches.load(run.step)):  # noqa: B905
        with autocast(run.life.world.device, run.trainer.amp):
            run.trainer.model(*run.make_inputs(batch, step))
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    run.trainer.model.eval()
