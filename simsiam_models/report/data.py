"""The images that a run was trained on, if they are still there."""
import glob
import os
from typing import NamedTuple

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
    """Opens the data that a run names, or `given`; returns the parts for training and validation.

    The latter may have other classes.

    If they cannot be shown, returns no part, and a sentence that says why.
    """
    if given is None and str(name).partition(':')[0] in ELSEWHERE:
        return [], f'The report does not open {name} on its own; pass the data with --data.'
    if given is None and (glob.has_magic(str(name)) or os.path.realpath(str(name)).startswith(SYSTEM)):
        return [], f'The report does not search {name} on its own; pass the data with --data.'
    try:
        train, val, unusable = open_parts(name if given is None else given)
    except (ValueError, OSError, RuntimeError, DataError) as e:  # RuntimeError: a package is missing
        return [], f'The data cannot be opened ({e}); if the data has moved, pass it with --data.'
    if isinstance(train, Stream):
        return [], f'{train.name} is a stream without random access, so its images cannot be shown.'
    parts = [part for part in (train, val, unusable and unusable.images) if part is not None]
    if given is None and any(isinstance(part, ArrowImages) and part.names_urls() for part in parts):
        return [], f'{name} names images by URLs, which the report does not open on its own; pass the data with --data.'
    return parts, ''


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
