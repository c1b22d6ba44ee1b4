"""Image -> features: the backbones, registered with timm.

`simsiam_resnet50` is timm's own ResNet-50, with torchvision's layout: everything that timm offers for a ResNet works.
The file is called `resnet.py` because timm lists models under the name of their module.
"""
import functools
import logging
from typing import Any, cast

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from .weights import sources
from .weights.layouts import Checkpoint, load_checkpoint, recognize
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

    Args:
        stem_padding: 1; solo-learn's stem pads by 2, so that its maps have 34 px.
        stem_relu: whether a ReLU follows the stem's batch norm; in networks cut from lightly's ResNet none does.
    """

    def __init__(
        self, *args: Any, in_chans: int = 3, stem_padding: int = 1, stem_relu: bool = True, **kwargs: Any,
    ) -> None:
        super().__init__(*args, **{**kwargs, 'in_chans': in_chans})
        old = cast(nn.Conv2d, self.conv1)
        stem = nn.Conv2d(
            in_chans, old.out_channels, 3, padding=1, bias=False, device=old.weight.device, dtype=old.weight.dtype)
        nn.init.kaiming_normal_(stem.weight, mode='fan_out', nonlinearity='relu')
        self.add_module('conv1', stem)  # both annotated as Sequential by timm
        self.add_module('maxpool', nn.Identity())
        self.set_stem(stem_padding, stem_relu)
        for i, info in enumerate(cast(list[dict[str, Any]], self.feature_info)):  # timm assumes a stem of stride 4
            info['reduction'] = 1 if i == 0 else info['reduction'] // 4

    def set_stem(self, stem_padding: int = 1, stem_relu: bool = True) -> None:
        """Changes what no entry of a checkpoint shows; see the class."""
        cast(nn.Conv2d, self.conv1).padding = (stem_padding, stem_padding)
        if not stem_relu:
            self.act1 = nn.Identity()


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module, branch: str | None = None) -> dict[str, Tensor]:
    """Returns the entries that `model` loads from a checkpoint of any known layout; `branch`: see `load_checkpoint`.

    Raises ValueError if the keys fit no known layout, and RuntimeError if the backbone's entries are not those of the
    model: timm itself accepts that if `num_classes` differs from the file's, and leaves random weights.
    """
    return choose_entries(recognize(state_dict, branch), model)


def choose_entries(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
    """Returns the entries of a checkpoint for `model`, and sets the stem that they were trained with.

    A classifier is among them if it has the model's number of classes. If not, the model's own stays random, as for
    all pretrained weights of timm, and a warning says so. Raises RuntimeError as `checkpoint_filter_fn`.
    """
    state, needed = checkpoint.model_state(), [k for k in model.state_dict() if not k.startswith('fc.')]
    lacking, extra = [k for k in needed if k not in state], [k for k in checkpoint.backbone if k not in needed]
    for keys, problem in ((lacking, f'lacks {len(lacking)} of the'), (extra, f'has {len(extra)} more than the')):
        if keys:
            raise RuntimeError(
                f'the checkpoint (layout {checkpoint.layout}) {problem} {len(needed)} entries of the '
                f'backbone: {", ".join(keys[:3])}, ...')
    if stem := checkpoint.info.get('stem'):
        if not isinstance(model, CifarResNet):
            raise RuntimeError(
                f'the checkpoint (layout {checkpoint.layout}) is of a network for 32 px images; load it as '
                'simsiam_resnet18_cifar')
        model.set_stem(**stem)
    _logger.info(checkpoint.describe())
    classes = len(state.get('fc.weight', ()))
    if hasattr(model, 'pretrained_cfg'):
        # timm takes a classifier of this size, and drops any other.
        cast(dict[str, Any], model.pretrained_cfg)['num_classes'] = classes
    own = cast(int, model.num_classes)
    if own not in (0, classes):
        found = f'a classifier of {classes} classes' if classes else 'no classifier'
        _logger.warning(f"the weights hold {found}; the model's, with {own} classes, starts at random")
    return state if own == classes else checkpoint.backbone


def find_weights(variant: str, kwargs: dict[str, Any]) -> tuple[str, Weights] | None:
    """Returns 'simsiam_resnet50.TAG' and its row in WEIGHTS; None if the caller names another source of weights."""
    cfg = timm.models.resolve_pretrained_cfg(
        variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    tag = next((tag for tag, weights in WEIGHTS.items() if weights.url == cfg.url), None)
    if tag is None or cfg.source or cfg.file or cfg.state_dict or cfg.hf_hub_id:
        return None
    return f'{variant}.{tag}', WEIGHTS[tag]


def _create_resnet(
    cls: type[ResNet], variant: str, pretrained: bool, branch: str | None = None, **kwargs: Any,
) -> ResNet:
    """Calls timm's builder. Published weights become local files, and the caller's files may have any known layout."""
    overlay, filter_fn = dict(kwargs.pop('pretrained_cfg_overlay', None) or {}), None
    if pretrained:
        cfg = timm.models.resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
        if found := find_weights(variant, {**kwargs, 'pretrained_cfg_overlay': overlay}):
            overlay['file'] = str(sources.fetch(*found, cache_dir=kwargs.get('cache_dir')))
            overlay = _match_statistics(variant, kwargs, overlay, found[1].bgr)
            warn_of_licence(*found)
        elif cfg.file and not cfg.state_dict and not cfg.source:
            # timm loads with weights_only=True, which refuses OpenMMLab's files.
            checkpoint = load_checkpoint(cfg.file, branch)
            overlay['state_dict'] = checkpoint.model_state()
            overlay = _match_statistics(variant, kwargs, overlay, checkpoint.info.get('bgr', False))
            filter_fn = functools.partial(_fill, checkpoint)
    filter_fn = filter_fn or functools.partial(checkpoint_filter_fn, branch=branch)
    model = build_model_with_cfg(
        cls, variant, pretrained, pretrained_cfg_overlay=overlay or None, pretrained_filter_fn=filter_fn, **kwargs)
    # It would stay in memory and in every copy of the configuration.
    cast(dict[str, Any], model.pretrained_cfg).pop('state_dict', None)
    return model


def _fill(checkpoint: Checkpoint, state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    return choose_entries(checkpoint, model)


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
