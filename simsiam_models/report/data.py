"""The images that a run was trained on, if they are still there."""
import glob
import os
from pathlib import Path
from typing import NamedTuple, cast

from ..data import DataError, Images, Stream
from ..data.opening import open_parts
from ..data.readers.arrow import ArrowImages
from ..training.setup import digest_sizes
from .run import RunFolder

ELSEWHERE = 'hf', 'hf-stream', 'pipe', 'http', 'https', 'torchvision'  # a file may not make a report fetch or run these
SYSTEM = '/proc', '/sys', '/dev'  # folders without an end


class TrainingData(NamedTuple):
    """The training images of a run; None, with a sentence that says why, if they cannot be shown."""

    images: Images | None
    problem: str = ''


def open_recorded(name: str | None, given: str | None = None) -> tuple[list[Images], str]:
    """Opens the data that a run names, or `given`; returns the training and the validation part, if there are both.

    If the data that a run names cannot be shown, returns no part, and a sentence that says why; raises ValueError if
    `given` cannot.
    """
    if given is None and str(name).partition(':')[0] in ELSEWHERE:
        return [], f'The report does not open {name} on its own; pass the data with --data.'
    if given is None and _is_endless(str(name)):
        return [], f'The report does not search {name} on its own; pass the data with --data.'
    problem = ''
    try:
        train, val, unusable = open_parts(name if given is None else given)
        if isinstance(train, Stream):
            problem = f'{train.name} is a stream without random access, so its images cannot be shown.'
    except (ValueError, OSError, RuntimeError, DataError) as e:  # RuntimeError: a package is missing
        problem = f'The data cannot be opened ({e}); if the data has moved, pass it with --data.'
    if problem and given is not None:
        raise ValueError(f'--data {given}: {problem}')
    if problem:
        return [], problem
    parts = [cast(Images, part) for part in (train, val, unusable and unusable.images) if part is not None]
    if given is None and any(isinstance(part, ArrowImages) and part.names_urls() for part in parts):
        return [], f'{name} names images by URLs, which the report does not open on its own; pass the data with --data.'
    return parts, ''


def _is_endless(name: str) -> bool:
    """Returns whether a path is a pattern to search for, or lies in one of the folders of SYSTEM."""
    path = Path(os.path.realpath(name))
    return any(path.is_relative_to(folder) for folder in SYSTEM) or glob.has_magic(name) and not os.path.exists(name)


def open_training_data(run: RunFolder, given: str | None = None) -> TrainingData:
    """Opens the data that args.json names, or `given`, and compares them with what the run was trained on."""
    parts, problem = open_recorded(run.args.get('data'), given)
    if problem:
        return TrainingData(None, problem)
    images = parts[0]
    if (run.args['digest'], run.args['images']) != (images.digest, len(images)):
        return TrainingData(None, (
            f'{images.name} has changed since the run: it has {len(images):,} images with the digest {images.digest}, '
            f'but the run had {run.args["images"]:,} with {run.args["digest"]}, so no images are shown.'))
    if run.args.get('sizes') not in (None, digest_sizes(images)):
        return TrainingData(None, (
            f'The image files in {images.name} still have the names and labels that they had when the run '
            'began, but different file sizes, so no images are shown.'))
    return TrainingData(images)
