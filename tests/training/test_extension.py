"""--extend N: what a longer schedule changes, and what is refused. tests/test_survival.py kills such runs."""
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, run_train
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from simsiam_models.cli import main
from simsiam_models.training import pretrain
from simsiam_models.training.setup import _read_recorded
from simsiam_models.weights.history import read_history
from simsiam_models.weights.publish import publish

BASE = 0.4 * 16 / 256  # the demo's rate at batch 16


def train(data: Path, output: Path, *more: str) -> dict:
    return pretrain.main([
        str(data), *TINY, '--batch-size', '16', '--workers', '0', '--log-every', '4', '--output', str(output), *more])


def rates(output: Path) -> dict[int, float]:
    """The learning rate of each epoch in log.jsonl."""
    lines = map(json.loads, (output / 'log.jsonl').read_text().splitlines())
    return {line['epoch']: line['lr'] for line in lines if 'lr' in line}


def cosine(epoch: int, epochs: int) -> float:
    return BASE * (1 + math.cos(math.pi * epoch / epochs)) / 2


def arguments(output: Path) -> dict:
    return json.loads((output / 'args.json').read_text())


@pytest.fixture(scope='module')
def done(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 2 epochs, of 4 steps each."""
    output = tmp_path_factory.mktemp('done') / 'run'
    train(few_digits, output, '--epochs', '2')
    return output


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    return shutil.copytree(done, tmp_path / 'run')


def test_a_finished_run_goes_on_with_the_cosine_of_the_new_total_and_keeps_its_log(few_digits, run, capsys):
    log, backbone = (run / 'log.jsonl').read_bytes(), (run / 'backbone/model.safetensors').read_bytes()
    train(few_digits, run, '--epochs', '2', '--extend', '4')
    said = capsys.readouterr().out
    assert ('extending the run from 2 to 4 epochs: from epoch 3 on, the learning rate follows the cosine over 4 '
            f'epochs, which gives {cosine(2, 4):.3g} in that epoch after {cosine(1, 2):.3g} in the '
            'epoch before; '
            f"the predictor's stays {BASE:.3g}\n") in said
    assert (run / 'log.jsonl').read_bytes().startswith(log)
    assert rates(run) == pytest.approx({0: cosine(0, 2), 1: cosine(1, 2), 2: cosine(2, 4), 3: cosine(3, 4)})
    args = arguments(run)
    assert args['epochs'] == 4 and [
        (x['epochs_before'], x['epochs'], x['from_epoch']) for x in args['extensions']] == [(2, 4, 2)]
    state = torch.load(run / 'checkpoint.pth', weights_only=True)
    assert state['epoch'] == 4 and (run / 'backbone/model.safetensors').read_bytes() != backbone
    exported = load_file(run / 'backbone/model.safetensors')
    assert all(torch.equal(v, state['model'][f'backbone.{k}']) for k, v in exported.items())


def test_a_stopped_run_finishes_its_epoch_with_the_old_rate(few_digits, tmp_path, capsys):
    train(few_digits, tmp_path, '--epochs', '3', '--max-steps', '6')
    train(few_digits, tmp_path, '--epochs', '3', '--extend', '5', '--max-steps', '7')
    said = capsys.readouterr().out
    assert 'from epoch 3 on' in said and f'{cosine(2, 5):.3g} in that epoch instead of {cosine(2, 3):.3g}' in said
    train(few_digits, tmp_path, '--epochs', '3')
    assert rates(tmp_path) == pytest.approx(
        {**{e: cosine(e, 3) for e in (0, 1)}, **{e: cosine(e, 5) for e in (2, 3, 4)}})


def test_an_extended_run_is_finished_once_and_goes_on_by_either_command(few_digits, run, capsys):
    train(few_digits, run, '--epochs', '2', '--extend', '3', '--max-steps', '9')
    backbone = (run / 'backbone/model.safetensors').read_bytes()
    train(few_digits, run, '--epochs', '2', '--max-steps', '10')  # the command that began the run
    train(few_digits, run, '--epochs', '3', '--max-steps', '11')  # its total now
    assert (run / 'backbone/model.safetensors').read_bytes() == backbone  # still that of 2 epochs
    capsys.readouterr()
    train(few_digits, run, '--epochs', '2', '--extend', '3')
    assert f'{run} has already been extended to 3 epochs\n' in capsys.readouterr().out
    checkpoint, args = (run / 'checkpoint.pth').read_bytes(), arguments(run)
    assert len(args['extensions']) == 1
    train(few_digits, run, '--epochs', '2', '--extend', '3')
    assert f'{run} has already been extended to 3 epochs and is finished' in capsys.readouterr().out
    assert (run / 'checkpoint.pth').read_bytes() == checkpoint and arguments(run) == args


def test_the_epochs_that_a_run_has_need_not_be_repeated(few_digits, run):
    for n in (3, 4):
        train(few_digits, run, '--extend', str(n))
        assert arguments(run)['epochs'] == n
    assert rates(run) == pytest.approx({0: cosine(0, 2), 1: cosine(1, 2), 2: cosine(2, 3), 3: cosine(3, 4)})


def test_a_run_is_extended_again_and_each_epoch_keeps_the_rate_it_had(few_digits, run):
    train(few_digits, run, '--epochs', '2', '--extend', '3')
    train(few_digits, run, '--epochs', '2', '--extend', '4')
    assert rates(run) == pytest.approx({0: cosine(0, 2), 1: cosine(1, 2), 2: cosine(2, 3), 3: cosine(3, 4)})
    with pytest.raises(ValueError, match='--extend 3: the run in .* has 4 epochs; name a larger total'):
        train(few_digits, run, '--epochs', '2', '--extend', '3')


@pytest.mark.parametrize('more, words', [
    (['--epochs', '2', '--extend', '2'], '--extend 2: the run in .* has 2 epochs; name a larger total'),
    (['--epochs', '2', '--extend', '0'], '--extend 0: the run in .* has 2 epochs; name a larger total'),
    (['--epochs', '4'], 'holds this run with 2 epochs, not 4: add --extend 4 to continue it to 4'),
    (['--epochs', '1'], r'another run \(epochs: 2 there, 1 here\)'),
    (['--epochs', '2', '--extend', '4', '--lr', '0.1'], 'lr: 0.4 there, 0.1 here'),
    (['--epochs', '2', '--extend', '4', '--resume', 'never'], '--resume never forbids'),
    (['--epochs', '4', '--resume', 'never'], '--resume never forbids'),
    (['--epochs', '4', '--lr', '0.1'], 'epochs: 2 there, 4 here; lr')])
def test_what_cannot_be_extended_is_refused_and_nothing_changes(few_digits, done, more, words):
    before = {p: p.read_bytes() for p in done.rglob('*') if p.is_file()}
    with pytest.raises(ValueError, match=words):
        train(few_digits, done, *more)
    assert {p: p.read_bytes() for p in done.rglob('*') if p.is_file()} == before


@pytest.mark.parametrize('content, words', [
    (None, 'of an unknown run; give another --output'), ('{"recipe": ', 'args.json cannot be read; give another')])
def test_a_run_without_readable_arguments_is_not_called_none(few_digits, tmp_path, content, words):
    (tmp_path / 'checkpoint.pth').write_bytes(b'')
    if content is not None:
        (tmp_path / 'args.json').write_text(content)
    with pytest.raises(ValueError, match=words):
        train(few_digits, tmp_path, '--extend', '4')


def test_a_folder_without_a_run_cannot_be_extended(few_digits, tmp_path):
    with pytest.raises(ValueError, match=r'--extend 4: .*new holds no run; name the --output of a run'):
        train(few_digits, tmp_path / 'new', '--extend', '4')
    assert not (tmp_path / 'new').exists()


def test_a_file_of_an_extended_run_begins_a_folder_that_knows_the_extension(few_digits, run, tmp_path):
    train(few_digits, run, '--epochs', '2', '--extend', '4', '--max-steps', '10')
    train(few_digits, tmp_path / 'new', '--epochs', '2', '--resume', str(run / 'checkpoint.pth'))
    assert arguments(tmp_path / 'new')['extensions'] == arguments(run)['extensions']
    assert rates(tmp_path / 'new') == pytest.approx({2: cosine(2, 4), 3: cosine(3, 4)})


def test_a_card_says_which_of_the_epochs_are_in_the_weights(few_digits, run, tmp_path):
    train(few_digits, run, '--epochs', '2', '--extend', '4', '--max-steps', '10')
    publish(run, repo='me/x', license='mit', dry_run=tmp_path / 'early')  # backbone/ is still that of 2 epochs
    card = ModelCard.load(tmp_path / 'early/README.md').text
    assert '**Epochs:** 2\n' in card and 'Extended' not in card and 'after epoch 2' in card
    history = read_history(run / 'checkpoint.pth', 3)
    assert history.facts['Epochs'].startswith('3 of 4;') and 'from 2 to 4 epochs' in history.facts['Extended']
    train(few_digits, run, '--epochs', '2')
    publish(run, repo='me/x', license='mit', dry_run=tmp_path / 'late')
    card = ModelCard.load(tmp_path / 'late/README.md').text
    assert '**Epochs:** 4\n' in card and 'the learning rates of 4 epochs after epoch 2' in card
    assert 'after epoch 4' in card and ' && ' in card


def test_two_processes_extend_a_run_as_one_does(few_digits, run):
    result = run_train(
        few_digits, *TINY, '--batch-size', '16', '--workers', '0', '--log-every', '4', '--output', run, '--epochs', '2',
        '--extend', '3', processes=2)
    assert result.returncode == 0 and result.stdout.count('extending the run from 2 to 3 epochs') == 1, result.stderr
    assert rates(run) == pytest.approx({0: cosine(0, 2), 1: cosine(1, 2), 2: cosine(2, 3)})
    assert len(arguments(run)['extensions']) == 1


def test_the_commands_of_the_docs_run_as_written(few_digits, tmp_path, monkeypatch):
    """But for two steps only; tests/training/test_initial.py has published weights."""
    (tmp_path / 'FOLDER').symlink_to(few_digits)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / 'docs/pretraining.md').read_text()
    commands = re.findall(r'^simsiam (pretrain FOLDER .*--output runs/.*)$', page, re.M)
    assert len(commands) == 3
    assert [main([*shlex.split(c, comments=True), '--max-steps', '2']) for c in commands] == [0, 0, 0]
    assert arguments(tmp_path / 'runs/mine')['epochs'] == 30
    assert arguments(tmp_path / 'runs/next')['init_from']['heads']


@pytest.mark.parametrize('key, value', [
    ('extensions', 'foo'), ('extensions', [3]), ('extensions', None), ('extensions', [{}]), ('epochs', '8'),
    ('epochs', None), ('epochs', -1), ('init_from', 'foo'), ('init_from', {'a': 1}), ('perf', 'x'), ('amp', 3),
    ('extensions', [{'epochs_before': 5, 'epochs': 2, 'from_epoch': 0}]),
    ('extensions', [{'epochs_before': 1, 'epochs': 2, 'from_epoch': -1}])])
def test_arguments_that_no_run_has_written_are_one_sentence(key, value, tmp_path):
    sound = {'recipe': 'demo', 'epochs': 2, 'amp': 'off', 'perf': None}
    (tmp_path / 'args.json').write_text(json.dumps(sound))
    assert _read_recorded(tmp_path) == sound
    (tmp_path / 'args.json').write_text(json.dumps({**sound, key: value}))
    with pytest.raises(ValueError, match='args.json is damaged; give another --output'):
        _read_recorded(tmp_path)


def test_a_finished_run_without_its_checkpoint_is_not_trained_over(few_digits, tmp_path, capsys):
    args = ['pretrain', str(few_digits), *TINY, '--batch-size', '16', '--epochs', '1', '--output', f'{tmp_path}/run']
    assert main(args) == 0
    kept = tmp_path / 'kept.pth'
    (tmp_path / 'run/checkpoint.pth').rename(kept)
    (tmp_path / 'run/checkpoint_previous.pth').unlink()
    before = (tmp_path / 'run/log.jsonl').read_bytes()
    assert main(args) == 1 and 'holds a trained backbone, but no checkpoint' in capsys.readouterr().err
    assert (tmp_path / 'run/log.jsonl').read_bytes() == before
    args[-1] = str(tmp_path / 'again')
    assert main([*args, '--resume', str(kept)]) == 0 and (tmp_path / 'again/checkpoint.pth').exists()
