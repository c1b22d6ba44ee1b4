"""Writes files that are complete or absent, locks folders between processes, and finds the cache folder."""
import codecs
import csv
import errno
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from .distributed import World
from .messages import inert_cell

ABANDONED = 3600  # seconds after which a temporary file counts as left over by a killed process


def cache_folder() -> Path | None:
    """Returns $SIMSIAM_CACHE, else simsiam_models in the user's cache folder; None if it is not writable."""
    try:
        base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
        folder = Path(os.environ.get('SIMSIAM_CACHE') or Path(base) / 'simsiam_models')
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home folder, as in some containers
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


@contextmanager
def replacing(path: Path, shared: bool = False, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary name beside `path`; the file written there replaces `path` if the block succeeds.

    Args:
        shared: other processes may write the same file at the same time, so each gets its own name.
        durable: wait until the new name is on the disk.

    Raises:
        OSError: the file cannot be written; the error names `path`.
    """
    part = path.with_name(f'{path.name}.part')
    if shared:
        _remove_abandoned(path)
        part = path.with_name(f'{path.stem}.{uuid.uuid4().hex[:12]}.part')
    try:
        yield part
        os.replace(part, path)
    except OSError as e:
        if e.filename is None and e.errno is not None:
            e.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


def _remove_abandoned(path: Path) -> None:
    for left in path.parent.glob(f'{path.stem}*.part'):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()


class _File:
    """Remembers why a write failed: torch.save replaces the error with one of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as e:
            self.error = e
            raise

    def flush(self) -> None:
        self.file.flush()


def write_synced(path: Path, write: Callable[[Any], Any]) -> None:
    """Calls `write(file)` and waits until the bytes are on the disk."""
    with open(path, 'wb') as f:
        file = _File(f)
        try:
            write(file)
        except Exception:  # torch.save raises RuntimeError on a full disk
            if file.error is not None:
                raise file.error from None
            raise
        f.flush()
        os.fsync(f.fileno())


def write_atomically(path: Path, write: Callable[[Any], Any], shared: bool = False) -> None:
    """Calls `write(file)`; the old file stays until the new one is complete. `shared`: see `replacing`."""
    with replacing(path, shared) as part:
        write_synced(part, write)


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` durable if the file system supports it."""
    with suppress(OSError):
        at = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(at)
        finally:
            os.close(at)


def finite(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON; see `finite`."""
    text = json.dumps(finite(value), indent=2) + '\n'
    write_atomically(path, lambda f: f.write(text.encode()))


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Writes a table; a cell that a spreadsheet would take for a formula becomes text."""
    def write(file: Any) -> None:
        table = csv.writer(codecs.getwriter('utf-8')(file, 'surrogateescape'), lineterminator='\n')
        table.writerows([inert_cell(cell) for cell in row] for row in rows)

    write_atomically(path, write)


@contextmanager
def explain_write_errors(path: Path, flag: str = '--cache') -> Iterator[None]:
    """Turns a failed write to `path` into one sentence; `flag` is the option that names its folder."""
    try:
        yield
    except OSError as e:
        why = e.strerror or e
        raise OSError(f'{flag}: {path} cannot be written ({why}); make room there, or name another folder') from None


@contextmanager
def hold_lock(path: Path, world: World) -> Iterator[None]:
    """Holds the lock file `path`; while another process holds it, says so and waits."""
    lock = None

    def take() -> None:
        nonlocal lock
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f'waiting for another process that holds {path}', file=sys.stderr)
            lock.acquire()
        except NotImplementedError:  # a file system without locks
            lock = None
        except OSError as e:
            if e.errno != errno.ENOLCK:  # a network file system without a lock daemon
                raise
            lock = None

    world.broadcast_from_main(take)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
