"""Signals that ask a run to leave: it finishes its step, saves, and exits with a code that schedulers understand."""
import signal
import threading
import time
from typing import Any

# SIGTERM: schedulers and torchrun; SIGUSR1: SLURM's early warning; SIGINT: Ctrl-C.
NAMES = ('SIGTERM', 'SIGINT', 'SIGUSR1')
ECHO = 3.0  # seconds: one signal to a whole group of processes reaches torchrun's twice, by itself and passed on


class Stopped(KeyboardInterrupt):
    """A signal ended the run; `code` is 128 + its number, as shells and schedulers have it (143 for SIGTERM)."""

    def __init__(self, number: int) -> None:
        super().__init__(f'stopped by {signal.Signals(number).name}')
        self.code = 128 + number


class Signals:
    """While it is entered, the first signal sets `number` where `deferred` is set; a later one raises Stopped.

    `deferred` is set while there are steps that no checkpoint holds.
    """

    def __init__(self) -> None:
        self.number, self.deferred, self._before, self._at = 0, False, {}, -ECHO

    def __enter__(self) -> 'Signals':
        if threading.current_thread() is threading.main_thread():  # only there Python allows handlers
            for name in NAMES:
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: Any) -> None:
        again, now = self.number != 0, time.monotonic()
        if again and self.deferred and now - self._at < ECHO:
            return
        self.number, self._at = number, now
        if again or not self.deferred:
            raise Stopped(number)
