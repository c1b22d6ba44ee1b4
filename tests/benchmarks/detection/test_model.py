"""Whole detectors: their parts, initialisation, padding, and their losses and detections against plain_detector."""
import math

import numpy as np
import pytest
import torch
from plain_detector import PlainDetector, fill
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from simsiam_models.benchmarks.backbone import Backbone, load_backbone
from simsiam_models.benchmarks.detection.model import Detector, build

KINDS = ['fasterrcnn_c4', 'maskrcnn_c4', 'maskrcnn_fpn']
CLASSES = {'fasterrcnn_c4': 20, 'maskrcnn_c4': 80, 'maskrcnn_fpn': 80}  # the page's
POOL = {'fasterrcnn_c4': 6, 'maskrcnn_c4': 6, 'maskrcnn_fpn': 3}  # cells per side of a RoI, for speed
ALL = {'rpn_samples': 10**6, 'rois': 10**5, 'roi_share': 0.5}  # every candidate is a sample
EVERY_KIND = [('fasterrcnn_c4', 'mmdet'), ('fasterrcnn_c4', 'detectron2'), ('maskrcnn_c4', 'mmdet'),
              ('maskrcnn_fpn', 'mmdet')]


@pytest.fixture(scope='module')
def resnet50() -> Backbone:
    return load_backbone('resnet50:random')


@pytest.fixture(scope='module')
def published(resnet50) -> dict[str, Detector]:
    """The detectors of the page, as `build` initialises them."""
    return {kind: build(resnet50, kind, classes) for kind, classes in CLASSES.items()}


def build_small(kind: str, variant: str = 'mmdet', network: Backbone | None = None, **changes) -> Detector:
    """A small detector with the weights of `fill`."""
    network = network or load_backbone('resnet18:random', layers=[1, 1, 1, 1], channels=[16, 32, 64, 96])
    numbers = {'mask_size': 6} if kind == 'maskrcnn_fpn' else {}
    numbers |= {'pool_size': POOL[kind], 'train_proposals': (100, 25), 'test_proposals': (100, 20)}
    detector = build(network, kind, 3, variant=variant, **(numbers | changes))
    fill(detector)
    for m in detector.modules():
        if isinstance(m, _BatchNorm):
            m.momentum = 1.0  # in evaluation, the last batch's statistics
    return detector


def make_image(height: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))


def make_target(height: int, width: int, *rows: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """Rows are x1, y1, x2, y2, label; masks are ellipses."""
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 5)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing='ij')
    masks = [
        ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 < 1
        for x1, y1, x2, y2, _ in table.tolist()]
    return {'boxes': table[:, :4].contiguous(), 'labels': table[:, 4].long(),
            'masks': torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.bool)}


def make_batch(empty: bool = False) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    sizes = [(90, 150), (94, 141)]  # little padding: constant maps would have equal candidates, in any order
    first = make_target(*sizes[0], (3.3, 5.2, 130.1, 88.7, 1), (20.5, 30.2, 90.3, 70.1, 0), (44.1, 3, 61.7, 24.2, 2))
    second = make_target(*sizes[1], *([] if empty else [(10.2, 12.4, 50.6, 80.9, 2)]))
    return [make_image(*s, i) for i, s in enumerate(sizes)], [first, second]


