"""Fine-tuning: timm loads what was measured, runs go on in the same bits, and the protocol's numbers are literal."""
import argparse
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import layouts_benchmarks as layouts
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, write_digits
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch import nn

from simsiam_models.benchmarks.backbone import load_backbone
from simsiam_models.benchmarks.finetune.command import (
    command as finetune,
)
from simsiam_models.benchmarks.finetune.command import (
    data as finetune_data,
)
from simsiam_models.benchmarks.finetune.command import (
    result as finetune_result,
)
from simsiam_models.benchmarks.finetune.command import (
    training as finetune_training,
)
from simsiam_models.data import DataError, open_data
from simsiam_models.runtime import checkpoint
from simsiam_models.runtime.distributed import World

NETWORK = '{"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64], "stem_width": 8, "stem_type": "deep"}'
TINY = (
    '--model', 'resnet18:random', '--model-args', NETWORK, '--image-size', '32', '--resize', '36', '--device', 'cpu',
    '--workers', '0')
PLAIN = (
    *TINY, '--epochs', '6', '--batch-size', '32', '--lr', '0.06', '--warmup-epochs', '1', '--layer-decay', '0.9',
    '--flip-p', '0', '--crop-scale', '0.7', '1', '--randaugment', 'rand-m3-inc1', '--mixup', '0.1', '--cutmix', '0')
ALONE = World(0, 1, torch.device('cpu'))
LAUNCH = (
    'import argparse, sys, torch; torch.set_num_threads(1)\n'
    'from simsiam_models.benchmarks import finetune as f\n'
    'p = argparse.ArgumentParser(); f.add_arguments(p); sys.exit(f.run(p.parse_args(sys.argv[1:])))')


def parse(*args: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    finetune.add_arguments(parser)
    return parser.parse_args([str(a) for a in args])


def run(*args: str | Path) -> dict:
    assert finetune.run(parse(*args)) == 0
    return json.loads((parse(*args).output / 'record.json').read_text())


def settings(*args: str, images: int = 50_000) -> finetune_training.Settings:
    return finetune.plain_settings(parse('x', '--out', 'y', *args), images)


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
    _, val, _ = finetune_data.open_labelled(str(photos), 0.2, 0)
    with torch.no_grad():
        return model(torch.stack([transform(Image.fromarray(val.read(i))) for i in range(len(val))]))


# --- what a run leaves

def test_digits_are_learned_from_a_folder_without_validation_images(trained: Path):
    record = json.loads((trained / 'record.json').read_text())
    assert record['metrics']['top1'] > 45  # chance is 10
    assert record['data']['counts'] == {'train': 240, 'test': 60, 'classes': 10}
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
    here = finetune_data.eval_transform(32, 36, mean, std)(Image.open(image).convert('RGB'))
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
    _, val, _ = finetune_data.open_labelled(str(photos), 0.2, 0)
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


def test_top_1_and_top_5_are_those_of_the_exported_model(trained: Path, photos: Path):
    predicted = exported_logits(trained, photos).topk(5).indices
    label = torch.tensor(finetune_data.open_labelled(str(photos), 0.2, 0)[1].labels)[:, None]
    metrics = json.loads((trained / 'record.json').read_text())['metrics']
    for k in (1, 5):
        right = (predicted[:, :k] == label).any(1).double().mean().item()
        assert 0.1 < right < 1 and metrics[f'top{k}'] == pytest.approx(100 * right)


@pytest.mark.parametrize('name, kwargs, size', [
    ('test_vit', {}, 160), ('test_vit', {}, 96), ('test_vit', {'img_size': 64}, 64), ('test_vit4', {}, 160),
    ('swinv2_tiny_window8_256', {'embed_dim': 12, 'depths': [1, 1, 1, 1], 'num_heads': [1, 1, 1, 1]}, 256),
    ('deit_tiny_distilled_patch16_224', {'embed_dim': 12, 'depth': 1}, 224), ('test_resnet', {}, 96)])
def test_plain_timm_builds_the_same_network_for_the_same_images(name: str, kwargs: dict, size: int, tmp_path: Path):
    s = settings('--image-size', str(size))
    target = finetune_result.Target(f'{name}:random', kwargs, ALONE.device, ['a', 'b', 'c'], s, tmp_path)
    model = target.backbone.model
    finetune_training.add_classifier(model, 3, 0)
    target.check()
    target.export(model)
    plain = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert {k: v.shape for k, v in plain.named_buffers()} == {k: v.shape for k, v in model.named_buffers()}
    data = timm.data.resolve_data_config(plain.pretrained_cfg)
    assert data['input_size'] == (3, size, size)
    x = torch.randn(2, *data['input_size'], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), atol=1e-6, rtol=1e-5)
    again = load_backbone(str(tmp_path))
    assert finetune_result.architecture(str(tmp_path), again.model, {}) == (name, target.config().get('model_args', {}))


