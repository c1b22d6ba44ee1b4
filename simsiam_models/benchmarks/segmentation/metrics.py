"""Confusion of true and predicted pixels, and the metrics of segmentation, as mmsegmentation computes them."""
from typing import Any

import numpy as np

IGNORED = 255  # the label of pixels that count nowhere


def count_pixels(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts pairs of true and predicted labels, (classes, classes + 1) int64.

    Pixels whose true label is IGNORED do not count. The last column has predictions that are none of the classes.

    Args:
        truth, predicted: integers, of the same shape.

    Raises:
        ValueError: the shapes differ, or a true label is none of the classes.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f'truth {truth.shape} and prediction {predicted.shape}: the shapes must be the same')
    valid = truth != IGNORED
    rows, columns = truth[valid].astype(np.int64), predicted[valid].astype(np.int64)
    if len(rows) and not 0 <= rows.min() <= rows.max() < classes:
        raise ValueError(
            f'true labels {rows.min()} to {rows.max()}, but the classes are 0 to {classes - 1} ({IGNORED}: ignored)')
    columns[(columns < 0) | (columns >= classes)] = classes
    return np.bincount(rows * (classes + 1) + columns, minlength=classes * (classes + 1)).reshape(classes, -1)


def compute_metrics(counts: np.ndarray, names: list[str]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Returns metrics in percent, and a row per class, from the counts of all images together.

    mIoU is the mean over classes of intersection / union, mAcc that of the share of a class's pixels that are found;
    a class that is neither true nor predicted anywhere, or never true, is left out of the mean and has None in its
    row. pixel_accuracy is the share of all labelled pixels.

    Raises:
        ValueError: no pixel has a label.
    """
    true, found, right = counts.sum(1), counts[:, :-1].sum(0), np.diag(counts)
    if not true.sum():
        raise ValueError('no pixel of the test images has a label; give masks with some')
    union = true + found - right
    with np.errstate(invalid='ignore'):
        iou, accuracy = 100 * right / union, 100 * right / true
    metrics = {
        'mIoU': float(np.nanmean(iou)), 'mAcc': float(np.nanmean(accuracy)),
        'pixel_accuracy': float(100 * right.sum() / true.sum())}
    rows = [
        {'class': name, 'pixels': int(n), 'IoU': _number(a), 'accuracy': _number(b)}
        for name, n, a, b in zip(names, true, iou, accuracy, strict=True)]
    return metrics, rows


def _number(x: float) -> float | None:
    return None if np.isnan(x) else float(x)
