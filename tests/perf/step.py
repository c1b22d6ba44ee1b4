"""How long a training step takes: the paper's plain step against ours, in one interleaved run.

  python tests/perf/step.py                                 ResNet-18 (CIFAR), 32 px, batch 64, all cores
  python tests/perf/step.py --model simsiam_resnet50 --size 224 --batch 256 --proj-layers 3 --device cuda

plain      two forward passes in fp32 and contiguous memory, torch's default SGD, loss.item() after each step, as in
           FAIR's main_simsiam.py
ours       train.py's train_step, without --compile
"""
import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from simsiam_models import SimSiam, create_simsiam, simsiam_loss
from simsiam_models.runtime.distributed import World, synchronize
from simsiam_models.training.recipes import Recipe
from simsiam_models.training.step import Trainer, train_step


def plain_step(model: SimSiam, recipe: Recipe, x1: Tensor, x2: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)

    def step() -> float:
        loss = simsiam_loss(*model(x1, x2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()
    return step


def our_step(model: SimSiam, recipe: Recipe, amp: str, x1: Tensor, x2: Tensor) -> Callable[[], object]:
    model.to(memory_format=torch.channels_last).train()
    x1, x2 = (x.contiguous(memory_format=torch.channels_last) for x in (x1, x2))  # as the data arrive in a run
    trainer = Trainer(model, recipe, World(0, 1, x1.device), amp)
    return lambda: train_step(trainer, x1, x2)


def milliseconds(step: Callable[[], object], device: torch.device, steps: int) -> float:
    """Per step, of several that follow each other."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return 1000 * (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='simsiam_resnet18_cifar')
    parser.add_argument('--size', type=int, default=32, help='pixels')
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--proj-layers', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    recipe = Recipe('', model=args.model, proj_layers=args.proj_layers, batch_size=args.batch)
    model = create_simsiam(args.model, dim=2048, pred_dim=512, proj_layers=args.proj_layers).to(device)
    x1, x2 = torch.randn(2, args.batch, 3, args.size, args.size, device=device)
    steps = {
        'plain fp32': plain_step(copy.deepcopy(model), recipe, x1, x2),
        'ours fp32': our_step(copy.deepcopy(model), recipe, 'off', x1, x2),
        'ours bf16': our_step(copy.deepcopy(model), recipe, 'bfloat16', x1, x2)}

    together = 10 if device.type == 'cuda' else 1
    spent = {name: [] for name in steps}
    for _ in range(2 + args.rounds):
        for name, step in steps.items():
            spent[name].append(milliseconds(step, device, together))
    medians = {name: statistics.median(times[2:]) for name, times in spent.items()}

    parameters = sum(p.numel() for p in model.parameters())
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'CPU, {args.threads} threads'
    load = ' '.join(f'{x:.2f}' for x in os.getloadavg())
    print(f'{args.model}, {args.size} px, batch {args.batch}, {parameters:,} parameters; {name}, torch '
          f'{torch.__version__}; medians of {args.rounds} interleaved rounds; load average at the end {load}')
    for name, ms in medians.items():
        quick, slow = min(spent[name][2:]), max(spent[name][2:])
        print(f'{name:12} {ms:9.1f} ms per step ({quick:.1f} .. {slow:.1f})   {medians["plain fp32"] / ms:.2f} x plain')


if __name__ == '__main__':
    main()
