"""kernel.c against NumPy, PIL, torch, torchvision and SciPy; and the fallback where it cannot be loaded."""
import hashlib
import itertools
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT
from PIL import Image, ImageEnhance
from scipy import stats
from test_augment import MEAN, OPERATORS, STD, colours, gaussian, parameters, photo, source
from torchvision import transforms
from torchvision.transforms.v2 import functional as F

from simsiam_models.data import Augmentation, FolderImages, TwoViews, kernel
from simsiam_models.data.augment import Finish, crop, crop_box, draw, finish, jitter_and_gray, resize
from simsiam_models.data.philox import philox

needs_kernel = pytest.mark.skipif(kernel.load_library() is None, reason='not built: python3 -m pip install -e .')
SOURCE = kernel.SOURCE.read_text()
pytestmark = [pytest.mark.usefixtures('one_thread'), needs_kernel]


def run(images: list[np.ndarray], size: int, params: Finish | None = None) -> np.ndarray:
    """Resizes each whole image to size: bytes, or finished floats (n, S, S, 3)."""
    n = len(images)
    # The box of area 1 with the ratio of the image is the whole image.
    out = np.empty((n, size, size, 3), np.uint8 if params is None else np.float32)
    for i, image in enumerate(images):
        height, width = image.shape[:2]
        ratio = width / height
        u = np.zeros((1, 22))
        table = None if params is None else params.table()[i:i + 1]
        kernel.cut_views([image], u, np.array([1.0, 1.0, ratio, ratio]), table, out, np.array([i]))
    return out


def crop_boxes(u: np.ndarray, sizes: np.ndarray, rule: np.ndarray) -> np.ndarray:
    """(n, 22) numbers in [0, 1) and (n, 2) widths and heights -> (n, 4) left, top, width, height."""
    out = np.empty((len(u), 4), np.int64)
    u, sizes = np.ascontiguousarray(u, np.float64), np.ascontiguousarray(sizes, np.int64)
    kernel.load_library().crop_boxes(len(u), u.ctypes.data, sizes.ctypes.data, rule.ctypes.data, out.ctypes.data)
    return out


def as_images(x: torch.Tensor) -> list[np.ndarray]:
    return list(x.permute(0, 2, 3, 1).contiguous().numpy())


def levels(out: np.ndarray) -> np.ndarray:
    """Finished floats -> grey levels, 0 .. 255."""
    return (out * np.array(STD) + np.array(MEAN)) * 255


# Numbers and boxes


def test_its_words_are_numpys():
    indices = np.array([0, 1, 7, 2**31, 2**32 + 5, 2**40])
    for seed, epoch, block in itertools.product((0, 3, 2**33 + 1, -1), (0, 799), (0, 256, 1 << 16)):
        got = kernel.philox_words(seed, epoch, indices, block, 8)
        c = np.zeros((len(indices), 8, 4), np.uint64)
        c[..., 0] = np.arange(block, block + 8)
        c[..., 1], c[..., 2], c[..., 3] = indices[:, None] & 0xFFFFFFFF, indices[:, None] >> 32, epoch
        want = philox(c, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)).reshape(len(indices), -1)
        assert np.array_equal(got, want)


SHAPES = [(500, 375), (375, 500), (32, 32), (1, 1), (1, 50), (3, 2), (20000, 20), (20, 20000), (640, 427)]


@pytest.mark.parametrize('width, height', SHAPES)
def test_its_boxes_are_those_of_the_readable_rule(width, height):
    aug = Augmentation()
    u, _ = draw(aug, 0, 0, np.arange(3000), 0)
    left, top, w, h = crop_boxes(u, np.tile([width, height], (3000, 1)), aug.rule()).T
    want = np.array([crop_box(aug, row, width, height) for row in u])
    assert np.array_equal(np.stack([left, top, left + w, top + h], 1), want)