def values(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    return {k: v.item() for k, v in losses.items()}


def near(losses: dict[str, torch.Tensor], rel: float = 3e-4) -> dict[str, float]:
    return {k: pytest.approx(v, rel=rel, abs=1e-12) for k, v in values(losses).items()}


def plain_of(detector: Detector, training: bool) -> PlainDetector:
    n = detector.numbers
    proposals = n.train_proposals if training else n.test_proposals
    state = {k: v.detach().clone() for k, v in detector.state_dict().items()}
    return PlainDetector(state, detector.kind, n.variant, training, proposals, n.pool_size, n.mask_size)


# Parts


@pytest.mark.parametrize(('kind', 'parameters', 'norms'), [
    ('fasterrcnn_c4', 33_234_160, 54), ('maskrcnn_fpn', 45_711_152, 69), ('maskrcnn_c4', 35_966_828, 54)])
def test_detectors_have_the_size_of_the_published_ones(published, kind, parameters, norms):
    detector = published[kind]
    assert sum(p.numel() for p in detector.parameters()) == parameters
    assert sum(isinstance(m, _BatchNorm) for m in detector.modules()) == norms
    assert f'{parameters:,} parameters and {norms} batch norms' in detector.describe()


def conv_norm(out: int, given: int, side: int) -> list[tuple[int, ...]]:
    return [(out, given, side, side), (out,), (out,)]


def with_bias(*shape: int, out: int | None = None) -> list[tuple[int, ...]]:
    return [shape, (out or shape[0],)]


FPN_SHAPES = [
    *[s for c in (256, 512, 1024, 2048) for s in conv_norm(256, c, 1)], *4 * conv_norm(256, 256, 3),
    *with_bias(256, 256, 3, 3), *with_bias(3, 256, 1, 1), *with_bias(12, 256, 1, 1),
    *with_bias(81, 1024), *with_bias(320, 1024), *4 * conv_norm(256, 256, 3), *with_bias(1024, 256 * 49),
    *4 * conv_norm(256, 256, 3), *with_bias(256, 256, 2, 2), *with_bias(80, 256, 1, 1)]
RPN_C4_SHAPES = [*with_bias(1024, 1024, 3, 3), *with_bias(15, 1024, 1, 1), *with_bias(60, 1024, 1, 1)]
MASK_C4_SHAPES = [*with_bias(2048, 256, 2, 2, out=256), *with_bias(80, 256, 1, 1)]


def test_parts_have_the_names_order_and_shapes_of_mmdets(published):
    def children(module: nn.Module) -> list[str]:
        return [name for name, _ in module.named_children()]

    def shapes(module: nn.Module, *beside: str) -> list[tuple[int, ...]]:
        return [tuple(p.shape) for name, p in module.named_parameters() if not name.startswith(beside)]
    assert children(published['maskrcnn_fpn']) == ['backbone', 'neck', 'rpn_head', 'roi_head']
    assert children(published['maskrcnn_fpn'].roi_head) == ['bbox_head', 'mask_head']
    assert shapes(published['maskrcnn_fpn'], 'backbone') == FPN_SHAPES
    stages = ['conv1', 'bn1', 'act1', 'maxpool', 'layer1', 'layer2', 'layer3']
    assert children(published['maskrcnn_fpn'].backbone) == [*stages, 'layer4']
    for kind, heads in (('fasterrcnn_c4', ['bbox_head']), ('maskrcnn_c4', ['bbox_head', 'mask_head'])):
        detector = published[kind]
        assert children(detector) == ['backbone', 'rpn_head', 'roi_head']
        assert children(detector.backbone) == stages and children(detector.roi_head) == ['shared_head', *heads]
        assert children(detector.roi_head.shared_head) == ['layer4', 'norm']
        classes = CLASSES[kind]
        assert shapes(detector, 'backbone', 'roi_head.shared_head.layer4') == [
            *RPN_C4_SHAPES, (2048,), (2048,), *with_bias(classes + 1, 2048), *with_bias(4 * classes, 2048),
            *(MASK_C4_SHAPES if kind == 'maskrcnn_c4' else [])]


def test_the_backbones_own_layers_train(resnet50, published):
    for detector in published.values():
        own = {id(p) for p in resnet50.model.parameters()}
        taken = [p for name, p in detector.named_parameters() if name.startswith((
            'backbone', 'roi_head.shared_head.layer'))]
        assert {id(p) for p in taken} == own  # layer4, too
        assert all(p.requires_grad for p in detector.parameters())
        assert all(m.training for m in detector.modules())


@pytest.mark.parametrize('kind', KINDS)
def test_new_layers_are_initialised_as_mmdets(published, kind):
    detector = published[kind]
    norms = {name for name, m in detector.named_modules() if isinstance(m, _BatchNorm)}
    seen = 0
    for name, p in detector.named_parameters():
        if name.startswith(('backbone', 'roi_head.shared_head.layer4')):
            continue
        layer, seen = name.rpartition('.')[0], seen + 1
        if p.ndim == 1:
            assert (p == float(layer in norms and name.endswith('weight'))).all(), name
        elif 'neck' in name or name == 'roi_head.bbox_head.shared.5.weight':  # Xavier, uniform
            bound = math.sqrt(6 / (p[0].numel() + p.shape[0] * p[0, 0].numel()))
            assert 0.99 < float(p.abs().max()) / bound < 1.0001, name
            assert float(p.std()) == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(2 * p.numel())), name
        else:
            std = 0.001 if 'fc_reg' in name else 0.01
            if 'shared' in name or 'mask_head' in name:  # Kaiming, by the output; torch's is weight.shape[0]
                std = math.sqrt(2 / (p.shape[0] * p[0, 0].numel()))
            assert float(p.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * p.numel())), name
            assert abs(float(p.mean())) < 4 * std / math.sqrt(p.numel()), name
            assert float(p.abs().max()) > 3 * std, name  # normal
    assert seen == {'fasterrcnn_c4': 12, 'maskrcnn_c4': 16, 'maskrcnn_fpn': len(FPN_SHAPES)}[kind]


