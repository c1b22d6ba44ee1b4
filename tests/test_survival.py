"""Runs that are killed, stopped, starved of disk or continued elsewhere. tests/killing.py has the accidents."""
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import warm
from conftest import ROOT, TINY

from simsiam_models.runtime import checkpoint
from simsiam_models.training.setup import KEYS

EPOCHS, STEPS = 3, 4  # 64 digits in batches of 16
ENV = {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}


class Process:
    """train.py with an accident: one process, or torchrun's."""

    def __init__(
        self, data: Path, output: Path, *more: str, accident: tuple[str, int] = ('none', 0), processes: int = 1,
        restarts: int = 0, **env: str,
    ) -> None:
        folder = Path(tempfile.mkdtemp(dir=output.parent))
        self.out, self.err = folder / 'out', folder / 'err'
        self.out.touch()
        self.err.touch()
        args = [
            str(ROOT / 'tests/killing.py'), accident[0], str(accident[1]), str(data), *TINY, '--epochs', str(EPOCHS),
            '--batch-size', '16', '--log-every', '2', '--output', str(output), *more]
        env = {**os.environ, **ENV, **env}
        self.torchrun = None
        with open(self.out, 'w') as out, open(self.err, 'w') as err, open(os.devnull) as nothing:
            if processes == 1:
                files = {0: nothing.fileno(), 1: out.fileno(), 2: err.fileno()}
                self.fork = warm.Fork(warm.server().socket, args, env, str(ROOT), files)
                return
            self.torchrun = subprocess.Popen(
                [warm.python(), '-m', 'torch.distributed.run', '--standalone', '--local-addr', '127.0.0.1',
                 '--nproc-per-node', str(processes), '--max-restarts', str(restarts), *args],
                stdout=out, stderr=err, cwd=ROOT, env=env)

    def wait(self) -> tuple[int, str, str]:
        """Exit code (minus the signal's number, if one killed it), what it said, what it complained of."""
        code = self.fork.wait() if self.torchrun is None else self.torchrun.wait(240)
        return code, self.out.read_text(), self.err.read_text()

    def wait_for(self, words: str) -> None:
        end = time.monotonic() + 120
        while words not in self.out.read_text():
            assert time.monotonic() < end, self.err.read_text()
            time.sleep(0.01)

    def send(self, number: int) -> None:
        self.fork.send(number)


def run(*args, **kwargs) -> tuple[int, str, str]:
    return Process(*args, **kwargs).wait()


def weights(output: Path, name: str = 'checkpoint.pth') -> dict[str, torch.Tensor]:
    state = torch.load(output / name, weights_only=True)
    momentum = state['optimizer']['state']
    return {**state['model'], **{f'momentum {k}': v['momentum_buffer'] for k, v in momentum.items()}}


def assert_same_run(a: Path, b: Path) -> None:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    different = [k for k, v in one.items() if not torch.equal(v, two[k])]
    assert not different
    lines = [[{k: v for k, v in json.loads(line).items() if k not in ('images_per_second', 'waiting')}
              for line in (f / 'log.jsonl').read_text().splitlines()] for f in (a, b)]
    assert lines[0] == lines[1]


def read(path: Path) -> dict:
    return checkpoint.read(path, KEYS)


@pytest.fixture(scope='module')
def undisturbed(few_digits, tmp_path_factory) -> Path:
    """Lines of the log are at even steps; so are all checkpoints, so that lines of continued runs are the same."""
    output = tmp_path_factory.mktemp('undisturbed') / 'run'
    code, out, err = run(few_digits, output, '--checkpoint-steps', '2', '--workers', '2')
    assert code == 0, err
    return output


KILLS = [
    ('read', 1), ('read', 70), ('batch', 1), ('batch', 6), ('backward', 3), ('before step', 1), ('before step', 5),
    ('after step', 2), ('after step', 4), ('before write', 1), ('before write', 2), ('in write', 1), ('in write', 2),
    ('in write', 3), ('after write', 1), ('after write', 2), ('before sync', 1), ('before sync', 3), ('after sync', 2),
    ('after sync', 4), ('before rename', 1), ('before rename', 2), ('before rename', 3), ('before rename', 4),
    ('after rename', 1), ('after rename', 2), ('after rename', 3), ('in load', 1)]


