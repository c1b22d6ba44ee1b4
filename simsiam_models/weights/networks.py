"""Finds and builds the network whose weights a source holds: an exported folder, a run's folder, or a checkpoint."""
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..runtime.checkpoint import LAST
from ..runtime.lifecycle import ARGS
from ..runtime.messages import one_line, short
from .export import PLAIN_TIMM, describe_mismatch, make_timm_config
from .folders import Network, check_network, create_from_folder, limit_parameters, read_config, read_json
from .layouts import Checkpoint, load_checkpoint
from .published import NAME, pixel_statistics
from .reading import find_export, is_safetensors, read, read_head, require_safetensors
from .tensorfile import CONFIG, HEADS, check_whole

# Networks that a bare checkpoint may hold. The first one whose entries have the same names and shapes is chosen.
KNOWN = (NAME, 'resnet18', 'resnet34', 'resnet101', 'resnet152')
CIFAR = 'simsiam_resnet18_cifar'
BACKBONE = 'backbone'  # folder of the exported backbone in that of a run
# What timm raises for a name, an argument or an entry that does not fit, besides RuntimeError.
TIMM_ERRORS = (TypeError, AssertionError, LookupError, ArithmeticError, AttributeError, SafetensorError)

_logger = logging.getLogger('simsiam_models')


class Trained(NamedTuple):
    """A network with its weights, in evaluation mode; `model.pretrained_cfg` describes its pixels and its classes."""

    model: nn.Module  # with the linear classifier of the weights, if they have one
    network: Network
    heads: dict[str, Tensor]  # projector and predictor under the names of `SimSiam`; {} if there are none
    path: Path  # the exported folder or the checkpoint that holds the weights
    checkpoint: Checkpoint | None  # None: an exported folder

    @property
    def name(self) -> str:
        """Returns the name under which plain timm builds the network, if it does."""
        return PLAIN_TIMM.get(self.network.name, self.network.name)

    def describe(self) -> str:
        if self.checkpoint:
            return f'{self.path}: {self.checkpoint.describe()}'
        classes = f'a classifier of {self.model.num_classes} classes' if self.model.num_classes else 'no classifier'
        return f'{self.path}: {self.name}, {len(self.model.state_dict())} entries, {classes}'


def find_weights(path: Path) -> Path:
    """Returns the exported folder or checkpoint that the folder of a run holds; any other path as it is.

    Such folders are OUTPUT of `pretrain` (backbone/ once it is finished, checkpoint.pth before), and those of
    `finetune`, `detect` and `segment`. Raises FileNotFoundError if a folder holds no weights.
    """
    if not path.is_dir():
        return path
    for folder in (path, path / BACKBONE):
        if (folder / CONFIG).is_file():
            return folder
    if (path / LAST).is_file():  # a run that has not finished
        return path / LAST
    find_export(path)
    return path


def load_trained(source: Path, branch: str | None = None) -> Trained:
    """Builds the network of a source, of any architecture of timm's, and fills every entry of it.

    `source` is what `find_weights` takes; `branch` selects a network of a checkpoint, as for `load_checkpoint`. Raises
    FileNotFoundError or ValueError if there are no weights, or they fill no network.
    """
    path = find_weights(source)
    if (path / CONFIG).is_file():
        if branch is not None:
            raise ValueError(f'--branch {branch}: selects a network in a checkpoint file, but {path} is a folder')
        return _load_export(path)
    if path.is_file() and is_safetensors(read_head(path)):
        check_whole(path)
    checkpoint = load_checkpoint(path, branch)
    state = checkpoint.model_state()
    candidates = list_networks(checkpoint, path)
    found = fill_network(state, candidates, len(state.get('fc.weight', ())))
    if found is None:
        with torch.device('meta'):
            expected = timm.create_model('resnet50', num_classes=0).state_dict()
        raise ValueError(
            f'{path}: its {len(checkpoint.backbone)} backbone entries (layout {checkpoint.layout}) fill none of '
            f'{", ".join(network.name for network in candidates)}; it is not a ResNet-50 because of '
            f'{describe_mismatch(checkpoint.backbone, expected)}: name the folder it was exported to, or put the '
            "run's args.json beside it")
    model, network = found
    own, classes = cast(dict[str, Any], model.pretrained_cfg), cast(int, model.num_classes)
    cfg = make_timm_config(model, network.name, classes, network.description)['pretrained_cfg']
    cast(Any, model).pretrained_cfg = {**own, **cfg}
    return Trained(model.eval(), network, checkpoint.heads_state(), path, checkpoint)


