"""Chooses the precision of the forward pass, and runs it in that precision."""
import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

AMP = {'bfloat16': torch.bfloat16, 'float16': torch.float16, 'off': None}


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
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


def choose_amp(name: str, device: torch.device, model: nn.Module, shape: Sequence[int]) -> str:
    """Resolves `auto`: bfloat16 if the GPU supports it, else float16 on CUDA; on a CPU a short timing decides.

    `model` and the `shape` (B, 3, H, W) of its views are the run's: whether bfloat16 is faster depends on both.

    Raises:
        ValueError: float16 on a CPU, which lacks operators for it.
    """
    if name == 'float16' and device.type == 'cpu':
        raise ValueError('--amp float16 does not run on a CPU; use --amp bfloat16 or off')
    if name != 'auto':
        return name
    if device.type == 'cuda':
        return 'bfloat16' if torch.cuda.get_device_capability(device)[0] >= 8 else 'float16'
    return 'bfloat16' if device.type == 'cpu' and _bfloat16_is_faster(model, shape) else 'off'


def _bfloat16_is_faster(model: nn.Module, shape: Sequence[int], rounds: int = 15, seconds: float = 5.0) -> bool:
    """Compares the median times of forward and backward of a copy of the model, with both precisions in turn.

    For large images a part of the batch is enough, but at least 8 samples: the heads' weights cost the same for any
    batch. At least 3 rounds run, then as many as the seconds allow.
    """
    trial = copy.deepcopy(model).to('cpu', memory_format=torch.channels_last)
    batch, *image = shape
    batch = min(batch, max(8, 2**18 // (image[1] * image[2])))
    x = torch.randn(batch, *image, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    spent: dict[bool, list[float]] = {False: [], True: []}
    with torch.random.fork_rng(devices=[]):
        try:
            for bf16 in spent:
                _forward_backward(trial, x, bf16)
        except RuntimeError:  # an operator of this model does not support bfloat16
            return False
        end = time.perf_counter() + seconds
        while len(spent[True]) < 3 or len(spent[True]) < rounds and time.perf_counter() < end:
            for bf16, times in spent.items():
                times.append(_forward_backward(trial, x, bf16))
    return statistics.median(spent[True]) < 0.9 * statistics.median(spent[False])


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
