"""`simsiam segment` as a user runs it: training, continuing, measuring again, using what it wrote."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from real_data import unpack_real
from scenes import NAMES, write_scenes

from simsiam_models.benchmarks import segmentation
from simsiam_models.benchmarks.backbone import load_backbone
from simsiam_models.benchmarks.results.record import read_record
from simsiam_models.benchmarks.segmentation.metrics import compute_metrics, count_pixels
from simsiam_models.cli import main

NETWORK = '{"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32], "stem_width": 8, "stem_type": "deep"}'
TINY = [
    '--model', 'resnet18:random', '--model-args', NETWORK, '--head-channels', '12', '--device', 'cpu', '--workers', '0']
SMALL = ['--dataset', 'folder', *TINY, '--iterations', '6', '--eval-every', '3', '--batch-size', '4',
         '--image-size', '48']
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp('scenes'), 10, 3)


@pytest.fixture(scope='module')
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('segment') / 'run'
    torch.set_num_threads(1)
    assert main(['segment', str(scenes), *SMALL, '--output', str(folder)]) == 0
    return folder


def read_masks(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p)) for p in sorted(folder.glob('*.png'))}


def test_a_run_leaves_a_record_masks_a_sheet_and_a_table_of_classes(trained: Path, scenes: Path):
    record = read_record(trained / 'record.json')
    assert record['benchmark'] == 'segment_fcn_d8' and {'mIoU', 'mAcc', 'pixel_accuracy'} == record['metrics'].keys()
    changed = record['protocol']['changed']
    assert changed['batch_size'] == {'used': 4, 'published': 16} and changed['crop'] == {'used': 48, 'published': 512}
    assert changed['lr'] == {'used': 0.0025, 'published': 0.01} and changed['box']['used'] == [192, 48]
    assert record['protocol']['loss_mean'] == 'all'
    assert record['data']['counts'] == {'train': 10, 'test': 3, 'classes': 3}
    masks = read_masks(trained / 'masks')
    assert list(masks) == ['0000.png', '0001.png', '0002.png']
    assert Image.open(trained / 'masks' / '0000.png').mode == 'P'
    truth = read_masks(scenes / 'masks' / 'val')
    counts = sum(count_pixels(truth[name], masks[name], 3) for name in masks)
    assert compute_metrics(counts, NAMES)[0] == pytest.approx(record['metrics'])
    assert Image.open(trained / 'sheet.jpg').width > 1000
    rows = (trained / 'per_class.csv').read_text().splitlines()
    assert rows[0] == 'class,pixels,IoU,accuracy' and [row.split(',')[0] for row in rows[1:]] == NAMES
    logged = [json.loads(line) for line in (trained / 'log.jsonl').read_text().splitlines()]
    assert {'decode', 'aux', 'loss', 'lr'} <= logged[0].keys()
    assert logged[0]['loss'] == pytest.approx(logged[0]['decode'] + 0.4 * logged[0]['aux'])


def test_a_trained_segmenter_predicts_the_same_in_files_arrays_and_pil_images(
    trained: Path, scenes: Path, tmp_path: Path,
):
    predictor, file = segmentation.load(trained, device='cpu'), scenes / 'images' / 'val' / '0001.jpg'
    image = Image.open(file)
    found = predictor([file, image, np.asarray(image)])
    assert predictor.classes == NAMES and found[0].shape == (image.height, image.width)
    written = np.asarray(Image.open(trained / 'masks' / '0001.png'))
    assert all(np.array_equal(mask, written) for mask in found)
    predictor.save(found[0], tmp_path / 'mask.png')
    assert (tmp_path / 'mask.png').read_bytes() == (trained / 'masks' / '0001.png').read_bytes()
    with pytest.raises(ValueError, match='a list of images'):
        predictor(file)
    with pytest.raises(ValueError, match=r'\(H, W, 3\) of uint8'):
        predictor([np.zeros((8, 8))])
    with pytest.raises(ValueError, match='use a name that ends in .png'):
        predictor.save(found[0], tmp_path / 'mask.jpg')
    with pytest.raises(ValueError, match='labels from 0 to 3, but the classes are 0 to 2'):
        predictor.save(np.arange(4).reshape(2, 2), tmp_path / 'mask.png')


def test_the_backbone_of_a_trained_segmenter_loads_in_timm(trained: Path):
    model = timm.create_model(f'local-dir:{trained / "backbone"}', pretrained=True)
    state = torch.load(trained / 'checkpoint.pth', weights_only=True)['model']
    assert all(torch.equal(value, state[f'backbone.{key}']) for key, value in model.state_dict().items())
    start = load_backbone('resnet18:random', **json.loads(NETWORK)).model.state_dict()
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, start[k])]
    assert len(moved) == len(start)  # nothing was frozen
    assert load_backbone(str(trained)).digest == load_backbone(str(trained / 'backbone')).digest


def test_eval_only_measures_what_the_run_measured(trained: Path, scenes: Path, tmp_path: Path):
    for i, name in enumerate((trained, trained / 'checkpoint.pth')):
        out = tmp_path / str(i)
        assert main(['segment', str(scenes), '--dataset', 'folder', '--eval-only', str(name), '--device', 'cpu',
                     '--output', str(out)]) == 0
        again, first = read_record(out / 'record.json'), read_record(trained / 'record.json')
        for key in ('metrics', 'protocol', 'weights', 'data', 'benchmark'):
            assert again[key] == first[key], key
        assert (out / 'masks' / '0002.png').read_bytes() == (trained / 'masks' / '0002.png').read_bytes()


def test_the_same_command_again_trains_no_further(trained: Path, scenes: Path, capsys: pytest.CaptureFixture):
    before = (trained / 'segmenter' / 'model.safetensors').read_bytes()
    assert main(['segment', str(scenes), *SMALL, '--output', str(trained)]) == 0
    assert 'continuing after iteration 6 of 6' in capsys.readouterr().out
    assert (trained / 'segmenter' / 'model.safetensors').read_bytes() == before


@pytest.mark.parametrize(('flags', 'said'), [
    (['--lr', '0.02'], 'lr: 0.0025 there, 0.02 here'), (['--loss-mean', 'valid'], 'loss_mean: all there, valid here'),
    (['--test', 'slide'], 'test: whole there, slide here'), (['--seed', '1'], 'seed: 0 there, 1 here')])
def test_another_run_does_not_continue_this_one(
    trained: Path, scenes: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture,
):
    assert main(['segment', str(scenes), *SMALL, *flags, '--output', str(trained)]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(('flags', 'said'), [
    (['--model', 'vit_tiny_patch16_224:random', '--model-args', '{}'], 'need a ResNet of timm'),
    (['--model-args', '{"output_stride": 32}'], 'leave it out of --model-args'),
    (['--image-size', '8'], '--image-size 8: must be at least 32'), (['--lr', '-1'], '--lr -1.0: must be above 0'),
    (['--head-channels', '1'], '--head-channels 1: must be at least 2'),
    (['--amp', 'float16'], 'does not run on a CPU'),
    (['--batch-size', '11'], 'a batch of 11 is larger than the training set (10)'),
    (['--model', 'nothing_like_this'], 'neither a model of timm nor a file'),
    (['--classes', 'nowhere.txt'], 'nowhere.txt: no such list of classes')])
def test_wrong_flags_are_refused_in_one_sentence(
    scenes: Path, tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture,
):
    assert main(['segment', str(scenes), *SMALL, '--output', str(tmp_path / 'run'), *flags]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count('\n') == 1


def test_a_segmenter_of_other_classes_is_not_measured(trained: Path, scenes: Path, tmp_path: Path, capsys):
    shutil.copytree(scenes, tmp_path / 'other')
    (tmp_path / 'other' / 'classes.txt').write_text('ground\ncircle\nsquare\n')
    assert main(['segment', str(tmp_path / 'other'), '--dataset', 'folder', '--eval-only', str(trained), '--device',
                 'cpu', '--output', str(tmp_path / 'again')]) == 1
    assert 'give the data set that it was trained on' in capsys.readouterr().err


def test_a_damaged_segmenter_is_refused(trained: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match='of a segmenter there'):
        segmentation.load(tmp_path)
    shutil.copytree(trained / 'segmenter', tmp_path / 'segmenter')
    file = tmp_path / 'segmenter' / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match='damaged or was cut off'):
        segmentation.load(tmp_path)


KILLED = '''
import os, signal, sys
import torch
from simsiam_models.benchmarks import transfer
from simsiam_models.cli import main
torch.set_num_threads(1)
real, at = transfer.TransferTrainer.step, int(sys.argv[1])

def step(self, inputs, number):
    if number == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, inputs, number)

transfer.TransferTrainer.step = step
sys.exit(main(sys.argv[2:]))
'''


def test_a_killed_run_ends_in_the_bits_of_an_undisturbed_one(scenes: Path, tmp_path: Path):
    flags = ['segment', str(scenes), *SMALL, '--eval-every', '2', '--checkpoint-minutes', '0.00001']
    assert main([*flags, '--output', str(tmp_path / 'whole')]) == 0
    killed = subprocess.run(  # after an evaluation, inside the epoch
        [sys.executable, '-c', KILLED, '3', *flags, '--output', str(tmp_path / 'killed')], check=False,
        cwd=Path(__file__).resolve().parents[3], env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True,
        timeout=250)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (tmp_path / 'killed' / 'lock').unlink(missing_ok=True)
    assert main([*flags, '--output', str(tmp_path / 'killed')]) == 0
    a, b = (torch.load(tmp_path / name / 'checkpoint.pth', weights_only=True) for name in ('whole', 'killed'))
    for key, value in a['model'].items():
        assert torch.equal(value, b['model'][key]), key
    momenta = [[s['momentum_buffer'] for s in x['optimizer']['state'].values()] for x in (a, b)]
    assert all(torch.equal(x, y) for x, y in zip(*momenta, strict=True))
    assert [h['metrics'] for h in a['history']] == [h['metrics'] for h in b['history']]
    masks = [read_masks(tmp_path / name / 'masks') for name in ('whole', 'killed')]
    assert all(np.array_equal(masks[0][name], masks[1][name]) for name in masks[0])


EXAMPLE = '''from simsiam_models.benchmarks import segmentation

segmentation.train('my_masks', 'runs/mine', model='simsiam_resnet50', dataset='folder', batch_size=8)
predictor = segmentation.load('runs/mine')
mask = predictor(['photo.jpg'])[0]  # (H, W): positions in predictor.classes
predictor.save(mask, 'mask.png')
'''


def test_the_example_of_the_docs_runs(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = (Path(__file__).resolve().parents[3] / 'docs/benchmarks/segmentation.md').read_text()
    found = re.search(r'<!-- segment -->\n```python\n(.*?)```', text, re.S)
    assert found[1] == EXAMPLE
    (tmp_path / 'my_masks').symlink_to(scenes)
    (tmp_path / 'photo.jpg').symlink_to(scenes / 'images' / 'val' / '0001.jpg')
    monkeypatch.chdir(tmp_path)
    small = dict(iterations=2, image_size=48, head_channels=12, device='cpu', workers=0, model_args=json.loads(NETWORK))
    real, names = segmentation.train, {}
    monkeypatch.setattr(segmentation, 'train', lambda *args, **flags: real(*args, **flags, **small))
    exec(EXAMPLE.replace('simsiam_resnet50', 'resnet18:random'), names)
    assert names['predictor'].classes == NAMES and np.array_equal(np.asarray(Image.open('mask.png')), names['mask'])
    assert read_record(tmp_path / 'runs' / 'mine' / 'record.json')['benchmark'] == 'segment_fcn_d8'


def test_wrong_flags_from_python_are_one_sentence(scenes: Path, tmp_path: Path):
    with pytest.raises(ValueError, match='unrecognized arguments: --crop 3'):
        segmentation.train(scenes, tmp_path, dataset='folder', model='resnet18:random', crop=3)


def test_test_images_that_also_train_are_named(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    root = shutil.copytree(scenes, tmp_path / 'scenes')
    shutil.copy(root / 'images' / 'train' / '0003.jpg', root / 'images' / 'val' / '0001.jpg')
    shutil.copy(root / 'masks' / 'train' / '0003.png', root / 'masks' / 'val' / '0001.png')
    assert main(['segment', str(root), *SMALL, '--batch-size', '99', '--output', str(tmp_path / 'run')]) == 1
    assert '1 of 3 test images are also training images, byte for byte' in capsys.readouterr().out


def test_the_voc_layout_runs_every_path(tmp_path: Path, capsys: pytest.CaptureFixture):
    root = unpack_real('voc_mini.zip', tmp_path) / 'VOCdevkit'
    flags = [
        'segment', str(root), *TINY, '--iterations', '2', '--batch-size', '4', '--image-size', '64', '--test', 'slide']
    assert main([*flags, '--output', str(tmp_path / 'run')]) == 1
    assert 'not the complete VOC2012 with SBD: 27 training images found' in capsys.readouterr().err
    assert main([*flags, '--allow-partial', '--output', str(tmp_path / 'run')]) == 0
    record = read_record(tmp_path / 'run' / 'record.json')
    assert record['benchmark'] == 'voc12aug_fcn_r50_d8_512_20k' and record['data']['counts']['classes'] == 21
    assert 'expected 10,582' in record['not_comparable'] and not record['difference']
    published = {entry['tag']: entry for entry in record['published'] if entry['same_protocol']}
    assert published['mm_ep100_bgr_in1k']['metrics']['mIoU'] == 48.35
    assert published['mm_ep200_bgr_in1k']['metrics']['mIoU'] == 46.27
    assert all('outlier' in published[tag]['warning'] for tag in ('mm_ep100_bgr_in1k', 'mm_ep200_bgr_in1k'))
    assert 'outlier' in capsys.readouterr().out
    assert len(list((tmp_path / 'run' / 'masks').glob('*.png'))) == 27
