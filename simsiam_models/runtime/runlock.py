"""Locks a folder for one run, also on shared disks: the lock is a file that names its process.

Locks of the operating system are missing on many network disks, and the children of a dead process keep holding them.
"""
import json
import os
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from .messages import short

BEAT = 10.0  # seconds between two signs of life: the holder sets the time of its lock file
SILENCE = 120.0  # seconds without a sign of life after which a process of another machine counts as dead
PATIENCE = 10.0  # seconds in which a lock file that can neither be made nor read must become one of both


class RunLock:
    """The lock file `path`, between `acquire` and `release`.

    On its own machine a process holds the lock as long as it lives, whatever became of its file's time. From another
    machine, or another container, it holds it as long as the time moves on. A job that SLURM requeued takes the lock of
    its earlier start.

    Args:
        say: is told when `acquire` has to wait for a sign of life.
        start_over: the alternative that errors suggest.
    """

    def __init__(self, path: Path, say: Callable[[str], Any], start_over: str = 'give another --output') -> None:
        self.path, self.say, self.start_over = path, say, start_over
        self.mine = {**describe_process(), 'token': uuid.uuid4().hex}
        self._done = threading.Event()
        self._heart = threading.Thread(target=self._beat, name='simsiam-lock', daemon=True)

    def acquire(self) -> None:
        """Takes the lock, and breaks that of a dead process.

        Raises:
            ValueError: another process holds it; the message names the process.
            OSError: the file cannot be written.
        """
        with self._explain_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
        first, began = None, time.monotonic()
        while not self._create():
            waited, found = time.monotonic() - began, read_lock(self.path)
            if found is None:  # released a moment ago, unless it is something else than a file
                if waited > PATIENCE:
                    raise OSError(f'{self.path} cannot be written; remove it, or {self.start_over}')
                time.sleep(0.01)
                continue
            holder, touched = found
            alive = is_alive(holder, self.mine)
            if alive is None and first is None:
                first, age = found, self._measure_age(touched)
                if age <= SILENCE:
                    self.say(f'{describe(self.path, holder)}: waiting up to {SILENCE - age:.0f} s for a sign of life')
            if alive is None:
                alive = found != first or (None if age + waited <= SILENCE else False)
            if alive:
                raise ValueError(
                    f'{describe(self.path, holder)}; wait for it or stop it, or {self.start_over}')
            if alive is None:
                time.sleep(min(1.0, BEAT))
            else:
                self._break(found)
        self._heart.start()

    def _break(self, found: tuple[dict[str, Any], int]) -> None:
        """Removes the lock `found` of a dead process; one that another process has taken meanwhile stays."""
        aside = self._name_aside()
        with suppress(FileNotFoundError):
            os.rename(self.path, aside)  # of several processes, one gets the file
            try:
                if read_lock(aside) != found:
                    self._put_back(aside)
            finally:
                aside.unlink(missing_ok=True)

    def _put_back(self, aside: Path) -> None:
        try:
            os.link(aside, self.path)
        except FileExistsError:  # its owner, or yet another process, was faster
            pass
        except OSError:  # a file system without links
            os.replace(aside, self.path)

    def _name_aside(self) -> Path:
        """Returns a name beside the lock that is this process's own."""
        return self.path.with_name(f'{self.path.name}.{self.mine["token"][:12]}.part')

    def check(self) -> bool:
        """Returns whether the file is there; if not, `renew` makes it again.

        Raises:
            ValueError: another process holds the lock now.
            OSError: the file cannot be read.
        """
        found = read_lock(self.path)
        if found and found[0].get('token') != self.mine['token']:
            raise ValueError(
                f'{describe(self.path, found[0])}, which has taken it over from this one; the last checkpoint is kept')
        return found is not None

    def renew(self) -> None:
        """Makes the deleted file again; raises like `check`."""
        if not self._create():
            self.check()

    def release(self) -> None:
        """Removes the file, unless another process has taken it over."""
        self._done.set()
        with suppress(RuntimeError):  # it was never started
            self._heart.join()
        with suppress(OSError):
            if (found := read_lock(self.path)) and found[0].get('token') == self.mine['token']:
                self.path.unlink()

    def _create(self) -> bool:
        """Returns False if the file exists."""
        with self._explain_errors():
            try:
                f = open(self.path, 'x')
            except FileExistsError:
                return False
            try:
                with f:
                    f.write(json.dumps(self.mine))
            except OSError:
                self.path.unlink(missing_ok=True)
                raise
        return True

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise type(e)(
                f'{self.path.parent} cannot be written to ({e.strerror or e}); make it writable, or '
                f'{self.start_over}') from None

    def _measure_age(self, touched: int) -> float:
        """Returns the seconds since `touched`, by the clock that dates the files of this disk."""
        probe = self._name_aside()
        try:
            probe.touch()
            return max(0.0, (probe.stat().st_mtime_ns - touched) / 1e9)
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            with suppress(OSError):  # `check` makes a deleted file again
                os.utime(self.path)


