"""Print every number that the commands compute on a small data set, to compare two versions of the code.

Run it once per version, on the same machine with the same packages, and compare:

    python tests/same_numbers.py --tree ../before > before.txt
    python tests/same_numbers.py > after.txt
    diff before.txt after.txt

It pretrains a tiny network on scikit-learn's handwritten digits and takes it through the benchmarks, on one CPU thread,
in about four minutes. It uses the command line only and reads what the commands print and the files they write, so it
does not depend on how the package is laid out. Lines read `command key = value` and are sorted. Of weights, momentum
and features it prints a hash and the norm; of sentences, the numbers in them. Times, dates, versions and the path of
the temporary folder are left out. Pytest does not collect this file.
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

VARYING = {  # keys whose values differ between two runs of the same code
    'date', 'images_per_second', 'log_bytes', 'seconds', 'versions', 'waiting'}
SPEED = re.compile(r'[\d.,]+ (?:img|images)/s|waiting +\d+ %|\d+:\d\d:\d\d|\bin [\d.]+ s\b')
PROGRESS = re.compile(r'fits/s')  # the SVM's lines come at intervals of time
NUMBER = re.compile(r'(?<![\w.])[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?(?!\w)')
TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--local-addr', '127.0.0.1', '--nproc-per-node', '2')
SMALL = ('--image-size', '32', '--resize', '36', '--device', 'cpu')
LINEAR = {  # protocol -> flags that shorten it
    'fair': ('--epochs', '3', '--batch-size', '48', '--lr', '60'),
    'mmselfsup': ('--epochs', '3', '--batch-size', '48', '--eval-every', '2'),
    'moco': ('--epochs', '3', '--batch-size', '48', '--lr-steps', '1', '2'),
    'mhead': ('--epochs', '3', '--batch-size', '48', '--lr-steps', '2', '--report-epochs', '2', '--eval-every', '3'),
    'auto': ()}
VOC_CLASSES = ('bird', 'boat', 'cat', 'dog')


class Commands:
    """Run the commands of a checkout and collect what they compute in `lines`."""

    def __init__(self, tree: Path, work: Path) -> None:
        self.tree, self.work = tree, work
        self.lines: list[str] = []
        caches = {name: str(work / 'cache') for name in ('SIMSIAM_CACHE', 'XDG_CACHE_HOME', 'HF_HOME', 'TORCH_HOME')}
        self.environment = {
            **os.environ, **caches, 'PYTHONPATH': str(tree), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}

    def run(self, name: str, *command: str | Path, whole_text: bool = False) -> None:
        """Run Python with `command` and take the numbers it prints, or with `whole_text` all of its lines."""
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=self.tree, env=self.environment, capture_output=True, text=True)
        print(f'{name}: {time.monotonic() - began:.0f} s', file=sys.stderr)
        if done.returncode:
            sys.exit(f'{name} ends with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}')
        for i, line in enumerate(done.stdout.splitlines()):
            if whole_text:
                self.add(name, f'line.{i:02}', line.replace(str(self.work), 'WORK'))
            elif not PROGRESS.search(line) and (found := self.canonical(SPEED.sub('', line) + ' ')):
                self.add(name, 'printed', found)

    def simsiam(self, name: str, subcommand: str, *args: str | Path) -> None:
        self.run(name, '-m', 'simsiam_models', subcommand, *args)

    def files(self, name: str, folder: Path) -> None:
        """Take what the files in `folder` hold; digests in the names of records get a line of their own."""
        for path in sorted(folder.rglob('*')):
            if path.suffix not in READERS or path.name.startswith('svm-'):  # svm-*.jsonl: seconds of every fit
                continue
            stem = re.sub(r'-[0-9a-f]{8}$', '', path.stem)
            where = f'{path.relative_to(folder).parent / stem}{path.suffix}'
            if stem != path.stem:
                self.add(name, where, path.name)
            arrays: dict[str, dict[str, np.ndarray]] = {}
            for key, value in leaves(READERS[path.suffix](path)):
                if isinstance(value, np.ndarray) and value.dtype.kind != 'U':
                    arrays.setdefault(key.split('.')[0], {})[key] = value
                else:
                    self.add(name, f'{where} {key}', self.canonical(value))
            for group, members in arrays.items():
                self.add(name, f'{where} {group}', fingerprint(members))

    def canonical(self, value: Any) -> str:
        if isinstance(value, np.ndarray):
            value = ','.join(value.tolist())
        if not isinstance(value, str):
            return repr(value)
        text = value.replace(str(self.work), 'WORK')
        return ' '.join(NUMBER.findall(text)) if ' ' in text else text

    def add(self, name: str, key: str, value: str) -> None:
        self.lines.append(f'{name} {key} = {value}')


def leaves(value: Any, key: str = '') -> Iterator[tuple[str, Any]]:
    """The values of nested dicts and lists with their dotted keys."""
    if isinstance(value, (dict, list, tuple)):
        for k, v in value.items() if isinstance(value, dict) else enumerate(value):
            if k not in VARYING:
                yield from leaves(v, f'{key}.{k}' if key else str(k))
    else:
        yield key, value.numpy() if isinstance(value, torch.Tensor) else value


def fingerprint(arrays: dict[str, np.ndarray]) -> str:
    """Of names, types, shapes and bytes; the norm tells rounding from another result."""
    digest, squares = hashlib.sha256(), 0.0
    for key in sorted(arrays):
        array = arrays[key]
        digest.update(f'{key} {array.dtype} {array.shape}'.encode() + array.tobytes())
        squares += float(np.square(array.astype(np.float64)).sum())
    return f'{digest.hexdigest()} norm {squares ** 0.5!r}'


def read_csv(path: Path) -> dict[str, list[str]]:
    with open(path, newline='') as f:
        return {row[0]: row[1:] for row in csv.reader(f)}


READERS: dict[str, Callable[[Path], Any]] = {
    '.json': lambda path: json.loads(path.read_text()),
    '.jsonl': lambda path: [json.loads(line) for line in path.read_text().splitlines()],
    '.csv': read_csv,
    '.pth': lambda path: torch.load(path, map_location='cpu', weights_only=True),
    '.safetensors': load_file,
    '.npz': lambda path: dict(np.load(path))}


def write_data(work: Path) -> None:
    """WORK/digits: 320 images in train/ and 160 others in val/; WORK/VOCdevkit: 80 and 40 of them as VOC2007."""
    digits = work / 'digits'
    write_digits(digits / 'train', 480)
    files = sorted((digits / 'train').rglob('*.*'), key=lambda path: path.stem)
    for path in files[2::3]:
        target = digits / 'val' / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        path.rename(target / path.name)
    for folder in ('JPEGImages', 'ImageSets/Main'):
        (work / 'VOCdevkit/VOC2007' / folder).mkdir(parents=True)
    for part, source, n in (('trainval', 'train', 80), ('test', 'val', 40)):
        write_voc(work / 'VOCdevkit/VOC2007', part, sorted((digits / source).rglob('*.*'))[::4][:n])


def write_voc(folder: Path, part: str, files: list[Path]) -> None:
    """A digit's class is its remainder; every fifth image has the next class as a difficult object."""
    for path in files:
        Image.open(path).convert('RGB').save(folder / f'JPEGImages/{path.stem}.jpg')
    for number, name in enumerate(VOC_CLASSES):
        lines = []
        for i, path in enumerate(files):
            away = (number - int(path.parent.name)) % len(VOC_CLASSES)
            lines.append(f'{path.stem} {1 if away == 0 else 0 if away == 1 and i % 5 == 0 else -1:2}\n')
        (folder / f'ImageSets/Main/{name}_{part}.txt').write_text(''.join(lines))


