"""Processes that work through a list, and end when the one that started them does, however that ends.

Run as a script, this file is such a process: it imports nothing else before it can notice the end of its parent.
"""
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import wait
from typing import Any

from ...runtime.signals import NAMES

ONE_THREAD = dict.fromkeys(('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'), '1')


class DiedError(RuntimeError):
    """A process ended before it gave a result; the text says how."""


def in_processes(work: Callable[[Any], Any], items: Sequence[Any], jobs: int) -> Generator[Any, None, None]:
    """work(item) of each, as they come; the processes end when this generator does. `work` and items are pickled.

    Raises:
        DiedError: a process was killed.
        Exception: what work raised.
    """
    left, processes, busy = iter(items), [], {}
    try:
        for _ in range(min(jobs, len(items))):
            processes.append(_start())
        for process, item in zip(processes, left, strict=False):
            _send(process, (os.getpid(), sys.path), work, item)
            busy[process.stdout] = process
        while busy:
            for pipe in wait(list(busy)):
                process = busy.pop(pipe)
                result = _receive(process)
                for item in islice(left, 1):
                    _send(process, item)
                    busy[pipe] = process
                yield result
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            with suppress(OSError), process:  # the pipe of a killed one may hold what it did not take
                pass


def _start() -> subprocess.Popen:
    # What a terminal or a scheduler sends to all processes is for this one to act on; the others inherit the mask.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {getattr(signal, name) for name in NAMES})
    try:
        return subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **ONE_THREAD})
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _send(process: subprocess.Popen, *what: Any) -> None:
    try:
        for x in what:
            process.stdin.write(pickle.dumps(x))
        process.stdin.flush()
    except BrokenPipeError:
        raise _died(process) from None


def _receive(process: subprocess.Popen) -> Any:
    try:
        result, error, text = pickle.load(process.stdout)
    except (EOFError, pickle.UnpicklingError):
        raise _died(process) from None
    if error is not None:
        raise error from RuntimeError(text)
    return result


def _died(process: subprocess.Popen) -> DiedError:
    try:
        code = process.wait(5)
    except subprocess.TimeoutExpired:  # it closed its end and lives
        code = None
    killed = code is not None and -code == signal.SIGKILL
    return DiedError(
        'was killed, most likely for want of memory' if killed else f'ended with exit code {code}, see what it printed')


def _serve() -> None:
    take, give = sys.stdin.buffer, os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)  # what a library prints is no result
    with suppress(EOFError, pickle.UnpicklingError, BrokenPipeError):  # the parent has ended
        parent, sys.path[:] = pickle.load(take)
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        work = pickle.load(take)
        while True:
            item = pickle.load(take)
            try:
                answer = pickle.dumps((work(item), None, ''))
            except Exception as e:
                answer = _failure(e)
            give.write(answer)
            give.flush()


def _failure(e: Exception) -> bytes:
    """The exception itself where it can be sent, else what it says."""
    text = traceback.format_exc()
    try:
        answer = pickle.dumps((None, e, text))
        pickle.loads(answer)
    except Exception:
        answer = pickle.dumps((None, RuntimeError(f'{type(e).__name__}: {e}'), text))
    return answer


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == '__main__':
    _serve()
