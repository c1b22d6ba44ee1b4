"""Linear evaluation: the protocols' numbers, and what is computed from them."""
import argparse
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import ROOT, write_digits
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.transforms import functional as TF

from simsiam_models.benchmarks.backbone import load_backbone, pooled, taps
from simsiam_models.benchmarks.datasets.classification import open_pair
from simsiam_models.benchmarks.datasets.sizes import SIZES
from simsiam_models.benchmarks.features import CPU_BATCH
from simsiam_models.benchmarks.linear import command as linear
from simsiam_models.benchmarks.linear import training as linear_training
from simsiam_models.benchmarks.linear.command import NUMBERS, PROTOCOLS, benchmark_name, choose
from simsiam_models.benchmarks.linear.heads import Heads, MmselfsupLars, lr_at, make_optimizer, right_within
from simsiam_models.benchmarks.linear.images import CentreCrops, Piece, TrainCrops, lighting, to_device
from simsiam_models.benchmarks.linear.training import LinearRun, check_batches
from simsiam_models.benchmarks.results.compare import why_not_comparable
from simsiam_models.data import MemoryImages, kernel
from simsiam_models.runtime.distributed import World

pytestmark = pytest.mark.usefixtures('one_thread')
CPU = torch.device('cpu')
ALONE = World(0, 1, CPU)
MODEL = 'resnet10t:random'
SMALL = ['--image-size', '32', '--resize', '32', '--batch-size', '48', '--device', 'cpu']
# Protocols of sections 2.1, 2.3, 2.4 and 3, shrunken to 100 images.
SHRUNKEN = {
    'fair': ['--epochs', '3', '--lr', '60'], 'mmselfsup': ['--epochs', '3', '--eval-every', '2'],
    'moco': ['--epochs', '3', '--lr-steps', '1', '2'],
    'mhead': ['--epochs', '3', '--lr-steps', '2', '--report-epochs', '2', '--eval-every', '3']}


@pytest.fixture(scope='session')
def split_digits(tmp_path_factory) -> Path:
    """100 digits to learn from, so batches of 48, 48 and 4, and 60 to test on."""
    root = tmp_path_factory.mktemp('split_digits')
    write_digits(root / 'train', 160)
    for path in sorted((root / 'train').rglob('*.*')):
        if int(path.stem) >= 100:
            target = root / 'val' / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
    return root


def _args(data: Path, output: Path, protocol: str, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    linear.add_arguments(parser)
    return parser.parse_args([
        str(data), '--protocol', protocol, '--model', MODEL, '--output', str(output), *SMALL,
        *SHRUNKEN.get(protocol, []), *more])


def _record(output: Path) -> dict:
    (path,) = output.glob('*.json')
    return json.loads(path.read_text())


def _same_numbers(a: dict, b: dict) -> bool:
    return a['metrics'] == b['metrics'] and a['extra'] == b['extra'] and a['protocol'] == b['protocol']


# The numbers.

def test_the_numbers_are_those_of_the_sources():
    common = {'momentum': 0.9, 'image_size': 224, 'resize': 256, 'init_std': 0.01, 'flip_p': 0.5}
    large = {**common, 'batch_size': 4096, 'scaled_lr': 1.6, 'epochs': 90, 'schedule': 'cosine', 'weight_decay': 0,
             'trust': 0.001, 'crop_scale': (0.08, 1.0), 'inputs': 'avgpool', 'augmentation': 'resized_crop'}
    five = {**common, 'batch_size': 256, 'scaled_lr': 0.01, 'nesterov': True, 'weight_decay': 1e-4, 'inputs': 'five',
            'optimizer': 'sgd', 'schedule': 'steps', 'lr_gamma': 0.1, 'eval_every': 10, 'reported': 'last'}
    expected = {
        'fair': {**large, 'optimizer': 'larc', 'lr': 0.1, 'eval_every': 1, 'reported': 'best'},
        'mmselfsup': {**large, 'optimizer': 'lars_mmselfsup', 'lr': 1.6, 'eval_every': 10, 'reported': 'last'},
        'moco': {**common, 'batch_size': 256, 'scaled_lr': 30, 'weight_decay': 0, 'epochs': 100, 'schedule': 'steps',
                 'lr_steps': (60, 80), 'lr_gamma': 0.1, 'optimizer': 'sgd', 'nesterov': False, 'reported': 'best'},
        'mhead': {**five, 'epochs': 90, 'lr_steps': (30, 60), 'augmentation': 'resized_crop_colour', 'jitter': 0.4,
                  'lighting': 0.1, 'crop_scale': (0.08, 1.0)},
        'mhead_places205': {**five, 'epochs': 28, 'lr_steps': (7, 14, 21), 'augmentation': 'random_crop',
                            'report_epochs': (20,)},
        'mhead_inat18': {**five, 'epochs': 84, 'lr_steps': (24, 48, 72), 'augmentation': 'resized_crop',
                         'crop_scale': (0.08, 1.0)}}
    assert set(expected) == set(PROTOCOLS)
    for name, numbers in expected.items():
        for key, value in numbers.items():
            assert getattr(PROTOCOLS[name], key) == value, (name, key)


@pytest.mark.parametrize(('protocol', 'dataset'), [
    ('fair', 'imagenet'), ('mmselfsup', 'imagenet'), ('mhead', 'imagenet'), ('mhead', 'places205'),
    ('mhead', 'inat18')])
def test_a_record_is_comparable_as_long_as_no_number_is_changed(protocol, dataset):
    size = SIZES[dataset]
    data = {'name': dataset, 'counts': {
        'train': size.train, 'test': size.test, 'classes': size.classes, 'test_classes': size.classes}}

    def reason(**changes):
        chosen = choose(protocol, dataset, changes)
        numbers = json.loads(json.dumps(chosen.record()))
        return why_not_comparable({'benchmark': benchmark_name(chosen, dataset), 'protocol': numbers, 'data': data})
    assert reason() is None
    for key, value in dict(epochs=2, batch_size=64, lr=0.3, resize=300, init_std=0.1, flip_p=0.1, momentum=0.8).items():
        assert reason(**{key: value}), key


def test_every_number_of_a_protocol_has_a_flag():
    numbers = {f.name for f in dataclasses.fields(linear.Protocol)}
    fixed = {'name', 'inputs', 'optimizer', 'lr_per_256', 'schedule', 'augmentation', 'reported', 'nesterov'}
    assert numbers - fixed == set(NUMBERS)


def test_the_batch_scales_the_rate_where_the_protocol_says_so():
    assert choose('fair', 'imagenet', {'batch_size': 1024}).protocol.scaled_lr == pytest.approx(0.4)
    assert choose('mmselfsup', 'imagenet', {'batch_size': 1024}).protocol.scaled_lr == 1.6


@pytest.mark.parametrize(('protocol', 'overrides', 'words'), [
    ('fair', {'jitter': 0.1}, '--jitter: protocol fair has no such number'),
    ('fair', {'lr_steps': [3]}, '--lr-steps: protocol fair has no such number'),
    ('moco', {'trust': 0.1}, '--trust: protocol moco has no such number'),
    ('fair', {'epochs': 0}, '--epochs 0: it must be above 0'),
    ('fair', {'resize': 100}, '--resize 100: must be at least the image size, 224'),
    ('fair', {'image_size': 5}, '--image-size 5: must be at least 8 pixels'),
    ('fair', {'crop_scale': [0.5, 0.1]}, '--crop-scale 0.5 0.1'),
    ('mhead', {'epochs': 3, 'report_epochs': [2, 4]}, '--report-epochs 2 4: there are epochs 1 to 3'),
    ('mhead', {'report_epochs': [0]}, '--report-epochs 0: there are epochs 1 to 90'),
    ('mhead', {'momentum': 0.0}, '--momentum 0'),
    ('best', {}, '--protocol best is not known')])
def test_numbers_that_cannot_be_are_refused(protocol, overrides, words):
    with pytest.raises(ValueError, match='^' + words.replace('.', r'\.')):
        choose(protocol, 'imagenet', overrides)


def test_cifar_keeps_its_pixels_and_says_that_this_is_a_change():
    chosen = choose('fair', 'cifar10', {})
    assert chosen.protocol.image_size == 32 and chosen.changed == {'image_size': (224, 32), 'resize': (256, 32)}
    assert 'image_size 224 -> 32' in chosen.describe() and 'changed' in chosen.label


@pytest.mark.parametrize(('overrides', 'own', 'sizes'), [
    ({}, 224, (224, 256)), ({'image_size': 32}, 224, (32, 37)), ({}, 32, (32, 37)), ({'resize': 32}, 32, (32, 32)),
    ({'image_size': 448, 'resize': None}, 32, (448, 512))])
def test_the_short_side_follows_the_image_size(overrides, own, sizes):
    chosen = choose('fair', 'folder', overrides, own=own)
    assert (chosen.protocol.image_size, chosen.protocol.resize) == sizes
    assert bool(chosen.changed) == (sizes != (224, 256))


def test_the_cosine_goes_by_epoch_and_steps_fall_after_theirs():
    fair, mhead = PROTOCOLS['fair'], PROTOCOLS['mhead_places205']
    for epoch in range(90):
        assert lr_at(epoch, fair) == pytest.approx(1.6 * 0.5 * (1 + math.cos(math.pi * epoch / 90)), rel=1e-12)
    rates = [lr_at(epoch, mhead) for epoch in range(28)]
    assert rates == pytest.approx([1e-2] * 7 + [1e-3] * 7 + [1e-4] * 7 + [1e-5] * 7)


# The optimizers.

def _walk(make, steps=6, rate=lambda t: 1.6):
    """A weight and a zero bias along fixed gradients: ours, and what `formula(w, g, buffer, lr)` makes of them."""
    rng = np.random.default_rng(0)
    head = nn.Linear(7, 3).double()
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(rng.normal(0, 0.01, (3, 7))))
        head.bias.zero_()
    gradients = [[rng.normal(0, 0.1, (3, 7)), rng.normal(0, 0.1, 3)] for _ in range(steps)]
    optimizer = make(head)
    path = [[p.detach().numpy().copy() for p in head.parameters()]]
    for t, gs in enumerate(gradients):
        for group in optimizer.param_groups:
            group['lr'] = rate(t)
        for p, g in zip(head.parameters(), gs, strict=True):
            p.grad = torch.from_numpy(g)
        optimizer.step()
        path.append([p.detach().numpy().copy() for p in head.parameters()])
    return gradients, path


