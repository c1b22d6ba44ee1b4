"""--auto-perf: times a few ways of computing the same step and takes the fastest."""
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.messages import one_line
from .step import Perf, time_step

Key = tuple[str, Perf]  # amp, perf
Step = Callable[[Tensor, Tensor], Any]  # one training step on two views
MakeStep = Callable[[nn.Module, str, Perf], Step]


def choose_perf(
    model: nn.Module, shape: Sequence[int], device: torch.device, amps: Sequence[str], make_step: MakeStep,
    say: Callable[[str], None], *, budget: float = 60.0,
) -> Key:
    """Returns the fastest (amp, Perf) for views of `shape` (B, 3, H, W).

    `make_step` builds the training step of a copy, so the model, its buffers and the random state stay as they are.
    Compiling on a CPU may take longer than everything else, so it comes last there and only if time is left (`budget`,
    in seconds). Raises ValueError if no combination works.
    """
    views = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device).unbind()
    steps: dict[Key, Step] = {}
    seconds: dict[Key, list[float]] = {}
    n, began = 1 if device.type == 'cpu' else 4, time.perf_counter()  # steps at once: an accelerator gets several
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        for compiled in (False, True):
            before = len(steps)
            for amp, perf in [(amp, Perf(last, compiled)) for last in (True, False) for amp in amps]:
                if steps and time.perf_counter() - began > budget / 2 and not (compiled and device.type == 'cuda'):
                    say(f'auto-perf: {perf}, amp {amp}: not tried, as no time is left')
                    continue
                try:
                    trial = copy.deepcopy(model).to(device, memory_format=perf.memory_format)
                    if compiled:
                        trial.compile()
                    step = make_step(trial, amp, perf)
                    time_step(step, views, n)
                    steps[amp, perf] = step
                except Exception as e:  # torch.compile and operators without bfloat16 raise errors of many kinds
                    reason = one_line(str(e).strip().partition('\n')[0], 120)
                    say(f'auto-perf: {perf}, amp {amp}: does not work here ({type(e).__name__}: {reason})')
            if len(steps) > before:  # time the eager ones again with the compiled ones: the load may have changed
                seconds = _time_in_turn(steps, views, n, budget / 4)
    if not steps:
        raise ValueError('--auto-perf: no combination works here')
    median = {key: statistics.median(spent) for key, spent in seconds.items()}
    for key, s in median.items():
        say(f'auto-perf: {key[1]}, amp {key[0]}: {shape[0] / s:.1f} samples/s (median of {len(seconds[key])} timings)')
    amp, perf = min(median, key=median.get)
    say(f'auto-perf: taking {perf}, amp {amp}')
    return amp, perf


def _time_in_turn(
    steps: dict[Key, Step], views: tuple[Tensor, Tensor], n: int, budget: float,
) -> dict[Key, list[float]]:
    """Times the steps in 1 to 20 rounds, all in each round, so a busy moment of the machine slows all of them."""
    seconds: dict[Key, list[float]] = {key: [] for key in steps}
    began = time.perf_counter()
    for done in range(20):
        if done and time.perf_counter() - began > budget:
            break
        for key, step in steps.items():
            seconds[key].append(time_step(step, views, n))
    return seconds
