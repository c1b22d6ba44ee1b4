"""Folders of image files: which files are found, their labels, and files that cannot be read."""
import errno
import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EPS, put_ghostscript, write_digits
from PIL import Image

from simsiam_models.data import (
    Augmentation,
    FolderImages,
    MemoryImages,
    TwoViews,
    UnreadableError,
    open_data,
)
from simsiam_models.data.readers import decode

AUG = Augmentation(size=16)


def picture(seed: int = 0, width: int = 24, height: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def fill(root: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(root / name)
    return root


def broken(path: Path, kind: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == 'truncated':
        picture(0, 200, 200).save(path, 'JPEG')
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == 'empty':
        path.write_bytes(b'')
    else:
        path.write_text('this is no image\n')
    return path


def broken_read(index: int) -> np.ndarray:
    raise UnreadableError(f'{index}: gone')


pytestmark = pytest.mark.usefixtures('one_thread')


BROKEN = ['truncated', 'empty', 'text']


# Layouts


def test_subfolders_are_classes_in_sorted_order(tmp_path):
    source = FolderImages(fill(tmp_path, ['dog/2.png', 'cat/1.png', 'dog/1.png', 'ant/x/y.png']))
    assert source.classes == ['ant', 'cat', 'dog']
    assert len(source) == 4
    assert np.issubdtype(source.labels.dtype, np.integer)
    for i in range(4):
        relative = source.path(i).relative_to(tmp_path).as_posix()
        assert source.classes[source.labels[i]] == relative.split('/')[0]  # the topmost folder is the class


def test_labels_are_those_of_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder
    fill(tmp_path, ['b/2.png', 'a/1.png', 'B/1.png', 'a b/1.png', 'a/10.png', 'a/2.png'])
    ours, theirs = FolderImages(tmp_path), ImageFolder(str(tmp_path))
    assert ours.classes == theirs.classes
    assert {str(ours.path(i)): int(ours.labels[i]) for i in range(len(ours))} == dict(theirs.samples)


def test_a_flat_folder_has_no_labels(tmp_path):
    source = FolderImages(fill(tmp_path, ['b.png', 'a.jpg', 'c.bmp']))
    assert source.labels is None
    assert source.classes == []
    assert [source.path(i).name for i in range(3)] == ['a.jpg', 'b.png', 'c.bmp']


def test_other_files_are_ignored(tmp_path):
    fill(tmp_path, ['a/1.png', 'a/2.JPG'])
    (tmp_path / 'a/readme.txt').write_text('x')
    (tmp_path / 'a/3.png').mkdir()  # a folder with the name of an image is not an image
    assert len(FolderImages(tmp_path)) == 2


def test_names_with_spaces_and_accents_are_read(tmp_path):
    source = FolderImages(fill(tmp_path, ['an émeu/été 1.png', 'z/一.png']))
    assert source.classes == ['an émeu', 'z']
    assert [source.read(i).shape for i in range(2)] == [(20, 24, 3)] * 2


@pytest.mark.skipif(os.name != 'posix', reason='links need rights on Windows')
def test_class_folders_may_be_links(tmp_path):
    # torchvision's ImageFolder follows them, and subsets of ImageNet are often made of links.
    fill(tmp_path / 'store', ['cat/1.png', 'dog/1.png'])
    (tmp_path / 'subset').mkdir()
    for name in ('cat', 'dog'):
        (tmp_path / 'subset' / name).symlink_to(tmp_path / 'store' / name, target_is_directory=True)
    assert FolderImages(tmp_path / 'subset').classes == ['cat', 'dog']


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere: no such folder'):
        FolderImages(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match='nowhere: no such file or folder'):
        open_data(tmp_path / 'nowhere')


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / 'void/deeper').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='void: no image in it'):
        FolderImages(tmp_path / 'void')


def test_train_and_val_are_opened_together(tmp_path):
    fill(tmp_path, ['train/a/1.png', 'train/a/2.png', 'train/b/1.png', 'val/a/3.png', 'val/b/2.png'])
    train, val = open_data(tmp_path)
    assert (len(train), len(val)) == (3, 2)
    assert train.classes == val.classes == ['a', 'b']
    assert val.labels.tolist() == [0, 1]


def test_without_train_the_folder_itself_is_the_training_data(tmp_path):
    train, val = open_data(fill(tmp_path, ['a/1.png', 'b/1.png']))
    assert len(train) == 2 and val is None


def test_without_val_there_is_only_training_data(tmp_path):
    train, val = open_data(fill(tmp_path, ['train/a/1.png', 'train/b/1.png']))
    assert len(train) == 2 and val is None


@pytest.mark.parametrize('val_names', [['val/1.png'], ['val/a/1.png', 'val/other/1.png']])
def test_val_with_other_classes_or_none_is_dropped(tmp_path, val_names):
    _, val = open_data(fill(tmp_path, ['train/a/1.png', 'train/b/1.png', *val_names]))
    assert val is None


# Formats


def gray() -> Image.Image:
    return picture().convert('L')


@pytest.mark.parametrize('name, image', [
    ('gray.png', gray()),
    ('gray.jpg', gray()),
    ('gray_alpha.png', gray().convert('LA')),
    ('bilevel.png', gray().convert('1')),
    ('cmyk.jpg', picture().convert('CMYK')),
    ('cmyk.tif', picture().convert('CMYK')),
    ('sixteen.png', Image.fromarray(np.full((20, 24), 30000, np.uint16))),
    ('rgba.png', picture().convert('RGBA')),
    ('palette.gif', picture().convert('P')),
    ('one.png', picture(0, 1, 1)),
], ids=lambda v: v if isinstance(v, str) else '')
def test_every_mode_is_read_as_rgb(tmp_path, name, image):
    image.save(tmp_path / name)
    read = FolderImages(tmp_path).read(0)
    assert read.dtype == np.uint8
    assert read.shape == (image.height, image.width, 3)
    if image.mode != 'I;16':
        with Image.open(tmp_path / name) as saved:
            assert np.array_equal(read, np.asarray(saved.convert('RGB')))


@pytest.mark.parametrize('options', [
    dict(subsampling=0), dict(subsampling=1), dict(subsampling=2), dict(progressive=True), dict(quality=1),
    dict(quality=100), dict(optimize=True), dict(restart_marker_blocks=2)], ids=str)
@pytest.mark.parametrize('width, height', [(24, 20), (1, 1), (17, 33), (500, 1)])
def test_every_jpeg_is_decoded_to_pils_bits(tmp_path, options, width, height):
    picture(1, width, height).save(tmp_path / 'a.jpg', **options)
    with Image.open(tmp_path / 'a.jpg') as saved:
        assert np.array_equal(FolderImages(tmp_path).read(0), np.asarray(saved.convert('RGB')))


def test_without_simplejpeg_pil_gives_the_same_bits(tmp_path, monkeypatch):
    picture(1, 61, 47).save(tmp_path / 'a.jpg')
    want = FolderImages(tmp_path).read(0)
    monkeypatch.setattr(decode, 'simplejpeg', None)
    assert np.array_equal(FolderImages(tmp_path).read(0), want)


@pytest.mark.parametrize('error', [ValueError('Invalid SOS parameters'), KeyError(6)])  # 6: 4:4:1
def test_what_simplejpeg_cannot_read_is_read_by_pil(tmp_path, monkeypatch, error):
    picture(1, 61, 47).save(tmp_path / 'a.jpg')
    want = FolderImages(tmp_path).read(0)
    monkeypatch.setattr(decode.simplejpeg, 'decode_jpeg_header', fail(error))
    assert np.array_equal(FolderImages(tmp_path).read(0), want)


@pytest.mark.parametrize('name', ['a.jpg', 'a.png', 'a.tif'])
def test_an_image_of_too_many_pixels_is_unreadable_before_it_is_decoded(tmp_path, monkeypatch, name):
    picture(1, 300, 200).save(tmp_path / name)
    monkeypatch.setattr(decode, 'MAX_PIXELS', 60000)
    assert FolderImages(tmp_path).read(0).shape == (200, 300, 3)
    monkeypatch.setattr(decode, 'MAX_PIXELS', 59999)
    monkeypatch.setattr(decode, 'to_rgb', fail(AssertionError()))
    monkeypatch.setattr(decode.simplejpeg, 'decode_jpeg', fail(AssertionError()))
    with pytest.raises(UnreadableError, match='300 x 200 pixels, more than 59,999; downscale it'):
        FolderImages(tmp_path).read(0)


def test_postscript_under_the_name_of_an_image_is_not_run(tmp_path, monkeypatch):
    ran = put_ghostscript(tmp_path, monkeypatch)
    with pytest.raises(UnreadableError, match='PostScript, a program'):
        decode.decode(EPS, 'a.jpg')
    fields = [(3, 60, b'\1\0'), (3, 20, b'50'), (3, 30, b'50'), (3, 120, b'\5'), (8, 10, EPS)]
    iptc = b''.join(b'\x1c' + bytes([*tag]) + len(data).to_bytes(2, 'big') + data for *tag, data in fields)
    with pytest.raises(UnreadableError, match='cannot be read as an image'):
        decode.decode(iptc, 'a.jpg')
    assert not ran.exists()
    with suppress(Exception), Image.open(io.BytesIO(EPS)) as image:
        image.load()
    assert ran.exists()  # PIL itself would have run it


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('name', ['a.jpg', 'a.png'])
def test_a_decompression_bomb_is_unreadable_as_in_pil(tmp_path, monkeypatch, name):
    picture(1, 300, 200).save(tmp_path / name)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(UnreadableError, match='exceeds limit'):
        FolderImages(tmp_path).read(0)


def test_a_folder_that_went_away_is_not_tried_file_by_file(tmp_path, monkeypatch):
    images = FolderImages(fill(tmp_path, [f'{i}.png' for i in range(40)]))
    tried = []
    monkeypatch.setattr(FolderImages, 'read', lambda self, i: (tried.append(i), broken_read(i))[1])
    with pytest.raises(UnreadableError):
        next(iter(TwoViews(images, AUG, batch=4).epoch(0)))
    assert len(tried) <= 4


def test_an_orientation_in_the_exif_data_is_not_applied(tmp_path):
    # So do torchvision's ImageFolder and the published runs.
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    picture(2).save(tmp_path / 'a.jpg', exif=exif)
    read = FolderImages(tmp_path).read(0)
    assert read.shape == (20, 24, 3)
    with Image.open(tmp_path / 'a.jpg') as saved:
        assert np.array_equal(read, np.asarray(saved.convert('RGB')))


def test_webp_and_a_very_wide_image_are_read_and_trained_on(tmp_path):
    picture(0).save(tmp_path / 'a.webp', lossless=True)
    picture(1, 20000, 20).save(tmp_path / 'b.jpg')
    images = FolderImages(tmp_path)
    assert np.array_equal(images.read(0), np.asarray(picture(0)))
    assert images.read(1).shape == (20, 20000, 3)
    (x1, _), = TwoViews(images, AUG, batch=2).epoch(0)
    assert x1.isfinite().all()


def test_a_jpeg_that_is_cut_off_is_unreadable_as_in_pil(tmp_path):
    picture(0, 200, 200).save(tmp_path / 'whole.jpg')
    data = (tmp_path / 'whole.jpg').read_bytes()
    for keep in (3, 20, 600, len(data) // 2, len(data) - 400):
        (tmp_path / 'cut.jpg').write_bytes(data[:keep])
        with pytest.raises(UnreadableError, match='cut.jpg: cannot be read as an image'):
            FolderImages(tmp_path).read(0)


def test_gray_is_the_same_in_each_channel(tmp_path):
    gray().save(tmp_path / 'a.png')
    read = np.asarray(FolderImages(tmp_path).read(0))
    assert (read == np.asarray(gray())[..., None]).all()


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    # Without scaling, all values above 255 would be white.
    wide = np.linspace(0, 65535, 20 * 24).astype(np.uint16).reshape(20, 24)
    Image.fromarray(wide).save(tmp_path / 'a.png')
    read = np.asarray(FolderImages(tmp_path).read(0)).astype(int)
    assert np.abs(read - (wide / 257)[..., None]).max() <= 1


def test_a_palette_with_transparency_keeps_its_colours(tmp_path):
    image = picture().quantize(16)
    image.info['transparency'] = 3
    image.save(tmp_path / 'a.png', transparency=3)
    with Image.open(tmp_path / 'a.png') as saved:
        assert saved.mode == 'P' and 'transparency' in saved.info
    read = FolderImages(tmp_path).read(0)
    assert (np.asarray(read) == np.asarray(image.convert('RGB'))).all()


def test_a_png_named_jpg_is_read(tmp_path):
    picture(5).save(tmp_path / 'a.jpg', 'PNG')
    assert (np.asarray(FolderImages(tmp_path).read(0)) == np.asarray(picture(5))).all()


def test_one_pixel_can_be_trained_on(tmp_path):
    for i in range(2):
        picture(i, 1, 1).save(tmp_path / f'{i}.png')
    (x1, x2), = TwoViews(FolderImages(tmp_path), AUG, batch=2).epoch(0)
    assert x1.shape == x2.shape == (2, 3, 16, 16)
    assert x1.isfinite().all() and x2.isfinite().all()


def test_arrays_in_memory_are_read_as_they_are():
    array = np.stack([np.asarray(picture(i)) for i in range(3)])
    source = MemoryImages(array, np.array([0, 1, 0]), ['a', 'b'], 'three')
    assert len(source) == 3
    assert (np.asarray(source.read(1)) == array[1]).all()


# Unreadable files


@pytest.mark.parametrize('kind', BROKEN)
def test_a_broken_file_is_named(tmp_path, kind):
    path = broken(tmp_path / 'cat' / 'bad one.jpg', kind)
    with pytest.raises(UnreadableError, match='cannot be read as an image') as e:
        FolderImages(tmp_path).read(0)
    assert str(path) in str(e.value)


def test_a_file_that_went_away_is_named(tmp_path):
    source = FolderImages(fill(tmp_path, ['a.png']))
    (tmp_path / 'a.png').unlink()
    with pytest.raises(UnreadableError, match=r'a\.png'):
        source.read(0)


@pytest.mark.parametrize('call, error', [
    ('os.open', OSError(errno.ENOMEM, 'no memory')), ('os.open', OSError(errno.EMFILE, 'no handles')),
    ('os.open', MemoryError()), ('PIL.Image.open', MemoryError())], ids=range(4))
def test_a_lack_of_memory_or_file_handles_is_not_an_unreadable_image(tmp_path, monkeypatch, call, error):
    source = FolderImages(fill(tmp_path, ['a.png', 'b.png']))
    monkeypatch.setattr(call, fail(error))
    with pytest.raises(type(error)):
        source.read(0)
    with pytest.raises(type(error)):
        list(TwoViews(source, AUG, batch=2, max_unreadable=1).epoch(0))


def test_an_error_of_the_disk_is_an_unreadable_image_that_is_named(tmp_path, monkeypatch):
    source = FolderImages(fill(tmp_path, ['a.png']))
    monkeypatch.setattr(os, 'open', fail(OSError(errno.EIO, 'Input/output error')))
    with pytest.raises(UnreadableError, match=r'a\.png: cannot be read \(Input/output error\)'):
        source.read(0)


def fail(error: Exception) -> Callable[..., None]:
    def call(*args: object, **kwargs: object) -> None:
        raise error
    return call


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('kind', BROKEN)
def test_by_default_one_unreadable_file_stops_training(tmp_path, kind, workers):
    fill(tmp_path, [f'{i}.png' for i in range(7)])
    path = broken(tmp_path / 'bad.jpg', kind)
    views = TwoViews(FolderImages(tmp_path), AUG, batch=4, workers=workers)
    with pytest.raises(UnreadableError) as e:
        list(views.epoch(0))
    assert str(path) in str(e.value)
    assert '--max-unreadable' in str(e.value)  # what to do


def holes(root: Path) -> FolderImages:
    """12 files; 2, 3 and 11 are unreadable: two in a row, and the last one."""
    for i in range(12):
        if i in (2, 3, 11):
            broken(root / f'{i:02}.jpg', BROKEN[i % 3])
        else:
            picture(i).save(root / f'{i:02}.png')
    return FolderImages(root)


@pytest.mark.parametrize('workers', [0, 2])
def test_allowed_unreadable_files_are_replaced_and_counted_once(tmp_path, workers):
    source = holes(tmp_path)
    assert [source.path(i).stem for i in range(12)] == [f'{i:02}' for i in range(12)]
    views = TwoViews(source, AUG, batch=4, workers=workers, max_unreadable=0.5)
    for epoch in range(2):  # the second epoch reads the same files: they do not count again
        batches = list(views.epoch(epoch))
        assert len(batches) == len(views) == 3
        assert all(x.isfinite().all() for batch in batches for x in batch)
        assert sorted(views.unreadable) == [2, 3, 11]
    for i, text in views.unreadable.items():
        assert str(source.path(i)) in text


@pytest.mark.parametrize('workers', [0, 2])
def test_the_replacement_is_the_next_readable_image(tmp_path, workers):
    # The same training on a source in which files 2, 3 -> 4 and 11 -> 0 gives the same bits.
    source = holes(tmp_path)
    instead = [0, 1, 4, 4, 4, 5, 6, 7, 8, 9, 10, 0]
    clean = MemoryImages(np.stack([np.asarray(picture(i)) for i in instead]), None, [], 'clean')
    got = list(TwoViews(source, AUG, batch=4, seed=3, workers=workers, max_unreadable=0.25).epoch(0))
    want = list(TwoViews(clean, AUG, batch=4, seed=3).epoch(0))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_one_more_than_allowed_stops_training(tmp_path):
    source = holes(tmp_path)
    views = TwoViews(source, AUG, batch=4, max_unreadable=2 / 12)
    with pytest.raises(UnreadableError, match='3 unreadable so far, 2 of 12 allowed'):
        list(views.epoch(0))


def test_pipes_devices_and_huge_files_are_unreadable_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_digits(tmp_path, 4)
    images = FolderImages(tmp_path)
    pipe, device, large = (images.path(i) for i in range(3))
    pipe.unlink(), device.unlink()
    os.mkfifo(pipe)
    device.symlink_to('/dev/zero')
    os.truncate(large, (1 << 30) + 1)
    for i in range(3):
        with pytest.raises(UnreadableError, match='not a regular file, or larger than a gigabyte'):
            images.read(i)
    assert images.read(3).shape == (32, 32, 3)