def test_what_config_json_builds_is_held_against_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    s = settings('--image-size', '160')
    target = finetune_result.Target('test_vit:random', {}, ALONE.device, ['a', 'b', 'c'], s, tmp_path)
    finetune_training.add_classifier(target.backbone.model, 3, 0)
    config = target.config()
    monkeypatch.setattr(target, 'config', lambda: {k: v for k, v in config.items() if k != 'model_args'})
    with pytest.raises(ValueError, match='timm builds another network by this name'):
        target.check()


def test_a_small_matrix_is_printed_and_a_class_without_images_has_no_accuracy():
    pairs = {(0, 0): 3, (0, 1): 1}
    rows = finetune_result.per_class(pairs, ['cat', 'dog'])
    assert [r['accuracy'] for r in rows] == [75.0, None]
    assert finetune_result.confusion_table(pairs, rows).splitlines()[1:] == [
        '0 cat                 3   1  75.0 %', '1 dog                 0   0    none']


def test_confusion_counts_labels_in_rows():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 7, 200), rng.integers(0, 7, 200)
    pairs = finetune_training.confusion(labels, torch.as_tensor(predicted))
    expected = confusion_matrix(labels, predicted)
    np.testing.assert_array_equal([[pairs.get((i, j), 0) for j in range(7)] for i in range(7)], expected)
    assert sum(pairs.values()) == 200 and all(pairs.values())
    rows = finetune_result.confusion_rows(pairs, [f'c{i}' for i in range(7)])
    assert rows[0][1:] == [r[0] for r in rows[1:]] == [f'c{i}' for i in range(7)]
    np.testing.assert_array_equal([r[1:] for r in rows[1:]], expected)


def test_of_more_than_a_thousand_classes_the_pairs_that_occur_are_counted_and_written():
    classes = [f'c{i}' for i in range(100_000)]
    pairs = finetune_training.confusion(np.array([0, 99_999, 0], np.int32), torch.tensor([0, 5, 0]))
    assert finetune_result.confusion_rows(pairs, classes) == [
        ['label', 'predicted', 'images'], ['c0', 'c0', 2], ['c99999', 'c5', 1]]
    rows = finetune_result.per_class(pairs, classes)
    assert rows[0] == {'class': 'c0', 'images': 2, 'right': 2, 'accuracy': 100.0}
    assert rows[99_999] == {'class': 'c99999', 'images': 1, 'right': 0, 'accuracy': 0.0}


def test_a_finished_run_started_again_trains_nothing_and_says_the_same(
    trained: Path, photos: Path, monkeypatch: pytest.MonkeyPatch,
):
    before = json.loads((trained / 'record.json').read_text())
    monkeypatch.setattr(finetune_training.Training, '_train_epoch', lambda self: 1 / 0)
    again = run(photos, '--out', trained, *PLAIN)
    assert again['metrics'] == before['metrics'] and again['extra'] == before['extra']


# --- how it learns

def test_defaults_follow_the_number_of_images():
    tiny, few, many = (settings(images=n) for n in (100, 400, 100_000))
    assert (tiny.batch_size, tiny.epochs, tiny.patience, tiny.warmup_epochs) == (16, 100, 33, 10)
    assert (few.batch_size, few.epochs, few.lr, few.mixup, few.cutmix) == (32, 84, 2e-3 * (1000 / 1008) ** 0.5, 0, 0)
    assert (many.batch_size, many.epochs, many.patience, many.mixup, many.cutmix) == (64, 30, 10, 0.2, 1.0)
    assert many.lr == pytest.approx(2e-3 * (1000 / (30 * 1562)) ** 0.5)
    flags = ('--epochs', '5', '--batch-size', '8', '--lr', '0.32', '--mixup', '0.1', '--patience', '2')
    given = settings(*flags, images=99)
    assert (given.epochs, given.batch_size, given.mixup, given.patience, given.warmup_epochs) == (5, 8, 0.1, 2, 0)
    assert given.lr == 0.01
    for n, processes, batch in ((8, 1, 8), (100, 6, 12), (100, 32, 32), (1, 1, 2), (100_000, 3, 60)):
        s = finetune.plain_settings(parse('x', '--out', 'y'), n, processes=processes)
        assert s.batch_size == batch
        if n > 1:
            assert finetune.fit_batch(s, n, processes, print) == s
    assert finetune.fit_batch(settings('--batch-size', '256', images=100), 100, 1, print).lr == pytest.approx(2e-3)


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

