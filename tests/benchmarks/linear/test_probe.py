"""The grid of linear classifiers on cached features: its own protocol, and against scikit-learn's optimum."""
import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from tiny_linear import CPU, MODEL, write_split_digits
from torch import nn

from simsiam_models import cli
from simsiam_models.benchmarks.linear import probe, probe_fit
from simsiam_models.benchmarks.linear.probe import auto_probe, extend_grid
from simsiam_models.benchmarks.linear.probe_features import ScaledFeatures, compute_moments
from simsiam_models.benchmarks.linear.probe_fit import (
    AutoProbe,
    Fit,
    choose_batch_size,
    compute_objective,
    count_rows,
    differentiate,
    evaluate,
    find_optimum,
    train_grid,
)
from simsiam_models.data.philox import permutation
from simsiam_models.runtime.messages import silent

pytestmark = pytest.mark.usefixtures('one_thread')
QUICK = AutoProbe(lrs=(2.0, 8.0), weight_decays=(1e-4, 1e-3), epochs=6)


def _digits(dtype: torch.dtype = torch.float32) -> tuple[ScaledFeatures, ScaledFeatures]:
    """1200 and 597 handwritten digits, 64 pixels each (three of them constant), scaled by the first table."""
    digits = load_digits()
    x = digits.data.astype(np.float32) * 3 + 5
    tables = [ScaledFeatures(x[part], digits.target[part], CPU, dtype) for part in (slice(1200), slice(1200, None))]
    for table in tables:
        table.scale_by(*compute_moments(x[:1200]))
    return tables[0], tables[1]


def _all(table: ScaledFeatures) -> np.ndarray:
    return np.arange(len(table))


def _zero(table: ScaledFeatures, g: int = 1, classes: int = 10) -> Fit:
    return Fit(
        torch.zeros(table.dim, g, classes, dtype=table.dtype), torch.zeros(g, classes, dtype=table.dtype),
        np.zeros((1, g)))


def test_lbfgs_is_scikit_learns_optimum():
    """C = 1 / (N wd) makes its objective N times ours."""
    a, b = _digits(torch.float64)
    x, y, wd = a.take(_all(a)).numpy(), a.labels.numpy(), 1e-4
    oracle = LogisticRegression(C=1 / (len(x) * wd), tol=1e-10, max_iter=5000).fit(x, y)
    fit, value, slope = find_optimum(a, _all(a), wd, _zero(a), 1000)
    assert slope < 1e-6
    weight = fit.weight[:, 0].T.numpy()
    np.testing.assert_allclose(weight, oracle.coef_, atol=2e-3 * np.abs(oracle.coef_).max())
    bias = fit.bias[0].numpy()
    np.testing.assert_allclose(bias - bias.mean(), oracle.intercept_ - oracle.intercept_.mean(), atol=2e-2)
    p = oracle.predict_proba(x)[np.arange(len(x)), y]
    assert value == pytest.approx(-np.log(p).mean() + wd / 2 * (oracle.coef_ ** 2).sum(), rel=1e-7)
    ours = float(evaluate(fit, b)['top1'][0])
    assert ours == pytest.approx(100 * oracle.score(b.take(_all(b)).numpy(), b.labels.numpy()), abs=0.01)


def test_float32_ends_near_the_optimum_too():
    a, b = _digits()
    double, _ = _digits(torch.float64)
    _, value, _ = find_optimum(double, _all(double), 1e-4, _zero(double), 1000)
    fit, single, _ = find_optimum(a, _all(a), 1e-4, _zero(a), 300)
    assert single == pytest.approx(value, rel=1e-5)
    assert evaluate(fit, b)['top1'][0] > 90


def test_sgd_comes_near_the_optimum_of_the_same_penalty():
    a, b = _digits()
    p = dataclasses.replace(QUICK, epochs=60)
    fit = train_grid(a, _all(a), 10, [(8.0, 1e-3)], p)
    best, value, _ = find_optimum(a, _all(a), 1e-3, _zero(a), 300)
    assert value <= compute_objective(fit, a, _all(a), 1e-3) < value * 1.01
    assert abs(evaluate(fit, b)['top1'][0] - evaluate(best, b)['top1'][0]) < 1


