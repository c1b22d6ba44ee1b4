"""The region proposal network: the order of its outputs, its losses and their normaliser, and its proposals."""
import dataclasses
import math

import numpy as np
import pytest
import torch
from plain_detector import PlainDetector, to_deltas
from torchvision.ops import box_iou

from simsiam_models.benchmarks.detection.rpn import RPN, Draw
from simsiam_models.benchmarks.protocols import DETECTORS, DetectorNumbers

NO_OBJECTS = torch.zeros(0, 4)
C4, PYRAMID = 'fasterrcnn_c4', 'maskrcnn_fpn'
VARIANTS = ['mmdet', 'detectron2']


def numbers_of(kind: str = C4, **changes) -> DetectorNumbers:
    return dataclasses.replace(DETECTORS[kind], **changes)


def maps_of(images: int, *sides: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.zeros(images, 1, *side) for side in sides]


def outputs_of(rpn: RPN, maps: list[torch.Tensor], seed: int | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits and deltas for maps: zeros, or random ones."""
    rng, found = torch.Generator().manual_seed(seed or 0), []
    for x, a in zip(maps, rpn.make_anchors(maps), strict=True):
        logits, deltas = torch.randn(len(x), len(a), generator=rng), torch.randn(len(x), len(a), 4, generator=rng)
        found.append((logits * (seed is not None), deltas * (seed is not None)))
    return found


def losses_of(rpn: RPN, maps, sizes, objects, seed=None, keys=None) -> dict[str, float]:
    draw = Draw(keys or list(range(len(sizes))))
    found = rpn.compute_losses(outputs_of(rpn, maps, seed), maps, sizes, objects, draw)
    return {k: float(v) for k, v in found.items()}


def plain(kind: str, variant: str, proposals: tuple[int, int] = (10**6, 10**6)) -> PlainDetector:
    return PlainDetector({'roi_head.bbox_head.fc_cls.weight': torch.zeros(2, 1)}, kind, variant, True, proposals, 7)


# Outputs


def test_logits_and_deltas_have_the_order_of_the_anchors():
    rpn = RPN(2, numbers_of())
    with torch.no_grad():
        for conv in (rpn.rpn_conv, rpn.rpn_cls, rpn.rpn_reg):
            conv.weight.zero_()
            conv.bias.zero_()
        rpn.rpn_conv.weight[0, 0, 1, 1] = 1
        rpn.rpn_cls.weight[:, 0] = 1000
        rpn.rpn_reg.weight[:, 0] = 1000
        rpn.rpn_cls.bias.copy_(torch.arange(15))
        rpn.rpn_reg.bias.copy_(torch.arange(60))
        cells = torch.arange(12.0).view(1, 1, 3, 4)
        (logits, deltas), = rpn([torch.cat([cells, cells], 1)])
    assert logits.shape == (1, 180) and deltas.shape == (1, 180, 4)
    for cell, anchor in np.ndindex(12, 15):
        assert logits[0, 15 * cell + anchor] == 1000 * cell + anchor
        assert deltas[0, 15 * cell + anchor].tolist() == [1000 * cell + 4 * anchor + k for k in range(4)]


def test_the_hidden_layer_is_a_relu():
    rpn = RPN(1, numbers_of())
    with torch.no_grad():
        rpn.rpn_conv.weight.zero_()
        rpn.rpn_conv.bias.fill_(-1)
        assert not rpn([torch.ones(1, 1, 2, 2)])[0][0].any()


# Losses


def test_mmdet_divides_by_the_sampled_anchors_of_all_images():
    rpn = RPN(1, numbers_of(rpn_samples=40))
    maps, sizes = maps_of(2, (8, 8)), [(128, 128)] * 2
    found = losses_of(rpn, maps, sizes, [torch.tensor([[40.0, 40, 72, 72]])] * 2)
    assert found['loss_rpn_cls'] == pytest.approx(math.log(2), rel=1e-5)  # of each anchor, at a logit of 0


def test_mmdet_counts_one_positive_for_an_image_without():
    rpn = RPN(1, numbers_of(rpn_samples=40))
    maps, sizes = maps_of(2, (8, 8)), [(128, 128)] * 2
    found = losses_of(rpn, maps, sizes, [NO_OBJECTS, NO_OBJECTS])
    assert found == {'loss_rpn_cls': pytest.approx(math.log(2) * 80 / 82, rel=1e-5), 'loss_rpn_bbox': 0}
    found = losses_of(rpn, maps, sizes, [NO_OBJECTS, torch.tensor([[40.0, 40, 72, 72]])])
    assert found['loss_rpn_cls'] == pytest.approx(math.log(2) * 80 / 81, rel=1e-5)


def test_mmdet_counts_one_negative_for_an_image_without_anchors():
    rpn = RPN(1, numbers_of())
    found = losses_of(rpn, maps_of(1, (1, 1)), [(16, 16)], [NO_OBJECTS])  # no anchor lies inside
    assert found == {'loss_rpn_cls': 0, 'loss_rpn_bbox': 0}


@pytest.mark.parametrize('samples', [256, 40])
def test_detectron2_divides_by_the_samples_to_be_drawn(samples):
    rpn = RPN(1, numbers_of(variant='detectron2', rpn_samples=samples))
    found = losses_of(rpn, maps_of(3, (2, 2)), [(32, 32)] * 3, [NO_OBJECTS] * 3)  # 60 anchors each
    assert found['loss_rpn_cls'] == pytest.approx(math.log(2) * min(60, samples) / samples, rel=1e-5)


@pytest.mark.parametrize('variant', VARIANTS)
def test_the_box_loss_is_l1_and_not_smooth(variant):
    rpn = RPN(1, numbers_of(variant=variant, rpn_samples=10**6))
    maps, target = maps_of(1, (8, 8)), torch.tensor([[49.0, 47.5, 80.5, 81.0]])
    anchors = rpn.make_anchors(maps)[0]
    anchor = anchors[15 * (4 * 8 + 4) + (5 if variant == 'mmdet' else 1)]
    assert anchor.tolist() == [48, 48, 80, 80]
    expected, count = sum(map(abs, to_deltas(anchor.numpy(), target[0].numpy(), (1, 1, 1, 1)))), 10**6
    if variant == 'mmdet':
        iou = box_iou(target, anchors[rpn.find_trained([anchors], maps, (128, 128))])[0]
        assert int((iou >= 0.7).sum()) == 1
        count = 1 + int((iou < 0.3).sum())
    assert losses_of(rpn, maps, [(128, 128)], [target])['loss_rpn_bbox'] == pytest.approx(expected / count, rel=1e-4)


@pytest.mark.parametrize(('kind', 'variant'), [(C4, 'mmdet'), (C4, 'detectron2'), (PYRAMID, 'mmdet')])
@pytest.mark.parametrize('seed', range(2))
def test_the_losses_of_images_of_different_sizes_equal_those_of_a_loop(kind, variant, seed):
    rpn = RPN(1, numbers_of(kind, variant=variant, rpn_samples=10**6))
    sizes = [(120, 90), (60, 140), (64, 64)]
    sides = [(8, 10)] if kind == C4 else [(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)]
    maps = maps_of(3, *sides)
    objects = [torch.tensor([[10.0, 12, 50, 55], [30, 40, 41, 47.5], [0.5, 0.5, 89, 119]]) + seed / 3,
               torch.tensor([[-0.0, 3, 138, 58.5]]) + seed / 7, NO_OBJECTS]
    divisor = 10**6 if variant == 'detectron2' else None
    expected = plain(kind, variant).rpn_losses(
        maps, outputs_of(rpn, maps, seed), sizes, [x.numpy() for x in objects], divisor)
    found = losses_of(rpn, maps, sizes, objects, seed)
    assert found == {k: pytest.approx(float(v), rel=1e-4) for k, v in expected.items()}
    assert found['loss_rpn_bbox'] > 0


def test_only_mmdets_c4_filters_anchors_that_leave_the_image_and_only_mmdet_those_of_foreign_padding():
    size, side = (70, 100), (8, 8)  # its own padding: 96 x 128, thus 6 rows and 8 columns
    for kind, variant in ((C4, 'mmdet'), (C4, 'detectron2'), (PYRAMID, 'mmdet')):
        sides = [side] if kind == C4 else [(32, 32), (16, 16), side, (4, 4), (2, 2)]
        rpn, maps = RPN(1, numbers_of(kind, variant=variant)), maps_of(1, *sides)
        anchors = rpn.make_anchors(maps)
        found = rpn.find_trained(anchors, maps, size).tolist()
        other = plain(kind, variant)
        expected = []
        for stride, a, (h, w) in zip(other.strides, anchors, sides, strict=True):
            per_cell = len(a) // (h * w)
            expected += [other.is_trained(a[j].numpy(), divmod(j // per_cell, w), stride, size) for j in range(len(a))]
        assert found == expected
        if variant == 'detectron2':
            assert all(found)
        elif kind == C4:
            assert 0 < sum(found) < 6 * 8 * 15 / 2
        else:
            assert sum(found) == 3 * (24 * 32 + 12 * 16 + 6 * 8 + 3 * 4 + 2 * 2)


def test_at_most_half_of_256_samples_are_positive():
    rpn = RPN(1, numbers_of())
    maps = maps_of(1, (20, 20))
    anchors = rpn.make_anchors(maps)[0]
    inside = anchors[rpn.find_trained([anchors], maps, (320, 320))]
    logits = torch.zeros(1, len(anchors), requires_grad=True)
    outputs = [(logits, torch.zeros(1, len(anchors), 4))]
    rpn.compute_losses(outputs, maps, [(320, 320)], [inside[:200] + 0.01], Draw([0]))['loss_rpn_cls'].backward()
    assert int((logits.grad < 0).sum()) == 128 and int((logits.grad > 0).sum()) == 128


def test_the_losses_are_a_function_of_the_keys_of_the_images():
    rpn = RPN(1, numbers_of(rpn_samples=8))
    maps, sizes, objects = maps_of(2, (8, 8)), [(128, 128)] * 2, [torch.tensor([[40.0, 40, 72, 72]])] * 2
    first, again, other = (losses_of(rpn, maps, sizes, objects, 0, keys) for keys in ([3, 4], [3, 4], [3, 5]))
    assert first == again and first != other


def test_a_batch_without_objects_still_has_gradients():
    rpn = RPN(4, numbers_of())
    maps = [torch.randn(1, 4, 8, 8)]
    losses = rpn.compute_losses(rpn(maps), maps, [(128, 128)], [NO_OBJECTS], Draw([0]))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in rpn.parameters())


# Proposals


@pytest.mark.parametrize(('kind', 'variant'), [(C4, 'mmdet'), (C4, 'detectron2'), (PYRAMID, 'mmdet')])
@pytest.mark.parametrize('training', [True, False])
def test_proposals_equal_those_of_a_loop(kind, variant, training):
    limits = (60, 40)
    rpn = RPN(1, numbers_of(kind, variant=variant, **{f'{"train" if training else "test"}_proposals': limits}))
    rpn.train(training)
    sides = [(5, 6)] if kind == C4 else [(20, 24), (10, 12), (5, 6), (3, 3), (2, 2)]
    maps, sizes = maps_of(2, *sides), [(80, 96), (61, 50)]
    outputs = outputs_of(rpn, maps, 1)
    found = rpn.propose(outputs, maps, sizes)
    expected = plain(kind, variant, limits).propose(maps, outputs, sizes)
    for a, b in zip(found, expected, strict=True):
        assert 0 < len(a) <= 40
        np.testing.assert_allclose(a.numpy(), b, atol=1e-3)


def test_each_map_gives_its_best_and_the_image_keeps_the_best_of_all():
    rpn = RPN(1, numbers_of(PYRAMID, train_proposals=(2, 3), rpn_nms=1.0))
    maps = maps_of(1, (4, 4), (2, 2), (1, 1), (1, 1), (1, 1))
    outputs = [(torch.full_like(a, -9), b) for a, b in outputs_of(rpn, maps)]
    outputs[0][0][0, :4] = torch.tensor([5.0, 7, 6, 4])  # the first map may only give two
    outputs[1][0][0, :2] = torch.tensor([3.0, 1])
    found = rpn.propose(outputs, maps, [(64, 64)])[0]
    anchors = rpn.make_anchors(maps)
    expected = torch.stack([anchors[0][1], anchors[0][2], anchors[1][0]]).clamp(0, 64)
    torch.testing.assert_close(found, expected)


def test_boxes_of_different_maps_do_not_suppress_each_other():
    rpn = RPN(1, numbers_of(PYRAMID, train_proposals=(1, 10)))
    maps = maps_of(1, (1, 1), (1, 1), (1, 1), (1, 1), (1, 1))
    found = rpn.propose(outputs_of(rpn, maps), maps, [(8, 8)])[0]  # all cover the image
    assert found.tolist() == [[0, 0, 8, 8]] * 5
    rpn = RPN(1, numbers_of(train_proposals=(10, 10)))
    assert rpn.propose(outputs_of(rpn, maps_of(1, (1, 1))), maps_of(1, (1, 1)), [(8, 8)])[0].tolist() == [[0, 0, 8, 8]]


def test_training_and_test_have_numbers_of_their_own():
    rpn = RPN(1, numbers_of(train_proposals=(40, 7), test_proposals=(40, 3), rpn_nms=0.99))
    maps = maps_of(1, (8, 8))
    outputs = outputs_of(rpn, maps, 0)
    assert len(rpn.propose(outputs, maps, [(128, 128)])[0]) == 7
    assert len(rpn.eval().propose(outputs, maps, [(128, 128)])[0]) == 3


def test_boxes_are_cut_at_the_unpadded_image_and_dropped_when_nothing_is_left():
    rpn = RPN(1, numbers_of())
    maps = maps_of(1, (8, 8))
    outputs = outputs_of(rpn, maps, 0)
    found = rpn.propose(outputs, maps, [(50, 70)])[0]
    assert found[:, ::2].max() == 70 and found[:, 1::2].max() == 50 and found.min() == 0
    assert (found[:, 2:] > found[:, :2]).all()
    outputs[0][1][..., :2] = 1e4
    assert rpn.propose(outputs, maps, [(50, 70)])[0].shape == (0, 4)


@pytest.mark.parametrize(('variant', 'winner'), [('mmdet', 0), ('detectron2', 1)])
def test_detectron2_ranks_by_logits_where_mmdets_probabilities_are_all_one(variant, winner):
    rpn = RPN(1, numbers_of(variant=variant, train_proposals=(1, 1)))
    maps = maps_of(1, (1, 1))
    logits = torch.zeros(1, 15)
    logits[0, :2] = torch.tensor([30.0, 40.0])
    found = rpn.propose([(logits, torch.zeros(1, 15, 4))], maps, [(1000, 1000)])[0]
    torch.testing.assert_close(found[0], rpn.make_anchors(maps)[0][winner].clamp(min=0))
