"""Exports a trained backbone, or the parts of a checkpoint, to a folder that timm and transformers load."""
import shutil
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ..runtime.files import write_json
from ..runtime.messages import short
from . import tensorfile
from .folders import DESCRIPTION, Network, read_json
from .layouts import Checkpoint
from .published import NAME, pixel_statistics
from .reading import find_export, read, require_safetensors
from .tensorfile import CONFIG, HEADS, MODEL

PLAIN_TIMM = {NAME: 'resnet50'}  # our name -> the name under which plain timm builds the same network
RESNET50 = Network(NAME, {})  # of the published weights
BACKBONE = 'backbone_sha256'  # hash of the backbone's entries, which ties a tag to its weights


def export_backbone(
    backbone: nn.Module, folder: str | Path, model_name: str, model_args: dict[str, Any] | None = None, size: int = 224,
    resize: int = 256, *, epochs: int | None = None,
) -> None:
    """Writes a folder for `timm.create_model('local-dir:FOLDER', pretrained=True)`.

    timm built the backbone from `model_name` and `model_args`, apart from num_classes=0. For evaluation, `size` is the
    side of the crop and `resize` the short side before it, in pixels. `epochs` of training go into the header.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    overlay = {'input_size': [3, size, size], 'crop_pct': size / resize}
    tensorfile.write(folder / MODEL, backbone.state_dict(), **({'epochs': str(epochs)} if epochs else {}))
    write_json(folder / CONFIG, make_timm_config(backbone, model_name, 0, overlay, model_args))


def export_checkpoint(
    checkpoint: Checkpoint, folder: str | Path, pretrained_cfg: dict[str, Any] | None = None,
    origin: dict[str, str] | None = None, network: Network = RESNET50,
) -> None:
    """Writes config.json, model.safetensors and, if the checkpoint has both heads, heads.safetensors.

    model.safetensors holds the backbone and, if present, the linear classifier. timm rejects any other entry.
    `pretrained_cfg` overrides entries of config.json's pretrained_cfg (license, origin_url, ...), `origin` goes into
    the headers (see `identity.make_origin`). Raises ValueError if backbone and classifier do not match the entries of
    the `network`.
    """
    folder, tensors = Path(folder), checkpoint.model_state()
    num_classes = len(tensors.get('fc.weight', ()))
    with torch.device('meta'):
        model = timm.create_model(
            PLAIN_TIMM.get(network.name, network.name), num_classes=num_classes, **network.args)
    expected = model.state_dict()
    if mismatch := describe_mismatch(tensors, expected):
        raise ValueError(
            f'the checkpoint does not fill {network.name}, which has {len(expected)} entries: {mismatch}. '
            'If `simsiam pretrain` trained another network, use the folder OUTPUT/backbone')
    folder.mkdir(parents=True, exist_ok=True)
    bgr = checkpoint.info.get('bgr', False)
    mark = {tensorfile.CHANNELS: tensorfile.REVERSED} if bgr else {}
    tensorfile.write(folder / MODEL, tensors, **(origin or {}), **mark)
    if checkpoint.projector and checkpoint.predictor:
        tensorfile.write(folder / HEADS, checkpoint.heads_state(), **(origin or {}))
    else:
        (folder / HEADS).unlink(missing_ok=True)  # heads of an earlier export would belong to another backbone
    description = {**network.description, **{k: list(v) for k, v in pixel_statistics(bgr).items()}}
    config = make_timm_config(
        model, network.name, num_classes, {**description, **(pretrained_cfg or {})}, network.args)
    config[BACKBONE] = tensorfile.hash_tensors(checkpoint.backbone)
    write_json(folder / CONFIG, config)


def copy_export(source: Path, folder: Path, cfg: dict[str, Any]) -> None:
    """Copies an exported folder of any architecture and adds `cfg` to its pretrained_cfg.

    Raises FileNotFoundError, or ValueError if the folder is not whole, or holds NaN or infinity.
    """
    if source.resolve() == folder.resolve():
        raise ValueError(f'{folder} is the source itself: give another folder')
    config = read_whole_config(source)
    config['pretrained_cfg'] = {k: v for k, v in config['pretrained_cfg'].items() if k in DESCRIPTION} | cfg
    (config.get('model_args') or {}).pop('num_classes', None)  # transformers passes it too, and fails
    for name in (MODEL, HEADS):
        if name == MODEL or (source / name).exists():
            require_safetensors(find_export(source) if name == MODEL else source / name)
            check_finite(read(source / name), source / name)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MODEL, HEADS):
        (folder / name).unlink(missing_ok=True)
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    write_json(folder / CONFIG, config)


def read_whole_config(folder: Path) -> dict[str, Any]:
    """Returns config.json with all that a card needs; raises ValueError if it lacks something."""
    config = read_json(folder / CONFIG)
    if not {'architecture', 'num_classes', 'num_features', 'pretrained_cfg'} <= set(config):
        raise ValueError(f'{folder / CONFIG} is not that of a model exported for timm: it has only {", ".join(config)}')
    size = config['pretrained_cfg'].get('input_size')
    if not isinstance(size, list) or len(size) != 3:
        raise ValueError(f'{folder / CONFIG}: pretrained_cfg has the input_size {short(size)}, but channels, height '
                         'and width are needed: export the folder again')
    return config


def check_finite(tensors: dict[str, Any], source: Path | str) -> None:
    if bad := tensorfile.find_nonfinite(tensors):
        raise ValueError(f'{source} holds NaN or infinity in {len(bad)} tensors ({", ".join(bad[:3])})')


def make_timm_config(
    model: nn.Module, name: str, num_classes: int, overlay: dict[str, Any], model_args: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns config.json for plain timm and for transformers, which requires pretrained_cfg and passes num_classes.

    `overlay` overrides entries of pretrained_cfg; `model_args` built `model`, apart from num_classes.
    """
    name = name.split('.')[0]
    cfg = cast(dict[str, Any], model.pretrained_cfg)
    if cfg.get('fixed_input_size'):  # otherwise timm builds the model for its own default image size
        model_args = {'img_size': cfg['input_size'][-1], **(model_args or {})}
    return {
        'architecture': PLAIN_TIMM.get(name, name), 'num_classes': num_classes, 'num_features': model.num_features,
        'pretrained_cfg': {
            'tag': 'simsiam', 'custom_load': False, 'input_size': list(cfg.get('input_size') or (3, 224, 224)),
            'fixed_input_size': False, 'interpolation': 'bilinear', 'crop_pct': 0.875, 'crop_mode': 'center',
            'mean': list(IMAGENET_DEFAULT_MEAN), 'std': list(IMAGENET_DEFAULT_STD), 'num_classes': num_classes,
            'pool_size': cfg.get('pool_size'), 'first_conv': cfg.get('first_conv'), 'classifier': cfg.get('classifier'),
            'paper_ids': 'arXiv:2011.10566', **overlay,
        },
        **({'model_args': model_args} if model_args else {}),
    }


def describe_mismatch(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Lists the missing, unknown and wrongly shaped entries of a state dict; '' if there are none."""
    groups = {
        'missing': [k for k in expected if k not in tensors],
        'unknown': [k for k in tensors if k not in expected],
        'of another shape': [
            f'{k} {tuple(tensors[k].shape)} instead of {tuple(v.shape)}' for k, v in expected.items()
            if k in tensors and tensors[k].shape != v.shape]}
    return '; '.join(
        f'{len(keys)} {problem} ({", ".join(keys[:3])}{", ..." if len(keys) > 3 else ""})'
        for problem, keys in groups.items() if keys)
