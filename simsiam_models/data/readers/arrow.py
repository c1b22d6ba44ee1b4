"""Data sets of the Hugging Face Hub and their formats: folders of `save_to_disk`, Parquet and Arrow files, `hf:REPO`.

Arrow files are memory-mapped in place. Parquet has no random access: the datasets library first converts it to Arrow
files in its own cache (set by HF_DATASETS_CACHE).

The images are the only column of type Image, or the one named image or img if there are several, or the one that
`#image=COLUMN` chooses. In files without such types they are the only column of binary or of {bytes, path}. `labels`
says which column has the labels; columns within a column are called OUTER.INNER.
"""
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ...runtime.messages import announce, one_line
from . import images
from .decode import DataError, UnreadableError, decode, explain_read_errors, import_library
from .index import describe_alike, digest
from .labels import (
    DOUBTFUL,
    NAMED,
    NUMBERED,
    PLAIN,
    SAMPLE,
    Choice,
    LabelError,
    choose_column,
    describe_column,
    number_classes,
)
from .names import choose_parts, part_of

# pyarrow's errors are subclasses of the first two; a package for URLs may be missing.
READ_ERRORS = OSError, ValueError, ImportError, UnreadableError


def import_datasets() -> ModuleType:
    return import_library('datasets', 'Hugging Face data sets')


class ArrowImages:
    """The images of a datasets.Dataset, decoded here. Raises ValueError unless exactly one column holds images."""

    def __init__(self, rows: Any, name: str, choice: Choice | None = None) -> None:
        choice = choice or Choice()
        self.name, self.column = name, find_image_column(rows.features, name, choice)
        if not len(rows):
            raise ValueError(f'{name}: no image in it (a table of 0 rows)')
        self.labels, self.classes, about = _read_labels(rows, self.column, choice)
        for note in filter(None, (about, describe_alike(self.classes))):
            announce(f'{name}: {note}')
        self._rows = select_undecoded(rows, self.column)
        self.digest = self._digest()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> np.ndarray:
        """Returns (H, W, 3) uint8; raises UnreadableError, which names the row, if it cannot be read or decoded."""
        name = f'{self.name}: image {index}'
        with explain_read_errors(name, *READ_ERRORS):
            data = read_encoded(self._rows[int(index)][self.column])
        if data is None:
            raise UnreadableError(f'{name}: the table has no image there')
        return decode(data, name)

    def stored_bytes(self, index: int, start: int = 0, length: int | None = None) -> bytes:
        """See `images.stored_bytes`."""
        with explain_read_errors(f'{self.name}: image {index}', *READ_ERRORS):
            data = read_encoded(self._rows[int(index)][self.column]) or b''
        return data[start:None if length is None else start + length]

    def names_urls(self) -> bool:
        """Returns whether the table names images by URLs or inside archives, instead of containing them."""
        import pyarrow as pa
        import pyarrow.compute as pc
        values = self._rows.with_format('arrow')[:][self.column]
        if not pa.types.is_struct(values.type) or values.type.get_field_index('path') < 0:
            return False
        paths = pc.struct_field(values, 'path').filter(pc.is_null(pc.struct_field(values, 'bytes')))
        return any(map(is_url, map(str, paths.to_pylist())))

    def _digest(self) -> str:
        """Hashes the sizes of all images in order, and the labels: reading every byte would take hours."""
        import pyarrow as pa
        import pyarrow.compute as pc
        values, paths = self._rows.with_format('arrow')[:][self.column], ''
        if pa.types.is_struct(values.type):
            parts, values = values, pc.struct_field(values, 'bytes')
            if values.null_count:
                paths = json.dumps(pc.struct_field(parts, 'path').to_pylist())
        if pa.types.is_null(values.type):  # no row has any bytes
            values = values.cast(pa.binary())
        sizes = pc.fill_null(pc.cast(pc.binary_length(values), pa.int64()), -1).to_numpy()
        labels = np.zeros(0) if self.labels is None else self.labels
        return digest(json.dumps([self.column, self.classes]), paths, sizes.astype('<i8'), labels.astype('<i8'))


def find_image_column(features: Any, name: str, choice: Choice) -> str:
    datasets = import_datasets()
    if choice.image is not None:
        if choice.image not in features:
            raise ValueError(f'{name}: no column {choice.image} for #image=; its columns are {", ".join(features)}')
        return choice.image
    kinds: list[Callable[[Any], bool]] = [
        lambda f: isinstance(f, datasets.Image), lambda f: getattr(f, 'dtype', None) in ('binary', 'large_binary'),
        lambda f: isinstance(f, dict) and 'bytes' in f]
    found: list[str] = next(filter(None, ([c for c, f in features.items() if is_image(f)] for is_image in kinds)), [])
    if len(found) > 1:
        usual: list[str] = [column for column in ('image', 'img') if column in found]
        found = usual[:1] or found
    if len(found) != 1:
        has = f'several columns of images ({", ".join(found)})' if found else 'no column of images'
        raise ValueError(
            f'{name}: {has}; its columns are {", ".join(features)}, and exactly one must be of type Image; '
            '#image=COLUMN after the name chooses one')
    return found[0]


