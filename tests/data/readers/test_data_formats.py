"""The same images in every format give the same views, bit for bit; wrong input ends in one sentence."""
import csv
import functools
import gzip
import http.server
import importlib.util
import io
import json
import os
import shutil
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_digits
from PIL import Image

from simsiam_models.data import (
    Augmentation,
    DataError,
    FolderImages,
    MemoryImages,
    Stream,
    TwoViews,
    UnreadableError,
    open_data,
)
from simsiam_models.data.readers import streams as streams_module

AUG = Augmentation(size=16)
BATCH = 16
HAS = {name: importlib.util.find_spec(name) is not None for name in ('datasets', 'webdataset')}
if HAS['datasets']:
    import datasets
needs_datasets = pytest.mark.skipif(not HAS['datasets'], reason="needs the datasets library: pip install '.[data]'")
needs_webdataset = pytest.mark.skipif(
    not HAS['webdataset'], reason="needs the webdataset library: pip install '.[data]'")
ONE_SENTENCE = (ValueError, FileNotFoundError, RuntimeError, OSError)
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True, scope='module')
def caches(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as m:
        m.setenv('SIMSIAM_CACHE', str(tmp_path_factory.mktemp('cache')))
        if HAS['datasets']:
            m.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path_factory.mktemp('hf'))
            m.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
            m.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
            # It waits 5 seconds after each Parquet stream.
            m.setattr(datasets.config, 'SLEEP_TIME_ON_THREADS_SHUTDOWN', 0.05, raising=False)
            datasets.disable_progress_bars()
        yield


Sample = tuple[str, bytes, int]  # name relative to the folder, bytes of the file, label


def samples_of(folder: Path) -> list[Sample]:
    images = FolderImages(folder)
    return [(images.path(i).relative_to(folder).as_posix(), images.path(i).read_bytes(), int(images.labels[i]))
            for i in range(len(images))]


def write_text(root: Path, samples: list[Sample], sep: str = ' ', labels: bool = True) -> str:
    write_files(root, samples)
    lines = [f'{name}{sep}{label}' if labels else name for name, _, label in samples]
    (root / 'list.txt').write_text('\n'.join(lines) + '\n')
    return str(root / 'list.txt')


def write_files(root: Path, samples: list[Sample]) -> Path:
    for name, data, _ in samples:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_csv(root: Path, samples: list[Sample]) -> str:
    write_files(root / 'im, ages', samples)
    with open(root / 'list.csv', 'w', newline='') as f:
        table = csv.writer(f)
        table.writerow(['id', 'class', 'filename'])
        table.writerows([i, f'class {label}', f'im, ages/{name}'] for i, (name, _, label) in enumerate(samples))
    return str(root / 'list.csv')


def write_places(root: Path, samples: list[Sample]) -> str:
    write_files(root, samples)
    (root / 'list.csv').write_text(''.join(f'{name},{label}\n' for name, _, label in samples))
    return str(root / 'list.csv')


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path: Path, samples: list[Sample], labels: bool = True, form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w', format=form) as tar:
        for name, data, label in samples:
            if labels:
                add(tar, name.rpartition('.')[0] + '.cls', str(label).encode())
            add(tar, name, data)
    return path


def write_tars(root: Path, samples: list[Sample], labels: bool = True, name: str = 'shard-') -> str:
    for k, part in enumerate(np.array_split(np.arange(len(samples)), 3)):
        write_tar(root / f'{name}{k:03}.tar', [samples[i] for i in part], labels)
    return str(root)


def table(samples: list[Sample], names: bool = True) -> 'datasets.Dataset':
    classes = [str(i) for i in range(10)]
    label = datasets.ClassLabel(names=classes) if names else datasets.Value('int64')
    rows = {'image': [{'bytes': data, 'path': name} for name, data, _ in samples], 'label': [y for *_, y in samples]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features({'image': datasets.Image(), 'label': label}))


def write_saved(root: Path, samples: list[Sample]) -> str:
    table(samples).save_to_disk(root, num_shards=2)
    return str(root)


def write_parquet(root: Path, samples: list[Sample], prefix: str = 'part') -> str:
    root.mkdir(parents=True, exist_ok=True)
    rows = table(samples)
    for k in range(3):
        rows.shard(3, k, contiguous=True).to_parquet(root / f'{prefix}-{k:05}.parquet')
    return str(root)


