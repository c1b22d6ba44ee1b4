"""The `simsiam linear` command: its records, and what a user can get wrong."""
import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import warm
from conftest import ROOT
from tiny_linear import MODEL, SHORT, arguments, measure, read_record, same_numbers, write_split_digits

from simsiam_models.benchmarks.features import CPU_BATCH
from simsiam_models.benchmarks.linear import command
from simsiam_models.benchmarks.linear.frozen import FrozenBackbone
from simsiam_models.benchmarks.linear.heads import Heads
from simsiam_models.benchmarks.linear.protocol import choose_protocol

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def split_digits(tmp_path_factory) -> Path:
    return write_split_digits(tmp_path_factory.mktemp('split_digits'))


@pytest.mark.parametrize('protocol', list(SHORT))
def test_a_run_writes_its_record_and_another_one_gives_the_same(protocol, split_digits, tmp_path, capsys):
    assert measure(split_digits, tmp_path / 'a', protocol) == 0
    lines = capsys.readouterr().out.splitlines()
    assert measure(split_digits, tmp_path / 'b', protocol, '--workers', '2') == 0
    a, b = read_record(tmp_path / 'a'), read_record(tmp_path / 'b')
    assert same_numbers(a, b)
    assert a['protocol']['changed'] and a['protocol']['name'] == f'{protocol} (changed)'
    assert a['not_comparable'] or not a['published']
    # No number without the name of its protocol.
    for line in lines:
        if '%' in line or 'top' in line and ':' in line:
            assert f'{protocol} (changed)' in line, line
    assert sum(' images/s' in line for line in lines) == 3
    history = a['extra']['epochs']
    assert [e['epoch'] for e in history] == [1, 2, 3] and all(0 < e['loss'] for e in history)
    evaluated = [e['epoch'] for e in history if 'top1' in e]
    assert evaluated == {'fair': [1, 2, 3], 'moco': [1, 2, 3], 'mmselfsup': [2, 3], 'mhead': [2, 3]}[protocol]
    if protocol == 'mhead':
        assert [a['metrics'][f'feature{i}'] for i in range(1, 6)] == history[-1]['top1']
        assert [a['metrics'][f'feature{i}_top1_epoch2'] for i in range(1, 6)] == history[1]['top1']
    else:
        top1 = [e['top1'][0] for e in history if 'top1' in e]
        best, last = (a['metrics'][k] for k in (('top1', 'top1_last') if protocol != 'mmselfsup' else (
            'top1_best', 'top1')))
        assert (best, last) == (max(top1), top1[-1])


def test_heads_on_the_five_feature_maps_learn_digits(split_digits, tmp_path):
    measure(split_digits, tmp_path, 'mhead', '--epochs', '10', '--lr-steps', '8', '--batch-size', '12')
    metrics = read_record(tmp_path)['metrics']
    assert metrics['feature2'] > 40 and metrics['feature3'] > 40  # chance is 10


def test_a_batch_larger_than_the_training_images_is_reported(split_digits, tmp_path, capsys):
    for size, said in (('101', 1), ('100', 0)):
        measure(split_digits, tmp_path / size, 'fair', '--epochs', '1', '--batch-size', size)
        assert capsys.readouterr().out.count(
            f'batch {size} is larger than the 100 training images, so an epoch is one step; for your own folder, '
            '--protocol auto chooses the learning rate itself') == said


def test_a_backbone_that_changed_gives_no_number(split_digits, tmp_path, monkeypatch, capsys):
    real = FrozenBackbone.extract

    def extract(self, x):
        with torch.no_grad():
            next(b for n, b in self.model.named_buffers() if 'running_mean' in n)[0] += 1e-6
        return real(self, x)
    monkeypatch.setattr(FrozenBackbone, 'extract', extract)
    with pytest.raises(RuntimeError, match='changed while its classifier was trained'):
        measure(split_digits, tmp_path, 'fair')
    assert not list(tmp_path.glob('*.json')) and 'metric' not in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_with_a_sentence(split_digits, tmp_path):
    with pytest.raises(FloatingPointError, match=r'^protocol moco \(changed\): the loss is not finite in epoch '):
        measure(split_digits, tmp_path, 'moco', '--lr', '1e38', '--epochs', '5')
    assert not list(tmp_path.glob('*.json'))


