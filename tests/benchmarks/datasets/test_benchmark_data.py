"""Each data set's layout gives its images and labels; an incomplete set is refused, with both counts."""
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import layouts_benchmarks as layouts
import numpy as np
import pytest
from PIL import Image

from simsiam_models import cli
from simsiam_models.benchmarks.datasets import classification, lists, sizes
from simsiam_models.benchmarks.datasets.classification import open_pair
from simsiam_models.benchmarks.datasets.lists import labelled_subset
from simsiam_models.benchmarks.datasets.voc import NAMES, open_voc07
from simsiam_models.benchmarks.samples import subset
from simsiam_models.data import MemoryImages, UnreadableError

ONE_SENTENCE = (ValueError, FileNotFoundError, RuntimeError)
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv('SIMSIAM_CACHE', str(tmp_path_factory.mktemp('cache')))


@pytest.fixture
def whole(monkeypatch) -> Callable[..., None]:
    """Declares a miniature to be the complete set."""
    def declare(kind: str, train: int, test: int, classes: int) -> None:
        monkeypatch.setitem(sizes.SIZES, kind, sizes.SIZES[kind]._replace(train=train, test=test, classes=classes))
    return declare


def assert_holds(images, root: Path, written: list[tuple[str, int]]) -> None:
    """Asserts that pixels and labels are those of the files."""
    assert len(images) == len(written)
    assert np.asarray(images.labels).tolist() == [label for _, label in written]
    for i, (path, _) in enumerate(written):
        np.testing.assert_array_equal(images.read(i), layouts.pixels(root / path))


def lists_with_prefix(root: Path) -> layouts.Written:
    """Writes iNaturalist 2018 as MMSelfSup's converter does."""
    written = layouts.write_inat18(root)
    (root / 'meta').mkdir()
    for part, rows in written.items():
        (root / f'{part}2018.json').unlink()
        (root / 'meta' / f'{part}.txt').write_text(''.join(f'{path} {label}\n' for path, label in rows))
    return written


def kaggle(root: Path) -> layouts.Written:
    inside = 'ILSVRC/Data/CLS-LOC'
    written = layouts.write_imagenet(root / inside)
    return {part: [(f'{inside}/{path}', label) for path, label in rows] for part, rows in written.items()}


def kaggle_flat(root: Path) -> layouts.Written:
    """Writes ImageNet as Kaggle's archive unpacks."""
    written = kaggle(root)
    val, sets = root / 'ILSVRC/Data/CLS-LOC/val', root / 'ILSVRC/ImageSets/CLS-LOC'
    rows = [(Path(path), label) for path, label in written['val']]
    for path, _ in rows:
        (root / path).rename(val / path.name)
    for wnid in layouts.WNIDS:
        (val / wnid).rmdir()
    boxes = ['85 1 499 272', '131 0 499 254 {0} 5 40 96 80']
    lines = [f'{p.stem},{layouts.WNIDS[y]} {boxes[n % 2].format(layouts.WNIDS[y])} ' for n, (p, y) in enumerate(rows)]
    (root / classification.SOLUTION).write_text('\n'.join(['ImageId,PredictionString', *lines]) + '\n')
    sets.mkdir(parents=True)
    (sets / 'val.txt').write_text(''.join(f'{path.stem} {n}\n' for n, (path, _) in enumerate(rows, 1)))
    return {**written, 'val': [(f'ILSVRC/Data/CLS-LOC/val/{path.name}', label) for path, label in rows]}


