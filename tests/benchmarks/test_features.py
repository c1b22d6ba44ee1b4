"""Features: taps as the protocol pools them, pixels as torchvision makes them, files that survive a kill."""
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import warm
from conftest import ROOT, write_digits
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import transforms

from simsiam_models import cli, create_simsiam
from simsiam_models.benchmarks import feature_file, features
from simsiam_models.benchmarks.backbone import (
    compute_maps,
    has_protocol_sizes,
    load_backbone,
    pool_stages,
    weights_digest,
)
from simsiam_models.benchmarks.features import NAMES, Extraction, Features, Transform
from simsiam_models.benchmarks.samples import subset
from simsiam_models.data import DataError, FolderImages, MemoryImages, UnreadableError
from simsiam_models.data.readers.index import digest
from simsiam_models.data.readers.streams import WebStream
from simsiam_models.data.readers.tars import TarImages
from simsiam_models.weights import export_backbone

pytestmark = pytest.mark.usefixtures('one_thread')
SMALL = Transform(36, 32)


@pytest.fixture(scope='module')
def tiny():
    return load_backbone('resnet10t:random')


@pytest.fixture
def small_shards(monkeypatch):
    for module in (feature_file, features):
        monkeypatch.setattr(module, 'shard_rows', lambda n: 16)
    monkeypatch.setattr(features, 'CPU_BATCH', 8)


@pytest.fixture
def images(few_digits) -> FolderImages:
    return FolderImages(few_digits)


def extract(backbone, images, what=NAMES, transform=SMALL, cache=None, world=None, **options) -> Features:
    return features.extract(backbone, images, what, transform, Extraction(cache, **options), world)


def files(cache: Path) -> dict[str, bytes]:
    """The only tables in the cache."""
    folder, = (f for f in cache.iterdir() if f.is_dir())
    return {f.name: f.read_bytes() for f in sorted(folder.glob('*.npy'))}


def test_taps_are_the_maps_behind_stem_and_layers(tiny):
    seen = {}
    hooks = [getattr(tiny.model, name).register_forward_hook(
        lambda m, i, o, name=name: seen.__setitem__(name, o)) for name in
        ('act1', 'layer1', 'layer2', 'layer3', 'layer4')]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tiny.model(x)
        maps = compute_maps(tiny, x)
    for hook in hooks:
        hook.remove()
    assert [m.shape[-1] for m in maps] == [32, 16, 8, 4, 2]  # the first is before max-pool
    assert all(torch.equal(a, b) for a, b in zip(maps, seen.values(), strict=True))


def test_pools_of_a_resnet50_are_those_of_the_protocol():
    backbone = load_backbone('simsiam_resnet50:random')
    assert backbone.num_features == 2048 and not backbone.model.training
    with torch.no_grad():
        maps = compute_maps(backbone, torch.randn(1, 3, 224, 224))
    flat = pool_stages(maps)
    assert [x.shape[1] for x in flat] == [9216, 9216, 8192, 9216, 8192]
    table = {0: (10, 10, 4), 1: (16, 8, 0), 2: (13, 5, 0), 3: (8, 3, 0), 4: (6, 1, 0)}  # kernel, stride, padding
    for i, (kernel, stride, padding) in table.items():
        x = maps[i][0].double().numpy()
        channels, side = x.shape[0], x.shape[1]
        blank = np.zeros((channels, side + 2 * padding, side + 2 * padding))
        blank[:, padding:padding + side, padding:padding + side] = x
        out = (side + 2 * padding - kernel) // stride + 1
        expected = np.stack([
            blank[:, r * stride:r * stride + kernel, c * stride:c * stride + kernel].sum((1, 2)) / kernel**2
            for r in range(out) for c in range(out)], 1)  # the zeros around are counted
        np.testing.assert_allclose(flat[i][0].double().numpy(), expected.reshape(-1), atol=1e-6)


def test_other_sizes_are_pooled_only_where_that_is_asked_for(tiny):
    with torch.no_grad():
        maps = compute_maps(tiny, torch.randn(1, 3, 96, 96))
    assert not has_protocol_sizes(maps)
    with pytest.raises(ValueError, match='48x48.*--image-size 224'):
        pool_stages(maps)
    flat = pool_stages(maps, adaptive=True)
    assert [x.shape[1] for x in flat] == [64 * 144, 64 * 144, 128 * 64, 256 * 36, 512 * 9]
    ones = pool_stages([torch.ones(1, c, 112, 112) for c in (64, 256, 512, 1024, 2048)], adaptive=True)
    assert [x.shape[1] for x in ones] == [9216, 9216, 8192, 9216, 8192]


