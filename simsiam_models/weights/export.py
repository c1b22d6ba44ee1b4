"""Exports a trained backbone, or the parts of a checkpoint, to a folder that timm and transformers load."""
from pathlib import Path
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ..runtime.files import write_json
from . import tensorfile
from .layouts import Checkpoint
from .published import NAME, pixel_statistics
from .tensorfile import CONFIG, HEADS, MODEL

PLAIN_TIMM = {NAME: 'resnet50'}  # our name -> the name under which plain timm builds the same network
BACKBONE = 'backbone_sha256'  # hash of the backbone's entries, which ties a tag to its weights


def export_backbone(
    backbone: nn.Module, folder: str | Path, model_name: str, model_args: dict[str, Any] | None = None, size: int = 224,
    resize: int = 256,
) -> None:
    """Writes a folder for `timm.create_model('local-dir:FOLDER', pretrained=True)`.

    timm built the backbone from `model_name` and `model_args`, apart from num_classes=0. For evaluation, `size` is the
    side of the crop and `resize` the short side before it, in pixels.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    overlay = {'input_size': [3, size, size], 'crop_pct': size / resize}
    tensorfile.write(folder / MODEL, backbone.state_dict())
    write_json(folder / CONFIG, make_timm_config(backbone, model_name, 0, overlay, model_args))


def export_checkpoint(
    checkpoint: Checkpoint, folder: str | Path, pretrained_cfg: dict[str, Any] | None = None,
    origin: dict[str, str] | None = None,
) -> None:
    """Writes a ResNet-50: config.json, model.safetensors and, if the checkpoint has both heads, heads.safetensors.

    model.safetensors holds the backbone and, if present, the linear classifier. timm rejects any other entry.
    `pretrained_cfg` overrides entries of config.json's pretrained_cfg (license, origin_url, ...), `origin` goes into
    the headers (see `identity.make_origin`). Raises ValueError if backbone and classifier do not match the entries of
    a ResNet-50.
    """
    folder, tensors = Path(folder), checkpoint.model_state()
    num_classes = len(tensors.get('fc.weight', ()))
    model = timm.create_model('resnet50', num_classes=num_classes, device='meta')
    expected = model.state_dict()
    if mismatch := describe_mismatch(tensors, expected):
        raise ValueError(
            f'the checkpoint does not fill {NAME}, which has {len(expected)} entries: {mismatch}. '
            'If `simsiam pretrain` trained another network, use the folder OUTPUT/backbone')
    folder.mkdir(parents=True, exist_ok=True)
    bgr = checkpoint.info.get('bgr', False)
    mark = {tensorfile.CHANNELS: tensorfile.REVERSED} if bgr else {}
    tensorfile.write(folder / MODEL, tensors, **(origin or {}), **mark)
    if checkpoint.projector and checkpoint.predictor:
        tensorfile.write(folder / HEADS, checkpoint.heads_state(), **(origin or {}))
    else:
        (folder / HEADS).unlink(missing_ok=True)  # heads of an earlier export would belong to another backbone
    statistics = {k: list(v) for k, v in pixel_statistics(bgr).items()}
    config = make_timm_config(model, NAME, num_classes, {**statistics, **(pretrained_cfg or {})})
    config[BACKBONE] = tensorfile.hash_tensors(checkpoint.backbone)
    write_json(folder / CONFIG, config)


def make_timm_config(
    model: nn.Module, name: str, num_classes: int, overlay: dict[str, Any], model_args: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns config.json for plain timm and for transformers, which requires pretrained_cfg and passes num_classes.

    `overlay` overrides entries of pretrained_cfg; `model_args` built `model`, apart from num_classes.
    """
    name = name.split('.')[0]
    cfg = model.pretrained_cfg
    if cfg.get('fixed_input_size'):  # otherwise timm builds the model for its own default image size
        model_args = {'img_size': cfg['input_size'][-1], **(model_args or {})}
    return {
        'architecture': PLAIN_TIMM.get(name, name), 'num_classes': num_classes, 'num_features': model.num_features,
        'pretrained_cfg': {
            'tag': 'simsiam', 'custom_load': False, 'input_size': [3, 224, 224], 'fixed_input_size': False,
            'interpolation': 'bilinear', 'crop_pct': 0.875, 'crop_mode': 'center',
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
