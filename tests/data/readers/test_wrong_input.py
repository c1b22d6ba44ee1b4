"""Wrong input ends in one sentence that names it."""
import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from formats import (
    HAS,
    ONE_SENTENCE,
    Sample,
    caches,  # noqa: F401 - a fixture
    cases,
    samples_of,
    table,
    write_files,
    write_parquet,
    write_tar,
    write_tars,
)

from simsiam_models.data import open_data

if HAS['datasets']:
    import datasets
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def samples(few_digits) -> list[Sample]:
    return samples_of(few_digits)


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
    """Cuts a tar in the middle of a header."""
    tar = tarfile.open(fileobj=io.BytesIO(data))
    return data[:tar.getmembers()[4].offset + 100]


WRONG: dict[str, tuple[Callable[[Path, list[Sample]], str], str]] = {
    'nothing there': (lambda r, s: str(r / 'nowhere'), 'no such file or folder; DATA must be a folder'),
    'an empty folder': (lambda r, s: str(r), 'no image in it'),
    'a file of another kind': (lambda r, s: place(r, s, 'a.exe', b'x'), 'is not a file that can be read here'),
    'a single image': (lambda r, s: place(r, s, 'a.png', s[1][1]), 'a single image'),
    'an empty list': (lambda r, s: place(r, s, 'l.txt', '\n\n'), 'names no image'),
    'a list of files elsewhere': (lambda r, s: place(r, s, 'l.txt', 'a.png\nb.png\n'), 'neither its first image'),
    'a list with a bad label': (
        lambda r, s: place(r, s, 'l.txt', f'{s[0][0]} 1\n{s[1][0]} x\n'), "line 2: the label 'x'"),
    'a list with a negative label': (lambda r, s: place(r, s, 'l.txt', f'{s[0][0]} -1\n'), "line 1: the label '-1'"),
    'a list with a huge label': (lambda r, s: place(r, s, 'l.txt', f'{s[0][0]} 100000\n'), 'not a class number'),
    'a list with some labels': (
        lambda r, s: place(r, s, 'l.txt', f'{s[0][0]} 1\n\n{s[1][0]}\n'), 'line 3: has no label'),
    'a list with a label too many': (
        lambda r, s: place(r, s, 'l.txt', f'{s[0][0]}\n{s[1][0]} 1\n'), "line 2: has the label '1'"),
    'a list of what is no image': (
        lambda r, s: place(r, s, 'l.txt', 'some words\n'), 'line 1: .* is not the path of an image'),
    'a binary list': (lambda r, s: place(r, s, 'l.txt', bytes(range(256))), 'line 1'),
    'a list in UTF-16': (lambda r, s: place(r, s, 'l.txt', 'a.png\nb.png'.encode('utf-16')), 'line 1'),
    'a csv without a path': (lambda r, s: place(r, s, 'l.csv', 'url,label\nx,1\n'), 'line 1: .* names no column path'),
    'a csv of uneven rows': (
        lambda r, s: place(r, s, 'l.csv', 'path,label\na b.png,1\na,b.png,1\n'), 'line 3: 3 fields'),
    'a csv with a bad label': (
        lambda r, s: place(r, s, 'l.csv', 'path,label\na.png,1\nb.png,dog\n'), 'line 3: the label'),
    'a csv with an empty path': (
        lambda r, s: place(r, s, 'l.csv', 'path,label\na.png,1\n,1\n'), 'line 3: the path is empty'),
    'a csv with an open quote': (lambda r, s: place(r, s, 'l.csv', 'path\n"' + 'a' * 200000), 'not valid CSV'),
    'an empty csv': (lambda r, s: place(r, s, 'l.csv', ''), 'names no image'),
    'a tar cut in an image': (lambda r, s: cut_tar(r, s, lambda d: d[:2000]), 'a.tar: cut off'),
    'a tar cut in a header': (lambda r, s: cut_tar(r, s, headless), 'a.tar: cut off'),
    'a tar cut at its end': (lambda r, s: cut_tar(r, s, lambda d: d.rstrip(b'\0')), 'a.tar: cut off'),
    'a tar with a damaged header': (lambda r, s: cut_tar(r, s, lambda d: d[:1024] + b'x' * 512 + d[1536:]), 'cut off'),
    'two tars in one file': (lambda r, s: cut_tar(r, s, lambda d: d + d), 'continues after its end'),
    'an empty tar': (lambda r, s: cut_tar(r, s, lambda d: b''), 'a.tar: cut off'),
    'no tar': (lambda r, s: place(r, s, 'a.tar', b'no tar' * 500), 'a.tar: cut off, damaged or not a tar'),
    'a tar without images': (
        lambda r, s: str(write_tar(r / 'a.tar', [('a.txt', b'x', 0)])), 'no image in 1 tar shards'),
    'a compressed tar': (lambda r, s: place(r, s, 'a.tar.gz', gzip.compress(b'x')), 'gunzip'),
    'a folder of compressed tars': (lambda r, s: str(edit(r / 'a.tgz', b'x').parent), 'gunzip'),
    'a tar with a bad label': (
        lambda r, s: str(write_tar(r / 'a.tar', [
            ('a.cls', b'1', 0), ('a.png', b'', 0), ('b.cls', b'dog', 0), ('b.png', b'', 0)], labels=False)),
        "a.tar: b.cls: the label 'dog' is not a class number"),
    'a tar with a label of many lines': (
        lambda r, s: str(write_tar(r / 'a.tar', [('a.cls', b'dog\ncat', 0), ('a.png', b'', 0)], labels=False)),
        'a.cls: the label .* is not a class name or number'),
    'a tar with a label of many bytes': (
        lambda r, s: str(write_tar(r / 'a.tar', [('a.cls', b'x' * 70000, 0), ('a.png', b'', 0)], labels=False)),
        'a.cls holds 70000 bytes, too many for a label'),
    'a tar with two images in a sample': (
        lambda r, s: str(write_tar(r / 'a.tar', [('a.1.png', b'', 0), ('a.2.png', b'', 0)], labels=False)),
        'more than one image .* choose one by its ending, with #image=2.png after the name of the tar'),
    'a tar of links': (linked_tar, 'is a link or a sparse file; write the tar with --dereference'),
    'a shard that is missing': (
        lambda r, s: write_tars(r, s) + '/shard-{000..003}.tar', '003.tar: no such shard, of 4'),
    'a pattern of nothing': (lambda r, s: f'{r}/*.tar', 'no file matches'),
    'a pattern that counts down': (lambda r, s: f'{r}/{{9..0}}.tar', 'is not a shard range'),
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
    'no name of torchvision': (
        lambda r, s: f'torchvision:CIFAR1O:{r}', r'no data set of that name; did you mean CIFAR10\?'),
    'torchvision without files': (lambda r, s: f'torchvision:CIFAR10:{r}', 'download=True'),
    'torchvision without a split': (lambda r, s: f'torchvision:EMNIST:{r}', 'by its name alone'),
    'a prefix alone': (lambda r, s: 'hf:', 'hf: is not complete; DATA must be a folder'),
    'cifar of a wrong size': (
        lambda r, s: str(edit(r / 'data_batch_1.bin', bytes(3073 * 2 + 5)).parent),
        '2 are complete, 10000 are expected'),
    'cifar of wrong labels': (lambda r, s: str(edit(r / 'data_batch_1.bin', b'\xff' * 3073).parent), 'a label of 255'),
    'an empty cifar': (lambda r, s: str(edit(r / 'train.bin', b'').parent), 'not a whole number of CIFAR-100 records'),
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
    with pytest.raises(RuntimeError, match=f'pip install {module}'):
        open_data(spec, 3)
