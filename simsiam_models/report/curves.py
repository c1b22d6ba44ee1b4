"""The figures of a run over time: those of the log, or of the epochs that a record lists."""
import math
from typing import Any

import numpy as np

from ..pages.plots import Plot, Series
from ..runtime.messages import is_count, printable
from ..training.recipes import Recipe, restore_recipe
from ..training.schedule import scaled_lr
from .run import RunFolder

MOST_PLOTS = 60  # of a detector or segmenter
ROWS = 40  # of the table of figures
LARGEST = 1e30  # of numbers in a plot
FIGURES = {  # key in the log -> name of the file, title, format
    'loss': ('loss', 'Loss', '.4f'), 'std': ('std', 'Output std (1 is healthy)', '.3f'),
    'rank': ('rank', 'Effective rank', '.1f'), 'lr': ('lr', 'Learning rate', '.3g'),
    'images_per_second': ('throughput', 'Images per second', '.1f'),
    'waiting': ('waiting', 'Waiting for data, %', '.1f')}

PERCENT = {'knn', 'pixels', 'random', 'initial', 'waiting', 'top1', 'top5'}
TITLES = {'top1': 'Validation top-1, %', 'top5': 'Validation top-5, %'}  # of a classifier


def list_plots(run: RunFolder) -> list[Plot]:
    """Returns the plots of a run; those without a number are left out."""
    plots = _plot_log(run) if run.kind == 'pretrain' else _plot_record(run)
    drawn = [plot._replace(series=[s for s in plot.series if any(map(math.isfinite, s.y))]) for plot in plots]
    return [plot for plot in drawn if plot.series]


def _plot_log(run: RunFolder) -> list[Plot]:
    x = [line['epoch'] + line['step'] / run.steps for line in run.figures]
    plots = []
    for key, (name, title, form) in FIGURES.items():
        y = [_read(line, key) for line in run.figures]
        series = [Series('backbone and projector' if key == 'lr' else title, x, y)]
        if key == 'lr' and run.args.get('fix_pred_lr'):
            series.append(Series('predictor', x, [scaled_lr(read_recipe(run))] * len(x)))
        plots.append(Plot(name, title, 'epoch', series, form))
    return [*plots[:4], _plot_knn(run), *plots[4:]]


def _plot_knn(run: RunFolder) -> Plot:
    """Returns the accuracies of the monitor; before training, it measured the untrained network and the pixels."""
    lines = [line for line in run.lines if 'knn' in line and 'epoch' in line]
    points = sorted({line['epoch']: _read(line, 'knn') for line in lines if not isinstance(line['knn'], dict)}.items())
    before = next((line['knn'] for line in lines if isinstance(line['knn'], dict)), {})
    start = [(0, _read(before, k)) for k in before if k != 'pixels']
    x, y = zip(*start, *points, strict=True) if start or points else ((), ())
    series = [Series('features', x, y)]
    if 'pixels' in before:
        series.append(Series('raw pixels', [0, max((1, *x))], [_read(before, 'pixels')] * 2))
    return Plot('knn', 'kNN accuracy, %', 'epoch', series if x else [], '.1f')


def _plot_record(run: RunFolder) -> list[Plot]:
    """Returns a plot for each number in the log of a detector or segmenter, or in the epochs of a classifier."""
    epochs = (run.record or {}).get('extra', {}).get('epochs')
    rows = run.lines or [row for row in (epochs if isinstance(epochs, list) else ()) if isinstance(row, dict)]
    x_label = next((k for k in ('step', 'epoch') if rows and k in rows[0]), None)
    if x_label is None:
        return []
    rows = sorted((row for row in rows if is_count(row.get(x_label))), key=lambda row: row[x_label])
    names = [k for k in dict.fromkeys(k for row in rows for k in row) if k not in (x_label, 'seconds')]
    plots = []
    for name in names[:MOST_PLOTS]:
        points = [(row[x_label], _read(row, name)) for row in rows if type(row.get(name)) in (int, float)]
        if points:
            x, y = zip(*points, strict=True)
            file, title, form = FIGURES.get(name) or (
                ''.join(c if c.isalnum() and c.isascii() else '_' for c in name), TITLES.get(name, printable(name)),
                '.4f' if 'loss' in name else '.2f')
            plots.append(Plot(file, title, x_label, [Series(name, x, y)], form))
    return plots


def _read(line: dict[str, Any], key: str) -> float:
    value = (100 if key == 'waiting' else 1) * _number(line.get(key))
    return value if key not in PERCENT or -1e-6 < value < 100 + 1e-6 else math.nan


def _number(value: Any) -> float:
    """Returns a number that can be drawn, or NaN."""
    return float(value) if type(value) in (int, float) and abs(value) < LARGEST else math.nan


def read_recipe(run: RunFolder) -> Recipe:
    """Returns the recipe of a pretraining; raises ValueError if args.json lacks numbers."""
    try:
        return restore_recipe(run.args)
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f'{run.folder}/args.json is damaged ({e}); restore the file') from None


def tabulate_figures(plots: list[Plot]) -> tuple[list[list[str]], int]:
    """Returns a header and rows of the numbers of the plots that share their points, and how many points there are.

    At most ROWS of them, evenly spaced, have a row.
    """
    x = plots[0].series[0].x
    shared = [plot for plot in plots if plot.series[0].x == x]
    kept = np.unique(np.linspace(0, len(x) - 1, min(ROWS, len(x))).round().astype(int)).tolist()
    header, form = [plots[0].x_label, *(plot.title for plot in shared)], '.2f' if any(v % 1 for v in x) else '.0f'
    return [header, *([f'{x[i]:{form}}', *(
        f'{plot.series[0].y[i]:{plot.form}}' if math.isfinite(plot.series[0].y[i]) else '-' for plot in shared)]
        for i in kept)], len(x)