def test_a_run_killed_28_times_ends_in_the_bits_and_lines_of_an_undisturbed_one(few_digits, tmp_path, undisturbed):
    """Each accident is met by a run that goes on from where the one before died."""
    order, killed = random.Random(0).sample(KILLS, len(KILLS)), 0
    output = tmp_path / 'run'
    for accident in order:
        args = few_digits, output, '--checkpoint-steps', '2', '--workers', '2'
        code, out, err = run(*args, accident=accident)
        assert code in (-9, 0), (accident, err)
        killed += code == -9
        if code == 0:  # done before the accident: another run from its beginning
            assert_same_run(output, undisturbed)
            shutil.rmtree(output)
    assert killed >= 20
    code, out, err = run(*args)
    assert code == 0, err
    assert_same_run(output, undisturbed)


def test_a_run_killed_at_moments_of_the_clock_ends_in_the_same_bits(few_digits, tmp_path, undisturbed):
    """From outside, wherever it is."""
    output, moments = tmp_path / 'run', random.Random(1)
    args = few_digits, output, '--checkpoint-steps', '2', '--workers', '2'
    for _ in range(6):
        process = Process(*args)
        time.sleep(moments.uniform(0, 1.5))
        process.send(signal.SIGKILL)
        process.wait()
    code, out, err = run(*args)
    assert code == 0, err
    assert_same_run(output, undisturbed)


def test_an_extended_run_killed_anywhere_ends_in_the_bits_and_lines_of_an_undisturbed_one(
        few_digits, tmp_path, undisturbed):
    """It goes on by --extend, or by the command that began it."""
    args = '--checkpoint-steps', '2', '--workers', '0'
    for name in ('whole', 'killed'):
        shutil.copytree(undisturbed, tmp_path / name)
    code, out, err = run(few_digits, tmp_path / 'whole', *args, '--extend', '5')
    assert code == 0 and 'extending the run from 3 to 5 epochs' in out, err
    for accident, extend in (
            (('before rename', 1), True), (('after rename', 1), True), (('in load', 1), False),
            (('after step', 3), False), (('in write', 1), True), (('before rename', 2), True)):
        more = ['--extend', '5'] if extend else []
        code, out, err = run(few_digits, tmp_path / 'killed', *args, *more, accident=accident)
        assert code == -9, (accident, out, err)
    assert run(few_digits, tmp_path / 'killed', *args)[0] == 0
    assert_same_run(tmp_path / 'killed', tmp_path / 'whole')


def test_a_run_extended_inside_an_epoch_ends_in_the_same_bits_from_the_checkpoint_before(half_way, tmp_path):
    args, output = half_way
    whole = shutil.copytree(output, tmp_path / 'whole')
    assert run(args[0], whole, *args[2:], '--extend', '5')[0] == 0
    assert run(*args, '--extend', '5', accident=('before step', 1))[0] == -9
    (output / 'checkpoint.pth').write_bytes(b'')  # the one before is from before the extension
    code, out, err = run(*args)
    assert code == 0 and 'continuing after epoch 1, step 0' in out, err
    assert_same_run(output, whole)


def test_two_processes_of_which_one_is_killed_end_in_the_same_bits(few_digits, tmp_path):
    outputs = [tmp_path / n for n in ('whole', 'killed')]
    more = '--checkpoint-steps', '2', '--workers', '0'
    assert run(few_digits, outputs[0], *more, processes=2)[0] == 0
    code, out, err = run(
        few_digits, outputs[1], *more, processes=2, restarts=2, accident=('rank 1 dies', 7),
        MARKER=str(tmp_path / 'marker'))
    assert code == 0, err
    assert (tmp_path / 'marker').exists() and 'continuing after epoch 1, step 2' in out
    assert_same_run(*outputs)
    assert 'Traceback' not in err.replace('Traceback : ', '')


def test_four_processes_continue_in_the_same_bits(few_digits, tmp_path):
    """With more than two, the order of a sum counts."""
    args = '--workers', '0', '--knn-every', '0'
    for name, first in (('whole', []), ('parts', ['--max-steps', '5'])):
        if first:
            assert run(few_digits, tmp_path / name, *args, *first, processes=4)[0] == 0
        code, out, err = run(few_digits, tmp_path / name, *args, processes=4)
        assert code == 0, err
    one, two = weights(tmp_path / 'whole'), weights(tmp_path / 'parts')
    assert not [k for k, v in one.items() if not torch.equal(v, two[k])]


