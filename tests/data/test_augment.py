"""The augmentation: its random parameters, and its operators against torchvision and SciPy.

References are independent: torchvision's operators, its RandomResizedCrop, and SciPy's Gaussian filter.
"""
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.v2 import functional as F

from simsiam_models.data import Augmentation, MemoryImages
from simsiam_models.data.augment import CROP_DRAWS, Finish, blur, crop, crop_box, draw, finish, normalize, shift_hue

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUG = Augmentation(size=32)


pytestmark = pytest.mark.usefixtures('one_thread')


def colours(batch: int, size: int = 32, seed: int = 0) -> Tensor:
    """(B, 3, S, S) uint8: noise, with patches of pure gray, black and white, whose hue is undefined."""
    x = torch.randint(0, 256, (batch, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    x[:, :, :4] = x[:, :1, :4]
    x[:, :, 4:6], x[:, :, 6:8] = 0, 255
    x[:, 1, 8:10] = x[:, 0, 8:10]  # two channels are the largest
    return x


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise."""
    r = np.random.default_rng(seed)
    coarse = Image.fromarray(r.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse, np.int16) + r.integers(-12, 13, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def parameters(batch: int, **kwargs: np.ndarray) -> Finish:
    """Parameters that do nothing, except for those given."""
    nothing = dict(
        jitter=np.zeros(batch, bool), order=np.tile(np.arange(4), (batch, 1)),
        factors=np.tile([1.0, 1, 1, 0], (batch, 1)), gray=np.zeros(batch, bool),
        sigma=np.zeros(batch), flip=np.zeros(batch, bool))
    return Finish(**{**nothing, **kwargs})


def denormalize(x: Tensor) -> Tensor:
    return x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def gaussian(x: np.ndarray, sigma: float) -> np.ndarray:
    """(3, S, S) -> float64 reference; the kernel is cut off at 4 sigma, rounded up to whole pixels."""
    radius = math.ceil(4 * sigma)
    return ndimage.gaussian_filter(x.astype(np.float64), (0, sigma, sigma), mode='nearest', radius=(0, radius, radius))


def source(n: int = 24, width: int = 40, height: int = 36) -> MemoryImages:
    r = np.random.default_rng(7)
    return MemoryImages(r.integers(0, 256, (n, height, width, 3), dtype=np.uint8), None, [], 'noise')


# Colour operators against torchvision, on float images


OPERATORS = [
    ('brightness', 0, F.adjust_brightness, [0.6, 1.0, 1.4, 0.0], 1e-6),
    ('contrast', 1, F.adjust_contrast, [0.6, 1.0, 1.4, 0.0], 2e-6),
    ('saturation', 2, F.adjust_saturation, [0.6, 1.0, 1.4, 0.0], 2e-6),
    ('hue', 3, F.adjust_hue, [-0.1, -0.03, 0.0, 0.07, 0.1, 0.5, -0.5], 1e-5),
]


@pytest.mark.parametrize('name, op, reference, factors, error', OPERATORS, ids=[o[0] for o in OPERATORS])
def test_each_colour_operator_is_torchvisions(name, op, reference, factors, error):
    n = len(factors)
    x = colours(n)
    f = np.tile([1.0, 1.0, 1.0, 0.0], (n, 1))
    f[:, op] = factors
    got = denormalize(finish(x, parameters(n, jitter=np.ones(n, bool), factors=f)))
    want = torch.stack([reference(x[i] / 255, factors[i]) for i in range(n)])
    # The other three operators are neutral, but each rounds once.
    assert (got - want).abs().max() < error + 2e-6


def test_shift_hue_is_exact_against_torchvision():
    x = colours(5) / 255
    shift = torch.tensor([-0.1, 0.1, 0.25, 0.5, -0.5])
    got = shift_hue(x, shift.view(-1, 1, 1, 1))
    want = torch.stack([F.adjust_hue(x[i], float(shift[i])) for i in range(5)])
    assert (got - want).abs().max() < 1e-5


def test_gray_is_torchvisions():
    x = colours(2)
    got = denormalize(finish(x, parameters(2, gray=np.array([True, False]))))
    assert (got[0] - F.rgb_to_grayscale(x[0] / 255, num_output_channels=3)).abs().max() < 1e-6
    assert (got[1] - x[1] / 255).abs().max() < 1e-6


def test_jitter_applies_the_operators_in_each_samples_own_order():
    orders = np.array(list(itertools.permutations(range(4))))
    n = len(orders)
    factors = np.random.default_rng(0).uniform([0.6, 0.6, 0.6, -0.1], [1.4, 1.4, 1.4, 0.1], (n, 4))
    x = colours(n, 16)
    got = denormalize(finish(x, parameters(n, jitter=np.ones(n, bool), order=orders, factors=factors)))
    for i in range(n):
        want = x[i] / 255
        for op in orders[i]:
            want = OPERATORS[op][2](want, float(factors[i, op]))
        assert (got[i] - want).abs().max() < 2e-5


def test_flip_mirrors_left_and_right():
    x = colours(2)
    got = finish(x, parameters(2, flip=np.array([True, False])))
    assert torch.equal(got[0], normalize(x / 255)[0].flip(-1))
    assert torch.equal(got[1], normalize(x / 255)[1])


@pytest.mark.parametrize('sigma', [0.1, 0.5, 1.0, 2.0])
def test_blur_is_a_gaussian_with_repeated_edges(sigma):
    x = colours(2) / 255
    got = blur(x, np.array([sigma, sigma]))
    want = np.stack([gaussian(x[i].numpy(), sigma) for i in range(2)])
    assert np.abs(got.numpy() - want).max() < 2e-6


def test_each_sample_is_blurred_by_its_own_sigma():
    x = colours(4) / 255
    sigma = np.array([0.1, 0.7, 1.3, 2.0])
    got = blur(x, sigma).numpy()
    for i in range(4):
        assert np.abs(got[i] - gaussian(x[i].numpy(), sigma[i])).max() < 2e-4  # the tail beyond 4 sigma is 6e-5


def test_blur_does_not_depend_on_the_rest_of_the_batch():
    x = colours(2) / 255
    together = blur(x, np.array([0.7, 2.0]))
    assert torch.equal(blur(x[:1], np.array([0.7])), together[:1])


def test_a_kernel_wider_than_the_image_still_sums_to_one():
    x = torch.full((1, 3, 4, 4), 0.25)
    assert (blur(x, np.array([2.0])) - 0.25).abs().max() < 1e-6


def test_all_steps_together_are_the_references_in_the_published_order():
    n = 24
    x = colours(n)
    _, p = draw(AUG, 5, 0, np.arange(n), 0)
    assert p.jitter.any() and p.gray.any() and p.sigma.any() and p.flip.any()
    before = x.clone()
    got = finish(x, p)
    assert torch.equal(x, before)  # the crops do not change
    assert got.dtype == torch.float32 and got.shape == (n, 3, 32, 32)
    for i in range(n):
        want = x[i] / 255
        for op in p.order[i] if p.jitter[i] else ():
            want = OPERATORS[op][2](want, float(p.factors[i, op]))
        if p.gray[i]:
            want = F.rgb_to_grayscale(want, num_output_channels=3)
        if p.sigma[i]:
            want = torch.from_numpy(gaussian(want.numpy(), p.sigma[i])).float()
        if p.flip[i]:
            want = want.flip(-1)
        want = F.normalize(want, MEAN, STD)
        assert (got[i] - want).abs().max() < 1e-3  # of standard deviations


# The crop


def boxes(n: int, width: int, height: int, aug: Augmentation = AUG) -> np.ndarray:
    u, _ = draw(aug, 0, 0, np.arange(n), 0)
    return np.array([crop_box(aug, row, width, height) for row in u])


@pytest.mark.parametrize('width, height', [(320, 240), (240, 320), (500, 120), (32, 32)])
def test_crop_boxes_are_distributed_as_torchvisions(width, height):
    n = 3000
    left, top, right, bottom = boxes(n, width, height).T
    assert (left >= 0).all() and (top >= 0).all() and (right <= width).all() and (bottom <= height).all()
    assert (right > left).all() and (bottom > top).all()
    image = Image.new('RGB', (width, height))
    torch.manual_seed(0)
    theirs = np.array([
        transforms.RandomResizedCrop.get_params(image, AUG.crop_scale, AUG.crop_ratio) for _ in range(n)])
    t_top, t_left, t_h, t_w = theirs.T
    w, h = right - left, bottom - top
    pairs = {
        'area': (w * h, t_w * t_h), 'ratio': (w / h, t_w / t_h), 'left': (left, t_left), 'top': (top, t_top),
        'free left': (left / np.maximum(width - w, 1), t_left / np.maximum(width - t_w, 1)),
        'free top': (top / np.maximum(height - h, 1), t_top / np.maximum(height - t_h, 1))}
    for name, (a, b) in pairs.items():
        assert stats.ks_2samp(a, b).pvalue > 1e-3, name


@pytest.mark.parametrize('width, height', [(20000, 20), (20, 20000)])
def test_an_extreme_image_gets_torchvisions_fallback(width, height):
    top, left, h, w = transforms.RandomResizedCrop.get_params(
        Image.new('RGB', (width, height)), AUG.crop_scale, AUG.crop_ratio)
    assert {tuple(b) for b in boxes(50, width, height).tolist()} == {(left, top, left + w, top + h)}


@pytest.mark.parametrize('width, height', [(1, 1), (1, 50), (50, 1), (2, 3), (1, 20000)])
def test_a_tiny_image_gets_a_box_inside(width, height):
    for left, top, right, bottom in boxes(200, width, height):
        assert 0 <= left < right <= width and 0 <= top < bottom <= height


@pytest.mark.parametrize('box', [(10, 20, 150, 140), (0, 0, 200, 160), (3, 5, 20, 19)])
def test_a_crop_is_torchvisions_resized_crop_bit_for_bit(box):
    image = photo(200, 160)
    left, top, right, bottom = box
    want = F.resized_crop(image, top, left, bottom - top, right - left, [32, 32], transforms.InterpolationMode.BILINEAR)
    got = crop(image, box, 32)
    assert got.dtype == np.uint8 and got.shape == (32, 32, 3)
    assert np.array_equal(got, np.asarray(want))


# Random parameters


N = 20_000


@pytest.fixture(scope='module')
def drawn() -> Finish:
    return draw(Augmentation(), 0, 0, np.arange(N), 0)[1]


def test_the_defaults_are_the_published_numbers():
    a = Augmentation()
    assert (a.size, a.crop_scale, a.crop_ratio) == (224, (0.2, 1.0), (3 / 4, 4 / 3))
    assert (a.jitter_p, a.brightness, a.contrast, a.saturation, a.hue) == (0.8, 0.4, 0.4, 0.4, 0.1)
    assert (a.gray_p, a.blur_p, a.blur_sigma, a.flip_p) == (0.2, 0.5, (0.1, 2.0), 0.5)


def test_each_step_happens_as_often_as_published(drawn):
    shares = {'jitter': (drawn.jitter, 0.8), 'gray': (drawn.gray, 0.2), 'blur': (drawn.sigma > 0, 0.5),
              'flip': (drawn.flip, 0.5)}
    for name, (happened, p) in shares.items():
        assert abs(happened.mean() - p) < 4 * math.sqrt(p * (1 - p) / N), name


def test_the_steps_are_independent(drawn):
    steps = np.stack([drawn.jitter, drawn.gray, drawn.sigma > 0, drawn.flip, *drawn.factors.T]).astype(float)
    assert np.abs(np.corrcoef(steps) - np.eye(8)).max() < 5 / math.sqrt(N)


def test_factors_fill_their_ranges_evenly(drawn):
    low, high = [0.6, 0.6, 0.6, -0.1], [1.4, 1.4, 1.4, 0.1]
    for i in range(4):
        f = drawn.factors[:, i]
        assert f.min() >= low[i] and f.max() <= high[i]
        assert stats.kstest(f, 'uniform', (low[i], high[i] - low[i])).pvalue > 1e-3
    sigma = drawn.sigma[drawn.sigma > 0]
    assert sigma.min() >= 0.1 and sigma.max() <= 2.0
    assert stats.kstest(sigma, 'uniform', (0.1, 1.9)).pvalue > 1e-3


def test_factors_below_zero_are_zero_as_in_torchvision():
    _, p = draw(Augmentation(brightness=1.5), 0, 0, np.arange(2000), 0)
    theirs = transforms.ColorJitter(brightness=1.5).brightness
    assert p.factors[:, 0].min() >= theirs[0] == 0
    assert p.factors[:, 0].max() <= theirs[1]
    assert stats.kstest(p.factors[:, 0], 'uniform', (0, 2.5)).pvalue > 1e-3


def test_all_24_orders_occur_equally_often(drawn):
    orders, counts = np.unique(drawn.order, axis=0, return_counts=True)
    assert len(orders) == 24
    assert (np.sort(orders, 1) == np.arange(4)).all()
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_step_of_probability_zero_or_one_never_or_always_happens():
    off = draw(Augmentation(jitter_p=0, gray_p=0, blur_p=0, flip_p=0), 0, 0, np.arange(500), 0)[1]
    assert not (off.jitter.any() or off.gray.any() or off.sigma.any() or off.flip.any())
    on = draw(Augmentation(jitter_p=1, gray_p=1, blur_p=1, flip_p=1), 0, 0, np.arange(500), 0)[1]
    assert on.jitter.all() and on.gray.all() and (on.sigma > 0).all() and on.flip.all()


def test_the_crop_has_numbers_of_its_own():
    u, _ = draw(AUG, 0, 0, np.arange(10), 0)
    assert u.shape == (10, CROP_DRAWS) == (10, 22)
