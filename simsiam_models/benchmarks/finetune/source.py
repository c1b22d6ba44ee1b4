"""The images of a fine-tuning run: which of them train, and which validate."""
import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...data import open_data
from ...data.readers.images import Images, contents_digest
from ...data.readers.index import digest
from ..datasets.classification import open_pair
from ..datasets.lists import labelled_subset
from ..samples import check_every_class_trains, split, subset


@dataclass
class Source:
    """Training and validation images. The labels of both number `classes`."""

    train: Images
    val: Images
    classes: list[str]
    validation: str  # where the validation images come from
    digest: str


def open_source(args: argparse.Namespace) -> Source:
    """Opens the user's own images; with --protocol the listed images and the data set's test images."""
    if args.protocol == 'plain':
        train, val, validation = open_labelled(args.data, args.val_share, args.seed)
    else:
        pair = open_pair(args.dataset, args.data, args.allow_partial)
        train, val = pair.train, pair.test
        if args.list is not None:
            train = labelled_subset(train, args.protocol.removeprefix('semi_'), args.list, args.allow_partial)
        if not args.allow_partial:
            check_every_class_trains(train)
        validation = f"the data set's {len(val)} test images"
    return Source(
        train, val, [str(c) for c in train.classes], validation, digest(contents_digest(train), contents_digest(val)))


def open_labelled(spec: str, share: float, seed: int) -> tuple[Images, Images, str]:
    """Opens training and validation images; the string says where the latter come from.

    Validation images lie beside the training images, or are a seeded `share` of each class.

    Raises:
        ValueError: there are no labels, or there is only one class; a val folder has other classes; a class has no
            training image.
    """
    images, val = open_data(spec)
    if hasattr(images, 'samples') or images.labels is None:
        raise ValueError(f'{spec}: no labels; fine-tuning needs one subfolder per class, or a list with labels')
    for part in ('val', 'valid', 'validation'):
        if val is None and Path(spec, 'train').is_dir() and Path(spec, part).is_dir():
            found = {p.name for p in Path(spec, part).iterdir() if p.is_dir()}
            odd = sorted(found.symmetric_difference(images.classes))
            reason = f'{odd[0]!r} is in one of them only' if odd else 'the folder is not called val'
            raise ValueError(
                f'{Path(spec, part)}: not the {len(images.classes)} classes of {Path(spec, "train")}: {reason}; give '
                'both the same class folders under train and val')
    if len(np.unique(images.labels)) < 2:
        raise ValueError(f'{spec}: one class only; a classifier needs at least two')
    check_every_class_trains(images)
    if val is not None:
        return images, val, f'{len(val)} images of {val.name}'
    train, held = split(np.asarray(images.labels), share, seed)
    if not len(held):
        raise ValueError(f'{spec}: no class has two images, so none can be held out; add images, or a val folder')
    text = f'{len(held)} of {len(images)} images, {share:g} of each class, held out by seed {seed}'
    if single := sum(np.bincount(images.labels) == 1):
        text += f'; {single} classes have one image and are not validated'
    return subset(images, train), subset(images, held), text
