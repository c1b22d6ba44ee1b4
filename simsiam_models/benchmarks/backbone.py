"""Frozen backbones for the benchmarks: loading from any source, the digest of the weights, and the stages' maps."""
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.models import is_model
from timm.models.resnet import ResNet
from torch import Tensor, nn

from ..data.readers.index import digest
from ..runtime.messages import one_line
from ..weights import sources, tensorfile
from ..weights.export import BACKBONE
from ..weights.folders import create_from_folder, read_config, read_json
from ..weights.layouts import Checkpoint, load_checkpoint
from ..weights.networks import TIMM_ERRORS, fill_network, find_weights, list_networks
from ..weights.published import WEIGHTS, find_tag
from ..weights.reading import find_export, is_safetensors, read_head
from ..weights.tensorfile import check_whole
from .protocols import LEAST, SIZE

RANDOM = ':random'
# MMSelfSup's pooling of the five maps at 224 px: side of the map; kernel, stride, padding. Zeros count in the mean.
POOLS = ((112, 10, 10, 4), (56, 16, 8, 0), (28, 13, 5, 0), (14, 8, 3, 0), (7, 6, 1, 0))
OTHER_WEIGHTS = '--model PATH takes a checkpoint that you have, and NAME:random untrained weights'
WRONG_NAMES = {  # what timm says -> what to do
    'Unknown model': 'timm.list_models() lists the names',
    'Invalid pretrained tag': 'timm.list_pretrained() lists the tags'}
VALUES = 9216  # adaptive pooling leaves at most this many values per map
MOST = 4096  # pixels of the side of an image
Three = tuple[float, float, float]

_logger = logging.getLogger('simsiam_models')


@dataclass
class Backbone:
    """A network in evaluation mode, without gradients: `model` maps (B, 3, S, S) to (B, num_features)."""

    model: nn.Module
    name: str  # as the user wrote it
    tag: str | None  # of published weights, if these are proven to be them
    digest: str  # `weights_digest`
    mean: Three  # of RGB pixels, as std
    std: Three
    num_features: int
    image_size: int = SIZE  # pixels: the side of the images in the model's configuration, or in its run
    architecture: str = ''  # timm's name of the network
    args: dict[str, Any] = field(default_factory=dict)  # what timm builds it from besides, apart from num_classes

    @property
    def identity(self) -> str:
        """Hashes weights, network and scaling, which determine the features, to 16 hexadecimal characters."""
        pooling = getattr(self.model, 'global_pool', None)  # a string if the network has no module for it
        # False: no network takes BGR. Features that an earlier version cached for networks that did have true here.
        return digest(self.digest, f'{self.model} {pooling}', json.dumps([False, self.mean, self.std]))


def load_backbone(
    name: str, device: torch.device | str = 'cpu', branch: str | None = None, **model_kwargs: Any,
) -> Backbone:
    """Loads a backbone without classifier. The weights fill every entry of it, or this raises.

    Args:
        name: a timm name (pretrained weights), 'local-dir:FOLDER', 'hf-hub:REPO', a folder that `simsiam pretrain`
            wrote or its backbone/, a checkpoint file of any layout that `load_checkpoint` reads, or NAME:random
            (untrained, seed 0).
        branch: which network to take of a checkpoint file with several, as for `load_checkpoint`.
        model_kwargs: for timm's create_model.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: there are no such weights, or they fill no network.
        OSError: the weights cannot be read.
    """
    if 'num_classes' in model_kwargs:
        raise ValueError(f'num_classes={model_kwargs["num_classes"]}: a backbone has no classifier; leave it out')
    model, tag, args, proven = _load_model(name, branch, model_kwargs)
    model = model.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    mean, std, size = read_pixels({**cfg, 'input_size': model_kwargs.get('img_size') or cfg.get('input_size')}, name)
    tag = tag if isinstance(tag, str) and tag in WEIGHTS else None
    found = weights_digest(model)
    if tag and not (proven or sources.is_proven(tag, found, model_kwargs.get('cache_dir'))):
        _logger.warning(
            f'{name}: named {tag}, but nothing here proves that these are the published weights: they count as your '
            f"own (`simsiam weights verify {tag}` gets the authors' file to compare with)")
        tag = None
    features: Any = getattr(model, 'head_hidden_size', None) or model.num_features
    architecture = cfg.get('architecture') or name.removesuffix(RANDOM).split('.')[0]
    return Backbone(model, name, tag, found, mean, std, int(features), size, architecture, args)