def write_plain_parquet(root: Path, samples: list[Sample]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq
    root.mkdir(parents=True)
    pq.write_table(pa.table({'jpg': [d for _, d, _ in samples], 'label': [y for *_, y in samples]}), root / 'a.parquet')
    return str(root / 'a.parquet')


def write_country(root: Path, samples: list[Sample]) -> str:
    write_files(root / 'country211/train', samples)
    return f'torchvision:Country211:{root}'


def write_food(root: Path, samples: list[Sample]) -> str:
    """Its names all end in .jpg, whatever is in the files."""
    write_files(root / 'food-101/images', [(name.rpartition('.')[0] + '.jpg', data, y) for name, data, y in samples])
    split: dict[str, list[str]] = {}
    for name, *_ in samples:
        split.setdefault(name.split('/')[0], []).append(name.rpartition('.')[0])
    (root / 'food-101/meta').mkdir()
    (root / 'food-101/meta/train.json').write_text(json.dumps(split))
    return f'torchvision:Food101:{root}'


FORMATS: dict[str, Callable[[Path, list[Sample]], str]] = {
    'list.txt': write_text,
    'list.csv': write_csv,
    'list.csv without a header': write_places,
    'tar shards': write_tars,
    'tar pattern': lambda root, samples: write_tars(root, samples) + '/shard-{000..002}.tar',
    'tar glob': lambda root, samples: write_tars(root, samples) + '/*.tar',
    'one tar': lambda root, samples: str(write_tar(root / 'a.tar', samples)),
    'save_to_disk': write_saved,
    'parquet': write_parquet,
    'parquet pattern': lambda root, samples: write_parquet(root, samples) + '/part-*.parquet',
    'parquet of plain bytes': write_plain_parquet,
    'hf: parquet': lambda root, samples: f'hf:{write_parquet(root, samples)}',
    'arrow file': lambda root, samples: write_saved(root, samples) + '/data-{00000..00001}-of-00002.arrow',
    'torchvision ImageFolder': write_country,
    'torchvision Food101': write_food,
}


HUGGING = {
    'save_to_disk', 'parquet', 'parquet pattern', 'parquet of plain bytes', 'hf: parquet', 'arrow file', 'arrow',
    'garbage parquet', 'garbage arrow', 'empty parquet', 'a truncated arrow file', 'a table without images',
    'a table without rows', 'a saved set without its files', 'no Hub', 'no Hub for a stream',
    'a stream of an empty folder', 'a split that is not there', 'datasets'}


def cases(names) -> list:
    return [pytest.param(name, marks=needs_datasets) if name in HUGGING else
            pytest.param(name, marks=needs_webdataset) if name == 'pipe' else name for name in names]


@pytest.fixture(scope='module')
def samples(few_digits) -> list[Sample]:
    return samples_of(few_digits)


@pytest.fixture(scope='module')
def made(tmp_path_factory, samples) -> dict[str, str]:
    return {name: write(tmp_path_factory.mktemp('format') / 'data', samples) for name, write in FORMATS.items()
            if HAS['datasets'] or name not in HUGGING}


def views(source, rank: int = 0, world: int = 1, start: int = 0, epoch: int = 1, **how) -> list[torch.Tensor]:
    """(2, B / world, 3, S, S) of each step."""
    loader = TwoViews(source, AUG, BATCH, seed=5, rank=rank, world=world, **how)
    return [torch.stack(pair) for pair in loader.epoch(epoch, start)]


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def together(source, world: int, **how) -> list[torch.Tensor]:
    parts = [views(source, rank, world, **how) for rank in range(world)]
    return [torch.cat(step, 1) for step in zip(*parts, strict=True)]


# One stream of views from every format


@pytest.mark.parametrize('name', cases(FORMATS))
def test_every_format_gives_the_views_and_labels_of_the_folder(few_digits, made, name):
    folder, (source, val) = FolderImages(few_digits), open_data(made[name])
    assert val is None and len(source) == len(folder) == 64
    assert source.labels.tolist() == folder.labels.tolist()
    assert len(source.classes) == 10
    want = views(folder)
    assert len(want) == 4 and not torch.equal(want[0], want[1])
    for world, workers in ((1, 0), (1, 2), (2, 0), (2, 2)):
        assert same(together(source, world, workers=workers), want)
    assert same(views(source, start=2, workers=2), want[2:])


def test_a_folder_and_the_demonstration_are_opened_as_before(few_digits):
    source, val = open_data(few_digits)
    assert isinstance(source, FolderImages) and val is None
    for spec in (None, 'demo'):
        train, val = open_data(spec)
        assert (len(train), len(val)) == (3000, 768)


def cifar(folder: Path, pixels: np.ndarray, labels: np.ndarray, names: list[str], head: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    records = np.concatenate(
        [np.zeros((len(pixels), head - 1), np.uint8), labels[:, None].astype(np.uint8),
         pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)], 1)
    for name, part in zip(names, np.array_split(records, len(names)), strict=True):
        (folder / name).write_bytes(part.tobytes())


@pytest.fixture(scope='module')
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize('where', ['.', 'cifar-10-batches-bin'])
def test_binary_cifar10_is_that_of_png_files(tmp_path, pixels, where, caplog):
    labels = np.arange(40) % 10
    folder = tmp_path / 'cifar' / where
    cifar(folder, pixels, labels, [f'data_batch_{i}.bin' for i in range(1, 6)])
    cifar(folder, pixels[:10], labels[:10], ['test_batch.bin'])
    (folder / 'batches.meta.txt').write_text('\n'.join(f'name {i}' for i in range(10)) + '\n\n')
    (tmp_path / 'png').mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f'png/{i:02}.png')
    train, val = open_data(tmp_path / 'cifar')
    assert (len(train), len(val)) == (40, 10)
    assert train.labels.tolist() == labels.tolist() and train.classes[3] == 'name 3'
    assert '40 images found, 50000 expected' in caplog.text and '10 images found, 10000 expected' in caplog.text
    want = views(FolderImages(tmp_path / 'png'))
    for world, workers in ((1, 2), (2, 0)):
        assert same(together(train, world, workers=workers), want)
    assert np.array_equal(val.read(9), pixels[9])


