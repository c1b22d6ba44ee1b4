"""Names of shards: expands patterns, lists folders, and tells training files from validation files."""
import glob
import os
import re
from contextlib import suppress
from pathlib import Path

from ...runtime.messages import announce
from .names import TEST, find_part, is_passed_over, part_of

TABLES = ('.parquet', '.arrow')


MOST = 10**6  # names that a pattern stands for


def expand_braces(pattern: str) -> list[str]:
    """Expands `shards-{000..009}.tar` and `{a,b}.tar` to all names, of which there may be MOST."""
    braces = re.search(r'\{([^{}]*(?:\.\.|,)[^{}]*)\}', pattern)
    if braces is None:
        return [pattern]
    numbers, words = re.fullmatch(r'([0-9]+)\.\.([0-9]+)', braces[1]), braces[1].split(',')
    if numbers is not None:
        first, last = int(numbers[1]), int(numbers[2])
        if last < first or last - first >= MOST:
            raise ValueError(f'{pattern}: {braces[0]} is not a shard range; use {{FIRST..LAST}}, such as {{000..009}}')
        words = [str(i).zfill(len(numbers[1])) for i in range(first, last + 1)]
    found: list[str] = []
    for word in words:
        found += expand_braces(pattern[:braces.start()] + word + pattern[braces.end():])
        if len(found) > MOST:
            raise ValueError(f'{pattern}: it stands for more than {MOST:,} names')
    return found


def expand_pattern(pattern: str) -> list[Path]:
    """Returns the files of a pattern with {} or *; those that match * are sorted."""
    return [Path(path) for name in expand_braces(pattern) for path in (
        sorted(glob.glob(name)) if glob.has_magic(name) else [name])]


def list_shards(folder: Path, suffix: str) -> list[Path]:
    """Returns the sorted files with this suffix in `folder`, or else in its subfolder data, as in repositories."""
    for place in (folder, folder / 'data'):
        names = []
        with suppress(OSError):
            names = sorted(n for n in os.listdir(place) if n.lower().endswith(suffix) and not is_passed_over(n))
        if found := [place / name for name in names if (place / name).is_file()]:
            return found
    return []


def list_tables(folder: Path) -> list[Path]:
    """Returns the Parquet files of `list_shards`, or else the Arrow files."""
    return list_shards(folder, TABLES[0]) or list_shards(folder, TABLES[1])


def split_by_name(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Separates files such as train-00000.tar and validation-00000.tar: (training, validation).

    If no name contains train, all files that tell no other part are training data, or else all files are. Validation
    files go before test files. Logs which files are left out, or are taken for training data.
    """
    train, val = ([file for file in files if part_of(file.name) == part] for part in ('train', 'val'))
    plain = [file for file in files if not part_of(file.name)]
    if not train and not plain:
        return files, []
    best = [file for file in val if (found := find_part(file.name)) and found[1] not in TEST] or val
    if not train and val:
        announce(f'{plain[0].parent}: training on the {len(plain)} files whose names tell no part, such as '
                 f'{plain[0].name}, and not on {len(val)} such as {val[0].name}')
    elif train and (others := sorted({*files} - {*train, *best})):
        announce(f'{others[0].parent}: skipped {len(others)} files, whose names are neither like {train[0].name} '
                 f'nor like {best[0].name if best else "validation"}; the first is {others[0].name}')
    return train or plain, best
