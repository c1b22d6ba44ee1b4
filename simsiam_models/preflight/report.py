"""`simsiam preflight`: reports on the data and on the speed of a step before a long run, and recommends a command.

Each line of the report says where it comes from: `measured` (here and now, or computed from a measurement),
`published`, or `rule of thumb`.
"""
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data import Images, open_data
from ..runtime.distributed import choose_device, cores, default_workers
from ..runtime.files import write_json
from ..runtime.messages import check_flags, counted, printable, size_text
from ..training.recipes import CPU_RECIPES, RECIPES
from .plan import MEASURED, PUBLISHED, Line, Plan, estimate_cost
from .survey import ELONGATED, Survey, survey
from .trial import Trial, run_trial

MIN_STEPS = 50  # without stop-gradient a run collapses within 100
FEW_IMAGES = 1000
FAR = 0.2  # from ImageNet's mean and standard deviation of a channel


def list_warnings(
    s: Survey, plan: Plan, t: Trial, device: torch.device, used: int, cost: dict[str, Any]) -> list[str]:
    """Lists the problems, and what to do about each; `used`: data threads."""
    slow, waiting = device.type == 'cpu' and cost['hours'] > 24 and plan.name not in CPU_RECIPES, t.waiting or 0.0
    warnings = [
        *_check_images(s, plan), (slow, f'{cost["hours"]:,.0f} hours on this CPU: use a GPU, or --recipe small'),
        (not slow and cost['hours'] > 24 * 7,
         f'{cost["hours"] / 24:,.0f} days here: use more GPUs, or fewer --epochs'),
        (waiting > 0.1, f'training waits for data {100 * waiting:.0f} % of the time: use '
                        + (f'more --workers (now {used}), or ' if used < cores() else '') + 'smaller files'),
        (cost['disk_bytes'] > cost['disk_free_bytes'],
         f'the run needs {size_text(cost["disk_bytes"])} and {size_text(cost["disk_free_bytes"])} are free in '
         f'{Path.cwd()}: put --output on another disk'),
        (t.diagnosis is not None, f'after {counted(t.steps, "step")}: {t.diagnosis}'),
        (bool(t.disturbance),
         f'the timing was disturbed: {100 * (t.disturbance or 0):.0f} % of the processor time went to other processes; '
         'run it again on an idle machine')]
    return [text for applies, text in warnings if applies]


def _check_images(s: Survey, plan: Plan) -> list[tuple[bool, str]]:
    """Returns warnings about the data, each with whether it applies."""
    aug, batch, allowed = plan.recipe.augmentation, plan.recipe.batch_size, plan.args.max_unreadable
    share, repeated = s.unreadable / s.read, s.duplicates / s.decoded
    imagenet = *IMAGENET_DEFAULT_MEAN, *IMAGENET_DEFAULT_STD
    return [
        (share > allowed,
         f'{100 * share:.1f} % of the images are unreadable, and training stops above {100 * allowed:g} %: repair or '
         f'remove them, or add --max-unreadable {math.ceil(100 * share + 1) / 100:g}'),
        (repeated > 0.01, f'{100 * repeated:.1f} % of the images repeat another one: remove them, they cost time and '
                          'inflate the kNN accuracy (rule of thumb: above 1 %)'),
        (s.constant > 0, f'{s.constant} of {s.decoded} images are of one colour or nearly so, and their views teach '
            f'nothing: remove them{", or the outputs may collapse" if s.constant > 0.1 * s.decoded else ""}'),
        (s.images < FEW_IMAGES, f'{s.images:,} images are few: fine-tuning published weights will likely work better '
                                f'(rule of thumb: below {FEW_IMAGES:,}); '
         + ('see its command below' if plan.finetune_command else 'it needs labels, such as a subfolder per class')),
        (s.smaller_than(aug.size) > 0.5, f'most images are smaller than the {aug.size} px views and will be enlarged: '
                                         + suggest_size(s.short_side[1], aug.size)),
        (bool(s.turned), f'{counted(s.turned or 0, "image is", "images are")} rotated by an EXIF tag, which training '
                          'ignores: rotate the files'),
        (s.grayscale > 0.9 and aug.brightness < 0.8,
         'on grayscale images hue, saturation and grayscale change nothing, so views differ less: use --brightness 0.8 '
         '--contrast 0.8 (rule of thumb)'),
        (any(abs(a - b) > FAR for a, b in zip((*s.mean, *s.std), imagenet, strict=True)),
         "the channels are far from ImageNet's statistics, which all recipes normalise with; the first batch norm "
         'corrects most of it, so change nothing unless training fails (rule of thumb)'),
        (batch < 64, f'batch norm sees {batch} samples; the paper tried no batch below 64: '
                     + ('more images help most' if s.images < 256 else 'use --batch-size 64 or more'))]


def suggest_size(short: int, size: int) -> str:
    """Suggests smaller views than `size` for images of the short side `short`, both in pixels."""
    smaller = short // 32 * 32 or short // 8 * 8
    return f'use --image-size {smaller}' if 8 <= smaller < size else 'larger images would teach more'


