"""The heads on regions of interest: samples, losses, detections, masks; by mmdet 2.25 or detectron2."""
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, roi_align

from ..protocols import DetectorNumbers
from . import boxes
from .heads import BoxHead, Layer4, MaskHead
from .masks import mask_targets
from .rpn import Draw

FINEST = 56  # pixels: RoIs with sides below twice that are pooled from the finest map of a pyramid


class SampledRoIs(NamedTuple):
    """The sampled RoIs of one image, the positives first."""

    rois: Tensor  # (n, 4)
    labels: Tensor  # (n,), of the background the number of classes
    objects: Tensor  # (p,): the object of each positive


class Found(NamedTuple):
    """The detections in one image, by falling score."""

    boxes: Tensor  # (n, 4), in the original image's pixels
    scores: Tensor  # (n,)
    labels: Tensor  # (n,)
    masks: Tensor | None  # (n, S, S), probabilities within the boxes


class RoIHead(nn.Module):
    """Pools RoIs from the maps, and classifies, regresses and segments them.

    Args:
        shared_head: what the RoIs pass before both heads, in C4 detectors.
    """

    def __init__(
        self, numbers: DetectorNumbers, bbox_head: BoxHead, mask_head: MaskHead | None, shared_head: Layer4 | None,
    ) -> None:
        super().__init__()
        if shared_head is not None:
            self.shared_head = shared_head
        self.bbox_head = bbox_head
        if mask_head is not None:
            self.mask_head = mask_head
        self.numbers, self.has_masks, self.is_shared = numbers, mask_head is not None, shared_head is not None

    @property
    def classes(self) -> int:
        return self.bbox_head.fc_cls.out_features - 1

    def pool(self, maps: Sequence[Tensor], rois: Sequence[Tensor], size: int) -> Tensor:
        """Returns the features (n, C, S, S) of RoIs (n, 4) of each image, n over all images."""
        strides = self.numbers.strides[:len(maps)]
        table = torch.cat([torch.cat([r.new_full((len(r), 1), i), r], 1) for i, r in enumerate(rois)])  # (n, 5)
        if len(maps) == 1:
            cells: Tensor = roi_align(maps[0], table, size, 1 / strides[0], sampling_ratio=0, aligned=True)
            return cells
        side = (table[:, 3:] - table[:, 1:3]).prod(1).sqrt()
        level = (side / FINEST + 1e-6).log2().floor().clamp(0, len(maps) - 1)
        features = [(level == i).nonzero().squeeze(1) for i in range(len(maps))]
        parts = [
            roi_align(x, table[rows], size, 1 / stride, sampling_ratio=0, aligned=True)
            for x, rows, stride in zip(maps, features, strides, strict=True)]
        return torch.cat(parts)[torch.cat(features).argsort()]

    def sample(self, proposals: Tensor, objects: Tensor, labels: Tensor, rng: torch.Generator) -> SampledRoIs:
        """Draws RoIs from an image's proposals (n, 4) and its objects (m, 4), which are RoIs too."""
        n, m = self.numbers, len(objects)
        if n.rules.objects_first:
            own = torch.arange(m, device=objects.device)
            candidates = torch.cat([objects, proposals])
            matched = torch.cat([own, boxes.match(proposals, objects, n.roi_iou, n.roi_iou, n.best_rois)])
        else:
            candidates = torch.cat([proposals, objects])
            matched = boxes.match(candidates, objects, n.roi_iou, n.roi_iou, n.best_rois)
        positive, negative = boxes.sample(matched, n.rois, n.roi_share, rng)
        rois, number = candidates[torch.cat([positive, negative])], matched[positive]
        background = labels.new_full((len(negative),), self.classes)
        return SampledRoIs(rois, torch.cat([labels[number], background]), number)

    def compute_losses(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], objects: Sequence[Tensor],
        labels: Sequence[Tensor], masks: Sequence[Tensor] | None, draw: Draw,
    ) -> dict[str, Tensor]:
        """Returns loss_cls and loss_bbox, and loss_mask of a detector with masks.

        The lists have an entry for each image: proposals (n, 4), objects (m, 4), labels (m,), masks (m, H, W).
        """
        taken = [self.sample(*parts) for parts in zip(proposals, objects, labels, draw.generators, strict=True)]
        count = draw.mean_count(sum(len(s.rois) for s in taken))
        if not count:  # no proposal and no object, on any process
            zero = _zero_of(self)
            return dict.fromkeys(('loss_cls', 'loss_bbox', *(['loss_mask'] if self.has_masks else [])), zero)
        features = self._share(self.pool(maps, [s.rois for s in taken], self.numbers.pool_size))
        logits, deltas = self.bbox_head(features)
        targets = torch.cat([s.labels for s in taken])
        positive = (targets < self.classes).nonzero().squeeze(1)
        encoded = torch.cat([
            boxes.encode(s.rois[:len(s.objects)], own[s.objects], self.numbers.box_stds)
            for s, own in zip(taken, objects, strict=True)])
        own_deltas = deltas[positive, targets[positive]]
        losses = {
            'loss_cls': F.cross_entropy(logits, targets, reduction='sum') / count,
            'loss_bbox': F.l1_loss(own_deltas, encoded, reduction='sum') / count}
        if self.has_masks:
            losses['loss_mask'] = self._compute_mask_loss(maps, taken, masks or (), features[positive], draw)
        return losses

    def _compute_mask_loss(
        self, maps: Sequence[Tensor], taken: list[SampledRoIs], masks: Sequence[Tensor], shared: Tensor, draw: Draw,
    ) -> Tensor:
        """Returns the mean binary cross-entropy over the positives' pixels; `shared`: their features in C4."""
        count = draw.mean_count(len(shared))
        if not count:  # on no process
            return _zero_of(self.mask_head)
        rois = [s.rois[:len(s.objects)] for s in taken]
        features = shared if self.is_shared else self.pool(maps, rois, self.numbers.mask_size)
        logits = self.mask_head(features)
        labels = torch.cat([s.labels[:len(s.objects)] for s in taken])
        size = logits.shape[-1]
        target = torch.cat([
            mask_targets(m, r, size, s.objects, self.numbers.rules.divisor)
            for m, s, r in zip(masks, taken, rois, strict=True)])
        own = logits[torch.arange(len(labels), device=labels.device), labels]
        loss: Tensor = F.binary_cross_entropy_with_logits(own, target.to(own), reduction='sum') / (count * size * size)
        return loss

    def _share(self, features: Tensor) -> Tensor:
        return self.shared_head(features) if self.is_shared else features

    @torch.no_grad()
    def detect(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]],
        originals: Sequence[tuple[int, int]],
    ) -> list[Found]:
        """Returns the detections in each image. `sizes`, height and width as the network sees it; `originals`."""
        logits, deltas = self.bbox_head(self._share(self.pool(maps, proposals, self.numbers.pool_size)))
        counts, results = [len(p) for p in proposals], []
        scales = [_find_scale(*pair, logits) for pair in zip(sizes, originals, strict=True)]
        for p, score, delta, size, original, scale in zip(
                proposals, logits.softmax(1).split(counts), deltas.split(counts), sizes, originals, scales,
                strict=True):
            decoded = boxes.decode(p, delta, self.numbers.box_stds, size, self.numbers.rules.clamp_below)
            results.append(self._choose(decoded, score[:, :-1], scale, original))
        if self.has_masks:
            rois = [found.boxes * scale for found, scale in zip(results, scales, strict=True)]
            results = self._segment(maps, rois, results)
        return results

    def _choose(self, decoded: Tensor, scores: Tensor, scale: Tensor, original: tuple[int, int]) -> Found:
        """Returns the best detections; boxes (n, C, 4) in the network's pixels, scores (n, C)."""
        n = self.numbers
        roi, label = (scores > n.score).nonzero().unbind(1)
        chosen, score, final = decoded[roi, label], scores[roi, label], decoded[roi, label] / scale
        kept = batched_nms(final if n.rules.rescale_first else chosen, score, label, n.nms)[:n.detections]
        final, score, label = final[kept], score[kept], label[kept]
        if not n.rules.rescale_first:
            final = boxes.clip(final, original)
            whole = (final[:, 2:] > final[:, :2]).all(1)
            final, score, label = final[whole], score[whole], label[whole]
        return Found(final, score, label, None)

    def _segment(self, maps: Sequence[Tensor], rois: list[Tensor], found: list[Found]) -> list[Found]:
        counts = [len(r) for r in rois]
        if not sum(counts):
            side = 2 * (self.numbers.mask_size or -(-self.numbers.pool_size // 2))
            return [f._replace(masks=f.scores.new_zeros(0, side, side)) for f in found]
        features = self._share(self.pool(maps, rois, self.numbers.mask_size or self.numbers.pool_size))
        logits = self.mask_head(features)
        labels = torch.cat([f.labels for f in found])
        own = logits[torch.arange(len(labels), device=labels.device), labels].sigmoid()
        return [f._replace(masks=m) for f, m in zip(found, own.split(counts), strict=True)]


def _zero_of(module: nn.Module) -> Tensor:
    """Returns 0 with a gradient of 0 for each parameter, which several processes wait for."""
    return cast(Tensor, sum(0 * p.sum() for p in module.parameters()))


def _find_scale(size: tuple[int, int], original: tuple[int, int], like: Tensor) -> Tensor:
    """Returns by what the x and y of original boxes are multiplied, (4,)."""
    y, x = (new / old for new, old in zip(size, original, strict=True))
    return like.new_tensor([x, y, x, y])
