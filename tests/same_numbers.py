"""Print every number that the commands compute on a small data set, to compare two versions of the code.

Run it once per version, on the same machine with the same packages, and compare:

    python tests/same_numbers.py --tree ../before > before.txt
    python tests/same_numbers.py > after.txt
    diff before.txt after.txt

The script pretrains a tiny network on scikit-learn's handwritten digits and takes it through the benchmarks, on one CPU
thread, in about four minutes. It uses the command line only and reads what the commands print and the files they write,
so it does not depend on how the package is laid out. Lines read `command key = value` and are sorted. Weights, momentum
and features appear as a hash and a norm, sentences as the numbers in them. Times, dates, versions and the path of the
temporary folder are left out. Pytest does not collect this file.
"""
import argparse
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import TINY, write_digits
from PIL import Image
from safetensors.numpy import load_file

# Keys and texts that differ between two runs of the same code.
VARYING = {'command', 'date', 'images_per_second', 'log_bytes', 'seconds', 'versions', 'waiting'}
SPEED = re.compile(r'[\d.,]+ (?:(?:img|images)/s|s\b|seconds\b)|waiting +\d+ %|\d+:\d\d:\d\d')
NUMBER = re.compile(r'(?<![\w.])[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?(?!\w)')
TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--local-addr', '127.0.0.1', '--nproc-per-node', '2')
SMALL = ('--image-size', '32', '--resize', '36', '--device', 'cpu')
BATCHES = ('--epochs', '3', '--batch-size', '48')
LINEAR = {  # protocol -> flags that shorten it
    'fair': (*BATCHES, '--lr', '60'), 'mmselfsup': (*BATCHES, '--eval-every', '2'),
    'moco': (*BATCHES, '--lr-steps', '1', '2'),
    'mhead': (*BATCHES, '--lr-steps', '2', '--report-epochs', '2', '--eval-every', '3'), 'auto': ()}


class Commands:
    """Run the commands of a checkout and collect what they compute in `lines`."""

    def __init__(self, tree: Path, work: Path) -> None:
        self.tree, self.work = tree, work
        self.lines: list[str] = []
        caches = {name: str(work / 'cache') for name in ('SIMSIAM_CACHE', 'XDG_CACHE_HOME', 'HF_HOME', 'TORCH_HOME')}
        self.environment = {
            **os.environ, **caches, 'PYTHONPATH': str(tree), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}

    def python(self, *command: str | Path) -> str:
        """Run Python with `command` and return what it prints; exit where it fails."""
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=self.tree, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f'{command} ends with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}')
        return done.stdout

    def run(self, name: str, *command: str | Path, whole_text: bool = False) -> None:
        """Run a command and collect the numbers it prints, or with `whole_text` all of its lines."""
        began = time.monotonic()
        for i, line in enumerate(self.python(*command).splitlines()):
            key = f'line.{i:02}' if whole_text else 'printed'
            self.add(name, key, line if whole_text else ' '.join(NUMBER.findall(SPEED.sub('', line))))
        print(f'{name}: {time.monotonic() - began:.0f} s', file=sys.stderr)

    def files(self, name: str, folder: Path) -> None:
        """Collect what the files in `folder` hold; the digest in a file's name gets a line of its own."""
        for path in sorted(p for p in folder.rglob('*') if p.suffix in READERS):
            stem = re.sub(r'-([0-9a-f]{8}){1,2}$', '', path.stem)
            where = f'{path.relative_to(folder).parent / stem}{path.suffix}'
            if stem != path.stem:
                self.add(name, where, path.name)
            content = READERS[path.suffix](path)
            if stem == 'svm':  # rows of fit, result, seconds, checksum
                content = {'-'.join(map(str, fit)): result for fit, result, *_ in content}
            arrays: dict[str, dict[str, np.ndarray]] = {}
            for key, value in leaves(content):
                if isinstance(value, np.ndarray):
                    arrays.setdefault(key.split('.')[0], {})[key] = value
                elif isinstance(value, str):
                    self.add(name, f'{where} {key}', ' '.join(NUMBER.findall(value)) if ' ' in value else value)
                else:
                    self.add(name, f'{where} {key}', repr(value))
            for group, members in arrays.items():
                self.add(name, f'{where} {group}', fingerprint(members))

    def add(self, name: str, key: str, value: str) -> None:
        if value:
            self.lines.append(f'{name} {key} = {value}'.replace(str(self.work), 'WORK'))


