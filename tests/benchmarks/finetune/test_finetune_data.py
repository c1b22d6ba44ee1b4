"""Fine-tuning images: who trains and who validates, what becomes of an image, and which cannot be read."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_finetune import ALONE, Broken, settings

from simsiam_models.benchmarks.finetune.data import (
    Loader,
    Samples,
    find_crop_pct,
    make_eval_transform,
    make_train_transform,
    plan_train_batches,
)
from simsiam_models.benchmarks.samples import split
from simsiam_models.data import DataError, open_data
from simsiam_models.runtime.distributed import World


def test_held_out_images_are_a_seeded_share_of_each_class():
    labels = np.array([0] * 10 + [1] * 5 + [2] * 2 + [3])
    train, held = split(labels, 0.3, 0)
    assert sorted([*train, *held]) == list(range(18))
    assert np.bincount(labels[held], minlength=4).tolist() == [3, 2, 1, 0]
    np.testing.assert_array_equal(held, split(labels, 0.3, 0)[1])
    assert set(held) != set(split(labels, 0.3, 1)[1])
    assert np.bincount(labels[split(labels, 0.99, 0)[0]], minlength=4).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize('n, batch, keep, sizes', [
    (20, 8, False, [8, 8]), (20, 8, True, [8, 8, 4]), (17, 8, True, [8, 8, 4]), (16, 8, True, [8, 8])])
def test_the_processes_batches_together_are_the_global_ones(n: int, batch: int, keep: bool, sizes: list[int]):
    worlds = [World(r, 2, torch.device('cpu')) for r in range(2)]
    parts = [plan_train_batches(n, batch, 3, 5, w, keep) for w in worlds]
    joined = [sorted(a + b) for a, b in zip(*parts, strict=True)]
    assert [len(b) for b in joined] == sizes
    assert all(len(a) == len(b) for a, b in zip(*parts, strict=True))
    alone = plan_train_batches(n, batch, 3, 5, ALONE, keep)
    assert [sorted(b) for b in alone[:n // batch]] == joined[:n // batch]
    if keep:
        assert {i for b in joined for _, i in b} == set(range(n))  # every image trains
    else:
        assert len({i for b in joined for _, i in b}) == sum(sizes)
    assert plan_train_batches(n, batch, 4, 5, ALONE, keep) != alone


def test_an_image_depends_on_seed_epoch_and_index_and_not_on_workers(few_digits: Path):
    images, _ = open_data(few_digits)
    mean, std = (0.5,) * 3, (0.2,) * 3
    s = settings(
        '--image-size', '24', '--crop-scale', '0.3', '1', '--flip-p', '0.5', '--randaugment', 'rand-m9-mstd0.5-inc1',
        '--erase-p', '0.5')
    transform = make_train_transform(s, mean, std)

    def batches(seed: int, epoch: int, workers: int) -> torch.Tensor:
        samples = Samples(images, transform, seed, True)
        keys = [[(epoch, i) for i in part] for part in ((3, 1, 4), (15, 9, 2))]
        return torch.stack([x for x, _ in Loader(samples, workers, torch.device('cpu')).load(keys)])

    first = batches(0, 0, 0)
    assert torch.equal(first, batches(0, 0, 2))
    assert not torch.equal(first, batches(1, 0, 0)) and not torch.equal(first, batches(0, 1, 0))


def test_the_next_readable_image_stands_in_for_an_unreadable_one_and_it_is_named():
    images = Broken(30, {4, 5})
    transform = make_eval_transform(8, 8, (0.0,) * 3, (1.0,) * 3)
    training = Loader(Samples(images, transform, 0, True), 0, torch.device('cpu'))
    x, y = next(training.load([[(0, 3), (0, 4), (0, 5)]]))
    assert (255 * x[:, 0, 0, 0]).round().tolist() == [3, 6, 6] and y.tolist() == [1, 0, 0]
    assert training.unreadable == {4: '4.jpg: torn', 5: '5.jpg: torn'}
    measuring = Loader(Samples(images, transform, 0, False), 0, torch.device('cpu'))
    x, y = next(measuring.load([[(0, 3), (0, 4)]]))
    assert x[1].abs().max() == 0 and y.tolist() == [1, 0]  # predict leaves the row out
    for n, bad, said in ((30, {1, 2, 3, 4}, '4 of 30 images cannot be read, more than 10%'), (3, {0, 1, 2}, 'none of')):
        loader = Loader(
            Samples(Broken(n, bad), transform, 0, True), 0, torch.device('cpu'))
        with pytest.raises(DataError, match=said):
            list(loader.load([[(0, i) for i in range(n)]]))


@pytest.mark.parametrize('workers', [0, 1])
def test_why_a_run_ends_comes_out_of_a_reading_process_as_one_sentence(workers: int):
    transform = make_eval_transform(8, 8, (0.0,) * 3, (1.0,) * 3)
    samples = Samples(Broken(3, {0, 1, 2}), transform, 0, True)
    with pytest.raises(DataError) as e:
        next(Loader(samples, workers, ALONE.device).load([[(0, 0), (0, 1)]]))
    assert str(e.value) == 'broken: none of the 3 images can be read; the first: 0.jpg: torn'


class Two(World):
    """A world of two, the other of which could not read what `other` says."""

    other: dict[int, str] = {}

    def gather(self, mine: dict[int, str]) -> list[dict[int, str]]:
        return [self.other, mine]


def test_what_any_process_cannot_read_all_know_and_count_together():
    samples = Samples(Broken(30, set()), None, 0, False)
    world = Two(1, 2, torch.device('cpu'))
    loader = Loader(samples, 0, world.device)
    loader.unreadable = {7: '7.jpg: torn', 9: '9.jpg: torn'}
    world.other.update({6: '6.jpg: torn', 7: '/elsewhere/7.jpg: torn'})
    loader.join(world)
    assert sorted(loader.unreadable) == [6, 7, 9]  # a tenth
    world.other[3] = '3.jpg: torn'
    with pytest.raises(DataError, match='4 of 30 images cannot be read, more than 10%; the first: 3.jpg: torn'):
        loader.join(world)


def test_labels_are_a_copy_of_those_of_a_listing_which_are_mapped():
    images = Broken(8, set())
    images.labels.setflags(write=False)
    samples = Samples(images, None, 0, False)
    assert samples.labels.flags.writeable and np.array_equal(samples.labels, images.labels)


@pytest.mark.parametrize('size, resize', [(224, 256), (96, 110), (32, 36), (176, 201), (49, 49)])
def test_timm_resizes_to_what_the_exported_crop_pct_means(size: int, resize: int):
    assert math.floor(size / find_crop_pct(size, resize)) == resize