def chi_square(a: np.ndarray, b: np.ndarray, bins: int = 40) -> float:
    """p of the hypothesis that two samples have the same distribution, over bins with equal shares of their union."""
    edges = np.unique(np.quantile(np.concatenate([a, b]), np.linspace(0, 1, bins + 1)))
    edges[-1] += 1e-9
    counts = np.stack([np.histogram(x, edges)[0] for x in (a, b)])
    return stats.chi2_contingency(counts[:, counts.sum(0) > 0]).pvalue


def test_boxes_are_distributed_as_torchvisions_over_100_000_draws():
    n, width, height, aug = 100_000, 500, 375, Augmentation()
    u, _ = draw(aug, 0, 0, np.arange(n), 0)
    left, top, w, h = crop_boxes(u, np.tile([width, height], (n, 1)), aug.rule()).T
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([
        transforms.RandomResizedCrop.get_params(image, aug.crop_scale, aug.crop_ratio) for _ in range(n)])
    t_top, t_left, t_h, t_w = theirs.T
    for name, a, b in (
            ('width', w, t_w), ('height', h, t_h), ('left', left, t_left), ('top', top, t_top),
            ('area', w * h, t_w * t_h), ('ratio', w / h, t_w / t_h)):
        assert chi_square(a, b) > 1e-3, name


def test_factors_orders_and_probabilities_are_distributed_as_torchvisions_over_100_000_draws():
    n, aug = 100_000, Augmentation()
    p = draw(aug, 0, 0, np.arange(n), 1)[1]
    torch.manual_seed(0)
    jitter = transforms.ColorJitter(aug.brightness, aug.contrast, aug.saturation, aug.hue)
    drawn = [
        jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(n)]
    for i in range(4):
        assert chi_square(p.factors[:, i], np.array([d[1 + i] for d in drawn])) > 1e-3, OPERATORS[i][0]
    places = np.stack([[d[0].tolist() for d in drawn], p.order.tolist()]) @ [64, 16, 4, 1]
    both = np.unique(places)
    assert len(both) == 24
    assert stats.chi2_contingency([[np.sum(x == v) for v in both] for x in places]).pvalue > 1e-3
    sigma = p.sigma[p.sigma > 0]
    assert chi_square(sigma, np.random.default_rng(0).uniform(*aug.blur_sigma, len(sigma))) > 1e-3
    for what, happened, share in (
            ('jitter', p.jitter, 0.8), ('gray', p.gray, 0.2), ('blur', p.sigma > 0, 0.5), ('flip', p.flip, 0.5)):
        assert stats.binomtest(int(happened.sum()), n, share).pvalue > 1e-3, what


# The resized crop


@pytest.mark.parametrize('width, height, size', [
    (387, 290, 224), (290, 387, 224), (100, 80, 224), (500, 375, 32), (1, 1, 16), (1, 40, 8), (40, 1, 8), (3, 2, 5),
    (2000, 1500, 224), (1500, 2000, 224), (20000, 20, 32), (224, 224, 224), (31, 33, 1)])
def test_a_crop_is_pils_within_one_level(width, height, size):
    rng = np.random.default_rng(width)
    for image in (rng.integers(0, 256, (height, width, 3), dtype=np.uint8), np.asarray(photo(width, height))):
        got = run([image], size)[0].astype(int)
        want = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)).astype(int)
        off = np.abs(got - want)
        assert (off > 1).mean() < 1e-3 and off.max() <= 2  # both round twice, in different orders
        assert abs((got - want).mean()) < 0.05 or size < 16
    full = np.full((height, width, 3), 255, np.uint8)
    assert (run([full], size)[0] == 255).all()


def test_a_box_takes_no_pixel_from_outside():
    image = np.full((60, 80, 3), 255, np.uint8)
    aug = Augmentation(size=24, crop_scale=(0.2, 0.4))
    u, _ = draw(aug, 0, 0, np.arange(50), 0)
    for row, (left, top, w, h) in zip(
            u, crop_boxes(u, np.tile([80, 60], (50, 1)), aug.rule()), strict=True):
        framed = image.copy()
        framed[top:top + h, left:left + w] = 7
        out = np.empty((1, 24, 24, 3), np.uint8)
        kernel.cut_views([framed], row[None], aug.rule(), None, out, np.array([0]))
        assert (out == 7).all()