def describe_process() -> dict[str, Any]:
    """Describes this process so that others can tell whether it lives."""
    place = [socket.gethostname()]  # process numbers are unique in a boot and a namespace only
    reads: list[Callable[[], str]] = [
        lambda: Path('/proc/sys/kernel/random/boot_id').read_text().strip(), lambda: os.readlink('/proc/self/ns/pid')]
    for read in reads:
        with suppress(OSError):
            place.append(read())
    return {
        'host': place[0], 'place': place, 'pid': os.getpid(), 'started': find_start(os.getpid()),
        'since': datetime.now().astimezone().strftime('%Y-%m-%d %H:%M:%S %Z'),
        'job': os.environ.get('SLURM_JOB_ID', ''), 'restarts': int(os.environ.get('SLURM_RESTART_COUNT') or 0)}


def find_start(pid: int) -> str | None:
    """Returns when a process of this machine was started, in a form to compare; '' if it hides that; None: dead."""
    with suppress(OSError, IndexError):
        state, *fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
        return None if state in 'ZX' else fields[18]  # proc(5): field 22; a zombie is dead, but not buried
    if os.name == 'nt':  # os.kill would end it
        return ''
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # another user's
        pass
    return ''


def is_alive(holder: dict[str, Any], mine: dict[str, Any]) -> bool | None:
    """Returns whether the holder of a lock lives; None if only its file can tell."""
    if holder.get('job') and holder['job'] == mine['job'] and mine['restarts'] > holder.get('restarts', 0):
        return False  # SLURM has ended the earlier start of the job
    if holder.get('place') != mine['place'] or os.name == 'nt':
        return None
    return find_start(holder['pid']) in ('', holder['started'])


def read_lock(path: Path) -> tuple[dict[str, Any], int] | None:
    """Returns the holder, {} if the file does not tell, and the time of the file in ns; None if there is no file."""
    try:
        # Opening it makes a network disk ask for the time, but must not wait for the writer of a pipe.
        with open(path, 'rb', opener=lambda name, flags: os.open(name, flags | getattr(os, 'O_NONBLOCK', 0))) as f:
            status = os.fstat(f.fileno())
            text, touched = f.read(1 << 16) or b'' if stat.S_ISREG(status.st_mode) else b'', status.st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return None
    with suppress(ValueError, RecursionError):
        holder = json.loads(text)
        kinds: dict[str, type | tuple[type, ...]] = {
            'host': str, 'since': str, 'started': (str, type(None)), 'place': list, 'pid': int, 'restarts': int}
        if isinstance(holder, dict) and all(isinstance(holder.get(k), kind) for k, kind in kinds.items()):
            if 0 < holder['pid'] < 2**31:
                return holder, touched
    return {}, touched


def describe(path: Path, holder: dict[str, Any]) -> str:
    who = 'a process that its lock does not name'
    if holder:
        who = f'process {holder["pid"]} on {short(holder["host"])}, since {short(holder["since"])}'
    return f'{path.parent} is in use by another run ({who}; lock file {path.name})'
