"""Every number of a segmentation run: the protocol's, and what flags change."""
import argparse
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ...runtime.messages import check_flags
from ..protocols import SEGMENTATION, SegmentationProtocol
from ..transfer import Schedule
from .data import CropAugmentation
from .inference import Inference

SMALLEST = 32  # pixels of a crop
ABOUT = {'benchmark', 'dataset'}  # fields that are no numbers
ELSEWHERE = {'eval_every', *ABOUT}  # fields that do not change what is learned


@dataclass(frozen=True, kw_only=True)
class SegmentationSettings:
    """The numbers in use, and the protocol as published."""

    name: str  # of the protocol
    used: SegmentationProtocol
    seed: int

    @property
    def published(self) -> SegmentationProtocol:
        return SEGMENTATION[self.name]

    def describe(self, amp: str) -> dict[str, Any]:
        """Returns a record's protocol; 'changed' holds each number that is not the published one, with both."""
        used, published = (dataclasses.asdict(p) for p in (self.used, self.published))
        changed = {
            k: {'used': used[k], 'published': published[k]} for k in used
            if k not in ELSEWHERE and used[k] != published[k]}
        numbers = {k: v for k, v in used.items() if k not in ABOUT}
        more = {'changed': changed} if changed else {}
        return {'name': self.name, **numbers, 'amp': amp, 'seed': self.seed, **more}

    def make_schedule(self) -> Schedule:
        """Returns what the optimizer does."""
        return Schedule(**take(self.used, Schedule))

    def make_augmentation(self) -> CropAugmentation:
        """Returns how training images are prepared."""
        return CropAugmentation(**take(self.used, CropAugmentation))

    def make_inference(self) -> Inference:
        """Returns how images are measured."""
        return Inference(**take(self.used, Inference))


def take(values: SegmentationProtocol, kind: type) -> dict[str, Any]:
    """Returns those numbers that a dataclass has as fields."""
    return {f.name: getattr(values, f.name) for f in dataclasses.fields(kind) if hasattr(values, f.name)}


def resolve(args: argparse.Namespace) -> SegmentationSettings:
    """Returns the numbers that the flags ask for, or raises ValueError for a wrong flag.

    With another batch size, the rate is in proportion to it, and the iterations are in inverse proportion, so that the
    images that train remain the same. The floor of the rate is in proportion to the rate. With another size of crops,
    the box that images are fitted in is in proportion to it, and so is the stride of windows.
    """
    p = SEGMENTATION[args.protocol]
    check_flags(
        (f'--{name.replace("_", "-")}', value, value >= low, f'at least {low}')
        for name, low in (('iterations', 1), ('batch_size', 1), ('image_size', SMALLEST), ('head_channels', 2),
                          ('eval_every', 1), ('workers', 0), ('seed', 0))
        if (value := getattr(args, name)) is not None)
    check_flags([('--lr', args.lr, args.lr is None or 0 < args.lr < math.inf, 'above 0 and finite'),
                 ('--checkpoint-minutes', args.checkpoint_minutes, args.checkpoint_minutes > 0, 'above 0')])
    batch = args.batch_size or p.batch_size
    factor = batch / p.batch_size
    lr = p.lr * factor if args.lr is None else args.lr
    iterations = args.iterations or max(1, round(p.iterations / factor))
    changes: dict[str, Any] = {
        'batch_size': batch, 'lr': lr, 'floor': p.floor * (lr / p.lr), 'iterations': iterations,
        'eval_every': args.eval_every or min(iterations, max(1, round(p.eval_every / factor)))}
    if args.image_size is not None:
        scale = args.image_size / p.crop
        changes |= {'crop': args.image_size, 'box': tuple(max(1, round(side * scale)) for side in p.box),
                    'stride': max(1, round(p.stride * scale))}
    if args.head_channels is not None:
        changes |= {'channels': args.head_channels, 'aux_channels': args.head_channels // 2}
    changes |= {name: getattr(args, name) for name in ('test', 'loss_mean') if getattr(args, name) is not None}
    return SegmentationSettings(name=args.protocol, used=dataclasses.replace(p, **changes), seed=args.seed)
