"""Detectors with a timm ResNet as their backbone: Faster R-CNN C4, Mask R-CNN C4, Mask R-CNN with a feature pyramid."""
import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from torch import Tensor, nn

from ...runtime.distributed import World, mean_over_processes
from ...runtime.precision import widen
from ..backbone import Backbone, load_backbone
from ..protocols import DETECTION_VARIANTS, DETECTORS, DetectorNumbers
from ..trained import check_trained, count_parts, name_classes
from .heads import BoxHead, Layer4, MaskHead, Pyramid, Stages
from .roi import Found, RoIHead
from .rpn import RPN, Draw

STRIDES = [4, 8, 16, 32]  # of the stages that the detectors are built on


class Detector(nn.Module):
    """A two-stage detector. Its parts have the names of mmdet's: backbone, neck, rpn_head, roi_head.

    `source` is the backbone that it was built on; training changes that network's weights, too. `names` are those of
    the classes. The losses are those of the images of all processes of `world` together.
    """

    def __init__(self, kind: str, source: Backbone, names: Sequence[str], numbers: DetectorNumbers) -> None:
        super().__init__()
        resnet, classes = cast(ResNet, source.model), len(names)
        channels = [info['num_chs'] for info in cast(list[dict[str, Any]], resnet.feature_info)[-4:]]
        self.kind, self.source, self.names, self.numbers = kind, source, list(names), numbers
        self.world = World(0, 1, torch.device('cpu'))
        has_masks, shared_head, self.neck = kind != 'fasterrcnn_c4', None, None
        if kind == 'maskrcnn_fpn':
            self.backbone, self.neck = Stages(resnet, 4, (1, 2, 3, 4)), Pyramid(channels)
            channel = head_channel = Pyramid.channels
        else:
            self.backbone = Stages(resnet, 3, (3,))
            channel, head_channel = channels[2:]
            shared_head = Layer4(resnet, head_channel)
        self.rpn_head = RPN(channel, numbers)
        bbox_head = BoxHead(head_channel, classes, numbers.pool_size if self.neck is not None else None)
        mask_head = MaskHead(head_channel, classes, 4 if self.neck is not None else 0) if has_masks else None
        self.roi_head = RoIHead(numbers, bbox_head, mask_head, shared_head)

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], keys: Sequence[int] | None = None,
                ) -> dict[str, Tensor]:
        return self.losses(images, targets, keys)

    def losses(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], keys: Sequence[int] | None = None,
               ) -> dict[str, Tensor]:
        """Returns loss_rpn_cls, loss_rpn_bbox, loss_cls, loss_bbox and, of a detector with masks, loss_mask.

        Args:
            images: (3, H, W) each, of any sizes, normalised with `source.mean` and `source.std`.
            targets: of each image, boxes (m, 4) as x1, y1, x2, y2 in its pixels, labels (m,) from 0 on, and masks
                (m, H, W) if the detector has a mask head. m may be 0.
            keys: a seed for the samples of each image; drawn from torch's generator if None.

        Raises:
            ValueError: the targets do not fit the images or the classes, or a box has no area.
        """
        check_targets(images, targets, len(self.names), self.roi_head.has_masks)
        if keys is None:
            keys = torch.randint(2**62, (len(images),)).tolist()
        draw, device = Draw(keys, self._mean_count), images[0].device
        objects, labels = [t['boxes'].to(images[0]) for t in targets], [t['labels'].to(device) for t in targets]
        masks = [t['masks'].to(device) for t in targets] if self.roi_head.has_masks else None
        sizes = [(x.shape[-2], x.shape[-1]) for x in images]
        maps = self.compute_maps(self.pad(images))
        outputs = self.rpn_head(maps)
        losses = self.rpn_head.compute_losses(outputs, maps, sizes, objects, draw)
        proposals = self.rpn_head.propose(outputs, maps, sizes)
        return losses | self.roi_head.compute_losses(maps[:4], proposals, objects, labels, masks, draw)

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor], originals: Sequence[tuple[int, int]] | None = None) -> list[Found]:
        """Returns the detections in images (3, H, W), normalised; call it in evaluation mode.

        `originals`: height and width of each image before it was resized, in whose pixels the boxes are; by default the
        images' own.
        """
        sizes = [(x.shape[-2], x.shape[-1]) for x in images]
        maps = self.compute_maps(self.pad(images))
        proposals = self.rpn_head.propose(self.rpn_head(maps), maps, sizes)
        return self.roi_head.detect(maps[:4], proposals, sizes, sizes if originals is None else originals)

    def compute_maps(self, x: Tensor) -> list[Tensor]:
        """Returns the maps of a batch (B, 3, H, W): one of stride 16, or five of strides 4 to 64."""
        maps = self.backbone(x)
        return [widen(m) for m in (maps if self.neck is None else self.neck(maps))]

    def pad(self, images: Sequence[Tensor]) -> Tensor:
        """Returns one batch (B, 3, H, W): zeros at the right and below make all images of a batch equally large.

        In training, the batch is that of all processes.
        """
        divisor = self.numbers.rules.divisor
        sides = [-(-max(x.shape[i] for x in images) // divisor) * divisor for i in (1, 2)]
        height, width = self.world.all_reduce_max(sides) if self.training else sides
        batch = torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in images])
        return batch.contiguous(memory_format=torch.channels_last)

    def _mean_count(self, count: float) -> float | Tensor:
        if self.world.size == 1:
            return float(count)
        return mean_over_processes(torch.tensor(float(count), device=self.world.device), self.world)

    def check_trained(self) -> None:
        """Raises RuntimeError if a parameter or a batch norm is frozen."""
        check_trained(self, 'detector')

    def describe(self) -> str:
        """Returns how large the network is, and that all of it trains."""
        self.check_trained()
        return f'{self.kind}: {count_parts(self)}'


