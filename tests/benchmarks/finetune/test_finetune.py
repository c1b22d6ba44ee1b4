"""Fine-tuning: timm loads what was measured, and a run that was stopped goes on in the same bits."""
import csv
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import layouts_benchmarks as layouts
import numpy as np
import pytest
import timm
import torch
import warm
from conftest import ROOT, write_digits
from PIL import Image
from sklearn.metrics import confusion_matrix
from tiny_finetune import ALONE, NETWORK, PLAIN, TINY, Broken, parse, settings

from simsiam_models.benchmarks import protocols
from simsiam_models.benchmarks.backbone import load_backbone
from simsiam_models.benchmarks.datasets.classification import open_pair
from simsiam_models.benchmarks.finetune import command, training
from simsiam_models.benchmarks.finetune.data import Loader, Samples, make_eval_transform
from simsiam_models.benchmarks.finetune.model import Classifier
from simsiam_models.benchmarks.finetune.training import compute_lr_factor
from simsiam_models.benchmarks.results.report import report
from simsiam_models.data import DataError
from simsiam_models.data.readers.images import name_of
from simsiam_models.runtime import checkpoint
from simsiam_models.runtime.lifecycle import Lifecycle, RunError
from simsiam_models.runtime.signals import Signals, Stopped

LAUNCH = (
    'import argparse, sys, torch; torch.set_num_threads(1)\n'
    'from simsiam_models.benchmarks.finetune import command as f\n'
    'p = argparse.ArgumentParser(); f.add_arguments(p); sys.exit(f.run(p.parse_args(sys.argv[1:])))')


def run(*args: str | Path) -> dict:
    assert command.run(parse(*args)) == 0
    return json.loads((parse(*args).output / 'record.json').read_text())


def environment() -> dict[str, str]:
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': str(ROOT)}


@pytest.fixture(scope='module')
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 digits in class folders."""
    return write_digits(tmp_path_factory.mktemp('photos'), 300)


@pytest.fixture(scope='module')
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('trained') / 'run'
    run(photos, '--out', folder, *PLAIN)
    return folder


def exported_logits(folder: Path, photos: Path) -> torch.Tensor:
    """Of the held-out images, by what plain timm makes of the folder."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
    val = open_pair('folder', photos).test
    with torch.no_grad():
        return model(torch.stack([transform(Image.fromarray(val.read(i))) for i in range(len(val))]))


# --- what a run leaves

def test_digits_are_learned_from_a_folder_without_validation_images(trained: Path):
    record = json.loads((trained / 'record.json').read_text())
    assert record['metrics']['top1'] > 45  # chance is 10
    assert record['data']['counts'] == {'train': 240, 'test': 60, 'classes': 10, 'test_classes': 10}
    assert record['protocol']['validation'] == '60 of 300 images, 0.2 of each class, held out by seed 0'
    assert record['metrics']['top1'] == max(e['top1'] for e in record['extra']['epochs'])
    assert record['extra']['best_epoch'] in range(1, 7) and record['extra']['last_epoch'] == 6
    assert record['extra']['averaged_weights'] is True
    assert record['benchmark'] == 'finetune' and record['published'] == []


def test_plain_timm_loads_the_classifier_with_its_class_names_in_another_process(
    trained: Path, tmp_path: Path, photos: Path,
):
    image = sorted(photos.rglob('*.png'))[0]
    code = (
        'import sys, json, timm, torch; from PIL import Image; torch.set_num_threads(1)\n'
        f'm = timm.create_model("local-dir:{trained}", pretrained=True).eval()\n'
        't = timm.data.create_transform(**timm.data.resolve_data_config(m.pretrained_cfg))\n'
        f'x = t(Image.open({str(image)!r}).convert("RGB"))[None]\n'
        'assert not any(n.startswith("simsiam") for n in sys.modules)\n'
        'print(json.dumps([m.pretrained_cfg["label_names"], m.num_classes, m(x).tolist(), x.flatten().tolist()]))')
    out = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, env=environment(), check=True)
    names, classes, logits, x = json.loads(out.stdout)
    assert (names, classes) == ([str(i) for i in range(10)], 10)
    mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    here = make_eval_transform(32, 36, mean, std)(Image.open(image).convert('RGB'))
    np.testing.assert_array_equal(np.array(x, np.float32), here.flatten().numpy())  # the pixels it was validated on
    state = torch.load(trained / 'checkpoint.pth', weights_only=True)
    model = timm.create_model('resnet18', num_classes=10, **json.loads(NETWORK)).eval()
    model.load_state_dict(state['best']['weights'])
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(here[None]).numpy(), atol=1e-6)


