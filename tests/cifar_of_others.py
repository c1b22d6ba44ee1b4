"""Networks for 32 px images as other projects build and save them, written from their documented structure.

Each writer returns backbone, projector and predictor, in evaluation mode, whose outputs are to be reached.
"""
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn


def randomize(model: nn.Module) -> nn.Module:
    """Gives every norm statistics, scale and shift of its own, as after training."""
    torch.manual_seed(3)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            m.num_batches_tracked.fill_(9)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1)
                nn.init.normal_(m.bias, std=0.1)
    return model.eval()


def pixels() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def cifar_resnet(padding: int = 1, layers: tuple[int, ...] = (2, 2, 2, 2)) -> torchvision.models.ResNet:
    """torchvision's ResNet with a stem for 32 px images, as the code of others builds it."""
    torch.manual_seed(0)
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, list(layers))
    model.conv1 = nn.Conv2d(3, 64, 3, 1, padding, bias=False)
    model.maxpool = model.fc = nn.Identity()
    return randomize(model)


def prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in module.state_dict().items()}


def solo_heads(dim: int = 24, hidden: int = 8) -> tuple[nn.Module, nn.Module]:
    projector = nn.Sequential(
        nn.Linear(512, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, dim, bias=False),
        nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, dim), nn.BatchNorm1d(dim, affine=False))
    predictor = nn.Sequential(
        nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim))
    return randomize(projector), randomize(predictor)


def write_solo(path: Path) -> tuple[nn.Module, nn.Module, nn.Module]:
    backbone, (projector, predictor) = cifar_resnet(padding=2), solo_heads()
    state = {**prefixed('backbone.', backbone), **prefixed('projector.', projector),
             **prefixed('predictor.', predictor), **prefixed('classifier.', nn.Linear(512, 10))}
    torch.save({'state_dict': state, 'pytorch-lightning_version': '1.6.4', 'epoch': 9}, path)
    return backbone, projector, predictor


def write_lightly(path: Path, layers: tuple[int, ...] = (2, 2, 2, 2)) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Its own ResNet calls ReLU as a function, so that an nn.Sequential of its children has none behind the stem."""
    r = cifar_resnet(layers=layers)
    backbone = nn.Sequential(r.conv1, r.bn1, r.layer1, r.layer2, r.layer3, r.layer4, nn.AdaptiveAvgPool2d(1))
    torch.manual_seed(5)
    projector = nn.Sequential(
        nn.Sequential(nn.Linear(512, 32), nn.BatchNorm1d(32), nn.ReLU()),
        nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)))
    predictor = nn.Sequential(nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 32))
    for head in (projector, predictor):
        randomize(head)
    state = {k.replace('downsample', 'shortcut'): v for k, v in prefixed('model.backbone.', backbone).items()}
    state |= {**prefixed('model.projection_mlp.', projector), **prefixed('model.prediction_mlp.', predictor)}
    torch.save({'state_dict': state, 'epoch': 9}, path)
    return nn.Sequential(backbone, nn.Flatten()), projector, predictor


def write_hua(path: Path) -> tuple[nn.Module, nn.Module, nn.Module]:
    """PatrickHua/SimSiam with proj_layers=2: its third layer stays in the file and is not used."""
    backbone = cifar_resnet()
    torch.manual_seed(5)
    one, two, three = (nn.Sequential(nn.Linear(n, 32), nn.BatchNorm1d(32), nn.ReLU()) for n in (512, 32, 32))
    predictor = nn.Sequential(nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 32))
    for head in (one, two, three, predictor):
        randomize(head)
    two[1].num_batches_tracked.fill_(0)
    names = {'layer1': one, 'layer2': two, 'layer3': three[:2]}
    projector = {f'projector.{name}.{k}': v for name, layer in names.items() for k, v in layer.state_dict().items()}
    state = {
        **prefixed('module.backbone.', backbone), **{f'module.{k}': v for k, v in projector.items()},
        **prefixed('module.encoder.0.', backbone),
        **{f'module.{k.replace("projector", "encoder.1")}': v for k, v in projector.items()},
        **{f'module.predictor.layer{int(k[0]) + 1}{k[1:]}': v for k, v in predictor.state_dict().items()}}
    torch.save({'state_dict': state, 'epoch': 800}, path)
    return backbone, nn.Sequential(one, three[:2]), predictor


WRITERS = {
    'solo-learn': (write_solo, dict(dim=24, pred_dim=8)),
    'lightly': (write_lightly, dict(dim=32, pred_dim=8, proj_layers=2)),
    'patrickhua': (write_hua, dict(dim=32, pred_dim=8, proj_layers=2))}