def build(
    model: str | Backbone, kind: str = 'fasterrcnn_c4', classes: int | Sequence[str] = 20, *, seed: int = 0,
    branch: str | None = None, model_args: dict[str, Any] | None = None, **numbers: Any,
) -> Detector:
    """Builds a detector whose backbone holds the weights of `model`; the other parts are initialised from `seed`.

    Args:
        model: what `load_backbone` takes, a ResNet: a timm name or tag, a folder, a checkpoint, NAME:random.
        kind: 'fasterrcnn_c4', 'maskrcnn_fpn' or 'maskrcnn_c4'.
        classes: how many, or their names.
        branch: which network to take of a checkpoint with several.
        model_args: keyword arguments of the backbone.
        numbers: of the detector, where they are not the protocol's: fields of `protocols.DetectorNumbers`.

    Raises:
        ValueError: the network is not a ResNet, or a number is unknown or out of range.
        ValueError, RuntimeError, OSError: there are no such weights, or they fill no network.
    """
    names = name_classes(classes)
    resolved = resolve_numbers(kind, numbers)
    if not names or len(set(names)) < len(names):
        raise ValueError(f'{len(names)} classes, {len(set(names))} of them different: each needs a name of its own')
    source = model if isinstance(model, Backbone) else load_backbone(model, branch=branch, **(model_args or {}))
    resnet = source.model
    if not isinstance(resnet, ResNet) or [i['reduction'] for i in resnet.feature_info[-4:]] != STRIDES:
        raise ValueError(
            f'--model {source.name}: detectors need a ResNet of timm whose stages have the strides 4, 8, 16 and 32, '
            'such as simsiam_resnet50 or resnet18')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = Detector(kind, source, names, resolved)
    return detector.requires_grad_(True).train()


def resolve_numbers(kind: str, changes: dict[str, Any]) -> DetectorNumbers:
    """Returns the numbers of a detector with these changes; raises ValueError for a wrong one."""
    if kind not in DETECTORS:
        raise ValueError(f'{kind}: no such detector; choose one of {", ".join(DETECTORS)}')
    known = {f.name for f in dataclasses.fields(DetectorNumbers)}
    if unknown := sorted(changes.keys() - known):
        raise ValueError(f'{unknown[0]}: no such number of a detector; choose among {", ".join(sorted(known))}')
    numbers = dataclasses.replace(DETECTORS[kind], **changes)
    if numbers.variant not in DETECTION_VARIANTS:
        raise ValueError(f'variant {numbers.variant}: choose one of {", ".join(DETECTION_VARIANTS)}')
    if numbers.variant == 'detectron2' and kind != 'fasterrcnn_c4':
        raise ValueError(f"{kind}: the variant detectron2 is MoCo's fasterrcnn_c4; use the variant mmdet")
    if min(*numbers.train_proposals, *numbers.test_proposals, numbers.rois, numbers.pool_size, numbers.rpn_samples) < 1:
        raise ValueError(f'{kind}: proposals, rois, rpn_samples and pool_size must be at least 1')
    return numbers


def check_targets(
    images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], classes: int, has_masks: bool,
) -> None:
    """Raises ValueError if the targets do not fit the images or the classes."""
    if len(images) != len(targets) or not images:
        raise ValueError(f'{len(images)} images and {len(targets)} targets: each image needs one')
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        if missing := [key for key in ('boxes', 'labels') if key not in target]:
            raise ValueError(f'target {i} has no {missing[0]}')
        boxes, labels = target['boxes'], target['labels']
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f'image {i}: (3, H, W) is needed, not {tuple(image.shape)}')
        if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != (len(boxes),):
            raise ValueError(
                f'image {i}: boxes (m, 4) and labels (m,) are needed, not {tuple(boxes.shape)}, {tuple(labels.shape)}')
        if labels.is_floating_point():
            raise ValueError(f'image {i}: labels are whole numbers, not {labels.dtype}')
        bad = ~((boxes[:, 2:] > boxes[:, :2]).all(1) & boxes.isfinite().all(1))
        if bad.any():
            at = int(bad.nonzero()[0])
            raise ValueError(f'image {i}, box {at}: {boxes[at].tolist()} has no area; leave it out')
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(
                f'image {i}: labels {int(labels.min())} to {int(labels.max())}, but the classes are 0 to {classes - 1}')
        if has_masks and ('masks' not in target or target['masks'].shape != (len(boxes), *image.shape[1:])):
            found = tuple(target['masks'].shape) if 'masks' in target else 'none'
            raise ValueError(f'image {i}: masks {(len(boxes), *image.shape[1:])} are needed, not {found}')
