"""The page of a run: complete, quiet, accessible, and true to what the network was given."""
import csv
import dataclasses
import json
import math
import os
import re
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from browser import HOSTILE, Browser
from conftest import EPS, TINY, put_ghostscript, write_digits
from PIL import Image

from simsiam_models import cli
from simsiam_models.benchmarks.backbone import load_backbone
from simsiam_models.data import TwoViews, open_data
from simsiam_models.data.augment import normalize
from simsiam_models.data.readers.decode import UnreadableError
from simsiam_models.pages.plots import make_distinct
from simsiam_models.report.curves import list_plots, read_recipe, tabulate_figures
from simsiam_models.report.data import open_recorded, open_training_data
from simsiam_models.report.nearest import find_similar, make_networks
from simsiam_models.report.run import describe_state, list_facts, read_run
from simsiam_models.report.views import choose_samples, redraw, to_picture
from simsiam_models.simsiam import create_simsiam

NAMES = [name.replace('/', '|') for name in HOSTILE]
SECTIONS = ['About this run', 'Curves', 'The two views', 'Nearest neighbours before and after training']


def rename_hostile(root: Path) -> Path:
    """Gives files and two class folders hostile names."""
    for folder in sorted(root.iterdir()):
        for file, name in zip(sorted(folder.iterdir()), NAMES, strict=False):
            file.rename(file.with_name(f'{name}{file.suffix}'))
    (root / '0').rename(root / '<b>zero')
    (root / '1').rename(root / 'אחת')
    return root


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rename_hostile(write_digits(tmp_path_factory.mktemp('report') / 'digits', 96))


@pytest.fixture(scope='module')
def run(data: Path) -> Path:
    """The folder of a run that was stopped in its third epoch."""
    torch.set_num_threads(1)
    assert cli.main(['pretrain', str(data), *TINY, '--batch-size', '32', '--workers', '0', '--log-every', '1',
                     '--max-steps', '8', '--output', str(data.parent / 'run')]) == 0
    return data.parent / 'run'


@pytest.fixture(scope='module')
def page(run: Path) -> Path:
    assert cli.main(['report', str(run), '--html', str(run.parent / 'p.html'), '--plots', str(run.parent / 'p')]) == 0
    return run.parent / 'p.html'


@pytest.mark.parametrize('dark', [False, True])
@pytest.mark.parametrize('width', [360, 1200])
def test_the_page_is_quiet_fits_and_is_accessible(page, browser: Browser, width, dark):
    opened = browser.open(page, width, dark)
    opened.page.locator('summary').first.click()
    assert not opened.messages and not opened.requests
    assert opened.overflow() <= 0 and not opened.violations() and not opened.unreached()


def test_the_page_says_what_the_run_is_and_draws_every_figure_of_the_log(run, page, browser: Browser):
    page = browser.open(page).page
    assert page.locator('h2').all_text_contents() == SECTIONS
    facts = dict(zip(page.locator('dt').all_text_contents(), page.locator('dd').all_text_contents(), strict=True))
    args = json.loads((run / 'args.json').read_text())
    assert facts['Command'] == args['command'] and args['versions']['torch'] in facts['Versions']
    assert facts['State'] == 'stopped after 2 of 20 epochs and 2 of 3 steps' and args['digest'] in facts['Data']
    boxes = page.evaluate('() => [...document.querySelectorAll("svg")].map(s => Math.max(...['
                          '...s.querySelectorAll("path")].map(p => p.getBBox().width * p.getBBox().height)))')
    assert len(boxes) == 7 and min(boxes) > 100
    names = {'loss', 'std', 'rank', 'lr', 'knn', 'throughput', 'waiting'}
    assert {file.stem for file in (run.parent / 'p').iterdir()} == names
    page.locator('summary').click()
    assert page.locator('details tbody tr').count() == 8 + 1  # steps, and one measurement of kNN


def test_names_of_files_and_classes_show_as_text(page, browser: Browser):
    page = browser.open(page).page
    text = page.locator('main').text_content()
    assert '<b>zero' in text and '<img src=x onerror=alert(1)>.jpg' in text and '\x1b' not in text
    assert page.locator('main b').all_text_contents() and not page.locator('[onerror], [src="x"]').count()


