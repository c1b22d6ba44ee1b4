"""The life of a long run: it claims its folder, resumes, saves when a checkpoint is due, and stops on a signal."""
import errno
import json
import time
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path
from typing import Any, NamedTuple

from . import checkpoint
from .distributed import World
from .files import write_atomically, write_json
from .messages import name_some, silent
from .runlock import RunLock
from .signals import Signals, Stopped

ARGS = 'args.json'
# Files that runs leave in their folders.
OUTPUTS = (
    'checkpoint.pth', 'checkpoint_previous.pth', 'log.jsonl', 'backbone', 'config.json', 'model.safetensors',
    'record.json')
PATIENCE = 3  # a run stops if its newest checkpoint is older than this many times `minutes`


class RunError(RuntimeError):
    """The run cannot continue as it is."""


class Pause(NamedTuple):
    """The decision that all processes share after a step; if all fields are 0, the run continues."""

    signal: int = 0  # number of the signal that stops the run
    due: int = 0  # 1: write a checkpoint
    failed: int = 0  # 1: a process reports that the run has failed


class Lifecycle:
    """One run, from the claim of its folder to its last checkpoint.

        with Lifecycle(folder / 'checkpoint.pth', keys, world, signals, say) as life:
            life.claim(arguments)
            state = life.resume(arguments)
            ...
            pause = life.agree(step)                        # after each step
            if pause.due or pause.signal:
                life.save(make_state, epoch, step)
                life.stop_if_signalled()

    Processes take every decision together, and only rank 0 touches files. Between `claim` and the end of the block no
    other run can claim the folder. While a checkpoint cannot be written (disk full, mount lost) the run continues and
    keeps the previous one. A deleted folder is recreated at the next save.

    Args:
        newest: path of the newest checkpoint.
        keys: the entries that a checkpoint of this run has.
        minutes, every_steps: when a checkpoint is due.
        keep_last: checkpoints that are kept; with 2 or more, the run falls back from a damaged one to the one before.
        keep_every: keep the checkpoint of every N-th epoch for good; 0: none.
        start_over: what errors tell the user to do to start again.

    `on_restored` is called, on rank 0, after the folder was made again.
    """

    def __init__(
        self, newest: Path, keys: set[str], world: World, signals: Signals, say: Callable[[str], Any], *,
        minutes: float = 10.0, every_steps: int | None = None, keep_last: int = 2, keep_every: int = 0,
        start_over: str = 'give another --output',
    ) -> None:
        self.newest, self.folder, self.keys = newest, newest.parent, keys
        self.world, self.signals, self.say = world, signals, say
        self.minutes, self.every_steps = minutes, every_steps
        self.keep_last, self.keep_every, self.start_over = keep_last, keep_every, start_over
        # (epoch, step) of the last attempt to save, and of the newest checkpoint
        self.position: tuple[int, int] | None = None
        self.saved: tuple[int, int] | None = None
        self.on_restored: Callable[[], Any] = silent
        self._saved_at = self._tried_at = time.monotonic()
        self._lock: RunLock | None = None  # rank 0's
        # Of the folder: the file system it is on, and the bytes of args.json.
        self._device: int | None = None
        self._args: bytes | None = None

    def __enter__(self) -> 'Lifecycle':
        return self

    def __exit__(self, *error: Any) -> None:
        self.signals.deferred = False
        if self._lock is not None:
            self._lock.release()

    def claim(self, args: dict[str, Any], free: Set[str] = frozenset(), fresh: bool = False) -> dict[str, Any]:
        """Makes the folder this run's, or finds that it already is, and returns the arguments recorded there.

        Args:
            free: arguments that may differ between a run and its continuation.
            fresh: refuse to continue a run.

        Raises:
            ValueError: the folder holds another run, or files of an unknown one; nothing in it is touched. Or another
                process is running it.
        """
        def check() -> dict[str, Any] | None:
            return read_claim(self.folder, args, free, fresh)

        def write() -> dict[str, Any]:
            if (old := check()) is None:
                if others := sorted(path.name for path in self.folder.iterdir() if not path.name.startswith('lock')):
                    self.say(f'{self.folder} holds other files, too ({name_some(others)}); the run adds its own')
                write_json(self.folder / ARGS, args)
            self._args = (self.folder / ARGS).read_bytes()
            return old or args

        self.world.broadcast_from_main(check)  # before anything is written, the lock included
        self.lock()
        return self.world.broadcast_from_main(write)

    def lock(self, path: Path | None = None) -> None:
        """Keeps other runs out of the folder; `path` is the lock file if it is not FOLDER/lock.

        Raises:
            ValueError: another process has it; the message names the process.
        """
        def take() -> None:
            lock = RunLock(path or self.folder / 'lock', self.say)
            lock.acquire()
            self._lock, self._device = lock, _find_device(self.folder)

        self.world.broadcast_from_main(take)

    def resume(self, run: dict[str, Any], free: Set[str] = frozenset()) -> dict[str, Any] | None:
        """Returns the newest undamaged checkpoint on every process, or None if there is no checkpoint.

        Args:
            run: must equal the checkpoint's entry 'run', except for the keys in `free`.

        Raises:
            ValueError: it belongs to another run; the differing keys are named. Or all checkpoints are damaged.
            OSError, MemoryError: it cannot be read now; nothing is set aside.
        """
        def load() -> dict[str, Any] | None:
            found = checkpoint.load(self.newest, self.keys, self.say, self.start_over)
            if found is None:
                return None
            path, state = found
            if said := checkpoint.find_differences(state['run'], run, free):
                raise ValueError(f'{path} belongs to another run ({said}); {self.start_over}')
            return state

        return self.world.broadcast_from_main(load)

    def begin(self, epoch: int = 0, step: int = 0) -> None:
        """Starts the run at this position: from here on, a signal waits until a checkpoint holds all steps done."""
        self.position = self.saved = epoch, step
        self._saved_at = self._tried_at = time.monotonic()
        self.signals.deferred = True

    def agree(self, steps: int, failed: bool = False) -> Pause:
        """Decides what to do after `steps` steps of the run; all processes get the same answer."""
        due = False
        if self.world.main:
            due = time.monotonic() - self._tried_at > 60 * self.minutes
            due |= bool(self.every_steps and steps % self.every_steps == 0)
        return Pause(*self.world.all_reduce_max([self.signals.number, int(due), int(failed)]))

    def interruptible(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields the batches of the steps, but no further one after a signal that comes while it waits for one.

        Images may take minutes to decode, and a scheduler gives seconds. Of several processes, which step together,
        each finishes the step.
        """
        source = iter(batches)
        while True:
            try:
                self.signals.waiting = self.world.size == 1
                if self.signals.waiting and self.signals.number:
                    return
                batch = next(source, None)
            except Stopped:
                return
            finally:
                self.signals.waiting = False
            if batch is None:
                return
            yield batch

    def save(self, make_state: Callable[[], dict[str, Any]], epoch: int, step: int = 0) -> bool:
        """Writes a checkpoint of the entries that `make_state` returns on rank 0.

        Args:
            epoch, step: the position that it holds.

        Returns:
            Whether it was written; if not, the previous one is kept.

        Raises:
            RunError: none could be written for PATIENCE times `minutes`, or another run has taken the folder over.
        """
        self.position = epoch, step
        keep = epoch if self.keep_every and step == 0 and epoch and epoch % self.keep_every == 0 else 0

        def write() -> bool:
            self._tried_at = time.monotonic()
            try:
                self._restore()
                checkpoint.save(self.newest, make_state(), self.keep_last, keep)
            except OSError as e:
                self._tolerate(e)
                return False
            self._saved_at = self._tried_at
            return True

        written = self.world.broadcast_from_main(write)
        if written:
            self.saved = self.position
        return written

    def _restore(self) -> None:
        """Makes the folder, its lock and args.json again if they were deleted.

        Raises:
            RunError: another run has taken the folder over.
            OSError: the folder is not there because its disk is not there, or it cannot be written to.
        """
        if self._lock is None:
            return
        record, device, gone = self.folder / ARGS, _find_device(self.folder), not self.folder.exists()
        try:
            kept = self._lock.check()
            if not kept:
                if device != self._device:  # what is written to the place of a lost mount is lost, too
                    raise OSError(errno.ENODEV, 'its disk is not there')
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock.renew()
        except ValueError as e:
            raise RunError(str(e)) from None
        self._device = device
        if record.exists():
            self._args = record.read_bytes()
        elif self._args is not None:
            write_atomically(record, lambda f: f.write(self._args))
            kept = False
        if not kept:
            self.say(f'{self.folder} was deleted{"" if gone else " in part"}; it is recreated, and the run continues')
            self.on_restored()

    def _tolerate(self, e: OSError) -> None:
        minutes = PATIENCE * self.minutes
        if self._tried_at - self._saved_at > 60 * minutes:
            raise RunError(
                f'no checkpoint could be written for {minutes:g} minutes ({e.strerror or e}); make room in '
                f'{self.folder}, and the same command continues from the newest one')
        self.say(
            f'no checkpoint written to {self.folder} ({e.strerror or e}); the one before is kept, and the next try is '
            f'in {self.minutes:g} minutes or after this epoch')

    def stop_if_signalled(self) -> None:
        """Raises Stopped on all processes if one of them got a signal; call it after `save`."""
        number = self.world.all_reduce_max([self.signals.number])[0]
        if not number:
            return
        if self.saved != self.position:
            raise RunError('stopped by a signal without a new checkpoint; the one before is kept')
        raise Stopped(number)

    def finish(self) -> None:
        """Raises RunError if the last checkpoint could not be written."""
        self.signals.deferred = False
        if self.saved != self.position:
            raise RunError(
                'the last checkpoint could not be written; make room, and the same command continues from '
                'the one before')


def _find_device(path: Path) -> int:
    """Returns the number of the file system that holds `path`, or would hold it."""
    while not path.exists():
        path = path.parent
    return path.stat().st_dev


def read_claim(
    folder: Path, args: dict[str, Any], free: Set[str], fresh: bool = False, start_over: str = 'give another --output',
) -> dict[str, Any] | None:
    """Returns the arguments recorded in `folder` if it holds this run, or None if no run has claimed it.

    Raises ValueError as `Lifecycle.claim` does.
    """
    record = folder / ARGS
    if folder.exists() and not folder.is_dir():
        raise ValueError(f'{folder} is a file; {start_over}')
    if not record.exists():
        if taken := [name for name in OUTPUTS if (folder / name).exists()]:
            raise ValueError(f'{folder} holds {", ".join(taken)} of an unknown run; {start_over}')
        return None
    if fresh:
        raise ValueError(f'{folder} holds a run, and --resume never forbids continuing it; {start_over}')
    try:
        old = json.loads(record.read_text())
    except ValueError:
        raise ValueError(f'{record} cannot be read; {start_over}, or remove the folder') from None
    if not isinstance(old, dict) or old.get('benchmark') != args.get('benchmark'):
        raise ValueError(f'{folder} holds a run of another kind; {start_over}')
    if said := checkpoint.find_differences(old, args, free):
        raise ValueError(f'{folder} holds another run ({said}); {start_over}')
    return old


def amend_claim(folder: Path, changes: dict[str, Any]) -> None:
    """Records what was decided after the folder was claimed."""
    write_json(folder / ARGS, {**json.loads((folder / ARGS).read_text()), **changes})
