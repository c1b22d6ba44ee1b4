"""FCN-D8 as in mmsegmentation: a timm ResNet whose last two stages are dilated, a decode and an auxiliary head."""
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from torch import Tensor, nn

from ...runtime.distributed import World, mean_over_processes
from ...runtime.precision import widen
from ..backbone import Backbone, forward_stages, load_backbone
from ..protocols import SEGMENTATION
from ..trained import check_trained, count_parts, name_classes
from .metrics import IGNORED

OUTPUT_STRIDE = 8
STRIDES = [4, 8, 8, 8]  # of the stages
LOSS_MEANS = ('all', 'valid')
PUBLISHED = SEGMENTATION['voc12aug_20k']  # the numbers of the network, which all protocols have


class ConvBlock(nn.Module):
    """3x3 convolution, batch norm and ReLU."""

    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class FCNHead(nn.Module):
    """Convolutions, perhaps one more over their output beside their input, and a 1x1 convolution to the classes."""

    def __init__(self, before: int, channels: int, classes: int, convs: int, concat: bool, dropout: float) -> None:
        super().__init__()
        self.conv_seg, self.dropout = nn.Conv2d(channels, classes, 1), nn.Dropout2d(dropout)
        self.convs = nn.Sequential(*(ConvBlock(channels if i else before, channels) for i in range(convs)))
        self.conv_cat = ConvBlock(before + channels, channels) if concat else None
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(cast(Tensor, self.conv_seg.bias))

    def forward(self, x: Tensor, draws: Tensor | None = None) -> Tensor:
        """Returns logits (B, classes, h, w). `draws`: see `Segmenter.losses`; (B, channels) of this head."""
        y = self.convs(x)
        if self.conv_cat is not None:
            y = self.conv_cat(torch.cat([x, y], 1))
        if draws is None or not self.training:
            y = self.dropout(y)
        else:
            kept = (draws >= self.dropout.p).to(y) / (1 - self.dropout.p)
            y = y * kept[:, :, None, None]
        logits: Tensor = self.conv_seg(y)
        return logits


