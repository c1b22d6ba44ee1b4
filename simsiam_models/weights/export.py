"""A trained backbone, or the parts of a checkpoint -> a folder that timm and transformers load."""
import json
import os
from pathlib import Path
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from . import tensorfile
from .layouts import Checkpoint

# Our name -> the name by which plain timm, without this package, builds the same network.
PLAIN_TIMM = {'simsiam_resnet50': 'resnet50'}
BACKBONE = 'backbone_sha256'  # of its entries: to which weights a tag belongs


def export_backbone(
    backbone: nn.Module, folder: str | Path, model_name: str, model_args: dict[str, Any] | None = None, size: int = 224,
    resize: int = 256,
) -> None:
    """Write `timm.create_model('local-dir:FOLDER', pretrained=True)`.

    Args:
        model_name: the timm name that built the backbone.
        model_args: the keyword arguments it was built with beside num_classes=0.
        size, resize: evaluation crop and short side in pixels.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = timm_config(
        backbone, model_name, 0, {'input_size': [3, size, size], 'crop_pct': size / resize}, model_args)
    tensorfile.write(folder / 'model.safetensors', backbone.state_dict())
    write_json(folder / 'config.json', config)


def export_checkpoint(
    checkpoint: Checkpoint, folder: str | Path, architecture: str = 'simsiam_resnet50',
    pretrained_cfg: dict[str, Any] | None = None,
) -> None:
    """Write config.json, model.safetensors, and heads.safetensors where the checkpoint has projector and predictor.

    model.safetensors holds the backbone, and a linear classifier where there is one: nothing else, or timm refuses it.

    Args:
        architecture: the timm name of the backbone.
        pretrained_cfg: entries for config.json's pretrained_cfg (license, origin_url, ...) over the usual ones.

    Raises:
        ValueError: the backbone or the classifier does not fill the architecture, entry for entry.
    """
    folder = Path(folder)
    weight = (checkpoint.classifier or {}).get('weight')  # a multi-head classifier has none: timm knows no such model
    num_classes = 0 if weight is None else weight.shape[0]
    model = timm.create_model(architecture.split('.')[0], num_classes=num_classes, device='meta')
    tensors = checkpoint.model_state()
    _check_filled(tensors, model.state_dict(), architecture)
    folder.mkdir(parents=True, exist_ok=True)
    tensorfile.write(folder / 'model.safetensors', tensors)
    if checkpoint.projector and checkpoint.predictor:
        tensorfile.write(folder / 'heads.safetensors', checkpoint.heads_state())
    else:
        (folder / 'heads.safetensors').unlink(missing_ok=True)  # an earlier export's would belong to another backbone
    config = timm_config(model, architecture, num_classes, pretrained_cfg or {})
    config[BACKBONE] = tensorfile.content_sha256(checkpoint.backbone)  # a tag holds for these and no others
    write_json(folder / 'config.json', config)


def timm_config(
    model: nn.Module, name: str, num_classes: int, overlay: dict[str, Any], model_args: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """config.json for plain timm and for transformers, which needs a pretrained_cfg and passes num_classes itself.

    Args:
        overlay: entries of pretrained_cfg over the usual ones.
        model_args: the keyword arguments that `model` was built with beside num_classes.
    """
    name = name.split('.')[0]
    cfg = model.pretrained_cfg
    if cfg.get('fixed_input_size'):  # timm would build it for the size of the images, which may be another one
        model_args = {'img_size': cfg['input_size'][-1], **(model_args or {})}
    return {
        'architecture': PLAIN_TIMM.get(name, name),
        'num_classes': num_classes,
        'num_features': model.num_features,
        'pretrained_cfg': {
            'tag': 'simsiam', 'custom_load': False, 'input_size': [3, 224, 224], 'fixed_input_size': False,
            'interpolation': 'bilinear', 'crop_pct': 0.875, 'crop_mode': 'center',
            'mean': list(IMAGENET_DEFAULT_MEAN), 'std': list(IMAGENET_DEFAULT_STD), 'num_classes': num_classes,
            'pool_size': cfg.get('pool_size'), 'first_conv': cfg.get('first_conv'), 'classifier': cfg.get('classifier'),
            'paper_ids': 'arXiv:2011.10566', **overlay,
        },
        **({'model_args': model_args} if model_args else {}),
    }


def _check_filled(tensors: dict[str, Tensor], wanted: dict[str, Tensor], architecture: str) -> None:
    missing = [k for k in wanted if k not in tensors]
    unknown = [k for k in tensors if k not in wanted]
    shapes = [
        f'{k} {tuple(tensors[k].shape)} for {tuple(v.shape)}' for k, v in wanted.items()
        if k in tensors and tensors[k].shape != v.shape]
    found = [f'{len(keys)} {what} ({", ".join(keys[:3])}{", ..." if len(keys) > 3 else ""})' for what, keys in (
        ('missing', missing), ('unknown', unknown), ('of another shape', shapes)) if keys]
    if found:
        raise ValueError(
            f'the checkpoint does not fill {architecture}, which has {len(wanted)} entries: {"; ".join(found)}. '
            'Of another network that train.py trained, take the folder OUTPUT/backbone')


def write_json(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(path.name + '.part')
    part.write_text(json.dumps(content, indent=2) + '\n')
    os.replace(part, path)