def test_the_readmes_lines_name_the_class_of_a_photo(
    trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
):
    (code,) = [block for block in (ROOT / 'README.md').read_text().split('```python\n') if 'local-dir:OUT' in block]
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'OUT').symlink_to(trained)
    shutil.copy(next((photos / '0').glob('*.jpg')), tmp_path / 'photo.jpg')
    exec(code.partition('```')[0], {})
    assert capsys.readouterr().out.strip() in {str(i) for i in range(10)}


def test_the_confusion_matrix_is_scikit_learns_of_what_the_exported_model_predicts(trained: Path, photos: Path):
    val = open_pair('folder', photos).test
    predicted = exported_logits(trained, photos).argmax(1)
    expected = confusion_matrix(val.labels, predicted, labels=range(10))
    rows = list(csv.reader((trained / 'confusion.csv').open()))
    assert rows[0][1:] == [r[0] for r in rows[1:]] == [str(i) for i in range(10)]
    np.testing.assert_array_equal(np.array([r[1:] for r in rows[1:]], int), expected)
    record = json.loads((trained / 'record.json').read_text())
    of = record['extra']['confusion']
    np.testing.assert_array_equal([[of[str(i)].get(str(j), 0) for j in range(10)] for i in range(10)], expected)
    assert record['metrics']['top1'] == pytest.approx(100 * (predicted.numpy() == val.labels).mean())
    listed = list(csv.DictReader((trained / 'per_class.csv').open()))
    for i, row in enumerate(listed):
        assert (int(row['images']), int(row['right'])) == (expected[i].sum(), expected[i, i])
        assert float(row['accuracy']) == pytest.approx(100 * expected[i, i] / expected[i].sum(), abs=0.005)


def test_the_predictions_and_their_scores_are_those_of_the_exported_model(trained: Path, photos: Path):
    val, scores = open_pair('folder', photos).test, exported_logits(trained, photos).softmax(1)
    rows = list(csv.DictReader((trained / 'predictions.csv').open()))
    assert [row['path'] for row in rows] == [name_of(val, i) for i in range(len(val))]
    assert [row['label'] for row in rows] == [Path(row['path']).parent.name for row in rows]
    assert [int(row['predicted']) for row in rows] == scores.argmax(1).tolist()
    assert [float(row['score']) for row in rows] == pytest.approx(scores.amax(1).tolist(), abs=1e-4)


def test_top_1_and_top_5_are_those_of_the_exported_model(trained: Path, photos: Path):
    predicted = exported_logits(trained, photos).topk(5).indices
    label = torch.tensor(open_pair('folder', photos).test.labels)[:, None]
    metrics = json.loads((trained / 'record.json').read_text())['metrics']
    for k in (1, 5):
        right = (predicted[:, :k] == label).any(1).double().mean().item()
        assert 0.1 < right < 1 and metrics[f'top{k}'] == pytest.approx(100 * right)


def test_a_finished_run_started_again_trains_nothing_and_says_the_same(
    trained: Path, photos: Path, monkeypatch: pytest.MonkeyPatch,
):
    before = json.loads((trained / 'record.json').read_text())
    monkeypatch.setattr(training, 'train_one_epoch', lambda run: 1 / 0)
    again = run(photos, '--out', trained, *PLAIN)
    assert again['metrics'] == before['metrics'] and again['extra'] == before['extra']


