"""The optimizer's groups and the learning rate of each epoch."""
import math

import torch
from torch import nn

from .recipes import Recipe


def scaled_lr(recipe: Recipe) -> float:
    """The linear scaling rule: `lr` is per 256 samples."""
    return recipe.lr * recipe.batch_size / 256


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD over all parameters; the predictor is a group of its own, whose `fix_lr` says that it does not decay."""
    named = list(model.named_parameters())
    groups = [
        dict(params=[p for n, p in named if not n.startswith('predictor.')], fix_lr=False),
        dict(params=[p for n, p in named if n.startswith('predictor.')], fix_lr=recipe.fix_pred_lr)]
    return torch.optim.SGD(groups, scaled_lr(recipe), recipe.momentum, weight_decay=recipe.weight_decay)


def lr_at(epoch: int, recipe: Recipe) -> float:
    """Linear warm-up, then the published cosine per epoch: lr 0.5 (1 + cos(pi epoch / epochs)), epoch from 0."""
    warm = recipe.warmup_epochs
    if epoch < warm:
        return scaled_lr(recipe) * (epoch + 1) / warm
    return scaled_lr(recipe) * 0.5 * (1 + math.cos(math.pi * (epoch - warm) / (recipe.epochs - warm)))


def set_lr(optimizer: torch.optim.Optimizer, epoch: int, recipe: Recipe) -> float:
    """Sets the rate of every group for this epoch; returns that of the backbone."""
    lr = lr_at(epoch, recipe)
    for group in optimizer.param_groups:
        group['lr'] = scaled_lr(recipe) if group['fix_lr'] else lr
    return lr
