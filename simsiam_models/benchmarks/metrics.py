"""Average precision of one class by the two definitions of VOC, from scores and right answers.

Images of equal score are ranked together, so that neither value depends on the order of the rows.
"""
import numpy as np
from torch import Tensor


def _counts(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(N,) scores and bools -> right ones and images down to each distinct score, highest first; positives in all.

    Raises:
        ValueError: no positive image, or a score that is no number: there is no average precision then.
    """
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive, bool)
    if not positive.any():
        raise ValueError('average precision needs at least one positive image, and there is none; leave the class out')
    if np.isnan(scores).any():
        raise ValueError('average precision needs scores that are numbers, and some are NaN; look at the features')
    order = np.argsort(-scores, kind='stable')
    scores, hits = scores[order], np.cumsum(positive[order])
    last = np.append(scores[1:] != scores[:-1], True)  # of the images that share a score
    return hits[last], np.flatnonzero(last) + 1, int(hits[-1])


def envelope_ap(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the precision envelope at all points (VOC 2010 and later, and the published VOC07 SVM numbers).

    Precision is made non-increasing from the right, and recall runs from 0 to 1: the sum over recall changes of the
    change times the highest precision at this recall or a higher one.
    """
    hits, seen, positives = _counts(scores, positive)
    envelope = np.maximum.accumulate((hits / seen)[::-1])[::-1]
    return float(np.sum(np.diff(hits, prepend=0) / positives * envelope))


def eleven_point_ap(scores: np.ndarray, positive: np.ndarray) -> float:
    """VOC 2007's own: the mean over recalls 0, 0.1, ..., 1 of the highest precision at that recall or a higher one."""
    hits, seen, positives = _counts(scores, positive)
    precision = hits / seen
    # recall >= t / 10 in whole numbers: 3 of 10 is a recall of 0.3 although 3 * 0.1 is not
    return float(np.mean([np.max(precision[10 * hits >= t * positives], initial=0.0) for t in range(11)]))


def right_within(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """How many of (B, classes) scores have their label (B,) among the k highest; 0-dimensional.

    A tie counts as wrong: the label is behind every other class whose score is not lower. So does a score that is not a
    number.
    """
    own = scores.gather(1, labels[:, None])
    return ((~(scores < own)).sum(1) <= k).logical_and(own.squeeze(1).isfinite()).sum()