def select_undecoded(rows: Any, column: str) -> Any:
    """Selects the images alone, each as bytes or the path of a file."""
    rows, image = rows.select_columns([column]), import_datasets().Image
    return rows.cast_column(column, image(decode=False)) if isinstance(rows.features[column], image) else rows


def is_url(path: str) -> bool:
    """Returns whether the datasets library reads this path from elsewhere, or from inside an archive."""
    return '://' in path or '::' in path


def read_encoded(value: Any) -> bytes | None:
    """Returns the bytes of an image that a table contains, or whose file it names."""
    if isinstance(value, dict):
        if value.get('bytes') is None and value.get('path'):
            path = str(value['path'])
            if not is_url(path):
                return images.open_files([path], path).stored_bytes(0)
            from datasets.utils.file_utils import xopen  # also reads files in archives and on the Hub
            with xopen(path, 'rb') as f:
                data: bytes = f.read()
                return data
        value = value.get('bytes')
    return value or None


def _read_labels(rows: Any, image: str, choice: Choice) -> tuple[np.ndarray | None, list[str], str]:
    """Returns the labels, the names of the classes, and a line about them for the log."""
    features = dict(_list_columns({c: f for c, f in rows.features.items() if c != image}))
    kinds = {c: kind for c, f in features.items() if (kind := _kind(f)) is not None}
    first = rows.select(range(min(len(rows), SAMPLE)))
    column = choose_column(kinds, choice, lambda c: _read_column(first, c).to_pylist())
    labels, reason = None, ''
    classes: list[str] = []
    if column is not None:
        try:
            feature = getattr(features[column], 'feature', features[column])  # that of a list's items
            labels, classes = _number(_read_column(rows, column), getattr(feature, 'names', None))
        except LabelError as e:
            reason = str(e) if e.at is None else f'row {e.at}: {e}'
    return labels, classes, describe_column(column, features, len(classes), reason)