def _by_hand(gradients, start, inside: bool, rate, trust=0.001, momentum=0.9):
    w, buffers = [x.copy() for x in start], [0.0, 0.0]
    for t, gs in enumerate(gradients):
        for i, g in enumerate(gs):
            wn, gn = np.sqrt((w[i] ** 2).sum()), np.sqrt((g ** 2).sum())
            r = trust * wn / (gn + 1e-8) if wn > 0 and gn > 0 else 1.0
            buffers[i] = momentum * buffers[i] + r * g * (rate(t) if inside else 1)
            w[i] = w[i] - buffers[i] * (1 if inside else rate(t))
    return w


def falling(t):
    return 1.6 * 0.5 * (1 + math.cos(math.pi * t / 6))


@pytest.mark.parametrize(('protocol', 'inside'), [('fair', False), ('mmselfsup', True)])
def test_a_step_is_that_of_the_formula(protocol, inside):
    gradients, path = _walk(lambda head: make_optimizer(head, PROTOCOLS[protocol]), rate=falling)
    for ours, hand in zip(path[-1], _by_hand(gradients, path[0], inside, falling), strict=True):
        np.testing.assert_allclose(ours, hand, rtol=1e-9)


@pytest.mark.parametrize('protocol', ['fair', 'mmselfsup'])
def test_a_zero_bias_makes_its_first_step_at_the_full_rate(protocol):
    gradients, path = _walk(lambda head: make_optimizer(head, PROTOCOLS[protocol]))
    np.testing.assert_allclose(path[1][1], -1.6 * gradients[0][1], rtol=1e-12)
    change = np.linalg.norm(path[1][0] - path[0][0])  # the weights' is 0.001 of their norm, times the rate
    assert change == pytest.approx(1.6 * 0.001 * np.linalg.norm(path[0][0]), rel=1e-6)


def test_both_kinds_of_lars_agree_at_a_constant_rate_only():
    def ends(rate):
        return [
            _walk(lambda head, p=p: make_optimizer(head, PROTOCOLS[p]), rate=rate)[1][-1]
            for p in ('fair', 'mmselfsup')]
    a, b = ends(lambda t: 1.6)
    np.testing.assert_allclose(a[0], b[0], rtol=1e-9)
    a, b = ends(falling)
    assert np.abs(a[0] - b[0]).max() / np.abs(a[0]).max() > 1e-4


def test_lars_with_weight_decay_follows_the_formula():
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = MmselfsupLars([w], lr=2.0, momentum=0.5, weight_decay=0.1, trust=0.01)
    w.grad = torch.tensor([0.6, 0.8], dtype=torch.float64)
    optimizer.step()  # ratio 0.01 * 5 / (1 + 0.1 * 5); g + wd w = (0.9, 1.2)
    np.testing.assert_allclose(w.detach(), [3 - 2 * 0.05 / 1.5 * 0.9, 4 - 2 * 0.05 / 1.5 * 1.2], rtol=1e-7)


# The heads.

def test_the_five_taps_of_resnet50_have_the_published_shapes():
    backbone = load_backbone('simsiam_resnet50:random')
    with torch.no_grad():
        maps = taps(backbone, torch.zeros(1, 3, 224, 224))
        flat = pooled(maps)
    assert [x.shape[1] for x in flat] == [9216, 9216, 8192, 9216, 8192]
    assert [m.shape[1] for m in maps] == [64, 256, 512, 1024, 2048]


