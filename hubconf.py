"""SimSiam ResNet-50 for torch.hub: published weights, without installing this package.

    torch.hub.list('OWNER/simsiam_models', trust_repo=True)
    print(torch.hub.help('OWNER/simsiam_models', 'simsiam_r50', trust_repo=True))
    model = torch.hub.load('OWNER/simsiam_models', 'simsiam_r50', trust_repo=True)
"""
from __future__ import annotations

TYPE_CHECKING = False  # type checkers take it as true; reading this file imports nothing
if TYPE_CHECKING:
    from typing import Any

    from torch import nn

    from simsiam_models import SimSiam

dependencies = ['torch', 'torchvision', 'timm', 'huggingface_hub', 'safetensors']  # import names


def simsiam_r50(pretrained: bool = True, tag: str | None = None, **kwargs: Any) -> nn.Module:
    """SimSiam ResNet-50 backbone, as timm's ResNet: (B, 3, 224, 224) -> (B, 2048).

        model = torch.hub.load('OWNER/simsiam_models', 'simsiam_r50', trust_repo=True)
        model = torch.hub.load('OWNER/simsiam_models', 'simsiam_r50', tag='fb_bs256_ep100_in1k', trust_repo=True)
        model = torch.hub.load('OWNER/simsiam_models', 'simsiam_r50', num_classes=10, trust_repo=True)

    Inputs are RGB images, normalised by model.pretrained_cfg['mean'] and ['std'].

    Args:
        pretrained: load published weights (default), or start at random.
        tag: which weights to load. The default is mm_ep200_in1k (69.84 % linear top-1 on ImageNet as published). Once
            any model has been loaded, timm.list_pretrained('simsiam_resnet50*') lists every tag.
        **kwargs: passed on to timm.create_model, for example num_classes=10, in_chans=1 or features_only=True.

    Licence: the code is Apache-2.0. Weights have their own licences: tags that start with mm (OpenMMLab) are
    Apache-2.0; those that start with fb (Facebook AI Research) are CC BY-NC 4.0, for non-commercial use only.
    """
    import timm

    return timm.create_model(_name(tag), pretrained=pretrained, **kwargs)


def simsiam_r50_lin(pretrained: bool = True, tag: str | None = None, **kwargs: Any) -> nn.Module:
    """SimSiam ResNet-50 with its published linear ImageNet classifier: (B, 3, 224, 224) -> (B, 1000).

        model = torch.hub.load('OWNER/simsiam_models', 'simsiam_r50_lin', trust_repo=True)

    Args:
        pretrained: load published weights (default), or start at random.
        tag: a tag with _lin_ in its name: mm1x_ep200_lin_in1k (default; 69.8 % top-1 as published),
            mm1x_ep100_lin_in1k, fb_bs512_ep100_lin_in1k or fb_bs256_ep100_lin_in1k.
        **kwargs: passed on to timm.create_model.

    Raises ValueError for a tag without a classifier. Inputs and licences: see simsiam_r50.
    """
    import timm

    return timm.create_model(_name(tag, classifier=True), pretrained=pretrained, **kwargs)


def simsiam_r50_full(pretrained: bool = True, tag: str | None = None, **kwargs: Any) -> SimSiam:
    """SimSiam ResNet-50 with its published projector and predictor: forward(x1, x2) -> p1, p2, z1, z2.

        model = torch.hub.load('OWNER/simsiam_models', 'simsiam_r50_full', trust_repo=True)

    x1 and x2 are two views (B, 3, 224, 224) of the same images, and each result is (B, 2048).

    Args:
        pretrained: load published weights (default), or start at random.
        tag: which weights to load: a tag without _lin_ in its name; see simsiam_r50.
        **kwargs: dim, pred_dim and proj_layers of the heads; all others are passed on to timm.create_model.

    Raises ValueError for weights that hold no heads. Licences: see simsiam_r50.
    """
    import simsiam_models

    return simsiam_models.create_simsiam(_name(tag), pretrained=pretrained, **kwargs)


def _name(tag: str | None, classifier: bool = False) -> str:
    """Returns timm's name of the weights; raises ValueError for a tag that is unknown or lacks the classifier."""
    import simsiam_models  # registers the models with timm
    from simsiam_models.weights.published import NAME, WEIGHTS

    if tag is None and classifier:
        tag = 'mm1x_ep200_lin_in1k'
    tags = [known for known, weights in WEIGHTS.items() if weights.linear or not classifier]
    if tag is not None and tag not in tags:
        what = 'has no classifier' if tag in WEIGHTS else 'is not known'
        raise ValueError(f'tag={tag!r} {what}; use one of {", ".join(tags)}')
    return NAME if tag is None else f'{NAME}.{tag}'
