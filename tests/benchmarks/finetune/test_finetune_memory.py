"""Worker processes hand batches over where shared memory is short or missing, and a dead one is a sentence."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from simsiam_models.benchmarks.finetune import data
from simsiam_models.benchmarks.finetune.data import Loader, Samples
from simsiam_models.data import MemoryImages

CPU = torch.device('cpu')
KEYS = [[(0, i) for i in range(k, k + 8)] for k in (0, 8, 16)]
CHILD = '''
import logging, sys, torch
logging.basicConfig(format='%(message)s')
sys.path.insert(0, 'tests/benchmarks/finetune')
from test_finetune_memory import KEYS, CPU, make
loader = make(2)
print([x.double().sum().item() for x, y in loader.load(KEYS)], loader.workers)
'''


def transform(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def make(workers: int) -> Loader:
    """Batches of 8 images, 96 kB each."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    images = MemoryImages(pixels, np.arange(24) % 2, ['a', 'b'], 'noise')
    return Loader(Samples(images, transform, 0, True), workers, CPU)


def sums(loader: Loader) -> list[float]:
    return [x.double().sum().item() for x, y in loader.load(KEYS)]


@pytest.mark.parametrize('size, workers', [('64k', 2), ('4k', 0)])
def test_workers_need_no_room_in_shared_memory(size, workers, tmp_path):
    tiny = ['unshare', '-rm', 'sh', '-c', f'mount -t tmpfs -o size={size} none /dev/shm && exec "$@"', 'sh']
    try:
        done = subprocess.run([*tiny, 'true'], capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip('no unshare')
    if done.returncode:
        pytest.skip('no mounts in a namespace of its own')
    done = subprocess.run(
        [*tiny, sys.executable, '-c', CHILD], capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{ROOT}:{ROOT}/tests', 'TMPDIR': str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stdout == f'{sums(make(0))} {workers}\n'
    assert ('the main process reads the images' in done.stderr) == (workers == 0)


def test_workers_use_shared_memory_where_it_suffices_and_the_pipe_where_not(monkeypatch):
    samples = make(0).samples
    free = {'bytes': 1e12}
    monkeypatch.setattr(data, 'free_shared_memory', lambda: free['bytes'])
    monkeypatch.setattr(data, 'get_worker_info', lambda: type('Worker', (), {'num_workers': 4}))
    x, y, _ = samples[KEYS[0]]
    assert isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    for free['bytes'] in (0, 8 * x.nbytes):
        arrays = samples[KEYS[0]]
        assert isinstance(arrays[0], np.ndarray) and isinstance(arrays[1], np.ndarray)
        assert torch.equal(torch.as_tensor(arrays[0]), x)
    monkeypatch.setattr(data, 'get_worker_info', lambda: None)  # the main process needs neither
    assert isinstance(samples[KEYS[0]][0], torch.Tensor)


def test_a_worker_that_is_killed_is_one_sentence_with_a_remedy(monkeypatch):
    loader = make(1)
    main = os.getpid()

    def read(index: int) -> np.ndarray:
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGBUS)  # as the kernel does when /dev/shm is full
        return np.zeros((32, 32, 3), np.uint8)

    monkeypatch.setattr(loader.samples.images, 'read', read)
    with pytest.raises(RuntimeError, match='a process that reads images ended .*--workers 0') as e:
        list(loader.load(KEYS))
    assert '\n' not in str(e.value)
    loader.workers = 0
    assert len(list(loader.load(KEYS))) == 3


def test_the_room_is_that_of_dev_shm():
    if Path('/dev/shm').is_dir():
        stats = os.statvfs('/dev/shm')
        assert 0 <= data.free_shared_memory() <= stats.f_blocks * stats.f_frsize
