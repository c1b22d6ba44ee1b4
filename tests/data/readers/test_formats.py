"""The same images in every format give the same views, bit for bit."""
import io
import os
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_digits
from formats import (
    AUG,
    BATCH,
    FORMATS,
    HAS,
    HUGGING,
    ONE_SENTENCE,
    Sample,
    add,
    caches,  # noqa: F401 - a fixture
    cases,
    needs_datasets,
    same,
    samples_of,
    table,
    together,
    views,
    write_csv,
    write_files,
    write_parquet,
    write_tar,
    write_tars,
    write_text,
)
from PIL import Image

from simsiam_models.data import FolderImages, MemoryImages, TwoViews, UnreadableError, open_data
from simsiam_models.data.readers import lists, tars

if HAS['datasets']:
    import datasets
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def samples(few_digits) -> list[Sample]:
    return samples_of(few_digits)


@pytest.fixture(scope='module')
def made(tmp_path_factory, samples) -> dict[str, str]:
    return {name: write(tmp_path_factory.mktemp('format') / 'data', samples) for name, write in FORMATS.items()
            if HAS['datasets'] or name not in HUGGING}



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
    with pytest.raises(ValueError, match='read it with torchvision:CIFAR10:'):
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


def test_validation_without_labels_or_of_other_classes_is_dropped(tmp_path, samples):
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
    monkeypatch.setattr('simsiam_models.data.readers.tars.MAX_OPEN', 3)
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
    parsed, parse = [], lists._parse
    monkeypatch.setattr(lists, '_parse', lambda *a: parsed.append(a) or parse(*a))
    spec = Path(write(tmp_path, samples))
    os.utime(spec, (1e9, 1e9))
    for _ in range(2):
        source, _ = open_data(spec)
    assert len(parsed) == 1 and source.labels.tolist() == [y for *_, y in samples]
    spec.write_text(''.join(spec.read_text().splitlines(True)[:-1]))
    for _ in range(2):
        assert len(open_data(spec)[0]) == 63
    assert len(parsed) == 3  # a list that changed just now may change again, so it is not cached


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


def test_digits_are_written_identically_each_time(tmp_path, few_digits):
    assert samples_of(write_digits(tmp_path, 64)) == samples_of(few_digits)