def test_each_layers_rate_is_decay_to_the_power_of_its_distance_from_the_last():
    model = timm.create_model('resnet18', num_classes=3)
    s = settings('--layer-decay', '0.5', '--batch-size', '256', '--lr', '0.1')
    optimizer = finetune_training.make_optimizer(model, s)
    scale = {id(p): g['lr_scale'] for g in optimizer.param_groups for p in g['params']}
    decay = {id(p): g['weight_decay'] for g in optimizer.param_groups for p in g['params']}
    order = ['conv1', 'bn1', *(f'layer{i}.{j}' for i in range(1, 5) for j in range(2)), 'fc']
    depth = {name: max(0, i - 1) for i, name in enumerate(order)}  # conv1 and bn1 are the stem
    for name, p in model.named_parameters():
        at = depth['.'.join(name.split('.')[:2 if name.startswith('layer') else 1])]
        assert scale[id(p)] == 0.5 ** (9 - at), name
        assert decay[id(p)] == (0 if p.ndim == 1 else s.weight_decay)
    assert s.lr == 0.1


def test_without_layer_decay_all_rates_are_alike():
    model = timm.create_model('resnet10t', num_classes=3)
    optimizer = finetune_training.make_optimizer(model, settings('--layer-decay', '1'))
    assert {g.get('lr_scale', 1.0) for g in optimizer.param_groups} == {1.0}


def test_the_rate_warms_up_and_falls_as_a_cosine_to_zero():
    s = settings('--epochs', '10', '--warmup-epochs', '2')
    rates = [finetune_training.lr_factor(s, step, 5) for step in range(50)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:], [0.5 * (1 + math.cos(math.pi * i / 40)) for i in range(40)])


def test_the_rate_that_a_step_uses_is_the_groups(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda self, closure=None: seen.append(
        {round(g['lr'] / g['lr_scale'], 12) for g in self.param_groups}))
    run(photos, '--out', tmp_path / 'run', *PLAIN, '--epochs', '2')
    steps = 240 // 32
    s = settings(*PLAIN, '--epochs', '2')
    assert seen == [{round(s.lr * finetune_training.lr_factor(s, i, steps), 12)} for i in range(2 * steps)]


def test_a_run_ends_when_validation_stops_getting_better_and_keeps_the_best(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
):
    top1 = iter([20.0, 30.0, 30.0, 10.0, 99.0])
    real = finetune_training.Training.accuracy
    monkeypatch.setattr(finetune_training.Training, '_train_epoch', lambda self: _mark(self))
    monkeypatch.setattr(
        finetune_training.Training, 'accuracy', lambda self, p: {**real(self, p), 'top1': next(top1, 30.0)})
    record = run(photos, '--out', tmp_path / 'run', *PLAIN, '--patience', '2', '--ema-decay', '0')
    assert [e['top1'] for e in record['extra']['epochs']] == [20, 30, 30, 10]
    assert record['extra']['best_epoch'] == 2 and record['extra']['stopped_early'] is True
    assert 'stopped early: validation top-1 did not rise for 2 epochs' in capsys.readouterr().out
    model = timm.create_model(f'local-dir:{tmp_path / "run"}', pretrained=True)
    assert model.fc.bias[0].item() == 2.0  # of the second epoch


def _mark(training: finetune_training.Training) -> float:
    with torch.no_grad():
        training.model.fc.bias[0] = training.epoch + 1.0
    return 1.0


def test_a_loss_that_is_not_finite_ends_the_run_in_one_sentence(photos: Path, tmp_path: Path):
    args = parse(photos, '--out', tmp_path / 'run', *PLAIN, '--opt', 'sgd', '--lr', '1e30', '--warmup-epochs', '0')
    with pytest.raises(RuntimeError, match='the loss of epoch 1 is (nan|inf); a lower --lr'):
        finetune.run(args)


# --- images

def test_held_out_images_are_a_seeded_share_of_each_class():
    labels = np.array([0] * 10 + [1] * 5 + [2] * 2 + [3])
    train, held = finetune_data.split(labels, 0.3, 0)
    assert sorted([*train, *held]) == list(range(18))
    assert np.bincount(labels[held], minlength=4).tolist() == [3, 2, 1, 0]
    np.testing.assert_array_equal(held, finetune_data.split(labels, 0.3, 0)[1])
    assert set(held) != set(finetune_data.split(labels, 0.3, 1)[1])
    assert np.bincount(labels[finetune_data.split(labels, 0.99, 0)[0]], minlength=4).tolist() == [1, 1, 1, 1]


