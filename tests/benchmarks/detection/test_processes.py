"""Two processes train a detector as one does."""
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import spawn
from shapes import write_shapes
from torch import nn

from simsiam_models.benchmarks.datasets.objects import open_objects
from simsiam_models.benchmarks.detection.data import Preparation, TrainLoader
from simsiam_models.benchmarks.detection.model import Detector, build
from simsiam_models.benchmarks.detection.training import make_example, make_inputs
from simsiam_models.benchmarks.pixels import Normalizer
from simsiam_models.benchmarks.transfer import Schedule, TransferTrainer
from simsiam_models.runtime.distributed import GlobalBatchNorm, World, synchronize_batchnorm

STEPS = 5


def example(detector: Detector) -> tuple:
    images, targets, keys = make_example(detector, detector.world.device)
    return [x.double() for x in images], targets, keys


def train(rank: int, folder: str, size: int, kind: str) -> dict[str, Any]:
    """Trains on batches of 4 images in `size` processes; returns the mean losses of each step and the weights."""
    world, steps = World(rank, size, torch.device('cpu')), []
    images = open_objects('folder', folder, 'mmdet').train
    detector = build('resnet10t:random', kind, 3, rois=16, pool_size=4, train_proposals=(200, 50))
    detector.double().world = world  # so that no rounding decides which of two boxes is the better one
    schedule = Schedule(
        iterations=STEPS, batch_size=4, lr=1e-3, momentum=0.9, weight_decay=1e-4, eval_every=STEPS)
    loader = TrainLoader(
        images, images.training_indices('mmdet'), Preparation((64, 80), 160, 0.5, 'mmdet', kind != 'fasterrcnn_c4'), 4,
        world, seed=0, workers=0)
    trainer = TransferTrainer(detector, schedule, world, 'off', lambda: example(detector))
    normalize = Normalizer(detector.source.mean, detector.source.std, world.device)
    trainer.net.train()
    for step, items in zip(range(STEPS), loader.load(0)):  # noqa: B905 - the loader has no end
        inputs = make_inputs(items, step, 0, normalize)
        losses = trainer.step(([x.double() for x in inputs[0]], *inputs[1:]), step)
        steps.append([x.item() for x in losses.values()])
    return {'losses': steps, 'weights': detector.state_dict()}


@pytest.mark.parametrize('kind', ['fasterrcnn_c4', 'maskrcnn_fpn'])
def test_two_processes_compute_what_one_does(kind: str, tmp_path: Path, one_thread: None):
    folder = write_shapes(tmp_path / 'shapes', 8, 1, side=64)
    whole = train(0, str(folder), 1, kind)
    a, b = spawn(train, tmp_path, str(folder), 2, kind)
    both = (torch.tensor(a['losses']) + torch.tensor(b['losses'])) / 2
    assert torch.allclose(both, torch.tensor(whole['losses']), rtol=1e-7, atol=1e-9)
    for key, value in whole['weights'].items():
        assert torch.equal(a['weights'][key], b['weights'][key]), key
        assert torch.allclose(a['weights'][key].double(), value.double(), rtol=1e-6, atol=1e-9), key


def normalize_parts(rank: int, counts: list[int]) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 3, 2, 2, dtype=torch.float64)
    world = World(rank, 2, torch.device('cpu'))
    net = synchronize_batchnorm(nn.Sequential(nn.BatchNorm2d(3)).double(), world)
    assert isinstance(net[0], GlobalBatchNorm)
    mine = x.split(counts)[rank].requires_grad_()
    y = net(mine)
    (y ** 3).sum().backward()
    return {'y': y.detach(), 'grad': mine.grad, 'mean': net[0].running_mean, 'var': net[0].running_var}


@pytest.mark.parametrize('counts', [[5, 2], [7, 0]])
def test_batch_norm_weights_the_processes_by_their_samples(counts: list[int], tmp_path: Path):
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 3, 2, 2, dtype=torch.float64).requires_grad_()
    bn = nn.BatchNorm2d(3).double()
    y = bn(x)
    (y ** 3).sum().backward()
    parts = spawn(normalize_parts, tmp_path, counts)
    assert torch.allclose(torch.cat([p['y'] for p in parts]), y.detach(), atol=1e-10)
    assert torch.allclose(torch.cat([p['grad'] for p in parts]), x.grad, atol=1e-9)
    for p in parts:
        assert torch.allclose(p['mean'], bn.running_mean) and torch.allclose(p['var'], bn.running_var)
