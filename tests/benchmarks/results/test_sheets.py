"""Results on one's own data form tables that compare models and state how their rows differ."""
from pathlib import Path

import pytest
from torch import nn

from simsiam_models.benchmarks.backbone import Backbone
from simsiam_models.benchmarks.linear.protocol import benchmark_name, choose_protocol
from simsiam_models.benchmarks.results.record import format_record, write_record
from simsiam_models.benchmarks.results.report import report

DATA = {
    'name': 'folder', 'counts': {'train': 1200, 'test': 300, 'classes': 10}, 'digest': '1f2e3d4c5b6a7988',
    'path': 'my/photos'}
TITLE = 'my/photos (1f2e3d4c, 1,200 + 300 images of 10 classes)'
KNN = {'T': 0.07, 'k': [10], 'features': 'avgpool', 'resize': 256, 'image_size': 224, 'amp': 'off'}


@pytest.fixture
def save(tmp_path: Path):
    def save(benchmark: str, protocol: dict, name: str, metrics: dict, digest: str = 'ab' * 8, **more) -> dict:
        model = Backbone(nn.Identity(), name, None, digest, (0.5,) * 3, (0.2,) * 3, 2048)
        file = tmp_path / f'{len(list(tmp_path.iterdir())):03}.json'
        data = {**DATA, **more.pop('data', {})}
        return write_record(file, benchmark, protocol, model, data, metrics, seconds=1, **more)
    return save


def linear(protocol: str = 'fair', amp: str = 'off', **numbers) -> tuple[str, dict]:
    chosen = choose_protocol(protocol, 'folder', numbers, amp)
    return benchmark_name(chosen, 'folder'), {**chosen.record(), 'seed': 0, 'amp': amp}


def tables(text: str) -> dict[str, list[list[str]]]:
    """Parses Markdown: title -> rows, the header first."""
    found = {}
    for block in text.split('### ')[1:]:
        title, *lines = block.splitlines()
        assert title not in found
        rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if line.startswith('|')]
        found[title] = [rows[0], *rows[2:]]
    return found


def test_each_benchmark_and_data_set_has_one_table_of_all_models(save, tmp_path: Path):
    for name, digest, value in (('runs/a', 'a' * 16, 50.0), ('runs/b', 'b' * 16, 60.0)):
        save('folder_knn_T0.07', KNN, name, {'k=10': value, 'k=10 top-5': value + 5}, digest)
        save('folder_auto_probe', {'name': 'auto_probe'}, name, {'top1': value + 1}, digest)
    save('folder_knn_T0.07', {**KNN, 'k': [5]}, 'runs/a', {'k=5': 40.0}, 'a' * 16)
    save('folder_knn_T0.07', KNN, 'runs/a', {'k=10': 30.0}, 'a' * 16, data={'digest': 'f' * 16})
    text = report([tmp_path])
    assert tables(text) == {
        f'folder_knn_T0.07 on {TITLE}': [
            ['Weights', 'k=10', 'k=5', 'k=10 top-5'], ['runs/a', '50.00', '', '55.00'], ['runs/a', '', '40.00', ''],
            ['runs/b', '60.00', '', '65.00']],
        f'folder_auto_probe on {TITLE}': [['Weights', 'top1'], ['runs/a', '51.00'], ['runs/b', '61.00']],
        f'folder_knn_T0.07 on {TITLE.replace("1f2e3d4c", "ffffffff")}': [['Weights', 'k=10'], ['runs/a', '30.00']]}
    assert text.count('\n- ') == text.count('\n- Standard error of an accuracy: at most ') > 0
    lines = report([tmp_path], markdown=False).splitlines()
    at = lines.index(f'folder_auto_probe on {TITLE}')
    assert [line.split() for line in lines[at + 2:at + 5]] == [
        ['Weights', 'top1'], ['runs/a', '51.00'], ['runs/b', '61.00']]


