"""Anchors, matching, sampling and the coding of boxes, against hand computations, torchvision and slow loops."""
import math

import numpy as np
import pytest
import torch
from plain_detector import C4_SIZES, assign, cell_anchors, from_deltas, grid_anchors
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou

from simsiam_models.benchmarks.detection import boxes
from simsiam_models.benchmarks.detection.boxes import IGNORED, NEGATIVE, SCALE_CLAMP, encode, match, sample

SCALES, RATIOS = (2.0, 4.0, 8.0, 16.0, 32.0), (0.5, 1.0, 2.0)
RCNN_STDS = (0.1, 0.1, 0.2, 0.2)
HUGE = (10**6, 10**6)


def boxes_of(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).view(-1, 4)


def random_boxes(n: int, seed: int, side: float = 100) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    low, extent = rng.uniform(0, side, (n, 2)), rng.uniform(1, side, (n, 2))
    return torch.tensor(np.concatenate([low, low + extent], 1), dtype=torch.float32)


def generator(key: int) -> torch.Generator:
    return torch.Generator().manual_seed(key)


# Anchors


def test_the_first_anchors_of_mmdet_have_one_ratio_and_growing_scales():
    found = boxes.make_base_anchors(16, SCALES, RATIOS, size_major=False)
    r = math.sqrt(2)
    assert found.shape == (15, 4)
    torch.testing.assert_close(
        found[:2], boxes_of((-16 * r, -8 * r, 16 * r, 8 * r), (-32 * r, -16 * r, 32 * r, 16 * r)))
    torch.testing.assert_close(found[5], torch.tensor([-16.0, -16, 16, 16]))
    torch.testing.assert_close(found[14], torch.tensor([-128 * r, -256 * r, 128 * r, 256 * r]))


def test_the_first_anchors_of_detectron2_have_one_size_and_growing_ratios():
    found = boxes.make_base_anchors(16, SCALES, RATIOS, size_major=True)
    r = math.sqrt(2)
    torch.testing.assert_close(
        found[:3], boxes_of((-16 * r, -8 * r, 16 * r, 8 * r), (-16, -16, 16, 16), (-8 * r, -16 * r, 8 * r, 16 * r)))
    torch.testing.assert_close(found[3], torch.tensor([-32 * r, -16 * r, 32 * r, 16 * r]))


@pytest.mark.parametrize('size_major', [False, True])
def test_anchors_are_not_rounded_and_keep_area_and_ratio(size_major):
    found = boxes.make_base_anchors(16, SCALES, RATIOS, size_major)
    width, height = (found[:, 2:] - found[:, :2]).unbind(1)
    pairs = sorted(zip((width * height).sqrt().tolist(), (height / width).tolist(), strict=True))
    expected = sorted((s, r) for s in C4_SIZES for r in RATIOS)
    np.testing.assert_allclose(sorted(np.round(pairs, 3).tolist()), expected, rtol=1e-4)
    assert (found != found.round()).any()
    np.testing.assert_allclose(found.numpy(), cell_anchors(C4_SIZES, size_major), rtol=1e-5)


def test_a_cell_of_the_pyramid_has_three_anchors_of_eight_strides():
    for stride in (4, 8, 16, 32, 64):
        found = boxes.make_base_anchors(stride, (8.0,), RATIOS, size_major=False)
        np.testing.assert_allclose(found.numpy(), cell_anchors((8 * stride,), False), rtol=1e-5)


def test_anchors_run_row_by_row_and_cell_by_cell_in_whole_strides():
    base = boxes_of((-1, -2, 1, 2), (-3, -3, 3, 3))
    found = boxes.make_anchors(base, 16, height=2, width=3)
    assert found.shape == (12, 4)
    assert found[:3].tolist() == [[-1, -2, 1, 2], [-3, -3, 3, 3], [15, -2, 17, 2]]
    assert found[6].tolist() == [-1, 14, 1, 18]  # second row
    np.testing.assert_array_equal(found.numpy(), grid_anchors(base.numpy(), 16, 2, 3))


