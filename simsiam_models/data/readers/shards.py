"""Names of shards: expands patterns, lists folders, and tells training files from validation files."""
import glob
import os
import re
from contextlib import suppress
from pathlib import Path

TABLES = ('.parquet', '.arrow')
VALIDATION = ('validation', 'val', 'valid', 'test')  # in order of preference


def expand_braces(pattern: str) -> list[str]:
    """Expands `shards-{000..009}.tar` and `{a,b}.tar` to all names."""
    braces = re.search(r'\{([^{}]*(?:\.\.|,)[^{}]*)\}', pattern)
    if braces is None:
        return [pattern]
    numbers, words = re.fullmatch(r'([0-9]+)\.\.([0-9]+)', braces[1]), braces[1].split(',')
    if numbers is not None:
        first, last = int(numbers[1]), int(numbers[2])
        if last < first or last - first >= 10**6:
            raise ValueError(f'{pattern}: {braces[0]} counts no shards; use {{FIRST..LAST}}, such as {{000..009}}')
        words = [str(i).zfill(len(numbers[1])) for i in range(first, last + 1)]
    return [name for word in words for name in expand_braces(pattern[:braces.start()] + word + pattern[braces.end():])]


def expand_pattern(pattern: str) -> list[Path]:
    """Returns the files of a pattern with {} or *; those that match * are sorted."""
    return [Path(path) for name in expand_braces(pattern) for path in (
        sorted(glob.glob(name)) if glob.has_magic(name) else [name])]


def list_shards(folder: Path, suffix: str) -> list[Path]:
    """Returns the sorted files with this suffix in `folder`, or else in its subfolder data, as in repositories."""
    for place in (folder, folder / 'data'):
        names = []
        with suppress(OSError):
            names = sorted(n for n in os.listdir(place) if n.lower().endswith(suffix) and not n.startswith('.'))
        if found := [place / name for name in names if (place / name).is_file()]:
            return found
    return []


def list_tables(folder: Path) -> list[Path]:
    """Returns the Parquet files of `list_shards`, or else the Arrow files."""
    return list_shards(folder, TABLES[0]) or list_shards(folder, TABLES[1])


def split_by_name(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Separates files such as train-00000.tar and validation-00000.tar: (training, validation).

    If no name contains train, all files are training data. Otherwise, files of neither kind are left out.
    """
    words = {file: set(re.split(r'[^a-z]+', file.name.lower())) for file in files}
    train = [file for file in files if 'train' in words[file]]
    if not train:
        return files, []
    val, test = ([file for file in files if 'train' not in words[file] and not words[file].isdisjoint(names)]
                 for names in (VALIDATION[:3], VALIDATION[3:]))
    return train, val or test