def test_a_frozen_part_is_found():
    detector = build_small('fasterrcnn_c4')
    detector.check_trained()
    detector.backbone.layer1[0].bn1.eval()
    with pytest.raises(RuntimeError, match=r'backbone\.layer1\.0\.bn1'):
        detector.check_trained()
    detector.train().backbone.bn1 = FrozenBatchNorm2d(64)
    with pytest.raises(RuntimeError, match=r'backbone\.bn1'):
        detector.check_trained()
    detector = build_small('fasterrcnn_c4')
    detector.rpn_head.rpn_cls.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r'rpn_head\.rpn_cls\.bias'):
        detector.check_trained()


# Padding


@pytest.mark.parametrize(('variant', 'height', 'width'), [('mmdet', 64, 96), ('detectron2', 33, 70)])
def test_images_are_padded_with_zeros_at_the_right_and_below(variant, height, width):
    images = [torch.ones(3, 33, 64), torch.ones(3, 20, 70)]
    batch = build_small('fasterrcnn_c4', variant).pad(images)
    assert batch.shape == (2, 3, height, width)
    for padded, image in zip(batch, images, strict=True):
        assert torch.equal(padded[:, :image.shape[1], :image.shape[2]], image)
        assert padded.sum() == image.numel()


def test_a_padded_multiple_of_the_divisor_stays():
    assert build_small('fasterrcnn_c4').pad([torch.ones(3, 64, 96)]).shape == (1, 3, 64, 96)


# Losses and detections


@pytest.mark.parametrize(('kind', 'variant'), EVERY_KIND)
def test_losses_and_detections_equal_a_plain_implementation(kind, variant):
    detector = build_small(kind, variant, **ALL)
    plain = plain_of(detector, training=True)
    divisor = ALL['rpn_samples'] if variant == 'detectron2' else None
    for empty in (False, True):
        images, targets = make_batch(empty)
        expected = plain.losses(images, targets, divisor)
        assert values(detector.losses(images, targets, [1, 2])) == near(expected)
        assert list(expected) == ['loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox', 'loss_mask'][:len(expected)]
        assert min(values(expected).values()) > 0 and ('loss_mask' in expected) == (kind != 'fasterrcnn_c4')
    check_detections(detector.eval(), images[0], (58, 100))


def check_detections(
    detector: Detector, image: torch.Tensor, original: tuple[int, int], rel: float = 1e-4,
) -> None:
    found = detector.detect([image], [original])[0]
    expected = plain_of(detector, training=False).detect(image, original)
    assert len(found.scores) == len(expected['scores']) > 10
    assert found.labels.tolist() == expected['labels'].tolist()
    np.testing.assert_allclose(found.scores.numpy(), expected['scores'], rtol=rel)
    np.testing.assert_allclose(found.boxes.numpy(), expected['boxes'], atol=100 * rel)
    assert (found.masks is None) == ('masks' not in expected)
    if found.masks is not None:
        np.testing.assert_allclose(found.masks.numpy(), expected['masks'], atol=1e-3)


def test_bottlenecks_have_their_stride_in_the_middle(resnet50):
    """mmdet's style is `pytorch`: losses and detections on ResNet-50 equal a plain implementation."""
    detector = build_small('fasterrcnn_c4', 'mmdet', resnet50, **ALL, train_proposals=(60, 15), test_proposals=(60, 15))
    plain, image = plain_of(detector, training=True), make_image(64, 90, 0)
    target = make_target(64, 90, (3.3, 5.2, 40.1, 38.7, 1), (20.5, 30.2, 80.3, 60.1, 0))
    assert values(detector.losses([image], [target], [1])) == near(plain.losses([image], [target], None))
    check_detections(detector.eval(), image, (64, 90), rel=1e-2)