# Evaluation


def of_one_axis_at_a_time(image: np.ndarray, width: int, height: int) -> np.ndarray:
    rows = Image.fromarray(image).resize((width, image.shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(rows.resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize('seed', range(10))
def test_a_window_of_the_resized_image_is_pils_bit_for_bit(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    for case in range(40):
        w, h = (int(x) for x in rng.integers(1, 2500 if case < 3 else 400, 2))
        image = rng.integers(0, 256, (h, w, 3), dtype=np.uint8) if case % 4 else np.full((h, w, 3), 255, np.uint8)
        width, height = int(rng.integers(1, 400)), int(rng.integers(1, 400))
        width, height = {5: (w, h), 6: (w, height), 7: (width, h), 8: (1, 1)}.get(case, (width, height))
        left, top = int(rng.integers(width)), int(rng.integers(height))
        out = np.full((int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1)), 3), 9, np.uint8)
        resize(image, width, height, left, top, out)
        window = np.s_[top:top + out.shape[0], left:left + out.shape[1]]
        assert np.array_equal(out, of_one_axis_at_a_time(image, width, height)[window])
        whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))[window]
        assert np.abs(out.astype(int) - whole).max() <= 1  # PIL 13 may start with the columns
        with monkeypatch.context() as without:
            without.setattr(kernel, 'load_library', lambda: None)
            again = np.empty_like(out)
            resize(image, width, height, left, top, again)
        assert np.array_equal(out, again)


def test_resizing_reads_and_writes_nothing_outside():
    image = np.random.default_rng(0).integers(0, 256, (9, 30, 3), dtype=np.uint8)
    for frame in (0, 255):
        around = np.full((11, 30, 3), frame, np.uint8)
        around[1:10] = image
        target = np.full((26, 20, 3), 77, np.uint8)
        kernel.resize(around[1:10], 20, 24, 0, 0, target[1:25])
        assert np.array_equal(target[1:25], of_one_axis_at_a_time(image, 20, 24))
        assert (target[0] == 77).all() and (target[25] == 77).all()


@pytest.mark.parametrize('wrong', [
    dict(image=np.zeros((4, 4), np.uint8)), dict(image=np.zeros((4, 4, 3), np.float32)),
    dict(image=np.zeros((0, 4, 3), np.uint8)), dict(left=-1), dict(left=5), dict(top=5), dict(width=3),
    dict(out=np.zeros((4, 4, 4), np.uint8)), dict(out=np.zeros((4, 4, 3), np.int8)),
    dict(out=np.zeros((4, 8, 3), np.uint8)[:, ::2])])
def test_what_does_not_fit_is_not_resized(wrong):
    black = np.zeros((4, 4, 3), np.uint8)
    good = dict(image=black, width=8, height=8, left=0, top=0, out=black.copy())
    kernel.resize(**good)
    with pytest.raises(ValueError, match='no window'):
        kernel.resize(**{**good, **wrong})


# After the crop


def test_everything_is_what_torch_makes_of_it():
    n = 256
    x = colours(n)
    p = draw(Augmentation(size=32), 3, 1, np.arange(n), 0)[1]
    got = torch.from_numpy(run(as_images(x), 32, p)).permute(0, 3, 1, 2)
    assert (got - finish(x, p)).abs().max() < 2e-5  # of standard deviations: about 1e-3 of a grey level


@pytest.mark.parametrize('name, op, reference, factors, error', OPERATORS, ids=[o[0] for o in OPERATORS])
def test_each_colour_operator_is_torchvisions_on_floats(name, op, reference, factors, error):
    n = len(factors)
    x = colours(n)
    f = np.tile([1.0, 1.0, 1.0, 0.0], (n, 1))
    f[:, op] = factors
    got = levels(run(as_images(x), 32, parameters(n, jitter=np.ones(n, bool), factors=f)))
    for i in range(n):
        want = reference(x[i] / 255, factors[i]).permute(1, 2, 0).numpy() * 255
        assert np.abs(got[i] - want).max() < 3e-3  # grey levels


