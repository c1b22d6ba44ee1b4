"""Opens the images that a command line names: files, folders, patterns and lists, in their order.

Anything else is opened as in the other commands (tar shards, Parquet, hf:REPO, ...), with all its parts.
"""
import dataclasses
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data import open_parts
from ..data.readers.images import FileImages, Images, name_of, open_files
from ..data.readers.index import Index, open_index
from ..data.readers.labels import split_choice
from ..data.readers.lists import CSV_SUFFIXES, TEXT_SUFFIXES, ListImages
from ..data.readers.names import EXTENSIONS, is_image
from ..data.readers.shards import TABLES
from ..data.readers.tars import COMPRESSED
from ..runtime.messages import announce, guess_path

ARCHIVES = ('.tar', *TABLES, *COMPRESSED)
SOURCE = re.compile(r'(hf|hf-stream|torchvision|pipe|https?):')  # of what is no path
FORMS = 'files, folders, quoted glob patterns, lists (.txt, .csv), tar shards or Parquet files'


class Inputs:
    """The images of several sources, one source after the other. `read` may be called from any thread."""

    def __init__(self, sources: Sequence[Images]) -> None:
        self.sources = list(sources)
        self.starts = np.cumsum([0, *map(len, self.sources)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _find(self, row: int) -> tuple[Images, int]:
        at = int(np.searchsorted(self.starts, row, 'right')) - 1
        return self.sources[at], row - int(self.starts[at])

    def read(self, row: int) -> np.ndarray:
        """Returns (H, W, 3) uint8, RGB; raises UnreadableError if the image cannot be read or decoded."""
        images, at = self._find(row)
        return images.read(at)

    def name_of(self, row: int) -> str:
        """Returns the path of an image as the user would write it, or the name of one that is not a file."""
        return name_of(*self._find(row))


def open_inputs(specs: Sequence[str]) -> Inputs:
    """Opens images; see the module. Logs which files are skipped.

    Raises:
        FileNotFoundError: there is no such file or folder, or no image in it.
        ValueError, DataError, OSError: a list or an archive cannot be used; the message says why.
    """
    sources, files = list[Images](), list[str]()
    for spec in specs:
        if _is_single(spec):
            files.append(spec)
            continue
        if files:
            sources.append(open_files(files, ''))
            files = []
        sources += _open_spec(spec)
    return Inputs([*sources, *([open_files(files, '')] if files else [])])


def _is_single(spec: str) -> bool:
    """Returns whether this is one image file, also one with an unknown extension."""
    return os.path.isfile(spec) and not spec.lower().endswith((*TEXT_SUFFIXES, *CSV_SUFFIXES, *ARCHIVES))


def _open_spec(spec: str) -> list[Images]:
    text, choice = split_choice(spec)
    if os.path.isdir(text):
        index = _list_folder(text)
        return [FileImages(Path(text), index, text)] if len(index) else _open_parts(spec)
    if os.path.isfile(text) and text.lower().endswith((*TEXT_SUFFIXES, *CSV_SUFFIXES)):
        return [ListImages(text, choice)]
    if os.path.isfile(text) or SOURCE.match(text) or text.lower().endswith(ARCHIVES):
        return _open_parts(spec)
    if glob.has_magic(spec):
        return [_open_pattern(spec)]
    raise FileNotFoundError(f'{spec}: no such file or folder; {guess_path(spec) or "IMAGES can be " + FORMS}')


def _list_folder(folder: str) -> Index:
    """Lists all images below a folder. Of the notes, those about labels say nothing here."""
    index = open_index(folder, EXTENSIONS)
    skipped = [note for note in index.notes if note.partition(':')[0].endswith((', skipped', ', not followed'))]
    return dataclasses.replace(index, notes=skipped)


def _open_pattern(pattern: str) -> FileImages:
    """Opens the images among the files that match, and those in folders that match, each image once."""
    found: dict[str, None] = {}
    others = 0
    for match in sorted(glob.iglob(pattern, recursive=True)):
        if os.path.isdir(match):
            index = _list_folder(match)
            found |= dict.fromkeys(os.path.join(match, os.fsdecode(index.path(i))) for i in range(len(index)))
        elif is_image(match):
            found[match] = None
        else:
            others += 1
    if not found:
        what = f'matches {others} files, but no image' if others else 'matches no file'
        raise FileNotFoundError(f'{pattern}: this pattern {what}; IMAGES can be {FORMS}')
    if others:
        announce(f'{pattern}: files without an image extension, skipped: {others:,}')
    return open_files(list(found), pattern)


def _open_parts(spec: str) -> list[Images]:
    train, val, unusable = open_parts(spec)
    if hasattr(train, 'samples'):
        raise ValueError(f'{spec}: a stream cannot be read at random; download it and give its files instead')
    return [train, *([] if val is None else [val]), *([unusable.images] if unusable else [])]