def test_a_complete_set_is_the_same_in_any_form(save, tmp_path: Path):
    for digest in ('a' * 16, 'b' * 16):
        data = {'name': 'cifar10', 'counts': {'train': 50000, 'test': 10000, 'classes': 10}, 'digest': digest}
        save('cifar10_knn_T0.07', KNN, digest, {'k=10': 50.0}, data=data)
    assert [len(t) for t in tables(report([tmp_path])).values()] == [3]


def test_weights_that_share_a_name_are_distinguished_by_their_digests(save, tmp_path: Path):
    save('folder_knn_T0.07', KNN, 'run1', {'k=10': 50.0}, '3f2a9c0177aa00ff')
    save('folder_auto_probe', {}, 'run1', {'top1': 60.0}, 'aa11bb22cc33dd44')
    save('folder_auto_probe', {}, 'run2', {'top1': 60.0}, 'ee11bb22cc33dd44')
    save('folder_auto_probe', {}, f'/data/{"x" * 99}/run3', {'top1': 60.0}, 'ff11bb22cc33dd44')
    rows = [row[0] for t in tables(report([tmp_path])).values() for row in t[1:]]
    assert rows[:3] == ['run1 (3f2a9c01)', 'run1 (aa11bb22)', 'run2']
    assert rows[3].startswith('...xx') and rows[3].endswith('x/run3') and len(rows[3]) == 60
    (tmp_path / '001.json').unlink()
    assert '3f2a9c01' not in report([tmp_path])


def test_rows_state_how_protocols_differ_and_a_note_what_they_share(save, tmp_path: Path):
    for name, numbers in (('a', {'epochs': 5}), ('b', {'epochs': 5}), ('b', {'epochs': 10, 'lr': 0.3})):
        benchmark, protocol = linear(batch_size=64, **numbers)
        save(benchmark, protocol, name, {'top1': 50.0})
    text = report([tmp_path])
    assert [row[:2] for row in tables(text)[f'folder_linear_fair on {TITLE}']] == [
        ['Weights', 'Protocol'], ['a', 'fair (changed), lr 0.1, epochs 5'], ['b', 'fair (changed), lr 0.1, epochs 5'],
        ['b', 'fair (changed), lr 0.3, epochs 10']]
    assert text.count('\n- ') == 2 and text.endswith('- Changed: batch_size 64 (published: 4096).')
    save(benchmark, {**protocol, 'momentum': 0.8, 'crop_scale': [0.2, 1.0]}, 'c', {'top1': 50.0})
    text = report([tmp_path])
    assert [row[1] for row in tables(text)[f'folder_linear_fair on {TITLE}']] == ['Protocol', '1', '1', '2', '3']
    assert '- Protocol 3: fair (changed), lr 0.3, epochs 10, momentum 0.8, crop_scale \\[0.2, 1.0\\].' in text


def test_a_changed_protocol_is_marked_if_no_number_is_published(save, tmp_path: Path):
    said = 'amp: bfloat16 where off is published'
    save('folder_knn_T0.07', {**KNN, 'amp': 'bfloat16', 'changed': said}, 'a', {'k=10': 50.0})
    save('folder_linear_fair', {'name': 'fair', 'changed': True}, 'a', {'top1': 50.0})
    save('folder_linear_moco', {'name': 'moco (changed)'}, 'a', {'top1': 50.0})
    found = save(*linear('mhead', lr=0.5), 'a', {'feature1': 50.0})
    save('folder_semi_1pct', {'lr': 1, 'head_multiplier': 2, 'changed': ['epochs 1', 'lr 1']}, 'a', {'top1': 50.0})
    save('folder_auto_probe', {'name': 'auto_probe', 'changed': {}}, 'a', {'top1': 50.0})
    text = report([tmp_path])
    assert [t[1][1] for t in tables(text).values()] == [
        '(changed)', 'fair (changed)', 'moco (changed)', 'mhead (changed)',
        '(changed), lr 1, x 2 for the classifier', '50.00']
    for line in (said, 'lr 0.5 (published: 0.01)', 'epochs 1; lr 1'):
        assert f'- Changed: {line}.' in text
    assert text.count('- Changed') == 3 and 'true' not in text
    assert 'changed: lr 0.5 (published: 0.01)' in format_record(found)


