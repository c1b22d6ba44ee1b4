"""The images of a detector: their sizes and boxes, who is in which batch, and which cannot be read."""
import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tv

from simsiam_models.benchmarks.detection.data import (
    BatchPlan,
    EvalLoader,
    Item,
    Preparation,
    TrainLoader,
    prepare,
    resize_boxes,
)
from simsiam_models.benchmarks.detection.masks import rasterize
from simsiam_models.benchmarks.pixels import fit_size, resize_image, resize_mask
from simsiam_models.data import DataError, UnreadableError
from simsiam_models.runtime.distributed import World

ALONE = World(0, 1, torch.device('cpu'))
TWO = [World(rank, 2, torch.device('cpu')) for rank in range(2)]
SMALL = Preparation((20, 24, 30), 50, 0.5, masks=True)


class Rectangles:
    """Stands in for ObjectImages: image i has i % 4 bright rectangles; `broken` ones cannot be read."""

    name, has_masks = 'rectangles', True

    def __init__(self, sizes: list[tuple[int, int]], broken: tuple[int, ...] = ()) -> None:
        self.sizes, self.broken = np.array(sizes), set(broken)
        self.extra: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.sizes)

    def corners(self, i: int) -> np.ndarray:
        h, w = self.sizes[i]
        u = np.random.default_rng(i).random((i % 4, 4))
        low = np.floor(u[:, :2] * (w - 6, h - 6))
        return np.concatenate([low, np.floor(low + 3 + u[:, 2:] * ((w, h) - low - 3))], 1)

    def read(self, i: int) -> np.ndarray:
        if i in self.broken:
            raise UnreadableError(f'{i}.jpg: cannot be read')
        image = np.random.default_rng(i).integers(0, 60, (*self.sizes[i], 3), np.uint8)
        for x1, y1, x2, y2 in self.corners(i).astype(int):
            image[y1:y2, x1:x2] = 200
        return image

    def training_objects(self, i: int, variant: str) -> SimpleNamespace:
        boxes = self.corners(i)
        polygons = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes.tolist()]
        return SimpleNamespace(
            boxes=boxes.astype(np.float32), labels=np.arange(len(boxes)) + i,
            segmentations=self.extra.get(i, polygons))


def mixed(n: int, broken: tuple[int, ...] = ()) -> Rectangles:
    """Every third image is upright, every fifth square."""
    return Rectangles([(40, 30) if i % 3 == 0 else (33, 33) if i % 5 == 0 else (30, 41 + i) for i in range(n)], broken)


def loader(images: Any, world: World = ALONE, batch: int = 4, workers: int = 0, **changed: Any) -> TrainLoader:
    p = changed.pop('p', SMALL)
    return TrainLoader(images, np.arange(len(images)), p, batch, world, seed=changed.pop('seed', 3), workers=workers)


