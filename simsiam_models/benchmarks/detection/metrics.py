"""Average precision of detections: COCO's by pycocotools, and VOC's over 11 points.

All figures are percentages. Images that could not be read are not measured: `rows` are the indices of those that were,
in step with `detections`.
"""
import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ...runtime.messages import require
from ..datasets.objects import ObjectImages

STATS = ('AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large')  # the first of COCOeval.stats
THRESHOLDS = {'mmdet': (50,), 'detectron2': tuple(range(50, 100, 5))}  # of VOC: IoU in percent
POINTS = np.arange(0, 1.1, 0.1)  # as in both frameworks: .3, .6 and .7 are a rounding error above these recalls

Table = list[dict[str, Any]]


class Detections(NamedTuple):
    """What was detected in one image, by falling score, in pixels of the stored image."""

    boxes: np.ndarray  # (n, 4) float32: x1, y1, x2, y2
    scores: np.ndarray  # (n,) float32
    labels: np.ndarray  # (n,) int64: places in `classes`
    masks: list[dict[str, Any]] | None = None  # pycocotools' compressed encodings with text; None: of boxes only


def to_coco_results(images: ObjectImages, rows: Sequence[int], detections: Sequence[Detections]) -> Table:
    """Returns what COCO's files of results hold, with the ids of the annotations' file."""
    results: Table = []
    for row, found in zip(rows, detections, strict=True):
        image_id, boxes = images.image_ids[row], found.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        for i, (box, score, label) in enumerate(zip(
                boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)):
            result = {'image_id': image_id, 'category_id': images.category_ids[label], 'bbox': box, 'score': score}
            results.append(result if found.masks is None else {**result, 'segmentation': found.masks[i]})
    return results


def coco_metrics(
    images: ObjectImages, rows: Sequence[int], detections: Sequence[Detections],
) -> tuple[dict[str, float], Table]:
    """Computes COCO's average precision (`STATS`) of boxes, and of masks if there are any, by pycocotools.

    Returns `box_AP` and so on, and a row for each class. What has no object, such as boxes of a size that does not
    occur, is left out of the former and None in the latter. VOC's difficult objects are measured like crowds.

    Annotations are renumbered from 1, because pycocotools treats a match with annotation 0 as no match.
    """
    require("COCO's metric", pycocotools='pycocotools')
    results, truth = to_coco_results(images, rows, detections), _list_objects(images, rows)
    metrics, table = dict[str, float](), _count_objects(images, np.asarray(rows, np.int64))
    masked = images.has_masks and all(found.masks is not None for found in detections)
    for what, kind in (('box', 'bbox'), *([('mask', 'segm')] if masked else [])):
        evaluation = _evaluate(images, rows, truth, results, kind)
        values = zip(STATS, evaluation.stats.tolist(), strict=False)
        metrics |= {f'{what}_{name}': 100 * value for name, value in values if value > -1}
        precision = evaluation.eval['precision'][:, :, :, 0, -1]  # (IoU, recall, class by id) of all sizes
        for i, label in enumerate(np.argsort(images.category_ids).tolist()):
            table[label][f'{what}_AP'] = _mean(precision[:, :, i])
            if what == 'box':
                table[label]['box_AP50'] = _mean(precision[0, :, i])
    return metrics, table


def _mean(precision: np.ndarray) -> float | None:
    """Returns the mean in percent; pycocotools writes -1 where there is no object."""
    return 100 * float(precision.mean()) if (precision > -1).all() else None


def _list_objects(images: ObjectImages, rows: Sequence[int]) -> Table:
    """Returns the objects as in a file of COCO's form."""
    owners, rectangles, labels, ignored, areas = images.annotation_table(np.asarray(rows, np.int64))
    image_ids, category_ids = [images.image_ids[row] for row in rows], images.category_ids
    outlines = [s for row in rows for s in images.objects(row).segmentations or ()] if images.has_masks else None
    truth = [
        {'id': i, 'image_id': image_ids[owner], 'category_id': category_ids[label], 'bbox': box, 'area': area,
         'iscrowd': int(crowd)}
        for i, (owner, box, label, crowd, area) in enumerate(zip(*(
            x.tolist() for x in (owners, rectangles, labels, ignored, areas)), strict=True), 1)]
    return truth if outlines is None else [
        {**row, 'segmentation': outline} for row, outline in zip(truth, outlines, strict=True)]


