"""Runs tasks in parallel processes, and stores each result so that an interrupted run continues."""
import functools
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...runtime.files import explain_write_errors, write_atomically
from ...runtime.signals import NAMES
from .fits import SvmData, Task, fit_task

REPORT_INTERVAL = 30.0  # seconds between lines of progress
# Workers use one thread each. The resource tracker would report the semaphores of a killed command, which it removes.
WORKER_ENVIRONMENT = {
    'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1',
    'PYTHONWARNINGS': 'ignore:resource_tracker'}


class FinishedTasks:
    """The results so far, stored as one JSON line with a checksum each. If a line is damaged, its task runs again.

    The caller holds a lock on the file: no other process may write to it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.results, self.seconds = path, {}, {}
        if not path.is_file():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        intact = []
        for line in lines:
            try:
                *parts, crc = json.loads(line)
                if line.endswith(b'\n') and crc == _compute_checksum(parts):
                    task, result, seconds = parts
                    self.results[tuple(task)], self.seconds[tuple(task)] = result, seconds
                    intact.append(line)
            except (ValueError, TypeError, RecursionError):
                continue
        if len(intact) < len(lines):
            with explain_write_errors(path, '--output'):
                write_atomically(path, lambda f: f.write(b''.join(intact)))

    def add(self, task: Task, result: dict[str, Any], seconds: float) -> None:
        """Appends a result to the file."""
        parts = [task, result, round(seconds, 3)]
        with explain_write_errors(self.path, '--output'), open(self.path, 'a') as f:
            f.write(json.dumps([*parts, _compute_checksum(parts)]) + '\n')
        self.results[task], self.seconds[task] = result, seconds

    def select_missing(self, tasks: Sequence[Task]) -> list[Task]:
        """Returns the tasks without a result."""
        return [task for task in tasks if task not in self.results]


def _compute_checksum(parts: list[Any]) -> int:
    return zlib.crc32(json.dumps(parts).encode())


def run_tasks(
    tasks: Sequence[Task], data: SvmData, finished: FinishedTasks, jobs: int, fit: Callable[..., Any] = fit_task,
) -> None:
    """Runs the unfinished tasks in `jobs` processes of one thread; one job runs in this process.

    Results do not depend on the number of processes or on the order of the tasks.

    Raises:
        RuntimeError: a process was killed or ran out of memory; finished results are kept.
        OSError: a result cannot be written.
    """
    missing = finished.select_missing(tasks)
    if not missing:
        return
    progress = Progress(len(tasks), len(tasks) - len(missing))
    run = functools.partial(_run_timed, fit, data)
    results = (run(task) for task in missing) if jobs == 1 else map_in_processes(run, missing, jobs)
    try:
        with closing(results):
            for task, result, seconds in results:
                finished.add(task, result, seconds)
                progress.step()
    except (BrokenProcessPool, MemoryError) as e:
        what = f'one of the {jobs} processes' if jobs > 1 else 'the process'
        why = 'ran out of memory' if isinstance(e, MemoryError) else e
        advice = 'with fewer --jobs' if jobs > 1 else 'on a machine with more free memory'
        raise RuntimeError(
            f'{what} {why}; run the same command again {advice} (finished fits are kept in {finished.path})') from None
    finally:
        progress.bar.close()


def _run_timed(fit: Callable[..., Any], data: SvmData, task: Task) -> tuple[Task, Any, float]:
    start = time.perf_counter()
    return task, fit(task, data), time.perf_counter() - start


class Progress:
    """Reports progress on stderr: a bar on a terminal, elsewhere a line at most every 30 s and one at the end."""

    def __init__(self, total: int, done: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.initial, self.done, self.clock = total, done, done, clock
        self.start = self.reported = clock()
        self.bar = tqdm(total=total, initial=done, unit='fit', disable=None, leave=False)

    def step(self) -> None:
        """Counts one finished task."""
        self.done += 1
        self.bar.update()
        now, last = self.clock(), self.done == self.total
        if self.bar.disable and (last or now - self.reported >= REPORT_INTERVAL):
            self.reported, seconds = now, now - self.start
            rate = (self.done - self.initial) / max(seconds, 1e-3)
            left = (self.total - self.done) / rate
            text = f'in {_format_duration(seconds)}' if last else f'about {_format_duration(left)} left'
            print(f'svm: {self.done} of {self.total} fits, {float(f"{rate:.2g}"):g} fits/s, {text}', file=sys.stderr)


def _format_duration(seconds: float) -> str:
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'


def map_in_processes(function: Callable[[Any], Any], items: Sequence[Any], jobs: int) -> Generator[Any, None, None]:
    """Yields function(item) of every item, in the order in which worker processes finish.

    Workers get `function` and the items pickled. They ignore the signals that a terminal or scheduler sends to the
    whole process group, and end with this generator or with this process, even if it is killed.

    Raises:
        BrokenProcessPool: a worker ended early; the message says how.
        Exception: `function` raised it.
    """
    others, workers = set(multiprocessing.active_children()), set[BaseProcess]()
    with _configure_new_processes():  # the executor starts multiprocessing's resource tracker
        executor = ProcessPoolExecutor(
            min(jobs, len(items)), multiprocessing.get_context('spawn'), _start_worker, (function,))
    try:
        with _configure_new_processes():
            futures = [executor.submit(_run_in_worker, item) for item in items]
            workers = set(multiprocessing.active_children()) - others
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise BrokenProcessPool(_explain_death(workers)) from None
    finally:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        executor.shutdown(cancel_futures=True)


@contextmanager
def _configure_new_processes() -> Iterator[None]:
    """Gives processes started in this block WORKER_ENVIRONMENT and a mask that blocks the signals of `Signals`."""
    environment = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {getattr(signal, name) for name in NAMES})
    os.environ.update(WORKER_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in environment.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _explain_death(workers: set[BaseProcess]) -> str:
    end = time.monotonic() + 5
    while not (codes := {worker.exitcode for worker in workers if worker.exitcode is not None}) and (
            time.monotonic() < end):
        time.sleep(0.01)  # the executor's thread has seen the end of a worker and is about to store its exit code
    if -signal.SIGKILL in codes:
        return 'was killed, most likely because memory ran out'
    return f'ended with exit code {min(codes) if codes else "unknown"}; see its output above'


_of_worker: list[Callable[[Any], Any]] = []  # the function of this worker process


def _start_worker(function: Callable[[Any], Any]) -> None:
    """Initializes a worker process."""
    _of_worker.append(function)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _run_in_worker(item: Any) -> Any:
    try:
        return _of_worker[-1](item)
    except Exception as e:  # whatever `function` raises: an exception that cannot be unpickled would break the pool
        try:
            pickle.loads(pickle.dumps(e))
        except Exception:  # __init__ or __reduce__ of that exception may raise anything
            raise RuntimeError(f'{type(e).__name__}: {e}') from None
        raise
