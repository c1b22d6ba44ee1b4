"""Finds the parts of a data set in its folders: training and validation images, or classes alone."""
import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ..runtime.messages import announce, name_some
from .readers.names import PARTS, choose_parts, find_part, is_image, is_passed_over, part_of

LONG = 10_000  # entries of a folder that are looked at; a longer one has images or classes, and parts as in PARTS
INNER = ('images', 'image', 'imgs', 'img', 'data')  # names of a folder in a part that say nothing about a class


def find_parts(root: Path) -> tuple[Path, Path | None, Path | None]:
    """Returns the folder that holds the data, its training part, and its validation part (without one, its test part).

    If all images lie in one folder below `root`, at any depth, that one is the folder. Without a training part the
    subfolders are classes. Logs what is looked through and what is left out. Raises ValueError if parts and classes
    cannot be told apart.
    """
    at = _look_through(root)
    if at != root:
        announce(f'{root}: all its images are in {at}')
    folders, loose = list_entries(at)
    parts = choose_parts(folders)
    named = [name for names in parts.values() for name in names]
    others = [name for name in folders if named and name not in named and holds_images(at / name)]
    if 'train' not in parts:
        _check_classes(at, named, others)
        return at, None, None
    for first, *more in parts.values():
        words = [found[1] for name in (first, *more[:1]) if (found := find_part(name))]
        if len(words) == 2 and words[0] == words[1]:
            raise ValueError(f'{at}: {first} and {more[0]} may both be the same part; rename or remove one of them')
    used = [names[0] for part in PARTS if (names := parts.get(part))]
    if others and len(used) == 1 and list_entries(at / used[0])[1]:
        raise ValueError(
            f'{at}: {used[0]} may be the training part, or a class like {name_some(others)}; give {at / used[0]} '
            'itself to train on it alone, or give that class another name')
    if unused := [*(name for name in named if name not in used), *others, *loose[:1]]:
        announce(f'{at}: {" and ".join(used)} {"is" if len(used) == 1 else "are"} used, and these are left out: '
                 f'{name_some(unused)}')
    train, *val = (_look_through_part(at / name) for name in used)
    return at, train, val[0] if val else None


def _look_through(root: Path) -> Path:
    """Returns the folder, at any depth, that alone holds images and divides them into parts or classes; else `root`."""
    at = root
    while True:
        folders, loose = list_entries(at)
        if loose or 'train' in choose_parts(folders):
            return root if loose else at
        holding = _find_two(at, folders)
        if len(holding) != 1:
            return at if holding else root
        at /= holding[0]


def _look_through_part(part: Path) -> Path:
    """Returns the folder in `part` that alone holds its class folders and is no class by its name; else `part`."""
    folders, loose = list_entries(part)
    holding = [] if loose else _find_two(part, folders)
    if len(holding) == 1 and (holding[0].lower() in INNER or part_of(holding[0]) == part_of(part.name)):
        inside = part / holding[0]
        folders, loose = list_entries(inside)
        if not loose and len(_find_two(inside, folders)) == 2:
            announce(f'{part}: all its images are in {inside}')
            return inside
    return part


def _check_classes(root: Path, named: list[str], others: list[str]) -> None:
    """Raises ValueError if folders that are named as parts cannot be classes; `others`: folders beside them."""
    if not named or len(named) == 1 and not others:
        return
    if len(named) > 1 or not list_entries(root / named[0])[1]:
        raise ValueError(
            f'{root}: {name_some(named)} may be parts of a data set, but none is the training part; call that one '
            f'train, or give {root / named[0]} itself, or give classes other names')
    announce(f'{root}: {named[0]} is treated as a class like {name_some(others)}, as there is no training part')


def list_entries(folder: Path) -> tuple[list[str], list[str]]:
    """Returns the sorted names of folders and of images in `folder`, among its first LONG entries."""
    entries = list(itertools.islice(_scan(folder), LONG))
    folders = {name for name, is_folder in entries if is_folder}
    if len(entries) == LONG:
        folders |= {name for names in PARTS.values() for name in names if (folder / name).is_dir()}
    return sorted(folders), sorted(name for name, is_folder in entries if not is_folder and is_image(name))


def holds_images(folder: Path) -> bool:
    """Returns whether an image lies in `folder` or below it."""
    waiting, seen = [folder], set()
    while waiting:
        at = waiting.pop()
        with suppress(OSError):
            status = os.stat(at)
            if (status.st_dev, status.st_ino) in seen:  # a link to a folder above it
                continue
            seen.add((status.st_dev, status.st_ino))
        for name, is_folder in _scan(at):
            if is_folder:
                waiting.append(at / name)
            elif is_image(name):
                return True
    return False


def _find_two(folder: Path, names: Iterable[str]) -> list[str]:
    """Returns the first two of these folders that hold images, or as many as do."""
    return list(itertools.islice((name for name in names if holds_images(folder / name)), 2))


def _scan(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yields the names that are not passed over, and whether they are folders; nothing for an unreadable folder."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not is_passed_over(entry.name):
                is_folder = False
                with suppress(OSError):  # a link to itself, or to a place that is out of reach
                    is_folder = entry.is_dir()
                yield entry.name, is_folder