def test_a_val_folder_is_what_is_validated_on(photos: Path, tmp_path: Path):
    shutil.copytree(photos, tmp_path / 'data' / 'train')
    for i in range(10):
        shutil.copytree(photos / str(i), tmp_path / 'data' / 'val' / str(i))
    train, val, text = finetune_data.open_labelled(str(tmp_path / 'data'), 0.2, 0)
    assert len(train) == len(val) == 300 and text == f'300 images of {tmp_path / "data" / "val"}'
    shutil.rmtree(tmp_path / 'data' / 'val' / '3')
    with pytest.raises(ValueError, match="val: not the 10 classes of .*: '3' is in one of them only"):
        finetune_data.open_labelled(str(tmp_path / 'data'), 0.2, 0)


@pytest.mark.parametrize('n, batch, keep, sizes', [
    (20, 8, False, [8, 8]), (20, 8, True, [8, 8, 4]), (17, 8, True, [8, 8, 4]), (16, 8, True, [8, 8])])
def test_the_processes_batches_together_are_the_global_ones(n: int, batch: int, keep: bool, sizes: list[int]):
    worlds = [World(r, 2, torch.device('cpu')) for r in range(2)]
    parts = [finetune_data.train_batches(n, batch, 3, 5, w, keep) for w in worlds]
    joined = [sorted(a + b) for a, b in zip(*parts, strict=True)]
    assert [len(b) for b in joined] == sizes
    assert all(len(a) == len(b) for a, b in zip(*parts, strict=True))
    alone = finetune_data.train_batches(n, batch, 3, 5, ALONE, keep)
    assert [sorted(b) for b in alone[:n // batch]] == joined[:n // batch]
    if keep:
        assert {i for b in joined for _, i in b} == set(range(n))  # every image trains
    else:
        assert len({i for b in joined for _, i in b}) == sum(sizes)
    assert finetune_data.train_batches(n, batch, 4, 5, ALONE, keep) != alone


def test_an_image_depends_on_seed_epoch_and_index_and_not_on_workers(few_digits: Path):
    images, _ = open_data(few_digits)
    mean, std = (0.5,) * 3, (0.2,) * 3
    transform = finetune_data.train_transform(24, mean, std, (0.3, 1.0), 0.5, 'rand-m9-mstd0.5-inc1', 0.5)

    def batches(seed: int, epoch: int, workers: int) -> torch.Tensor:
        samples = finetune_data.Samples(images, transform, seed, True)
        keys = [[(epoch, i) for i in part] for part in ((3, 1, 4), (15, 9, 2))]
        return torch.stack([x for x, _ in finetune_data.Loader(samples, workers, torch.device('cpu')).batches(keys)])

    first = batches(0, 0, 0)
    assert torch.equal(first, batches(0, 0, 2))
    assert not torch.equal(first, batches(1, 0, 0)) and not torch.equal(first, batches(0, 1, 0))


class Broken:
    """Images some of which cannot be read."""

    name, classes, digest = 'broken', ['a', 'b'], 'ab' * 8

    def __init__(self, n: int, bad: set[int]) -> None:
        self.n, self.bad, self.labels = n, bad, np.arange(n) % 2

    def __len__(self) -> int:
        return self.n

    def read(self, index: int) -> np.ndarray:
        from simsiam_models.data import UnreadableError
        if index in self.bad:
            raise UnreadableError(f'{index}.jpg: torn')
        return np.full((8, 8, 3), index, np.uint8)


def test_the_next_readable_image_stands_in_for_an_unreadable_one_and_it_is_named():
    images = Broken(30, {4, 5})
    transform = finetune_data.eval_transform(8, 8, (0.0,) * 3, (1.0,) * 3)
    training = finetune_data.Loader(finetune_data.Samples(images, transform, 0, True), 0, torch.device('cpu'))
    x, y = next(training.batches([[(0, 3), (0, 4), (0, 5)]]))
    assert (255 * x[:, 0, 0, 0]).round().tolist() == [3, 6, 6] and y.tolist() == [1, 0, 0]
    assert training.unreadable == {4: '4.jpg: torn', 5: '5.jpg: torn'}
    measuring = finetune_data.Loader(finetune_data.Samples(images, transform, 0, False), 0, torch.device('cpu'))
    x, y = next(measuring.batches([[(0, 3), (0, 4)]]))
    assert x[1].abs().max() == 0 and y.tolist() == [1, 0]  # counts with its own label
    for n, bad, said in ((30, {1, 2, 3, 4}, '4 of 30 images cannot be read, more than 10%'), (3, {0, 1, 2}, 'none of')):
        loader = finetune_data.Loader(
            finetune_data.Samples(Broken(n, bad), transform, 0, True), 0, torch.device('cpu'))
        with pytest.raises(DataError, match=said):
            list(loader.batches([[(0, i) for i in range(n)]]))


@pytest.mark.parametrize('workers', [0, 1])
def test_why_a_run_ends_comes_out_of_a_reading_process_as_one_sentence(workers: int):
    transform = finetune_data.eval_transform(8, 8, (0.0,) * 3, (1.0,) * 3)
    samples = finetune_data.Samples(Broken(3, {0, 1, 2}), transform, 0, True)
    with pytest.raises(DataError) as e:
        next(finetune_data.Loader(samples, workers, ALONE.device).batches([[(0, 0), (0, 1)]]))
    assert str(e.value) == 'broken: none of the 3 images can be read; the first: 0.jpg: torn'


class Two(World):
    """A world of two, the other of which could not read what `other` says."""

    other: dict[int, str] = {}

    def gather(self, mine: dict[int, str]) -> list[dict[int, str]]:
        return [self.other, mine]


def test_what_any_process_cannot_read_all_know_and_count_together():
    samples = finetune_data.Samples(Broken(30, set()), None, 0, False)
    world = Two(1, 2, torch.device('cpu'))
    loader = finetune_data.Loader(samples, 0, world.device)
    loader.unreadable = {7: '7.jpg: torn', 9: '9.jpg: torn'}
    world.other.update({6: '6.jpg: torn', 7: '/elsewhere/7.jpg: torn'})
    loader.join(world)
    assert sorted(loader.unreadable) == [6, 7, 9]  # a tenth
    world.other[3] = '3.jpg: torn'
    with pytest.raises(DataError, match='4 of 30 images cannot be read, more than 10%; the first: 3.jpg: torn'):
        loader.join(world)


def test_labels_are_a_copy_of_those_of_a_listing_which_are_mapped():
    images = Broken(8, set())
    images.labels.setflags(write=False)
    samples = finetune_data.Samples(images, None, 0, False)
    assert samples.labels.flags.writeable and np.array_equal(samples.labels, images.labels)


@pytest.mark.parametrize('size, resize', [(224, 256), (96, 110), (32, 36), (176, 201), (49, 49)])
def test_timm_resizes_to_what_the_exported_crop_pct_means(size: int, resize: int):
    assert math.floor(size / finetune_data.crop_pct(size, resize)) == resize


def test_a_network_of_bgr_pixels_becomes_one_of_rgb_with_the_same_outputs():
    backbone = load_backbone('resnet18:random')
    backbone.bgr = True
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.mean, backbone.std))
    before = backbone.model((pixels.flip(1) - mean) / std)  # protocols: channels turned round, statistics not
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in finetune_result.take_rgb(backbone))
    torch.testing.assert_close(backbone.model((pixels - mean) / std), before)


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
        [sys.executable, '-m', 'simsiam_models', 'finetune', str(photos), '--out', str(folder), *PLAIN],
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
        assert said == 'simsiam: stopped by SIGINT; the same command goes on after the last whole epoch\n'
    epoch = torch.load(folder / 'checkpoint.pth', weights_only=True)['epoch']
    assert 2 <= epoch < 6 and not (folder / 'record.json').exists()
    assert timm.create_model(f'local-dir:{folder}', pretrained=True).num_classes == 10  # the best so far
    run(photos, '--out', folder, *PLAIN)
    assert same(folder, trained) and without_seconds(folder) == without_seconds(trained)


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
    names = (checkpoint.LAST, checkpoint.PREVIOUS)
    assert [checkpoint.read(folder / n, finetune_training.KEYS)['epoch'] for n in names] == [6, 5]
    assert (folder / 'checkpoint.pth.torn').read_bytes() == data[:len(data) // 2]
    for name in (checkpoint.LAST, checkpoint.PREVIOUS):
        (folder / name).write_bytes(b'PK torn')
    with pytest.raises(ValueError, match='no checkpoint can be read'):
        run(photos, '--out', folder, *PLAIN)


def test_images_that_could_not_be_read_are_still_in_the_record_after_a_restart(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
):
    broken = break_images(photos, tmp_path / 'data')
    first = run(tmp_path / 'data', '--out', tmp_path / 'run', *PLAIN, '--epochs', '2')
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith('so far')]
    assert len(said) == 1 and said[0].startswith('so far 1 training and 2 validation images cannot be read')
    assert len(first['extra']['unreadable']) == 3
    assert all(any(w.startswith(f'{b}: ') for w in first['extra']['unreadable']) for b in broken)
    monkeypatch.setattr(finetune_training.Training, '_train_epoch', lambda self: 1 / 0)
    again = run(tmp_path / 'data', '--out', tmp_path / 'run', *PLAIN, '--epochs', '2')
    assert again['extra'] == first['extra']


