"""More epochs for a run: --extend N gives it a new total, and the epochs still to come the schedule of that total.

args.json keeps the extensions, and the learning rate of an epoch depends on them alone. So a run that was extended, and
killed at any moment, ends in the same bits as one that was extended and left alone.
"""
import dataclasses
from pathlib import Path
from typing import Any

from ..runtime.checkpoint import find_differences
from ..runtime.lifecycle import amend_claim
from ..runtime.versions import command
from .recipes import Recipe
from .schedule import lr_at, scaled_lr


def match_epochs(epochs: int, extend: int | None, recorded: dict[str, Any]) -> int:
    """Returns the total of epochs to compare with that of an earlier run, from a command's --epochs and --extend.

    It is the run's own if the command names any total that the run had before, has now, or is to have: the command that
    began a run also continues it after an extension.
    """
    totals = {extend, recorded['epochs'], *(other['epochs_before'] for other in recorded.get('extensions', ()))}
    return recorded['epochs'] if epochs in totals else epochs


def check_epochs(
    epochs: int | None, record: dict[str, Any], recorded: dict[str, Any], free: set[str], folder: Path,
) -> None:
    """Raises ValueError if the run in `folder` cannot be extended to `epochs`, or only with --extend to what is wanted.

    Args:
        epochs: --extend; None without it.
        record, recorded: the arguments of the command, and those of the run; {}: the folder holds none.
        free: arguments that may differ.
    """
    if epochs is None:
        wanted = record['epochs']
        if recorded and wanted > recorded['epochs'] and not find_differences(recorded, record, free | {'epochs'}):
            raise ValueError(
                f'{folder} holds this run with {recorded["epochs"]} epochs, not {wanted}: add --extend {wanted} to '
                f'continue it to {wanted}, or give another --output')
        return
    if not recorded:
        raise ValueError(f'--extend {epochs}: {folder} holds no run; name the --output of a run, or leave --extend out')
    total = recorded['epochs']
    if epochs < total or epochs == total and not recorded.get('extensions'):
        raise ValueError(
            f'--extend {epochs}: the run in {folder} has {total} epochs; name a larger total, or leave --extend out')


def extend(
    folder: Path, record: dict[str, Any], state: dict[str, Any] | None, epochs: int, recipe: Recipe,
) -> tuple[dict[str, Any], str]:
    """Records a longer schedule, from the next epoch on; returns the run's arguments, and what has changed.

    Args:
        state: the checkpoint that the run continues from; None: it has none yet.
        epochs: the new total; if the run already has it, nothing changes.

    Raises:
        OSError: args.json cannot be written.
    """
    if record['epochs'] == epochs:
        done = state is not None and state['epoch'] == epochs
        return record, f'{folder} has already been extended to {epochs} epochs{" and is finished" if done else ""}'
    earlier = record.get('extensions', [])
    reached = 0 if state is None else state['epoch'] + (state['step'] > 0)
    extension = {
        'epochs_before': record['epochs'], 'epochs': epochs, 'command': command(),
        'from_epoch': max([reached, *(other['from_epoch'] for other in earlier)])}
    changes = {'epochs': epochs, 'extensions': [*earlier, extension]}
    amend_claim(folder, changes)
    return {**record, **changes}, _describe(extension, recipe)


def _describe(extension: dict[str, Any], recipe: Recipe) -> str:
    before, now, epoch = extension['epochs_before'], extension['epochs'], extension['from_epoch']
    old, new = (dataclasses.replace(recipe, epochs=n) for n in (before, now))
    was = (f'instead of {lr_at(epoch, old):.3g}' if epoch < before
           else f'after {lr_at(epoch - 1, old):.3g} in the epoch before')
    predictor = f"; the predictor's stays {scaled_lr(recipe):.3g}" if recipe.fix_pred_lr else ''
    return (
        f'extending the run from {before} to {now} epochs: from epoch {epoch + 1} on, the learning rate follows the '
        f'cosine over {now} epochs, which gives {lr_at(epoch, new):.3g} in that epoch {was}{predictor}')


def recipe_at(epoch: int, recipe: Recipe, record: dict[str, Any]) -> Recipe:
    """Returns the recipe with the total of epochs whose schedule holds in this epoch, which counts from 0."""
    for extension in record.get('extensions', ()):
        if epoch < extension['from_epoch']:
            return dataclasses.replace(recipe, epochs=extension['epochs_before'])
    return recipe
