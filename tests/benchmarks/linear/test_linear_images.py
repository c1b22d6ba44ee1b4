"""The images of the linear protocols, against torchvision's operators and distributions."""
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_linear import ALONE, CPU, Photos, small_protocol
from torchvision import transforms
from torchvision.transforms import functional as TF

from simsiam_models.benchmarks.linear.images import Piece, TrainCrops, draw_lighting, finish
from simsiam_models.data import EvalImages, MemoryImages, Transform, kernel
from simsiam_models.runtime.distributed import World

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('name', ['fair', 'mhead', 'mhead_places205'])
def test_an_image_depends_on_seed_epoch_and_index_alone(name):
    def seen(micro, workers, rank=0, world=1, epoch=1, seed=0, start=0):
        crops = TrainCrops(Photos(), small_protocol(name), micro, workers, seed, World(rank, world, CPU))
        out = {}
        for piece, _ in crops.epoch(epoch, start):
            x = finish(piece, CPU, (0.5,) * 3, (0.25,) * 3)
            out.update({int(i): (piece.step, x[k].numpy().copy()) for k, i in enumerate(piece.rows)})
        return out
    whole = seen(64, 0)
    assert sorted(whole) == list(range(11))  # none is dropped, none comes twice
    assert sorted(step for step, _ in whole.values()) == [0] * 4 + [1] * 4 + [2] * 3
    parts = [seen(1, 2), seen(3, 1), {**seen(2, 0, 0, 2), **seen(2, 0, 1, 2)}]
    for other in parts:
        assert sorted(other) == sorted(whole)
        for i, (step, x) in whole.items():
            assert other[i][0] == step and np.array_equal(other[i][1], x)
    late = seen(64, 0, start=2)
    assert {i: s for i, (s, _) in late.items()} == {i: s for i, (s, _) in whole.items() if s == 2}
    for changed in (seen(64, 0, epoch=2), seen(64, 0, seed=1)):
        assert any(not np.array_equal(changed[i][1], x) for i, (_, x) in whole.items())


def test_more_processes_than_images_of_a_step_leave_one_an_empty_piece():
    crops = TrainCrops(Photos(5), small_protocol('fair'), 2, 0, 0, World(1, 2, CPU))
    pieces = [p for p, _ in crops.epoch(0)]
    assert [len(p.rows) for p in pieces] == [2, 0] and [p.last for p in pieces] == [True, True]


def test_the_kernel_and_pil_cut_the_same(monkeypatch):
    def pixels():
        crops = TrainCrops(Photos(), small_protocol('fair'), 64, 0, 0, ALONE)
        return np.concatenate([p.pixels.numpy() for p, _ in crops.epoch(0)]).astype(int)
    if kernel.load_library() is None:
        pytest.skip('the kernel is not built')
    ours = pixels()
    monkeypatch.setattr(kernel, 'load_library', lambda: None)
    assert np.abs(ours - pixels()).max() <= 1


def test_test_images_are_torchvisions_resize_and_centre_crop():
    images = Photos()
    oracle = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(24)])
    rows = {}
    for rank in (0, 1):
        batches = [part for part in np.split(np.arange(rank, 11, 2), [2, 4]) if len(part)]
        for indices, pixels in EvalImages(images, batches, Transform(32, 24), 1):
            rows.update(zip(indices.tolist(), pixels.numpy(), strict=True))
    assert sorted(rows) == list(range(11))
    for i, x in rows.items():
        assert np.array_equal(x, np.asarray(oracle(Image.fromarray(images.read(i)))))


def test_places_crops_lie_anywhere_in_the_centre_square():
    images = MemoryImages(np.zeros((1, 40, 60, 3), np.uint8), np.array([0]), ['a'], 'one')
    images.images[0, :, :, 0], images.images[0, :, :, 1] = np.arange(60), np.arange(40)[:, None]
    protocol = small_protocol('mhead_places205', image_size=36, resize=40, batch_size=1)
    crops = TrainCrops(images, protocol, 1, 0, 0, ALONE)
    corners = set()
    for epoch in range(300):
        for piece, _ in crops.epoch(epoch):
            x = piece.pixels[0].numpy().astype(int)
            left, top = x[0, 0, :2]
            assert np.array_equal(x[..., 0], np.broadcast_to(left + np.arange(36), (36, 36)))
            corners.add((left - 10, top))  # the centre square begins at column 10
    assert {x for x, _ in corners} == {y for _, y in corners} == {0, 1, 2, 3, 4}


