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
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data import open_data
from ..runtime.distributed import choose_device, default_workers
from ..runtime.files import write_json
from ..runtime.messages import check_flags
from ..training.recipes import RECIPES
from .plan import MEASURED, PUBLISHED, Line, Plan, estimate_cost
from .survey import ELONGATED, Survey, survey
from .trial import Trial, run_trial

MIN_STEPS = 50  # without stop-gradient a run collapses within 100
FEW_IMAGES = 1000
FAR = 0.2  # from ImageNet's mean and standard deviation of a channel


def list_warnings(
    s: Survey, plan: Plan, t: Trial, device: torch.device, used: int, cost: dict[str, Any]) -> list[str]:
    """What is in the way, and what to do about it; `used`: data threads."""
    return [
        *_warn_of_data(s, plan), *_warn_of_images(s, plan), *_warn_of_cost(plan, t, device, used, cost),
        *([] if t.diagnosis is None else [f'after {t.steps} steps: {t.diagnosis}'])]


def _warn_of_data(s: Survey, plan: Plan) -> list[str]:
    warnings, share, allowed = [], s.unreadable / s.read, plan.args.max_unreadable
    if share > allowed:
        warnings.append(
            f'{100 * share:.1f} % of the images are unreadable, and train.py stops above {100 * allowed:g} %: repair '
            f'or remove them, or add --max-unreadable {math.ceil(100 * share + 1) / 100:g}')
    if s.duplicates > 0.01 * s.decoded:
        warnings.append(
            f'{100 * s.duplicates / s.decoded:.1f} % of the images repeat another one: remove them, they cost time and '
            'inflate the kNN accuracy (rule of thumb: above 1 %)')
    if s.constant:
        warnings.append(
            f'{s.constant} of {s.decoded} images are of one colour or nearly so, and their views teach nothing: remove '
            f'them{", or the outputs may collapse" if s.constant > 0.1 * s.decoded else ""}')
    if s.images < FEW_IMAGES:
        warnings.append(
            f'{s.images:,} images are few: fine-tuning published weights will likely work better (rule of thumb: below '
            f'{FEW_IMAGES:,})')
    return warnings


