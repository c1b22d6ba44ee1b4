"""The classifiers of the linear protocols, and the optimizers that train them."""
import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.optim.lars import Lars
from torch import Tensor, nn

from ..protocols import LinearProtocol


class MmselfsupLars(torch.optim.Optimizer):
    """LARS with the learning rate inside the momentum buffer, as MMSelfSup has it (LARC's is outside).

    buffer <- momentum buffer + lr r (g + wd w),  w <- w - buffer,  r = trust ||w|| / (||g|| + wd ||w|| + 1e-8), or 1
    where a norm is 0. Equal to LARC at a constant rate; at a falling one the rates of past steps stay.
    """

    def __init__(
        self, params: Any, lr: float, momentum: float, weight_decay: float, trust: float, eps: float = 1e-8) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust, eps=eps))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group['params']:
                w, g = p.norm(), p.grad.norm()
                ratio = group['trust'] * w / (g + group['weight_decay'] * w + group['eps'])
                ratio = torch.where((w > 0) & (g > 0), ratio, torch.ones_like(ratio))
                update = p.grad.add(p, alpha=group['weight_decay']) * (ratio * group['lr'])
                buffer = self.state[p].setdefault('momentum_buffer', torch.zeros_like(p))
                p.sub_(buffer.mul_(group['momentum']).add_(update))


def make_optimizer(heads: nn.Module, p: LinearProtocol) -> torch.optim.Optimizer:
    if p.optimizer == 'larc':  # always_adapt: without it timm's does nothing at weight decay 0
        return Lars(
            heads.parameters(), p.scaled_lr, p.momentum, weight_decay=p.weight_decay, trust_coeff=p.trust, eps=1e-8,
            always_adapt=True)
    if p.optimizer == 'lars_mmselfsup':
        return MmselfsupLars(heads.parameters(), p.scaled_lr, p.momentum, p.weight_decay, p.trust)
    return torch.optim.SGD(
        heads.parameters(), p.scaled_lr, p.momentum, weight_decay=p.weight_decay, nesterov=p.nesterov)


def lr_at(epoch: int, p: LinearProtocol) -> float:
    """The rate of this epoch, from 0."""
    if p.schedule == 'cosine':
        return p.scaled_lr * 0.5 * (1 + math.cos(math.pi * epoch / p.epochs))
    return p.scaled_lr * p.lr_gamma ** sum(epoch >= step for step in p.lr_steps)


class Heads(nn.Module):
    """One linear classifier per tap; with `norm` batch norm without affine over the channels of the pooled map first.

    shapes: (channels, values per channel) of each tap. Weights N(0, std), biases 0.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], classes: int, norm: bool, std: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.shapes = list(shapes)
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(c, affine=False) if norm else nn.Identity() for c, _ in shapes)
        self.linears = nn.ModuleList(nn.Linear(c * n, classes) for c, n in shapes)
        with torch.no_grad():
            for linear in self.linears:
                linear.weight.normal_(0, std, generator=generator)
                linear.bias.zero_()

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """(B, channels x values) per tap -> (B, classes) per tap."""
        parts = zip(features, self.shapes, self.norms, self.linears, strict=True)
        return [linear(norm(x.reshape(len(x), c, n)).flatten(1)) for x, (c, n), norm, linear in parts]
