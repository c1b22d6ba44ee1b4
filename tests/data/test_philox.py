"""Counter-based random numbers: the published known answers, and pure functions of (seed, epoch, index, view)."""
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from simsiam_models.data.philox import permutation, philox, uniforms


@pytest.mark.parametrize('counter, key, words', [
    ('00000000 00000000 00000000 00000000', '00000000 00000000', '6627e8d5 e169c58d bc57ac4c 9b00dbd8'),
    ('ffffffff ffffffff ffffffff ffffffff', 'ffffffff ffffffff', '408f276d 41c83b0e a20bc7c6 6d5451fd'),
    ('243f6a88 85a308d3 13198a2e 03707344', 'a4093822 299f31d0', 'd16cfe09 94fdcceb 5001e420 24126ea1'),
])
def test_philox_gives_the_published_known_answers(counter, key, words):
    c = np.array([[int(w, 16) for w in counter.split()]], np.uint64)
    k0, k1 = (int(w, 16) for w in key.split())
    assert philox(c, (k0, k1))[0].tolist() == [int(w, 16) for w in words.split()]


def test_uniforms_depend_on_seed_epoch_index_and_view():
    base = dict(seed=1, epoch=2, indices=np.array([3]), view=0, n=32)
    changed = [
        dict(), dict(seed=2), dict(seed=1 + (1 << 32)), dict(epoch=3), dict(indices=np.array([4])),
        dict(indices=np.array([3 + (1 << 32)])), dict(view=1)]
    rows = [uniforms(**{**base, **c})[0] for c in changed]
    for a, b in itertools.combinations(rows, 2):
        assert not np.isin(a, b).any()  # not even shifted: no number is shared
    assert (uniforms(**base)[0] == rows[0]).all()


def test_uniforms_do_not_depend_on_the_other_indices():
    indices = np.array([5, 0, 999, 5, 17])
    together = uniforms(0, 0, indices, 1, 30)
    for i, index in enumerate(indices):
        assert (uniforms(0, 0, np.array([index]), 1, 30)[0] == together[i]).all()


def test_uniforms_do_not_depend_on_how_many_are_asked_for():
    assert (uniforms(0, 0, np.arange(5), 0, 7) == uniforms(0, 0, np.arange(5), 0, 32)[:, :7]).all()


def test_uniforms_are_uniform_on_0_1():
    u = uniforms(0, 0, np.arange(4000), 0, 32)
    assert u.dtype == np.float64
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u.ravel(), 'uniform').pvalue > 1e-3
    c = np.corrcoef(u.T) - np.eye(32)
    assert np.abs(c).max() < 5 / math.sqrt(4000)


@pytest.mark.parametrize('n', [1, 2, 1000])
def test_a_permutation_visits_each_sample_once(n):
    assert np.array_equal(np.sort(permutation(0, 0, n)), np.arange(n))


def test_permutations_differ_by_epoch_and_seed():
    orders = [permutation(s, e, 1000) for s, e in ((0, 0), (0, 1), (1, 0))]
    for a, b in itertools.combinations([*orders, np.arange(1000)], 2):
        assert (a == b).sum() < 10  # one fixed point is expected
    assert np.array_equal(permutation(0, 1, 1000), orders[1])
