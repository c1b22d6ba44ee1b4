"""Every number of a detection run: the protocol's, and what flags change."""
import argparse
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ...runtime.messages import check_flags
from ..protocols import DETECTION, DETECTORS, DetectionProtocol, DetectorNumbers
from ..transfer import Schedule
from .data import Preparation
from .model import resolve_numbers

SMALLEST = 32  # pixels of a short side; also mmdet's limit for training images
ELSEWHERE = {'eval_every', 'log_every', 'variant'}  # fields that do not change what is learned, or stand for themselves


@dataclass(frozen=True, kw_only=True)
class DetectionSettings:
    """The numbers in use. `changed` names those that are not the protocol's, with both values."""

    protocol: DetectionProtocol
    numbers: DetectorNumbers
    short_sides: tuple[int, ...]
    test_side: int
    long_side: int
    flip_p: float
    seed: int

    def describe_changes(self, schedule: Schedule, epoch: int) -> dict[str, dict[str, Any]]:
        """Returns each number that is not the protocol's: used, published.

        `epoch` is the iterations of an epoch with the protocol's batch size.
        """
        used = {**_flatten(schedule), **_flatten(self.numbers), **self.list_images()}
        published = DetectionSettings(
            protocol=self.protocol, seed=0, **_take_images(self.protocol),
            numbers=dataclasses.replace(DETECTORS[self.protocol.detector], variant=self.numbers.variant))
        rules = {
            **_flatten(make_schedule(published, None, epoch)),
            **_flatten(published.numbers), **published.list_images()}
        return {k: {'used': used[k], 'published': rules[k]} for k in used if k not in ELSEWHERE and used[k] != rules[k]}

    def prepare(self, training: bool) -> Preparation:
        """Returns how images are resized and flipped."""
        sides, flip = (self.short_sides, self.flip_p) if training else ((self.test_side,), 0.0)
        masks = training and self.protocol.detector != 'fasterrcnn_c4'
        return Preparation(sides, self.long_side, flip, self.numbers.variant, masks)

    def list_images(self) -> dict[str, Any]:
        """Returns the numbers of the images' sizes and flips."""
        return {k: getattr(self, k) for k in ('short_sides', 'test_side', 'long_side', 'flip_p')}


def resolve(args: argparse.Namespace) -> DetectionSettings:
    """Returns the numbers that the flags ask for, or raises ValueError for a wrong flag."""
    protocol = DETECTION[args.protocol]
    size, least = args.image_size, SMALLEST
    check_flags(
        (f'--{name.replace("_", "-")}', value, value >= low, f'at least {low}')
        for name, low in (('iterations', 1), ('batch_size', 1), ('image_size', least), ('rois', 1), ('pool_size', 2),
                          ('proposals', 1), ('eval_every', 1), ('workers', 0), ('seed', 0))
        if (value := getattr(args, name)) is not None)
    check_flags([
        ('--lr', args.lr, args.lr is None or 0 < args.lr < math.inf, 'above 0 and finite'),
        ('--checkpoint-minutes', args.checkpoint_minutes, args.checkpoint_minutes >= 0, 'at least 0')])
    changes: dict[str, Any] = {'variant': args.variant}
    if args.rois is not None:
        changes['rois'] = args.rois
    if args.pool_size is not None:
        changes['pool_size'] = args.pool_size
        if DETECTORS[protocol.detector].mask_size:
            changes['mask_size'] = 2 * args.pool_size
    if args.proposals is not None:
        published = DETECTORS[protocol.detector]
        changes['train_proposals'] = published.train_proposals[0], args.proposals
        changes['test_proposals'] = published.test_proposals[0], args.proposals
    images = _take_images(protocol)
    if size is not None:
        images |= {
            'short_sides': (size,), 'test_side': size,
            'long_side': round(size * protocol.long_side / protocol.test_side)}
    return DetectionSettings(
        protocol=protocol, numbers=resolve_numbers(protocol.detector, changes), seed=args.seed, **images)


def make_schedule(s: DetectionSettings, args: argparse.Namespace | None, epoch: int) -> Schedule:
    """Returns the schedule; `epoch` is the iterations of one. Without `args`, it is the protocol's own.

    With another batch size, the rate is in proportion to it, and the iterations are in inverse proportion, so that the
    images that train remain the same. With --iterations, the steps of the rate keep their places. The warm-up is at
    most a tenth of the iterations.
    """
    p = s.protocol
    given = {k: getattr(args, k, None) for k in ('iterations', 'batch_size', 'lr', 'eval_every')}
    batch = given['batch_size'] or p.batch_size
    factor = p.batch_size / batch
    unit = epoch if p.epochs else factor  # of iterations, steps and evaluations
    whole = (p.epochs or p.iterations or 0) * unit
    iterations = given['iterations'] or round(whole)
    shrink = iterations / whole
    every = given['eval_every'] or min(iterations, max(1, round(p.eval_every * unit)))
    return Schedule(
        iterations=iterations, batch_size=batch, lr=p.lr / factor if given['lr'] is None else given['lr'],
        momentum=p.momentum, weight_decay=p.weight_decay, decay_norms=s.numbers.rules.decay_norms,
        warmup=min(round(p.warmup * factor), iterations // 10), warmup_ratio=p.warmup_ratio,
        lr_steps=tuple(round(at * unit * shrink) for at in p.lr_steps), lr_gamma=p.lr_gamma, eval_every=every)


def _take_images(p: DetectionProtocol) -> dict[str, Any]:
    return {k: getattr(p, k) for k in ('short_sides', 'test_side', 'long_side', 'flip_p')}


def _flatten(values: Schedule | DetectorNumbers) -> dict[str, Any]:
    return dataclasses.asdict(values)
