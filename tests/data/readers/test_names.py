"""What a name means is the same everywhere: an image, what systems write beside images, or a part of a data set."""
import logging
import os
import tarfile
from pathlib import Path

import pytest
from formats import add
from PIL import Image

from simsiam_models.data import FolderImages, open_data
from simsiam_models.data.readers import index
from simsiam_models.data.readers.names import choose_parts, find_passed_over, is_image, is_passed_over, part_of
from simsiam_models.data.readers.shards import split_by_name
from simsiam_models.runtime import messages

JUNK = [
    '.DS_Store', '._1.jpg', '.hidden.png', '.ipynb_checkpoints', '.AppleDouble', '.thumbnails', '.Trash-1000', '.git',
    '.@__thumb', '__MACOSX', '__macosx', 'Thumbs.db', 'THUMBS.DB', 'ehthumbs.db', 'desktop.ini', 'Desktop.ini',
    '@eaDir', '#recycle', '$RECYCLE.BIN', 'System Volume Information', 'lost+found', 'Icon\r', '_vti_cnf',
    '1.jpg:Zone.Identifier', '1.jpg@SynoEAStream']


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv('SIMSIAM_CACHE', str(tmp_path_factory.mktemp('cache')))


def fill(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def listed(root: Path) -> list[str]:
    images = FolderImages(root)
    return [images.path(i).relative_to(root).as_posix() for i in range(len(images))]


@pytest.mark.parametrize('name', JUNK)
def test_what_systems_write_is_passed_over(name):
    assert is_passed_over(name)
    assert find_passed_over(f'./cat/{name}/1.jpg') == find_passed_over(f'../{name}') == name


@pytest.mark.parametrize('name', ['cat', 'cat.1', '1.jpg', '.', '..', '', 'thumbs', 'Thumbs.db.png', 'macosx'])
def test_other_names_are_not_passed_over(name):
    assert not is_passed_over(name) and not find_passed_over(f'./a/{name}/b')


@pytest.mark.parametrize('name', [
    'a.jpg', 'a.JPG', 'a.jpeg', 'a.jpe', 'a.jfif', 'a.JFIF', 'a.png', 'a.bmp', 'a.gif', 'a.tif', 'a.tiff', 'a.webp',
    'a.avif', 'a.ppm', 'a.pgm'])
def test_these_names_are_images(name):
    assert is_image(name)


@pytest.mark.parametrize('suffix, kind', [('.jfif', 'JPEG'), ('.jpe', 'JPEG'), ('.avif', 'AVIF')])
def test_jfif_jpe_and_avif_are_read(tmp_path, suffix, kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip('this Pillow has no AVIF')
    picture = Image.effect_noise((24, 20), 50).convert('RGB')
    (tmp_path / 'a').mkdir()
    picture.save(tmp_path / 'a' / f'1{suffix}', kind)
    images, _ = open_data(tmp_path)
    with Image.open(tmp_path / 'a' / f'1{suffix}') as saved:
        assert images.read(0).tobytes() == saved.convert('RGB').tobytes()


# In folders


@pytest.mark.skipif(os.name != 'posix', reason='other systems refuse such names')
def test_junk_beside_images_and_beside_classes_changes_neither_images_nor_classes_nor_digest(tmp_path):
    clean = ['cat/1.jpg', 'cat/2.png', 'dog/1.jpg']
    fill(tmp_path / 'clean', clean)
    junk = [f'{place}{name}' for place in ('', 'cat/') for name in JUNK]
    junk += [f'{name}/1.jpg' for name in JUNK if '.' not in name[1:]]
    for name in sorted(junk, reverse=True):  # folders before files of the same name
        if not (tmp_path / 'messy' / name).exists():
            fill(tmp_path / 'messy', [name])
    fill(tmp_path / 'messy', clean)
    a, b = FolderImages(tmp_path / 'clean'), FolderImages(tmp_path / 'messy')
    assert listed(tmp_path / 'messy') == clean and b.classes == ['cat', 'dog']
    assert a.digest == b.digest and a.notes == []


def test_a_folder_without_junk_has_the_digest_of_earlier_versions(tmp_path):
    # Computed before junk was passed over: checkpoints of runs from then stay valid.
    for names, digest in (
            (['cat/1.png', 'cat/2.jpg', 'dog/1.png', 'dog/deep/3.webp'], 'e343422633cd2b31'),
            (['b.png', 'a/1.png'], 'e8c12a604e2cf351'), (['1.png'], 'af29c61f0bcee3ea')):
        assert FolderImages(fill(tmp_path / digest, names)).digest == digest


def test_what_is_passed_over_and_left_out_is_counted_in_one_line_each_also_from_the_cache(tmp_path, caplog):
    root = fill(tmp_path / 'data', [
        'cat/1.jpg', 'cat/.ipynb_checkpoints/1-checkpoint.jpg', 'dog/.ipynb_checkpoints/x.jpg', 'dog/1.jpg',
        'cat/Thumbs.db', 'cat/._1.jpg', 'cat/._2.jpg', 'cat/2.heic', 'cat/3.HEIC', 'dog/4.svg', 'dog/readme',
        'dog/5.npy'])
    for folder, *_ in os.walk(root):
        os.utime(folder, (1e9, 1e9))
    notes = [
        'hidden and system files, skipped: 5 (2 ._*, 2 .ipynb_checkpoints, 1 Thumbs.db),'
        ' the first cat/._1.jpg',
        'files without an image extension, skipped: 5 (2 .heic, 1 .npy, 1 .svg, 1 without an extension),'
        ' the first cat/2.heic']
    scans = []
    for _ in range(2):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(index, '_scan', lambda *a, scan=index._scan: scans.append(a) or scan(*a))
            assert FolderImages(root).notes == notes
    assert len(scans) == 1
    assert [r.message for r in caplog.records] == 2 * [f'{root}: {note}' for note in notes]


def test_of_several_processes_the_first_speaks(tmp_path, caplog, monkeypatch):
    root = fill(tmp_path, ['cat/1.jpg', 'cat/2.heic'])
    monkeypatch.setenv('RANK', '1')
    FolderImages(root)
    assert not caplog.records
    monkeypatch.setenv('RANK', '0')
    FolderImages(root)
    assert len(caplog.records) == 1


def test_a_folder_of_nothing_but_what_is_left_out_says_so(tmp_path):
    fill(tmp_path, ['a/1.heic', '.thumbnails/1.png'])
    with pytest.raises(FileNotFoundError, match=r'no image in it.*1 \.thumbnails.*1 \.heic'):
        open_data(tmp_path)


def test_many_kinds_are_counted_and_some_are_named(tmp_path):
    root = fill(tmp_path, ['a/1.jpg', *(f'a/{i}.{i:06}' for i in range(150))])
    note, = FolderImages(root).notes
    assert ': 150 (' in note and note.count('1 .0000') == messages.MAX_NAMED - 1 and 'others' in note


def test_names_of_control_characters_and_lone_bytes_are_printable_in_the_notes(tmp_path):
    root = fill(tmp_path, ['a/1.jpg', 'a/\x1b[31m.heic', 'a/x.\x07y'])
    if os.name == 'posix':
        open(os.path.join(os.fsencode(root), b'a/\xff.raw'), 'wb').close()
    assert all(note.isprintable() for note in FolderImages(root).notes)


def test_what_may_not_be_a_class_is_named(tmp_path):
    root = fill(tmp_path, [
        'cat/1.jpg', 'Cat/1.jpg', 'e\u0301mu/1.jpg', 'ému/1.jpg', 'dog/pug/1.jpg', 'dog/pug/old/2.jpg', 'dog/3.jpg'])
    (root / 'eel').mkdir()
    images = FolderImages(root)
    if len(images) < 7:
        pytest.skip('a file system that does not distinguish case')
    nested, empty, alike = images.notes
    assert nested.endswith('labelled by the topmost folder: 2, the first dog/pug/') and images.classes[1] == 'cat'
    assert empty == 'folders without images, not used as classes: eel'
    assert alike.startswith('classes whose names differ in case, blanks or encoding only: Cat, cat, ')


def test_images_beside_class_folders_are_named(tmp_path, caplog):
    images, _ = open_data(fill(tmp_path, ['a/1.jpg', 'b/1.jpg', 'cover.jpg', 'back.jpg']))
    assert images.labels is None
    assert 'no labels, as 2 images lie beside 2 folders of images: back.jpg beside a, b' in caplog.text


@pytest.mark.skipif(os.name != 'posix', reason='links need rights on Windows')
def test_links_that_lead_nowhere_or_upwards_are_named(tmp_path):
    root = fill(tmp_path / 'data', ['a/1.jpg', 'b/1.jpg'])
    (root / 'a' / 'up').symlink_to(root)
    (root / 'c').symlink_to(tmp_path / 'a disk that is not mounted')
    assert FolderImages(root).notes == [
        'files without an image extension, skipped: 1 (1 broken links), the first c',
        'links to a folder above them, not followed: 1, the first a/up/']


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    root, scandir = fill(tmp_path, ['a/1.jpg', 'b/1.jpg']), os.scandir

    def refuse(path):
        if str(path).endswith('b' + os.sep):
            raise PermissionError(13, 'Permission denied')
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', refuse)
    assert FolderImages(root).notes[0] == (
        'unreadable folders, skipped: 1 (1 Permission denied), the first b/')


# In tars and lists


def test_junk_in_a_tar_is_passed_over_and_counted(tmp_path, caplog):
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        for name in ('./cat/1.jpg', './cat/2.jpg', '__MACOSX/cat/._1.jpg', '.ipynb_checkpoints/3.jpg', '@eaDir/4.jpg',
                     'cat/._2.jpg', 'cat/Thumbs.db', 'cat/1.json', 'cat/2.json'):
            add(tar, name, b'x')
    images, _ = open_data(tmp_path / 'a.tar')
    assert len(images) == 2 and caplog.text.count('\n') == 3 and 'no labels: no .cls' in caplog.text
    assert ': 5 (1 .ipynb_checkpoints, 1 ._*' in caplog.text.replace('1 ._*, 1 .ipynb_checkpoints',
                                                                     '1 .ipynb_checkpoints, 1 ._*')
    assert 'files without an image extension, skipped: 2 (2 .json), the first cat/1.json' in caplog.text


def test_junk_in_a_stream_is_passed_over_and_named(tmp_path, caplog):
    pytest.importorskip('webdataset', reason="needs the webdataset library: pip install '.[data]'")
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        for name in ('cat/1.jpg', '__MACOSX/cat/._1.jpg', '.ipynb_checkpoints/3.jpg', '._4.jpg', 'cat/2.jpg'):
            add(tar, name, name.encode())
    stream, _ = open_data(f'pipe:cat {tmp_path / "a.tar"}', images_per_epoch=9)
    assert sorted(stream.samples(0, 0, 0)) == [b'cat/1.jpg', b'cat/2.jpg']
    assert caplog.text.count('files are skipped') == 1 and '._' in caplog.text


@pytest.mark.parametrize('name, lines, said', [
    ('l.txt', ['a.jpg 0', 'b.jpg 1', './a.jpg 1', 'a.jpg 0'], '1 of them with another label: 2, the first ./a.jpg'),
    ('l.csv', ['path,label', 'a.jpg,x', 'b.jpg,y', 'a.jpg,x'], '0 of them with another label: 1, the first a.jpg'),
    ('l.txt', ['a.jpg', 'b.jpg', 'b.jpg'], 'images that are listed again: 1, the first b.jpg')])
def test_an_image_that_a_list_names_again_stays_and_is_named_also_from_the_cache(tmp_path, caplog, name, lines, said):
    fill(tmp_path, ['a.jpg', 'b.jpg'])
    (tmp_path / name).write_text('\n'.join(lines))
    os.utime(tmp_path / name, (1e9, 1e9))
    for times in (1, 2):
        images, _ = open_data(tmp_path / name)
        assert len(images) == len([line for line in lines if '.jpg' in line])
        assert caplog.text.count(said) == times


def test_a_list_without_repetitions_says_nothing(tmp_path, caplog):
    fill(tmp_path, ['a.jpg', 'b.jpg'])
    (tmp_path / 'l.txt').write_text('a.jpg 0\nb.jpg 1\n')
    open_data(tmp_path / 'l.txt')
    assert not caplog.records


# Parts


@pytest.mark.parametrize('names, part', [
    ('train Train TRAIN training train2017 train_set TrainSet training-images seg_train in-train-000.tar', 'train'),
    ('train.csv trainval data_train train_val', 'train'),
    ('val Valid VALIDATION dev test Testing test_set testset eval evaluation val2017 in-validation-000.tar', 'val'),
    ('strain trains pretrain latest contest devil invalid value evaluate cat testimony images meta', '')])
def test_a_part_is_known_by_a_whole_word_of_any_usual_spelling(names, part):
    assert {name: part_of(name) for name in names.split()} == dict.fromkeys(names.split(), part)


def test_validation_goes_before_test_and_other_words_must_agree():
    assert choose_parts(['test', 'Validation', 'train']) == {'train': ['train'], 'val': ['Validation', 'test']}
    assert choose_parts(['seg_test', 'seg_train', 'seg_pred']) == {'train': ['seg_train'], 'val': ['seg_test']}
    assert choose_parts(['cat', 'toy train']) == choose_parts(['toy train', 'contest']) == {}


def test_shards_are_divided_by_the_same_names_and_others_are_named(tmp_path, caplog):
    def split(*names: str) -> list[list[str]]:
        caplog.clear()
        return [[file.name for file in part] for part in split_by_name([tmp_path / name for name in names])]

    assert split('a.tar', 'b.tar') == [['a.tar', 'b.tar'], []] and not caplog.records
    assert split('training-0.tar', 'Dev-0.tar') == [['training-0.tar'], ['Dev-0.tar']] and not caplog.records
    assert split('train-0.tar', 'test-0.tar', 'val-0.tar') == [['train-0.tar'], ['val-0.tar']]
    assert 'skipped 1 files, whose names are neither like' in caplog.text and 'the first is test-0.tar' in caplog.text
    assert split('part-0.tar', 'test-0.tar') == [['part-0.tar'], ['test-0.tar']]  # test images train nothing
    assert 'training on the 1 files' in caplog.text
    assert split('val-0.tar', 'val-1.tar') == [['val-0.tar', 'val-1.tar'], []] and not caplog.records
    assert logging.getLogger('simsiam_models').level <= logging.WARNING
