"""An image that is in both parts is counted and named by every benchmark, and what was not compared is said."""
import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import layouts_benchmarks as layouts
import numpy as np
import pytest
from conftest import write_digits
from PIL import Image

from simsiam_models import cli
from simsiam_models.benchmarks import shared_images
from simsiam_models.benchmarks.datasets.classification import open_pair
from simsiam_models.benchmarks.datasets.voc import open_voc07
from simsiam_models.benchmarks.samples import subset
from simsiam_models.benchmarks.shared_images import find_shared, report_shared
from simsiam_models.data import FolderImages, MemoryImages, open_data
from simsiam_models.data.readers.images import Images


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv('SIMSIAM_CACHE', str(tmp_path_factory.mktemp('cache')))


@pytest.fixture
def parts(tmp_path) -> Path:
    """40 training and 60 other digits; three of the latter are copies, the last one in another class."""
    write_digits(tmp_path / 'train', 100)
    for path in sorted((tmp_path / 'train').rglob('*.*')):
        if int(path.stem) >= 40:
            (tmp_path / 'val' / path.parent.name).mkdir(parents=True, exist_ok=True)
            path.rename(tmp_path / 'val' / path.parent.name / path.name)
    shutil.copy(tmp_path / 'train/0/0000.jpg', tmp_path / 'val/0/copy.jpg')
    shutil.copy(tmp_path / 'train/1/0001.png', tmp_path / 'val/1/same name is not needed.png')
    shutil.copy(tmp_path / 'train/2/0002.jpg', tmp_path / 'val/3/wrong.jpg')
    return tmp_path


def expect(train: list[Path], test: list[Path]) -> int:
    """Counts by hashes of all files."""
    known = {hashlib.sha256(path.read_bytes()).digest() for path in train}
    return sum(hashlib.sha256(path.read_bytes()).digest() in known for path in test)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob('*.*'))


def test_copies_in_folders_are_counted_and_the_first_is_named(parts, capsys):
    train, val = FolderImages(parts / 'train'), FolderImages(parts / 'val')
    said = report_shared(train, val, print)
    assert said == {
        'compared': 63, 'shared': expect(files(parts / 'train'), files(parts / 'val')), 'other_label': 1,
        'first': [str(parts / 'val/0/copy.jpg'), str(parts / 'train/0/0000.jpg')]}
    assert said['shared'] == 3
    assert capsys.readouterr().out == (
        '3 of 63 test images are also training images, byte for byte, 1 of them with another label, so the result is '
        f'better than on new images; the first: {parts / "val/0/copy.jpg"} is {parts / "train/0/0000.jpg"}\n')


def test_parts_without_copies_are_compared_and_nothing_is_printed(parts, capsys):
    for name in ('0/copy.jpg', '1/same name is not needed.png', '3/wrong.jpg'):
        (parts / 'val' / name).unlink()
    said = report_shared(FolderImages(parts / 'train'), FolderImages(parts / 'val'), print)
    assert said == {'compared': 60, 'shared': 0, 'other_label': 0, 'first': []} and not capsys.readouterr().out


def test_equal_sizes_and_equal_middles_are_not_yet_equal_images(tmp_path):
    for part, end in (('train', b'x'), ('val', b'y')):
        (tmp_path / part / 'a').mkdir(parents=True)
        (tmp_path / part / 'a/1.png').write_bytes(bytes(1000) + end)
    assert find_shared(FolderImages(tmp_path / 'train'), FolderImages(tmp_path / 'val'))['shared'] == 0
    (tmp_path / 'val/a/1.png').write_bytes(bytes(1000) + b'x')
    assert find_shared(FolderImages(tmp_path / 'train'), FolderImages(tmp_path / 'val'))['shared'] == 1


def test_few_files_are_read_whole(parts, monkeypatch):
    read = []
    stored = shared_images.stored_bytes
    monkeypatch.setattr(shared_images, 'stored_bytes', lambda *a: read.append(a[2:]) or stored(*a))
    find_shared(FolderImages(parts / 'train'), FolderImages(parts / 'val'))
    assert sum(not part for part in read) == 6  # of three copies and their originals


def test_empty_missing_and_unreadable_files_are_no_copies(parts):
    for part in ('train', 'val'):
        (parts / part / '0/empty.png').write_bytes(b'')
    train, val = FolderImages(parts / 'train'), FolderImages(parts / 'val')
    (parts / 'val/0/copy.jpg').unlink()
    assert find_shared(train, val)['shared'] == 2


