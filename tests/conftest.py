"""Real images for the tests: scikit-learn's handwritten digits, written out as files."""
import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from browser import browser  # noqa: F401  a fixture
from PIL import Image
from sklearn.datasets import load_digits

# Nothing is kept in the user's cache: neither the compiled kernel nor listings of folders that tests fill.
os.environ['SIMSIAM_CACHE'] = tempfile.mkdtemp(prefix='simsiam-tests-')
atexit.register(shutil.rmtree, os.environ['SIMSIAM_CACHE'], ignore_errors=True)
ROOT = Path(__file__).resolve().parent.parent
TINY = [  # a tiny backbone and recipe for 32 px images
    '--recipe', 'demo', '--model', 'resnet18', '--model-args',
    '{"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64], "stem_type": "deep", "stem_width": 8}',
    '--dim', '64', '--pred-dim', '16', '--image-size', '32', '--eval-resize', '32', '--device', 'cpu', '--amp', 'off',
    '--knn-every', '0', '--knn-k', '20', '--hue', '0.1', '--crop-scale', '0.6', '1', '--flip-p', '0', '--gray-p', '0']


def write_digits(folder: Path, n: int) -> Path:
    """The first n digits as 32 px files in one folder per class, PNG and JPEG in turn."""
    digits = load_digits()
    for i in range(n):
        image = Image.fromarray((digits.images[i] * 255 / 16).astype(np.uint8))
        image = image.resize((32, 32), Image.Resampling.BICUBIC)
        target = folder / str(digits.target[i])
        target.mkdir(parents=True, exist_ok=True)
        image.save(target / (f'{i:04}.png' if i % 2 else f'{i:04}.jpg'), **({} if i % 2 else {'quality': 95}))
    return folder


def copy_sources(folder: Path) -> Path:
    """Copies what git tracks into a new folder: setuptools writes into the folder that it builds."""
    if not (ROOT / '.git').exists():
        pytest.skip('needs a clone: git names the files')
    files = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\n')
    for name in filter(None, files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def build_wheel(folder: Path, sources: Path | None = None) -> Path:
    """Builds the wheel into a folder, from a copy of what git tracks or from other sources."""
    subprocess.run(
        [sys.executable, '-m', 'pip', 'wheel', str(sources or copy_sources(folder / 'sources')), '--no-deps',
         '--no-build-isolation', '-q', '-w', str(folder)], check=True, timeout=120)
    return next(folder.glob('simsiam_models-*.whl'))


@pytest.fixture
def one_thread():
    """For tests that compare bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='session')
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp('digits'), 1000)


@pytest.fixture(scope='session')
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp('few_digits'), 64)


def run_train(
    *args: str | Path, processes: int = 1, timeout: float = 240, python: str | None = None,
) -> subprocess.CompletedProcess:
    """train.py in its own process, or torchrun's processes, one thread each, under `python` (default: a warm one)."""
    launcher = [] if processes == 1 else [
        '-m', 'torch.distributed.run', '--standalone', '--local-addr', '127.0.0.1', '--nproc-per-node', str(processes)]
    return subprocess.run(
        [python or warm.python(), *launcher, str(ROOT / 'train.py'), *map(str, args)], capture_output=True, text=True,
        timeout=timeout, cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})


EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n'


def put_ghostscript(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a `gs` first on PATH that leaves a file; returns this file."""
    (folder / 'bin').mkdir()
    (folder / 'bin' / 'gs').write_text(f'#!/bin/sh\necho 10; touch {folder}/ran\n')
    (folder / 'bin' / 'gs').chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder}/bin:{os.environ["PATH"]}')
    monkeypatch.setattr('PIL.EpsImagePlugin.gs_binary', None)
    return folder / 'ran'
