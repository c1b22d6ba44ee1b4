"""The numbers that the authors of the published weights give for them, as data; none was measured here.

published.json holds one entry per weights file and benchmark: 'tag', 'benchmark', 'metrics' (percent), 'source', 'url',
and where known 'protocol', 'confidence', 'warning', and the 'pages' that list it: its own first, then those that copied
it.
"""
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from . import sources, tensorfile

FAIR = 'https://dl.fbaipublicfiles.com/simsiam/models/'
MM0 = 'https://download.openmmlab.com/mmselfsup/simsiam/simsiam_resnet50_8xb32-coslr-'
MM1 = 'https://download.openmmlab.com/mmselfsup/1.x/simsiam/simsiam_resnet50_8xb32-coslr-'
MM1_LINEAR = '_in1k/resnet50_linear-8xb512-coslr-90e_in1k/resnet50_linear-8xb512-coslr-90e_in1k_20220825-'


class Weights(NamedTuple):
    """One published file: where it is, what trained it, and the linear top-1 (percent) that its authors publish."""

    url: str
    layout: str  # key layout of the upstream file
    epochs: int
    batch: int
    top1: float | None  # None: they publish none
    license: str
    sha256_prefix: str | None  # OpenMMLab file names carry 8 hex digits; FAIR's carry none
    num_classes: int = 0  # 1000: backbone and linear classifier


# The first tag is the default: the best published linear accuracy, under a licence that allows commercial use.
# `bgr`: trained on BGR pixels with RGB statistics; half of the MMSelfSup page's numbers belong to these two files.
WEIGHTS = {
    'mm_ep200_in1k': Weights(
        f'{MM0}200e_in1k_20220225-2f488143.pth', 'mmselfsup_0x', 200, 256, 69.84, 'apache-2.0', '2f488143'),
    'mm_ep100_in1k': Weights(
        f'{MM0}100e_in1k_20220225-68a88ad8.pth', 'mmselfsup_0x', 100, 256, 68.28, 'apache-2.0', '68a88ad8'),
    'mm1x_ep200_in1k': Weights(
        f'{MM1}200e_in1k/simsiam_resnet50_8xb32-coslr-200e_in1k_20220825-efe91299.pth',
        'mmselfsup_1x', 200, 256, 69.8, 'apache-2.0', 'efe91299'),
    'mm1x_ep100_in1k': Weights(
        f'{MM1}100e_in1k/simsiam_resnet50_8xb32-coslr-100e_in1k_20220825-d07cb2e6.pth',
        'mmselfsup_1x', 100, 256, 68.3, 'apache-2.0', 'd07cb2e6'),
    'mm1x_ep200_lin_in1k': Weights(
        f'{MM1}200e{MM1_LINEAR}519b5135.pth', 'mmselfsup_1x_linear', 200, 256, 69.8, 'apache-2.0', '519b5135', 1000),
    'mm1x_ep100_lin_in1k': Weights(
        f'{MM1}100e{MM1_LINEAR}f53ba400.pth', 'mmselfsup_1x_linear', 100, 256, 68.3, 'apache-2.0', 'f53ba400', 1000),
    'mm_ep200_bgr_in1k': Weights(
        f'{MM0}200e_in1k_20211213-b605f9f1.pth', 'mmselfsup_0x', 200, 256, 69.8, 'apache-2.0', 'b605f9f1'),
    'mm_ep100_bgr_in1k': Weights(
        f'{MM0}100e_in1k_20211230-65a0eff4.pth', 'mmselfsup_0x', 100, 256, 68.2, 'apache-2.0', '65a0eff4'),
    'fb_bs512_ep100_in1k': Weights(
        f'{FAIR}100ep/pretrain/checkpoint_0099.pth.tar', 'fair', 100, 512, 68.1, 'cc-by-nc-4.0', None),
    'fb_bs256_ep100_in1k': Weights(
        f'{FAIR}100ep-256bs/pretrain/checkpoint_0099.pth.tar', 'fair', 100, 256, 68.3, 'cc-by-nc-4.0', None),
    'fb_bs256_ep200_in1k': Weights(
        f'{FAIR}200ep-256bs/pretrain/checkpoint_0199.pth.tar', 'fair', 200, 256, None, 'cc-by-nc-4.0', None),
    'fb_bs512_ep100_lin_in1k': Weights(
        f'{FAIR}100ep/linear/model_best.pth.tar', 'fair_linear', 100, 512, 68.1, 'cc-by-nc-4.0', None, 1000),
    'fb_bs256_ep100_lin_in1k': Weights(
        f'{FAIR}100ep-256bs/linear/model_best.pth.tar', 'fair_linear', 100, 256, 68.3, 'cc-by-nc-4.0', None, 1000),
}


def tag_of_file(path: str | Path) -> str | None:
    """The tag whose file this is: those of OpenMMLab are known by their hashes."""
    found = tensorfile.file_sha256(path)
    return next((t for t, w in WEIGHTS.items() if w.sha256_prefix and found.startswith(w.sha256_prefix)), None)


@cache
def _entries() -> list[dict[str, Any]]:
    return json.loads(Path(__file__).with_name('published.json').read_text(encoding='utf-8'))


def published(tag: str) -> list[dict[str, Any]]:
    """The entries that belong to this very file; none for weights that nobody published."""
    return [entry for entry in _entries() if entry['tag'] == tag]


def same_page(tag: str) -> list[dict[str, Any]]:
    """The entries that a page lists beside those of this file although another file was measured.

    MMSelfSup's page mixes two generations of weights, and its 1.x page copies all but the linear result.
    """
    pages = {entry['pages'][0] for entry in published(tag) if 'pages' in entry}
    return [entry for entry in _entries() if entry['tag'] != tag and pages & set(entry.get('pages', []))]


def describe(tag: str) -> str:
    """Where a published file comes from and every number published for it, as text.

    Raises:
        ValueError: nobody published weights under this tag.
    """
    tag = tag.removeprefix('simsiam_resnet50.')
    if tag not in WEIGHTS:
        raise ValueError(f'{tag!r} is not a published tag: choose one of {", ".join(WEIGHTS)}')
    w = WEIGHTS[tag]
    lines = [
        f'simsiam_resnet50.{tag}: ImageNet-1k, {w.epochs} epochs, batch {w.batch}, '
        f'{f"linear classifier of {w.num_classes} classes" if w.num_classes else "no classifier"}, license {w.license}',
        f'Hub:      {sources.hub_id(f"simsiam_resnet50.{tag}")}',
        f'upstream: {w.url} (layout {w.layout}, SHA-256 '
        f'{f"begins with {w.sha256_prefix}" if w.sha256_prefix else "not published"})',
        'Numbers of this file (percent; published by its authors, not measured again here):',
        *map(_line, published(tag))]
    if others := same_page(tag):
        lines += ['On the same page, but measured with another file:', *map(_line, others)]
    return '\n'.join(lines)


def _line(entry: dict[str, Any]) -> str:
    numbers = ', '.join(f'{metric} {value}' for metric, value in entry['metrics'].items())
    remarks = [entry[key] for key in ('protocol', 'source', 'warning') if key in entry]
    if 'confidence' in entry:
        remarks.append(f'which weights: {entry["confidence"]}')
    return f'  {entry["tag"]}  {entry["benchmark"]}: {numbers} ({"; ".join(remarks)})'