def _load_model(
    name: str, branch: str | None, kwargs: dict[str, Any],
) -> tuple[nn.Module, str | None, dict[str, Any], bool]:
    """Returns the network, the tag that the weights claim, timm's arguments, and whether a hash proves the tag."""
    path = Path(name).expanduser()
    if branch is not None and not path.is_file():
        raise ValueError(f'--branch {branch}: selects a network from a checkpoint file, but --model {name} is not one')
    if name.endswith(RANDOM):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _create(name.removesuffix(RANDOM), False, num_classes=0, **kwargs), None, kwargs, False
    if name.startswith('local-dir:'):
        return *_load_export(Path(name.removeprefix('local-dir:')), kwargs), False
    if name.startswith(('hf-hub:', 'hf_hub:')) or (not path.exists() and is_model(name.split('.')[0])):
        model = _create_pretrained(name, kwargs)
        return model, cast(dict[str, Any], model.pretrained_cfg).get('tag'), kwargs, False
    if path.is_dir():
        return *_load_folder(path, kwargs), False
    if path.is_file():
        model, args = _load_file(path, kwargs, branch)
        return model, find_tag(path), args, True
    raise FileNotFoundError(
        f'--model {name}: neither a model of timm nor a file or folder; use a name that timm.list_models() returns, '
        "a checkpoint, the OUTPUT of `simsiam pretrain`, local-dir:FOLDER or hf-hub:REPO")


def read_pixels(cfg: dict[str, Any], name: str) -> tuple[Three, Three, int]:
    """Returns mean, std and the image size in pixels of timm's configuration of a model; raises ValueError."""
    mean = _parse_three(cfg.get('mean') or timm.data.IMAGENET_DEFAULT_MEAN, f'{name}: mean')
    std = _parse_three(cfg.get('std') or timm.data.IMAGENET_DEFAULT_STD, f'{name}: std', least=1e-6)
    values = cfg.get('input_size') or SIZE
    size = values[-1] if isinstance(values, (list, tuple)) else values
    if type(size) is not int or not LEAST <= size <= MOST:
        raise ValueError(
            f'{name}: input_size {str(values)[:60]} in its configuration: channels, height and width are needed, '
            f'{LEAST} to {MOST} px')
    return mean, std, size