def share_beyond_one_level(a: np.ndarray, b: np.ndarray) -> float:
    return float((np.abs(np.rint(a).astype(int) - b.astype(int)) > 1).mean())


@pytest.mark.parametrize('op, enhance', [
    (0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)], ids=['b', 'c', 's'])
@pytest.mark.parametrize('factor', [0.6, 0.8, 1.2, 1.4])
def test_colours_are_pils_within_one_level(op, enhance, factor):
    image = np.asarray(photo(64, 64))
    f = np.array([[1.0, 1, 1, 0]])
    f[0, op] = factor
    got = levels(run([image], 64, parameters(1, jitter=np.array([True]), factors=f)))[0]
    assert share_beyond_one_level(got, np.asarray(enhance(Image.fromarray(image)).enhance(factor))) < 1e-3


def test_gray_is_pils_within_one_level():
    image = np.asarray(photo(64, 64))
    got = levels(run([image], 64, parameters(1, gray=np.array([True]))))[0]
    assert share_beyond_one_level(got, np.asarray(Image.fromarray(image).convert('L').convert('RGB'))) < 1e-3


@pytest.mark.parametrize('shift', [-0.1, 0.04, 0.1])
def test_hue_is_as_far_from_pils_as_torchvisions_floats_are(shift):
    """PIL quantises hue and its shift to 256 steps: some pixels are 10 levels off. We use the exact hue."""
    image = np.asarray(photo(64, 64))
    got = levels(run([image], 64, parameters(1, jitter=np.array([True]), factors=np.array([[1, 1, 1, shift]]))))[0]
    pil = np.asarray(transforms.functional.adjust_hue(Image.fromarray(image), shift)).astype(int)
    exact = F.adjust_hue(torch.tensor(image).permute(2, 0, 1) / 255, shift).permute(1, 2, 0).numpy() * 255
    assert np.abs(np.abs(got - pil) - np.abs(exact - pil)).max() < 0.01
    assert np.abs(got - pil).mean() < 2


@pytest.mark.parametrize('sigma', [0.1, 0.3, 0.7, 1.0, 1.5, 2.0])
def test_blur_is_the_gaussian_and_not_pils_cascade_of_boxes(sigma):
    image = np.asarray(photo(64, 64))
    got = levels(run([image], 64, parameters(1, sigma=np.array([sigma]))))[0]
    want = gaussian(image.transpose(2, 0, 1), sigma).transpose(1, 2, 0)
    assert np.abs(got - want).max() < 5e-3  # grey levels
    if sigma >= 0.7:  # PIL's is close on a photograph
        from PIL import ImageFilter
        pil = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))
        assert np.abs(got - pil).mean() < 1.5


def test_a_blur_wider_than_the_image_keeps_its_mean():
    image = np.full((3, 3, 3), 100, np.uint8)
    assert np.abs(levels(run([image], 3, parameters(1, sigma=np.array([2.0])))) - 100).max() < 1e-3


def test_a_flip_mirrors():
    image = np.asarray(photo(37, 37))
    a, b = (run([image], 37, parameters(1, flip=np.array([f])))[0] for f in (False, True))
    assert np.array_equal(a[:, ::-1], b)


def test_torchs_colours_are_captured_without_a_graph_break():
    """So that torch.compile can fuse them on a GPU."""
    captured = torch.compile(jitter_and_gray, fullgraph=True, backend='eager', dynamic=False)
    table = torch.from_numpy(draw(Augmentation(size=8), 0, 0, np.arange(4), 0)[1].table())
    x = colours(4, 8)
    assert torch.equal(captured(x, table), jitter_and_gray(x, table))


# Batches


