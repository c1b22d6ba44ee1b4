"""Published weights as data: a table of the files, and the numbers that their authors report for them.

None was measured here. published.json holds one entry per weights file and benchmark: 'tag', 'benchmark', 'metrics'
(percent), 'source', 'url'; if known, 'protocol', 'confidence', 'warning', and 'pages': its own, then copies.
"""
import json
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.utils import HFValidationError, validate_repo_id
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from . import tensorfile

NAME = 'simsiam_resnet50'  # the model of all published weights
MMSELFSUP_0 = 'OpenMMLab (MMSelfSup 0.x)'


class Weights(NamedTuple):
    """One published file: its address, its training, and the linear top-1 (percent) that its authors report."""

    url: str
    layout: str  # key layout of the upstream file
    publisher: str
    project: str  # address of the publisher's repository
    license: str
    epochs: int
    batch: int
    top1: float | None  # None: not reported
    sha256_prefix: str | None = None  # OpenMMLab's file names end in 8 hex digits; FAIR publishes no hash
    num_classes: int = 0  # 1000: the file holds a linear classifier
    bgr: bool = False  # trained on BGR pixels with RGB statistics; our copies take RGB, see `layouts.reverse_channels`
    counterpart: str | None = None  # classifier: tag of its pretraining weights; BGR weights: tag of the RGB weights

    @property
    def linear(self) -> bool:
        return self.num_classes > 0


def _openmmlab(folder: str, name: str, **facts: Any) -> Weights:
    url = f'https://download.openmmlab.com/mmselfsup/{folder}simsiam/simsiam_resnet50_8xb32-coslr-{name}.pth'
    return Weights(url, license='apache-2.0', batch=256, sha256_prefix=name[-8:], **facts)


def _fair(name: str, layout: str = 'fair', **facts: Any) -> Weights:
    url = f'https://dl.fbaipublicfiles.com/simsiam/models/{name}.pth.tar'
    return Weights(
        url, layout, publisher='Facebook AI Research (facebookresearch/simsiam)',
        project='https://github.com/facebookresearch/simsiam', license='cc-by-nc-4.0', **facts)


_mm0 = partial(
    _openmmlab, '', layout='mmselfsup_0x', publisher=MMSELFSUP_0, project='https://github.com/open-mmlab/mmselfsup')
_mm0_bgr = partial(_mm0, bgr=True)
_mm1 = partial(
    _openmmlab, '1.x/', layout='mmselfsup_1x', publisher='OpenMMLab (MMSelfSup 1.x, MMPretrain)',
    project='https://github.com/open-mmlab/mmpretrain')
_mm1_lin = partial(_mm1, layout='mmselfsup_1x_linear', num_classes=1000)
_fair_linear = partial(_fair, layout='fair_linear', num_classes=1000)
MM1_LINEAR = '_in1k/resnet50_linear-8xb512-coslr-90e_in1k/resnet50_linear-8xb512-coslr-90e_in1k_20220825-'

# The first tag is the default: the best reported linear accuracy under a licence that allows commercial use.
# Half of the numbers on the MMSelfSup page belong to the two BGR files.
WEIGHTS = {
    'mm_ep200_in1k': _mm0('200e_in1k_20220225-2f488143', epochs=200, top1=69.84),
    'mm_ep100_in1k': _mm0('100e_in1k_20220225-68a88ad8', epochs=100, top1=68.28),
    'mm1x_ep200_in1k': _mm1(
        '200e_in1k/simsiam_resnet50_8xb32-coslr-200e_in1k_20220825-efe91299', epochs=200, top1=69.8),
    'mm1x_ep100_in1k': _mm1(
        '100e_in1k/simsiam_resnet50_8xb32-coslr-100e_in1k_20220825-d07cb2e6', epochs=100, top1=68.3),
    'mm1x_ep200_lin_in1k': _mm1_lin(f'200e{MM1_LINEAR}519b5135', epochs=200, top1=69.8, counterpart='mm1x_ep200_in1k'),
    'mm1x_ep100_lin_in1k': _mm1_lin(f'100e{MM1_LINEAR}f53ba400', epochs=100, top1=68.3, counterpart='mm1x_ep100_in1k'),
    'mm_ep200_bgr_in1k': _mm0_bgr('200e_in1k_20211213-b605f9f1', epochs=200, top1=69.8, counterpart='mm_ep200_in1k'),
    'mm_ep100_bgr_in1k': _mm0_bgr('100e_in1k_20211230-65a0eff4', epochs=100, top1=68.2, counterpart='mm_ep100_in1k'),
    'fb_bs512_ep100_in1k': _fair('100ep/pretrain/checkpoint_0099', epochs=100, batch=512, top1=68.1),
    'fb_bs256_ep100_in1k': _fair('100ep-256bs/pretrain/checkpoint_0099', epochs=100, batch=256, top1=68.3),
    # Not in the project's README: the address and 69.8 are from the author's comment in its issue 18.
    'fb_bs256_ep200_in1k': _fair('200ep-256bs/pretrain/checkpoint_0199', epochs=200, batch=256, top1=69.8),
    'fb_bs512_ep100_lin_in1k': _fair_linear(
        '100ep/linear/model_best', epochs=100, batch=512, top1=68.1, counterpart='fb_bs512_ep100_in1k'),
    'fb_bs256_ep100_lin_in1k': _fair_linear(
        '100ep-256bs/linear/model_best', epochs=100, batch=256, top1=68.3, counterpart='fb_bs256_ep100_in1k'),
}
# "Trained on BGR" follows from dates in open-mmlab/mmselfsup: its loader gave BGR pixels to transforms with RGB
# statistics (issue 205) until pull request 210, commit 89e94dc3 of 2022-02-10, released in v0.7.0.
BGR_EVIDENCE = {
    'mm_ep100_bgr_in1k': 'inferred, on strong evidence: its log starts on 2021-12-25, when the loader gave BGR',
    'mm_ep200_bgr_in1k': 'inferred, on weaker evidence: the file, of 2021-12-13, is two days older than the first '
                         'public commit of the loader that gave BGR'}