def _parse_three(values: Any, what: str, least: float = -math.inf) -> Three:
    try:
        numbers = tuple(float(x) for x in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(math.isfinite(x) and x >= least for x in numbers):
        raise ValueError(f'{what} {str(values)[:60]} in its configuration: three numbers are needed')
    return numbers


def weights_digest(model: nn.Module) -> str:
    """Hashes to 16 hexadecimal characters the names and bytes of all parameters and buffers, persistent or not."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return tensorfile.hash_tensors({k: v.detach().cpu() for k, v in tensors.items()})[:16]


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Creates a model with timm; see `_explain`."""
    return _explain(name, lambda: timm.create_model(name, pretrained=pretrained, **kwargs))


def _explain(name: str, create: Callable[[], nn.Module]) -> nn.Module:
    """Turns timm's many kinds of errors into one sentence."""
    try:
        return create()
    except TIMM_ERRORS as e:  # arguments
        raise ValueError(f'--model {name}: timm cannot build it ({one_line(e)})') from None
    except RuntimeError as e:
        text = one_line(e, 1000)
        if type(e) is not RuntimeError or not text.startswith(('the ', name)):  # otherwise it is a sentence of ours
            text = f'--model {name}: {text[:300]}'
        if 'could not be loaded' in text or 'No pretrained weights' in text:
            text = f'{text.partition(" To use a checkpoint that you have")[0].rstrip(".")}. {OTHER_WEIGHTS}'
        for problem, hint in WRONG_NAMES.items():
            if problem in text:
                text = f'{text.rstrip(".")}; {hint}'
        raise RuntimeError(text) from None
    except OSError as e:  # includes the Hub client's errors, which have many lines
        raise RuntimeError(
            f'--model {name}: its weights cannot be loaded ({one_line(e, 300)}); {OTHER_WEIGHTS}') from None


def _create_pretrained(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Creates the model with the classifier of its weights, since timm checks every entry only then, and removes it."""
    model = _create(name, True, **kwargs)
    if model.num_classes:
        cast(Callable[[int], None], model.reset_classifier)(0)
    return model


def _load_export(folder: Path, kwargs: dict[str, Any]) -> tuple[nn.Module, str | None, dict[str, Any]]:
    """Loads a folder exported for timm; its tag counts only if config.json holds the digest of these weights.

    timm's own save_for_hf keeps the tag of weights that were trained further.
    """
    if not (folder / 'config.json').is_file():
        raise FileNotFoundError(f'local-dir:{folder}: no config.json there; name a folder that was exported for timm')
    check_whole(find_export(folder))
    model = _explain(f'local-dir:{folder}', lambda: create_from_folder(folder, num_classes=0, **kwargs))
    tag = cast(dict[str, Any], model.pretrained_cfg).get('tag')
    args = {**read_config(folder).args, **kwargs}
    if not isinstance(tag, str) or tag not in WEIGHTS:
        return model, None, args
    if str(read_json(folder / 'config.json').get(BACKBONE))[:16] == weights_digest(model):
        if WEIGHTS[tag].bgr and tensorfile.CHANNELS not in tensorfile.read_metadata(folder / tensorfile.MODEL):
            raise ValueError(
                f'{folder}: an older version exported {tag} to it with the channels B, G, R; convert the file again')
        return model, tag, args
    _logger.warning(f'{folder}: config.json names {tag}, but these are other weights: they count as your own')
    return model, None, args


def _load_folder(path: Path, kwargs: dict[str, Any]) -> tuple[nn.Module, str | None, dict[str, Any]]:
    try:
        found = find_weights(path)
    except FileNotFoundError:
        found = path
    if found.is_file():  # a run that has not finished
        model, args = _load_file(found, kwargs)
        return model, None, args
    if (found / 'config.json').is_file():
        return _load_export(found, kwargs)
    raise FileNotFoundError(
        f'{path}: contains neither config.json nor backbone/ nor checkpoint.pth; name a folder that '
        '`simsiam pretrain` wrote or that was exported for timm')


def _load_file(path: Path, kwargs: dict[str, Any], branch: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    if is_safetensors(read_head(path)):
        check_whole(path)
    return _build_model(load_checkpoint(path, branch), path, kwargs)


def _build_model(checkpoint: Checkpoint, path: Path, kwargs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Builds the first of the networks that the checkpoint may be of whose entries it fills; see `list_networks`."""
    candidates = [network._replace(args={**network.args, **kwargs}) for network in list_networks(checkpoint, path)]
    found = fill_network(checkpoint.backbone, candidates, create=lambda name, **more: _create(name, False, **more))
    if found is None:
        raise ValueError(
            f'{path}: its {len(checkpoint.backbone)} backbone entries (layout {checkpoint.layout}) fill none of '
            f'{", ".join(network.name for network in candidates)}; export the backbone and name it as local-dir:FOLDER')
    model, network = found
    return model, network.args


def compute_maps(backbone: Backbone, x: Tensor) -> list[Tensor]:
    """Maps (B, 3, S, S) normalised pixels to the feature maps of the stages, first to last.

    ResNets have five: after the stem's convolution, batch norm and ReLU, before max-pool; then after layer1 to layer4.
    Other networks return the last five maps of timm's forward_intermediates, or fewer if they have fewer.
    """
    return forward_stages(backbone.model, x)[0]


def forward_stages(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Returns the feature maps of the stages and the input of `forward_head`."""
    if isinstance(model, ResNet):
        maps = [model.act1(model.bn1(model.conv1(x)))]
        x = model.maxpool(maps[0])
        for name in ('layer1', 'layer2', 'layer3', 'layer4'):
            x = model.get_submodule(name)(x)
            maps.append(x)
        return maps, x
    if not hasattr(model, 'forward_intermediates'):
        raise ValueError(f'{type(model).__name__} returns no feature maps (timm has no forward_intermediates for it)')
    last, maps = cast(Callable[[Tensor], tuple[Tensor, list[Tensor]]], model.forward_intermediates)(x)
    return maps[-5:], last


def pool_stages(maps: list[Tensor], adaptive: bool = False) -> list[Tensor]:
    """Maps (B, C, H, W) -> flat float32 (B, D), pooled as in MMSelfSup's multi-head benchmark at 224 px.

    ResNet-50's five maps become 9216, 9216, 8192, 9216 and 8192 values. `adaptive` is for other sizes and networks: it
    averages each map over side x side areas, with the largest side that gives at most 9216 values (and is no larger
    than the map). For ResNet-50 at 224 px the result has as many values as the protocol's, but from other areas.

    Raises:
        ValueError: the maps are not those of a ResNet at 224 px, and `adaptive` is not set.
    """
    if adaptive:
        return [F.adaptive_avg_pool2d(x.float(), _choose_sides(x)).flatten(1) for x in maps]
    if not has_protocol_sizes(maps):
        raise ValueError(
            f'maps of {", ".join(f"{x.shape[-2]}x{x.shape[-1]}" for x in maps)} pixels: the protocol pools those of a '
            'ResNet at 224 px (112, 56, 28, 14, 7); use --image-size 224, or adaptive=True for other areas')
    return [
        F.avg_pool2d(x.float(), kernel, stride, padding).flatten(1)
        for x, (_, kernel, stride, padding) in zip(maps, POOLS, strict=True)]


def has_protocol_sizes(maps: list[Tensor]) -> bool:
    """Returns whether the maps have the sizes that the protocol pools."""
    return [tuple(x.shape[-2:]) for x in maps] == [(side, side) for side, *_ in POOLS]


def _choose_sides(x: Tensor) -> tuple[int, int]:
    side = max(1, math.isqrt(VALUES // x.shape[1]))
    return min(side, x.shape[-2]), min(side, x.shape[-1])
