"""Features -> z -> p -> loss: SimSiam (Chen & He, arXiv 2011.10566, section 3).

The names are the paper's: two views `x1, x2`; encoder f = backbone + projector, `z = f(x)`; predictor h, `p = h(z)`.
"""
import logging
from pathlib import Path
from typing import Any

import timm
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from . import resnet
from .weights import sources
from .weights.layouts import load_checkpoint

_logger = logging.getLogger('simsiam_models')


def projector(in_dim: int, dim: int = 2048, layers: int = 3) -> nn.Sequential:
    """The projection MLP: `layers` fully connected layers of width `dim`, each with batch norm, the last without ReLU.

    No layer has a bias (batch norm removes it) and the last batch norm has no scale and shift. Entries are numbered as
    in the released files: 0 1 (2) 3 4 (5) 6 7 for three layers (2 layers in the paper's CIFAR setting, appendix D).
    """
    if layers < 1:
        raise ValueError(f'proj_layers={layers}: the projector needs at least 1 layer (the paper has 3, for CIFAR 2)')
    widths = [in_dim] + [dim] * layers
    mlp = []
    for i, (d_in, d_out) in enumerate(zip(widths[:-1], widths[1:], strict=True), 1):
        last = i == layers
        mlp += [nn.Linear(d_in, d_out, bias=False), nn.BatchNorm1d(d_out, affine=not last)]
        mlp += [] if last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*mlp)


def predictor(dim: int = 2048, pred_dim: int = 512) -> nn.Sequential:
    """The prediction MLP h: a bottleneck of width `pred_dim`; its output has neither batch norm nor ReLU."""
    return nn.Sequential(
        nn.Linear(dim, pred_dim, bias=False), nn.BatchNorm1d(pred_dim), nn.ReLU(inplace=True), nn.Linear(pred_dim, dim))


class SimSiam(nn.Module):
    """SimSiam around any timm model that was created with `num_classes=0`.

    Args:
        backbone: maps (B, 3, H, W) to pooled features (B, C).
        dim: width of z and p.
        pred_dim: hidden width of the predictor; the paper takes dim / 4.
        proj_layers: fully connected layers of the projector.

    Raises:
        ValueError: the backbone has a classifier, or does not say how wide its features are.
    """

    def __init__(self, backbone: nn.Module, dim: int = 2048, pred_dim: int = 512, proj_layers: int = 3) -> None:
        super().__init__()
        if getattr(backbone, 'num_classes', 0) != 0:
            raise ValueError(
                f'the backbone has num_classes={backbone.num_classes}, SimSiam needs its features: create it with '
                'num_classes=0')
        # Some timm models (MobileNetV3, VGG) keep a hidden layer behind the pooling when the classifier is gone.
        width = getattr(backbone, 'head_hidden_size', None) or getattr(backbone, 'num_features', None)
        if width is None:
            raise ValueError(f'{type(backbone).__name__} has no num_features; use a timm model with num_classes=0')
        self.backbone = backbone
        self.projector = projector(width, dim, proj_layers)
        self.predictor = predictor(dim, pred_dim)

    def encode(self, x: Tensor) -> Tensor:
        """f: (B, 3, H, W) -> z (B, dim)."""
        f = self.backbone(x)  # (B, C)
        if f.ndim != 2:
            raise ValueError(
                f'the backbone returns shape {tuple(f.shape)}, SimSiam needs pooled features (B, C): create it with '
                "num_classes=0 and without global_pool=''")
        return self.projector(f)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Two views (B, 3, H, W) -> p1, p2, z1, z2, each (B, dim); z1 and z2 carry no gradient (Algorithm 1).

        The views are two passes: batch statistics are per view.
        """
        z1, z2 = self.encode(x1), self.encode(x2)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return p1, p2, z1.detach(), z2.detach()


def simsiam_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """L = D(p1, z2) / 2 + D(p2, z1) / 2, D the negative cosine similarity (eq. 1 and 2), averaged over the batch.

    A scalar in [-1, 1]; p and z are (B, dim). z1 and z2 are constants: the stop-gradient is applied here too.
    """
    return -(F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean()) / 2


def create_simsiam(
    model_name: str = 'simsiam_resnet50', pretrained: bool = False, dim: int = 2048, pred_dim: int = 512,
    proj_layers: int = 3, **backbone_kwargs: Any,
) -> SimSiam:
    """SimSiam over `timm.create_model(model_name, num_classes=0, **backbone_kwargs)`.

    With the defaults this is the paper's model of 38,199,360 parameters. timm starts the last batch norm of each
    residual block at zero, as the released recipes do.

    `pretrained=True` loads backbone, projector and predictor of `simsiam_resnet50` (tags as for timm), of a checkpoint
    file given by `pretrained_cfg_overlay=dict(file=...)`, or of a `local-dir:` folder; with other models of timm the
    heads start at random, which is said.

    Raises:
        ValueError: the weights hold no heads, or heads of other widths than dim, pred_dim and proj_layers.
        RuntimeError: no source has the weights.
    """
    if backbone_kwargs.setdefault('num_classes', 0) != 0:
        raise ValueError(f'num_classes={backbone_kwargs["num_classes"]}: SimSiam has no classifier; leave it out')
    heads = _published_heads(model_name, backbone_kwargs) if pretrained else {}
    model = SimSiam(timm.create_model(model_name, pretrained=pretrained, **backbone_kwargs), dim, pred_dim, proj_layers)
    if heads:
        _load_heads(model, heads, f'dim={dim}, pred_dim={pred_dim}, proj_layers={proj_layers}')
    elif pretrained:
        _logger.warning(f'{model_name}: pretrained backbone; projector and predictor start at random')
    return model


def _published_heads(model_name: str, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Projector and predictor that belong to the weights which timm will load; empty where there are none to expect."""
    if model_name.startswith('local-dir:'):
        file = Path(model_name.removeprefix('local-dir:')) / sources.HEADS
        return load_file(file) if file.exists() else {}
    name, _, tag = model_name.partition('.')
    if name != 'simsiam_resnet50':
        return {}
    if file := (kwargs.get('pretrained_cfg_overlay') or {}).get('file'):
        return load_checkpoint(file).heads_state()
    found = resnet.published(name, {**({'pretrained_cfg': tag} if tag else {}), **kwargs})
    if found is None:
        return {}
    if found[1].num_classes:
        raise ValueError(
            f'{found[0]} holds a classifier and no heads; take its pretraining weights, '
            f'{found[0].replace("_lin_", "_")}')
    return load_file(sources.fetch(*found, filename=sources.HEADS, cache_dir=kwargs.get('cache_dir')))


def _load_heads(model: SimSiam, heads: dict[str, Tensor], asked: str) -> None:
    own = {k: v.shape for k, v in model.state_dict().items() if not k.startswith('backbone.')}
    wrong = [k for k in {*own, *heads} if k not in own or k not in heads or own[k] != heads[k].shape]
    if wrong:
        raise ValueError(
            f'the heads of these weights do not fit {asked} ({len(wrong)} entries differ, first {min(wrong)}); '
            'published heads have dim=2048, pred_dim=512, proj_layers=3')
    model.load_state_dict(heads, strict=False)  # every entry of the heads is there: compared above
