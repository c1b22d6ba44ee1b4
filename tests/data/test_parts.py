"""The parts of a data set are found in its folders whatever their spelling, and never taken for classes in silence."""
import io
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import write_digits

from simsiam_models.benchmarks.datasets.classification import open_pair
from simsiam_models.data import open_data, open_parts
from simsiam_models.data.parts import find_parts, holds_images, list_entries


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv('SIMSIAM_CACHE', str(tmp_path_factory.mktemp('cache')))


@pytest.fixture(scope='module')
def classes(tmp_path_factory) -> Path:
    """Two class folders."""
    root = tmp_path_factory.mktemp('classes')
    write_digits(root, 60)
    for folder in root.iterdir():
        if folder.name not in '01':
            shutil.rmtree(folder)
    return root


def fill(root: Path, names: str) -> Path:
    for name in names.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


TRAIN = ['train', 'Train', 'TRAIN', 'training', 'Training_Set', 'trainset', 'train2017', 'train_images']
VAL = ['val', 'valid', 'validation', 'Validation', 'dev', 'test', 'Test', 'testing', 'TestSet', 'eval', 'val2017']


@pytest.mark.parametrize('train, val', [*((name, 'val') for name in TRAIN), *(('train', name) for name in VAL)])
def test_parts_of_any_usual_spelling_are_parts_in_every_command(tmp_path, classes, train, val):
    for name in (train, val):
        shutil.copytree(classes, tmp_path / name)
    for images in (open_data(tmp_path), ((pair := open_pair('folder', tmp_path)).train, pair.test)):
        assert [part.name for part in images] == [str(tmp_path / train), str(tmp_path / val)]
        assert images[0].classes == images[1].classes == ['0', '1']


@pytest.mark.parametrize('names, found, said', [
    ('train/a/1.png val/a/1.png', ('.', 'train', 'val'), ''),
    ('train/a/1.png', ('.', 'train', None), ''),
    ('a/1.png b/1.png', ('.', None, None), ''),
    ('1.png a/1.png', ('.', None, None), ''),
    ('one/1.png', ('.', None, None), ''),
    ('train/a/1.png meta/train.txt val/a/1.png', ('.', 'train', 'val'), ''),
    ('train/a/1.png val/a/1.png test/a/1.png', ('.', 'train', 'val'), 'train and val are used, and .* left out: test'),
    ('train/a/1.png test/a/1.png images/x.png', ('.', 'train', 'test'), 'these are left out: images'),
    ('train/a/1.png test/a/1.png cover.png', ('.', 'train', 'test'), 'these are left out: cover.png'),
    ('train/a/1.png extra/x.png', ('.', 'train', None), 'train is used, and these are left out: extra'),
    ('train/a/1.png trainval/a/1.png test/a/1.png', ('.', 'train', 'test'), 'left out: trainval'),
    ('CUB/train/a/1.png CUB/test/a/1.png', ('CUB', 'CUB/train', 'CUB/test'), 'all its images are in'),
    ('CUB/Train/a/1.png CUB/Valid/a/1.png __MACOSX/CUB/._x.png .DS_Store', ('CUB', 'CUB/Train', 'CUB/Valid'), 'CUB$'),
    ('x/y/train/a/1.png x/y/val/a/1.png notes/a.txt', ('x/y', 'x/y/train', 'x/y/val'), 'x/y$'),
    ('PetImages/Cat/1.jpg PetImages/Dog/1.jpg readme.txt', ('PetImages', None, None), 'PetImages$'),
    ('test/a/1.png test/b/1.png', ('test', None, None), 'test$'),
    ('images/train/a/1.png images/val/a/1.png labels/train/1.txt', ('images', 'images/train', 'images/val'), 'images$'),
    ('seg_train/seg_train/a/1.png seg_train/seg_train/b/1.png seg_test/seg_test/a/1.png seg_test/seg_test/b/1.png '
     'seg_pred/1.png', ('.', 'seg_train/seg_train', 'seg_test/seg_test'), 'left out: seg_pred'),
    ('train/images/a/1.png train/images/b/1.png', ('.', 'train/images', None), 'train/images$'),
    ('train/person/a/1.png train/person/b/1.png', ('.', 'train', None), ''),
    ('valid/1.png invalid/1.png', ('.', None, None), 'valid is treated as a class like invalid'),
    ('cat/1.png toy_train/1.png', ('.', None, None), ''),
])
def test_parts_and_classes_are_told_apart_and_what_is_not_used_is_named(tmp_path, caplog, names, found, said):
    got = find_parts(fill(tmp_path, names))
    assert got == tuple(part and (tmp_path / part if part != '.' else tmp_path) for part in found)
    lines = [r.message for r in caplog.records]
    if not said:
        assert not lines
    else:
        assert any(re.search(said, line) for line in lines), lines
        assert all(str(tmp_path) in line and '\n' not in line for line in lines)