def test_heads_normalise_channels_of_the_pooled_map_then_flatten():
    torch.manual_seed(0)
    maps = [torch.randn(6, 3, 4, 4) * 5 + 2, torch.randn(6, 8, 2, 2)]
    heads = Heads([(3, 16), (8, 4)], 10, True, 0.01, seed=0)
    scores = heads([m.flatten(1) for m in maps])
    for m, y, head, linear_ in zip(maps, scores, heads.norms, heads.linears, strict=True):
        oracle = nn.BatchNorm2d(m.shape[1], affine=False, momentum=0.1)
        torch.testing.assert_close(y, linear_(oracle(m).flatten(1)))
        torch.testing.assert_close(head.running_mean, oracle.running_mean)
        torch.testing.assert_close(head.running_var, oracle.running_var)
    assert not [n for n, _ in heads.named_parameters() if n.startswith('norms')]


def test_classifiers_start_at_0_01_and_biases_at_zero():
    (only,) = Heads([(2048, 1)], 1000, False, 0.01, seed=0).linears
    assert float(only.weight.detach().std()) == pytest.approx(0.01, rel=5e-3)
    assert abs(float(only.weight.detach().mean())) < 1e-4 and not only.bias.any()
    assert torch.equal(only.weight, Heads([(2048, 1)], 1000, False, 0.01, seed=0).linears[0].weight)


def test_a_tie_counts_as_wrong_and_so_does_no_number():
    scores = torch.tensor([[2.0, 1, 0], [1, 1, 0], [0, 0, 0], [float('nan'), 1, 0], [1, float('nan'), 0]])
    right = [[int(right_within(s[None], torch.tensor([0]), k)) for k in (1, 2, 3)] for s in scores]
    assert right == [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0], [0, 1, 1]]


def test_top_k_equals_topk_where_there_are_no_ties():
    scores, labels = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)), torch.arange(500) % 12
    for k in (1, 5):
        oracle = (scores.topk(k).indices == labels[:, None]).any(1).sum()
        assert right_within(scores, labels, k) == oracle


# The images.

def _photos(n: int = 11) -> MemoryImages:
    rng = np.random.default_rng(0)

    class Photos(MemoryImages):
        def read(self, index: int) -> np.ndarray:
            return self.images[index]

    shapes = [(40 + 7 * (i % 3), 50 - 5 * (i % 4), 3) for i in range(n)]
    pictures = [rng.integers(0, 256, s, dtype=np.uint8) for s in shapes]
    images = Photos(np.zeros((n, 1, 1, 3), np.uint8), np.arange(n) % 3, ['a', 'b', 'c'], 'photos')
    images.images = pictures
    return images


def _protocol(name: str, **numbers) -> linear.Protocol:
    return dataclasses.replace(PROTOCOLS[name], **{'image_size': 24, 'resize': 32, 'batch_size': 4, **numbers})


@pytest.mark.parametrize('name', ['fair', 'mhead', 'mhead_places205'])
def test_an_image_depends_on_seed_epoch_and_index_alone(name):
    def seen(micro, workers, rank=0, world=1, epoch=1, seed=0, start=0):
        crops = TrainCrops(_photos(), _protocol(name), micro, CPU, workers, seed, rank, world)
        out = {}
        for piece, _ in crops.epoch(epoch, start):
            x = to_device(piece, CPU, (0.5,) * 3, (0.25,) * 3)
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
    crops = TrainCrops(_photos(5), _protocol('fair'), 2, CPU, 0, 0, rank=1, world=2)
    pieces = [p for p, _ in crops.epoch(0)]
    assert [len(p.rows) for p in pieces] == [2, 0] and [p.last for p in pieces] == [True, True]


def test_the_kernel_and_pil_cut_the_same(monkeypatch):
    def pixels():
        crops = TrainCrops(_photos(), _protocol('fair'), 64, CPU, 0, 0)
        return np.concatenate([p.pixels.numpy() for p, _ in crops.epoch(0)]).astype(int)
    if kernel.library() is None:
        pytest.skip('no C compiler here')
    ours = pixels()
    monkeypatch.setattr(kernel, 'library', lambda: None)
    assert np.abs(ours - pixels()).max() <= 1


def test_test_images_are_torchvisions_resize_and_centre_crop():
    images = _photos()
    oracle = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(24)])
    rows = {}
    for rank in (0, 1):
        for piece in CentreCrops(images, _protocol('fair'), 2, CPU, 1).pieces(rank, 2):
            rows.update(zip(piece.rows.tolist(), piece.pixels.numpy(), strict=True))
    assert sorted(rows) == list(range(11))
    for i, x in rows.items():
        assert np.array_equal(x, np.asarray(oracle(Image.fromarray(images.read(i)))))


def test_places_crops_lie_anywhere_in_the_centre_square():
    images = MemoryImages(np.zeros((1, 40, 60, 3), np.uint8), np.array([0]), ['a'], 'one')
    images.images[0, :, :, 0], images.images[0, :, :, 1] = np.arange(60), np.arange(40)[:, None]
    protocol = _protocol('mhead_places205', image_size=36, resize=40, batch_size=1)
    crops = TrainCrops(images, protocol, 1, CPU, 0, 0)
    corners = set()
    for epoch in range(300):
        for piece, _ in crops.epoch(epoch):
            x = piece.pixels[0].numpy().astype(int)
            left, top = x[0, 0, :2]
            assert np.array_equal(x[..., 0], np.broadcast_to(left + np.arange(36), (36, 36)))
            corners.add((left - 10, top))  # the centre square begins at column 10
    assert {x for x, _ in corners} == {y for _, y in corners} == {0, 1, 2, 3, 4}


def test_the_finish_is_bgr_flip_light_and_normalisation():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    light = rng.normal(0, 0.1, (2, 3)).astype(np.float32)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    for bgr in (False, True):
        piece = Piece(0, True, np.arange(2), torch.from_numpy(pixels), np.array([True, False]), None, light)
        x = pixels[..., ::-1] if bgr else pixels
        x = x.astype(np.float64) / 255
        x = np.stack([x[0, :, ::-1], x[1]]) + light[:, None, None]
        x = ((x - mean) / std).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(to_device(piece, CPU, mean, std, bgr), x, atol=1e-5)


def test_lighting_is_pca_noise_of_the_published_spread():
    x = lighting(0.1, 0, 0, np.arange(100_000)).astype(np.float64)
    values = np.array([0.2175, 0.0188, 0.0045])
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    expected = vectors @ np.diag((0.1 * values) ** 2) @ vectors.T
    assert np.abs(x.mean(0)).max() < 3e-4
    np.testing.assert_allclose(np.cov(x.T), expected, rtol=0.02, atol=2e-7)
    assert not lighting(0.0, 0, 0, np.arange(10)).any()


