"""Detection: a training step against torchvision's Mask R-CNN of the same size, and the metric against pycocotools.

    python tests/perf/detection.py                                     # CPU: ratios, medians of --rounds, peak memory
    python tests/perf/detection.py --device cuda --amp bfloat16        # GPU: also images/s of two published protocols

Steps of both models are timed in turn, on the same images and objects. Nothing is gated.
"""
import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from simsiam_models.benchmarks.detection.model import build
from simsiam_models.benchmarks.protocols import DETECTION
from simsiam_models.benchmarks.transfer import Schedule, TransferTrainer
from simsiam_models.runtime.distributed import World, synchronize


def make_batch(n: int, height: int, width: int, device: torch.device, classes: int = 80) -> tuple:
    """Images and targets with 8 objects each, and the keys of their samples."""
    rng = torch.Generator().manual_seed(0)
    images = [torch.randn(3, height, width, generator=rng).to(device) for _ in range(n)]
    targets = []
    for _ in range(n):
        low = torch.rand(8, 2, generator=rng) * torch.tensor([width, height]) * 0.6
        boxes = torch.cat([low, low + 8 + torch.rand(8, 2, generator=rng) * torch.tensor([width, height]) * 0.3], 1)
        masks = torch.zeros(8, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        targets.append({'boxes': boxes, 'labels': torch.randint(classes, (8,), generator=rng), 'masks': masks})
    return images, targets, list(range(n))


def make_ours(device: torch.device, amp: str, kind: str = 'maskrcnn_fpn', classes: int = 80) -> Callable[..., object]:
    schedule = Schedule(iterations=100, batch_size=2, lr=1e-4, momentum=0.9, weight_decay=1e-4, eval_every=100)
    model = build('simsiam_resnet50:random', kind, classes).to(device)
    return TransferTrainer(model, schedule, World(0, 1, device), amp, tuple).step


def make_torchvision(device: torch.device, amp: str, side: int) -> Callable[..., object]:
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

    model = maskrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=81, trainable_backbone_layers=5, min_size=side,
        max_size=4 * side, image_mean=[0, 0, 0], image_std=[1, 1, 1]).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9, weight_decay=1e-4)

    def step(inputs: tuple, number: int) -> None:
        images, targets, _ = inputs
        targets = [{k: (v + (k == 'labels')).to(device) for k, v in t.items()} for t in targets]
        with torch.autocast(device.type, torch.bfloat16, enabled=amp != 'off'):
            losses = model(images, targets)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer.step()

    return step


def time_call(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def compare_steps(args: argparse.Namespace, device: torch.device) -> None:
    height, width = args.side, args.side * 4 // 3
    batch = make_batch(args.batch, height, width, device)
    ours, theirs = make_ours(device, args.amp), make_torchvision(device, args.amp, args.side)
    spent: dict[str, list[float]] = {'ours': [], 'torchvision': []}
    for i in range(args.rounds + 1):
        for name, step in (('ours', ours), ('torchvision', theirs)):
            seconds = time_call(functools.partial(step, batch, i), device)
            if i:  # the first one warms up
                spent[name].append(seconds)
    medians = {name: statistics.median(times) for name, times in spent.items()}
    print(f'maskrcnn_fpn, {args.batch} images of {height} x {width}, {device.type}, amp {args.amp}, n {args.rounds}: '
          f'ours {1 / medians["ours"]:.3f} iterations/s, torchvision {1 / medians["torchvision"]:.3f}, '
          f'ratio {medians["torchvision"] / medians["ours"]:.2f}')


def measure_memory(which: str, args: argparse.Namespace, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    step = make_ours(device, args.amp) if which == 'ours' else make_torchvision(device, args.amp, args.side)
    batch = make_batch(args.batch, args.side, args.side * 4 // 3, device)
    for i in range(2):
        step(batch, i)
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
          f'{peaks["torchvision"] / 2**30:.2f} GiB')


def time_protocols(args: argparse.Namespace, device: torch.device) -> None:
    """Images/s at the published batch, on images of the largest published size."""
    for name, classes in (('voc0712_c4_24k', 20), ('coco_fpn_1x', 80)):
        p = DETECTION[name]
        step = make_ours(device, args.amp, p.detector, classes)
        batch = make_batch(p.batch_size, 800, 1088, device, classes)
        step(batch, 0)
        seconds = statistics.median(
            time_call(functools.partial(step, batch, i), device) for i in range(args.rounds))
        print(f'{name}: {p.batch_size / seconds:.1f} images/s, batch {p.batch_size}, 800 x 1088, amp {args.amp}, peak '
              f'{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, n {args.rounds}')


def compare_metrics(rounds: int) -> None:
    """20,000 detections in 1,000 images: our metric against COCOeval alone."""
    import tempfile

    from PIL import Image
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    from simsiam_models.benchmarks.datasets.objects import open_objects
    from simsiam_models.benchmarks.detection.metrics import Detections, coco_metrics, to_coco_results

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root, images, annotations = Path(folder), [], []
        (root / 'images').mkdir()
        for i in range(1000):
            Image.new('RGB', (64, 48)).save(root / f'images/{i:04}.png')
            images.append({'id': i, 'file_name': f'images/{i:04}.png', 'width': 64, 'height': 48})
            for x, y in rng.uniform(0, 30, (7, 2)):
                w, h = rng.uniform(4, 18, 2)
                annotations.append({
                    'id': len(annotations) + 1, 'image_id': i, 'category_id': int(rng.integers(80)) + 1,
                    'bbox': [x, y, w, h], 'area': w * h, 'iscrowd': 0})
        content = {'images': images, 'annotations': annotations,
                   'categories': [{'id': k + 1, 'name': f'c{k}'} for k in range(80)]}
        for part in ('train', 'val'):
            (root / f'{part}.json').write_text(json.dumps(content))
        test = open_objects('folder', root, 'mmdet').test
        found = []
        for _ in range(1000):
            low = rng.uniform(0, 30, (20, 2))
            found.append(Detections(
                np.concatenate([low, low + rng.uniform(4, 18, (20, 2))], 1).astype(np.float32),
                np.sort(rng.random(20).astype(np.float32))[::-1], rng.integers(80, size=20), None))
        rows = list(range(1000))
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(root / 'val.json'))
            results = to_coco_results(test, rows, found)

        def alone() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                evaluation = COCOeval(truth, truth.loadRes(results), 'bbox')
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()

        cpu = torch.device('cpu')
        measure = functools.partial(coco_metrics, test, rows, found)
        pairs = [(time_call(measure, cpu), time_call(alone, cpu)) for _ in range(rounds)]
        ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(f'20,000 detections: ours {ours:.2f} s, pycocotools alone {theirs:.2f} s, ratio {ours / theirs:.3f}, '
              f'n {rounds}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--amp', choices=['off', 'bfloat16'], default='off')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--side', type=int, default=256)
    parser.add_argument('--threads', type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    compare_steps(args, device)
    compare_memory(args)
    compare_metrics(args.rounds)
    if device.type == 'cuda':
        time_protocols(args, device)


if __name__ == '__main__':
    main()