@pytest.mark.parametrize(('size', 'stride', 'rows', 'columns'), [
    ((100, 70), 16, 8, 6),  # 128 x 96 after padding
    ((96, 64), 16, 6, 4),  # already multiples of 32
    ((97, 65), 4, 32, 24),
    ((70, 130), 64, 2, 3),  # 96 / 64 and 160 / 64, rounded up
    ((1000, 1000), 16, 40, 40)])  # never more than the map has
def test_cells_beyond_an_images_own_padding_are_not_valid(size, stride, rows, columns):
    valid = boxes.find_valid_cells(size, 32, stride, 40, 40)
    expected = np.zeros((40, 40), bool)
    expected[:rows, :columns] = True
    np.testing.assert_array_equal(valid.numpy(), expected)


def test_an_anchor_may_touch_the_low_borders_but_not_the_high_ones():
    cases = {(0, 0, 9, 19): True, (0, 0, 10, 19): False, (0, 0, 9, 20): False, (-0.01, 0, 5, 5): False,
             (0, -0.01, 5, 5): False, (2, 3, 9.99, 19.99): True, (-5, -5, 30, 30): False}
    found = boxes.lie_inside(boxes_of(*cases), (20, 10))  # height, width
    assert dict(zip(cases, found.tolist(), strict=True)) == cases


# Matching


def test_thresholds_are_reached_from_the_high_one_on_and_missed_below_the_low_one():
    objects = boxes_of((0, 0, 8, 8))
    candidates = boxes_of((0, 0, 8, 8), (0, 0, 8, 4), (0, 0, 8, 2), (0, 0, 8, 1.9))  # IoU 1, .5, .25, less
    assert match(candidates, objects, 0.25, 0.5).tolist() == [0, 0, IGNORED, NEGATIVE]


def test_an_object_takes_its_best_anchor_from_the_floor_on():
    objects, anchors = boxes_of((0, 0, 10, 10)), boxes_of((0, 0, 10, 4), (0, 0, 10, 3.5), (50, 50, 60, 60))
    assert match(anchors, objects, 0.3, 0.7, 'none').tolist() == [IGNORED, IGNORED, NEGATIVE]
    assert match(anchors, objects, 0.3, 0.7, 'floor').tolist() == [0, IGNORED, NEGATIVE]
    assert match(anchors, objects, 0.3, 0.7, 'always').tolist() == [0, IGNORED, NEGATIVE]


def test_below_the_floor_only_detectron2_takes_the_best_anchor():
    objects, anchors = boxes_of((0, 0, 10, 10)), boxes_of((0, 0, 10, 2), (50, 50, 60, 60))
    assert match(anchors, objects, 0.3, 0.7, 'floor').tolist() == [NEGATIVE, NEGATIVE]
    assert match(anchors, objects, 0.3, 0.7, 'always').tolist() == [0, NEGATIVE]


def test_an_object_that_touches_no_anchor_takes_none_in_mmdet_and_all_in_detectron2():
    objects, anchors = boxes_of((500, 500, 510, 510)), random_boxes(9, 0)
    assert match(anchors, objects, 0.3, 0.7, 'floor').tolist() == [NEGATIVE] * 9
    assert match(anchors, objects, 0.3, 0.7, 'always').tolist() == [0] * 9


def test_anchors_that_share_the_first_place_are_all_positive():
    objects, anchors = boxes_of((2, 2, 6, 6)), boxes_of((0, 0, 6, 6), (2, 2, 8, 8), (0, 0, 20, 20))  # 16 / 36 twice
    for best in ('floor', 'always'):
        assert match(anchors, objects, 0.3, 0.7, best).tolist() == [0, 0, NEGATIVE]


def test_the_best_anchor_of_two_objects_goes_to_the_last_in_mmdet_and_to_the_nearer_in_detectron2():
    anchors = boxes_of((0, 0, 10, 10), (80, 80, 90, 90))
    objects = boxes_of((0, 0, 10, 6), (0, 5, 10, 10))  # IoU .6 and .5 with the same anchor
    assert match(anchors, objects, 0.3, 0.7, 'floor').tolist() == [1, NEGATIVE]
    assert match(anchors, objects, 0.3, 0.7, 'always').tolist() == [0, NEGATIVE]


