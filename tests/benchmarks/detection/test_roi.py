"""The heads on regions of interest: pooling, samples, losses, detections."""
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_detector import assign, to_deltas
from torch import nn
from torchvision.ops.poolers import LevelMapper

from simsiam_models.benchmarks.detection.heads import BoxHead, MaskHead
from simsiam_models.benchmarks.detection.roi import RoIHead
from simsiam_models.benchmarks.detection.rpn import Draw
from simsiam_models.benchmarks.protocols import DETECTORS

C4, PYRAMID = 'fasterrcnn_c4', 'maskrcnn_fpn'
VARIANTS = ['mmdet', 'detectron2']
STDS = (0.1, 0.1, 0.2, 0.2)
CLASSES = 3


def head_of(kind: str = C4, channels: int = 2, masks: bool = False, **changes) -> RoIHead:
    """A head whose linear layers are 0. Nothing is shared: it sees the pooled features themselves."""
    box_head = BoxHead(channels, CLASSES)
    mask_head = MaskHead(channels, CLASSES, 0) if masks else None
    for layer in (box_head.fc_cls, box_head.fc_reg, *([mask_head.predictor.mask_fcn_logits] if masks else [])):
        nn.init.zeros_(layer.weight)
    shared = nn.Identity() if kind == C4 else None
    return RoIHead(dataclasses.replace(DETECTORS[kind], **changes), box_head, mask_head, shared)


def boxes_of(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).view(-1, 4)


def random_boxes(n: int, seed: int, side: float = 60) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    low, extent = rng.uniform(0, side, (n, 2)), rng.uniform(1, side, (n, 2))
    return torch.tensor(np.concatenate([low, low + extent], 1), dtype=torch.float32)


def draws(*keys: int) -> Draw:
    return Draw(keys)