def test_the_folder_of_another_run_is_refused_untouched(trained: Path, photos: Path, tmp_path: Path):
    with pytest.raises(ValueError, match='holds another run .*epochs: 6 there, 7 here'):
        command.run(parse(photos, '--out', trained, *PLAIN, '--epochs', '7'))
    (tmp_path / 'pretrained').mkdir()
    (tmp_path / 'pretrained' / 'args.json').write_text('{"recipe": "demo"}')
    (tmp_path / 'export').mkdir()
    (tmp_path / 'export' / 'model.safetensors').write_bytes(b'mine')
    (tmp_path / 'file').write_text('x')
    for name, said in (('pretrained', 'a run of another kind'), ('export', 'model.safetensors of an unknown run'),
                       ('file', 'is a file')):
        with pytest.raises(ValueError, match=said):
            command.run(parse(photos, '--out', tmp_path / name, *PLAIN))
    assert (tmp_path / 'export' / 'model.safetensors').read_bytes() == b'mine'
    assert sorted(p.name for p in (tmp_path / 'export').iterdir()) == ['model.safetensors']


def test_a_fine_tuned_folder_is_a_backbone_again(trained: Path, photos: Path, tmp_path: Path, one_thread: None):
    args = [a for a in PLAIN if a not in ('--model', 'resnet18:random', '--model-args', NETWORK)]
    record = run(photos, '--out', tmp_path / 'again', *args, '--model', str(trained), '--epochs', '2')
    assert record['metrics']['top1'] > 45
    config = json.loads((tmp_path / 'again' / 'config.json').read_text())
    assert config['architecture'] == 'resnet18' and config['model_args'] == json.loads(NETWORK)
    assert timm.create_model(f'local-dir:{tmp_path / "again"}', pretrained=True).num_classes == 10


# --- how it learns

def test_a_small_folder_is_learned_at_the_rate_of_the_defaults(
    trained: Path, photos: Path, tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture,
):
    args = ('--model', trained, '--device', 'cpu', '--workers', '0')
    record = run(photos, '--out', tmp_path / 'run', *args, '--epochs', '15', '--resize', '40')
    assert record['metrics']['top1'] > 50  # 35 at the rate of large data sets, --lr 0.001
    assert (record['protocol']['image_size'], record['protocol']['resize']) == (32, 40)  # 32 is the model's own
    said = capsys.readouterr().out
    assert f'images of 32 px, the size in the configuration of {trained} (--image-size changes it)' in said
    assert 'little was learned' not in said and '15 epochs of 7 steps, batch 32, adamw, lr 0.002, 32 px' in said
    run(photos, '--out', tmp_path / 'slow', *args, '--epochs', '1', '--lr', '1e-6')
    assert 'little was learned: the training loss, 2.' in capsys.readouterr().out


def test_the_rate_that_a_step_uses_is_the_groups(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda self, closure=None: seen.append(
        {round(g['lr'] / g['lr_scale'], 12) for g in self.param_groups}))
    run(photos, '--out', tmp_path / 'run', *PLAIN, '--epochs', '2')
    steps = 240 // 32
    s = settings(*PLAIN, '--epochs', '2')
    assert seen == [{round(s.lr * compute_lr_factor(s, i, steps), 12)} for i in range(2 * steps)]


def test_a_run_ends_when_validation_stops_getting_better_and_keeps_the_best(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
):
    top1 = iter([20.0, 30.0, 30.0, 10.0, 99.0])
    real = training.measure_accuracy
    monkeypatch.setattr(training, 'train_one_epoch', _mark)
    monkeypatch.setattr(training, 'measure_accuracy', lambda *args: {**real(*args), 'top1': next(top1)})
    record = run(photos, '--out', tmp_path / 'run', *PLAIN, '--patience', '2', '--ema-decay', '0')
    assert [e['top1'] for e in record['extra']['epochs']] == [20, 30, 30, 10]
    assert record['extra']['best_epoch'] == 2 and record['extra']['stopped_early'] is True
    assert 'stopped early: validation top-1 did not rise for 2 epochs' in capsys.readouterr().out
    model = timm.create_model(f'local-dir:{tmp_path / "run"}', pretrained=True)
    assert model.fc.bias[0].item() == 2.0  # of the second epoch


def _mark(run: training.Finetuning) -> float:
    with torch.no_grad():
        run.trainer.model.fc.bias[0] = run.epoch + 1.0
    return 1.0