def test_several_rates_are_a_record_each_and_a_table_and_one_that_diverges_is_a_row(split_digits, tmp_path, capsys):
    assert measure(split_digits, tmp_path / 'out', 'moco', '--lr', '1', '1e38', '10') == 0
    printed = capsys.readouterr().out
    assert printed.count(' training images of 10 classes; tested on 60 images of ') == 1
    found = {record['protocol']['lr']: record for record in map(
        lambda path: json.loads(path.read_text()), (tmp_path / 'out').glob('*.json'))}
    assert set(found) == {1, 10}
    rows = [line.split() for line in printed.splitlines()]
    assert ['1e+38', 'diverged'] in rows and 'the loss is not finite in epoch 1' in printed
    for lr in (1, 10):
        assert [row for row in rows if row[:2] == [str(lr), f'{found[lr]["metrics"]["top1"]:.2f}']]
    assert measure(split_digits, tmp_path / 'alone', 'moco', '--lr', '10') == 0
    assert same_numbers(read_record(tmp_path / 'alone'), found[10])
    with pytest.raises(ValueError, match='--lr: not used by --protocol auto'):
        measure(split_digits, tmp_path / 'auto', 'auto', '--lr', '1', '2')


def test_an_unreadable_image_ends_the_evaluation(split_digits, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(split_digits, data)
    first = sorted((data / 'val').rglob('*.*'))[0]
    first.write_bytes(b'no image')
    with pytest.raises(RuntimeError, match=str(first)):
        measure(data, tmp_path / 'out', 'fair')


def _broken(source: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of the data in which image 9 of each part cannot be read, and one in which these are not there."""
    for name in ('broken', 'without'):
        shutil.copytree(source, folder / name)
        for part in ('train', 'val'):
            path = sorted((folder / name / part).rglob('*.*'))[9]
            path.write_bytes(b'no image') if name == 'broken' else path.unlink()
    return folder / 'broken', folder / 'without'


@pytest.mark.parametrize('part', ['train', 'val'])
def test_an_unreadable_image_ends_with_the_rule_and_the_next_step(part, split_digits, tmp_path):
    broken, _ = _broken(split_digits, tmp_path)
    whole = 'val' if part == 'train' else 'train'
    shutil.rmtree(broken / whole)
    shutil.copytree(split_digits / whole, broken / whole)
    (bad,) = (p for p in (broken / part).rglob('*.*') if p.read_bytes() == b'no image')
    with pytest.raises(RuntimeError, match=f'{bad}.*repair or remove it, or leave it out with --allow-partial'):
        measure(broken, tmp_path / 'out', 'mhead')


@pytest.mark.parametrize('protocol', ['fair', 'mhead'])
def test_allow_partial_leaves_unreadable_images_out_as_if_they_were_not_there(protocol, split_digits, tmp_path, capsys):
    broken, without = _broken(split_digits, tmp_path)
    measure(broken, tmp_path / 'a', protocol, '--allow-partial', '--workers', '2')
    assert '2 images cannot be read and are left out, the first: ' in capsys.readouterr().out
    measure(without, tmp_path / 'b', protocol)
    a, b = read_record(tmp_path / 'a'), read_record(tmp_path / 'b')
    assert a['metrics'] == b['metrics'] and a['extra']['epochs'] == b['extra']['epochs']
    assert (a['extra']['unreadable'], b['extra']['unreadable']) == (2, 0)
    assert a['data']['counts']['train'] == 100 and b['data']['counts']['train'] == 99


def test_a_data_set_that_went_away_is_not_left_out_image_by_image(split_digits, tmp_path):
    shutil.copytree(split_digits, tmp_path / 'data')
    for path in (tmp_path / 'data' / 'val').rglob('*.*'):
        path.write_bytes(b'')
    with pytest.raises(RuntimeError, match='60 of 60 images cannot be read: is the data still there?'):
        measure(tmp_path / 'data', tmp_path / 'out', 'fair', '--allow-partial')


def _torchrun(data: Path, output: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [warm.python(), '-m', 'torch.distributed.run', '--standalone', '--local-addr', '127.0.0.1', '--nproc-per-node',
         '2', '-m', 'simsiam_models.cli', *arguments(data, output, 'mhead', *more)],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}, capture_output=True, text=True,
        timeout=120, cwd=ROOT)


def test_two_processes_both_name_the_unreadable_image_or_leave_it_out(split_digits, tmp_path):
    broken, without = _broken(split_digits, tmp_path)
    done = _torchrun(broken, tmp_path / 'refused')
    said = [line for line in done.stderr.splitlines() if line.startswith('simsiam: ')]
    assert done.returncode and said and 'Connection' not in done.stderr, done.stderr
    assert all('repair or remove it, or leave it out with --allow-partial' in line for line in said)
    done = _torchrun(broken, tmp_path / 'out', '--allow-partial')
    assert done.returncode == 0, done.stderr
    measure(without, tmp_path / 'one', 'mhead')
    both, one = read_record(tmp_path / 'out'), read_record(tmp_path / 'one')
    assert both['extra']['unreadable'] == 2
    assert [e['loss'] for e in both['extra']['epochs']] == pytest.approx(
        [e['loss'] for e in one['extra']['epochs']], rel=1e-4)


@pytest.mark.parametrize('below', ['', 'below'])
def test_an_output_that_cannot_be_written_to_is_found_before_anything_else(below, tmp_path):
    file = tmp_path / 'file'
    file.write_bytes(b'')
    with pytest.raises(ValueError, match=f'^--output {file / below}: cannot be written to'):
        measure(tmp_path / 'no data', file / below, 'fair')


@pytest.mark.parametrize(('flags', 'words'), [
    (['--seed', '-1'], '--seed -1: must be in 0 .. 9223372036854775807'),
    (['--seed', str(2**63)], '--seed 9223372036854775808: must be in 0 .. 9223372036854775807'),
    (['--workers', '-1'], '--workers -1: must be at least 0'),
    (['--micro-batch', '0'], '--micro-batch 0: must be at least 1'),
    (['--cache', 'here'], '--cache here: only --protocol auto caches features; leave it out')])
def test_wrong_flags_are_refused(flags, words, split_digits, tmp_path):
    with pytest.raises(ValueError, match=f'^{words}$'):
        measure(split_digits, tmp_path / 'out', 'fair', *flags)
    assert not (tmp_path / 'out').exists()


def test_the_largest_seed_runs(split_digits, tmp_path):
    assert measure(split_digits, tmp_path, 'fair', '--epochs', '1', '--seed', str(2**63 - 1)) == 0


def test_the_help_states_the_batch_size_on_a_cpu():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert f'on a CPU {CPU_BATCH};' in ' '.join(parser.format_help().split())


@pytest.mark.parametrize(('where', 'words'), [
    ((FrozenBackbone, 'extract'), 'in the backbone: lower --micro-batch$'),
    ((Heads, 'forward'), 'in the classifiers: lower --batch-size')])
def test_too_little_memory_names_the_flag_that_helps(where, words, split_digits, tmp_path, monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ...')
    monkeypatch.setattr(*where, fails)
    with pytest.raises(RuntimeError, match='^out of memory .CUDA out of memory.*' + words):
        measure(split_digits, tmp_path, 'fair')


def test_a_batch_of_one_image_is_refused_with_batch_norm_only(split_digits, tmp_path):
    with pytest.raises(ValueError, match='^--batch-size 1: .*use --batch-size 2$'):
        measure(split_digits, tmp_path, 'mhead', '--batch-size', '1')
    assert measure(split_digits, tmp_path, 'fair', '--batch-size', '1', '--epochs', '1') == 0


@pytest.mark.parametrize(('model', 'pooling'), [('convnext_atto:random', 'adaptive'), (MODEL, 'mmselfsup')])
def test_feature_maps_of_other_networks_are_pooled_adaptively_which_is_a_change(model, pooling, split_digits, tmp_path):
    for part, n in (('train', 12), ('val', 6)):
        for path in sorted((split_digits / part).rglob('*.*'))[:n]:
            (tmp_path / 'data' / part / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / 'data' / part / path.parent.name)
    size = ['--image-size', '224', '--resize', '256', '--batch-size', '256']
    measure(tmp_path / 'data', tmp_path / 'out', 'mhead', '--model', model, *size, '--eval-every', '10')
    protocol = read_record(tmp_path / 'out')['protocol']
    assert protocol['pooling'] == pooling
    assert protocol['changed'].get('pooling') == (
        {'published': 'mmselfsup', 'used': 'adaptive'} if pooling == 'adaptive' else None)


def test_half_precision_is_a_change_of_the_protocol(split_digits, tmp_path):
    assert measure(split_digits, tmp_path, 'fair', '--amp', 'bfloat16') == 0
    record = read_record(tmp_path)
    assert record['protocol']['changed']['amp'] == {'published': 'off', 'used': 'bfloat16'}
    assert choose_protocol('fair', 'imagenet', {}, 'bfloat16').label == 'fair (changed)'
    with pytest.raises(ValueError, match='--amp float16 does not run on cpu'):
        measure(split_digits, tmp_path, 'fair', '--amp', 'float16')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_a_gpu_computes_what_a_cpu_does(split_digits, tmp_path):
    for device in ('cpu', 'cuda'):
        measure(split_digits, tmp_path / device, 'mhead', '--device', device)
    a, b = (read_record(tmp_path / device)['extra']['epochs'] for device in ('cpu', 'cuda'))
    assert [e['loss'] for e in a] == pytest.approx([e['loss'] for e in b], rel=1e-3)


def test_images_that_the_backbone_cannot_take_are_named(split_digits, tmp_path):
    with pytest.raises(ValueError, match='vit_tiny.*--image-size'):
        measure(split_digits, tmp_path, 'fair', '--model', 'vit_tiny_patch16_224:random')
