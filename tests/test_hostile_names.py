"""Files and classes whose names command terminals, forge lines and compute in spreadsheets, through whole commands."""
import csv
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import warm
from conftest import ROOT, TINY, write_digits

from simsiam_models import cli

CLASSES = [b'\x1b[2Jclear', b'=1+1', b'two\nFORGED line', '\u202ebidi'.encode(), b'\xff\xfe', b'car\rFORGED']
NETWORK = '{"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64], "stem_width": 8, "stem_type": "deep"}'


@pytest.fixture(scope='module')
def hostile(tmp_path_factory) -> Path:
    """Six classes of digits and an image that cannot be read, in a folder with such a name."""
    digits = write_digits(tmp_path_factory.mktemp('digits'), 150)
    root = os.fsencode(tmp_path_factory.mktemp('hostile')) + b'/data\nFORGED \x1b[2J'
    for i, name in enumerate(CLASSES):
        target = os.path.join(root, name)
        shutil.copytree(os.fsencode(digits / str(i)), target)
    with open(os.path.join(root, CLASSES[0], b'torn\nFORGED\x1b[31m.png'), 'wb') as f:
        f.write(b'no image')
    return Path(os.fsdecode(root))


def assert_plain(text: str, commands: bool = False) -> None:
    assert text and all(c.isprintable() or c == '\n' for c in text), ascii(text)
    assert not [line for line in text.split('\n') if line.lstrip().startswith('FORGED')], text


def run(*args: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [warm.python(), *map(os.fsencode, args)], capture_output=True, text=True, timeout=240, cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})


def test_train_py(hostile, tmp_path):
    done = run('train.py', hostile, *TINY, '--epochs', '1', '--batch-size', '16', '--output', tmp_path / 'run',
               '--max-unreadable', '0.2')
    assert done.returncode == 0, done.stderr
    assert_plain(done.stdout + done.stderr)
    assert 'torn\\nFORGED\\x1b[31m.png' in done.stdout
    assert_plain((tmp_path / 'run/unreadable.txt').read_text())
    done = run('train.py', hostile, *TINY, '--output', tmp_path / 'stopped', '--batch-size', '16',
               '--max-unreadable', '0')
    assert done.returncode == 1 and len(done.stderr.strip().split('\n')) == 1
    assert_plain(done.stdout + done.stderr)
    done = run('train.py', hostile, '--recipe', 'x\nFORGED\x1b[2J', '--no-such\nFORGED')
    assert done.returncode == 2
    assert_plain(done.stderr)


def test_finetune_and_its_tables(hostile, tmp_path, capsys):
    args = ['finetune', str(hostile), '--output', str(tmp_path / 'run'), '--model', 'resnet18:random', '--model-args',
            NETWORK, '--image-size', '32', '--resize', '36', '--device', 'cpu', '--workers', '0', '--epochs', '1',
            '--batch-size', '16', '--warmup-epochs', '0']
    assert cli.main(args) == 0
    assert_plain(''.join(capsys.readouterr()))
    for name in ('per_class.csv', 'confusion.csv'):
        with open(tmp_path / 'run' / name, newline='', errors='surrogateescape') as f:
            rows = list(csv.reader(f))
        assert "'=1+1" in {row[0] for row in rows[1:]}
        assert not [cell for row in rows for cell in row if cell.startswith(('=', '+', '@', '\t', '\r'))]
    assert json.loads((tmp_path / 'run/config.json').read_text())['label_names'] == sorted(map(os.fsdecode, CLASSES))
    for more in ([], ['--markdown']):
        assert cli.main(['report', str(tmp_path / 'run'), *more]) == 0
        assert_plain(''.join(capsys.readouterr()))


@pytest.mark.parametrize('args', [
    ['knn', '--allow-partial'], ['embed', '--allow-partial'], ['preflight', '--device', 'cpu', '--seconds', '2'],
    ['linear', '--protocol', 'auto', '--allow-partial']])
def test_the_other_commands(hostile, tmp_path, capsys, args):
    command, *more = args
    if command != 'preflight':
        more += ['--model', 'resnet10t:random', '--output', str(tmp_path / 'out'), '--device', 'cpu',
                 '--image-size', '32', '--resize', '32']
    data = hostile
    if command in ('knn', 'linear'):
        data = Path(f'{tmp_path}/both\nFORGED')
        for part in ('train', 'val'):
            shutil.copytree(hostile, data / part)
    assert cli.main([command, str(data), *more]) == 0
    assert_plain(''.join(capsys.readouterr()))
