"""--auto-perf: times a few ways of computing the same step and takes the fastest."""
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.distributed import synchronize
from ..runtime.messages import one_line
from .step import Perf

BUDGET = 60.0  # seconds

Key = tuple[str, Perf]  # amp, perf
Step = Callable[[Tensor, Tensor], Any]  # one training step on two views
MakeStep = Callable[[nn.Module, str, Perf], Step]


def choose_perf(
    model: nn.Module, shape: Sequence[int], device: torch.device, amps: Sequence[str], make_step: MakeStep,
    say: Callable[[str], None], *, budget: float = BUDGET,
) -> Key:
    """Returns the fastest (amp, Perf) for views of `shape` (B, 3, H, W).

    Copies are timed, so the model, its buffers and the random state stay as they are. Compiling on a CPU may take
    longer than everything else, so it comes last there and only if time is left.

    Args:
        make_step: builds the training step of a copy.
        budget: seconds.

    Raises:
        ValueError: no combination works.
    """
    views = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device).unbind()
    steps: dict[Key, Step] = {}
    seconds: dict[Key, list[float]] = {}
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        for compiled in (False, True):
            before = len(steps)
            for amp, perf in [(amp, Perf(last, compiled)) for last in (True, False) for amp in amps]:
                if steps and time.perf_counter() - began > budget / 2 and not (compiled and device.type == 'cuda'):
                    say(f'auto-perf: {perf}, amp {amp}: not tried, no time is left')
                    continue
                try:
                    steps[amp, perf] = _warm_up(model, views, make_step, amp, perf)
                except Exception as e:  # torch.compile and operators without bfloat16 raise errors of many kinds
                    reason = one_line(str(e).strip().partition('\n')[0], 120)
                    say(f'auto-perf: {perf}, amp {amp}: does not work here ({type(e).__name__}: {reason})')
            if len(steps) > before:  # time the eager ones again beside the compiled ones: the machine may have changed
                seconds = _time_in_turn(steps, views, budget / 4)
    if not steps:
        raise ValueError('--auto-perf: no combination works here')
    median = {key: statistics.median(spent) for key, spent in seconds.items()}
    for (amp, perf), s in median.items():
        n = len(seconds[amp, perf])
        say(f'auto-perf: {perf}, amp {amp}: {shape[0] / s:.1f} samples/s (median of {n} timings)')
    amp, perf = min(median, key=median.get)
    say(f'auto-perf: taking {perf}, amp {amp}')
    return amp, perf


def _warm_up(model: nn.Module, views: Sequence[Tensor], make_step: MakeStep, amp: str, perf: Perf) -> Step:
    """The step of a copy of the model, after its first calls."""
    trial = copy.deepcopy(model).to(views[0].device, memory_format=perf.memory_format)
    if perf.compile:
        trial.compile()
    step = make_step(trial, amp, perf)
    _time_step(step, views)
    return step


def _time_in_turn(steps: dict[Key, Step], views: Sequence[Tensor], budget: float) -> dict[Key, list[float]]:
    """1 to 20 rounds in which each step takes its turn, so that a busy moment of the machine slows all of them."""
    seconds: dict[Key, list[float]] = {key: [] for key in steps}
    began = time.perf_counter()
    for done in range(20):
        if done and time.perf_counter() - began > budget:
            break
        for key, step in steps.items():
            seconds[key].append(_time_step(step, views))
    return seconds


def _time_step(step: Step, views: Sequence[Tensor]) -> float:
    """Seconds per step; an accelerator gets several at once, as in a run."""
    device = views[0].device
    n = 1 if device.type == 'cpu' else 4
    synchronize(device)
    start = time.perf_counter()
    for _ in range(n):
        step(*views)
    synchronize(device)
    return (time.perf_counter() - start) / n