def test_a_loss_that_is_not_finite_ends_the_run_in_one_sentence(photos: Path, tmp_path: Path):
    args = parse(photos, '--out', tmp_path / 'run', *PLAIN, '--opt', 'sgd', '--lr', '1e30', '--warmup-epochs', '0')
    with pytest.raises(FloatingPointError, match='the loss of epoch 1 is (nan|inf); lower --lr'):
        command.run(args)


def test_a_grid_on_a_list_of_labelled_images_names_each_pair_and_its_deviations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, one_thread: None,
):
    written = layouts.write_imagenet(tmp_path / 'in1k', train=8, val=4)
    names = [Path(path).name for path, _ in written['train'][::2]]
    (tmp_path / '1percent.txt').write_text('\n'.join(names) + '\n')
    monkeypatch.setattr(protocols, 'SEMI_LRS', (0.1, 0.001))
    monkeypatch.setattr(protocols, 'SEMI_HEAD_MULTIPLIERS', (1.0, 10.0))
    args = parse(
        tmp_path / 'in1k', '--protocol', 'semi_1pct', '--list', tmp_path / '1percent.txt', '--allow-partial', '--grid',
        '--out', tmp_path / 'o', *TINY, '--epochs', '11', '--batch-size', '8')
    assert command.run(args) == 0
    printed = capsys.readouterr().out
    assert 'chosen on the 12 test images that' in printed and printed.count('std. error') == 5
    record = json.loads((tmp_path / 'o' / 'lr0.001_head10' / 'record.json').read_text())
    assert record['benchmark'] == 'imagenet_semi_1pct'
    assert (record['protocol']['lr'], record['protocol']['head_multiplier']) == (0.001, 10)
    assert record['protocol']['changed'] == ['epochs 11', 'batch_size 8', 'image_size 32', 'resize 36']
    assert record['data']['counts'] == {'train': 12, 'test': 12, 'classes': 3, 'test_classes': 3}
    assert set(record['metrics']) == {'top1', 'top1_epoch10', 'top1_epoch11'}  # three classes have no top-5
    assert [('top1' in e) for e in record['extra']['epochs']] == [False] * 9 + [True] * 2
    assert record['extra']['best_epoch'] == 11
    first = torch.load(tmp_path / 'o' / 'lr0.1_head1' / 'checkpoint.pth', weights_only=True)['model']
    start = load_backbone('resnet18:random', **json.loads(NETWORK)).model
    assert not torch.equal(first['bn1.running_mean'], start.bn1.running_mean)  # batch norm is not frozen


def test_several_rates_are_a_run_each_and_a_table_that_marks_the_best(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, one_thread: None,
):
    assert command.run(parse(photos, '--out', tmp_path / 'o', *PLAIN, '--epochs', '4', '--lr', '1e-6', '0.06')) == 0
    printed = capsys.readouterr().out
    folders = [tmp_path / 'o' / name for name in ('lr1e-06', 'lr0.06')]
    low, high = (json.loads((folder / 'record.json').read_text()) for folder in folders)
    assert low['protocol']['lr'] == 1e-6 * 32 / 256 and low['metrics']['top1'] < high['metrics']['top1']
    row, = (line.split() for line in printed.splitlines() if line.endswith(' best') and '%' in line)
    assert row[:2] == ['0.06', f'{high["metrics"]["top1"]:.2f}']
    assert 'best: lr 0.06, chosen on the 60 test images' in printed
    alone = run(photos, '--out', tmp_path / 'alone', *PLAIN, '--epochs', '4')
    assert (alone['metrics'], alone['protocol']) == (high['metrics'], high['protocol'])
    table = report([tmp_path / 'o'], markdown=False)
    assert 'lr 1.25e-07' in table and 'Standard error of an accuracy: at most' in table
    with pytest.raises(ValueError, match='--lr 0.0: must be above 0'):
        command.run(parse(photos, '--out', tmp_path / 'x', *PLAIN, '--lr', '0.1', '0'))


def test_the_protocol_is_at_224_px_whatever_the_size_of_the_model(trained: Path, photos: Path, tmp_path: Path):
    for part in ('train', 'val'):
        for c in '01':
            (tmp_path / 'data' / part / c).mkdir(parents=True)
            shutil.copy(next((photos / c).glob('*.jpg')), tmp_path / 'data' / part / c)
    record = run(
        tmp_path / 'data', '--out', tmp_path / 'run', '--protocol', 'semi_1pct', '--dataset', 'folder', '--device',
        'cpu', '--workers', '0', '--model', trained, '--epochs', '1')
    assert (record['protocol']['image_size'], record['protocol']['resize']) == (224, 256)
    assert record['protocol']['changed'] == ['epochs 1']


