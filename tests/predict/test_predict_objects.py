"""`simsiam predict` with detectors and segmenters: it writes what their predictors return, image by image."""
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import write_scenes
from shapes import write_shapes

from simsiam_models.benchmarks import detection, segmentation
from simsiam_models.cli import main

NETWORK = '{"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32], "stem_width": 8, "stem_type": "deep"}'
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp('shapes'), 8, 3, side=64)


@pytest.fixture(scope='module')
def detector(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip('pycocotools')
    folder = tmp_path_factory.mktemp('detect') / 'run'
    torch.set_num_threads(1)
    assert main([
        'detect', str(shapes), '--dataset', 'folder', '--model', 'resnet10t:random', '--iterations', '2',
        '--batch-size', '4', '--image-size', '64', '--rois', '16', '--pool-size', '4', '--proposals', '50', '--lr',
        '0.01', '--device', 'cpu', '--workers', '0', '--protocol', 'coco_c4_1x', '--output', str(folder)]) == 0
    return folder


@pytest.fixture(scope='module')
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp('scenes'), 8, 3)


@pytest.fixture(scope='module')
def segmenter(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('segment') / 'run'
    torch.set_num_threads(1)
    assert main([
        'segment', str(scenes), '--dataset', 'folder', '--model', 'resnet18:random', '--model-args', NETWORK,
        '--head-channels', '12', '--device', 'cpu', '--workers', '0', '--iterations', '3', '--batch-size', '4',
        '--image-size', '48', '--output', str(folder)]) == 0
    return folder


def predict(model: Path | str, *args: Path | str) -> int:
    return main(['predict', str(model), *map(str, args), '--device', 'cpu'])


def read_rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline='') as f:
        return list(csv.DictReader(f))


@pytest.fixture
def images(shapes: Path, tmp_path: Path) -> list[Path]:
    """Three images, the second of which cannot be read."""
    (tmp_path / 'torn.png').write_bytes(b'no image')
    return [shapes / 'val' / '0002.png', tmp_path / 'torn.png', shapes / 'val' / '0000.png']


def test_boxes_in_cocos_form_are_those_of_the_predictor(detector, images, tmp_path):
    from pycocotools.coco import COCO

    assert predict(detector, *images, '--score', '0.1', '--output', tmp_path / 'boxes.json') == 0
    written = json.loads((tmp_path / 'boxes.json').read_text())
    assert [i['file_name'] for i in written['images']] == list(map(str, images))
    assert 'cannot be read' in written['images'][1]['error'] and 'width' not in written['images'][1]
    found = detection.load(detector, device='cpu')([images[0], images[2]], score=0.1)
    coco = COCO()
    coco.dataset = written
    coco.createIndex()
    for at, one, file in ((1, found[0], images[0]), (3, found[1], images[2])):
        entry, rows = coco.imgs[at], coco.loadAnns(coco.getAnnIds(imgIds=at))
        assert (entry['width'], entry['height']) == Image.open(file).size and len(rows) == len(one['scores']) > 0
        boxes = np.array([r['bbox'] for r in rows])
        boxes[:, 2:] += boxes[:, :2]
        assert np.allclose(boxes, one['boxes'], atol=0.02)
        assert np.allclose([r['score'] for r in rows], one['scores'], atol=1e-6)
        assert [coco.cats[r['category_id']]['name'] for r in rows] == one['names']
        assert all(np.array_equal(coco.annToMask(r), m) for r, m in zip(rows, one['masks'], strict=True))
    assert not coco.getAnnIds(imgIds=2)


def test_a_csv_has_a_row_for_each_box_and_one_for_an_image_without_any(detector, images, tmp_path, capsys):
    assert predict(detector, *images, '--score', '0.1', '--output', tmp_path / 'boxes.csv') == 0
    assert '1 of 3 images cannot be read' in capsys.readouterr().err
    rows = read_rows(tmp_path / 'boxes.csv')
    assert list(rows[0]) == ['path', 'label', 'score', 'x1', 'y1', 'x2', 'y2', 'error']
    found = detection.load(detector, device='cpu')([images[0], images[2]], score=0.1)
    for file, one in ((images[0], found[0]), (images[2], found[1])):
        own = [row for row in rows if row['path'] == str(file)]
        assert [row['label'] for row in own] == one['names']
        corners = [[float(row[k]) for k in ('x1', 'y1', 'x2', 'y2')] for row in own]
        assert np.allclose(corners, one['boxes'], atol=0.01)
    torn = [row for row in rows if row['path'] == str(images[1])]
    assert len(torn) == 1 and torn[0]['error'] and not torn[0]['label']
    assert predict(detector, *images, '--score', '1', '--output', tmp_path / 'none.csv') == 0
    rows = read_rows(tmp_path / 'none.csv')
    assert [(row['path'], row['label'], bool(row['error'])) for row in rows] == [
        (str(file), '', i == 1) for i, file in enumerate(images)]
    capsys.readouterr()
    assert predict(detector, *images, '--score', '0.1') == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(read_rows(tmp_path / 'boxes.csv'))