def test_other_networks_show_the_stages_that_they_have():
    backbone = load_backbone('test_convnext:random')
    with torch.no_grad():
        maps = compute_maps(backbone, torch.randn(1, 3, 64, 64))
    assert len(maps) == 4 and len(pool_stages(maps, adaptive=True)) == 4


class Photo:
    """One image."""

    name, labels, classes, digest = 'photo', None, [], '0' * 16

    def __init__(self, image: Image.Image) -> None:
        self.image = image

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> np.ndarray:
        return np.asarray(self.image)


def resized(image: Image.Image, height: int, width: int) -> Image.Image:
    """Along the rows first: PIL before its release 13 does that by itself, later releases choose an order."""
    rows = transforms.Resize((image.height, width))(image)
    return transforms.Resize((height, width))(rows)


def short_side_256(image: Image.Image) -> Image.Image:
    like = transforms.Resize(256)(image)
    return resized(image, like.height, like.width)


@pytest.mark.parametrize('kind, ours', [
    ('center', transforms.CenterCrop(224)), ('squash', lambda image: resized(image, 224, 224))])
@pytest.mark.parametrize('size', [(500, 375), (333, 500), (256, 300), (90, 61), (1000, 257)])
def test_pixels_are_torchvisions(kind, ours, size, tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8))
    seen = []

    class Model(nn.Module):
        num_features = 1

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            seen.append(x.clone())
            return x.mean((1, 2, 3))[:, None]

    backbone = load_backbone('simsiam_resnet18_cifar:random')
    backbone.model = Model().eval()
    extract(backbone, Photo(image), ['avgpool'], Transform(kind=kind), tmp_path, workers=0)
    to = [short_side_256, ours, transforms.ToTensor(), transforms.Normalize(
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    assert torch.equal(seen[-1][0], transforms.Compose(to)(image))


@pytest.mark.parametrize('kwargs', [{'kind': 'crop'}, {'resize': 100}, {'crop': 0, 'kind': 'squash'}])
def test_a_transform_that_cannot_be_is_refused(kwargs):
    with pytest.raises(ValueError):
        Transform(**kwargs)


def test_features_are_those_of_the_model(tiny, images, tmp_path):
    found = extract(tiny, images, NAMES, SMALL, tmp_path)
    assert len(found) == 64 and found.made == 64 and (found.labels == images.labels).all()
    to = transforms.Compose([
        transforms.Resize(36), transforms.CenterCrop(32), transforms.ToTensor(),
        transforms.Normalize(tiny.mean, tiny.std)])
    with torch.no_grad():
        x = torch.stack([to(Image.fromarray(images.read(i))) for i in range(64)])
        expected = [tiny.model(x), *pool_stages(compute_maps(tiny, x), adaptive=True)]
    for name, y in zip(NAMES, expected, strict=True):
        array = found.array(name)
        assert isinstance(array, np.memmap) and array.dtype == np.float32 and array.std() > 0
        np.testing.assert_allclose(array, y, atol=1e-5)
        np.testing.assert_array_equal(found.rows(name, [5, 2]), array[[5, 2]])
    with pytest.raises(ValueError, match='feat9'):
        found.array('feat9')


def test_a_second_run_reads_no_image(tiny, images, tmp_path, small_shards, monkeypatch):
    first = extract(tiny, images, ['avgpool', 'feat5'], SMALL, tmp_path)
    before = files(tmp_path)
    read, seen = FolderImages.read, []
    monkeypatch.setattr(FolderImages, 'read', lambda self, i: seen.append(i) or read(self, i))
    again = extract(tiny, images, ['feat5'], SMALL, tmp_path)
    assert seen == [63 * i // 15 for i in range(16)]  # whether they are the same pixels
    assert again.made == 0 and again.digest == first.digest and files(tmp_path) == before


def test_what_is_added_later_is_what_one_pass_gives(tiny, images, tmp_path, small_shards):
    extract(tiny, images, ['avgpool'], SMALL, tmp_path / 'a')
    added = extract(tiny, images, ['avgpool', 'feat4'], SMALL, tmp_path / 'a')
    extract(tiny, images, ['feat4', 'avgpool'], SMALL, tmp_path / 'b')
    assert added.made == 64 and files(tmp_path / 'a') == files(tmp_path / 'b')


@pytest.mark.parametrize('workers, batch', [(0, 256), (3, 8)])
def test_workers_change_no_bit(tiny, images, tmp_path, small_shards, workers, batch):
    extract(tiny, images, ['avgpool'], SMALL, tmp_path / 'a', workers=1)
    extract(tiny, images, ['avgpool'], SMALL, tmp_path / 'b', workers=workers, batch_size=batch)
    assert files(tmp_path / 'a') == files(tmp_path / 'b')


def test_the_key_changes_with_weights_data_transform_and_precision(tiny, images, tmp_path):
    def key(backbone=tiny, data=images, transform=SMALL, **kwargs):
        return extract(backbone, data, ['avgpool'], transform, tmp_path, **kwargs).digest

    pixels = np.stack([images.read(i) for i in range(8)])
    some = MemoryImages(pixels, None, [], 'some')
    other = load_backbone('resnet10t:random')
    with torch.no_grad():
        other.model.layer4[0].conv2.weight[0, 0, 0, 0] += 1e-6
    other.digest = weights_digest(other.model)
    dilated = load_backbone('resnet10t:random', output_stride=8)
    assert dilated.digest == tiny.digest  # the same numbers, another network
    turned = load_backbone('resnet10t:random')
    turned.mean = turned.mean[::-1]
    pixels2 = pixels.copy()
    pixels2[3, 1, 1, 0] ^= 1
    other_pixels = write_digits(tmp_path / 'other', 64)
    for file in other_pixels.rglob('*.*g'):
        Image.open(file).rotate(90).save(file)  # the same names, other pixels
    assert FolderImages(other_pixels).digest == images.digest
    keys = [key(), key(other), key(dilated), key(turned), key(data=some),
            key(data=MemoryImages(pixels2, None, [], 'some')), key(transform=Transform(40, 32)),
            key(transform=Transform(36, 32, 'squash')), key(transform=Transform(36, 36)), key(amp='bfloat16'),
            key(data=FolderImages(other_pixels))]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0] == key(amp='off') == key(batch_size=3)


CHILD = '''
import os, signal, sys, time
import torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from simsiam_models.benchmarks import feature_file, features
from simsiam_models.benchmarks.backbone import load_backbone
from simsiam_models.data import FolderImages
from simsiam_models.runtime.distributed import join_world
torch.set_num_threads(1)
feature_file.shard_rows = features.shard_rows = lambda n: 16
features.CPU_BATCH = 8
data, cache, delay = sys.argv[1:]
class Slow(FolderImages):
    def read(self, index):
        time.sleep(float(delay))
        return super().read(index)
with join_world('cpu') as world:
    found = features.extract(
        load_backbone('resnet10t:random'), Slow(data), ['avgpool', 'feat3'], features.Transform(36, 32),
        features.Extraction(cache, workers=1), world)
    print(f'made {found.made}', flush=True)
'''


def child(*args, launcher=()) -> subprocess.Popen:
    return subprocess.Popen(
        [warm.python(), *launcher, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': str(ROOT)})


@pytest.mark.parametrize('after, number', [(1, signal.SIGKILL), (3, signal.SIGKILL), (1, signal.SIGINT)])
def test_after_a_kill_it_goes_on_to_the_same_bytes(tiny, few_digits, tmp_path, small_shards, after, number):
    extract(tiny, FolderImages(few_digits), ['avgpool', 'feat3'], SMALL, tmp_path / 'whole')
    (tmp_path / 'child.py').write_text(CHILD)
    process = child(tmp_path / 'child.py', few_digits, tmp_path / 'killed', 0.08)  # slow enough to be killed in time
    try:
        end = time.monotonic() + 60
        while len(list((tmp_path / 'killed').glob('*/feat3.shards/?'))) < after:
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.002)
    finally:
        process.send_signal(number)
        process.communicate(timeout=60)  # no thread holds it up
    assert number == signal.SIGKILL or not list((tmp_path / 'killed').rglob('*.part'))
    assert files(tmp_path / 'killed') != files(tmp_path / 'whole')
    rest = extract(tiny, FolderImages(few_digits), ['avgpool', 'feat3'], SMALL, tmp_path / 'killed')
    assert 0 < rest.made <= 64 - 16 * after
    assert files(tmp_path / 'killed') == files(tmp_path / 'whole')


def test_two_processes_make_the_features_of_one(tiny, few_digits, tmp_path, small_shards):
    extract(tiny, FolderImages(few_digits), ['avgpool', 'feat3'], SMALL, tmp_path / 'one')
    (tmp_path / 'child.py').write_text(CHILD)
    process = child(
        tmp_path / 'child.py', few_digits, tmp_path / 'two', 0, launcher=(
            '-m', 'torch.distributed.run', '--standalone', '--local-addr', '127.0.0.1', '--nproc-per-node', '2'))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count('made 64') == 2
    assert files(tmp_path / 'two') == files(tmp_path / 'one')


def test_of_a_few_hundred_images_most_are_kept_where_it_is_stopped(tiny, tmp_path, monkeypatch):
    images = MemoryImages(np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), np.uint8), None, [], 'some')
    read = MemoryImages.read

    def stop(self, index):
        if index == 270:
            raise KeyboardInterrupt
        return read(self, index)

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(MemoryImages, 'read', stop)
        extract(tiny, images, ['avgpool'], SMALL, tmp_path)
    assert extract(tiny, images, ['avgpool'], SMALL, tmp_path).made == 300 - 256
    assert [feature_file.shard_rows(n) for n in (8191, 8192)] == [128, 1024]  # of many images, larger ones cost less


@pytest.mark.parametrize('kind', ['folder', 'subset', 'tar'])
def test_an_image_exchanged_under_its_name_is_noticed(tiny, tmp_path, small_shards, kind):
    data = write_digits(tmp_path / 'data', 64)

    def opened(root):
        images = FolderImages(root)
        if kind == 'tar':
            with tarfile.open(root / 'x.tar', 'w') as tar:
                for i in range(64):
                    tar.add(images.path(i), images.path(i).name)
            return TarImages([root / 'x.tar'], 'x')
        return subset(images, range(8, 64)) if kind == 'subset' else images

    first = extract(tiny, opened(data), ['avgpool'], SMALL, tmp_path / 'cache')
    shutil.copytree(data, tmp_path / 'copy', copy_function=shutil.copyfile)  # with other times
    copied = extract(tiny, opened(tmp_path / 'copy'), ['avgpool'], SMALL, tmp_path / 'cache')
    assert copied.made == 0 and copied.digest == first.digest
    file = FolderImages(data).path(28)  # none that pixels_digest samples, of neither kind
    before = file.stat().st_size
    Image.open(file).rotate(90).save(file)
    assert file.stat().st_size != before
    again = extract(tiny, opened(data), ['avgpool'], SMALL, tmp_path / 'cache')
    assert again.made == 16 and again.digest != first.digest and again.folder == first.folder
    extract(tiny, opened(data), ['avgpool'], SMALL, tmp_path / 'fresh')
    assert files(tmp_path / 'cache') == files(tmp_path / 'fresh')


@pytest.mark.parametrize('call, after, where', [
    ('mkdir', 0, ''), ('fsync', 0, ''), ('pwrite', 0, '/avgpool.npy'), ('pwrite', 5, '/avgpool.npy'),
    ('fsync', 2, '/avgpool.npy'), ('fsync', 3, '/avgpool.npy')])  # the last: of a mark
def test_a_full_disk_is_told_with_the_file_and_what_to_do(
        tiny, images, tmp_path, small_shards, monkeypatch, call, after, where):
    calls, do = [], getattr(os, call)

    def full(*args):
        calls.append(args)
        if len(calls) > after:
            raise OSError(28, 'No space left on device')
        return do(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        text = rf'--cache: {re.escape(str(tmp_path))}/cache/[0-9a-f]{{16}}{where}.* \(No space left on device\); make'
        with pytest.raises(OSError, match=text):
            extract(tiny, images, ['avgpool'], SMALL, tmp_path / 'cache')
    for cache in ('cache', 'fresh'):
        extract(tiny, images, ['avgpool'], SMALL, tmp_path / cache)
    assert files(tmp_path / 'cache') == files(tmp_path / 'fresh')


@pytest.mark.parametrize('harm', ['truncate', 'flip', 'empty', 'mark', 'head', 'remove'])
def test_a_damaged_table_is_found_and_made_again(tiny, images, tmp_path, small_shards, harm):
    extract(tiny, images, ['avgpool'], SMALL, tmp_path)
    before = files(tmp_path)
    table, = tmp_path.glob('*/avgpool.npy')
    data = bytearray(table.read_bytes())
    row = feature_file.HEAD + 4 * 512 * 40  # in the third shard of four
    if harm == 'truncate':
        data = data[:row]
    elif harm == 'flip':
        data[row] ^= 1
    elif harm == 'empty':
        data = b''
    elif harm == 'head':
        data[70] ^= 1
    elif harm == 'mark':
        (table.parent / 'avgpool.shards' / '2').write_text('{"crc32": ')
    table.write_bytes(data)
    if harm == 'remove':
        table.unlink()
    again = extract(tiny, images, ['avgpool'], SMALL, tmp_path)
    assert again.made == {'truncate': 32, 'flip': 16, 'mark': 16, 'head': 0, 'empty': 64, 'remove': 64}[harm]
    assert files(tmp_path) == before


@pytest.mark.parametrize('kind', ['mark', 'rows'])
def test_a_disk_that_fails_to_read_is_an_error_and_nothing_is_computed_again(
        tiny, images, tmp_path, small_shards, monkeypatch, kind):
    extract(tiny, images, ['avgpool'], SMALL, tmp_path)
    before, read_text, opened = files(tmp_path), Path.read_text, open

    def fail(*args, **kwargs):
        raise OSError(5, 'Input/output error')

    with monkeypatch.context() as patched:
        if kind == 'mark':
            patched.setattr(
                Path, 'read_text', lambda p, *a, **k: (fail if 'shards' in str(p) else read_text)(p, *a, **k))
        else:
            patched.setattr(
                feature_file, 'open', lambda p, mode, **k: (fail if mode == 'rb' else opened)(p, mode, **k),
                raising=False)
        name = 'avgpool.shards/[0-3]' if kind == 'mark' else 'avgpool.npy'
        text = rf'--cache: .*{name} cannot be read \(Input/output error\); nothing is changed'
        with pytest.raises(OSError, match=text):
            extract(tiny, images, ['avgpool'], SMALL, tmp_path)
    again = extract(tiny, images, ['avgpool'], SMALL, tmp_path)
    assert again.made == 0 and files(tmp_path) == before


def test_an_unreadable_image_is_named_and_refused(tiny, tmp_path, small_shards):
    data = write_digits(tmp_path / 'data', 40)
    source = FolderImages(data)
    broken = source.path(22)
    good = broken.read_bytes()
    broken.write_bytes(b'no image')
    for _ in range(2):  # from the cache too
        with pytest.raises(DataError, match=rf'1 of 40 images cannot be read \({broken}.*--allow-partial'):
            extract(tiny, source, ['avgpool'], SMALL, tmp_path / 'cache')
    found = extract(tiny, source, ['avgpool'], SMALL, tmp_path / 'cache', partial=True)
    assert found.made == 0 and list(found.unreadable) == [22]
    assert found.readable.tolist() == [i for i in range(40) if i != 22]
    broken.write_bytes(good)
    repaired = extract(tiny, source, ['avgpool'], SMALL, tmp_path / 'cache')
    assert repaired.made == 16 and not repaired.unreadable
    extract(tiny, source, ['avgpool'], SMALL, tmp_path / 'fresh')
    assert files(tmp_path / 'cache') == files(tmp_path / 'fresh')


def test_data_that_went_away_end_the_run_early(tiny, images, tmp_path, monkeypatch):
    def gone(self, index):
        raise UnreadableError(f'{self.path(index)}: gone')

    monkeypatch.setattr(FolderImages, 'read', gone)
    with pytest.raises(DataError, match='64 of 64 images in a row'):
        extract(tiny, images, ['avgpool'], SMALL, tmp_path, partial=True)


def test_features_that_are_not_finite_are_refused(images, tmp_path):
    backbone = load_backbone('resnet10t:random')
    with torch.no_grad():
        backbone.model.layer4[0].conv2.weight[0, 0, 1, 1] = float('nan')
    with pytest.raises(ValueError, match='avgpool of images 0 to 7 is not finite'):
        extract(backbone, images, ['avgpool'], SMALL, tmp_path)


def test_what_cannot_be_done_is_said_in_one_sentence(tiny, images, tmp_path):
    for match, kwargs in {
        'choose from avgpool': {'what': ['feat6']}, '--amp int8': {'amp': 'int8'}, '--batch-size 0': {'batch_size': 0},
        'does not run on images of 8 px': {'backbone': load_backbone('test_vit:random'), 'transform': Transform(8, 8)},
        'maps of 4 stages': {'backbone': load_backbone('test_convnext:random'), 'what': ['feat5']},
    }.items():
        arguments = {'backbone': tiny, 'images': images, 'what': ['avgpool'], 'transform': SMALL, 'cache': tmp_path}
        with pytest.raises(ValueError, match=match):
            extract(**{**arguments, **kwargs})
    with pytest.raises(ValueError, match='is a stream'):
        extract(tiny, WebStream('pipe:cat x.tar', 10), ['avgpool'], SMALL, tmp_path)


def test_backbones_come_from_every_kind_of_place(tmp_path):
    torch.manual_seed(3)
    model = create_simsiam('resnet18', dim=16, pred_dim=4, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8)).eval()
    export_backbone(model.backbone, tmp_path / 'run' / 'backbone', 'resnet18', {
        'layers': [1, 1, 1, 1], 'channels': [8, 8, 8, 8]})
    torch.save({'model': model.state_dict()}, tmp_path / 'run' / 'checkpoint.pth')
    (tmp_path / 'run' / 'args.json').write_text(json.dumps({
        'model': 'resnet18', 'model_args': {'layers': [1, 1, 1, 1], 'channels': [8, 8, 8, 8]}}))
    expected = weights_digest(model.backbone)
    folder = tmp_path / 'run'
    for name in (folder, folder / 'backbone', f'local-dir:{folder / "backbone"}', folder / 'checkpoint.pth'):
        backbone = load_backbone(str(name))
        assert backbone.digest == expected and backbone.tag is None
        assert backbone.num_features == 8 and backbone.name == str(name)
        assert not any(p.requires_grad for p in backbone.model.parameters())
    whole = timm.create_model('simsiam_resnet18_cifar')
    torch.save(whole.state_dict(), tmp_path / 'cifar.pth')
    assert load_backbone(str(tmp_path / 'cifar.pth')).digest == weights_digest(whole)


def test_weights_that_fill_no_network_are_refused(tmp_path):
    model = timm.create_model('resnet18', num_classes=0)
    export_backbone(model, tmp_path / 'x', 'resnet18')
    state = load_file(tmp_path / 'x' / 'model.safetensors')
    del state['layer3.0.conv1.weight']
    save_file(state, tmp_path / 'x' / 'model.safetensors')
    with pytest.raises(RuntimeError, match='layer3.0.conv1.weight'):
        load_backbone(f'local-dir:{tmp_path / "x"}')
    torch.save(state, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match='fill none of'):
        load_backbone(str(tmp_path / 'x.pth'))
    for name, match in {
        'nonsense': 'neither a model of timm', 'resnet18:randomly': 'neither',
        'nonsense:random': r'Unknown model .*; timm.list_models\(\)',
        'resnet18.odd': r'tag .*; timm.list_pretrained\(\)', f'{tmp_path}': 'neither config.json',
        'local-dir:/nowhere': 'no config.json', __file__: 'cannot be read',
    }.items():
        with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match=match) as e:
            load_backbone(name)
        assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='num_classes=10'):
        load_backbone('resnet18:random', num_classes=10)


