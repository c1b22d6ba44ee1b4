"""A second implementation of the detectors, as an oracle: plain loops, written from the protocols, not the package.

Layers are torch.nn.functional on a state dict, RoIs are pooled by torchvision, and all else is float32 NumPy, image by
image and box by box. Every candidate is a sample: the numbers of samples have to be larger than that of candidates.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

C4_SIZES, RATIOS = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)


def fill(module: nn.Module) -> None:
    """Gives each entry of a module values of a formula, whose scale keeps activations, logits and deltas moderate.

    The sine of a square: that of a multiple would make each layer a matrix of rank 2, and candidates alike.
    """
    with torch.no_grad():
        for i, (name, tensor) in enumerate(module.state_dict().items()):
            if not tensor.is_floating_point():
                continue
            steps = torch.arange(tensor.numel(), dtype=torch.float64)
            wave = torch.sin(steps.square() * (1.7 + 0.01 * i) + i).view(tensor.shape)
            if name.endswith('running_var') or (tensor.ndim == 1 and name.endswith('weight')):
                wave = 1 + 0.3 * wave
            elif tensor.ndim == 1:
                wave = 0.1 * wave
            else:
                gain = {'rpn_reg': 0.5, 'fc_reg': 2, 'fc_cls': 4, 'rpn_cls': 4}.get(name.split('.')[-2], 1.6)
                wave = wave * gain / math.sqrt(tensor[0].numel())
            tensor.copy_(wave)


# Boxes --------------------------------------------------------------------------------------------------------------


def cell_anchors(sizes: tuple[float, ...], size_major: bool) -> np.ndarray:
    """(A, 4) of anchors around 0, of the area size squared and the ratio height / width."""
    pairs = [(s, r) for s in sizes for r in RATIOS] if size_major else [(s, r) for r in RATIOS for s in sizes]
    return np.array([
        (-s / math.sqrt(r) / 2, -s * math.sqrt(r) / 2, s / math.sqrt(r) / 2, s * math.sqrt(r) / 2)
        for s, r in pairs], np.float32)


def grid_anchors(cell: np.ndarray, stride: int, height: int, width: int) -> np.ndarray:
    """(height * width * A, 4)."""
    return np.array([
        (box + np.array([x, y, x, y], np.float32) * stride) for y in range(height) for x in range(width)
        for box in cell], np.float32)


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of each box of a (n, 4) with each of b (m, 4), in float32."""
    area_a, area_b = ((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b))
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = np.prod(np.maximum(high - low, np.float32(0)), 2)
    return inter / (area_a[:, None] + area_b[None] - inter)


def assign(boxes: np.ndarray, objects: np.ndarray, low: float, high: float, best: str) -> np.ndarray:
    """For each box the object's number, -1 for the background, or -2; `best` is none, floor or always."""
    result = np.full(len(boxes), -1)
    if not len(objects) or not len(boxes):
        return result
    iou = overlap(objects, boxes)
    for j in range(len(boxes)):
        most = int(iou[:, j].argmax())
        result[j] = most if iou[most, j] >= np.float32(high) else -1 if iou[most, j] < np.float32(low) else -2
    for i in range(len(objects)):
        if best == 'none' or (best == 'floor' and iou[i].max() < np.float32(low)):
            continue
        for j in np.flatnonzero(iou[i] == iou[i].max()):
            result[j] = i if best == 'floor' else int(iou[:, j].argmax())
    return result


def to_deltas(box: np.ndarray, target: np.ndarray, stds: tuple[float, ...]) -> list[float]:
    (x1, y1, x2, y2), (u1, v1, u2, v2) = box.tolist(), target.tolist()
    w, h = x2 - x1, y2 - y1
    raw = [((u1 + u2) - (x1 + x2)) / 2 / w, ((v1 + v2) - (y1 + y2)) / 2 / h, math.log((u2 - u1) / w),
           math.log((v2 - v1) / h)]
    return [r / s for r, s in zip(raw, stds, strict=True)]


