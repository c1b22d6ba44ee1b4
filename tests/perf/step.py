"""How long a training step takes: the paper's plain step against ours, in one interleaved run.

  python tests/perf/step.py                                 ResNet-18 (CIFAR), 32 px, batch 64, all cores
  python tests/perf/step.py --model simsiam_resnet50 --size 224 --batch 256 --proj-layers 3 --device cuda \\
    --steps 'plain fp32' 'ours bf16' 'ours bf16, compiled'

plain      two forward passes in contiguous memory, torch's default SGD, loss.item() after each step, as in FAIR's
           main_simsiam.py; bf16 adds a line of autocast
ours       train.py's train_step, channels last and without torch.compile unless the name says otherwise
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

from simsiam_models import SimSiam, simsiam_loss
from simsiam_models.data import Augmentation
from simsiam_models.runtime.distributed import World, synchronize
from simsiam_models.training.recipes import Recipe
from simsiam_models.training.setup import make_model
from simsiam_models.training.step import Perf, Trainer, train_step

PLAIN = 'plain fp32'
PLAINS = {PLAIN: False, 'plain bf16': True}  # with autocast
OURS = {
    'ours fp32': ('off', Perf()), 'ours bf16': ('bfloat16', Perf()), 'ours fp16': ('float16', Perf()),
    'ours bf16, contiguous': ('bfloat16', Perf(channels_last=False)),
    'ours bf16, compiled': ('bfloat16', Perf(compile=True))}
USUAL = [*PLAINS, 'ours fp32', 'ours bf16']


def plain_step(model: SimSiam, recipe: Recipe, autocast: bool, x1: Tensor, x2: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)

    def step() -> float:
        with torch.autocast(x1.device.type, torch.bfloat16, enabled=autocast):
            loss = simsiam_loss(*model(x1, x2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()
    return step


def our_step(
    model: SimSiam, recipe: Recipe, amp: str, perf: Perf, x1: Tensor, x2: Tensor,
) -> Callable[[], object]:
    model.to(memory_format=perf.memory_format).train()
    if perf.compile:
        model.compile()
    x1, x2 = (x.contiguous(memory_format=perf.memory_format) for x in (x1, x2))  # as the data arrive in a run
    trainer = Trainer(model, recipe, World(0, 1, x1.device), amp, perf)
    return lambda: train_step(trainer, x1, x2)


def milliseconds(step: Callable[[], object], device: torch.device, steps: int) -> float:
    """Per step, of several that follow each other."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return 1000 * (time.perf_counter() - start) / steps


def measure(recipe: Recipe, device: torch.device, names: list[str], together: int, rounds: int) -> dict:
    """Returns, by step: ms in each round, seconds of the first step, peak bytes on a card; or its error."""
    torch.backends.cudnn.benchmark = True  # as in FAIR's script; our Trainer does it, too
    model, size = make_model(recipe, 0).to(device), recipe.augmentation.size
    x1, x2 = torch.randn(2, recipe.batch_size, 3, size, size, device=device)
    steps, found = {}, {name: {'ms': []} for name in names}
    for name in names:
        trial = copy.deepcopy(model)
        if device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(device)
        try:
            step = plain_step(trial, recipe, PLAINS[name], x1, x2) if name in PLAINS else our_step(
                trial, recipe, *OURS[name], x1, x2)
            found[name]['first_s'] = milliseconds(step, device, 1) / 1000
            milliseconds(step, device, together)
            steps[name] = step
        except (RuntimeError, torch.OutOfMemoryError) as e:  # no float16 on a CPU, no compiler, no memory
            found[name]['error'] = f'{type(e).__name__}: {str(e).splitlines()[0]}'
        if device.type == 'cuda':
            found[name]['peak_bytes'] = torch.cuda.max_memory_allocated(device)
    for _ in range(rounds):
        for name, step in steps.items():
            found[name]['ms'].append(milliseconds(step, device, together))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='simsiam_resnet18_cifar')
    parser.add_argument('--size', type=int, default=32, help='pixels')
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--proj-layers', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--steps', nargs='+', choices=[*PLAINS, *OURS], default=USUAL)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = Recipe(
        '', model=args.model, proj_layers=args.proj_layers, batch_size=args.batch,
        augmentation=Augmentation(size=args.size))
    together = 1 if args.device == 'cpu' else 10
    found = measure(recipe, torch.device(args.device), args.steps, together, args.rounds)
    name = torch.cuda.get_device_name(args.device) if args.device != 'cpu' else f'CPU, {args.threads} threads'
    load = ' '.join(f'{x:.2f}' for x in os.getloadavg())
    print(f'{args.model}, {args.size} px, batch {args.batch}; {name}, torch {torch.__version__}; medians of '
          f'{args.rounds} interleaved rounds; load average at the end {load}')
    medians = {name: statistics.median(f['ms']) for name, f in found.items() if f['ms']}
    for name, f in found.items():
        if name not in medians:
            print(f'{name:22} {f["error"]}')
            continue
        ratio = ', '.join(f'{medians[p] / medians[name]:.2f} x {p}' for p in PLAINS if p in medians)
        print(f'{name:22} {medians[name]:9.1f} ms per step ({min(f["ms"]):.1f} .. {max(f["ms"]):.1f})   {ratio}')


if __name__ == '__main__':
    main()
