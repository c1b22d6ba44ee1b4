"""The `simsiam` command, and what `weights verify` finds."""
import copy
import functools
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import timm
import torch
import warm
from conftest import ROOT, TINY
from safetensors.torch import load_file
from torch import nn

import simsiam_models
from simsiam_models import cli, create_simsiam
from simsiam_models.cli import main
from simsiam_models.runtime.distributed import default_device
from simsiam_models.weights import layouts, tensorfile
from simsiam_models.weights.export import export_checkpoint
from simsiam_models.weights.published import WEIGHTS
from simsiam_models.weights.verify import TOLERANCE, compare_fingerprints, compute_fingerprint


@pytest.fixture(scope='module')
def model() -> nn.Module:
    """A ResNet-50 that tells its inputs apart: no zero gammas, and statistics of some batches."""
    torch.manual_seed(0)
    model = timm.create_model('simsiam_resnet50', zero_init_last=False)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 64, 64))
    return model.eval()


@pytest.fixture(scope='module')
def exported(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('exported') / 'repo'
    export_checkpoint(layouts.recognize(model.state_dict()), folder)
    return folder


def test_list_names_every_tag_with_its_licence(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr('torch.hub.get_dir', lambda: str(tmp_path))
    assert main(['weights', 'list']) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    for tag, w in WEIGHTS.items():
        assert lines[tag][1:] == [str(w.epochs), str(w.batch), str(w.top1 or '-'), w.license, 'no']


def test_info_lists_the_numbers_of_the_file_and_names_those_of_another(capsys):
    assert main(['weights', 'info', 'mm_ep200_in1k']) == 0
    own, others = capsys.readouterr().out.split('measured with another file')
    assert '69.84' in own and '60.4' in own and '85.2' not in own
    assert '85.2' in others and 'mm_ep200_bgr_in1k' in others


@pytest.mark.parametrize('args, text', [
    (['weights', 'info', 'nope'], 'mm_ep200_in1k'), (['weights', 'verify', 'nope'], 'neither a file nor a tag'),
    (['convert', 'nope', 'out', '--to', 'timm'], 'nope does not exist')])
def test_a_mistake_is_one_sentence_and_exit_code_1(args, text, capsys):
    assert main(args) == 1
    error = capsys.readouterr().err
    assert text in error and error.startswith('simsiam: ') and error.count('\n') == 1


def test_verify_passes_what_was_exported(exported, capsys):
    assert main(['weights', 'verify', str(exported)]) == 0
    out = capsys.readouterr().out
    assert 'all 318 entries' in out and 'FAIL' not in out and out.endswith('passed\n')


@pytest.mark.parametrize('damage, text', [('flipped', 'FAIL hash'), ('nan', 'FAIL values'), ('missing', 'FAIL keys')])
def test_verify_fails_what_is_damaged(exported, tmp_path, capsys, damage, text):
    path = tmp_path / 'model.safetensors'
    tensors = load_file(exported / 'model.safetensors')
    if damage == 'nan':
        tensors['layer4.2.conv3.weight'][0] = float('nan')
    if damage == 'missing':
        del tensors['bn1.running_var']
    tensorfile.write(path, tensors)
    if damage == 'flipped':
        data = bytearray(path.read_bytes())
        data[-1000] ^= 1
        path.write_bytes(data)
    assert main(['weights', 'verify', str(path)]) == 1
    assert text in capsys.readouterr().out


def test_a_fingerprint_is_the_same_for_every_way_to_compute_it_and_another_for_other_weights(model):
    before, threads = compute_fingerprint(model), torch.get_num_threads()
    torch.set_num_threads(1)
    assert compare_fingerprints(before, compute_fingerprint(model)) < TOLERANCE['float32']
    torch.set_num_threads(threads)
    assert compare_fingerprints(before, compute_fingerprint(copy.deepcopy(model).double())) < TOLERANCE['float32']
    assert compare_fingerprints(before, compute_fingerprint(copy.deepcopy(model).bfloat16())) < TOLERANCE['bfloat16']
    bgr = copy.deepcopy(model)
    bgr.conv1.weight.data = bgr.conv1.weight.data.flip(1)
    assert compare_fingerprints(before, compute_fingerprint(bgr)) > TOLERANCE['bfloat16']


def test_verify_compares_with_the_fingerprint_beside_the_file(exported, tmp_path, capsys, model):
    folder = tmp_path / 'repo'
    shutil.copytree(exported, folder)
    found = compute_fingerprint(model)
    (folder / 'fingerprint.json').write_text(json.dumps(found))
    assert main(['weights', 'verify', str(folder)]) == 0
    found['outputs'][3] += 0.01 * found['std']
    (folder / 'fingerprint.json').write_text(json.dumps(found))
    assert main(['weights', 'verify', str(folder)]) == 1
    assert 'FAIL fingerprint' in capsys.readouterr().out


def test_heads_of_other_widths_are_refused(tmp_path):
    small = create_simsiam('simsiam_resnet50', dim=64, pred_dim=16)
    torch.save({'model': small.state_dict()}, tmp_path / 'small.pth')
    file = dict(pretrained_cfg_overlay=dict(file=str(tmp_path / 'small.pth')))
    with pytest.raises(ValueError, match='do not fit dim=2048'):
        create_simsiam('simsiam_resnet50', pretrained=True, **file)
    again = create_simsiam('simsiam_resnet50', pretrained=True, dim=64, pred_dim=16, **file)
    for k, v in again.state_dict().items():
        assert torch.equal(v, small.state_dict()[k]), k


def test_a_classifier_has_no_heads_to_load():
    with pytest.raises(ValueError, match='use its pretraining weights, simsiam_resnet50.mm1x_ep200_in1k'):
        create_simsiam('simsiam_resnet50.mm1x_ep200_lin_in1k', pretrained=True)


def test_a_reader_that_has_seen_enough_is_no_error():
    done = subprocess.run(
        ['bash', '-c', f'{warm.python()} -m simsiam_models.cli weights list | head -1; exit ${{PIPESTATUS[0]}}'],
        capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == '' and done.stdout.startswith('tag')


def test_names_speak_to_no_terminal_and_need_not_be_text(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(['knn', f'{tmp_path}/\x1b]0;title\x07\udcff', '--model', 'resnet10t:random']) == 1
    said = capsys.readouterr().err
    assert '\\x1b]0;title\\x07\\udcff' in said and '\x1b' not in said


def test_a_device_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture, few_digits: Path, tmp_path: Path):
    for part in ('train', 'val'):
        shutil.copytree(few_digits, tmp_path / part)
    for name in ('nothing', *([] if torch.cuda.is_available() else ['cuda'])):
        args = ['knn', str(tmp_path), '--model', 'resnet10t:random', '--device', name, '--output', f'{tmp_path}/out']
        assert main(args) == 1
        said = capsys.readouterr().err
        assert said.startswith(f'simsiam: --device {name}: not available here (') and said.count('\n') == 1
        assert said.endswith(f'); use {default_device()}, or leave it out\n') and 'http' not in said


@pytest.mark.parametrize('command', ['knn', 'embed'])
@pytest.mark.parametrize(('name', 'code'), [('SIGINT', 130), ('SIGTERM', 143)])
def test_a_signal_is_one_line_that_says_what_is_kept(command, name, code, few_digits, tmp_path, monkeypatch, capsys):
    for part in ('train', 'val'):
        shutil.copytree(few_digits, tmp_path / part)
    module = {'knn': cli.knn, 'embed': cli.embed}[command]
    monkeypatch.setattr(module, 'extract', lambda *args: os.kill(os.getpid(), getattr(signal, name)))
    args = [command, str(tmp_path), '--model', 'resnet10t:random', '--device', 'cpu', '--out', str(tmp_path / 'out')]
    before = signal.getsignal(signal.SIGTERM)
    assert main(args) == code
    assert capsys.readouterr().err == (
        f'simsiam: stopped by {name}; finished features are kept; the same command continues\n')
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_command_prints_help_and_version_the_package_s(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(name.split()[0] in text for name in cli.COMMANDS)
    with pytest.raises(SystemExit) as e:
        main(['--version'])
    first, *others = capsys.readouterr().out.splitlines()
    assert e.value.code == 0 and first == f'simsiam_models {simsiam_models.__version__}'
    found = dict(line.split(' ', 1) for line in others)
    assert {'python', 'torch', 'torchvision', 'timm', 'platform'} <= found.keys() and found['timm'] == timm.__version__


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_help_ends_with_an_example_that_the_command_takes(name, capsys):
    parser, words = cli.build_parser(), [*name.split(), *cli.COMMANDS[name].example.split()]
    assert parser.parse_args(words).run is cli.COMMANDS[name].run
    with pytest.raises(SystemExit):
        parser.parse_args([*name.split(), '--help'])
    assert f'example: simsiam {" ".join(words)}' in [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_pretrain_and_train_py_are_one_program(few_digits, tmp_path):
    """The same bits from both, and each names itself in its errors."""
    programs = {'simsiam pretrain': ['-m', 'simsiam_models', 'pretrain'], 'train.py': [str(ROOT / 'train.py')]}
    weights = []
    for i, (name, command) in enumerate(programs.items()):
        args = [str(few_digits), *TINY, '--batch-size', '16', '--output', str(tmp_path / str(i))]
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
        run = functools.partial(
            subprocess.run, cwd=ROOT if i else tmp_path, env=env, capture_output=True, text=True, timeout=240)
        done = run([warm.python(), *command, *args, '--max-steps', '2'])
        assert done.returncode == 0, done.stderr
        weights.append(torch.load(tmp_path / str(i) / 'checkpoint.pth', weights_only=True)['model'])
        done = run([warm.python(), *command, *args, '--lr', '-1'])
        assert done.returncode == 1 and done.stderr == f'{name}: --lr -1.0: must be above 0\n'
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


def test_a_signal_before_the_command_is_known_is_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr(cli, 'build_parser', lambda: os.kill(os.getpid(), signal.SIGINT))
    assert main([]) == 130
    assert capsys.readouterr().err == 'simsiam: stopped by SIGINT\n'


def test_weights_that_cannot_be_had_and_files_that_are_none_name_the_way_on(few_digits, tmp_path, monkeypatch, capsys):
    for part in ('train', 'val'):
        shutil.copytree(few_digits, tmp_path / part)
    (tmp_path / 'notes.txt').write_text('no weights\n')

    def offline(*args, **more):
        raise RuntimeError('simsiam_resnet50.x: model.safetensors could not be loaded. No network. Do this.')
    monkeypatch.setattr('simsiam_models.weights.sources.fetch', offline)
    for model, words in {
        'simsiam_resnet50': 'Do this. --model PATH takes a checkpoint that you have, and NAME:random untrained weights',
        'simsiam_resnet18_cifar': 'random init. --model PATH takes a checkpoint',
        f'{tmp_path / "notes.txt"}':
            'notes.txt cannot be read as a checkpoint: it is a text file; name a weights file',
    }.items():
        assert main(['knn', str(tmp_path), '--model', model, '--device', 'cpu', '--out', str(tmp_path / 'out')]) == 1
        said = capsys.readouterr().err
        assert words in said and said.count('\n') == 1