@pytest.fixture(scope='module')
def files(tmp_path_factory) -> FolderImages:
    folder = tmp_path_factory.mktemp('photos')
    for i in range(48):
        photo(60 + i, 90 - i, i).save(folder / f'{i:02}.{"png" if i % 3 == 0 else "jpg"}')
    return FolderImages(folder)


@pytest.mark.parametrize('on_device', [False, True])
def test_the_same_bits_with_0_1_2_and_5_workers_and_in_2_processes(files, on_device):
    for images in (files, source(48)):
        aug = Augmentation(size=24)
        want = list(TwoViews(images, aug, 16, seed=2, on_device=on_device).epoch(1))
        for workers in (1, 2, 5):
            got = list(TwoViews(images, aug, 16, seed=2, workers=workers, on_device=on_device).epoch(1))
            assert all(torch.equal(a, b) for x, y in zip(want, got, strict=True) for a, b in zip(x, y, strict=True))
        ranks = [list(TwoViews(images, aug, 16, seed=2, rank=r, world=2, workers=2, on_device=on_device).epoch(1))
                 for r in (0, 1)]
        for x, a, b in zip(want, *ranks, strict=True):
            assert all(torch.equal(whole, torch.cat(parts)) for whole, *parts in zip(x, a, b, strict=True))


def test_what_a_gpu_would_finish_is_what_the_kernel_finishes(files):
    aug = Augmentation(size=24)
    for a, b in zip(TwoViews(files, aug, 16).epoch(0), TwoViews(files, aug, 16, on_device=True).epoch(0), strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.is_contiguous(memory_format=torch.channels_last)
            assert (x - y).abs().max() < 2e-5


def test_a_batch_that_is_held_is_not_written_to(files):
    views = TwoViews(files, Augmentation(size=24), 8, workers=2)
    held = [(x1, x2.clone(), x1.clone()) for e in range(3) for x1, x2 in views.epoch(e)]
    again = [x for e in range(3) for x in TwoViews(files, Augmentation(size=24), 8).epoch(e)]
    for (x1, x2, copy), (y1, y2) in zip(held, again, strict=True):
        assert torch.equal(x1, copy) and torch.equal(x1, y1) and torch.equal(x2, y2)


def test_the_memory_of_released_batches_is_reused(files):
    views = TwoViews(files, Augmentation(size=24), 8, workers=2)
    seen = {x1.data_ptr() for e in range(4) for x1, _ in views.epoch(e)}
    assert len(seen) <= 7  # of 24 batches: one in use, those ahead, and those that threads hold
    kept = [x1 for x1, _ in views.epoch(4)]
    assert len({x.data_ptr() for x in kept}) == len(kept)


def test_autograd_holds_a_batch_too():
    views = TwoViews(source(32), Augmentation(size=16), 8)
    w = torch.ones(3, requires_grad=True)
    pending = []
    for x1, _ in views.epoch(0):
        pending.append(((x1 * w.view(1, 3, 1, 1)).square().sum(), x1.clone()))
        del x1
    for loss, x in pending:
        w.grad = None
        loss.backward()
        assert torch.allclose(w.grad, 2 * x.square().sum((0, 2, 3)), rtol=1e-4)


def test_an_epoch_that_is_left_early_leaves_no_work_behind(files):
    views = TwoViews(files, Augmentation(size=24), 8, workers=2)
    first = next(iter(views.epoch(0)))
    again = next(iter(views.epoch(0)))
    assert torch.equal(first[0], again[0])


def test_an_error_in_a_thread_reaches_the_caller():
    class Broken:
        name, labels, classes = 'broken', None, []

        def __len__(self) -> int:
            return 16

        def read(self, index: int) -> np.ndarray:
            raise KeyError('of the source')

    with pytest.raises(KeyError, match='of the source'):
        list(TwoViews(Broken(), Augmentation(size=8), 8, workers=2).epoch(0))


@pytest.mark.parametrize('sigma', [-5.0, 1e9, np.inf, np.nan])
def test_no_blur_reaches_the_kernel_that_would_leave_its_memory(sigma):
    table = np.zeros((1, 12), np.float32)
    good = dict(images=[np.zeros((4, 4, 3), np.uint8)], u=np.zeros((1, 22)), rule=Augmentation().rule(),
                out=np.zeros((1, 8, 8, 3), np.float32), rows=np.array([0]))
    kernel.cut_views(**good, table=table)
    table[0, 10] = sigma
    with pytest.raises(ValueError, match='the kernel needs'):
        kernel.cut_views(**good, table=table)


@pytest.mark.parametrize('wrong', [
    dict(images=[np.zeros((4, 4), np.uint8)]), dict(images=[np.zeros((4, 4, 3), np.float32)]),
    dict(images=[np.zeros((0, 4, 3), np.uint8)]),
    dict(u=np.zeros((1, 21))), dict(u=np.zeros((1, 22), np.float32)), dict(rows=np.array([1])),
    dict(rows=np.array([-1])), dict(rows=np.array([0, 0])), dict(out=np.zeros((1, 8, 9, 3), np.uint8)),
    dict(out=np.zeros((1, 8, 8, 3), np.float32)), dict(out=np.zeros((1, 0, 0, 3), np.uint8)),
    dict(out=np.zeros((2, 8, 8, 3), np.uint8)[::2][:, ::-1])])
def test_wrong_shapes_do_not_reach_the_kernel(wrong):
    good = dict(images=[np.zeros((4, 4, 3), np.uint8)], u=np.zeros((1, 22)), rule=Augmentation().rule(), table=None,
                out=np.zeros((1, 8, 8, 3), np.uint8), rows=np.array([0]))
    kernel.cut_views(**good)
    with pytest.raises(ValueError, match='the kernel needs'):
        kernel.cut_views(**{**good, **wrong})


# Loading


CHILD = """
import sys, logging, hashlib, numpy as np
logging.basicConfig(format='%(message)s')
from simsiam_models.data import Augmentation, EvalImages, MemoryImages, Transform, TwoViews, kernel
images = MemoryImages(np.random.default_rng(0).integers(0, 256, (16, 40, 36, 3), dtype=np.uint8), None, [], 'noise')
x1, x2 = next(iter(TwoViews(images, Augmentation(size=32), 16).epoch(0)))
seen = next(iter(EvalImages(images, [np.arange(16)], Transform(30, 24))))[1].numpy().tobytes()
print(kernel.load_library() is not None, hashlib.sha256(x1.numpy().tobytes() + seen).hexdigest(), float(x1.mean()))
"""


def in_a_process(**env: str) -> tuple[list[str], str]:
    done = subprocess.run(
        [warm.python(), '-c', CHILD], capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **env})
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