class Segmenter(nn.Module):
    """FCN-D8. Its parts have the names of mmsegmentation's: backbone, decode_head, auxiliary_head.

    `source` is the backbone that it was built on; training changes that network's weights, too. `names` are those of
    the classes. The losses are those of the images of all processes of `world` together.
    """

    def __init__(
        self, source: Backbone, names: Sequence[str], channels: tuple[int, int], *, align_corners: bool, dropout: float,
        loss_mean: str,
    ) -> None:
        super().__init__()
        self.source, self.names, self.channels = source, list(names), channels
        self.align_corners, self.loss_mean = align_corners, loss_mean
        self.world = World(0, 1, torch.device('cpu'))
        self.backbone = source.model
        *_, before_aux, before = [info['num_chs'] for info in cast(list[dict[str, Any]], source.model.feature_info)]
        self.decode_head = FCNHead(before, channels[0], len(names), 2, True, dropout)
        self.auxiliary_head = FCNHead(before_aux, channels[1], len(names), 1, False, dropout)

    def forward(self, images: Tensor, masks: Tensor, draws: Tensor | None = None) -> dict[str, Tensor]:
        return self.losses(images, masks, draws)

    def losses(self, images: Tensor, masks: Tensor, draws: Tensor | None = None) -> dict[str, Tensor]:
        """Returns the cross-entropies `decode` and `aux`; the published training adds 0.4 times `aux`.

        Args:
            images: (B, 3, H, W), normalised with `source.mean` and `source.std`.
            masks: (B, H, W) integers from 0 to classes - 1; 255 is ignored.
            draws: (B, sum of `channels`) numbers in [0, 1): in training, a channel drops out if its own is below the
                share that does. If None, torch's generator draws.

        Raises:
            ValueError: the shapes do not fit, or a label is none of the classes.
        """
        check_batch(images, masks, len(self.names))
        masks = masks.to(images.device).long()
        each = [None, None] if draws is None else draws.to(images.device).split(self.channels, 1)
        before_aux, before = self.compute_maps(images)
        divisor = self._count(masks)
        return {
            name: self._cross_entropy(head(x, own), masks, divisor) for name, head, x, own in (
                ('decode', self.decode_head, before, each[0]), ('aux', self.auxiliary_head, before_aux, each[1]))}

    def _count(self, masks: Tensor) -> Tensor | int:
        """Returns the number of pixels that the loss is divided by."""
        if self.loss_mean == 'all':
            return masks.numel()
        n = (masks != IGNORED).sum().float()
        return (mean_over_processes(n, self.world) if self.world.size > 1 else n).clamp(min=1)

    def _cross_entropy(self, logits: Tensor, masks: Tensor, divisor: Tensor | int) -> Tensor:
        logits = self.resize(widen(logits), masks.shape[-2:])
        return F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction='sum') / divisor

    def resize(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Returns logits (B, C, h, w) at another size (H, W)."""
        return F.interpolate(logits, tuple(size), mode='bilinear', align_corners=self.align_corners)

    def compute_maps(self, images: Tensor) -> list[Tensor]:
        """Returns the maps of the last two stages, (B, C, H / 8, W / 8)."""
        return forward_stages(self.backbone, images.contiguous(memory_format=torch.channels_last))[0][-2:]

    def compute_logits(self, images: Tensor) -> Tensor:
        """Returns logits (B, classes, H, W) of images (B, 3, H, W), normalised; call it in evaluation mode."""
        return self.resize(widen(self.decode_head(self.compute_maps(images)[1])), images.shape[-2:])

    def check_trained(self) -> None:
        """Raises RuntimeError if a parameter or a batch norm is frozen."""
        check_trained(self, 'network')

    def describe(self) -> str:
        """Returns how large the network is, and that all of it trains."""
        self.check_trained()
        return f'FCN-D8: {count_parts(self)}'


def build(
    model: str | Backbone, classes: int | Sequence[str] = 21, align_corners: bool = False, *, seed: int = 0,
    branch: str | None = None, model_args: dict[str, Any] | None = None, channels: tuple[int, int] | None = None,
    dropout: float = PUBLISHED.dropout, loss_mean: str = PUBLISHED.loss_mean,
) -> Segmenter:
    """Builds a segmenter whose backbone holds the weights of `model`; the heads are initialised from `seed`.

    Args:
        model: what `load_backbone` takes, a ResNet: a timm name or tag, a folder, a checkpoint, NAME:random. Or what it
            returns with `output_stride=8`.
        classes: how many, or their names.
        align_corners: of the bilinear resizing of logits: False for VOC12, True for Cityscapes.
        branch: which network to take of a checkpoint with several.
        model_args: keyword arguments of the backbone.
        channels: of the decode head and the auxiliary head; published are 512 and 256.
        dropout: the share of channels that drop out before the classes.
        loss_mean: the losses are means over 'all' pixels, also ignored ones, as published, or over 'valid' ones.

    Raises:
        ValueError: the network is not a ResNet that can be dilated, or a number is out of range.
        ValueError, RuntimeError, OSError: there are no such weights, or they fill no network.
    """
    names = name_classes(classes)
    channels = channels or (PUBLISHED.channels, PUBLISHED.aux_channels)
    if not 2 <= len(names) <= IGNORED or len(set(names)) < len(names):
        raise ValueError(
            f'{len(names)} classes, {len(set(names))} of them different: 2 to {IGNORED} are possible, each with a name '
            f'of its own ({IGNORED} is the label of ignored pixels)')
    if min(channels) < 1 or not 0 <= dropout < 1 or loss_mean not in LOSS_MEANS:
        raise ValueError(
            f'channels {channels}, dropout {dropout}, loss_mean {loss_mean}: channels must be at least 1, dropout from '
            f'0 to below 1, and loss_mean one of {", ".join(LOSS_MEANS)}')
    source = model if isinstance(model, Backbone) else load_dilated(model, branch, model_args or {})
    check_dilated(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        segmenter = Segmenter(
            source, names, (channels[0], channels[1]), align_corners=align_corners, dropout=dropout,
            loss_mean=loss_mean)
    return segmenter.to(memory_format=torch.channels_last).requires_grad_(True).train()


def load_dilated(model: str, branch: str | None, args: dict[str, Any]) -> Backbone:
    """Loads a backbone with an output stride of 8, whole, or raises as `load_backbone`."""
    if args.get('output_stride', OUTPUT_STRIDE) != OUTPUT_STRIDE:
        raise ValueError(
            f'output_stride {args["output_stride"]}: FCN-D8 has one of {OUTPUT_STRIDE}; leave it out of --model-args')
    try:
        return load_backbone(model, branch=branch, **{**args, 'output_stride': OUTPUT_STRIDE})
    except (ValueError, RuntimeError) as e:
        if 'output_stride' not in str(e):
            raise
        raise ValueError(f'{e}; segmenters need a ResNet of timm, such as simsiam_resnet50 or resnet18') from None


def check_dilated(source: Backbone) -> None:
    """Raises ValueError if the backbone is not a ResNet with an output stride of 8."""
    resnet = source.model
    if not isinstance(resnet, ResNet):
        raise ValueError(
            f'--model {source.name}: segmenters need a ResNet of timm, such as simsiam_resnet50 or resnet18')
    if (found := [info['reduction'] for info in resnet.feature_info[-4:]]) != STRIDES:
        raise ValueError(
            f'--model {source.name}: its stages have the strides {found}, and FCN-D8 needs {STRIDES}; load it with '
            f'output_stride={OUTPUT_STRIDE}, which networks with a small stem or other stages cannot have')


def check_batch(images: Tensor, masks: Tensor, classes: int) -> None:
    """Raises ValueError if the masks do not fit the images or the classes."""
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f'images (B, 3, H, W) are needed, not {tuple(images.shape)}')
    if masks.shape != (len(images), *images.shape[2:]) or masks.is_floating_point():
        needed = len(images), *images.shape[2:]
        raise ValueError(f'masks {needed} of integers are needed, not {tuple(masks.shape)} of {masks.dtype}')
    valid = masks[masks != IGNORED]
    if valid.numel() and not 0 <= int(valid.min()) <= int(valid.max()) < classes:
        raise ValueError(
            f'labels {int(valid.min())} to {int(valid.max())}, but the classes are 0 to {classes - 1} ({IGNORED}: '
            'ignored)')