# --- images that cannot be read

def test_images_that_could_not_be_read_are_still_in_the_record_after_a_restart(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
):
    broken = break_images(photos, tmp_path / 'data')
    first = run(tmp_path / 'data', '--out', tmp_path / 'run', *PLAIN, '--epochs', '2')
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith('so far')]
    assert len(said) == 1 and said[0].startswith('so far 1 training and 2 validation images cannot be read')
    assert len(first['extra']['unreadable']) == 3
    assert all(any(w.startswith(f'{b}: ') for w in first['extra']['unreadable']) for b in broken)
    monkeypatch.setattr(training, 'train_one_epoch', lambda run: 1 / 0)
    again = run(tmp_path / 'data', '--out', tmp_path / 'run', *PLAIN, '--epochs', '2')
    assert again['extra'] == first['extra']


def break_images(photos: Path, folder: Path) -> list[Path]:
    """A copy in which one training image and two validation images, of two processes one each, cannot be read."""
    shutil.copytree(photos, folder)
    pair = open_pair('folder', folder)
    rows = (pair.train, 17), (pair.test, 20), (pair.test, 31)
    broken = [images.images.path(int(images.indices[i])) for images, i in rows]
    for path in broken:
        path.write_bytes(b'torn')
    return broken


def digits_with_validation(folder: Path, n: int = 30) -> list[Path]:
    """100 training digits and n others to validate on; returns the files of the latter."""
    write_digits(folder / 'train', 100)
    write_digits(folder / 'all', 100 + n)
    for path in sorted((folder / 'all').rglob('*.*'), key=lambda p: p.stem)[100:]:
        (folder / 'val' / path.parent.name).mkdir(parents=True, exist_ok=True)
        path.rename(folder / 'val' / path.parent.name / path.name)
    shutil.rmtree(folder / 'all')
    return sorted((folder / 'val').rglob('*.*'))