def test_members_trained_together_equal_members_trained_alone():
    a, _ = _digits(torch.float64)
    members = [(2.0, 1e-4), (2.0, 1e-2), (16.0, 1e-5), (0.1, 0.0)]
    together = train_grid(a, _all(a), 10, members, QUICK)
    for g, member in enumerate(members):
        alone = train_grid(a, _all(a), 10, [member], QUICK)
        for x, y in ((together.weight[:, g], alone.weight[:, 0]), (together.bias[g], alone.bias[0])):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(together.losses[:, g], alone.losses[:, 0], rtol=1e-9)


def test_a_member_is_torchs_sgd_on_the_same_batches():
    a, _ = _digits(torch.float64)
    p = dataclasses.replace(QUICK, epochs=2)
    ours = train_grid(a, _all(a), 10, [(4.0, 1e-3)], p)
    head = nn.Linear(64, 10).double()
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD([{'params': [head.weight], 'weight_decay': 1e-3}, {'params': [head.bias]}], 4.0, 0.9)
    done, steps = 0, 19  # of at most 64 images, as equal as can be
    cuts = np.cumsum([64] * 3 + [63] * 16)
    for epoch in range(2):
        for at in np.split(permutation(0, epoch, 1200), cuts[:-1]):
            for group in optimizer.param_groups:
                group['lr'] = 4.0 * 0.5 * (1 + math.cos(math.pi * done / (2 * steps)))
            optimizer.zero_grad()
            F.cross_entropy(head(a.take(at)), a.take_labels(at)).backward()
            optimizer.step()
            done += 1
    torch.testing.assert_close(ours.weight[:, 0].T, head.weight.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.bias[0], head.bias.detach(), rtol=1e-9, atol=1e-12)


def test_the_gradient_is_autograds_whatever_the_chunk(monkeypatch):
    a, _ = _digits(torch.float64)
    x, y = a.take(np.arange(50)), a.take_labels(np.arange(50))
    fit = Fit(torch.randn(64, 3, 10, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64), np.zeros((1, 3)))
    w, b = fit.weight.clone().requires_grad_(), fit.bias.clone().requires_grad_()
    scores = torch.einsum('bd,dgc->bgc', x, w) + b
    losses = torch.stack([F.cross_entropy(scores[:, g], y, reduction='sum') for g in range(3)])
    losses.sum().backward()
    for most in (1 << 28, 2000):  # bytes: all rows at once, and eight at a time
        monkeypatch.setattr(probe_fit, 'MAX_SCORE_BYTES', most)
        loss, dw, db = differentiate(fit, x, y)
        torch.testing.assert_close(loss, losses.detach())
        torch.testing.assert_close(dw, w.grad)
        torch.testing.assert_close(db, b.grad)


def test_scores_are_held_in_bounded_pieces():
    """ImageNet's shape: 16 members, 1000 classes."""
    rows = count_rows(16, 1000, torch.float32)
    assert rows * 16 * 1000 * 4 <= probe_fit.MAX_SCORE_BYTES and rows >= 1024  # one batch at once, all the same


def test_moments_are_numpys_over_chosen_rows():
    x = np.random.default_rng(0).normal(3, 2, (1000, 5)).astype(np.float16)
    x[:, 2] = 7
    rows = np.arange(0, 1000, 3)
    for mean, std, part in ((*compute_moments(x, rows, 17), x[rows]), (*compute_moments(x), x)):
        part = part.astype(np.float64)
        np.testing.assert_allclose(mean, part.mean(0), rtol=1e-12)
        np.testing.assert_allclose(std, part.std(0), rtol=1e-9)
    assert std[2] == 0


def test_a_constant_feature_is_left_out_and_others_have_unit_length():
    a, _ = _digits()
    x = a.take(_all(a))
    assert int((x == 0).all(0).sum()) == 3
    assert float(x.square().sum(1).mean()) == pytest.approx(61 / 64, rel=1e-4)


def test_the_scale_of_the_features_does_not_matter():
    digits, found = load_digits(), []
    for scale in (1.0, 1e-3, 1e4):
        x = (digits.data * scale).astype(np.float64)
        tables = [ScaledFeatures(x[p], digits.target[p], CPU, torch.float64) for p in (slice(1200), slice(1200, None))]
        found.append(auto_probe(*tables, 10, QUICK, say=silent)[0])
    assert found[0] == found[1] == found[2]


