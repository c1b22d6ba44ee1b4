"""Evaluation images: torchvision's pixels, in the given order, and unreadable images named instead of measured."""
import numpy as np
import pytest
import torch
from PIL import Image
from test_augment import photo
from torchvision import transforms

from simsiam_models.data import EvalImages, Transform, UnreadableError

pytestmark = pytest.mark.usefixtures('one_thread')
SMALL = Transform(36, 32)


class Photos:
    """Images of different sizes; those that are None are unreadable."""

    name, labels, classes = 'photos', None, []

    def __init__(self, images: list[Image.Image | None]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        if self.images[index] is None:
            raise UnreadableError(f'{index}.jpg: cannot be read')
        return np.asarray(self.images[index])


def transform(image: Image.Image, how: Transform) -> np.ndarray:
    (rows, pixels), = EvalImages(Photos([image]), [np.array([0])], how)
    assert rows.tolist() == [0]
    assert pixels.shape == (1, how.crop, how.crop, 3) and pixels.dtype == torch.uint8
    return pixels[0].numpy()


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resizes along the rows first, as PIL does before release 13; later releases choose the order."""
    rows = transforms.Resize((image.height, width))(image)
    return transforms.Resize((height, width))(rows)


SIZES = [(427, 333), (333, 427), (301, 301), (640, 257), (256, 256), (300, 256)]


@pytest.mark.parametrize('width, height', SIZES)
def test_evaluation_is_torchvisions_resize_and_centre_crop(width, height):
    image = photo(width, height)
    theirs = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    assert np.array_equal(transform(image, Transform()), np.asarray(theirs(image)))


@pytest.mark.parametrize('kind, then', [
    ('center', transforms.CenterCrop(224)), ('squash', lambda image: resize(image, 224, 224))])
@pytest.mark.parametrize('width, height', [*SIZES, (500, 375), (333, 500), (90, 61), (61, 90), (1000, 257), (3, 2)])
def test_both_kinds_are_torchvisions_for_every_size(kind, then, width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for image in (Image.fromarray(noise), photo(width, height)):
        size = transforms.Resize(256)(image)
        want = np.asarray(then(resize(image, size.height, size.width)))
        assert np.array_equal(transform(image, Transform(kind=kind)), want)


@pytest.mark.parametrize('kwargs, match', [
    ({'kind': 'crop'}, "transform 'crop': must be 'center' or 'squash'"),
    ({'resize': 100}, '--image-size 224 and --resize 100: the crop must fit'),
    ({'crop': 0, 'kind': 'squash'}, 'the crop must fit')])
def test_a_transform_that_cannot_be_is_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        Transform(**kwargs)


def test_evaluation_keeps_the_order_and_the_last_batch():
    images = Photos([photo(40 + i, 50 - i, i) for i in range(5)])
    batches = [np.array([4, 0]), np.array([3, 1]), np.array([2])]
    loader = EvalImages(images, batches, SMALL)
    found = list(loader)
    assert len(loader) == 3 and [len(x) for _, x in found] == [2, 2, 1]
    for (rows, x), wanted in zip(found, batches, strict=True):
        assert rows.tolist() == wanted.tolist()
        for i, pixels in zip(rows, x, strict=True):
            assert np.array_equal(pixels, transform(images.images[i], SMALL))


@pytest.mark.parametrize('images_per_batch', [1, 3, 16, 40])
def test_the_number_of_workers_changes_nothing(images_per_batch):
    images = Photos([None if i in (7, 20) else photo(40 + i, 60 - i, i) for i in range(40)])
    order = np.random.default_rng(0).permutation(40)
    batches = [order[i:i + images_per_batch] for i in range(0, 40, images_per_batch)]
    alone = EvalImages(images, batches, SMALL)
    want = list(alone)
    assert sorted(alone.unreadable) == [7, 20]
    for workers in (1, 2, 5):
        loader = EvalImages(images, batches, SMALL, workers)
        got = list(loader)
        assert loader.unreadable == alone.unreadable
        assert len(got) == len(want) == len(batches)
        assert all(np.array_equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(got, want, strict=True))


@pytest.mark.parametrize('workers', [0, 2])
def test_an_unreadable_image_is_named_before_its_batch_is_yielded(workers):
    images = Photos([None if i in (2, 3, 11) else photo(40, 30, i) for i in range(12)])
    loader = EvalImages(images, [np.arange(i, i + 4) for i in (0, 4, 8)], SMALL, workers)
    for rows, x in loader:
        assert x.shape == (4, 32, 32, 3)
        for row, pixels in zip(rows, x, strict=True):
            assert (row in loader.unreadable) == (row in (2, 3, 11)) == bool((pixels == 0).all())
    assert loader.unreadable == {i: f'{i}.jpg: cannot be read' for i in (2, 3, 11)}


def test_each_pass_names_what_it_could_not_read():
    images = Photos([None, photo(40, 30)])
    loader = EvalImages(images, [np.arange(2)], SMALL)
    list(loader)
    assert sorted(loader.unreadable) == [0]
    images.images = [photo(40, 30), None]
    (_, x), = loader
    assert sorted(loader.unreadable) == [1] and bool((x[0] != 0).any())


@pytest.mark.parametrize('error', [MemoryError('no memory'), KeyError('of the source')])
@pytest.mark.parametrize('workers', [0, 2])
def test_another_error_reaches_the_caller(error, workers):
    class Broken(Photos):
        def read(self, index: int) -> np.ndarray:
            raise error

    with pytest.raises(type(error)):
        list(EvalImages(Broken([photo(4, 4)]), [np.array([0])], SMALL, workers))