RESULTS: list[dict[str, Any]] = json.loads(Path(__file__).with_name('published.json').read_text(encoding='utf-8'))


def hub_id(name: str) -> str:
    """Returns the Hub repository of 'simsiam_resnet50.TAG'."""
    return f'{hub_namespace() or "simsiam-models"}/{name}'


def hub_namespace() -> str:
    """Returns the namespace that SIMSIAM_HUB_NAMESPACE names, '' if none. Raises ValueError if it can be none."""
    namespace = os.environ.get('SIMSIAM_HUB_NAMESPACE', '').strip()
    try:
        validate_repo_id(f'{namespace}/{NAME}' if namespace else NAME)
        namespace.encode('ascii')  # older clients admit letters that the Hub does not
    except (HFValidationError, UnicodeEncodeError):
        raise ValueError(
            f'SIMSIAM_HUB_NAMESPACE={namespace!r} cannot be a user or an organization on the Hub, whose names consist '
            'of letters, digits, "-", "_" and "."; correct it, or unset it') from None
    return namespace


def pixel_statistics(bgr: bool) -> dict[str, tuple[float, float, float]]:
    """Returns mean and std, for R, G, B from 0 to 1, of the pixels that weights take; `bgr` as in `Weights`.

    The training normalized B, G, R by the statistics of R, G, B; with the channels reversed, so are the statistics.
    """
    step = -1 if bgr else 1
    return {name: (x[0], x[1], x[2]) for name, x in (
        ('mean', IMAGENET_DEFAULT_MEAN[::step]), ('std', IMAGENET_DEFAULT_STD[::step]))}


def find_tag(path: str | Path) -> str | None:
    """Returns the tag of a file from OpenMMLab, found by its hash; None for any other file."""
    sha256 = tensorfile.hash_file(path)
    return next((t for t, w in WEIGHTS.items() if w.sha256_prefix and sha256.startswith(w.sha256_prefix)), None)


def find_results(tag: str) -> list[dict[str, Any]]:
    """Returns the published entries of exactly this file; an empty list for unpublished weights."""
    return [entry for entry in RESULTS if entry['tag'] == tag]


def find_page_results(tag: str) -> list[dict[str, Any]]:
    """Returns the entries of other files that this file's page lists next to its own.

    The MMSelfSup page mixes two generations of weights, and its 1.x page copies all but the linear result.
    """
    pages = {entry['pages'][0] for entry in find_results(tag) if 'pages' in entry}
    return [entry for entry in RESULTS if entry['tag'] != tag and pages & set(entry.get('pages', []))]


def describe(tag: str) -> str:
    """Describes the origin of a published file and lists every number published for it."""
    tag = tag.removeprefix(f'{NAME}.')
    if tag not in WEIGHTS:
        raise ValueError(f'{tag!r} is not a published tag: choose one of {", ".join(WEIGHTS)}')
    w = WEIGHTS[tag]
    lines = [
        f'{NAME}.{tag}: ImageNet-1k, {w.epochs} epochs, batch {w.batch}, '
        f'{f"linear classifier of {w.num_classes} classes" if w.linear else "no classifier"}, license {w.license}',
        f'Hub:      {hub_id(f"{NAME}.{tag}")} (used only if it is pinned, or if SIMSIAM_HUB_NAMESPACE names it)',
        f'upstream: {w.url} (layout {w.layout}, SHA-256 '
        f'{f"begins with {w.sha256_prefix}" if w.sha256_prefix else "not published"}), of {w.project}',
        *_describe_pixels(tag, w),
        'Numbers of this file (percent; published by its authors, not measured again here):',
        *map(_format_entry, find_results(tag))]
    if others := find_page_results(tag):
        lines += ['On the same page, but measured with another file:', *map(_format_entry, others)]
    return '\n'.join(lines)


def _describe_pixels(tag: str, weights: Weights) -> list[str]:
    if not weights.bgr:
        return []
    mean, std = (', '.join(map(str, x)) for x in pixel_statistics(True).values())
    return [
        f'pixels:   RGB with mean ({mean}) and std ({std}), as for every tag, since the input channels of conv1 are '
        f'reversed when the file is read. It was trained on BGR pixels with RGB statistics ({BGR_EVIDENCE[tag]}).']


def _format_entry(entry: dict[str, Any]) -> str:
    remarks = [entry[key] for key in ('protocol', 'source', 'warning') if key in entry]
    remarks += [f'which weights: {entry["confidence"]}'] if 'confidence' in entry else []
    return f'  {entry["tag"]}  {entry["benchmark"]}: {format_metrics(entry)} ({"; ".join(remarks)})'


def format_metrics(entry: dict[str, Any]) -> str:
    return ', '.join(f'{metric} {value}' for metric, value in entry['metrics'].items())
