"""`simsiam predict` with classifiers: what it says equals what fine-tuning measured, whatever form images come in."""
import csv
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, write_digits
from PIL import Image

from simsiam_models.benchmarks.results.record import read_record
from simsiam_models.cli import main
from simsiam_models.weights import sources, tensorfile
from simsiam_models.weights.export import make_timm_config

NETWORK = '{"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64], "stem_width": 8, "stem_type": "deep"}'
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 digits in train/ and 60 in val/, in class folders."""
    root = tmp_path_factory.mktemp('digits')
    write_digits(root / 'train', 240)
    for file in sorted(write_digits(root / 'all', 300).glob('*/*')):
        if int(file.stem) >= 240:
            target = root / 'val' / file.parent.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, target)
    shutil.rmtree(root / 'all')
    return root


@pytest.fixture(scope='module')
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('finetune') / 'run'
    torch.set_num_threads(1)
    assert main([
        'finetune', str(digits), '--model', 'resnet18:random', '--model-args', NETWORK, '--image-size', '32',
        '--resize', '36', '--device', 'cpu', '--workers', '0', '--epochs', '3', '--batch-size', '32', '--lr', '0.06',
        '--warmup-epochs', '1', '--layer-decay', '0.9', '--flip-p', '0', '--crop-scale', '0.7', '1', '--output',
        str(folder)]) == 0
    return folder


def predict(model: Path | str, *args: Path | str) -> int:
    return main(['predict', str(model), *map(str, args), '--device', 'cpu'])


def read_rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline='', errors='surrogateescape') as f:
        return list(csv.DictReader(f))


def write_classifier(folder: Path, classes: int, names: list[str] | None = None, **config: object) -> Path:
    """Exports an untrained network of timm for `local-dir:`."""
    torch.manual_seed(0)
    model = timm.create_model('resnet18', num_classes=classes, **json.loads(NETWORK))
    overlay = {'input_size': [3, 32, 32], 'crop_pct': 1.0, **config}
    folder.mkdir(parents=True)
    tensorfile.write(folder / 'model.safetensors', model.state_dict())
    described = make_timm_config(model, 'resnet18', classes, overlay, json.loads(NETWORK))
    (folder / 'config.json').write_text(json.dumps({**described, **({'label_names': names} if names else {})}))
    return folder


# --- what it says

def test_predictions_equal_the_accuracy_in_the_record_of_fine_tuning_exactly(digits, trained, tmp_path):
    out = tmp_path / 'out.csv'
    assert predict(trained, digits / 'val', '--output', out) == 0
    rows = read_rows(out)
    right = [row['label'] == Path(row['path']).parent.name for row in rows]
    metrics = read_record(trained / 'record.json')['metrics']
    top5 = [Path(row['path']).parent.name in [row['label'], *(row[f'label{i}'] for i in range(2, 6))] for row in rows]
    assert len(rows) == 60 and 100 * sum(right) / 60 == pytest.approx(metrics['top1'], abs=1e-9)
    assert 100 * sum(top5) / 60 == pytest.approx(metrics['top5'], abs=1e-9)
    of_class = {row['class']: int(row['right']) for row in read_rows(trained / 'per_class.csv')}
    found = {name: 0 for name in of_class}
    for row, hit in zip(rows, right, strict=True):
        found[Path(row['path']).parent.name] += hit
    assert found == of_class


def test_probabilities_are_those_of_plain_timm(digits, trained, tmp_path):
    out = tmp_path / 'out.json'
    assert predict(trained, digits / 'val', '--output', out, '--top-k', '10') == 0
    model = timm.create_model(f'local-dir:{trained}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    for row in json.loads(out.read_text())[:12]:
        with torch.no_grad():
            p = model(transform(Image.open(row['path']).convert('RGB'))[None]).softmax(1)[0]
        assert row['label'] == model.pretrained_cfg['label_names'][int(p.argmax())]
        assert row['probability'] == pytest.approx(p.max().item(), abs=1e-4)
        assert sum(row[f'probability{i or ""}'] for i in ('', *range(2, 11))) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize('config', [
    {'interpolation': 'bicubic', 'crop_pct': 0.7}, {'crop_mode': 'squash'}, {'mean': [0.1] * 3, 'std': [0.5] * 3},
    {'input_size': [3, 48, 64]}])
def test_preprocessing_is_the_one_that_is_stored(config, digits, tmp_path):
    model = write_classifier(tmp_path / 'model', 7, **config)
    plain = timm.create_model(f'local-dir:{model}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(plain))
    file = next((digits / 'val').glob('*/*.png'))
    Image.open(file).resize((70, 50)).save(tmp_path / 'wide.png')
    assert predict(model, tmp_path / 'wide.png', '--output', tmp_path / 'out.json', '--top-k', '7') == 0
    with torch.no_grad():
        p = plain(transform(Image.open(tmp_path / 'wide.png').convert('RGB'))[None]).softmax(1)[0]
    row = json.loads((tmp_path / 'out.json').read_text())[0]
    assert int(row['label']) == int(p.argmax()) and row['probability'] == pytest.approx(p.max().item(), abs=1e-5)


@pytest.mark.parametrize('flags', [['--batch-size', '1'], ['--batch-size', '7', '--workers', '3'], ['--workers', '0']])
def test_rows_keep_the_order_of_the_input_whatever_the_batch(flags, digits, trained, tmp_path):
    files = sorted((digits / 'val').glob('*/*'), key=lambda f: f.name[::-1])
    bad = tmp_path / 'torn.png'
    bad.write_bytes(b'no image')
    files[5:5] = [bad]
    assert predict(trained, *files, '--output', tmp_path / 'out.csv', *flags) == 0
    rows = read_rows(tmp_path / 'out.csv')
    assert [row['path'] for row in rows] == list(map(str, files))
    assert predict(trained, digits / 'val', '--output', tmp_path / 'folder.csv') == 0
    of_folder = {row['path']: row for row in read_rows(tmp_path / 'folder.csv')}
    for row in rows[:5] + rows[6:]:
        assert row['label'] == of_folder[row['path']]['label']
        assert float(row['probability']) == pytest.approx(float(of_folder[row['path']]['probability']), abs=1e-4)


# --- forms of images

def test_files_folders_patterns_lists_and_tables_name_the_same_images(digits, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(digits)
    folder, files = 'val/3', sorted(map(str, Path('val/3').iterdir()))
    (tmp_path / 'list.txt').write_text(''.join(f'{digits / file}\n' for file in files))
    (tmp_path / 'list.csv').write_text('path,other\n' + ''.join(f'{digits / file},1\n' for file in files))
    expected = None
    for images in ([folder], files, ['val/3/*'], ['val/**/3/*'], [tmp_path / 'list.txt'], [tmp_path / 'list.csv']):
        assert predict(trained, *images, '--output', tmp_path / 'out.csv') == 0
        rows = [[os.path.relpath(row['path']), row['label'], row['probability']] for row in
                read_rows(tmp_path / 'out.csv')]
        expected = expected or rows
        assert rows == expected and [row[0] for row in rows] == files
    assert predict(trained, files[1], 'val/3', tmp_path / 'list.txt', files[0], '--output', tmp_path / 'out.csv') == 0
    paths = [os.path.relpath(row['path']) for row in read_rows(tmp_path / 'out.csv')]
    assert paths == [files[1], *files, *files, files[0]]


def test_folders_are_read_with_all_below_them_and_what_is_no_image_is_named(digits, trained, tmp_path, capsys, caplog):
    file = next((digits / 'val').glob('*/*.png'))
    for place in ('a.png', 'b/c/d.png', 'b/e.png', 'train/f.png', 'val/g.png'):
        (tmp_path / 'photos' / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / 'photos' / place)
    (tmp_path / 'photos/b/notes.md').write_text('no image')
    for images in (tmp_path / 'photos', f'{tmp_path}/photos/**', f'{tmp_path}/pho*'):
        caplog.clear()
        assert predict(trained, images, '--output', tmp_path / 'out.csv') == 0
        found = [row['path'].removeprefix(f'{tmp_path}/photos/') for row in read_rows(tmp_path / 'out.csv')]
        assert found == ['a.png', 'b/c/d.png', 'b/e.png', 'train/f.png', 'val/g.png']
        assert 'label' not in caplog.text
        assert 'files without an image extension, skipped: 1' in caplog.text or '/**' not in str(images)


def test_parquet_files_of_images_are_read_with_all_their_rows(digits, trained, tmp_path):
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    pytest.importorskip('datasets')
    files = sorted((digits / 'val').glob('*/*'))[:6]
    images = [{'bytes': f.read_bytes(), 'path': f.name} for f in files]
    pq.write_table(pa.table({'image': images}), tmp_path / 'x.parquet')
    assert predict(trained, tmp_path / 'x.parquet', '--output', tmp_path / 'a.csv') == 0
    assert predict(trained, *files, '--output', tmp_path / 'b.csv') == 0
    a, b = read_rows(tmp_path / 'a.csv'), read_rows(tmp_path / 'b.csv')
    assert [(r['label'], r['probability']) for r in a] == [(r['label'], r['probability']) for r in b]


# --- unreadable images

def test_unreadable_images_are_named_and_have_a_row_without_a_prediction(digits, trained, tmp_path, capsys):
    good = next((digits / 'val').glob('*/*.png'))
    (tmp_path / 'torn.jpg').write_bytes(good.read_bytes()[:60])
    (tmp_path / 'list.txt').write_text(f'{tmp_path}/torn.jpg\n{good}\nmissing.png\n')
    assert predict(trained, tmp_path / 'list.txt', '--output', tmp_path / 'out.csv') == 0
    torn, fine, missing = read_rows(tmp_path / 'out.csv')
    assert not fine['error'] and fine['label']
    for row, name in ((torn, 'torn.jpg'), (missing, 'missing.png')):
        assert name in row['path'] and 'cannot be read' in row['error']
        assert not [v for k, v in row.items() if k not in ('path', 'error') and v]
    said = capsys.readouterr().err
    assert 'torn.jpg: cannot be read' in said and 'missing.png: cannot be read' in said
    assert '2 of 3 images cannot be read and have no prediction\n' in said
    assert predict(trained, tmp_path / 'list.txt') == 0
    assert re.search(r'torn\.jpg +cannot be read\n', capsys.readouterr().out)


def test_the_exit_status_tells_only_that_no_image_could_be_read(trained, tmp_path, capsys):
    for i in range(25):
        (tmp_path / f'{i}.png').write_bytes(b'no image')
    for out in ('out.csv', 'out.json', 'out.parquet'):
        assert predict(trained, f'{tmp_path}/*.png', '--output', tmp_path / out) == 1
        assert '25 of 25 images cannot be read and have no prediction (5 of them not listed' in capsys.readouterr().err
    assert len(read_rows(tmp_path / 'out.csv')) == len(json.loads((tmp_path / 'out.json').read_text())) == 25


# --- tables

def test_csv_json_parquet_and_the_terminal_say_the_same(digits, trained, tmp_path, capsys):
    pq = pytest.importorskip('pyarrow.parquet')
    (tmp_path / 'torn.png').write_bytes(b'no image')
    images = [digits / 'val' / '4', tmp_path / 'torn.png']
    for suffix in ('csv', 'json', 'parquet'):
        assert predict(trained, *images, '--output', tmp_path / f'deep/er/out.{suffix}', '--top-k', '2') == 0
    table = pq.read_table(tmp_path / 'deep/er/out.parquet')
    assert table.column_names == ['path', 'label', 'probability', 'label2', 'probability2', 'error']
    assert [str(t) for t in table.schema.types] == ['string', 'string', 'double', 'string', 'double', 'string']
    as_json, as_csv = (json.loads((tmp_path / 'deep/er/out.json').read_text()), read_rows(tmp_path / 'deep/er/out.csv'))
    assert table.to_pylist() == as_json
    assert as_csv == [{k: '' if v is None else str(v) for k, v in row.items()} for row in as_json]
    capsys.readouterr()
    assert predict(trained, *images, '--top-k', '2') == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ['path', 'label', 'probability', 'others'] and len(lines) == len(as_csv) + 1
    for line, row in zip(lines[1:-1], as_json[:-1], strict=True):
        assert line.split() == [
            row['path'], row['label'], f'{row["probability"]:.4f}', row['label2'], f'{row["probability2"]:.4f}']


def test_names_neither_command_a_terminal_nor_compute_in_a_spreadsheet(digits, tmp_path, monkeypatch, capsys):
    model = write_classifier(tmp_path / 'model', 3, ['=1+1', '\x1b[2Jclear', 'lone \ud800'])
    file = next((digits / 'val').glob('*/*.png'))
    for name in (b'=2+2.png', b'\x1b[31m.png', b'\xff.png'):
        (tmp_path / 'photos').mkdir(exist_ok=True)
        shutil.copy(file, os.path.join(os.fsencode(tmp_path), b'photos', name))
    monkeypatch.chdir(tmp_path / 'photos')
    for suffix in ('csv', 'json', 'parquet'):
        assert predict(model, *os.listdir(), '--output', tmp_path / f'out.{suffix}') == 0
    cells = [cell for row in read_rows(tmp_path / 'out.csv') for cell in row.values()]
    assert {"'=1+1", "'=2+2.png", '\udcff.png', 'lone \ufffd'} <= set(cells)
    assert not [cell for cell in cells if cell.startswith('=')]
    assert '\ufffd.png' in {row['path'] for row in json.loads((tmp_path / 'out.json').read_text())}
    capsys.readouterr()
    assert predict(model, *os.listdir()) == 0
    said = ''.join(capsys.readouterr())
    assert '\\x1b[31m.png' in said and '\x1b' not in said


# --- models

def test_published_classifiers_have_the_names_of_imagenet(digits, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model('simsiam_resnet50', num_classes=1000)
    tensorfile.write(tmp_path / 'lin.safetensors', model.state_dict())
    monkeypatch.setattr(sources, 'fetch', lambda *args, **more: tmp_path / 'lin.safetensors')
    file = next((digits / 'val').glob('*/*.png'))
    names = timm.data.ImageNetInfo().label_descriptions()
    for name in ('mm1x_ep200_lin_in1k', 'simsiam_resnet50.mm1x_ep200_lin_in1k'):
        assert predict(name, file, '--output', tmp_path / 'out.json', '--top-k', '1000') == 0
        row = json.loads((tmp_path / 'out.json').read_text())[0]
        found = [row['label'], *(row[f'label{i}'] for i in range(2, 1001))]
        assert len(set(found)) == 1000 and {re.sub(r' \(n\d+\)$', '', name) for name in found} == set(names)


def test_a_classifier_without_names_gets_numbers_and_says_so(digits, tmp_path, caplog):
    model = write_classifier(tmp_path / 'model', 1000)
    assert predict(model, digits / 'val/1', '--output', tmp_path / 'out.csv') == 0
    assert all(row['label'].isdigit() for row in read_rows(tmp_path / 'out.csv'))
    assert 'has no class names (label_names in config.json)' in caplog.text


def test_backbones_without_a_classifier_are_refused_with_the_way_to_one(digits, tmp_path, capsys):
    run = tmp_path / 'run'
    write_classifier(run / 'backbone', 0)
    for model in (run, run / 'backbone', f'local-dir:{run}/backbone', 'simsiam_resnet50', 'mm_ep200_in1k',
                  'simsiam_resnet18_cifar'):
        assert predict(model, digits / 'val') == 1
        said, name = capsys.readouterr().err, 'simsiam_resnet50.mm_ep200_in1k' if model == 'mm_ep200_in1k' else model
        assert said == (
            f'simsiam: {name}: has no classifier, only features (num_classes 0); train one with `simsiam finetune DATA '
            f'--model {name} --output OUT`, then predict with OUT\n')


@pytest.mark.parametrize(('model', 'config', 'said'), [
    ('nothing', None, 'neither a folder nor a timm model'),
    ('.', None, 'no config.json there; name the --output of a finished `simsiam finetune`'),
    ('m', {'label_names': ['a', 'b']}, 'label_names in its configuration: 3 names are needed, not 2 names'),
    ('m', {'label_names': 'abc'}, '3 names are needed, not abc'),
    ('m', {'label_names': [1, True, 'c']}, 'label_names in its configuration: not all are names'),
    ('m', {'mean': 'abc'}, 'mean abc in its configuration: three numbers are needed'),
    ('m', {'std': [-1, -1, -1]}, 'std [-1, -1, -1] in its configuration'),
    ('m', {'input_size': [3, 20000, 20000]}, 'input_size [3, 20000, 20000] in its configuration'),
    ('m', {'crop_pct': 0}, 'crop_pct 0, crop_mode center'), ('m', {'crop_mode': 'zz'}, 'one of center, squash, border'),
    ('m', {'interpolation': 'cubist'}, 'the preprocessing in its configuration cannot be used'),
    ('m', {'crop_pct': 'all'}, 'crop_pct all, crop_mode center'),
    ('m', {'input_size': [1, 32, 32]}, 'm: the classifier cannot be loaded (')])
def test_models_that_cannot_be_used_are_one_sentence(model, config, said, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if config:
        names = config.pop('label_names', None)
        write_classifier(tmp_path / 'm', 3, names, **config)
    assert predict(model, digits / 'val') == 1
    error = capsys.readouterr().err
    assert said in error and error.count('\n') == 1 and error.startswith('simsiam: ')


def test_damaged_weights_are_one_sentence(digits, tmp_path, capsys):
    model = write_classifier(tmp_path / 'model', 3)
    data = (model / 'model.safetensors').read_bytes()
    (model / 'model.safetensors').write_bytes(data[:-100])
    assert predict(model, digits / 'val') == 1
    assert 'it is damaged or was cut off' in capsys.readouterr().err
    state = timm.create_model('resnet18', num_classes=3, **json.loads(NETWORK)).state_dict()
    state['fc.bias'][1] = float('inf')
    tensorfile.write(model / 'model.safetensors', state)
    assert predict(model, digits / 'val') == 1
    assert capsys.readouterr().err.count('\n') == 1


@pytest.mark.parametrize(('args', 'said'), [
    (['gone.jpg'], 'gone.jpg: no such file or folder; IMAGES can be files, folders'),
    (['gone*.jpg'], 'gone*.jpg: this pattern matches no file'), (['*.md'], 'matches 1 files, but no image'),
    (['val', '--output', 'x.xlsx'], '--output x.xlsx: the file name must end in one of .csv, .json, .parquet'),
    (['val', '--output', 'x'], '--output x: the file name must end in one of'),
    (['val/3', '--top-k', '0'], '--top-k 0: must be at least 1'),
    (['val/3', '--top-k', '11'], '--top-k 11: '), (['val/3', '--score', '0.5'], 'applies only to a detector, but'),
    (['val/3', '--batch-size', '0'], '--batch-size 0: must be at least 1'),
    (['list.csv', '--output', 'list.csv'], '--output list.csv is one of IMAGES; name another file'),
    (['val/3', '--output', 'notes.md/x.csv'], '--output notes.md: cannot be written to ('),
    (['hf-stream:a/b'], 'hf-stream:a/b: a stream')])
def test_wrong_arguments_are_one_sentence(args, said, digits, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('simsiam_models.predict.inputs.open_parts', lambda spec: (Streaming(), None, None))
    shutil.copytree(digits / 'val', tmp_path / 'val')
    (tmp_path / 'list.csv').write_text(f'path\n{next((digits / "val").glob("*/*.png"))}\n')
    (tmp_path / 'notes.md').write_text('no image')
    assert predict(trained, *args) == 1
    error = capsys.readouterr().err
    assert said in error and error.count('\n') == 1


class Streaming:
    def samples(self) -> None: ...


def test_a_missing_parquet_library_is_named_before_anything_is_read(trained, digits, monkeypatch, capsys):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    assert predict(trained, digits / 'val', '--output', 'x.parquet') == 1
    assert capsys.readouterr().err == 'simsiam: --output x.parquet needs pyarrow: pip install pyarrow\n'


def test_the_examples_of_the_docs_run(trained, digits, tmp_path, monkeypatch):
    code = (ROOT / 'docs/predict.md').read_text().split('```bash\n')[1].split('```')[0]
    (tmp_path / 'runs').mkdir()
    shutil.copytree(trained, tmp_path / 'runs/photos')
    shutil.copytree(digits / 'val/3', tmp_path / 'new')
    monkeypatch.chdir(tmp_path)
    lines = [line.split('#')[0].strip() for line in code.splitlines()]
    ran = [shlex.split(line) for line in lines if 'runs/photos' in line]
    for words in ran:
        assert words[0] == 'simsiam' and main(words[1:]) == 0
    assert len(ran) == 2 and len(read_rows(tmp_path / 'labels.csv')) == len(list((tmp_path / 'new').iterdir()))


def test_a_picture_of_one_pixel_row_has_a_prediction(trained, tmp_path):
    Image.fromarray(np.zeros((1, 40, 3), np.uint8)).save(tmp_path / 'thin.png')
    assert predict(trained, tmp_path / 'thin.png', '--output', tmp_path / 'out.csv') == 0
    assert read_rows(tmp_path / 'out.csv')[0]['label']
