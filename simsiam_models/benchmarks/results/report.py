"""Prints records as the tables of MMSelfSup's SimSiam page, with measured next to published numbers.

    simsiam report results/ [--markdown > RESULTS.md]

The tables have the columns of the page (MMSelfSup v0.9.1). A record appears in one of them only if its data and
parameters are the published ones; other records go to tables that compare models (see `sheets`).
"""
import argparse
import functools
import os
import shutil
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...runtime.lifecycle import ARGS
from ...runtime.messages import counted, plain_markdown, short
from ...weights.tensorfile import CONFIG
from ..protocols import KNN_KS, KNN_T, LOW_SHOT_KS
from .accuracy import note_uncertainty
from .compare import TOLERANCE, compare, strip_layer
from .record import NoRecordError, describe_source, format_published, read_record
from .sheets import VARIANT, Compared, Label, ResultTable, make_label, tabulate

OF_RUNS = {ARGS, CONFIG}  # of runs and exported networks, beside which records lie
Cells = dict[int, str]  # column -> text


class PageColumn(NamedTuple):
    header: str
    benchmark: str  # without the layer
    metric: str | None  # None: the name of the layer


class PageTable(NamedTuple):
    title: str
    digits: int  # of published numbers
    columns: list[PageColumn]

    def find_columns(self, benchmark: str) -> dict[str | None, int]:
        """Returns metric -> column for the metrics of a benchmark."""
        return {c.metric: i for i, c in enumerate(self.columns) if c.benchmark == strip_layer(benchmark)}


Metrics = dict[str, str | None]  # header of a column -> metric; None: the name of the layer
FEATURES: Metrics = {f'Feature{i}': f'feature{i}' for i in range(1, 6)}
KNN: Metrics = {f'k={k}': f'k={k}' for k in KNN_KS}
LOW_SHOT: Metrics = {f'k={k}': f'k={k}' for k in LOW_SHOT_KS}
AVGPOOL: Metrics = {'AvgPool': 'top1'}
COCO: Metrics = {
    'mAP(Box)': 'box_AP', 'AP50(Box)': 'box_AP50', 'AP75(Box)': 'box_AP75', 'mAP(Mask)': 'mask_AP',
    'AP50(Mask)': 'mask_AP50', 'AP75(Mask)': 'mask_AP75'}
_TABLES: list[tuple[str, int, dict[str, Metrics]]] = [
    ('VOC07 SVM / Low-shot SVM', 2, {
        'voc07_svm': {'Best Layer': None, 'SVM': 'mAP'}, 'voc07_lowshot_svm': LOW_SHOT}),
    ('ImageNet Linear Evaluation', 2, {'imagenet_mhead_linear': FEATURES, 'imagenet_linear_avgpool': AVGPOOL}),
    ("ImageNet Linear Evaluation, facebookresearch/simsiam's protocol (best of 90 epochs)", 2, {
        'imagenet_linear': AVGPOOL}),
    ('Places205 Linear Evaluation', 2, {'places205_mhead_linear': FEATURES}),
    ('iNaturalist2018 Linear Evaluation', 2, {'inat18_mhead_linear': FEATURES}),
    ('ImageNet Nearest-Neighbor Classification', 1, {f'imagenet_knn_T{KNN_T:g}': KNN}),
    ('Pascal VOC 2007 + 2012', 2, {'voc0712_faster_rcnn_c4_24k': {'AP50': 'AP50'}}),
    ('COCO2017', 1, {'coco_mask_rcnn_r50_fpn_ms_1x': COCO}),
    ('Pascal VOC 2012 + Aug', 2, {'voc12aug_fcn_r50_d8_512_20k': {'mIOU': 'mIoU'}})]
PAGE = [
    PageTable(title, digits, [PageColumn(k, name, v) for name, metrics in columns.items() for k, v in metrics.items()])
    for title, digits, columns in _TABLES]
WIDTH = 120  # characters of a line if the terminal's width is unknown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('results', nargs='+', type=Path, metavar='RESULTS',
                        help='records, or folders to search for .json files')
    parser.add_argument('--markdown', action='store_true', help='print the tables as Markdown')


def run(args: argparse.Namespace) -> int:
    print(report(args.results, args.markdown, shutil.get_terminal_size((WIDTH, 24)).columns))
    return 0


