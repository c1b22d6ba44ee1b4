"""torch.hub entry points: torch.hub.load('OWNER/simsiam_models', 'simsiam_r50', trust_repo=True)."""

dependencies = ['torch', 'torchvision', 'timm', 'huggingface_hub', 'safetensors']  # import names


def simsiam_r50(pretrained=True, **kwargs):
    """SimSiam ResNet-50 backbone, (B, 3, 224, 224) -> (B, 2048); default: 69.84 % linear top-1, as published."""
    import timm

    import simsiam_models

    return timm.create_model('simsiam_resnet50', pretrained=pretrained, **kwargs)


def simsiam_r50_lin(pretrained=True, **kwargs):
    """SimSiam ResNet-50 with the published linear ImageNet classifier (1000 classes, 69.8 % top-1, as published)."""
    import timm

    import simsiam_models

    return timm.create_model('simsiam_resnet50.mm1x_ep200_lin_in1k', pretrained=pretrained, **kwargs)


def simsiam_r50_full(pretrained=True, **kwargs):
    """SimSiam ResNet-50 with its published projector and predictor: forward(x1, x2) -> p1, p2, z1, z2."""
    import simsiam_models

    return simsiam_models.create_simsiam('simsiam_resnet50', pretrained=pretrained, **kwargs)