@pytest.mark.parametrize('names, said', [
    ('val/a/1.png test/a/1.png', 'val, test may be parts of a data set, but none is the training part'),
    ('cat/1.png test/a/1.png', 'test may be parts of a data set'),
    ('images/1.png val/1.png test/1.png', 'val, test may be parts'),
    ('airplane/1.png car/1.png train/1.png', 'train may be the training part, or a class like airplane, car'),
    ('train_1/a/1.png train_2/a/1.png', 'train_1 and train_2 may both be the same part'),
    ('train/a/1.png Train/b/1.png', 'Train and train may both be the same part')])
def test_what_may_be_parts_or_classes_is_refused_in_one_sentence(tmp_path, names, said):
    fill(tmp_path, names)
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip('a file system that does not distinguish case')
    for call in (open_data, find_parts, lambda root: open_pair('folder', root)):
        with pytest.raises(ValueError, match=said) as e:
            call(tmp_path)
        assert '\n' not in str(e.value) and str(tmp_path) in str(e.value)


@pytest.mark.skipif(os.name != 'posix', reason='links need rights on Windows')
def test_loops_of_links_and_unreadable_folders_end_the_search(tmp_path):
    fill(tmp_path, 'a/x.txt b/y.txt')
    for name in 'abc':
        for other in 'abc':
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f'to_{other}').symlink_to(tmp_path / other)
    assert not holds_images(tmp_path) and find_parts(tmp_path) == (tmp_path, None, None)
    assert not holds_images(tmp_path / 'gone')


def test_a_long_flat_folder_is_not_listed_whole_but_keeps_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr('simsiam_models.data.parts.LONG', 3)
    fill(tmp_path, 'train/a/1.png val/a/1.png 1.png 2.png 3.png 4.png 5.png 6.png')
    assert list_entries(tmp_path)[0] == ['train', 'val']
    assert find_parts(tmp_path)[1:] == (tmp_path / 'train', tmp_path / 'val')


# Validation images that cannot be used


def test_unusable_validation_images_are_named_and_not_replaced_in_silence(tmp_path, classes, caplog):
    shutil.copytree(classes, tmp_path / 'Train')
    shutil.copytree(classes, tmp_path / 'valid')
    (tmp_path / 'valid/1').rename(tmp_path / 'valid/2')
    reason = f"{tmp_path / 'valid'}: not the 2 classes of {tmp_path / 'Train'}: '1' is in one of them only"
    assert open_data(tmp_path)[1] is None and f'not used for validation: {reason}' in caplog.text
    assert str(open_parts(tmp_path)[2]) == reason
    with pytest.raises(ValueError, match="1 of 2 test classes have no training image, the first is '2'"):
        open_pair('folder', tmp_path)


@pytest.mark.parametrize('part', ['test', 'Testing', 'eval'])
def test_test_images_without_labels_are_no_validation_images_but_val_must_have_labels(tmp_path, classes, part, caplog):
    shutil.copytree(classes, tmp_path / 'train')
    shutil.copytree(classes / '0', tmp_path / part)
    said = f'not used for validation: {tmp_path / part}: its images have no labels'
    assert open_data(tmp_path)[1] is None and said in caplog.text
    caplog.clear()
    assert 'held out by seed 0' in open_pair('folder', tmp_path).held_out and said in caplog.text
    (tmp_path / part).rename(tmp_path / 'val')
    with pytest.raises(ValueError, match='val: the test images have no labels'):
        open_pair('folder', tmp_path)


@pytest.mark.parametrize('train, val', [
    ('train_a.txt', 'val_a.txt'), ('Train.csv', 'Test.csv'), ('TRAIN.txt', 'VALID.txt'),
    ('my-training.csv', 'my-dev.csv')])
def test_a_list_has_its_validation_list_beside_it_under_the_same_names(tmp_path, classes, train, val):
    for folder in classes.iterdir():
        shutil.copytree(folder, tmp_path / folder.name)
    for name in (train, val):
        (tmp_path / name).write_text(''.join(f'{p.relative_to(classes)},{p.parent.name}\n' if name.endswith('csv') else
                                             f'{p.relative_to(classes)} {p.parent.name}\n'
                                             for p in sorted(classes.rglob('*.*'))))
    images, held = open_data(tmp_path / train)
    assert held is not None and held.name == str(tmp_path / val) and len(held) == len(images)


# Without a validation part


def test_a_seeded_share_of_each_class_of_a_plain_class_folder_is_held_out(classes):
    pair = open_pair('folder', classes, share=0.3, seed=5)
    n = len(list(classes.rglob('*.*')))
    assert sorted([*pair.train.indices, *pair.test.indices]) == list(range(n))
    for c in (0, 1):
        held, all_of_it = ((np.asarray(x.labels) == c).sum() for x in (pair.test, pair.test.images))
        assert held == round(0.3 * all_of_it)
    text = f'{len(pair.test)} of {n} images, 0.3 of each class, held out by seed 5'
    assert pair.held_out == pair.tested_on == pair.data()['held_out'] == text and pair.counts['test'] == len(pair.test)
    other = open_pair('folder', classes, share=0.3, seed=6)
    assert other.digest != pair.digest and open_pair('folder', classes, share=0.3, seed=5).digest == pair.digest