@pytest.mark.parametrize('name, code', [('SIGTERM', 143), ('SIGINT', 130), ('SIGUSR1', 138)])
def test_a_signal_ends_the_step_saves_it_and_exits_with_its_number(few_digits, tmp_path, undisturbed, name, code):
    output = tmp_path / 'run'
    args = few_digits, output, '--checkpoint-steps', '2', '--workers', '0'
    got, out, err = run(*args, accident=(name, 6))
    assert got == code and err.splitlines() == [
        f'train.py: stopped by {name}; the same command continues from the last checkpoint']
    state = read(output / 'checkpoint.pth')
    assert (state['epoch'], state['step']) == (1, 2)
    got, out, err = run(*args)
    assert got == 0 and 'continuing after epoch 1, step 2' in out
    assert_same_run(output, undisturbed)


def test_a_signal_before_the_first_checkpoint_says_that_there_is_none(few_digits, tmp_path, undisturbed):
    args = few_digits, tmp_path / 'run', '--checkpoint-steps', '2', '--workers', '0'
    code, out, err = run(*args, accident=('SIGINT before the first checkpoint', 1))
    assert code == 130 and err.splitlines() == [
        'train.py: stopped by SIGINT; there is no checkpoint yet, so the same command starts from the beginning']
    assert run(*args)[0] == 0
    assert_same_run(tmp_path / 'run', undisturbed)


def test_one_signal_that_arrives_twice_is_one(few_digits, tmp_path):
    """As when it is sent to torchrun and its processes together: torchrun passes it on."""
    code, out, err = run(few_digits, tmp_path / 'run', '--workers', '0', accident=('SIGTERM twice', 6))
    state = read(tmp_path / 'run/checkpoint.pth')
    assert code == 143 and (state['epoch'], state['step']) == (1, 2)


def test_a_signal_to_one_process_stops_both_at_the_same_step(few_digits, tmp_path):
    code, out, err = run(
        few_digits, tmp_path / 'run', '--workers', '0', processes=2, accident=('SIGTERM on rank 1', 6))
    assert code != 0 and err.count('train.py: stopped by SIGTERM') == 1
    state = read(tmp_path / 'run/checkpoint.pth')
    assert (state['epoch'], state['step']) == (1, 2)


def test_a_signal_before_the_first_step_stops_at_once(few_digits, tmp_path):
    code, out, err = run(
        few_digits, tmp_path / 'run', '--auto-perf', '--workers', '0', accident=('SIGTERM in the trial', 2))
    assert code == 143 and 'stopped by SIGTERM' in err
    assert not list((tmp_path / 'run').glob('*.pth'))


@pytest.fixture
def half_way(few_digits, tmp_path) -> tuple[tuple, Path]:
    """A run that was stopped after 6 of its 12 steps, with checkpoints of steps 4 and 6."""
    args = few_digits, tmp_path / 'run', '--checkpoint-steps', '2', '--workers', '0'
    assert run(*args, '--max-steps', '6')[0] == 0
    assert read(tmp_path / 'run/checkpoint_previous.pth')['step'] == 0
    return args, tmp_path / 'run'


def garbage_inside(data: bytes) -> bytes:
    """Numbers of the largest tensor are changed; the archive is whole."""
    at = len(data) // 2
    return data[:at] + bytes(255 - b for b in data[at:at + 64]) + data[at + 64:]


