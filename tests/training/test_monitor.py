"""The monitors: output std and rank, and kNN against a loop and without unreadable images."""
import dataclasses
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from simsiam_models import SimSiam, create_simsiam, simsiam_loss
from simsiam_models.data import DataError, FolderImages, demo_images
from simsiam_models.data.philox import permutation
from simsiam_models.runtime.distributed import World
from simsiam_models.training import monitor as monitoring
from simsiam_models.training.monitor import (
    KnnMonitor,
    Moment,
    Reading,
    allowed_size,
    constant_channels,
    effective_rank,
    explain_no_monitor,
    has_classes,
    is_collapsed,
    knn_accuracy,
    measure_pixel_std,
    output_std,
)
from simsiam_models.training.options import resolve_recipe
from simsiam_models.training.pretrain import build_parser
from simsiam_models.training.recipes import RECIPES
from simsiam_models.training.setup import prepare
from simsiam_models.training.summary import describe_gain


def test_std_is_one_for_isotropic_and_zero_for_constant_outputs():
    z = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert output_std(z) == pytest.approx(1, abs=0.02)
    assert output_std(torch.ones(64, 32)) == pytest.approx(0, abs=1e-6)


def test_effective_rank_counts_directions():
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(256, 256, generator=g)).Q
    assert effective_rank(torch.cat([q[:, :8], -q[:, :8]], 1).T.repeat(4, 1)) == pytest.approx(8, rel=1e-3)
    assert effective_rank(torch.randn(100, 1, generator=g) * torch.ones(1, 50)) == pytest.approx(1, abs=0.01)


def test_not_a_number_counts_as_collapsed():
    assert is_collapsed(float('nan'), 5.0) and is_collapsed(1.0, float('nan'))


def test_the_rank_of_a_few_samples_is_no_collapse_but_their_std_is():
    assert is_collapsed(1.0, 1.0, 64) and not is_collapsed(1.0, 1.0, 2)
    assert is_collapsed(0.1, 1.0, 2)


@pytest.fixture
def small_model() -> SimSiam:
    return create_simsiam('resnet10t', dim=8, pred_dim=4, proj_layers=2)


def test_a_reading_holds_the_values_of_the_step_it_was_started_at(small_model: SimSiam):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, 8, 8, generator=g)
    z, p = (torch.randn(16, 8, generator=g).to(torch.bfloat16) for _ in range(2))
    loss = torch.tensor(-0.25)
    cosine = F.cosine_similarity(p.double(), z.double()).mean()
    with torch.no_grad():
        small_model.projector[1].running_var[:3] = 1e-6
    channels = sum(m.num_features for m in small_model.modules() if isinstance(m, _BatchNorm))
    expected = {
        'loss': -0.25, 'std': float(output_std(z)), 'rank': effective_rank(z), 'p_std': float(output_std(p)),
        'p_rank': effective_rank(p), 'cosine': pytest.approx(float(cosine), abs=1e-6),
        'pixels': float(measure_pixel_std(x)), 'constant_channels': pytest.approx(3 / channels), 'samples': 16}
    reading = Reading(loss, x, p, z, small_model)
    for t in (x, z, p, loss, small_model.projector[1].running_var):
        t.zero_()
    assert reading.read() == expected


def test_a_reading_of_outputs_that_are_no_numbers_is_no_number(small_model: SimSiam):
    z = torch.full((4, 3), float('nan'))
    figures = Reading(torch.tensor(float('nan')), torch.zeros(4, 3, 8, 8), z, z, small_model).read()
    assert all(np.isnan(figures[k]) for k in ('loss', 'std', 'rank', 'p_std', 'p_rank', 'cosine'))