def leaves(value: Any, key: str = '') -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of nested dicts and lists; tensors become arrays, and arrays of text lists."""
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    elif isinstance(value, np.ndarray) and value.dtype.kind == 'U':
        value = value.tolist()
    if isinstance(value, (dict, list, tuple)):
        for k, v in value.items() if isinstance(value, dict) else enumerate(value):
            if k not in VARYING:
                yield from leaves(v, f'{key}.{k}' if key else str(k))
    else:
        yield key, value


def fingerprint(arrays: dict[str, np.ndarray]) -> str:
    """Return a hash of names, types, shapes and bytes, and the norm, which tells rounding from another result."""
    digest, squares = hashlib.sha256(), 0.0
    for key, array in sorted(arrays.items()):
        digest.update(f'{key} {array.dtype} {array.shape}'.encode() + array.tobytes())
        if array.dtype.kind == 'f':
            squares += float(np.square(array.astype(np.float64)).sum())
    return f'{digest.hexdigest()} norm {squares ** 0.5!r}'


READERS: dict[str, Callable[[Path], Any]] = {
    '.json': lambda path: json.loads(path.read_text()),
    '.jsonl': lambda path: [json.loads(line) for line in path.read_text().splitlines()],
    '.csv': lambda path: {row[0]: row[1:] for row in csv.reader(path.read_text().splitlines())},
    '.pth': lambda path: torch.load(path, map_location='cpu', weights_only=True),
    '.safetensors': load_file,
    '.npz': lambda path: dict(np.load(path))}


def write_data(work: Path) -> None:
    """Write 320 digits to digits/train and 160 others to digits/val, and a quarter of each as VOCdevkit/VOC2007."""
    digits = work / 'digits'
    write_digits(digits / 'train', 480)
    files = sorted((digits / 'train').rglob('*.*'), key=lambda path: path.stem)
    for path in files[2::3]:
        target = digits / 'val' / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        path.rename(target / path.name)
    for part, source in (('trainval', 'train'), ('test', 'val')):
        write_voc(work / 'VOCdevkit/VOC2007', part, sorted((digits / source).rglob('*.*'))[::4])


def write_voc(folder: Path, part: str, files: list[Path]) -> None:
    """Write a part of VOC2007 with four classes: a digit is of class digit % 4, some are difficult in the next one."""
    images, lists = folder / 'JPEGImages', folder / 'ImageSets/Main'
    for path in (images, lists):
        path.mkdir(parents=True, exist_ok=True)
    for path in files:
        Image.open(path).convert('RGB').save(images / f'{path.stem}.jpg')
    for number, name in enumerate(('bird', 'boat', 'cat', 'dog')):
        away = [(number - int(path.parent.name)) % 4 for path in files]
        labels = [1 if a == 0 else 0 if a == 1 and i % 5 == 0 else -1 for i, a in enumerate(away)]
        lines = [f'{path.stem} {label:2}\n' for path, label in zip(files, labels, strict=True)]
        (lists / f'{name}_{part}.txt').write_text(''.join(lines))


def pretrain(commands: Commands) -> None:
    """Pretrain undisturbed, stopped in the second epoch and continued, and with two processes and other flags."""
    work = commands.work
    flags = ('train.py', work / 'digits', *TINY, '--knn-every', '1', '--epochs', '2', '--batch-size', '16',
             '--workers', '0', '--seed', '0', '--log-every', '5')
    other = ('--blur-p', '0.5', '--gray-p', '0.2', '--flip-p', '0.5', '--warmup-epochs', '1', '--no-fix-pred-lr')
    commands.run('train', *flags, '--output', work / 'run')
    commands.run('train-stopped', *flags, '--max-steps', '27', '--output', work / 'parts')
    commands.files('train-stopped', work / 'parts')
    commands.run('train-continued', *flags, '--output', work / 'parts')
    commands.run('train-two', *TORCHRUN, *flags, *other, '--output', work / 'two')
    commands.files('train', work / 'run')
    commands.files('train-continued', work / 'parts')
    commands.files('train-two', work / 'two')


def benchmark(commands: Commands) -> None:
    """Take the backbone of the first run through the benchmarks."""
    work, results, simsiam = commands.work, commands.work / 'results', ('-m', 'simsiam_models')
    digits, small = work / 'digits', (*SMALL, '--model', work / 'run')
    voc = ('svm', work / 'VOCdevkit', *small, '--allow-partial', '--jobs', '1')
    tune = ('finetune', digits, *small, '--epochs', '2', '--batch-size', '32', '--workers', '0')
    labelled = [f'{path.parent.name}/{path.name}\n' for path in sorted((digits / 'train').rglob('*.*'))[::5]]
    (work / 'labelled.txt').write_text(''.join(labelled))
    runs = {
        'knn': ('knn', digits, *small, '--k', '1', '5', '20', '100'),
        **{f'linear-{protocol}': ('linear', digits, *small, '--protocol', protocol, *flags)
           for protocol, flags in LINEAR.items()},
        'svm': voc, 'svm-low-shot': (*voc, '--low-shot', '--k', '1', '2', '--samples', '2'),
        'finetune': (*tune, '--mixup', '0.1', '--cutmix', '0.5', '--erase-p', '0.2'),
        'finetune-semi': (*tune, '--dataset', 'folder', '--protocol', 'semi_1pct', '--list', work / 'labelled.txt',
                          '--allow-partial')}
    for name, args in runs.items():
        commands.run(name, *simsiam, *args, '--output', results / name)
        commands.files(name, results / name)
    features = ('avgpool', *(f'feat{i}' for i in range(1, 6)))
    commands.run('embed', *simsiam, 'embed', digits, *small, '--what', *features, '--output', work / 'embed/all.npz')
    commands.files('embed', work / 'embed')
    commands.run('report', *simsiam, 'report', '--markdown', *(results / name for name in runs), whole_text=True)
    commands.run('weights', *simsiam, 'weights', 'list', whole_text=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--tree', type=Path, default=Path(__file__).parent.parent, metavar='FOLDER',
        help='checkout whose commands run (default: the one this file lies in)')
    tree = parser.parse_args().tree.resolve()
    with tempfile.TemporaryDirectory(prefix='same-numbers-') as folder:
        commands = Commands(tree, Path(folder).resolve())
        package = commands.python('-c', 'import simsiam_models; print(simsiam_models.__file__)').strip()
        if not Path(package).resolve().is_relative_to(tree):
            sys.exit(f'{package} is the package found from {tree}, and it lies elsewhere')
        write_data(commands.work)
        pretrain(commands)
        benchmark(commands)
    print('\n'.join(sorted(commands.lines)))


if __name__ == '__main__':
    main()