def break_images(photos: Path, folder: Path) -> list[Path]:
    """A copy in which one training image and two validation images, of two processes one each, cannot be read."""
    shutil.copytree(photos, folder)
    train, val, _ = finetune_data.open_labelled(str(folder), 0.2, 0)
    broken = [images.images.path(int(images.indices[i])) for images, i in ((train, 17), (val, 20), (val, 31))]
    for path in broken:
        path.write_bytes(b'torn')
    return broken


def test_a_run_begun_in_full_precision_goes_on_where_losses_are_scaled(trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / 'run')
    started = json.loads((trained / 'args.json').read_text())
    model = timm.create_model('resnet18', num_classes=10, **json.loads(NETWORK))
    loader = finetune_data.Loader(finetune_data.Samples(Broken(64, set()), None, 0, True), 0, ALONE.device)
    training = finetune_training.Training(
        model, 10, settings(*PLAIN), loader, loader, tmp_path / 'run', ALONE, 'float16', started, print, print)
    assert training.epoch == 6 and training.scaler.is_enabled()


def test_two_spellings_of_a_path_are_one_run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for part in ('train', 'val'):
        shutil.copytree(photos, tmp_path / 'data' / part)
    args = ('--out', tmp_path / 'run', *PLAIN, '--epochs', '1', '--warmup-epochs', '0')
    run(tmp_path / 'data', *args)
    monkeypatch.setattr(finetune_training.Training, '_train_epoch', lambda self: 1 / 0)
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
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--local-addr', '127.0.0.1',
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


