"""COCO's metric is pycocotools' own, and VOC's follows the rules of both frameworks."""
import json
from collections.abc import Callable
from pathlib import Path

import layouts_objects as layouts
import numpy as np
import pytest
from layouts_objects import xml, xml_object
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from real_data import unpack_real

from simsiam_models.benchmarks.datasets.objects import ObjectImages, open_objects
from simsiam_models.benchmarks.detection.metrics import (
    POINTS,
    Detections,
    coco_metrics,
    to_coco_results,
    voc_ap,
    voc_metrics,
)

STATS = ('AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large')


def detections(*found: tuple[tuple[float, ...], float, int]) -> Detections:
    """Makes the detections of an image from boxes, scores and labels."""
    boxes, scores, labels = ([list(x) for x in zip(*found, strict=True)] if found else ([], [], []))
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32),
                      np.array(labels, np.int64))


def detect_at_random(images: ObjectImages, rng: np.random.Generator, n: int, masks: bool = False) -> list[Detections]:
    """Makes n detections for each image: moved objects, some with another class, and boxes anywhere."""
    found = []
    for i in range(len(images)):
        height, width = images.sizes[i].tolist()
        low = rng.uniform(0, 0.7, (n, 2)) * [width, height]
        boxes = np.concatenate([low, low + rng.uniform(2, 0.3 * height, (n, 2))], 1)
        labels, truth = rng.integers(0, len(images.classes), n), images.objects(i)
        for j in range(min(n // 2, 3 * len(truth.labels))):
            k = j % len(truth.labels)
            boxes[j] = truth.boxes[k] + rng.normal(0, 3, 4)
            labels[j] = truth.labels[k] if j % 5 else labels[j]
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        scores = np.sort(np.round(rng.random(n), 2))[::-1]  # with ties
        encoded = [_encode(box, height, width) for box in boxes] if masks else None
        found.append(Detections(boxes.astype(np.float32), scores.astype(np.float32), labels, encoded))
    return found


def _encode(box: np.ndarray, height: int, width: int) -> dict:
    pixels = np.zeros((height, width), np.uint8, order='F')
    x1, y1, x2, y2 = np.clip(box, 0, [width, height, width, height]).astype(int)
    pixels[y1:y2, x1:x2 - (x2 - x1) // 3] = 1  # less than the box: another area
    encoded = mask.encode(pixels)
    return {'size': encoded['size'], 'counts': encoded['counts'].decode()}


def call_pycocotools(
    file: Path, results: list[dict], kind: str, folder: Path, ids: list[int], category: int | None = None,
) -> list[float]:
    """Evaluates as everybody does: with files on disk; `ids`: of the images that are measured."""
    written = folder / f'{kind}.json'
    written.write_text(json.dumps([
        {k: v for k, v in row.items() if k != ('bbox' if kind == 'segm' else 'segmentation')} for row in results]))
    truth = COCO(str(file))
    evaluation = COCOeval(truth, truth.loadRes(str(written)), kind)
    evaluation.params.imgIds = ids
    if category is not None:
        evaluation.params.catIds = [category]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return (100 * evaluation.stats).tolist()


def assert_equals_pycocotools(images: ObjectImages, file: Path, folder: Path, n: int, rows: list[int]) -> None:
    found = detect_at_random(images, np.random.default_rng(1), n, masks=True)
    found = [found[row] for row in rows]
    results, ids = to_coco_results(images, rows, found), [images.image_ids[row] for row in rows]
    metrics, table = coco_metrics(images, rows, found)
    for what, kind in (('box', 'bbox'), ('mask', 'segm')):
        expected = call_pycocotools(file, results, kind, folder, ids)
        assert 0 < expected[0] < 100
        expected = {f'{what}_{name}': value for name, value in zip(STATS, expected, strict=False) if value > -100}
        assert {name: value for name, value in metrics.items() if name.startswith(what)} == expected
        for label in [i for i, row in enumerate(table) if row['objects']][:4]:
            single = call_pycocotools(file, results, kind, folder, ids, images.category_ids[label])
            assert table[label][f'{what}_AP'] == pytest.approx(single[0], abs=1e-10)
            if what == 'box':
                assert table[label]['box_AP50'] == pytest.approx(single[1], abs=1e-10)


@pytest.fixture
def open_coco(tmp_path: Path) -> Callable[..., ObjectImages]:
    """Writes files in COCO's form and opens the one to test on."""
    def write(content: dict) -> ObjectImages:
        return open_objects('folder', layouts.write_coco2017(tmp_path, val=content), 'mmdet').test
    return write


def test_coco_metrics_are_those_of_pycocotools_called_directly(tmp_path: Path, open_coco):
    rng = np.random.default_rng(0)
    content = layouts.coco(8, [
        layouts.annotation(5 + i, 100 - 3 * (i % 6), (7, 3)[i % 2], (x := 2 * (i % 9), 3, 8 + i % 7, 12), area=70.5 + i,
                           segmentation=[[x, 3, x + 9, 3, x + 8, 14.5, x, 13]])
        for i in rng.permutation(24).tolist()] + [
        layouts.annotation(77, 97, 3, (0, 0, 30, 20), iscrowd=1,
                           segmentation={'size': [32, 40], 'counts': [100, 300, 880]})])
    images = open_coco(content)
    measured = [7, 0, 1, 2, 4, 5]
    assert_equals_pycocotools(images, tmp_path / 'annotations/instances_val2017.json', tmp_path, 12, measured)


def test_coco_metrics_of_real_pictures_are_those_of_pycocotools(tmp_path: Path):
    root = unpack_real('coco_mini.zip', tmp_path)
    images = open_objects('coco', root, 'mmdet', partial=True).test
    assert_equals_pycocotools(
        images, root / 'annotations/instances_val2017.json', tmp_path, 30, list(range(0, len(images), 2)))


def test_what_has_no_object_is_left_out_of_the_metrics_and_none_in_the_table(open_coco):
    images = open_coco(layouts.coco(2))
    metrics, table = coco_metrics(images, [0, 1], [detections(((4, 4, 14, 14), 0.9, 0)), detections()])
    assert metrics == pytest.approx({'box_AP': 50, 'box_AP50': 50, 'box_AP75': 50, 'box_AP_small': 50})
    assert table == [
        {'class': 'dog', 'images': 1, 'objects': 1, 'box_AP': pytest.approx(100), 'box_AP50': pytest.approx(100)},
        {'class': 'cat', 'images': 1, 'objects': 1, 'box_AP': 0, 'box_AP50': 0},
        {'class': 'toothbrush', 'images': 0, 'objects': 0, 'box_AP': None, 'box_AP50': None}]


def test_no_detection_at_all_gives_zero(open_coco, capsys):
    images = open_coco(layouts.coco(3))
    metrics, _ = coco_metrics(images, [0, 1, 2], [detections()] * 3)
    assert metrics['box_AP'] == metrics['box_AP_small'] == 0 and not capsys.readouterr().out


def test_an_annotation_with_the_id_0_can_be_found(open_coco):
    """pycocotools itself takes a match with it for none."""
    images = open_coco(layouts.coco(1, [layouts.annotation(0, 100)]))
    assert coco_metrics(images, [0], [detections(((4, 4, 14, 14), 0.9, 0))])[0]['box_AP'] == pytest.approx(100)


def test_results_have_the_ids_of_the_file(open_coco):
    images = open_coco(layouts.coco(3))
    found = [detections(((1, 2, 5.5, 10), 0.75, 2), ((0, 0, 1, 1), 0.5, 1)), detections(((3, 3, 4, 5), 0.25, 0))]
    results = to_coco_results(images, [2, 0], found)
    assert json.loads(json.dumps(results)) == results == [
        {'image_id': 94, 'category_id': 90, 'bbox': [1, 2, 4.5, 8], 'score': 0.75},
        {'image_id': 94, 'category_id': 3, 'bbox': [0, 0, 1, 1], 'score': 0.5},
        {'image_id': 100, 'category_id': 7, 'bbox': [3, 3, 1, 2], 'score': 0.25}]


# VOC

@pytest.fixture
def open_voc(tmp_path: Path) -> Callable[..., ObjectImages]:
    """Writes an XML file for each image to test on; boxes are counted from 0."""
    def write(*texts: str, variant: str = 'mmdet') -> ObjectImages:
        images = {f'{i:06}': text for i, text in enumerate(texts)}
        ids = [*images]
        images['train'] = xml(xml_object('dog'), xml_object('cat'))
        layouts.write_voc(tmp_path / variant, images, {'train': ['train'], 'val': ids})
        return open_objects('folder', tmp_path / variant, variant).test
    return write


def obj(name: str, x1: float, y1: float, x2: float, y2: float, difficult: int = 0) -> str:
    return xml_object(name, (x1 + 1, y1 + 1, x2 + 1, y2 + 1), difficult)


@pytest.mark.parametrize('tenths, points', [
    (0, 0), (1, 2), (2, 3), (3, 3), (4, 5), (5, 6), (6, 6), (7, 7), (8, 9), (9, 10), (10, 11)])
def test_a_recall_of_exactly_3_6_or_7_tenths_loses_a_point(tenths: int, points: int):
    right = np.ones(tenths, bool)
    assert len(POINTS) == 11 and voc_ap(right, ~right, 10) == pytest.approx(points / 11)


def test_precision_is_the_largest_at_a_recall_or_above():
    right = np.array([True, False, True, True, False])
    # Recall and precision: 1/4 at 1, 2/4 at 2/3, 3/4 at 3/4. Points 0 to .2: 1; .3 to .7: 3/4; .8 and on: 0.
    assert voc_ap(right, ~right, 4) == pytest.approx((3 * 1 + 5 * 0.75) / 11)
    nothing = np.zeros(3, bool)
    assert voc_ap(nothing, nothing, 4) == 0 and voc_ap(nothing[:0], nothing[:0], 4) == 0


def test_an_overlap_of_exactly_half_matches_in_mmdet_only(open_voc):
    for variant, expected in (('mmdet', 100), ('detectron2', 0)):
        images = open_voc(xml(obj('dog', 0, 0, 9, 9)), variant=variant)
        half = detections(((0, 0, 9, 4) if variant == 'mmdet' else (0, 0, 10, 5), 0.9, 1))
        assert images.objects(0).boxes.tolist() == [[0, 0, 9, 9]] if variant == 'mmdet' else [[0, 0, 10, 10]]
        # A side is a pixel longer than the difference of its corners: 10 x 10 and 10 x 5.
        assert voc_metrics(images, [0], [half], variant)[0]['AP50'] == pytest.approx(expected)


def test_detectron2_measures_boxes_as_it_writes_them(open_voc):
    """In its files boxes count from 1 at xmin and ymin only, with 1 decimal, and scores have 3."""
    images = open_voc(xml(obj('dog', 0, 0, 9, 9)), xml(obj('dog', 0, 0, 9, 9)), variant='detectron2')
    # In the file 1 1 10 5.0 against 1 1 10 10: 10 x 5 of 10 x 10, and 5.04 is written as 5.0.
    for y2, expected in ((5.0, 0), (5.04, 0), (5.06, 100)):
        found = [detections(((0, 0, 10, y2), 0.9, 1))] * 2
        assert voc_metrics(images, [0, 1], found, 'detectron2')[0]['AP50'] == pytest.approx(expected)
    one = open_voc(xml(), xml(obj('dog', 0, 0, 9, 9)), variant='detectron2')
    found = [detections(((0, 0, 10, 10), 0.9001, 1)), detections(((0, 0, 10, 10), 0.9004, 1))]
    assert voc_metrics(one, [0, 1], found, 'detectron2')[0]['AP50'] == pytest.approx(50)  # a tie: the first image first
    same = open_voc(xml(), xml(obj('dog', 0, 0, 9, 9)))
    assert voc_metrics(same, [0, 1], found, 'mmdet')[0]['AP50'] == pytest.approx(100)


@pytest.mark.parametrize('variant', ['mmdet', 'detectron2'])
def test_difficult_objects_count_neither_as_found_nor_as_missed(variant: str, open_voc):
    images = open_voc(xml(obj('dog', 0, 0, 9, 9, 1), obj('dog', 15, 15, 29, 29), obj('cat', 0, 15, 9, 29, 1)),
                      variant=variant)
    found = detections(((0, 0, 9, 9), 0.9, 1), ((0, 0, 9, 9), 0.8, 1), ((15, 15, 29, 29), 0.7, 1),
                       ((0, 15, 9, 29), 0.6, 0))
    metrics, table = voc_metrics(images, [0], [found], variant)
    assert metrics['AP50'] == pytest.approx(100)  # cats have no object that counts
    assert [(row['class'], row['images'], row['objects']) for row in table] == [('cat', 0, 0), ('dog', 1, 1)]
    assert table[0]['AP50'] is None and table[1]['AP50'] == pytest.approx(100)
    assert {*table[0]} == {*table[1]} == {'class', 'images', 'objects', *metrics}
    assert [*metrics] == (['AP50'] if variant == 'mmdet' else ['AP', 'AP50', 'AP75'])


def test_an_object_is_found_once_and_only_by_its_class(open_voc):
    images = open_voc(xml(obj('dog', 0, 0, 9, 9)))
    first = ((0, 0, 9, 9), 0.8, 1)
    for before, expected in (
            (((0, 0, 9, 9), 0.9, 0), 100), (((0, 0, 9, 8), 0.9, 1), 100), (((20, 20, 29, 29), 0.9, 1), 50)):
        found = detections(before, first)
        assert voc_metrics(images, [0], [found], 'mmdet')[0]['AP50'] == pytest.approx(expected)
    images = open_voc(xml(obj('dog', 0, 0, 9, 9), obj('dog', 20, 0, 29, 9)))
    twice = detections(first, ((0, 0, 9, 9), 0.7, 1), ((20, 0, 29, 9), 0.6, 1))
    assert voc_metrics(images, [0], [twice], 'mmdet')[0]['AP50'] == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)


def measure_slowly(images: ObjectImages, rows: list[int], found: list[Detections], variant: str, percent: int) -> float:
    """Computes VOC's average precision one detection at a time, from objects as text writes them."""
    values = []
    for label in range(len(images.classes)):
        queue, used, n = [], set(), 0
        for k, row in enumerate(rows):
            truth = images.objects(row)
            n += int((~truth.ignored[truth.labels == label]).sum())
            for i in np.flatnonzero(found[k].labels == label).tolist():
                score, box = float(found[k].scores[i]), found[k].boxes[i].copy()
                if variant == 'detectron2':
                    box[:2] += 1
                    score, box = float(f'{score:.3f}'), np.array([float(f'{x:.1f}') for x in box])
                queue.append((-score, k, box))
        right, wrong = [], []
        for _, k, box in sorted(queue, key=lambda item: item[0]):
            best, at, truth = -1.0, None, images.objects(rows[k])
            order = sorted(range(len(truth.labels)), key=lambda i: variant == 'mmdet' and truth.ignored[i])
            for i in order:
                x1, y1, x2, y2 = truth.boxes[i] + (np.array([1, 1, 0, 0]) if variant == 'detectron2' else 0)
                w, h = min(x2, box[2]) - max(x1, box[0]) + 1, min(y2, box[3]) - max(y1, box[1]) + 1
                common = max(w, 0) * max(h, 0)
                iou = common / ((x2 - x1 + 1) * (y2 - y1 + 1) + (box[2] - box[0] + 1) * (box[3] - box[1] + 1) - common)
                if truth.labels[i] == label and iou > best:
                    best, at = iou, i
            matched = best >= percent / 100 if variant == 'mmdet' else best > percent / 100
            difficult = matched and truth.ignored[at]
            right.append(bool(matched and not difficult and (k, at) not in used))
            wrong.append(not right[-1] and not difficult)
            if matched and not difficult:
                used.add((k, at))
        if n:
            tp, fp, total = np.cumsum(right), np.cumsum(wrong), 0.0
            for point in np.arange(0, 1.1, 0.1):
                precisions = [t / max(t + f, 1e-16) for t, f in zip(tp, fp, strict=True) if t / n >= point]
                total += max(precisions, default=0) / 11
            values.append(100 * total)
    return float(np.mean(values))


@pytest.mark.parametrize('variant', ['mmdet', 'detectron2'])
def test_voc_metrics_are_those_of_the_rules_one_detection_at_a_time(variant: str, open_voc):
    rng = np.random.default_rng(2)
    texts = []
    for _ in range(12):
        objects = []
        for _ in range(int(rng.integers(0, 5))):
            x, y, w, h = rng.integers([0, 0, 6, 6], [20, 15, 18, 15]).tolist()
            objects.append(obj(('cat', 'dog')[rng.integers(2)], x, y, x + w, y + h, int(rng.random() < 0.3)))
        texts.append(xml(*objects))
    images, rows = open_voc(*texts, variant=variant), [11, *range(10)]
    found = detect_at_random(images, rng, 14)
    found = [found[row] for row in rows]
    metrics, _ = voc_metrics(images, rows, found, variant)
    expected = {t: measure_slowly(images, rows, found, variant, t) for t in (
        (50,) if variant == 'mmdet' else range(50, 100, 5))}
    assert 0 < expected[50] < 100
    named = {'AP50': expected[50]}
    if variant == 'detectron2':
        named |= {'AP75': expected[75], 'AP': np.mean([*expected.values()])}
    assert metrics == pytest.approx(named)
