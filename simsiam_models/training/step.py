"""The training step: what `simsiam pretrain`, --auto-perf and `simsiam preflight` all run."""
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.distributed import World, synchronize
from ..runtime.precision import autocast, make_scaler
from ..simsiam import SimSiam, simsiam_loss
from .recipes import Recipe
from .schedule import load_optimizer, make_optimizer


@dataclass(frozen=True)
class Perf:
    """How a step is computed; the defaults are those of a run on a CPU without --auto-perf."""

    channels_last: bool = True
    compile: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        return ('channels_last' if self.channels_last else 'contiguous') + (', compiled' if self.compile else ', eager')


class Trainer:
    """The model with its optimizer and loss scaler, on the device of `world`.

    `model` is on the device, in the memory format of `perf`; `net` is the model wrapped for several processes. `amp` is
    a key of precision.AMP. `seed` is for dropout and stochastic depth, in backbones that have them.
    """

    def __init__(
        self, model: SimSiam, recipe: Recipe, world: World, amp: str, perf: Perf = Perf(),  # noqa: B008 - frozen
        *, net: nn.Module | None = None, seed: int = 0,
    ) -> None:
        self.model, self.recipe, self.world, self.amp, self.perf = model, recipe, world, amp, perf
        self.net, self.seed = net or model, seed
        torch.backends.cudnn.benchmark |= world.device.type == 'cuda'  # worth it, since the shapes of a run are fixed
        self.optimizer, self.scaler = make_optimizer(model, recipe), make_scaler(world.device, amp)

    def state_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k).state_dict() for k in ('model', 'optimizer', 'scaler')}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state['model'])
        load_optimizer(self.optimizer, state['optimizer'])
        self.scaler.load_state_dict(state['scaler'])

    def is_finite(self) -> bool:
        """Returns whether all weights are finite numbers; waits for the device once."""
        return bool(torch.stack([p.isfinite().all() for p in self.model.parameters()]).all())


def train_step(trainer: Trainer, x1: Tensor, x2: Tensor, step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Takes an optimizer step on two views, (B, 3, S, S) each; `step` counts the steps of the run from 1.

    Returns the loss, p1 and z1, (B, dim) each. They stay on the device, so the host does not wait.
    """
    world, memory_format = trainer.world, trainer.perf.memory_format
    x1, x2 = x1.contiguous(memory_format=memory_format), x2.contiguous(memory_format=memory_format)
    torch.manual_seed((trainer.seed * 1_000_003 + step) * world.size + world.rank)  # for dropout
    with autocast(world.device, trainer.amp):
        p1, p2, z1, z2 = trainer.net(x1, x2)
    loss = simsiam_loss(p1.float(), p2.float(), z1.float(), z2.float())
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.scaler.scale(loss).backward()
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    return loss.detach(), p1.detach(), z1


def time_step(step: Callable[[Tensor, Tensor], Any], views: tuple[Tensor, Tensor], n: int = 1) -> float:
    """Returns the seconds per call of `step` on two views, which is called `n` times without waiting in between."""
    synchronize(views[0].device)
    start = time.perf_counter()
    for _ in range(n):
        step(*views)
    synchronize(views[0].device)
    return (time.perf_counter() - start) / n
