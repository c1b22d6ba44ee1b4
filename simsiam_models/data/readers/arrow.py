"""Data sets of the Hugging Face Hub and their formats: folders of `save_to_disk`, Parquet and Arrow files, `hf:REPO`.

Arrow files are memory-mapped in place. Parquet has no random access: the datasets library first converts it to Arrow
files in its own cache (set by HF_DATASETS_CACHE).

The images are the only column of type Image, or the one named image or img if there are several. In files without
such types they are the only column of binary or of {bytes, path}. Labels are the first column of LABELS that has class
names or integers, or else the only column of class names. They are ignored if one is missing or below 0.
"""
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ...runtime.messages import announce, one_line
from .decode import DataError, UnreadableError, decode, explain_read_errors, import_library
from .index import digest
from .lists import MAX_CLASSES
from .names import choose_parts, part_of

LABELS = ('label', 'labels', 'fine_label', 'class', 'target')


def import_datasets() -> ModuleType:
    return import_library('datasets', 'Hugging Face data sets')


class ArrowImages:
    """The images of a datasets.Dataset, decoded here. Raises ValueError unless exactly one column holds images."""

    def __init__(self, rows: Any, name: str) -> None:
        self.name, self.column = name, find_image_column(rows.features, name)
        if not len(rows):
            raise ValueError(f'{name}: no image in it (a table of 0 rows)')
        self.labels, self.classes = _read_labels(rows)
        self._rows = select_undecoded(rows, self.column)
        self.digest = self._digest()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> np.ndarray:
        """Returns (H, W, 3) uint8; raises UnreadableError, which names the row, if it cannot be read or decoded."""
        name = f'{self.name}: image {index}'
        with explain_read_errors(name, OSError, ValueError):  # pyarrow's errors are subclasses of these
            data = read_encoded(self._rows[int(index)][self.column])
        if data is None:
            raise UnreadableError(f'{name}: the table has no image there')
        return decode(data, name)

    def stored_bytes(self, index: int, start: int = 0, length: int | None = None) -> bytes:
        """See `images.stored_bytes`."""
        with explain_read_errors(f'{self.name}: image {index}', OSError, ValueError):
            data = read_encoded(self._rows[int(index)][self.column]) or b''
        return data[start:None if length is None else start + length]

    def _digest(self) -> str:
        """Hashes the sizes of all images in order, and the labels: reading every byte would take hours."""
        import pyarrow as pa
        import pyarrow.compute as pc
        values, paths = self._rows.with_format('arrow')[:][self.column], ''
        if pa.types.is_struct(values.type):
            parts, values = values, pc.struct_field(values, 'bytes')
            if values.null_count:
                paths = json.dumps(pc.struct_field(parts, 'path').to_pylist())
        sizes = pc.fill_null(pc.cast(pc.binary_length(values), pa.int64()), -1).to_numpy()
        labels = np.zeros(0) if self.labels is None else self.labels
        return digest(json.dumps([self.column, self.classes]), paths, sizes.astype('<i8'), labels.astype('<i8'))


def find_image_column(features: Any, name: str) -> str:
    datasets = import_datasets()
    kinds = (lambda f: isinstance(f, datasets.Image), lambda f: getattr(f, 'dtype', None) in ('binary', 'large_binary'),
             lambda f: isinstance(f, dict) and 'bytes' in f)
    found = next(filter(None, ([c for c, f in features.items() if is_image(f)] for is_image in kinds)), [])
    if len(found) > 1:
        found = [column for column in ('image', 'img') if column in found][:1] or found
    if len(found) != 1:
        has = f'several columns of images ({", ".join(found)})' if found else 'no column of images'
        raise ValueError(f'{name}: {has}; its columns are {", ".join(features)}, and exactly one must be of type Image')
    return found[0]


def select_undecoded(rows: Any, column: str) -> Any:
    """Selects the images alone, each as bytes or the path of a file."""
    rows, image = rows.select_columns([column]), import_datasets().Image
    return rows.cast_column(column, image(decode=False)) if isinstance(rows.features[column], image) else rows


