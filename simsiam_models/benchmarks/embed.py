"""Features of any images as files for NumPy, and their t-SNE.

    simsiam embed PHOTOS --out photos.npz                        average pool, paths and labels
    simsiam embed PHOTOS --what avgpool feat4 --out FOLDER       one .npy for each, for more than memory holds
    simsiam embed IMAGENET --part val --what feat1 feat2 feat3 feat4 feat5 --out val.npz --tsne

The t-SNE is MMSelfSup's: images of the first 20 classes, features as they are, one picture for each.
"""
import argparse
import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..data import open_data
from ..runtime.distributed import default_device, join_world
from ..runtime.files import write_atomically
from .backbone import load_backbone
from .features import Features, extract
from .options import add_extraction, check_extraction, silent, size_and_resize, transform_of
from .protocols import LEAST

FEATURES = ('avgpool', 'feat1', 'feat2', 'feat3', 'feat4', 'feat5')
CLASSES = 20
# MMSelfSup v0.9.1, tools/analysis_tools/visualize_tsne.py.
TSNE = {
    'n_components': 2, 'perplexity': 30.0, 'early_exaggeration': 12.0, 'learning_rate': 200.0, 'max_iter': 1000,
    'n_iter_without_progress': 300, 'init': 'random', 'random_state': 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('data', metavar='DATA', help="as for train.py: a folder of images, a list, tar shards, ...")
    add('--out', '--output', dest='output', type=Path, required=True, metavar='FILE.npz|FOLDER',
        help='where the features go')
    add('--model', default='simsiam_resnet50', metavar='NAME',
        help='timm name, checkpoint, OUTPUT of train.py, local-dir:FOLDER or hf-hub:REPO (default: simsiam_resnet50)')
    add('--what', nargs='+', choices=FEATURES, default=['avgpool'], metavar='FEATURE',
        help='avgpool, and feat1 .. feat5, the pooled maps of the stages (default: avgpool)')
    add('--part', choices=['train', 'val'], default='train',
        help='of data that has a training and a validation part (default: train)')
    add('--tsne', nargs='?', type=Path, const=Path(), metavar='PNG',
        help='also a t-SNE picture of each feature (default: named as --out)')
    add_extraction(parser)
    add('--allow-partial', action='store_true', help='go on where images cannot be read; they are left out')


def run(args: argparse.Namespace) -> int:
    if args.output.suffix not in ('', '.npz'):
        raise ValueError(f'--output {args.output}: must be a file that ends in .npz, or a folder')
    if args.output.suffix == '' and args.output.is_file():
        raise ValueError(f'--output {args.output} is a file; name a folder, or a file that ends in .npz')
    if args.tsne is not None:
        check_tsne()
        if args.tsne.suffix not in ('', '.png') or args.tsne.suffix == '' and args.tsne != Path():
            raise ValueError(f'--tsne {args.tsne}: must be a file that ends in .png')
    check_extraction(args, *size_and_resize(args, LEAST))
    train, val = open_data(args.data)
    images = train if args.part == 'train' else val
    if images is None:
        if (val := Path(args.data) / 'val').is_dir():
            raise ValueError(
                f'{val}: its images have no labels, or other classes than those of train, and so are no validation '
                f'part of {args.data}; give {val} itself, without --part')
        raise ValueError(f'{args.data} has no validation part; leave --part out')
    if args.tsne is not None and not hasattr(images, 'samples'):  # a stream is refused by `extract`
        check_count(len(shown(images.labels, len(images))))
    with join_world(args.device or default_device()) as world:
        backbone = load_backbone(args.model, world.device)
        features = extract(
            backbone, images, args.what, transform_of(args, backbone, print if world.main else silent), args.cache,
            args.batch_size, args.workers, args.amp, world, args.allow_partial)
    if not world.main:
        return 0
    for text in features.unreadable.values():
        print(f'left out: {text}')
    rows = features.readable
    about = {
        'paths': paths(images, rows), 'classes': [str(name) for name in features.classes],
        'labels': None if features.labels is None else features.labels[rows].astype('int64')}
    _save(args.output, features, rows, about)
    print(f'{args.output}: {", ".join(f"{n} {len(rows)} x {features.array(n).shape[1]}" for n in features.names)} '
          f'of {images.name} by {backbone.name} (weights {backbone.digest})')
    if args.tsne is not None:
        _pictures(args, features, rows, about['labels'])
    return 0


def paths(images: Any, rows: 'np.ndarray') -> list[str]:
    """Where the files are; of images that are no files, their numbers."""
    if not hasattr(images, 'path'):
        return [str(i) for i in rows]
    # A name that is no text in any encoding has to be written somehow.
    return [str(images.path(int(i))).encode(errors='surrogateescape').decode(errors='replace') for i in rows]


def _save(out: Path, features: 'Features', rows: 'np.ndarray', about: dict[str, Any]) -> None:
    def array(name: str) -> 'np.ndarray':
        return features.array(name) if len(rows) == len(features) else features.rows(name, rows)

    tables = {} if about['labels'] is None else {'labels': about['labels'], 'classes': np.array(about['classes'])}
    if out.suffix:
        out.parent.mkdir(parents=True, exist_ok=True)
        tables |= {'paths': np.array(about['paths']), **{name: array(name) for name in features.names}}
        write_atomically(out, lambda f: np.savez(_Seekless(f), **tables))
        return
    out.mkdir(parents=True, exist_ok=True)
    for name in features.names:
        write_atomically(out / f'{name}.npy', lambda f, name=name: np.lib.format.write_array(f, array(name)))
    if about['labels'] is not None:
        write_atomically(out / 'labels.npy', lambda f: np.lib.format.write_array(f, about['labels']))
    text = json.dumps({'paths': about['paths'], 'classes': about['classes']}, ensure_ascii=False)
    write_atomically(out / 'images.json', lambda f: f.write(text.encode()))


class _Seekless:
    """A file for zipfile, which writes one after the other where it cannot seek."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: Any) -> int:
        self.file.write(data)
        return memoryview(data).nbytes

    def read(self, n: int = -1) -> bytes:
        raise OSError('only written')

    def flush(self) -> None:
        self.file.flush()


def check_tsne() -> None:
    missing = [package for name, package in (('sklearn', 'scikit-learn'), ('matplotlib', 'matplotlib'))
               if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f'--tsne needs {" and ".join(missing)}: pip install {" ".join(missing)}')


def check_count(n: int) -> None:
    if n <= TSNE['perplexity']:
        raise ValueError(
            f'{n} images for a t-SNE of perplexity {TSNE["perplexity"]:g}: more than that are needed, of the first '
            f'{CLASSES} classes where there are labels; add images, or leave --tsne out')


def shown(labels: 'np.ndarray | None', n: int) -> 'np.ndarray':
    """Which of n images a picture shows."""
    return np.arange(n) if labels is None else np.flatnonzero(np.asarray(labels) < CLASSES)


def tsne(x: 'np.ndarray') -> 'np.ndarray':
    """(N, D) -> (N, 2), as scikit-learn gives it with TSNE's parameters."""
    from sklearn.manifold import TSNE as Embedding

    check_count(len(x))  # again: some may be unreadable
    known = inspect.signature(Embedding).parameters  # max_iter was n_iter before scikit-learn 1.5
    return Embedding(**{k if k in known else 'n_iter': v for k, v in TSNE.items()}).fit_transform(x)


def _pictures(args: argparse.Namespace, features: 'Features', rows: 'np.ndarray', labels: Any) -> None:
    chosen = shown(labels, len(rows))
    target = args.output.with_name(f'{args.output.stem}.png') if args.tsne == Path() else args.tsne
    target.parent.mkdir(parents=True, exist_ok=True)
    for name in features.names:
        file = target if len(features.names) == 1 else target.with_name(f'{target.stem}-{name}.png')
        xy = tsne(features.rows(name, rows[chosen]))
        scatter(xy, None if labels is None else labels[chosen], file)
        print(f'{file}: t-SNE of {name}, {len(chosen)} images')


def scatter(xy: 'np.ndarray', labels: 'np.ndarray | None', file: Path) -> None:
    """10 x 10 inches, each axis stretched to 0 .. 1, colours by class."""
    from matplotlib.figure import Figure

    xy = (xy - xy.min(0)) / (xy.max(0) - xy.min(0)).clip(1e-12)
    figure = Figure(figsize=(10, 10))
    axes = figure.subplots()
    colours = {} if labels is None else {'c': labels, 'cmap': 'tab20', 'vmin': 0, 'vmax': CLASSES - 1}
    axes.scatter(*xy.T, s=15, **colours)
    axes.set_xticks([])
    axes.set_yticks([])
    figure.savefig(file)
