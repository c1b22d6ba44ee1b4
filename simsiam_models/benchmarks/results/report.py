"""Records of benchmarks as the tables of the published SimSiam page, measured beside published.

    simsiam report results/                     in a terminal
    simsiam report results/ --markdown > RESULTS.md

A table has the columns of the page (MMSelfSup 0.9.1). Only a record whose data and parameters are the published ones
stands in it; all others stand in tables of their own, which compare models (`sheets`).
"""
import argparse
import os
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...runtime.messages import short
from .compare import compare, family, spread
from .record import NoRecordError, published_line, read_record, source
from .sheets import VARIANT, Compared, Label, Sheet, labels, sheets

KS = (1, 2, 4, 8, 16, 32, 64, 96)
Cells = dict[int, str]  # column -> text


class Column(NamedTuple):
    header: str
    benchmark: str  # without the layer
    metric: str | None  # None: the layer itself


class Table(NamedTuple):
    title: str
    columns: list[Column]
    digits: int = 2  # of published numbers


def _columns(benchmark: str, metrics: dict[str, str]) -> list[Column]:
    return [Column(header, benchmark, metric) for header, metric in metrics.items()]


FEATURES = {f'Feature{i}': f'feature{i}' for i in range(1, 6)}
TABLES = [
    Table('VOC07 SVM / Low-shot SVM', [
        Column('Best Layer', 'voc07_svm', None), Column('SVM', 'voc07_svm', 'mAP'),
        *_columns('voc07_lowshot_svm', {f'k={k}': f'k={k}' for k in KS})]),
    Table('ImageNet Linear Evaluation', [
        *_columns('imagenet_mhead_linear', FEATURES), Column('AvgPool', 'imagenet_linear_avgpool', 'top1')]),
    Table("ImageNet Linear Evaluation, facebookresearch/simsiam's protocol (best of 90 epochs)", [
        Column('AvgPool', 'imagenet_linear', 'top1')]),
    Table('Places205 Linear Evaluation', _columns('places205_mhead_linear', FEATURES)),
    Table('iNaturalist2018 Linear Evaluation', _columns('inat18_mhead_linear', FEATURES)),
    Table('ImageNet Nearest-Neighbor Classification', _columns(
        'imagenet_knn_T0.07', {f'k={k}': f'k={k}' for k in (10, 20, 100, 200)}), digits=1),
    Table('Pascal VOC 2007 + 2012', _columns('voc0712_faster_rcnn_c4_24k', {'AP50': 'AP50'})),
    Table('COCO2017', _columns('coco_mask_rcnn_r50_fpn_ms_1x', {
        'mAP(Box)': 'box_AP', 'AP50(Box)': 'box_AP50', 'AP75(Box)': 'box_AP75', 'mAP(Mask)': 'mask_AP',
        'AP50(Mask)': 'mask_AP50', 'AP75(Mask)': 'mask_AP75'}), digits=1),
    Table('Pascal VOC 2012 + Aug', _columns('voc12aug_fcn_r50_d8_512_20k', {'mIOU': 'mIoU'})),
]
WIDTH = 120  # characters of a line, where the terminal does not tell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'results', nargs='+', type=Path, metavar='RESULTS', help='records, or folders in which all .json are read')
    parser.add_argument('--markdown', action='store_true', help='tables in Markdown')


def run(args: argparse.Namespace) -> int:
    print(report(args.results, args.markdown, shutil.get_terminal_size((WIDTH, 24)).columns))
    return 0


def report(paths: Sequence[str | Path], markdown: bool = True, width: int = WIDTH) -> str:
    """All records as tables, in Markdown or for a terminal of `width` characters.

    Raises:
        FileNotFoundError: no such file or folder, or no record in any of them.
        ValueError, OSError: a file that is named is no record, or cannot be read; one in a folder is left out, and the
            report says so.
    """
    records, left = _read(paths)
    label, found, fit, others = labels(records), [], [], []
    for record in records:
        compared = record, compare(record)
        (fit if compared[1]['not_comparable'] is None and _has_column(record) else others).append(compared)
    for table in TABLES:
        wanted = {column.benchmark for column in table.columns}
        if chosen := [c for c in fit if family(c[0]['benchmark']) in wanted]:
            found.append(_table(table, chosen, label))
    found += sheets(others, label)
    blocks = [_markdown(sheet) if markdown else _text(sheet, width) for sheet in found]
    if left:
        lines = [f'- {_escaped(text) if markdown else text}' for text in left]
        blocks.append('\n'.join(['No records, left out:', *lines]))
    return '\n\n'.join(blocks)