def pretrain(commands: Commands) -> None:
    """Undisturbed, stopped inside the second epoch and continued, and on two processes with every augmentation."""
    work = commands.work
    flags = ('train.py', work / 'digits', *TINY, '--knn-every', '1', '--epochs', '2', '--batch-size', '16',
             '--workers', '0', '--seed', '0', '--log-every', '5')
    other = ('--blur-p', '0.5', '--gray-p', '0.2', '--flip-p', '0.5', '--warmup-epochs', '1', '--no-fix-pred-lr')
    commands.run('train', *flags, '--output', work / 'run')
    commands.run('train-stopped', *flags, '--max-steps', '27', '--output', work / 'parts')
    commands.files('train-stopped', work / 'parts')
    commands.run('train-continued', *flags, '--output', work / 'parts')
    commands.run('train-two', *TORCHRUN, *flags, *other, '--output', work / 'two')
    for name, folder in (('train', 'run'), ('train-continued', 'parts'), ('train-two', 'two')):
        commands.files(name, work / folder)


def benchmark(commands: Commands) -> None:
    """Take the backbone of the first run through the benchmarks."""
    work, results = commands.work, commands.work / 'results'
    digits, small = work / 'digits', (*SMALL, '--model', work / 'run')
    voc = (work / 'VOCdevkit', *small, '--allow-partial', '--jobs', '1')
    tune = ('finetune', digits, *small, '--epochs', '2', '--batch-size', '32', '--workers', '0')
    labelled = [f'{path.parent.name}/{path.name}\n' for path in sorted((digits / 'train').rglob('*.*'))[::5]]
    (work / 'labelled.txt').write_text(''.join(labelled))

    commands.simsiam('knn', 'knn', digits, *small, '--k', '1', '5', '20', '100', '--output', results / 'knn')
    for protocol, flags in LINEAR.items():
        commands.simsiam(f'linear-{protocol}', 'linear', digits, *small, '--protocol', protocol, *flags,
                         '--output', results / f'linear-{protocol}')
    commands.simsiam('svm', 'svm', *voc, '--output', results / 'svm')
    commands.simsiam('svm-low-shot', 'svm', *voc, '--low-shot', '--k', '1', '2', '--samples', '2',
                     '--output', results / 'svm-low-shot')
    commands.simsiam('finetune', *tune, '--mixup', '0.1', '--cutmix', '0.5', '--erase-p', '0.2',
                     '--output', results / 'finetune')
    commands.simsiam('finetune-semi', *tune, '--dataset', 'folder', '--protocol', 'semi_1pct', '--list',
                     work / 'labelled.txt', '--allow-partial', '--output', results / 'finetune-semi')
    commands.simsiam('embed', 'embed', digits, *small, '--what', 'avgpool', *(f'feat{i}' for i in range(1, 6)),
                     '--output', work / 'embed/features.npz')
    for folder in (*sorted(results.iterdir()), work / 'embed'):
        commands.files(folder.name, folder)
    commands.run('report', '-m', 'simsiam_models', 'report', '--markdown', *sorted(results.iterdir()), whole_text=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--tree', type=Path, default=Path(__file__).parent.parent, metavar='FOLDER',
        help='checkout whose commands run (default: the one this file lies in)')
    tree = parser.parse_args().tree.resolve()
    with tempfile.TemporaryDirectory(prefix='same-numbers-') as folder:
        commands = Commands(tree, Path(folder).resolve())
        write_data(commands.work)
        pretrain(commands)
        benchmark(commands)
        commands.run('weights', '-m', 'simsiam_models', 'weights', 'list', whole_text=True)
    print('\n'.join(sorted(commands.lines)))


if __name__ == '__main__':
    main()
