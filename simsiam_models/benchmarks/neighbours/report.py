"""What was found, as lines, tables and a contact sheet."""
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.readers.images import Images, load_picture
from ...pages.gallery import Cell
from ...runtime.messages import printable, short
from ...runtime.tables import Columns, write_table
from ..feature_table import FeatureTable
from .copies import Copy, find_copies
from .findings import VOTERS, Doubt, Outlier, find_outliers, find_wrong_labels, mask_copies
from .nearest import find_others
from .sheet import ROWS, Section, write_sheet

SPARE = 5  # neighbours searched beyond those that vote, in place of copies
SHOWN = 6  # copies or neighbours in a row of the sheet


@dataclass
class Findings:
    """What the features of `table` say about its images. `found` (M, k) and `cosines`: the nearest, of each image."""

    table: FeatureTable
    images: Images | None  # None: the files are not here
    found: np.ndarray
    cosines: np.ndarray
    queries: tuple[list[str], Images] | None = None  # names and images that were asked for, instead of all
    copies: list[Copy] = field(default_factory=list)
    outliers: list[Outlier] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    agree: float = 0.0  # share of images whose neighbours agree with their label
    unreadable: list[str] = field(default_factory=list)
    kinds: dict[tuple[int, int], str] = field(default_factory=dict)  # (image, neighbour) -> kind of copy

    def class_of(self, row: int) -> str:
        return '' if self.table.labels is None else self.table.classes[self.table.labels[row]]

    def describe(self) -> list[str]:
        """Returns a line for each finding."""
        n = len(self.table.paths)
        lines = [f'not compared: {text}' for text in self.unreadable]
        if self.images is not None:
            groups = len({copy.group for copy in self.copies})
            kinds = ', '.join(f'{count:,} {kind}' for kind, count in Counter(c.kind for c in self.copies).most_common())
            kinds = f' ({kinds})' if kinds else ''
            lines.append(f'copies: {len(self.copies):,} of {n:,} images, in {groups:,} groups{kinds}')
            if self.table.labels is not None:
                other = sum(self.class_of(c.row) != self.class_of(c.original) for c in self.copies)
                lines[-1] += f'; {other:,} in a different class from their original' if other else ''
        lines.append(f'outliers: {len(self.outliers):,} of {n:,} images')
        if self.table.labels is not None:
            weak = ', so these features say little about them' if self.agree < 0.5 else ''
            lines.append(f'likely wrong labels: {len(self.doubts):,} of {n:,} images; ' + (
                'no image has a neighbour that is not a copy of it' if math.isnan(self.agree) else
                f'the {VOTERS} nearest agree with {self.agree:.0%} of the labels{weak}'))
        return lines


def examine(
    table: FeatureTable, images: Images | None, k: int, device: torch.device, approximate: bool, workers: int,
) -> Findings:
    """Searches the neighbours of all images, and what follows from them."""
    (_, x), = table.arrays.items()
    found, cosines = find_others(x, min(max(k, VOTERS) + SPARE, len(x) - 1), device, approximate)
    result = Findings(table, images, found[:, :k], cosines[:, :k])
    groups = np.full(len(x), -1)
    if images is not None:
        result.copies, result.unreadable = find_copies(images, found, device, workers)
        for copy in result.copies:
            groups[[copy.row, copy.original]] = copy.group
            result.kinds[copy.row, copy.original] = result.kinds[copy.original, copy.row] = copy.kind
    counted = mask_copies(found, groups)
    result.outliers = find_outliers(cosines, counted)
    if table.labels is not None:
        result.doubts, result.agree = find_wrong_labels(found, counted, table.labels)
    return result


def print_query(answer: Findings) -> None:
    """Prints the nearest images of each query."""
    names = [] if answer.queries is None else answer.queries[0]
    for i, name in enumerate(names):
        print(f'{printable(name)}:')
        for row, cosine in zip(answer.found[i].tolist(), answer.cosines[i], strict=True):
            kind = f'  ({answer.kinds[i, row]})' if (i, row) in answer.kinds else ''
            print(f'  {cosine:.4f}  {printable(answer.table.paths[row])}{kind}')


def write_outputs(output: Path | None, sheet: Path | None, found: Findings) -> None:
    """Writes the tables and the contact sheet, and prints the names of the files."""
    if output is not None:
        for name, (columns, rows) in _list_tables(found).items():
            file = output.with_name(f'{output.stem}{name}{output.suffix}')
            write_table(file, columns, rows)
            print(f'written to {file}')
    if sheet is not None:
        data = found.table.about.get('data') or 'features'
        title = f'Nearest images in {data}' if found.queries else f'What the features say about {data}'
        write_sheet(sheet, title, _list_sections(found))
        print(f'written to {sheet}')


