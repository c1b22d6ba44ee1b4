"""Predicts the class of every pixel, as masks with a palette in a folder."""
import argparse
import os
from pathlib import Path, PurePath

import torch

from ..benchmarks import segmentation
from ..benchmarks.results.record import check_output
from ..runtime.files import explain_write_errors, write_atomically
from ..runtime.messages import as_text, printable
from ..runtime.tables import FORMATS, write_table
from .inputs import Inputs
from .reading import Reader

TABLE, CLASSES = 'predictions.csv', 'classes.txt'  # beside the masks


def predict_masks(args: argparse.Namespace, images: Inputs, device: torch.device) -> int:
    """Writes a mask for each image, which mask is of which image, and what its numbers mean; returns the status."""
    folder = args.output
    if folder is None or folder.is_file() or folder.suffix.lower() in FORMATS:
        given = '' if folder is None else f' {folder}'
        raise ValueError(f'--output{given}: must be a folder for the masks, since {args.model} is a segmenter')
    names = [images.name_of(row) for row in range(len(images))]
    masks = name_masks(names)
    check_no_input(folder, [*masks, TABLE, CLASSES], [*names, *args.images])
    check_output(folder)
    predictor = segmentation.load(args.model.removeprefix('local-dir:'), str(device))
    reader = Reader(images, lambda image: image, 1, args.workers)
    for rows, pictures in reader:
        for row, image in zip(rows, pictures, strict=True):
            mask = predictor([image])[0]
            with explain_write_errors(folder, '--output'):
                predictor.save(mask, folder / masks[row])
    with explain_write_errors(folder, '--output'):
        write_table(folder / TABLE, {'path': str, 'mask': str, 'error': str}, [
            [name, None if row in reader.unreadable else masks[row], reader.unreadable.get(row)]
            for row, name in enumerate(names)])
        lines = [f'{i} {printable(as_text(name))}\n' for i, name in zip(predictor.ids, predictor.classes, strict=True)]
        write_atomically(folder / CLASSES, lambda file: file.write(''.join(lines).encode()))
    print(f'{folder}: masks of {len(images) - len(reader.unreadable):,} of {len(images):,} images; {TABLE} lists '
          f'them, and {CLASSES} says which class each pixel value is')
    return reader.report()


def name_masks(names: list[str]) -> list[str]:
    """Returns the relative path of each image's mask: its path below the common folder, with the extension .png.

    If two images differ only in their extension, .png is appended to it in the name of every mask.

    >>> name_masks(['x/a.jpg', 'x/b/a.jpg']), name_masks(['x/a.jpg', 'x/a.png'])
    (['a.png', 'b/a.png'], ['a.jpg.png', 'a.png.png'])
    """
    paths = [os.path.abspath(name) for name in names]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    inner = [PurePath(os.path.relpath(path, root)) for path in paths]
    short = {path: str(path.with_suffix('.png')) for path in inner}
    distinct = len({name.casefold() for name in short.values()}) == len(short)
    return [short[path] if distinct else f'{path}.png' for path in inner]


def check_no_input(folder: Path, outputs: list[str], inputs: list[str]) -> None:
    """Raises ValueError if a file in `folder` would replace one that is read."""
    read = {os.path.realpath(name) for name in inputs}
    if taken := next((name for name in outputs if os.path.realpath(folder / name) in read), None):
        raise ValueError(f'--output {folder}: would overwrite {taken}, which is one of IMAGES; name another folder')
