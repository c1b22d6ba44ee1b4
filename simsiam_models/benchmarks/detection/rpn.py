"""The region proposal network: its losses and its proposals, by mmdet 2.25 or detectron2 (`protocols.VARIANTS`)."""
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from ...runtime.precision import widen
from ..protocols import DetectorNumbers
from . import boxes

RPN_STDS = (1.0, 1.0, 1.0, 1.0)


class RPN(nn.Module):
    """Proposes boxes from the maps of a backbone.

    Args:
        channels: of the maps.
    """

    def __init__(self, channels: int, numbers: DetectorNumbers) -> None:
        super().__init__()
        self.numbers, anchors = numbers, len(numbers.scales) * len(numbers.ratios)  # in each cell
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, anchors, 1)
        self.rpn_reg = nn.Conv2d(channels, 4 * anchors, 1)
        for conv in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(cast(Tensor, conv.bias))

    def forward(self, maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Maps (B, C, h, w) to logits (B, h * w * A) and deltas (B, h * w * A, 4), for each map."""
        return [self._forward_map(x) for x in maps]

    def _forward_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.rpn_conv(x).relu()
        logits, deltas = (widen(y.permute(0, 2, 3, 1)) for y in (self.rpn_cls(x), self.rpn_reg(x)))
        return logits.reshape(len(x), -1), deltas.reshape(len(x), -1, 4)

    def make_anchors(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Returns the anchors of each map, (h * w * A, 4)."""
        n = self.numbers
        return [
            boxes.make_anchors(
                boxes.make_base_anchors(stride, n.scales, n.ratios, n.rules.size_major).to(x),
                stride, *x.shape[-2:])
            for stride, x in zip(n.strides, maps, strict=True)]

    def find_trained(self, anchors: Sequence[Tensor], maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Returns which anchors of all maps may be trained on an image of `size`, (N,)."""
        n = self.numbers
        if not n.rules.inside:
            return torch.ones(sum(map(len, anchors)), dtype=torch.bool, device=maps[0].device)
        trained = torch.cat([
            boxes.find_valid_cells(size, n.rules.divisor, stride, *x.shape[-2:]).view(-1, 1).expand(
                -1, len(a) // (x.shape[-2] * x.shape[-1])).reshape(-1)
            for stride, x, a in zip(n.strides, maps, anchors, strict=True)]).to(maps[0].device)
        return trained & boxes.lie_inside(torch.cat(list(anchors)), size) if n.inside else trained

    def compute_losses(
        self, outputs: list[tuple[Tensor, Tensor]], maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]],
        objects: Sequence[Tensor], draw: 'Draw',
    ) -> dict[str, Tensor]:
        """Returns loss_rpn_cls and loss_rpn_bbox.

        Args:
            outputs: of `forward` on `maps`.
            sizes: height and width of each image without padding.
            objects: their boxes, (m, 4).
        """
        n, anchors = self.numbers, self.make_anchors(maps)
        every = torch.cat(anchors)
        logits, deltas = (torch.cat(parts, 1) for parts in zip(*outputs, strict=True))
        cls, box, count = logits.new_zeros(()), logits.new_zeros(()), 0
        for i, (size, own) in enumerate(zip(sizes, objects, strict=True)):
            trained = self.find_trained(anchors, maps, size).nonzero().squeeze(1)
            matched = boxes.match(every[trained], own, *n.rpn_iou, n.rules.best_anchors)
            positive, negative = boxes.sample(matched, n.rpn_samples, n.rpn_share, draw.generators[i])
            count += max(len(positive), 1) + max(len(negative), 1)
            chosen = trained[positive]
            cls = cls + _bce(logits[i, chosen], 1.0) + _bce(logits[i, trained[negative]], 0.0)
            if len(positive):
                target = boxes.encode(every[chosen], own[matched[positive]], RPN_STDS)
                box = box + F.l1_loss(deltas[i, chosen], target, reduction='sum')
        # Without a sample, the head has no gradient, which several processes wait for.
        box, cls = box + 0 * deltas.sum(), cls + 0 * logits.sum()
        if not n.rules.divide_by_drawn:
            count = n.rpn_samples * len(sizes)
        mean = draw.mean_count(count)
        return {'loss_rpn_cls': cls / mean, 'loss_rpn_bbox': box / mean}

    @torch.no_grad()
    def propose(
        self, outputs: list[tuple[Tensor, Tensor]], maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Returns the proposals of each image, (n, 4), by falling score."""
        anchors = self.make_anchors(maps)
        return [
            self._propose_one([(logits[i], deltas[i]) for logits, deltas in outputs], anchors, size)
            for i, size in enumerate(sizes)]

    def _propose_one(
        self, outputs: list[tuple[Tensor, Tensor]], anchors: list[Tensor], size: tuple[int, int],
    ) -> Tensor:
        n = self.numbers
        per_map, per_image = n.train_proposals if self.training else n.test_proposals
        decoded, ranked, levels = [], [], []
        for level, ((logits, deltas), at) in enumerate(zip(outputs, anchors, strict=True)):
            score = logits if n.rules.rank_logits else logits.sigmoid()
            if len(score) > per_map:
                score, kept = score.sort(descending=True, stable=True)
                score, kept = score[:per_map], kept[:per_map]
                deltas, at = deltas[kept], at[kept]
            decoded.append(boxes.decode(at, deltas.unsqueeze(1), RPN_STDS, size, n.rules.clamp_below).squeeze(1))
            ranked.append(score)
            levels.append(torch.full_like(score, level, dtype=torch.long))
        found, scores, numbers = torch.cat(decoded), torch.cat(ranked), torch.cat(levels)
        width, height = (found[:, 2:] - found[:, :2]).unbind(1)
        whole = (width > 0) & (height > 0)
        found, scores, numbers = found[whole], scores[whole], numbers[whole]
        best: Tensor = found[batched_nms(found, scores, numbers, n.rpn_nms)[:per_image]]
        return best


class Draw:
    """What makes the draws of a step a function of its keys, and its sums those of all processes.

    Args:
        keys: the seed of each image's samples.
        mean_count: averages a count over the processes. Gradients are averaged too, so a sum over one process's samples
            divided by it is that process's part of the loss over all samples.
    """

    def __init__(self, keys: Sequence[int], mean_count: Callable[[float], float | Tensor] = float) -> None:
        self.generators = [torch.Generator().manual_seed(key) for key in keys]
        self.mean_count = mean_count


def _bce(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target), reduction='sum')