def _list_tables(found: Findings) -> dict[str, tuple[Columns, Iterator[tuple[Any, ...]]]]:
    """Returns the columns and rows of each table, by what its file name ends in."""
    paths, name = found.table.paths, found.class_of
    tables: dict[str, tuple[Columns, Iterator[tuple[Any, ...]]]] = {'': (
        {'path': str, 'class': str, 'rank': int, 'neighbour': str, 'neighbour_class': str,
         'cosine': float, 'copy': str}, _list_neighbours(found))}
    if found.queries is not None:
        return tables
    tables['-copies'] = (
        {'group': int, 'path': str, 'class': str, 'original': str, 'original_class': str,
         'kind': str, 'difference': float},
        ((c.group, paths[c.row], name(c.row), paths[c.original], name(c.original), c.kind, c.difference)
         for c in found.copies))
    tables['-outliers'] = (
        {'path': str, 'class': str, 'cosine': float, 'score': float},
        ((paths[o.row], name(o.row), o.cosine, o.score) for o in found.outliers))
    if found.table.labels is not None:
        tables['-labels'] = (
            {'path': str, 'class': str, 'suggested': str, 'votes': float, 'own_votes': float},
            ((paths[d.row], name(d.row), found.table.classes[d.suggested], d.share, d.own) for d in found.doubts))
    return tables


def _list_neighbours(found: Findings) -> Iterator[tuple[Any, ...]]:
    paths = found.table.paths
    names = paths if found.queries is None else found.queries[0]
    for i, path in enumerate(names):
        own = found.class_of(i) if found.queries is None else ''
        for rank, (row, cosine) in enumerate(zip(found.found[i].tolist(), found.cosines[i].tolist(), strict=True), 1):
            yield path, own, rank, paths[row], found.class_of(row), cosine, found.kinds.get((i, row), '')


def _list_sections(found: Findings) -> list[Section]:
    if found.queries is not None:
        return [Section('Nearest images', 'Each query and its nearest images by cosine similarity.', [
            _neighbour_row(found, i) for i in range(min(ROWS, len(found.found)))], len(found.found))]
    groups: dict[int, list[Copy]] = {}
    for copy in found.copies:
        groups.setdefault(copy.group, []).append(copy)
    sections = [Section(
        'Copies', 'The first image of each group is the one with the most pixels and bytes.',
        [(f'Group {number}', [_cell(found, group[0].original, 'original'), *(
            _cell(found, c.row, c.kind) for c in group[:SHOWN])]) for number, group in list(groups.items())[:ROWS]],
        len(groups))] if found.images is not None else []
    sections.append(Section(
        'Outliers', 'Images that are far from all others, farthest first, with their nearest images.',
        [_neighbour_row(found, o.row, f'score {o.score:.1f}') for o in found.outliers[:ROWS]], len(found.outliers)))
    if found.table.labels is not None:
        sections.append(Section(
            'Likely wrong labels', 'At least seven of ten neighbours belong to one other class, and at most one to '
            'the class of the image.' + (
                '' if math.isnan(found.agree) else f' The neighbours agree with {found.agree:.0%} of all labels.'),
            [_neighbour_row(found, d.row, f'{short(found.class_of(d.row), 40)}, or '
                            f'{short(found.table.classes[d.suggested], 40)}? ({d.share:.0%} of the votes)')
             for d in found.doubts[:ROWS]], len(found.doubts)))
    n = len(found.found)
    some = sorted({n * i // ROWS for i in range(ROWS)})
    sections.append(Section(
        'Nearest images', 'A sample of the images, evenly spaced, and their nearest images by cosine similarity.',
        [_neighbour_row(found, i) for i in some], n))
    return sections


def _cell(found: Findings, row: int, text: str) -> Cell:
    name = short(found.class_of(row), 40)
    return Cell(partial(load_picture, found.images, row), f'{text}{f", {name}" * bool(name)}', found.table.paths[row])


def _neighbour_row(found: Findings, i: int, heading: str = '') -> tuple[str, list[Cell]]:
    if found.queries is None:
        first = _cell(found, i, 'this image')
    else:
        first = Cell(partial(load_picture, found.queries[1], i), 'query', found.queries[0][i])
    cells = [first]
    for row, cosine in zip(found.found[i, :SHOWN].tolist(), found.cosines[i], strict=False):
        kind = found.kinds.get((i, row))
        cells.append(_cell(found, row, f'{cosine:.3f}, {kind}' if kind else f'{cosine:.3f}'))
    return heading or Path(first.path).name, cells