def test_beyond_a_number_of_images_the_rarest_sizes_are_compared_and_the_rest_is_said(tmp_path, monkeypatch, capsys):
    for part in ('train', 'val'):
        (tmp_path / part / 'a').mkdir(parents=True)
        for i in range(5):  # one size
            (tmp_path / part / f'a/{i}.png').write_bytes(bytes([i]) * 100)
        (tmp_path / part / 'a/5.png').write_bytes(b'x' * 50)
    monkeypatch.setattr(shared_images, 'MAX_READ', 9)
    said = report_shared(FolderImages(tmp_path / 'train'), FolderImages(tmp_path / 'val'), print)
    assert (said['compared'], said['shared']) == (1, 1)
    assert '1 of 6 test images are also training images, byte for byte (compared: 1 of 6)' in capsys.readouterr().out
    monkeypatch.setattr(shared_images, 'MAX_READ', 1)
    report_shared(FolderImages(tmp_path / 'train'), FolderImages(tmp_path / 'val'), print)
    assert 'is unknown: their bytes were not compared' in capsys.readouterr().out


def tar(folder: Path) -> Images:
    out = folder.with_suffix('.tar')
    with tarfile.open(out, 'w') as t:
        for i, path in enumerate(files(folder)):
            for name, data in ((f'{i:04}.cls', path.parent.name.encode()), (f'{i:04}{path.suffix}', path.read_bytes())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))
    return open_data(out)[0]


def csv(folder: Path) -> Images:
    folder.with_suffix('.csv').write_text(''.join(f'{path},{path.parent.name}\n' for path in files(folder)))
    return open_data(folder.with_suffix('.csv'))[0]


def parquet(folder: Path) -> Images:
    datasets = pytest.importorskip('datasets', reason="needs the datasets library: pip install '.[data]'")
    rows = {'image': [{'bytes': p.read_bytes(), 'path': None} for p in files(folder)],
            'label': [int(p.parent.name) for p in files(folder)]}
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.Value('int64')})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder.with_suffix('.saved'))
    return open_data(folder.with_suffix('.saved'))[0]


def memory(folder: Path) -> Images:
    pixels = np.stack([np.asarray(Image.open(path).convert('RGB')) for path in files(folder)])
    return MemoryImages(pixels, np.array([int(p.parent.name) for p in files(folder)]), list('0123456789'), 'memory')


@pytest.mark.parametrize('make', [tar, csv, parquet, memory])
def test_copies_are_found_in_every_form(parts, make):
    train, val = make(parts / 'train'), make(parts / 'val')
    said = find_shared(train, val)
    assert (said['compared'], said['shared'], said['other_label']) == (63, 3, 1) and len(said['first']) == 2
    part = subset(val, [62, 0, 1])
    assert find_shared(train, part)['compared'] == 3


def test_a_copy_between_a_folder_and_a_tar_is_found(parts):
    assert find_shared(FolderImages(parts / 'train'), tar(parts / 'val'))['shared'] == 3


def test_sources_that_only_decode_are_not_compared(capsys):
    class Decoded:
        name, labels, classes, digest = 'decoded', None, [], ''

        def __len__(self) -> int:
            return 4

        def read(self, index: int) -> np.ndarray:
            raise AssertionError('decoded')

    assert report_shared(Decoded(), Decoded(), print)['compared'] == 0
    assert 'unknown' in capsys.readouterr().out


def test_copies_between_what_was_learned_and_held_out_are_found(tmp_path):
    write_digits(tmp_path, 60)
    for path in files(tmp_path):
        shutil.copy(path, path.with_name(f'copy {path.name}'))
    pair = open_pair('folder', tmp_path)
    train, held = pair.train, pair.test
    said = find_shared(train, held)
    paths = [[part.images.path(int(i)) for i in part.indices] for part in (train, held)]
    assert said['shared'] == expect(*paths) > 0


# In the commands


@pytest.mark.parametrize('command', [
    'knn --k 1', 'linear --protocol auto --epochs 1', 'linear --protocol fair --epochs 1'])
