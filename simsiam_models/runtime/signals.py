"""Signals that ask a run to stop: it finishes its step, saves, and exits with a code that schedulers understand."""
import signal
import threading
import time
from typing import Any

# SIGTERM: schedulers and torchrun; SIGUSR1: SLURM's early warning; SIGINT: Ctrl-C.
NAMES = ('SIGTERM', 'SIGINT', 'SIGUSR1')
ECHO = 3.0  # seconds: torchrun passes on a signal that a whole group of processes has already received


class Stopped(KeyboardInterrupt):
    """A signal ended the run; `code` is 128 + its number, as in shells and schedulers (143 for SIGTERM)."""

    def __init__(self, number: int) -> None:
        super().__init__(f'stopped by {signal.Signals(number).name}')
        self.code = 128 + number


class Signals:
    """Inside the `with` block a signal raises Stopped, or only sets `number` while `deferred` is set.

    The run sets `deferred` while no checkpoint holds its last steps, and `waiting` while it waits between two steps,
    when Stopped may be raised after all. A second signal always raises Stopped.
    """

    def __init__(self) -> None:
        self.number, self.deferred, self.waiting = 0, False, False
        self._before: dict[signal.Signals, Any] = {}
        self._received_at = -ECHO

    def __enter__(self) -> 'Signals':
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for name in NAMES:
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        again, now = self.number != 0, time.monotonic()
        if again and self.deferred and now - self._received_at < ECHO:
            return
        self.number, self._received_at = number, now
        if again or self.waiting or not self.deferred:
            raise Stopped(number)