def test_the_finish_is_flip_light_and_normalisation():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    light = rng.normal(0, 0.1, (2, 3)).astype(np.float32)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    piece = Piece(np.arange(2), torch.from_numpy(pixels), flip=np.array([True, False]), light=light)
    x = pixels.astype(np.float64) / 255
    x = np.stack([x[0, :, ::-1], x[1]]) + light[:, None, None]
    x = ((x - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(finish(piece, CPU, mean, std), x, atol=1e-5)


def test_lighting_is_pca_noise_of_the_published_covariance():
    x = draw_lighting(0.1, 0, 0, np.arange(100_000)).astype(np.float64)
    values = np.array([0.2175, 0.0188, 0.0045])
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    expected = vectors @ np.diag((0.1 * values) ** 2) @ vectors.T
    assert np.abs(x.mean(0)).max() < 3e-4
    np.testing.assert_allclose(np.cov(x.T), expected, rtol=0.02, atol=2e-7)
    assert not draw_lighting(0.0, 0, 0, np.arange(10)).any()


def test_colours_are_jittered_always_and_without_hue():
    crops = TrainCrops(Photos(), small_protocol('mhead'), 64, 0, 0, ALONE)
    table = next(crops.epoch(0))[0].table
    assert (table[:, 0] == 1).all() and (table[:, 8] == 0).all() and not table[:, 9].any()
    assert (np.abs(table[:, 5:8] - 1) <= 0.4).all() and np.ptp(table[:, 5:8]) > 0.1


def _ramps(n: int) -> MemoryImages:
    """One picture n times, 240 x 180: red tells the column, green the row."""
    picture = np.full((180, 240, 3), 128, np.uint8)
    picture[..., 0], picture[..., 1] = np.arange(240), np.arange(180)[:, None]
    return MemoryImages(np.broadcast_to(picture, (n, 180, 240, 3)), np.zeros(n, int), ['a'], 'ramps')


@pytest.mark.parametrize('name', ['fair', 'mhead', 'mhead_inat18'])
def test_crops_are_distributed_as_torchvisions(name):
    """Where a crop lies is read off the colours of what was cut."""
    n, columns = 3000, np.arange(4, 20)  # away from the edges, where the filter is cut off
    crops = TrainCrops(_ramps(n), small_protocol(name, batch_size=500), 500, 0, 0, ALONE)
    x = np.concatenate([p.pixels.numpy() for p, _ in crops.epoch(0)]).astype(np.float64)

    def line(values):
        """Length and middle of n runs of 24 pixels."""
        about = columns - columns.mean()
        return 24 * (values[:, columns] * about).sum(1) / (about**2).sum(), values[:, columns].mean(1) + 0.5
    (w, middle), (h, height) = line(x[:, 12, :, 0]), line(x[:, :, 12, 1])
    area = w * h / (240 * 180)
    assert 0.078 < area.min() < 0.085 and area.max() > 0.95
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        picture = Image.fromarray(_ramps(1).read(0))
        boxes = np.array([
            transforms.RandomResizedCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]).T
    top, left, height_, width_ = boxes
    for ours, theirs in (
            (area, height_ * width_ / (240 * 180)), (w / h, width_ / height_), (middle, left + width_ / 2),
            (height, top + height_ / 2)):
        both = np.sort(np.concatenate([ours, theirs]))
        below = [np.searchsorted(np.sort(v), both, 'right') / n for v in (ours, theirs)]
        assert np.abs(below[0] - below[1]).max() < 1.63 * math.sqrt(2 / n)  # Kolmogorov and Smirnov at 1 %


@pytest.mark.parametrize(('name', 'numbers'), [
    ('fair', {}), ('mhead', {'jitter': 0.0, 'lighting': 0.0}), ('mhead_places205', {}), ('mhead_inat18', {})])
def test_half_of_the_images_are_flipped_and_none_with_flip_p_0(name, numbers):
    def share(**more):
        crops = TrainCrops(_ramps(3000), small_protocol(name, batch_size=500, **numbers, **more), 500, 0, 0, ALONE)
        x = torch.cat([finish(p, CPU, (0.0,) * 3, (1.0,) * 3) for p, _ in crops.epoch(0)])
        return float((x[:, 0, 12, 0] > x[:, 0, 12, -1]).float().mean())
    assert abs(share() - 0.5) < 0.03 and share(flip_p=0.0) == 0


def test_multi_head_images_are_torchvisions_colours_then_flip_light_and_normalisation():
    crops = TrainCrops(Photos(), small_protocol('mhead', batch_size=11), 64, 0, 0, ALONE)
    ((piece, _),) = crops.epoch(3)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    light = torch.from_numpy(draw_lighting(0.1, 0, 3, piece.rows))
    operators = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, lambda y, hue: y]
    for k, x in enumerate(finish(piece, CPU, mean, std)):
        y = piece.pixels[k].permute(2, 0, 1).float() / 255
        for op in piece.table[k, 1:5].astype(int):
            y = operators[op](y, float(piece.table[k, 5 + op]))
        y = (y.flip(-1) if piece.flip[k] else y) + light[k][:, None, None]
        torch.testing.assert_close(x, TF.normalize(y, mean, std), rtol=1e-4, atol=1e-4)


def test_a_gray_picture_shows_brightness_and_lighting_alone():
    """Contrast and saturation do nothing to it: it becomes b gray + noise, b uniform in 0.6 .. 1.4."""
    n, gray = 6000, 100 / 255
    images = MemoryImages(np.broadcast_to(np.uint8(100), (n, 8, 8, 3)), np.zeros(n, int), ['a'], 'gray')
    crops = TrainCrops(images, small_protocol('mhead', image_size=2, batch_size=1000), 1000, 0, 0, ALONE)
    x = torch.cat([finish(p, CPU, (0.0,) * 3, (1.0,) * 3) for p, _ in crops.epoch(0)])[:, :, 0, 0].double().numpy()
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    noise = vectors @ np.diag((0.1 * np.array([0.2175, 0.0188, 0.0045])) ** 2) @ vectors.T
    np.testing.assert_allclose(np.cov(x.T), gray**2 * 0.8**2 / 12 + noise, rtol=0.05)
    colours = np.eye(3) - 1 / 3  # what is not gray is noise alone
    np.testing.assert_allclose(np.cov((x @ colours).T), colours @ noise @ colours, rtol=0.1, atol=1e-7)