def test_a_benchmark_prints_and_records_the_copies(parts, command, capsys):
    args = [*command.split(), '--model', 'resnet10t:random', '--image-size', '32', '--resize', '32', '--device', 'cpu',
            '--out', str(parts / 'out')]
    if 'fair' not in command:
        args += ['--cache', str(parts / 'features')]
    assert cli.main([args[0], str(parts), *args[1:]]) == 0
    out = capsys.readouterr().out
    assert out.count('3 of 63 test images are also training images, byte for byte, 1 of them with another label') == 1
    record, = ((parts / 'out').glob('*.json'))
    assert json.loads(record.read_text())['extra']['shared_images']['shared'] == 3


COMMANDS = [
    'knn --k 1', 'linear --protocol fair --epochs 1 --lr 1', 'linear --protocol auto --epochs 5',
    'finetune --epochs 1 --batch-size 32 --workers 0']


def run(command: str, data: Path, *flags: str) -> int:
    name, *rest = command.split()
    return cli.main([
        name, str(data), *rest, '--model', 'resnet10t:random', '--image-size', '32', '--resize', '32',
        '--device', 'cpu', '--out', str(data.parent / name), *flags])


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_divides_plain_data_alike_and_its_output_and_record_say_how(tmp_path, command, capsys):
    write_digits(tmp_path / 'data', 100)
    assert run(command, tmp_path / 'data', '--val-share', '0.3', '--seed', '2') == 0
    pair = open_pair('folder', tmp_path / 'data', share=0.3, seed=2)
    text = f'{len(pair.test)} of 100 images, 0.3 of each class, held out by seed 2'
    said = f'{tmp_path / "data"}: {len(pair.train)} training images of 10 classes; tested on {text}'
    assert capsys.readouterr().out.count(said) == 1
    record, = ((tmp_path / command.split()[0]).glob('*record.json' if 'finetune' in command else '*.json'))
    data = json.loads(record.read_text())['data']
    assert data == pair.data() | {'path': str(tmp_path / 'data')} and data['held_out'] == text
    for flag in (['--val-share', '0'], ['--val-share', '1'], ['--seed', '-1']):
        assert run(command, tmp_path / 'data', *flag) == 1
        assert f'simsiam: {" ".join(flag)}: must be' in capsys.readouterr().err


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_refuses_a_class_without_training_images_alike(tmp_path, command, capsys):
    paths = files(write_digits(tmp_path / 'data', 60))
    (tmp_path / 'list.txt').write_text(''.join(f'{p} {p.parent.name}\n' for p in paths if p.parent.name != '3'))
    assert run(command, tmp_path / 'list.txt') == 1
    assert capsys.readouterr().err.strip().endswith(
        "1 of 10 classes have no training image, the first is '3'; add images, number the classes from 0 without gaps, "
        'or accept this with --allow-partial')
    assert run(command, tmp_path / 'list.txt', '--allow-partial') == 0
    assert '1 of 10 classes have no training image: 3' in capsys.readouterr().out


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_names_an_empty_class_folder_and_a_class_without_test_images(tmp_path, command, capsys, caplog):
    for part in ('train', 'val'):
        write_digits(tmp_path / 'data' / part, 60)
    shutil.rmtree(tmp_path / 'data' / 'val' / '3')
    (tmp_path / 'data' / 'train' / 'void').mkdir()
    assert run(command, tmp_path / 'data') == 0
    assert 'folders without images, not used as classes: void' in caplog.text
    out = capsys.readouterr().out
    assert '1 of 10 classes have no test image: 3' in out
    n = len(files(tmp_path / 'data' / 'val'))
    assert f'60 training images of 10 classes; tested on {n} images of {tmp_path / "data" / "val"}' in out


def test_one_class_gives_no_knn_number(tmp_path, capsys):
    write_digits(tmp_path, 60)
    for folder in tmp_path.iterdir():
        if folder.name != '3':
            shutil.rmtree(folder)
    assert cli.main(['knn', str(tmp_path), '--model', 'resnet10t:random', '--out', str(tmp_path / 'out')]) == 1
    assert 'only one class (3)' in capsys.readouterr().err


def test_copies_in_voc07_are_found(tmp_path):
    layouts.write_voc07(tmp_path, names=('cat', 'dog'))
    voc = open_voc07(tmp_path, partial=True)
    said = find_shared(voc.trainval, voc.test)
    assert said['shared'] == expect(*([part.path(i) for i in range(len(part))] for part in (voc.trainval, voc.test)))
    assert said['shared'] == 20 and said['other_label'] == 0  # image i of both parts is the same digit
