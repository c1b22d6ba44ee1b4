"""Fits linear SVMs on fixed features, one class against the rest, as MMSelfSup's VOC07 benchmark does."""
import functools
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...runtime.files import explain_write_errors, write_atomically
from ..features import Features
from ..metrics import eleven_point_ap, envelope_ap
from ..protocols import LINEAR_SVC, LOW_SHOT_NEGATIVES, SVM_COSTS, SVM_FOLDS

FORMAT = 3  # increase it when the result of a task changes for the same parameters
Task = tuple[Any, ...]  # ('cv' or 'test', stage, class, cost) or ('low-shot', stage, k, draw, class)


@dataclass(frozen=True)
class SvmData:
    """The data of all fits: the files of the normalized features (.npy, float64) and the labels (N, classes)."""

    trainval: dict[str, Path]  # by stage: 'feat1' .. 'feat5'
    test: dict[str, Path]
    labels_trainval: np.ndarray  # 1 present, 0 absent, -1 difficult objects only
    labels_test: np.ndarray
    seed: int


def write_svm_data(
    folder: Path, features: tuple[Features, Features], stages: Sequence[str], labels: tuple[np.ndarray, np.ndarray],
    seed: int,
) -> SvmData:
    """Writes the normalized features of trainval and test into files that all processes map.

    Images that could not be read are left out, and so are their rows of `labels`. The files are written and not mapped
    here: on a full disk, writing to a mapped file ends the process with SIGBUS.

    Raises:
        ValueError: a feature is not finite.
        OSError: the disk is full.
    """
    with explain_write_errors(folder, '--output'):
        folder.mkdir(parents=True, exist_ok=True)
    paths = [{stage: folder / f'{stage}_{part}.npy' for stage in stages} for part in ('trainval', 'test')]
    for part, files in zip(features, paths, strict=True):
        for stage, path in files.items():
            write = functools.partial(_write_rows, stage, part.array(stage), part.readable)
            with explain_write_errors(path, '--output'):
                write_atomically(path, write)
    trainval, test = (x[part.readable] for x, part in zip(labels, features, strict=True))
    return SvmData(paths[0], paths[1], trainval, test, seed)


def _write_rows(stage: str, x: np.ndarray, rows: np.ndarray, file: BinaryIO) -> None:
    """Writes these rows of x, normalized, as .npy."""
    np.lib.format.write_array_header_1_0(
        file, {'descr': '<f8', 'fortran_order': False, 'shape': (len(rows), x.shape[1])})
    for i in range(0, len(rows), 512):
        part = normalize_rows(x[rows[i:i + 512]])
        if not np.isfinite(part).all():
            raise ValueError(
                f'{stage} of some image is not finite, so no SVM can be fitted; check the weights (simsiam weights '
                'verify), or use --amp off')
        file.write(part.tobytes())


def normalize_rows(x: np.ndarray) -> np.ndarray:
    """Divides each row by its Euclidean norm + 1e-5, in float64."""
    x = np.asarray(x, np.float64)
    normalized: np.ndarray = x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-5)
    return normalized


def fit_task(task: Task, data: SvmData) -> dict[str, Any]:
    """Fits the SVMs of one task in one thread; the result depends on `task` and `data` only."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        fits: dict[str, Callable[..., dict[str, Any]]] = {
            'cv': _cross_validate_task, 'test': _refit_task, 'low-shot': _fit_low_shot_task}
        result = fits[task[0]](data, *task[1:])
    return {**result, 'unconverged': _count_unconverged(caught)}


def _count_unconverged(caught: Sequence[warnings.WarningMessage]) -> int:
    from sklearn.exceptions import ConvergenceWarning

    return sum(issubclass(w.category, ConvergenceWarning) for w in caught)


def _cross_validate_task(data: SvmData, stage: str, number: int, cost: float) -> dict[str, Any]:
    x = np.load(data.trainval[stage], mmap_mode='r')
    targets = binarize_labels(data.labels_trainval[:, number])
    return {'cv': _cross_validate(x, targets, cost, SVM_FOLDS, data.seed)}


def _refit_task(data: SvmData, stage: str, number: int, cost: float) -> dict[str, Any]:
    """Fits all trainval rows and scores the test rows without difficult images."""
    x, x_test = np.load(data.trainval[stage], mmap_mode='r'), np.load(data.test[stage], mmap_mode='r')
    labels = data.labels_test[:, number]
    targets = binarize_labels(data.labels_trainval[:, number])
    scores = make_svc(cost, data.seed).fit(x, targets).decision_function(x_test)
    return {'ap': _compute_aps(scores[labels != -1], labels[labels != -1])}


def _fit_low_shot_task(data: SvmData, stage: str, k: int, draw: int, number: int) -> dict[str, Any]:
    """Returns the average precisions (19 costs, 2) and, for k > 1, the cross-validated one of each cost."""
    train, test = data.labels_trainval[:, number], data.labels_test[:, number]
    rows = draw_rows(train, k, data.seed, draw, number)
    x, targets = np.load(data.trainval[stage], mmap_mode='r')[rows], binarize_labels(train[rows])
    models = [make_svc(cost, data.seed).fit(x, targets) for cost in SVM_COSTS]
    weights = np.stack([model.coef_[0] for model in models], 1)  # (D, 19)
    kept = np.flatnonzero(test != -1)
    x_test = np.load(data.test[stage], mmap_mode='r')
    scores = np.concatenate([x_test[kept[i:i + 1024]] @ weights for i in range(0, len(kept), 1024)])  # (kept, 19)
    scores += np.array([model.intercept_[0] for model in models])
    folds = min(SVM_FOLDS, k)
    cv = [_cross_validate(x, targets, cost, folds, data.seed) for cost in SVM_COSTS] if folds > 1 else None
    return {'ap': [_compute_aps(column, test[kept]) for column in scores.T], 'cv': cv}


def make_svc(cost: float, seed: int) -> Any:
    """Creates the protocol's LinearSVC."""
    from sklearn.svm import LinearSVC

    return LinearSVC(C=cost, random_state=seed, **LINEAR_SVC)


def binarize_labels(labels: np.ndarray) -> np.ndarray:
    """Returns the protocol's training targets: 1 for present, else -1. Difficult images are negatives."""
    return np.where(labels == 1, 1, -1)


def draw_rows(labels: np.ndarray, k: int, seed: int, draw: int, number: int) -> np.ndarray:
    """Draws the low-shot rows of class `number`: k labelled 1 and 19 k labelled 0, without replacement, ascending.

    MMSelfSup draws with an unseeded `random.sample`; here each (seed, draw, k, class) has its own generator.
    """
    rng = random.Random(f'{seed} {draw} {k} {number}')
    positive = rng.sample(np.flatnonzero(labels == 1).tolist(), k)
    negative = rng.sample(np.flatnonzero(labels == 0).tolist(), LOW_SHOT_NEGATIVES * k)
    return np.sort(np.array(positive + negative))


def _cross_validate(x: np.ndarray, targets: np.ndarray, cost: float, folds: int, seed: int) -> float:
    from sklearn.model_selection import cross_val_score

    return float(cross_val_score(make_svc(cost, seed), x, targets, cv=folds, scoring='average_precision').mean())


def _compute_aps(scores: np.ndarray, labels: np.ndarray) -> list[float]:
    return [envelope_ap(scores, labels == 1), eleven_point_ap(scores, labels == 1)]
