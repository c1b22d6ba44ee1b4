"""Reads and writes checkpoints, which are always complete or absent.

checkpoint.pth is the newest, checkpoint_previous.pth the one before it (then checkpoint_previous_2.pth, ... with
--keep-last), and checkpoint_epoch0010.pth the one after epoch 10 with --keep-every 10. Only rank 0 touches them.
"""
import errno
import glob
import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .files import replacing, write_synced

LAST = 'checkpoint.pth'
# What zipfile raises if the bytes are not those that were written.
DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, LookupError, OverflowError, NotImplementedError,
    RuntimeError)


class DamagedError(ValueError):
    """The bytes of a checkpoint are not those that were written."""


def checkpoint_names(newest: Path, n: int) -> list[Path]:
    """Returns the names of the n newest checkpoints, newest first."""
    older = [newest.with_stem(f'{newest.stem}_previous' + (f'_{i}' if i > 1 else '')) for i in range(1, n)]
    return [newest, *older]


def save(newest: Path, state: dict[str, Any], keep_last: int = 2, keep_as_epoch: int = 0) -> None:
    """Writes `state` as the newest checkpoint and renames the older ones; `keep_as_epoch` also keeps it for good.

    A kill at any moment loses at most this checkpoint.

    Raises:
        OSError: it cannot be written; the older ones stay as they are.
    """
    with replacing(newest) as part:
        write_synced(part, lambda f: torch.save(state, f))
        if keep_as_epoch:
            _link(part, newest.with_stem(f'{newest.stem}_epoch{keep_as_epoch:04}'))
        names = checkpoint_names(newest, keep_last)
        for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
            if newer.exists():
                os.replace(newer, older)


def _link(path: Path, name: Path) -> None:
    """Gives a file a second name, without copying it if the file system can."""
    with replacing(name) as part:
        part.unlink(missing_ok=True)
        try:
            os.link(path, part)
        except OSError:
            shutil.copyfile(path, part)


def read(path: Path, keys: set[str]) -> dict[str, Any]:
    """Reads a checkpoint and verifies every byte of it.

    Args:
        keys: entries that the checkpoint must have.

    Raises:
        DamagedError: it is torn or damaged.
        ValueError: it is a checkpoint of another program.
        OSError, MemoryError: it cannot be read now, which says nothing about its bytes.
    """
    try:
        with open(path, 'rb') as f:
            if damage := _find_damage(f):
                raise DamagedError(f'{path} cannot be read: it is damaged, or not a checkpoint ({damage})')
            f.seek(0)
            state = _load(f)
    except OSError as e:
        raise type(e)(f'{path} cannot be read ({e.strerror or e}); nothing is changed, so try again later') from None
    except MemoryError:
        raise MemoryError(f'not enough memory to read {path}; nothing is changed') from None
    if not isinstance(state, dict) or not state.keys() >= keys:
        raise ValueError(f'{path} is not a checkpoint of this program')
    return state


class _Reader:
    """A file that remembers why reading it failed: zipfile mistakes some disk errors for damage."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def read(self, *n: int) -> bytes:
        try:
            return self.file.read(*n)
        except OSError as e:
            self.error = e
            raise


def _find_damage(f: BinaryIO) -> str:
    """Describes the damage in the archive; returns '' if there is none. torch.load alone may accept damaged numbers."""
    reader = _Reader(f)
    try:
        with zipfile.ZipFile(reader) as archive:
            damage = '' if archive.testzip() is None else 'a checksum differs'
    except DAMAGE as e:
        damage = type(e).__name__
    except OSError as e:
        if e.errno != errno.EINVAL:  # the bytes name a position that no file has
            raise
        damage = type(e).__name__
    if reader.error is not None:
        raise reader.error
    return damage


def _load(f: BinaryIO) -> Any:
    """Loads an archive whose bytes are intact; returns None if torch cannot read it."""
    try:
        return torch.load(f, map_location='cpu', weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as e:  # torch.load raises RuntimeError, KeyError, ... on an archive of another program
        if 'memory' in str(e):  # torch's allocator raises RuntimeError
            raise MemoryError from None
        return None


def load(
    newest: Path, keys: set[str], say: Callable[[str], Any] = print, start_over: str = 'give another --output',
) -> tuple[Path, dict[str, Any]] | None:
    """Returns the path and the content of the newest undamaged checkpoint, or None if there is no checkpoint.

    Damaged ones are reported and set aside (.torn), so that no later rename puts one in the place of a good one.

    Args:
        start_over: what the error tells users to do to start again.

    Raises:
        ValueError: all checkpoints are damaged, or one is of another program.
        OSError, MemoryError: one cannot be read now; nothing is set aside.
    """
    stem, suffix = glob.escape(newest.stem), newest.suffix
    previous = newest.parent.glob(f'{stem}_previous_*{suffix}')
    found = [*checkpoint_names(newest, 2), *sorted(previous, key=lambda p: (len(p.name), p.name))]
    found += sorted(newest.parent.glob(f'{stem}_epoch*{suffix}'), reverse=True)
    damaged: list[Path] = []
    for path in found:
        if not path.exists():
            continue
        try:
            state = read(path, keys)
        except DamagedError as e:
            say(f'{e}; trying the previous one')
            damaged.append(path)
            continue
        except ValueError as e:
            raise ValueError(f'{e}; {start_over}') from None
        if damaged:
            say(f'continuing from {path}')
        for bad in damaged:
            _set_aside(bad)
        return path, state
    if damaged:
        raise ValueError(f'{damaged[0]} cannot be read, and there is no other checkpoint; {start_over}')
    return None


def _set_aside(path: Path) -> None:
    try:
        os.replace(path, path.with_name(path.name + '.torn'))
    except OSError:  # read-only: then nothing overwrites the good ones either
        pass


def find_differences(old: dict[str, Any], new: dict[str, Any], free: Set[str] = frozenset()) -> str:
    """Returns 'key: old there, new here; ...' for the keys outside `free` that differ, or '' if none do."""
    old, new = _flatten(old), _flatten(new)
    keys = [k for k in sorted({*old, *new}) if k not in free and old.get(k) != new.get(k)]
    return '; '.join(f'{k}: {old.get(k)} there, {new.get(k)} here' for k in keys)


def _flatten(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the record as JSON would, with the augmentation's numbers moved to the top level."""
    record = json.loads(json.dumps(record))
    augmentation = record.pop('augmentation', None) or {}
    return {**record, **augmentation}
