"""Weights to start from: --init-from fills the backbone, and the heads where they fit, before the first step."""
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor

from ..resnet import warn_of_licence
from ..runtime.checkpoint import LAST
from ..runtime.lifecycle import ARGS
from ..simsiam import SimSiam
from ..weights import sources, tensorfile
from ..weights.export import check_finite, describe_mismatch
from ..weights.folders import read_json
from ..weights.identity import read_origin
from ..weights.layouts import load_checkpoint
from ..weights.networks import find_weights, load_trained
from ..weights.published import NAME, WEIGHTS, pixel_statistics
from ..weights.reading import find_export, is_safetensors, read, read_head
from ..weights.tensorfile import CONFIG, HEADS, MODEL
from .recipes import Recipe

KEY = 'init_from'  # in args.json


class Initial(NamedTuple):
    """Weights for a new run, and what is said and recorded about them."""

    state: dict[str, Tensor]  # entries of `SimSiam`: those of the backbone, and of both heads or of none
    record: dict[str, Any]  # source, tag, sha256 of `state`, heads
    text: str


class Source(NamedTuple):
    """What a file, a folder or a tag holds."""

    backbone: dict[str, Tensor]
    heads: dict[str, Tensor]  # projector and predictor under the names of `SimSiam`
    tag: str | None = None  # of published weights
    mean: tuple[float, ...] = pixel_statistics(False)['mean']  # of the pixels that the backbone takes
    stem: dict[str, Any] = {}  # arguments of the network that no entry shows


def load_initial(source: str, model: SimSiam, recipe: Recipe) -> Initial:
    """Reads the weights that a new run of `recipe` starts from.

    Args:
        source: a published tag, OUTPUT of a run (its newest checkpoint), an exported folder, or a checkpoint of any
            layout that `load_checkpoint` knows.
        model: the run's; it stays as it is.

    Raises:
        FileNotFoundError, RuntimeError: there are no such weights, or they cannot be downloaded.
        ValueError: they cannot be read, or are not those of the recipe's backbone.
    """
    try:
        found = _read_tag(tag) if (tag := find_tag_name(source)) else _read_path(Path(source))
        check_finite({**found.backbone, **found.heads}, source)
    except (ValueError, FileNotFoundError) as e:
        text = str(e).removeprefix(f'{source}: ')
        hint = '; `simsiam convert FILE FOLDER --to timm --branch NAME` extracts one' if '--branch' in text else ''
        raise type(e)(f'--init-from {source}: {text}{hint}') from None
    if found.tag:
        warn_of_licence(f'{NAME}.{found.tag}', WEIGHTS[found.tag])
    own = model.state_dict()
    if mismatch := describe_mismatch(found.backbone, model.backbone.state_dict()):
        raise ValueError(
            f'--init-from {source}: its backbone is not the {recipe.model} of this run: {mismatch}; name that network '
            'with --model and --model-args')
    if any(recipe.model_args.get(k) != v for k, v in found.stem.items()):
        raise ValueError(
            f'--init-from {source}: its network has a non-standard stem; add it to --model-args: '
            f'{json.dumps({**recipe.model_args, **found.stem})}')
    state, misfit = {f'backbone.{k}': v for k, v in found.backbone.items()}, 'the source has none'
    if found.heads:
        misfit = describe_mismatch(found.heads, {k: v for k, v in own.items() if not k.startswith('backbone.')})
        state |= {} if misfit else found.heads
    sha256 = tensorfile.hash_tensors(state)
    said = f'backbone only; projector and predictor start at random ({misfit})' if misfit else 'backbone, projector ' \
        'and predictor'
    if tuple(found.mean) != pixel_statistics(False)['mean']:
        said += f'; the weights were trained on pixels with the mean {tuple(found.mean)}, and now get the usual one'
    record = {'source': name_source(source), 'tag': found.tag, 'sha256': sha256, 'heads': not misfit}
    return Initial(state, record, f'starting from {record["source"]}: {said}; SHA-256 {sha256[:16]}')


