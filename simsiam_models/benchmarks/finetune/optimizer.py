"""The optimizer of a fine-tuning run, and its learning rate at each step."""
import math

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from ...runtime.messages import one_line
from ..protocols import SEMI_LR_GAMMA
from .model import find_last_layers
from .settings import Settings


def make_optimizer(model: nn.Module, s: Settings) -> torch.optim.Optimizer:
    """Returns the optimizer. The `lr_scale` of each group is a factor of its learning rate.

    Raises:
        ValueError: timm has no such optimizer, or it needs a library, a GPU or second derivatives.
    """
    if s.head_multiplier is not None:
        head = {id(p) for p in find_last_layers(model).parameters()}
        groups = [
            dict(params=[p for p in model.parameters() if id(p) not in head], lr_scale=1.0),
            dict(params=[p for p in model.parameters() if id(p) in head], lr_scale=s.head_multiplier)]
        return torch.optim.SGD(groups, s.lr, s.momentum, weight_decay=s.weight_decay)
    try:
        optimizer = create_optimizer_v2(
            model, s.optimizer, s.lr, s.weight_decay, s.momentum, layer_decay=s.layer_decay)
        if getattr(optimizer, 'is_second_order', False):
            raise ValueError('it needs second derivatives, which this loop does not compute')
    except (ValueError, TypeError, ImportError, AssertionError) as e:
        raise ValueError(f'--opt {s.optimizer}: cannot be used ({one_line(e, 150)}); use adamw or sgd') from None
    return optimizer


def compute_lr_factor(s: Settings, step: int, steps: int) -> float:
    """The factor of the rate at a step of the run, which has `steps` per epoch: warm-up from 1 / n, then cosine to 0.

    With `s.steps`, the rate falls after these epochs instead.
    """
    if s.steps is not None:
        return SEMI_LR_GAMMA ** sum(step // steps >= e for e in s.steps)
    warm = s.warmup_epochs * steps
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, s.epochs * steps - warm)))


def set_lr(optimizer: torch.optim.Optimizer, s: Settings, step: int, steps: int) -> None:
    """Sets the rate of every group for a step of the run."""
    lr = s.lr * compute_lr_factor(s, step, steps)
    for group in optimizer.param_groups:
        group['lr'] = lr * group.get('lr_scale', 1.0)