def test_the_same_call_gives_the_same_numbers():
    runs = [auto_probe(*_digits(), 10, QUICK, say=silent) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0][0]['top1'] > 88 and runs[0][0]['top1_lbfgs'] > 88


def test_members_that_diverge_are_dropped_named_and_spoil_no_other(capsys):
    a, b = _digits()
    wild = dataclasses.replace(QUICK, lrs=(8.0, 1e6, 1e30))
    metrics, found = auto_probe(a, b, 10, wild)
    assert found['dropped'] == [f'lr {lr:g} wd {wd:g}' for lr in (1e6, 1e30) for wd in (1e-4, 1e-3)]
    assert 'auto_probe: diverged and dropped: lr 1e+06 wd 0.0001' in capsys.readouterr().out
    assert found['chosen']['lr'] <= 8 and metrics['top1'] > 88  # 8 is at an end: 2 and 0.5 are tried
    tame, _ = auto_probe(
        a, b, 10, dataclasses.replace(QUICK, lrs=(found['chosen']['lr'],)), say=silent)
    assert metrics == pytest.approx(tame, abs=0.4)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    with pytest.raises(RuntimeError, match='every classifier of the grid diverged'):
        auto_probe(a, b, 10, dataclasses.replace(QUICK, lrs=(1e30,)), say=silent)


def test_an_epoch_is_spread_evenly_over_its_steps(monkeypatch):
    """66 images in batches of 64 would leave a step of two, at the full rate."""
    a, _ = _digits()
    sizes, real = [], probe_fit.differentiate
    monkeypatch.setattr(probe_fit, 'differentiate', lambda fit, x, y: sizes.append(len(x)) or real(fit, x, y))
    train_grid(a, np.arange(66), 10, [(32.0, 1e-6)], dataclasses.replace(QUICK, epochs=2))
    assert sizes == [33, 33] * 2


@pytest.mark.parametrize(('lr', 'weight_decay', 'expected'), [
    (2.0, 1e-5, []), (32.0, 1e-5, [(128.0, 1e-5), (512.0, 1e-5)]), (0.5, 1e-6, [(0.125, 1e-6), (0.03125, 1e-6)]),
    (32.0, 1e-3, [(128.0, 1e-3), (512.0, 1e-3), (32.0, 1e-2), (32.0, 1e-1)])])
def test_past_an_end_of_the_grid_two_more_are_tried(lr, weight_decay, expected):
    found = extend_grid(lr, weight_decay, AutoProbe())
    assert [x for x, _ in found] == [x for x, _ in expected]
    assert [x for _, x in found] == pytest.approx([x for _, x in expected])


def test_a_grid_that_is_too_low_finds_the_rate_above_it():
    a, b = _digits()
    said = []
    low = dataclasses.replace(QUICK, lrs=(0.001, 0.01), weight_decays=(1e-6,), epochs=12)
    metrics, found = auto_probe(a, b, 10, low, said.append)
    assert [m['lr'] for m in found['grid']] == [0.001, 0.01, 0.04, 0.16] and found['chosen']['lr'] == 0.16
    assert found['chosen']['at_edge_of'] == ['lr']
    text = '\n'.join(said)
    assert 'lr 0.01, weight decay 1e-06 is the best and at an end of the grid; trying 2 beyond it' in text
    assert 'no larger lr was tried: --epochs 24 may give more' in text
    assert 'quote top1, from SGD; top1_lbfgs is at the optimum, which SGD did not reach' in text
    assert sum('images/s' in line for line in said) == 6  # every other epoch


def test_the_choice_does_not_see_the_test_images():
    a, b = _digits()
    _, found = auto_probe(a, b, 10, QUICK, say=silent)
    b.labels = (b.labels + 1) % 10
    _, other = auto_probe(a, b, 10, QUICK, say=silent)
    assert found == other


def test_the_choice_is_the_best_of_the_held_out_images():
    """Held out are the first tenth of the fixed order; the members never saw them."""
    a, b = _digits()
    _, found = auto_probe(a, b, 10, QUICK, say=silent)
    order = permutation(0, 0, 1200)
    a.scale_by(*compute_moments(a.array, order[120:]))
    members = [(m['lr'], m['weight_decay']) for m in found['grid']]
    figures = evaluate(train_grid(a, order[120:], 10, members, QUICK), a, order[:120])
    assert [m['held_out_top1'] for m in found['grid']] == figures['top1'].tolist()
    best = min(range(len(members)), key=lambda g: (-figures['top1'][g], figures['loss'][g]))
    assert (found['chosen']['lr'], found['chosen']['weight_decay']) == members[best]
    assert found['held_out_images'] == 120


