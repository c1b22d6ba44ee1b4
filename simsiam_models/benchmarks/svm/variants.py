"""The two VOC07 benchmarks: SVMs from all images, and low-shot SVMs from k positives per class.

Each lists its tasks and turns their results into the numbers and the table of the published page.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..protocols import SVM_COST_AT_K1, SVM_COSTS
from .fits import SvmData, Task
from .jobs import FinishedTasks, run_tasks

Results = dict[str, dict[str, Any]]  # by stage


@dataclass(frozen=True)
class FullSvm:
    """SVMs from all trainval images; cross-validation chooses the cost of each class."""

    benchmark: ClassVar[str] = 'voc07_svm'
    stages: Sequence[str]
    names: Sequence[str]  # of the classes

    def list_tasks(self, finished: FinishedTasks) -> list[Task]:
        """Lists the cross-validation of each cost and, for classes where it is finished, the refit at the best cost."""
        tasks = []
        for stage in self.stages:
            for number in range(len(self.names)):
                cv = [('cv', stage, number, cost) for cost in SVM_COSTS]
                tasks += cv
                if not finished.select_missing(cv):
                    best = np.argmax([finished.results[task]['cv'] for task in cv])  # the first of equal ones
                    tasks.append(('test', stage, number, SVM_COSTS[best]))
        return tasks

    def summarize(self, stage: str, finished: FinishedTasks) -> dict[str, Any]:
        """Returns mAP by both definitions, and each class's cost, cross-validated AP and two APs; all as fractions."""
        tasks = [task for task in self.list_tasks(finished) if task[1] == stage]
        rows = {}
        for kind, _, number, cost in tasks:
            if kind == 'test':
                ap, ap11 = finished.results['test', stage, number, cost]['ap']
                cv = finished.results['cv', stage, number, cost]['cv']
                rows[self.names[number]] = {'cost': cost, 'cv_ap': cv, 'ap': ap, 'ap_11point': ap11}
        return {
            'mAP': float(np.mean([row['ap'] for row in rows.values()])),
            'mAP_11point': float(np.mean([row['ap_11point'] for row in rows.values()])), 'classes': rows,
            'unconverged': sum(finished.results[task]['unconverged'] for task in tasks)}

    def compute_metrics(self, result: dict[str, Any]) -> dict[str, float]:
        """Returns the metrics of a record, in percent."""
        return {name: to_percent(result[name]) for name in ('mAP', 'mAP_11point')}

    def score(self, result: dict[str, Any]) -> float:
        """Returns the number whose maximum defines the best layer."""
        return float(result['mAP'])

    def format_table(self, results: Results) -> str:
        """Returns a column per stage."""
        lines = ['VOC07 SVM, mAP in percent  ' + ''.join(f'{f"feature{stage[-1]}":>10}' for stage in results)]
        for name, key in (('envelope AP (as published)', 'mAP'), ('11-point AP', 'mAP_11point')):
            lines.append(f'{name:27}' + ''.join(f'{100 * result[key]:10.2f}' for result in results.values()))
        return '\n'.join(lines)


@dataclass(frozen=True)
class LowShotSvm:
    """SVMs from several draws of k positives and 19 k negatives, for each k."""

    benchmark: ClassVar[str] = 'voc07_lowshot_svm'
    stages: Sequence[str]
    names: Sequence[str]  # of the classes
    ks: Sequence[int]
    draws: int

    def list_tasks(self, finished: FinishedTasks) -> list[Task]:
        """Lists all draws, large k first, so that the last tasks to finish are short."""
        return [
            ('low-shot', stage, k, draw, number) for stage in self.stages for k in sorted(self.ks, reverse=True)
            for draw in range(self.draws) for number in range(len(self.names))]

    def summarize(self, stage: str, finished: FinishedTasks) -> dict[str, Any]:
        """Returns statistics over the draws for each k, with the best cost on test and with one chosen without test."""
        summary: dict[str, Any] = {'k': {}, 'unconverged': 0}
        for k in self.ks:
            rows = [
                [finished.results['low-shot', stage, k, draw, number] for number in range(len(self.names))]
                for draw in range(self.draws)]
            ap = np.array([[r['ap'] for r in row] for row in rows])  # (draws, classes, costs, 2)
            cv = None if k == 1 else np.array([[r['cv'] for r in row] for row in rows])  # (draws, classes, costs)
            summary['k'][k] = choose_costs(ap.mean(1), None if cv is None else cv.mean(1))
            summary['unconverged'] += sum(r['unconverged'] for row in rows for r in row)
        return summary

    def compute_metrics(self, result: dict[str, Any]) -> dict[str, float]:
        """Returns the metrics of a record, in percent."""
        return {
            f'k={k}{suffix}': r[rule]['mean'] for rule, suffix in (('oracle', ''), ('honest', '_honest'))
            for k, r in result['k'].items()}

    def score(self, result: dict[str, Any]) -> float:
        """Returns the number whose maximum defines the best layer: the sum over k, with costs chosen as published."""
        return float(sum(r['oracle']['mean'] for r in result['k'].values()))

    def format_table(self, results: Results) -> str:
        """Returns a column per k."""
        lines = [f'{"VOC07 low-shot SVM, mAP in percent":42}' + ''.join(f'{f"k={k}":>8}' for k in self.ks)]
        for stage, result in results.items():
            for rule, text in (('oracle', 'cost best on test (as published)'), ('honest', 'cost chosen without test')):
                for statistic, title in (('mean', f'feature{stage[-1]} {text}'), ('std', '  std over the draws')):
                    values = [result['k'][k][rule][statistic] for k in self.ks]
                    lines.append(f'{title:42}' + ''.join(f'{value:8.2f}' for value in values))
        return '\n'.join(lines)


def fit_svms(svm: FullSvm | LowShotSvm, data: SvmData, finished: FinishedTasks, jobs: int) -> None:
    """Runs all tasks, including those that follow from the results of others."""
    while finished.select_missing(tasks := svm.list_tasks(finished)):
        run_tasks(tasks, data, finished, jobs)


def choose_costs(ap: np.ndarray, cv: np.ndarray | None) -> dict[str, Any]:
    """Chooses costs by two rules and returns the statistics of each over the draws, in percent.

    'oracle', as published: one cost for all draws, the one with the highest mean on test. 'honest': for each draw, the
    cost with the highest cross-validated mean over the classes, from its training rows alone; cost 1 without `cv`.

    Args:
        ap: test mAPs (draws, costs, 2), fractions.
        cv: cross-validated mAPs (draws, costs), fractions.
    """
    best = int(ap[:, :, 0].mean(0).argmax())
    own = [SVM_COSTS.index(SVM_COST_AT_K1)] * len(ap) if cv is None else cv.argmax(1).tolist()
    honest = ap[np.arange(len(ap)), own]
    return {
        'oracle': {**_summarize_draws(ap[:, best]), 'cost': SVM_COSTS[best]},
        'honest': {**_summarize_draws(honest), 'costs': [SVM_COSTS[i] for i in own]}}


def _summarize_draws(ap: np.ndarray) -> dict[str, float]:
    """Computes the statistics of (draws, 2), in percent."""
    statistics = {name: to_percent(getattr(ap[:, 0], name)()) for name in ('mean', 'min', 'max', 'std')}
    return {**statistics, 'mean_11point': to_percent(ap[:, 1].mean())}


def to_percent(value: float) -> float:
    """Converts a fraction to percent with two decimals."""
    return round(100 * float(value), 2)
