"""Linear SVMs on fixed features, one class against the rest: what one process fits, and the file of what is finished.

The protocol is that of MMSelfSup's VOC07 benchmark; every number of it is here.
"""
import functools
import json
import random
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...runtime.files import explain_write_errors, write_atomically
from ..metrics import eleven_point_ap, envelope_ap
from ..protocols import LINEAR_SVC, LOW_SHOT_NEGATIVES, SVM_COST_AT_K1, SVM_COSTS, SVM_FOLDS
from .pool import DiedError, in_processes

EVERY = 30.0  # seconds between lines of progress
FORMAT = 3  # to be raised where a result is another one for the same parameters
Task = tuple[Any, ...]  # ('cv' or 'test', tap, class, cost) or ('low-shot', tap, k, sample, class)


@dataclass(frozen=True)
class Table:
    """What a process needs: where the normalised features lie (.npy, float64), and the labels (N, classes)."""

    trainval: dict[str, Path]  # by tap
    test: dict[str, Path]
    labels_trainval: np.ndarray  # 1 present, 0 absent, -1 difficult only
    labels_test: np.ndarray
    seed: int


def normalize_rows(x: np.ndarray) -> np.ndarray:
    """Rows / (their Euclidean norm + 1e-5), float64."""
    x = np.asarray(x, np.float64)
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-5)


def svc(cost: float, seed: int) -> Any:
    from sklearn.svm import LinearSVC

    return LinearSVC(C=cost, random_state=seed, **LINEAR_SVC)


def signs(labels: np.ndarray) -> np.ndarray:
    """The protocol's training labels: 1, else -1; difficult images are trained as negatives."""
    return np.where(labels == 1, 1, -1)


def draw(labels: np.ndarray, k: int, seed: int, sample: int, number: int) -> np.ndarray:
    """Low-shot rows of class `number`, in ascending order: k labelled 1 and 19 k labelled 0, without replacement.

    The original draws with an unseeded `random.sample`; here each (seed, sample, k, class) has a generator of its own.
    """
    rng = random.Random(f'{seed} {sample} {k} {number}')
    positive = rng.sample(np.flatnonzero(labels == 1).tolist(), k)
    negative = rng.sample(np.flatnonzero(labels == 0).tolist(), LOW_SHOT_NEGATIVES * k)
    return np.sort(np.array(positive + negative))


def _both(scores: np.ndarray, labels: np.ndarray) -> list[float]:
    return [envelope_ap(scores, labels == 1), eleven_point_ap(scores, labels == 1)]


def _unconverged(caught: Sequence[warnings.WarningMessage]) -> int:
    from sklearn.exceptions import ConvergenceWarning

    return sum(issubclass(w.category, ConvergenceWarning) for w in caught)


def _cross_validate(x: np.ndarray, y: np.ndarray, cost: float, folds: int, seed: int) -> float:
    from sklearn.model_selection import cross_val_score

    return float(cross_val_score(svc(cost, seed), x, y, cv=folds, scoring='average_precision').mean())


