"""Features -> z -> p -> loss: SimSiam (Chen & He, arXiv 2011.10566, section 3).

Names follow the paper: two views `x1, x2`; encoder f = backbone + projector, `z = f(x)`; predictor h, `p = h(z)`.
"""
import logging
from pathlib import Path
from typing import Any

import timm
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models import PretrainedCfg
from torch import Tensor, nn

from .resnet import default_cfgs, find_weights
from .weights import sources
from .weights.folders import create_from_folder
from .weights.layouts import load_checkpoint, recognize
from .weights.published import NAME
from .weights.reading import require_numbers, require_safetensors
from .weights.tensorfile import HEADS

_logger = logging.getLogger('simsiam_models')


def build_projector(in_dim: int, dim: int = 2048, layers: int = 3) -> nn.Sequential:
    """Builds the projection MLP: fully connected layers of width `dim`, each with batch norm, the last without ReLU.

    No layer has a bias, which batch norm would remove, and the last batch norm has no scale and shift. Entries are
    numbered as in the released files: 0 1 (2) 3 4 (5) 6 7 for three layers. The paper uses 3, for CIFAR 2 (appendix D).
    """
    if layers < 1:
        raise ValueError(f'proj_layers={layers}: the projector needs at least 1 layer (the paper uses 3, for CIFAR 2)')
    mlp = []
    for width in [in_dim] + [dim] * (layers - 1):
        mlp += [nn.Linear(width, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(inplace=True)]
    return nn.Sequential(*mlp[:-2], nn.BatchNorm1d(dim, affine=False))


def build_predictor(dim: int = 2048, pred_dim: int = 512) -> nn.Sequential:
    """Builds the prediction MLP h: a bottleneck of width `pred_dim` without batch norm and ReLU on its output."""
    return nn.Sequential(
        nn.Linear(dim, pred_dim, bias=False), nn.BatchNorm1d(pred_dim), nn.ReLU(inplace=True), nn.Linear(pred_dim, dim))


class SimSiam(nn.Module):
    """SimSiam around any timm model created with `num_classes=0`, which maps (B, 3, H, W) to pooled features (B, C).

    Args:
        dim: width of z and p.
        pred_dim: hidden width of the predictor; the paper uses dim / 4.
        proj_layers: number of fully connected layers of the projector.
    """

    def __init__(self, backbone: nn.Module, dim: int = 2048, pred_dim: int = 512, proj_layers: int = 3) -> None:
        super().__init__()
        if getattr(backbone, 'num_classes', 0) != 0:
            raise ValueError(f'the backbone has num_classes={backbone.num_classes}, but SimSiam needs features: create '
                             'it with num_classes=0')
        # Some timm models (MobileNetV3, VGG) keep a hidden layer after the pooling without a classifier.
        width = getattr(backbone, 'head_hidden_size', None) or getattr(backbone, 'num_features', None)
        if width is None:
            raise ValueError(f'{type(backbone).__name__} has no num_features; use a timm model with num_classes=0')
        self.backbone = backbone
        self.projector = build_projector(width, dim, proj_layers)
        self.predictor = build_predictor(dim, pred_dim)

    def encode(self, x: Tensor) -> Tensor:
        """Applies f: (B, 3, H, W) -> z (B, dim)."""
        f = self.backbone(x)  # (B, C)
        if f.ndim != 2:
            raise ValueError(f'the backbone returns shape {tuple(f.shape)}, but SimSiam needs pooled features (B, C): '
                             "create it with num_classes=0 and without global_pool=''")
        z: Tensor = self.projector(f)
        return z

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Maps two views (B, 3, H, W) to p1, p2, z1, z2, each (B, dim); z1 and z2 are detached (Algorithm 1).

        Each view is a separate pass, so batch statistics are per view.
        """
        z1, z2 = self.encode(x1), self.encode(x2)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return p1, p2, z1.detach(), z2.detach()


def simsiam_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Computes D(p1, z2) / 2 + D(p2, z1) / 2, with D the negative cosine similarity (eq. 1 and 2), over a batch.

    p and z are (B, dim); the result is a scalar in [-1, 1]. The stop-gradient on z1 and z2 is applied here too.
    """
    return -(F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean()) / 2


def create_simsiam(
    model_name: str = 'simsiam_resnet50', pretrained: bool = False, dim: int = 2048, pred_dim: int = 512,
    proj_layers: int = 3, **backbone_kwargs: Any,
) -> SimSiam:
    """Creates SimSiam around `timm.create_model(model_name, num_classes=0, **backbone_kwargs)`.

    The defaults give the paper's model with 38,199,360 parameters. timm initializes the last batch norm of each
    residual block to zero, as the released recipes do. `pretrained=True` loads backbone, projector and predictor of
    `simsiam_resnet50` (tags as for timm), of a checkpoint file given by `pretrained_cfg_overlay=dict(file=...)`, or of
    a `local-dir:` folder. With other timm models the heads start at random, with a warning. `branch` selects one of
    several networks in a file (see `load_checkpoint`). The projector's last batch norm has a scale and a shift only if
    the file's has them; the paper's has none.

    Raises:
        ValueError: the weights hold no heads, or heads that do not match dim, pred_dim and proj_layers.
        RuntimeError: no source has the weights.
    """
    if backbone_kwargs.setdefault('num_classes', 0) != 0:
        raise ValueError(f'num_classes={backbone_kwargs["num_classes"]}: SimSiam has no classifier; leave it out')
    if pretrained and backbone_kwargs.get('checkpoint_path'):
        raise ValueError(
            f'checkpoint_path={str(backbone_kwargs["checkpoint_path"])!r} would fill the backbone alone, and the heads '
            'would be those of other weights: pass pretrained_cfg_overlay=dict(file=PATH)')
    if model_name.startswith('local-dir:'):
        folder = Path(model_name.removeprefix('local-dir:'))
        heads = _read_heads(folder) if pretrained else {}
        backbone = create_from_folder(folder, pretrained, **backbone_kwargs)
    else:
        heads = _find_heads(model_name, backbone_kwargs) if pretrained else {}
        backbone = timm.create_model(model_name, pretrained=pretrained, **backbone_kwargs)
    model = SimSiam(backbone, dim, pred_dim, proj_layers)
    if heads:
        last = len(model.projector) - 1
        if f'projector.{last}.weight' in heads:
            model.projector[last] = nn.BatchNorm1d(dim)
        own = {k: v.shape for k, v in model.state_dict().items() if not k.startswith('backbone.')}
        if wrong := [k for k in {*own, *heads} if k not in own or k not in heads or own[k] != heads[k].shape]:
            raise ValueError(
                f'the heads of these weights do not fit dim={dim}, pred_dim={pred_dim}, proj_layers={proj_layers} '
                f'({len(wrong)} entries differ, first {min(wrong)}); published heads have dim=2048, pred_dim=512, '
                'proj_layers=3')
        model.load_state_dict(heads, strict=False)  # the comparison above covers every entry of the heads
    elif pretrained:
        _logger.warning(f'{model_name}: pretrained backbone; projector and predictor start at random')
    return model


def _read_heads(folder: Path) -> dict[str, Tensor]:
    """Returns projector and predictor of an exported folder."""
    file = folder / HEADS
    if not file.exists():
        raise ValueError(f'{folder} holds no {HEADS}, so no projector and predictor; create its backbone with timm, or '
                         'name the checkpoint that holds them')
    require_safetensors(file)
    heads = load_file(file)
    require_numbers(heads, f'{file}: ')
    return heads


def _find_heads(model_name: str, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Returns projector and predictor of the weights that timm will load; an empty dictionary if they have none.

    Changes `kwargs` so that a checkpoint of any known layout fills the backbone of any timm model.
    """
    name, _, tag = model_name.partition('.')
    cfg, overlay = kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay') or {}
    cfg = vars(cfg) if isinstance(cfg, PretrainedCfg) else cfg
    given = {**(cfg if isinstance(cfg, dict) else {}), **overlay}
    if own := given.get('state_dict') or given.get('file'):
        branch = kwargs.get('branch')
        checkpoint = recognize(own, branch) if isinstance(own, dict) else load_checkpoint(own, branch)
        if not (checkpoint.projector and checkpoint.predictor):
            where = 'the state_dict' if isinstance(own, dict) else own
            raise ValueError(
                f'{where} holds no projector and predictor ({checkpoint.describe()}); to load its backbone alone, use '
                f'timm.create_model({model_name!r}, pretrained=True, num_classes=0, ...)')
        if name not in default_cfgs:  # timm alone would look for its own names, and load nothing without a word
            kwargs.pop('branch', None)
            kwargs['pretrained_cfg_overlay'] = {
                **overlay, 'file': None, 'state_dict': checkpoint.backbone, 'num_classes': 0}
        return checkpoint.heads_state()
    if name != NAME:
        return {}
    found = find_weights(name, {**({'pretrained_cfg': tag} if tag else {}), **kwargs})
    if found is None:
        return {}
    full_name, weights = found
    if weights.linear:
        raise ValueError(
            f'{full_name} holds a classifier and no heads; use its pretraining weights, {NAME}.{weights.counterpart}')
    return load_file(sources.fetch(full_name, weights, filename=HEADS, cache_dir=kwargs.get('cache_dir')))