LAYOUTS = {  # name -> kind, writer, images of a whole set
    'ImageNet, a folder per class': ('imagenet', layouts.write_imagenet, (12, 6, 3)),
    'ImageNet, lists': ('imagenet', layouts.write_imagenet_lists, (12, 6, 3)),
    'ImageNet, below ILSVRC': ('imagenet', kaggle, (12, 6, 3)),
    'ImageNet, as Kaggle has it': ('imagenet', kaggle_flat, (12, 6, 3)),
    'Places205, blanks': ('places205', layouts.write_places205, (6, 3, 3)),
    'Places205, commas': ('places205', lambda r: layouts.write_places205(r, between=','), (6, 3, 3)),
    'Places205, short path': ('places205', lambda r: layouts.write_places205(r, images='images256'), (6, 3, 3)),
    'iNaturalist, prefix in the names': ('inat18', layouts.write_inat18, (6, 3, 3)),
    'iNaturalist, no prefix': ('inat18', lambda r: layouts.write_inat18(r, prefix=''), (6, 3, 3)),
    'iNaturalist, lists': ('inat18', lists_with_prefix, (6, 3, 3)),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_layout_gives_its_images_with_their_labels(layout: str, tmp_path: Path, whole):
    kind, write, size = LAYOUTS[layout]
    written = write(tmp_path)
    whole(kind, *size)
    pair = open_pair(kind, str(tmp_path))
    assert_holds(pair.train, tmp_path, written['train'])
    assert_holds(pair.test, tmp_path, written['val'])
    assert pair.classes == size[2] and pair.name == kind
    assert pair.counts == {'train': size[0], 'test': size[1], 'classes': size[2], 'test_classes': size[2]}
    again = open_pair(kind, str(tmp_path))  # from the cached listing
    assert again.data() == pair.data() and len(pair.data()['digest']) == 16


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_miniature_is_refused_with_the_counts_found_and_expected(layout: str, tmp_path: Path):
    kind, write, size = LAYOUTS[layout]
    write(tmp_path)
    with pytest.raises(ValueError) as e:
        open_pair(kind, str(tmp_path))
    assert f'{size[0]} training images found (expected {sizes.SIZES[kind].train:,})' in str(e.value)
    assert f'{size[1]} test images found (expected {sizes.SIZES[kind].test:,})' in str(e.value)
    assert f'{size[2]} classes found (expected {sizes.SIZES[kind].classes:,})' in str(e.value)
    assert '--allow-partial' in str(e.value) and 'http' in str(e.value) and '\n' not in str(e.value)
    assert open_pair(kind, str(tmp_path), partial=True).counts['train'] == size[0]


def test_the_expected_sizes_are_those_of_the_published_sets():
    assert {kind: size[1:4] for kind, size in sizes.SIZES.items()} == {
        'imagenet': (1281167, 50000, 1000), 'places205': (2448873, 20500, 205), 'inat18': (437513, 24426, 8142),
        'cifar10': (50000, 10000, 10), 'cifar100': (50000, 10000, 100), 'voc07': (5011, 4952, 20),
        'voc0712': (16551, 4952, 20), 'coco': (118287, 5000, 80), 'voc12aug': (10582, 1449, 21),
        'cityscapes': (2975, 500, 19)}


def test_every_single_count_is_checked():
    right = {'train': 1281167, 'test': 50000, 'classes': 1000, 'test_classes': 1000}
    assert sizes.deviation('imagenet', right) is None
    for key in right:
        found = sizes.deviation('imagenet', {**right, key: right[key] - 1})
        assert found and f'{right[key] - 1:,}' in found and f'{right[key]:,}' in found
    assert 'no number of training images' in sizes.deviation('imagenet', {'test': 50000, 'classes': 1000})
    assert sizes.deviation('folder', {}) is None


@pytest.mark.parametrize('hundred', [False, True])
def test_cifar_is_opened_and_the_other_cifar_is_refused(hundred: bool, tmp_path: Path, whole):
    labels = layouts.write_cifar(tmp_path, hundred, 100, 50)
    kind, other = ('cifar100', 'cifar10') if hundred else ('cifar10', 'cifar100')
    classes = 100 if hundred else 10
    whole(kind, 100, 50, classes)
    pair = open_pair(kind, str(tmp_path), partial=hundred)  # 50 test images cannot have 100 classes
    assert pair.train.labels.tolist() == labels['train'] and pair.test.labels.tolist() == labels['test']
    np.testing.assert_array_equal(pair.train.read(3)[..., 1], layouts.digit(3, (32, 32)))
    with pytest.raises(ValueError, match=rf'{classes} classes found \(expected {110 - classes}\)'):
        open_pair(other, str(tmp_path))


def test_places205_is_found_under_either_spelling_and_from_the_folder_above(tmp_path: Path):
    layouts.write_places205(tmp_path / 'Places205')
    for given in ('Places205', 'places205', '.'):
        assert len(open_pair('places205', str(tmp_path / given), partial=True).train) == 6
    for given in ('/', '.', str(tmp_path / 'Places205' / 'data')):
        with pytest.raises(FileNotFoundError, match='trainvalsplit_places205 is not below it'):
            open_pair('places205', given, partial=True)


@pytest.mark.parametrize('layout', [k for k in LAYOUTS if 'list' in k or 'Places' in k or 'iNat' in k])
def test_a_listed_image_that_is_not_there_is_named_and_only_left_out_when_allowed(layout, tmp_path, whole, caplog):
    kind, write, size = LAYOUTS[layout]
    written = write(tmp_path)
    gone = written['train'].pop(2)
    (tmp_path / gone[0]).unlink()
    whole(kind, *size)  # by its lists it is whole
    with pytest.raises(FileNotFoundError, match=f'{size[0] - 1} images found below .*, {size[0]} named in') as e:
        open_pair(kind, str(tmp_path))
    assert Path(gone[0]).name in str(e.value)
    pair = open_pair(kind, str(tmp_path), partial=True)
    assert_holds(pair.train, tmp_path, written['train'])
    assert 'left out' in caplog.text
    for path, _ in written['train']:
        (tmp_path / path).unlink()
    with pytest.raises(FileNotFoundError, match='0 images found'):
        open_pair(kind, str(tmp_path), partial=True)


@pytest.mark.parametrize('layout', [k for k in LAYOUTS if 'lists' in k or 'Places' in k or 'Kaggle' in k])
def test_an_image_that_a_list_names_twice_counts_once(layout: str, tmp_path: Path, whole, caplog):
    kind, write, size = LAYOUTS[layout]
    written = write(tmp_path)
    lists = ('meta/val.txt', 'trainvalsplit_places205/val_places205.csv', classification.SOLUTION)
    file = next(tmp_path / name for name in lists if (tmp_path / name).is_file())
    lines = file.read_text().splitlines()
    file.write_text('\n'.join([*lines[:-1], lines[-2]]))
    whole(kind, *size)
    with pytest.raises(ValueError, match=f'{size[1] - 1} images found below .*, {size[1]} named in') as e:
        open_pair(kind, str(tmp_path))
    again = Path(written['val'][-2][0]).name
    assert again in str(e.value) and 'named twice' in str(e.value) and '\n' not in str(e.value)
    assert_holds(open_pair(kind, str(tmp_path), partial=True).test, tmp_path, written['val'][:-1])
    assert f'{again}): the others are left out' in caplog.text


def test_a_list_that_changed_is_read_again(tmp_path: Path):
    layouts.write_imagenet_lists(tmp_path)
    file = tmp_path / 'meta' / 'train.txt'
    before = open_pair('imagenet', str(tmp_path), partial=True)
    lines = file.read_text().splitlines()
    file.write_text('\n'.join(lines[:-1]))
    after = open_pair('imagenet', str(tmp_path), partial=True)
    assert len(after.train) == len(before.train) - 1 and after.train.digest != before.train.digest


def test_a_path_in_a_list_may_have_blanks_and_commas(tmp_path: Path):
    (tmp_path / 'list.txt').write_text('a b/c, d.jpg 3\n\n./x 1.jpg,0\r\nü.jpg\t2\n')
    listing = lists.parse_list(tmp_path / 'list.txt')
    assert bytes(listing.paths).decode() == 'a b/c, d.jpgx 1.jpgü.jpg' and listing.labels.tolist() == [3, 0, 2]


@pytest.mark.parametrize('line', [
    'n01440764/a.JPEG', 'n01440764/a.JPEG cat', 'a.JPEG -1', 'a.JPEG 1.5', '7', 'a\0b.jpg 1', 'a.JPEG 99999999999',
    'a.JPEG 100000', 'a.JPEG ²'])
def test_a_malformed_line_is_named(line: str, tmp_path: Path):
    layouts.write_imagenet_lists(tmp_path)
    with open(tmp_path / 'meta' / 'train.txt', 'a') as f:
        f.write(line + '\n')
    with pytest.raises(ValueError, match='train.txt, line 13: .* is not `path label`'):
        open_pair('imagenet', str(tmp_path), partial=True)


def test_a_flat_val_without_lists_says_what_to_do(tmp_path: Path):
    layouts.write_imagenet_lists(tmp_path)
    (tmp_path / 'meta' / 'val.txt').unlink()
    with pytest.raises(FileNotFoundError, match='has no folder per class and no list: .*val.txt'):
        open_pair('imagenet', str(tmp_path))


@pytest.mark.parametrize('place', ['.', 'ILSVRC', 'ILSVRC/Data', 'ILSVRC/Data/CLS-LOC'])
@pytest.mark.parametrize('given', ['.', 'ILSVRC', 'ILSVRC/Data/CLS-LOC'])
def test_kaggles_imagenet_is_found_from_three_folders_and_its_list_above_it(given, place, tmp_path, monkeypatch):
    written = kaggle_flat(tmp_path)
    if place != '.':
        (tmp_path / classification.SOLUTION).rename(tmp_path / place / classification.SOLUTION)
    pair = open_pair('imagenet', str(tmp_path / given), partial=True)
    assert_holds(pair.train, tmp_path, written['train'])
    assert_holds(pair.test, tmp_path, written['val'])
    assert pair.train.classes == pair.test.classes == list(layouts.WNIDS)
    monkeypatch.chdir(tmp_path / given)
    assert open_pair('imagenet', '.', partial=True).data() == pair.data()


def test_the_solution_of_kaggle_may_lack_classes_and_images(tmp_path: Path):
    written = kaggle_flat(tmp_path)
    file = tmp_path / classification.SOLUTION
    lines = file.read_text().splitlines()
    file.write_text('\n'.join(line for line in lines if layouts.WNIDS[0] not in line))
    test = open_pair('imagenet', str(tmp_path), partial=True).test
    assert_holds(test, tmp_path, [row for row in written['val'] if row[1]])
    (tmp_path / written['val'][-1][0]).unlink()
    assert_holds(open_pair('imagenet', str(tmp_path), partial=True).test, tmp_path, written['val'][2:-1])
    for line in ('x', 'x,', 'x,85 1 499 272', 'n01440764', 'a/x,n01440764 1 2 3 4', 'x,n014407645'):
        file.write_text('\n'.join([*lines, line]))
        with pytest.raises(ValueError, match=rf'{classification.SOLUTION}, line 8: .* is not `image,class`'):
            open_pair('imagenet', str(tmp_path), partial=True)


def test_a_flat_val_names_what_may_be_put_where(tmp_path: Path):
    kaggle_flat(tmp_path)
    (tmp_path / classification.SOLUTION).unlink()
    with pytest.raises(FileNotFoundError) as e:
        open_pair('imagenet', str(tmp_path))
    tree = tmp_path / 'ILSVRC/Data/CLS-LOC'
    assert f'{tree}/meta/train.txt and {tree}/meta/val.txt' in str(e.value)
    assert f'LOC_val_solution.csv of Kaggle into {tree} or up to three folders above' in str(e.value)
    shutil.rmtree(tree / 'val')
    with pytest.raises(FileNotFoundError, match='has no validation part .none of val'):
        open_pair('imagenet', str(tmp_path))


@pytest.mark.parametrize('stray', ['.ipynb_checkpoints', '.thumbs/x.jpg', 'tmp', 'tmp/x.jpg', 'x.jpg'])
@pytest.mark.parametrize('write', [layouts.write_imagenet_lists, kaggle_flat])
def test_unlisted_files_in_val_change_nothing(write, stray: str, tmp_path: Path):
    written = write(tmp_path)
    before = open_pair('imagenet', str(tmp_path), partial=True)
    put(tmp_path / Path(written['val'][0][0]).parent / stray)
    after = open_pair('imagenet', str(tmp_path), partial=True)
    assert_holds(after.test, tmp_path, written['val'])
    assert after.data() == before.data()


def test_replaced_images_change_the_digest(tmp_path: Path):
    for part in ('train', 'val'):
        for i in range(40):
            layouts.write_image(tmp_path / part / str(i % 2) / f'{i:02}.png', i)
    before = open_pair('folder', str(tmp_path)).data()
    pictures = sorted((tmp_path / 'train').rglob('*.png'))
    assert open_pair('folder', str(tmp_path)).data() == before
    pictures[1].write_bytes(pictures[1].read_bytes() + b'x')  # not among the 16 of which pixels are looked at
    assert open_pair('folder', str(tmp_path)).data()['digest'] != before['digest']


def put(path: Path) -> None:
    layouts.write_image(path, 0) if path.suffix == '.jpg' else path.mkdir()


@pytest.mark.parametrize('part', ['train', 'val'])
@pytest.mark.parametrize('stray', ['.ipynb_checkpoints', '.thumbs/x.jpg', '._x.jpg'])
def test_hidden_folders_are_not_classes(part: str, stray: str, tmp_path: Path, caplog):
    written = layouts.write_imagenet(tmp_path)
    before = open_pair('imagenet', str(tmp_path), partial=True)
    put(tmp_path / part / stray)
    after = open_pair('imagenet', str(tmp_path), partial=True)
    assert_holds(after.train, tmp_path, written['train'])
    assert_holds(after.test, tmp_path, written['val'])
    assert after.data() == before.data() and after.train.classes == before.train.classes
    name = Path(stray).parts[0]
    kind = '._*' if name.startswith('._') else name
    assert f'{tmp_path / part}: hidden and system files, skipped: 1 (1 {kind})' in (
        caplog.text)


@pytest.mark.parametrize(('write', 'stray', 'first'), [
    (layouts.write_imagenet, 'train/x.jpg', layouts.WNIDS[0]), (layouts.write_imagenet, 'val/x.jpg', layouts.WNIDS[0]),
    (kaggle, 'ILSVRC/Data/CLS-LOC/val/x.jpg', layouts.WNIDS[0]),
    (layouts.write_imagenet_lists, 'val/tmp', 'tmp')])
def test_an_image_beside_the_class_folders_is_named(write, stray: str, first: str, tmp_path: Path):
    write(tmp_path)
    (tmp_path / 'meta' / 'val.txt').unlink(missing_ok=True)
    if write is kaggle:  # which stays where somebody sorted val
        (tmp_path / classification.SOLUTION).write_text(f'ImageId,PredictionString\nx,{first} 1 2 3 4\n')
    put(tmp_path / stray)
    image = 'ILSVRC2012_val_00000001.JPEG' if first == 'tmp' else 'x.jpg'
    parent = (tmp_path / stray).parent
    with pytest.raises(ValueError, match=f'{parent}: the image {image} lies beside the folder {first}'):
        open_pair('imagenet', str(tmp_path), partial=True)


def test_embed_names_a_val_without_labels(tmp_path: Path, capsys):
    layouts.write_imagenet_lists(tmp_path)
    command = ['embed', str(tmp_path), '--part', 'val', '--model', 'resnet10t:random', '--out', str(tmp_path / 'x.npz')]
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert f'{tmp_path / "val"} cannot be the validation part of {tmp_path}: its images have no labels' in said
    assert f'give {tmp_path / "val"} itself' in said
    small = ['--image-size', '32', '--resize', '32', '--device', 'cpu', '--cache', str(tmp_path / 'cache')]
    assert cli.main(['embed', str(tmp_path / 'val'), *command[4:], *small]) == 0
    assert len(np.load(tmp_path / 'x.npz')['avgpool']) == 6
    shutil.rmtree(tmp_path / 'val')
    assert cli.main(command) == 1
    assert 'has no validation part; leave --part out' in capsys.readouterr().err


def inat_json(**changes) -> dict:
    return {
        'images': [{'id': 1, 'file_name': 'train_val2018/x.jpg'}],
        'annotations': [{'id': 1, 'image_id': 1, 'category_id': 4}],
        'categories': [{'id': 4, 'name': 'oak'}], **changes}


@pytest.mark.parametrize(('text', 'said'), [
    ('{"images": [', 'JSON'), ('[]', 'JSON'), ('{}', "no 'categories'"), ('\xff\xfe', 'JSON'), ('[' * 100_000, 'JSON'),
    (json.dumps(inat_json(annotations=[])), 'image 1 has no annotation'),
    (json.dumps(inat_json(annotations=[{'image_id': 1, 'category_id': 5}])), 'image 1 has no annotation'),
    (json.dumps(inat_json(annotations=[{'image_id': 1, 'category_id': c} for c in (4, 5)])), 'two categories, 4 and 5'),
    (json.dumps(inat_json(images=[{'id': 1}])), "no 'file_name'"),
    (json.dumps(inat_json(images=[{'id': 1, 'file_name': 3}])), 'JSON'),
    (json.dumps(inat_json(images=[{'id': [1], 'file_name': 'x.jpg'}])), 'JSON'),
    (json.dumps(inat_json(images=[])), 'names no image')])
def test_a_broken_json_of_inaturalist_raises_one_line(text: str, said: str, tmp_path: Path):
    layouts.write_inat18(tmp_path)
    (tmp_path / 'train2018.json').write_text(text, encoding='latin-1')
    with pytest.raises(ValueError, match='train2018.json') as e:
        open_pair('inat18', str(tmp_path), partial=True)
    assert said in str(e.value) and '\n' not in str(e.value)


def test_the_lists_of_inaturalist_are_read_in_linear_time(tmp_path: Path):
    n = 60_000
    file = tmp_path / 'train2018.json'
    file.write_text(json.dumps({
        'images': [{'id': i, 'file_name': f'train_val2018/{i}.jpg'} for i in range(n)],
        'annotations': [{'image_id': i, 'category_id': i % 8142} for i in range(n)],
        'categories': [{'id': i, 'name': str(i)} for i in range(8142)]}))
    started = time.perf_counter()
    listing = lists.parse_inat(file)
    assert time.perf_counter() - started < 15  # the product of both lists would take minutes
    assert listing.labels.tolist() == [i % 8142 for i in range(n)]


def test_a_folder_takes_val_before_test_and_maps_classes_by_name(tmp_path: Path):
    written = layouts.write_imagenet(tmp_path, wnids=('cat', 'dog', 'owl'))
    shutil.rmtree(tmp_path / 'val' / 'cat')
    shutil.copytree(tmp_path / 'train', tmp_path / 'test')
    pair = open_pair('folder', str(tmp_path))
    assert pair.train.classes == pair.test.classes == ['cat', 'dog', 'owl']
    assert_holds(pair.test, tmp_path, [row for row in written['val'] if row[1]])
    assert pair.counts == {'train': 12, 'test': 4, 'classes': 3, 'test_classes': 2}
    shutil.rmtree(tmp_path / 'val')
    assert len(open_pair('folder', str(tmp_path)).test) == 12


def test_test_classes_without_training_images_are_named(tmp_path: Path):
    layouts.write_imagenet(tmp_path)
    shutil.rmtree(tmp_path / 'train' / layouts.WNIDS[1])
    with pytest.raises(
            ValueError, match=f"1 of 3 test classes have no training image, the first is '{layouts.WNIDS[1]}'"):
        open_pair('folder', str(tmp_path))


def test_wrong_data_raise_one_line(tmp_path: Path):
    empty, flat, alone = tmp_path / 'empty', tmp_path / 'flat', tmp_path / 'alone'
    empty.mkdir()
    for part in ('train', 'val'):
        layouts.write_image(flat / part / '1.jpg', 1)
    layouts.write_image(alone / 'train' / 'cat' / '1.jpg', 1)
    (tmp_path / 'half' / 'trainvalsplit_places205').mkdir(parents=True)
    (tmp_path / 'bare' / 'train_val2018').mkdir(parents=True)
    roots = (empty, tmp_path / 'none', flat, alone, tmp_path / 'half', tmp_path / 'bare', flat / 'train' / '1.jpg')
    for kind in classification.KINDS:
        for root in roots:
            with pytest.raises(ONE_SENTENCE) as e:
                open_pair(kind, str(root), partial=True)
            assert '\n' not in str(e.value) and len(str(e.value)) > 30
    with pytest.raises(ValueError, match='--dataset mnist: no such data set; choose one of imagenet'):
        open_pair('mnist', str(empty))
    for stream in ('pipe:cat x.tar', 'hf-stream:someone/set', 'https://127.0.0.1/x.tar'):
        with pytest.raises(ValueError, match='a stream has no labels'):
            open_pair('imagenet', stream)


def test_any_form_of_data_with_two_labelled_parts_can_be_measured():
    pair = open_pair('folder', 'demo')
    assert pair.counts == {'train': 3000, 'test': 768, 'classes': 12, 'test_classes': 12}


def test_images_are_read_from_many_threads_at_once_and_a_broken_one_is_named(tmp_path: Path):
    written = layouts.write_imagenet(tmp_path, 10)
    (tmp_path / written['train'][4][0]).write_bytes(b'\xff\xd8 no JPEG')
    train = open_pair('imagenet', str(tmp_path), partial=True).train
    found: dict[tuple[int, int], np.ndarray] = {}

    def read(thread: int) -> None:
        for i in range(len(train)):
            if i != 4:
                found[thread, i] = train.read(i)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 * 29
    for (_, i), image in found.items():
        np.testing.assert_array_equal(image, layouts.pixels(tmp_path / written['train'][i][0]))
    with pytest.raises(UnreadableError, match=Path(written['train'][4][0]).name):
        train.read(4)


def test_a_subset_is_the_chosen_images_in_the_chosen_order():
    pixels = np.arange(5 * 12, dtype=np.uint8).reshape(5, 2, 2, 3)
    images = MemoryImages(pixels, np.array([0, 1, 0, 1, 1]), ['a', 'b'], 'x')
    part = subset(images, [4, 0, 4])
    assert len(part) == 3 and part.labels.tolist() == [1, 0, 1] and part.classes == ['a', 'b']
    for at, i in enumerate([4, 0, 4]):
        np.testing.assert_array_equal(part.read(at), images.images[i])
    assert part.digest == subset(images, np.array([4, 0, 4])).digest
    assert len({images.digest, part.digest, subset(images, [0, 4, 4]).digest, subset(images, []).digest}) == 4
    assert subset(MemoryImages(images.images, None, [], 'x'), [1]).labels is None
    for wrong in ([5], [-1], [0.5], [[0]], ['a']):
        with pytest.raises(ValueError, match='x: '):
            subset(images, wrong)


@pytest.fixture
def semi(tmp_path: Path, monkeypatch) -> tuple[Path, Path]:
    """Writes ImageNet and an unordered list of 5 of its training images."""
    written = layouts.write_imagenet(tmp_path / 'imagenet')
    names = [Path(path).name for path, _ in written['train']]
    (tmp_path / '1percent.txt').write_text('\n'.join(names[i] for i in (7, 2, 11, 0, 5)) + '\n')
    monkeypatch.setitem(sizes.LABELLED, '1pct', 5)
    return tmp_path / 'imagenet', tmp_path / '1percent.txt'


@pytest.mark.parametrize('lists', [False, True])
def test_a_semi_supervised_list_gives_its_images_with_the_class_before_the_underscore(semi, lists: bool):
    root, file = semi
    if lists:
        shutil.rmtree(root)
        layouts.write_imagenet_lists(root)
    train = open_pair('imagenet', str(root), partial=True).train
    part = labelled_subset(train, '1pct', file)
    names = file.read_text().split()
    assert [layouts.WNIDS[label] for label in part.labels] == [name.split('_')[0] for name in names]
    for i, name in enumerate(names):
        np.testing.assert_array_equal(part.read(i), layouts.pixels(root / 'train' / name.split('_')[0] / name))


@pytest.mark.parametrize('form', ['{0}/{1} {2}', '{1} {2}', '{0}/{1}', 'train/{0}/{1}\t{2}'])
@pytest.mark.parametrize('lists', [False, True])
def test_a_semi_supervised_list_may_have_folders_and_labels_as_mmselfsups_has(semi, lists: bool, form: str):
    root, file = semi
    if lists:
        shutil.rmtree(root)
        layouts.write_imagenet_lists(root)
    train = open_pair('imagenet', str(root), partial=True).train
    expected = labelled_subset(train, '1pct', file)
    names = [(name.split('_')[0], name) for name in file.read_text().split()]
    rows = [(wnid, name, layouts.WNIDS.index(wnid)) for wnid, name in names]
    file.write_text(''.join(form.format(*row) + '\n' for row in rows))
    part = labelled_subset(train, '1pct', file)
    assert part.digest == expected.digest and part.labels.tolist() == [label for *_, label in rows]
    if '{2}' not in form:
        return
    rows[3] = (*rows[3][:2], rows[3][2] + 1)
    file.write_text(''.join(form.format(*row) + '\n' for row in rows))
    with pytest.raises(ValueError, match=f'{rows[3][1]} has the label {rows[3][2]} there, but {rows[3][2] - 1} '):
        labelled_subset(train, '1pct', file)


def test_a_listed_image_in_the_folder_of_another_class_is_missing(semi):
    root, file = semi
    name = file.read_text().split()[0]
    own = name.split('_')[0]
    other = next(wnid for wnid in layouts.WNIDS if wnid != own)
    (root / 'train' / own / name).rename(root / 'train' / other / name)
    train = open_pair('imagenet', str(root), partial=True).train
    with pytest.raises(FileNotFoundError, match=f'1 of the 5 images .* the first is {own}/{name}'):
        labelled_subset(train, '1pct', file)


def test_a_semi_supervised_list_of_another_length_or_with_missing_images_is_refused(semi):
    root, file = semi
    train = open_pair('imagenet', str(root), partial=True).train
    with pytest.raises(ValueError, match='5 images found, but the list of 10pct has 128,116'):
        labelled_subset(train, '10pct', file)
    assert len(labelled_subset(train, '10pct', file, partial=True)) == 5
    with pytest.raises(ValueError, match='5pct: no such share'):
        labelled_subset(train, '5pct', file)
    with pytest.raises(FileNotFoundError, match='no such list'):
        labelled_subset(train, '1pct', file.with_name('none.txt'))
    with pytest.raises(ValueError, match='these images are not files'):
        labelled_subset(open_pair('folder', 'demo').train, '1pct', file)
    lines = file.read_text().split()
    file.write_text('\n'.join([*lines[:4], lines[0]]))
    with pytest.raises(ValueError, match='1 of its 5 images are named twice'):
        labelled_subset(train, '1pct', file)
    for name in ('n01440764_999.JPEG', 'n99999999_1.JPEG', 'x.JPEG', 'n01440764_10.JPEG '[:-2]):
        file.write_text('\n'.join([*lines[:4], name]))
        with pytest.raises(FileNotFoundError, match='1 of the 5 images that .* names are missing, the first is'):
            labelled_subset(train, '1pct', file)
    assert sizes.LABELLED['10pct'] == 128116


@pytest.mark.parametrize('below', ['.', 'VOCdevkit', 'VOCdevkit/VOC2007'])
def test_voc07_has_its_images_by_id_and_its_labels_by_the_rule(below: str, tmp_path: Path, whole):
    ids, labels = layouts.write_voc07(tmp_path)
    whole('voc07', 30, 20, 20)
    voc = open_voc07(tmp_path / below)
    assert voc.names == list(layouts.VOC_NAMES) == sorted(voc.names)
    assert voc.counts == {'train': 30, 'test': 20, 'classes': 20}
    for part, images, found in (('trainval', voc.trainval, voc.labels_trainval), ('test', voc.test, voc.labels_test)):
        assert found.dtype == np.int8 and {-1, 0, 1} == set(found.ravel())
        np.testing.assert_array_equal(found, labels[part])
        assert len(images) == len(ids[part]) and images.labels is None
        for i, at in enumerate(ids[part]):
            np.testing.assert_array_equal(
                images.read(i), layouts.pixels(tmp_path / f'VOCdevkit/VOC2007/JPEGImages/{at}.jpg'))
    assert voc.data() == open_voc07(tmp_path).data() and voc.trainval.digest != voc.test.digest


def test_voc07_values_mean_present_absent_and_difficult(tmp_path: Path):
    layouts.write_voc07(tmp_path, 3, 3, ('cat',))
    main = tmp_path / 'VOCdevkit/VOC2007/ImageSets/Main'
    (main / 'cat_trainval.txt').write_text('000009  0\n000005  1\n000007 -1\n')
    voc = open_voc07(tmp_path, partial=True)
    assert voc.labels_trainval.tolist() == [[1], [0], [-1]]  # ids 5, 7, 9
    (main / 'cat_trainval.txt').write_text('000009  0\n000005  1\n000007  1\n')
    assert open_voc07(tmp_path, partial=True).data()['digest'] != voc.data()['digest']


def test_part_of_voc07_is_refused_with_both_counts(tmp_path: Path):
    layouts.write_voc07(tmp_path)
    with pytest.raises(ValueError) as e:
        open_voc07(tmp_path)
    assert '30 training images found (expected 5,011)' in str(e.value)
    assert '20 test images found (expected 4,952)' in str(e.value)
    assert open_voc07(tmp_path, partial=True).counts['train'] == 30


def test_missing_or_inconsistent_files_of_voc07_raise_one_line(tmp_path: Path, whole, caplog):
    whole('voc07', 30, 20, 20)
    with pytest.raises(FileNotFoundError, match='neither it nor VOCdevkit/VOC2007 below it has JPEGImages'):
        open_voc07(tmp_path)
    layouts.write_voc07(tmp_path)
    folder = tmp_path / 'VOCdevkit/VOC2007'
    main, file = folder / 'ImageSets/Main', folder / 'ImageSets/Main/cat_test.txt'
    text = file.read_text()
    for wrong, said in (
        (text.replace('000006', '900006'),
         'its 20 images are not the 20 of aeroplane_test.txt: only one of the two has 000006'),
        (''.join(text.splitlines(True)[1:]), 'its 19 images are not the 20 of aeroplane_test.txt'),
        (text + '000004 -1\n', 'line 21: 000004 is named twice'),
        (text + '000044 2\n', "line 21: '000044 2' is not an id"),
        (text + '000044\n', 'line 21: '), (text + '../x 1\n', 'line 21: '), ('', 'names no image'),
        ('\0\xff', 'line 1: ')):
        file.write_text(wrong, encoding='latin-1')
        for partial in (False, True):
            with pytest.raises(ValueError, match=said) as e:
                open_voc07(tmp_path, partial)
            assert 'cat_test.txt' in str(e.value)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r'39 files of classes found \(expected 40.*cat_test.txt'):
        open_voc07(tmp_path)
    with pytest.raises(FileNotFoundError, match='missing: cat_test.txt'):
        open_voc07(tmp_path, partial=True)
    file.write_text(text)
    for part in ('trainval', 'test'):
        shutil.copy(main / f'cat_{part}.txt', main / f'unicorn_{part}.txt')
    with pytest.raises(ValueError, match='unicorn is not a class of VOC07'):
        open_voc07(tmp_path)
    for part in ('trainval', 'test'):
        (main / f'unicorn_{part}.txt').unlink()
    (folder / 'JPEGImages' / '000008.jpg').unlink()
    with pytest.raises(
            FileNotFoundError, match=r'19 images found in .*, 20 named for test \(missing: 000008.jpg\)'):
        open_voc07(tmp_path)
    voc = open_voc07(tmp_path, partial=True)
    assert voc.counts['test'] == len(voc.test) == len(voc.labels_test) == 19 and 'left out' in caplog.text
    assert voc.test.path(2).name == '000010.jpg' and voc.labels_test[2].tolist() == [0, 0, 0, 1] + [0] * 16


