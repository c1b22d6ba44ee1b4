"""VOC07 SVMs: average precision by its definitions, selection and draws by the protocol, and runs that go on."""
import argparse
import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from pathlib import Path

import layouts_benchmarks as layouts
import numpy as np
import pytest
import warm
from conftest import ROOT
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from simsiam_models.benchmarks import backbone
from simsiam_models.benchmarks.metrics import eleven_point_ap, envelope_ap
from simsiam_models.benchmarks.protocols import LINEAR_SVC, LOW_SHOT_KS
from simsiam_models.benchmarks.protocols import SVM_COSTS as COSTS
from simsiam_models.benchmarks.results.compare import REQUIRED
from simsiam_models.benchmarks.svm import command as svm
from simsiam_models.benchmarks.svm import fits as svm_fits
from simsiam_models.benchmarks.svm.fits import draw_rows, fit_task
from simsiam_models.benchmarks.svm.jobs import FinishedTasks, Progress, map_in_processes, run_tasks
from simsiam_models.benchmarks.svm.variants import FullSvm, LowShotSvm, choose_costs, fit_svms

NAMES = ['cat', 'cow', 'dog']


class Rows:
    """Features as write_svm_data takes them."""

    def __init__(self, x: np.ndarray, unreadable: tuple[int, ...] = (), digest: str = 'rows') -> None:
        self.x, self.unreadable = x.astype(np.float32), dict.fromkeys(unreadable, 'broken')
        self.readable = np.array([i for i in range(len(x)) if i not in unreadable])
        self.digest = digest

    def array(self, name: str) -> np.ndarray:
        return self.x