class Questions(TorchDispatchMode):
    """Collects the operations that would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ('_local_scalar_dense', 'is_nonzero', 'nonzero', 'equal', '_linalg_eigh'):
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


def test_starting_a_reading_asks_the_device_for_no_value(small_model: SimSiam):
    z = torch.randn(16, 8)
    with Questions() as questions:
        reading = Reading(z.mean(), torch.randn(16, 3, 8, 8), z, z, small_model)
    assert questions.asked == []
    with Questions() as questions:
        reading.read()
    assert questions.asked  # so they are seen where they are


def test_a_model_without_batch_norm_has_no_constant_channels():
    assert constant_channels(nn.Linear(2, 2)) == 0


def test_pictures_of_one_colour_each_do_not_differ_in_pixels():
    colours = torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    assert float(measure_pixel_std(colours.expand(8, 3, 16, 16))) == pytest.approx(0, abs=1e-6)
    for size in (32, 224):
        noise = torch.randn(64, 3, size, size, generator=torch.Generator().manual_seed(0))
        assert float(measure_pixel_std(noise)) == pytest.approx(1, abs=0.02)


def test_moments_are_seconds_apart():
    first = Moment(torch.device('cpu'))
    time.sleep(0.02)
    second = Moment(torch.device('cpu'))
    second.wait()
    assert 0.02 <= second.since(first) < 1


def test_knn_equals_a_float64_loop():
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(60, 7, generator=g), torch.randn(33, 7, generator=g)
    y, labels = torch.randint(0, 5, (60,), generator=g), torch.randint(0, 5, (33,), generator=g)
    right = 0
    for q, label in zip(queries.double(), labels, strict=True):
        s = [float(q @ b / q.norm() / b.norm()) for b in bank.double()]
        votes = np.zeros(5)
        for i in sorted(range(60), key=lambda i: -s[i])[:9]:
            votes[int(y[i])] += np.exp(s[i] / 0.07)
        right += int(votes.argmax() == int(label))
    assert knn_accuracy(bank, y, queries, labels, 9, 0.07, chunk=8) == pytest.approx(100 * right / 33)


def test_knn_takes_fewer_neighbours_than_asked_where_there_are_fewer():
    x, y = torch.eye(3), torch.arange(3)
    assert knn_accuracy(x, y, x, y, 200, 0.07) == 100


def pixel_monitor(train: Path, val: Path | None, **more) -> KnnMonitor:
    recipe = dataclasses.replace(RECIPES['demo'], knn_k=5)
    val = None if val is None else FolderImages(val)
    return KnnMonitor(FolderImages(train), val, recipe, World(0, 1, torch.device('cpu')), **more)


@pytest.fixture
def parts(few_digits, tmp_path) -> tuple[Path, Path]:
    """Training and validation folders of the same ten classes: 40 and 24 digits."""
    for i, path in enumerate(sorted(few_digits.rglob('*.*'), key=lambda p: p.name)):
        target = tmp_path / ('train' if i < 40 else 'val') / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return tmp_path / 'train', tmp_path / 'val'


def test_one_class_or_no_labels_give_no_monitor(tmp_path, few_digits):
    shutil.copytree(few_digits / '3', tmp_path / 'one' / '3')
    for folder, why in ((tmp_path / 'one', 'only one class'), (tmp_path / 'one' / '3', 'no labels')):
        assert not has_classes(FolderImages(folder)) and why in explain_no_monitor(FolderImages(folder))
    shutil.copytree(few_digits / '4', tmp_path / 'one' / '4')
    assert has_classes(FolderImages(tmp_path / 'one'))
    for folder, said in ((few_digits / '3', 'has no labels'), (tmp_path / 'single', 'has only one class')):
        if not folder.exists():
            shutil.copytree(few_digits / '3', folder / '3')
        args = build_parser().parse_args([str(few_digits), '--recipe', 'demo', '--knn-data', str(folder)])
        with pytest.raises(ValueError, match=f'--knn-data .* {said}'):
            prepare(args, resolve_recipe(args)[1], World(0, 1, torch.device('cpu')))
    args = build_parser().parse_args([str(few_digits / '3'), '--recipe', 'demo', '--batch-size', '2'])
    assert prepare(args, resolve_recipe(args)[1], World(0, 1, torch.device('cpu')))[1] is None
    args = build_parser().parse_args([str(tmp_path / 'single'), '--recipe', 'demo', '--batch-size', '2'])
    assert prepare(args, resolve_recipe(args)[1], World(0, 1, torch.device('cpu')))[1] is None


@pytest.mark.parametrize('spoiled', ['val', 'train'])
def test_unreadable_images_are_left_out_of_the_monitor_and_named(parts, tmp_path, spoiled):
    """The accuracy is that of the same folders without these files."""
    train, val = parts
    bad = sorted((train if spoiled == 'train' else val).rglob('*.png'))[:2]
    for path in bad:
        path.write_bytes(b'no image')
    monitor = pixel_monitor(train, val)
    accuracy = monitor.measure(nn.Flatten())
    words = f'(k=5, T=0.1; {40 - 2 * (spoiled == "train")} bank images, {24 - 2 * (spoiled == "val")} queries)'
    assert words in monitor.describe() and '2 unreadable images left out' in monitor.describe()
    assert any(str(path) in monitor.describe() for path in bad)
    for path in bad:
        path.unlink()
    assert pixel_monitor(train, val).measure(nn.Flatten()) == pytest.approx(accuracy, abs=1e-9)


def test_the_share_of_a_folder_without_validation_images_is_that_of_the_folder(parts):
    """One of its eight queries is more than a tenth of them, and not of the folder."""
    train, _ = parts
    files = [FolderImages(train).path(int(i)) for i in permutation(0, 0, 40)]
    files[0].write_bytes(b'no image')
    monitor = pixel_monitor(train, None)
    monitor.measure(nn.Flatten())
    assert '32 bank images, 7 queries' in monitor.describe() and str(files[0]) in monitor.describe()
    for path in files[8:13]:
        path.write_bytes(b'no image')
    with pytest.raises(DataError, match='6 of 40 images'):
        pixel_monitor(train, None).measure(nn.Flatten())


def test_a_monitor_of_mostly_unreadable_images_is_refused(parts):
    train, val = parts
    files = sorted(val.rglob('*.*'))
    for path in files[:10]:
        path.write_bytes(b'no image')
    with pytest.raises(DataError, match=r'10 of 24 images for the kNN monitor cannot be read .*--max-unreadable 0.1'):
        pixel_monitor(train, val).measure(nn.Flatten())
    monitor = pixel_monitor(train, val, max_unreadable=0.5)
    monitor.measure(nn.Flatten())
    assert '14 queries' in monitor.describe()
    for path in files:
        path.write_bytes(b'no image')
    with pytest.raises(DataError, match='24 of 24 images'):
        pixel_monitor(train, val, max_unreadable=1.0).measure(nn.Flatten())


class Timed(nn.Module):
    """A backbone that takes 10 ms of an artificial clock for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seconds += 0.01 * len(x)
        return x.flatten(1)


