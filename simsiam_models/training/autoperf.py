"""--auto-perf: which way of computing the same step is the fastest here, by timing a few."""
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BUDGET = 60.0  # seconds


@dataclass(frozen=True)
class Perf:
    """How a step is computed; the defaults are those of a run without --auto-perf."""

    channels_last: bool = True
    compile: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        return ('channels_last' if self.channels_last else 'contiguous') + (', compiled' if self.compile else ', eager')


Key = tuple[str, Perf]  # amp, perf
Step = Callable[[Tensor, Tensor], Any]  # one training step on two views
MakeStep = Callable[[nn.Module, str, Perf], Step]


def choose_perf(
    model: nn.Module, shape: Sequence[int], device: torch.device, amps: Sequence[str], make_step: MakeStep,
    say: Callable[[str], None], budget: float = BUDGET,
) -> Key:
    """The fastest (amp, Perf) for views of `shape` (B, 3, H, W).

    It is measured on copies: the model, its buffers and the random state stay as they are. On a CPU compiling may take
    longer than all the rest, so it comes last there and only if time is left.

    Raises:
        ValueError: no combination works.
    """
    x1, x2 = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    steps: dict[Key, Step] = {}
    seconds: dict[Key, list[float]] = {}
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        for compiled in (False, True):
            before = len(steps)
            for perf, amp in [(Perf(last, compiled), amp) for last in (True, False) for amp in amps]:
                if steps and time.perf_counter() - began > budget / 2 and not (compiled and device.type == 'cuda'):
                    say(f'auto-perf: {perf}, amp {amp}: not tried, no time is left')
                elif step := _warm_step(model, x1, x2, perf, amp, make_step, say):
                    steps[amp, perf] = step
            if len(steps) > before:  # the eager ones again beside the compiled ones: the machine may have changed
                _time(steps, x1, x2, seconds, budget / 4)
    if not steps:
        raise ValueError('--auto-perf: no combination works here')
    median = {key: statistics.median(spent) for key, spent in seconds.items()}
    for (amp, perf), s in median.items():
        n = len(seconds[amp, perf])
        say(f'auto-perf: {perf}, amp {amp}: {shape[0] / s:.1f} samples/s (median of {n} timings)')
    amp, perf = min(median, key=median.get)
    say(f'auto-perf: taking {perf}, amp {amp}')
    return amp, perf


def _warm_step(
    model: nn.Module, x1: Tensor, x2: Tensor, perf: Perf, amp: str, make_step: MakeStep, say: Callable[[str], None],
) -> Step | None:
    """The step of a copy of the model after its first calls, or None where it fails, which is said."""
    try:
        trial = copy.deepcopy(model).to(x1.device, memory_format=perf.memory_format)
        if perf.compile:
            trial.compile()
        step = make_step(trial, amp, perf)
        _seconds(step, x1, x2)
        return step
    except Exception as e:  # whatever it is, there are others to try
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        say(f'auto-perf: {perf}, amp {amp}: does not work here ({type(e).__name__}: {reason[:120]})')
        return None


def _time(
    steps: dict[Key, Step], x1: Tensor, x2: Tensor, seconds: dict[Key, list[float]], budget: float,
) -> None:
    """1 to 20 rounds, all in turn, so that a busy moment of the machine meets all; an earlier timing is replaced."""
    seconds.clear()
    began = time.perf_counter()
    for done in range(20):
        if done and time.perf_counter() - began > budget:
            break
        for key, step in steps.items():
            seconds.setdefault(key, []).append(_seconds(step, x1, x2))


def _seconds(step: Step, x1: Tensor, x2: Tensor) -> float:
    """Per step; on an accelerator several are launched at once, as in a run."""
    n = 1 if x1.device.type == 'cpu' else 4
    _finish(x1.device)
    start = time.perf_counter()
    for _ in range(n):
        step(x1, x2)
    _finish(x1.device)
    return (time.perf_counter() - start) / n


def _finish(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()