def problem(n: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, 12) features and (n, 3) labels; a sixth is difficult for each class, and features tell classes roughly."""
    rng = np.random.default_rng(seed)
    centres = np.eye(3, 12)
    labels = np.zeros((n, 3), np.int8)
    labels[np.arange(n), np.arange(n) % 3] = 1
    x = labels @ centres + noise * rng.normal(size=(n, 12))
    labels[(rng.random((n, 3)) < 1 / 6) & (labels == 0)] = -1
    return x, labels


def table(folder: Path, noise: float = 0.6, n: int = 90, seed: int = 0) -> svm_fits.SvmData:
    (x, labels), (x_test, labels_test) = problem(n, noise, 1), problem(60, noise, 2)
    return svm_fits.write_svm_data(folder / 'work', (Rows(x), Rows(x_test)), ['feat5'], (labels, labels_test), seed)


def fit_full(made: svm_fits.SvmData, finished: FinishedTasks) -> dict:
    variant = FullSvm(['feat5'], NAMES)
    fit_svms(variant, made, finished, 1)
    return variant.summarize('feat5', finished)


def reference_svc(cost: float, seed: int = 0) -> LinearSVC:
    """Protocol 4.3, written out again."""
    return LinearSVC(
        C=cost, class_weight={1: 2, -1: 1}, intercept_scaling=1.0, penalty='l2', loss='squared_hinge', tol=0.0001,
        dual=True, max_iter=2000, random_state=seed)


def parse(*args: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    svm.add_arguments(parser)
    return parser.parse_args([str(a) for a in args])


# --- average precision

def points(scores: np.ndarray, positive: np.ndarray) -> list[tuple[Fraction, Fraction]]:
    """(recall, precision) at each score as a threshold, exactly."""
    found = []
    for threshold in set(scores.tolist()):
        chosen = scores >= threshold
        hits = int((chosen & positive).sum())
        found.append((Fraction(hits, int(positive.sum())), Fraction(hits, int(chosen.sum()))))
    return found


def by_definition(scores: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """Area under r -> the highest precision at a recall of r or more; and its mean at 0, 0.1, ..., 1."""
    found = points(scores, positive)

    def highest(r: Fraction) -> Fraction:
        return max((p for recall, p in found if recall >= r), default=Fraction(0))

    steps = sorted({Fraction(0), *(r for r, _ in found)})
    area = sum((b - a) * highest(b) for a, b in zip(steps, steps[1:], strict=False))
    return float(area), float(sum(highest(Fraction(t, 10)) for t in range(11)) / 11)


def test_the_average_precisions_of_small_rankings_are_those_computed_by_hand():
    five = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    right = np.array([1, 0, 1, 0, 1], bool)  # precision 1, 2/3, 3/5 at recall 1/3, 2/3, 1
    assert envelope_ap(five, right) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert eleven_point_ap(five, right) == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11)
    three, late = np.array([3.0, 2.0, 1.0]), np.array([0, 1, 1], bool)  # precision 1/2, 2/3: the envelope is 2/3
    assert envelope_ap(three, late) == pytest.approx(2 / 3)
    assert average_precision_score(late, three) == pytest.approx((1 / 2 + 2 / 3) / 2)  # another definition
    assert eleven_point_ap(three, late) == pytest.approx(2 / 3)


@pytest.mark.parametrize('seed', range(20))
def test_both_average_precisions_equal_their_definitions(seed: int):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 60))
    scores = rng.integers(0, 1 + int(rng.integers(1, 200)), n) / 7  # with ties
    positive = rng.random(n) < rng.choice([0.1, 0.5, 0.9])
    positive[rng.integers(n)] = True
    assert (envelope_ap(scores, positive), eleven_point_ap(scores, positive)) == pytest.approx(
        by_definition(scores, positive), abs=1e-12)
    order = rng.permutation(n)
    assert envelope_ap(scores[order], positive[order]) == envelope_ap(scores, positive)


def test_a_recall_of_three_in_ten_counts_as_0_3():
    positive = np.array([1] * 3 + [0] * 7 + [1] * 7, bool)  # 0.1 * 3 > 3 / 10 in floating point
    scores = -np.arange(17.0)
    assert eleven_point_ap(scores, positive) == pytest.approx((4 * 1 + 7 * 10 / 17) / 11)


@pytest.mark.parametrize('scores, positive, said', [
    ([1.0, 2.0], [False, False], 'at least one positive'), ([1.0, float('nan')], [True, False], 'NaN')])
def test_no_average_precision_is_an_error(scores: list, positive: list, said: str):
    for ap in (envelope_ap, eleven_point_ap):
        with pytest.raises(ValueError, match=said):
            ap(np.array(scores), np.array(positive))


# --- the protocol

def test_costs_and_parameters_are_those_of_the_protocol():
    assert COSTS == (
        1, 10, 100, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625, 0.001953125, 0.0009765625, 0.00048828125,
        0.000244140625, 0.0001220703125, 6.103515625e-05, 3.0517578125e-05, 1.52587890625e-05, 7.62939453125e-06,
        3.814697265625e-06, 1.9073486328125e-06)
    assert svm_fits.make_svc(10.0, 3).get_params() == reference_svc(10.0, 3).get_params()


def test_features_are_float64_rows_over_their_norm_plus_1e_5():
    x = np.array([[3, 4], [0, 0]], np.float32)
    rows = svm_fits.normalize_rows(x)
    assert rows.dtype == np.float64
    np.testing.assert_allclose(rows, [[3 / 5.00001, 4 / 5.00001], [0, 0]], rtol=1e-15)


def test_the_table_holds_normalised_readable_rows_and_their_labels(tmp_path: Path):
    (x, labels), (x_test, labels_test) = problem(30, 0.5, 1), problem(12, 0.5, 2)
    made = svm_fits.write_svm_data(tmp_path, (Rows(x, (4, 7)), Rows(x_test)), ['feat5'], (labels, labels_test), 0)
    kept = np.delete(np.arange(30), [4, 7])
    np.testing.assert_array_equal(
        np.load(made.trainval['feat5']), svm_fits.normalize_rows(x.astype(np.float32)[kept]))
    np.testing.assert_array_equal(made.labels_trainval, labels[kept])
    assert len(np.load(made.test['feat5'])) == len(made.labels_test) == 12


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs a disk that is always full: /dev/full')
def test_a_full_disk_is_one_sentence_that_names_the_output(tmp_path: Path):
    x, labels = problem(30, 0.5, 1)
    (tmp_path / 'feat5_trainval.npy.part').symlink_to('/dev/full')
    with pytest.raises(OSError, match=r'--output: .*feat5_trainval.npy cannot be written \(No space left'):
        svm_fits.write_svm_data(tmp_path, (Rows(x), Rows(x)), ['feat5'], (labels, labels), 0)
    assert not list(tmp_path.iterdir())
    finished = FinishedTasks(tmp_path / 'f.jsonl')
    finished.path.symlink_to('/dev/full')
    with pytest.raises(OSError, match=r'--output: .*f.jsonl cannot be written \(No space left'):
        run_tasks([('cv', 'feat5', 0, 1.0)], None, finished, 1, lambda task, made: {})


def test_the_table_is_written_and_not_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def never(*args, **kwargs):
        raise AssertionError('a full disk would end the process by SIGBUS')

    monkeypatch.setattr(np.lib.format, 'open_memmap', never)
    x, labels = problem(30, 0.5, 1)
    svm_fits.write_svm_data(tmp_path, (Rows(x), Rows(x)), ['feat5'], (labels, labels), 0)
    monkeypatch.undo()
    size = (tmp_path / 'feat5_test.npy').stat().st_size
    assert size == 128 + 30 * 12 * 8


def test_a_feature_that_is_not_finite_is_refused(tmp_path: Path):
    x, labels = problem(30, 0.5, 1)
    x[3, 2] = np.inf
    with np.errstate(invalid='ignore'), pytest.raises(ValueError, match='feat5 of some image is not finite'):
        svm_fits.write_svm_data(tmp_path, (Rows(x), Rows(x)), ['feat5'], (labels, labels), 0)


def test_selection_and_result_equal_scikit_learns_own_calls(tmp_path: Path):
    made = table(tmp_path)
    results = fit_full(made, FinishedTasks(tmp_path / 'f.jsonl'))
    x, x_test = np.load(made.trainval['feat5']), np.load(made.test['feat5'])
    costs = set()
    for c, name in enumerate(NAMES):
        y = np.where(made.labels_trainval[:, c] == 1, 1, -1)
        scores = [
            cross_val_score(reference_svc(cost), x, y, cv=3, scoring='average_precision').mean() for cost in COSTS]
        best = next(i for i, score in enumerate(scores) if score == max(scores))
        assert results['classes'][name]['cost'] == COSTS[best]
        assert results['classes'][name]['cv_ap'] == scores[best]
        kept = made.labels_test[:, c] != -1
        decision = reference_svc(COSTS[best]).fit(x, y).decision_function(x_test)[kept]
        assert (results['classes'][name]['ap'], results['classes'][name]['ap_11point']) == pytest.approx(
            by_definition(decision, made.labels_test[kept, c] == 1), abs=1e-12)
        costs.add(COSTS[best])
    assert len(costs) > 1  # or the test would say little about the selection
    assert results['mAP'] == pytest.approx(np.mean([r['ap'] for r in results['classes'].values()]))


def test_of_equal_costs_the_first_is_taken(tmp_path: Path):
    made = table(tmp_path, noise=0.02)
    finished = FinishedTasks(tmp_path / 'f.jsonl')
    results = fit_full(made, finished)
    scores = [finished.results['cv', 'feat5', 0, cost]['cv'] for cost in COSTS]
    equal = [cost for cost, score in zip(COSTS, scores, strict=True) if score == max(scores)]
    assert len(equal) > 1 and results['classes']['cat']['cost'] == equal[0] == 1.0


def test_difficult_images_train_as_negatives(tmp_path: Path):
    made = table(tmp_path)
    as_absent = svm_fits.SvmData(
        made.trainval, made.test, np.where(made.labels_trainval == -1, 0, made.labels_trainval), made.labels_test, 0)
    assert (made.labels_trainval == -1).any()
    for task in (('cv', 'feat5', 1, 1.0), ('test', 'feat5', 1, 1.0)):
        assert fit_task(task, made) == fit_task(task, as_absent)


def test_difficult_images_are_left_out_of_the_test(tmp_path: Path):
    made = table(tmp_path)
    tasks = [('test', 'feat5', 1, 1.0), ('low-shot', 'feat5', 2, 0, 1)]
    before = [fit_task(task, made) for task in tasks]
    x_test = np.load(made.test['feat5'])
    difficult = made.labels_test[:, 1] == -1
    assert difficult.any()
    x_test[difficult] = x_test[made.labels_test[:, 1] == 1][0]  # would be ranked first
    np.save(made.test['feat5'], x_test)
    assert [fit_task(task, made) for task in tasks] == before
    as_absent = svm_fits.SvmData(
        made.trainval, made.test, made.labels_trainval, np.where(made.labels_test == -1, 0, made.labels_test), 0)
    assert all(fit_task(task, as_absent)['ap'] != b['ap'] for task, b in zip(tasks, before, strict=True))


# --- low-shot

@pytest.mark.parametrize('k', [1, 2, 8])
def test_a_draw_has_k_positives_and_19_k_negatives_without_difficult_or_repeated_images(k: int):
    labels = problem(900, 0.5, 3)[1][:, 1]
    rows = draw_rows(labels, k, 0, 0, 1)
    assert len(np.unique(rows)) == len(rows) == 20 * k
    assert [(labels[rows] == value).sum() for value in (1, 0, -1)] == [k, 19 * k, 0]
    assert (np.diff(rows) > 0).all()


def test_draws_are_repeatable_and_differ_by_seed_sample_k_and_class():
    labels = problem(900, 0.5, 3)[1][:, 1]
    first = draw_rows(labels, 8, 0, 0, 1)
    np.testing.assert_array_equal(first, draw_rows(labels, 8, 0, 0, 1))
    assert len({tuple(draw_rows(labels, 8, *of)) for of in ((0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2))}) == 4
    assert not set(draw_rows(labels, 4, 0, 0, 1)) < set(first)  # independent, not nested


@pytest.mark.parametrize('seed', [0, 7])
def test_every_low_shot_fit_equals_scikit_learns(seed: int, tmp_path: Path):
    made = table(tmp_path, n=600, seed=seed)
    result = fit_task(('low-shot', 'feat5', 4, 2, 1), made)
    x, x_test = np.load(made.trainval['feat5']), np.load(made.test['feat5'])
    rows = draw_rows(made.labels_trainval[:, 1], 4, seed, 2, 1)
    y = np.where(made.labels_trainval[rows, 1] == 1, 1, -1)
    kept = made.labels_test[:, 1] != -1
    for i, cost in enumerate(COSTS):
        decision = reference_svc(cost, seed).fit(x[rows], y).decision_function(x_test)[kept]
        assert result['ap'][i] == pytest.approx(by_definition(decision, made.labels_test[kept, 1] == 1), abs=1e-9)
        assert result['cv'][i] == cross_val_score(
            reference_svc(cost, seed), x[rows], y, cv=3, scoring='average_precision').mean()


def test_the_published_choice_is_the_best_on_test_and_the_honest_one_knows_no_test():
    rng = np.random.default_rng(0)
    ap, cv = rng.random((5, 19, 2)), rng.random((5, 19))
    chosen = choose_costs(ap, cv)
    best = max(range(19), key=lambda i: ap[:, i, 0].mean())
    column = 100 * ap[:, best, 0]
    assert chosen['oracle'] == {
        'mean': round(column.mean(), 2), 'min': round(column.min(), 2), 'max': round(column.max(), 2),
        'std': round(column.std(), 2), 'mean_11point': round(100 * ap[:, best, 1].mean(), 2), 'cost': COSTS[best]}
    own = [max(range(19), key=lambda i: cv[s, i]) for s in range(5)]
    assert chosen['honest']['costs'] == [COSTS[i] for i in own]
    assert chosen['honest']['mean'] == round(np.mean([100 * ap[s, i, 0] for s, i in enumerate(own)]), 2)
    other = choose_costs(1 - ap, cv)
    assert other['honest']['costs'] == chosen['honest']['costs'] and other['oracle']['cost'] != chosen['oracle']['cost']


def test_one_positive_allows_no_cross_validation_and_the_cost_is_1(tmp_path: Path):
    made = table(tmp_path)
    assert fit_task(('low-shot', 'feat5', 1, 0, 0), made)['cv'] is None
    variant, finished = LowShotSvm(['feat5'], NAMES, [1, 2], 2), FinishedTasks(tmp_path / 'f.jsonl')
    fit_svms(variant, made, finished, 1)
    results = variant.summarize('feat5', finished)['k']
    assert results[1]['honest']['costs'] == [1.0, 1.0]
    assert results[1]['oracle']['mean'] >= results[1]['honest']['mean']


# --- runs

def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(tmp_path: Path):
    made = table(tmp_path)
    whole = fit_full(made, FinishedTasks(tmp_path / 'whole.jsonl'))
    done = []

    def killed(task, made):
        if len(done) == 20:
            raise KeyboardInterrupt
        done.append(task)
        return fit_task(task, made)

    path = tmp_path / 'f.jsonl'
    tasks = [('cv', 'feat5', c, cost) for c in range(3) for cost in COSTS]
    with pytest.raises(KeyboardInterrupt):
        run_tasks(tasks, made, FinishedTasks(path), 1, killed)
    path.write_bytes(path.read_bytes() + b'[["cv", "feat5", 2, 1.0], {"cv": 0.')  # the kill cut this line off
    again = FinishedTasks(path)
    assert set(again.results) == set(done)
    assert fit_full(made, again) == whole
    assert len(path.read_text().splitlines()) == len(tasks) + 3
    assert FinishedTasks(path).results == FinishedTasks(tmp_path / 'whole.jsonl').results

    def never(task, made):
        raise AssertionError

    run_tasks(tasks, made, FinishedTasks(path), 1, never)


def die(task: tuple, made: svm_fits.SvmData) -> None:  # a process imports it by its name
    os._exit(9)


def much(task: tuple, made: svm_fits.SvmData) -> dict:
    return {'cv': np.zeros((2**25, 2**30))}


@pytest.fixture
def warm_processes() -> Iterator[None]:
    with warm.spawned():
        yield


@pytest.mark.usefixtures('warm_processes')
def test_many_processes_find_what_one_does_and_a_killed_one_is_reported(tmp_path: Path):
    made = table(tmp_path)
    one, two = FinishedTasks(tmp_path / '1.jsonl'), FinishedTasks(tmp_path / '2.jsonl')
    tasks = [('low-shot', 'feat5', 2, s, c) for s in range(2) for c in range(3)]
    run_tasks(tasks, made, one, 1)
    run_tasks(tasks, made, two, 2)
    assert one.results == two.results

    with pytest.raises(RuntimeError, match='one of the 2 processes ended with exit code 9.*fewer --jobs'):
        run_tasks([('cv', 'feat5', 0, 1.0)] * 2, made, FinishedTasks(tmp_path / '3.jsonl'), 2, die)


class TwoArgumentsError(Exception):
    def __init__(self, a: str, b: str) -> None:
        super().__init__(f'{a} and {b}')


def unsendable(x: str) -> None:
    raise TwoArgumentsError(x, 'y')


@pytest.mark.usefixtures('warm_processes')
def test_processes_take_every_item_once_and_an_error_in_one_is_raised():
    assert sorted(map_in_processes(abs, range(-9, 0), 2)) == list(range(1, 10))
    with pytest.raises(ValueError, match="invalid literal for int.*'x'") as e:
        list(map_in_processes(int, ['1', 'x'], 1))
    assert 'Traceback' in str(e.value.__cause__)  # of that process
    with pytest.raises(BrokenProcessPool, match='ended with exit code 9'):
        list(map_in_processes(os._exit, [9, 9], 1))
    with pytest.raises(BrokenProcessPool, match='was killed, most likely because memory ran out'):
        list(map_in_processes(functools.partial(signal.raise_signal), [signal.SIGKILL], 1))
    with pytest.raises(RuntimeError, match='TwoArgumentsError: x and y'):
        list(map_in_processes(unsendable, ['x'], 1))  # an error whose copy cannot be made from its text
    blocked, environment = functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK), dict(os.environ)
    before = blocked(())
    theirs, = map_in_processes(blocked, [()], 1)  # what a terminal sends to all is for the first process to act on
    assert theirs >= {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1} and blocked(()) == before == set()
    assert list(map_in_processes(os.getenv, ['OMP_NUM_THREADS'], 1)) == ['1'] and os.environ == environment


SLEEPY = """
import fcntl, multiprocessing, os, sys, time
from simsiam_models import cli
from simsiam_models.benchmarks.svm import jobs