def test_being_best_outranks_a_high_overlap_with_another_object_in_mmdet_only():
    anchors, objects = boxes_of((0, 0, 10, 10)), boxes_of((0, 0, 10, 9), (0, 0, 10, 4))  # IoU .9 and .4
    assert match(anchors, objects, 0.3, 0.7, 'none').tolist() == [0]
    assert match(anchors, objects, 0.3, 0.7, 'floor').tolist() == [1]
    assert match(anchors, objects, 0.3, 0.7, 'always').tolist() == [0]


def test_of_equal_overlaps_the_first_object_counts():
    objects = boxes_of((0, 0, 10, 10), (0, 0, 10, 10))
    assert match(boxes_of((0, 0, 10, 9)), objects, 0.3, 0.7).tolist() == [0]


@pytest.mark.parametrize('best', ['none', 'floor', 'always'])
@pytest.mark.parametrize('seed', range(4))
def test_matching_equals_a_loop_over_boxes_and_objects(best, seed):
    objects = torch.cat([random_boxes(5, seed), boxes_of((900, 900, 903, 950))][:1 + seed % 2])
    candidates = torch.cat([random_boxes(200, 10 + seed), objects[:2], objects[:1] + 0.25])
    for low, high in ((0.3, 0.7), (0.5, 0.5)):
        found = match(candidates, objects, low, high, best)
        np.testing.assert_array_equal(found.numpy(), assign(candidates.numpy(), objects.numpy(), low, high, best))


@pytest.mark.parametrize('seed', range(4))
def test_detectron2s_matching_equals_torchvisions(seed):
    objects, candidates = random_boxes(6, seed), random_boxes(300, 20 + seed)
    expected = Matcher(0.7, 0.3, allow_low_quality_matches=True)(box_iou(objects, candidates))
    assert match(candidates, objects, 0.3, 0.7, 'always').tolist() == expected.tolist()  # -1 and -2 mean the same


@pytest.mark.parametrize('best', ['none', 'floor', 'always'])
def test_without_objects_all_is_background(best):
    assert match(random_boxes(3, 0), boxes_of(), 0.3, 0.7, best).tolist() == [NEGATIVE] * 3
    assert match(boxes_of(), random_boxes(3, 0), 0.3, 0.7, best).tolist() == []
    assert match(boxes_of(), boxes_of(), 0.3, 0.7, best).tolist() == []


# Sampling


def matched_of(positives: int, negatives: int, ignored: int = 0) -> torch.Tensor:
    rows = torch.tensor([3] * positives + [NEGATIVE] * negatives + [IGNORED] * ignored)
    return rows[torch.randperm(len(rows), generator=generator(7))]


@pytest.mark.parametrize(('positives', 'negatives', 'number', 'share', 'drawn'), [
    (300, 900, 256, 0.5, (128, 128)),
    (20, 900, 256, 0.5, (20, 236)),  # negatives fill up
    (300, 30, 256, 0.5, (128, 30)),  # positives do not
    (0, 900, 256, 0.5, (0, 256)),
    (300, 900, 512, 0.25, (128, 384)),
    (9, 9, 7, 0.25, (1, 6)),  # rounded down
    (4, 0, 2, 0.5, (1, 0)),
    (0, 0, 256, 0.5, (0, 0))])
def test_at_most_a_share_is_positive_and_negatives_fill_up(positives, negatives, number, share, drawn):
    matched = matched_of(positives, negatives, ignored=50)
    positive, negative = sample(matched, number, share, generator(0))
    assert (len(positive), len(negative)) == drawn
    assert (matched[positive] == 3).all() and (matched[negative] == NEGATIVE).all()
    for found in (positive, negative):
        assert found.tolist() == sorted(set(found.tolist()))