def test_masks_are_those_of_the_predictor_under_the_names_of_the_images(segmenter, scenes, tmp_path):
    files = sorted((scenes / 'images' / 'val').iterdir())
    (tmp_path / 'torn.jpg').write_bytes(b'no image')
    assert predict(segmenter, scenes / 'images', tmp_path / 'torn.jpg', '--output', tmp_path / 'masks') == 0
    rows = read_rows(tmp_path / 'masks' / 'predictions.csv')
    assert len(rows) == 12 and not rows[-1]['mask'] and 'cannot be read' in rows[-1]['error']
    predictor = segmentation.load(segmenter, device='cpu')
    masks = {row['path']: row['mask'] for row in rows}
    for file, expected in zip(files, predictor(files), strict=True):
        written = Image.open(tmp_path / 'masks' / masks[str(file)])
        assert written.mode == 'P' and np.array_equal(np.asarray(written), np.array(predictor.ids)[expected])
        assert masks[str(file)].endswith(f'val/{file.stem}.png')
    lines = (tmp_path / 'masks' / 'classes.txt').read_text().splitlines()
    assert lines == [f'{i} {name}' for i, name in zip(predictor.ids, predictor.classes, strict=True)]


def test_images_that_differ_in_their_ending_have_masks_of_their_own(segmenter, scenes, tmp_path):
    image = Image.open(next((scenes / 'images' / 'val').iterdir()))
    (tmp_path / 'in').mkdir()
    image.save(tmp_path / 'in/a.jpg')
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'in/a.png')
    assert predict(segmenter, tmp_path / 'in', '--output', tmp_path / 'out') == 0
    sizes = [Image.open(tmp_path / 'out' / name).size for name in ('a.jpg.png', 'a.png.png')]
    assert sizes == [image.size, image.size[::-1]]


def test_no_mask_leaves_its_folder_or_replaces_an_input(segmenter, scenes, tmp_path, capsys):
    image = Image.open(next((scenes / 'images' / 'val').iterdir()))
    for place in ('photos', 'other'):
        (tmp_path / place).mkdir()
        image.save(tmp_path / place / f'{place}.png')
    before = (tmp_path / 'photos/photos.png').read_bytes()
    assert predict(segmenter, tmp_path / 'photos', '--output', tmp_path / 'photos') == 1
    assert 'would overwrite photos.png, which is one of IMAGES; name another folder' in capsys.readouterr().err
    (tmp_path / 'photos/classes.txt').write_text('../other/other.png\nphotos.png\n')
    assert predict(segmenter, tmp_path / 'photos/classes.txt', '--output', tmp_path / 'photos') == 1
    assert 'is one of IMAGES; name another folder' in capsys.readouterr().err
    assert predict(segmenter, tmp_path / 'photos/classes.txt', '--output', tmp_path / 'masks') == 0
    assert sorted(str(p.relative_to(tmp_path / 'masks')) for p in (tmp_path / 'masks').rglob('*.png')) == [
        'other/other.png', 'photos/photos.png']
    assert (tmp_path / 'photos/photos.png').read_bytes() == before


@pytest.mark.parametrize(('kind', 'args', 'said'), [
    ('segmenter', [], '--output: '),
    ('segmenter', ['--output', 'x.csv'], 'must be a folder for the masks, since'),
    ('segmenter', ['--output', 'x', '--top-k', '3'], 'applies only to a classifier, but'),
    ('detector', ['--top-k', '3'], '--top-k 3: applies only to a classifier, but'),
    ('detector', ['--score', '2'], '--score 2.0: must be from 0 to 1'),
    ('detector', ['--output', 'x.txt'], '--output x.txt: the file name must end in one of .csv, .json, .parquet')])
def test_flags_of_another_kind_of_model_are_refused(kind, args, said, request, images, capsys):
    assert predict(request.getfixturevalue(kind), images[0], *args) == 1
    error = capsys.readouterr().err
    assert said in error and error.count('\n') == 1