@pytest.mark.parametrize('kind', KINDS)
def test_every_parameter_gets_a_gradient(kind):
    detector = build_small(kind)
    sum(detector.losses(*make_batch(), keys=[0, 1]).values()).backward()
    assert not [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize('kind', KINDS)
def test_a_batch_without_objects_has_finite_losses_and_a_gradient_everywhere(kind):
    detector = build_small(kind)
    losses = detector.losses([make_image(64, 64, 0)], [make_target(64, 64)], [0])
    assert losses['loss_rpn_bbox'] == losses['loss_bbox'] == losses.get('loss_mask', 0) == 0
    assert losses['loss_rpn_cls'] > 0 and losses['loss_cls'] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


def test_losses_are_a_function_of_the_keys_and_drawn_from_torchs_generator_without(one_thread):
    detector = build_small('maskrcnn_fpn', rpn_samples=8, rois=8)
    batch = make_batch()
    first, again, other = (values(detector.losses(*batch, keys)) for keys in ([1, 2], [1, 2], [1, 3]))
    assert first == again and first != other
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(values(detector.losses(*batch)))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize('kind', KINDS)
def test_the_order_of_the_images_does_not_count(kind):
    detector = build_small(kind, rpn_samples=8, rois=8)
    (a, b), (target_a, target_b) = make_batch()
    first = detector.losses([a, b], [target_a, target_b], [1, 2])
    assert values(detector.losses([b, a], [target_b, target_a], [2, 1])) == near(first)


@pytest.mark.parametrize('variant', ['mmdet', 'detectron2'])
def test_two_images_of_a_size_have_the_mean_of_their_losses(variant):
    detector = build_small('fasterrcnn_c4', variant, rpn_samples=16, rois=16)
    images = [make_image(128, 128, i) for i in range(2)]
    targets = [make_target(128, 128, (20, 25, 70, 80, 1)), make_target(128, 128, (50, 40, 120, 90, 2))]
    detector.losses(images, targets)
    for m in detector.modules():
        if isinstance(m, _BatchNorm):
            m.eval()  # only the batch's statistics join the images
    both = values(detector.losses(images, targets, [5, 6]))
    single = [values(detector.losses([i], [t], [k])) for i, t, k in zip(images, targets, [5, 6], strict=True)]
    assert both == {k: pytest.approx((single[0][k] + single[1][k]) / 2, rel=1e-4) for k in both}


def test_images_of_a_batch_are_detected_as_alone():
    detector = build_small('maskrcnn_fpn')
    images = [make_image(64, 96, 0), make_image(64, 96, 1)]
    detector.losses(images, [make_target(64, 96)] * 2)
    detector.eval()
    together = detector.detect(images, [(64, 96), (32, 48)])
    for image, original, found in zip(images, [(64, 96), (32, 48)], together, strict=True):
        alone = detector.detect([image], [original])[0]
        assert found.labels.tolist() == alone.labels.tolist()
        for name in ('boxes', 'scores', 'masks'):
            torch.testing.assert_close(getattr(found, name), getattr(alone, name), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('kind', KINDS)
def test_nothing_is_detected_where_nothing_is_proposed(kind):
    detector = build_small(kind).eval()
    with torch.no_grad():
        detector.rpn_head.rpn_reg.bias.fill_(-1e6)  # all boxes lie outside
    found = detector.detect([make_image(64, 64, 0)])[0]
    assert found.boxes.shape == (0, 4) and not len(found.scores)
    if kind != 'fasterrcnn_c4':
        side = 12 if kind == 'maskrcnn_fpn' else POOL[kind]
        assert found.masks.shape == (0, side, side)


# Building


def test_the_seed_decides_the_new_layers_and_leaves_torchs_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again, other = (build('resnet10t:random', classes=2, seed=s).state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[k], again[k]) for k in first)
    name = 'rpn_head.rpn_conv.weight'
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize(('arguments', 'named'), [
    ({'kind': 'retinanet'}, 'retinanet'),
    ({'kind': 'maskrcnn_fpn', 'variant': 'detectron2'}, 'detectron2'),
    ({'variant': 'mmdet3'}, 'mmdet3'),
    ({'anchors': 3}, 'anchors'),
    ({'rois': 0}, 'rois'),
    ({'classes': ['cat', 'cat']}, '2 classes, 1'),
    ({'classes': 0}, '0 classes'),
    ({'model': 'vit_tiny_patch16_224:random'}, 'vit_tiny')])
def test_a_wrong_number_is_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        build(**({'model': 'resnet10t:random'} | arguments))


@pytest.mark.parametrize(('change', 'named'), [
    ({'boxes': torch.tensor([[10.0, 10, 10, 30]])}, 'image 1, box 0'),
    ({'boxes': torch.tensor([[10.0, 10, math.nan, 30]])}, 'image 1, box 0'),
    ({'labels': torch.tensor([3])}, 'labels 3 to 3'),
    ({'labels': torch.tensor([-1])}, 'labels -1'),
    ({'labels': torch.tensor([1, 2])}, 'image 1'),
    ({'boxes': torch.zeros(1, 5)}, 'image 1'),
    ({'masks': torch.zeros(1, 60, 90)}, 'image 1: masks')])
def test_a_target_that_does_not_fit_is_refused(change, named):
    detector = build_small('maskrcnn_c4')
    images, targets = make_batch()
    targets[1] |= change
    with pytest.raises(ValueError, match=named):
        detector.losses(images, targets, [0, 1])
    with pytest.raises(ValueError, match='2 images and 1 targets'):
        detector.losses(images, targets[:1], [0, 1])