def _warn_of_images(s: Survey, plan: Plan) -> list[str]:
    r, warnings = plan.recipe, []
    size = r.augmentation.size
    if s.smaller_than(size) > 0.5:
        least = max(32, s.short_side[1] // 32 * 32)
        warnings.append(
            f'most images are smaller than the {size} px views and will be enlarged: use --image-size {least}')
    if s.turned:
        warnings.append(f'{s.turned} images are turned by EXIF, which training does not apply: rotate the files')
    if s.grayscale > 0.9 and r.augmentation.brightness < 0.8:
        warnings.append(
            'on grayscale images hue, saturation and grayscale change nothing, so views differ less: use --brightness '
            '0.8 --contrast 0.8 (rule of thumb)')
    if _is_far(s):
        warnings.append(
            "the channels are far from ImageNet's statistics, with which all recipes normalise; the first batch norm "
            'corrects most of it, so change nothing unless training fails (rule of thumb)')
    if r.batch_size < 64:
        warnings.append(
            f'batch norm sees {r.batch_size} samples; the paper tried no batch below 64: '
            + ('more images help most' if s.images < 256 else 'use --batch-size 64 or more'))
    return warnings


def _warn_of_cost(plan: Plan, t: Trial, device: torch.device, used: int, cost: dict[str, Any]) -> list[str]:
    warnings = []
    if device.type == 'cpu' and cost['hours'] > 24 and plan.name != 'demo':
        warnings.append(f'{cost["hours"]:,.0f} hours on this CPU: use a GPU, or --recipe demo')
    elif cost['hours'] > 24 * 7:
        warnings.append(f'{cost["hours"] / 24:,.0f} days here: use more GPUs, or fewer --epochs')
    if t.waiting is not None and t.waiting > 0.1:
        warnings.append(
            f'training waits for data {100 * t.waiting:.0f} % of the time: use more --workers (now {used}), or smaller '
            'files')
    if cost['disk_bytes'] > cost['disk_free_bytes']:
        warnings.append(
            f'the run needs {size_text(cost["disk_bytes"])} and {size_text(cost["disk_free_bytes"])} are free in '
            f'{Path.cwd()}: put --output on another disk')
    return warnings


def _is_far(s: Survey) -> bool:
    pairs = [*zip(s.mean, IMAGENET_DEFAULT_MEAN, strict=True), *zip(s.std, IMAGENET_DEFAULT_STD, strict=True)]
    return any(abs(a - b) > FAR for a, b in pairs)


def data_lines(s: Survey, size: int) -> list[Line]:
    """What the survey counted; `size`: of a view, in pixels."""
    classes = 'no labels'
    if s.classes is not None:
        (low, least), (high, most) = s.smallest_class, s.largest_class
        classes = f'{s.classes} classes of {least:,} ({low}) to {most:,} ({high})'
        if least == most:
            classes = f'{s.classes} classes of {least:,}'
    more = '' if s.complete else '; everything below is about these (--all reads every image)'
    repeats = ', '.join(f'{a} = {b}' for a, b in s.duplicates_first[:2])
    turned = '' if s.turned is None else f', turned by EXIF {s.turned:,}'
    (w0, w1, w2), (h0, h1, h2) = s.width, s.height
    return [
        (MEASURED, f'{s.images:,} images, {classes}'),
        (MEASURED, f'read {"the first " if s.stream else ""}{s.read:,} of {s.images:,} in {s.seconds:.1f} s{more}'),
        (MEASURED, f'unreadable {s.unreadable:,}, duplicates {s.duplicates:,}{f" ({repeats})" if repeats else ""}'
                   f'{turned}, of one colour {s.constant:,}'),
        *((MEASURED, f'unreadable: {text}') for text in s.unreadable_first),
        (MEASURED, f'pixels, min / median / max: width {w0} / {w1} / {w2}, height {h0} / {h1} / {h2}'),
        (MEASURED, f'smaller than the {size} px views {percent(s.smaller_than(size))}, longer than {ELONGATED:g} : 1 '
                   f'{percent(s.elongated / s.decoded)}, grayscale {percent(s.grayscale)}'),
        (MEASURED, f'{size_text(s.bytes)} {"of files" if s.files else "of pixels"}'
                   f'{"" if s.complete else f", so about {size_text(s.bytes / s.decoded * s.images)} in all"}'),
        (MEASURED, f'channels R G B: mean {numbers(s.mean)}, std {numbers(s.std)}'),
        (PUBLISHED, f'ImageNet, as all recipes normalise: mean {numbers(IMAGENET_DEFAULT_MEAN)}, std '
                    f'{numbers(IMAGENET_DEFAULT_STD)}')]


def trial_lines(t: Trial) -> list[Line]:
    """What the trial measured."""
    lines = [(MEASURED, note) for note in t.notes]
    if t.data_rate is not None:
        lines.append((MEASURED, f'data alone: {t.data_rate:,.0f} images/s'))
    scaled = '' if t.timed_batch == t.batch else f', estimated from {t.timed_batch} samples'
    lines.append((MEASURED, f'step alone: {t.batch / t.step_seconds:,.1f} images/s ({t.step_seconds:.3g} s{scaled})'))
    if t.rate is not None:
        lines.append((MEASURED, f'both: {t.rate:,.1f} images/s, waiting for data {percent(t.waiting)}'))
    if t.memory is not None:
        lines.append((MEASURED, f'peak memory {size_text(t.memory)} ({t.memory_of})'))
    if t.steps < 2:
        lines.append((MEASURED, f'one step took {t.step_seconds:.3g} s, too long to train here: nothing is known about '
                                'collapse; use more --seconds'))
        return lines
    found = 'no collapse so far' if t.steps >= MIN_STEPS else 'too few steps to judge'
    if t.diagnosis is not None:
        found = 'COLLAPSED' if t.collapsed else 'at risk, see the warnings'
    a, b = t.first, t.last
    lines.append((
        MEASURED, f'{t.steps} steps: loss {a["loss"]:.2f} -> {b["loss"]:.2f}, std x sqrt(d) {a["std"]:.2f} -> '
                  f'{b["std"]:.2f}, effective rank {a["rank"]:.0f} -> {b["rank"]:.0f}: {found}'))
    return lines


def cost_lines(plan: Plan, t: Trial, cost: dict[str, Any]) -> list[Line]:
    """Time and disk of the whole run."""
    per_epoch = plan.steps_per_epoch * t.run_seconds
    return [
        (MEASURED, f'{duration(3600 * cost["hours"])}: {plan.steps:,} steps of {t.run_seconds:.3g} s; '
                   f'{plan.recipe.epochs} epochs of {duration(per_epoch)}; the kNN monitor is not included'),
        (MEASURED, f'{size_text(cost["disk_bytes"])} of disk: {plan.args.keep_last} checkpoints and one being written, '
                   f'{size_text(t.state_bytes)} each, backbone {size_text(t.backbone_bytes)}, log'),
    ]


def preflight(
    data: str, recipe: str | None = None, *, batch: int | None = None, device: str | None = None,
    seconds: float = 120.0, workers: int | None = None, sample: int | None = None, file: Path | None = None,
    images_per_epoch: int | None = None, say: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Surveys the data, tries to train, prints a report, and returns the record that `file` gets.

    Raises:
        ValueError: a wrong argument, or data that cannot be trained on.
        OSError: there is no such data, or `file` cannot be written.
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
    report = Report(say)
    report.show(f'DATA   {s.name}', data_lines(s, plan.recipe.augmentation.size))
    t = run_trial(train, plan.recipe, where, used, max(seconds / 2, seconds - (time.perf_counter() - began)))
    if t.batch != plan.recipe.batch_size:
        plan = Plan(data, s, where, recipe, t.batch, flags=flags, batch_reason='what fits into memory')
    cost = estimate_cost(plan, t)
    report.show(
        f'TRIAL  {plan.name}, {plan.recipe.model} with {t.parameters:,} parameters, batch {t.batch}, {where}, amp '
        f'{t.amp}, {used} data threads, {t.seconds:.0f} s', trial_lines(t))
    report.show('PLAN', [*plan.reasons, *cost_lines(plan, t, cost)])
    warnings = list_warnings(s, plan, t, where, used, cost)
    record = {
        'command': plan.command, 'recipe': plan.name, 'batch_size': t.batch, 'epochs': plan.recipe.epochs,
        'image_size': plan.recipe.augmentation.size, 'device': str(where), 'workers': used,
        'survey': s.record(plan.recipe.augmentation.size), 'trial': asdict(t), 'cost': cost, 'warnings': warnings,
        'lines': report.lines, 'seconds': time.perf_counter() - began, 'python': platform.python_version(),
        'torch': torch.__version__}
    if file is not None:
        write_json(file, record)
    if warnings:
        say('\n'.join(['WARNINGS', *(f'  - {text}' for text in warnings)]))
    say(f'\n{plan.command}')
    if where.type == 'cuda' and (n := torch.cuda.device_count()) > 1:
        say(f'on all {n} cards (not measured): torchrun --nproc-per-node {n} {plan.command.removeprefix("python ")}')
    return record


class Report:
    """Prints sections as they are ready, and keeps their lines for the record."""

    def __init__(self, say: Callable[[str], Any]) -> None:
        self.say, self.lines = say, []

    def show(self, title: str, lines: list[Line]) -> None:
        section = title.split()[0].lower()
        self.lines += [{'section': section, 'kind': kind, 'text': text} for kind, text in lines]
        self.say('\n'.join([title, *(f'  {kind:15}{text}' for kind, text in lines)]))


def _check_survey(s: Survey, batch: int | None) -> None:
    """Raises ValueError if the data cannot be trained on."""
    if s.images < 2 or batch is not None and batch > s.images:
        raise ValueError(f'{s.name} has {s.images} images, a batch takes {batch or 2}: use more images'
                         + (f', or --batch-size {s.images} or less' if s.images >= 2 else ''))
    if s.unreadable > s.read / 2:
        raise ValueError(
            f'{s.name}: {s.unreadable} of {s.read} images read cannot be decoded, more than half; repair or remove '
            f'them; the first: {s.unreadable_first[0]}')


def percent(share: float) -> str:
    return f'{100 * share:.0f} %' if share in (0, 1) else f'{100 * share:.1f} %'


def numbers(values: tuple[float, ...]) -> str:
    return ' '.join(f'{x:.3f}' for x in values)


def size_text(n: float) -> str:
    for unit in ('B', 'kB', 'MB', 'GB'):
        if n < 1000:
            return f'{n:.3g} {unit}'
        n /= 1000
    return f'{n:,.4g} TB'


def duration(seconds: float) -> str:
    for unit, length in (('days', 86400), ('hours', 3600), ('minutes', 60)):
        if seconds >= 2 * length:
            return f'{seconds / length:,.1f} {unit}'
    return f'{seconds:.3g} s'