def test_the_views_are_those_of_the_loader_to_the_bit(run, data):
    found, images = read_run(run), open_data(data)[0]
    epochs, rows = choose_samples(found)
    assert epochs == [0, 1, 2] and 2 <= len(rows) <= 6
    drawn = redraw(found, images, epochs, rows)
    recipe = read_recipe(found)
    loader = TwoViews(images, recipe.augmentation, recipe.batch_size, seed=found.args['seed'])
    for epoch, pair in zip(epochs, drawn, strict=True):
        seen = {}
        for number, batch in enumerate(loader.batches(epoch)):
            indices = batch.indices.copy()
            if epoch < 2 or number < 2:  # what the run reached
                seen |= {int(i): views for i, *views in zip(indices, *loader.finish(batch), strict=True)}
        for i, row in enumerate(rows.tolist()):
            for view in (0, 1):
                assert torch.equal(pair[view][i], seen[row][view])
    assert not torch.equal(drawn[0][0], drawn[0][1]) and not torch.equal(drawn[0][0], drawn[1][0])
    np.testing.assert_allclose(
        normalize(torch.from_numpy(np.array(to_picture(drawn[0][0][0]))).permute(2, 0, 1)[None] / 255)[0],
        drawn[0][0][0], atol=0.01)


def test_neighbours_are_those_of_the_seeds_network_and_of_the_trained_one(run, data):
    found, images = read_run(run), open_data(data)[0]
    some, near, problem = find_similar(found, images)
    recipe = read_recipe(found)
    torch.manual_seed(found.args['seed'])
    before = create_simsiam(recipe.model, dim=64, pred_dim=16, proj_layers=recipe.proj_layers, **recipe.model_args)
    networks = {'before': before.backbone.eval(), 'after': load_backbone(str(run)).model}
    x = normalize(torch.from_numpy(np.stack([images.read(i) for i in range(96)])).permute(0, 3, 1, 2) / 255)
    assert not problem and len(some) == 96
    for name, network in networks.items():
        with torch.no_grad():
            y = torch.nn.functional.normalize(network(x).double(), dim=1)
        cosines = (y @ y.T).fill_diagonal_(-1).sort(descending=True).values[:, :5]
        np.testing.assert_allclose(near[name][1], cosines, atol=1e-5)
    assert not np.array_equal(near['before'][0], near['after'][0])


def test_data_that_are_gone_or_changed_are_named_and_can_be_given(run, data, tmp_path, capsys, browser: Browser):
    copy = tmp_path / 'run'
    shutil.copytree(run, copy)
    args = json.loads((copy / 'args.json').read_text())
    other, sized = write_digits(tmp_path / 'other', 64), tmp_path / 'sized'
    shutil.copytree(data, sized)
    for file in sized.rglob('*.jpg'):
        Image.open(file).save(file, quality=50)
    for name, said in (
            (tmp_path / 'gone', 'gone: no such file or folder'), (other, 'has changed since the'),
            (sized, 'but different file sizes'), (f'pipe:touch {tmp_path}/ran', 'pass the data with --data')):
        (copy / 'args.json').write_text(json.dumps({**args, 'data': str(name)}))
        assert cli.main(['report', str(copy), '--html', str(tmp_path / 'p.html')]) == 0
        page = browser.open(tmp_path / 'p.html').page
        assert page.locator('section').nth(2).text_content().count(said) == 1 and page.locator('svg').count() == 7
        assert not page.locator('img').count() and not (tmp_path / 'ran').exists()
    assert cli.main(['report', str(copy), '--html', str(tmp_path / 'p.html'), '--data', str(data)]) == 0
    assert browser.open(tmp_path / 'p.html').page.locator('img').count() > 50


