"""The data sets of segmentation: which images and masks belong together, and masks that are not what they should be."""
import shutil
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_data import unpack_real
from scenes import NAMES, write_scenes

from simsiam_models.benchmarks.datasets.cityscapes import CLASSES
from simsiam_models.benchmarks.datasets.mask_files import decode_mask
from simsiam_models.benchmarks.datasets.masks import open_masks
from simsiam_models.data import DataError, UnreadableError

IDS = np.array([[0, 1, 2, 255], [3, 2, 1, 0], [1, 1, 1, 1]], np.uint8)


def encode(image: Image.Image, kind: str = 'PNG', **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def palette(ids: np.ndarray, colours: list[int]) -> Image.Image:
    image = Image.fromarray(ids)
    image.putpalette(colours + [0] * (768 - len(colours)))
    return image


def gray_png(ids: np.ndarray, bits: int) -> bytes:
    """A gray PNG of 1, 2, 4 or 16 bits, put together by hand."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    rows = b''
    for row in ids.tolist():
        text = ''.join(format(v, f'0{bits}b') for v in row)
        text += '0' * (-len(text) % 8)
        rows += b'\0' + int(text, 2).to_bytes(len(text) // 8, 'big')
    header = struct.pack('>IIBBBBB', ids.shape[1], ids.shape[0], bits, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


# --- files

@pytest.mark.parametrize('data', [
    encode(Image.fromarray(IDS)), encode(palette(IDS, [9, 8, 7, 200, 100, 0])),
    encode(palette(IDS, [v for v in range(255, -1, -1) for _ in range(3)])),  # its gray colours are not the ids
    encode(Image.fromarray(np.stack([IDS] * 3, 2))), encode(Image.fromarray(np.stack([IDS] * 3 + [IDS * 0 + 255], 2))),
    gray_png(IDS, 16)], ids=['gray', 'palette', 'reversed palette', 'rgb of equal channels', 'opaque rgba', '16 bits'])
def test_ids_are_gray_levels_or_palette_numbers(data: bytes):
    mask = decode_mask(data, 'a.png')
    assert mask.dtype == np.uint8 and np.array_equal(mask, IDS)


@pytest.mark.parametrize('bits', [1, 2, 4])
def test_gray_levels_of_few_bits_are_not_scaled_up(bits: int):
    ids = np.minimum(np.arange(20, dtype=np.uint8).reshape(4, 5), 2**bits - 1)
    assert np.array_equal(decode_mask(gray_png(ids, bits), 'a.png'), ids)
    if bits > 1:
        assert not np.array_equal(np.asarray(Image.open(BytesIO(gray_png(ids, bits)))), ids)  # Pillow scales them


@pytest.mark.parametrize('bits', [1, 2, 4])
def test_palettes_of_few_bits_are_read(bits: int):
    ids = np.arange(6, dtype=np.uint8).reshape(2, 3) % 2**bits
    assert np.array_equal(decode_mask(encode(palette(ids, [1, 2, 3]), bits=bits), 'a.png'), ids)


@pytest.mark.parametrize(('data', 'said'), [
    (encode(Image.fromarray(IDS), 'JPEG'), 'a.png: a mask saved as JPEG, which changes ids'),
    (encode(Image.fromarray(IDS), 'BMP'), 'a mask saved as BMP; save masks as PNG'),
    (encode(Image.fromarray(IDS), 'WEBP'), 'a mask saved as WEBP'), (b'', 'a mask of 0 bytes'),
    (b'id,name', 'a mask of an unknown format'),
    (encode(Image.new('RGB', (4, 4), (128, 0, 0))), r'a mask in colours \(\[128, 0, 0\] at column 0, row 0\)'),
    (encode(Image.new('RGBA', (4, 4), (0, 0, 0, 7))), 'a mask with transparency'),
    (gray_png(np.array([[0, 300]]), 16), 'a mask of 16 bits with the id 300')])
def test_masks_that_are_no_ids_are_refused_by_name(data: bytes, said: str):
    with pytest.raises(DataError, match=said) as e:
        decode_mask(data, 'a.png')
    assert not isinstance(e.value, UnreadableError) and 'ids from 0 to 254' in str(e.value)


def test_a_mask_that_is_cut_off_is_unreadable():
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 9, (64, 64)).astype(np.uint8)))
    for end in (20, 200):
        with pytest.raises(UnreadableError, match='a.png: cannot be read as a mask'):
            decode_mask(data[:end], 'a.png')


# --- a user's own folder

def test_parts_are_found_inside_and_above_the_folders(tmp_path: Path):
    inside = write_scenes(tmp_path / 'inside', 4, 2)
    above = tmp_path / 'above'
    for part in ('train', 'val'):
        for folder in ('images', 'masks'):
            shutil.copytree(inside / folder / part, above / part / folder)
    for root in (inside, above):
        pair = open_masks('folder', root)
        assert pair.counts['train'] == 4 and pair.counts['test'] == 2
        image, mask = pair.test.read_pair(1)
        assert image.shape == (48, 64, 3) and mask.shape == (48, 64)
    assert pair.classes == 3 and pair.train.classes == ['0', '1', '2']  # no classes.txt there: the ids found
    assert open_masks('folder', inside).train.classes == NAMES
    assert 'the classes are the ids found, 0 to 2' in pair.describe()


def test_without_a_part_to_test_on_a_seeded_share_is_held_out(tmp_path: Path):
    root = write_scenes(tmp_path, 10, 0)
    pair, again, other = (open_masks('folder', root, val_share=0.3, seed=seed) for seed in (0, 0, 1))
    names = [{p.test.images.name_of(int(i)) for i in p.test.indices} for p in (pair, again, other)]
    assert len(names[0]) == 3 and names[0] == names[1] != names[2]
    assert not names[0] & {pair.train.images.name_of(int(i)) for i in pair.train.indices}
    assert pair.held_out == '3 of 10 images, 0.3 of all, held out by seed 0'
    assert pair.digest == again.digest != other.digest


def test_masks_may_have_an_end_more_than_their_images(tmp_path: Path):
    root = write_scenes(tmp_path, 4, 2)
    for file in (root / 'masks').rglob('*.png'):
        file.rename(file.with_name(f'{file.stem}_mask.png'))
    assert open_masks('folder', root).counts == {'train': 4, 'test': 2, 'classes': 3}


def test_ids_with_gaps_are_numbered_in_order_and_written_back(tmp_path: Path):
    root = write_scenes(tmp_path, 4, 2)
    for file in (root / 'masks').rglob('*.png'):
        ids = np.asarray(Image.open(file))
        Image.fromarray(np.where(ids == 2, 200, np.where(ids == 1, 7, ids)).astype(np.uint8)).save(file)
    (root / 'classes.txt').write_text('200 square\n0: ground\n7, disc\n255 nothing\n')
    pair = open_masks('folder', root)
    assert pair.train.classes == ['ground', 'disc', 'square'] and pair.train.kinds.ids == [0, 7, 200]
    raw = np.asarray(Image.open(root / 'masks' / 'train' / '0000.png'))
    labels = pair.train.read_mask(0)
    assert np.array_equal(np.array([0, 7, 200, *[255] * 253])[labels], raw)


def break_mask(root: Path, change) -> Path:
    file = root / 'masks' / 'train' / '0001.png'
    change(file)
    return root


def set_id(value: int):
    def change(file: Path) -> None:
        ids = np.array(Image.open(file))
        ids[3, 5] = value
        Image.fromarray(ids).save(file)
    return change


@pytest.mark.parametrize(('change', 'said'), [
    (set_id(9), r'0001.png: the id 9 at column 5, row 3 is of no class; the ids of classes are 0 to 2'),
    (lambda f: Image.open(f).resize((60, 48)).save(f), '0001.jpg has 64 x 48 pixels, but its mask .*0001.png has 60 x'),
    (lambda f: Image.open(f).save(f, 'JPEG'), '0001.png: a mask saved as JPEG'),
    (lambda f: Image.open(f).convert('RGB').point([0, 90, 180, *range(3, 256)] + [*range(256)] * 2).save(f),
     '0001.png: a mask in colours')])
def test_a_wrong_mask_is_refused_before_training_with_its_file(tmp_path: Path, change, said: str):
    with pytest.raises(DataError, match=said):
        open_masks('folder', break_mask(write_scenes(tmp_path, 4, 2), change))


def test_the_orientation_of_an_image_that_explains_another_size_is_named(tmp_path: Path):
    root = write_scenes(tmp_path, 4, 2)
    file = root / 'images' / 'train' / '0001.jpg'
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(file).rotate(90, expand=True).save(file, exif=exif)
    with pytest.raises(DataError, match=r'as its EXIF data turn it \(orientation 6\).*store the image upright'):
        open_masks('folder', root)


def test_images_and_masks_without_the_other_are_refused_or_left_out(tmp_path: Path):
    root = write_scenes(tmp_path, 4, 2)
    (root / 'masks' / 'train' / '0002.png').unlink()
    with pytest.raises(FileNotFoundError, match='1 of 4 images have no mask, such as images/train/0002.jpg'):
        open_masks('folder', root)
    (root / 'images' / 'train' / '0003.jpg').unlink()
    assert open_masks('folder', root, partial=True).counts['train'] == 2
    Image.new('RGB', (64, 48)).save(root / 'images' / 'train' / '0001.png')
    with pytest.raises(ValueError, match='images/train/0001.jpg and images/train/0001.png have the same name'):
        open_masks('folder', root)


def test_an_unreadable_mask_counts_as_an_unreadable_image(tmp_path: Path):
    root = break_mask(write_scenes(tmp_path, 4, 2), lambda f: f.write_bytes(f.read_bytes()[:60]))
    pair = open_masks('folder', root)
    with pytest.raises(UnreadableError, match='0001.png'):
        pair.train.read_pair(1)


@pytest.mark.parametrize(('text', 'said'), [
    ('only\n', '1 classes'), ('a\nb\na\n', '3 classes, 2 different names'), ('0 a\n0 b\n', 'an id of its own'),
    ('0 a\n300 b\n', 'ids up to 300'), ('', '0 classes')])
def test_a_wrong_list_of_classes_is_refused(tmp_path: Path, text: str, said: str):
    root = write_scenes(tmp_path, 4, 2)
    (root / 'classes.txt').write_text(text)
    with pytest.raises(ValueError, match=said):
        open_masks('folder', root)


def test_masks_of_one_class_are_refused_and_ignored_pixels_are_named(tmp_path: Path):
    root = write_scenes(tmp_path, 4, 2)
    (root / 'classes.txt').unlink()
    for file in (root / 'masks').rglob('*.png'):  # 0 and 255 instead of 0 and 1
        ids = np.asarray(Image.open(file))
        Image.fromarray(np.where(ids > 0, 255, 0).astype(np.uint8)).save(file)
    with pytest.raises(ValueError, match=r'its masks have only id 0 and 255 \(ignored\)'):
        open_masks('folder', root)


@pytest.mark.parametrize(('part', 'ids', 'said'), [
    ('train', [0, 255, 255], r'\(train\): its masks have only id 0 and 255 \(ignored\); at least two'),
    ('train', [1, 1, 1], r'\(train\): its masks have only id 1 and 255 \(ignored\); at least two'),
    ('train', [255, 255, 255], r'its masks have only 255 \(ignored\); at least two'),
    ('val', [255, 255, 255], r'\(val\): its masks have only 255 \(ignored\); there is nothing to test on')])
def test_a_part_whose_masks_teach_or_measure_nothing_is_refused_though_classes_are_named(
    tmp_path: Path, part: str, ids: list[int], said: str,
):
    root = write_scenes(tmp_path, 4, 2)
    for file in (root / 'masks' / part).rglob('*.png'):
        Image.fromarray(np.array(ids + 253 * [255], np.uint8)[np.asarray(Image.open(file))]).save(file)
    with pytest.raises(ValueError, match=said):
        open_masks('folder', root)


@pytest.mark.parametrize(('text', 'said'), [
    (b'-1 void\n0 road\n1 car\n', 'line 1: -1 void: not in the form `id name`'),
    (b'id,name\n0,road\n1,car\n', 'line 1: id,name: not in the form `id name`'),
    (b'0 road\n1 car\nsky\n', 'line 3: sky: not in the form `id name`'),
    (b'road\n\ncar\nsky\n', 'blank lines between names'),
    ('road\ncar\nsky\n'.encode('utf-16'), 'line 1: not valid UTF-8 text'),
    ('caf\u00e9\ncar\nsky\n'.encode('latin-1'), 'line 1: not valid UTF-8 text')])
def test_a_list_of_classes_that_would_shift_the_names_is_refused(tmp_path: Path, text: bytes, said: str):
    root = write_scenes(tmp_path, 4, 2)
    (root / 'classes.txt').write_bytes(text)
    with pytest.raises(ValueError, match=said):
        open_masks('folder', root)


def test_folders_without_images_or_masks_are_refused(tmp_path: Path):
    for make, said in (((), 'no images and masks; DATA must have'), (('images', 'masks'), 'no images in images'),
                       (('images', 'imgs', 'masks'), 'images and imgs may both be the folder of images')):
        root = tmp_path / str(len(make))
        root.mkdir()
        for name in make:
            (root / name).mkdir()
        with pytest.raises((FileNotFoundError, ValueError), match=said):
            open_masks('folder', root)
    with pytest.raises(FileNotFoundError, match='nowhere: no such folder'):
        open_masks('folder', tmp_path / 'nowhere')


def test_camvid_pairs_every_picture_with_its_mask(tmp_path: Path):
    pair = open_masks('folder', unpack_real('camvid_mini.zip', tmp_path))
    assert pair.counts == {'train': 367, 'test': 101, 'classes': 11} and pair.train.classes[3] == 'Road'
    image, mask = pair.train.read_pair(0)
    assert image.shape == (180, 240, 3) and set(np.unique(mask)) <= {*range(11), 255}


# --- VOC2012 and Cityscapes

def test_voc12aug_takes_the_devkits_masks_for_train_and_sbds_for_the_others(tmp_path: Path):
    root = unpack_real('voc_mini.zip', tmp_path) / 'VOCdevkit'
    with pytest.raises(ValueError, match=r'27 training images found \(expected 10,582\), 27 test images found'):
        open_masks('voc12aug', root)
    pair = open_masks('voc12aug', root, partial=True)
    assert pair.train.classes[:2] == ['background', 'aeroplane']
    assert pair.counts == {'train': 27, 'test': 27, 'classes': 21}
    lists = root / 'VOC2012' / 'ImageSets' / 'Segmentation'
    ids = {name: (lists / f'{name}.txt').read_text().split() for name in ('train', 'aug', 'val')}
    masks = [pair.train.masks.path(i) for i in range(27)]
    assert [p.stem for p in masks] == ids['train'] + ids['aug']
    assert [p.parent.name for p in masks] == ['SegmentationClass'] * 14 + ['SegmentationClassAug'] * 13
    assert [pair.test.masks.path(i).stem for i in range(27)] == ids['val']
    (lists / 'aug.txt').unlink()  # trainaug.txt without train.txt is the same
    assert open_masks('voc12aug', root / 'VOC2012', partial=True).digest == pair.digest
    (lists / 'trainaug.txt').unlink()
    with pytest.raises(FileNotFoundError, match='no ImageSets/Segmentation/aug.txt or trainaug.txt, which come from'):
        open_masks('voc12aug', root)


def test_an_image_of_val_never_trains(tmp_path: Path):
    root = unpack_real('voc_mini.zip', tmp_path) / 'VOCdevkit'
    lists = root / 'VOC2012' / 'ImageSets' / 'Segmentation'
    (lists / 'aug.txt').write_text((lists / 'val.txt').read_text().split()[0])
    with pytest.raises(ValueError, match='1 images are to train on and in val.txt'):
        open_masks('voc12aug', root, partial=True)


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    ids = np.arange(34, dtype=np.uint8).reshape(2, 17)
    train_ids = np.full(34, 255, np.uint8)
    train_ids[[row[1] for row in CLASSES]] = np.arange(19)
    for part, cities in (('train', ('aachen', 'bochum')), ('val', ('munster',))):
        for city in cities:
            for side in ('leftImg8bit', 'gtFine'):
                (tmp_path / side / part / city).mkdir(parents=True)
            name = f'{part}/{city}/{city}_000000_000019'
            Image.new('RGB', (17, 2)).save(tmp_path / 'leftImg8bit' / f'{name}_leftImg8bit.png')
            Image.fromarray(ids).save(tmp_path / 'gtFine' / f'{name}_gtFine_labelIds.png')
            Image.fromarray(train_ids[ids]).save(tmp_path / 'gtFine' / f'{name}_gtFine_labelTrainIds.png')
    return tmp_path


def test_cityscapes_has_nineteen_classes_by_either_kind_of_masks(cityscapes: Path):
    with pytest.raises(ValueError, match=r'2 training images found \(expected 2,975\)'):
        open_masks('cityscapes', cityscapes)
    pair = open_masks('cityscapes', cityscapes, partial=True)
    first = pair.train.read_mask(0)
    assert pair.train.classes[:2] == ['road', 'sidewalk'] and first[0, 7] == 0 and first[0, 0] == 255
    for file in cityscapes.rglob('*labelTrainIds.png'):
        file.unlink()
    assert np.array_equal(open_masks('cityscapes', cityscapes, partial=True).train.read_mask(0), first)
    next(cityscapes.rglob('aachen*labelIds.png')).unlink()
    with pytest.raises(FileNotFoundError, match='1 of 2 images of train have a mask'):
        open_masks('cityscapes', cityscapes)
    with pytest.raises(FileNotFoundError, match='it has no leftImg8bit and gtFine'):
        open_masks('cityscapes', cityscapes / 'gtFine')


def test_a_mask_of_a_standard_set_with_another_id_is_refused_where_it_is_read(cityscapes: Path):
    file = next(cityscapes.rglob('aachen*labelTrainIds.png'))
    Image.fromarray(np.full((2, 17), 19, np.uint8)).save(file)
    pair = open_masks('cityscapes', cityscapes, partial=True)
    with pytest.raises(DataError, match='labelTrainIds.png: the id 19 .* 0 to 18, and ignored is 255'):
        pair.train.read_pair(0)


def test_names_of_classes_are_for_a_users_own_folder_alone(cityscapes: Path):
    with pytest.raises(ValueError, match='cityscapes has its own'):
        open_masks('cityscapes', cityscapes, classes=Path('classes.txt'))