def read_encoded(value: Any) -> bytes | None:
    """Returns the bytes of an image that a table contains, or whose file it names."""
    if isinstance(value, dict):
        if value.get('bytes') is None and value.get('path'):
            from datasets.utils.file_utils import xopen  # also reads files in archives and on the Hub
            with xopen(value['path'], 'rb') as f:
                return f.read()
        value = value.get('bytes')
    return value or None


def _read_labels(rows: Any) -> tuple[np.ndarray | None, list[str]]:
    named = {c: list(f.names) for c, f in rows.features.items() if isinstance(f, import_datasets().ClassLabel)}
    numbered = [c for c, f in rows.features.items() if str(getattr(f, 'dtype', '')).startswith(('int', 'uint'))]
    column = next((c for c in LABELS if c in (*named, *numbered)), next(iter(named)) if len(named) == 1 else None)
    values = None if column is None else rows.select_columns([column]).with_format('arrow')[:][column]
    if values is None or values.null_count or (labels := values.to_numpy()).min() < 0 or labels.max() >= MAX_CLASSES:
        return None, []
    return labels.astype(np.int32), named.get(column) or [str(i) for i in range(int(labels.max()) + 1)]


def explain_open_errors(name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Returns the result of a call of the datasets library; turns its errors into one DataError."""
    try:
        return call(*args, **options)
    # datasets raises its own DatasetsError, and those of pyarrow, fsspec, huggingface_hub, json, yaml, ...
    except Exception as e:
        e = e.__cause__ or e  # the outermost error often says only that something went wrong
        if isinstance(e, MemoryError):
            raise e from None
        raise DataError(
            f'{name} cannot be opened by the datasets library ({type(e).__name__}: {one_line(e, 300)})') from None


def open_saved(folder: Path, name: str) -> tuple[ArrowImages, ArrowImages | None] | None:
    """Opens a folder of `save_to_disk`, all its splits or a single one; returns None if `folder` is not one."""
    if not (folder / 'dataset_dict.json').is_file() and not (folder / 'state.json').is_file():
        return None
    rows = explain_open_errors(str(folder), import_datasets().load_from_disk, str(folder))
    return _choose_splits(rows if isinstance(rows, dict) else {'train': rows}, name)


def open_files(files: list[Path], name: str) -> ArrowImages:
    """Opens Parquet or Arrow files as one table."""
    datasets = import_datasets()
    if files[0].suffix == '.parquet':
        return ArrowImages(explain_open_errors(
            name, datasets.load_dataset, 'parquet', data_files=[str(f.resolve()) for f in files], split='train'), name)
    return ArrowImages(explain_open_errors(
        name, lambda: datasets.concatenate_datasets([datasets.Dataset.from_file(str(f)) for f in files])), name)


def open_repo(repo: str, split: str | None, name: str) -> tuple[ArrowImages, ArrowImages | None]:
    """Downloads a data set of the Hub: all its splits, or the given one."""
    at = f'hf:{repo}' if split is None else f'hf:{repo}:{split}'
    rows = explain_open_errors(at, import_datasets().load_dataset, repo, split=split)
    return _choose_splits(rows if split is None else {'train': rows}, name)


def _choose_splits(splits: dict[str, Any], name: str) -> tuple[ArrowImages, ArrowImages | None]:
    """Returns the training split, and the first one for validation (see `choose_parts`) that has labels."""
    parts = choose_parts(splits)
    if 'train' not in parts and len(splits) > 1:
        raise ValueError(f'{name} has no split train but {", ".join(splits)}; choose one with hf:REPO:SPLIT')
    if not splits:
        raise ValueError(f'{name} has no splits')
    first, val = parts.get('train', list(splits))[0], None
    used = [first]
    if part_of(first) == 'val':
        announce(f'{name}: its only split is {first}, which is used')
    for split in parts.get('val', []):
        if split != first and len(splits[split]):
            val, used = ArrowImages(splits[split], f'{name} ({split})'), [first, split]
            if val.labels is not None:
                break
    if others := [split for split in splits if split not in used]:
        announce(f'{name}: splits that are not used: {", ".join(others)}')
    return ArrowImages(splits[first], name), val
