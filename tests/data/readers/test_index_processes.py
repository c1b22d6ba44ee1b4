"""The cached listing in several processes, and the memory and time it takes for millions of images."""
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_index import EXTENSIONS, check, content, fill, kept, settle, walked
from test_index import cache as cache  # a fixture

from simsiam_models.data.readers import index
from simsiam_models.data.readers.index import open_index


def child(code: str, *args: object) -> subprocess.Popen:
    """Runs Python with `index` alone: importing the whole package, and torch, takes seconds and memory."""
    start = '\n'.join([
        'import json, os, sys, time',
        'from types import ModuleType, SimpleNamespace',
        'names = "simsiam_models simsiam_models.data simsiam_models.data.readers simsiam_models.runtime"',
        'for name in names.split():',
        '    sys.modules[name] = ModuleType(name)',
        '    sys.modules[name].__path__ = [name.replace(".", "/")]',
        'sys.modules["simsiam_models.runtime.distributed"] = SimpleNamespace(World=None)',
        'from simsiam_models.data.readers import index'])
    return subprocess.Popen(
        [sys.executable, '-c', f'{start}\n{code}', *map(str, args)], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_processes_that_write_at_once_do_no_harm(tmp_path, cache):
    root = settle(fill(tmp_path / 'data', [f'{i % 7}/{i}.png' for i in range(300)]))
    code = '''
file, key = index.Path(sys.argv[2]), {'root': sys.argv[1], 'extensions': ['.png']}
for _ in range(100):
    index._save(file, key, index._scan(key['root'], ('.png',)))
    found = index._load(file, key)
    assert len(found) == 300 and found.path(299) == b'6/97.png'
'''
    file = kept(root, cache)
    processes = [child(code, root, file) for _ in range(2)]
    assert content(open_index(root, EXTENSIONS)) == walked(root)
    assert [p.wait(60) for p in processes] == [0, 0]
    assert list((cache / 'index').iterdir()) == [file]
    check(root)


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('kind', ['folder', 'list', 'tar'])
def test_a_long_listing_is_opened_at_once_and_takes_little_memory(tmp_path, kind):
    root = settle(fill(tmp_path / 'data', ['n0000/0.png']))
    n, classes = 2_000_000, 1000
    if kind == 'folder':
        listing = index._scan(str(root), EXTENSIONS)
        listing.paths, listing.offsets, listing.labels = bytearray(), index.array('q', [0]), index.array('i')
        listing.label_runs([(f'n{c:04}', n // classes) for c in range(classes)])
    else:
        listing = index.Listing()
        listing.labels = index.array('i', np.repeat(np.arange(classes, dtype=np.int32), n // classes))
        listing.classes = [f'n{c:04}' for c in range(classes)]
        listing.files['n0000/0.png'] = index.stamp_file(root / 'n0000/0.png')
    if kind == 'tar':
        listing.columns = {'shards': index.array('i', bytes(4 * n)), 'starts': index.array('q', range(n)),
                           'sizes': index.array('q', range(n))}
    for c in range(classes):
        for i in range(n // classes):
            listing.add(f'n{c:04}/n{c:04}_{i}.JPEG')
    key = {'root': str(root), 'extensions': list(EXTENSIONS)}
    index._save(tmp_path / 'cache.idx', key, listing)
    code = '''
def private():  # resident without shared pages: Linux 6.18 maps MBs of a file at one access
    with open('/proc/self/statm') as f:
        _, resident, shared, *_ = map(int, f.read().split())
        return (resident - shared) * os.sysconf('SC_PAGE_SIZE')
before, start = private(), time.perf_counter()
found = index._load(index.Path(sys.argv[1]), json.loads(sys.argv[2]))
seconds, step = time.perf_counter() - start, len(found) // 50
few = [os.fsdecode(found.path(i)) for i in range(0, len(found), step)]
labels = found.labels[::step].tolist()
starts = found.columns['starts'][::step].tolist() if found.columns else []
print(json.dumps([len(found), seconds, private() - before, few, labels, starts, found.digest]))
'''
    process = child(code, tmp_path / 'cache.idx', json.dumps(key))
    length, seconds, grown, few, labels, starts, digest = json.loads(process.communicate(timeout=60)[0])
    assert length == n
    assert seconds < 2
    assert grown < 50 * 2**20
    assert few == [f'n{i // 2000:04}/n{i // 2000:04}_{i % 2000}.JPEG' for i in range(0, n, n // 50)]
    assert labels == [i // 2000 for i in range(0, n, n // 50)]
    assert starts == (list(range(0, n, n // 50)) if kind == 'tar' else [])
    assert digest == listing.make_index().digest
