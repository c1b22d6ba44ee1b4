"""Chooses the precision of the forward pass, and runs it in that precision."""
import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

TRIAL, ENOUGH = 4.0, 0.2  # seconds of the trial of bfloat16; of a pass, beyond which more samples tell nothing
AMP = {'bfloat16': torch.bfloat16, 'float16': torch.float16, 'off': None}


def autocast(device: torch.device, amp: str) -> AbstractContextManager[Any]:
    """The forward pass in a precision of AMP."""
    return torch.autocast(device.type, AMP[amp]) if AMP[amp] else nullcontext()


def widen(x: Tensor) -> Tensor:
    """Returns a tensor of 16 bits per number, from autocast, in float32, and every other one as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def suggest_off(amp: str) -> str:
    """Returns advice for numbers that are not finite: ', or use --amp off (...)', or '' if it is off already."""
    return '' if amp == 'off' else f', or use --amp off (now {amp})'


def make_scaler(device: torch.device, amp: str) -> torch.amp.GradScaler:
    """Scales the loss in float16, and does nothing otherwise."""
    return torch.amp.GradScaler(device.type, enabled=amp == 'float16')


def choose_amp(name: str, device: torch.device, model: nn.Module | None, shape: Sequence[int]) -> str:
    """Resolves `auto`: bfloat16 if the GPU supports it, else float16 on CUDA; on a CPU a short timing decides.

    `model` and the `shape` (B, 3, H, W) of its views are the run's: whether bfloat16 is faster depends on both. Without
    a model, `auto` is `off` on a CPU.

    Raises:
        ValueError: float16 on a CPU, which lacks operators for it.
    """
    if name == 'float16' and device.type == 'cpu':
        raise ValueError('--amp float16 does not run on a CPU; use --amp bfloat16 or off')
    if name != 'auto':
        return name
    if device.type == 'cuda':
        return 'bfloat16' if torch.cuda.get_device_capability(device)[0] >= 8 else 'float16'
    try_it = device.type == 'cpu' and has_bfloat16()
    return 'bfloat16' if model is not None and try_it and _bfloat16_is_faster(model, shape) else 'off'


def has_bfloat16() -> bool:
    """Returns whether bfloat16 may be faster on this CPU; with AVX2 alone it is emulated, many times slower."""
    return torch.backends.cpu.get_cpu_capability() != 'AVX2'


def fewest_samples(shape: Sequence[int]) -> int:
    """Returns with how many samples of `shape` the trial of bfloat16 begins."""
    return min(shape[0], max(2, 2**14 // (shape[2] * shape[3])))


def _bfloat16_is_faster(model: nn.Module, shape: Sequence[int], rounds: int = 15, seconds: float = TRIAL) -> bool:
    """Compares the median times of forward and backward of a copy of the model, with both precisions in turn.

    A part of the batch is enough if it takes a while; a slow model is timed with a few samples, and once.
    """
    trial = copy.deepcopy(model).to('cpu').to(memory_format=torch.channels_last)
    n, end = fewest_samples(shape), time.perf_counter() + seconds
    spent: dict[bool, list[float]] = {False: [], True: []}
    with torch.random.fork_rng(devices=[]):
        x = _make_views(n, shape)
        _forward_backward(trial, x, False)
        while (once := _forward_backward(trial, x, False)) < ENOUGH and n < shape[0]:
            n = min(4 * n, shape[0])
            x = _make_views(n, shape)
        try:
            if _forward_backward(trial, x, True) > max(1.0, 4 * once):  # the first time is always the slowest
                return False
        except RuntimeError:  # an operator of this model does not support bfloat16
            return False
        while not spent[True] or len(spent[True]) < rounds and time.perf_counter() < end:
            for bf16, times in spent.items():
                times.append(_forward_backward(trial, x, bf16))
    return statistics.median(spent[True]) < 0.9 * statistics.median(spent[False])


def _make_views(n: int, shape: Sequence[int]) -> torch.Tensor:
    x = torch.randn(n, *shape[1:], generator=torch.Generator().manual_seed(0))
    return x.to(memory_format=torch.channels_last)


def _forward_backward(model: nn.Module, x: torch.Tensor, bf16: bool) -> float:
    """Returns the time in seconds."""
    start = time.perf_counter()
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        outputs = model(x, x)
    sum(y.float().sum() for y in outputs).backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


@contextmanager
def full_precision() -> Iterator[None]:
    """Computes float32 convolutions in float32, although CUDA would use TF32 by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