# --- the semi-supervised protocol

def semi(*args: str, share: str = '1pct') -> list[tuple[Path, finetune_training.Settings]]:
    return finetune.semi_runs(parse('x', '--out', 'o', '--protocol', f'semi_{share}', '--list', 'f.txt', *args))


@pytest.mark.parametrize('share, decay', [('1pct', 5e-4), ('10pct', 1e-4)])
def test_the_numbers_of_the_protocol_are_literal(share: str, decay: float):
    (folder, s), = semi('--lr', '0.1', '--head-multiplier', '100', share=share)
    assert (s.epochs, s.batch_size, s.momentum, s.weight_decay) == (20, 256, 0.9, decay)
    assert (s.lr, s.head_multiplier) == (0.1, 100)
    assert (s.image_size, s.resize, s.crop_scale, s.flip) == (224, 256, (0.08, 1.0), 0.5)
    assert (s.mixup, s.cutmix, s.smoothing, s.ema_decay, s.randaugment, s.erase) == (0, 0, 0, 0, None, 0)
    assert (s.eval_every, s.keep, folder) == (10, 'last', Path('o'))
    rates = [finetune_training.lr_factor(s, 51 * epoch, 51) for epoch in range(20)]
    np.testing.assert_allclose(rates, [1] * 12 + [0.2] * 4 + [0.04] * 4)


def test_the_head_alone_has_the_multiplied_rate_and_everything_decays():
    (_, s), = semi('--lr', '0.01', '--head-multiplier', '10')
    model = timm.create_model('resnet18', num_classes=5)
    optimizer = finetune_training.make_optimizer(model, s)
    assert type(optimizer) is torch.optim.SGD
    body, head = optimizer.param_groups
    assert [id(p) for p in head['params']] == [id(p) for p in model.fc.parameters()]
    assert len(body['params']) + 2 == len(list(model.parameters()))
    assert (body['lr_scale'], head['lr_scale']) == (1, 10)
    assert {(g['momentum'], g['weight_decay'], g['nesterov']) for g in (body, head)} == {(0.9, 5e-4, False)}


def test_the_grid_is_the_nine_pairs_in_folders_of_their_own():
    runs = semi('--grid')
    assert {(s.lr, s.head_multiplier) for _, s in runs} == {
        (lr, m) for lr in (0.1, 0.01, 0.001) for m in (1, 10, 100)}
    assert len({folder for folder, _ in runs}) == 9 and runs[0][0] == Path('o/lr0.1_head1')


def test_a_grid_on_a_list_of_labelled_images_names_each_pair_and_its_deviations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, one_thread: None,
):
    written = layouts.write_imagenet(tmp_path / 'in1k', train=8, val=4)
    names = [Path(path).name for path, _ in written['train'][::2]]
    (tmp_path / '1percent.txt').write_text('\n'.join(names) + '\n')
    monkeypatch.setattr(finetune, 'LRS', (0.1, 0.001))
    monkeypatch.setattr(finetune, 'MULTIPLIERS', (1.0, 10.0))
    args = parse(
        tmp_path / 'in1k', '--protocol', 'semi_1pct', '--list', tmp_path / '1percent.txt', '--allow-partial', '--grid',
        '--out', tmp_path / 'o', *TINY, '--epochs', '11', '--batch-size', '8')
    assert finetune.run(args) == 0
    printed = capsys.readouterr().out
    assert 'chosen on the test images' in printed
    record = json.loads((tmp_path / 'o' / 'lr0.001_head10' / 'record.json').read_text())
    assert record['benchmark'] == 'imagenet_semi_1pct'
    assert (record['protocol']['lr'], record['protocol']['head_multiplier']) == (0.001, 10)
    assert record['protocol']['changed'] == ['epochs 11', 'batch_size 8', 'image_size 32', 'resize 36']
    assert record['data']['counts'] == {'train': 12, 'test': 12, 'classes': 3}
    assert set(record['metrics']) == {'top1', 'top1_epoch10', 'top1_epoch11'}  # three classes have no top-5
    assert [('top1' in e) for e in record['extra']['epochs']] == [False] * 9 + [True] * 2
    assert record['extra']['best_epoch'] == 11
    first = torch.load(tmp_path / 'o' / 'lr0.1_head1' / 'checkpoint.pth', weights_only=True)['model']
    start = load_backbone('resnet18:random', **json.loads(NETWORK)).model
    assert not torch.equal(first['bn1.running_mean'], start.bn1.running_mean)  # batch norm is not frozen


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