def _load_export(folder: Path) -> Trained:
    network, heads = read_config(folder), {}
    _check_pixels(network.description, folder / CONFIG)
    check_whole(find_export(folder))
    if (folder / HEADS).exists():
        require_safetensors(folder / HEADS)
        heads = read(folder / HEADS)
    try:
        model = create_from_folder(folder)
    except (RuntimeError, *TIMM_ERRORS) as e:
        raise ValueError(f'timm cannot load {folder} as {network.name} ({one_line(e, 300)})') from None
    return Trained(model.eval(), network, heads, folder, None)


def _check_pixels(description: dict[str, Any], file: Path) -> None:
    """Raises ValueError if a description of the images holds something else than three numbers."""
    for key in {'input_size', 'mean', 'std'} & set(description):
        values = description[key]
        if not isinstance(values, list) or len(values) != 3 or not all(
                isinstance(x, int | float) and math.isfinite(x) for x in values):
            raise ValueError(f'{file}: {key} {short(values)}, but three numbers are needed: export the folder again')


def fill_network(
    state: dict[str, Tensor], candidates: list[Network], num_classes: int = 0,
    create: Callable[..., nn.Module] = timm.create_model,
) -> tuple[nn.Module, Network] | None:
    """Builds and fills the first network whose entries have the names and shapes of `state`; None if none has.

    `create` takes a name and keyword arguments.
    """
    shapes = {k: v.shape for k, v in state.items()}
    for network in candidates:
        with torch.device('meta'), limit_parameters(network.name):
            model = create(network.name, num_classes=num_classes, **network.args)
        if {k: v.shape for k, v in model.state_dict().items()} == shapes:
            model = create(network.name, num_classes=num_classes, **network.args)
            model.load_state_dict(state, strict=True)
            own = cast(dict[str, Any], model.pretrained_cfg)
            cast(Any, model).pretrained_cfg = {**own, **network.description}
            return model, network
    return None


def list_networks(checkpoint: Checkpoint, path: Path) -> list[Network]:
    """Returns the networks that a checkpoint may be of: that of the run in whose folder it lies, then KNOWN ones.

    Their descriptions hold what is known about the images.
    """
    blocks = {tuple(k.split('.')[:2]) for k in checkpoint.backbone if k.startswith('layer')}
    layers = [max(1, sum(layer == f'layer{i}' for layer, *_ in blocks)) for i in range(1, 5)]
    stem = checkpoint.info.get('stem', {})
    cifar = Network(CIFAR, {**({} if layers == [2, 2, 2, 2] else {'layers': layers}), **stem})
    networks = [cifar] if stem else [*(Network(name, {}) for name in KNOWN), cifar]
    run, config = (_read_beside(path.parent / name) for name in (ARGS, CONFIG))
    if (own := _find_network(run, path.parent / ARGS)) and not stem:
        networks.insert(0, own)
    description: dict[str, Any] = dict(pixel_statistics(True)) if checkpoint.info.get('bgr') else {}
    views, resize = _get_dict(run, 'augmentation').get('size'), run.get('eval_resize')
    if size := _get_dict(config, 'pretrained_cfg').get('input_size'):  # of an exported folder
        description['input_size'] = size
    elif views:  # what it was trained on
        description['input_size'] = [3, views, views]
        if isinstance(resize, int) and isinstance(views, int) and 0 < views <= resize:
            description['crop_pct'] = views / resize
    return [network._replace(description=description) for network in networks]


def _find_network(run: dict[str, Any], where: Path) -> Network | None:
    """Returns the network that the arguments of a run name; None, with a warning, if they name none of timm's."""
    if 'model' not in run:
        return None
    try:
        network = check_network(run['model'], run.get('model_args'), where)
        with torch.device('meta'), limit_parameters(where):
            timm.create_model(network.name, num_classes=0, **network.args)
    except (ValueError, RuntimeError, *TIMM_ERRORS) as e:
        _logger.warning(f'{one_line(e, 300)}; {where} is not used')
        return None
    return network


def _read_beside(file: Path) -> dict[str, Any]:
    """Returns the JSON object beside a checkpoint; {}, with a warning, if the file holds something else."""
    if not file.exists():
        return {}
    try:
        return read_json(file)
    except (ValueError, OSError) as e:
        _logger.warning(f'{e}; it is not used')
        return {}


def _get_dict(values: dict[str, Any], key: str) -> dict[str, Any]:
    return value if isinstance(value := values.get(key), dict) else {}
