"""The classifiers of the linear protocols, and the optimizers that train them."""
import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.optim.lars import Lars
from torch import Tensor, nn

from ..protocols import LinearProtocol


class MmselfsupLars(torch.optim.Optimizer):
    """LARS as in MMSelfSup, whose momentum buffer includes the learning rate; LARC multiplies by it afterwards.

    buffer <- momentum buffer + lr r (g + wd w),  w <- w - buffer,  r = trust ||w|| / (||g|| + wd ||w|| + 1e-8), or 1
    if a norm is 0. Both are equal at a constant rate. When the rate falls, this buffer keeps the rates of past steps.
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
    """Returns the protocol's optimizer for the parameters of the heads."""
    if p.optimizer == 'larc':  # without always_adapt, timm's Lars does not adapt at weight decay 0
        return Lars(
            heads.parameters(), p.scaled_lr, p.momentum, weight_decay=p.weight_decay, trust_coeff=p.trust, eps=1e-8,
            always_adapt=True)
    if p.optimizer == 'lars_mmselfsup':
        return MmselfsupLars(heads.parameters(), p.scaled_lr, p.momentum, p.weight_decay, p.trust)
    return torch.optim.SGD(
        heads.parameters(), p.scaled_lr, p.momentum, weight_decay=p.weight_decay, nesterov=p.nesterov)


def compute_lr(epoch: int, p: LinearProtocol) -> float:
    """Returns the learning rate of this epoch; epochs count from 0."""
    if p.schedule == 'cosine':
        return p.scaled_lr * 0.5 * (1 + math.cos(math.pi * epoch / p.epochs))
    return p.scaled_lr * p.lr_gamma ** sum(epoch >= step for step in p.lr_steps)


class Heads(nn.Module):
    """Linear classifiers, one per feature map; weights N(0, std), biases 0.

    Args:
        shapes: (channels, values per channel) of each pooled feature map.
        norm: precede each classifier by a batch norm, without affine, over the channels of its feature map.
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
        """(B, channels x values) per feature map -> (B, classes) per classifier."""
        parts = zip(features, self.shapes, self.norms, self.linears, strict=True)
        return [linear(norm(x.reshape(len(x), c, n)).flatten(1)) for x, (c, n), norm, linear in parts]
