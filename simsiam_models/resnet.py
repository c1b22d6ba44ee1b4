"""Image -> features: the backbones, registered with timm.

`simsiam_resnet50` is timm's own ResNet-50, with torchvision's layout: everything that timm offers for a ResNet works.
The file is called `resnet.py` because timm lists models under the name of their module.
"""
import functools
import logging
from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from .weights import sources
from .weights.layouts import load_checkpoint, recognize
from .weights.published import NAME, WEIGHTS, Weights, pixel_statistics

_logger = logging.getLogger('simsiam_models')


def _cfg(bgr: bool = False, **kwargs: Any) -> dict[str, Any]:
    # Evaluation as published: resize the short side to 256 (bilinear), centre crop 224, so crop_pct is 0.875.
    return {
        'num_classes': 0, 'input_size': (3, 224, 224), 'pool_size': (7, 7), 'crop_pct': 0.875,
        'interpolation': 'bilinear', **pixel_statistics(bgr), 'first_conv': 'conv1', 'classifier': 'fc',
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2011.10566', **kwargs,
    }


default_cfgs = generate_default_cfgs({
    **{f'{NAME}.{tag}': _cfg(
        bgr=w.bgr, url=w.url, num_classes=w.num_classes, license=w.license, origin_url=w.project)
        for tag, w in WEIGHTS.items()},
    'simsiam_resnet18_cifar.untrained': _cfg(input_size=(3, 32, 32), pool_size=(4, 4), crop_pct=1.0),
})


class CifarResNet(ResNet):
    """ResNet for 32 px images: a 3x3 stem of stride 1 and no max-pool.

    The paper's appendix D says only "the CIFAR variant of ResNet-18"; this stem is the usual reading of it. timm's own
    ResNets lack such a stem, so an exported backbone of this kind needs `import simsiam_models` to load.
    """

    def __init__(self, *args: Any, in_chans: int = 3, **kwargs: Any) -> None:
        super().__init__(*args, in_chans=in_chans, **kwargs)
        old = self.conv1
        self.conv1 = nn.Conv2d(
            in_chans, old.out_channels, 3, padding=1, bias=False, device=old.weight.device, dtype=old.weight.dtype)
        nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
        self.maxpool = nn.Identity()
        for i, info in enumerate(self.feature_info):  # timm assumes a stem of stride 4
            info['reduction'] = 1 if i == 0 else info['reduction'] // 4


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Returns the entries that `model` loads from a checkpoint of any known layout.

    Raises ValueError if the keys fit no known layout, and RuntimeError if entries of the backbone are missing: timm
    itself accepts that if `num_classes` differs from the file's, and leaves random weights.
    """
    checkpoint = recognize(state_dict)
    state = checkpoint.model_state() if model.num_classes else checkpoint.backbone
    needed = [k for k in model.state_dict() if not k.startswith('fc.')]
    if missing := [k for k in needed if k not in state]:
        raise RuntimeError(f'the checkpoint (layout {checkpoint.layout}) lacks {len(missing)} of the {len(needed)} '
                           f'entries of the backbone: {", ".join(missing[:3])}, ...')
    _logger.info(checkpoint.describe())
    return state


def find_weights(variant: str, kwargs: dict[str, Any]) -> tuple[str, Weights] | None:
    """Returns 'simsiam_resnet50.TAG' and its row in WEIGHTS; None if the caller names another source of weights."""
    cfg = timm.models.resolve_pretrained_cfg(
        variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    tag = next((tag for tag, weights in WEIGHTS.items() if weights.url == cfg.url), None)
    own = tag is None or cfg.source or cfg.file or cfg.state_dict or cfg.hf_hub_id
    return None if own else (f'{variant}.{tag}', WEIGHTS[tag])


def _create_resnet(cls: type[ResNet], variant: str, pretrained: bool, **kwargs: Any) -> ResNet:
    """Calls timm's builder. Published weights become local files, and the caller's files may have any known layout."""
    overlay = dict(kwargs.pop('pretrained_cfg_overlay', None) or {})
    if pretrained:
        if found := find_weights(variant, {**kwargs, 'pretrained_cfg_overlay': overlay}):
            overlay['file'] = str(sources.fetch(*found, cache_dir=kwargs.get('cache_dir')))
            overlay = _match_statistics(variant, kwargs, overlay, found[1].bgr)
            warn_of_licence(*found)
        elif overlay.get('file') and not overlay.get('state_dict'):
            # timm loads with weights_only=True, which refuses OpenMMLab's files.
            checkpoint = load_checkpoint(overlay['file'])
            overlay['state_dict'] = checkpoint.model_state()
            overlay = _match_statistics(variant, kwargs, overlay, checkpoint.info.get('bgr', False))
    model = build_model_with_cfg(
        cls, variant, pretrained, pretrained_cfg_overlay=overlay or None, pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs)
    model.pretrained_cfg.pop('state_dict', None)  # it would stay in memory and in every copy of the configuration
    return model


def _match_statistics(variant: str, kwargs: dict[str, Any], overlay: dict[str, Any], bgr: bool) -> dict[str, Any]:
    """Returns the overlay with mean and std of the weights in it, if the tag's are those of the other order."""
    cfg = timm.models.resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    wrong = tuple(cfg.mean or ()) == pixel_statistics(not bgr)['mean']
    return {**pixel_statistics(bgr), **overlay} if wrong else overlay


@functools.cache
def warn_of_licence(name: str, weights: Weights) -> None:
    """Warns once per name of weights that forbid commercial use."""
    if '-nc-' in weights.license:
        _logger.warning(f'{name}: these weights are licensed {weights.license.upper()}, for non-commercial use only')


@register_model
def simsiam_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-50 as in SimSiam: (B, 3, H, W) -> (B, 2048), or logits if `num_classes` is set."""
    return _create_resnet(ResNet, NAME, pretrained, **{'block': Bottleneck, 'layers': (3, 4, 6, 3), **kwargs})


@register_model
def simsiam_resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 with the usual CIFAR stem: (B, 3, 32, 32) -> (B, 512), or logits."""
    kwargs = {'block': BasicBlock, 'layers': (2, 2, 2, 2), **kwargs}
    return _create_resnet(CifarResNet, 'simsiam_resnet18_cifar', pretrained, **kwargs)