def test_a_damaged_or_odd_export_is_one_sentence(tmp_path):
    model = timm.create_model('resnet10t', num_classes=0)
    export_backbone(model, tmp_path / 'x', 'resnet10t')
    weights, config = tmp_path / 'x' / 'model.safetensors', tmp_path / 'x' / 'config.json'
    good, said = weights.read_bytes(), json.loads(config.read_text())
    flipped = bytearray(good)
    flipped[-100] ^= 1
    for data in (bytes(flipped), good[:5000]):
        weights.write_bytes(data)
        for name in (str(tmp_path / 'x'), f'local-dir:{tmp_path / "x"}', str(weights)):
            with pytest.raises(ValueError, match='model.safetensors: it is damaged or was cut off'):
                load_backbone(name)
    weights.write_bytes(good)
    for change in ({'mean': 5}, {'mean': 'abc'}, {'std': [1, 0, 1]}, {'std': [1, float('nan'), 1]}, {'tag': ['a']}):
        config.write_text(json.dumps({**said, 'pretrained_cfg': {**said['pretrained_cfg'], **change}}))
        if 'tag' in change:
            assert load_backbone(str(tmp_path / 'x')).tag is None
            continue
        with pytest.raises(ValueError, match='three numbers are needed'):
            load_backbone(str(tmp_path / 'x'))


