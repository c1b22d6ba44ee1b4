"""Times several ways of computing the same step and takes the fastest (--auto-perf, and the default of --compile)."""
import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.messages import one_line
from .step import Perf, time_step

SHORT = 900  # seconds of a run, below which compiling, about a minute, does not pay
WAYS = tuple(Perf(last, compiled) for compiled in (False, True) for last in (True, False))

Key = tuple[str, Perf]  # amp, perf
Step = Callable[[Tensor, Tensor], Any]  # one training step on two views
MakeStep = Callable[[nn.Module, str, Perf], Step]


def choose_perf(
    model: nn.Module, shape: Sequence[int], device: torch.device, amps: Sequence[str], make_step: MakeStep,
    say: Callable[[str], None], *, ways: Sequence[Perf] = WAYS, budget: float = 60.0, steps_of_run: float = math.inf,
) -> Key:
    """Returns the fastest (amp, Perf) for views of `shape` (B, 3, H, W) among `ways`, the eager ones first.

    `make_step` builds the training step of a copy, so the model, its buffers and the random state stay as they are.
    Compiling on a CPU may take longer than everything else, so it comes last there and only if time is left (`budget`,
    in seconds), and nowhere if the `steps_of_run` take less than SHORT without it. Raises ValueError if no combination
    works.
    """
    x1, x2 = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device).unbind()
    views = x1, x2
    steps: dict[Key, Step] = {}
    first: dict[Key, float] = {}  # seconds of the first call, which compiles
    seconds: dict[Key, list[float]] = {}
    error: Exception | None = None
    n, began = 1 if device.type == 'cpu' else 4, time.perf_counter()  # steps at once: an accelerator gets several
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        for compiled in (False, True):
            before = len(steps)
            if compiled and seconds and (whole := steps_of_run * min(map(statistics.median, seconds.values()))) < SHORT:
                say(f'auto-perf: not compiling: it takes about a minute, the whole run only {whole / 60:.1f} minutes')
                break
            for amp, perf in [(amp, perf) for perf in ways if perf.compile == compiled for amp in amps]:
                if steps and time.perf_counter() - began > budget / 2 and not (compiled and device.type == 'cuda'):
                    say(f'auto-perf: {perf}, amp {amp}: not tried, as no time is left')
                    continue
                try:
                    step = make_step(_copy_model(model, device, perf), amp, perf)
                    first[amp, perf] = n * time_step(step, views, n)
                    steps[amp, perf] = step
                except Exception as e:  # torch.compile and operators without bfloat16 raise errors of many kinds
                    error, reason = e.with_traceback(None), one_line(str(e).strip().partition('\n')[0], 120)
                    say(f'auto-perf: {perf}, amp {amp}: does not work here ({type(e).__name__}: {reason})')
            if len(steps) > before:  # time the eager ones again with the compiled ones: the load may have changed
                seconds = _time_in_turn(steps, views, n, budget / 4)
    if not steps and isinstance(error, torch.OutOfMemoryError):
        raise error
    if not steps:
        raise ValueError('no way of computing a step works here; the lines above say why')
    median = {key: statistics.median(spent) for key, spent in seconds.items()}
    for key, s in median.items():
        compiling = f', compiled in {first[key]:.0f} s' if key[1].compile else ''
        say(f'auto-perf: {key[1]}, amp {key[0]}: {shape[0] / s:.1f} samples/s (median of {len(seconds[key])} timings)'
            f'{compiling}')
    amp, perf = min(median, key=lambda key: median[key])
    say(f'auto-perf: taking {perf}, amp {amp}')
    return amp, perf


def _copy_model(model: nn.Module, device: torch.device, perf: Perf) -> nn.Module:
    trial: nn.Module = copy.deepcopy(model).to(device).to(memory_format=perf.memory_format)
    if perf.compile:
        trial.compile()
    return trial


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