def generator(key: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(key)


# Pooling


def pool_slowly(x: np.ndarray, box: np.ndarray, size: int, stride: int) -> np.ndarray:
    """The aligned mean of bilinear samples, as many in each cell as it has pixels."""
    x1, y1, x2, y2 = box / stride - 0.5
    cell_w, cell_h = (x2 - x1) / size, (y2 - y1) / size
    grid_w, grid_h = math.ceil(cell_w), math.ceil(cell_h)
    found = np.zeros((len(x), size, size))
    for i, j, gi, gj in np.ndindex(size, size, grid_h, grid_w):
        y, u = y1 + cell_h * (i + (gi + 0.5) / grid_h), x1 + cell_w * (j + (gj + 0.5) / grid_w)
        found[:, i, j] += interpolate(x, y, u) / (grid_h * grid_w)
    return found


def interpolate(x: np.ndarray, v: float, u: float) -> np.ndarray:
    height, width = x.shape[1:]
    if not (-1 <= v <= height and -1 <= u <= width):
        return np.zeros(len(x))
    v, u = min(max(v, 0), height - 1), min(max(u, 0), width - 1)
    a, b = int(v), int(u)
    c, d = min(a + 1, height - 1), min(b + 1, width - 1)
    return ((x[:, a, b] * (1 - v + a) + x[:, c, b] * (v - a)) * (1 - u + b)
            + (x[:, a, d] * (1 - v + a) + x[:, c, d] * (v - a)) * (u - b))


@pytest.mark.parametrize('variant', VARIANTS)
def test_rois_are_pooled_aligned_with_as_many_samples_as_pixels(variant):
    x = torch.randn(2, 3, 9, 11, generator=generator())
    rois = [boxes_of((3, 5, 150, 130), (0, 0, 176, 144), (160, 130, 176, 144)), boxes_of((20.5, 31, 29, 60))]
    found = head_of(variant=variant).pool([x], rois, 4)
    expected = [
        pool_slowly(x[i].numpy(), box.numpy().astype(np.float64), 4, 16) for i, r in enumerate(rois) for box in r]
    np.testing.assert_allclose(found.numpy(), np.stack(expected), rtol=1e-4, atol=1e-5)


def levels_of(rois: torch.Tensor) -> list[int]:
    maps = [torch.full((1, 1, 1024 // s, 1024 // s), float(i)) for i, s in enumerate((4, 8, 16, 32))]
    return head_of(PYRAMID).pool(maps, [rois], 7)[:, 0, 3, 3].long().tolist()


def test_a_roi_is_pooled_from_the_map_of_its_size():
    sides = {1: 0, 56: 0, 111.9: 0, 112: 1, 223.9: 1, 224: 2, 447.9: 2, 448: 3, 896: 3, 1000: 3}
    rois = boxes_of(*((0, 0, s, s) for s in sides))
    assert dict(zip(sides, levels_of(rois), strict=True)) == sides
    assert levels_of(boxes_of((0, 0, 28, 448), (0, 0, 896, 14))) == [1, 1]  # the root of the area counts


def test_levels_equal_torchvisions():
    rois = random_boxes(300, 0, 600)
    rois = rois[(rois < 1024).all(1)]
    assert levels_of(rois) == LevelMapper(2, 5)([rois]).tolist()


def test_features_have_the_order_of_the_rois_whatever_their_maps():
    maps = [torch.randn(2, 3, 512 // s, 512 // s, generator=generator(s)) for s in (4, 8, 16, 32)]
    rois = [boxes_of((0, 0, 500, 500), (3, 4, 20, 30), (10, 10, 140, 150)), boxes_of((5, 5, 300, 310), (7, 7, 9, 30))]
    found = head_of(PYRAMID).pool(maps, rois, 3)
    expected = [
        pool_slowly(maps[level][i].numpy(), rois[i][j].numpy().astype(np.float64), 3, 4 * 2**level)
        for i, j, level in ((0, 0, 3), (0, 1, 0), (0, 2, 1), (1, 0, 2), (1, 1, 0))]
    np.testing.assert_allclose(found.numpy(), np.stack(expected), rtol=1e-3, atol=1e-4)


# Samples


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_quarter_of_512_rois_is_positive_and_the_objects_are_rois(variant):
    objects, labels = boxes_of((10, 10, 50, 50), (70, 20, 90, 60)), torch.tensor([2, 0])
    near = objects[torch.arange(300) % 2] + torch.rand(300, 4, generator=generator())
    far = random_boxes(1700, 1) + 200
    found = head_of(variant=variant).sample(torch.cat([near, far]), objects, labels, generator())
    assert len(found.rois) == 512 and len(found.objects) == 128
    assert found.labels[:128].tolist() == [[2, 0][i] for i in found.objects.tolist()]
    assert (found.labels[128:] == CLASSES).all() and (found.rois[128:] >= 200).all()
    head = head_of(variant=variant, rois=4000, roi_share=0.5)
    every = head.sample(torch.cat([near, far]), objects, labels, generator())
    own = [every.rois.tolist().index(box) for box in objects.tolist()]
    assert own == ([0, 1] if variant == 'mmdet' else [300, 301])
    assert every.objects[own].tolist() == [0, 1]


@pytest.mark.parametrize('variant', VARIANTS)
def test_objects_train_without_a_single_proposal(variant):
    objects = boxes_of((10, 10, 50, 50))
    found = head_of(variant=variant).sample(boxes_of(), objects, torch.tensor([1]), generator())
    assert found.rois.tolist() == objects.tolist() and found.labels.tolist() == [1]


def test_an_image_without_objects_gives_background_only():
    found = head_of(rois=10).sample(random_boxes(30, 0), boxes_of(), torch.zeros(0, dtype=torch.long), generator())
    assert found.labels.tolist() == [CLASSES] * 10 and len(found.objects) == 0


def test_a_roi_is_positive_from_an_iou_of_one_half_on():
    proposals = boxes_of((0, 0, 10, 5), (0, 0, 10, 4.99))
    found = head_of().sample(proposals, boxes_of((0, 0, 10, 10)), torch.tensor([0]), generator())
    assert found.labels.tolist() == [0, 0, CLASSES]


@pytest.mark.parametrize(('kind', 'object_of_roi'), [(C4, 0), (PYRAMID, 1)])
def test_in_the_pyramid_only_an_object_takes_its_best_roi_from_a_better_one(kind, object_of_roi):
    objects, proposals = boxes_of((0, 0, 10, 9), (0, 0, 10, 6)), boxes_of((0, 0, 10, 10))  # IoU .9 and .6
    found = head_of(kind).sample(proposals, objects, torch.tensor([0, 1]), generator())
    assert found.objects.tolist() == [0, 1, object_of_roi]


def test_in_the_pyramid_no_best_roi_counts_below_one_half():
    found = head_of(PYRAMID).sample(boxes_of((0, 0, 10, 4)), boxes_of((0, 0, 10, 10)), torch.tensor([0]), generator())
    assert found.labels.tolist() == [0, CLASSES]


@pytest.mark.parametrize(('kind', 'best'), [(C4, 'none'), (PYRAMID, 'floor')])
def test_samples_equal_those_of_a_loop(kind, best):
    proposals, objects, labels = random_boxes(200, 3), random_boxes(4, 4), torch.tensor([2, 0, 1, 1])
    found = head_of(kind, rois=10**5, roi_share=0.5).sample(proposals, objects, labels, generator())
    numbers = np.concatenate([range(4), assign(proposals.numpy(), objects.numpy(), 0.5, 0.5, best)])
    order = np.concatenate([np.flatnonzero(numbers >= 0), np.flatnonzero(numbers < 0)])
    np.testing.assert_array_equal(found.rois.numpy(), torch.cat([objects, proposals]).numpy()[order])
    assert found.objects.tolist() == numbers[numbers >= 0].tolist()


def test_samples_of_rois_are_a_function_of_the_key():
    args = random_boxes(200, 3), random_boxes(4, 4), torch.tensor([2, 0, 1, 1])
    head = head_of(rois=20)
    first, again, other = (head.sample(*args, generator(k)).rois for k in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


# Losses

MAPS = [torch.zeros(2, 2, 8, 8)]


@pytest.mark.parametrize('variant', VARIANTS)
def test_the_class_loss_is_the_mean_over_the_sampled_rois_of_all_images(variant):
    head = head_of(variant=variant)
    with torch.no_grad():
        head.bbox_head.fc_cls.bias.copy_(torch.tensor([0.5, -1, 2, 3]))
    objects = [boxes_of((10, 10, 50, 50), (60, 60, 90, 90)), boxes_of()]
    labels = [torch.tensor([2, 0]), torch.zeros(0, dtype=torch.long)]
    proposals = [boxes_of((100, 100, 120, 120)), boxes_of((0, 0, 30, 30), (5, 5, 80, 80))]
    found = head.compute_losses(MAPS, proposals, objects, labels, None, draws(0, 1))
    log = torch.tensor([0.5, -1, 2, 3]).log_softmax(0)
    assert found['loss_cls'].item() == pytest.approx(-float(log[2] + log[0] + 3 * log[3]) / 5, rel=1e-5)


@pytest.mark.parametrize('variant', VARIANTS)
def test_the_box_loss_is_the_l1_of_the_objects_class_divided_by_all_sampled_rois(variant):
    head = head_of(variant=variant)
    given = torch.arange(12.0) / 7
    with torch.no_grad():
        head.bbox_head.fc_reg.bias.copy_(given)
    proposal, box = boxes_of((12, 9, 50, 55)), boxes_of((10, 10, 50, 50))
    proposals = [torch.cat([proposal, boxes_of((100, 100, 120, 120))]), boxes_of((0, 0, 30, 30))]
    found = head.compute_losses(
        MAPS, proposals, [box, boxes_of()], [torch.tensor([1]), torch.zeros(0, dtype=torch.long)], None, draws(0, 1))
    own = given[4:8].numpy()  # of class 1
    errors = [np.abs(own - to_deltas(roi[0].numpy(), box[0].numpy(), STDS)).sum() for roi in (proposal, box)]
    assert found['loss_bbox'].item() == pytest.approx(sum(errors) / 4, rel=1e-5)


def test_without_a_positive_the_box_and_mask_losses_are_zero_and_have_gradients():
    head = head_of(masks=True, pool_size=4)
    found = head.compute_losses(
        [torch.randn(1, 2, 8, 8)], [random_boxes(5, 0)], [boxes_of()], [torch.zeros(0, dtype=torch.long)],
        [torch.zeros(0, 128, 128)], draws(0))
    assert found['loss_bbox'].item() == found['loss_mask'].item() == 0 < found['loss_cls'].item()
    sum(found.values()).backward()
    assert all(p.grad is not None for p in head.parameters())


def test_a_batch_without_any_roi_has_losses_of_zero():
    head = head_of(masks=True)
    none = torch.zeros(0, dtype=torch.long)
    found = head.compute_losses(
        MAPS, [boxes_of()] * 2, [boxes_of()] * 2, [none] * 2, [torch.zeros(0, 9, 9)] * 2, draws(0, 1))
    assert {k: v.item() for k, v in found.items()} == {'loss_cls': 0, 'loss_bbox': 0, 'loss_mask': 0}


def test_the_mask_loss_is_the_mean_over_the_pixels_of_the_positives_in_their_classes():
    head = head_of(masks=True, pool_size=4)
    logits = torch.tensor([0.3, -2.0, 1.5])
    with torch.no_grad():
        head.mask_head.predictor.mask_fcn_logits.bias.copy_(logits)
    masks = torch.zeros(2, 128, 128)
    masks[0, :32, :24] = 1  # the left three quarters of the first box
    masks[1, 32:64] = 1  # all of the second one
    objects = boxes_of((0, 0, 32, 32), (0, 32, 128, 64))
    found = head.compute_losses(
        MAPS, [boxes_of((90, 90, 120, 120)), boxes_of((0, 0, 50, 50))], [objects, boxes_of()],
        [torch.tensor([2, 0]), torch.zeros(0, dtype=torch.long)], [masks, torch.zeros(0, 128, 128)], draws(0, 1))
    first = 0.75 * F.softplus(-logits[2]) + 0.25 * F.softplus(logits[2])
    assert found['loss_mask'].item() == pytest.approx(float(first + F.softplus(-logits[0])) / 2, rel=1e-5)


# Detections


def detect(logits: torch.Tensor, rois: torch.Tensor, deltas: torch.Tensor | None = None, size=(128, 128),
           original=(128, 128), **changes):
    """The detections of RoIs with these logits (n, C + 1) and deltas (n, C, 4); each RoI is an image of its own map."""
    head = head_of(channels=len(rois), **changes).eval()
    features = torch.eye(len(rois))[:, :, None, None]
    head.pool = lambda maps, boxes, size: features
    with torch.no_grad():
        head.bbox_head.fc_cls.weight.copy_(logits.T)
        if deltas is not None:
            head.bbox_head.fc_reg.weight.copy_(deltas.reshape(len(rois), -1).T)
    return head.detect(MAPS, [rois], [size], [original])[0]


def logits_of(*rows: tuple[float, ...]) -> torch.Tensor:
    """Logits with these probabilities of the classes; the rest is the background's."""
    p = torch.tensor(rows)
    return torch.cat([p, 1 - p.sum(1, keepdim=True)], 1).log()


APART = boxes_of((0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10))


@pytest.mark.parametrize('variant', VARIANTS)
def test_scores_are_probabilities_beside_the_background_which_is_last_and_no_detection(variant):
    found = detect(logits_of((0.1, 0.2, 0.3), (0.6, 0.001, 0.001), (0.01, 0.02, 0.04)), APART, variant=variant)
    assert found.scores.tolist() == pytest.approx([0.6, 0.3, 0.2, 0.1], rel=1e-4)
    assert found.labels.tolist() == [0, 2, 1, 0]
    assert found.boxes.tolist() == [APART[i].tolist() for i in (1, 0, 0, 0)]
    assert found.masks is None


def test_a_score_has_to_exceed_the_threshold():
    logits = logits_of((0.25, 0.5, 0.125))
    assert len(detect(logits, APART[:1], score=0.25).scores) == 1
    assert len(detect(logits, APART[:1], score=0.249).scores) == 2


def test_the_published_threshold_limit_and_overlap():
    numbers = DETECTORS[C4]
    assert (numbers.score, numbers.nms, numbers.detections) == (0.05, 0.5, 100)


def test_suppression_is_within_a_class_and_above_the_overlap():
    rois = boxes_of((0, 0, 10, 10), (0, 0, 10, 5), (0, 0, 10, 5.1), (0, 0, 10, 10))  # IoU 1/2, and more
    found = detect(logits_of((0.9, 0.01, 0.01), (0.8, 0.01, 0.01), (0.7, 0.01, 0.01), (0.01, 0.6, 0.01)), rois)
    assert found.scores.tolist() == pytest.approx([0.9, 0.8, 0.6], rel=1e-4)
    assert found.labels.tolist() == [0, 0, 1]


def test_only_the_best_detections_of_all_classes_are_kept():
    rois = torch.stack([torch.tensor([20.0 * i, 0, 20 * i + 10, 10]) for i in range(150)])
    scores = torch.linspace(0.1, 0.9, 150)
    p = torch.stack([scores, torch.full_like(scores, 0.001), torch.full_like(scores, 0.001)], 1)
    p = torch.where((torch.arange(150) % 2 == 0)[:, None], p, p.roll(1, 1))
    found = detect(logits_of(*p.tolist()), rois, size=(3000, 3000), original=(3000, 3000))
    assert len(found.scores) == 100 and float(found.scores.min()) > float(scores[49])
    torch.testing.assert_close(found.scores, scores.flip(0)[:100])


def test_each_class_has_its_own_box_and_deltas_are_scaled():
    deltas = torch.zeros(1, CLASSES, 4)
    deltas[0, 1] = torch.tensor([1.0, -2, 5 * math.log(2), 0])
    found = detect(logits_of((0.3, 0.6, 0.001)), boxes_of((40, 40, 60, 80)), deltas)
    torch.testing.assert_close(found.boxes, boxes_of((32, 32, 72, 72), (40, 40, 60, 80)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('variant', VARIANTS)
def test_boxes_are_cut_at_the_networks_image_and_rescaled_by_both_real_ratios(variant):
    found = detect(logits_of((0.6, 0.001, 0.001)), boxes_of((10, 20, 300, 400)), size=(100, 200), original=(33, 50),
                   variant=variant)
    torch.testing.assert_close(found.boxes, boxes_of((2.5, 6.6, 50, 33)))


@pytest.mark.parametrize(('variant', 'found'), [('mmdet', 1), ('detectron2', 0)])
def test_only_detectron2_drops_detections_without_area(variant, found):
    boxes = detect(logits_of((0.6, 0.001, 0.001)), boxes_of((300, 20, 310, 40)), size=(100, 200), original=(100, 200),
                   variant=variant).boxes
    assert len(boxes) == found


@pytest.mark.parametrize('masks', [False, True])
def test_an_image_without_proposals_or_detections_has_none(masks):
    head = head_of(masks=masks, pool_size=4).eval()
    for rois in (boxes_of(), APART):  # equal logits: no class reaches .3
        head.numbers = dataclasses.replace(head.numbers, score=0.3)
        found = head.detect(MAPS, [rois, boxes_of()], [(128, 128)] * 2, [(64, 64)] * 2)
        for f in found:
            assert f.boxes.shape == (0, 4) and f.scores.shape == f.labels.shape == (0,)
            assert f.masks is None if not masks else f.masks.shape == (0, 4, 4)  # as layer4 halves


def test_a_mask_is_that_of_the_detections_class_on_its_own_box():
    head = head_of(channels=2, masks=True, pool_size=4).eval()
    with torch.no_grad():
        head.bbox_head.fc_cls.bias.copy_(logits_of((0.1, 0.3, 0.5))[0])
        head.mask_head.predictor.mask_fcn_logits.bias.copy_(torch.tensor([1.0, 2, -1]))
    found = head.detect(MAPS, [APART[:1]], [(128, 128)], [(64, 64)])[0]
    assert found.labels.tolist() == [2, 1, 0]
    assert found.masks.shape == (3, 8, 8)
    torch.testing.assert_close(found.masks[:, 0, 0], torch.tensor([-1.0, 2, 1]).sigmoid())


def test_masks_are_pooled_from_the_detections_in_the_networks_pixels():
    pooled = []
    head = head_of(masks=True, pool_size=4).eval()
    pool = head.pool
    head.pool = lambda maps, rois, size: pooled.append([r.clone() for r in rois]) or pool(maps, rois, size)
    head.detect(MAPS, [boxes_of((10, 20, 30, 50))], [(128, 128)], [(64, 32)])
    torch.testing.assert_close(pooled[1][0], boxes_of((10, 20, 30, 50)).expand(3, 4))
