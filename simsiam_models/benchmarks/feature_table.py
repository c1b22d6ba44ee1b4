"""Tables of features with the paths and labels of their images, in the formats of other tools.

    .npz           arrays: each feature, paths, labels, classes, and about (JSON)
    .npy           the matrix of one feature; the rest is in a .json file of the same name
    .csv           columns path, label, class, and FEATURE_0, FEATURE_1, ...
    .parquet       columns path, label, class, and each feature as a list of floats
    .safetensors   tensors: each feature and labels; paths, classes and about are JSON in the header

`about` says which model computed the features, and at which size; a .csv file has no place for it.
"""
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..runtime.distributed import World
from ..runtime.files import explain_write_errors, replacing, write_atomically, write_csv
from ..runtime.messages import require
from ..weights import tensorfile

SUFFIXES = ('.npz', '.npy', '.csv', '.parquet', '.safetensors')
ROW_GROUP = 4096  # rows of a Parquet file that are written, and later read, at a time
MAX_HEADER = 90_000_000  # bytes of text in a safetensors file, whose readers refuse headers of 100 MB


class FeatureTable(NamedTuple):
    """Features of named images, a row for each."""

    arrays: dict[str, np.ndarray]  # (N, D) float32 for each feature; may be mapped from files
    paths: list[str]
    labels: np.ndarray | None  # (N,) int64
    classes: list[str]
    about: dict[str, Any]  # model, weights (their digest), data, image_size, resize

    def part(self, rows: slice) -> 'FeatureTable':
        arrays = {name: x[rows] for name, x in self.arrays.items()}
        return self._replace(
            arrays=arrays, paths=self.paths[rows], labels=None if self.labels is None else self.labels[rows])


def check_format(path: Path, features: int) -> None:
    """Raises ValueError if `path` has another suffix or cannot hold that many features, RuntimeError without pyarrow.

    A path without a suffix is a folder.
    """
    if path.suffix not in ('', *SUFFIXES):
        raise ValueError(f'--output {path}: must be a folder, or a file that ends in {", ".join(SUFFIXES)}')
    if path.suffix == '' and path.is_file():
        raise ValueError(f'--output {path} is a file; name a folder, or a file that ends in {", ".join(SUFFIXES)}')
    if path.suffix == '.npy' and features > 1:
        raise ValueError(f'--output {path}: a .npy file holds one feature, not {features}; name a folder or a .npz')
    if path.suffix == '.parquet':
        require(f'--output {path}', pyarrow='pyarrow')


def write_table(path: Path, table: FeatureTable) -> None:
    """Writes a table in the format of the suffix; `check_format` says which there are.

    Raises:
        ValueError: the paths are too long for a .safetensors file.
        OSError: the file cannot be written.
    """
    writers = {
        '': _write_folder, '.npz': _write_npz, '.npy': _write_npy, '.csv': _write_csv, '.parquet': _write_parquet,
        '.safetensors': _write_safetensors}
    with explain_write_errors(path, '--output'):
        (path if path.suffix == '' else path.parent).mkdir(parents=True, exist_ok=True)
        writers[path.suffix](path, table)