def test_without_it_the_numbers_are_near(tmp_path):
    with_it, said = in_a_process()
    assert with_it[0] == 'True' and said == ''
    without, said = in_a_process(SIMSIAM_KERNEL='0')
    assert without[0] == 'False' and said == ''
    assert float(without[2]) == pytest.approx(float(with_it[2]), abs=0.02)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder where the kernel is looked for, as if the package were installed there."""
    monkeypatch.setattr(kernel, 'SOURCE', tmp_path / 'kernel.c')
    kernel._load_once.cache_clear()
    yield tmp_path
    kernel._load_once.cache_clear()


def builds() -> dict[str, Path]:
    """The builds for this processor by name, best first."""
    names = kernel.BUILDS.get(torch.backends.cpu.get_cpu_capability(), ('plain',))
    found = {name: [*kernel.SOURCE.parent.glob(f'_kernel_{name}.*')] for name in names}
    return {name: paths[0] for name, paths in found.items() if paths}


BUILT = builds()


def refused(caplog: pytest.LogCaptureFixture) -> str:
    """The one line that says why there is no kernel."""
    with caplog.at_level(logging.WARNING):
        assert kernel.load_library() is None and kernel.load_library() is None
    record, = caplog.records
    assert record.message.endswith('continuing without it, slower') and '\n' not in record.message
    return record.message


def test_an_installation_without_a_build_says_so_in_one_line(elsewhere, caplog):
    assert 'install a C compiler, then reinstall simsiam-models' in refused(caplog)


def test_a_clone_that_is_not_installed_says_so_in_one_line(elsewhere, caplog):
    (elsewhere / 'kernel.c').write_text('')
    assert 'python3 -m pip install -e .' in refused(caplog)


def test_a_build_of_another_source_is_not_used(elsewhere, caplog):
    built = next(iter(BUILT.values()))
    (elsewhere / built.name).write_bytes(built.read_bytes())
    assert kernel.load_library() is not None  # without its source beside it, as in a wheel
    kernel._load_once.cache_clear()
    (elsewhere / 'kernel.c').write_text(SOURCE.replace('0xD2511F53', '0xD2511F55'))
    assert f'{built.name} was built from a different kernel.c' in refused(caplog)


@pytest.mark.skipif(len(BUILT) < 2, reason='this processor runs only one build')
def test_a_stale_build_does_not_hide_a_fresh_one(elsewhere):
    best, other = list(BUILT.values())[:2]
    (elsewhere / 'kernel.c').write_text(SOURCE)
    digest = hashlib.sha256(SOURCE.encode()).hexdigest().encode()
    (elsewhere / best.name).write_bytes(best.read_bytes().replace(digest, digest[::-1]))
    (elsewhere / other.name).write_bytes(other.read_bytes())
    assert kernel.load_library()._name == str(elsewhere / other.name)


@pytest.mark.parametrize('data', [b'', b'garbage' * 999, b'\x7fELF'], ids=['empty', 'garbage', 'cut'])
def test_a_file_that_is_no_library_is_named_in_one_line(elsewhere, caplog, data):
    built = next(iter(BUILT.values()))
    (elsewhere / built.name).write_bytes(data)
    assert built.name in refused(caplog)


def test_the_best_build_for_the_processor_is_loaded(monkeypatch):
    kernel._load_once.cache_clear()
    assert kernel.load_library()._name == str(next(iter(BUILT.values())))
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'SVE256')
    kernel._load_once.cache_clear()
    assert kernel.load_library()._name == str(BUILT['plain'])
    kernel._load_once.cache_clear()


@pytest.mark.parametrize('size', [24, 31, 224])
def test_all_builds_give_the_same_bits(monkeypatch, size):
    assert len(BUILT) > 1 or torch.backends.cpu.get_cpu_capability() not in kernel.BUILDS
    aug, rng, seen = Augmentation(size=size), np.random.default_rng(0), []
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SHAPES for _ in range(4)]
    u, params = draw(aug, 0, 0, np.arange(len(images)), 0)
    for path in BUILT.values():
        library = kernel.load_build(path)
        monkeypatch.setattr(kernel, 'load_library', lambda library=library: library)
        views = np.zeros((len(images), size, size, 3), np.float32)
        kernel.cut_views(images, u, aug.rule(), params.table(), views, np.arange(len(images)))
        window = np.zeros((20, 20, 3), np.uint8)
        kernel.resize(images[0], 60, 45, 3, 2, window)
        seen.append([views, window, kernel.philox_words(3, 1, np.arange(9), 0, 8)])
    assert np.ptp(seen[0][0]) > 1
    for other in seen[1:]:
        assert all(map(np.array_equal, seen[0], other))


def test_its_crop_and_pils_are_one_rule(files):
    """Compares the kernel's box and resize with `crop_box` and `crop`, on real files."""
    aug = Augmentation(size=24)
    u, _ = draw(aug, 0, 0, np.arange(len(files)), 0)
    off = []
    for i in range(len(files)):
        image = files.read(i)
        out = np.empty((1, 24, 24, 3), np.uint8)
        kernel.cut_views([image], u[i:i + 1], aug.rule(), None, out, np.array([0]))
        want = crop(Image.fromarray(image), crop_box(aug, u[i], image.shape[1], image.shape[0]), 24)
        off.append(np.abs(out[0].astype(int) - want).max())
    assert max(off) <= 1
