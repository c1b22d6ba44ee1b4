"""Results of the VOC07 SVMs: records, and tables as the published page has them."""
from pathlib import Path
from typing import Any

from ...runtime.files import explain_write_errors
from ..results.record import print_record, record_path, write_record
from .fits import LINEAR_SVC, Finished, percent


def report(
    output: Path, protocol: dict[str, Any], backbone: Any, data: Any, results: dict[str, Any],
    finished: Finished, unreadable: int, seconds: dict[str, float],
) -> None:
    """One record per tap, then the table as the page has it, and measured beside published for the best tap."""
    low_shot = 'k' in protocol
    kind = 'voc07_lowshot_svm' if low_shot else 'voc07_svm'
    records = {}
    for tap, result in results.items():
        benchmark, of_tap = f'{kind}_feature{tap[-1]}', {**protocol, 'tap': tap}
        path = record_path(output, benchmark, backbone, of_tap, data.data())
        extra = {
            'results': result, 'finished_fits': finished.path.name, 'unreadable': unreadable,
            'best_layer': best_tap(results)}
        with explain_write_errors(path, '--output'):
            records[tap] = write_record(
                path, benchmark, of_tap, backbone, data.data(), _metrics(result), seconds[tap], extra)
    best = best_tap(results)
    print(low_shot_table(results) if low_shot else full_table(results))
    if len(results) > 1:
        print(f'best layer: feature{best[-1]}')
    if left := sum(r['unconverged'] for r in results.values()):
        print(
            f'{left} fits ended at the limit of {LINEAR_SVC["max_iter"]} iterations before they converged: so it is in the '
            'published protocol, which has the same solver and limit, and the numbers stand')
    print(print_record(records[best]))


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    """Percent."""
    if 'mAP' in result:
        return {name: percent(result[name]) for name in ('mAP', 'mAP_11point')}
    return {
        f'k={k}{suffix}': r[rule]['mean'] for rule, suffix in (('oracle', ''), ('honest', '_honest'))
        for k, r in result['k'].items()}


def best_tap(results: dict[str, Any]) -> str:
    """The tap of the highest mAP; low-shot: of the highest mean over k, costs chosen as published."""
    def score(tap: str) -> float:
        r = results[tap]
        return r['mAP'] if 'mAP' in r else sum(v['oracle']['mean'] for v in r['k'].values())

    return max(results, key=score)


def full_table(results: dict[str, Any]) -> str:
    lines = ['VOC07 SVM, mAP in percent  ' + ''.join(f'{f"feature{tap[-1]}":>10}' for tap in results)]
    for name, key in (('envelope SVM_AP (as published)', 'mAP'), ('11-point AP', 'mAP_11point')):
        lines.append(f'{name:27}' + ''.join(f'{100 * r[key]:10.2f}' for r in results.values()))
    return '\n'.join(lines)


def low_shot_table(results: dict[str, Any]) -> str:
    ks = list(next(iter(results.values()))['k'])
    lines = [f'{"VOC07 low-shot SVM, mAP in percent":42}' + ''.join(f'{f"k={k}":>8}' for k in ks)]
    for tap, result in results.items():
        for rule, text in (('oracle', 'cost best on test (as published)'), ('honest', 'cost chosen without test')):
            for statistic in ('mean', 'std'):
                start = f'feature{tap[-1]} {text}' if statistic == 'mean' else '  std over the draws'
                lines.append(f'{start:42}' + ''.join(f'{result["k"][k][rule][statistic]:8.2f}' for k in ks))
    return '\n'.join(lines)
