"""A frozen backbone as the benchmarks use it: weights from anywhere, their digest, and the five taps of its stages."""
import json
import logging
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.models import is_model
from timm.models.resnet import ResNet
from torch import Tensor, nn

from ..data.readers.index import digest
from ..weights import sources, tensorfile
from ..weights.export import BACKBONE
from ..weights.layouts import Checkpoint, load_checkpoint
from ..weights.published import WEIGHTS, tag_of_file
from .protocols import LEAST, SIZE

RANDOM = ':random'
# MMSelfSup's pooling of the five taps at 224 px: side of the map; kernel, stride, padding. Zeros count in the mean.
POOLS = ((112, 10, 10, 4), (56, 16, 8, 0), (28, 13, 5, 0), (14, 8, 3, 0), (7, 6, 1, 0))
HAVE = '--model PATH takes a checkpoint that you have, and NAME:random untrained weights'
VALUES = 9216  # the most that adaptive pooling leaves of a tap
# Networks that a bare checkpoint may hold; the first whose entries have the same names and shapes is taken.
KNOWN = ('simsiam_resnet50', 'simsiam_resnet18_cifar', 'resnet18', 'resnet34', 'resnet101', 'resnet152')

_logger = logging.getLogger('simsiam_models')


@dataclass
class Backbone:
    """`model` maps (B, 3, S, S) to (B, num_features); it is in evaluation mode and needs no gradient."""

    model: nn.Module
    name: str  # as the user wrote it
    tag: str | None  # of published weights, else None
    digest: str  # 16 hexadecimal characters, of all parameters and buffers by name and bytes
    bgr: bool  # pixels must come in the order blue, green, red, with the mean and std of RGB (MMSelfSup before v0.7)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_features: int
    image_size: int = SIZE  # pixels: the side of the images that the model's configuration, or its run, is made for

    @property
    def identity(self) -> str:
        """16 hexadecimal characters of what decides what becomes of an image: weights, network, channels, scaling."""
        pooling = getattr(self.model, 'global_pool', None)  # a text where the network has no module for it
        return digest(self.digest, f'{self.model} {pooling}', json.dumps([self.bgr, self.mean, self.std]))


def load_backbone(name: str, device: torch.device | str = 'cpu', **model_kwargs: Any) -> Backbone:
    """A backbone without classifier; every entry of it is filled from the weights, or this raises.

    Args:
        name: a timm name (pretrained weights), 'local-dir:FOLDER', 'hf-hub:REPO', a folder that train.py wrote or its
            backbone/, a checkpoint file of any layout that `load_checkpoint` reads, or NAME:random (untrained, seed 0).
        model_kwargs: for timm's create_model.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: no such weights, or they fill no network; in one sentence.
    """
    if 'num_classes' in model_kwargs:
        raise ValueError(f'num_classes={model_kwargs["num_classes"]}: a backbone has no classifier; leave it out')
    path = Path(name).expanduser()
    tag = None
    if name.endswith(RANDOM):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _create(name.removesuffix(RANDOM), False, num_classes=0, **model_kwargs)
    elif name.startswith('local-dir:'):
        model, tag = _exported(Path(name.removeprefix('local-dir:')), model_kwargs)
    elif name.startswith(('hf-hub:', 'hf_hub:')) or (not path.exists() and is_model(name.split('.')[0])):
        model = _pretrained(name, model_kwargs)
        tag = model.pretrained_cfg.get('tag')
        if ':' in name and name.split(':')[1].split('@')[0] != sources.hub_id(f'simsiam_resnet50.{tag}'):
            tag = None
    elif path.is_dir():
        model, tag = _from_folder(path, model_kwargs)
    elif path.is_file():
        model = _from_checkpoint(path, model_kwargs)
        tag = tag_of_file(path)
    else:
        raise FileNotFoundError(
            f'--model {name}: neither a model of timm nor a file or folder; name one (timm.list_models() lists them), '
            "a checkpoint, train.py's OUTPUT, local-dir:FOLDER or hf-hub:REPO")
    model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    mean = _three(cfg.get('mean') or timm.data.IMAGENET_DEFAULT_MEAN, f'{name}: mean')
    std = _three(cfg.get('std') or timm.data.IMAGENET_DEFAULT_STD, f'{name}: std', least=1e-6)
    tag = tag if tag in WEIGHTS else None
    features = getattr(model, 'head_hidden_size', None) or model.num_features
    size = _size(model_kwargs.get('img_size') or cfg.get('input_size') or SIZE, name)
    return Backbone(model, name, tag, weights_digest(model), '_bgr_' in (tag or ''), mean, std, int(features), size)


