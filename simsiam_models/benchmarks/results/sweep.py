"""Runs that differ in their learning rates, and one table of them that marks the best."""
import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

from ...runtime.accuracy import standard_error
from ...runtime.messages import check_flags, counted, short
from .accuracy import count_tested, describe_difference
from .sheets import VARIANT

Record = dict[str, Any]


def each_rate(args: argparse.Namespace) -> list[argparse.Namespace]:
    """Returns the arguments of each run, with one of the numbers of --lr, or None, under `lr`.

    Raises ValueError if a number is given twice, or is not finite.
    """
    rates = args.lr or [None]
    usable = len({*rates}) == len(rates) and all(lr is None or math.isfinite(lr) for lr in rates)
    check_flags([('--lr', ' '.join(map(str, rates)), usable, 'finite numbers that differ')])
    return [argparse.Namespace(**{**vars(args), 'lr': lr}) for lr in rates]


def run_each(runs: Sequence[Callable[[], Record | None]], say: Callable[[str], Any]) -> list[Record | None]:
    """Returns the records of the runs. Of several, one whose loss is not finite gives None, and the others go on."""
    records = []
    for run in runs:
        try:
            records.append(run())
        except FloatingPointError as e:
            if len(runs) == 1:
                raise
            say(str(e))
            records.append(None)
    return records


def format_sweep(names: Sequence[str], values: Sequence[Sequence[float]], records: Sequence[Record | None]) -> str:
    """Returns a table with a row for each run, and a sentence about the best.

    Args:
        names: what differs between the runs.
        values: of each run, one for each name.
        records: of each run; None if its loss was not finite.
    """
    found = [None if record is None else _find_accuracy(record) for record in records]
    done = [(i, *x) for i, x in enumerate(found) if x]
    ranked = sorted(done, key=lambda run: -run[2])  # the first of equals is the best
    rows = [[*names, 'accuracy', 'std. error', '']]
    for i, (value, x) in enumerate(zip(values, found, strict=True)):
        rows.append([f'{v:g}' for v in value] + (['diverged', '', ''] if x is None else [
            f'{x[1]:.2f} %', f'{standard_error(x[1], x[2]):.2f}', ' '.join(
                filter(None, ('' if x[0] == 'top1' else short(x[0], 40), 'best' * (i == ranked[0][0]))))]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ['  '.join([*map(str.rjust, row[:-1], widths), row[-1]]).rstrip() for row in rows]
    return '\n'.join([*table, _describe_best(names, values, ranked)])


def _find_accuracy(record: Record) -> tuple[str, float, int]:
    """Returns the name of the accuracy that a run is judged by, its percent, and the number of test images."""
    metrics = {k: v for k, v in record['metrics'].items() if not VARIANT.search(k) and 'top5' not in k}
    name = max(metrics, key=lambda name: metrics[name])
    return name, metrics[name], count_tested(record)


def _describe_best(
    names: Sequence[str], values: Sequence[Sequence[float]], ranked: list[tuple[int, str, float, int]],
) -> str:
    if not ranked:
        return 'every run diverged; try lower rates'
    (best, _, accuracy, images), *others = ranked
    which = ', '.join(f'{name} {x:g}' for name, x in zip(names, values[best], strict=True))
    text = (f'best: {which}, chosen on the {counted(images, "test image")} that gave its accuracy, so expect less on '
            'new images')
    if others:
        text += f'; compared with the runner-up: {describe_difference(accuracy, others[0][2], images)}'
    for name, own, tried in zip(names, values[best], zip(*values, strict=True), strict=True):
        if len({*tried}) > 2 and own in (min(tried), max(tried)):
            text += f'; no {"lower" if own == min(tried) else "higher"} {name} was tried'
    return text
