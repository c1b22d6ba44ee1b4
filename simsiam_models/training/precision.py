"""Which precision the forward pass runs in."""
import statistics
import time

import torch
from torch import nn

AMP = {'bfloat16': torch.bfloat16, 'float16': torch.float16, 'off': None}


def choose_amp(name: str, device: torch.device) -> str:
    """Resolve `auto`: bfloat16 where the card has it, else float16 on CUDA; on a CPU what a short timing says.

    Raises:
        ValueError: float16 on a CPU, whose operators lack it.
    """
    if name == 'float16' and device.type == 'cpu':
        raise ValueError('--amp float16 does not run on a CPU; use --amp auto, bfloat16 or off')
    if name != 'auto':
        return name
    if device.type == 'cuda':
        return 'bfloat16' if torch.cuda.get_device_capability(device)[0] >= 8 else 'float16'
    return 'bfloat16' if device.type == 'cpu' and _bfloat16_is_faster() else 'off'


def _bfloat16_is_faster(rounds: int = 5) -> bool:
    """By the median time of a small convolution, batch norm and ReLU, forward and backward."""
    layer = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(16, 64, 16, 16, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with torch.random.fork_rng(devices=[]):
        for _ in range(rounds + 1):
            for bf16, spent in seconds.items():
                start = time.perf_counter()
                with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
                    y = layer(x)
                y.float().sum().backward()
                spent.append(time.perf_counter() - start)
    return statistics.median(seconds[True][1:]) < 0.9 * statistics.median(seconds[False][1:])
