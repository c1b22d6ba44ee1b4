"""Computes the average precision of one class by VOC's two definitions, and top-k accuracy.

Average precision ranks images of equal score together, so it does not depend on the order of the rows.
"""
import numpy as np
from torch import Tensor


def _rank(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Ranks images from their scores (N,) and whether they are positive (N,).

    Returns the positives and the images that reach each distinct score, highest first, and the number of positives.
    """
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive, bool)
    if not positive.any():
        raise ValueError('average precision needs at least one positive image, but there is none; leave the class out')
    if np.isnan(scores).any():
        raise ValueError('average precision needs scores that are numbers, but some are NaN; check the features')
    order = np.argsort(-scores, kind='stable')
    scores, hits = scores[order], np.cumsum(positive[order])
    last = np.append(scores[1:] != scores[:-1], True)  # of the images with equal scores
    return hits[last], np.flatnonzero(last) + 1, int(hits[-1])


def envelope_ap(scores: np.ndarray, positive: np.ndarray) -> float:
    """Returns the area under the precision envelope, as VOC 2010 and later and the published VOC07 SVM numbers have it.

    The envelope at a recall is the highest precision at that recall or above; each change of recall weights it.
    """
    hits, seen, positives = _rank(scores, positive)
    envelope = np.maximum.accumulate((hits / seen)[::-1])[::-1]
    return float(np.sum(np.diff(hits, prepend=0) / positives * envelope))


def eleven_point_ap(scores: np.ndarray, positive: np.ndarray) -> float:
    """Returns VOC 2007's AP: the mean over recalls 0, 0.1, ..., 1 of the highest precision at that recall or above."""
    hits, seen, positives = _rank(scores, positive)
    precision = hits / seen
    # Compare recall >= t / 10 in integers: in floats, 3 / 10 < 3 * 0.1.
    return float(np.mean([np.max(precision[10 * hits >= t * positives], initial=0.0) for t in range(11)]))


def right_within(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Counts the rows of `scores` (B, classes) whose label (B,) is among the k highest scores; returns 0-dimensional.

    A tie counts as wrong: a label ranks behind every other class whose score is not lower. So does a label whose score
    is not finite.
    """
    own = scores.gather(1, labels[:, None])
    return ((~(scores < own)).sum(1) <= k).logical_and(own.squeeze(1).isfinite()).sum()
