"""Applies a trained classifier, detector or segmenter to images.

    simsiam predict runs/photos new/*.jpg                          a table on the terminal
    simsiam predict runs/photos new --output labels.csv            or .json, .parquet
    simsiam predict mm1x_ep200_lin_in1k 'new/**/*.png' --top-k 3   a published ImageNet classifier
    simsiam predict runs/detector new --output boxes.json          boxes in COCO format, or one row per box in .csv
    simsiam predict runs/segmenter list.txt --output masks/        a mask for each image
"""
import argparse
from pathlib import Path

from ..benchmarks.detection.stored import NAME as DETECTOR
from ..benchmarks.segmentation.stored import NAME as SEGMENTER
from ..benchmarks.trained import COUNT
from ..runtime.distributed import choose_device, cores
from ..runtime.messages import check_flags
from ..runtime.precision import full_precision
from ..weights.folders import read_json
from ..weights.tensorfile import CONFIG
from .inputs import open_inputs
from .labels import predict_labels
from .masks import predict_masks
from .objects import predict_objects

CLASSIFIER = 'classifier'
KINDS = {CLASSIFIER: predict_labels, DETECTOR: predict_objects, SEGMENTER: predict_masks}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('model', metavar='MODEL', help='folder that finetune, detect or segment wrote, folder exported for timm, timm '
        'name, hf-hub:REPO, or a tag with a classifier')
    add('images', metavar='IMAGES', nargs='+', help='image files, folders (searched recursively), quoted glob '
        'patterns, lists of paths (.txt, .csv), tar shards or Parquet files')
    add('--output', '--out', dest='output', type=Path, metavar='FILE|FOLDER',
        help='.csv, .json or .parquet file (default: a table on the terminal); for a segmenter, a folder')
    add('--top-k', **COUNT, help='number of most likely classes to report (default: 5); classifiers only')
    add('--score', type=float, metavar='X', help='minimum score of objects to report (default: 0.3); detectors only')
    add('--batch-size', **COUNT, help='images per forward pass (default: 64, or 8 on a CPU); classifiers only')
    add('--workers', **COUNT, help='threads that read images (default: one per core, at most 16)')
    add('--device', metavar='D', help='cuda, mps or cpu (default: the first one available)')


def run(args: argparse.Namespace) -> int:
    """Predicts; returns 1 if no image could be read."""
    check_flags([
        ('--top-k', args.top_k, args.top_k is None or args.top_k >= 1, 'at least 1'),
        ('--score', args.score, args.score is None or 0 <= args.score <= 1, 'from 0 to 1'),
        ('--batch-size', args.batch_size, args.batch_size is None or args.batch_size >= 1, 'at least 1'),
        ('--workers', args.workers, args.workers is None or args.workers >= 0, 'at least 0')])
    kind = find_kind(args.model)
    for flag, value, its in (('--top-k', args.top_k, CLASSIFIER), ('--score', args.score, DETECTOR)):
        if value is not None and kind != its:
            raise ValueError(f'{flag} {value}: applies only to a {its}, but {args.model} is a {kind}; leave it out')
    if args.output is not None:
        check_no_image(args.output, args.images)
    device = choose_device(args.device)
    if args.workers is None:
        args.workers = min(16, cores())
    if args.batch_size is None:
        args.batch_size = 8 if device.type == 'cpu' else 64
    images = open_inputs(args.images)
    with full_precision():
        return KINDS[kind](args, images, device)


def find_kind(model: str) -> str:
    """Returns what MODEL is, by what a folder says."""
    folder = Path(model.removeprefix('local-dir:')).expanduser()
    for kind in (DETECTOR, SEGMENTER):
        if (folder / kind / CONFIG).is_file():
            return kind
        if (folder / CONFIG).is_file() and read_json(folder / CONFIG).get('format') == f'simsiam_models {kind}':
            return kind
    return CLASSIFIER


def check_no_image(output: Path, images: list[str]) -> None:
    """Raises ValueError if --output would replace a file that IMAGES names."""
    if output.is_file() and any(Path(spec).is_file() and output.samefile(spec) for spec in images):
        raise ValueError(f'--output {output} is one of IMAGES; name another file')
