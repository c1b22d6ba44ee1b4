"""Flags that several benchmarks share: the model, the image size, and how features are extracted."""
import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..data.evaluation import Transform
from ..runtime.distributed import World
from ..runtime.messages import check_flags, counted, printable, short
from .backbone import Backbone
from .features import Extraction
from .protocols import LEAST, SIZE
from .samples import Pair
from .shared_images import report_shared


class FlagParser(argparse.ArgumentParser):
    """Raises ValueError instead of ending the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_flags(
    name: str, add_arguments: Callable[[argparse.ArgumentParser], Any], data: str | Path, output: str | Path,
    flags: dict[str, Any],
) -> argparse.Namespace:
    """Parses a command's arguments from Python: names without dashes, such as batch_size=4 for --batch-size 4.

    Raises ValueError for a wrong or unknown one.
    """
    parser = FlagParser(name, add_help=False, allow_abbrev=False)
    add_arguments(parser)
    words = [str(data), '--output', str(output)]
    for flag, value in flags.items():
        if value is not None and value is not False:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            words += [f'--{flag.replace("_", "-")}', *([] if value is True else [text])]
    return parser.parse_args(words)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--model', default='simsiam_resnet50', metavar='NAME',
        help='timm name, checkpoint, OUTPUT of `pretrain`, local-dir:FOLDER or hf-hub:REPO (default: simsiam_resnet50)')
    parser.add_argument(
        '--branch', metavar='NAME', help='which network to load from a checkpoint with several, for example teacher')


def add_held_out(parser: argparse.ArgumentParser, seed: bool = True) -> None:
    """Adds the flags of the images that are held out of data without a validation part."""
    parser.add_argument(
        '--val-share', type=float, default=0.2, metavar='X',
        help='share of each class to hold out if DATA has no validation part (default: 0.2)')
    if seed:
        parser.add_argument(
            '--seed', type=int, default=0, metavar='N', help='seed of the held-out images (default: 0)')


def check_held_out(args: argparse.Namespace) -> None:
    """Raises ValueError if a flag of `add_held_out` is out of range."""
    check_flags([
        ('--val-share', f'{args.val_share:g}', 0 < args.val_share < 1, 'above 0 and below 1'),
        ('--seed', args.seed, 0 <= args.seed < 2**63, f'in 0 .. {2**63 - 1}')])


def add_extraction(
    parser: argparse.ArgumentParser,
    size: str = "pixels of the centre crop (default: the model's own size, or 224 if it has none; CIFAR: 32)",
    resize: str = 'short side before the crop (default: image size x 8/7; CIFAR: the image size)',
) -> None:
    """Adds the flags of the transform, with these help texts, and those that `read_extraction` reads."""
    add = parser.add_argument
    add('--image-size', type=int, metavar='N', help=size)
    add('--resize', type=int, metavar='N', help=resize)
    add('--device', metavar='D', help='cuda, mps or cpu (default: the first one available)')
    add('--batch-size', type=int, default=256, metavar='N',
        help='images in a forward pass (default: 256; at most 8 on a CPU)')
    add('--workers', type=int, metavar='N', help='threads that read images (default: one per core, at most 16)')
    add('--amp', choices=['auto', 'off', 'bfloat16'], default='auto',
        help='precision of the forward pass (default: auto, which is off, as published)')
    add('--cache', type=Path, metavar='DIR', help="folder that keeps the features (default: the package's cache)")
    parser.set_defaults(kept='finished features are kept; the same command continues')  # cli prints it after Ctrl-C


def read_extraction(args: argparse.Namespace) -> Extraction:
    return Extraction(args.cache, args.batch_size, args.workers, args.amp, args.allow_partial)


def is_small(dataset: str) -> bool:
    """Returns whether the images of a data set have 32 px and keep that size."""
    return dataset.startswith('cifar')


def choose_sizes(dataset: str, size: int | None, resize: int | None, own: int = SIZE) -> tuple[int, int]:
    """Returns the sizes of the crop and of the short side before it, in pixels.

    None stands for the default; `own` is the model's size.
    """
    small = is_small(dataset)
    size = (32 if small else own) if size is None else size
    return size, (size if small else round(size * 8 / 7)) if resize is None else resize


def read_sizes(args: argparse.Namespace, own: int = SIZE) -> tuple[int, int]:
    """Calls `choose_sizes` for a command's flags; a command without --dataset has no small images."""
    return choose_sizes(getattr(args, 'dataset', ''), args.image_size, args.resize, own)


def check_sizes(size: int, resize: int) -> None:
    """Raises ValueError if the crop is too small or does not fit into the resized image."""
    check_flags([
        ('--image-size', size, size >= LEAST, f'at least {LEAST} pixels'),
        ('--resize', resize, resize >= size, f'at least the image size, {size}')])


def check_extraction(args: argparse.Namespace, size: int, resize: int) -> None:
    """Raises ValueError for a flag outside its range. Before the model is known, pass the sizes for LEAST."""
    check_sizes(size, resize)
    check_flags([
        ('--batch-size', args.batch_size, args.batch_size is None or args.batch_size >= 1, 'at least 1'),
        ('--workers', args.workers, args.workers is None or args.workers >= 0, 'at least 0')])


def report_size(args: argparse.Namespace, backbone: Backbone, say: Callable[[str], Any]) -> None:
    """Prints the image size if the model chose it and it is not the protocols' 224 px."""
    if args.image_size is None and not is_small(getattr(args, 'dataset', '')) and backbone.image_size != SIZE:
        say(f'images of {backbone.image_size} px, the size in the configuration of {backbone.name} (--image-size '
            'changes it)')


def make_transform(args: argparse.Namespace, backbone: Backbone, say: Callable[[str], Any]) -> Transform:
    """Returns the transform that the flags ask for; raises ValueError if --resize is below the model's own size."""
    size, resize = read_sizes(args, backbone.image_size)
    check_extraction(args, size, resize)
    report_size(args, backbone, say)
    return Transform(resize, size)


def report_pair(pair: Pair, world: World, say: Callable[[str], Any] = print) -> None:
    """Prints what is trained and tested on, which classes have no image, and which images are in both parts.

    The main process alone compares them, and notes the result in `pair.shared`.
    """
    if not world.main:
        return
    say(printable(
        f'{pair.train.name}: {counted(len(pair.train), "training image")} of {pair.counts["classes"]} classes; tested '
        f'on {pair.tested_on}'))
    pair.shared = report_shared(pair.train, pair.test, say)
    present = np.unique(np.asarray(pair.train.labels))
    absent = np.setdiff1d(np.arange(pair.classes), present)
    untested = np.setdiff1d(present, np.asarray(pair.test.labels))
    for missing, n, part in ((absent, pair.classes, 'training'), (untested, len(present), 'test')):
        if len(missing):
            names = short(', '.join(str(pair.train.classes[i]) for i in missing[:100]))
            say(f'{len(missing)} of {n} classes have no {part} image: {names}')
