"""The classifiers of the linear protocols, and the optimizers that train them."""
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from timm.optim.lars import Lars
from torch import Tensor, nn

from ..protocols import LinearProtocol


class MmselfsupLars(torch.optim.Optimizer):
    """LARS as in MMSelfSup, whose momentum buffer includes the learning rate; LARC multiplies by it afterwards.

    buffer <- momentum buffer + lr r (g + wd w),  w <- w - buffer,  r = trust ||w|| / (||g|| + wd ||w|| + 1e-8), or 1
    if a norm is 0. Both are equal at a constant rate. When the rate falls, this buffer keeps the rates of past steps.
    """

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float, trust: float) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Takes a step; returns what `closure` returns, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group['params']:
                w, g = p.norm(), p.grad.norm()
                ratio = group['trust'] * w / (g + group['weight_decay'] * w + 1e-8)
                ratio = torch.where((w > 0) & (g > 0), ratio, torch.ones_like(ratio))
                update = p.grad.add(p, alpha=group['weight_decay']) * (ratio * group['lr'])
                buffer = self.state[p].setdefault('momentum_buffer', torch.zeros_like(p))
                p.sub_(buffer.mul_(group['momentum']).add_(update))
        return loss


def make_optimizer(heads: nn.Module, p: LinearProtocol) -> torch.optim.Optimizer:
    common: dict[str, Any] = dict(
        params=heads.parameters(), lr=p.scaled_lr, momentum=p.momentum, weight_decay=p.weight_decay)
    if p.optimizer == 'larc':  # without always_adapt, timm's Lars does not adapt at weight decay 0
        return Lars(**common, trust_coeff=p.trust, eps=1e-8, always_adapt=True)
    if p.optimizer == 'lars_mmselfsup':
        return MmselfsupLars(**common, trust=p.trust)
    return torch.optim.SGD(**common, nesterov=p.nesterov)


def compute_lr(epoch: int, p: LinearProtocol) -> float:
    """Returns the learning rate of this epoch; epochs count from 0."""
    if p.schedule == 'cosine':
        return p.scaled_lr * 0.5 * (1 + math.cos(math.pi * epoch / p.epochs))
    return p.scaled_lr * p.lr_gamma ** sum(epoch >= step for step in p.lr_steps)


class Heads(nn.Module):
    """A linear classifier per (channels, values per channel), with `norm` after a batch norm (no affine) by channel."""

    def __init__(self, shapes: Sequence[tuple[int, int]], classes: int, norm: bool, std: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.shapes = list(shapes)
        self.norms = nn.ModuleList(nn.BatchNorm1d(c, affine=False) if norm else nn.Identity() for c, _ in shapes)
        self.linears = nn.ModuleList(nn.Linear(c * n, classes) for c, n in shapes)
        for linear in self.linears:
            nn.init.normal_(cast(Tensor, linear.weight), 0, std, generator)
            nn.init.zeros_(cast(Tensor, linear.bias))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, channels x values) per feature map to (B, classes) per classifier."""
        parts = zip(features, self.shapes, self.norms, self.linears, strict=True)
        return [linear(norm(x.reshape(len(x), c, n)).flatten(1)) for x, (c, n), norm, linear in parts]