@pytest.mark.parametrize('most, processes, expected', [(60_000, 1, 300), (200, 1, 200), (60_000, 4, 1200)])
def test_the_first_measurement_reads_what_its_seconds_allow(few_digits, monkeypatch, most, processes, expected):
    backbone = Timed()
    monkeypatch.setattr(monitoring.time, 'perf_counter', lambda: backbone.seconds)
    images = FolderImages(few_digits)
    monitor = KnnMonitor(images, None, RECIPES['demo'], World(0, processes, torch.device('cpu')), most=most)
    assert monitor._choose_size(backbone) == pytest.approx(expected, abs=1)
    assert backbone.seconds <= monitoring.SECONDS / 2


def test_the_chosen_size_is_kept_and_stated(few_digits):
    recipe, world = RECIPES['demo'], World(0, 1, torch.device('cpu'))
    monitor = KnnMonitor(FolderImages(few_digits), None, recipe, world, most=50)
    figures = monitor.measure_before(nn.Flatten(), pixels=True)
    assert set(figures) == {'random', 'pixels'} and monitor.size == sum(monitor.sizes) == 50
    again = KnnMonitor(FolderImages(few_digits), None, recipe, world, size=monitor.size)
    assert again.measure_before(nn.Flatten(), pixels=False) == {'random': figures['random']}
    assert again.sizes == monitor.sizes


@pytest.mark.parametrize(
    'size, sizes', [(10, [8, 2]), (20, [16, 4]), (50, [40, 10]), (60, [40, 20]), (10**9, [40, 24])])
def test_a_fifth_of_the_images_are_queries_as_far_as_there_are_enough(parts, size, sizes):
    assert pixel_monitor(*parts, size=size).sizes == sizes


def test_few_queries_leave_the_rest_to_the_bank(parts):
    train, val = parts
    for path in sorted(val.rglob('*.*'))[3:]:
        path.unlink()
    assert pixel_monitor(train, val, size=40).sizes == [37, 3]