def test_colours_are_jittered_always_and_without_hue():
    crops = TrainCrops(_photos(), _protocol('mhead'), 64, CPU, 0, 0)
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
    crops = TrainCrops(_ramps(n), _protocol(name, batch_size=500), 500, CPU, 0, 0)
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
        crops = TrainCrops(_ramps(3000), _protocol(name, batch_size=500, **numbers, **more), 500, CPU, 0, 0)
        x = torch.cat([to_device(p, CPU, (0.0,) * 3, (1.0,) * 3) for p, _ in crops.epoch(0)])
        return float((x[:, 0, 12, 0] > x[:, 0, 12, -1]).float().mean())
    assert abs(share() - 0.5) < 0.03 and share(flip_p=0.0) == 0


def test_multi_head_images_are_torchvisions_colours_then_flip_light_and_normalisation():
    crops = TrainCrops(_photos(), _protocol('mhead', batch_size=11), 64, CPU, 0, 0)
    ((piece, _),) = crops.epoch(3)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    light = torch.from_numpy(lighting(0.1, 0, 3, piece.rows))
    operators = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, lambda y, hue: y]
    for k, x in enumerate(to_device(piece, CPU, mean, std)):
        y = piece.pixels[k].permute(2, 0, 1).float() / 255
        for op in piece.table[k, 1:5].astype(int):
            y = operators[op](y, float(piece.table[k, 5 + op]))
        y = (y.flip(-1) if piece.flip[k] else y) + light[k][:, None, None]
        torch.testing.assert_close(x, TF.normalize(y, mean, std), rtol=1e-4, atol=1e-4)


def test_a_gray_picture_shows_brightness_and_lighting_alone():
    """Contrast and saturation do nothing to it: it becomes b gray + noise, b uniform in 0.6 .. 1.4."""
    n, gray = 6000, 100 / 255
    images = MemoryImages(np.broadcast_to(np.uint8(100), (n, 8, 8, 3)), np.zeros(n, int), ['a'], 'gray')
    crops = TrainCrops(images, _protocol('mhead', image_size=2, batch_size=1000), 1000, CPU, 0, 0)
    x = torch.cat([to_device(p, CPU, (0.0,) * 3, (1.0,) * 3) for p, _ in crops.epoch(0)])[:, :, 0, 0].double().numpy()
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    noise = vectors @ np.diag((0.1 * np.array([0.2175, 0.0188, 0.0045])) ** 2) @ vectors.T
    np.testing.assert_allclose(np.cov(x.T), gray**2 * 0.8**2 / 12 + noise, rtol=0.05)
    colours = np.eye(3) - 1 / 3  # what is not gray is noise alone
    np.testing.assert_allclose(np.cov((x @ colours).T), colours @ noise @ colours, rtol=0.1, atol=1e-7)


# Whole runs.

@pytest.mark.parametrize('protocol', list(SHRUNKEN))
def test_a_run_writes_its_record_and_another_one_gives_the_same(protocol, split_digits, tmp_path, capsys):
    assert linear.run(_args(split_digits, tmp_path / 'a', protocol)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert linear.run(_args(split_digits, tmp_path / 'b', protocol, '--workers', '2')) == 0
    a, b = _record(tmp_path / 'a'), _record(tmp_path / 'b')
    assert _same_numbers(a, b)
    assert a['protocol']['changed'] and a['protocol']['name'] == f'{protocol} (changed)'
    assert a['not_comparable'] or not a['published']
    # No number without the name of its protocol.
    for line in lines:
        if '%' in line or 'top' in line and ':' in line:
            assert f'{protocol} (changed)' in line, line
    assert sum(' images/s' in line for line in lines) == 3
    history = a['extra']['epochs']
    assert [e['epoch'] for e in history] == [1, 2, 3] and all(0 < e['loss'] for e in history)
    evaluated = [e['epoch'] for e in history if 'top1' in e]
    assert evaluated == {'fair': [1, 2, 3], 'moco': [1, 2, 3], 'mmselfsup': [2, 3], 'mhead': [2, 3]}[protocol]
    if protocol == 'mhead':
        assert [a['metrics'][f'feature{i}'] for i in range(1, 6)] == history[-1]['top1']
        assert [a['metrics'][f'feature{i}_top1_epoch2'] for i in range(1, 6)] == history[1]['top1']
    else:
        top1 = [e['top1'][0] for e in history if 'top1' in e]
        best, last = (a['metrics'][k] for k in (('top1', 'top1_last') if protocol != 'mmselfsup' else (
            'top1_best', 'top1')))
        assert (best, last) == (max(top1), top1[-1])


@pytest.mark.parametrize(('protocol', 'expected'), [
    ('fair', {'top1': 60.0, 'top5': 81.0, 'top1_last': 50.0, 'top5_last': 82.0}),
    ('mmselfsup', {'top1': 50.0, 'top5': 82.0, 'top1_best': 60.0, 'top5_best': 81.0})])
def test_best_or_last_is_reported_and_the_other_beside_it(protocol, expected, split_digits):
    """top-5 is that of the same epoch; of equals the first is the best; epochs without evaluation do not count."""
    run = _run(split_digits, protocol)
    run.history = [
        {'epoch': 1, 'top1': [40.0], 'top5': [83.0]}, {'epoch': 2}, {'epoch': 3, 'top1': [60.0], 'top5': [81.0]},
        {'epoch': 4, 'top1': [60.0], 'top5': [99.0]}, {'epoch': 5, 'top1': [50.0], 'top5': [82.0]}]
    assert run.metrics() == expected


def test_heads_on_the_taps_learn_digits(split_digits, tmp_path):
    linear.run(_args(split_digits, tmp_path, 'mhead', '--epochs', '10', '--lr-steps', '8', '--batch-size', '12'))
    metrics = _record(tmp_path)['metrics']
    assert metrics['feature2'] > 40 and metrics['feature3'] > 40  # chance is 10


@pytest.mark.parametrize(('protocol', 'kill'), [('fair', 4), ('mmselfsup', 5), ('moco', 9), ('mhead', 7)])  # step
def test_a_run_that_died_ends_as_one_that_did_not(protocol, kill, split_digits, tmp_path, monkeypatch):
    linear.run(_args(split_digits, tmp_path / 'whole', protocol))
    real, calls = LinearRun._step, []

    def step(self, *args):
        calls.append(1)
        if len(calls) == kill:
            raise KeyboardInterrupt
        real(self, *args)
    with monkeypatch.context() as m:
        m.setattr(LinearRun, '_step', step)
        with pytest.raises(KeyboardInterrupt):
            linear.run(_args(split_digits, tmp_path / 'killed', protocol))
    assert not list((tmp_path / 'killed').glob('*.json'))
    linear.run(_args(split_digits, tmp_path / 'killed', protocol))
    assert _same_numbers(_record(tmp_path / 'whole'), _record(tmp_path / 'killed'))
    states = [torch.load(next((tmp_path / n).glob('*.pth')), weights_only=True) for n in ('whole', 'killed')]
    for name, x in states[0]['heads'].items():
        assert torch.equal(x, states[1]['heads'][name]), name


@pytest.mark.parametrize('at', [1, 5, 9])
def test_sigterm_finishes_the_step_and_the_same_command_goes_on(at, split_digits, tmp_path, monkeypatch, capsys):
    linear.run(_args(split_digits, tmp_path / 'whole', 'mhead'))
    real, calls = LinearRun._step, []

    def step(self, *args):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, *args)
    with monkeypatch.context() as m:
        m.setattr(LinearRun, '_step', step)
        assert linear.run(_args(split_digits, tmp_path / 'stopped', 'mhead')) == 143
        assert len(calls) == at
    assert 'SIGTERM; the same command goes on' in capsys.readouterr().err
    linear.run(_args(split_digits, tmp_path / 'stopped', 'mhead'))
    assert _same_numbers(_record(tmp_path / 'whole'), _record(tmp_path / 'stopped'))


