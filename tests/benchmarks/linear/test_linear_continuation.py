"""A linear evaluation that was stopped, killed or damaged, and the same command again."""
import os
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import warm
from conftest import ROOT
from tiny_linear import arguments, measure, read_record, same_numbers, write_split_digits

from simsiam_models import cli
from simsiam_models.benchmarks.linear import command, training
from simsiam_models.data.philox import permutation

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def split_digits(tmp_path_factory) -> Path:
    return write_split_digits(tmp_path_factory.mktemp('split_digits'))


def before_step(patch: pytest.MonkeyPatch, n: int, do: Callable[[], None]) -> list[list[int]]:
    """Calls `do` before the n-th step; returns the images of each step from now on."""
    real, calls = training.train_step, []

    def train_step(run, features, rows):
        calls.append(rows.tolist())
        if len(calls) == n:
            do()
        real(run, features, rows)
    patch.setattr(training, 'train_step', train_step)
    return calls


def die() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(('protocol', 'kill'), [('fair', 4), ('mmselfsup', 5), ('moco', 9), ('mhead', 7)])  # step
def test_a_run_that_died_ends_as_one_that_did_not(protocol, kill, split_digits, tmp_path, monkeypatch):
    measure(split_digits, tmp_path / 'whole', protocol)
    with monkeypatch.context() as m:
        before_step(m, kill, die)
        with pytest.raises(KeyboardInterrupt):
            measure(split_digits, tmp_path / 'killed', protocol)
    assert not list((tmp_path / 'killed').glob('*.json'))
    measure(split_digits, tmp_path / 'killed', protocol)
    assert same_numbers(read_record(tmp_path / 'whole'), read_record(tmp_path / 'killed'))
    states = [torch.load(next((tmp_path / n).glob('*.pth')), weights_only=True) for n in ('whole', 'killed')]
    for name, x in states[0]['heads'].items():
        assert torch.equal(x, states[1]['heads'][name]), name


@pytest.mark.parametrize('at', [1, 5, 9])
def test_sigterm_finishes_the_step_and_the_same_command_goes_on(at, split_digits, tmp_path, monkeypatch, capsys):
    measure(split_digits, tmp_path / 'whole', 'mhead')
    with monkeypatch.context() as m:
        calls = before_step(m, at, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert cli.main(arguments(split_digits, tmp_path / 'stopped', 'mhead')) == 143
        assert len(calls) == at
    assert 'SIGTERM; the same command continues' in capsys.readouterr().err
    measure(split_digits, tmp_path / 'stopped', 'mhead')
    assert same_numbers(read_record(tmp_path / 'whole'), read_record(tmp_path / 'stopped'))


def test_sigkill_leaves_a_checkpoint_that_is_whole(split_digits, tmp_path):
    script = f'''
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(Path(__file__).parent)!r}]
import torch
torch.set_num_threads(1)
from pathlib import Path
from tiny_linear import measure
real, count = torch.save, [0]
def save(state, file):
    count[0] += 1
    real(state, file)
    if count[0] == 2:  # while the second is being written
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
measure(Path({str(split_digits)!r}), Path({str(tmp_path / "killed")!r}), 'moco')
'''
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run([warm.python(), '-c', script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    measure(split_digits, tmp_path / 'whole', 'moco')
    measure(split_digits, tmp_path / 'killed', 'moco')
    assert same_numbers(read_record(tmp_path / 'whole'), read_record(tmp_path / 'killed'))


def test_a_kill_costs_the_steps_since_the_last_save_within_the_epoch(split_digits, tmp_path, monkeypatch):
    measure(split_digits, tmp_path / 'whole', 'mhead')
    monkeypatch.setattr(command, 'SAVE_EVERY', 0.0)
    calls = before_step(monkeypatch, 5, die)
    with pytest.raises(KeyboardInterrupt):
        measure(split_digits, tmp_path / 'killed', 'mhead')
    measure(split_digits, tmp_path / 'killed', 'mhead')
    expected = permutation(0, 1, 100)[48:96].tolist()  # the second step of the second epoch
    assert calls[4] == calls[5] == expected and len(calls) == 10  # 3 epochs of 3 steps, and the one that was killed
    assert same_numbers(read_record(tmp_path / 'whole'), read_record(tmp_path / 'killed'))


def test_a_finished_run_reports_that_and_prints_its_result_again(split_digits, tmp_path, capsys):
    before, after = [measure(split_digits, tmp_path, 'fair') or capsys.readouterr().out for _ in range(2)]
    (path,) = tmp_path.glob('*.pth')
    assert f'fair (changed): {path} is finished after 3 epochs; --fresh trains again' in after
    assert 'images/s' not in after and 'continues' not in after
    assert before.splitlines()[-3:] == after.splitlines()[-3:]


def test_the_checkpoint_of_other_numbers_is_named_by_those_that_were_given(split_digits, tmp_path):
    for rate in ('60', '30'):
        measure(split_digits, tmp_path / rate, 'fair', '--lr', rate)
    ours, other = (next((tmp_path / rate).glob('*.pth')) for rate in ('60', '30'))
    shutil.copy(other, ours)
    with pytest.raises(ValueError, match=r'belongs to another run \(--lr: 30.0 there, 60.0 here\); .*--fresh'):
        measure(split_digits, tmp_path / '60', 'fair')


def test_another_command_does_not_continue_this_run(split_digits, tmp_path):
    measure(split_digits, tmp_path, 'fair')
    measure(split_digits, tmp_path, 'fair', '--seed', '1')
    assert len(list(tmp_path.glob('*.json'))) == 2


def test_a_damaged_checkpoint_is_named_and_fresh_passes_over_it(split_digits, tmp_path):
    measure(split_digits, tmp_path, 'fair')
    (path,) = tmp_path.glob('*.pth')
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match='cannot be read.*--fresh'):
        measure(split_digits, tmp_path, 'fair')
    assert measure(split_digits, tmp_path, 'fair', '--fresh') == 0


def test_a_flipped_byte_of_a_checkpoint_is_noticed(split_digits, tmp_path):
    measure(split_digits, tmp_path, 'fair')
    (path,) = tmp_path.glob('*.pth')
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        inside = archive.read(largest)[:64]
    at = data.index(inside) + largest.file_size // 2
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match='cannot be read.*--fresh'):
        measure(split_digits, tmp_path, 'fair')


@pytest.mark.parametrize('key', ['sums', 'history', 'seconds', 'heads'])
def test_a_checkpoint_of_another_program_is_named(key, split_digits, tmp_path):
    measure(split_digits, tmp_path, 'fair', '--epochs', '1')
    (path,) = tmp_path.glob('*.pth')
    state = torch.load(path, weights_only=True)
    del state[key]
    torch.save(state, path)
    with pytest.raises(ValueError, match='not a checkpoint of this program.*--fresh'):
        measure(split_digits, tmp_path, 'fair', '--epochs', '1')