def test_validation_images_that_cannot_be_read_are_left_out_of_every_number(
    tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture,
):
    args = (*PLAIN, '--epochs', '3', '--ema-decay', '0.5')
    broken = [digits_with_validation(tmp_path / name)[i] for name in ('torn', 'removed') for i in (4, 11, 26)]
    for path in broken[:3]:
        path.write_bytes(b'torn')
    for path in broken[3:]:
        path.unlink()
    torn = run(tmp_path / 'torn', '--out', tmp_path / 'a', *args)
    said = [line for line in capsys.readouterr().out.splitlines() if 'cannot be read' in line or 'left out' in line]
    removed = run(tmp_path / 'removed', '--out', tmp_path / 'b', *args)
    assert torn['data']['counts']['test'] == 30 and removed['data']['counts']['test'] == 27
    assert torn['metrics'] == removed['metrics'] and 0 < torn['metrics']['top1'] < 100
    right = torn['metrics']['top1'] * 27 / 100  # a whole number of images
    assert right == pytest.approx(round(right)) and torn['metrics']['top1'] == pytest.approx(100 * round(right) / 27)
    for key in ('per_class', 'confusion', 'best_epoch'):
        assert torn['extra'][key] == removed['extra'][key]
    assert sum(row['images'] for row in torn['extra']['per_class']) == 27
    assert sum(row['right'] for row in torn['extra']['per_class']) == round(right)
    assert sum(n for row in torn['extra']['confusion'].values() for n in row.values()) == 27
    assert without_seconds(tmp_path / 'a') == without_seconds(tmp_path / 'b')
    for name in ('per_class.csv', 'confusion.csv', 'model.safetensors'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
    assert removed['extra']['unreadable'] == []
    assert [text.split(': ')[0] for text in torn['extra']['unreadable']] == sorted(map(str, broken[:3]))
    assert len(said) == 2
    assert said[0].startswith('so far 0 training and 3 validation images cannot be read') and str(broken[0]) in said[0]
    assert said[1].startswith('3 validation images could not be read and are left out') and str(broken[0]) in said[1]


def test_more_than_a_tenth_of_the_validation_images_is_refused(tmp_path: Path):
    for path in digits_with_validation(tmp_path / 'data')[:4]:
        path.write_bytes(b'torn')
    with pytest.raises(DataError, match='4 of 30 images cannot be read, more than 10%'):
        command.run(parse(tmp_path / 'data', '--out', tmp_path / 'run', *PLAIN))
    assert not (tmp_path / 'run' / 'model.safetensors').exists()


def test_the_first_place_goes_to_the_right_class_of_the_readable_images():
    predicted = torch.tensor([[1, 1], [training.UNREADABLE] * 2, [0, 0], [2, 1]])
    assert training.measure_accuracy(predicted, np.array([1, 0, 1, 2])) == {
        'top1': pytest.approx(200 / 3), 'top5': pytest.approx(200 / 3)}


# --- runs that go on

def same(a: Path, b: Path) -> bool:
    return (a / 'model.safetensors').read_bytes() == (b / 'model.safetensors').read_bytes()


def without_seconds(folder: Path) -> list[dict]:
    epochs = json.loads((folder / 'record.json').read_text())['extra']['epochs']
    return [{k: v for k, v in e.items() if k != 'seconds'} for e in epochs]


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGINT])
def test_a_run_stopped_in_an_epoch_ends_in_the_same_bits(
    number: int, trained: Path, photos: Path, tmp_path: Path, one_thread: None,
):
    folder = tmp_path / 'run'
    process = subprocess.Popen(
        [warm.python(), '-m', 'simsiam_models', 'finetune', str(photos), '--out', str(folder), *PLAIN],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        for line in process.stdout:
            if line.startswith('epoch 2/'):
                break
    finally:
        process.send_signal(number)
        said = process.communicate()[1]
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert said == 'simsiam: stopped by SIGINT; the same command continues from the last checkpoint\n'
    epoch = torch.load(folder / 'checkpoint.pth', weights_only=True)['epoch']
    assert 2 <= epoch < 6 and not (folder / 'record.json').exists()
    assert timm.create_model(f'local-dir:{folder}', pretrained=True).num_classes == 10  # the best so far
    run(photos, '--out', folder, *PLAIN)
    assert same(folder, trained) and without_seconds(folder) == without_seconds(trained)


class KilledError(BaseException):
    """Takes the place of a SIGKILL in a test: nothing handles it."""


def at_call(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, count: int, do: Callable[[], None]) -> None:
    """Calls `do` before call number `count` of owner.name."""
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            do()
        return real(*args, **kwargs)
    monkeypatch.setattr(owner, name, call)


def kill() -> None:
    raise KilledError


def position(folder: Path) -> tuple[int, int]:
    state = checkpoint.read(folder / 'checkpoint.pth', training.KEYS)
    return state['epoch'], state['step']


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_stops(
    number: int, trained: Path, photos: Path, tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture,
):
    folder = tmp_path / 'run'
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, training, 'train_step', 2 * 7 + 4, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Stopped) as e:
            command.run(parse(photos, '--out', folder, *PLAIN))
    assert e.value.code == 128 + number and position(folder) == (2, 4)
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    run(photos, '--out', folder, *PLAIN)
    assert 'continuing after epoch 2, step 4' in capsys.readouterr().out
    assert same(folder, trained) and without_seconds(folder) == without_seconds(trained)


def test_a_run_killed_after_a_checkpoint_inside_an_epoch_ends_in_the_same_bits(
    trained: Path, photos: Path, tmp_path: Path, one_thread: None,
):
    folder = tmp_path / 'run'
    for count, reached in ((4, (0, 3)), (10, (1, 5))):  # three steps from the start, then twelve
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command, 'Lifecycle', functools.partial(Lifecycle, every_steps=3))
            at_call(patch, training, 'train_step', count, kill)
            with pytest.raises(KilledError):
                command.run(parse(photos, '--out', folder, *PLAIN))
        assert position(folder) == reached
    run(photos, '--out', folder, *PLAIN)
    assert same(folder, trained) and without_seconds(folder) == without_seconds(trained)


