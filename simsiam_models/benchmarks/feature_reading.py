"""Reads the files that `simsiam embed` wrote, one or several shards, as one matrix."""
import csv
import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from ..runtime.messages import one_line, require, restore_cell, size_text
from .feature_table import SUFFIXES, FeatureTable

SHARD = re.compile(r'(.*)-(\d{5})-of-(\d{5})')
EXPANSION = 64  # bytes that a byte of a compressed file may become
_COLUMN = re.compile(r'(.+)_(\d+)')
_Parts = tuple[dict[str, Any], list[str], Any, list[str] | None, dict[str, Any]]  # the fields of a FeatureTable


def read_features(files: Sequence[str | Path]) -> FeatureTable:
    """Returns the features in `files`, in their order, with classes in the order of their names.

    The table has one array: the average pool, or the only feature in the files. Files and folders may be in any format
    of `feature_table`.

    Raises:
        FileNotFoundError, ValueError: a file or a shard is missing, damaged, or not of the same model as the others.
    """
    named = [Path(file) for file in files]
    _check_shards(named)
    tables = [_read_file(file) for file in named]
    name, = tables[0].arrays
    for file, table in zip(named, tables, strict=True):
        others = [f'{key} {about.get(key)}' for key in ('weights', 'image_size', 'resize')
                  for about in [table.about] if about.get(key) != tables[0].about.get(key)]
        (own, x), = table.arrays.items()
        if others or own != name or x.shape[1] != tables[0].arrays[name].shape[1]:
            raise ValueError(
                f'{file}: {own} of {x.shape[1]} numbers{"".join(f", {text}" for text in others)}, unlike {files[0]}; '
                'give files from the same model')
        if (table.labels is None) != (tables[0].labels is None):
            raise ValueError(f'{file} and {files[0]}: only one of them has labels; give files from the same data set')
    x = tables[0].arrays[name] if len(tables) == 1 else np.concatenate([table.arrays[name] for table in tables])
    paths = [path for table in tables for path in table.paths]
    labels, classes = None, []
    if tables[0].labels is not None:
        classes = sorted({table.classes[i] for table in tables for i in np.unique(np.asarray(table.labels)).tolist()})
        number = {text: i for i, text in enumerate(classes)}
        labels = np.concatenate([np.array([number.get(c, -1) for c in t.classes], np.int64)[t.labels] for t in tables])
    return FeatureTable({name: x}, paths, labels, classes, tables[0].about)


def _check_shards(files: list[Path]) -> None:
    """Raises ValueError unless the files include all shards of each set; FileNotFoundError if one is not there."""
    sets: dict[tuple[str, str], list[Path]] = {}
    for file in files:
        if not (file.is_file() or file.is_dir()):
            raise FileNotFoundError(f'--features {file}: no such file; name a file that simsiam embed wrote')
        if found := SHARD.fullmatch(file.stem):
            sets.setdefault((found[1], found[3]), []).append(file)
    for (_, count), shards in sets.items():
        if len(shards) != int(count) or len(set(shards)) != len(shards):
            raise ValueError(
                f'--features: {len(shards)} shards such as {shards[0].name} are given, but there are {int(count)}; '
                'give each one once')


def _read_file(path: Path) -> FeatureTable:
    """Reads one file or folder; the table has one array. Raises ValueError if it is damaged or holds something else."""
    readers = {'.npz': _read_npz, '.npy': _read_npy, '.csv': _read_csv, '.parquet': _read_parquet,
               '.safetensors': _read_safetensors}
    read = _read_folder if path.is_dir() else readers.get(path.suffix)
    if read is None:
        raise ValueError(f'--features {path}: must be a folder, or a file that ends in {", ".join(SUFFIXES)}')
    if path.suffix == '.parquet':
        require(f'--features {path}', pyarrow='pyarrow')
    try:
        arrays, paths, labels, classes, about = read(path)
        x, = arrays.values()
        if not isinstance(about, dict) or not all(isinstance(v, str) for v in [*paths, *(classes or [])]):
            raise ValueError('its paths, classes or description are of another kind')
        if x.dtype.kind not in 'fiu' or labels is not None and np.asarray(labels).dtype.kind not in 'iu':
            raise ValueError(f'features of the type {x.dtype}, or labels that are no whole numbers')
        with np.errstate(over='ignore'):  # an overflow gives infinity, and the search refuses that
            x = x.astype(np.float32, copy=False)
        labels = None if labels is None else np.asarray(labels, np.int64)
        counts = {len(x), len(paths), *([] if labels is None else [len(labels)])}
        if x.ndim != 2 or counts != {len(x)} or not x.size or labels is not None and labels.ndim != 1:
            raise ValueError(f'features {x.shape}, {len(paths)} paths')
        if labels is not None and not 0 <= labels.min() <= labels.max() < len(classes or ()):
            raise ValueError(f'labels {labels.min()} to {labels.max()} of {len(classes or ())} classes')
    except MemoryError:
        raise ValueError(f'--features {path}: it needs more memory than is free') from None
    except OSError as e:
        if e.errno is not None:
            raise OSError(f'--features {path}: cannot be read ({e.strerror})') from None
        raise ValueError(f'--features {path}: damaged ({one_line(e)}); run simsiam embed again') from None
    # numpy, zipfile, zlib, pyarrow, csv and safetensors raise almost anything for damaged files.
    except Exception as e:
        raise ValueError(
            f'--features {path}: not as simsiam embed writes it, or damaged ({one_line(e)}); run simsiam embed again'
        ) from None
    return FeatureTable(dict(zip(arrays, [x], strict=True)), list(paths), labels, list(classes or []), about)


