"""The augmentation: counted random numbers, operators against torchvision and SciPy, batches that are pure functions.

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

from simsiam_models.data import Augmentation, EvalImages, MemoryImages, TwoViews, kernel
from simsiam_models.data.augment import CROP_DRAWS, Finish, blur, crop, crop_box, draw, finish, normalize, shift_hue
from simsiam_models.data.philox import permutation, philox, uniforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUG = Augmentation(size=32)


pytestmark = pytest.mark.usefixtures('one_thread')


def colours(batch: int, size: int = 32, seed: int = 0) -> Tensor:
    """(B, 3, S, S) uint8: noise, with patches of pure gray, black and white, where hue is undefined."""
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
    """Nothing happens, but for what is given."""
    nothing = dict(
        jitter=np.zeros(batch, bool), order=np.tile(np.arange(4), (batch, 1)),
        factors=np.tile([1.0, 1, 1, 0], (batch, 1)), gray=np.zeros(batch, bool),
        sigma=np.zeros(batch), flip=np.zeros(batch, bool))
    return Finish(**{**nothing, **kwargs})


def denormalize(x: Tensor) -> Tensor:
    return x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def gaussian(x: np.ndarray, sigma: float) -> np.ndarray:
    """(3, S, S) -> float64 reference; the kernel is cut at 4 sigma, rounded up to whole pixels."""
    radius = math.ceil(4 * sigma)
    return ndimage.gaussian_filter(x.astype(np.float64), (0, sigma, sigma), mode='nearest', radius=(0, radius, radius))


def source(n: int = 24, width: int = 40, height: int = 36) -> MemoryImages:
    r = np.random.default_rng(7)
    return MemoryImages(r.integers(0, 256, (n, height, width, 3), dtype=np.uint8), None, [], 'noise')


# Counted numbers


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
    # The three other operators are neutral, and cost a rounding each.
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
        assert np.abs(got[i] - gaussian(x[i].numpy(), sigma[i])).max() < 2e-4  # the tail behind 4 sigma is 6e-5


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
    assert torch.equal(x, before)  # the crops are not written to
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


# What is drawn


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


# Batches


@pytest.mark.parametrize('with_kernel', [True, False])
def test_views_are_what_the_parts_give(monkeypatch, with_kernel):
    if not with_kernel:
        monkeypatch.setattr(kernel, 'library', lambda: None)
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
            if with_kernel:  # its crops are PIL's within a level, see test_kernel.py
                kernel.views([data.read(i) for i in indices], u, AUG.rule(), None, crops, np.arange(8))
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


# Evaluation


class Photos:
    """Images of different sizes."""

    name, labels, classes = 'photos', None, []

    def __init__(self, images: list[Image.Image]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        return np.asarray(self.images[index])


@pytest.mark.parametrize('width, height', [(427, 333), (333, 427), (301, 301), (640, 257), (256, 256), (300, 256)])
def test_evaluation_is_torchvisions_resize_and_centre_crop(width, height):
    image = photo(width, height)
    theirs = transforms.Compose([
        transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    got, = EvalImages(Photos([image]), np.array([0]), size=224, resize=256)
    assert got.shape == (1, 3, 224, 224) and got.dtype == torch.float32
    assert (got[0] - theirs(image)).abs().max() < 1e-6


def test_evaluation_keeps_the_order_and_the_last_batch():
    images = Photos([photo(40 + i, 50 - i, i) for i in range(5)])
    indices = np.array([4, 0, 3, 1, 2])
    batches = list(EvalImages(images, indices, size=32, resize=36, batch=2))
    assert [len(b) for b in batches] == [2, 2, 1]
    for x, i in zip(torch.cat(batches), indices, strict=True):
        one, = EvalImages(images, np.array([i]), size=32, resize=36)
        assert torch.equal(one[0], x)