def test_a_signal_during_validation_stops_the_run_and_no_step_is_repeated(
    trained: Path, photos: Path, tmp_path: Path, one_thread: None,
):
    folder = tmp_path / 'run'
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, training, 'plan_eval_batches', 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            command.run(parse(photos, '--out', folder, *PLAIN))
    assert position(folder) == (1, 7)
    run(photos, '--out', folder, *PLAIN)
    assert same(folder, trained) and without_seconds(folder) == without_seconds(trained)


def test_a_run_with_stochastic_depth_and_random_erasing_goes_on_inside_an_epoch(
    photos: Path, tmp_path: Path, one_thread: None,
):
    args = (
        '--model', 'test_vit:random', '--model-args', '{"img_size": 32, "drop_path_rate": 0.2}', '--device', 'cpu',
        '--workers', '0', '--image-size', '32', '--epochs', '2', '--batch-size', '64', '--opt', 'sgd', '--ema-decay',
        '0', '--erase-p', '0.5', '--mixup', '0', '--cutmix', '0')
    run(photos, '--out', tmp_path / 'whole', *args)
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, training, 'train_step', 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            command.run(parse(photos, '--out', tmp_path / 'run', *args))
    assert position(tmp_path / 'run') == (1, 2)
    run(photos, '--out', tmp_path / 'run', *args)
    assert same(tmp_path / 'run', tmp_path / 'whole')
    assert without_seconds(tmp_path / 'run') == without_seconds(tmp_path / 'whole')


def test_a_signal_to_all_processes_of_a_group_does_not_end_those_that_read(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):
    real = Samples._read

    def read(self: Samples, index: int):
        if os.getpid() != main:
            for name in ('SIGTERM', 'SIGINT', 'SIGUSR1'):
                os.kill(os.getpid(), getattr(signal, name))
        return real(self, index)
    main = os.getpid()
    monkeypatch.setattr(Samples, '_read', read)
    record = run(photos, '--out', tmp_path / 'run', *PLAIN, '--workers', '1', '--epochs', '1', '--warmup-epochs', '0')
    assert record['extra']['last_epoch'] == 1


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_for_a_while_costs_nothing(
    trained: Path, photos: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    at_call(monkeypatch, checkpoint, 'save', 3, fill_disk)
    at_call(monkeypatch, Classifier, 'export', 1, fill_disk)
    run(photos, '--out', tmp_path / 'run', *PLAIN)
    said = capsys.readouterr().out
    assert f'no checkpoint written to {tmp_path / "run"} (No space left on device)' in said
    assert 'the best weights so far cannot be exported' in said
    assert same(tmp_path / 'run', trained) and without_seconds(tmp_path / 'run') == without_seconds(trained)


def test_a_run_whose_last_checkpoint_fails_says_so_and_goes_on_from_the_one_before(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture,
):
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, checkpoint, 'save', 2, fill_disk)
        with pytest.raises(RunError, match='the last checkpoint could not be written'):
            command.run(parse(photos, '--out', tmp_path / 'run', *PLAIN, '--epochs', '2'))
    assert position(tmp_path / 'run') == (1, 0) and not (tmp_path / 'run' / 'record.json').exists()
    assert run(photos, '--out', tmp_path / 'run', *PLAIN, '--epochs', '2')['extra']['last_epoch'] == 2
    assert 'continuing after epoch 1' in capsys.readouterr().out


