"""The run's folder: whose it is, and checkpoints that are either whole or not there.

checkpoint.pth is the newest, checkpoint_previous.pth the one before it (with --keep-last checkpoint_previous_2.pth, ...
too), checkpoint_epoch0010.pth the one after epoch 10 with --keep-every 10, checkpoint_healthy.pth the last one before
the outputs collapsed, if they did. Only rank 0 touches the folder.
"""
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .files import sync_folder, write_atomically, write_synced

ARGS, LAST, PREVIOUS, LOG, BACKBONE = 'args.json', 'checkpoint.pth', 'checkpoint_previous.pth', 'log.jsonl', 'backbone'
UNREADABLE, HEALTHY = 'unreadable.txt', 'checkpoint_healthy.pth'
KEYS = {'model', 'optimizer', 'scaler', 'epoch', 'step', 'knn', 'run', 'processes', 'healthy'}


def differences(old: dict[str, Any], new: dict[str, Any], free: set[str]) -> str:
    """'key: old there, new here; ...' for the keys outside `free` that differ; '' where none does."""
    old, new = _flat(old), _flat(new)
    keys = [k for k in sorted({*old, *new}) if k not in free and old.get(k) != new.get(k)]
    return '; '.join(f'{k}: {old.get(k)} there, {new.get(k)} here' for k in keys)


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, the augmentation's numbers beside the others."""
    record = json.loads(json.dumps(record))
    return {**record, **(record.pop('augmentation', None) or {})}


def claim_folder(
    folder: Path, args: dict[str, Any], free: set[str], fresh: bool = False) -> dict[str, Any] | None:
    """Make the folder this run's, or find that it was already: then its recorded arguments are returned.

    `free` names the arguments that may differ between a run and its continuation; `fresh` refuses to continue one.

    Raises:
        ValueError: the folder holds another run, or files of an unknown one; nothing in it is touched.
    """
    record = folder / ARGS
    if fresh and record.exists():
        raise ValueError(f'{folder} holds a run, and --resume never does not continue it; give another --output')
    if record.exists():
        try:
            old = json.loads(record.read_text())
        except ValueError:
            raise ValueError(f'{record} is not readable; give another --output, or remove the folder') from None
        said = differences(old, args, free)
        if said:
            raise ValueError(f'{folder} holds another run ({said}); give another --output')
        return old
    taken = [n for n in (LAST, PREVIOUS, LOG, BACKBONE) if (folder / n).exists()]
    if taken:
        raise ValueError(f'{folder} holds {", ".join(taken)} of an unknown run; give another --output')
    folder.mkdir(parents=True, exist_ok=True)
    _write_args(folder, args)
    return None


def _write_args(folder: Path, args: dict[str, Any]) -> None:
    write_atomically(folder / ARGS, lambda f: f.write((json.dumps(args, indent=2) + '\n').encode()))


def amend_record(folder: Path, changes: dict[str, Any]) -> None:
    """Write what was decided after the folder was claimed into its arguments."""
    record = {**json.loads((folder / ARGS).read_text()), **changes}
    _write_args(folder, record)


def _names(n: int) -> list[str]:
    """Of the n newest checkpoints, newest first."""
    return [LAST, PREVIOUS, *(f'checkpoint_previous_{i}.pth' for i in range(2, n))][:n]


def _also(path: Path, name: str) -> None:
    """The same file under another name, which is whole or not there."""
    part = path.with_name(name + '.part')
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)  # no second copy
    except OSError:
        shutil.copyfile(path, part)
    os.replace(part, path.with_name(name))
    part.unlink(missing_ok=True)  # os.replace leaves it where both names are the same file already


def save(
    folder: Path, state: dict[str, Any], keep_last: int = 2, keep_as_epoch: int = 0, pin: bool = False) -> None:
    """Write the newest checkpoint; `keep_last` are kept, and this one also under its epoch's name if that is not 0.

    The new one is whole on the disk before the older ones move. `pin` keeps the newest before it as the healthy one.

    Raises:
        OSError: it could not be written; what was there is still there.
    """
    part = folder / (LAST + '.part')
    write_synced(part, lambda f: torch.save(state, f))
    names = [folder / n for n in _names(keep_last)]
    if pin and (newest := next((n for n in names if n.exists()), None)):
        _also(newest, HEALTHY)
    if keep_as_epoch:
        _also(part, f'checkpoint_epoch{keep_as_epoch:04}.pth')
    for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
        if newer.exists():
            os.replace(newer, older)
    os.replace(part, folder / LAST)
    sync_folder(folder)


def read(path: Path, keys: set[str] = KEYS) -> dict[str, Any]:
    """One checkpoint, every byte of it checked; `keys` are those that it must have.

    Raises:
        ValueError: it is torn, damaged, or none of ours.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load alone may take damaged numbers for good ones
                raise ValueError('damaged')
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # a torn file raises whatever its bytes lead to
        raise ValueError(f'{path} cannot be read ({type(e).__name__})') from None
    if not isinstance(state, dict) or not state.keys() >= keys:
        raise ValueError(f'{path} is no checkpoint of this program')
    return state


def load(
    folder: Path, say: Callable[[str], Any] = print, run: dict[str, Any] | None = None, free: set[str] = frozenset(),
    healthy: bool = False, keys: set[str] = KEYS,
) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, or None; a torn one is named and set aside, so that it replaces none.

    `run` is what the checkpoint must belong to, apart from the keys in `free`. `healthy`: only one that was written
    before any sign of a collapse.

    Raises:
        ValueError: the newest one belongs to another model, recipe or data set; the differing keys are named.
            Or there are checkpoints and none is readable.
    """
    last = sorted(folder.glob('checkpoint_previous_*.pth'), key=lambda p: (len(p.name), p.name))
    found = [p for p in (folder / LAST, folder / PREVIOUS, *last, folder / HEALTHY) if p.exists()]
    found += sorted(folder.glob('checkpoint_epoch*.pth'), reverse=True)
    torn = []
    for path in found:
        try:
            state = read(path, keys)
        except ValueError as e:
            say(f'{e}; looking for the one before')
            torn.append(path)
            continue
        said = differences(state['run'], run, free) if run is not None else ''
        if said:
            raise ValueError(f'{path} belongs to another run ({said}); give another --output')
        if torn:
            say(f'continuing from {path}')
            for bad in torn:
                _set_aside(bad)
        if not healthy or state['healthy']:
            return state
    if torn and len(torn) == len(found):
        raise ValueError(f'{folder}: no checkpoint can be read; remove the folder or give another --output')
    return None


def _set_aside(path: Path) -> None:
    try:
        os.replace(path, path.with_name(path.name + '.torn'))
    except OSError:  # read-only: then nothing is written over the good ones either
        pass