def test_samples_are_a_function_of_the_key():
    matched = matched_of(300, 900)
    first, again, other = (sample(matched, 256, 0.5, generator(k)) for k in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_each_candidate_is_drawn_equally_often():
    matched, counts = matched_of(20, 60), torch.zeros(80)
    for key in range(500):
        for found in sample(matched, 20, 0.25, generator(key)):
            counts[found] += 1
    expected = torch.where(matched == 3, 500 * 5 / 20, 500 * 15 / 60)
    assert (counts - expected).abs().max() < 5 * math.sqrt(125)  # five standard deviations


# Coding


def test_targets_are_shifts_in_sizes_and_logarithms_of_ratios():
    found = encode(boxes_of((10, 20, 30, 60)), boxes_of((20, 20, 60, 40)), RCNN_STDS)
    torch.testing.assert_close(
        found, torch.tensor([[20 / 20 / 0.1, -10 / 40 / 0.1, math.log(2) / 0.2, math.log(0.5) / 0.2]]))


@pytest.mark.parametrize('stds', [RCNN_STDS, (1.0, 1.0, 1.0, 1.0)])
def test_targets_equal_torchvisions(stds):
    a, b = random_boxes(50, 1), random_boxes(50, 2)
    coder = BoxCoder(tuple(1 / s for s in stds))
    torch.testing.assert_close(encode(a, b, stds), coder.encode_single(b, a), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('clamp_below', [False, True])
def test_decoding_undoes_encoding(clamp_below):
    a, b = random_boxes(50, 1), random_boxes(50, 2)
    found = boxes.decode(a, encode(a, b, RCNN_STDS)[:, None], RCNN_STDS, (1000, 1000), clamp_below)[:, 0]
    torch.testing.assert_close(found, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(('clamp_below', 'least'), [(True, 100 / 62.5), (False, 100 * math.exp(-20))])
def test_growth_is_clamped_at_both_ends_or_from_above_only(clamp_below, least):
    box, deltas = boxes_of((1000, 1000, 1100, 1100)), torch.tensor([[[0, 0, 100.0, 5.0], [0, 0, -100.0, -100.0]]])
    found = boxes.decode(box, deltas, RCNN_STDS, HUGE, clamp_below)[0]
    width, height = (found[:, 2:] - found[:, :2]).unbind(1)
    assert width.tolist() == pytest.approx([min(6250, 1050 + 3125), least], rel=1e-3, abs=1e-3)  # cut at 0
    assert height.tolist() == pytest.approx([100 * math.e, least], rel=1e-3, abs=1e-3)


def test_the_clamp_is_of_the_scaled_delta():
    found = boxes.decode(boxes_of((5000, 5000, 5100, 5100)), torch.tensor([[[0, 0, SCALE_CLAMP / 0.2, 10.0]]]),
                         RCNN_STDS, HUGE, True)[0, 0]
    assert float(found[2] - found[0]) == pytest.approx(6250, rel=1e-4)
    assert float(found[3] - found[1]) == pytest.approx(100 * math.exp(2), rel=1e-4)


@pytest.mark.parametrize('clamp_below', [False, True])
@pytest.mark.parametrize('stds', [RCNN_STDS, (1.0, 1.0, 1.0, 1.0)])
def test_extreme_deltas_decode_as_in_a_loop(clamp_below, stds):
    rng = np.random.default_rng(3)
    given, deltas = random_boxes(60, 4), torch.tensor(rng.normal(0, 8, (60, 3, 4)), dtype=torch.float32)
    found = boxes.decode(given, deltas, stds, (90, 120), clamp_below).numpy()
    for i, k in np.ndindex(60, 3):
        expected = from_deltas(given[i].numpy(), deltas[i, k].numpy(), stds, (90, 120), clamp_below)
        np.testing.assert_allclose(found[i, k], expected, rtol=1e-4, atol=1e-3)


def test_decoding_without_the_lower_clamp_equals_torchvisions():
    given, deltas = random_boxes(60, 4), 5 * torch.randn(60, 4, generator=generator(0))
    expected = BoxCoder((10.0, 10.0, 5.0, 5.0)).decode_single(deltas, given)
    expected = torch.stack([expected[:, 0].clamp(0, 120), expected[:, 1].clamp(0, 90), expected[:, 2].clamp(0, 120),
                            expected[:, 3].clamp(0, 90)], 1)
    found = boxes.decode(given, deltas[:, None], RCNN_STDS, (90, 120), clamp_below=False)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_boxes_are_cut_at_width_and_height():
    found = boxes.clip(boxes_of((-5, -6, 200, 300), (10, 20, 30, 40)), (90, 120))
    assert found.tolist() == [[0, 0, 120, 90], [10, 20, 30, 40]]