def test_binary_cifar100_has_the_fine_labels(tmp_path, pixels):
    cifar(tmp_path, pixels, np.arange(40) + 60, ['train.bin'], head=2)
    train, val = open_data(tmp_path)
    assert val is None
    assert train.labels.tolist() == list(range(60, 100)) and len(train.classes) == 100
    assert np.array_equal(train.read(17), pixels[17])


def test_torchvisions_cifar10_and_mnist_are_read_by_name(tmp_path, pixels, monkeypatch):
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10
    folder = tmp_path / 'cifar-10-batches-py'
    folder.mkdir()
    data = {'data': pixels.transpose(0, 3, 1, 2).reshape(40, -1), 'labels': [i % 10 for i in range(40)]}
    for name in ('data_batch_1', 'test_batch', 'batches.meta'):
        what = data if name != 'batches.meta' else {'label_names': [f'c{i}' for i in range(10)]}
        (folder / name).write_bytes(pickle.dumps(what))
    md5 = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in folder.iterdir()}  # torchvision knows the real ones
    monkeypatch.setattr(CIFAR10, 'train_list', [('data_batch_1', md5['data_batch_1'])])
    monkeypatch.setattr(CIFAR10, 'test_list', [('test_batch', md5['test_batch'])])
    monkeypatch.setattr(CIFAR10, 'meta', {**CIFAR10.meta, 'md5': md5['batches.meta']})
    train, val = open_data(f'torchvision:CIFAR10:{tmp_path}')
    assert train.classes == [f'c{i}' for i in range(10)] and val.labels.tolist() == train.labels.tolist()
    assert same(views(train, workers=2), views(MemoryImages(pixels, None, [], 'array')))
    with pytest.raises(ValueError, match='read it as torchvision:CIFAR10:'):
        open_data(tmp_path)

    raw = tmp_path / 'MNIST/raw'
    raw.mkdir(parents=True)
    for part, n in (('train', 30), ('t10k', 20)):
        image_bytes = struct.pack('>4i', 2051, n, 32, 32) + pixels[:n, ..., 0].tobytes()
        (raw / f'{part}-images-idx3-ubyte').write_bytes(image_bytes)
        (raw / f'{part}-labels-idx1-ubyte').write_bytes(struct.pack('>2i', 2049, n) + bytes(range(10)) * (n // 10))
    train, val = open_data(f'torchvision:MNIST:{tmp_path}')
    assert (len(train), len(val)) == (30, 20)
    assert np.array_equal(train.read(3), np.repeat(pixels[3, ..., :1], 3, 2))


# Training and validation


@needs_datasets
def test_train_and_val_are_opened_together_in_every_format(tmp_path, samples):
    write_tars(tmp_path / 'tars/train', samples)
    write_tars(tmp_path / 'tars/val', samples[:9])
    write_tars(tmp_path / 'names', samples, name='in-train-')
    write_tars(tmp_path / 'names', samples[:9], name='in-validation-')
    write_parquet(tmp_path / 'tables/data', samples, 'train')
    write_parquet(tmp_path / 'tables/data', samples[:9], 'test')
    write_parquet(tmp_path / 'folders/train', samples)
    write_parquet(tmp_path / 'folders/val', samples[:9])
    datasets.DatasetDict(train=table(samples), test=table(samples[:9])).save_to_disk(tmp_path / 'saved')
    write_files(tmp_path / 'lists', samples)
    for name, part in (('train_a.txt', samples), ('val_a.txt', samples[:9])):
        (tmp_path / 'lists' / name).write_text(''.join(f'{n} {y}\n' for n, _, y in part))
    for spec in ('tars', 'names', 'tables', 'folders', 'saved', 'lists/train_a.txt'):
        train, val = open_data(tmp_path / spec)
        assert (len(train), len(val)) == (64, 9), spec
        assert val.labels.tolist() == [y for *_, y in samples[:9]], spec


def test_validation_without_labels_or_of_other_classes_is_of_no_use(tmp_path, samples):
    write_tars(tmp_path / 'a/train', samples)
    write_tars(tmp_path / 'a/val', samples[:9], labels=False)
    write_files(tmp_path / 'b', samples)
    (tmp_path / 'b/train.csv').write_text(''.join(f'{n},class {y}\n' for n, _, y in samples))
    (tmp_path / 'b/val.csv').write_text(''.join(f'{n},other {y}\n' for n, _, y in samples))
    for spec in ('a', 'b/train.csv'):
        assert open_data(tmp_path / spec)[1] is None


def test_images_win_over_archives_left_beside_them_and_the_log_says_so(tmp_path, samples, caplog):
    write_files(tmp_path, samples)
    write_tar(tmp_path / 'rest.tar', samples[:5])
    source, _ = open_data(tmp_path)
    assert isinstance(source, FolderImages) and len(source) == 64
    assert 'rest.tar' in caplog.text


# Labels are optional


@pytest.mark.parametrize('write', [
    lambda root, samples: write_text(root, samples, labels=False), lambda root, s: write_tars(root, s, labels=False),
], ids=['text', 'tar'])
def test_without_labels_the_views_are_the_same(tmp_path, few_digits, samples, write):
    source, _ = open_data(write(tmp_path / 'data', samples))
    assert source.labels is None and source.classes == []
    assert same(views(source), views(FolderImages(few_digits)))


def test_a_path_in_a_list_may_have_spaces_and_be_absolute(tmp_path, samples):
    write_files(tmp_path, [('a b/c 1.png', samples[1][1], 0), ('d.png', samples[3][1], 0)])
    (tmp_path / 'sub').mkdir()
    for text in ('../a b/c 1.png\n\n{}\n', '../a b/c 1.png \t 3\r\n{}\t0\n', '\ufeff../a b/c 1.png\n{}'):
        (tmp_path / 'sub/l.txt').write_text(text.format(tmp_path / 'd.png'))
        source, _ = open_data(tmp_path / 'sub/l.txt')
        assert len(source) == 2 and all(source.read(i).shape == (32, 32, 3) for i in range(2))
        assert (None if source.labels is None else source.labels.tolist()) == ([3, 0] if '3' in text else None)


def test_names_of_classes_in_a_csv_are_numbered_in_their_order(tmp_path, samples):
    write_files(tmp_path, [('1.png', samples[1][1], 0)])
    (tmp_path / 'l.csv').write_text('Label,Image\nzebra,1.png\n"ant, red",1.png\nzebra,1.png\n')
    source, _ = open_data(tmp_path / 'l.csv')
    assert source.classes == ['ant, red', 'zebra'] and source.labels.tolist() == [1, 0, 1]


@needs_datasets
def test_an_arrow_table_without_whole_labels_has_none(tmp_path, samples):
    for name, labels in (('null', [1, None]), ('negative', [1, -1])):
        rows = {'image': [{'bytes': samples[i][1], 'path': None} for i in (1, 3)], 'label': labels}
        features = datasets.Features({'image': datasets.Image(), 'label': datasets.Value('int64')})
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / name)
        assert open_data(tmp_path / name)[0].labels is None


# Tar


@pytest.mark.parametrize('form', [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_other_members_of_a_tar_are_understood(tmp_path, samples, form):
    long = 'très long/' + 'x' * 150 + '/' + 'y' * 120
    few = [(f'{long}{i}.png', samples[2 * i + 1][1], i) for i in range(3)]
    write_tar(tmp_path / 'a.tar', few, form=form)
    with tarfile.open(tmp_path / 'a.tar', 'a') as tar:
        add(tar, 'x/._y.png', b'a Mac leaves these')
        add(tar, 'readme.txt', b'text')
        add(tar, '0001.json', b'{}')
    source, _ = open_data(tmp_path / 'a.tar')
    assert len(source) == 3 and source.labels.tolist() == [0, 1, 2]
    assert all(np.array_equal(source.read(i), np.asarray(Image.open(io.BytesIO(few[i][1])).convert('RGB')))
               for i in range(3))


def test_a_shard_is_indexed_once_and_again_after_a_change(tmp_path, samples, monkeypatch):
    from simsiam_models.data.readers import tars
    scans, scan = [], tars._scan
    monkeypatch.setattr(tars, '_scan', lambda *a: scans.append(a) or scan(*a))
    write_tars(tmp_path, samples)
    for path in tmp_path.iterdir():
        os.utime(path, (1e9, 1e9))
    for _ in range(2):
        source, _ = open_data(tmp_path)
    assert len(scans) == 1
    write_tar(tmp_path / 'shard-001.tar', samples[:5])
    os.utime(tmp_path / 'shard-001.tar', (1e9, 1e9))
    assert len(open_data(tmp_path)[0]) != len(source) and len(scans) == 2


def test_few_shards_are_open_at_a_time(tmp_path, samples, monkeypatch):
    monkeypatch.setattr('simsiam_models.data.readers.tars.OPEN', 3)
    for i in range(40):
        write_tar(tmp_path / f'{i:02}.tar', samples[i:i + 1])
    source, _ = open_data(tmp_path)
    before = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else None
    want = views(MemoryImages(np.stack([source.read(i) for i in range(40)]), None, [], 'x'))
    assert same(views(source, workers=4), want)
    assert len(source._open) == 3
    if before is not None:
        assert len(os.listdir('/proc/self/fd')) <= before + 3


@pytest.mark.parametrize('write', [write_text, write_csv])
def test_a_list_is_parsed_once_and_again_after_a_change(tmp_path, samples, monkeypatch, write):
    from simsiam_models.data.readers import lists
    parsed, parse = [], lists._parse
    monkeypatch.setattr(lists, '_parse', lambda file: parsed.append(file) or parse(file))
    spec = Path(write(tmp_path, samples))
    os.utime(spec, (1e9, 1e9))
    for _ in range(2):
        source, _ = open_data(spec)
    assert len(parsed) == 1 and source.labels.tolist() == [y for *_, y in samples]
    spec.write_text(''.join(spec.read_text().splitlines(True)[:-1]))
    for _ in range(2):
        assert len(open_data(spec)[0]) == 63
    assert len(parsed) == 3  # a list of this moment may change once more, and is not kept


# Digests


@pytest.mark.parametrize(
    'name', cases(['list.txt', 'list.csv', 'tar shards', 'save_to_disk', 'parquet', 'torchvision Food101']))
def test_a_digest_is_that_of_the_content_and_not_of_the_place(tmp_path, made, samples, name):
    digest = open_data(made[name])[0].digest
    assert len(digest) == 16 and int(digest, 16) >= 0
    assert open_data(FORMATS[name](tmp_path / 'copy', samples))[0].digest == digest
    assert open_data(FORMATS[name](tmp_path / 'less', samples[:-1]))[0].digest != digest
    other = [*samples[:-1], (samples[-1][0], samples[-1][1], 3)]  # another label
    if name != 'torchvision Food101':
        assert open_data(FORMATS[name](tmp_path / 'label', other))[0].digest != digest


def test_a_folders_digest_changes_with_its_names_only(tmp_path, few_digits):
    digest = FolderImages(few_digits).digest
    assert FolderImages(shutil.copytree(few_digits, tmp_path / 'copy')).digest == digest
    (tmp_path / 'copy/3/0003.png').rename(tmp_path / 'copy/3/3.png')
    assert FolderImages(tmp_path / 'copy').digest != digest


def test_images_in_memory_are_digested_by_content():
    pixels, labels = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)
    digest = MemoryImages(pixels, labels, list('abcd'), 'one').digest
    assert MemoryImages(pixels.copy(), labels, list('abcd'), 'two').digest == digest
    pixels[3, 7, 7, 2] = 1
    assert MemoryImages(pixels, labels, list('abcd'), 'one').digest != digest


# Unreadable images


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('name', cases(FORMATS))
def test_unreadable_images_are_counted_in_every_format(tmp_path, samples, name, workers):
    bad = {3: b'', 4: b'no image', 63: samples[63][1][:200]}
    mixed = [(n, bad.get(i, data), y) for i, (n, data, y) in enumerate(samples)]
    source, _ = open_data(FORMATS[name](tmp_path / 'data', mixed))
    loader = TwoViews(source, AUG, BATCH, workers=workers, max_unreadable=0.1)
    for epoch in range(2):
        assert len(list(loader.epoch(epoch))) == 4
        assert sorted(loader.unreadable) == [3, 4, 63]
    with pytest.raises(UnreadableError, match=r'\d unreadable so far, 0 of 64 allowed'):
        list(TwoViews(source, AUG, BATCH).epoch(0))


def test_a_listed_file_that_is_not_there_is_an_unreadable_image(tmp_path, samples):
    spec = write_text(tmp_path, samples)
    (tmp_path / samples[7][0]).unlink()
    with pytest.raises(UnreadableError, match=samples[7][0]):
        open_data(spec)[0].read(7)


@needs_datasets
def test_a_table_may_name_files_that_hold_the_images(tmp_path, few_digits):
    folder = FolderImages(few_digits)
    paths = [str(folder.path(i)) for i in range(64)]
    source, _ = open_data(write_paths(tmp_path / 'a.parquet', paths))
    assert same(views(source, workers=2), views(folder)) and source.labels is None
    other, _ = open_data(write_paths(tmp_path / 'b.parquet', [*paths[:63], str(tmp_path / 'gone.png')]))
    assert other.digest != source.digest
    with pytest.raises(UnreadableError, match='image 63: cannot be read'):
        other.read(63)
    with pytest.raises(UnreadableError, match='image 1: the table has no image there'):
        open_data(write_paths(tmp_path / 'c.parquet', [paths[0], None]))[0].read(1)


def write_paths(file: Path, paths: list[str | None]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq
    kind = pa.struct({'bytes': pa.binary(), 'path': pa.string()})
    pq.write_table(pa.table({'image': pa.array([{'bytes': None, 'path': path} for path in paths], kind)}), file)
    return file


def test_damaged_tars_and_lists_are_opened_or_refused_in_one_sentence(tmp_path, samples):
    rng = np.random.default_rng(0)
    tar = write_tar(tmp_path / 'a.tar', samples[1:9:2]).read_bytes()
    write_files(tmp_path, samples[1:9:2])
    heads = [i + k for i in range(0, len(tar), 512) for k in range(512) if tar[i + 257:i + 262] == b'ustar']
    text = ''.join(f'{name},{label}\n' for name, _, label in samples[1:9:2]).encode()
    refused = 0
    for trial in range(300):
        kind, data = ('a.tar', bytearray(tar)) if trial % 3 else (('l.txt', 'l.csv')[trial % 2], bytearray(text))
        for _ in range(1 + trial % 4):
            data[rng.choice(heads) if kind == 'a.tar' else rng.integers(len(data))] = rng.integers(256)
        (tmp_path / kind).write_bytes(data[:rng.integers(len(data))] if trial % 5 == 0 else data)
        try:
            source, _ = open_data(tmp_path / kind)
            for i in range(len(source)):
                try:
                    source.read(i)
                except UnreadableError as e:
                    assert '\n' not in str(e)
        except ONE_SENTENCE as e:
            assert type(e).__module__ == 'builtins' and '\n' not in str(e) and str(tmp_path) in str(e)
            refused += 1
    assert 100 < refused < 300


# Streams


@pytest.fixture(scope='module')
def streams(tmp_path_factory, samples) -> dict[str, str]:
    root = tmp_path_factory.mktemp('streams')
    write_tars(root / 'tars', samples)
    made = {'pipe': f'pipe:cat {root}/tars/shard-{{000..002}}.tar'}
    if HAS['datasets']:
        made['parquet'] = f'hf-stream:{write_parquet(root / "parquet", samples)}'
        made['arrow'] = f'hf-stream:{write_saved(root / "saved", samples)}'
    return made


STREAMS = cases(['parquet', 'arrow', 'pipe'])


@pytest.fixture(params=STREAMS)
def stream(streams, request, monkeypatch) -> Stream:
    monkeypatch.setattr(streams_module, 'BUFFER', 10)
    return open_data(streams[request.param], 64)[0]


def test_a_stream_has_every_image_once_in_an_order_of_each_epoch(stream, samples):
    assert isinstance(stream, Stream) and len(stream) == 64 and stream.labels is None
    assert 'same' in stream.promise and len(stream.digest) == 16
    orders = [list(stream.samples(0, epoch, 0)) for epoch in (0, 1)] + [list(stream.samples(1, 0, 0))]
    files = sorted(data for _, data, _ in samples)
    assert all(sorted(order) == files for order in orders)
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[0] != [data for _, data, _ in samples]
    assert list(stream.samples(0, 1, 0)) == orders[1] and list(stream.samples(0, 1, 11)) == orders[1][11:]


def test_a_stream_gives_the_same_views_in_any_number_of_processes_and_threads(stream):
    want = views(stream)
    assert len(want) == 4
    for world, workers in ((1, 2), (2, 0), (2, 2), (4, 3)):
        assert same(together(stream, world, workers=workers), want)
    assert same(views(stream, workers=2, start=3), want[3:])
    assert not same(views(stream, epoch=2), want)


class Listed:
    """A stream out of a list, in its order."""

    name, labels, classes, digest, promise = 'listed', None, [], '0' * 16, 'all of it'

    def __init__(self, items: list, length: int | None = None) -> None:
        self.items, self.length, self.given = items, length or len(items), 0

    def __len__(self) -> int:
        return self.length

    def samples(self, seed: int, epoch: int, start: int) -> Iterator:
        for item in self.items[start:]:
            self.given += 1
            yield item


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('world', [1, 2])
def test_an_unreadable_sample_gives_way_to_the_next_one_of_its_batch(samples, workers, world):
    data = [data for _, data, _ in samples]
    for i in (2, 3, 7, 31, *range(32, 48)):  # two in a row, the last of a slice and of a batch, a whole batch
        data[i] = b'broken'
    instead = {2: 4, 3: 4, 7: 8, 31: 16}
    clean = [data[instead.get(i, i)] for i in range(64)]
    black = np.zeros((16, 16, 3), np.uint8)
    clean = [black if x == b'broken' else x for x in clean]
    want = views(Listed(clean))
    assert same(together(Listed(data), world, workers=workers, max_unreadable=0.5), want)
    loader = TwoViews(Listed(data), AUG, BATCH, workers=workers, max_unreadable=20 / 64)
    for epoch in (0, 1):  # as many again, which are no more of an epoch
        list(loader.epoch(epoch))
        assert sorted(k - 64 * epoch for k in loader.unreadable if k >= 64 * epoch) == [2, 3, 7, 31, *range(32, 48)]
    with pytest.raises(UnreadableError, match='of 64 allowed'):
        list(TwoViews(Listed(data), AUG, BATCH, workers=workers, max_unreadable=19 / 64).epoch(0))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_stream_that_ends_early_says_how_many_images_it_gave(samples, workers):
    source = Listed([data for _, data, _ in samples], 80)
    with pytest.raises(DataError, match='ended after 64 images of epoch 3, where 80 were expected'):
        views(source, epoch=3, workers=workers)


def test_a_stream_is_read_no_further_than_the_batches_ahead(samples):
    from simsiam_models.data.loader import AHEAD
    source = Listed([samples[1][1]] * 2000)
    steps = TwoViews(source, AUG, BATCH, workers=2).epoch(0)
    for done in range(1, 20):
        next(steps)
        assert source.given <= (done + AHEAD) * BATCH  # and one more while the next one is finished
    steps.close()
    assert next(TwoViews(source, AUG, BATCH, workers=2).batches(0)).raw is None  # what was decoded is let go


@needs_webdataset
def test_one_shard_alone_is_shuffled_anew_each_epoch(streams, monkeypatch):
    monkeypatch.setattr(streams_module, 'BUFFER', 10)
    source, _ = open_data(streams['pipe'].replace('{000..002}', '001'), 21)
    orders = [list(source.samples(seed, epoch, 0)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] and orders[0] != orders[2]


@needs_webdataset
def test_a_stream_may_be_shorter_than_its_source(streams):
    source, _ = open_data(streams['pipe'], 40)
    assert len(source) == 40 and len(list(source.samples(0, 0, 0))) == 40
    assert len(views(source)) == 2


@pytest.mark.parametrize('name', STREAMS)
def test_a_stream_of_unknown_length_asks_for_it(streams, name):
    with pytest.raises(ValueError, match='--images-per-epoch N'):
        open_data(streams[name])


@needs_webdataset
@pytest.mark.parametrize('command', ['false', 'head -c 9000 {}/shard-000.tar', 'echo no tar', 'cat {}/nowhere.tar'])
def test_a_stream_that_breaks_off_is_named(tmp_path, samples, command):
    spec = 'pipe:' + command.format(write_tars(tmp_path, samples))
    with pytest.raises(DataError, match='pipe:') as e:
        views(open_data(spec, 64)[0], workers=2)
    assert '\n' not in str(e.value)


@needs_webdataset
@pytest.mark.skipif(shutil.which('curl') is None, reason='webdataset fetches by curl')
def test_shards_are_streamed_from_a_server(tmp_path, samples, streams, monkeypatch):
    write_tars(tmp_path, samples)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    handler = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f'http://127.0.0.1:{server.server_port}/shard-'
            got = views(open_data(f'{url}{{000..002}}.tar', 64)[0], workers=2)
            with pytest.raises(DataError, match='003.tar: the stream broke off'):
                views(open_data(f'{url}003.tar', 64)[0])
        finally:
            server.shutdown()
    assert same(got, views(open_data(streams['pipe'], 64)[0]))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


# Wrong input


def edit(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def cut_tar(root: Path, samples: list[Sample], keep: Callable[[bytes], bytes]) -> str:
    path = write_tar(root / 'a.tar', samples[:5])
    return str(edit(path, keep(path.read_bytes())))


def place(root: Path, samples: list[Sample], name: str, data: bytes | str) -> str:
    write_files(root, samples[:3])
    return str(edit(root / name, data.encode() if isinstance(data, str) else data))


def table_without_images(root: Path, samples: list[Sample]) -> str:
    datasets.Dataset.from_dict({'text': ['a', 'b']}).save_to_disk(root)
    return str(root)


def write_saved_rows(root: Path, samples: list[Sample]) -> str:
    table(samples).save_to_disk(root)
    return str(root)


def arrow_without_rows(root: Path, samples: list[Sample]) -> str:
    import pyarrow as pa
    empty = pa.table({'image': pa.array([], pa.binary())})
    with pa.ipc.new_stream(root / 'a.arrow', empty.schema) as f:
        f.write_table(empty)
    return str(root)


def cut_arrow(root: Path, samples: list[Sample]) -> str:
    write_saved_rows(root, samples)
    file, = root.glob('*.arrow')
    file.write_bytes(file.read_bytes()[:20000])
    return str(root)


def linked_tar(root: Path, samples: list[Sample]) -> str:
    with tarfile.open(root / 'a.tar', 'w') as tar:
        link = tarfile.TarInfo('a.png')
        link.type, link.linkname = tarfile.SYMTYPE, 'b.png'
        tar.addfile(link)
    return str(root / 'a.tar')


def headless(data: bytes) -> bytes:
    """Without the member that ends in the middle of a header."""
    tar = tarfile.open(fileobj=io.BytesIO(data))
    return data[:tar.getmembers()[4].offset + 100]


WRONG: dict[str, tuple[Callable[[Path, list[Sample]], str], str]] = {
    'nothing there': (lambda r, s: str(r / 'nowhere'), 'no such file or folder; DATA is a folder'),
    'an empty folder': (lambda r, s: str(r), 'no image in it'),
    'a file of another kind': (lambda r, s: place(r, s, 'a.exe', b'x'), 'not read here'),
    'a single image': (lambda r, s: place(r, s, 'a.png', s[1][1]), 'a single image'),
    'an empty list': (lambda r, s: place(r, s, 'l.txt', '\n\n'), 'names no image'),
    'a list of files elsewhere': (lambda r, s: place(r, s, 'l.txt', 'a.png\nb.png\n'), 'a.png is not there'),
    'a list with a bad label': (
        lambda r, s: place(r, s, 'l.txt', f'{s[0][0]} 1\n{s[1][0]} x\n'), "line 2: the label 'x'"),
    'a list with a negative label': (lambda r, s: place(r, s, 'l.txt', f'{s[0][0]} -1\n'), "line 1: the label '-1'"),
    'a list with a huge label': (lambda r, s: place(r, s, 'l.txt', f'{s[0][0]} 100000\n'), 'no class number'),
    'a list with some labels': (
        lambda r, s: place(r, s, 'l.txt', f'{s[0][0]} 1\n\n{s[1][0]}\n'), 'line 3: has no label'),
    'a list with a label too many': (
        lambda r, s: place(r, s, 'l.txt', f'{s[0][0]}\n{s[1][0]} 1\n'), "line 2: has the label '1'"),
    'a list of what is no image': (lambda r, s: place(r, s, 'l.txt', 'some words\n'), 'line 1: .* no path of an image'),
    'a binary list': (lambda r, s: place(r, s, 'l.txt', bytes(range(256))), 'line 1'),
    'a list in UTF-16': (lambda r, s: place(r, s, 'l.txt', 'a.png\nb.png'.encode('utf-16')), 'line 1'),
    'a csv without a path': (lambda r, s: place(r, s, 'l.csv', 'url,label\nx,1\n'), 'line 1: .* names no column path'),
    'a csv of uneven rows': (
        lambda r, s: place(r, s, 'l.csv', 'path,label\na b.png,1\na,b.png,1\n'), 'line 3: 3 fields'),
    'a csv with a bad label': (
        lambda r, s: place(r, s, 'l.csv', 'path,label\na.png,1\nb.png,dog\n'), 'line 3: the label'),
    'a csv with an empty path': (lambda r, s: place(r, s, 'l.csv', 'path,label\na.png,1\n,1\n'), 'line 3: no path'),
    'a csv with an open quote': (lambda r, s: place(r, s, 'l.csv', 'path\n"' + 'a' * 200000), 'no CSV'),
    'an empty csv': (lambda r, s: place(r, s, 'l.csv', ''), 'names no image'),
    'a tar cut in an image': (lambda r, s: cut_tar(r, s, lambda d: d[:2000]), 'a.tar: cut off'),
    'a tar cut in a header': (lambda r, s: cut_tar(r, s, headless), 'a.tar: cut off'),
    'a tar cut at its end': (lambda r, s: cut_tar(r, s, lambda d: d.rstrip(b'\0')), 'a.tar: cut off'),
    'a tar with a damaged header': (lambda r, s: cut_tar(r, s, lambda d: d[:1024] + b'x' * 512 + d[1536:]), 'cut off'),
    'two tars in one file': (lambda r, s: cut_tar(r, s, lambda d: d + d), 'goes on after its end'),
    'an empty tar': (lambda r, s: cut_tar(r, s, lambda d: b''), 'a.tar: cut off'),
    'no tar': (lambda r, s: place(r, s, 'a.tar', b'no tar' * 500), 'a.tar: cut off, damaged or no tar'),
    'a tar without images': (
        lambda r, s: str(write_tar(r / 'a.tar', [('a.txt', b'x', 0)])), 'no image in 1 tar shards'),
    'a compressed tar': (lambda r, s: place(r, s, 'a.tar.gz', gzip.compress(b'x')), 'gunzip'),
    'a folder of compressed tars': (lambda r, s: str(edit(r / 'a.tgz', b'x').parent), 'gunzip'),
    'a tar with a bad label': (
        lambda r, s: str(write_tar(r / 'a.tar', [('a.cls', b'dog', 0), ('a.png', b'', 0)], labels=False)),
        "holds b'dog'"),
    'a tar with two images in a sample': (
        lambda r, s: str(write_tar(r / 'a.tar', [('a.1.png', b'', 0), ('a.2.png', b'', 0)], labels=False)),
        'more than one image'),
    'a tar of links': (linked_tar, 'is a link or a sparse file; write the tar with --dereference'),
    'a shard that is missing': (
        lambda r, s: write_tars(r, s) + '/shard-{000..003}.tar', '003.tar: no such shard, of 4'),
    'a pattern of nothing': (lambda r, s: f'{r}/*.tar', 'no file fits'),
    'a pattern that counts down': (lambda r, s: f'{r}/{{9..0}}.tar', 'counts no shards'),
    'garbage parquet': (lambda r, s: place(r, s, 'a.parquet', b'garbage' * 99), 'cannot be opened by the datasets'),
    'garbage arrow': (lambda r, s: place(r, s, 'a.arrow', b'garbage' * 99), 'cannot be opened by the datasets'),
    'empty parquet': (lambda r, s: place(r, s, 'a.parquet', b''), 'cannot be opened by the datasets'),
    'a truncated arrow file': (cut_arrow, 'cannot be opened by the datasets'),
    'a table without rows': (arrow_without_rows, 'a table of 0 rows'),
    'a table without images': (table_without_images, 'no column of images; its columns are text'),
    'a saved set without its files': (lambda r, s: str(edit(r / 'state.json', b'{}').parent), 'cannot be opened'),
    'no Hub': (lambda r, s: 'hf:nobody/nothing', 'hf:nobody/nothing cannot be opened'),
    'no Hub for a stream': (lambda r, s: 'hf-stream:nobody/nothing', 'nobody/nothing:train cannot be opened'),
    'a split that is not there': (
        lambda r, s: f'hf-stream:{write_parquet(r, s, "train")}:test', 'no Parquet or Arrow file of a split test'),
    'a stream of an empty folder': (lambda r, s: f'hf-stream:{r}', 'no Parquet or Arrow file'),
    'no name of torchvision': (lambda r, s: f'torchvision:CIFAR1O:{r}', 'no data set of that name; CIFAR10 is near'),
    'torchvision without files': (lambda r, s: f'torchvision:CIFAR10:{r}', 'download=True'),
    'torchvision without a split': (lambda r, s: f'torchvision:EMNIST:{r}', 'by its name alone'),
    'a prefix alone': (lambda r, s: 'hf:', 'what is to follow'),
    'cifar of a wrong size': (
        lambda r, s: str(edit(r / 'data_batch_1.bin', bytes(3073 * 2 + 5)).parent),
        '2 are whole where 10000 are expected'),
    'cifar of wrong labels': (lambda r, s: str(edit(r / 'data_batch_1.bin', b'\xff' * 3073).parent), 'a label of 255'),
    'an empty cifar': (lambda r, s: str(edit(r / 'train.bin', b'').parent), 'no whole number of CIFAR-100 records'),
}


@pytest.mark.parametrize('wrong', cases(WRONG))
def test_wrong_input_ends_in_one_sentence(tmp_path, samples, wrong):
    make, match = WRONG[wrong]
    (tmp_path / 'data').mkdir()
    with pytest.raises(ONE_SENTENCE, match=match) as e:
        open_data(make(tmp_path / 'data', samples), 64 if 'stream' in wrong else None)
    assert type(e.value).__module__.split('.')[0] in ('builtins', 'simsiam_models')
    assert '\n' not in str(e.value) and len(str(e.value)) < 800


@pytest.mark.parametrize('module', cases(['datasets', 'webdataset']))
def test_a_missing_library_is_named_with_the_command_that_installs_it(tmp_path, samples, monkeypatch, module):
    spec = write_parquet(tmp_path, samples[:3]) if module == 'datasets' else 'pipe:cat x.tar'
    monkeypatch.setitem(__import__('sys').modules, module, None)
    with pytest.raises(RuntimeError, match=r"pip install 'simsiam-models\[data\]'"):
        open_data(spec, 3)


def test_digits_are_written_alike_each_time(tmp_path, few_digits):
    assert samples_of(write_digits(tmp_path, 64)) == samples_of(few_digits)
