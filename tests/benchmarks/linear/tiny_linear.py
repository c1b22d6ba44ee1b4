"""Linear evaluations of a tiny backbone on a few digits, for the tests of this folder."""
import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from conftest import write_digits

from simsiam_models import cli
from simsiam_models.benchmarks.backbone import load_backbone
from simsiam_models.benchmarks.datasets.classification import open_pair
from simsiam_models.benchmarks.linear.frozen import FrozenBackbone
from simsiam_models.benchmarks.linear.protocol import ChosenProtocol
from simsiam_models.benchmarks.linear.training import KEYS, LinearRun
from simsiam_models.benchmarks.protocols import LINEAR, LinearProtocol
from simsiam_models.data import MemoryImages
from simsiam_models.runtime.distributed import World
from simsiam_models.runtime.lifecycle import Lifecycle
from simsiam_models.runtime.messages import silent
from simsiam_models.runtime.signals import Signals

CPU = torch.device('cpu')
ALONE = World(0, 1, CPU)
MODEL = 'resnet10t:random'
SMALL = ['--image-size', '32', '--resize', '32', '--batch-size', '48', '--device', 'cpu']
# The protocols, shortened for 100 images.
SHORT = {
    'fair': ['--epochs', '3', '--lr', '60'], 'mmselfsup': ['--epochs', '3', '--eval-every', '2'],
    'moco': ['--epochs', '3', '--lr-steps', '1', '2'],
    'mhead': ['--epochs', '3', '--lr-steps', '2', '--report-epochs', '2', '--eval-every', '3']}


def write_split_digits(root: Path, n: int = 160, train: int = 100) -> Path:
    """The first `train` digits to learn from, 100 of which make batches of 48, 48 and 4; the others to test on."""
    write_digits(root / 'train', n)
    for path in sorted((root / 'train').rglob('*.*')):
        if int(path.stem) >= train:
            target = root / 'val' / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
    return root


def arguments(data: Path, output: Path, protocol: str, *more: str) -> list[str]:
    return [
        'linear', str(data), '--protocol', protocol, '--model', MODEL, '--output', str(output), *SMALL,
        *SHORT.get(protocol, []), *more]


def parse(data: Path, output: Path, protocol: str, *more: str) -> argparse.Namespace:
    return cli.build_parser().parse_args(arguments(data, output, protocol, *more))


def measure(data: Path, output: Path, protocol: str, *more: str) -> int:
    """`simsiam linear`, but errors are raised."""
    args = parse(data, output, protocol, *more)
    return args.run(args)


def read_record(output: Path) -> dict:
    (path,) = output.glob('*.json')
    return json.loads(path.read_text())


def same_numbers(a: dict, b: dict) -> bool:
    return a['metrics'] == b['metrics'] and a['extra'] == b['extra'] and a['protocol'] == b['protocol']


def small_protocol(name: str, **numbers) -> LinearProtocol:
    return dataclasses.replace(LINEAR[name], **{'image_size': 24, 'resize': 32, 'batch_size': 4, **numbers})


def make_run(
    data: Path, protocol: str, world: World = ALONE, micro_batch: int = 256, minutes: float = 10.0, **numbers,
) -> LinearRun:
    # Batches of 33, 33, 33 and 1, of which one of two processes has nothing; with batch norm of 49, 49 and 2.
    p = small_protocol(protocol, **{
        'image_size': 32, 'batch_size': 49 if protocol == 'mhead' else 33, 'epochs': 2, 'lr_steps': (),
        'report_epochs': (), **numbers})
    life = Lifecycle(
        data.parent / f'{protocol}-{world.size}.pth', KEYS, world, Signals(), silent, minutes=minutes, keep_last=1)
    frozen = FrozenBackbone(load_backbone(MODEL), p, world.device)
    return LinearRun(
        ChosenProtocol(p, {}), frozen, open_pair('folder', str(data)), life, workers=0, micro_batch=micro_batch,
        identity={})


class Photos(MemoryImages):
    """Images of noise of several sizes."""

    def __init__(self, n: int = 11) -> None:
        super().__init__(np.zeros((n, 1, 1, 3), np.uint8), np.arange(n) % 3, ['a', 'b', 'c'], 'photos')
        rng = np.random.default_rng(0)
        shapes = [(40 + 7 * (i % 3), 50 - 5 * (i % 4), 3) for i in range(n)]
        self.images = [rng.integers(0, 256, s, dtype=np.uint8) for s in shapes]

    def read(self, index: int) -> np.ndarray:
        return self.images[index]
