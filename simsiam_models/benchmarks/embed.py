"""Writes features of any images as NumPy files, and draws their t-SNE.

    simsiam embed PHOTOS --out photos.npz                        average pool, paths and labels
    simsiam embed PHOTOS --what avgpool feat4 --out FOLDER       one .npy file each, for more than memory holds
    simsiam embed IMAGENET --part val --what feat1 feat2 feat3 feat4 feat5 --out val.npz --tsne

The t-SNE is MMSelfSup's: the images of the first 20 classes, features without scaling, one picture per feature. Only
the seed is ours: MMSelfSup gives none, and numpy's global generator, seeded with 0, runs on from feature to feature.
"""
import argparse
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..data import open_parts
from ..data.readers.images import Images
from ..runtime.distributed import join_world
from ..runtime.files import write_atomically
from ..runtime.messages import as_text, printable, require, silent
from .backbone import load_backbone
from .features import NAMES, Features, extract
from .options import add_extraction, add_model, check_extraction, make_transform, read_extraction, read_sizes
from .protocols import LEAST

CLASSES = 20
# MMSelfSup v0.9.1, tools/analysis_tools/visualize_tsne.py, except for random_state.
TSNE = {
    'n_components': 2, 'perplexity': 30.0, 'early_exaggeration': 12.0, 'learning_rate': 200.0, 'max_iter': 1000,
    'n_iter_without_progress': 300, 'init': 'random', 'random_state': 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('data', metavar='DATA', help="as for `pretrain`: a folder of images, a list, tar shards, ...")
    add('--out', '--output', dest='output', type=Path, required=True, metavar='FILE.npz|FOLDER',
        help='file or folder for the features')
    add_model(parser)
    add('--what', nargs='+', choices=NAMES, default=['avgpool'], metavar='FEATURE',
        help='avgpool, and feat1 .. feat5, the pooled maps of the stages (default: avgpool)')
    add('--part', choices=['train', 'val'], default='train',
        help='part to use, if the data has both (default: train)')
    add('--tsne', nargs='?', type=Path, const=Path(), metavar='PNG',
        help='also draw a t-SNE picture of each feature (default: named after --out)')
    add_extraction(parser)
    add('--allow-partial', action='store_true', help='leave unreadable images out instead of stopping')


def run(args: argparse.Namespace) -> int:
    """Extracts the features, writes them, and draws the pictures."""
    check(args)
    images = _open_images(args)
    with join_world(args.device) as world:
        backbone = load_backbone(args.model, world.device, args.branch)
        transform = make_transform(args, backbone, print if world.main else silent)
        features = extract(backbone, images, args.what, transform, read_extraction(args), world)
    if not world.main:
        return 0
    for text in features.unreadable.values():
        print(f'left out: {text}')
    rows = features.readable
    labels = None if features.labels is None else features.labels[rows].astype('int64')
    _save(args.output, features, labels, list_paths(images, rows))
    print(f'{args.output}: {", ".join(f"{n} {len(rows)} x {features.array(n).shape[1]}" for n in features.names)} '
          f'of {printable(images.name)} by {backbone.name} (weights {backbone.digest})')
    if args.tsne is not None:
        _draw_pictures(args, features, labels)
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a wrong flag, RuntimeError if --tsne lacks a package."""
    if args.output.suffix not in ('', '.npz'):
        raise ValueError(f'--output {args.output}: must be a file that ends in .npz, or a folder')
    if args.output.suffix == '' and args.output.is_file():
        raise ValueError(f'--output {args.output} is a file; name a folder, or a file that ends in .npz')
    if args.tsne is not None:
        require('--tsne', sklearn='scikit-learn', matplotlib='matplotlib')
        if args.tsne != Path() and args.tsne.suffix != '.png':
            raise ValueError(f'--tsne {args.tsne}: must be a file that ends in .png')
    check_extraction(args, *read_sizes(args, LEAST))


def _open_images(args: argparse.Namespace) -> Images:
    """Opens DATA's part; raises ValueError if there is none, or too few images for --tsne."""
    train, val, unusable = open_parts(args.data)
    images = train if args.part == 'train' else val
    if images is None:
        if unusable:
            raise ValueError(
                f'{unusable.images.name} cannot be the validation part of {args.data}: {unusable.reason}; give '
                f'{unusable.images.name} itself, without --part')
        raise ValueError(f'{args.data} has no validation part; leave --part out')
    if args.tsne is not None and not hasattr(images, 'samples'):  # `extract` refuses streams
        check_count(len(select_shown(images.labels, len(images))))
    return images


def list_paths(images: Images, rows: np.ndarray) -> list[str]:
    """Returns the paths of the files, or numbers for images that are not files."""
    if not hasattr(images, 'path'):
        return [str(i) for i in rows]
    return [as_text(images.path(int(i))) for i in rows]


def _save(out: Path, features: Features, labels: np.ndarray | None, paths: list[str]) -> None:
    """Writes the readable rows to a .npz file, or to .npy files and images.json in a folder."""
    rows, classes = features.readable, [as_text(name) for name in features.classes]

    def load(name: str) -> np.ndarray:
        return features.array(name) if len(rows) == len(features) else features.rows(name, rows)

    if out.suffix:
        out.parent.mkdir(parents=True, exist_ok=True)
        arrays = {} if labels is None else {'labels': labels, 'classes': np.array(classes)}
        arrays |= {'paths': np.array(paths), **{name: load(name) for name in features.names}}
        write_atomically(out, lambda f: np.savez(_Seekless(f), **arrays))
        return
    out.mkdir(parents=True, exist_ok=True)
    for name in features.names:
        write_atomically(out / f'{name}.npy', lambda f, name=name: np.lib.format.write_array(f, load(name)))
    if labels is not None:
        write_atomically(out / 'labels.npy', lambda f: np.lib.format.write_array(f, labels))
    text = json.dumps({'paths': paths, 'classes': classes}, ensure_ascii=False)
    write_atomically(out / 'images.json', lambda f: f.write(text.encode()))


class _Seekless:
    """A file that cannot seek, so zipfile writes its members one after the other."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: Any) -> int:
        self.file.write(data)
        return memoryview(data).nbytes

    def read(self, n: int = -1) -> bytes:
        raise OSError('the file is write-only')

    def flush(self) -> None:
        self.file.flush()


def check_count(n: int) -> None:
    """Raises ValueError if n images are too few for the perplexity."""
    if n <= TSNE['perplexity']:
        raise ValueError(
            f'{n} images are too few: a t-SNE of perplexity {TSNE["perplexity"]:g} needs more than that, in the first '
            f'{CLASSES} classes if there are labels; add images, or omit --tsne')


def select_shown(labels: np.ndarray | None, n: int) -> np.ndarray:
    """Returns the indices of the images, among n, that a picture shows."""
    return np.arange(n) if labels is None else np.flatnonzero(np.asarray(labels) < CLASSES)


def compute_tsne(x: np.ndarray) -> np.ndarray:
    """Embeds (N, D) features as (N, 2) points, by scikit-learn with the parameters TSNE."""
    from sklearn.manifold import TSNE as Embedding

    check_count(len(x))  # again: some may be unreadable
    known = inspect.signature(Embedding).parameters  # max_iter was n_iter before scikit-learn 1.5
    return Embedding(**{k if k in known else 'n_iter': v for k, v in TSNE.items()}).fit_transform(x)


def _draw_pictures(args: argparse.Namespace, features: Features, labels: np.ndarray | None) -> None:
    rows = features.readable
    chosen = select_shown(labels, len(rows))
    target = args.output.with_name(f'{args.output.stem}.png') if args.tsne == Path() else args.tsne
    target.parent.mkdir(parents=True, exist_ok=True)
    for name in features.names:
        file = target if len(features.names) == 1 else target.with_name(f'{target.stem}-{name}.png')
        xy = compute_tsne(features.rows(name, rows[chosen]))
        draw_scatter(xy, None if labels is None else labels[chosen], file)
        print(f'{file}: t-SNE of {name}, {len(chosen)} images')


def draw_scatter(xy: np.ndarray, labels: np.ndarray | None, file: Path) -> None:
    """Saves a picture of 10 x 10 inches; each axis is scaled to 0 .. 1, and colours are classes."""
    from matplotlib.figure import Figure

    xy = (xy - xy.min(0)) / (xy.max(0) - xy.min(0)).clip(1e-12)
    figure = Figure(figsize=(10, 10))
    axes = figure.subplots()
    colours = {} if labels is None else {'c': labels, 'cmap': 'tab20', 'vmin': 0, 'vmax': CLASSES - 1}
    axes.scatter(*xy.T, s=15, **colours)
    axes.set_xticks([])
    axes.set_yticks([])
    figure.savefig(file)
