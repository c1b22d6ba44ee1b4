"""Describes a run at its start and at its end."""
from pathlib import Path

from ..data import TwoViews
from ..runtime.accuracy import difference_error
from ..runtime.messages import counted, printable
from ..weights.networks import BACKBONE
from .journal import UNREADABLE, Journal
from .monitor import KnnMonitor, explain_no_monitor
from .recipes import CPU_RECIPES, STEPS
from .schedule import scaled_lr
from .step import Trainer


def describe(name: str, trainer: Trainer, views: TwoViews, knn: KnnMonitor | None, folder: Path) -> str:
    """Describes the data, the recipe and the device of a run, with advice about them."""
    r, images, world = trainer.recipe, views.images, trainer.world
    parameters = sum(p.numel() for p in trainer.model.parameters())
    kind = 'no labels' if images.labels is None else counted(len(images.classes), 'class', 'classes')
    lines = [
        f'{printable(images.name)}: {counted(len(images), "image")}, {kind}; {counted(len(views), "step")} per epoch',
        f'recipe {name}: {r.model}, {parameters:,} parameters, {counted(r.epochs, "epoch")}, batch {r.batch_size} '
        f'({r.batch_size // world.size} x {counted(world.size, "process", "processes")}), lr {r.lr:g} per 256 samples '
        f'= {scaled_lr(r):g}, {world.device.type}, amp {trainer.amp}, {trainer.perf} -> {folder}']
    if world.device.type == 'cpu' and name not in CPU_RECIPES:
        lines.append(
            f'{name} is a recipe for GPUs: on a CPU it takes long, and may take more memory than there is; for small '
            'images of your own, use --recipe small; `simsiam preflight` says what this machine can do')
    steps = len(views) * r.epochs
    if name in STEPS and 4 * steps < STEPS[name][0]:
        lines.append(
            f'{counted(steps, "step")} in all are few: {name} was measured with {STEPS[name][0]:,}; `simsiam '
            'preflight` suggests --epochs for these data')
    if hasattr(images, 'promise'):
        lines.append(images.promise)
    if r.knn_every < 0:
        lines.append(f'--knn-every {r.knn_every}: no kNN monitor')
    elif knn is None:
        lines.append(f'{explain_no_monitor(images)}, so no kNN monitor; --knn-data DATA names labelled images')
    if r.batch_size >= 1024 and not r.warmup_epochs and r.epochs > 10:
        lines.append('the paper warms up for 10 epochs at batches of 1024 and more: --warmup-epochs 10')
    if r.batch_size < 64:
        lines.append(f'batch norm sees {r.batch_size} samples; the paper tried no batch below 64')
    return '\n'.join(lines)


def describe_continuation(epoch: int, step: int, processes: int, before: int) -> str:
    """Describes a continued run; `before`: how many processes it had when the checkpoint was written."""
    more = '' if processes == before else (
        f', now with {processes} processes, before with {before}: each global batch still holds the same samples and '
        'views')
    return f'continuing after epoch {epoch}, step {step}{more}'


def verdict(journal: Journal, views: TwoViews, folder: Path) -> str:
    """Describes the result of a finished run."""
    f, lines, bad, knn = journal.figures, [], views.unreadable, journal.figures['knn']
    if journal.diagnosis is not None:
        lines.append(f'{journal.diagnosis} (std x sqrt(d) {f["std"]:.2f}, effective rank {f["rank"]:.1f})')
    if bad:
        lines.append(f'{len(bad)} images could not be read and were replaced; {folder / UNREADABLE} names them:')
        lines += [f'  {text}' for text in list(bad.values())[:5]]
    if journal.knn is not None and 'trained' in knn:
        raw = f', raw pixels {knn["pixels"]:.1f} %' if 'pixels' in knn else ''
        start, gain = knn[journal.start], describe_gain(
            knn['trained'], max(knn[journal.start], knn.get('pixels', 0.0)), journal.knn.queries)
        lines.append(
            f'{journal.knn.describe()}: trained backbone {knn["trained"]:.1f} %, {journal.start} backbone {start:.1f} %'
            f'{raw}: {gain}')
    lines.append(f"The backbone is ready for timm: timm.create_model('local-dir:{folder / BACKBONE}', pretrained=True)")
    return '\n'.join(lines)


def describe_gain(trained: float, before: float, queries: int) -> str:
    """Compares two accuracies in percent; a difference within two standard errors counts as none."""
    difference, error = trained - before, difference_error(trained, before, queries)
    text = f'{abs(difference):.1f} points {"below" if difference < 0 else "over"} the better of them (standard error ' \
           f'{error:.1f} with {queries} queries)'
    if abs(difference) <= 2 * error:
        return f'{text}, no significant difference.'
    return f'{text}{"; these features are of no use yet" if difference < 0 else ", learned without labels"}.'