def test_layers_are_rows_and_a_common_reason_is_stated_once(save, tmp_path: Path):
    few = {'name': 'voc07', 'counts': {'train': 60, 'test': 60, 'classes': 20}}
    for layer in range(1, 6):
        for name in 'ba':
            save(f'voc07_svm_feature{layer}', {'tap': f'feature{layer}'}, name, {'mAP': 20.0 + layer}, data=few)
    text = report([tmp_path])
    (title, found), = tables(text).items()
    assert title == 'voc07_svm on voc07 (1f2e3d4c, 60 + 60 images of 20 classes)'
    assert found == [['Weights', 'Layer', 'mAP'], *(
        [name, f'feature{layer}', f'{20 + layer}.00'] for name in 'ba' for layer in range(1, 6))]
    assert text.count('Not comparable with published numbers: 60 training images found (expected 5,011)') == 1
    assert text.count('not comparable') == 0
    save('voc07_svm_feature5', {'tap': 'feature5', 'folds': 2}, 'b', {'mAP': 10.0}, data=few)
    text = report([tmp_path])
    assert 'b: not comparable with published numbers: 60' in text and '; folds 2 (published: 3)' in text


def test_unreadable_images_are_noted_with_the_model(save, tmp_path: Path):
    for name, bad in (('a', 0), ('b', 2), ('c', ['x.jpg'])):
        save('folder_knn_T0.07', KNN, name, {'k=10': 50.0}, extra={'unreadable': bad})
    assert report([tmp_path]).split('\n\n')[-1].splitlines()[1:] == [
        '- b: 2 images could not be read.', '- c: 1 image could not be read.']


def test_reported_metrics_come_first_and_tables_fit_any_terminal(save, tmp_path: Path):
    kinds = ('', '_top5', '_top1_best', '_top5_best', '_top1_epoch7')
    metrics = {f'feature{i}{kind}': 10.0 * i + j for i in range(1, 6) for j, kind in enumerate(kinds)}
    benchmark, protocol = linear('mhead')
    for name in ('runs/a', 'runs/b'):
        save(benchmark, protocol, name, metrics)
    header, row, _ = tables(report([tmp_path]))[f'{benchmark} on {TITLE}']
    assert header[1:11] == [*(f'feature{i}' for i in range(1, 6)), *(f'feature{i}_top5' for i in range(1, 6))]
    assert {name: float(x) for name, x in zip(header[1:], row[1:], strict=True)} == metrics
    for width in (40, 80, 120, 160):
        text = report([tmp_path], markdown=False, width=width)
        assert max(map(len, text.splitlines())) <= width
        shown = [n for line in text.splitlines() if line.startswith('Weights') for n in line.split()[1:]]
        assert shown == header[1:11]
        assert ' '.join(text.split()).endswith('15 more columns, such as feature1_top1_best: see --markdown.')
        assert text.count('runs/b  ') == text.count('Weights')
    assert '_epoch7' in report([tmp_path], markdown=False, width=600)


def test_parts_of_a_table_repeat_the_columns_that_distinguish_rows(save, tmp_path: Path):
    metrics = {f'k={k}': 50.0 for k in range(10, 22)}
    save('folder_knn_T0.07', KNN, 'a', metrics)
    save('folder_knn_T0.07', {**KNN, 'resize': 64}, 'b', metrics)
    text = report([tmp_path], markdown=False, width=60)
    heads = [line.split()[:2] for line in text.splitlines() if line.startswith('Weights')]
    assert heads == [['Weights', 'Protocol'], ['Weights', 'k=15']]
    save('folder_knn_T0.07', {**KNN, 'resize': 128}, 'b', metrics)
    text = report([tmp_path], markdown=False, width=60)
    assert text.count('Protocol') == text.count('Weights') == text.count('resize 128') == 3
