"""Predicts the objects in images, as boxes: a file in COCO format, or one row per box."""
import argparse
from typing import Any

import numpy as np
import torch

from ..benchmarks import detection
from ..benchmarks.detection.masks import encode_masks
from ..benchmarks.detection.result import SURE
from ..benchmarks.results.record import check_output
from ..runtime.files import explain_write_errors, write_json
from ..runtime.messages import as_text, printable, short
from ..runtime.tables import Columns, check_table, format_table, write_table
from .inputs import Inputs
from .reading import Reader

COLUMNS: Columns = {
    'path': str, 'label': str, 'score': float, 'x1': float, 'y1': float, 'x2': float, 'y2': float, 'error': str}


def predict_objects(args: argparse.Namespace, images: Inputs, device: torch.device) -> int:
    """Writes or prints the boxes of each image, in their order; returns the exit status."""
    if args.output is not None:
        check_table(args.output)
        check_output(args.output.parent)
    predictor = detection.load(args.model.removeprefix('local-dir:'), str(device))
    as_coco = args.output is not None and args.output.suffix.lower() == '.json'
    reader, found = Reader(images, lambda image: image, 1, args.workers), {}
    for rows, pictures in reader:
        for row, image in zip(rows, pictures, strict=True):
            one = predictor([image], SURE if args.score is None else args.score)[0]
            masks = encode_masks(one['masks']) if as_coco and 'masks' in one else None
            found[row] = {**one, 'masks': masks, 'size': image.shape[:2]}
    if args.output is None:
        print(format_table(list(COLUMNS), [
            [printable(path), short(label or '', 40), *('' if x is None else f'{x:g}' for x in numbers),
             'cannot be read' if error else '']
            for path, label, *numbers, error in make_box_rows(reader, found)]))
        return reader.report()
    with explain_write_errors(args.output, '--output'):
        if as_coco:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.output, make_coco(reader, predictor.classes, found))
        else:
            write_table(args.output, COLUMNS, make_box_rows(reader, found))
    print(f'{args.output}: {sum(len(one["scores"]) for one in found.values()):,} objects; {len(found):,} of '
          f'{len(images):,} images could be read')
    return reader.report()


def list_boxes(one: dict[str, Any]) -> list[list[float]]:
    """Returns the corners x1, y1, x2, y2 of an image's boxes, in pixels, rounded to two decimals."""
    boxes: list[list[float]] = np.round(one['boxes'].astype(np.float64), 2).tolist()
    return boxes


def list_scores(one: dict[str, Any]) -> list[float]:
    scores: list[float] = np.round(one['scores'].astype(np.float64), 6).tolist()
    return scores


def make_box_rows(reader: Reader, found: dict[int, dict[str, Any]]) -> list[list[Any]]:
    """Returns the cells of COLUMNS for each box; an image without any has a row with a path, and perhaps an error."""
    rows: list[list[Any]] = []
    for row in range(len(reader.images)):
        path, error = reader.images.name_of(row), reader.unreadable.get(row)
        if error or not len(found[row]['scores']):
            rows.append([path, *[None] * 6, error])
            continue
        one = found[row]
        rows += [[path, name, score, *box, None] for name, score, box in zip(
            one['names'], list_scores(one), list_boxes(one), strict=True)]
    return rows


def make_coco(reader: Reader, classes: list[str], found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Returns images, categories and annotations as in COCO's files, with scores; all ids count from 1.

    An image that cannot be read has an `error` instead of a size.
    """
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for row in range(len(reader.images)):
        entry = {'id': row + 1, 'file_name': as_text(reader.images.name_of(row))}
        if row not in found:
            images.append({**entry, 'error': reader.unreadable[row]})
            continue
        one = found[row]
        images.append({**entry, 'width': one['size'][1], 'height': one['size'][0]})
        for i, (label, score, box) in enumerate(zip(
                one['labels'].tolist(), list_scores(one), list_boxes(one), strict=True)):
            x1, y1, x2, y2 = box
            annotations.append({
                'id': len(annotations) + 1, 'image_id': row + 1, 'category_id': label + 1, 'score': score,
                'bbox': [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                **({} if one['masks'] is None else {'segmentation': one['masks'][i]})})
    categories = [{'id': i, 'name': as_text(name)} for i, name in enumerate(classes, 1)]
    return {'images': images, 'categories': categories, 'annotations': annotations}
