"""Segmentation: a training step and a prediction of FCN-D8 against torchvision's fcn_resnet50 at the same size.

    python tests/perf/segmentation.py                                  # CPU: medians of --rounds, ratios, peak memory
    python tests/perf/segmentation.py --device cuda --amp bfloat16     # GPU: also images/s of the published protocols

Steps of both models are timed in turn, on the same images. torchvision's head has one convolution, ours has three, as
published: with --same-head, torchvision's model gets our heads, so that only the code differs. Nothing is gated.
"""
import argparse
import functools
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from simsiam_models.benchmarks.protocols import SEGMENTATION
from simsiam_models.benchmarks.segmentation.model import FCNHead, build
from simsiam_models.benchmarks.transfer import Schedule, TransferTrainer
from simsiam_models.runtime.distributed import World, synchronize

CLASSES = 21
Step = Callable[[Tensor, Tensor, int], object]


def make_batch(n: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, side, side, generator=rng)
    masks = torch.randint(CLASSES, (n, side // 8, side // 8), generator=rng)
    masks = masks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return images.to(device), F.pad(masks, (0, side % 8, 0, side % 8), value=255).to(device)


def make_ours(device: torch.device, amp: str) -> tuple[Step, nn.Module]:
    schedule = Schedule(iterations=1000, batch_size=2, lr=1e-4, momentum=0.9, weight_decay=5e-4, eval_every=1000)
    model = build('simsiam_resnet50:random', CLASSES).to(device)
    trainer = TransferTrainer(model, schedule, World(0, 1, device), amp, tuple, weights={'aux': 0.4})
    return lambda images, masks, i: trainer.step((images, masks), i), model


def make_torchvision(device: torch.device, amp: str, same_head: bool) -> tuple[Step, nn.Module]:
    from torchvision.models.segmentation import fcn_resnet50

    model = fcn_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True)
    if same_head:
        model.classifier = FCNHead(2048, 512, CLASSES, 2, True, 0.1)
        model.aux_classifier = FCNHead(1024, 256, CLASSES, 1, False, 0.1)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9, weight_decay=5e-4)

    def step(images: Tensor, masks: Tensor, i: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp != 'off'):
            out = model(images.contiguous(memory_format=torch.channels_last))
        loss, aux = (F.cross_entropy(out[k].float(), masks, ignore_index=255) for k in ('out', 'aux'))
        optimizer.zero_grad(set_to_none=True)
        (loss + 0.4 * aux).backward()
        optimizer.step()

    return step, model


def make_both(args: argparse.Namespace, device: torch.device) -> dict[str, tuple[Step, nn.Module]]:
    return {'ours': make_ours(device, args.amp), 'torchvision': make_torchvision(device, args.amp, args.same_head)}


def time_call(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def compare(args: argparse.Namespace, device: torch.device) -> None:
    both = make_both(args, device)
    images, masks = make_batch(args.batch, args.side, device)
    spent: dict[str, list[float]] = {name: [] for name in both}
    for i in range(args.rounds + 1):
        for name, (step, _) in both.items():
            seconds = time_call(lambda step=step, i=i: step(images, masks, i), device)
            if i:  # the first one warms up
                spent[name].append(seconds)
    report('training step', spent, args, device)
    spent = {name: [] for name in both}
    calls = {'ours': both['ours'][1].eval().compute_logits, 'torchvision': lambda x: both['torchvision'][1](x)['out']}
    both['torchvision'][1].eval()
    with torch.no_grad():
        for i in range(args.rounds + 1):
            for name, call in calls.items():
                seconds = time_call(lambda call=call: call(images), device)
                if i:
                    spent[name].append(seconds)
    report('prediction', spent, args, device)


def report(what: str, spent: dict[str, list[float]], args: argparse.Namespace, device: torch.device) -> None:
    medians = {name: statistics.median(times) for name, times in spent.items()}
    print(f'{what}, {args.batch} images of {args.side} px, {device.type}, amp {args.amp}, n {args.rounds}: ours '
          f'{1 / medians["ours"]:.3f} iterations/s, torchvision {1 / medians["torchvision"]:.3f}, ratio '
          f'{medians["torchvision"] / medians["ours"]:.2f}', flush=True)


def measure_memory(which: str, args: argparse.Namespace, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    step = (make_ours(device, args.amp) if which == 'ours' else make_torchvision(device, args.amp, args.same_head))[0]
    images, masks = make_batch(args.batch, args.side, device)
    for i in range(2):
        step(images, masks, i)
    peak = torch.cuda.max_memory_allocated() if device.type == 'cuda' else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    queue.put(peak)


def compare_memory(args: argparse.Namespace) -> None:
    context, peaks = multiprocessing.get_context('spawn'), {}
    for which in ('ours', 'torchvision'):
        queue = context.Queue()
        process = context.Process(target=measure_memory, args=(which, args, queue))
        process.start()
        peaks[which] = queue.get(timeout=1200)
        process.join()
    print(f'peak memory of two steps: ours {peaks["ours"] / 2**30:.2f} GiB, torchvision '
          f'{peaks["torchvision"] / 2**30:.2f} GiB', flush=True)


def time_protocols(args: argparse.Namespace, device: torch.device) -> None:
    """Images/s at the published batch and size."""
    for name, p in SEGMENTATION.items():
        step, _ = make_ours(device, args.amp)
        images, masks = make_batch(p.batch_size, p.crop, device)
        call = functools.partial(step, images, masks, 0)
        call()
        seconds = statistics.median(time_call(call, device) for _ in range(args.rounds))
        print(f'{name}: {p.batch_size / seconds:.1f} images/s, batch {p.batch_size}, {p.crop} px, amp {args.amp}, peak '
              f'{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, n {args.rounds}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--amp', choices=['off', 'bfloat16'], default='off')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--side', type=int, default=256)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--same-head', action='store_true')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    compare(args, device)
    compare_memory(args)
    if device.type == 'cuda':
        time_protocols(args, device)


if __name__ == '__main__':
    main()