def test_a_training_part_alone_is_divided_too_but_a_published_set_needs_its_own_test_images(tmp_path, classes):
    shutil.copytree(classes, tmp_path / 'train')
    pair = open_pair('folder', tmp_path)
    assert pair.held_out and 'held_out' in pair.data()
    with pytest.raises(FileNotFoundError, match='has no validation part .none of val'):
        open_pair('imagenet', tmp_path, partial=True)
    shutil.copytree(classes, tmp_path / 'dev')
    assert 'held_out' not in open_pair('folder', tmp_path).data()  # the identity of runs that exist


@pytest.mark.parametrize('parts', [('',), ('train', 'val')])
def test_one_class_gives_no_number(tmp_path, classes, parts):
    for part in parts:
        shutil.copytree(classes / '0', tmp_path / part / 'only')
    with pytest.raises(ValueError, match=r'only one class \(only\); a classifier needs at least two'):
        open_pair('folder', tmp_path)


def test_images_beside_class_folders_are_the_reason_in_the_error(tmp_path, classes):
    shutil.copytree(classes, tmp_path / 'data')
    shutil.copy(next(classes.rglob('*.png')), tmp_path / 'data/loose.png')
    with pytest.raises(ValueError, match='no labels.*no labels, as 1 image lies beside 2 folders.*loose.png'):
        open_pair('folder', tmp_path / 'data')


def test_a_link_that_leads_nowhere_hides_no_part(tmp_path):
    fill(tmp_path, 'train/a/1.png train/b/1.png val/a/1.png val/b/1.png')
    for i in range(20):  # folders list their names in any order
        (tmp_path / f'link{i}').symlink_to(f'link{i}')  # to itself
    assert find_parts(tmp_path) == (tmp_path, tmp_path / 'train', tmp_path / 'val')
    assert holds_images(tmp_path)


@pytest.mark.parametrize('root', ['data', 'training data'])
@pytest.mark.parametrize('form', ['tar', 'parquet'])
def test_unlabelled_test_files_are_not_used_and_a_share_is_held_out(tmp_path, classes, root, form, caplog):
    """As with a folder of test images without labels."""
    root = tmp_path / root
    root.mkdir()
    pictures = {file: file.read_bytes() for file in sorted(classes.rglob('*.png'))}
    test = dict(list(pictures.items())[:1])
    for part, some, labelled in (('train', pictures, True), ('test', test, False)):
        if form == 'tar':
            write_tar(root / f'{part}-0.tar', some, labelled)
        else:
            pa, parquet = map(pytest.importorskip, ('pyarrow', 'pyarrow.parquet'))
            pytest.importorskip('datasets')
            columns = {'image': list(some.values()), 'label': [file.parent.name for file in some]}
            if not labelled:
                del columns['label']
            parquet.write_table(pa.table(columns), root / f'{part}-0.parquet')
    train, _, unusable = open_parts(root)
    assert unusable.is_test and unusable.images.name == f'{root} (test)'
    pair = open_pair('folder', root)
    assert len(pair.train) + len(pair.test) == len(train) == len(pictures)
    assert f'not used for validation: {root} (test): its images have no labels' in caplog.text


def write_tar(file: Path, pictures: dict[Path, bytes], labelled: bool) -> None:
    with tarfile.open(file, 'w') as f:
        for path, data in pictures.items():
            name = f'{path.parent.name}-{path.stem}'
            for ending, content in (('png', data), ('cls', path.parent.name.encode()))[:1 + labelled]:
                member = tarfile.TarInfo(f'{name}.{ending}')
                member.size = len(content)
                f.addfile(member, io.BytesIO(content))


def test_the_same_classes_in_another_order_are_said_to_be_that(tmp_path, classes):
    datasets = pytest.importorskip('datasets')
    picture = next(classes.rglob('*.png')).read_bytes()
    datasets.DatasetDict({part: datasets.Dataset.from_dict(
        {'image': [{'bytes': picture, 'path': None}] * 2, 'label': [0, 1]}, features=datasets.Features(
            {'image': datasets.Image(), 'label': datasets.ClassLabel(names=names)}))
        for part, names in (('train', ['cat', 'dog']), ('test', ['dog', 'cat']))}).save_to_disk(str(tmp_path / 'saved'))
    assert 'they are numbered in another order' in open_parts(tmp_path / 'saved')[2].reason
    assert open_pair('folder', tmp_path / 'saved').test.labels.tolist() == [1, 0]


def test_compressed_tars_beside_others_are_said_to_be_left_out(tmp_path, classes, caplog):
    write_tar(tmp_path / 'a-0.tar', {file: file.read_bytes() for file in classes.rglob('*.png')}, True)
    (tmp_path / 'a-1.tar.gz').touch()
    open_data(tmp_path)
    assert f'{tmp_path}: 1 compressed tars are left out' in caplog.text and 'a-1.tar.gz' in caplog.text
