"""Masks: from the annotation to pixels, to targets of the mask head, and from its output back to the image."""
import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco

from simsiam_models.benchmarks.detection import masks as module
from simsiam_models.benchmarks.detection.masks import (
    encode_masks,
    encode_pasted,
    mask_targets,
    paste_masks,
    rasterize,
)
from simsiam_models.benchmarks.pixels import resize_mask

TRIANGLE, SQUARE = [1.0, 1.0, 9.0, 1.0, 9.0, 7.0], [10, 2, 14, 2, 14, 9, 10, 9]
NEW, OLD, NEAR = 34, 6, 17


def blobs(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """(n, height, width) bool: random ellipses, some of them cut by the edge."""
    rng, y, x = np.random.default_rng(seed), np.arange(height)[:, None], np.arange(width)
    centre, radius = rng.uniform(0, (height, width), (n, 2)), rng.uniform(2, (height / 2, width / 2), (n, 2))
    return np.stack([
        ((y - c[0]) / r[0]) ** 2 + ((x - c[1]) / r[1]) ** 2 < 1 for c, r in zip(centre, radius, strict=True)])


def test_the_mask_of_several_polygons_is_their_union_as_pycocotools_draws_them():
    got = rasterize([TRIANGLE, SQUARE], 12, 16)
    each = [coco.decode(coco.frPyObjects([p], 12, 16))[:, :, 0] for p in (TRIANGLE, SQUARE)]
    np.testing.assert_array_equal(got, each[0] | each[1])
    assert got.shape == (12, 16) and got.dtype == np.uint8 and got.sum() == each[0].sum() + 28


def test_a_polygon_of_two_points_covers_nothing_wherever_it_stands():
    for polygons in ([[1, 1, 5, 5], SQUARE], [SQUARE, [1, 1, 5, 5], []]):
        np.testing.assert_array_equal(rasterize(polygons, 12, 16), rasterize([SQUARE], 12, 16))


@pytest.mark.parametrize('seed', range(4))
def test_run_lengths_are_read_as_pycocotools_writes_them(seed: int):
    mask = [blobs(1, 40, 50)[0], np.random.default_rng(1).random((17, 5)) < 0.5, np.zeros((3, 2)), np.ones((90, 70))]
    mask = mask[seed].astype(np.uint8)
    runs = coco.encode(np.asfortranarray(mask))
    edges = np.flatnonzero(np.diff(mask.T.ravel(), prepend=0))  # a list starts with the length of background
    counts = np.diff([0, *edges, mask.size]).tolist()
    size = list(mask.shape)
    for written in (runs['counts'], runs['counts'].decode(), counts):
        np.testing.assert_array_equal(rasterize({'size': size, 'counts': written}, *size), mask)


@pytest.mark.parametrize('segmentation, message', [
    ([], r'segmentation \[\]: must be run lengths, or a list of polygons'),
    ([[1, 1, 5, 5]], 'at least one with three points'),
    (None, 'segmentation null'), ('polygon', 'segmentation polygon'),
    ([TRIANGLE + [3]], r'polygon \[1.0, .*: must be an even number of coordinates'),
    ([TRIANGLE, 7], 'polygon 7: must be an even number'), ([[TRIANGLE]], r'polygon \[\[1.0'),
    ([['a', 1, 5, 1, 5, 5]], 'polygon .*: must be an even'), ([[None, 1, 5, 1, 5, 5]], 'polygon'),
    ([[float('nan'), 1, 5, 1, 5, 5]], r'polygon \[NaN'), ([[1e9, 1, 5, 1, 5, 5]], 'polygon'),
    ({'counts': [96, 96]}, r'run lengths of size null: the image has height and width \[12, 16\]'),
    ({'size': [16, 12], 'counts': [96, 96]}, r'size \[16, 12\]'),
    ({'size': [12, 16]}, 'run lengths null: must be integers from 0 that add up to 12 x 16 pixels'),
    ({'size': [12, 16], 'counts': [96, 95]}, r'run lengths \[96, 95\]'),
    ({'size': [12, 16], 'counts': [200, -8]}, r'run lengths \[200, -8\]'),
    ({'size': [12, 16], 'counts': [96.5, 95.5]}, 'run lengths'), ({'size': [12, 16], 'counts': []}, 'run lengths'),
    ({'size': [12, 16], 'counts': ''}, 'run lengths'), ({'size': [12, 16], 'counts': b'S1'}, 'run lengths S1'),
    ({'size': [12, 16], 'counts': 'zzzz'}, 'run lengths zzzz'), ({'size': [12, 16], 'counts': 'P'}, 'run lengths P'),
    ({'size': [12, 16], 'counts': '\u4e2d'}, 'run lengths'), ({'size': [12, 16], 'counts': [2**70]}, 'run lengths')])
def test_a_segmentation_that_is_none_is_refused(segmentation: Any, message: str):
    with pytest.raises(ValueError, match=message):
        rasterize(segmentation, 12, 16)


@pytest.mark.parametrize('height, width, h, w', [(7, 9, 14, 18), (30, 40, 11, 13), (20, 17, 53, 90), (5, 5, 5, 5)])
def test_a_resized_mask_has_the_pixels_at_the_floor_of_the_position(height: int, width: int, h: int, w: int):
    mask = np.random.default_rng(0).integers(0, 2, (height, width), np.uint8)
    got = resize_mask(mask, h, w)
    for y in range(h):
        for x in range(w):
            old = int(y * (1 / (h / height))), int(x * (1 / (w / width)))
            assert got[y, x] == mask[min(old[0], height - 1), min(old[1], width - 1)]


def test_the_position_is_rounded_as_in_opencv():
    """Pixel NEAR of NEW lies at an integer of OLD; OpenCV 4.5 to 5.0 return the pixel before it."""
    got = resize_mask(np.arange(OLD, dtype=np.int64)[None], 1, NEW)[0]
    assert NEAR * OLD % NEW == 0 and got[NEAR] == NEAR * OLD // NEW - 1


def mean_in_cells(mask: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """Aligned RoIAlign by its definition: a cell has as many samples as pixels; beyond the image, its edge repeats."""
    x1, y1, x2, y2 = box - 0.5
    out, (height, width) = np.zeros((size, size)), mask.shape
    ny, nx = (max(1, int(np.ceil(length / size))) for length in (y2 - y1, x2 - x1))
    for i in range(size):
        for j in range(size):
            ys = y1 + (y2 - y1) / size * (i + (np.arange(ny) + 0.5) / ny)
            xs = x1 + (x2 - x1) / size * (j + (np.arange(nx) + 0.5) / nx)
            values = [bilinear(mask, np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)) for y in ys for x in xs]
            out[i, j] = np.mean(values)
    return out


def bilinear(image: np.ndarray, y: float, x: float) -> float:
    """Between the four pixels around the position; outside of the image there are zeros."""
    top, left, value = int(np.floor(y)), int(np.floor(x)), 0.0
    for i, wy in ((top, top + 1 - y), (top + 1, y - top)):
        for j, wx in ((left, left + 1 - x), (left + 1, x - left)):
            if 0 <= i < image.shape[0] and 0 <= j < image.shape[1]:
                value += wy * wx * image[i, j]
    return value


def test_a_target_is_the_mean_of_the_mask_in_each_cell_cut_at_a_half():
    height, width = 64, 96
    masks, rng = blobs(6, height, width), np.random.default_rng(3)
    ends = [[axis[0], axis[-1]] for m in masks for axis in (np.flatnonzero(m.any(0)), np.flatnonzero(m.any(1)))]
    boxes = np.reshape(ends, (6, 2, 2)).transpose(0, 2, 1).reshape(6, 4) + rng.uniform(-4, 4, (6, 4))
    got = mask_targets(torch.from_numpy(masks).byte(), torch.from_numpy(boxes).float(), 14)
    assert got.shape == (6, 14, 14) and got.dtype == torch.float32
    shares, unsure = [], 0
    for k in range(6):
        share = mean_in_cells(masks[k].astype(float), np.clip(boxes[k], 0, [width, height] * 2), 14)
        clear = np.abs(share - 0.5) > 1e-4
        np.testing.assert_array_equal(got[k].numpy()[clear], (share >= 0.5)[clear])
        shares.append(share)
        unsure += (~clear).sum()
    assert unsure < 60 and 0.1 < np.mean(np.array(shares) >= 0.5) < 0.9


def test_a_cell_that_is_half_covered_belongs_to_the_target():
    mask = torch.zeros(1, 32, 32, dtype=torch.uint8)
    mask[0, :, :3] = 1
    box = torch.tensor([[0.0, 0.0, 28.0, 28.0]])  # cells of 2 pixels: the second has half of its samples in the mask
    assert mask_targets(mask, box, 14)[0].sum(0).tolist() == [14, 14] + [0] * 12


@pytest.mark.parametrize('height, width', [(33, 50), (64, 50), (33, 64), (64, 64)])
def test_a_mask_ends_where_the_padding_of_its_image_begins(height: int, width: int):
    """mmdetection pads masks to multiples of 32 before it computes targets."""
    masks, rng = torch.from_numpy(blobs(8, height, width, 1)), np.random.default_rng(0)
    masks[0] = True
    low = rng.uniform(0, 30, (8, 2))
    high = np.minimum(low + rng.uniform(2, 40, (8, 2)), [width, height])
    boxes = torch.tensor(np.concatenate([low, high], 1)).float()
    boxes[0] = torch.tensor([width - 1.0, height - 1.0, width, height])  # near the padding, the mask fades to a quarter
    padded = F.pad(masks, (0, -width % 32, 0, -height % 32))
    got = mask_targets(masks, boxes, 28)
    torch.testing.assert_close(got, mask_targets(padded, boxes, 28), rtol=0, atol=0)
    assert mask_targets(masks, boxes, 28, divisor=1)[0].all()
    assert got[0].all().item() == (height % 32 == 0 or width % 32 == 0)


def test_several_boxes_may_have_the_same_mask():
    masks = torch.from_numpy(blobs(3, 40, 40))
    boxes, matched = torch.tensor([[2, 3, 30, 35], [0, 0, 40, 40], [5.5, 8, 20, 22.25]]), torch.tensor([2, 0, 2])
    got = mask_targets(masks, boxes, 7, matched)
    torch.testing.assert_close(got, mask_targets(masks[matched], boxes, 7), rtol=0, atol=0)
    assert mask_targets(masks, boxes[:0], 7, matched[:0]).shape == (0, 7, 7)
    assert mask_targets(masks[:0], boxes[:0], 7).shape == (0, 7, 7)


def outputs(n: int, cells: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and boxes; some boxes reach over the edges."""
    rng = np.random.default_rng(5)
    low = rng.uniform(-6, (width - 5, height - 5), (n, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.3, 40, (n, 2))], 1)
    return torch.from_numpy(rng.random((n, cells, cells))).float(), torch.from_numpy(boxes).float()


def test_a_pasted_mask_is_the_output_at_the_centre_of_each_pixel():
    p, boxes = outputs(5, 7, 30, 40)
    got = paste_masks(p, boxes, 30, 40)
    assert got.shape == (5, 30, 40) and got.dtype == torch.bool and 50 < got.sum() < 3000
    for k, (x1, y1, x2, y2) in enumerate(boxes.double().tolist()):
        for y in range(30):
            for x in range(40):
                value = bilinear(
                    p[k].numpy(), (y + 0.5 - y1) / (y2 - y1) * 7 - 0.5, (x + 0.5 - x1) / (x2 - x1) * 7 - 0.5)
                assert got[k, y, x].item() == (value >= 0.5) or abs(value - 0.5) < 1e-4


@pytest.mark.parametrize('threshold', [0.01, 0.3, 0.5, 0.9])
def test_only_the_part_near_the_box_is_computed_and_the_rest_is_empty(threshold: float):
    p, boxes = outputs(20, 5, 50, 64)
    x = (torch.arange(64) + 0.5 - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    y = (torch.arange(50) + 0.5 - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, 50, -1), y[:, :, None].expand(-1, -1, 64)], 3)
    whole = F.grid_sample(p[:, None], grid, align_corners=False)[:, 0]
    got, clear = paste_masks(p, boxes, 50, 64, threshold), (whole - threshold).abs() > 1e-6
    assert torch.equal(got & clear, (whole >= threshold) & clear) and clear.float().mean() > 0.999


def test_a_box_without_area_or_outside_of_the_image_has_an_empty_mask():
    boxes = torch.tensor([
        [5, 5, 5, 9], [5, 5, 9, 5], [9, 9, 5, 5], [float('nan'), 1, 2, 3], [0, 0, float('inf'), 5],
        [-90, -90, -50, -50], [100, 3, 120, 9], [1e30, 1, 2e30, 5], [2, 2, 6, 6]])
    got = paste_masks(torch.ones(9, 14, 14), boxes, 10, 20)
    assert got.sum((1, 2)).tolist() == [0] * 8 + [16]
    assert paste_masks(torch.ones(0, 14, 14), boxes[:0], 10, 20).shape == (0, 10, 20)


def test_encoded_masks_decode_to_the_same_pixels_and_can_be_written_as_json():
    masks = blobs(4, 30, 21)
    for given in (masks, torch.from_numpy(masks), masks.astype(np.uint8)):
        runs = json.loads(json.dumps(encode_masks(given)))
        assert [r['size'] for r in runs] == [[30, 21]] * 4
        np.testing.assert_array_equal(coco.decode(runs).transpose(2, 0, 1), masks)
    assert encode_masks(masks[:0]) == []


def test_large_masks_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch):
    p, boxes = outputs(7, 14, 40, 30)
    whole = encode_masks(paste_masks(p, boxes, 40, 30))
    assert encode_pasted(p, boxes, 40, 30) == whole
    held = []
    monkeypatch.setattr(module, 'CHUNK', 3 * 40 * 30)
    monkeypatch.setattr(module, 'encode_masks', lambda masks: held.append(len(masks)) or encode_masks(masks))
    assert encode_pasted(p, boxes, 40, 30) == whole and held == [3, 3, 1]
    assert encode_pasted(p[:0], boxes[:0], 40, 30) == []
