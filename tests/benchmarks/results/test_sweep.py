"""Several runs as one table, and what is said of differences that may be chance: by hand, and by drawing."""
import argparse
import math

import numpy as np
import pytest

from simsiam_models.benchmarks.results.accuracy import describe_difference, note_uncertainty, standard_error
from simsiam_models.benchmarks.results.sweep import each_rate, format_sweep, run_each


def record(top1: float, n: int = 60, **metrics: float) -> dict:
    metrics = metrics or {'top1': top1, 'top5': 99.0}
    return {'benchmark': 'finetune', 'data': {'counts': {'test': n}}, 'metrics': metrics}


@pytest.mark.parametrize('accuracy, n', [(50.0, 60), (93.0, 400), (0.0, 10), (100.0, 10)])
def test_the_standard_error_is_the_spread_of_accuracies_that_are_drawn(accuracy: float, n: int):
    drawn = np.random.default_rng(0).binomial(n, accuracy / 100, 20_000) / n * 100
    assert standard_error(accuracy, n) == pytest.approx(drawn.std(), rel=0.03)


def test_a_difference_names_its_direction_its_error_and_chance():
    assert describe_difference(58.8, 60.3, 50_000) == '1.50 points below (standard error 0.31)'
    assert describe_difference(60.0, 50.0, 60) == '10.00 points above (standard error 9.04, so it may be chance)'
    assert describe_difference(58.8, 60.3, 0) == '1.50 points below'  # no accuracies


def test_the_table_marks_the_best_and_says_what_it_was_chosen_on():
    head, *rows, last = format_sweep(
        ['lr'], [(0.01,), (0.03,), (0.1,)], [record(40.0), record(80.0), record(75.0)]).split('\n')
    assert head.split() == ['lr', 'accuracy', 'std.', 'error']
    assert [row.split() for row in rows] == [
        ['0.01', '40.00', '%', '6.32'], ['0.03', '80.00', '%', '5.16', 'best'], ['0.1', '75.00', '%', '5.59']]
    assert last == (
        'best: lr 0.03, chosen on the 60 test images that gave its accuracy, so expect less on new images; compared '
        'with the runner-up: 5.00 points above (standard error 7.61, so it may be chance)')


def test_the_first_of_equals_is_the_best_and_an_end_of_the_rates_is_named():
    text = format_sweep(['lr'], [(0.1,), (0.3,), (0.2,)], [record(50.0), record(40.0), record(50.0)])
    assert text.split('\n')[1].endswith('best') and text.count('best') == 2
    assert text.endswith('; no lower lr was tried')
    pairs = [(lr, x) for lr in (0.1, 0.2, 0.3) for x in (1, 10, 100)]
    text = format_sweep(['lr', 'multiplier'], pairs, [record(lr * 100 + (x == 10)) for lr, x in pairs])
    assert text.endswith('; no higher lr was tried') and 'best: lr 0.3, multiplier 10,' in text


def test_classifiers_of_several_feature_maps_are_judged_by_the_best_one():
    text = format_sweep(['lr'], [(1,), (2,)], [record(0, feature1=30.0, feature2=20.0, feature2_top1_last=99.0),
                                               record(0, feature1=25.0, feature2=28.0)])
    assert [row.split()[-1] for row in text.split('\n')[1:3]] == ['best', 'feature2'] and '30.00 %' in text


def test_a_run_that_diverged_is_a_row_of_several_and_an_error_alone():
    def diverge():
        raise FloatingPointError('the loss is not finite')

    said = []
    records = run_each([lambda: record(50.0), diverge], said.append)
    assert said == ['the loss is not finite'] and records[1] is None
    assert format_sweep(['lr'], [(1,), (9,)], records).split('\n')[2].split() == ['9', 'diverged']
    assert format_sweep(['lr'], [(1,), (9,)], [None, None]).endswith('every run diverged; try lower rates')
    with pytest.raises(FloatingPointError):
        run_each([diverge], said.append)


def test_each_rate_gives_a_run_and_a_rate_twice_is_refused():
    args = argparse.Namespace(lr=[0.1, 0.2], seed=3)
    assert [(a.lr, a.seed) for a in each_rate(args)] == [(0.1, 3), (0.2, 3)]
    assert each_rate(argparse.Namespace(lr=None))[0].lr is None
    for rates, said in (([0.1, 0.1], '0.1 0.1'), ([math.inf, 0.1], 'inf 0.1'), ([math.nan], 'nan')):
        with pytest.raises(ValueError, match=f'--lr {said}: must be finite numbers that differ'):
            each_rate(argparse.Namespace(lr=rates))


def test_only_accuracies_have_a_standard_error():
    boxes = {'benchmark': 'voc0712_faster_rcnn_c4_24k', 'data': {'counts': {'test': 10}}, 'metrics': {'AP50': 50.0}}
    assert note_uncertainty([boxes]) == []
    (note,) = note_uncertainty([record(50.0, 100), record(90.0, 100)])
    assert 'at most 5.00 points; differences of less than 14.14 points' in note
