"""Outliers, and labels that the neighbours contradict."""
import math
from typing import NamedTuple

import numpy as np

VOTERS = 10  # neighbours that vote on a label and say how far away an image is
# Robust standard deviations above which an image is an outlier (Iglewicz and Hoaglin, 1993). With the pixels of 1,797
# digits as features, it finds 20 of 20 digits whose pixels were shuffled, and no other.
FAR = 3.5
# Share of the votes for another class from which a label is likely wrong. With wrong labels for 65 of the digits, 63
# are found, among 71. With untrained features on photographs, none of 11 was found.
SURE = 0.7
OWN = 0.1  # share of the votes for the own class up to which it is


class Outlier(NamedTuple):
    """An image that is far from its neighbours."""

    row: int
    cosine: float  # the mean with its neighbours
    score: float  # robust standard deviations beyond the median


class Doubt(NamedTuple):
    """An image whose label is likely wrong."""

    row: int
    suggested: int  # class
    share: float  # of the votes for the suggested class
    own: float  # of the votes for the label


def mask_copies(found: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Returns which of the neighbours (N, k) are no copies of the image, and so tell something new about it.

    `groups` (N,) has the number of each image's group of copies, -1 without copies.
    """
    new: np.ndarray = (groups[found] != groups[:, None]) | (groups[:, None] < 0)
    return new


def find_outliers(cosines: np.ndarray, counted: np.ndarray) -> list[Outlier]:
    """Returns the outliers among images with the cosines (N, k) of their neighbours, the farthest first.

    The logarithm of the mean distance, 1 - cosine, of the VOTERS nearest that are `counted` (N, k) is compared with the
    median of all images, in units of 1.4826 times the median absolute deviation.
    """
    first = counted & (counted.cumsum(1) <= VOTERS)
    known = first.any(1)
    means = np.where(first, cosines, 0).sum(1) / np.maximum(first.sum(1), 1)
    far = np.log(np.maximum(1 - means, 1e-9))
    middle = np.median(far[known]) if known.any() else 0.0
    spread = 1.4826 * np.median(np.abs(far[known] - middle)) if known.any() else 0.0
    scores = np.where(known, (far - middle) / max(spread, 1e-9), 0)
    rows = np.flatnonzero(scores > FAR)
    return [Outlier(int(i), float(means[i]), float(scores[i])) for i in rows[np.argsort(-scores[rows], kind='stable')]]


def find_wrong_labels(found: np.ndarray, counted: np.ndarray, labels: np.ndarray) -> tuple[list[Doubt], float]:
    """Returns the doubtful labels, the surest first, and the share of images whose neighbours agree with their label;
    NaN if no image has neighbours that count.

    Each of the VOTERS nearest `counted` (N, k) neighbours has one vote. A label is doubtful if at least SURE of them
    are of one other class, and at most OWN of its own.
    """
    first = counted & (counted.cumsum(1) <= VOTERS)
    doubts, agree, voted = [], 0, 0
    for i in np.flatnonzero(first.any(1)).tolist():
        classes, counts = np.unique(labels[found[i][first[i]]], return_counts=True)
        shares = counts / counts.sum()
        own = float(shares[classes == labels[i]].sum())
        best = int(np.argmax(shares))
        voted += 1
        agree += own >= shares[best]
        if shares[best] >= SURE and own <= OWN and counts.sum() > VOTERS // 2:
            doubts.append(Doubt(i, int(classes[best]), float(shares[best]), own))
    return sorted(doubts, key=lambda d: (-d.share, d.own, d.row)), agree / voted if voted else math.nan
