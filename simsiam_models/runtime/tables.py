"""Writes tables as CSV, JSON or Parquet, by the ending of the file, with the same columns in each."""
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .files import explain_write_errors, replacing, write_csv, write_json
from .messages import as_text, require

FORMATS = ('.csv', '.json', '.parquet')
BLOCK = 100_000  # rows of a Parquet file that are written at a time

Columns = dict[str, type]  # name -> str, int or float


def check_table(path: Path, flag: str = '--output') -> None:
    """Raises ValueError if the extension is not in FORMATS, RuntimeError if Parquet's library is missing."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f'{flag} {path}: the file name must end in one of {", ".join(FORMATS)}')
    if path.is_dir():
        raise ValueError(f'{flag} {path} is a folder; name a file in it')
    if path.suffix.lower() == '.parquet':
        require(f'{flag} {path}', pyarrow='pyarrow')


def write_table(path: Path, columns: Columns, rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows of cells; None is an empty cell.

    Text that is not valid Unicode, such as some file names, keeps its bytes in a CSV and gets replacement characters in
    JSON and Parquet, which hold only Unicode. A cell of a CSV that a spreadsheet would take for a formula becomes text.
    JSON is a list of objects.

    Raises:
        OSError: the file cannot be written.
    """
    with explain_write_errors(path, '--output'):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == '.csv':
            write_csv(path, itertools.chain([columns], rows))
            return
        rows = ([as_text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
        if path.suffix.lower() == '.json':
            write_json(path, [dict(zip(columns, row, strict=True)) for row in rows])
        else:
            _write_parquet(path, columns, rows)


def _write_parquet(path: Path, columns: Columns, rows: Iterator[Sequence[Any]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    types = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    with replacing(path) as part, parquet.ParquetWriter(part, schema) as writer:
        while block := list(itertools.islice(rows, BLOCK)):
            writer.write_table(pa.table([list(cells) for cells in zip(*block, strict=True)], schema=schema))


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns lines of aligned columns below their names."""
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return '\n'.join('  '.join(f'{cell:{w}}' for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