def report(paths: Sequence[str | Path], markdown: bool = True, width: int = WIDTH) -> str:
    """Returns all records as tables, in Markdown or for a terminal of `width` characters.

    A file in a folder that cannot be read, or is not a record, is left out, and the report says so. Raises ValueError
    or OSError for such a file in `paths`, and FileNotFoundError if there is no record at all.
    """
    records, left_out, others = read_all(paths)
    left_out += [f'{counted(others, "JSON file")} of other kinds'] if others else []
    if not records:
        raise FileNotFoundError(explain_absence(paths, left_out))
    blocks = [_to_markdown(table) if markdown else _to_text(table, width) for table in make_tables(records)]
    if left_out:
        lines = [f'- {plain_markdown(text) if markdown else text}' for text in left_out]
        blocks.append('\n'.join(['Skipped files that are not records:', *lines]))
    return '\n\n'.join(blocks)


def make_tables(records: list[dict[str, Any]]) -> list[ResultTable]:
    """Returns the tables of the page that have a record, then those that compare models."""
    label, on_page, others = make_label(records), list[Compared](), list[Compared]()
    for record in records:
        found = compare(record)
        has_column = any(table.find_columns(record['benchmark']).keys() & record['metrics'].keys() for table in PAGE)
        (on_page if has_column and found['not_comparable'] is None else others).append((record, found))
    chosen = [(table, [c for c in on_page if table.find_columns(c[0]['benchmark'])]) for table in PAGE]
    return [_fill(table, compared, label) for table, compared in chosen if compared] + tabulate(others, label)


def read_all(paths: Sequence[str | Path]) -> tuple[list[dict[str, Any]], list[str], int]:
    """Returns the records, why damaged files in the folders are left out, and how many other JSON files there are."""
    files: dict[Any, tuple[Path, bool]] = {}  # each file once, and whether `paths` names it
    errors: list[OSError] = []
    for path in map(Path, paths):
        named = not path.is_dir()
        for file in [path] if named else [
                Path(folder, name) for folder, _, names in sorted(os.walk(path, onerror=errors.append))
                for name in sorted(names) if name.lower().endswith('.json')]:
            key = os.stat(file)[1:3] if os.path.exists(file) else file  # inode and device
            if named or key not in files:
                files[key] = file, named
    left_out = [short(f'{e.filename} cannot be listed ({e.strerror})', 400) for e in errors]
    records, others = [], 0
    for path, named in files.values():
        try:
            records.append(read_record(path))
        except (ValueError, OSError) as e:
            if named:
                raise
            if isinstance(e, NoRecordError):
                others += path.name not in OF_RUNS
            else:
                left_out.append(short(str(e), 400))
    return records, left_out, others


def explain_absence(paths: Sequence[str | Path], left_out: Sequence[str], what: str = 'no record') -> str:
    more = f'; left out: {left_out[0]}' if left_out else ''
    return f'{", ".join(map(str, paths))}: {what} of a benchmark there{more}'


def _fill(table: PageTable, chosen: list[Compared], label: Label) -> ResultTable:
    lines: list[tuple[str, str, Cells]] = []
    notes: dict[str, None] = {}  # in order, each once
    elsewhere: dict[str, list[dict[str, Any]]] = {}  # tag -> entries published for other weights
    for name, run in _group_runs(chosen, label):
        measured, difference, tolerance, own = Cells(), Cells(), Cells(), list[dict[str, Any]]()
        for record, found in _choose_layer(run, notes, name):
            at, benchmark, metrics = table.find_columns(record['benchmark']), record['benchmark'], record['metrics']
            measured |= _cells(at, {None: benchmark.rpartition('_')[2], **metrics}, '.2f')
            difference |= _cells(at, found['difference'], '+.2f')
            tolerance |= _cells(at, {k: v for k, v in found['tolerance'].items() if k in found['difference']}, '.2f')
            if text := ', '.join(f'{short(k, 40)} {v:.2f}' for k, v in metrics.items()
                                 if k not in at and not VARIANT.search(k)):
                notes[f'{name}, also measured for {strip_layer(benchmark)}: {short(text, 400)}.'] = None
            for entry in found['published']:
                (own if entry['same_weights'] else elsewhere.setdefault(entry['tag'], [])).append(entry)
        if tolerance:
            notes[f'Tolerance: {TOLERANCE}.'] = None
        published = _published_cells(table, own, notes)
        lines += [(name, 'measured', measured), (name, 'published, same weights', published),
                  (name, 'difference', difference), (name, 'tolerance', tolerance)]
    for tag, entries in elsewhere.items():
        lines.append((tag, 'published, other weights', _published_cells(table, entries, notes)))
    notes |= dict.fromkeys(note_uncertainty([record for record, _ in chosen]))
    header = ['Weights', '', *(column.header for column in table.columns)]
    rows = [[*line, *(cells.get(i, '') for i in range(len(table.columns)))] for *line, cells in lines if cells]
    return ResultTable(table.title, [header, *rows], list(notes), 2)