def test_sigkill_leaves_a_checkpoint_that_is_whole(split_digits, tmp_path):
    script = f'''
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
torch.set_num_threads(1)
from pathlib import Path
from simsiam_models.benchmarks import linear, linear_training
from test_linear import _args
real, count = linear_training.write_atomically, [0]
def write(path, do):
    count[0] += 1
    if count[0] == 2:  # while the second is being written
        real(path.with_suffix('.half'), lambda f: (do(f), f.flush(), os.kill(os.getpid(), signal.SIGKILL)))
    real(path, do)
linear_training.write_atomically = write
linear.run(_args(Path({str(split_digits)!r}), Path({str(tmp_path / "killed")!r}), 'moco'))
'''
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run([sys.executable, '-c', script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    linear.run(_args(split_digits, tmp_path / 'whole', 'moco'))
    linear.run(_args(split_digits, tmp_path / 'killed', 'moco'))
    assert _same_numbers(_record(tmp_path / 'whole'), _record(tmp_path / 'killed'))


def test_a_kill_costs_the_steps_since_the_last_save_within_the_epoch(split_digits, tmp_path, monkeypatch):
    linear.run(_args(split_digits, tmp_path / 'whole', 'mhead'))
    monkeypatch.setattr(linear_training, 'SAVE_EVERY', 0.0)
    real, calls, most = LinearRun._step, [], 5

    def step(self, *args):
        calls.append((self.epoch, self.step))
        if len(calls) == most:
            raise KeyboardInterrupt
        real(self, *args)
    monkeypatch.setattr(LinearRun, '_step', step)
    with pytest.raises(KeyboardInterrupt):
        linear.run(_args(split_digits, tmp_path / 'killed', 'mhead'))
    most = 99
    linear.run(_args(split_digits, tmp_path / 'killed', 'mhead'))
    assert calls[4] == calls[5] == (1, 1) and len(calls) == 10  # 3 epochs of 3 steps, and the one that was killed
    assert _same_numbers(_record(tmp_path / 'whole'), _record(tmp_path / 'killed'))


def test_a_finished_run_says_so_and_prints_its_result_again(split_digits, tmp_path, capsys):
    before, after = [linear.run(_args(split_digits, tmp_path, 'fair')) or capsys.readouterr().out for _ in range(2)]
    (path,) = tmp_path.glob('*.pth')
    assert f'fair (changed): {path} is finished, 3 epochs; --fresh trains anew' in after
    assert 'images/s' not in after and 'continuing' not in after
    assert before.splitlines()[-3:] == after.splitlines()[-3:]


def test_a_batch_of_more_than_all_images_is_said(split_digits, tmp_path, capsys):
    for size, said in (('101', 1), ('100', 0)):
        linear.run(_args(split_digits, tmp_path / size, 'fair', '--epochs', '1', '--batch-size', size))
        assert capsys.readouterr().out.count(
            f'batch {size} is more than the 100 training images: one step per epoch; for your own folder --protocol '
            'auto chooses the rates by itself') == said


def test_the_checkpoint_of_other_numbers_is_named_by_those_that_were_given(split_digits, tmp_path):
    for rate in ('60', '30'):
        linear.run(_args(split_digits, tmp_path / rate, 'fair', '--lr', rate))
    ours, other = (next((tmp_path / rate).glob('*.pth')) for rate in ('60', '30'))
    shutil.copy(other, ours)
    with pytest.raises(ValueError, match=r'belongs to another run \(--lr: 30.0 there, 60.0 here\); start anew'):
        linear.run(_args(split_digits, tmp_path / '60', 'fair'))


def test_another_command_does_not_continue_this_run(split_digits, tmp_path):
    linear.run(_args(split_digits, tmp_path, 'fair'))
    linear.run(_args(split_digits, tmp_path, 'fair', '--seed', '1'))
    assert len(list(tmp_path.glob('*.json'))) == 2


def test_a_damaged_checkpoint_is_named_and_fresh_passes_over_it(split_digits, tmp_path):
    linear.run(_args(split_digits, tmp_path, 'fair'))
    (path,) = tmp_path.glob('*.pth')
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match='cannot be read.*--fresh'):
        linear.run(_args(split_digits, tmp_path, 'fair'))
    assert linear.run(_args(split_digits, tmp_path, 'fair', '--fresh')) == 0


def test_a_flipped_byte_of_a_checkpoint_is_noticed(split_digits, tmp_path):
    linear.run(_args(split_digits, tmp_path, 'fair'))
    (path,) = tmp_path.glob('*.pth')
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        inside = archive.read(largest)[:64]
    at = data.index(inside) + largest.file_size // 2
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match='cannot be read.*--fresh'):
        linear.run(_args(split_digits, tmp_path, 'fair'))


@pytest.mark.parametrize('key', ['sums', 'seen', 'seconds', 'heads'])
def test_a_checkpoint_of_another_program_is_named(key, split_digits, tmp_path):
    linear.run(_args(split_digits, tmp_path, 'fair', '--epochs', '1'))
    (path,) = tmp_path.glob('*.pth')
    state = torch.load(path, weights_only=True)
    del state[key]
    torch.save(state, path)
    with pytest.raises(ValueError, match='no checkpoint of this program.*--fresh'):
        linear.run(_args(split_digits, tmp_path, 'fair', '--epochs', '1'))


def test_a_backbone_that_changed_gives_no_number(split_digits, tmp_path, monkeypatch, capsys):
    real = LinearRun.features

    def features(self, x):
        with torch.no_grad():
            next(b for n, b in self.model.named_buffers() if 'running_mean' in n)[0] += 1e-6
        return real(self, x)
    monkeypatch.setattr(LinearRun, 'features', features)
    with pytest.raises(RuntimeError, match='changed while its classifier was trained'):
        linear.run(_args(split_digits, tmp_path, 'fair'))
    assert not list(tmp_path.glob('*.json')) and 'metric' not in capsys.readouterr().out


def test_a_backbone_in_training_mode_is_put_to_rest(split_digits):
    run = _run(split_digits, 'fair')
    run.model.train()
    run.train()
    run.check_frozen()


def test_a_loss_that_is_no_number_ends_with_a_sentence(split_digits, tmp_path):
    with pytest.raises(RuntimeError, match=r'^protocol moco \(changed\): the loss is not a number any more in epoch '):
        linear.run(_args(split_digits, tmp_path, 'moco', '--lr', '1e38', '--epochs', '5'))
    assert not list(tmp_path.glob('*.json'))


