"""Puts the sections of a report together."""
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..benchmarks.results.report import explain_absence, make_tables, read_all
from ..pages import gallery, plots, tables
from ..pages.document import escape, link_sections, open_section, write_page
from ..runtime.lifecycle import ARGS
from ..runtime.messages import announce, counted, guess_path, is_count
from . import classified
from .classified import draw_confusion, draw_mistakes
from .curves import list_plots, tabulate_figures
from .data import open_training_data
from .nearest import draw_nearest, find_similar
from .objects import draw_objects
from .run import KINDS, RunFolder, list_facts, read_run
from .views import TEXT, draw_views

STYLE = gallery.STYLE + plots.STYLE + tables.STYLE + classified.STYLE


class PageSection(NamedTuple):
    """A heading, and what makes the pieces of HTML below it."""

    title: str
    draw: Callable[[], Iterator[str]]


Inputs = tuple[list[RunFolder], list[dict[str, Any]], list[str]]  # runs, records, which other files were left out


def read_inputs(paths: list[Path]) -> Inputs:
    """Returns the runs, the records, and which other files were left out.

    Raises FileNotFoundError if a path does not exist, or there is neither a run nor a record; ValueError for a damaged
    one.
    """
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f'{path}: no such file or folder; '
                                    + (guess_path(path) or 'name the OUTPUT of a run, or a folder of records'))
    runs = [run for path in paths if path.is_dir() and (run := read_run(path)) is not None]
    records, left_out, _ = read_all(paths)
    if not (runs or records):
        below = next((file.parent for path in paths for file in sorted(path.glob(f'*/{ARGS}'))), None)
        raise FileNotFoundError(explain_absence(paths, left_out, 'neither a run nor a record') + (
            f'; a run in it: {below}' if below else ''))
    return runs, records, left_out


def write_report(file: Path, paths: list[Path], inputs: Inputs, data: str | None = None) -> None:
    """Writes the page of what `read_inputs` found in `paths`; `data` names the images of the runs if they have moved.

    Raises ValueError if a file of a run is damaged, OSError if the page cannot be written.
    """
    runs, records, left_out = inputs
    sections = [section for run in runs for section in _list_sections(run, data, f': {run.folder}' * (len(runs) > 1))]
    if records:
        sections.append(PageSection('Results', lambda: _draw_results(records, left_out)))
    title = f'SimSiam report: {paths[0].resolve().name}' + f' and {len(paths) - 1} more' * (len(paths) > 1)

    def draw() -> Iterator[str]:
        yield link_sections(section.title for section in sections)
        for i, section in enumerate(sections):
            yield open_section(i, section.title)
            yield from section.draw()
            yield '</section>\n'

    write_page(file, title, list(draw()), style=STYLE)  # an error of a section is none of writing


def _list_sections(run: RunFolder, data: str | None, suffix: str) -> list[PageSection]:
    sections = [PageSection(f'About this run{suffix}', lambda: _draw_facts(run))]
    if drawn := list_plots(run):
        sections.append(PageSection(f'Curves{suffix}', lambda: _draw_curves(run, drawn)))
    if run.kind == 'pretrain':
        found = open_training_data(run, data)
        if found.problem:
            announce(f'{run.folder}: {found.problem}')

        def draw_seen() -> Iterator[str]:
            yield f'<p class="soft">{escape(found.problem or TEXT)}</p>\n'
            yield from draw_views(run, found.images) if found.images is not None else ()

        def draw_similar() -> Iterator[str]:
            if found.images is None:
                yield f'<p class="soft">{escape(found.problem)}</p>\n'
            else:
                yield from draw_nearest(*find_similar(run, found.images))

        sections += [PageSection(f'The two views{suffix}', draw_seen),
                     PageSection(f'Nearest neighbours before and after training{suffix}', draw_similar)]
    if run.kind == 'finetune' and (record := run.record) and record.get('extra', {}).get('confusion'):
        sections += [PageSection(f'Confusion{suffix}', lambda: iter([draw_confusion(record)])),
                     PageSection(f'Worst mistakes{suffix}', lambda: draw_mistakes(run, data))]
    if run.kind in ('detect', 'segment'):
        sections.append(PageSection(f'{"Detections" if run.kind == "detect" else "Masks"}{suffix}',
                                    lambda: draw_objects(run.folder, run.record)))
    return sections


def _draw_facts(run: RunFolder) -> Iterator[str]:
    yield f'<p class="soft">{KINDS.get(run.kind, "pretraining without labels").capitalize()}.</p>\n'
    yield tables.draw_facts(list_facts(run))


def _draw_curves(run: RunFolder, drawn: list[plots.Plot]) -> Iterator[str]:
    rows, n = tabulate_figures(drawn)
    if n > 2 * plots.GROUPS:
        yield (f'<p class="soft">Each curve of {n:,} points is drawn from the lowest and highest point of each of '
               f'{plots.GROUPS} equal groups.</p>\n')
    yield plots.draw_plots(drawn)
    sizes = next((line['knn_images'] for line in run.lines if isinstance(line.get('knn_images'), list)), None)
    if sizes and len(sizes) == 2 and all(map(is_count, sizes)):
        yield f'<p class="soft">kNN: {escape(" bank images, ".join(f"{n:,}" for n in sizes))} queries.</p>\n'
    shown = f'{len(rows) - 1} of {counted(n, "point")}, evenly spaced' if len(rows) - 1 < n else counted(n, 'point')
    yield f'<details><summary>The numbers</summary>{tables.draw_table(rows, f"Figures, {shown}")}'
    for plot in drawn:
        if plot.series[0].x != drawn[0].series[0].x:
            points = [[f'{x:.4g}', f'{y:{plot.form}}'] for x, y in zip(plot.series[0].x, plot.series[0].y, strict=True)]
            yield tables.draw_table([[plot.x_label, plot.title], *points[:1000]], plot.title)
    yield '</details>\n'


def _draw_results(records: list[dict[str, Any]], left_out: list[str]) -> Iterator[str]:
    for table in make_tables(records):
        columns = [i for i in range(len(table.rows[0])) if i < table.keys or any(row[i] for row in table.rows[1:])]
        yield tables.draw_table([[row[i] for i in columns] for row in table.rows], table.title, table.notes)
    if left_out:
        yield '<h3>Left out</h3>\n' + tables.draw_notes(left_out)