def test_a_new_classifier_is_normal_0_01_with_bias_0_and_everything_trains():
    backbone = load_backbone('resnet18:random')
    finetune_training.add_classifier(backbone.model, 500, 3)
    fc = backbone.model.fc
    assert isinstance(fc, nn.Linear) and fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert fc.bias.abs().max() == 0 and all(p.requires_grad for p in backbone.model.parameters())
    other = load_backbone('resnet18:random')
    finetune_training.add_classifier(other.model, 500, 3)
    assert torch.equal(other.model.fc.weight, fc.weight)


@pytest.mark.parametrize('name, kwargs', [
    ('deit_tiny_distilled_patch16_224', {'embed_dim': 12, 'depth': 1}), ('levit_128s', {}), ('resnet10t', {})])
def test_a_network_may_have_two_classifiers_or_one_without_bias(
    name: str, kwargs: dict, monkeypatch: pytest.MonkeyPatch,
):
    model = timm.create_model(name, num_classes=0, **kwargs)
    if name == 'resnet10t':
        monkeypatch.setattr(model, 'reset_classifier', lambda n: setattr(model, 'fc', nn.Linear(512, n, bias=False)))
    finetune_training.add_classifier(model, 400, 0)
    last = [m for m in finetune_training.classifier(model).modules() if isinstance(m, nn.Linear)]
    assert len(last) == (1 if name == 'resnet10t' else 2)
    for layer in last:
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert layer.bias is None or layer.bias.abs().max() == 0
    (_, s), = semi('--lr', '0.01')
    _, head = finetune_training.make_optimizer(model, s).param_groups
    assert {id(m.weight) for m in last} <= {id(p) for p in head['params']}


# --- what a user gets wrong

@pytest.mark.parametrize('args, said', [
    (['--model', 'no_such_model:random', '--model-args', '{}'], 'no_such_model'),
    (['--opt', 'nonsense'], '--opt nonsense'),
    (['--randaugment', 'nonsense'], '--randaugment nonsense: not as timm writes it'),
    (['--epochs', '0'], '--epochs 0: must be at least 1'),
    (['--batch-size', '31'], '--batch-size 31 does not divide by 2'),
    (['--layer-decay', '1.5'], '--layer-decay 1.5'), (['--warmup-epochs', '6'], '--warmup-epochs 6: must be 0'),
    (['--val-share', '1'], '--val-share 1'), (['--resize', '16'], '--resize 16: must be at least the image size, 32'),
    (['--crop-scale', '0', '1'], '--crop-scale'), (['--grid'], '--grid belongs to --protocol'),
    (['--list', 'x'], '--list belongs to --protocol'), (['--seed', '-1'], '--seed -1'),
    (['--head-multiplier', '0'], '--head-multiplier belongs to --protocol'),
    (['--opt', 'fusedadam'], '--opt fusedadam: cannot be used .*; adamw or sgd'),
    (['--opt', 'adahessian'], '--opt adahessian: cannot be used .it needs second derivatives'),
    (['--model', 'test_vit2:random', '--model-args', '{"dynamic_img_size": false}'],
     r'does not run on images of 32 px .*; give another --image-size, or --model-args \'{"img_size": 32}\''),
    (['--model', 'test_vit:random', '--model-args', '{"global_pool": ""}'],
     r'makes \(1, .* of an image, not a row of 10 classes'),
    (['--model-args', '{"no_such_argument": 1}'], 'no_such_argument'),
    (['--protocol', 'semi_1pct'], 'is fixed by --protocol semi_1pct; leave it out')])