def test_an_unreadable_image_ends_the_evaluation(split_digits, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(split_digits, data)
    first = sorted((data / 'val').rglob('*.*'))[0]
    first.write_bytes(b'no image')
    with pytest.raises(RuntimeError, match=str(first)):
        linear.run(_args(data, tmp_path / 'out', 'fair'))


def _broken(source: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of the data in which image 9 of each part cannot be read, and one in which these are not there."""
    for name in ('broken', 'without'):
        shutil.copytree(source, folder / name)
        for part in ('train', 'val'):
            path = sorted((folder / name / part).rglob('*.*'))[9]
            path.write_bytes(b'no image') if name == 'broken' else path.unlink()
    return folder / 'broken', folder / 'without'


@pytest.mark.parametrize('part', ['train', 'val'])
def test_an_unreadable_image_ends_with_the_rule_and_the_next_step(part, split_digits, tmp_path):
    broken, _ = _broken(split_digits, tmp_path)
    whole = 'val' if part == 'train' else 'train'
    shutil.rmtree(broken / whole)
    shutil.copytree(split_digits / whole, broken / whole)
    (bad,) = (p for p in (broken / part).rglob('*.*') if p.read_bytes() == b'no image')
    with pytest.raises(RuntimeError, match=f'{bad}.*repair or remove it, or leave it out with --allow-partial'):
        linear.run(_args(broken, tmp_path / 'out', 'mhead'))


@pytest.mark.parametrize('protocol', ['fair', 'mhead'])
def test_allow_partial_leaves_unreadable_images_out_as_if_they_were_not_there(protocol, split_digits, tmp_path, capsys):
    broken, without = _broken(split_digits, tmp_path)
    linear.run(_args(broken, tmp_path / 'a', protocol, '--allow-partial', '--workers', '2'))
    assert '2 images cannot be read and are left out, the first: ' in capsys.readouterr().out
    linear.run(_args(without, tmp_path / 'b', protocol))
    a, b = _record(tmp_path / 'a'), _record(tmp_path / 'b')
    assert a['metrics'] == b['metrics'] and a['extra']['epochs'] == b['extra']['epochs']
    assert (a['extra']['unreadable'], b['extra']['unreadable']) == (2, 0)
    assert a['data']['counts']['train'] == 100 and b['data']['counts']['train'] == 99


def test_a_data_set_that_went_away_is_not_left_out_image_by_image(split_digits, tmp_path):
    shutil.copytree(split_digits, tmp_path / 'data')
    for path in (tmp_path / 'data' / 'val').rglob('*.*'):
        path.write_bytes(b'')
    with pytest.raises(RuntimeError, match='60 of 60 images cannot be read: is the data still there?'):
        linear.run(_args(tmp_path / 'data', tmp_path / 'out', 'fair', '--allow-partial'))


def _torchrun(data: Path, output: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--local-addr', '127.0.0.1', '--nproc-per-node',
         '2', '-m', 'simsiam_models.cli', 'linear', str(data), '--protocol', 'mhead', '--model', MODEL, '--output',
         str(output), *SMALL, *SHRUNKEN['mhead'], *more],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}, capture_output=True, text=True,
        timeout=120, cwd=ROOT)


def test_of_two_processes_both_name_the_unreadable_image_or_leave_it_out(split_digits, tmp_path):
    broken, without = _broken(split_digits, tmp_path)
    done = _torchrun(broken, tmp_path / 'refused')
    said = [line for line in done.stderr.splitlines() if line.startswith('simsiam: ')]
    assert done.returncode and said and 'Connection' not in done.stderr, done.stderr
    assert all('repair or remove it, or leave it out with --allow-partial' in line for line in said)
    done = _torchrun(broken, tmp_path / 'out', '--allow-partial')
    assert done.returncode == 0, done.stderr
    linear.run(_args(without, tmp_path / 'one', 'mhead'))
    both, one = _record(tmp_path / 'out'), _record(tmp_path / 'one')
    assert both['extra']['unreadable'] == 2
    assert [e['loss'] for e in both['extra']['epochs']] == pytest.approx(
        [e['loss'] for e in one['extra']['epochs']], rel=1e-4)


# What a user can get wrong.

@pytest.mark.parametrize('below', ['', 'below'])
def test_an_output_that_cannot_be_written_to_is_found_before_anything_else(below, tmp_path):
    file = tmp_path / 'file'
    file.write_bytes(b'')
    with pytest.raises(ValueError, match=f'^--output {file / below}: no record can be written there'):
        linear.run(_args(tmp_path / 'no data', file / below, 'fair'))


@pytest.mark.parametrize(('flags', 'words'), [
    (['--seed', '-1'], '--seed -1: must be in 0 .. 9223372036854775807'),
    (['--seed', str(2**63)], '--seed 9223372036854775808: must be in 0 .. 9223372036854775807'),
    (['--workers', '-1'], '--workers -1: must be at least 0'),
    (['--micro-batch', '0'], '--micro-batch 0: must be at least 1'),
    (['--cache', 'here'], '--cache here: only --protocol auto keeps features; leave it out')])
def test_flags_that_cannot_be_are_refused(flags, words, split_digits, tmp_path):
    with pytest.raises(ValueError, match=f'^{words}$'):
        linear.run(_args(split_digits, tmp_path / 'out', 'fair', *flags))
    assert not (tmp_path / 'out').exists()


def test_the_largest_seed_runs(split_digits, tmp_path):
    assert linear.run(_args(split_digits, tmp_path, 'fair', '--epochs', '1', '--seed', str(2**63 - 1))) == 0


def test_the_help_tells_the_batch_that_a_cpu_takes():
    parser = argparse.ArgumentParser()
    linear.add_arguments(parser)
    assert f'on a CPU {CPU_BATCH};' in ' '.join(parser.format_help().split())


@pytest.mark.parametrize(('where', 'words'), [
    ((LinearRun, 'features'), 'in the backbone: lower --micro-batch$'),
    ((Heads, 'forward'), 'not the backbone, but the classifiers do not fit; lower --batch-size')])
def test_too_little_memory_names_the_flag_that_helps(where, words, split_digits, tmp_path, monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ...')
    monkeypatch.setattr(*where, fails)
    with pytest.raises(RuntimeError, match='^out of memory .CUDA out of memory.*' + words):
        linear.run(_args(split_digits, tmp_path, 'fair'))


def test_batch_norm_never_gets_one_image_and_the_size_that_is_named_works():
    """n = 7: of two the last batch has 1, of three, too."""
    with pytest.raises(ValueError, match='--batch-size 2: of 7 images the last batch.*use --batch-size 4$'):
        check_batches(7, 2, True)
    for n in range(2, 40):
        for batch in range(1, 45):
            sizes = {len(range(i, min(n, i + batch))) for i in range(0, n, batch)}
            if 1 not in sizes:
                check_batches(n, batch, True)
                continue
            with pytest.raises(ValueError, match=f'^--batch-size {batch}: of {n} images') as e:
                check_batches(n, batch, True)
            check_batches(n, int(str(e.value).split()[-1]), True)
            if batch > 1:
                check_batches(n, batch, False)  # the pooled maps of one image are values enough
    with pytest.raises(ValueError, match='^1 training image, and batch norm'):
        check_batches(1, 4, True)


def test_a_batch_of_one_image_is_refused_with_batch_norm_only(split_digits, tmp_path):
    with pytest.raises(ValueError, match='^--batch-size 1: .*use --batch-size 2$'):
        linear.run(_args(split_digits, tmp_path, 'mhead', '--batch-size', '1'))
    assert linear.run(_args(split_digits, tmp_path, 'fair', '--batch-size', '1', '--epochs', '1')) == 0


@pytest.mark.parametrize(('model', 'pooling'), [('convnext_atto:random', 'adaptive'), (MODEL, 'mmselfsup')])
def test_maps_of_other_networks_are_pooled_adaptively_which_is_a_change(model, pooling, split_digits, tmp_path):
    for part, n in (('train', 12), ('val', 6)):
        for path in sorted((split_digits / part).rglob('*.*'))[:n]:
            (tmp_path / 'data' / part / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / 'data' / part / path.parent.name)
    size = ['--image-size', '224', '--resize', '256', '--batch-size', '256']
    linear.run(_args(tmp_path / 'data', tmp_path / 'out', 'mhead', '--model', model, *size, '--eval-every', '10'))
    protocol = _record(tmp_path / 'out')['protocol']
    assert protocol['pooling'] == pooling
    assert protocol['changed'].get('pooling') == (
        {'published': 'mmselfsup', 'used': 'adaptive'} if pooling == 'adaptive' else None)

def test_half_precision_is_a_change_of_the_protocol(split_digits, tmp_path):
    assert linear.run(_args(split_digits, tmp_path, 'fair', '--amp', 'bfloat16')) == 0
    record = _record(tmp_path)
    assert record['protocol']['changed']['amp'] == {'published': 'off', 'used': 'bfloat16'}
    assert choose('fair', 'imagenet', {}, 'bfloat16').label == 'fair (changed)'
    with pytest.raises(ValueError, match='--amp float16 does not run on cpu'):
        linear.run(_args(split_digits, tmp_path, 'fair', '--amp', 'float16'))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_a_gpu_computes_what_a_cpu_does(split_digits, tmp_path):
    for device in ('cpu', 'cuda'):
        linear.run(_args(split_digits, tmp_path / device, 'mhead', '--device', device))
    a, b = (_record(tmp_path / device)['extra']['epochs'] for device in ('cpu', 'cuda'))
    assert [e['loss'] for e in a] == pytest.approx([e['loss'] for e in b], rel=1e-3)


def test_images_that_the_backbone_cannot_take_are_named(split_digits, tmp_path):
    with pytest.raises(ValueError, match='vit_tiny.*--image-size'):
        linear.run(_args(split_digits, tmp_path, 'fair', '--model', 'vit_tiny_patch16_224:random'))


# One process or many, one batch or pieces of it.

def _run(
    data: Path, protocol: str, world: World = ALONE, micro: int = 256, **numbers,
) -> LinearRun:
    # Batches of 33, 33, 33 and 1, of which one of two processes has nothing; with batch norm of 49, 49 and 2.
    batch = 49 if protocol == 'mhead' else 33
    p = _protocol(protocol, **{
        'image_size': 32, 'batch_size': batch, 'epochs': 2, 'lr_steps': (), 'report_epochs': (), **numbers})
    return LinearRun(
        p, 'test', load_backbone(MODEL), open_pair('folder', str(data)), world, 0, 'off', micro, 0,
        data.parent / f'{protocol}-{world.size}.pth', {}, say=lambda text: None)


@pytest.mark.parametrize('protocol', ['fair', 'mhead'])
def test_pieces_of_a_batch_make_the_step_of_the_whole(protocol, split_digits):
    ends = []
    for micro in (256, 7):
        run = _run(split_digits, protocol, micro=micro)
        run.save = lambda: None
        run.train()
        ends.append((run.heads.state_dict(), run.history))
    for name, x in ends[0][0].items():
        torch.testing.assert_close(x, ends[1][0][name], rtol=1e-4, atol=1e-6)
    assert [e['loss'] for e in ends[0][1]] == pytest.approx([e['loss'] for e in ends[1][1]], rel=1e-5)


def _enter(rank: int, store: str, data: str, folder: str) -> None:
    if rank == 0:  # which decides for both when to save
        linear_training.SAVE_EVERY = 0.0
    os.environ['GLOO_SOCKET_IFNAME'] = 'lo'
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    out = {}
    for protocol in ('fair', 'mhead', 'moco'):
        run = _run(Path(data), protocol, World(rank, 2, CPU, dist.new_group(backend='gloo')))
        run.path = Path(folder) / f'{protocol}.pth'
        run.train()
        run.check_frozen()
        out[protocol] = (run.heads.state_dict(), run.history)
    torch.save(out, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_compute_what_one_does(split_digits, tmp_path):
    mp.spawn(_enter, (str(tmp_path / 'store'), str(split_digits), str(tmp_path)), nprocs=2)
    both = [torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1)]
    for protocol in ('fair', 'mhead', 'moco'):
        run = _run(split_digits, protocol)
        run.path = tmp_path / 'one.pth'
        run.train()
        for state, history in (b[protocol] for b in both):
            for name, x in run.heads.state_dict().items():
                torch.testing.assert_close(state[name], x, rtol=1e-4, atol=1e-6)
            for a, b in zip(history, run.history, strict=True):
                assert a['loss'] == pytest.approx(b['loss'], rel=1e-5)
                assert a['train_top1'] == pytest.approx(b['train_top1']) and a.get('top1') == b.get('top1')
        for name, x in both[0][protocol][0].items():
            assert torch.equal(x, both[1][protocol][0][name])


def test_a_step_is_plain_sgd_on_the_summed_losses(split_digits):
    """By hand for one batch: the same images, the five taps, batch norm, cross-entropy, Nesterov."""
    run = _run(split_digits, 'mhead', batch_size=100, epochs=1)
    heads = Heads(run.shapes, run.classes, True, 0.01, 0)
    optimizer = torch.optim.SGD(heads.parameters(), 0.01, 0.9, weight_decay=1e-4, nesterov=True)
    (pieces,) = [list(run.train_images.epoch(0))]
    x = torch.cat([to_device(p, CPU, run.backbone.mean, run.backbone.std) for p, _ in pieces])
    with torch.no_grad():
        flat = pooled(taps(run.backbone, x), adaptive=True)
    labels = torch.from_numpy(run.labels[0][pieces[0][1]])
    loss = sum(F.cross_entropy(y, labels) for y in heads(flat))
    loss.backward()
    optimizer.step()
    run.save = lambda: None
    run.train()
    assert run.history[0]['loss'] == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(heads.parameters(), run.heads.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('bgr', [False, True])
def test_the_backbone_sees_the_channels_that_its_weights_know(bgr, split_digits):
    run = _run(split_digits, 'fair')
    run.backbone.bgr = bgr
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    x = (pixels[..., ::-1] if bgr else pixels) / 255
    x = ((x - run.backbone.mean) / run.backbone.std).transpose(0, 3, 1, 2)
    with torch.no_grad():
        expected = load_backbone(MODEL).model(torch.from_numpy(x).float())
    (found,) = run._piece(Piece(0, True, np.arange(4), torch.from_numpy(pixels)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_taps_at_224_pixels_are_pooled_as_published(split_digits):
    """Windows and their means by hand, zeros of the border included."""
    run = _run(split_digits, 'mhead', image_size=224, resize=256)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = taps(run.backbone, x)
    published = [(10, 10, 4), (16, 8, 0), (13, 5, 0), (8, 3, 0), (6, 1, 0)]  # kernel, stride, padding
    for m, y, (kernel_, stride, padding) in zip(maps, run.features(x), published, strict=True):
        windows = F.pad(m, (padding,) * 4).unfold(2, kernel_, stride).unfold(3, kernel_, stride)
        torch.testing.assert_close(y, windows.mean((-1, -2)).flatten(1), rtol=1e-4, atol=1e-5)


def _plain_step(kind: str, w, g, buffer, rate, decay=0.1, momentum=0.9, trust=0.001):
    """-> the weight and the buffer after a step; kind: the protocol."""
    wn, gn = float(w.norm()), float(g.norm())
    r = trust * wn / (gn + decay * wn + 1e-8) if wn > 0 and gn > 0 else 1.0
    d = g + decay * w
    if kind == 'mmselfsup':
        buffer = momentum * buffer + rate * r * d
        return w - buffer, buffer
    d = r * d if kind == 'fair' else d
    buffer = momentum * buffer + d
    return w - rate * (d + momentum * buffer if kind == 'mhead' else buffer), buffer


@pytest.mark.parametrize(('protocol', 'lr', 'rates'), [
    ('fair', 400.0, [1, 0.75, 0.25]), ('mmselfsup', 50.0, [1, 0.75, 0.25]), ('moco', 0.5, [1, 0.1, 0.01]),
    ('mhead', 0.05, [1, 0.1, 0.01])])
def test_epochs_are_the_plain_loop_of_the_protocol(protocol, lr, rates, split_digits):
    """Weight decay, the falling rate, batch norm, loss and training accuracy, written out once more."""
    steps = {} if protocol in ('fair', 'mmselfsup') else {'lr_steps': (1, 2)}
    run = _run(split_digits, protocol, epochs=3, lr=lr, weight_decay=0.1, eval_every=3, **steps)
    base = lr * 33 / 256 if protocol == 'fair' else lr
    weights = [p.detach().clone() for linear_ in run.heads.linears for p in (linear_.weight, linear_.bias)]
    first, buffers, history = [w.clone() for w in weights], [torch.zeros_like(w) for w in weights], []
    for epoch in range(3):
        total, right = 0.0, np.zeros(len(weights) // 2)
        for piece, rows in run.train_images.epoch(epoch):
            x = to_device(piece, CPU, run.backbone.mean, run.backbone.std)
            with torch.no_grad():
                five = protocol == 'mhead'
                flat = pooled(taps(run.backbone, x), adaptive=True) if five else [run.backbone.model(x)]
            labels, losses = torch.from_numpy(run.labels[0][rows]), []
            for w in weights:
                w.requires_grad_()
            for tap, f in enumerate(flat):
                if five:
                    f = f.reshape(len(f), run.shapes[tap][0], -1)  # (B, C, values)
                    f = (f - f.mean((0, 2), keepdim=True)) / (f.var((0, 2), False, keepdim=True) + 1e-5).sqrt()
                scores = f.flatten(1) @ weights[2 * tap].T + weights[2 * tap + 1]
                losses.append(-scores.log_softmax(1)[torch.arange(len(labels)), labels].mean())
                right[tap] += int((scores.argmax(1) == labels).sum())
            total += sum(losses).item() * len(labels)
            gradients = torch.autograd.grad(sum(losses), weights)
            with torch.no_grad():
                for i, g in enumerate(gradients):
                    weights[i], buffers[i] = _plain_step(
                        protocol, weights[i].detach(), g, buffers[i], base * rates[epoch])
        history.append((total / 100, right.tolist()))
    run.save = lambda: None
    run.train()
    ours = [p.detach() for linear_ in run.heads.linears for p in (linear_.weight, linear_.bias)]
    for a, b, start in zip(ours, weights, first, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float((b - start).abs().max()))
    for entry, (loss, right) in zip(run.history, history, strict=True):
        assert entry['loss'] == pytest.approx(loss, rel=1e-4) and entry['train_top1'] == pytest.approx(right)


@pytest.mark.parametrize('protocol', ['mmselfsup', 'mhead'])
def test_the_reported_accuracy_is_that_of_the_saved_classifiers(protocol, split_digits, tmp_path):
    linear.run(_args(split_digits, tmp_path, protocol, '--resize', '40', '--lr', '30' if protocol != 'mhead' else '.1'))
    (path,) = tmp_path.glob('*.pth')
    state, backbone = torch.load(path, weights_only=True)['heads'], load_backbone(MODEL)
    view = transforms.Compose([
        transforms.Resize(40), transforms.CenterCrop(32), transforms.ToTensor(),
        transforms.Normalize(backbone.mean, backbone.std)])
    classes = sorted(p.name for p in (split_digits / 'train').iterdir())
    files = sorted((split_digits / 'val').rglob('*.*'))
    x = torch.stack([view(Image.open(f).convert('RGB')) for f in files])
    labels = torch.tensor([classes.index(f.parent.name) for f in files])
    with torch.no_grad():
        flat = pooled(taps(backbone, x), adaptive=True) if protocol == 'mhead' else [backbone.model(x)]
    metrics = _record(tmp_path)['metrics']
    for tap, f in enumerate(flat):
        if protocol == 'mhead':
            mean, var = (state[f'norms.{tap}.running_{k}'][:, None] for k in ('mean', 'var'))
            f = ((f.reshape(len(f), len(mean), -1) - mean) / (var + 1e-5).sqrt()).flatten(1)
        scores = f @ state[f'linears.{tap}.weight'].T + state[f'linears.{tap}.bias']
        found = (scores.topk(5).indices == labels[:, None]).float()
        name = f'feature{tap + 1}' if protocol == 'mhead' else 'top1'
        five = f'{name}_top5' if protocol == 'mhead' else 'top5'
        one = 100 / len(files)  # PIL 13 moves some pixels by a level
        assert metrics[name] == pytest.approx(100 * float(found[:, 0].mean()), abs=one + 1e-4)
        assert metrics[five] == pytest.approx(100 * float(found.sum(1).mean()), abs=one + 1e-4)
        assert metrics[five] > 20  # so that a tenth of it is more than one image