def _list_columns(features: dict[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Yields the name and feature of each column, those within others as OUTER.INNER."""
    for name, feature in features.items():
        if isinstance(feature, dict) and 'bytes' not in feature:
            yield from _list_columns(feature, f'{prefix}{name}.')
        else:
            yield prefix + name, feature


def _kind(feature: Any) -> int | None:
    """Returns how a column may hold labels, NAMED to DOUBTFUL, or None if it cannot."""
    if isinstance(feature, import_datasets().ClassLabel):
        return NAMED
    if hasattr(feature, 'feature') or isinstance(feature, list):
        return DOUBTFUL  # a list of one label in each row
    kind = str(getattr(feature, 'dtype', ''))
    kinds = {('int', 'uint'): NUMBERED, ('string', 'large_string', 'bool'): PLAIN, ('float', 'decimal'): DOUBTFUL}
    return next((kinds[names] for names in kinds if kind.startswith(names)), None)


def _read_column(rows: Any, column: str) -> Any:
    """Returns a column of `_list_columns` as a pyarrow.Array."""
    import pyarrow as pa
    import pyarrow.compute as pc
    outer, *inner = [column] if column in rows.features else column.split('.')
    values = rows.select_columns([outer]).with_format('arrow')[:][outer]
    for name in inner:
        values = pc.struct_field(values, name)
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def _number(values: Any, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """Returns the labels (N,) and the names of the classes; `names`: of a ClassLabel. Raises LabelError."""
    import pyarrow as pa
    import pyarrow.compute as pc
    if isinstance(values.type, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
        lengths = pc.list_value_length(values)
        if not pc.all(pc.fill_null(pc.equal(lengths, 1), False)).as_py():
            raise LabelError('lists of labels, not all with exactly one', None)
        values = pc.list_flatten(values)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_decimal(values.type):
        values = values.cast(pa.float64())
    if pa.types.is_boolean(values.type):
        values = pc.if_else(values, 'True', 'False')
    if pa.types.is_floating(values.type) or pa.types.is_integer(values.type):
        missing = pc.is_null(values, nan_is_null=True)
    elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        missing = pc.fill_null(pc.equal(pc.binary_length(values), 0), True)
    else:
        raise LabelError(f'labels of the type {values.type} are not read', None)
    if n := pc.sum(missing).as_py():
        raise LabelError(f'{n} of {len(values)} rows have no label', pc.index(missing, True).as_py())
    encoded = pc.dictionary_encode(values)
    distinct, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    try:
        labels, classes = number_classes(distinct)
    except LabelError as e:
        raise LabelError(str(e), int(np.argmax(codes == e.at))) from None
    if names is not None and len(classes) > len(names):
        raise LabelError(f'number {len(classes) - 1}, but there are only {len(names)} names of classes', None)
    return np.array(labels, np.int32)[codes], names or classes


def explain_open_errors(name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Returns the result of a call of the datasets library; turns its errors into one DataError."""
    try:
        return call(*args, **options)
    # datasets raises its own DatasetsError, and those of pyarrow, fsspec, huggingface_hub, json, yaml, ...
    except Exception as e:
        cause = e.__cause__ or e  # the outermost error often says only that something went wrong
        if isinstance(cause, MemoryError):
            raise cause from None
        raise DataError(
            f'{name} cannot be opened by the datasets library ({type(cause).__name__}: {one_line(cause, 300)})'
        ) from None


def open_saved(folder: Path, name: str, choice: Choice | None = None) -> tuple[ArrowImages, ArrowImages | None] | None:
    """Opens a folder of `save_to_disk`, all its splits or a single one; returns None if `folder` is not one."""
    if not (folder / 'dataset_dict.json').is_file() and not (folder / 'state.json').is_file():
        return None
    rows = explain_open_errors(str(folder), import_datasets().load_from_disk, str(folder))
    return _choose_splits(rows if isinstance(rows, dict) else {'train': rows}, name, choice)


def open_files(files: list[Path], name: str, choice: Choice | None = None) -> ArrowImages:
    """Opens Parquet or Arrow files as one table."""
    datasets = import_datasets()
    if files[0].suffix.lower() == '.parquet':
        _check_class_names(files, name)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # load_dataset counts local files, too, by a request
        rows = explain_open_errors(
            name, datasets.load_dataset, 'parquet', data_files=[str(f.resolve()) for f in files], split='train')
    else:
        rows = explain_open_errors(
            name, lambda: datasets.concatenate_datasets([datasets.Dataset.from_file(str(f)) for f in files]))
    return ArrowImages(rows, name, choice)


def _check_class_names(files: list[Path], name: str) -> None:
    """Raises ValueError if class numbers mean other names in another file: datasets reads all by those of the first."""
    import pyarrow.parquet as pq
    read = import_datasets().Features.from_arrow_schema
    first: dict[str, tuple[Path, Any]] = {}
    for file in files if len(files) > 1 else ():
        features = explain_open_errors(str(file), lambda file=file: read(pq.read_schema(file)))
        for column, feature in _list_columns(features):
            if names := getattr(getattr(feature, 'feature', feature), 'names', None):
                where, known = first.setdefault(column, (file, names))
                if names != known:
                    raise ValueError(
                        f'{name}: the class names of the column {column} are not the same, or not in the same order, '
                        f'in {where.name} and {file.name}; write the files again with the same class names')


def open_repo(
    repo: str, split: str | None, name: str, choice: Choice | None = None,
) -> tuple[ArrowImages, ArrowImages | None]:
    """Downloads a data set of the Hub: all its splits, or the given one."""
    at = f'hf:{repo}' if split is None else f'hf:{repo}:{split}'
    rows = explain_open_errors(at, import_datasets().load_dataset, repo, split=split)
    return _choose_splits(rows if split is None else {'train': rows}, name, choice)


def _choose_splits(
    splits: dict[str, Any], name: str, choice: Choice | None,
) -> tuple[ArrowImages, ArrowImages | None]:
    """Returns the training split, and the first one for validation (see `choose_parts`) that has labels."""
    parts = choose_parts(splits)
    if 'train' not in parts and len(splits) > 1:
        raise ValueError(f'{name} has no split train; choose one of {", ".join(splits)} with hf:REPO:SPLIT')
    if not splits:
        raise ValueError(f'{name} has no splits')
    first, val = parts.get('train', list(splits))[0], None
    used = [first]
    if part_of(first) == 'val':
        announce(f'{name}: its only split is {first}, which is used')
    for split in parts.get('val', []):
        if split != first and len(splits[split]):
            val, used = ArrowImages(splits[split], f'{name} ({split})', choice), [first, split]
            if val.labels is not None:
                break
    if others := [split for split in splits if split not in used]:
        announce(f'{name}: unused splits: {", ".join(others)}')
    return ArrowImages(splits[first], name, choice), val