def write_shards(path: Path, table: FeatureTable, world: World) -> list[Path]:
    """Writes a Parquet file for each process, NAME-00000-of-00008.parquet; each holds consecutive rows.

    Returns the files, whose order is that of the rows.

    Raises:
        ValueError: there are shards of another number of processes, which readers of NAME-*.parquet would take, too.
    """
    files = [path.with_name(f'{path.stem}-{i:05}-of-{world.size:05}.parquet') for i in range(world.size)]
    left = [str(file) for file in path.parent.glob('*-of-*.parquet')
            if file.name.startswith(f'{path.stem}-') and file not in files]
    world.broadcast_from_main(lambda: _refuse_left(left, world.size))
    ends = [len(table.paths) * i // world.size for i in (world.rank, world.rank + 1)]
    world.all_or_none(lambda: write_table(files[world.rank], table.part(slice(*ends))))
    return files


def _refuse_left(left: list[str], processes: int) -> None:
    if left:
        raise ValueError(
            f'{sorted(left)[0]}: {len(left)} older shards are there that {processes} processes would not replace; '
            'remove them, or choose another --output')


def _write_folder(path: Path, table: FeatureTable) -> None:
    for name, x in table.arrays.items():
        _write_array(path / f'{name}.npy', x)
    if table.labels is not None:
        _write_array(path / 'labels.npy', table.labels)
    _write_text(path / 'images.json', {'paths': table.paths, 'classes': table.classes, 'about': table.about})


def _write_array(path: Path, x: np.ndarray) -> None:
    write_atomically(path, lambda f: np.lib.format.write_array(f, x))


def _write_text(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, ensure_ascii=False)
    write_atomically(path, lambda f: f.write(text.encode()))


def _write_npz(path: Path, table: FeatureTable) -> None:
    arrays = {} if table.labels is None else {'labels': table.labels, 'classes': np.array(table.classes)}
    arrays |= {'paths': np.array(table.paths), 'about': np.array(json.dumps(table.about)), **table.arrays}
    save: Callable[..., None] = np.savez
    write_atomically(path, lambda f: save(_Seekless(f), **arrays))


class _Seekless:
    """A file that cannot seek, so zipfile writes its members one after the other."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: Any) -> int:
        self.file.write(data)
        return memoryview(data).nbytes

    def read(self, n: int = -1) -> bytes:
        raise OSError('the file is write-only')

    def flush(self) -> None:
        self.file.flush()


def _write_npy(path: Path, table: FeatureTable) -> None:
    (name, x), = table.arrays.items()
    _write_array(path, x)
    labels = {} if table.labels is None else {'labels': table.labels.tolist(), 'classes': table.classes}
    _write_text(path.with_suffix('.json'), {'feature': name, 'paths': table.paths, **labels, 'about': table.about})


def _name_classes(table: FeatureTable) -> list[str]:
    return [table.classes[i] for i in np.asarray(table.labels).tolist()]


def _write_csv(path: Path, table: FeatureTable) -> None:
    def list_rows() -> Iterator[list[Any]]:
        labels, labelled = np.asarray(table.labels), table.labels is not None
        names = [f'{name}_{i}' for name, x in table.arrays.items() for i in range(x.shape[1])]
        yield ['path', *(['label', 'class'] if labelled else []), *names]
        for i, text in enumerate(table.paths):
            values = [value for x in table.arrays.values() for value in x[i]]  # of numpy: 0.1, not 0.10000000149
            yield [text, *([labels[i], table.classes[labels[i]]] if labelled else []), *values]

    write_csv(path, list_rows())


def _write_parquet(path: Path, table: FeatureTable) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns = [('path', pa.string())]
    columns += [] if table.labels is None else [('label', pa.int64()), ('class', pa.string())]
    columns += [(name, pa.list_(pa.float32(), x.shape[1])) for name, x in table.arrays.items()]
    schema = pa.schema(columns, {'simsiam': json.dumps(table.about)})
    with replacing(path) as part, parquet.ParquetWriter(part, schema) as writer:
        for start in range(0, len(table.paths), ROW_GROUP):
            some = table.part(slice(start, start + ROW_GROUP))
            cells = [some.paths, *([] if some.labels is None else [some.labels, _name_classes(some)])]
            cells += [
                pa.FixedSizeListArray.from_arrays(np.asarray(x).ravel(), x.shape[1]) for x in some.arrays.values()]
            writer.write_table(pa.table(cells, schema=schema))


def _write_safetensors(path: Path, table: FeatureTable) -> None:
    texts = {'paths': table.paths, 'classes': table.classes, 'about': table.about}
    header = {key: json.dumps(value) for key, value in texts.items()}
    if sum(map(len, header.values())) > MAX_HEADER:
        raise ValueError(f'--output {path}: {len(table.paths):,} paths are too long for its header; use .parquet')
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in table.arrays.items()}
    tensors |= {} if table.labels is None else {'labels': torch.from_numpy(table.labels)}
    tensorfile.write(path, tensors, **header)