def assert_same(a: Item, b: Item) -> None:
    assert a.row == b.row and a.size == b.size
    for x, y in zip((a.image, *a.target), (b.image, *b.target), strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype


@pytest.mark.parametrize('height, width, short, long, expected', [
    (375, 500, 800, 1333, (800, 1067)), (500, 375, 800, 1333, (1067, 800)), (300, 1000, 800, 1333, (400, 1333)),
    (1000, 300, 800, 1333, (1333, 400)), (333, 500, 480, 1333, (480, 721)), (480, 640, 800, 1333, (800, 1067)),
    (800, 800, 800, 1333, (800, 800)), (1, 5000, 800, 1333, (1, 1333)), (3, 2, 128, 128, (128, 85))])
def test_the_short_side_is_scaled_unless_the_long_side_would_be_too_long(height, width, short, long, expected):
    assert fit_size(height, width, short, long) == expected


def test_sides_are_rounded_to_the_nearest_and_not_down():
    for h, w, short in itertools.product(range(300, 501, 17), range(300, 501, 13), range(480, 801, 32)):
        assert fit_size(h, w, short, 10_000) == (
            (short, int(w * short / h + 0.5 + 1e-9)) if h <= w else (int(h * short / w + 0.5 + 1e-9), short))


def opencv_linear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """OpenCV's INTER_LINEAR for 8 bits: weights of 11 bits, of which the sum over a row loses 4."""
    def weights(new: int, old: int) -> tuple[np.ndarray, ...]:
        at = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
        first = np.floor(at).astype(int)
        part = np.where((first < 0) | (first >= old - 1), 0, at - first)
        first = np.clip(first, 0, old - 1)
        return first, np.minimum(first + 1, old - 1), np.rint((1 - part) * 2048), np.rint(part * 2048)
    left, right, a, b = (x.astype(np.int64) for x in weights(width, image.shape[1]))
    top, bottom, c, d = (x.astype(np.int64) for x in weights(height, image.shape[0]))
    rows = (image[:, left] * a[:, None] + image[:, right] * b[:, None]) >> 4
    c, d = c[:, None, None], d[:, None, None]
    return ((rows[top] * c >> 16) + (rows[bottom] * d >> 16) + 2 >> 2).astype(np.uint8)


def texture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize('height, width', [(80, 107), (48, 64), (19, 25), (40, 33), (1, 3), (38, 50)])
def test_mmdet_resizes_as_opencv_to_one_level(height: int, width: int):
    image = texture(38, 50)
    got = resize_image(image, height, width, 'mmdet')
    assert got.shape == (3, height, width) and got.dtype == torch.uint8
    off = got.permute(1, 2, 0).numpy().astype(int) - opencv_linear(image, height, width)
    assert np.abs(off).max() <= 1 and np.abs(off).mean() < 0.5


def test_mmdet_does_not_smooth_before_it_makes_an_image_smaller():
    stripes = np.zeros((40, 60, 3), np.uint8)
    stripes[:, ::6] = 255  # a third of the width takes columns 1, 4, 7, ..., which are all black
    plain, smooth = (resize_image(stripes, 10, 20, variant).float() for variant in ('mmdet', 'detectron2'))
    assert plain.max() == 0 and smooth.mean() == pytest.approx(255 / 6, abs=2)


@pytest.mark.parametrize('height, width', [(80, 107), (19, 25), (40, 33)])
def test_detectron2_resizes_as_pillow(height: int, width: int):
    image = texture(38, 50)
    rows = Image.fromarray(image).resize((width, 38), Image.Resampling.BILINEAR)  # in the order of Pillow before 13
    expected = np.asarray(rows.resize((width, height), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize_image(image, height, width, 'detectron2').permute(1, 2, 0), expected)


@pytest.mark.parametrize('variant', ['mmdet', 'detectron2'])
def test_an_image_that_cannot_be_written_to_is_resized_too(variant: str):
    """As FileImages decodes gray files: one channel, three times."""
    gray = np.broadcast_to(texture(38, 50)[:, :, :1], (38, 50, 3))
    got = resize_image(gray, 20, 30, variant)
    assert torch.equal(got, resize_image(np.array(gray), 20, 30, variant)) and torch.equal(got[0], got[2])


def test_boxes_grow_by_the_real_ratios_and_end_at_the_image():
    boxes = np.array([[0, 0, 500, 375], [10, 20, 30, 40], [-5, 10, 490, 400]], np.float32)
    got = resize_boxes(boxes, (375, 500), (800, 1067))
    x, y = 1067 / 500, 800 / 375
    np.testing.assert_allclose(
        got, [[0, 0, 1067, 800], [10 * x, 20 * y, 30 * x, 40 * y], [0, 10 * y, 490 * x, 800]], rtol=1e-6)
    whole = tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=(375, 500))
    np.testing.assert_allclose(got, tv.clamp_bounding_boxes(tv.resize(whole, [800, 1067])), atol=1e-3)
    assert got.dtype == np.float32 and resize_boxes(np.zeros((0, 4)), (5, 5), (7, 7)).shape == (0, 4)


@pytest.mark.parametrize('variant', ['mmdet', 'detectron2'])
@pytest.mark.parametrize('i', range(6))
def test_image_boxes_and_masks_are_resized_and_flipped_together(variant: str, i: int):
    images = mixed(6)
    plain, flipped = (prepare(images, i, (0, 0, i), Preparation((50,), 70, p, variant, True)) for p in (0, 1))
    h, w = fit_size(*images.sizes[i].tolist(), 50, 70)
    assert plain.size == tuple(images.sizes[i]) and plain.row == i and plain.image.shape == (3, h, w)
    assert torch.equal(plain.image, resize_image(images.read(i), h, w, variant))
    objects = images.training_objects(i, variant)
    np.testing.assert_array_equal(plain.target.boxes, resize_boxes(objects.boxes, plain.size, (h, w)))
    assert plain.target.labels.tolist() == objects.labels.tolist()
    for mask, segmentation in zip(plain.target.masks, objects.segmentations, strict=True):
        np.testing.assert_array_equal(mask, resize_mask(rasterize(segmentation, *plain.size), h, w))
    boxes = tv_tensors.BoundingBoxes(plain.target.boxes, format='XYXY', canvas_size=(h, w))
    torch.testing.assert_close(flipped.target.boxes, tv.horizontal_flip(boxes).as_subclass(torch.Tensor))
    assert torch.equal(flipped.image, plain.image.flip(2))
    assert torch.equal(flipped.target.masks, plain.target.masks.flip(2))
    assert [x.dtype for x in plain.target] == [torch.float32, torch.int64, torch.uint8]
    for x in (*flipped.target, flipped.image):
        assert x.is_contiguous()


def test_a_mask_lies_in_its_box_and_on_its_object():
    images = Rectangles([(60, 90)] * 4)
    item = prepare(images, 3, (1, 2, 3), Preparation((100,), 200, 1, masks=True))
    for box, mask in zip(item.target.boxes, item.target.masks, strict=True):
        rows, columns = mask.nonzero().T
        found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        assert (found - box).abs().max() < 2.5  # pycocotools includes the pixels of the edge
        assert item.image.float().mean(0)[mask.bool()].median() > 140


def test_an_image_without_objects_that_train_has_an_empty_target():
    target = prepare(mixed(1), 0, (0, 0, 0), SMALL).target
    assert target.boxes.shape == (0, 4) and target.labels.shape == (0,) and target.masks.shape[0] == 0
    assert prepare(mixed(2), 1, (0, 0, 1), Preparation((20,), 50)).target.masks is None


def test_detectron2_drops_a_box_that_has_no_area_in_the_image():
    images = mixed(4)
    objects = images.training_objects(3, '')
    objects.boxes[1] = [35, 3, 50, 9]  # beyond the right edge
    images.training_objects = lambda i, variant: objects
    for variant, kept in (('detectron2', [3, 5]), ('mmdet', [3, 4, 5])):
        item = prepare(images, 3, (0, 0, 0), Preparation((20,), 50, variant=variant, masks=True))
        assert item.target.labels.tolist() == kept
        assert len(item.target.boxes) == len(item.target.masks) == len(kept)


def test_each_length_of_the_short_side_is_as_frequent_and_half_of_the_images_are_flipped():
    images, p = Rectangles([(64, 80)] * 2), Preparation(tuple(range(8, 30, 2)), 999, 0.5)
    items = [prepare(images, 1, (7, k // 300, k % 300), p) for k in range(1200)]
    counts = Counter(item.image.shape[1] for item in items)
    assert sorted(counts) == list(p.shorts)
    assert all(abs(n - 1200 / 11) < 4 * (1200 / 11) ** 0.5 for n in counts.values())  # four standard deviations
    left = images.corners(1)[0, 0] / 80
    places = [item.target.boxes[0, 0].item() / item.image.shape[2] for item in items]
    assert 530 < sum(abs(x - left) > 0.01 for x in places) < 670


def test_an_image_is_a_function_of_seed_epoch_and_index():
    images, p = mixed(8), Preparation(tuple(range(20, 60)), 200, 0.5, masks=True)
    shapes = {key: prepare(images, 7, key, p).image.shape for key in itertools.product(range(3), range(3), range(3))}
    assert len(set(shapes.values())) > 12
    for key in shapes:
        assert_same(prepare(images, 7, key, p), prepare(images, 7, key, p))


@pytest.mark.parametrize('wide, high, batch', [(10, 6, 4), (3, 1, 8), (8, 0, 4), (0, 5, 2), (7, 7, 1)])
def test_batches_hold_one_orientation_and_an_epoch_holds_every_image(wide: int, high: int, batch: int):
    landscape = np.random.default_rng(0).permutation(np.arange(wide + high) < wide)
    plan = BatchPlan(landscape, batch, 1)
    assert plan.per_epoch == -(-wide // batch) + -(-high // batch)
    for epoch in range(3):
        found = [plan.at(epoch * plan.per_epoch + k) for k in range(plan.per_epoch)]
        assert all(e == epoch and len(b) == batch and len(set(landscape[b])) == 1 for e, b in found)
        counts = np.bincount(np.concatenate([b for _, b in found]), minlength=wide + high)
        for group in (counts[landscape], counts[~landscape]):  # each once, and as few twice as fill the last batch
            assert not len(group) or group.min() >= 1 and group.max() - group.min() <= 1
            assert group.sum() == -(-len(group) // batch) * batch


def test_the_plan_is_a_function_of_seed_and_epoch():
    landscape = np.arange(40) % 3 > 0
    walk = BatchPlan(landscape, 4, 5)
    steps = [walk.at(step)[1].tolist() for step in range(3 * walk.per_epoch)]
    for step in (17, 30, 2, 11, 17):
        assert BatchPlan(landscape, 4, 5).at(step)[1].tolist() == steps[step] == walk.at(step)[1].tolist()
    assert steps[:walk.per_epoch] != steps[walk.per_epoch:2 * walk.per_epoch]
    assert BatchPlan(landscape, 4, 6).at(0)[1].tolist() != steps[0]


def test_wide_and_high_batches_are_mixed():
    plan = BatchPlan(np.arange(200) < 100, 4, 0)
    sides = [bool(plan.at(step)[1][0] < 100) for step in range(50)]
    assert sum(sides) == 25 and 15 < sum(a != b for a, b in itertools.pairwise(sides)) < 35


def test_a_square_image_counts_as_upright():
    assert loader(mixed(16)).plan.landscape.tolist() == [i % 3 > 0 and i % 5 > 0 for i in range(16)]


@pytest.mark.parametrize('workers', [1, 3])
def test_threads_change_nothing(workers: int):
    images = mixed(20, broken=(7, 9))
    alone, threaded = loader(images), loader(images, workers=workers)
    for a, b in itertools.islice(zip(alone.load(0), threaded.load(0), strict=True), 14):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
        assert alone.unreadable == threaded.unreadable  # not those of batches that are read ahead
    assert sorted(alone.unreadable) == [7, 9]


def test_the_processes_together_read_what_one_reads():
    images = mixed(20, broken=(3,))
    whole, parts = loader(images), [loader(images, world) for world in TWO]
    for items, first, second in itertools.islice(
            zip(whole.load(0), *(part.load(0) for part in parts), strict=True), 12):
        assert len(first) == len(second) == 2
        joined = [first[0], second[0], first[1], second[1]]
        for x, y in zip(items, joined, strict=True):
            assert_same(x, y)
    assert whole.unreadable == parts[0].unreadable | parts[1].unreadable


def test_a_loader_continues_from_any_step():
    images = mixed(20, broken=(7,))
    walked = list(itertools.islice(loader(images).load(0), 12))
    for step in (1, 6, 11):
        for x, y in zip(walked[step], next(loader(images, workers=2).load(step)), strict=True):
            assert_same(x, y)


def test_the_next_of_its_orientation_replaces_an_image_that_cannot_be_read():
    good, images = mixed(30), mixed(30, broken=(4, 7))  # 4, 7 and 8 lie across; 5 and 6 are upright
    seen = 0
    for whole, items in itertools.islice(
            zip(loader(good).load(0), (broken := loader(images)).load(0), strict=True), broken.plan.per_epoch):
        for x, y in zip(whole, items, strict=True):
            if x.row in images.broken:
                seen += 1
                assert y.row == 8
                key = 3, 0, x.row  # size and flip as for the image it replaces
                assert_same(y, prepare(images, 8, key, SMALL))
            else:
                assert_same(x, y)
    assert seen >= 2 and broken.unreadable == {i: f'{i}.jpg: cannot be read' for i in (4, 7)}


def test_the_last_image_is_followed_by_the_first_and_then_by_those_of_the_other_orientation():
    plan = BatchPlan(np.array([True, False, True, False, True]), 2, 0)
    assert [list(plan.stand_ins(i)) for i in (4, 1)] == [[4, 0, 2, 1, 3], [1, 3, 0, 2, 4]]


def test_more_than_a_tenth_of_broken_images_is_an_error():
    with pytest.raises(DataError, match='rectangles: 3 of 20 images cannot be read, more than 10%; the first: 2.jpg'):
        list(itertools.islice(loader(mixed(20, (2, 5, 9))).load(0), 8))
    list(itertools.islice(loader(mixed(20, (2, 5))).load(0), 8))
    with pytest.raises(DataError, match='none of the 2 images can be read; the first: 0.jpg: cannot be read'):
        next(loader(mixed(2, (0, 1)), workers=1).load(0))


def test_the_broken_images_of_all_processes_count(monkeypatch: pytest.MonkeyPatch):
    reader = loader(mixed(20, (1, 5)), TWO[0])
    monkeypatch.setattr(World, 'gather', lambda self, mine: [mine, {9: '9.jpg: cannot be read'}])
    reader.unreadable = {1: '1.jpg: cannot be read'}
    reader.join()
    assert sorted(reader.unreadable) == [1, 9]
    reader.unreadable |= {5: '5.jpg: cannot be read'}
    with pytest.raises(DataError, match='3 of 20 images cannot be read'):
        reader.join()


@pytest.mark.parametrize('workers', [0, 2])
def test_a_segmentation_that_is_not_valid_names_its_image_and_object(workers: int):
    images = mixed(4)
    images.extra[3] = [*images.training_objects(3, '').segmentations[:2], [[1, 2, 3]]]
    with pytest.raises(DataError, match='rectangles: image 3: object 3 of those that train: polygon .* even number'):
        list(itertools.islice(loader(images, workers=workers).load(0), 2))


def test_an_image_of_another_size_than_annotated_stops_the_run():
    images = mixed(4)

    def read(i: int) -> np.ndarray:
        raise DataError(f'{i}.jpg: 40 x 30 pixels, but annotated as 30 x 40')
    images.read = read
    for items in (loader(images, workers=1).load(0), EvalLoader(images, np.arange(4), SMALL, ALONE, 1)):
        with pytest.raises(DataError, match='annotated as'):
            next(iter(items))


def test_a_training_without_images_or_without_wanted_masks_is_refused():
    with pytest.raises(ValueError, match='rectangles: no image to train on; give images with objects'):
        TrainLoader(mixed(4), np.arange(0), SMALL, 4, ALONE, seed=0, workers=0)
    images = mixed(4)
    images.has_masks = False
    with pytest.raises(ValueError, match='rectangles: no masks; give objects with a segmentation'):
        loader(images)
    loader(images, p=Preparation((20,), 50))


def test_only_the_given_rows_train_and_keep_their_own_numbers():
    images, rows = mixed(30), np.arange(1, 30, 2)
    reader = TrainLoader(images, rows, SMALL, 4, ALONE, seed=3, workers=0)
    items = [item for batch in itertools.islice(reader.load(0), reader.plan.per_epoch) for item in batch]
    assert {item.row for item in items} == set(rows.tolist())
    for item in items:
        assert_same(item, prepare(images, item.row, (3, 0, item.row), SMALL))


@pytest.mark.parametrize('workers', [0, 2])
def test_evaluation_reads_each_row_once_without_flip_and_names_what_it_leaves_out(workers: int):
    images, rows = mixed(24, broken=(9, 14)), np.arange(2, 24)
    p = Preparation((20, 24, 30), 50, 1.0, masks=True)
    whole = EvalLoader(images, rows, p, ALONE, workers)
    items = list(whole)
    assert [item.row for item in items] == [i for i in range(2, 24) if i not in (9, 14)]
    assert whole.unreadable == {i: f'{i}.jpg: cannot be read' for i in (9, 14)}
    for item in items:
        size = tuple(images.sizes[item.row].tolist())
        assert item.target is None and item.size == size
        assert torch.equal(item.image, resize_image(images.read(item.row), *fit_size(*size, 20, 50), 'mmdet'))
    parts = [[item.row for item in EvalLoader(images, rows, p, world, workers)] for world in TWO]
    assert parts == [[i for i in rows[rank::2] if i not in (9, 14)] for rank in range(2)]
    images.broken = set()
    assert len(list(whole)) == 22 and whole.unreadable == {}


def test_an_evaluation_with_too_many_broken_images_is_refused():
    with pytest.raises(DataError, match='rectangles: 3 of 20 images cannot be read'):
        list(EvalLoader(mixed(20, (2, 5, 9)), np.arange(20), SMALL, ALONE, 2))
    assert list(EvalLoader(mixed(0), np.arange(0), SMALL, ALONE, 1)) == []
