"""Curves of named numbers, drawn by matplotlib: SVG that follows the colours of the page, and PNG files."""
import functools
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..runtime.files import explain_write_errors, write_atomically
from .document import escape

GROUPS = 150  # of points: of each, the lowest and the highest are drawn
POINTS = 40  # a curve of up to so many points shows each of them
SIZE = 4.0, 2.3  # inches; a page scales it
# What is written into the picture -> the variable of the page that takes its place.
COLOURS = {
    '#1d2125': 'text', '#5b636b': 'soft', '#dfe2e5': 'line', '#2864b4': 's1', '#b4551e': 's2', '#23784b': 's3',
    '#8246a0': 's4'}
TEXT, SOFT, LINE, *SERIES = COLOURS
DASHES = '-', '--', '-.', ':'  # so that colours are not all that tells curves apart
STYLE = '''
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem;
  margin: 1.25rem 0 }
.plots figure { margin: 0; padding: .9rem .9rem .6rem; background: var(--panel); border: 1px solid var(--line);
  border-radius: 6px } .plots svg { display: block; width: 100%; height: auto }
.plots figcaption { font-size: .95rem; font-weight: 600; margin-bottom: .35rem; display: flex; gap: .75rem;
  justify-content: space-between; align-items: baseline } .plots svg text { fill: var(--soft) }
.plots .last { font-weight: 400; white-space: nowrap; color: var(--soft); font-variant-numeric: tabular-nums }
@media print { .plots { grid-template-columns: 1fr 1fr } }
'''


class Series(NamedTuple):
    """A curve; numbers that are not finite are gaps."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


class Plot(NamedTuple):
    """Curves over the same axis. `name` names a file."""

    name: str
    title: str
    x_label: str
    series: list[Series]
    form: str = '.3g'  # of its numbers in text
    unit: str = ''

    def describe(self) -> str:
        """Returns in words what the picture shows."""
        parts = []
        for s in self.series:
            y = np.asarray(s.y, float)
            y = y[np.isfinite(y)]
            first, last, low, high = (f'{v:{self.form}}{self.unit}' for v in (y[0], y[-1], y.min(), y.max()))
            parts.append(f'{s.name}: from {first} to {last}, lowest {low}, highest {high}')
        return f'{self.title} by {self.x_label}. {"; ".join(parts)}.'


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns at most 2 GROUPS + 2 of the points: the ends, and the lowest and highest of equal groups, in order."""
    a, b = np.asarray(x, float), np.asarray(y, float)
    if len(a) <= 2 * GROUPS:
        return a, b
    kept = {0, len(a) - 1}
    for part in np.array_split(np.arange(len(a)), GROUPS):
        finite = part[np.isfinite(b[part])]
        kept |= {int(finite[np.argmin(b[finite])]), int(finite[np.argmax(b[finite])])} if len(finite) else {
            int(part[0])}  # a gap stays one
    rows = np.array(sorted(kept))
    return a[rows], b[rows]


def draw_plots(plots: Sequence[Plot]) -> str:
    """Returns the plots as HTML, each with a title and a description in words."""
    figures = ''.join(
        f'<figure><figcaption>{escape(plot.title)}<span class="last">{escape(_name_last(plot))}</span></figcaption>'
        f'{draw_svg(plot)}</figure>\n' for plot in plots)
    return f'<div class="plots">\n{figures}</div>\n'


def _name_last(plot: Plot) -> str:
    y = [v for v in plot.series[0].y if np.isfinite(v)]
    return f'{y[-1]:{plot.form}}{plot.unit}'


def draw_svg(plot: Plot) -> str:
    """Returns an SVG element, whose colours are the page's."""
    import matplotlib

    with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': plot.name}), io.StringIO() as file:
        _draw_figure(plot).savefig(file, format='svg', transparent=True)
        text = file.getvalue()
    text = text[text.index('<svg'):]
    box = re.findall(r'viewBox="[^"]*"', text)[0]
    inner = re.sub(r'<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->', '', text[text.index('>') + 1:], flags=re.S)
    used = set(re.findall(r'#([\w-]+)', inner))  # other ids are the same in every picture
    inner = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else '', inner)
    for colour, name in COLOURS.items():
        inner = inner.replace(colour, f'var(--{name})')
    inner = re.sub(r"font: ([\d.]+)px '[^;\"]*", r'font: \1px system-ui, sans-serif', inner)
    inner = re.sub(r'\s*\n\s*', '\n', inner)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img" aria-label="{escape(plot.describe())}">{inner}'


def make_distinct(names: Sequence[str]) -> list[str]:
    """Returns names for files; repeated ones, whatever their case, get a number."""
    found: list[str] = []
    for name in names:
        taken, n, own = {x.lower() for x in found}, 2, name or '_'
        while own.lower() in taken:
            own, n = f'{name or "_"}_{n}', n + 1
        found.append(own)
    return found


def write_plots(folder: Path, plots: Sequence[Plot], flag: str = '--plots') -> list[Path]:
    """Writes FOLDER/NAME.png for each plot; returns the files. Raises OSError if one cannot be written."""
    files = []
    for name, plot in zip(make_distinct([plot.name for plot in plots]), plots, strict=True):
        file = folder / f'{name}.png'
        with explain_write_errors(file, flag):
            folder.mkdir(parents=True, exist_ok=True)
            save = functools.partial(_draw_figure(plot, plot.title).savefig, format='png', dpi=200)
            write_atomically(file, save, shared=True)  # nobody can foresee the name of the temporary file
        files.append(file)
    return files


def _draw_figure(plot: Plot, title: str = '') -> Any:
    """Returns matplotlib's figure; texts are plain, never formulas."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout='constrained')
    axes = figure.subplots()
    axes.set_title(title, parse_math=False, fontsize=11, color=TEXT, loc='left')
    for i, (name, x, y) in enumerate(plot.series):
        xs, ys = thin(x, y)
        axes.plot(
            xs, ys, DASHES[i % 4], color=SERIES[i % 4], linewidth=1.6, label=f' {name}', clip_on=False,
            marker='o' if len(xs) <= POINTS else None, markersize=3.5)
    axes.set_xlabel(plot.x_label, color=SOFT, fontsize=9.5, parse_math=False)
    axes.tick_params(colors=SOFT, labelsize=9.5, length=0)
    axes.grid(axis='y', color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.spines['bottom'].set_color(LINE)
    axes.margins(x=0.02, y=0.08)
    axes.set_xlim(left=0)
    if len(plot.series) > 1:
        for text in axes.legend(frameon=False, fontsize=9.5, labelcolor=SOFT, handlelength=2.2).get_texts():
            text.set_parse_math(False)
    return figure