def from_deltas(box: np.ndarray, deltas: np.ndarray, stds: tuple[float, ...], size: tuple[int, int],
                clamp_below: bool) -> np.ndarray:
    """One box after its deltas, cut at the image of `size` (height, width); float32 throughout."""
    f, limit = np.float32, np.float32(math.log(1000 / 16))
    (x1, y1, x2, y2), (dx, dy, dw, dh) = box.astype(f), (deltas.astype(f) * np.array(stds, f))
    dw, dh = (max(min(d, limit), -limit) if clamp_below else min(d, limit) for d in (dw, dh))
    cx, cy = (x1 + x2) * f(0.5) + dx * (x2 - x1), (y1 + y2) * f(0.5) + dy * (y2 - y1)
    w, h = (x2 - x1) * np.exp(dw), (y2 - y1) * np.exp(dh)
    out = np.array([cx - w * f(0.5), cy - h * f(0.5), cx + w * f(0.5), cy + h * f(0.5)], f)
    return np.clip(out, 0, np.array([size[1], size[0]] * 2, f))


def suppress(boxes: np.ndarray, scores: np.ndarray, groups: np.ndarray, most: float) -> list[int]:
    """Greedy suppression within groups, of boxes that overlap a better one by more than `most`; by falling score."""
    kept: list[int] = []
    for i in np.argsort(-scores, kind='stable'):
        rivals = [k for k in kept if groups[k] == groups[i]]
        if not rivals or overlap(boxes[[i]], boxes[rivals]).max() <= most:
            kept.append(int(i))
    return kept


# Networks -----------------------------------------------------------------------------------------------------------


