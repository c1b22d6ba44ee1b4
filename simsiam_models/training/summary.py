"""What a run says of itself at its beginning and at its end. `run` is train.py's Run."""
import math
from typing import Any

from ..runtime.checkpoint import BACKBONE, UNREADABLE
from .schedule import scaled_lr


def describe(run: Any, name: str) -> str:
    r, images, size = run.recipe, run.views.images, run.world.size
    parameters = sum(p.numel() for p in run.model.parameters())
    kind = f'{len(images.classes)} classes' if images.labels is not None else 'no labels'
    lines = [
        f'{images.name}: {len(images)} images, {kind}; {len(run.views)} steps per epoch',
        f'recipe {name}: {r.model}, {parameters:,} parameters, {r.epochs} epochs, batch {r.batch_size} '
        f'({r.batch_size // size} x {size} processes), lr {r.lr:g} per 256 samples = {scaled_lr(r):g}, '
        f'{run.world.device.type}, amp {run.amp}, {run.perf} -> {run.folder}']
    if hasattr(images, 'promise'):
        lines.append(images.promise)
    if run.monitor is None:
        lines.append('no labels, so no kNN monitor; --knn-data DATA names labelled images')
    if r.batch_size >= 1024 and not r.warmup_epochs:
        lines.append('the paper warms up for 10 epochs at batches of 1024 and more: --warmup-epochs 10')
    if r.batch_size < 64:
        lines.append(f'batch norm sees {r.batch_size} samples; the paper tried no batch below 64')
    return '\n'.join(lines)


def describe_continuation(run: Any, processes: int) -> str:
    """`processes`: how many there were before."""
    text = f'continuing after epoch {run.epoch}, step {run.step}'
    if processes != run.world.size:
        text += (
            f', now with {run.world.size} processes, before with {processes}: each global batch holds the same samples '
            'and views as it would have')
    return text


def verdict(run: Any) -> str:
    """The run in plain words."""
    f, lines = run.figures, []
    knn = f['knn']
    if run.diagnosis is not None:
        lines.append(f'{run.diagnosis} (std x sqrt(d) {f["std"]:.2f}, effective rank {f["rank"]:.1f})')
    if run.known_unreadable:
        lines.append(
            f'{len(run.known_unreadable)} images could not be read and were replaced; {run.folder / UNREADABLE} names '
            'them:')
        lines += [f'  {text}' for text in list(run.known_unreadable.values())[:5]]
    if 'trained' in knn:
        raw = f', raw pixels {knn["pixels"]:.1f} %' if 'pixels' in knn else ''
        gained = gain(knn['trained'], max(knn['random'], knn.get('pixels', 0.0)), len(run.monitor.sets[1][1]))
        lines.append(
            f'{run.monitor.describe()}: trained backbone {knn["trained"]:.1f} %, random backbone {knn["random"]:.1f} %'
            f'{raw}: {gained}')
    lines.append(
        f"The backbone is ready for timm: timm.create_model('local-dir:{run.folder / BACKBONE}', pretrained=True)")
    return '\n'.join(lines)


def gain(trained: float, before: float, queries: int) -> str:
    """Percent right of the queries, in words; a difference within two standard errors of it is none."""
    difference, p = trained - before, [x / 100 for x in (trained, before)]
    if abs(difference) <= 200 * math.sqrt(sum(x * (1 - x) for x in p) / queries):
        return f'no difference to the better of them that {queries} queries could show.'
    if difference < 0:
        return f'{-difference:.1f} points below the better of them; these features are of no use yet.'
    return f'{difference:+.1f} points over the better of them, learned without labels.'


def clock_time(seconds: float) -> str:
    """As h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02}:{s:02}'
