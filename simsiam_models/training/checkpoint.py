"""The run's folder: whose it is, and checkpoints that are either whole or not there."""
import json
import os
from pathlib import Path
from typing import Any

import torch

ARGS, LAST, PREVIOUS, LOG, BACKBONE = 'args.json', 'checkpoint.pth', 'checkpoint_previous.pth', 'log.jsonl', 'backbone'


def write_atomically(path: Path, write: Any) -> None:
    """`write(file)` into a temporary name, sync, rename: the old file stays until the new one is whole."""
    part = path.with_name(path.name + '.part')
    with open(part, 'wb') as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def claim_folder(folder: Path, args: dict[str, Any], free: set[str]) -> dict[str, Any] | None:
    """Make the folder this run's, or find that it was already: then its recorded arguments are returned.

    `free` names the arguments that may differ between a run and its continuation.

    Raises:
        ValueError: the folder holds another run, or files of an unknown one; nothing in it is touched.
    """
    record = folder / ARGS
    if record.exists():
        try:
            old = json.loads(record.read_text())
        except ValueError:
            raise ValueError(f'{record} is not readable; give another --output, or remove the folder') from None
        new = json.loads(json.dumps(args))
        keys = [k for k in sorted({*old, *new}) if k not in free and old.get(k) != new.get(k)]
        if keys:
            said = '; '.join(f'{k}: {old.get(k)} there, {new.get(k)} here' for k in keys)
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


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write the newest checkpoint; the one before is kept beside it."""
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / PREVIOUS)
    write_atomically(folder / LAST, lambda f: torch.save(state, f))


def load(folder: Path, say: Any = print) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, or None; a torn one is named and passed over.

    Raises:
        RuntimeError: there are checkpoints and none is readable.
    """
    found = [p for p in (folder / LAST, folder / PREVIOUS) if p.exists()]
    for path in found:
        try:
            return torch.load(path, map_location='cpu', weights_only=True)
        except Exception as e:  # a torn file raises whatever its bytes lead to
            say(f'{path} cannot be read ({type(e).__name__}); looking for the one before')
    if found:
        raise RuntimeError(f'{folder}: no checkpoint can be read; remove the folder or give another --output')
    return None
