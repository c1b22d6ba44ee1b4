"""The collapse doctor: each cause is named in a short real run, and healthy runs raise nothing.

The runs are those of tests/perf/collapse.py, which measures the doctor on many more of them.
"""
import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from simsiam_models import SimSiam, create_simsiam
from simsiam_models.training.doctor import CONFIRMATIONS, Diagnosis, Doctor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'perf'))
import collapse  # noqa: E402

WELL = {
    'loss': -0.5, 'std': 0.95, 'rank': 30.0, 'p_std': 0.6, 'p_rank': 15.0, 'cosine': 0.6, 'pixels': 0.5,
    'constant_channels': 0.0, 'samples': 64.0}
ILL = {**WELL, 'std': 0.3, 'rank': 3.0}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture
def model() -> SimSiam:
    return create_simsiam('resnet10t', dim=16, pred_dim=4, proj_layers=2)


def case(cause: str, start: str) -> collapse.Case:
    return next(c for c in collapse.CASES if c.cause == cause and c.what.startswith(start))


@pytest.mark.parametrize(('cause', 'start', 'data', 'steps'), [
    ('unknown cause', 'no stop-gradient, batch 64', 'demo', 60),
    ('learning rate too high', 'lr 40', 'demo', 40),
    ('batch too small', 'batch 2', 'demo', 20),
    ('batch too small', 'batch 4', 'demo', 20),
    ('constant images', 'black', 'demo', 20),
    ('constant images', 'each its own colour', 'digits', 20),
    ('not finite', 'a weight becomes NaN', 'demo', 20),
])
def test_a_run_that_goes_wrong_is_told_why_and_nothing_else(cause: str, start: str, data: str, steps: int):
    names = [d.name for _, _, d, _ in collapse.train(case(cause, start), data, 5, steps) if d]
    assert set(names) == {cause}


@pytest.mark.parametrize(('start', 'data', 'steps'), [
    ('batch 64', 'demo', 80), ('batch 16', 'digits', 80), ('lr 1.2', 'demo', 50), ('weak augmentation', 'digits', 50),
    ('z with a gradient that the loss stops', 'demo', 60)])
def test_a_healthy_run_is_told_nothing(start: str, data: str, steps: int):
    readings = list(collapse.train(case('healthy', start), data, 5, steps))
    assert len(readings) == steps // collapse.EVERY
    assert not any(d for _, _, d, _ in readings) and not readings[-1][3].confirmed


def test_a_collapse_is_confirmed_only_after_several_readings_in_a_row():
    doctor = Doctor(0.05, 64)
    for figures in [ILL] * (CONFIRMATIONS - 1) + [WELL] + [ILL] * (CONFIRMATIONS - 1):
        doctor.examine(figures)
        assert not doctor.confirmed
    assert doctor.examine(ILL).name == 'unknown cause' and doctor.confirmed


def test_a_risk_is_named_but_never_confirmed():
    doctor = Doctor(0.05, 2)
    for _ in range(3 * CONFIRMATIONS):
        diagnosis = doctor.examine({**WELL, 'std': 1.41, 'rank': 1.0, 'samples': 2.0})
    assert diagnosis.name == 'batch too small' and not diagnosis.collapsed and not doctor.confirmed


@pytest.mark.parametrize('name', ['loss', 'std', 'rank'])
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_confirmed_at_once(name: str, value: float):
    doctor = Doctor(0.05, 64)
    assert doctor.examine({**WELL, name: value}).name == 'not finite' and doctor.confirmed


def test_few_samples_on_each_process_are_no_collapse_where_batch_norm_sees_many():
    """The outputs of 2 samples differ along one line, whatever the global batch."""
    doctor = Doctor(0.05, 64)
    assert doctor.examine({**WELL, 'rank': 1.0, 'samples': 2.0}) is None
    assert doctor.examine({**WELL, 'rank': 1.0, 'samples': 64.0}).collapsed


def test_a_high_learning_rate_is_blamed_only_where_the_figures_are_bad():
    assert Doctor(10.0, 64).examine(WELL) is None
    assert Doctor(10.0, 64).examine({**WELL, 'rank': 3.0}).name == 'learning rate too high'
    assert Doctor(0.5, 64).examine({**WELL, 'rank': 3.0}) is None
    assert Doctor(0.5, 64).examine(ILL).name == 'unknown cause'


def test_a_continued_doctor_decides_as_an_undisturbed_one():
    readings = [ILL, WELL, ILL, ILL, ILL, WELL]
    undisturbed = Doctor(0.05, 64)
    expected = []
    for f in readings:
        expected.append((undisturbed.examine(f), undisturbed.confirmed))
    for cut in range(len(readings)):
        first, second = Doctor(0.05, 64), Doctor(0.05, 64)
        seen = []
        for f in readings[:cut]:
            seen.append((first.examine(f), first.confirmed))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for f in readings[cut:]:
            seen.append((second.examine(f), second.confirmed))
        assert seen == expected


def test_a_diagnosis_is_one_line_with_cause_and_suggestion():
    d = Diagnosis('no predictor', 'it is missing', 'put it back')
    assert str(d) == 'COLLAPSED (no predictor): it is missing; put it back'
    assert str(dataclasses.replace(d, collapsed=False)) == 'AT RISK (no predictor): it is missing; put it back'


def test_every_figure_of_a_reading_is_a_plain_number(model: SimSiam):
    x = torch.randn(4, 3, 32, 32)
    p, _, z, _ = model(x, x)
    figures = collapse.Reading(torch.tensor(0.0), x, p, z, model).read()
    assert set(figures) == set(WELL) and all(type(v) is float for v in figures.values())