@pytest.mark.parametrize('mark', ['{"999": "x"}', '{"-1": "x"}', '[' * 100_000])
def test_a_mark_of_a_shard_that_names_other_images_is_not_believed(mark, tiny, images, tmp_path, small_shards):
    first = extract(tiny, images, ['avgpool'], SMALL, tmp_path)
    file = first.folder / 'avgpool.shards' / '0'
    text = json.loads(file.read_text())
    file.write_text(mark if mark[0] == '[' else json.dumps({**text, 'unreadable': json.loads(mark)}))
    again = extract(tiny, images, ['avgpool'], SMALL, tmp_path)
    assert again.made == 16 and not again.unreadable


def test_features_of_networks_that_took_rgb_keep_their_folder_and_others_lose_it():
    """An earlier version hashed whether the network took BGR, too; then the same weights meant other pixels."""
    backbone = load_backbone('resnet10t:random')
    before = [digest(backbone.digest, f'{backbone.model} {backbone.model.global_pool}',
                     json.dumps([bgr, backbone.mean, backbone.std])) for bgr in (False, True)]
    assert backbone.identity == before[0] != before[1]


def test_a_random_backbone_is_always_the_same_and_leaves_the_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = load_backbone('resnet10t:random')
    assert torch.equal(torch.rand(1), expected)
    assert first.digest == load_backbone('resnet10t:random').digest


