"""Checks that a file is what its row of WEIGHTS says: the name of a file, a repository or a tag proves nothing.

What no check can tell: FAIR publishes no hash, so its files are known by their contents alone, and the first download
is trusted. A file in FAIR's own layout with FAIR's epochs and accuracy passes as FAIR's.
"""
import functools
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from ..runtime.messages import short
from . import tensorfile
from .export import describe_mismatch
from .layouts import Checkpoint
from .published import WEIGHTS, Weights
from .reading import require_numbers

HEAD_WIDTHS = 2048, 512  # of z and p, and inside the predictor
ORIGIN = ('url', 'upstream_sha256', 'layout')  # what the header of a converted file says about the authors' file
TOP1_DEVIATION = 0.5  # percent: a file's own accuracy may differ from the rounded, published one


@functools.cache
def expect_backbone(num_classes: int = 0) -> dict[str, Tensor]:
    """Returns the entries of a ResNet-50: their names and shapes, without memory."""
    return timm.create_model('resnet50', num_classes=num_classes, device='meta').state_dict()


@functools.cache
def expect_heads() -> dict[str, Tensor]:
    """Returns the entries of the published projectors and predictors: their names and shapes, without memory."""
    dim, hidden = HEAD_WIDTHS
    with torch.device('meta'):
        heads = {
            'projector.0': nn.Linear(dim, dim, bias=False), 'projector.1': nn.BatchNorm1d(dim),
            'projector.3': nn.Linear(dim, dim, bias=False), 'projector.4': nn.BatchNorm1d(dim),
            'projector.6': nn.Linear(dim, dim, bias=False), 'projector.7': nn.BatchNorm1d(dim, affine=False),
            'predictor.0': nn.Linear(dim, hidden, bias=False), 'predictor.1': nn.BatchNorm1d(hidden),
            'predictor.3': nn.Linear(hidden, dim)}
    return {f'{name}.{k}': v for name, layer in heads.items() for k, v in layer.state_dict().items()}


def read_origin(path: str | Path) -> dict[str, str]:
    """Returns what the header of a safetensors file says about the authors' file it was converted from; {} if nothing.

    It is a claim of that file, and shows a mistake rather than an attack.
    """
    header = tensorfile.read_metadata(path)
    return {key: header[key] for key in ORIGIN if key in header}


def make_origin(weights: Weights, sha256: str, layout: str) -> dict[str, str]:
    """Returns what goes into the header of a file that is converted from the authors' file of a row."""
    return {'url': weights.url, 'upstream_sha256': sha256, 'layout': layout}


def check_identity(checkpoint: Checkpoint, tag: str, weights: Weights, origin: Mapping[str, str]) -> None:
    """Raises ValueError, which names both values, if a checkpoint cannot be the file in the tag's row.

    Args:
        origin: for the authors' own file its 'upstream_sha256', as measured; for a converted one what its header says.
    """
    layout, converted = checkpoint.layout, 'layout' in origin
    if layout != weights.layout and layout in {w.layout for w in WEIGHTS.values()}:
        raise ValueError(f'the file has the layout {layout}, but {tag} is a file of the layout {weights.layout}')
    classes = len(checkpoint.model_state().get('fc.weight', ()))
    if classes != weights.num_classes:
        raise ValueError(f'the file has {f"a classifier of {classes} classes" if classes else "no classifier"}, {tag} '
                         f'has {f"one of {weights.num_classes} classes" if weights.linear else "none"}')
    expected = expect_backbone(weights.num_classes)
    if mismatch := describe_mismatch(checkpoint.model_state(), expected):
        raise ValueError(f'the backbone has {len(checkpoint.backbone)} entries, a ResNet-50 has '
                         f'{len(expected) - 2 * weights.linear}: {mismatch}')
    heads = checkpoint.heads_state()
    if heads or not (weights.linear or converted):
        check_heads(heads, tag, weights)
    _check_finite(checkpoint.model_state(), tag)
    _check_stated(checkpoint, tag, weights)
    check_origin(origin, tag, weights)
    if not converted and layout != weights.layout:
        raise ValueError(
            f'the file has the layout {layout}, as any ResNet-50 may have, and nothing shows that it comes from the '
            f"authors' file of {tag}, which has the layout {weights.layout}: use that file ({weights.url})")
    if checkpoint.info.get('bgr', False) != weights.bgr:
        raise ValueError(
            f'the file does not say that its channels were reversed from BGR to RGB, as those of {tag} must be'
            if weights.bgr else f'its channels were reversed from BGR to RGB, but {tag} was trained on RGB pixels')


def check_heads(heads: dict[str, Tensor], tag: str, weights: Weights) -> None:
    """Raises ValueError if projector and predictor are not whole, or have other widths than the published ones."""
    require_numbers(heads)
    counts, expected = ([sum(k.startswith(part) for k in x) for part in ('projector', 'predictor')]
                        for x in (heads, {} if weights.linear else expect_heads()))
    if counts != expected:
        raise ValueError(f'projector and predictor have {counts[0]} and {counts[1]} entries, those of {tag} have '
                         f'{expected[0]} and {expected[1]}: the file is incomplete, or another one')
    if not weights.linear and (mismatch := describe_mismatch(heads, expect_heads())):
        raise ValueError(f'projector and predictor are not those of {tag}: {mismatch}')
    _check_finite(heads, tag)


def _check_finite(tensors: dict[str, Tensor], tag: str) -> None:
    if bad := tensorfile.find_nonfinite(tensors):
        raise ValueError(
            f'the file holds NaN or infinity in {len(bad)} tensors ({", ".join(bad[:3])}), {tag} holds none')


def check_origin(origin: Mapping[str, str], tag: str, weights: Weights) -> None:
    """Raises ValueError if a file was converted from another file than that of the tag's row."""
    if origin.get('url', weights.url) != weights.url:
        raise ValueError(f'the file was converted from {origin["url"]}, but {tag} is {weights.url}')
    sha256, prefix = origin.get('upstream_sha256', ''), weights.sha256_prefix
    if sha256 and prefix and not sha256.startswith(prefix):
        raise ValueError(f"the authors' file has the SHA-256 {sha256[:12]}..., that of {tag} begins with {prefix}: it "
                         'is another file, or a damaged one')
    if origin.get('layout', weights.layout) != weights.layout:
        raise ValueError(f'the file was converted from the layout {origin["layout"]}, but {tag} is a file of the '
                         f'layout {weights.layout}')


def _check_stated(checkpoint: Checkpoint, tag: str, weights: Weights) -> None:
    """Raises ValueError if FAIR's file itself states another network, training length or accuracy than the row."""
    if checkpoint.layout not in ('fair', 'fair_linear'):
        return  # OpenMMLab's files have a hash
    stated = checkpoint.info
    if stated.get('arch', 'resnet50') != 'resnet50':
        raise ValueError(f'the file states the network {short(stated["arch"])}, {tag} is a resnet50')
    if checkpoint.layout == 'fair' and stated.get('epoch', weights.epochs) != weights.epochs:
        raise ValueError(f'the file states epoch {stated["epoch"]}, but {tag} was trained for {weights.epochs} epochs')
    top1 = stated.get('best_acc1')
    if checkpoint.layout == 'fair_linear' and weights.top1 is not None and not _is_near(top1, weights.top1):
        raise ValueError(f'the file states {short(top1)} % top-1, but the authors report {weights.top1} % for {tag}')


def _is_near(a: object, b: float) -> bool:
    return isinstance(a, int | float) and abs(a - b) <= TOP1_DEVIATION