def test_the_classes_of_voc07_are_those_of_the_development_kit():
    assert NAMES == list(layouts.VOC_NAMES)


def test_a_data_set_of_the_hub_is_opened_through_its_library(tmp_path: Path, monkeypatch):
    library = pytest.importorskip('datasets', reason="needs the datasets library: pip install '.[data]'")
    monkeypatch.setattr(library.config, 'HF_DATASETS_CACHE', tmp_path / 'hf')
    monkeypatch.setattr(library.config, 'HF_HUB_OFFLINE', True)
    written = layouts.write_imagenet(tmp_path / 'files')
    features = library.Features({'image': library.Image(), 'label': library.ClassLabel(names=list(layouts.WNIDS))})
    splits = {
        name: library.Dataset.from_dict({
            'image': [Image.open(tmp_path / 'files' / path) for path, _ in rows],
            'label': [label for _, label in rows]}, features)
        for name, rows in (('train', written['train']), ('validation', written['val']))}
    library.DatasetDict(splits).save_to_disk(tmp_path / 'saved')
    pair = open_pair('imagenet', str(tmp_path / 'saved'), partial=True)
    assert_holds(pair.test, tmp_path / 'files', written['val'])
    assert pair.train.labels.tolist() == [label for _, label in written['train']] and pair.classes == 3
    with pytest.raises(ValueError, match=r'12 training images found \(expected 1,281,167\)'):
        open_pair('imagenet', f'hf:{tmp_path / "saved"}')
