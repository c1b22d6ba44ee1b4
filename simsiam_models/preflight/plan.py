"""Derives a `simsiam pretrain` command from the survey and the trial, with its reasons and its cost."""
import argparse
import math
import shlex
import shutil
from typing import Any

import torch

from ..training.options import resolve_recipe
from ..training.pretrain import build_parser
from ..training.recipes import RECIPES, STEPS, Recipe
from ..training.setup import name_output
from ..weights.published import NAME
from .survey import Survey
from .trial import Trial

MEASURED, PUBLISHED, THUMB = 'measured', 'published', 'rule of thumb'
SMALL = 64  # pixels: at a smaller short side ImageNet's stem throws most of an image away
LONGEST = 800  # epochs: the paper's longest runs
# Small data sets get as many steps as STEPS says; for other recipes, the paper's 800 epochs of 97 steps.
PAPERS_STEPS = 77_600, "the paper's CIFAR-10 run"
LOG_LINE, LOG_EVERY = 300, 50  # bytes, steps

Line = tuple[str, str]  # kind, text


class Plan:
    """The arguments of `simsiam pretrain` for these data, and the reasons for them.

    `name` and `batch` are the recipe and the batch size if the user gives them (otherwise `batch_reason` says why
    `batch` was chosen); `flags` are other flags of the user, by name.
    """

    def __init__(
        self, data: str, s: Survey, device: torch.device, name: str | None = None, batch: int | None = None, *,
        flags: dict[str, Any] | None = None, batch_reason: str = '',
    ) -> None:
        short, self.reasons = s.short_side[1], []
        self.labelled = (s.classes or 0) > 1
        chosen = name or self._choose_recipe(short, device)
        recipe = RECIPES[chosen]
        size = recipe.augmentation.size
        self.flags = [data, '--recipe', chosen, '--batch-size', str(self._choose_batch(s, recipe, batch, batch_reason))]
        fitting = min(max(size, SMALL), max(32, short // 32 * 32))
        if name is None and fitting != size:
            self.flags += ['--image-size', str(fitting)]
            self.reasons.append((THUMB, f'views of {fitting} px, not {size}: the median short side is {short} px'))
        epochs = self._choose_epochs(chosen, s.images // self.batch)
        if epochs != recipe.epochs:
            self.flags += ['--epochs', str(epochs)]
        if self.batch >= 1024 and not recipe.warmup_epochs and epochs > 10:
            self.flags += ['--warmup-epochs', '10']
            self.reasons.append((PUBLISHED, 'warm-up of 10 epochs at batches of 1024 and more (paper)'))
        self.flags += [str(x) for flag, value in (flags or {}).items() if value is not None for x in (flag, value)]
        self.args = build_parser().parse_args(self.flags)
        self.name, self.recipe = resolve_recipe(self.args)
        self.steps_per_epoch = s.images // self.recipe.batch_size
        self.steps = self.steps_per_epoch * self.recipe.epochs

    @property
    def command(self) -> str:
        return f'simsiam pretrain {shlex.join(self.flags)}'

    @property
    def finetune_command(self) -> str:
        """The command that fine-tunes published weights on the same data; '' without labels of several classes."""
        if not self.labelled:
            return ''
        a = self.args
        words = [a.data, '--output', str(name_output(argparse.Namespace(output=None, data=a.data), 'finetune'))]
        for flag, value in (('--device', a.device), ('--workers', a.workers)):
            words += [] if value is None else [flag, str(value)]
        return f'simsiam finetune {shlex.join(words)} --model {NAME}'

    def _choose_recipe(self, short: int, device: torch.device) -> str:
        if device.type == 'cpu':
            name, why = 'small', 'its network is small enough for a CPU'
        elif short <= SMALL:
            name, why = 'cifar10_ep800', f'images of up to {SMALL} px need its 3x3 stem'
        else:
            name, why = 'in1k_bs512_ep100', 'the paper on ImageNet'
        self.reasons.append((THUMB, f'recipe {name}: {why}'))
        return name

    def _choose_batch(self, s: Survey, recipe: Recipe, batch: int | None, why: str) -> int:
        self.batch = batch or recipe.batch_size
        for least, steps, text in ((64, 4, 'at least 4 steps per epoch'), (0, 1, 'no more than there are images')):
            while batch is None and self.batch > least and steps * self.batch > s.images:
                self.batch //= 2
                why = text
        if why:
            self.reasons.append((THUMB, f'batch {self.batch}: {why}'))
        if 64 <= self.batch <= 512 and recipe.augmentation.size > SMALL:
            self.reasons.append(
                (PUBLISHED, 'ImageNet top-1: 66.1 at batch 64, 67.3 at 128, 68.1 at 256 and 512 (paper)'))
        return self.batch

    def _choose_epochs(self, name: str, steps: int) -> int:
        """Chooses the epochs: few images get more, and never fewer than the recipe has."""
        own, (target, whose) = RECIPES[name].epochs, STEPS.get(name, PAPERS_STEPS)
        epochs = max(own, min(LONGEST, math.ceil(target / steps)))
        if epochs != own:
            cut = f", but at most the paper's {LONGEST} epochs" if epochs == LONGEST else ''
            self.reasons.append((THUMB, f'{epochs} epochs, not {own}: the {target:,} steps of {whose}{cut}'))
        return epochs


def estimate_cost(plan: Plan, t: Trial) -> dict[str, Any]:
    """Estimates time and disk of the whole run from the measurements."""
    disk = (plan.args.keep_last + 1) * t.state_bytes + t.backbone_bytes
    log = (plan.steps // LOG_EVERY + plan.recipe.epochs) * LOG_LINE
    return {
        'steps': plan.steps, 'steps_per_epoch': plan.steps_per_epoch, 'seconds_per_step': t.run_seconds,
        'hours': plan.steps * t.run_seconds / 3600, 'checkpoint_bytes': t.state_bytes, 'log_bytes': log,
        'disk_bytes': disk + log, 'disk_free_bytes': shutil.disk_usage('.').free}
