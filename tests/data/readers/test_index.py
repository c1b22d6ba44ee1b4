"""The cached listing of an image folder: always what a fresh walk finds, and no walk if nothing has changed."""
import json
import mmap
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from simsiam_models.data.readers import index
from simsiam_models.data.readers.index import Index, open_index
from simsiam_models.runtime.files import ABANDONED, cache_folder

EXTENSIONS = ('.jpg', '.jpeg', '.png')
TREE = ['cat/1.png', 'cat/2.JPG', 'dog/1.png', 'dog/deep/2.jpeg', 'dog/readme.txt']
links = pytest.mark.skipif(os.name != 'posix', reason='links need rights on Windows')


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv('SIMSIAM_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


def fill(root: Path, names: list[str] = TREE) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def settle(root: Path) -> Path:
    """Sets the times of all folders to an hour ago."""
    for folder, *_ in os.walk(root):
        os.utime(folder, (time.time() - 3600,) * 2)
    return root


def walked(root: Path) -> tuple[list[str], list[str], list[int] | None]:
    """Paths, classes and labels by os.walk; hidden files are passed over."""
    paths = sorted(
        os.path.relpath(os.path.join(folder, name), root)
        for folder, _, names in os.walk(root, followlinks=True) for name in names
        if name.lower().endswith(EXTENSIONS) and not name.startswith('.'))
    if not paths or any(os.sep not in path for path in paths):
        return paths, [], None
    classes = sorted({path.split(os.sep)[0] for path in paths})
    return paths, classes, [classes.index(path.split(os.sep)[0]) for path in paths]


def content(found: Index) -> tuple[list[str], list[str], list[int] | None]:
    labels = None if found.labels is None else found.labels.tolist()
    return [os.fsdecode(found.path(i)) for i in range(len(found))], found.classes, labels


def check(root: Path) -> tuple[list[str], list[str], list[int] | None]:
    """Asserts that the index is what a walk finds."""
    got = content(open_index(root, EXTENSIONS))
    assert got == walked(root)
    return got


def is_mapped(found: Index) -> bool:
    owner = found._paths
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(owner, mmap.mmap)


@pytest.fixture
def scans(monkeypatch) -> list:
    """The folders that were listed; empty after a cache hit."""
    listed, scan = [], index._scan
    monkeypatch.setattr(index, '_scan', lambda root, extensions: listed.append(root) or scan(root, extensions))
    return listed


@pytest.fixture
def settled(tmp_path, scans) -> Path:
    """A folder whose listing is cached."""
    root = settle(fill(tmp_path / 'data'))
    check(root)
    scans.clear()
    check(root)
    assert scans == []
    return root


# The listing


def test_order_is_that_of_sorted_whole_paths(tmp_path):
    paths, classes, _ = check(fill(tmp_path / 'data', [
        'a/1.png', 'a b/1.png', 'a/b/1.png', 'a/b.png', 'a/b 1.png', 'a/b.c/1.png', 'a.b/1.png', 'B/1.png', 'a0/1.png',
        'b/10.png', 'b/9.png', 'a\n/1.png', 'a/été.png', 'été/1.png', 'a/一.png', 'a/\U0001f408.png', 'a/\uff21.png']))
    assert paths.index('a b/1.png') < paths.index('a.b/1.png') < paths.index('a/1.png')
    assert classes.index('a') < classes.index('a b')  # classes are in the order of their names alone


@pytest.mark.skipif(sys.platform != 'linux', reason='other file systems refuse such names')
def test_names_that_are_not_text_are_listed(tmp_path):
    root = fill(tmp_path / 'data', ['a/é.png', 'a/z.png', 'é/1.png', 'z/\ue000.png'])
    for name in (b'a/\x80.png', b'a/\xff.png', b'\xe9t\xe9/1.png', b'\x80/\xc3.png', b'z/\xee.png'):
        path = os.path.join(os.fsencode(root), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, 'wb').close()
    got = check(settle(root))
    assert check(root) == got
    assert b'a/\xff.png' in [open_index(root, EXTENSIONS).path(i) for i in range(len(got[0]))]


def test_only_files_with_an_image_extension_in_any_case_count(tmp_path):
    root = fill(
        tmp_path / 'data', ['a/1.PNG', 'a/2.JpEg', 'a/3.txt', 'a/png', 'a/.png', 'a/4.png.x', 'b/1.txt', '2.txt'])
    (root / 'a/5.png').mkdir()  # a folder with an image's name
    fill(root, ['a/6.png/1.png'])
    paths, classes, _ = check(root)
    assert paths == ['a/1.PNG', 'a/2.JpEg', 'a/6.png/1.png']
    assert classes == ['a']  # b has no image


@pytest.mark.parametrize('names', [['1.png'], ['b.png', 'a/1.png', 'c/1.png'], ['z.png', 'a/1.png']])
def test_a_file_directly_in_the_root_means_no_classes(tmp_path, names):
    root = settle(fill(tmp_path / 'data', names))
    assert check(root)[1:] == ([], None)
    assert check(root)[1:] == ([], None)  # from the cache


def test_an_index_out_of_range_is_an_error(settled):
    found = open_index(settled, EXTENSIONS)
    assert found.path(-1) == found.path(3)
    for i in (4, -5):
        with pytest.raises(IndexError):
            found.path(i)


@links
def test_links_to_folders_and_files_are_followed(tmp_path):
    store, root = fill(tmp_path / 'store', ['x/1.png', 'x/y/2.png', '3.png']), fill(tmp_path / 'data', ['cat/1.png'])
    (root / 'dog').symlink_to(store / 'x')
    (root / 'eel').symlink_to(store / 'x')  # the same folder twice is not a loop
    (root / 'cat/3.png').symlink_to(store / '3.png')
    (root / 'cat/4.png').symlink_to(store / 'nowhere')  # broken: a file that cannot be read
    (root / 'cat/5.png').symlink_to(root / 'cat/5.png')
    (root / 'fox').symlink_to(store / 'nowhere')
    paths, classes, _ = check(root)
    assert classes == ['cat', 'dog', 'eel']
    assert {'cat/3.png', 'cat/4.png', 'cat/5.png', 'dog/y/2.png', 'eel/1.png'} <= set(paths)


@links
def test_loops_of_links_end(tmp_path):
    root = fill(tmp_path / 'data', ['a/1.png', 'b/c/2.png'])
    (root / 'a/up').symlink_to(root)
    (root / 'a/self').symlink_to('.')
    (root / 'b/c/up').symlink_to('../../b')
    (root / 'b/other').symlink_to('../a')
    want = [b'a/1.png', b'b/c/2.png', b'b/other/1.png']
    settle(root)
    for _ in range(2):
        found = open_index(root, EXTENSIONS)
        assert [found.path(i) for i in range(len(found))] == want
    assert is_mapped(found)


def test_an_empty_or_missing_folder_has_length_zero_and_is_not_cached(tmp_path, cache):
    (tmp_path / 'data/a').mkdir(parents=True)
    settle(tmp_path / 'data')
    for root in (tmp_path / 'data', tmp_path / 'nowhere'):
        found = open_index(root, EXTENSIONS)
        assert (len(found), found.classes, found.labels) == (0, [], None)
    assert not list(cache.rglob('*.idx'))


# Kept and used again


def test_the_second_time_no_folder_is_listed(settled, monkeypatch):
    def fail(*_):
        raise AssertionError('a folder was listed')
    want = walked(settled)
    monkeypatch.setattr(os, 'scandir', fail)
    found = open_index(settled, EXTENSIONS)
    assert content(found) == want
    assert is_mapped(found)


def test_what_was_just_listed_is_mapped_too(tmp_path):
    found = open_index(settle(fill(tmp_path / 'data')), EXTENSIONS)
    assert is_mapped(found)  # so that the memory of the scan is free again


def test_the_mapping_is_read_only(settled):
    with pytest.raises(ValueError, match='read-only'):
        open_index(settled, EXTENSIONS).labels[0] = 1


def test_one_folder_has_one_listing_whatever_its_spelling(settled, scans, monkeypatch):
    monkeypatch.chdir(settled.parent)
    (settled.parent / 'link').symlink_to('data')
    for spelling in ('data', 'data/', './data', 'cache/../data', 'link', settled):
        assert len(open_index(spelling, EXTENSIONS)) == 4
    assert scans == []


def test_other_extensions_have_a_listing_of_their_own(settled):
    assert len(open_index(settled, ('.txt',))) == 1
    assert len(open_index(settled, EXTENSIONS)) == 4


EDITS = {
    'a file more': lambda root: (root / 'cat/3.png').touch(),
    'a file less': lambda root: (root / 'cat/1.png').unlink(),
    'a file renamed': lambda root: (root / 'cat/1.png').rename(root / 'cat/0.png'),
    'a file moved': lambda root: (root / 'cat/1.png').rename(root / 'dog/deep/1.png'),
    'a file deep down': lambda root: (root / 'dog/deep/0.png').touch(),
    'a file in the root': lambda root: (root / '0.png').touch(),
    'a class more': lambda root: fill(root, ['ant/1.png']),
    'a class less': lambda root: ((root / 'cat/1.png').unlink(), (root / 'cat/2.JPG').unlink(), (root / 'cat').rmdir()),
    'a class renamed': lambda root: (root / 'cat').rename(root / 'eel'),
    'two classes swapped': lambda root: (
        (root / 'cat').rename(root / 'x'), (root / 'dog').rename(root / 'cat'), (root / 'x').rename(root / 'dog')),
}


@pytest.mark.parametrize('change', EDITS.values(), ids=EDITS)
def test_after_any_change_the_folder_is_listed_again(settled, scans, change):
    before = walked(settled)
    change(settled)
    assert check(settled) != before
    assert scans
    settle(settled)
    check(settled)
    scans.clear()
    check(settled)
    assert scans == []  # and cached again


def test_a_change_is_seen_though_the_time_of_the_folder_was_set_back(settled, scans):
    # tar and rsync give a folder its time in the archive, whatever they added to it.
    before = (settled / 'cat').stat().st_mtime_ns
    time.sleep(0.05)  # more than a tick of the clock
    (settled / 'cat/3.png').touch()
    os.utime(settled / 'cat', ns=(before, before))
    check(settled)
    assert scans


@links
def test_a_link_that_leads_elsewhere_now_is_seen(tmp_path, scans):
    for name in 'abc':
        fill(tmp_path / f'store/{name}', [f'{name}.png'])
    root = fill(tmp_path / 'data', ['cat/1.png'])
    (tmp_path / 'middle').symlink_to('store/a')
    (root / 'dog').symlink_to(tmp_path / 'middle')
    (root / 'eel').symlink_to(tmp_path / 'not yet')
    settle(tmp_path)
    os.utime(tmp_path / 'store/b', ns=((root / 'dog').stat().st_mtime_ns,) * 2)
    check(root)
    scans.clear()
    check(root)
    assert scans == []
    # None of these changes the root itself.
    (tmp_path / 'middle').unlink()
    (tmp_path / 'middle').symlink_to('store/b')
    assert 'dog/b.png' in check(root)[0]
    check(root)
    (tmp_path / 'not yet').symlink_to('store/c')
    assert 'eel/c.png' in check(root)[0]


@pytest.mark.parametrize('age, kept', [(0, False), (1.5, False), (2.5, True), (-60, False), (None, False)])
def test_a_folder_changed_within_two_seconds_is_not_kept(tmp_path, scans, age, kept):
    # It may change again within one tick of the file system's clock. Nor are times in the future trusted, or those of
    # 1970, which file systems without times report.
    root = settle(fill(tmp_path / 'data'))
    moment = 0 if age is None else time.time() - age
    os.utime(root / 'dog', (moment, moment))
    check(root)
    check(root)
    assert len(scans) == (1 if kept else 2)


def test_a_folder_that_could_not_be_listed_is_tried_again(tmp_path, scans, monkeypatch):
    root, scandir = settle(fill(tmp_path / 'data')), os.scandir

    def refuse(path):
        if str(path).endswith('dog' + os.sep):
            raise PermissionError(path)
        return scandir(path)
    with monkeypatch.context() as m:
        m.setattr(os, 'scandir', refuse)
        assert open_index(root, EXTENSIONS).classes == ['cat']
    assert check(root)[1] == ['cat', 'dog']


# Files that are not what they should be


def kept(root: Path, cache: Path) -> Path:
    open_index(root, EXTENSIONS)
    file, = (cache / 'index').iterdir()
    return file


def test_a_truncated_file_is_ignored_and_written_again(settled, cache, scans):
    file = kept(settled, cache)
    whole, want = file.read_bytes(), walked(settled)
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        file.write_bytes(whole[:size])
        scans.clear()
        assert content(open_index(settled, EXTENSIONS)) == want
        assert scans and file.read_bytes() == whole


def test_a_flipped_bit_is_seen_wherever_it_is(settled, cache, scans):
    file = kept(settled, cache)
    whole, want = file.read_bytes(), walked(settled)
    header = index.PREFIX.size + index.PREFIX.unpack_from(whole)[1]
    rng = np.random.default_rng(0)
    arrays = range(index._align(header), len(whole))
    for at in [*range(index.PREFIX.size), *rng.integers(index.PREFIX.size, header, 150), *arrays]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        scans.clear()
        assert content(open_index(settled, EXTENSIONS)) == want
        assert scans


def with_header(header: object, body: bytes = bytes(64)) -> bytes:
    """A file whose checksum is right."""
    text = json.dumps(header).encode()
    head = index.PREFIX.pack(index.MAGIC, len(text), index.hashlib.sha256(text).digest()) + text
    return head + bytes(-len(head) % 8) + body


@pytest.mark.parametrize('foreign', [
    b'', bytes(4096), os.urandom(5000), b'\x80\x04\x95pickle', index.MAGIC, index.MAGIC + b'\xff' * 500,
    b'simsidx0' + bytes(90),
    with_header([]), with_header({}), with_header(None), with_header('x'), with_header({'root': 1, 'size': 'x'}),
    index.PREFIX.pack(index.MAGIC, 4, index.hashlib.sha256(b'\xff{}[').digest()) + b'\xff{}[' + bytes(64),
], ids=range(13))
def test_a_file_of_another_kind_is_ignored_and_written_again(settled, cache, scans, foreign):
    file = kept(settled, cache)
    file.write_bytes(foreign)
    check(settled)
    assert scans
    scans.clear()
    check(settled)
    assert scans == []


@pytest.mark.parametrize('change', [
    {'images': 3}, {'images': 5}, {'classes': []}, {'root': '/elsewhere'}, {'extensions': ['.png']}, {'arrays': {}},
    {'arrays': {'paths': [0, 8]}}, {'arrays': {'offsets': [0, 10**9], 'paths': [0, 5]}}, {'size': 0}, {'folders': None},
    {'folders': {'cat/': None}}, {'folders': {'': [1, 2]}}, {'files': None}, {'files': {'cat/1.png': [1, 2, 3, 4]}},
], ids=str)
def test_a_header_that_does_not_fit_the_file_is_ignored(settled, cache, scans, change):
    file = kept(settled, cache)
    whole = file.read_bytes()
    _, length, _ = index.PREFIX.unpack_from(whole)
    header = json.loads(whole[index.PREFIX.size:index.PREFIX.size + length])
    body = whole[index._align(index.PREFIX.size + length):]
    file.write_bytes(with_header(header, body))
    check(settled)
    assert scans == []  # so the change below is what matters
    file.write_bytes(with_header({**header, **change}, body))
    check(settled)
    assert scans


def test_the_listing_of_another_folder_is_not_taken(settled, cache, tmp_path):
    theirs = kept(settled, cache).read_bytes()
    ours = settle(fill(tmp_path / 'other', ['a/1.png']))
    open_index(ours, EXTENSIONS)
    for file in (cache / 'index').iterdir():
        file.write_bytes(theirs)
    check(ours)


@pytest.mark.parametrize('place', ['file/below', 'file', 'cache'])
def test_where_nothing_can_be_kept_the_folder_is_still_listed(tmp_path, monkeypatch, place):
    root = settle(fill(tmp_path / 'data'))
    (tmp_path / 'file').touch()
    fill(tmp_path, ['cache/index'])  # a file in place of the folder
    monkeypatch.setenv('SIMSIAM_CACHE', str(tmp_path / place))
    assert (cache_folder() is None) == (place != 'cache')
    check(root)


@pytest.mark.parametrize(('of', 'call'), [(Path, 'write_bytes'), (os, 'replace')])
def test_a_full_disk_leaves_nothing_behind(tmp_path, cache, monkeypatch, of, call):
    def fail(*_):
        raise OSError(28, 'No space left on device')
    root = settle(fill(tmp_path / 'data'))
    with monkeypatch.context() as m:
        m.setattr(of, call, fail)
        check(root)
    assert list((cache / 'index').iterdir()) == []
    check(root)
    assert len(list((cache / 'index').iterdir())) == 1


def test_what_a_killed_process_left_half_written_is_removed_later(settled, cache):
    file = kept(settled, cache)
    old, new = (file.with_name(f'{file.stem}{x}.part') for x in ('old', 'new'))
    for part in (old, new):
        part.touch()
    os.utime(old, (time.time() - 2 * ABANDONED,) * 2)
    file.unlink()
    check(settled)
    assert set(file.parent.iterdir()) == {file, new}  # another process may be writing the new one


def test_the_cache_is_for_its_owner_only(tmp_path, monkeypatch):
    monkeypatch.delenv('SIMSIAM_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    assert cache_folder() == tmp_path / 'xdg/simsiam_models'
    check(settle(fill(tmp_path / 'data')))
    if os.name == 'posix':
        file, = (tmp_path / 'xdg').rglob('*.idx')
        assert [p.stat().st_mode & 0o777 for p in (cache_folder(), file.parent, file)] == [0o700, 0o700, 0o600]
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    assert cache_folder() == tmp_path / 'home/.cache/simsiam_models'