def test_the_monitor_costs_at_most_its_share_of_the_run():
    small, large = (
        dataclasses.replace(RECIPES[name], epochs=20, knn_every=5) for name in ('demo', 'in1k_bs256_ep100'))
    assert allowed_size(large, 1_000_000) == 0.05 * 1_000_000 / 5  # measured 5 times
    assert allowed_size(small, 1_000_000) == 0.05 * 1_000_000 / (1 + 4 / 4)  # the pixels are kept
    assert allowed_size(large, 50_000) == 0.05 * 50_000 / (1 + 4 / 4)
    assert allowed_size(large, 100_000) == monitoring.KEPT // (3 * 224**2)
    assert allowed_size(small, 1000) == monitoring.LEAST and allowed_size(small, 10**9) == monitoring.MOST
    for every, measurements in ((0, 2), (1, 21), (3, 8), (100, 2)):
        recipe = dataclasses.replace(large, knn_every=every)
        assert allowed_size(recipe, 10**6) == int(0.05 * 10**6 / measurements)


@pytest.mark.parametrize('more, reads', [(0, 64), (-1, 128)])
def test_few_pixels_are_read_once_and_many_each_time(parts, monkeypatch, more, reads):
    monkeypatch.setattr(monitoring, 'KEPT', 64 * 32 * 32 * 3 + more)
    monitor, seen, real = pixel_monitor(*parts), [], FolderImages.read
    monkeypatch.setattr(FolderImages, 'read', lambda images, row: seen.append(row) or real(images, row))
    assert monitor.measure(nn.Flatten()) == monitor.measure(nn.Flatten())
    assert len(seen) == reads


def test_without_a_monitor_a_run_says_why(few_digits):
    args = build_parser().parse_args([
        str(few_digits), '--recipe', 'demo', '--batch-size', '2', '--knn-every', '-1'])
    assert prepare(args, resolve_recipe(args)[1], World(0, 1, torch.device('cpu')))[1] is None


def train_on_digits(stop_gradient: bool, steps: int = 100) -> list[tuple[float, float]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
    images = F.interpolate(images, size=32, mode='bilinear')
    model = create_simsiam(
        'resnet18', dim=128, pred_dim=32, proj_layers=2, layers=(1, 1, 1, 1), channels=(16, 32, 64, 64),
        stem_type='deep', stem_width=8)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=5e-4)
    seen = []
    for _ in range(steps):
        x = images[torch.randint(len(images), (64,))]
        x1, x2 = (
            torch.roll(x, tuple(torch.randint(-4, 5, (2,)).tolist()), (2, 3)) * (0.5 + torch.rand(64, 1, 1, 1))
            + 0.1 * torch.randn_like(x) for _ in range(2))
        z1, z2 = model.encode(x1), model.encode(x2)
        p1, p2 = model.predictor(z1), model.predictor(z2)
        if stop_gradient:
            loss = simsiam_loss(p1, p2, z1, z2)
        else:
            loss = -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append((float(output_std(z1)), effective_rank(z1)))
    return seen


def test_a_run_without_stop_gradient_is_called_collapsed_within_100_steps():
    assert any(is_collapsed(*f) for f in train_on_digits(stop_gradient=False))


def test_a_healthy_run_is_never_called_collapsed():
    assert not any(is_collapsed(*f) for f in train_on_digits(stop_gradient=True))


def test_the_demonstration_data_is_the_same_in_every_run_and_its_splits_differ():
    (train, val), (again, _) = demo_images(), demo_images()
    assert (len(train), len(val), len(train.classes)) == (3000, 768, 12)
    assert np.array_equal(train.images, again.images)
    seen = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in seen for image in val.images)


@pytest.mark.parametrize('trained, before, queries, difference, error, meaning', [
    (98.4, 41.5, 768, '56.9 points over', 1.8, ', learned without labels.'),
    (29.2, 25.0, 24, '4.2 points over', 12.8, ', no significant difference.'),
    (25.0, 29.2, 24, '4.2 points below', 12.8, ', no significant difference.'),
    (29.2, 25.0, 24_000, '4.2 points over', 0.4, ', learned without labels.'),
    (56.3, 94.7, 300, '38.4 points below', 3.1, '; these features are of no use yet.')])
def test_a_gain_is_one_only_beyond_what_chance_gives(trained, before, queries, difference, error, meaning):
    said = describe_gain(trained, before, queries)
    assert said == f'{difference} the better of them (standard error {error} with {queries} queries){meaning}'