def data_lines(s: Survey, size: int) -> list[Line]:
    """Lists the findings of the survey; `size`: of a view, in pixels."""
    classes = 'no labels'
    if s.classes is not None and s.smallest_class is not None and s.largest_class is not None:
        (low, least), (high, most) = s.smallest_class, s.largest_class
        span = f'{least:,}' if least == most else f'{least:,} ({low}) to {most:,} ({high})'
        classes = f'{counted(s.classes, "class", "classes")} of {span}'
    more = '' if s.complete else '; everything below is about these images (--all reads every image)'
    repeats = ', '.join(f'{a} = {b}' for a, b in s.duplicates_first[:2])
    turned = '' if s.turned is None else f', turned by EXIF {s.turned:,}'
    (w0, w1, w2), (h0, h1, h2) = s.width, s.height
    texts = [
        f'{counted(s.images, "image")}, {classes}',
        f'read {"the first " if s.stream else ""}{s.read:,} of {s.images:,} in {s.seconds:.1f} s{more}',
        f'unreadable {s.unreadable:,}, duplicates {s.duplicates:,}{f" ({repeats})" if repeats else ""}{turned}, of one '
        f'colour {s.constant:,}',
        *(f'unreadable: {text}' for text in s.unreadable_first),
        f'pixels, min / median / max: width {w0} / {w1} / {w2}, height {h0} / {h1} / {h2}',
        f'smaller than the {size} px views {percent(s.smaller_than(size))}, longer than {ELONGATED:g} : 1 '
        f'{percent(s.elongated / s.decoded)}, grayscale {percent(s.grayscale)}',
        f'{size_text(s.bytes)} {"of files" if s.files else "of pixels"}'
        f'{"" if s.complete else f", so about {size_text(s.bytes / s.decoded * s.images)} in all"}',
        f'channels R G B: mean {numbers(s.mean)}, std {numbers(s.std)}']
    return [*((MEASURED, text) for text in texts), (
        PUBLISHED, f'ImageNet, as all recipes normalise: mean {numbers(IMAGENET_DEFAULT_MEAN)}, std '
                   f'{numbers(IMAGENET_DEFAULT_STD)}')]


def trial_lines(t: Trial) -> list[Line]:
    """Lists the measurements of the trial."""
    scaled = '' if t.timed_batch == t.batch else f', estimated from {counted(t.timed_batch, "sample")}'
    texts = [
        *t.notes, f'data alone: {t.data_rate:,.0f} images/s',
        f'step alone: {t.batch / t.step_seconds:,.1f} images/s ({t.step_seconds:.3g} s{scaled})']
    if t.rate is not None and t.waiting is not None:
        texts.append(f'both: {t.rate:,.1f} images/s, waiting for data {percent(t.waiting)}')
    if t.memory is not None:
        texts.append(f'peak memory {size_text(t.memory)} ({t.memory_of})')
    if t.steps < 2:
        texts.append(f'one step took {t.step_seconds:.3g} s, too long to train here, so nothing is known about '
                     'collapse; use more --seconds')
    else:
        found = 'no collapse so far' if t.steps >= MIN_STEPS else 'too few steps to judge'
        if t.diagnosis is not None:
            found = 'COLLAPSED' if t.collapsed else 'at risk, see the warnings'
        a, b = t.first, t.last
        rose = ' (worse)' if b['loss'] > a['loss'] else ''
        texts.append(f'{t.steps} steps: loss {a["loss"]:.2f} -> {b["loss"]:.2f}{rose}, std x sqrt(d) {a["std"]:.2f} -> '
                     f'{b["std"]:.2f}, effective rank {a["rank"]:.0f} -> {b["rank"]:.0f}: {found}')
    return [(MEASURED, text) for text in texts]


def cost_lines(plan: Plan, t: Trial, cost: dict[str, Any]) -> list[Line]:
    """Lists time and disk of the whole run."""
    return [
        (MEASURED, f'{duration(3600 * cost["hours"])}: {counted(plan.steps, "step")} of {t.run_seconds:.3g} s; '
                   f'{counted(plan.recipe.epochs, "epoch")} of {duration(plan.steps_per_epoch * t.run_seconds)}; the '
                   'kNN monitor is not included'),
        (MEASURED, f'{size_text(cost["disk_bytes"])} of disk: {counted(plan.args.keep_last, "checkpoint")} and one '
                   f'being written, {size_text(t.state_bytes)} each, backbone {size_text(t.backbone_bytes)}, log')]