def _choose(names: Sequence[str]) -> str:
    if 'avgpool' not in names and len(names) != 1:
        raise ValueError(f'it must have avgpool or a single feature, but has {", ".join(names) or "none"}')
    return 'avgpool' if 'avgpool' in names else names[0]


def _read_npz(path: Path) -> _Parts:
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > EXPANSION * max(path.stat().st_size, 1 << 24):  # features shrink by far less
        raise ValueError(f'it would unpack to {size_text(size)}')
    with np.load(path) as table:
        name = _choose([key for key in table if key not in ('paths', 'labels', 'classes', 'about')])
        labelled = 'labels' in table
        return ({name: table[name]}, table['paths'].tolist(), table['labels'] if labelled else None,
                table['classes'].tolist() if labelled else None,
                json.loads(str(table['about'])) if 'about' in table else {})


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f'{path.name} is not there')
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _read_npy(path: Path) -> _Parts:
    rest = _read_json(path.with_suffix('.json'))
    array = {rest['feature']: np.load(path, mmap_mode='r')}
    return array, rest['paths'], rest.get('labels'), rest.get('classes'), rest['about']


def _read_folder(path: Path) -> _Parts:
    rest = _read_json(path / 'images.json')
    name = _choose([file.stem for file in sorted(path.glob('*.npy')) if file.stem != 'labels'])
    labels = np.load(path / 'labels.npy') if (path / 'labels.npy').is_file() else None
    return {name: np.load(path / f'{name}.npy', mmap_mode='r')}, rest['paths'], labels, rest['classes'], rest.get(
        'about', {})


def _read_csv(path: Path) -> _Parts:
    with open(path, newline='', encoding='utf-8', errors='surrogateescape') as f:
        table = csv.reader(f)
        header = next(table, [])
        columns = [_COLUMN.fullmatch(name) for name in header]
        name = _choose(list(dict.fromkeys(found[1] for found in columns if found)))
        start = header.index(f'{name}_0')
        stop = start + sum(found is not None and found[1] == name for found in columns)
        at, of = header.index('path'), header.index('class') if 'class' in header else None
        paths, names, rows = [], [], []
        for row in table:
            paths.append(restore_cell(row[at]))
            names += [] if of is None else [restore_cell(row[of])]
            rows.append(np.array(row[start:stop], np.float32))
    classes = sorted(set(names))
    number = {text: i for i, text in enumerate(classes)}
    return {name: np.stack(rows)}, paths, None if of is None else [number[text] for text in names], classes, {}


def _read_parquet(path: Path) -> _Parts:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        name = _choose([field.name for field in schema if field.name not in ('path', 'label', 'class')])
        labelled = 'class' in schema.names
        names = ['path', name, *(['class'] if labelled else [])]
        x = np.empty((file.metadata.num_rows, schema.field(name).type.list_size), np.float32)
        at, paths, texts = 0, list[str](), list[str]()
        for batch in file.iter_batches(columns=names):
            x[at:at + len(batch)] = batch[name].flatten().to_numpy().reshape(len(batch), -1)
            at += len(batch)
            paths += batch['path'].to_pylist()
            texts += batch['class'].to_pylist() if labelled else []
        about = json.loads((schema.metadata or {}).get(b'simsiam', b'{}'))
    classes = sorted(set(texts))
    number = {text: i for i, text in enumerate(classes)}
    return {name: x}, paths, [number[text] for text in texts] if labelled else None, classes, about


def _read_safetensors(path: Path) -> _Parts:
    with safe_open(str(path), 'np') as file:
        header = {key: json.loads(text) for key, text in (file.metadata() or {}).items()
                  if key in ('paths', 'classes', 'about')}
        name = _choose([key for key in file.keys() if key != 'labels'])
        labels = file.get_tensor('labels') if 'labels' in file.keys() else None
        return {name: file.get_tensor(name)}, header['paths'], labels, header['classes'], header['about']
