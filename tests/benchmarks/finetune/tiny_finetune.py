"""A tiny fine-tuning run, and images of which some cannot be read, for the tests of this folder."""
import argparse
from pathlib import Path

import numpy as np
import torch

from simsiam_models.benchmarks.finetune import command
from simsiam_models.benchmarks.finetune.settings import Settings, resolve_plain, resolve_semi
from simsiam_models.data import UnreadableError
from simsiam_models.runtime.distributed import World

NETWORK = '{"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64], "stem_width": 8, "stem_type": "deep"}'
TINY = (
    '--model', 'resnet18:random', '--model-args', NETWORK, '--image-size', '32', '--resize', '36', '--device', 'cpu',
    '--workers', '0')
PLAIN = (
    *TINY, '--epochs', '6', '--batch-size', '32', '--lr', '0.06', '--warmup-epochs', '1', '--layer-decay', '0.9',
    '--flip-p', '0', '--crop-scale', '0.7', '1', '--randaugment', 'rand-m3-inc1', '--mixup', '0.1', '--cutmix', '0')
ALONE = World(0, 1, torch.device('cpu'))


def parse(*args: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(a) for a in args])


def settings(*args: str, images: int = 50_000) -> Settings:
    ((_, s),) = resolve_plain(parse('x', '--out', 'y', *args), images)
    return s


def semi(*args: str, share: str = '1pct') -> list[tuple[Path, Settings]]:
    return resolve_semi(parse('x', '--out', 'o', '--protocol', f'semi_{share}', '--list', 'f.txt', *args))


class Broken:
    """Images some of which cannot be read."""

    name, classes, digest = 'broken', ['a', 'b'], 'ab' * 8

    def __init__(self, n: int, bad: set[int]) -> None:
        self.n, self.bad, self.labels = n, bad, np.arange(n) % 2

    def __len__(self) -> int:
        return self.n

    def read(self, index: int) -> np.ndarray:
        if index in self.bad:
            raise UnreadableError(f'{index}.jpg: torn')
        return np.full((8, 8, 3), index, np.uint8)