def test_the_held_out_images_do_not_scale_the_features_of_the_grid():
    digits, found = load_digits(), []
    for factor in (1, 1000):
        x = digits.data[:1200].astype(np.float32)
        x[permutation(0, 0, 1200)[:120]] *= factor
        tables = ScaledFeatures(x, digits.target[:1200], CPU), ScaledFeatures(x, digits.target[:1200], CPU)
        found.append(auto_probe(*tables, 10, QUICK, say=silent)[1]['grid'])
    losses = [[m['train_loss'] for m in grid[:4]] for grid in found]  # what lies beyond is chosen by the held-out ones
    assert losses[0] == losses[1] and found[0][:4] != found[1][:4]


def test_the_grid_and_the_final_fit_take_the_same_batches(monkeypatch):
    """2400 images make batches of 75; the 2160 that the grid learns from would make 67."""
    digits, sizes = load_digits(), []
    rows = np.arange(2400) % 1797
    a, b = (ScaledFeatures(digits.data.astype(np.float32), digits.target, CPU, rows=r) for r in (rows, rows[:100]))
    real = probe_fit.differentiate

    def noted(fit, x, y):
        sizes.append((len(fit.bias), len(x)))
        return real(fit, x, y)
    monkeypatch.setattr(probe_fit, 'differentiate', noted)
    auto_probe(a, b, 10, dataclasses.replace(QUICK, epochs=1, lbfgs_iterations=1), say=silent)
    assert max(n for g, n in sizes if g == 4) == max(n for g, n in sizes if g == 1 and n < 2400) == 75
    assert choose_batch_size(len(a), QUICK) == 75


def test_rows_that_do_not_count_are_as_if_they_were_not_there():
    digits, keep = load_digits(), np.flatnonzero(np.arange(1797) % 7)
    x = digits.data.astype(np.float32)
    found = []
    for resident in (False, True):
        table = ScaledFeatures(x, digits.target, CPU, resident=resident, rows=keep)
        found.append(auto_probe(table, table, 10, QUICK, say=silent))
    table = ScaledFeatures(x[keep], digits.target[keep], CPU)
    assert found[0] == found[1] == auto_probe(table, table, 10, QUICK, say=silent)


def test_ties_count_as_wrong_and_few_classes_have_no_top5():
    a, _ = _digits()
    assert evaluate(_zero(a), a)['top1'] == [0.0] and evaluate(_zero(a), a)['top5'] == [0.0]
    a.labels %= 5
    assert set(evaluate(_zero(a, classes=5), a)) == {'loss', 'top1'}


def test_a_table_on_the_device_gives_the_same_rows():
    x, y = np.random.default_rng(0).normal(0, 1, (40, 6)).astype(np.float16), np.arange(40) % 3
    tables = [ScaledFeatures(x, y, CPU, resident=r) for r in (False, True)]
    for table in tables:
        table.scale_by(*compute_moments(x))
    rows = np.array([3, 1, 39])
    assert torch.equal(tables[0].take(rows), tables[1].take(rows))


def test_too_few_images_and_features_that_are_no_numbers_end_with_a_sentence():
    x = np.ones((5, 3), np.float32)
    with pytest.raises(ValueError, match='too few to hold out'):
        auto_probe(ScaledFeatures(x, np.arange(5), CPU), ScaledFeatures(x, np.arange(5), CPU), 5, QUICK, say=silent)
    x[2, 1] = np.inf
    with pytest.raises(ValueError, match='not finite'), np.errstate(all='ignore'):
        compute_moments(x)


# The command.

def arguments(data: Path, output: Path, *more: str) -> list[str]:
    return [
        'linear', str(data), '--protocol', 'auto', '--model', MODEL, '--output', str(output), '--image-size', '32',
        '--resize', '32', '--device', 'cpu', '--workers', '0', '--cache', str(output / 'cache'), *more]


def measure(data: Path, output: Path, *more: str) -> int:
    args = cli.build_parser().parse_args(arguments(data, output, *more))
    return args.run(args)


@pytest.fixture(scope='module')
def split_digits(tmp_path_factory) -> Path:
    return write_split_digits(tmp_path_factory.mktemp('probe_digits'), 320, 220)


