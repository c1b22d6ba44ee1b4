"""Training images and masks: resized, cropped, flipped, distorted, normalised and padded, in this order."""
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from simsiam_models.benchmarks.pixels import Normalizer, nearest
from simsiam_models.benchmarks.protocols import SEGMENTATION
from simsiam_models.benchmarks.segmentation.data import (
    CropAugmentation,
    MaskedItem,
    ShuffledPlan,
    choose_crop,
    load_tests,
    load_training,
    prepare,
    resize_pair,
)
from simsiam_models.benchmarks.segmentation.settings import take
from simsiam_models.benchmarks.segmentation.training import make_inputs
from simsiam_models.data import DataError, UnreadableError
from simsiam_models.runtime.distributed import World

VOC = CropAugmentation(**take(SEGMENTATION['voc12aug_20k'], CropAugmentation))
SMALL = dataclasses.replace(VOC, box=(96, 64), crop=48)
PLAIN = dataclasses.replace(SMALL, flip_p=0, brightness=0, contrast=(1, 1), saturation=(1, 1), hue=0)
ALONE = World(0, 1, torch.device('cpu'))


class Pictures:
    """Images whose red channel is their mask, times 20, and whose blue one is their number."""

    name = 'pictures'

    def __init__(self, n: int = 10, bad: tuple[int, ...] = (), size: tuple[int, int] = (40, 60)) -> None:
        self.n, self.bad, self.size = n, bad, size

    def __len__(self) -> int:
        return self.n

    def read_pair(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if i in self.bad:
            raise UnreadableError(f'{i}.png: torn')
        mask = np.random.default_rng(i).integers(0, 3, (self.size[0] // 4, self.size[1] // 4)).repeat(4, 0).repeat(4, 1)
        return np.stack([20 * mask, 0 * mask, 0 * mask + i], 2).astype(np.uint8), mask.astype(np.uint8)


@pytest.mark.parametrize(('size', 'u', 'expected'), [
    ((375, 500), 1 / 3, (512, 683)),  # ratio 1: the short side is 512
    ((375, 500), 0.0, (256, 341)), ((500, 375), 0.0, (341, 256)),
    ((375, 500), 0.1357, (360, 480)),  # ratio .70355: 360.2 is truncated to 360
    ((300, 1500), 1 / 3, (410, 2048))])  # the long side is 2048
def test_images_are_resized_to_fit_in_a_box_whose_sides_are_truncated(size, u, expected):
    image, mask = np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8)
    resized, labels = resize_pair(image, mask, u, VOC)
    assert tuple(resized.shape) == (3, *expected) and labels.shape == expected


def test_masks_are_resized_to_the_nearest_pixel_and_images_between_them():
    image, mask = Pictures(size=(60, 80)).read_pair(0)
    resized, labels = resize_pair(image, mask, 0.9, SMALL)
    h, w = labels.shape
    rows, columns = (np.arange(h) * 60 / h).astype(int), (np.arange(w) * 80 / w).astype(int)
    assert np.array_equal(labels, mask[rows][:, columns])
    assert np.array_equal(nearest(w, 80), columns)
    assert len(np.unique(resized[0])) > 3 and set(np.unique(labels)) <= {0, 1, 2}


def test_a_crop_is_drawn_again_until_no_class_fills_three_quarters_of_its_labelled_pixels():
    a = dataclasses.replace(SMALL, crop=4, redraws=10)
    mask = np.zeros((4, 40), np.uint8)
    mask[:, 20:21] = 1  # a crop with it has one of four columns: a share of .75 exactly, which is too much
    mask[:, 30:32] = 1  # two of four columns

    def draws(*lefts: int) -> list[float]:
        return [x for left in lefts for x in (0.0, left / 37 + 1e-9)]

    filler = [0] * 9
    assert choose_crop(mask, draws(30, 0, *filler), a) == (0, 30)
    assert choose_crop(mask, draws(0, 30, *filler), a) == (0, 30)  # one class
    assert choose_crop(mask, draws(18, 30, *filler), a) == (0, 30)  # .75
    mask[:, 21] = 255  # not a class, and not in the share: 1 of 3 labelled columns is of class 1
    assert choose_crop(mask, draws(18, 30, *filler), a) == (0, 18)
    mask[:, 20] = 255
    assert choose_crop(mask, draws(18, 30, *filler), a) == (0, 30)  # one class and ignored pixels


def test_after_ten_redraws_the_last_crop_is_used_unchecked():
    a = dataclasses.replace(SMALL, crop=4)
    mask = np.zeros((4, 40), np.uint8)
    mask[:, 30:32] = 1
    lefts = [0] * 10 + [5]
    assert choose_crop(mask, [x for left in lefts for x in (0.0, left / 37 + 1e-9)], a) == (0, 5)
    lefts = [0] * 9 + [30, 5]  # the tenth draw is still checked
    assert choose_crop(mask, [x for left in lefts for x in (0.0, left / 37 + 1e-9)], a) == (0, 30)


def test_an_image_smaller_than_a_crop_is_not_cropped_on_that_side():
    mask = np.zeros((3, 40), np.uint8)
    top, left = choose_crop(mask, [0.99] * 22, dataclasses.replace(SMALL, crop=4))
    assert (top, left) == (0, 36)


def test_image_and_mask_are_cropped_and_flipped_together():
    for i in range(6):
        for flip_p in (0.0, 1.0):
            image, mask = Pictures(size=(64, 96)).read_pair(i)
            item = prepare(image, mask, i, (0, 0, i), dataclasses.replace(PLAIN, flip_p=flip_p, ratios=(1, 1)))
            assert torch.equal(item.image[0], 20 * torch.from_numpy(item.mask)) and item.mask.shape == (48, 48)
    plain, flipped = (
        prepare(*Pictures().read_pair(0), 0, (0, 0, 0), dataclasses.replace(PLAIN, flip_p=p)) for p in (0, 1))
    assert np.array_equal(plain.mask[:, ::-1], flipped.mask)


def test_what_is_drawn_depends_on_seed_epoch_and_image_alone():
    image, mask = Pictures().read_pair(0)
    first, again = (prepare(image, mask, 0, (0, 1, 2), SMALL) for _ in range(2))
    assert torch.equal(first.image, again.image) and np.array_equal(first.mask, again.mask)
    for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        other = prepare(image, mask, 0, key, SMALL)
        assert other.image.shape != first.image.shape or not torch.equal(other.image, first.image)


def test_images_are_padded_with_zeros_behind_normalization_and_masks_with_255():
    item = MaskedItem(torch.full((3, 2, 3), 100, dtype=torch.uint8), np.ones((2, 3), np.uint8), 7)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
    images, masks, draws = make_inputs([item], 0, 0, 4, Normalizer(mean, std, torch.device('cpu')), 5)
    expected = (100 - 255 * torch.tensor(mean)) / (255 * torch.tensor(std))
    assert torch.allclose(images[0, :, :2, :3], expected.view(3, 1, 1).expand(3, 2, 3))
    assert (images[0, :, 2:] == 0).all() and (images[0, :, :, 3:] == 0).all()
    assert masks[0].tolist() == [[1, 1, 1, 255]] * 2 + [[255] * 4] * 2
    assert draws.shape == (1, 5) and 0 <= draws.min() <= draws.max() < 1


def test_every_image_trains_once_per_epoch_but_for_an_incomplete_last_batch():
    plan = ShuffledPlan(10, 4, 0)
    epochs = [[plan.at(2 * e + k) for k in range(2)] for e in range(3)]
    for e, steps in enumerate(epochs):
        assert [epoch for epoch, _ in steps] == [e, e]
        assert len({i for _, batch in steps for i in batch.tolist()}) == 8
    assert len({tuple(batch.tolist()) for steps in epochs for _, batch in steps}) == 6
    first, same, other = (ShuffledPlan(10, 4, seed).at(0)[1].tolist() for seed in (0, 0, 1))
    assert first == same != other


def read(loader: Any, step: int, n: int) -> list[list[tuple[int, bytes]]]:
    return [[(item.row, item.image.numpy().tobytes() + item.mask.tobytes()) for item in items]
            for items, _ in zip(loader.load(step), range(n))]  # noqa: B905 - the loader has no end


def test_batches_are_the_same_from_any_step_on_with_any_number_of_threads():
    whole = read(load_training(Pictures(), SMALL, 4, ALONE, seed=0, workers=0), 0, 6)
    assert read(load_training(Pictures(), SMALL, 4, ALONE, seed=0, workers=3), 2, 4) == whole[2:]
    worlds = [World(rank, 2, ALONE.device) for rank in range(2)]
    parts = [read(load_training(Pictures(), SMALL, 4, world, seed=0, workers=0), 0, 6) for world in worlds]
    for batch, a, b in zip(whole, *parts, strict=True):
        assert batch[0::2] == a and batch[1::2] == b


def test_another_image_replaces_an_unreadable_one_and_too_many_are_refused():
    loader = load_training(Pictures(bad=(3,)), SMALL, 10, ALONE, seed=0, workers=0)
    (items,) = read(loader, 0, 1)
    assert 3 not in {i for i, _ in items} and len(items) == 10 and loader.unreadable == {3: '3.png: torn'}
    with pytest.raises(DataError, match='2 of 10 images cannot be read, more than 10%; the first: 3.png: torn'):
        read(load_training(Pictures(bad=(3, 4)), SMALL, 10, ALONE, seed=0, workers=0), 0, 1)


def test_fewer_images_than_a_batch_are_refused():
    with pytest.raises(ValueError, match=r'a batch of 4 is larger than the training set \(3\).*-size of at most 3'):
        load_training(Pictures(3), SMALL, 4, ALONE, seed=0, workers=0)


def test_test_images_fit_in_the_box_and_keep_their_masks():
    items = list(load_tests(Pictures(3, size=(40, 120)), (96, 64), ALONE, 0))
    assert [tuple(item.image.shape) for item in items] == [(3, 32, 96)] * 3
    assert all(np.array_equal(item.mask, Pictures(3, size=(40, 120)).read_pair(i)[1]) for i, item in enumerate(items))