def test_a_loss_that_is_not_finite_reaches_no_checkpoint(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(command, 'Lifecycle', functools.partial(Lifecycle, every_steps=1))
    args = ('--opt', 'sgd', '--lr', '1e30', '--warmup-epochs', '0')
    with pytest.raises(FloatingPointError, match='the loss of epoch 1 is (nan|inf); lower --lr'):
        command.run(parse(photos, '--out', tmp_path / 'run', *PLAIN, *args))
    assert np.isfinite(checkpoint.read(tmp_path / 'run' / 'checkpoint.pth', training.KEYS)['losses']).all()


def test_the_number_of_workers_changes_no_bit(trained: Path, photos: Path, tmp_path: Path, one_thread: None):
    run(photos, '--out', tmp_path / 'run', *PLAIN, '--workers', '2')
    assert same(tmp_path / 'run', trained)


def test_a_torn_checkpoint_falls_back_to_the_one_before(
    trained: Path, photos: Path, tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture,
):
    folder = tmp_path / 'run'
    shutil.copytree(trained, folder)
    data = (folder / 'checkpoint.pth').read_bytes()
    (folder / 'checkpoint.pth').write_bytes(data[:len(data) // 2])
    run(photos, '--out', folder, *PLAIN)
    assert 'continuing after epoch 5' in capsys.readouterr().out
    assert same(folder, trained)
    # The torn one did not take the place of the good one.
    names = ('checkpoint.pth', 'checkpoint_previous.pth')
    assert [checkpoint.read(folder / n, training.KEYS)['epoch'] for n in names] == [6, 5]
    assert (folder / 'checkpoint.pth.torn').read_bytes() == data[:len(data) // 2]
    for name in names:
        (folder / name).write_bytes(b'PK torn')
    with pytest.raises(ValueError, match='checkpoint.pth cannot be read, and there is no other checkpoint'):
        run(photos, '--out', folder, *PLAIN)


def test_a_run_begun_in_full_precision_goes_on_where_losses_are_scaled(trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / 'run')
    started = json.loads((trained / 'args.json').read_text())
    model = timm.create_model('resnet18', num_classes=10, **json.loads(NETWORK))
    loader = Loader(Samples(Broken(64, set()), None, 0, True), 0, ALONE.device)
    trainer = training.ClassifierTrainer(model, 10, settings(*PLAIN), 64, ALONE, 'float16')
    life = Lifecycle(tmp_path / 'run' / checkpoint.LAST, training.KEYS, ALONE, Signals(), print)
    run = training.Finetuning(trainer, loader, loader, life, None, {**started, 'amp': 'float16'})
    training.resume(run, {'amp'})
    assert run.epoch == 6 and trainer.scaler.is_enabled()


def test_two_spellings_of_a_path_are_one_run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for part in ('train', 'val'):
        shutil.copytree(photos, tmp_path / 'data' / part)
    args = ('--out', tmp_path / 'run', *PLAIN, '--epochs', '1', '--warmup-epochs', '0')
    run(tmp_path / 'data', *args)
    monkeypatch.setattr(training, 'train_one_epoch', lambda run: 1 / 0)
    monkeypatch.chdir(tmp_path)
    assert run('data', *args)['protocol']['validation'] == f'300 images of {Path("data", "val")}'


@pytest.mark.timeout(120)
def test_two_processes_learn_what_one_does(photos: Path, tmp_path: Path, one_thread: None):
    break_images(photos, tmp_path / 'data')
    # One step: rounding grows fivefold with each further one.
    args = (
        tmp_path / 'data', *PLAIN, '--mixup', '0', '--epochs', '1', '--opt', 'sgd', '--lr', '0.2', '--warmup-epochs',
        '0', '--batch-size', '240')
    script = tmp_path / 'launch.py'
    script.write_text(LAUNCH)
    subprocess.run(
        [warm.python(), '-m', 'torch.distributed.run', '--standalone', '--local-addr', '127.0.0.1',
         '--nproc-per-node', '2', str(script), *map(str, args), '--out', str(tmp_path / 'two')],
        check=True, capture_output=True, env=environment())
    run(*args, '--out', tmp_path / 'one')
    one, two = (torch.load(tmp_path / n / 'checkpoint.pth', weights_only=True) for n in ('one', 'two'))
    for name, value in one['model'].items():
        torch.testing.assert_close(two['model'][name], value, atol=1e-4, rtol=1e-4, msg=name)
    start = load_backbone('resnet18:random', **json.loads(NETWORK)).model.state_dict()
    assert (one['model']['layer2.0.conv1.weight'] - start['layer2.0.conv1.weight']).abs().max() > 1e-3  # it did learn
    assert two['history'][0]['loss'] == pytest.approx(one['history'][0]['loss'], abs=1e-5)
    assert two['history'][0]['top1'] == one['history'][0]['top1']
    assert list(two['model']) == list(one['model'])
    one, two = (json.loads((tmp_path / n / 'record.json').read_text())['extra']['unreadable'] for n in ('one', 'two'))
    assert one == two and len(one) == 3