def sleep(task, table):
    with open(f'{os.getpid()}.new', 'w') as mine:
        fcntl.lockf(mine, fcntl.LOCK_EX)
        os.rename(mine.name, f'{os.getpid()}.busy')
        time.sleep(600)

def main():
    multiprocessing.set_executable(os.environ['WARM'])
    jobs.run_tasks.__defaults__ = sleep,
    sys.exit(cli.main(['svm', *sys.argv[1:]]))
"""


@pytest.mark.parametrize('name, to, code', [('SIGINT', 'all', 130), ('SIGTERM', 'all', 143), ('SIGKILL', 'one', -9)])
def test_a_stopped_or_killed_command_leaves_one_line_and_no_process(
    name: str, to: str, code: int, devkit: Path, tmp_path: Path,
):
    (tmp_path / 'sleepy.py').write_text(SLEEPY)
    args = (devkit, *TINY, '--jobs', '2', '--taps', 'feat5', '--output', 'out', '--cache', 'cache')
    with open(tmp_path / 'err', 'w') as err:
        process = subprocess.Popen(
            [sys.executable, '-c', 'import sleepy; sleepy.main()', *map(str, args)], cwd=tmp_path, stderr=err,
            start_new_session=True, env={
                **os.environ, 'OMP_NUM_THREADS': '1', 'WARM': warm.python(),
                'PYTHONPATH': os.pathsep.join([str(tmp_path), str(ROOT)])})
    try:
        while len(busy := list(tmp_path.glob('*.busy'))) < 2:
            assert process.poll() is None, (tmp_path / 'err').read_text()
            time.sleep(0.05)
        (os.killpg if to == 'all' else os.kill)(process.pid, getattr(signal, name))
        assert process.wait(120) == code
        end = time.monotonic() + 60
        for path in busy:  # which a process holds while it lives
            with open(path, 'a') as f:
                while True:
                    try:
                        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except OSError:
                        assert time.monotonic() < end, f'{path.stem} goes on'
                        time.sleep(0.05)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    said = [line for line in (tmp_path / 'err').read_text().splitlines() if not line.startswith('features: ')]
    assert said == ([] if name == 'SIGKILL' else [
        f'simsiam: stopped by {name}; features stay in the cache and finished fits in --output; run the same command '
        'to continue']), '\n'.join(said)
    assert bool(list((tmp_path / 'out').glob('.svm-*/'))) == (name == 'SIGKILL')


def test_off_a_terminal_a_line_every_half_minute_and_at_the_end_reports_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture,
):
    now = [1000.0]
    progress = Progress(380, 100, lambda: now[0])
    for _ in range(280):
        now[0] += 2.5
        progress.step()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + 280 * 2.5 // 30
    assert lines[0] == 'svm: 112 of 380 fits, 0.4 fits/s, about 11 min left'
    assert lines[-2] == 'svm: 376 of 380 fits, 0.4 fits/s, about 10 s left'
    assert lines[-1] == 'svm: 380 of 380 fits, 0.4 fits/s, in 12 min'
    tasks = [('cv', i) for i in range(3)]
    for wanted in 'svm: 3 of 3 fits, ', '':  # the second time nothing is left to do
        run_tasks(tasks, None, FinishedTasks(tmp_path / 'f.jsonl'), 1, lambda task, made: {})
        said = capsys.readouterr().err
        assert said.startswith(wanted) and said.count('\n') == bool(wanted)


@pytest.mark.parametrize('jobs, said', [(1, 'with more free memory'), (2, 'one of the 2 processes .* fewer --jobs')])
def test_a_fit_that_finds_no_memory_is_one_sentence(jobs: int, said: str, tmp_path: Path):
    with pytest.raises(RuntimeError, match='ran out of memory') as e:
        run_tasks([('cv', 'feat5', 0, 1.0)], None, FinishedTasks(tmp_path / 'f.jsonl'), jobs, much)
    assert '\n' not in str(e.value)
    e.match(said)


def test_the_seconds_of_each_task_are_kept(tmp_path: Path):
    def work(task, made):
        time.sleep(task[1])
        return {}

    path = tmp_path / 'f.jsonl'
    tasks = [('cv', 0.05), ('cv', 0.1)]
    run_tasks(tasks, None, FinishedTasks(path), 1, work)
    finished = FinishedTasks(path)
    assert all(wanted <= finished.seconds[task] < wanted + 5 for task in tasks for wanted in task[1:])
    run_tasks(tasks, None, finished, 1, lambda task, made: 1 / 0)


def test_fits_that_do_not_converge_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = table(tmp_path)
    monkeypatch.setitem(LINEAR_SVC, 'max_iter', 1)
    assert fit_task(('cv', 'feat5', 0, 100.0), made)['unconverged'] == 3
    assert fit_task(('test', 'feat5', 0, 100.0), made)['unconverged'] == 1


def counts(positive: int, negative: int, test: int = 1) -> tuple:
    train = np.array([1] * positive + [0] * negative, np.int8)[:, None]
    return ['sheep'], train, np.array([1] * test + [0] * 5, np.int8)[:, None]


@pytest.mark.parametrize('of, ks, said', [
    (counts(2, 30), None, 'sheep: 2 of the 32 trainval images are positive, and 3-fold cross-validation needs 3'),
    (counts(30, 2), None, '3-fold cross-validation needs 3 positive and 3 others'),
    (counts(3, 90), [1, 4], 'sheep: 3 positive and 90 negative trainval images, and --k 4 needs 4 and 76; choose'),
    (counts(4, 75), [1, 4], r'--k 4 needs 4 and 76; choose a smaller --k \(possible here: 1 2\)'),
    (counts(40, 18), [1], '--k 1 needs 1 and 19; use more of VOC07'),
    (counts(4, 76, 0), [4], 'sheep: no positive test image')])
def test_too_few_images_of_a_class_are_one_sentence(of: tuple, ks: list | None, said: str):
    with pytest.raises(ValueError, match=said) as e:
        svm.check_counts(*of, ks)
    assert '\n' not in str(e.value)


def test_of_a_partial_set_the_published_ks_are_taken_that_it_suffices_for(
    devkit: Path, tmp_path: Path, capsys: pytest.CaptureFixture, one_thread: None,
):
    labels = counts(9, 19 * 8 - 1)[1]
    for flags, wanted in (
            (('--low-shot', '--allow-partial'), [1, 2, 4]), (('--low-shot',), list(LOW_SHOT_KS)),
            (('--allow-partial',), None), (('--low-shot', '--allow-partial', '--k', '96', '8'), [8, 96])):
        assert svm.choose_ks(parse('x', *flags), labels) == wanted
    assert svm.choose_ks(parse('x', '--low-shot', '--allow-partial'), counts(0, 90)[1]) == [1]  # to be refused
    record = run_and_read(tmp_path, devkit, *TINY, '--low-shot', '--samples', '1', '--cache', tmp_path / 'cache')
    assert record['protocol']['k'] == [1, 2] and 'training images found' in record['not_comparable']
    shared, *printed = capsys.readouterr().out.splitlines()
    assert '30 of 30 test images are also training images' in shared  # the fixture draws both parts alike
    assert printed[0] == 'low-shot: only k = 1 2, as a class has too few images for 4 8 16 32 64 96'


def test_as_many_images_as_needed_are_enough():
    svm.check_counts(*counts(3, 3), None)
    svm.check_counts(*counts(4, 76), [1, 4])


@pytest.fixture(scope='module')
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('voc')
    layouts.write_voc07(root, trainval=66, test=30, names=('cat', 'cow', 'dog'))
    return root


TINY = ('--model', 'resnet10t:random', '--allow-partial', '--image-size', '32', '--resize', '36', '--jobs', '1',
        '--device', 'cpu', '--workers', '0')


def test_the_command_prints_both_tables_and_writes_a_record_per_tap(
    devkit: Path, tmp_path: Path, capsys: pytest.CaptureFixture, one_thread: None,
):
    args = parse(
        devkit, *TINY, '--output', tmp_path / 'out', '--cache', tmp_path / 'cache', '--taps', 'feat4', 'feat5')
    assert svm.run(args) == 0
    printed = capsys.readouterr().out
    assert 'feature4  feature5' in printed and 'envelope AP (as published)' in printed and '11-point AP' in printed
    assert 'iterations before they converged, as in the published protocol' in printed
    assert 'best layer: feature' in printed and 'not comparable with published numbers' in printed
    records = {r['benchmark']: r for r in map(json.loads, (p.read_text() for p in (tmp_path / 'out').glob('*.json')))}
    assert set(records) == {'voc07_svm_feature4', 'voc07_svm_feature5'}
    record = records['voc07_svm_feature5']
    assert record['protocol']['random_state'] == 0 and record['protocol']['folds'] == 3
    assert record['protocol']['pooling'] == 'adaptive' and 'adaptively' in record['protocol']['changed']
    assert record['data']['counts'] == {'train': 66, 'test': 30, 'classes': 3}
    per_class = record['extra']['results']['classes']
    assert record['metrics']['mAP'] == pytest.approx(100 * np.mean([c['ap'] for c in per_class.values()]), abs=0.006)
    assert f'{record["metrics"]["mAP"]:.2f}' in printed
    left = {p.name for p in (tmp_path / 'out').iterdir() if p.suffix != '.json'}
    fits = record['extra']['finished_fits']
    assert left == {fits, f'.{Path(fits).stem}.lock'}
    assert svm.run(args) == 0  # everything is finished: the same numbers again
    assert capsys.readouterr().out == printed


def test_the_low_shot_command_prints_a_row_of_one_number_per_k(
    devkit: Path, tmp_path: Path, capsys: pytest.CaptureFixture, one_thread: None,
):
    args = parse(devkit, *TINY, '--low-shot', '--k', '2', '1', '--samples', '2', '--output', tmp_path, '--cache',
                 tmp_path / 'cache')
    assert svm.run(args) == 0
    printed = capsys.readouterr().out.splitlines()[1:]  # the first line counts the images of both parts
    assert printed[0].split()[-2:] == ['k=1', 'k=2']  # they were asked for: nothing is said
    record = json.loads(next(tmp_path.glob('*.json')).read_text())
    assert record['benchmark'] == 'voc07_lowshot_svm_feature5'
    assert set(record['metrics']) == {'k=1', 'k=2', 'k=1_honest', 'k=2_honest'}
    assert printed[1].split()[-2:] == [f'{record["metrics"][k]:.2f}' for k in ('k=1', 'k=2')]
    assert 'best on test' in printed[1] and 'without test' in printed[3]
    assert 'unseeded' in record['protocol']['note'] and 'best on test' in record['protocol']['k=N']


def test_with_the_defaults_the_record_has_the_numbers_that_published_ones_are_compared_by():
    for flags, kind in ((), 'voc07_svm'), (('--low-shot',), 'voc07_lowshot_svm'):
        protocol = svm.describe_protocol(parse('x', *flags))
        assert {k: protocol[k] for k in REQUIRED[kind]} == REQUIRED[kind]
        assert 'changed' not in protocol and protocol['amp'] == 'off'
    assert protocol['k'] == [1, 2, 4, 8, 16, 32, 64, 96]
    assert svm.describe_protocol(parse('x', '--amp', 'bfloat16'))['changed']


def test_auto_is_off_and_what_is_not_as_published_is_said():
    assert svm.describe_protocol(parse('x', '--amp', 'auto')) == svm.describe_protocol(parse('x'))
    args = parse('x', '--amp', 'bfloat16')
    assert svm.describe_protocol(args, 'adaptive', 3)['changed'] == (
        '3 images cannot be read and are left out; features in bfloat16; taps are pooled adaptively')
    assert svm.describe_protocol(args, 'adaptive')['pooling'] == 'adaptive'


@pytest.mark.parametrize('flags, wanted', [
    ((), (256, 224)), (('--image-size', '112'), (128, 112)), (('--image-size', '112', '--resize', '200'), (200, 112))])
def test_the_short_side_is_eight_sevenths_of_the_image_size(flags: tuple[str, ...], wanted: tuple[int, int]):
    protocol = svm.describe_protocol(parse('x', *flags))
    assert (protocol['resize'], protocol['image_size'], protocol['squash']) == (*wanted, True)


@pytest.mark.parametrize('size, wanted', [(224, 'mmselfsup'), (192, 'adaptive')])
def test_the_pooling_is_reported(size: int, wanted: str):
    assert svm.find_pooling(backbone.load_backbone('resnet10t:random'), size) == wanted


# --- what the model sees, and what a seed decides

def run_and_read(output: Path, *args: str | Path) -> dict:
    """The one record that the command wrote."""
    before = set(output.glob('*.json'))
    assert svm.run(parse(*args, '--output', output)) == 0
    new, = set(output.glob('*.json')) - before
    return json.loads(new.read_text())


def test_the_model_sees_pils_squashed_images_and_the_record_says_so(
    devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None,
):
    seen, load = [], backbone.load_backbone

    def watched(*args):
        found = load(*args)
        mean, std = (np.array(x, np.float32)[:, None, None] for x in (found.mean, found.std))
        found.model.conv1.register_forward_pre_hook(
            lambda _, inputs: seen.extend(inputs[0].numpy() * std + mean if len(inputs[0]) > 1 else []))
        return found

    monkeypatch.setattr(svm, 'load_backbone', watched)
    record = run_and_read(tmp_path, devkit, *TINY, '--taps', 'feat5', '--cache', tmp_path / 'cache')
    protocol = record['protocol']
    assert (protocol['squash'], protocol['resize'], protocol['image_size']) == (True, 36, 32)
    main = devkit / 'VOCdevkit' / 'VOC2007'
    names = [i for part in ('trainval', 'test') for i in sorted(
        line.split()[0] for line in (main / 'ImageSets' / 'Main' / f'cat_{part}.txt').read_text().splitlines())]
    assert len(seen) == len(names) == 96
    for x, name in zip(seen, names, strict=True):
        image = Image.open(main / 'JPEGImages' / f'{name}.jpg').convert('RGB')  # 40 x 32
        image = image.resize((45, 36), Image.Resampling.BILINEAR).resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(x.transpose(1, 2, 0) * 255, np.asarray(image), atol=2.01)  # PIL 13: other roundings


@pytest.mark.parametrize('flags', [(), ('--low-shot', '--k', '2', '--samples', '1')])
def test_the_seed_is_that_of_every_solver_and_draw_and_of_the_record(
    flags: tuple[str, ...], devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None,
):
    solvers, draws = [], []
    real, real_draw = svm_fits.make_svc, svm_fits.draw_rows
    monkeypatch.setattr(svm_fits, 'make_svc', lambda cost, seed: solvers.append(seed) or real(cost, seed))
    monkeypatch.setattr(svm_fits, 'draw_rows', lambda *of: draws.append(of[2]) or real_draw(*of))
    names = []
    for seed in 7, 0:
        solvers.clear(), draws.clear()
        more = ('--seed', str(seed)) if seed else ()
        record = run_and_read(tmp_path, devkit, *TINY, '--taps', 'feat5', *flags, *more, '--cache', tmp_path / 'cache')
        assert set(solvers) == {seed} == {record['protocol']['random_state']}
        assert draws == [seed] * (3 if flags else 0)
        names.append(record['extra']['finished_fits'])
    assert len(set(names)) == 2


# --- the folder

def test_fits_are_kept_under_the_name_of_all_that_decides_them(monkeypatch: pytest.MonkeyPatch):
    x, labels = problem(30, 0.5, 1)

    def name(*flags, bad=(), labels=labels, taps=('feat5',), digest='rows'):
        rows = Rows(x, bad), Rows(x, digest=digest)
        return svm.name_fits(parse('x', *flags), rows, list(taps), (labels[rows[0].readable], labels))

    alike = np.zeros_like(labels)
    names = [
        name(), name('--low-shot'), name('--seed', '1'), name(taps=('feat4', 'feat5')), name(bad=(3,)),
        name(labels=alike), name(digest='exchanged'), name(bad=(3,), labels=alike), name(bad=(4,), labels=alike)]
    for constant, value in (
            ('SVM_COSTS', (1.0,)), ('SVM_FOLDS', 5), ('LOW_SHOT_NEGATIVES', 9), ('LINEAR_SVC', {'tol': 1}),
            ('SVM_AP', 'x'), ('FORMAT', 0)):
        with monkeypatch.context() as changed:
            changed.setattr(svm, constant, value)
            names.append(name())
    assert len(set(names)) == len(names)
    assert name() == names[0] and name('--low-shot', '--k', '1', '--samples', '2') == name('--low-shot')


@pytest.mark.parametrize('killed', [False, True])
def test_repaired_images_count_in_the_same_folder(
    killed: bool, devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None,
):
    root, out = tmp_path / 'voc', tmp_path / 'out'
    shutil.copytree(devkit, root)
    args = (root, *TINY, '--taps', 'feat5', '--cache', tmp_path / 'cache')
    images = sorted((root / 'VOCdevkit' / 'VOC2007' / 'JPEGImages').iterdir())
    few = (7, 11, 21, 33, 37, 47, 59, 61)  # none that pixels_digest samples
    broken = {images[i]: images[i].read_bytes() for i in few}
    for path in broken:
        path.write_bytes(b'broken')
    if killed:
        def kill(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(svm, 'fit_svms', kill)
            svm.run(parse(*args, '--output', out))
    else:
        partial = run_and_read(out, *args)
        assert partial['extra']['unreadable'] == 8 and '8 images' in partial['protocol']['changed']
    for path, data in broken.items():
        path.write_bytes(data)
    repaired, fresh = run_and_read(out, *args), run_and_read(tmp_path / 'fresh', *args)
    assert repaired['extra']['unreadable'] == 0
    assert repaired['metrics'] == fresh['metrics'] and repaired['extra']['results'] == fresh['extra']['results']
    assert killed or partial['metrics'] != fresh['metrics']  # or the test would say little


def test_full_and_low_shot_share_a_folder(
    devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None,
):
    args = (devkit, *TINY, '--taps', 'feat5', '--output', tmp_path, '--cache', tmp_path / 'cache')
    fit_svms = svm.fit_svms

    def meanwhile(*of):
        monkeypatch.setattr(svm, 'fit_svms', fit_svms)
        assert svm.run(parse(*args)) == 0  # from its first fit to the end
        return fit_svms(*of)

    monkeypatch.setattr(svm, 'fit_svms', meanwhile)
    assert svm.run(parse(*args, '--low-shot', '--k', '2', '--samples', '1')) == 0
    records = [json.loads(p.read_text()) for p in tmp_path.glob('*.json')]
    assert len({r['extra']['finished_fits'] for r in records}) == len(records) == 2


def test_the_second_of_two_equal_runs_waits_and_finds_the_fits(
    devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, one_thread: None,
):
    args = parse(devkit, *TINY, '--taps', 'feat5', '--output', tmp_path, '--cache', tmp_path / 'cache')
    fit_svms, fit, fitted, status, said = svm.fit_svms, svm_fits._cross_validate_task, [], [], []
    second = threading.Thread(target=lambda: status.append(svm.run(args)), daemon=True)

    def meanwhile(*of):
        monkeypatch.setattr(svm, 'fit_svms', fit_svms)
        second.start()
        end = time.monotonic() + 60
        while 'waiting for another process' not in ''.join(said) and second.is_alive() and time.monotonic() < end:
            said.append(capsys.readouterr().err)
            time.sleep(0.01)
        fit_svms(*of)
        assert not status

    monkeypatch.setattr(svm, 'fit_svms', meanwhile)
    monkeypatch.setattr(svm_fits, '_cross_validate_task', lambda *of: fitted.append(of[1:]) or fit(*of))
    assert svm.run(args) == 0
    second.join(60)
    assert status == [0] and 'waiting for another process' in ''.join(said)
    assert len(fitted) == len(set(fitted)) == 3 * len(COSTS)


def test_a_finished_run_repeated_writes_no_table_and_keeps_its_seconds(
    devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None,
):
    args = parse(devkit, *TINY, '--taps', 'feat4', 'feat5', '--output', tmp_path, '--cache', tmp_path / 'cache')
    assert svm.run(args) == 0
    fits, = tmp_path.glob('svm-*.jsonl')
    lines = [json.loads(line) for line in fits.read_text().splitlines()]
    fits.unlink()
    finished = FinishedTasks(fits)
    for task, result, _, _ in lines:
        finished.add(tuple(task), result, 2.0)
    rows = svm_fits.normalize_rows
    monkeypatch.setattr(svm_fits, 'normalize_rows', lambda x: 1 / 0)
    assert svm.run(args) == 0
    for record in map(json.loads, (p.read_text() for p in tmp_path.glob('*.json'))):
        assert record['seconds'] == 2 * 3 * (len(COSTS) + 1)
    fits.write_text(''.join(fits.read_text().splitlines(keepends=True)[:-1]))  # a refit of feat5
    seen = []
    monkeypatch.setattr(svm_fits, 'normalize_rows', lambda x: seen.append(len(x)) or rows(x))
    assert svm.run(args) == 0
    assert seen == [66, 30]  # of feat5 alone


def test_an_output_that_takes_no_files_is_found_before_anything_slow(
    devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(svm, 'load_backbone', lambda *of: 1 / 0)
    file = tmp_path / 'file'
    file.write_text('x')
    for output in file, file / 'below':
        with pytest.raises(ValueError, match='--output .*file.*: cannot be written to'):
            svm.run(parse(devkit, *TINY, '--output', output))
    with pytest.raises(ZeroDivisionError):
        svm.run(parse(devkit, *TINY, '--output', tmp_path / 'new' / 'folder'))
    assert not list((tmp_path / 'new' / 'folder').iterdir())


@pytest.mark.parametrize('args, said', [
    (['--jobs', '0'], '--jobs 0: must be at least 1'), (['--low-shot', '--k', '0'], '--k 0: must be at least 1'),
    (['--samples', '0'], '--samples 0'), (['--seed', '-1'], '--seed -1'),
    (['--low-shot', '--samples', '0'], '--samples 0: must be at least 1'),
    (['--k', '4', '8'], '--k 4 8: must be used with --low-shot; add that flag'),
    (['--samples', '3'], '--samples 3: must be used with --low-shot; add that flag'),
    (['--model', 'convnext_atto:random'], 'feat5: .* 4 stages only; name those that it has with --taps'),
    (['--low-shot', '--k', '40'], r'--k 40 needs 40 and 760; .*\(possible here: 1 2\)'),
    (['--image-size', '40'], '--resize 36: must be at least'), (['--batch-size', '0'], '--batch-size 0: must be'),
    (['--model', 'no_such_model:random'], 'no_such_model')])
def test_what_a_user_gets_wrong_is_one_sentence(args: list[str], said: str, devkit: Path, tmp_path: Path):
    with pytest.raises((ValueError, RuntimeError), match=said) as e:
        svm.run(parse(devkit, *TINY, '--output', tmp_path, '--cache', tmp_path, *args))
    assert '\n' not in str(e.value)
    assert not list(tmp_path.glob('*.json'))


def test_a_partial_or_missing_devkit_is_refused_with_the_counts(devkit: Path, tmp_path: Path):
    with pytest.raises((ValueError, FileNotFoundError)):
        svm.run(parse(devkit, '--model', 'resnet10t:random', '--output', tmp_path))
    with pytest.raises(FileNotFoundError, match='JPEGImages'):
        svm.run(parse(tmp_path / 'nowhere', '--output', tmp_path))


def test_a_missing_scikit_learn_names_the_install_command(
    devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(__import__('sys').modules, 'sklearn', None)
    with pytest.raises(RuntimeError, match='^svm needs scikit-learn: pip install scikit-learn$'):
        svm.run(parse(devkit, *TINY, '--output', tmp_path))


@pytest.mark.parametrize('harm', ['flip', 'shape', 'cut', 'deep'])
def test_a_damaged_line_is_dropped_and_the_others_are_kept(harm: str, tmp_path: Path):
    fits = FinishedTasks(tmp_path / 'x.jsonl')
    for i in range(3):
        fits.add(('cv', i), {'ap': 0.9375}, 1.0)
    lines = fits.path.read_bytes().splitlines(keepends=True)
    broken = {
        'flip': lines[1].replace(b'0.9375', b'0.1375'), 'shape': b'5\n', 'cut': lines[1][:9] + b'\n',
        'deep': b'[' * 100_000 + b'\n'}[harm]
    fits.path.write_bytes(lines[0] + broken + lines[2] + lines[1][:-1])  # the last without its end
    for _ in range(2):
        assert FinishedTasks(fits.path).results == {('cv', 0): {'ap': 0.9375}, ('cv', 2): {'ap': 0.9375}}
        assert fits.path.read_bytes() == lines[0] + lines[2]


def test_a_table_that_a_kill_left_is_made_again(devkit: Path, tmp_path: Path, one_thread: None, monkeypatch):
    args = parse(devkit, *TINY, '--taps', 'feat5', '--output', tmp_path / 'a', '--cache', tmp_path / 'cache')
    assert svm.run(args) == 0
    other = parse(devkit, *TINY, '--taps', 'feat5', '--output', tmp_path / 'b', '--cache', tmp_path / 'cache')
    with monkeypatch.context() as killed:
        killed.setattr(svm, 'fit_svms', lambda *args: 1 / 0)
        killed.setattr(shutil, 'rmtree', lambda *args, **kwargs: None)
        with pytest.raises(ZeroDivisionError):
            svm.run(other)
    tables = list((tmp_path / 'b').rglob('*.npy'))
    for table in tables:
        table.write_bytes(table.read_bytes()[:200])
    assert svm.run(other) == 0
    a, b = (json.loads(next((tmp_path / x).glob('*.json')).read_text())['metrics'] for x in 'ab')
    assert tables and a == b
