"""Advice that names a value: whoever follows it gets on, also at the extremes."""
import re

import numpy as np
import pytest

from simsiam_models.benchmarks.finetune.settings import Settings, fit_batch
from simsiam_models.benchmarks.knn.command import select_ks
from simsiam_models.benchmarks.linear.training import check_batches
from simsiam_models.data import Augmentation, MemoryImages, TwoViews, UnreadableError
from simsiam_models.data.loader import check_batch
from simsiam_models.data.readers.decode import DataError
from simsiam_models.preflight.report import suggest_size
from simsiam_models.runtime.precision import AMP, suggest_off
from simsiam_models.training.doctor import Doctor


def images(n: int) -> MemoryImages:
    return MemoryImages(np.zeros((n, 8, 8, 3), np.uint8), None, [], 'blank')


@pytest.mark.parametrize('world', [1, 2, 3, 8])
@pytest.mark.parametrize('n', [1, 2, 3, 5, 7, 15, 16, 17, 100])
def test_a_batch_of_the_size_that_is_advised_fits(n, world):
    for batch in range(1, n + 20):
        try:
            check_batch(batch, 'blank', n, world)
        except ValueError as e:
            text = str(e)
        else:
            continue
        if 'add images' in text:
            assert not [b for b in range(2 * world, n + 1) if b % world == 0]  # none fits
            assert ('use fewer processes' in text) == (world > 1)
            if world > 1 and n >= 2:
                check_batch(2, 'blank', n, 1)
            continue
        if found := re.search(r'a multiple of (\d+) from (\d+) to (\d+)', text):
            k, low, high = map(int, found.groups())
            advised = [b for b in range(low, high + 1) if b % k == 0]
        elif found := re.search(r'a multiple of (\d+)$', text):
            k = int(found[1])
            advised = [batch // k * k]
        else:
            advised = [int(re.search(r'use at (?:most|least) (\d+)', text)[1])]
        assert advised
        for b in advised:
            check_batch(b, 'blank', n, world)


class Torn:
    """Images of which every k-th cannot be read."""

    name, classes, labels, digest = 'torn', [], None, 'ab' * 8

    def __init__(self, n: int, every: int) -> None:
        self.n, self.every = n, every

    def __len__(self) -> int:
        return self.n

    def read(self, index: int) -> np.ndarray:
        if index % self.every == 0:
            raise UnreadableError(f'{index}.jpg: torn')
        return np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize('allowed', [0.0, 0.001, 0.01, 0.1, 0.4])
def test_no_share_of_unreadable_images_is_advised_that_is_not_above_the_one_exceeded(allowed):
    with pytest.raises(UnreadableError) as e:
        list(TwoViews(Torn(1000, 2), Augmentation(size=8), 10, max_unreadable=allowed).epoch(0))
    assert f'or raise --max-unreadable, now {allowed:g}' in str(e.value) and 'preflight --all' in str(e.value)
    assert not re.search(r'--max-unreadable [\d.]', str(e.value))


class Short:
    """A stream that ends after `n` of the images that it promises."""

    name, labels, digest = 'short', None, 'ab' * 8

    def __init__(self, n: int, promised: int) -> None:
        self.n, self.promised = n, promised

    def __len__(self) -> int:
        return self.promised

    def samples(self, seed: int, epoch: int, start: int):
        return iter([np.zeros((8, 8, 3), np.uint8)] * (self.n - start))


@pytest.mark.parametrize('n', [0, 1, 3, 4, 5, 9])
def test_the_length_of_an_epoch_that_is_advised_fits_the_stream_and_the_batch(n):
    with pytest.raises(DataError, match=f'ended after {n} images') as e:
        list(TwoViews(Short(n, 16), Augmentation(size=8), 4).epoch(0))
    found = re.search(r'--images-per-epoch (\d+) or less', str(e.value))
    assert (found is None) == (n < 4)
    if found:
        assert list(TwoViews(Short(n, int(found[1])), Augmentation(size=8), 4).epoch(0))


@pytest.mark.parametrize('single', [False, True])
def test_a_linear_batch_that_is_advised_fits(single):
    for n in range(1, 40):
        for batch in range(1, 45):
            try:
                check_batches(n, batch, single)
            except ValueError as e:
                if found := re.search(r'use --batch-size (\d+)$', str(e)):
                    check_batches(n, int(found[1]), single)
                else:
                    assert n == 1 and 'add images' in str(e)


def finetuning(batch: int, mixup: float) -> Settings:
    return Settings(
        epochs=1, batch_size=batch, optimizer='sgd', lr=0.1, weight_decay=0.0, mixup=mixup, image_size=32, resize=36,
        crop_scale=(0.2, 1.0), flip=0.5, seed=0)


@pytest.mark.parametrize('mixup', [0.0, 0.2])
@pytest.mark.parametrize('processes', [1, 2, 3, 8])
def test_a_fine_tuning_batch_that_is_advised_fits(processes, mixup):
    for n in range(1, 20):
        for batch in range(2, 24):
            try:
                fit_batch(finetuning(batch, mixup), n, processes, lambda text: None)
                continue
            except ValueError as e:
                text = str(e)
            if found := re.search(r'use a multiple of (\d+)$', text):
                try:
                    fit_batch(finetuning(int(found[1]) * 2, mixup), n, processes, lambda text: None)
                except ValueError as again:
                    assert 'add images' in str(again)
            if '--mixup 0 --cutmix 0' in text:
                fit_batch(finetuning(processes * 2, 0.0), n, processes, lambda text: None)
            if 'fewer processes' in text and n >= 2:
                fit_batch(finetuning(2, mixup), n, 1, lambda text: None)


@pytest.mark.parametrize('n', [1, 2, 9, 150])
def test_the_k_that_is_advised_is_one_that_is_possible(n):
    with pytest.raises(ValueError) as e:
        select_ks([200, 400], n)
    k = int(re.search(r'use --k (\d+) or less', str(e.value))[1])
    assert select_ks([k], n) == [k]


def test_the_precision_that_is_already_used_is_not_advised():
    assert suggest_off('off') == ''
    assert all('use --amp off' in suggest_off(amp) and amp in suggest_off(amp) for amp in AMP if amp != 'off')
    figures = {'loss': float('nan'), 'std': 1.0, 'rank': 9.0}
    assert '--amp' not in Doctor(0.5, 64).examine(figures).suggestion
    assert '--amp off' in Doctor(0.5, 64, amp='bfloat16').examine(figures).suggestion


@pytest.mark.parametrize('n, advised', [(10, False), (63, False), (64, True)])
def test_a_larger_batch_is_advised_only_where_there_are_images_for_it(n, advised):
    figures = {'loss': -0.5, 'std': 1.0, 'rank': 9.0, 'pixels': 1.0, 'samples': 4}
    assert ('--batch-size 64' in Doctor(0.05, 4, n).examine(figures).suggestion) == advised
    if advised:
        check_batch(64, 'x', n, 1)


@pytest.mark.parametrize('size', [8, 32, 96, 224])
def test_the_image_size_that_is_advised_is_smaller_and_allowed(size):
    for short in range(1, size):
        if found := re.search(r'--image-size (\d+)', suggest_size(short, size)):
            assert 8 <= int(found[1]) < size and int(found[1]) <= short
        else:
            assert short < 8
