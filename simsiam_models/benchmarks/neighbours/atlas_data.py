"""What the page of the atlas holds: see `pages/atlas_map.js`, which reads it."""
import base64
import os
import re
from typing import Any

import numpy as np

from ...data.readers.images import Images, name_of
from ...runtime.messages import FORMULA, counted, inert_cell, printable
from ..feature_table import FeatureTable
from .projections import NAMES, fit_unit
from .report import Findings
from .sprites import COLUMNS, Sprites


def make_data(
    found: Findings, maps: dict[str, np.ndarray], sprites: Sprites | None, names: list[str],
) -> dict[str, Any]:
    """Returns the data of a page with the maps projection -> (N, 2) points.

    Texts are as they are shown, except for `names` and `cells`, which a list of images gets.
    """
    labels, classes = found.table.labels, found.table.classes
    return {
        'names': [f'./{name}' if name.startswith(FORMULA) else name for name in names],
        'spelled': {row: printable(name) for row, name in enumerate(names) if printable(name) != name},
        'labels': None if labels is None else labels.tolist(),
        'classes': [printable(name) for name in classes], 'cells': write_classes(classes),
        'maps': [{'name': NAMES[kind], 'xy': encode(fit_unit(xy), '<f4')} for kind, xy in maps.items()],
        'k': found.found.shape[1], 'near': encode(found.found, '<u4'),
        'cosines': encode(np.round((found.cosines.clip(-1, 1) + 1) / 2 * 65535), '<u2'),
        'findings': _list_findings(found, names),
        'tiles': None if sprites is None else {
            'side': sprites.side, 'columns': COLUMNS, 'place': encode(sprites.place, '<u4'),
            'sizes': encode(sprites.sizes, 'u1')}}


def state_facts(table: FeatureTable, kind: str) -> str:
    """Returns a line on a map by this projection."""
    classes = [] if table.labels is None else [counted(len(np.unique(table.labels)), 'class', 'classes')]
    of = f' of features from {table.about["model"]}' if 'model' in table.about else ''
    return ' · '.join([counted(len(table.paths), 'image'), *classes, f'{NAMES[kind]}{of}'])


def explain_list(root: str) -> str:
    """Returns what to do with a list of images whose paths start at `root`."""
    if not root:
        return 'The images are not separate files here, so no command can read the list.'
    return (f'Paths in the list are relative to {root}. Put the list in that folder, or enter the path to the '
            'folder in the field above. Then run: simsiam pretrain selection.csv')


def _list_findings(found: Findings, names: list[str]) -> list[dict[str, Any]]:
    """Returns, for each kind, its name, its mark (an SVG path in a square of 12), and the images with a text each."""
    originals = {c.original: 'has copies' for c in found.copies}
    copies = originals | {c.row: printable(f'copy of {names[c.original]} ({c.kind})') for c in found.copies}
    outliers = {o.row: f'outlier, score {o.score:.1f}' for o in found.outliers}
    doubts = {d.row: f'wrong label? {d.share:.0%} of its neighbours are {printable(found.table.classes[d.suggested])}'
              for d in found.doubts}
    kinds = [
        ('copies', 'Near-duplicates', 'M1.5 1.5h9v9h-9z', copies, found.images is not None),
        ('outliers', 'Outliers', 'M6 1a5 5 0 1 0 0 10a5 5 0 1 0 0-10z', outliers, True),
        ('doubts', 'Likely wrong labels', 'M3.5 4a2.5 2.5 0 1 1 3.6 2.2Q6 6.8 6 8M6 10v1', doubts,
         found.table.labels is not None)]
    return [{'key': key, 'name': name, 'mark': mark, 'rows': sorted(rows.items())}
            for key, name, mark, rows, known in kinds if known]


def write_classes(classes: list[str]) -> list[str]:
    """Returns what a list says for each class. Where numbers would be refused or merged, they become text."""
    numbers = [int(name) for name in classes if re.fullmatch('[0-9]{1,5}', name, re.ASCII)]
    if len(set(numbers)) == len(classes):
        return classes
    return [inert_cell(name) if re.search('[^0-9.+-]', name) else f"'{name}" for name in classes]


def encode(array: np.ndarray, kind: str) -> str:
    """Returns numbers of a NumPy type in base64."""
    return base64.b64encode(np.ascontiguousarray(array, kind).tobytes()).decode()


def name_images(table: FeatureTable, images: Images | None, data: str | None) -> tuple[str, list[str]]:
    """Returns the folder that a list of the images lies in, and their paths from there; '' if they are no files.

    The folder is DATA, or else the last one that all paths have in common.
    """
    names = table.paths if images is None else [name_of(images, row) for row in range(len(images))]
    if images is None or not os.path.isfile(names[0]):
        return '', names
    if data is not None and os.path.isdir(data) and all(name.startswith(os.path.join(data, '')) for name in names):
        root = os.path.join(data, '')
    else:
        try:
            root = os.path.join(os.path.commonpath([os.path.dirname(name) or '.' for name in names]), '')
        except ValueError:  # absolute and relative paths
            return './', names
    return root, [os.path.relpath(name, root) for name in names]
