"""`simsiam prepare`: copies of image folders with large images resized."""
import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT
from PIL import Image

from simsiam_models import cli
from simsiam_models.data import Augmentation, Images, TwoViews, open_data, prepare
from simsiam_models.data.readers.decode import decode

pytestmark = pytest.mark.usefixtures('one_thread')
ORIENTATION = 0x0112


def draw(seed: int, width: int = 120, height: int = 90) -> Image.Image:
    """A smooth picture, as photographs are; noise would not survive a resize."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def fill(root: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        draw(i, 120 + 10 * (i % 6), 90 + 7 * (i % 6)).save(root / name, quality=97)
    return root


def run(data: str | Path, out: str | Path, *flags: str) -> int:
    return cli.main(['prepare', str(data), str(out), '--short-side', '64', '--workers', '2', *flags])


def read_all(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob('*') if path.is_file() and path.name != 'args.json')
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def names_of(images: Images) -> list[str]:
    return [str(images.path(i).relative_to(images.root)) for i in range(len(images))]


# What stays the same

FLAT = ['10.jpg', '9.JPEG', 'b c.jpg', 'b.jpg', 'z.png']
LAYOUTS = {
    'flat': (FLAT, {}),
    'classes': (['a b/1.jpg', 'a/1.jpg', 'a/deep/0.jpg', 'c/x.png'], {}),
    'parts': (['train/a/1.jpg', 'train/b/2.jpg', 'val/a/0.jpg', 'val/b/1.jpg', 'test/3.jpg'], {}),
    'folder in a folder': (['images/a/1.jpg', 'images/b/1.jpg'], {}),
    'metadata': (FLAT, {'metadata.csv': 'file_name,label\n' + ''.join(f'{n},{i % 2}\n' for i, n in enumerate(FLAT))})}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_images_keep_their_names_order_labels_and_parts(layout, tmp_path):
    names, others = LAYOUTS[layout]
    data, out = fill(tmp_path / 'data', names), tmp_path / 'out'
    for name, text in others.items():
        (data / name).write_text(text)
    assert run(data, out) == 0
    for old, new in zip(open_data(data), open_data(out), strict=True):
        if old is None:
            assert new is None
            continue
        assert names_of(new) == names_of(old) and new.digest == old.digest and new.classes == old.classes
        assert (new.labels is None) == (old.labels is None)
        assert old.labels is None or new.labels.tolist() == old.labels.tolist()
        assert {min(new.read(i).shape[:2]) for i in range(len(new))} == {64}
    assert {*read_all(out)} == {*names, *others}


def test_a_list_in_the_folder_reads_the_copies(tmp_path):
    data = fill(tmp_path / 'data', ['images/a.jpg', 'images/b.jpg'])
    (data / 'lists').mkdir()
    (data / 'lists/train.txt').write_text('../images/b.jpg 1\n../images/a.jpg 0\n')
    (data / 'notes.doc').write_text('left out')
    assert run(data, tmp_path / 'out') == 0
    images, _ = open_data(tmp_path / 'out/lists/train.txt')
    assert images.read(0).shape[0] == 64 and images.labels.tolist() == [1, 0]
    assert 'notes.doc' not in read_all(tmp_path / 'out')


def test_an_image_gets_the_crops_flips_and_colours_of_the_original(tmp_path):
    data, out = fill(tmp_path / 'data', [f'{i}.jpg' for i in range(12)]), tmp_path / 'out'
    assert run(data, out, '--quality', '95') == 0
    views = []
    for folder, seed in ((data, 0), (out, 0), (data, 1)):
        loader = TwoViews(open_data(folder)[0], Augmentation(size=32), 12, seed=seed)
        views.append(torch.cat([x for batch in loader.epoch(3) for x in batch]))
    same, other = ((views[0] - v).abs().mean().item() for v in views[1:])
    assert same < 0.1 < 0.5 < other  # in standard deviations of a pixel


# What becomes of an image

@pytest.mark.parametrize(('name', 'kind'), [
    ('a.jpg', 'JPEG'), ('a.png', 'PNG'), ('a.webp', 'WEBP'), ('a.bmp', 'BMP'), ('a.tif', 'TIFF'), ('a.ppm', 'PPM')])
def test_a_larger_image_is_resized_as_torchvision_and_pil_do_it_and_keeps_its_format(name, kind, tmp_path):
    data = fill(tmp_path / 'data', [name])
    assert run(data, tmp_path / 'out', '--quality', '98') == 0
    with Image.open(tmp_path / 'out' / name) as image:
        assert image.format == kind and image.size == (int(64 * 120 / 90), 64)
        found = np.asarray(image.convert('RGB'), int)
    whole = Image.fromarray(decode((data / name).read_bytes(), name))
    expected = np.asarray(whole.resize((int(64 * 120 / 90), 64), Image.Resampling.BILINEAR), int)
    assert np.abs(found - expected).mean() < (4 if kind in prepare.LOSSY else 0.1)


def test_a_portrait_has_its_width_as_short_side(tmp_path):
    draw(0, 100, 250).save(fill(tmp_path / 'data', ['a.jpg']) / 'b.jpg', quality=97)
    assert run(tmp_path / 'data', tmp_path / 'out') == 0
    assert Image.open(tmp_path / 'out/b.jpg').size == (64, 160)


def test_gray_stays_gray_and_cmyk_becomes_rgb(tmp_path):
    data, out = fill(tmp_path / 'data', ['a.jpg']), tmp_path / 'out'
    for mode in ('L', 'CMYK'):
        draw(1).convert(mode).save(data / f'{mode}.jpg', quality=97)
    assert run(data, out) == 0
    assert [Image.open(out / f'{name}.jpg').mode for name in ('a', 'L', 'CMYK')] == ['RGB', 'L', 'RGB']


@pytest.mark.parametrize('name', ['a.jpg', 'a.webp'])
def test_an_orientation_is_kept_and_not_applied(name, tmp_path):
    data, exif = fill(tmp_path / 'data', ['b.jpg']), Image.Exif()
    exif[ORIENTATION], exif[0x010E] = 6, 'x' * 5000
    draw(1).save(data / name, quality=97, exif=exif)
    assert run(data, tmp_path / 'out') == 0
    with Image.open(tmp_path / 'out' / name) as image:
        assert image.size == (85, 64) and dict(image.getexif()) == {ORIENTATION: 6}


def test_an_image_that_is_not_larger_of_another_format_or_unreadable_is_copied_byte_for_byte(tmp_path, capsys):
    data, out = fill(tmp_path / 'data', ['large.jpg', 'animated.gif']), tmp_path / 'out'
    draw(1, 300, 64).save(data / 'small.jpg')
    (data / 'torn.jpg').write_bytes((data / 'large.jpg').read_bytes()[:900])
    (data / 'text.jpg').write_text('this is no image')
    draw(2).save(data / 'coarse.jpg', quality=1)
    assert run(data, out) == 0
    before, after = read_all(data), read_all(out)
    assert {name for name in before if after[name] == before[name]} == {*before} - {'large.jpg'}
    said = capsys.readouterr().out
    assert f'{data}/torn.jpg: cannot be read' in said and f'{data}/text.jpg: cannot be read' in said
    for text in ('6 images: ', '2 copied (unreadable)', '1 resized', '1 copied (not larger)',
                 '1 copied (format is never resized)', '1 copied (resizing would enlarge the file)'):
        assert text in said


def test_the_summary_states_bytes_and_how_much_crops_differ(tmp_path, capsys):
    data, out = fill(tmp_path / 'data', FLAT), tmp_path / 'out'
    assert run(data, out) == 0
    measured = json.loads((out / 'args.json').read_text())['measured']
    assert measured['bytes'] == [sum(map(len, read_all(folder).values())) for folder in (data, out)]
    assert 0 < measured['levels'] < 20 and measured['sample'] == len(FLAT) and min(measured['milliseconds']) > 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f'{out}: ') and f'differ by {measured["levels"]:.1f} of 255 levels' in line
    assert run(data, tmp_path / 'same', '--short-side', '500') == 0
    assert json.loads((tmp_path / 'same/args.json').read_text())['measured']['levels'] == 0


def test_a_folder_without_a_readable_image_is_copied_without_a_measurement(tmp_path, capsys):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/a.jpg').write_text('this is no image')
    assert run(tmp_path / 'data', tmp_path / 'out') == 0
    assert 'crops' not in capsys.readouterr().out


# Runs that are cut short

def test_the_number_of_threads_changes_no_byte(tmp_path):
    data = fill(tmp_path / 'data', [f'{i}.jpg' for i in range(20)])
    for n in ('1', '3'):
        assert run(data, tmp_path / n, '--workers', n) == 0
    assert read_all(tmp_path / '1') == read_all(tmp_path / '3')


def test_a_killed_run_leaves_no_out_and_the_same_command_completes_it(tmp_path):
    data, out = fill(tmp_path / 'data', [f'{i:03}.png' for i in range(300)]), tmp_path / 'out'
    command = ['-m', 'simsiam_models', 'prepare', str(data), str(out), '--short-side', '64', '--workers', '1']
    process = subprocess.Popen(
        [warm.python(), *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    part = tmp_path / 'out.part'
    deadline = time.monotonic() + 60
    while len([*part.glob('*.png')]) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    done = {p.name: p.stat().st_ino for p in part.glob('*.png')}
    assert 5 <= len(done) < 300 and not out.exists()
    torn, empty = part / '299.png.part', part / '298.png'  # by a kill, and by a power failure
    torn.write_bytes(b'half')
    empty.write_bytes(b'')
    assert run(data, out) == 0 and not part.exists()
    assert all((out / name).stat().st_ino == inode for name, inode in done.items() if name != empty.name)
    assert run(data, tmp_path / 'whole') == 0
    assert read_all(out) == read_all(tmp_path / 'whole')


@pytest.mark.parametrize(('name', 'code'), [('SIGINT', 130), ('SIGTERM', 143)])
def test_a_signal_ends_in_one_line(name, code, tmp_path, monkeypatch, capsys):
    data = fill(tmp_path / 'data', FLAT)
    with monkeypatch.context() as patched:
        patched.setattr(prepare, 'measure', lambda *images: os.kill(os.getpid(), getattr(signal, name)))
        assert run(data, tmp_path / 'out') == code
    assert capsys.readouterr().err == f'simsiam: stopped by {name}; the same command continues\n'
    assert not (tmp_path / 'out').exists() and run(data, tmp_path / 'out') == 0


def test_the_same_command_again_writes_nothing_and_replaces_what_was_deleted(tmp_path, capsys):
    data, out = fill(tmp_path / 'data', FLAT), tmp_path / 'out'
    assert run(data, out) == 0
    before = read_all(out)
    (out / FLAT[0]).unlink()
    (tmp_path / 'data').rename(tmp_path / 'moved')
    capsys.readouterr()
    assert run(tmp_path / 'moved', out) == 0
    assert read_all(out) == before and '4 already there, 1 resized' in capsys.readouterr().out


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half(tmp_path, monkeypatch, capsys):
    data, real, calls = fill(tmp_path / 'data', FLAT), Path.write_bytes, []

    def write(path: Path, content: bytes) -> int:
        calls.append(path)
        if len(calls) > 3:
            real(path, content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, content)

    monkeypatch.setattr(Path, 'write_bytes', write)
    assert run(data, tmp_path / 'out') == 1
    said = capsys.readouterr().err
    assert said.startswith(f'simsiam: OUT: {tmp_path}/out.part/') and said.count('\n') == 1
    assert 'cannot be written (No space left on device); make room there' in said
    assert {*read_all(tmp_path / 'out.part')} == {path.name.removesuffix('.part') for path in calls[:3]}


# What is refused

def occupied(data: Path) -> Path:
    return fill(data.parent / 'occupied', ['x.jpg'])


def is_file(data: Path) -> Path:
    (data.parent / 'file').write_text('x')
    return data.parent / 'file'


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    'OUT in DATA': (lambda data: data / 'out', 'must be separate folders, neither inside the other; name another OUT'),
    'DATA in OUT': (lambda data: data.parent, 'must be separate folders, neither inside the other; name another OUT'),
    'OUT is DATA': (lambda data: data, 'must be separate folders, neither inside the other; name another OUT'),
    'OUT holds files': (occupied, 'holds other files; name a new folder'),
    'OUT is a file': (is_file, 'is a file; name a new folder')}


@pytest.mark.parametrize('case', REFUSED)
def test_an_out_that_cannot_be_used_is_refused_before_anything_is_written(case, tmp_path, capsys):
    data = fill(tmp_path / 'data', FLAT)
    out = REFUSED[case][0](data)
    before = read_all(tmp_path)
    assert run(data, out) == 1
    said = capsys.readouterr().err
    assert REFUSED[case][1] in said and said.startswith('simsiam: ') and said.count('\n') == 1
    assert read_all(tmp_path) == before and not [*tmp_path.rglob('*.part')]


def test_data_that_has_the_name_of_the_incomplete_copy_is_not_taken_for_it(tmp_path, capsys):
    data = fill(tmp_path / 'out.part', FLAT)
    before = read_all(tmp_path)
    assert run(data, tmp_path / 'out') == 1
    assert 'must be separate folders' in capsys.readouterr().err and read_all(tmp_path) == before


def test_an_out_that_is_a_link_is_refused(tmp_path, capsys):
    data = fill(tmp_path / 'data', FLAT)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'out').symlink_to(tmp_path / 'empty')
    assert run(data, tmp_path / 'out') == 1
    assert 'out is a link; name a new folder' in capsys.readouterr().err and not (tmp_path / 'out.part').exists()


def test_an_out_of_other_numbers_or_images_is_refused(tmp_path, capsys):
    data, out = fill(tmp_path / 'data', FLAT), tmp_path / 'out'
    assert run(data, out) == 0
    assert run(data, out, '--quality', '80') == 1
    assert 'holds another run (quality: 90 there, 80 here); name another OUT' in capsys.readouterr().err
    out.rename(tmp_path / 'out.part')  # as if it had been stopped
    assert run(data, out, '--short-side', '65') == 1
    assert 'short_side: 64 there, 65 here' in capsys.readouterr().err
    draw(7, 200, 150).save(data / FLAT[0], quality=97)  # another image of that name
    assert run(data, out) == 1
    assert 'digest: ' in capsys.readouterr().err


def test_other_sources_are_refused_in_one_sentence_that_says_what_to_do(tmp_path, capsys):
    data = fill(tmp_path / 'data', FLAT)
    (data / 'list.txt').write_text('b.jpg\n')
    (tmp_path / 'tars').mkdir()
    subprocess.run(['tar', 'cf', tmp_path / 'tars/a.tar', '-C', data, *FLAT], check=True)
    for source in ('hf:some/set', 'demo', f'{data}/list.txt', f'{data}#label=x', 'nowhere', f'{tmp_path}/tars/a.tar',
                   f'{tmp_path}/tars'):
        assert run(source, tmp_path / 'out') == 1
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith('simsiam: ')]
        assert len(said) == 1 and said[0].endswith('unpack other data into a folder first, or train on it directly')
    assert not (tmp_path / 'out').exists() and not (tmp_path / 'out.part').exists()


@pytest.mark.parametrize(('flags', 'said'), [
    (['--short-side', '0'], '--short-side 0: must be at least 1'), (['--quality', '0'], '--quality 0: must be from 1'),
    (['--quality', '101'], '--quality 101: must be from 1 to 100'), (['--workers', '0'], '--workers 0: must be')])
def test_a_number_out_of_range_is_refused(flags, said, tmp_path, capsys):
    assert run(fill(tmp_path / 'data', FLAT), tmp_path / 'out', *flags) == 1
    assert capsys.readouterr().err.startswith(f'simsiam: {said}')


def test_a_file_that_cannot_be_read_at_all_ends_the_run_in_one_sentence(tmp_path, capsys):
    data = fill(tmp_path / 'data', FLAT)
    os.mkfifo(data / 'pipe.jpg')
    assert run(data, tmp_path / 'out') == 1
    said = capsys.readouterr().err
    assert f'{data}/pipe.jpg: cannot be read' in said and said.endswith('then run the same command to continue\n')
    assert not (tmp_path / 'out').exists()


def test_labels_from_above_the_folder_which_the_copy_lacks_are_an_error(tmp_path, capsys):
    data = fill(tmp_path / 'above/data', FLAT)
    rows = ''.join(f'data/{name},{i % 2}\n' for i, name in enumerate(FLAT))
    (tmp_path / 'above/metadata.csv').write_text(f'file_name,label\n{rows}')
    assert open_data(data)[0].labels is not None
    assert run(data, tmp_path / 'out') == 1
    assert 'prepare the folder that holds both' in capsys.readouterr().err
    assert run(tmp_path / 'above', tmp_path / 'both') == 0
    assert open_data(tmp_path / 'both')[0].labels is not None


def test_two_processes_do_not_write_one_out(tmp_path, capsys):
    data, target = fill(tmp_path / 'data', FLAT), tmp_path / 'out.part'
    with prepare.claim(target, {'benchmark': 'prepare'}):
        (target / 'args.json').unlink()
        assert run(data, tmp_path / 'out') == 1
        assert 'is in use by another run' in capsys.readouterr().err
    assert run(data, tmp_path / 'out') == 0