def _read(paths: Sequence[str | Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """Records, and why files of a folder are none."""
    files: dict[Any, tuple[Path, bool]] = {}  # a file, once under whatever names -> one of them, whether it was given
    left: list[str] = []

    def add(path: Path, named: bool) -> None:
        try:
            found = path.stat()
            key = found.st_dev, found.st_ino
        except OSError:  # reading it will tell
            key = path
        if named or key not in files:
            files[key] = path, named

    def unlisted(e: OSError) -> None:
        left.append(short(f'{e.filename}: cannot be listed ({e.strerror})', 400))

    for path in map(Path, paths):
        if not path.is_dir():
            add(path, True)
            continue
        for folder, _, names in sorted(os.walk(path, onerror=unlisted)):
            for name in sorted(names):
                if name.lower().endswith('.json'):
                    add(Path(folder, name), False)
    records, others = [], 0
    for path, named in files.values():
        try:
            records.append(read_record(path))
        except NoRecordError:
            if named:
                raise
            others += 1
        except (ValueError, OSError) as e:
            if named:
                raise
            left.append(short(str(e), 400))
    if others:
        left.append(f'{others} JSON {"file" if others == 1 else "files"} of other kinds')
    if not records:
        more = f'; of the files that are, {left[0]}' if left else ''
        raise FileNotFoundError(f'{", ".join(map(str, paths))}: no record of a benchmark in it{more}')
    return records, left


def _has_column(record: dict[str, Any]) -> bool:
    """Whether a number of it stands in a table of the page."""
    at = family(record['benchmark'])
    return any(c.benchmark == at and c.metric in record['metrics'] for table in TABLES for c in table.columns)


def _table(table: Table, chosen: list[Compared], label: Label) -> Sheet:
    rows = [['Weights', '', *(column.header for column in table.columns)]]
    notes: dict[str, None] = {}  # in order, each once
    elsewhere: dict[str, list[dict[str, Any]]] = {}  # published for other weights, by tag
    for name, run in _runs(chosen, label):
        measured, difference, tolerance, own = {}, {}, {}, []
        for record, found in _best_layers(run, notes, name):
            at = {c.metric: i for i, c in enumerate(table.columns) if c.benchmark == family(record['benchmark'])}
            measured |= _cells(at, record['benchmark'], record['metrics'], '.2f')
            difference |= _cells(at, '', found['difference'], '+.2f')
            rest = {k: v for k, v in record['metrics'].items() if k not in at and not VARIANT.search(k)}
            if text := ', '.join(f'{short(k, 40)} {v:.2f}' for k, v in rest.items()):
                notes[f'{name}, also measured for {family(record["benchmark"])}: {short(text, 400)}.'] = None
            tolerance |= _cells(at, '', found['tolerance'], '.2f')
            for entry in found['published']:
                if entry['same_weights']:
                    own.append(entry)
                elif entry not in (entries := elsewhere.setdefault(entry['tag'], [])):
                    entries.append(entry)
        tolerance = {i: text for i, text in tolerance.items() if i in difference}
        if tolerance:
            notes[f'Tolerance: {spread()["description"]} ({spread()["source"]}).'] = None
        rows += [
            [name, kind, *(cells.get(i, '') for i in range(len(table.columns)))] for kind, cells in (
                ('measured', measured), ('published, same weights', _published(table, own, notes)),
                ('difference', difference), ('tolerance', tolerance)) if cells]
    for tag, entries in elsewhere.items():
        if cells := _published(table, entries, notes):
            rows.append([tag, 'published, other weights', *(cells.get(i, '') for i in range(len(table.columns)))])
    return Sheet(table.title, rows, list(notes), 2)


def _runs(chosen: list[Compared], label: Label) -> list[tuple[str, list[Compared]]]:
    """Results of the same weights together; of two that are of the same benchmark, each begins a row of its own."""
    groups: dict[tuple, list[dict[str, Compared]]] = {}
    for record, found in chosen:
        weights = record['weights']
        runs = groups.setdefault((weights['name'], weights['tag'], weights['digest']), [])
        free = next((run for run in runs if record['benchmark'] not in run), None)
        if free is None:
            runs.append(free := {})
        free[record['benchmark']] = record, found
    first = [next(iter(run.values()))[0]['weights'] for runs in groups.values() for run in runs]
    listed = [list(run.values()) for runs in groups.values() for run in runs]
    return [(label(weights), run) for weights, run in zip(first, listed, strict=True)]


def _best_layers(run: list[Compared], notes: dict[str, None], name: str) -> list[Compared]:
    """Of results by layer, as the SVM's, those of the layer with the best SVM; the others become a note."""
    layered = [c for c in run if family(c[0]['benchmark']) != c[0]['benchmark']]
    kept = [c for c in run if not any(c is other for other in layered)]
    best = None
    for kind in ('voc07_svm', 'voc07_lowshot_svm'):
        found = {_layer(c[0]['benchmark']): c for c in layered if family(c[0]['benchmark']) == kind}
        if not found:
            continue
        score = {
            layer: sum(v for k, v in c[0]['metrics'].items() if k == 'mAP' or k in {f'k={k}' for k in KS})
            for layer, c in found.items()}
        layer = best if best in found else max(score, key=score.__getitem__)
        best = best or layer
        kept.append(found[layer])
        if layer != best:
            notes[f'{name}: low-shot SVM is of {layer}.'] = None
        if kind == 'voc07_svm':
            listed = ', '.join(f'{at} {c[0]["metrics"].get("mAP", 0):.2f}' for at, c in sorted(found.items()))
            notes[f'{name}: SVM by layer: {listed}{"" if len(found) == 5 else "; no other was measured"}.'] = None
    return kept


def _layer(benchmark: str) -> str:
    return benchmark.rpartition('_')[2]


def _cells(at: dict[str | None, int], benchmark: str, metrics: dict[str, float], form: str) -> Cells:
    cells = {at[name]: format(value, form) for name, value in metrics.items() if name in at}
    if None in at and benchmark:
        cells[at[None]] = _layer(benchmark)
    return cells


def _published(table: Table, entries: list[dict[str, Any]], notes: dict[str, None]) -> Cells:
    """Only numbers of the table's own protocols are shown in it; every entry becomes a note."""
    cells: Cells = {}
    for entry in entries:
        at = {c.metric: i for i, c in enumerate(table.columns) if c.benchmark == family(entry['benchmark'])}
        if at and entry['same_protocol']:
            cells |= _cells(at, entry['benchmark'], entry['metrics'], f'.{table.digits}f')
        line = f'published for {entry["tag"]} ({entry["file"]}): {source(entry)}'
        line = line if at and entry['same_protocol'] else published_line(entry)
        notes[f'{line[0].upper()}{line[1:]}.'] = None
    return cells


def _markdown(sheet: Sheet) -> str:
    rows = [[_escaped(cell) for cell in row] for row in sheet.rows]
    lines = [f'### {_escaped(sheet.title)}', '', _line(rows[0]), _line(['---'] * len(rows[0])), *map(_line, rows[1:])]
    return '\n'.join(lines + ([''] if sheet.notes else []) + [f'- {_escaped(note)}' for note in sheet.notes])


def _text(sheet: Sheet, width: int) -> str:
    """Without empty columns; what is wider than the terminal is written in parts, one below the other."""
    columns, notes, n = list(zip(*sheet.rows, strict=True)), sheet.notes, sheet.keys
    wide = [max(map(len, column)) + 2 for column in columns]
    shown = [i for i in range(n, len(columns)) if any(columns[i][1:])]
    kept = [i for i in shown if i not in sheet.variants]
    if sum(wide[:n]) + sum(wide[i] for i in shown) - 2 > width and 0 < len(kept) < len(shown):
        first, shown = next(i for i in shown if i in sheet.variants), kept
        notes = [*notes, f'{len(sheet.variants)} more columns, as {columns[first][0]}: see --markdown.']
    enough = next(  # key columns that tell the rows apart
        (i for i in range(1, n) if len(set(zip(*columns[:i], strict=True))) == len(sheet.rows)), n)
    parts = [[*range(n)]]
    used = sum(wide[:n])
    for i in shown:
        if len(parts[-1]) > n and used + wide[i] - 2 > width:
            n = enough
            parts.append([*range(n)])
            used = sum(wide[:n])
        parts[-1].append(i)
        used += wide[i]
    blocks = ['\n'.join(
        ''.join(row[i].ljust(wide[i]) for i in part).rstrip() for row in sheet.rows) for part in parts]
    rule = '-' * min(width, max(len(line) for block in blocks for line in block.split('\n')))
    return '\n'.join([
        *_wrapped(sheet.title, width), rule, '\n\n'.join(blocks), rule,
        *(line for note in notes for line in _wrapped(note, width))])


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, min(width, WIDTH), subsequent_indent='  ', break_long_words=False, break_on_hyphens=False)


def _line(cells: list[str]) -> str:
    return f'| {" | ".join(cells)} |'


def _escaped(text: str) -> str:
    for character, written in (('\\', '\\\\'), ('&', '&amp;'), ('|', '\\|'), ('<', '&lt;'), ('>', '&gt;'), ('[', '\\['),
            (']', '\\]'), ('`', '\\`')):
        text = text.replace(character, written)
    return text
