"""The networks of the detectors: ResNet stages, feature pyramid, and the heads, initialised as mmdet 2.25 does."""
from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeVar, cast

from timm.models.resnet import ResNet
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ...runtime.precision import widen

Layer = TypeVar('Layer', bound=nn.Module)


class Stages(nn.Module):
    """A ResNet's stem and first stages: (B, 3, H, W) to the maps of the stages in `returned`.

    The modules are the ResNet's own, so that training them trains it.
    """

    def __init__(self, resnet: ResNet, stages: int, returned: Sequence[int]) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1, self.maxpool = resnet.conv1, resnet.bn1, resnet.act1, resnet.maxpool
        for i in range(1, stages + 1):
            self.add_module(f'layer{i}', getattr(resnet, f'layer{i}'))
        self.stages, self.returned = stages, tuple(returned)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.maxpool(self.act1(self.bn1(self.conv1(x)))), []
        for i in range(1, self.stages + 1):
            x = getattr(self, f'layer{i}')(x)
            if i in self.returned:
                maps.append(x)
        return maps


class Layer4(nn.Module):
    """A ResNet's last stage on RoIs, and the extra batch norm, without ReLU, that MoCo's detectors have."""

    def __init__(self, resnet: ResNet, channels: int) -> None:
        super().__init__()
        self.layer4 = cast(nn.Sequential, resnet.layer4)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.layer4(x))
        return y


class Pyramid(nn.Module):
    """A feature pyramid of 256 channels with batch norm; its last map is every second pixel of the one before."""

    channels = 256

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork(
            list(channels), self.channels, LastLevelMaxPool(), norm_layer=nn.BatchNorm2d)
        for conv in _find(self, nn.Conv2d):
            nn.init.xavier_uniform_(conv.weight)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return list(self.fpn(OrderedDict(enumerate(maps))).values())


class BoxHead(nn.Module):
    """Classifies RoIs, and regresses a box for each class.

    In C4 detectors (`pool_size` None), it follows the average over layer4's map; in the pyramid, four convolutions and
    a linear layer of 1,024 channels.
    """

    def __init__(self, channels: int, classes: int, pool_size: int | None = None) -> None:
        super().__init__()
        self.fc_cls = nn.Linear(channels if pool_size is None else 1024, classes + 1)
        self.fc_reg = nn.Linear(channels if pool_size is None else 1024, 4 * classes)
        for layer, std in ((self.fc_cls, 0.01), (self.fc_reg, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        self.shared = None
        if pool_size is not None:
            self.shared = FastRCNNConvFCHead(
                (channels, pool_size, pool_size), [channels] * 4, [1024], norm_layer=nn.BatchNorm2d)
            for linear in _find(self.shared, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (n, C, S, S) to logits (n, classes + 1), the last of which is the background, and (n, classes, 4)."""
        x = x.mean((2, 3)) if self.shared is None else self.shared(x)
        return widen(self.fc_cls(x)), widen(self.fc_reg(x)).unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """Maps RoIs (n, C, S, S) to mask logits (n, classes, 2 S, 2 S), after `convs` convolutions with batch norm."""

    def __init__(self, channels: int, classes: int, convs: int) -> None:
        super().__init__()
        width = Pyramid.channels
        self.convs = MaskRCNNHeads(channels, [width] * convs, 1, norm_layer=nn.BatchNorm2d)
        self.predictor = MaskRCNNPredictor(width if convs else channels, width, classes)
        for layer in (self.predictor.conv5_mask, self.predictor.mask_fcn_logits):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return widen(self.predictor(self.convs(x)))


def _find(module: nn.Module, kind: type[Layer]) -> list[Layer]:
    return [m for m in module.modules() if isinstance(m, kind)]
