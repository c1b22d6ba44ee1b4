"""Which files a folder or a pattern of shards means."""
import glob
import os
import re
from pathlib import Path


def expand_braces(pattern: str) -> list[str]:
    """`shards-{000..009}.tar` and `{a,b}.tar` -> each name."""
    braces = re.search(r'\{([^{}]*(?:\.\.|,)[^{}]*)\}', pattern)
    if braces is None:
        return [pattern]
    numbers, words = re.fullmatch(r'([0-9]+)\.\.([0-9]+)', braces[1]), braces[1].split(',')
    if numbers is not None:
        first, last = int(numbers[1]), int(numbers[2])
        if last < first or last - first >= 10**6:
            raise ValueError(f'{pattern}: {braces[0]} counts no shards; write {{FIRST..LAST}}, as in {{000..009}}')
        words = [str(i).zfill(len(numbers[1])) for i in range(first, last + 1)]
    return [name for word in words for name in expand_braces(pattern[:braces.start()] + word + pattern[braces.end():])]


def expand(pattern: str) -> list[Path]:
    """The files of a pattern with {} or *; those that * stands for are sorted."""
    return [Path(path) for name in expand_braces(pattern) for path in (
        sorted(glob.glob(name)) if glob.has_magic(name) else [name])]


def shard_files(folder: Path, suffix: str) -> list[Path]:
    """The files of that suffix in `folder`, or else in its folder data, where repositories have them; sorted."""
    for place in (folder, folder / 'data'):
        try:
            names = sorted(os.listdir(place))
        except OSError:
            continue
        names = [name for name in names if name.lower().endswith(suffix) and not name.startswith('.')]
        if found := [place / name for name in names if (place / name).is_file()]:
            return found
    return []


def split_files(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """By their names, as in train-00000.tar and validation-00000.tar: (training, validation).

    Where no name says train, all files are training data; else those that say neither are left out.
    """
    words = {file: set(re.split(r'[^a-z]+', file.name.lower())) for file in files}
    train = [file for file in files if 'train' in words[file]]
    if not train:
        return files, []
    rest = [file for file in files if 'train' not in words[file]]
    for names in ({'validation', 'val', 'valid'}, {'test'}):
        if val := [file for file in rest if words[file] & names]:
            return train, val
    return train, []
