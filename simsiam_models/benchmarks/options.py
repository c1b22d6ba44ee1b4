"""Flags that several benchmarks share: the model, the image size, and how features are extracted."""
import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.messages import check_flags, short, silent  # noqa: F401 - silent is looked for here
from .backbone import Backbone
from .features import Transform
from .protocols import LEAST, SIZE
from .samples import Pair


def add_extraction(
    parser: argparse.ArgumentParser,
    size: str = "pixels of the centre crop (default: the model's own, 224 where it has none; CIFAR: 32)",
    resize: str = 'short side before that (default: image size x 8/7; CIFAR: the same)',
) -> None:
    """What `extract` takes, and the transform, with these help texts."""
    add = parser.add_argument
    add('--image-size', type=int, metavar='N', help=size)
    add('--resize', type=int, metavar='N', help=resize)
    add('--device', metavar='D', help='cuda, mps or cpu (default: the first of these that is there)')
    add('--batch-size', type=int, default=256, metavar='N',
        help='images in a forward pass (default: 256; a CPU takes 8 at most)')
    add('--workers', type=int, metavar='N', help='threads that read images (default: one for each core, at most 16)')
    add('--amp', choices=['auto', 'off', 'bfloat16'], default='auto',
        help='precision of the forward pass (default: auto, which is off, as published)')
    add('--cache', type=Path, metavar='DIR', help="features are kept there (default: the package's cache)")
    parser.set_defaults(kept='finished features are kept, the same command goes on')  # cli says so of a stopped one


def is_small(dataset: str) -> bool:
    """Its images are of 32 px and stay what they are."""
    return dataset.startswith('cifar')


def sizes(dataset: str, size: int | None, resize: int | None, own: int = SIZE) -> tuple[int, int]:
    """Pixels of the crop, and of the short side before it, where flags may say neither; `own`: the model's size."""
    small = is_small(dataset)
    size = (32 if small else own) if size is None else size
    return size, (size if small else round(size * 8 / 7)) if resize is None else resize


def check_sizes(size: int, resize: int) -> None:
    """Raises ValueError."""
    if size < LEAST:
        raise ValueError(f'--image-size {size}: must be at least {LEAST} pixels')
    if resize < size:
        raise ValueError(f'--resize {resize}: must be at least the image size, {size}')


def size_and_resize(args: argparse.Namespace, own: int = SIZE) -> tuple[int, int]:
    """`sizes` as the flags of a command say; a command without --dataset has no small images."""
    return sizes(getattr(args, 'dataset', ''), args.image_size, args.resize, own)


def say_size(args: argparse.Namespace, backbone: Backbone, say: Callable[[str], Any]) -> None:
    if args.image_size is None and not is_small(getattr(args, 'dataset', '')) and backbone.image_size != SIZE:
        say(f'images of {backbone.image_size} px, the size in the configuration of {backbone.name} (--image-size '
            'changes it)')


def transform_of(args: argparse.Namespace, backbone: Backbone, say: Callable[[str], Any]) -> Transform:
    """Raises ValueError where --resize is less than the model's own size."""
    size, resize = size_and_resize(args, backbone.image_size)
    check_extraction(args, size, resize)
    say_size(args, backbone, say)
    return Transform(resize, size)


def check_extraction(args: argparse.Namespace, size: int, resize: int) -> None:
    """Raises ValueError. Before there is a model, size and resize are those of LEAST."""
    check_sizes(size, resize)
    rules = [
        ('--batch-size', args.batch_size, args.batch_size is None or args.batch_size >= 1, 'at least 1'),
        ('--workers', args.workers, args.workers is None or args.workers >= 0, 'at least 0')]
    check_flags(rules)


def without_test_image(pair: Pair) -> str | None:
    """One line where classes of the training images have no test image."""
    missing = np.setdiff1d(pair.train.labels, pair.test.labels)
    if not len(missing):
        return None
    names = short(', '.join(str(pair.train.classes[i]) for i in missing))
    return f'{len(missing)} of {pair.counts["classes"]} classes have no test image: {names}'