class PlainDetector:
    """`variant`, 'mmdet' or 'detectron2'; `proposals`: per map before suppression, per image behind it."""

    def __init__(self, state: dict[str, Tensor], kind: str, variant: str, training: bool,
                 proposals: tuple[int, int], pool_size: int, mask_size: int = 0) -> None:
        self.w, self.kind, self.training, self.proposals = state, kind, training, proposals
        self.pool_size, self.mask_size = pool_size, mask_size or pool_size
        self.theirs = variant == 'detectron2'
        self.divisor, self.pyramid = 1 if self.theirs else 32, kind == 'maskrcnn_fpn'
        self.strides = (4, 8, 16, 32, 64) if self.pyramid else (16,)
        self.classes = len(state['roi_head.bbox_head.fc_cls.weight']) - 1

    # Layers

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.w[f'{name}.weight']
        return F.conv2d(x, weight, self.w.get(f'{name}.bias'), stride, weight.shape[-1] // 2)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f'{name}.weight'], self.w[f'{name}.bias'])

    def norm(self, x: Tensor, name: str) -> Tensor:
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        else:
            mean, var = self.w[f'{name}.running_mean'], self.w[f'{name}.running_var']
        scale = self.w[f'{name}.weight'] / (var + 1e-5).sqrt()
        return (x - mean[:, None, None]) * scale[:, None, None] + self.w[f'{name}.bias'][:, None, None]

    def block(self, x: Tensor, name: str, stride: int) -> Tensor:
        deep = f'{name}.conv3.weight' in self.w
        y = self.norm(self.conv(x, f'{name}.conv1', 1 if deep else stride), f'{name}.bn1').relu()
        y = self.norm(self.conv(y, f'{name}.conv2', stride if deep else 1), f'{name}.bn2')
        if deep:
            y = self.norm(self.conv(y.relu(), f'{name}.conv3'), f'{name}.bn3')
        if f'{name}.downsample.0.weight' in self.w:
            x = self.norm(self.conv(x, f'{name}.downsample.0', stride), f'{name}.downsample.1')
        return (x + y).relu()

    def stage(self, x: Tensor, name: str, stride: int) -> Tensor:
        i = 0
        while f'{name}.{i}.conv1.weight' in self.w:
            x, i = self.block(x, f'{name}.{i}', stride if i == 0 else 1), i + 1
        return x

    def maps(self, images: list[Tensor]) -> list[Tensor]:
        height, width = (max(math.ceil(x.shape[i] / self.divisor) * self.divisor for x in images) for i in (1, 2))
        batch = torch.zeros(len(images), 3, height, width)
        for row, x in zip(batch, images, strict=True):
            row[:, :x.shape[1], :x.shape[2]] = x
        x = F.max_pool2d(self.norm(self.conv(batch, 'backbone.conv1', 2), 'backbone.bn1').relu(), 3, 2, 1)
        found = []
        for i in range(1, 5 if self.pyramid else 4):
            x = self.stage(x, f'backbone.layer{i}', 1 if i == 1 else 2)
            found.append(x)
        return self.neck(found) if self.pyramid else found[-1:]

    def neck(self, maps: list[Tensor]) -> list[Tensor]:
        def layer(x: Tensor, kind: str, i: int) -> Tensor:
            return self.norm(self.conv(x, f'neck.fpn.{kind}.{i}.0'), f'neck.fpn.{kind}.{i}.1')
        laterals = [layer(x, 'inner_blocks', i) for i, x in enumerate(maps)]
        for i in (3, 2, 1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[-2:])
        outputs = [layer(x, 'layer_blocks', i) for i, x in enumerate(laterals)]
        return [*outputs, outputs[-1][:, :, ::2, ::2]]

    def rpn(self, maps: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Logits (B, N) and deltas (B, N, 4) of each map, in the order of `grid_anchors`."""
        found = []
        for x in maps:
            x = self.conv(x, 'rpn_head.rpn_conv').relu()
            logits, deltas = self.conv(x, 'rpn_head.rpn_cls'), self.conv(x, 'rpn_head.rpn_reg')
            b, a, h, w = logits.shape
            found.append((logits.permute(0, 2, 3, 1).reshape(b, -1),
                          deltas.view(b, a, 4, h, w).permute(0, 3, 4, 1, 2).reshape(b, -1, 4)))
        return found

    def anchors(self, maps: list[Tensor]) -> list[np.ndarray]:
        return [
            grid_anchors(cell_anchors((8 * s,) if self.pyramid else C4_SIZES, self.theirs), s, *x.shape[-2:])
            for s, x in zip(self.strides, maps, strict=True)]

    # Losses

    @torch.no_grad()
    def losses(
        self, images: list[Tensor], targets: list[dict[str, Tensor]], divisor: float | None,
    ) -> dict[str, Tensor]:
        """`divisor` of the RPN's losses, for each image; None: mmdet's."""
        maps = self.maps(images)
        outputs = self.rpn(maps)
        sizes = [tuple(x.shape[1:]) for x in images]
        objects = [t['boxes'].numpy() for t in targets]
        found = self.rpn_losses(maps, outputs, sizes, objects, divisor)
        proposals = self.propose(maps, outputs, sizes)
        return found | self.roi_losses(maps, proposals, targets)

    def is_trained(self, anchor: np.ndarray, cell: tuple[int, int], stride: int, size: tuple[int, int]) -> bool:
        if self.theirs:
            return True
        if any(c >= math.ceil(math.ceil(n / 32) * 32 / stride) for c, n in zip(cell, size, strict=True)):
            return False
        x1, y1, x2, y2 = anchor
        return self.pyramid or bool(x1 >= 0 and y1 >= 0 and x2 < size[1] and y2 < size[0])

    def rpn_losses(self, maps, outputs, sizes, objects, divisor) -> dict[str, Tensor]:
        anchors, count = self.anchors(maps), 0.0
        cls, box = torch.zeros(()), torch.zeros(())
        for b, (size, own) in enumerate(zip(sizes, objects, strict=True)):
            places = [
                (level, j) for level, (x, a) in enumerate(zip(maps, anchors, strict=True)) for j in range(len(a))
                if self.is_trained(a[j], divmod(j // (len(a) // x.shape[2] // x.shape[3]), x.shape[3]),
                                   self.strides[level], size)]
            assigned = assign(np.array([anchors[level][j] for level, j in places], np.float32).reshape(-1, 4), own, 0.3,
                              0.7, 'always' if self.theirs else 'floor')
            for (level, j), number in zip(places, assigned, strict=True):
                logit, delta = outputs[level][0][b, j], outputs[level][1][b, j]
                if number >= 0:
                    cls = cls + F.softplus(-logit)
                    goal = to_deltas(anchors[level][j], own[number], (1, 1, 1, 1))
                    box = box + (delta - torch.tensor(goal)).abs().sum()
                elif number == -1:
                    cls = cls + F.softplus(logit)
            positive, negative = int((assigned >= 0).sum()), int((assigned == -1).sum())
            count += max(positive, 1) + max(negative, 1) if divisor is None else divisor
        return {'loss_rpn_cls': cls / count, 'loss_rpn_bbox': box / count}

    def propose(self, maps, outputs, sizes) -> list[np.ndarray]:
        anchors, result = self.anchors(maps), []
        for b, size in enumerate(sizes):
            boxes, scores, levels = [], [], []
            for level, (a, (logits, deltas)) in enumerate(zip(anchors, outputs, strict=True)):
                score = (logits if self.theirs else logits.sigmoid())[b].numpy()
                for j in np.argsort(-score, kind='stable')[:self.proposals[0]]:
                    box = from_deltas(a[j], deltas[b, j].numpy(), (1, 1, 1, 1), size, not self.theirs)
                    if box[2] > box[0] and box[3] > box[1]:
                        boxes.append(box)
                        scores.append(score[j])
                        levels.append(level)
            boxes = np.array(boxes, np.float32).reshape(-1, 4)
            result.append(boxes[suppress(boxes, np.array(scores), np.array(levels), 0.7)[:self.proposals[1]]])
        return result

    def pool(self, maps: list[Tensor], rois: list[tuple[int, np.ndarray]], size: int) -> Tensor:
        """(n, C, size, size) of RoIs (image, box)."""
        found = []
        for image, box in rois:
            level = 0
            if self.pyramid:
                area = float((box[2] - box[0]) * (box[3] - box[1]))
                level = min(max(math.floor(math.log2(math.sqrt(area) / 56 + 1e-6)), 0), 3)
            row = torch.tensor([[image, *box.tolist()]])
            found.append(roi_align(maps[level], row, size, 1 / self.strides[level], sampling_ratio=0, aligned=True))
        return torch.cat(found)

    def share(self, x: Tensor) -> Tensor:
        if self.pyramid:
            return x
        return self.norm(self.stage(x, 'roi_head.shared_head.layer4', 2), 'roi_head.shared_head.norm')

    def box_head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, C + 1) and deltas (n, C, 4) of shared features."""
        name = 'roi_head.bbox_head'
        if self.pyramid:
            for i in range(4):
                x = self.norm(self.conv(x, f'{name}.shared.{i}.0'), f'{name}.shared.{i}.1').relu()
            x = self.linear(x.reshape(len(x), -1), f'{name}.shared.5').relu()
        else:
            x = F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0]
        logits, deltas = self.linear(x, f'{name}.fc_cls'), self.linear(x, f'{name}.fc_reg')
        return logits, deltas.view(len(x), self.classes, 4)

    def mask_head(self, x: Tensor) -> Tensor:
        name = 'roi_head.mask_head'
        for i in range(4 if self.pyramid else 0):
            x = self.norm(self.conv(x, f'{name}.convs.{i}.0'), f'{name}.convs.{i}.1').relu()
        x = F.conv_transpose2d(
            x, self.w[f'{name}.predictor.conv5_mask.weight'], self.w[f'{name}.predictor.conv5_mask.bias'], 2).relu()
        return self.conv(x, f'{name}.predictor.mask_fcn_logits')

    def roi_losses(self, maps, proposals, targets) -> dict[str, Tensor]:
        rois, labels, goals, places = [], [], [], []
        for b, (boxes, target) in enumerate(zip(proposals, targets, strict=True)):
            own, kind = target['boxes'].numpy(), 'floor' if self.pyramid else 'none'
            numbers = [*range(len(own)), *assign(boxes, own, 0.5, 0.5, kind)]
            every = [*own, *boxes]
            if self.theirs:
                every, numbers = [*boxes, *own], assign(np.concatenate([boxes, own]), own, 0.5, 0.5, kind)
            for j in sorted(range(len(every)), key=lambda j: numbers[j] < 0):
                number = numbers[j]
                rois.append((b, every[j]))
                labels.append(int(target['labels'][number]) if number >= 0 else self.classes)
                if number >= 0:
                    goals.append(own[number])
                    places.append(number)
        features = self.share(self.pool(maps, rois, self.pool_size))
        logits, deltas = self.box_head(features)
        cls = sum(torch.logsumexp(x, 0) - x[label] for x, label in zip(logits, labels, strict=True))
        positive = [j for j, label in enumerate(labels) if label < self.classes]
        box = sum(
            ((deltas[j, labels[j]] - torch.tensor(to_deltas(rois[j][1], goal, (0.1, 0.1, 0.2, 0.2)))).abs().sum()
             for j, goal in zip(positive, goals, strict=True)), torch.zeros(()))
        found = {'loss_cls': cls / len(rois), 'loss_bbox': box / len(rois)}
        if self.kind != 'fasterrcnn_c4':
            found['loss_mask'] = self.mask_loss(
                maps, [rois[j] for j in positive], features[positive], [labels[j] for j in positive], places, targets)
        return found

    def mask_loss(self, maps, rois, shared, labels, places, targets) -> Tensor:
        if not rois:
            return torch.zeros(())
        logits = self.mask_head(self.pool(maps, rois, self.mask_size) if self.pyramid else shared)
        means = []
        for (b, box), x, label, number in zip(rois, logits, labels, places, strict=True):
            mask = targets[b]['masks'][number]
            padded = F.pad(mask, (0, -mask.shape[1] % 32, 0, -mask.shape[0] % 32))
            row = torch.tensor([[0, *box.tolist()]])
            goal = roi_align(padded[None, None].float(), row, x.shape[-1], sampling_ratio=0, aligned=True)[0, 0] >= 0.5
            means.append((F.softplus(x[label]) - x[label] * goal).mean())
        return torch.stack(means).mean()

    # Detections

    @torch.no_grad()
    def detect(self, image: Tensor, original: tuple[int, int]) -> dict[str, np.ndarray]:
        """boxes in pixels of the original of this size, scores, labels, and masks' probabilities."""
        maps, size = self.maps([image]), tuple(image.shape[1:])
        proposals = self.propose(maps, self.rpn(maps), [size])[0]
        logits, deltas = self.box_head(self.share(self.pool(maps, [(0, p) for p in proposals], self.pool_size)))
        probabilities = logits.softmax(1).numpy()
        y, x = size[0] / original[0], size[1] / original[1]
        scale, rows = np.array([x, y, x, y], np.float32), []
        for i, c in np.ndindex(len(proposals), self.classes):
            if probabilities[i, c] > 0.05:
                box = from_deltas(proposals[i], deltas[i, c].numpy(), (0.1, 0.1, 0.2, 0.2), size, not self.theirs)
                rows.append((box, probabilities[i, c], c))
        boxes, scores, labels = (np.array([r[k] for r in rows], t) for k, t in enumerate((np.float32, np.float32, int)))
        kept = suppress(boxes if self.theirs else boxes / scale, scores, labels, 0.5)[:100]
        found = {'boxes': boxes[kept] / scale, 'scores': scores[kept], 'labels': labels[kept]}
        if self.kind != 'fasterrcnn_c4':
            rois = [(0, box * scale) for box in found['boxes']]
            masks = self.mask_head(self.share(self.pool(maps, rois, self.mask_size))).sigmoid()
            found['masks'] = masks[range(len(rois)), found['labels']].numpy()
        return found