def _evaluate(images: ObjectImages, rows: Sequence[int], truth: Table, results: Table, kind: str) -> Any:
    """Returns pycocotools' evaluation; `kind` is bbox or segm."""
    from pycocotools import mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if kind == 'segm':  # the size of a mask, not that of its box, says whether it is small
        areas = [int(mask.area(row['segmentation'])) for row in results]  # one by one: a list of 256 overflows there
    else:
        areas = [row['bbox'][2] * row['bbox'][3] for row in results]
    found = [{**row, 'id': i, 'iscrowd': 0, 'area': area}
             for i, (row, area) in enumerate(zip(results, areas, strict=True), 1)]
    listed = {
        'images': [{'id': images.image_ids[row], 'height': height, 'width': width}
                   for row, (height, width) in zip(rows, images.sizes[rows].tolist(), strict=True)],
        'categories': [{'id': i, 'name': name} for i, name in zip(images.category_ids, images.classes, strict=True)]}
    with contextlib.redirect_stdout(io.StringIO()):
        sides = COCO(), COCO()
        for side, annotations in zip(sides, (truth, found), strict=True):
            side.dataset = {**listed, 'annotations': annotations}
            side.createIndex()
        evaluation = COCOeval(*sides, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _count_objects(images: ObjectImages, rows: np.ndarray) -> Table:
    """Returns a row for each class: how many of the images show it, and how many objects there are."""
    owners, _, labels, ignored, _ = images.annotation_table(rows)
    shown = np.unique(np.stack([labels, owners])[:, ~ignored], axis=1)[0]
    pictures, objects = (np.bincount(x, minlength=len(images.classes)).tolist() for x in (shown, labels[~ignored]))
    return [{'class': name, 'images': n, 'objects': m}
            for name, n, m in zip(images.classes, pictures, objects, strict=True)]


def voc_metrics(
    images: ObjectImages, rows: Sequence[int], detections: Sequence[Detections], variant: str,
) -> tuple[dict[str, float], Table]:
    """Computes VOC07's average precision, the mean over classes that have objects.

    mmdet: AP50, from an IoU of .5 on. detectron2: AP50, AP75 and AP, the mean over 10 thresholds, from above each; its
    scores are rounded to 3 decimals and its boxes to 1. Sides are a pixel longer than differences of corners. Each
    detection belongs to the object of its class with the largest IoU: the first one is right and others are wrong,
    except that those of difficult objects do not count.

    Sources: mmdet v2.25.0, mmdet/core/evaluation/mean_ap.py; detectron2, evaluation/pascal_voc_evaluation.py.
    """
    chosen = np.asarray(rows, np.int64)
    table = _count_objects(images, chosen)
    owners, rectangles, classes, difficult, _ = images.annotation_table(chosen)
    truth = rectangles.astype(np.float64)
    truth[:, 2:] += truth[:, :2]
    if variant == 'mmdet':  # where two overlap equally, difficult objects come last
        order = np.lexsort((difficult, owners))
        owners, truth, classes, difficult = (x[order] for x in (owners, truth, classes, difficult))
    overlap, match = _match(truth, classes, owners, detections, variant)
    scores = np.concatenate([np.zeros(0, np.float32), *(found.scores for found in detections)]).astype(np.float64)
    labels = np.concatenate([np.zeros(0, np.int64), *(found.labels for found in detections)])
    scores = scores if variant == 'mmdet' else np.round(scores, 3)
    found_by: dict[str, list[float]] = {f'AP{t}': [] for t in THRESHOLDS[variant]}
    for label, row in enumerate(table):
        chosen = np.flatnonzero(labels == label)
        chosen = chosen[np.argsort(-scores[chosen], kind='stable')]
        precisions = []
        for t in THRESHOLDS[variant] if row['objects'] else ():
            hit = overlap[chosen] >= t / 100 if variant == 'mmdet' else overlap[chosen] > t / 100
            right, wrong = _judge(hit, match[chosen], difficult)
            precisions.append(100 * voc_ap(right, wrong, row['objects']))
            found_by[f'AP{t}'].append(precisions[-1])
        row |= _summarize(dict(zip(found_by, precisions, strict=False)), variant)
    means = {name: float(np.mean(values)) for name, values in found_by.items() if values}
    return {name: value for name, value in _summarize(means, variant).items() if value is not None}, table


def _summarize(found: dict[str, float], variant: str) -> dict[str, float | None]:
    """Returns what is reported of the average precisions at all thresholds; None without any."""
    mean = {'AP': float(np.mean([*found.values()])) if found else None} if variant == 'detectron2' else {}
    return mean | {name: found.get(name) for name in ('AP50', 'AP75') if variant == 'detectron2' or name == 'AP50'}


def _match(
    truth: np.ndarray, classes: np.ndarray, owners: np.ndarray, detections: Sequence[Detections], variant: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each detection the largest IoU with an object of its class, -1 without any, and that object's row."""
    starts = np.searchsorted(owners, np.arange(len(detections) + 1))
    overlaps, matches = [np.zeros(0)], [np.zeros(0, np.int64)]
    truth = truth.astype(np.float32) if variant == 'mmdet' else truth + [1, 1, 0, 0]  # counted from 1, as in the files
    for i, found in enumerate(detections):
        first, last = int(starts[i]), int(starts[i + 1])
        boxes = found.boxes
        if variant != 'mmdet':
            boxes = np.round((boxes + np.array([1, 1, 0, 0], np.float32)).astype(np.float64), 1)
        if first == last:
            overlaps.append(np.full(len(boxes), -1.0))
            matches.append(np.zeros(len(boxes), np.int64))
            continue
        iou = np.where(found.labels[:, None] == classes[None, first:last], _iou(boxes, truth[first:last]), -1)
        best = iou.argmax(1)
        overlaps.append(iou[np.arange(len(best)), best].astype(np.float64))
        matches.append(first + best)
    return np.concatenate(overlaps), np.concatenate(matches)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the IoU of boxes (n, 4) and (m, 4) as (n, m); sides are x2 - x1 + 1."""
    sides_a, sides_b = (x[:, 2:] - x[:, :2] + 1 for x in (a, b))
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = np.maximum(high - low + 1, 0).prod(2)
    overlaps: np.ndarray = common / (sides_a.prod(1)[:, None] + sides_b.prod(1)[None] - common)
    return overlaps


def _judge(hit: np.ndarray, match: np.ndarray, difficult: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns which detections of a class, by falling score, are right and which are wrong."""
    right = np.zeros(len(hit), bool)
    rows = np.flatnonzero(hit)
    rows = rows[~difficult[match[rows]]]
    right[rows[np.unique(match[rows], return_index=True)[1]]] = True
    wrong = ~hit
    wrong[rows] = ~right[rows]
    return right, wrong


def voc_ap(right: np.ndarray, wrong: np.ndarray, objects: int) -> float:
    """Returns the mean of the largest precision at a recall of 0, .1, ..., 1 or more, from 0 to 1.

    Args:
        right, wrong: (n,) of each detection of a class, by falling score; neither: it does not count.
        objects: how many there are to be found, 1 or more.
    """
    right, wrong = np.cumsum(right), np.cumsum(wrong)
    recall, precision = right / objects, right / np.maximum(right + wrong, np.finfo(np.float64).eps)
    return float(np.mean([precision[recall >= point].max(initial=0) for point in POINTS]))