def find_tag_name(source: str) -> str | None:
    """Returns the published tag that `source` names, with or without the name of the model; None if it names a path."""
    tag = source.removeprefix(f'{NAME}.')
    return tag if tag in WEIGHTS and not Path(source).exists() else None


def is_here(source: str) -> bool:
    """Returns whether these weights can be read without a download."""
    if not (tag := find_tag_name(source)):
        return os.path.exists(source)  # Path.exists raises for a folder of another user
    files = [MODEL] if WEIGHTS[tag].linear else [MODEL, HEADS]
    return all(sources.find_cached(f'{NAME}.{tag}', WEIGHTS[tag], filename) for filename in files)


def name_source(source: str) -> str:
    """Returns the full name of a tag, or the absolute path."""
    tag = find_tag_name(source)
    return f'{NAME}.{tag}' if tag else str(Path(source).resolve())


def match_initial(
    source: str | None, recorded: dict[str, Any], model: SimSiam, recipe: Recipe, where: Path,
) -> dict[str, Any]:
    """Returns what to record about the first weights of a run that goes on: {} if they were random.

    The file is read only if its name has changed. Raises ValueError if the run in `where`, a folder or a checkpoint,
    began otherwise.
    """
    theirs = recorded.get(KEY)
    if theirs is None and source is None:
        return {}
    if theirs is None:
        raise ValueError(f'{where} holds a run that started without --init-from; give another --output')
    if source is None:
        raise ValueError(
            f'{where} holds a run that started from given weights; add --init-from {theirs["source"]} to continue it, '
            'or give another --output')
    if name_source(source) != theirs['source']:
        check_same(load_initial(source, model, recipe), theirs, where)
    return {KEY: theirs}


def check_same(initial: Initial, recorded: dict[str, Any], where: Path) -> None:
    """Raises ValueError if these are not the weights that the run in `where` began from."""
    ours, theirs = initial.record['sha256'][:16], recorded['sha256'][:16]
    if ours != theirs:
        raise ValueError(
            f'{where} holds a run that started from {recorded["source"]} with the SHA-256 {theirs}, but '
            f'{initial.record["source"]} has {ours}; give another --output')


def _read_tag(tag: str) -> Source:
    name, weights = f'{NAME}.{tag}', WEIGHTS[tag]
    checkpoint = load_checkpoint(sources.fetch(name, weights))
    heads = {} if weights.linear else read(sources.fetch(name, weights, HEADS))
    return Source(checkpoint.backbone, heads, tag, pixel_statistics(weights.bgr)['mean'])


def _read_path(path: Path) -> Source:
    if not path.exists():
        raise FileNotFoundError(
            f'{path}: not a file, a folder or a published tag (`simsiam weights list` shows the tags)')
    newest = path / LAST
    # A finished run has the weights in backbone/, too, but the heads only in its checkpoint.
    path = newest if newest.is_file() and 'recipe' in _read_args(path) else find_weights(path)
    url = read_origin(find_export(path) if path.is_dir() else path).get('url')
    tag = next((tag for tag, weights in WEIGHTS.items() if weights.url == url), None)
    if (path / CONFIG).is_file():
        return _read_export(path)._replace(tag=tag)
    if path.is_file() and is_safetensors(read_head(path)):
        tensorfile.check_whole(path)
    checkpoint = load_checkpoint(path)
    info = checkpoint.info
    return Source(
        checkpoint.backbone, checkpoint.heads_state(), info.get('tag', tag),
        pixel_statistics(info.get('bgr', False))['mean'], info.get('stem', {}))


def _read_args(folder: Path) -> dict[str, Any]:
    return read_json(folder / ARGS) if (folder / ARGS).is_file() else {}


def _read_export(folder: Path) -> Source:
    trained = load_trained(folder)
    if trained.model.num_classes:
        cast(Callable[[int], None], trained.model.reset_classifier)(0)
    mean = cast(dict[str, Any], trained.model.pretrained_cfg).get('mean') or pixel_statistics(False)['mean']
    return Source(trained.model.state_dict(), trained.heads, mean=tuple(mean))
