"""Data sets of the Hugging Face Hub and their formats: what `save_to_disk` wrote, Parquet and Arrow files, `hf:REPO`.

Arrow files are mapped where they lie. Parquet cannot be read at random: the datasets library copies it to Arrow files
in its own cache once (HF_DATASETS_CACHE moves that).

The images are the one column of type Image, of several the one named image or img; in files without such types, the
one column of binary or of {bytes, path}. Labels are the first column of LABELS that has class names or whole numbers,
or else the one column of class names. They do not count where one is missing or below 0.
"""
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .decode import DataError, UnreadableError, decode
from .index import digest
from .lists import MOST

LABELS = ('label', 'labels', 'fine_label', 'class', 'target')
VALIDATION = ('validation', 'val', 'valid', 'test')  # of these the first one that has labels


def library() -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise DataError(
            "Hugging Face data sets need the datasets library: pip install 'simsiam-models[data]'") from None
    return datasets


class ArrowImages:
    """The images of a datasets.Dataset, decoded here.

    Raises:
        ValueError: no column of images, or several, or no image.
    """

    def __init__(self, rows: Any, name: str) -> None:
        self.name, self.column = name, image_column(rows.features, name)
        if not len(rows):
            raise ValueError(f'{name}: no image in it (a table of 0 rows)')
        self.labels, self.classes = _labels(rows)
        self._rows = undecoded(rows, self.column)
        self.digest = self._digest()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8. Raises UnreadableError, naming the row, where it cannot be decoded."""
        name = f'{self.name}: image {index}'
        try:
            value = self._rows[int(index)][self.column]
            data = encoded(value)
        except (OSError, ValueError) as e:  # also pyarrow's
            raise UnreadableError(f'{name}: cannot be read ({e})') from None
        if data is None:
            raise UnreadableError(f'{name}: the table has no image there')
        return decode(data, name)

    def _digest(self) -> str:
        """Of the sizes of all images, their order, and the labels: reading every byte would take hours."""
        import pyarrow as pa
        import pyarrow.compute as pc
        values = self._rows.with_format('arrow')[:][self.column]
        if not isinstance(values, pa.ChunkedArray):
            values = pa.chunked_array([values])
        paths = ''
        if pa.types.is_struct(values.type):
            parts = values
            values = pc.struct_field(parts, 'bytes')
            if values.null_count:
                paths = json.dumps(pc.struct_field(parts, 'path').to_pylist())
        sizes = pc.fill_null(pc.cast(pc.binary_length(values), pa.int64()), -1).to_numpy()
        labels = np.zeros(0) if self.labels is None else self.labels
        return digest(json.dumps([self.column, self.classes]), paths, sizes.astype('<i8'), labels.astype('<i8'))


def image_column(features: Any, name: str) -> str:
    datasets, found = library(), []
    for kind in (
        lambda f: isinstance(f, datasets.Image),
        lambda f: getattr(f, 'dtype', None) in ('binary', 'large_binary'),
        lambda f: isinstance(f, dict) and 'bytes' in f,
    ):
        found = [column for column, feature in features.items() if kind(feature)]
        if found:
            break
    if len(found) > 1:
        found = [column for column in ('image', 'img') if column in found][:1] or found
    if len(found) != 1:
        has = f'several columns of images ({", ".join(found)})' if found else 'no column of images'
        raise ValueError(f'{name}: {has}; its columns are {", ".join(features)}, and one is to be of type Image')
    return found[0]


def undecoded(rows: Any, column: str) -> Any:
    """Only the images, as bytes or the path of a file."""
    datasets = library()
    rows = rows.select_columns([column])
    if isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def encoded(value: Any) -> bytes | None:
    """The bytes of an image that a table holds, or names."""
    if isinstance(value, dict):
        if value.get('bytes') is None and value.get('path'):
            from datasets.utils.file_utils import xopen  # also reads from within archives and from the Hub
            with xopen(value['path'], 'rb') as f:
                return f.read()
        value = value.get('bytes')
    return value or None


def _labels(rows: Any) -> tuple[np.ndarray | None, list[str]]:
    datasets, features = library(), rows.features
    named = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    numbered = [column for column, feature in features.items() if str(getattr(feature, 'dtype', '')).startswith(
        ('int', 'uint'))]
    columns = [column for column in LABELS if column in named + numbered] or (named if len(named) == 1 else [])
    if not columns:
        return None, []
    values = rows.select_columns([columns[0]]).with_format('arrow')[:][columns[0]]
    if values.null_count:
        return None, []
    labels = values.to_numpy()
    if labels.min() < 0 or labels.max() >= MOST:
        return None, []
    names = features[columns[0]].names if columns[0] in named else None
    labels = labels.astype(np.int32)
    return labels, list(names) if names is not None else [str(i) for i in range(labels.max() + 1)]


def load(what: str, call: Any) -> Any:
    """The result of a call of the datasets library, whose errors are of many kinds and lengths."""
    try:
        return call()
    except Exception as e:
        e = e.__cause__ or e  # what is outermost often says no more than that something went wrong
        text = ' '.join(str(e).split())
        text = text if len(text) <= 300 else text[:297] + '...'
        raise DataError(f'{what} cannot be opened by the datasets library ({type(e).__name__}: {text})') from None


def open_saved(folder: Path) -> dict[str, Any]:
    """What `save_to_disk` wrote: its splits, or one that is named train."""
    rows = load(str(folder), lambda: library().load_from_disk(str(folder)))
    return dict(rows) if isinstance(rows, library().DatasetDict) else {'train': rows}


def open_files(files: list[Path], name: str) -> ArrowImages:
    """Parquet or Arrow files, one after the other."""
    datasets = library()
    if files[0].suffix == '.parquet':
        rows = load(name, lambda: datasets.load_dataset(
            'parquet', data_files=[str(f.resolve()) for f in files], split='train'))
    else:
        rows = load(name, lambda: datasets.concatenate_datasets([datasets.Dataset.from_file(str(f)) for f in files]))
    return ArrowImages(rows, name)


def open_repo(repo: str, split: str | None) -> dict[str, Any]:
    """A data set of the Hub, downloaded; only `split` where one is given."""
    if split is not None:
        return {'train': load(f'hf:{repo}:{split}', lambda: library().load_dataset(repo, split=split))}
    return dict(load(f'hf:{repo}', lambda: library().load_dataset(repo)))


def pick(splits: dict[str, Any], name: str) -> tuple[ArrowImages, ArrowImages | None]:
    """The training split, and the first of VALIDATION that has labels."""
    if 'train' not in splits and len(splits) > 1:
        raise ValueError(f'{name}: no split train in it but {", ".join(splits)}; name one, as in hf:REPO:SPLIT')
    first = 'train' if 'train' in splits else next(iter(splits), None)
    if first is None:
        raise ValueError(f'{name}: no split in it')
    train, val = ArrowImages(splits[first], name), None
    for split in VALIDATION:
        if split in splits and split != first and len(splits[split]):
            val = ArrowImages(splits[split], f'{name} ({split})')
            if val.labels is not None:
                break
    return train, val