def _group_runs(chosen: list[Compared], label: Label) -> list[tuple[str, list[Compared]]]:
    """Groups results by weights. A second result of the same benchmark starts another group, and so another row."""
    groups: dict[tuple[Any, ...], dict[int, list[Compared]]] = {}
    seen: Counter[tuple[Any, ...]] = Counter()
    for record, found in chosen:
        weights = tuple(record['weights'][key] for key in ('name', 'tag', 'digest'))
        n = seen[weights, record['benchmark']] = seen[weights, record['benchmark']] + 1
        groups.setdefault(weights, {}).setdefault(n, []).append((record, found))
    return [(label(run[0][0]['weights']), run) for runs in groups.values() for run in runs.values()]


def _choose_layer(run: list[Compared], notes: dict[str, None], name: str) -> list[Compared]:
    """Keeps the results of the layer with the best SVM, and notes those of the other layers."""
    kept, best = [c for c in run if strip_layer(c[0]['benchmark']) == c[0]['benchmark']], None
    for benchmark in ('voc07_svm', 'voc07_lowshot_svm'):
        found = {c[0]['benchmark'].rpartition('_')[2]: c for c in run
                 if c[0]['benchmark'].startswith(f'{benchmark}_feature')}
        if not found:
            continue
        layer = best if best in found else max(found.items(), key=lambda item: sum(
            v for k, v in item[1][0]['metrics'].items() if k == 'mAP' or k in LOW_SHOT))[0]
        best = best or layer
        kept.append(found[layer])
        if layer != best:
            notes[f'{name}: low-shot SVM is of {layer}.'] = None
        if benchmark == 'voc07_svm':
            listed = ', '.join(f'{at} {c[0]["metrics"].get("mAP", 0):.2f}' for at, c in sorted(found.items()))
            notes[f'{name}: SVM by layer: {listed}{"" if len(found) == 5 else "; no other was measured"}.'] = None
    return kept


def _cells(at: dict[str | None, int], values: dict[str | None, Any], form: str) -> Cells:
    return {at[k]: v if isinstance(v, str) else format(v, form) for k, v in values.items() if k in at}


def _published_cells(table: PageTable, entries: list[dict[str, Any]], notes: dict[str, None]) -> Cells:
    """Returns the numbers of the table's own protocols, and adds a note for every entry."""
    cells: Cells = {}
    for entry in entries:
        at, note = table.find_columns(entry['benchmark']), format_published(entry)
        if at and entry['same_protocol']:
            cells |= _cells(at, {None: entry['benchmark'].rpartition('_')[2], **entry['metrics']}, f'.{table.digits}f')
            note = f'published for {entry["tag"]} ({entry["file"]}): {describe_source(entry)}'
        notes[f'{note[0].upper()}{note[1:]}.'] = None
    return cells


def _to_markdown(table: ResultTable) -> str:
    header, *rows = (f'| {" | ".join(plain_markdown(cell) for cell in row)} |' for row in table.rows)
    lines = [f'### {plain_markdown(table.title)}', '', header, '|' + ' --- |' * len(table.rows[0]), *rows]
    return '\n'.join(lines + ([''] if table.notes else []) + [f'- {plain_markdown(note)}' for note in table.notes])


def _to_text(table: ResultTable, width: int) -> str:
    """Leaves out empty columns, and splits a table wider than the terminal into several, one below the other."""
    columns, notes, n = list(zip(*table.rows, strict=True)), table.notes, table.keys
    widths = [max(map(len, column)) + 2 for column in columns]
    shown = [i for i in range(n, len(columns)) if any(columns[i][1:])]
    kept = [i for i in shown if i not in table.variants]
    if sum(widths[:n]) + sum(widths[i] for i in shown) - 2 > width and 0 < len(kept) < len(shown):
        first, shown = next(i for i in shown if i in table.variants), kept
        notes = [*notes, f'{len(table.variants)} more columns, such as {columns[first][0]}: see --markdown.']
    enough = next(  # key columns that distinguish the rows
        (i for i in range(1, n) if len(set(zip(*columns[:i], strict=True))) == len(table.rows)), n)
    parts = [[*range(n)]]
    for i in shown:
        if len(parts[-1]) > n and sum(widths[j] for j in (*parts[-1], i)) - 2 > width:
            n = enough
            parts.append([*range(n)])
        parts[-1].append(i)
    blocks = ['\n'.join(
        ''.join(row[i].ljust(widths[i]) for i in part).rstrip() for row in table.rows) for part in parts]
    rule = '-' * min(width, max(len(line) for block in blocks for line in block.split('\n')))
    wrap = functools.partial(
        textwrap.wrap, width=min(width, WIDTH), subsequent_indent='  ', break_long_words=False, break_on_hyphens=False)
    return '\n'.join([*wrap(table.title), rule, '\n\n'.join(blocks), rule, *(line for n in notes for line in wrap(n))])
