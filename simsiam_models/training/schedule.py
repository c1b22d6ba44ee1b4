"""The optimizer, its parameter groups, and the learning rate of each epoch."""
import math
from typing import Any

import torch
from torch import nn

from .recipes import Recipe


def scaled_lr(recipe: Recipe) -> float:
    """Applies the linear scaling rule: `lr` is per 256 samples."""
    return recipe.lr * recipe.batch_size / 256


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """Builds SGD over all parameters. The predictor is a separate group; `fix_lr` keeps its rate from decaying."""
    groups = [
        dict(params=[p for n, p in model.named_parameters() if n.startswith('predictor.') == predictor], fix_lr=fix_lr)
        for predictor, fix_lr in ((False, False), (True, recipe.fix_pred_lr))]
    # One kernel for all parameters. With a GradScaler it also skips overflowed steps without waiting for the host.
    fused = all(p.device.type in ('cuda', 'cpu') for p in model.parameters()) or None
    optimizer = torch.optim.SGD(
        groups, scaled_lr(recipe), recipe.momentum, weight_decay=recipe.weight_decay, fused=fused)
    lay_out_momentum(optimizer)
    return optimizer


def load_optimizer(optimizer: torch.optim.SGD, state: dict[str, Any]) -> None:
    """Loads the state of a checkpoint, perhaps from another device; keeps this run's implementation."""
    own = [{k: group[k] for k in ('fused', 'foreach')} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, ours in zip(optimizer.param_groups, own, strict=True):
        group.update(ours)
    lay_out_momentum(optimizer)


def lay_out_momentum(optimizer: torch.optim.SGD) -> None:
    """Gives each momentum buffer the memory format of its parameter, and creates missing ones as zeros.

    The fused kernel needs the format: on a CPU it walks through both in memory order. Without the zeros it leaves the
    buffers uninitialised if the very first step overflows in float16.
    """
    for group in optimizer.param_groups:
        for p in group['params'] if group['momentum'] else []:
            buffer = torch.zeros_like(p)  # keeps the memory format
            old = optimizer.state[p].get('momentum_buffer')
            optimizer.state[p]['momentum_buffer'] = buffer if old is None else buffer.copy_(old)


def lr_at(epoch: int, recipe: Recipe) -> float:
    """Returns linear warm-up, then the published cosine per epoch: lr 0.5 (1 + cos(pi epoch / epochs)), from 0."""
    if epoch < (warm := recipe.warmup_epochs):
        return scaled_lr(recipe) * (epoch + 1) / warm
    return scaled_lr(recipe) * 0.5 * (1 + math.cos(math.pi * (epoch - warm) / (recipe.epochs - warm)))


def set_lr(optimizer: torch.optim.Optimizer, epoch: int, recipe: Recipe) -> None:
    """Sets the learning rate of every group for this epoch."""
    for group in optimizer.param_groups:
        group['lr'] = scaled_lr(recipe) if group['fix_lr'] else lr_at(epoch, recipe)