def test_a_wrong_flag_is_one_sentence_before_anything_is_written(
    args: list[str], said: str, photos: Path, tmp_path: Path,
):
    with pytest.raises((ValueError, RuntimeError), match=said) as e:
        finetune.run(parse(photos, '--out', tmp_path / 'run', *PLAIN, *args))
    assert '\n' not in str(e.value) and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('args, said', [
    ([], '--protocol semi_1pct needs --list FILE'), (['--list', 'f', '--grid', '--lr', '1'], '--grid runs all nine'),
    (['--list', 'f', '--lr', '0'], '--lr 0.0: must be above 0'),
    (['--list', 'f', '--head-multiplier', '-1'], '--head-multiplier -1.0'),
    (['--list', 'f', '--head-multiplier', '0'], '--head-multiplier 0.0: must be above 0')])
def test_a_wrong_flag_of_the_protocol_is_one_sentence(args: list[str], said: str):
    with pytest.raises(ValueError, match=said):
        finetune.semi_runs(parse('x', '--out', 'o', '--protocol', 'semi_1pct', *args))


def test_wrong_data_are_one_sentence(photos: Path, tmp_path: Path):
    shutil.copytree(photos / '0', tmp_path / 'one' / '0')
    shutil.copytree(photos / '0', tmp_path / 'flat')
    (tmp_path / 'empty').mkdir()
    for c in 'ab':
        (tmp_path / 'alone' / c).mkdir(parents=True)
        shutil.copy(next(photos.rglob('*.png')), tmp_path / 'alone' / c)
    for name, said in (('one', 'one class only'), ('flat', 'no labels'), ('empty', 'no image'), ('none', 'no such'),
                       ('alone', 'no class has two images')):
        with pytest.raises((ValueError, FileNotFoundError), match=said) as e:
            finetune.run(parse(tmp_path / name, '--out', tmp_path / 'run', *PLAIN))
        assert '\n' not in str(e.value)
    lines = ['path,label', *(f'{p},{0 if i % 2 else 99999}' for i, p in enumerate(sorted(photos.rglob('*.png'))[:8]))]
    for name in ('train', 'val'):
        (tmp_path / f'{name}.csv').write_text('\n'.join(lines))
    said = "99998 of 100000 classes have no training image, the first is '1'; add images, or number"
    with pytest.raises(ValueError, match=said):
        finetune.run(parse(tmp_path / 'train.csv', '--out', tmp_path / 'run', *PLAIN))
    protocol = ('--protocol', 'semi_1pct', '--dataset', 'folder')
    with pytest.raises(ValueError, match=said):
        finetune.run(parse(tmp_path / 'train.csv', '--out', tmp_path / 'run', *TINY, *protocol))
    assert not (tmp_path / 'run').exists()


def test_the_folder_of_another_run_is_refused_untouched(trained: Path, photos: Path, tmp_path: Path):
    with pytest.raises(ValueError, match='holds another run .*epochs: 6 there, 7 here'):
        finetune.run(parse(photos, '--out', trained, *PLAIN, '--epochs', '7'))
    (tmp_path / 'pretrained').mkdir()
    (tmp_path / 'pretrained' / 'args.json').write_text('{"recipe": "demo"}')
    (tmp_path / 'export').mkdir()
    (tmp_path / 'export' / 'model.safetensors').write_bytes(b'mine')
    (tmp_path / 'file').write_text('x')
    for name, said in (('pretrained', 'a run of another kind'), ('export', 'model.safetensors of something else'),
                       ('file', 'is a file')):
        with pytest.raises(ValueError, match=said):
            finetune.run(parse(photos, '--out', tmp_path / name, *PLAIN))
    assert (tmp_path / 'export' / 'model.safetensors').read_bytes() == b'mine'
    assert sorted(p.name for p in (tmp_path / 'export').iterdir()) == ['model.safetensors']


def test_a_fine_tuned_folder_is_a_backbone_again(trained: Path, photos: Path, tmp_path: Path, one_thread: None):
    args = [a for a in PLAIN if a not in ('--model', 'resnet18:random', '--model-args', NETWORK)]
    record = run(photos, '--out', tmp_path / 'again', *args, '--model', str(trained), '--epochs', '2')
    assert record['metrics']['top1'] > 45
    config = json.loads((tmp_path / 'again' / 'config.json').read_text())
    assert config['architecture'] == 'resnet18' and config['model_args'] == json.loads(NETWORK)
    assert timm.create_model(f'local-dir:{tmp_path / "again"}', pretrained=True).num_classes == 10


def test_more_than_the_images_in_a_batch_is_said_and_made_smaller():
    said = []
    s = finetune.fit_batch(settings('--batch-size', '64', '--lr', '1'), 31, 1, said.append)
    assert s.batch_size == 30 and s.lr == pytest.approx(30 / 256) and '30 is used' in said[0]
    with pytest.raises(ValueError, match='1 training images are too few'):
        finetune.fit_batch(settings('--batch-size', '64'), 1, 1, said.append)