def _size(values: Any, name: str) -> int:
    size = values[-1] if isinstance(values, (list, tuple)) and values else values
    if type(size) is not int or size < LEAST:
        raise ValueError(
            f'{name}: input_size {str(values)[:60]} in its configuration: channels, height and width are needed, at '
            f'least {LEAST} px')
    return size


def _three(values: Any, what: str, least: float = -math.inf) -> tuple[float, float, float]:
    try:
        numbers = tuple(float(x) for x in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(math.isfinite(x) and x >= least for x in numbers):
        raise ValueError(f'{what} {str(values)[:60]} in its configuration: three numbers are needed')
    return numbers


def weights_digest(model: nn.Module) -> str:
    """16 hexadecimal characters of all parameters and buffers, whether saved in checkpoints or not."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return tensorfile.content_sha256({k: v.detach().cpu() for k, v in tensors.items()})[:16]


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """timm's errors are of many kinds; here they are one sentence."""
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (TypeError, AssertionError, KeyError, AttributeError, SafetensorError) as e:  # arguments, among others
        raise ValueError(f'--model {name}: timm cannot build it ({" ".join(str(e).split())[:200]})') from None
    except RuntimeError as e:
        text = ' '.join(str(e).split())
        if type(e) is not RuntimeError or not text.startswith(('the ', name)):  # else it is a sentence of ours
            text = f'--model {name}: {text[:300]}'
        if 'could not be loaded' in text or 'No pretrained weights' in text:
            text = f'{text.rstrip(".")}. {HAVE}'
        raise RuntimeError(text) from None
    except OSError as e:  # among them those of the Hub client, of many lines
        text = ' '.join(str(e).split())[:300]
        raise RuntimeError(f'--model {name}: its weights cannot be had ({text}); {HAVE}') from None


def _pretrained(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """With the classifier of the weights at first: timm checks every entry only where that is asked for."""
    model = _create(name, True, **kwargs)
    if model.num_classes:
        model.reset_classifier(0)
    return model


def _exported(folder: Path, kwargs: dict[str, Any]) -> tuple[nn.Module, str | None]:
    """A folder written for timm. timm's own save_for_hf keeps the tag of weights that were trained on since."""
    if not (folder / 'config.json').is_file():
        raise FileNotFoundError(f'local-dir:{folder}: no config.json there; name a folder that was exported for timm')
    _check_whole(folder / sources.MODEL)
    model = _pretrained(f'local-dir:{folder}', kwargs)
    tag = model.pretrained_cfg.get('tag')
    if not isinstance(tag, str) or tag not in WEIGHTS:
        return model, None
    if json.loads((folder / 'config.json').read_text()).get(BACKBONE, '')[:16] == weights_digest(model):
        return model, tag
    _logger.warning(f'{folder}: its config.json says {tag}, but not for these weights: they count as your own, of RGB')
    return model, None


def _check_whole(path: Path) -> None:
    """Raises ValueError where the file is damaged, as far as it tells."""
    if path.is_file() and not tensorfile.is_whole(path):
        raise ValueError(f'{path}: it is damaged or was cut off; copy or export it again')


def _from_folder(path: Path, kwargs: dict[str, Any]) -> tuple[nn.Module, str | None]:
    for folder in (path, path / 'backbone'):
        if (folder / 'config.json').is_file():
            return _exported(folder, kwargs)
    if (path / 'checkpoint.pth').is_file():  # a run that has not finished
        return _from_checkpoint(path / 'checkpoint.pth', kwargs), None
    raise FileNotFoundError(
        f'{path}: neither config.json nor backbone/ nor checkpoint.pth in it; name a folder that train.py wrote or one '
        'exported for timm')


def _from_checkpoint(path: Path, kwargs: dict[str, Any]) -> nn.Module:
    if path.suffix == '.safetensors':
        _check_whole(path)
    try:
        checkpoint = load_checkpoint(path)
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as e:
        if _is_text(path):
            raise ValueError(
                f'{path} cannot be read as a checkpoint: it is a text; name a file of weights, or the folder of a '
                'run') from None
        if isinstance(e, ValueError):
            raise
        raise ValueError(f'{path} cannot be read as a checkpoint ({type(e).__name__}); name another one') from None
    return _fill(checkpoint, path, kwargs)


def _is_text(path: Path) -> bool:
    try:
        with open(path, 'rb') as f:
            head = f.read(4096)
    except OSError:
        return False
    return bool(head) and min(head.translate(None, b'\t\n\f\r'), default=0) >= 32


def _fill(checkpoint: Checkpoint, path: Path, kwargs: dict[str, Any]) -> nn.Module:
    """The network of the run whose folder the file lies in, or the first of KNOWN that the entries fill."""
    candidates = [(name, kwargs) for name in KNOWN]
    run, config = (_read(path.parent / name) for name in ('args.json', 'config.json'))
    if isinstance(run.get('model'), str):
        candidates.insert(0, (run['model'], {**_table(run, 'model_args'), **kwargs}))
    size = _table(config, 'pretrained_cfg').get('input_size')  # of an exported folder
    if size is None and (side := _table(run, 'augmentation').get('size')):  # of the views that it was trained on
        size = 3, side, side
    shapes = {k: v.shape for k, v in checkpoint.backbone.items()}
    for name, args in candidates:
        with torch.device('meta'):
            model = _create(name, False, num_classes=0, **args)
        if {k: v.shape for k, v in model.state_dict().items()} == shapes:
            model = _create(name, False, num_classes=0, **args)
            model.load_state_dict(checkpoint.backbone, strict=True)
            if size is not None:
                model.pretrained_cfg = {**model.pretrained_cfg, 'input_size': size}
            return model
    raise ValueError(
        f'{path}: its {len(shapes)} backbone entries (layout {checkpoint.layout}) fill none of '
        f'{", ".join(name for name, _ in candidates)}; export the backbone and name it as local-dir:FOLDER')


def _read(file: Path) -> dict[str, Any]:
    """JSON beside a checkpoint; {} where there is none of use."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _table(found: dict[str, Any], key: str) -> dict[str, Any]:
    return value if isinstance(value := found.get(key), dict) else {}


def taps(backbone: Backbone, x: Tensor) -> list[Tensor]:
    """(B, 3, S, S) normalised pixels -> the maps of the stages, first to last.

    ResNets give five: after the stem's convolution, batch norm and ReLU, before max-pool; then layer1 to layer4. Other
    networks give the last five of those that timm's forward_intermediates returns, or as many as there are.
    """
    return stage_maps(backbone.model, x)[0]


def stage_maps(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The maps, and what `forward_head` takes."""
    if isinstance(model, ResNet):
        maps = [model.act1(model.bn1(model.conv1(x)))]
        x = model.maxpool(maps[0])
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            x = layer(x)
            maps.append(x)
        return maps, x
    if not hasattr(model, 'forward_intermediates'):
        raise ValueError(f'{type(model).__name__} shows no maps (timm has no forward_intermediates for it)')
    last, maps = model.forward_intermediates(x)
    return maps[-5:], last


def pooled(maps: list[Tensor], adaptive: bool = False) -> list[Tensor]:
    """Maps (B, C, H, W) -> flat float32 (B, D), pooled as MMSelfSup's multi-head benchmark does at 224 px.

    Of ResNet-50 that leaves 9216, 9216, 8192, 9216 and 8192 values. `adaptive` is for other sizes and networks: each
    map is averaged to side x side areas, side the largest with at most 9216 values (and no larger than the map); of
    ResNet-50 at 224 px these are as many values as the protocol has, but other areas.

    Raises:
        ValueError: maps that are not those of a ResNet at 224 px, without `adaptive`.
    """
    if adaptive:
        return [F.adaptive_avg_pool2d(x.float(), _sides(x)).flatten(1) for x in maps]
    if not fits_protocol(maps):
        raise ValueError(
            f'maps of {", ".join(f"{x.shape[-2]}x{x.shape[-1]}" for x in maps)} pixels: the protocol pools those of a '
            'ResNet at 224 px (112, 56, 28, 14, 7); use --image-size 224, or adaptive=True for other areas')
    return [
        F.avg_pool2d(x.float(), kernel, stride, padding).flatten(1)
        for x, (_, kernel, stride, padding) in zip(maps, POOLS, strict=True)]


def fits_protocol(maps: list[Tensor]) -> bool:
    return [tuple(x.shape[-2:]) for x in maps] == [(side, side) for side, *_ in POOLS]


def _sides(x: Tensor) -> tuple[int, int]:
    side = max(1, math.isqrt(VALUES // x.shape[1]))
    return min(side, x.shape[-2]), min(side, x.shape[-1])