def run_task(task: Task, table: Table) -> dict[str, Any]:
    """The result of one task; it depends on nothing but `task` and `table`. One thread."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        result = {'cv': _run_cv, 'test': _run_test, 'low-shot': _run_low_shot}[task[0]](table, *task[1:])
    return {**result, 'unconverged': _unconverged(caught)}


def _run_cv(table: Table, tap: str, number: int, cost: float) -> dict[str, Any]:
    x = np.load(table.trainval[tap], mmap_mode='r')
    return {'cv': _cross_validate(x, signs(table.labels_trainval[:, number]), cost, SVM_FOLDS, table.seed)}


def _run_test(table: Table, tap: str, number: int, cost: float) -> dict[str, Any]:
    """Refit on all trainval rows; difficult test images are left out."""
    x, x_test = np.load(table.trainval[tap], mmap_mode='r'), np.load(table.test[tap], mmap_mode='r')
    labels = table.labels_test[:, number]
    scores = svc(cost, table.seed).fit(x, signs(table.labels_trainval[:, number])).decision_function(x_test)
    return {'ap': _both(scores[labels != -1], labels[labels != -1])}


def _run_low_shot(table: Table, tap: str, k: int, sample: int, number: int) -> dict[str, Any]:
    """-> average precisions (19 costs, 2), and the cross-validated one of each cost where k allows it."""
    train, test = table.labels_trainval[:, number], table.labels_test[:, number]
    rows = draw(train, k, table.seed, sample, number)
    x, y = np.load(table.trainval[tap], mmap_mode='r')[rows], signs(train[rows])
    fitted = [svc(cost, table.seed).fit(x, y) for cost in SVM_COSTS]
    kept = np.flatnonzero(test != -1)
    weights = np.stack([model.coef_[0] for model in fitted], 1)  # (D, 19)
    scores = np.concatenate([part @ weights for part in _parts(np.load(table.test[tap], mmap_mode='r'), kept)])
    scores += np.array([model.intercept_[0] for model in fitted])
    folds = min(SVM_FOLDS, k)
    cv = [_cross_validate(x, y, cost, folds, table.seed) for cost in SVM_COSTS] if folds > 1 else None
    return {'ap': [_both(column, test[kept]) for column in scores.T], 'cv': cv}


def _parts(x: np.ndarray, rows: np.ndarray, size: int = 1024) -> Iterable[np.ndarray]:
    return (x[rows[i:i + size]] for i in range(0, len(rows), size))


class Finished:
    """The results so far, one JSON line each with its checksum; the task of a damaged line runs again.

    Nobody else may write to the file meanwhile (`alone`).
    """

    def __init__(self, path: Path) -> None:
        self.path, self.results, self.seconds = path, {}, {}
        if not path.is_file():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        whole = []
        for line in lines:
            try:
                *parts, crc = json.loads(line)
                if line.endswith(b'\n') and crc == _checksum(parts):
                    task, result, seconds = parts
                    self.results[tuple(task)], self.seconds[tuple(task)] = result, seconds
                    whole.append(line)
            except (ValueError, TypeError, RecursionError):
                continue
        if len(whole) < len(lines):
            with explain_write_errors(path, '--output'):
                write_atomically(path, lambda f: f.write(b''.join(whole)))

    def add(self, task: Task, result: dict[str, Any], seconds: float) -> None:
        parts = [task, result, round(seconds, 3)]
        with explain_write_errors(self.path, '--output'), open(self.path, 'a') as f:
            f.write(json.dumps([*parts, _checksum(parts)]) + '\n')
        self.results[task], self.seconds[task] = result, seconds


def _checksum(parts: list[Any]) -> int:
    return zlib.crc32(json.dumps(parts).encode())


def run_all(
    tasks: Sequence[Task], table: Table, finished: Finished, jobs: int, work: Callable[..., Any] = run_task,
) -> None:
    """Run what is not finished yet, in `jobs` processes of one thread; the order does not matter to any number.

    Raises:
        RuntimeError: a process was killed, or found no memory; what was finished is kept.
        OSError: what is finished cannot be written.
    """
    left = [task for task in tasks if task not in finished.results]
    if not left:
        return
    progress = Progress(len(tasks), len(tasks) - len(left))
    try:
        one = functools.partial(_timed, work, table)
        with closing((one(task) for task in left) if jobs == 1 else in_processes(one, left, jobs)) as results:
            for task, result, seconds in results:
                finished.add(task, result, seconds)
                progress.step()
    except (DiedError, MemoryError) as e:
        who = f'one of the {jobs} processes' if jobs > 1 else 'the process'
        what = 'found no memory' if isinstance(e, MemoryError) else str(e)
        advice = 'with fewer --jobs' if jobs > 1 else 'where more is free'
        raise RuntimeError(
            f'{who} {what}; run it again {advice}: what is finished is kept in {finished.path}') from None
    finally:
        progress.bar.close()


def _timed(work: Callable[..., Any], table: Table, task: Task) -> tuple[Task, Any, float]:
    began = time.perf_counter()
    return task, work(task, table), time.perf_counter() - began


class Progress:
    """How far the fits are, on stderr: a bar on a terminal, elsewhere a line every 30 s at most, and at the end."""

    def __init__(self, total: int, done: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.before, self.done, self.clock = total, done, done, clock
        self.began = self.said = clock()
        self.bar = tqdm(total=total, initial=done, unit='fit', disable=None, leave=False)

    def step(self) -> None:
        self.done += 1
        self.bar.update()
        now, last = self.clock(), self.done == self.total
        if self.bar.disable and (last or now - self.said >= EVERY):
            self.said, seconds = now, now - self.began
            rate = (self.done - self.before) / max(seconds, 1e-3)
            rest = f'in {_rough(seconds)}' if last else f'about {_rough((self.total - self.done) / rate)} left'
            print(f'svm: {self.done} of {self.total} fits, {float(f"{rate:.2g}"):g} fits/s, {rest}', file=sys.stderr)


def _rough(seconds: float) -> str:
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'


def full_tasks(finished: Finished, taps: Sequence[str], classes: int) -> list[Task]:
    """Cross-validation at each cost, and for each class where it is finished the refit at the best cost."""
    tasks = []
    for tap in taps:
        for c in range(classes):
            cv = [('cv', tap, c, cost) for cost in SVM_COSTS]
            tasks += cv
            if all(task in finished.results for task in cv):
                best = int(np.argmax([finished.results[task]['cv'] for task in cv]))  # first of equals
                tasks.append(('test', tap, c, SVM_COSTS[best]))
    return tasks


def full(
    table: Table, finished: Finished, taps: Sequence[str], names: Sequence[str], jobs: int,
) -> dict[str, dict[str, Any]]:
    """Per tap: mAP (fraction) by both definitions, and per class the cost, its cross-validated SVM_AP and the two APs."""
    for _ in 'cross-validation', 'refits':
        run_all(full_tasks(finished, taps, len(names)), table, finished, jobs)
    tasks = full_tasks(finished, taps, len(names))
    results = {}
    for tap in taps:
        rows = {}
        for kind, of, c, cost in tasks:
            if (kind, of) == ('test', tap):
                ap, ap11 = finished.results[kind, of, c, cost]['ap']
                cv = finished.results['cv', of, c, cost]['cv']
                rows[names[c]] = {'cost': cost, 'cv_ap': cv, 'ap': ap, 'ap_11point': ap11}
        results[tap] = {
            'mAP': float(np.mean([r['ap'] for r in rows.values()])),
            'mAP_11point': float(np.mean([r['ap_11point'] for r in rows.values()])), 'classes': rows,
            'unconverged': sum(finished.results[task]['unconverged'] for task in tasks if task[1] == tap)}
    return results


def low_shot_tasks(taps: Sequence[str], ks: Sequence[int], samples: int, classes: int) -> list[Task]:
    return [  # large k first: the last fits to end are short
        ('low-shot', tap, k, s, c)
        for tap in taps for k in sorted(ks, reverse=True) for s in range(samples) for c in range(classes)]


def low_shot(
    table: Table, finished: Finished, taps: Sequence[str], ks: Sequence[int], samples: int, classes: int, jobs: int,
) -> dict[str, dict[str, Any]]:
    """Per tap and k: statistics over the draws, with the cost that is best on test, and with one chosen without it."""
    run_all(low_shot_tasks(taps, ks, samples, classes), table, finished, jobs)
    results = {}
    for tap in taps:
        results[tap] = {'k': {}, 'unconverged': 0}
        for k in ks:
            rows = [[finished.results['low-shot', tap, k, s, c] for c in range(classes)] for s in range(samples)]
            ap = np.array([[r['ap'] for r in row] for row in rows])  # (samples, classes, costs, 2)
            cv = None if k == 1 else np.array([[r['cv'] for r in row] for row in rows])  # (samples, classes, costs)
            results[tap]['k'][k] = choose_costs(ap.mean(1), None if cv is None else cv.mean(1))
            results[tap]['unconverged'] += sum(r['unconverged'] for row in rows for r in row)
    return results


def choose_costs(ap: np.ndarray, cv: np.ndarray | None) -> dict[str, Any]:
    """(samples, costs, 2) test mAPs and (samples, costs) cross-validated ones, fractions -> statistics in percent.

    'oracle': one cost for all draws, the one of the highest mean on test, as published. 'honest': for each draw the
    cost of the highest cross-validated mean over the classes, on its training rows alone; without cv the cost 1.
    """
    best = int(ap[:, :, 0].mean(0).argmax())
    own = [SVM_COSTS.index(SVM_COST_AT_K1)] * len(ap) if cv is None else cv.argmax(1).tolist()
    honest = ap[np.arange(len(ap)), own]
    return {
        'oracle': {**_statistics(ap[:, best, 0]), 'mean_11point': percent(ap[:, best, 1].mean()), 'cost': SVM_COSTS[best]},
        'honest': {
            **_statistics(honest[:, 0]), 'mean_11point': percent(honest[:, 1].mean()),
            'costs': [SVM_COSTS[i] for i in own]}}


def _statistics(values: np.ndarray) -> dict[str, float]:
    return {name: percent(getattr(values, name)()) for name in ('mean', 'min', 'max', 'std')}


def percent(value: float) -> float:
    return round(100 * float(value), 2)
