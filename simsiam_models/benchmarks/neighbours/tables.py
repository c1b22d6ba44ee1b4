"""Tables as CSV or Parquet files, by the suffix of their names."""
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...runtime.files import explain_write_errors, replacing, write_csv
from ...runtime.messages import require

SUFFIXES = ('.csv', '.parquet')
BLOCK = 100_000  # rows of a Parquet file that are written at a time


def check_table(path: Path) -> None:
    """Raises ValueError if `path` has another suffix, RuntimeError if pyarrow is missing for .parquet."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f'--output {path}: must be a file that ends in {" or ".join(SUFFIXES)}')
    if path.suffix == '.parquet':
        require(f'--output {path}', pyarrow='pyarrow')


def write_rows(path: Path, columns: dict[str, str], rows: Iterable[tuple[Any, ...]]) -> None:
    """Writes rows of cells; `columns`: name -> type as Arrow calls it, string, int64 or float64.

    Raises OSError if the file cannot be written.
    """
    with explain_write_errors(path, '--output'):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == '.csv':
            write_csv(path, itertools.chain([columns], rows))
        else:
            _write_parquet(path, columns, iter(rows))


def _write_parquet(path: Path, columns: dict[str, str], rows: Iterable[tuple[Any, ...]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])
    with replacing(path) as part, parquet.ParquetWriter(part, schema) as writer:
        while block := list(itertools.islice(rows, BLOCK)):
            writer.write_table(pa.table([list(cells) for cells in zip(*block, strict=True)], schema=schema))