def preflight(
    data: str, recipe: str | None = None, *, batch: int | None = None, device: str | None = None,
    seconds: float = 120.0, workers: int | None = None, sample: int | None = None, file: Path | None = None,
    images_per_epoch: int | None = None, say: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Surveys the data, tries to train, prints a report, and returns the record that it writes to `file`.

    Raises ValueError for a wrong argument or useless data, OSError for missing data or an unwritable `file`.
    """
    began = time.perf_counter()
    check_flags([
        ('--recipe', recipe, recipe is None or recipe in RECIPES, f'one of {", ".join(RECIPES)}'),
        ('--batch-size', batch, batch is None or batch >= 2, 'at least 2'),
        ('--seconds', seconds, 0 < seconds < math.inf, 'above 0'),
        ('--workers', workers, workers is None or workers >= 0, 'at least 0'),
        ('--sample', sample, sample is None or sample >= 1, 'at least 1'),
        ('--json', file, file is None or file.parent.is_dir() and not file.is_dir(), 'a file in a folder that exists')])
    where = choose_device(device)
    train, _ = open_data(data, images_per_epoch)
    flags = {'--workers': workers, '--device': device, '--images-per-epoch': images_per_epoch}
    threads = default_workers(torch.device('cuda')) if workers is None else workers  # nothing else runs yet
    s = survey(train, threads, seconds / 2, sample)
    _check_survey(s, batch)
    plan = Plan(data, s, where, recipe, batch, flags=flags)
    used = default_workers(where) if workers is None else workers
    lines = _show(say, f'DATA   {s.name}', data_lines(s, plan.recipe.augmentation.size))
    left = max(seconds / 2, seconds - (time.perf_counter() - began))
    t = run_trial(cast(Images, train), plan.recipe, where, used, left)
    if t.batch != plan.recipe.batch_size:
        plan = Plan(data, s, where, recipe, t.batch, flags=flags, batch_reason='what fits into memory')
    cost = estimate_cost(plan, t)
    lines += _show(
        say, f'TRIAL  {plan.name}, {plan.recipe.model} with {t.parameters:,} parameters, batch {t.batch}, {where}, '
        f'amp {t.amp}, {counted(used, "data thread")}, {t.seconds:.0f} s', trial_lines(t))
    lines += _show(say, 'PLAN', [*plan.reasons, *cost_lines(plan, t, cost)])
    warnings = list_warnings(s, plan, t, where, used, cost)
    record = {
        'command': plan.command, 'finetune_command': plan.finetune_command, 'recipe': plan.name, 'batch_size': t.batch,
        'epochs': plan.recipe.epochs, 'image_size': plan.recipe.augmentation.size, 'device': str(where),
        'workers': used,
        'survey': s.record(plan.recipe.augmentation.size), 'trial': asdict(t), 'cost': cost, 'warnings': warnings,
        'lines': lines, 'seconds': time.perf_counter() - began, 'python': platform.python_version(),
        'torch': torch.__version__}
    if file is not None:
        write_json(file, record)
    if warnings:
        say('\n'.join(['WARNINGS', *(f'  - {printable(text)}' for text in warnings)]))
    _show_commands(say, plan, s, where)
    return record


def _show_commands(say: Callable[[str], Any], plan: Plan, s: Survey, device: torch.device) -> None:
    if s.images < FEW_IMAGES and plan.finetune_command:
        say(f'\nlikely to work better than pretraining:\n{printable(plan.finetune_command)}')
    say(f'\n{printable(plan.command)}')
    if device.type == 'cuda' and (n := torch.cuda.device_count()) > 1:
        say(f'on all {n} cards (not measured): torchrun --nproc-per-node {n} -m simsiam_models '
            f'{plan.command.removeprefix("simsiam ")}')


def _show(say: Callable[[str], Any], title: str, lines: list[Line]) -> list[dict[str, str]]:
    """Prints a section as soon as it is ready, and returns its lines for the record."""
    say('\n'.join([printable(title), *(f'  {kind:15}{printable(text)}' for kind, text in lines)]))
    return [{'section': title.split()[0].lower(), 'kind': kind, 'text': text} for kind, text in lines]


def _check_survey(s: Survey, batch: int | None) -> None:
    """Raises ValueError if the data cannot be trained on."""
    if s.images < 2 or batch is not None and batch > s.images:
        raise ValueError(f'{s.name} has {counted(s.images, "image")}, but a batch takes {batch or 2}: use more images'
                         + (f', or --batch-size {s.images} or less' if s.images >= 2 else ''))
    if s.unreadable > s.read / 2:
        raise ValueError(
            f'{s.name}: {s.unreadable} of {s.read} images read cannot be decoded, more than half; repair or remove '
            f'them; the first: {s.unreadable_first[0]}')


def percent(share: float) -> str:
    return f'{100 * share:.0f} %' if share in (0, 1) else f'{100 * share:.1f} %'


def numbers(values: tuple[float, ...]) -> str:
    return ' '.join(f'{x:.3f}' for x in values)


def duration(seconds: float) -> str:
    for unit, length in (('days', 86400), ('hours', 3600), ('minutes', 60)):
        if seconds >= 2 * length:
            return f'{seconds / length:,.1f} {unit}'
    return f'{seconds:.3g} s'