@pytest.mark.parametrize('spoil', [
    lambda data: data[:len(data) // 2], lambda data: b'', lambda data: random.Random(0).randbytes(len(data)),
    lambda data: bytes(len(data)), garbage_inside, None], ids=[
    'truncated', 'empty', 'random bytes', 'zeros', 'damaged inside', 'rename lost'])
def test_a_spoiled_newest_checkpoint_falls_back_to_the_one_before_and_says_so(half_way, undisturbed, spoil):
    args, output = half_way
    path = output / 'checkpoint.pth'
    if spoil is None:
        path.rename(output / 'checkpoint.pth.part')
    else:
        path.write_bytes(spoil(path.read_bytes()))
    code, out, err = run(*args)
    assert code == 0, err
    assert 'continuing after epoch 1, step 0' in out
    assert ('checkpoint.pth cannot be read' in out) == (spoil is not None)
    assert_same_run(output, undisturbed)


def test_no_readable_checkpoint_is_one_line(half_way):
    args, output = half_way
    for path in output.glob('*.pth'):
        path.write_bytes(b'')
    code, out, err = run(*args)
    assert code == 1 and err.strip().splitlines()[-1].endswith('give another --output')
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize('more, words', [
    (['--dim', '32'], 'dim: 64 there, 32 here'), (['--lr', '0.1'], 'lr: 0.4 there, 0.1 here'),
    (['--model', 'resnet10t', '--model-args', '{}'], 'model: resnet18 there, resnet10t here'),
    (['--recipe', 'cifar10_ep800'], 'recipe: demo there, cifar10_ep800 here')])
@pytest.mark.parametrize('way', ['the same folder', '--resume FILE', 'a copied checkpoint'])
def test_a_checkpoint_of_another_model_or_recipe_is_refused_with_the_differing_keys(
        half_way, tmp_path, way, more, words):
    args, output = half_way
    before = (output / 'checkpoint.pth').read_bytes()
    if way == 'the same folder':
        code, out, err = run(*args, *more)
    elif way == '--resume FILE':
        code, out, err = run(args[0], tmp_path / 'new', *args[2:], *more, '--resume', str(output / 'checkpoint.pth'))
    else:
        assert run(args[0], tmp_path / 'new', *args[2:], *more, '--max-steps', '1')[0] == 0
        shutil.copy(output / 'checkpoint.pth', tmp_path / 'new/checkpoint.pth')
        code, out, err = run(args[0], tmp_path / 'new', *args[2:], *more)
    assert code == 1 and words in err and len(err.strip().splitlines()) == 1, err
    assert (output / 'checkpoint.pth').read_bytes() == before


def test_a_checkpoint_of_other_data_is_refused(half_way, few_digits, tmp_path):
    args, output = half_way
    other = tmp_path / 'other'
    shutil.copytree(few_digits, other)
    next(other.rglob('*.png')).rename(other / '0' / 'renamed.png')
    code, out, err = run(other, *args[1:])
    assert code == 1 and 'digest: ' in err and len(err.strip().splitlines()) == 1


def test_the_same_data_elsewhere_are_the_same_data(half_way, few_digits, tmp_path, undisturbed):
    args, output = half_way
    shutil.copytree(few_digits, tmp_path / 'moved')
    code, out, err = run(tmp_path / 'moved', *args[1:])
    assert code == 0, err
    assert_same_run(output, undisturbed)


def test_resume_begins_a_new_folder_from_a_file(half_way, tmp_path, undisturbed):
    args, output = half_way
    code, out, err = run(args[0], tmp_path / 'new', *args[2:], '--resume', str(output / 'checkpoint.pth'))
    assert code == 0 and 'continuing after epoch 1, step 2' in out, err
    for k, v in weights(undisturbed).items():
        assert torch.equal(v, weights(tmp_path / 'new')[k])


def test_a_refused_file_leaves_no_folder_and_its_precision_is_kept(half_way, tmp_path):
    args, output = half_way
    new = args[0], tmp_path / 'new', *args[2:], '--resume', str(output / 'checkpoint.pth')
    assert run(*new, '--lr', '0.1')[0] == 1 and not (tmp_path / 'new').exists()
    code, out, err = run(*new, '--amp', 'auto')
    assert code == 0 and 'amp off' in out, err
    code, out, err = run(*new)
    assert code == 0 and 'is ignored' in out


def test_resume_never_refuses_a_folder_that_holds_a_run(half_way):
    args, output = half_way
    code, out, err = run(*args, '--resume', 'never')
    assert code == 1 and '--resume never' in err


def test_an_error_of_one_process_is_said(few_digits, tmp_path):
    code, out, err = run(
        few_digits, tmp_path / 'run', '--workers', '0', processes=2, accident=('no data on rank 1', 0))
    assert code != 0 and 'train.py: process 1: no such mount' in err and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('before, after', [(2, 1), (1, 2)])
def test_another_number_of_processes_takes_every_sample_exactly_once_per_epoch(few_digits, tmp_path, before, after):
    output, seen = tmp_path / 'run', tmp_path / 'samples'
    more = '--workers', '0', '--keep-last', '5'
    assert run(few_digits, output, *more, '--max-steps', '6', processes=before, SAMPLES=str(seen))[0] == 0
    code, out, err = run(few_digits, output, *more, processes=after, SAMPLES=str(seen))
    assert code == 0 and f'now with {after} processes, before with {before}' in out, err
    lines = [json.loads(line) for line in seen.read_text().splitlines()]
    for epoch in range(EPOCHS):
        counts = Counter(i for line in lines if line['epoch'] == epoch for i in line['indices'])
        assert counts == Counter(range(64))


def test_the_last_n_and_every_kth_epoch_are_kept(few_digits, tmp_path):
    output = tmp_path / 'run'
    assert run(few_digits, output, '--epochs', '6', '--workers', '0', '--keep-last', '3', '--keep-every', '2')[0] == 0
    names = {p.name: read(p)['epoch'] for p in output.glob('*.pth')}
    assert names == {
        'checkpoint.pth': 6, 'checkpoint_previous.pth': 5, 'checkpoint_previous_2.pth': 5,  # before and after kNN
        'checkpoint_epoch0002.pth': 2, 'checkpoint_epoch0004.pth': 4, 'checkpoint_epoch0006.pth': 6}


def test_checkpoints_are_written_by_the_clock(few_digits, tmp_path):
    output = tmp_path / 'run'
    args = few_digits, output, '--workers', '0', '--checkpoint-minutes', '1e-9'
    assert run(*args, accident=('before step', 3))[0] == -9
    assert read(output / 'checkpoint.pth')['step'] == 2


@pytest.mark.parametrize('accident', ['full for a while', 'vanished'])
def test_a_run_goes_on_while_no_checkpoint_can_be_written(few_digits, tmp_path, undisturbed, accident):
    output = tmp_path / 'run'
    code, out, err = run(few_digits, output, '--checkpoint-steps', '2', '--workers', '0', accident=(accident, 5))
    assert code == 0, err
    assert 'the one before is kept' in out
    assert not list(output.glob('*.part'))
    for k, v in weights(undisturbed).items():
        assert torch.equal(v, weights(output)[k])


def test_a_deleted_output_is_made_again_and_the_run_ends_in_the_same_bits(few_digits, tmp_path, undisturbed):
    output = tmp_path / 'run'
    code, out, err = run(few_digits, output, '--checkpoint-steps', '2', '--workers', '0', accident=('deleted', 5))
    assert code == 0, err
    assert out.count(f'{output} was deleted; it is recreated') == 1
    assert {'args.json', 'log.jsonl', 'checkpoint.pth', 'backbone'} <= {p.name for p in output.iterdir()}
    for k, v in weights(undisturbed).items():
        assert torch.equal(v, weights(output)[k])


def test_a_second_run_on_one_output_is_one_line_and_a_killed_one_is_continued_at_once(few_digits, tmp_path):
    output = tmp_path / 'run'
    args = few_digits, output, '--workers', '0', '--epochs', '9999'
    first = Process(*args)
    first.wait_for('step 2/')
    code, _, err = run(*args)
    assert code == 1 and len(err.strip().splitlines()) == 1, err
    assert f'in use by another run (process {first.fork.pid} on ' in err
    first.send(signal.SIGKILL)
    code, out, err = run(*args, '--max-steps', '1')
    assert code == 0 and 'waiting' not in out, err
    first.wait()


def test_a_run_stops_when_the_newest_checkpoint_gets_too_old_and_keeps_it(few_digits, tmp_path, undisturbed):
    output = tmp_path / 'run'
    args = few_digits, output, '--checkpoint-minutes', '0.0001', '--checkpoint-steps', '2', '--workers', '0'
    code, out, err = run(*args, accident=('full disk', 5))
    assert code == 1 and 'no checkpoint could be written for' in err and len(err.strip().splitlines()) == 1
    state = read(output / 'checkpoint.pth')
    assert (state['epoch'], state['step']) == (1, 0)
    assert run(*args)[0] == 0
    for k, v in weights(undisturbed).items():
        assert torch.equal(v, weights(output)[k])


def test_a_disk_that_is_full_from_the_start_is_one_line(few_digits, tmp_path):
    code, out, err = run(
        few_digits, tmp_path / 'run', '--workers', '0', accident=('full from the start', 0))
    assert code == 1 and 'no checkpoint can be written' in err and len(err.strip().splitlines()) == 1


def spoil_files(data: Path, share: float) -> list[str]:
    files = sorted(p for p in data.rglob('*') if p.is_file())
    bad = random.Random(0).sample(files, round(share * len(files)))
    for path in bad:
        path.write_bytes(b'no image')
    return [str(p) for p in bad]


@pytest.mark.parametrize('workers, processes', [(0, 1), (2, 1), (1, 2)])
def test_five_percent_of_corrupt_images_are_replaced_and_counted_exactly(few_digits, tmp_path, workers, processes):
    data, output = tmp_path / 'data', tmp_path / 'run'
    shutil.copytree(few_digits, data)
    bad = spoil_files(data, 0.05)
    args = data, output, '--workers', str(workers)
    assert run(*args, '--max-steps', '5', processes=processes)[0] == 0  # the count goes on after a restart
    code, out, err = run(*args, processes=processes)
    assert code == 0, err
    assert sorted(line.split(': ')[0] for line in (output / 'unreadable.txt').read_text().splitlines()) == sorted(bad)
    lines = [json.loads(line) for line in (output / 'log.jsonl').read_text().splitlines()]
    counts = [line for line in lines if 'unreadable' in line]
    assert counts == [{'epoch': e, 'unreadable': len(bad), 'images': 64} for e in (1, 2, 3)]
    assert f'{len(bad)} images could not be read' in out


def test_sixty_percent_of_corrupt_images_stop_the_run_with_a_sentence(few_digits, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(few_digits, data)
    spoil_files(data, 0.6)
    # The kNN monitor reads the same images unless told otherwise, and then it is the first to refuse them.
    for output, more, words in (('run', ('--knn-data', str(few_digits)), '6 of 64 allowed'),
                                ('another', (), '38 of 64 images for the kNN')):
        code, out, err = run(data, tmp_path / output, '--workers', '2', *more)
        assert code == 1 and words in err and '--max-unreadable' in err
        assert len(err.strip().splitlines()) == 1


def test_weights_that_are_not_finite_end_the_run_in_one_line_and_keep_the_last_checkpoint(few_digits, tmp_path):
    output = tmp_path / 'run'
    code, out, err = run(few_digits, output, '--workers', '0', accident=('no number', 7))
    assert code == 1 and 'not a finite number at epoch ' in err or 'the loss is nan at epoch 1' in err
    assert len(err.strip().splitlines()) == 1
    state = read(output / 'checkpoint.pth')
    assert (state['epoch'], state['step']) == (1, 0)
    assert all(v.isfinite().all() for v in state['model'].values())


@pytest.mark.parametrize('accident, words', [
    ('I/O error in load', 'Input/output error'), ('no memory in load', 'not enough memory to read')])
def test_an_error_of_the_machine_is_no_damage(half_way, undisturbed, accident, words):
    """The newest checkpoint is good: it must neither be set aside nor passed over."""
    args, output = half_way
    before = {p: p.read_bytes() for p in output.rglob('*') if p.is_file()}
    code, out, err = run(*args, accident=(accident, 1))
    assert code == 1 and words in err and 'checkpoint.pth' in err and len(err.strip().splitlines()) == 1, err
    assert {p: p.read_bytes() for p in output.rglob('*') if p.is_file()} == before
    code, out, err = run(*args)
    assert code == 0 and 'continuing after epoch 1, step 2' in out, err
    assert_same_run(output, undisturbed)


def two_machines(folders: list[Path], data: Path, *more: str) -> list[str]:
    """torchrun on two 'machines' with one process each, each in a folder of its own; what they said."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    jobs = []
    for rank, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        args = [
            '-m', 'torch.distributed.run', '--nnodes', '2', '--nproc-per-node', '1', '--node-rank', str(rank),
            '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'127.0.0.1:{port}', '--rdzv-id', 'x', '--local-addr',
            '127.0.0.1', str(ROOT / 'train.py'), str(data), *TINY, '--epochs', str(EPOCHS), '--batch-size', '16',
            '--workers', '0', '--output', 'run', *more]
        # One after the other: on one address, c10d orders the machines by the numbers of their processes.
        with open(folder / 'said', 'w') as out, open(os.devnull) as nothing:
            files = {0: nothing.fileno(), 1: out.fileno(), 2: out.fileno()}
            jobs.append(warm.Fork(warm.server().socket, args, {**os.environ, **ENV}, str(folder), files))
    codes = [job.wait() for job in jobs]
    said = [(folder / 'said').read_text() for folder in folders]
    assert codes == [0, 0], said
    return said


def test_only_the_first_machine_needs_the_runs_folder(few_digits, tmp_path):
    machines = [tmp_path / 'one', tmp_path / 'two']
    two_machines(machines, few_digits, '--max-steps', '6')
    said = two_machines(machines, few_digits)
    assert 'continuing after epoch 1, step 2' in ''.join(said)
    folders = [f for f in machines if (f / 'run').exists()]  # c10d gives rank 0 to either
    assert len(folders) == 1
    assert run(few_digits, tmp_path / 'whole', '--workers', '0', processes=2)[0] == 0
    one, whole = weights(folders[0] / 'run'), weights(tmp_path / 'whole')
    assert all(torch.equal(v, one[k]) for k, v in whole.items())