def test_auto_is_recorded_as_its_own_protocol_and_repeats(split_digits, tmp_path, capsys):
    records = []
    for name in 'ab':
        assert measure(split_digits, tmp_path / name, '--epochs', '8') == 0
        (path,) = (tmp_path / name).glob('*.json')
        records.append(json.loads(path.read_text()))
    a, b = records
    assert a['metrics'] == b['metrics'] and a['extra'] == b['extra']
    assert a['benchmark'] == 'folder_auto_probe' and a['protocol']['name'] == 'auto_probe' and not a['difference']
    assert a['metrics']['top1'] > 50  # chance is 10
    assert a['protocol']['amp'] == 'off' and a['extra']['unreadable'] == 0
    for line in capsys.readouterr().out.splitlines():
        assert '%' not in line or 'auto_probe' in line


def test_flags_of_other_protocols_are_refused(split_digits, tmp_path):
    with pytest.raises(ValueError, match='^--jitter, --lr: not used by --protocol auto'):
        measure(split_digits, tmp_path, '--lr', '3', '--jitter', '0.1')
    for flags, words in {
        '--epochs 0': '--epochs 0: must be at least 1', '--batch-size 0': '--batch-size 0: must be at least 1',
        '--momentum 1': '--momentum 1.0: must be at least 0 and below 1',
        '--image-size 5': '--image-size 5: must be at least 8 pixels',
        '--resize 31': '--resize 31: must be at least the image size, 32'}.items():
        with pytest.raises(ValueError, match=f'^{words}$'):
            measure(split_digits, tmp_path, *flags.split())
    with pytest.raises(ValueError, match='^--fresh: --protocol auto always starts again'):
        measure(split_digits, tmp_path, '--fresh')
    with pytest.raises(ValueError, match='^--seed -1: must be in 0'):
        measure(split_digits, tmp_path, '--seed', '-1')


def test_an_output_that_is_a_file_is_found_before_the_features_are_made(split_digits, tmp_path):
    file = tmp_path / 'file'
    file.write_bytes(b'')
    with pytest.raises(ValueError, match=f'^--output {file}: cannot be written to'):
        measure(split_digits, file, '--cache', str(tmp_path / 'cache'))
    assert not (tmp_path / 'cache').exists()


def test_unreadable_images_end_the_probe_or_are_left_out_and_counted(split_digits, tmp_path, capsys):
    for name in ('broken', 'without'):
        shutil.copytree(split_digits, tmp_path / name)
        for part in ('train', 'val'):
            path = sorted((tmp_path / name / part).rglob('*.*'))[9]
            path.write_bytes(b'no image') if name == 'broken' else path.unlink()
    with pytest.raises(RuntimeError, match='1 of 220 images cannot be read.*leave them out with --allow-partial'):
        measure(tmp_path / 'broken', tmp_path / 'a')
    assert measure(tmp_path / 'broken', tmp_path / 'a', '--allow-partial') == 0
    assert '2 images cannot be read and are left out, the first: ' in capsys.readouterr().out
    measure(tmp_path / 'without', tmp_path / 'b')
    a, b = (json.loads(next((tmp_path / n).glob('*.json')).read_text()) for n in 'ab')
    assert (a['extra']['unreadable'], b['extra']['unreadable']) == (2, 0)
    assert a['extra']['chosen'] == b['extra']['chosen']
    assert a['metrics'] == pytest.approx(b['metrics'], abs=1.1)  # batches of the backbone are others: one image


def test_sigterm_says_that_the_features_are_kept(split_digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probe, 'auto_probe', lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(arguments(split_digits, tmp_path)) == 143
    assert 'SIGTERM; the same command reuses the cached features and trains from the start' in capsys.readouterr().err


def test_too_little_memory_in_the_backbone_or_in_the_classifiers(split_digits, tmp_path, monkeypatch):
    def fails(*args, **more):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB')
    with monkeypatch.context() as m, pytest.raises(RuntimeError, match='in the backbone: lower --micro-batch'):
        m.setattr(probe, 'extract', fails)
        measure(split_digits, tmp_path)
    with monkeypatch.context() as m, pytest.raises(RuntimeError, match='in the classifiers: lower --batch-size'):
        m.setattr(probe, 'auto_probe', fails)
        measure(split_digits, tmp_path)
