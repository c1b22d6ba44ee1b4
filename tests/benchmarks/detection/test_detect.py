"""`simsiam detect` as a user runs it: training, continuing, measuring again, using what it wrote."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from shapes import IDS, NAMES, write_shapes

from simsiam_models.benchmarks import detection
from simsiam_models.benchmarks.backbone import load_backbone
from simsiam_models.benchmarks.results.record import read_record
from simsiam_models.cli import main

SMALL = [
    '--dataset', 'folder', '--model', 'resnet10t:random', '--iterations', '4', '--batch-size', '4', '--image-size',
    '64', '--rois', '16', '--pool-size', '4', '--proposals', '50', '--lr', '0.01', '--device', 'cpu', '--workers', '0']
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp('shapes'), 12, 3, side=64)


@pytest.fixture(scope='module')
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('detect') / 'run'
    torch.set_num_threads(1)
    assert main(['detect', str(shapes), *SMALL, '--protocol', 'coco_c4_1x', '--output', str(folder)]) == 0
    return folder


def test_a_run_leaves_a_record_predictions_a_sheet_and_a_table_of_classes(trained: Path):
    record = read_record(trained / 'record.json')
    assert record['benchmark'] == 'detect_maskrcnn_c4' and {'box_AP', 'mask_AP'} <= record['metrics'].keys()
    changed = record['protocol']['changed']
    assert changed['batch_size'] == {'used': 4, 'published': 16} and changed['rois'] == {'used': 16, 'published': 512}
    assert record['data']['counts'] == {'train': 12, 'test': 3, 'classes': 3}
    predictions = json.loads((trained / 'predictions.json').read_text())
    assert {p['category_id'] for p in predictions} <= set(IDS) and {p['image_id'] for p in predictions} <= {3, 13, 23}
    assert all(p['segmentation']['size'] in ([48, 64], [64, 48]) for p in predictions)
    assert Image.open(trained / 'sheet.jpg').width > 500
    rows = (trained / 'per_class.csv').read_text().splitlines()
    assert rows[0].startswith('class,') and len(rows) == 4
    logged = [json.loads(line) for line in (trained / 'log.jsonl').read_text().splitlines()]
    assert {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox', 'loss_mask', 'lr'} <= logged[0].keys()


def test_a_trained_detector_finds_the_same_objects_in_files_arrays_and_pil_images(trained: Path, shapes: Path):
    predictor, file = detection.load(trained, device='cpu'), shapes / 'val' / '0001.png'
    image = Image.open(file)
    found = predictor([file, image, np.asarray(image)], score=0.1)
    assert set(predictor.classes) == set(NAMES)
    for one in found:
        assert one['boxes'].shape == (len(one['scores']), 4) and one['masks'].shape[1:] == (image.height, image.width)
        assert (one['scores'] >= 0.1).all() and (np.diff(one['scores']) <= 0).all()
        assert one['names'] == [predictor.classes[i] for i in one['labels']]
        assert np.array_equal(one['boxes'], found[0]['boxes']) and np.array_equal(one['masks'], found[0]['masks'])
    in_record = [p for p in json.loads((trained / 'predictions.json').read_text()) if p['image_id'] == 13]
    kept = [p for p in in_record if p['score'] >= 0.1]
    assert len(kept) == len(found[0]['scores'])
    assert np.allclose(sorted(p['score'] for p in kept), sorted(found[0]['scores'].tolist()))


def test_what_is_no_image_is_refused(trained: Path):
    predictor = detection.load(trained, device='cpu')
    with pytest.raises(ValueError, match='a list of images'):
        predictor('a.jpg')
    with pytest.raises(ValueError, match=r'\(H, W, 3\) of uint8'):
        predictor([np.zeros((8, 8))])


def test_the_backbone_of_a_trained_detector_loads_in_timm(trained: Path):
    model = timm.create_model(f'local-dir:{trained / "backbone"}', pretrained=True)
    state = torch.load(trained / 'checkpoint.pth', weights_only=True)['model']
    for key, value in model.state_dict().items():
        part = 'roi_head.shared_head.' if key.startswith('layer4') else 'backbone.'
        assert torch.equal(value, state[part + key]), key
    start = load_backbone('resnet10t:random').model.state_dict()
    assert sum(not torch.equal(v, start[k]) for k, v in model.state_dict().items()) == len(start)  # nothing was frozen
    assert load_backbone(str(trained)).digest == load_backbone(str(trained / 'backbone')).digest


def test_eval_only_measures_what_the_run_measured(trained: Path, shapes: Path, tmp_path: Path):
    for i, name in enumerate((trained, trained / 'checkpoint.pth')):
        out = tmp_path / str(i)
        assert main(['detect', str(shapes), '--dataset', 'folder', '--eval-only', str(name), '--device', 'cpu',
                     '--output', str(out)]) == 0
        again, first = read_record(out / 'record.json'), read_record(trained / 'record.json')
        assert all(again[key] == first[key] for key in ('metrics', 'protocol', 'weights', 'benchmark'))
        assert (out / 'predictions.json').read_bytes() == (trained / 'predictions.json').read_bytes()


def test_eval_only_reads_the_data_by_the_rules_of_the_run(
    trained: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture,
):
    args = ['detect', str(shapes), '--dataset', 'folder', '--eval-only', str(trained), '--device', 'cpu', '--output']
    for flag, value, own in (('variant', 'detectron2', 'mmdet'), ('protocol', 'coco_fpn_1x', 'coco_c4_1x')):
        assert main([*args, str(tmp_path / flag), f'--{flag}', value]) == 1
        assert f'trained with --{flag} {own}, not {value}; leave --{flag} out' in capsys.readouterr().err


def test_test_images_without_outlines_are_drawn_and_measured_by_their_boxes(
    trained: Path, shapes: Path, tmp_path: Path,
):
    (data := tmp_path / 'data').mkdir()
    for part in ('train', 'val'):
        (data / part).symlink_to(shapes / part)
        content = json.loads((shapes / f'{part}.json').read_text())
        if part == 'val':
            del content['annotations'][0]['segmentation']
        (data / f'{part}.json').write_text(json.dumps(content))
    assert main(['detect', str(data), '--dataset', 'folder', '--eval-only', str(trained), '--device', 'cpu', '--output',
                 str(tmp_path / 'out')]) == 0
    found = read_record(tmp_path / 'out' / 'record.json')['metrics']
    assert 'box_AP' in found and 'mask_AP' not in found and (tmp_path / 'out' / 'sheet.jpg').is_file()


def test_the_same_command_again_trains_no_further(trained: Path, shapes: Path, capsys: pytest.CaptureFixture):
    before = (trained / 'detector' / 'model.safetensors').read_bytes()
    assert main(['detect', str(shapes), *SMALL, '--protocol', 'coco_c4_1x', '--output', str(trained)]) == 0
    assert 'continuing after iteration 4 of 4' in capsys.readouterr().out
    assert (trained / 'detector' / 'model.safetensors').read_bytes() == before


@pytest.mark.parametrize(('flags', 'said'), [
    (['--lr', '0.02'], 'lr: 0.01 there, 0.02 here'), (['--rois', '17'], 'rois: 16 there, 17 here'),
    (['--model', 'resnet18:random'], 'weights: '), (['--seed', '1'], 'seed: 0 there, 1 here')])
def test_another_run_does_not_continue_this_one(
    trained: Path, shapes: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture,
):
    assert main(['detect', str(shapes), *SMALL, '--protocol', 'coco_c4_1x', *flags, '--output', str(trained)]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(('flags', 'said'), [
    (['--model', 'vit_tiny_patch16_224:random'], 'need a ResNet of timm'),
    (['--model', 'simsiam_resnet18_cifar:random'], 'strides 4, 8, 16 and 32'),
    (['--rois', '0'], '--rois 0: must be at least 1'), (['--image-size', '8'], '--image-size 8: must be at least 32'),
    (['--lr', '-1'], '--lr -1.0: must be above 0'), (['--amp', 'float16'], 'float16 does not run on a CPU'),
    (['--protocol', 'coco_fpn_1x', '--variant', 'detectron2'], "MoCo's fasterrcnn_c4"),
    (['--model', 'nothing_like_this'], 'neither a model of timm nor a file')])
def test_wrong_flags_are_refused_in_one_sentence(
    shapes: Path, tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture,
):
    assert main(['detect', str(shapes), *SMALL, '--output', str(tmp_path / 'run'), *flags]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count('\n') == 1


def test_a_detector_of_other_classes_is_not_measured(trained: Path, shapes: Path, tmp_path: Path, capsys: Any):
    content = json.loads((shapes / 'val.json').read_text())
    content['categories'][0]['name'] = 'circle'
    (data := tmp_path / 'data').mkdir()
    for part in ('train', 'val'):
        (data / part).symlink_to(shapes / part)
        other = json.loads((shapes / f'{part}.json').read_text()) | {'categories': content['categories']}
        (data / f'{part}.json').write_text(json.dumps(other))
    assert main(['detect', str(data), '--dataset', 'folder', '--eval-only', str(trained), '--device', 'cpu',
                 '--output', str(tmp_path / 'again')]) == 1
    assert 'give the data set that it was trained on' in capsys.readouterr().err


def test_the_example_of_the_docs_runs(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = (Path(__file__).resolve().parents[3] / 'docs/benchmarks/detection.md').read_text()
    code = text.split('<!-- detect -->\n```python\n')[1].split('```')[0]
    (tmp_path / 'my_objects').symlink_to(shapes)
    (tmp_path / 'photo.jpg').symlink_to(shapes / 'val' / '0000.png')
    monkeypatch.chdir(tmp_path)
    assert 'simsiam_resnet50' in code
    small = dict(iterations=2, batch_size=4, image_size=64, rois=8, pool_size=2, proposals=20, device='cpu', workers=0)
    real = detection.train
    monkeypatch.setattr(detection, 'train', lambda *args, **flags: real(*args, **flags, **small))
    exec(code.replace('simsiam_resnet50', 'resnet10t:random'), {})
    assert read_record(tmp_path / 'runs' / 'mine' / 'record.json')['benchmark'] == 'detect_maskrcnn_fpn'


def test_wrong_flags_from_python_are_one_sentence(shapes: Path, tmp_path: Path):
    with pytest.raises(ValueError, match='unrecognized arguments: --roi 3'):
        detection.train(shapes, tmp_path, dataset='folder', model='resnet10t:random', roi=3)


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


def test_a_killed_run_ends_in_the_bits_of_an_undisturbed_one(shapes: Path, tmp_path: Path):
    often = ['--eval-every', '2', '--checkpoint-minutes', '0']
    flags = ['detect', str(shapes), *SMALL, '--protocol', 'coco_c4_1x', *often]
    assert main([*flags, '--output', str(tmp_path / 'whole')]) == 0
    root = Path(__file__).resolve().parents[3]
    killed = subprocess.run(  # after an evaluation, inside the epoch
        [sys.executable, '-c', KILLED, '3', *flags, '--output', str(tmp_path / 'killed')], cwd=root, check=False,
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (tmp_path / 'killed' / 'lock').unlink(missing_ok=True)
    assert main([*flags, '--output', str(tmp_path / 'killed')]) == 0
    a, b = (torch.load(tmp_path / name / 'checkpoint.pth', weights_only=True) for name in ('whole', 'killed'))
    for key, value in a['model'].items():
        assert torch.equal(value, b['model'][key]), key
    momenta = [[s['momentum_buffer'] for s in x['optimizer']['state'].values()] for x in (a, b)]
    assert all(torch.equal(x, y) for x, y in zip(*momenta, strict=True))
    assert [h['metrics'] for h in a['history']] == [h['metrics'] for h in b['history']]
    logs = [(tmp_path / name / 'log.jsonl').read_text().splitlines() for name in ('whole', 'killed')]
    losses = [[json.loads(line).get('loss') for line in lines] for lines in logs]
    assert losses[0] == losses[1]