def test_embed_writes_features_paths_labels_and_pictures(few_digits, tmp_path, capsys):
    common = [
        'embed', str(few_digits), '--model', 'resnet10t:random', '--image-size', '32', '--resize', '36', '--device',
        'cpu', '--cache', str(tmp_path / 'cache'), '--what', 'avgpool', 'feat2', '--out']
    pytest.importorskip('matplotlib')
    assert cli.main([*common, str(tmp_path / 'x.npz'), '--tsne']) == 0
    source = FolderImages(few_digits)
    with np.load(tmp_path / 'x.npz') as table:
        assert table['avgpool'].shape == (64, 512) and table['feat2'].shape[0] == 64
        assert (table['labels'] == source.labels).all() and table['classes'].tolist() == source.classes
        assert table['paths'].tolist() == [str(source.path(i)) for i in range(64)]
        kept = table['avgpool']
    for name in ('x-avgpool.png', 'x-feat2.png'):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (1000, 1000) and len(picture.convert('RGB').getcolors(1 << 20)) > 10
    assert cli.main([*common, str(tmp_path / 'folder')]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / 'folder' / 'avgpool.npy'), kept)
    assert len(json.loads((tmp_path / 'folder' / 'images.json').read_text())['paths']) == 64
    assert cli.main([*common, str(tmp_path / 'x.npy')]) == 1
    assert 'x.npy: a .npy file holds one feature, not 2; name a folder or a .npz\n' in capsys.readouterr().err


def test_the_tsne_is_scikit_learns_with_the_published_parameters():
    from sklearn.manifold import TSNE

    from simsiam_models.benchmarks.tsne import compute_tsne

    x = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
    expected = TSNE(
        n_components=2, perplexity=30, early_exaggeration=12, learning_rate=200, max_iter=1000,
        n_iter_without_progress=300, init='random', random_state=0).fit_transform(x)
    np.testing.assert_array_equal(compute_tsne(x), expected)
    with pytest.raises(ValueError, match='30 images are too few: a t-SNE of perplexity 30'):
        compute_tsne(x[:30])


def test_progress_is_one_line_where_there_is_no_terminal(tiny, images, tmp_path, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(sys, 'stderr', said)
    extract(tiny, images, ['avgpool'], SMALL, tmp_path)
    assert said.getvalue().count('\n') == 1 and '64 images in' in said.getvalue() and 'images/s' in said.getvalue()
