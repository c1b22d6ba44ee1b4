"""Batches of two views: pure functions of (seed, epoch, index) for any number of workers and processes."""
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from test_augment import AUG, source
from torch import Tensor

from simsiam_models.data import TwoViews, augment, kernel, loader
from simsiam_models.data.augment import crop, crop_box, draw, finish, finish_colours
from simsiam_models.data.philox import permutation

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('with_kernel', [True, False])
def test_views_are_what_the_parts_give(monkeypatch, with_kernel):
    if not with_kernel:
        monkeypatch.setattr(kernel, 'load_library', lambda: None)
    data = source()
    batches = list(TwoViews(data, AUG, batch=8, seed=4).epoch(3))
    assert len(batches) == 3
    order = permutation(4, 3, 24)
    for b, views in enumerate(batches):
        indices = order[8 * b:8 * b + 8]
        for v, x in enumerate(views):
            u, p = draw(AUG, 4, 3, indices, v)
            crops = np.stack([
                crop(Image.fromarray(data.read(i)), crop_box(AUG, row, 40, 36), 32)
                for i, row in zip(indices, u, strict=True)])
            if with_kernel:  # its crops are PIL's within one level, see test_kernel.py
                kernel.cut_views([data.read(i) for i in indices], u, AUG.rule(), None, crops, np.arange(8))
            want = finish(torch.from_numpy(crops).permute(0, 3, 1, 2), p)
            torch.testing.assert_close(x, want, rtol=0, atol=1e-5)


def test_workers_change_no_bit():
    alone, helped = (TwoViews(source(), AUG, batch=8, seed=1, workers=w) for w in (0, 2))
    for epoch in (0, 1):
        for a, b in zip(alone.epoch(epoch), helped.epoch(epoch), strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_a_resumed_epoch_is_the_rest_of_the_epoch():
    whole = list(TwoViews(source(), AUG, batch=8).epoch(2))
    rest = list(TwoViews(source(), AUG, batch=8).epoch(2, start=1))
    assert len(rest) == 2
    for a, b in zip(whole[1:], rest, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_the_batches_of_two_ranks_are_the_batch_of_one_process():
    one = list(TwoViews(source(), AUG, batch=8).epoch(0))
    two = [list(TwoViews(source(), AUG, batch=8, rank=r, world=2).epoch(0)) for r in (0, 1)]
    assert len(one) == len(two[0]) == len(two[1]) == 3
    for whole, a, b in zip(one, *two, strict=True):
        for v in (0, 1):
            assert a[v].shape == (4, 3, 32, 32)
            assert torch.equal(torch.cat([a[v], b[v]]), whole[v])


def test_the_two_views_differ_and_so_do_epochs_and_seeds():
    def first(seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        return next(iter(TwoViews(source(8), AUG, batch=8, seed=seed).epoch(epoch)))

    x1, x2 = first(0, 0)
    assert all(not torch.equal(a, b) for a, b in zip(x1, x2, strict=True))
    assert not torch.equal(x1, first(0, 1)[0])
    assert not torch.equal(x1, first(1, 0)[0])
    again = first(0, 0)
    assert torch.equal(x1, again[0]) and torch.equal(x2, again[1])


def test_the_last_incomplete_batch_is_dropped():
    views = TwoViews(source(23), AUG, batch=8)
    assert len(views) == len(list(views.epoch(0))) == 2


@pytest.mark.parametrize('batch, world, text', [
    (25, 1, r'larger than the data set: noise has 24 images; use at most 24, or let simsiam preflight'),
    (8, 3, r'does not divide by 3 processes; use a multiple of 3'),
    (1, 1, r'at least 2 samples'),
    (4, 4, r'at least 2 samples'),
])
def test_a_batch_that_does_not_fit_is_refused_by_its_flag(batch, world, text):
    with pytest.raises(ValueError, match=text) as e:
        TwoViews(source(), AUG, batch=batch, world=world)
    assert f'--batch-size {batch}' in str(e.value)


# What a GPU finishes


def test_the_parameters_of_a_batch_are_sent_in_one_copy(monkeypatch):
    sent, send = [], augment.send
    monkeypatch.setattr(augment, 'send', lambda array, to: sent.append(array.shape) or send(array, to))
    batches = list(TwoViews(source(), AUG, batch=8, on_device=True).epoch(0))
    assert len(sent) == len(batches) == 3


def test_the_capture_of_the_finishing_pass_has_no_graph_break():
    captured = torch.compile(finish_colours, fullgraph=True, backend='eager', dynamic=False)
    x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    args = x, torch.from_numpy(draw(AUG, 0, 0, np.arange(4), 0)[1].table()), torch.rand(2, 3) + 1
    assert torch.equal(captured(*args), finish_colours(*args))


@pytest.mark.parametrize('fails', ['when it is made', 'when it is called'])
def test_an_augmentation_that_cannot_be_compiled_runs_uncompiled_after_one_warning(monkeypatch, caplog, fails):
    def no_compiler(*args, **kwargs):
        raise RuntimeError('Cannot find a working triton installation')
    monkeypatch.setattr(torch, 'compile', no_compiler if fails == 'when it is made' else lambda *a, **k: no_compiler)
    want = list(TwoViews(source(), AUG, batch=8, on_device=True).epoch(0))
    views = TwoViews(source(), AUG, batch=8, on_device=True)
    views._colours = loader._compile(finish_colours)
    with caplog.at_level(logging.WARNING):
        got = list(views.epoch(0))
    assert [r.message for r in caplog.records] == [
        'the augmentation cannot be compiled here (RuntimeError); continuing uncompiled, slower']
    for x, y in zip(want, got, strict=True):
        assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])