def test_a_thousand_lines_stay_small_and_damaged_ones_are_counted(run, tmp_path, browser: Browser):
    copy = tmp_path / 'run'
    shutil.copytree(run, copy)
    lines = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
    rng = np.random.default_rng(0)
    many = [{**lines[1], 'epoch': i // 3, 'step': i % 3 + 1, 'loss': rng.normal()} for i in range(1200)]
    many[-1].update(collapsed=True, diagnosis='high learning rate', loss=None)
    (copy / 'log.jsonl').write_text('\n'.join(map(json.dumps, [lines[0], *many])) + '\n{torn')
    (copy / 'args.json').write_text(json.dumps({**json.loads((copy / 'args.json').read_text()), 'epochs': 400}))
    assert cli.main(['report', str(copy), '--html', str(tmp_path / 'p.html')]) == 0
    assert (tmp_path / 'p.html').stat().st_size < 1_500_000
    opened = browser.open(tmp_path / 'p.html')
    text = opened.page.locator('main').text_content()
    assert 'Each curve of 1,200 points is drawn from the lowest and highest point of each of 150 equal groups.' in text
    assert 'its outputs have collapsed (high learning rate)' in text and '1 line of log.jsonl left out' in text
    assert max(map(len, opened.page.locator('svg').evaluate_all('all => all.map(e => e.outerHTML)'))) < 40_000


def test_paper_has_every_section_and_the_numbers(page, browser: Browser):
    page = browser.open(page, 700).page  # about the width of A4 between its margins
    page.emulate_media(media='print')
    heights = page.locator('section').evaluate_all('all => all.map(e => e.getBoundingClientRect().height)')
    assert len(heights) == len(SECTIONS) and min(heights) > 100
    assert page.locator('details table').first.bounding_box()['height'] > 100
    pictures = page.locator('img').evaluate_all('all => all.map(e => e.naturalWidth)')
    assert len(pictures) > 50 and min(pictures) > 0
    assert page.evaluate('() => document.documentElement.scrollWidth - window.innerWidth') <= 0
    assert page.evaluate('() => getComputedStyle(document.body).backgroundColor') == 'rgb(255, 255, 255)'


def test_a_classifier_shows_its_confusion_and_its_surest_mistakes(data, tmp_path, browser: Browser):
    folder, own = tmp_path / 'classifier', tmp_path / 'own'
    shutil.copytree(data, own)
    assert cli.main(['finetune', str(own), '--model', 'resnet10t:random', '--image-size', '32', '--epochs', '1',
                     '--device', 'cpu', '--workers', '0', '--output', str(folder)]) == 0
    with open(folder / 'predictions.csv', newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    wrong = [row for row in rows if row['label'] != row['predicted']]
    os.remove(max(wrong, key=lambda row: float(row['score']))['path'])
    assert cli.main(['report', str(folder), '--html', str(tmp_path / 'p.html')]) == 0
    opened = browser.open(tmp_path / 'p.html', 360)
    page = opened.page
    assert page.locator('h2').all_text_contents() == [
        'About this run', 'Curves', 'Confusion', 'Worst mistakes', 'Results']
    counts = [int(n) for n in page.locator('.matrix tbody td').all_text_contents()]
    assert len(counts) == 100 and sum(counts) == len(rows)
    shown = page.locator('.row b').all_text_contents()
    scores = [float(re.search(r'\((\d\.\d\d)\), label ', text)[1]) for text in shown]
    assert len(shown) == min(24, len(wrong)) and scores == sorted(scores, reverse=True)
    assert page.locator('.none').count() == 1  # the removed one
    assert not opened.messages and opened.overflow() <= 0 and not opened.violations()
    lines = (folder / 'predictions.csv').read_text().splitlines(keepends=True)
    for text in ('', lines[0], ''.join(lines[:-1]), ''.join([*lines, lines[-1]]), *(
            ''.join([*lines[:-1], re.sub('[^,]*$', score, lines[-1])]) for score in ('nan', 'inf', '500', '-3', 'x'))):
        (folder / 'predictions.csv').write_text(text)
        assert cli.main(['report', str(folder), '--html', str(tmp_path / 'q.html')]) == 1, text[-200:]
    (folder / 'predictions.csv').unlink()
    assert cli.main(['report', str(folder), '--html', str(tmp_path / 'p.html')]) == 0
    assert 'predictions.csv is missing' in (tmp_path / 'p.html').read_text()


def fine_tune(name: str) -> None:
    assert cli.main(['finetune', name, '--model', 'resnet10t:random', '--image-size', '32', '--epochs', '1', '--device',
                     'cpu', '--workers', '0', '--output', 'classifier']) == 0


def count_pictures(*args: str) -> tuple[int, int]:
    """Returns how many pictures of mistakes are missing on the page, and how many there should be."""
    assert cli.main(['report', 'classifier', '--html', 'p.html', *args]) == 0
    text = Path('p.html').read_text()
    return text.count('The image cannot be read.'), text.count('class="path"')


def make_own(kind: str, data: Path) -> str:
    """Makes labelled images here, in one of the forms of DATA; returns its name."""
    shutil.copytree(data, 'own')
    if kind == 'list':
        lines = [f'{p.relative_to("own")},c{p.parent.name}' for p in sorted(Path('own').glob('[2-9]/*'))
                 if p.stem.isalnum()]
        Path('own', 'list.csv').write_text('path,label\n' + '\n'.join(lines) + '\n')
    if kind in ('tar', 'pattern'):
        with tarfile.open('own-0.tar', 'w') as archive:
            for i, file in enumerate(sorted(p for p in Path('own').rglob('*') if p.is_file())):
                archive.add(file, f'{i}{file.suffix}')
                file.with_suffix('.cls').write_text(str(i % 2))
                archive.add(file.with_suffix('.cls'), f'{i}.cls')
        shutil.rmtree('own')
    return {'folder': 'own', 'list': 'own/list.csv', 'tar': 'own-0.tar', 'pattern': 'own-{0..0}.tar'}[kind]


@pytest.mark.parametrize('kind', ['folder', 'list', 'tar', 'pattern'])
def test_mistakes_are_found_wherever_the_data_have_moved_and_however_that_is_spelled(kind, data, tmp_path, monkeypatch):
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    name = make_own(kind, data)
    fine_tune(name)
    missing, n = count_pictures()
    assert missing == 0 and n > 2
    (tmp_path / 'new').mkdir()
    for file in Path().glob('own*'):
        shutil.move(file, tmp_path / 'new')
    assert count_pictures() == (n, n)
    assert 'cannot be opened' in Path('p.html').read_text() and 'pass it with --data' in Path('p.html').read_text()
    (tmp_path / 'link').symlink_to(tmp_path / 'new')
    for root in ('../new', str(tmp_path / 'new'), '../link', '../here/../new'):
        assert count_pictures('--data', f'{root}/{name}') == (0, n), root
    (tmp_path / 'other').mkdir()
    monkeypatch.chdir(tmp_path / 'other')
    shutil.copytree('../here/classifier', 'classifier')
    assert count_pictures('--data', f'../new/{name}') == (0, n)


def test_mistakes_are_only_shown_with_their_label(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fine_tune(make_own('folder', data))
    _, n = count_pictures()
    shutil.move('own', 'moved')
    first, *rest = sorted(p for p in Path('moved').iterdir())
    for file in first.iterdir():  # these labels, but other names
        file.rename(file.with_stem(f'{file.stem}x'))
    lines = list(csv.DictReader(Path('classifier/predictions.csv').open(newline='', encoding='utf-8')))
    gone = sum(row['label'] != row['predicted'] and row['label'] == first.name for row in lines)
    assert count_pictures('--data', 'moved') == (gone, n)
    assert (f'{gone} of these images' in Path('p.html').read_text()) == bool(gone)
    for file in rest[0].iterdir():  # these names, but another label
        file.rename(first / file.name)
    rest[0].rmdir()
    gone += sum(row['label'] != row['predicted'] and row['label'] == rest[0].name for row in lines)
    assert count_pictures('--data', 'moved') == (gone, n) and gone
    record = json.loads(Path('classifier/record.json').read_text())
    del record['data']['path']
    Path('classifier/record.json').write_text(json.dumps(record))
    assert count_pictures('--data', 'moved') == (gone, n)
    assert count_pictures() == (n, n) and 'does not name the data' in Path('p.html').read_text()


def test_mistakes_of_validation_images_that_lack_a_class_are_found(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, 'own/train')
    shutil.copytree(data, 'own/val')
    shutil.rmtree('own/val/9')
    fine_tune('own')
    _, n = count_pictures()
    shutil.move('own', 'moved')
    assert count_pictures('--data', 'moved') == (0, n)
    assert '/val/' in open('classifier/predictions.csv').read()


def test_odd_numbers_leave_gaps_in_the_curves(run, tmp_path):
    shutil.copytree(run, tmp_path / 'run')
    odd = [{'epoch': 0, 'knn': {'pixels': 40.0}}, {'epoch': 0, 'step': 1, 'loss': 1e308}, {
        'epoch': 0, 'step': 2, 'loss': -1e308}, {'epoch': 0, 'step': 3, 'loss': True, 'std': 'x', 'lr': [1]}]
    (tmp_path / 'run' / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in odd))
    assert cli.main(['report', str(tmp_path / 'run'), '--html', str(tmp_path / 'p.html')]) == 0
    (tmp_path / 'tuned').mkdir()
    (tmp_path / 'tuned' / 'args.json').write_text('{"benchmark": "finetune"}')
    record = {
        'format': 'simsiam_models benchmark', 'version': 1, 'benchmark': 'finetune', 'protocol': {'name': 'plain'},
        'weights': {'name': 'x', 'tag': None, 'digest': 'ab'}, 'data': {'name': 'folder', 'counts': {'test': 9}},
        'metrics': {'top1': 10.0},
        'extra': {'epochs': [{'epoch': 1, 'top1': 10**400}, {'epoch': 10**400, 'top1': 5}, {'epoch': 2, 'top1': 7}]}}
    (tmp_path / 'tuned' / 'record.json').write_text(json.dumps(record))
    plot, = list_plots(read_run(tmp_path / 'tuned'))
    assert list(plot.series[0].x) == [1, 2] and math.isnan(plot.series[0].y[0]) and plot.series[0].y[1] == 7
    assert cli.main(['report', str(tmp_path / 'tuned'), '--html', str(tmp_path / 'p.html')]) == 0


def test_a_pipe_in_place_of_the_lock_does_not_stop_a_report(run, tmp_path):
    shutil.copytree(run, tmp_path / 'run')
    os.mkfifo(tmp_path / 'run' / 'lock')
    assert describe_state(read_run(tmp_path / 'run')).startswith('stopped')


def test_networks_that_are_not_the_runs_are_left_out(run, tmp_path, monkeypatch):
    found = read_run(run)
    images = open_training_data(found).images
    start = {'source': str(run / 'backbone' / 'gone'), 'sha256': 'f' * 64, 'heads': True, 'tag': None}
    networks, problem = make_networks(found._replace(args={**found.args, 'init_from': start}), read_recipe(found))
    assert 'before' not in networks and 'are not on this machine' in problem
    start['source'] = str(run)
    networks, problem = make_networks(found._replace(args={**found.args, 'init_from': start}), read_recipe(found))
    assert 'before' not in networks and 'cannot be used' in problem and 'ffffffffffffffff' in problem
    for change in (
            {'model': 'os.system'}, {'model_args': {'act_layer': 'nope'}}, {'model_args': {'layers': [10**5] * 4}},
            {'model': 'eva02_enormous_patch14_clip_224', 'model_args': {}}, {'model_args': {'channels': []}}):
        networks, problem = make_networks(found, dataclasses.replace(read_recipe(found), **change))
        assert not networks and 'args.json names cannot be built' in problem, change
    other = timm.create_model('vit_tiny_patch16_224', num_classes=0, depth=1)
    monkeypatch.setattr('simsiam_models.report.nearest.make_networks', lambda *_: ({
        'before': create_simsiam(found.args['model'], **found.args['model_args']).backbone, 'after': other}, ''))
    _, neighbours, problem = find_similar(found, images)
    assert list(neighbours) == ['before'] and 'The network after training does not take these images (' in problem


def test_plots_of_the_same_name_do_not_replace_one_another(run, tmp_path, capsys):
    for name in ('a', 'b'):
        shutil.copytree(run, tmp_path / name / 'run')
    assert cli.main(['report', str(tmp_path / 'a' / 'run'), str(tmp_path / 'b' / 'run'), '--plots',
                     str(tmp_path / 'p')]) == 0
    assert sorted(p.name for p in (tmp_path / 'p').iterdir()) == ['run', 'run_2']
    assert make_distinct(['a_b', 'A_b', '', 'a_b']) == ['a_b', 'A_b_2', '_', 'a_b_3']
    assert cli.main(['report', str(run), '--plots', str(tmp_path / 'p'), '--data', 'x']) == 1
    assert 'only --html shows images' in capsys.readouterr().err
    assert cli.main(['report', str(run), '--html', str(tmp_path / 'p.html'), '--data', 'x']) == 1
    assert 'x: no such file or folder' in capsys.readouterr().err and not (tmp_path / 'p.html').exists()
    assert cli.main(['report', str(run)]) == 1
    assert 'for the page of the run, add --html FILE.html' in capsys.readouterr().err


def test_nobody_can_foresee_where_a_page_is_written(run, tmp_path):
    (tmp_path / 'p.html.part').symlink_to(tmp_path / 'victim')
    os.mkfifo(tmp_path / 'loss.png.part')
    assert cli.main(['report', str(run), '--html', str(tmp_path / 'p.html'), '--plots', str(tmp_path)]) == 0
    assert not (tmp_path / 'victim').exists() and (tmp_path / 'loss.png').is_file()


@pytest.mark.parametrize('name', ['x-{0..99}{0..99}{0..99}{0..99}.tar', '/*/*/*/*.tar', '/proc'])
def test_data_that_a_run_names_are_not_searched_without_end(name):
    parts, problem = open_recorded(name)
    assert not parts and ('on its own' in problem or 'stands for more than 1,000,000 names' in problem)


@pytest.mark.parametrize('name', ['photos [2024]', 'development', 'x*y'])
def test_a_folder_is_opened_whatever_its_name_looks_like(name, data, tmp_path, monkeypatch):
    monkeypatch.setattr('simsiam_models.report.data.SYSTEM', (str(tmp_path / 'dev'),))
    shutil.copytree(data, tmp_path / name)
    parts, problem = open_recorded(str(tmp_path / name))
    assert not problem and len(parts[0]) == 96


def test_a_table_of_urls_is_not_opened_unless_it_is_given(tmp_path, monkeypatch):
    table = pytest.importorskip('pyarrow').table({
        'image': [{'bytes': None, 'path': f'http://127.0.0.1:9/{i}.png'} for i in range(4)], 'label': ['a', 'b'] * 2})
    pytest.importorskip('pyarrow.parquet').write_table(table, tmp_path / 'own.parquet')
    monkeypatch.chdir(tmp_path)
    assert open_recorded('own.parquet')[0] == [] and 'by URLs' in open_recorded('own.parquet')[1]
    images = open_recorded('elsewhere', 'own.parquet')[0][0]
    assert images.names_urls() and len(images) == 4
    with pytest.raises(UnreadableError, match='cannot be read'):
        images.read(0)


def test_records_appear_in_the_tables_of_the_terminal(data, tmp_path, browser: Browser, capsys):
    for model in ('resnet10t', 'resnet18'):
        assert cli.main(['knn', str(data), '--dataset', 'folder', '--model', f'{model}:random', '--image-size', '32',
                         '--device', 'cpu', '--workers', '0', '--cache', str(tmp_path / 'cache'), '--output',
                         str(tmp_path / 'results')]) == 0
    capsys.readouterr()
    assert cli.main(['report', str(tmp_path / 'results'), '--markdown']) == 0
    lines = [line.strip('| ').split(' | ') for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    assert cli.main(['report', str(tmp_path / 'results'), '--html', str(tmp_path / 'p.html')]) == 0
    opened = browser.open(tmp_path / 'p.html', 360, dark=True)
    rows = [row.locator('td').all_text_contents() for row in opened.page.locator('tbody tr').all()]
    assert [row[-4:] for row in rows] == [line[-4:] for line in lines[2:]] and len(rows) == 2
    assert not opened.violations() and opened.overflow() <= 0 and not opened.unreached()


def test_a_detector_shows_its_sheet_and_classes(tmp_path, browser: Browser, monkeypatch):
    Image.new('RGB', (996, 1200), 'gray').save(tmp_path / 'sheet.jpg')
    protocol = {'name': 'coco_fpn_1x', 'variant': 'mmdet', 'iterations': 20, 'batch_size': 2, 'lr': 0.01, 'rois': 64}
    (tmp_path / 'args.json').write_text(json.dumps({
        'benchmark': 'detect', **protocol, 'protocol': protocol, 'source': {'name': 'x'}, 'digest': 'abc'}))
    facts = dict(list_facts(read_run(tmp_path)))
    assert (facts['Model'], facts['Data'], facts['State'], facts['Command']) == (
        'x', 'recorded when the run ends, digest abc', 'stopped before the end', 'recorded when the run ends')
    assert facts['Protocol'] == 'coco_fpn_1x: variant mmdet, iterations 20, batch size 2, lr 0.01'
    record = {
        'format': 'simsiam_models benchmark', 'version': 1, 'benchmark': 'detect_own', 'protocol': {'name': 'plain'},
        'weights': {'name': 'x', 'tag': None, 'digest': 'ab'},
        'data': {'name': 'folder', 'counts': {'train': 9, 'test': 4}, 'digest': 'abc'},
        'metrics': {'AP': 12.5}, 'extra': {'per_class': [{'class': '<b>cat</b>', 'objects': 3, 'AP': 12.5}]}}
    (tmp_path / 'record.json').write_text(json.dumps(record))
    log = [{'step': i, 'loss': 1 / i, 'lr': 2e-5, 'waiting': 0.5} for i in range(1, 9)]
    (tmp_path / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in [*log, {'step': 8, 'AP': 12.5}]))
    plots = {plot.title: plot for plot in list_plots(read_run(tmp_path))}
    assert list(plots) == ['Loss', 'Learning rate', 'Waiting for data, %', 'AP']
    assert set(plots['Waiting for data, %'].series[0].y) == {50} and f'{2e-5:{plots["Learning rate"].form}}' == '2e-05'
    facts = dict(list_facts(read_run(tmp_path)))
    assert facts['State'] == 'finished' and facts['Data'] == 'folder, 9 training images and 4 test images, digest abc'
    assert cli.main(['report', str(tmp_path), '--html', str(tmp_path / 'p.html')]) == 0
    opened = browser.open(tmp_path / 'p.html', 360)
    assert opened.page.locator('img').evaluate('e => e.naturalWidth') == 900
    assert opened.page.locator('td').all_text_contents().count('<b>cat</b>') == 1
    assert not opened.violations() and opened.overflow() <= 0
    for content in (b'torn', EPS, b'DDS ' + bytes(200)):
        ran = put_ghostscript(Path(tempfile.mkdtemp(dir=tmp_path)), monkeypatch)
        (tmp_path / 'sheet.jpg').write_bytes(content)
        assert cli.main(['report', str(tmp_path), '--html', str(tmp_path / 'p.html')]) == 0
        assert 'sheet.jpg cannot be read as an image.' in (tmp_path / 'p.html').read_text() and not ran.exists()


@pytest.mark.parametrize('change', [
    {'images': 0}, {'seed': 'x'}, {'augmentation': {}}, {'extensions': [{}]}, {'recipe': None},
    {'images': -3}, {'data': 5}, {'momentum': 'x'}, {'batch_size': 10 ** 400}, {'seed': 10 ** 400},
    {'lr': float('nan')}, {'epochs': True}, {'size': 0}, {'size': True}, {'blur_sigma': [-5, -5]},
    {'blur_sigma': [1e9, 1e9]}, {'blur_sigma': [float('nan'), 1]}, {'crop_scale': [0, 1]}, {'hue': 7},
    {'brightness': -1}])
def test_a_damaged_run_is_one_sentence(change, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / 'run')
    args = json.loads((run / 'args.json').read_text())
    args['augmentation'] |= {k: change[k] for k in args['augmentation'] if k in change}
    (tmp_path / 'run' / 'args.json').write_text(json.dumps({**args, **change}))
    assert cli.main(['report', str(tmp_path / 'run'), '--html', str(tmp_path / 'p.html')]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f'simsiam: {tmp_path}/run/args.json') and error.count('\n') == 1
    assert not (tmp_path / 'p.html').exists()


@pytest.mark.parametrize('change', [
    {'epoch': -5}, {'epoch': True}, {'step': -10**9}, {'epoch': 10**17}, {'step': '1'}, {'epoch': 21}, {'epoch': 1.0}])
def test_lines_beyond_a_run_are_left_out_and_counted(change, run, tmp_path):
    (tmp_path / 'args.json').write_bytes((run / 'args.json').read_bytes())
    lines = [{'epoch': 0, 'step': 1, 'loss': 0.5}, {'epoch': 0, 'step': 2, 'loss': 0.4, **change}]
    (tmp_path / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    found = read_run(tmp_path)
    assert found.damaged == 1 and found.reached == (0, 1) and len(found.figures) == 1


def test_lines_in_another_order_or_twice_make_the_same_page(run, tmp_path):
    copy = tmp_path / 'run'
    shutil.copytree(run, copy)
    lines = (run / 'log.jsonl').read_text().splitlines(keepends=True)
    plots, state = list_plots(read_run(copy)), describe_state(read_run(copy))
    for text in (''.join(reversed(lines)), ''.join([*lines, *lines])):
        (copy / 'log.jsonl').write_text(text)
        assert list_plots(read_run(copy)) == plots and describe_state(read_run(copy)) == state


@pytest.mark.parametrize('figures', [
    {'loss': True}, {'knn': True}, {'knn': 500}, {'knn': -1e29}, {'waiting': 7.0}, {'unreadable': -5},
    {'unreadable': True}, {'knn_images': [True, -5]}, {'knn_images': [5]}, {'knn': {'random': True, 'pixels': 900}}])
def test_figures_that_cannot_be_are_not_shown(figures, run, tmp_path):
    shutil.copytree(run, tmp_path / 'run')
    line = {'epoch': 0, 'step': 1, 'loss': 0.5, **figures}
    (tmp_path / 'run' / 'log.jsonl').write_text(json.dumps(line) + '\n')
    found = read_run(tmp_path / 'run')
    assert [p.name for p in list_plots(found)] == ([] if 'loss' in figures else ['loss']) + ['lr']
    assert 'Unreadable' not in dict(list_facts(found))
    assert cli.main(['report', str(tmp_path / 'run'), '--html', str(tmp_path / 'p.html')]) == 0
    assert 'bank images' not in (tmp_path / 'p.html').read_text()


def test_points_of_different_epochs_share_no_row_and_wrong_figures_are_left_out(run, tmp_path):
    (tmp_path / 'args.json').write_bytes((run / 'args.json').read_bytes())
    lines = [{'epoch': 0, 'step': 1, 'loss': 0.5}, {'epoch': 0, 'step': 2, 'loss': 0.4},
             {'epoch': 0, 'knn': {'random': 10.0, 'pixels': None}}, {'epoch': 1, 'knn': 20.0}]
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    (tmp_path / 'log.jsonl').write_text(f'{text}{{"epoch": 0, "step": 3, "loss": 1{"0" * 400}}}\n')
    found = read_run(tmp_path)
    assert found.damaged == 1
    plots = list_plots(found)
    assert [(plot.name, [s.name for s in plot.series]) for plot in plots] == [
        ('loss', ['Loss']), ('lr', ['predictor']), ('knn', ['features'])]
    assert 'kNN accuracy, %' not in tabulate_figures(plots)[0][0]


def test_data_of_another_number_of_images_are_not_drawn_again(run):
    found = read_run(run)
    fewer = found._replace(args={**found.args, 'images': found.args['images'] + 1})
    assert open_training_data(found).images is not None and 'has changed' in open_training_data(fewer).problem


@pytest.mark.parametrize('extra', [
    {}, {'extra': {'epochs': [5]}}, {'extra': {'epochs': {'a': 1}, 'confusion': {'a': {'b': 1}, 'b': {}}}}])
def test_a_record_without_the_usual_parts_is_drawn(extra, tmp_path):
    (tmp_path / 'args.json').write_text('{"benchmark": "finetune", "init_from": "x", "extensions": [1]}')
    (tmp_path / 'record.json').write_text(json.dumps({
        'format': 'simsiam_models benchmark', 'version': 1, 'benchmark': 'x', 'protocol': {}, 'metrics': {'top1': 5.0},
        'weights': {'name': 'a', 'digest': 'b', 'tag': None}, 'data': {'name': 'd', 'counts': {}}, **extra}))
    (tmp_path / 'predictions.csv').write_text(f'path,label,predicted,score\n{"x" * 5000},a,b,0.5\n')
    assert cli.main(['report', str(tmp_path), '--html', str(tmp_path / 'p.html')]) == 0


@pytest.mark.parametrize(('args', 'said'), [
    ('gone --html p.html', 'gone: no such file or folder; name the OUTPUT of a run, or a folder of records'),
    ('empty --html p.html', 'empty: neither a run nor a record of a benchmark there'),
    ('. --html p.html', '.: neither a run nor a record of a benchmark there; a run in it: run'),
    ('empty --plots p', 'empty: neither a run nor a record of a benchmark there'),
    ('run --html p.txt', '--html p.txt: must be a file that ends in .html'),
    ('run --html file/p.html', '--html: file/p.html cannot be written ('),
    ('run --html p.html --markdown', '--markdown: prints tables to the terminal'),
    ('run --data x', '--data x: only --html shows images; add --html FILE.html')])
def test_a_mistake_is_one_sentence(args, said, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('empty').mkdir()
    Path('file').write_bytes(b'')
    Path('run').symlink_to(run)
    assert cli.main(['report', *args.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f'simsiam: {said}') and error.count('\n') == 1


def test_without_matplotlib_its_absence_is_named_before_any_work(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    assert cli.main(['report', str(run), '--html', str(tmp_path / 'p.html')]) == 1
    assert capsys.readouterr().err == 'simsiam: --html needs matplotlib: pip install matplotlib\n'
