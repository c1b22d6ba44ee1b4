"""A trained backbone -> a folder that timm loads: config.json + model.safetensors."""
import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

# Our name -> the name by which plain timm, without this package, builds the same network.
PLAIN_TIMM = {'simsiam_resnet50': 'resnet50'}


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
    name = model_name.split('.')[0]
    cfg = backbone.pretrained_cfg
    config = {
        'architecture': PLAIN_TIMM.get(name, name),
        'num_classes': 0,
        'num_features': backbone.num_features,
        'pretrained_cfg': {
            'tag': 'simsiam', 'custom_load': False, 'input_size': [3, size, size], 'fixed_input_size': False,
            'interpolation': 'bilinear', 'crop_pct': size / resize, 'crop_mode': 'center',
            'mean': list(IMAGENET_DEFAULT_MEAN), 'std': list(IMAGENET_DEFAULT_STD), 'num_classes': 0,
            'pool_size': cfg.get('pool_size'), 'first_conv': cfg.get('first_conv'), 'classifier': cfg.get('classifier'),
            'paper_ids': 'arXiv:2011.10566',
        },
    }
    # transformers passes num_classes itself, so model_args holds only what the architecture needs.
    if model_args:
        config['model_args'] = model_args
    tensors = {k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}
    part = folder / 'model.safetensors.part'
    save_file(tensors, part, metadata={'format': 'pt'})
    os.replace(part, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
