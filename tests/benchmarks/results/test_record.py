"""Records: only numbers of the same weights, data and parameters are compared with published ones."""
import argparse
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from simsiam_models.benchmarks.backbone import Backbone
from simsiam_models.benchmarks.datasets.sizes import SIZES
from simsiam_models.benchmarks.results import compare as comparing
from simsiam_models.benchmarks.results import record as records
from simsiam_models.benchmarks.results import report as reports
from simsiam_models.benchmarks.results.compare import compare
from simsiam_models.benchmarks.results.record import format_record, read_record, write_record
from simsiam_models.benchmarks.results.report import report
from simsiam_models.weights.published import WEIGHTS, find_results

# Copied from the page (MMSelfSup v0.9.1, 200 epochs), not from published.json.
KNN = {'k=10': 60.2, 'k=20': 60.4, 'k=100': 58.8, 'k=200': 57.4}
SVM = {
    'k=1': 39.85, 'k=2': 50.44, 'k=4': 63.73, 'k=8': 70.93, 'k=16': 75.74, 'k=32': 79.42, 'k=64': 82.02, 'k=96': 83.44}
PLACES = {'feature1': 21.17, 'feature2': 35.85, 'feature3': 43.49, 'feature4': 50.99, 'feature5': 54.1}
RGB, BGR = 'mm_ep200_in1k', 'mm_ep200_bgr_in1k'


def backbone(tag: str | None = RGB, name: str | None = None, digest: str = '0123456789abcdef') -> Backbone:
    name = name or f'simsiam_resnet50.{tag}'
    return Backbone(nn.Identity(), name, tag, digest, (0.5,) * 3, (0.2,) * 3, 2048)


def whole(benchmark: str) -> dict:
    """Returns the data entry of a record of the complete set."""
    kind = benchmark.split('_')[0]
    size = SIZES[kind]
    counts = {'train': size.train, 'test': size.test, 'classes': size.classes}
    return {'name': kind, 'counts': counts, 'digest': 'ab' * 8}


def as_published(benchmark: str) -> dict:
    return dict(comparing.REQUIRED[comparing.strip_layer(benchmark)])


def write(path: Path, benchmark: str, metrics: dict, model: Backbone | None = None, **changes) -> dict:
    protocol = {**as_published(benchmark), **changes.pop('protocol', {})}
    data = {**whole(benchmark), **changes.pop('data', {})}
    assert not changes
    return write_record(path, benchmark, protocol, model or backbone(), data, metrics, seconds=12.34)


def test_a_record_holds_everything_and_reads_back_as_written(tmp_path: Path):
    file = tmp_path / 'new' / 'knn.json'
    written = write_record(
        file, 'imagenet_knn_T0.07',
        {**as_published('imagenet_knn_T0.07'), 'k': (10, np.int64(20)), 'list': np.arange(2)}, backbone(),
        whole('imagenet_knn_T0.07'), {'k=10': np.float64(60.25), 'k=20': np.float32(60.5)}, seconds=12.34,
        extra={'output': Path('x')})
    assert read_record(file) == written == json.loads(file.read_text())
    assert os.listdir(file.parent) == ['knn.json']
    assert written['protocol']['k'] == [10, 20] and written['protocol']['T'] == 0.07
    assert written['weights'] == {
        'name': f'simsiam_resnet50.{RGB}', 'tag': RGB, 'digest': '0123456789abcdef', 'pixels': 'RGB',
            'mean': [0.5] * 3, 'std': [0.2] * 3}
    assert written['metrics'] == {'k=10': 60.25, 'k=20': 60.5} and written['seconds'] == 12.3
    assert written['data']['counts']['train'] == 1281167 and written['extra'] == {'output': 'x'}
    assert {'python', 'torch', 'timm', 'torchvision', 'numpy'} <= set(written['versions']) and written['command']
    assert written['date'].endswith('+00:00')
    assert [e['metrics'] for e in written['published']] == [KNN] and written['published'][0]['same_weights']
    assert written['published'][0]['file'] == WEIGHTS[RGB].url.rsplit('/', 1)[-1]
    assert written['difference'] == {'k=10': pytest.approx(0.05), 'k=20': pytest.approx(0.1)}
    assert written['weights']['pixels'] == 'RGB'
    pixels = write(tmp_path / 'x.json', 'voc07_svm_feature5', {'mAP': 1}, backbone(BGR))['weights']['pixels']
    assert pixels.startswith('RGB; trained on BGR (inferred)')


@pytest.mark.parametrize('benchmark, named', [
    ('imagenet_knn_T0.07', True), ('folder_knn_T0.07', True), ('places205_mhead_linear', True),
    ('imagenet_linear_avgpool', True), ('voc07_svm_feature5', True), ('voc07_lowshot_svm_feature5', True),
    ('imagenet_semi_1pct', True), ('voc12aug_fcn_r50_d8_512_20k', True), ('imagenet_linear', False),
    ('imagenet_linear_moco', False), ('folder_auto_probe', False), ('finetune', False)])
def test_records_of_mmselfsups_protocols_say_that_its_reader_turns_images_by_exif(benchmark, named, tmp_path):
    found = write_record(
        tmp_path / 'x.json', benchmark, {}, backbone(), {'name': 'folder', 'counts': {}}, {'top1': 1.0}, seconds=1)
    assert ('exif' in found) == named and (not named or "MMSelfSup's reader (OpenCV) applied it" in found['exif'])


def test_a_number_whose_protocol_is_not_stated_is_shown_with_its_source_and_not_compared(tmp_path: Path):
    found = write(tmp_path / 'x.json', 'imagenet_linear', {'top1': 69.0}, backbone('fb_bs256_ep200_in1k'))
    entry = found['published'][0]
    assert entry['same_weights'] and entry['metrics'] == {'top1': 69.8} and found['difference'] == {}
    text = format_record(found)
    assert 'by a protocol that is not stated: top1 69.8' in text and 'simsiam issue 18' in text


def test_a_record_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch):
    file = tmp_path / 'knn.json'
    write(file, 'imagenet_knn_T0.07', {'k=10': 60.0})
    before = file.read_bytes()

    def full(*args):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as m:
        m.setattr(os, 'replace', full)
        with pytest.raises(OSError, match='No space left'):
            write(file, 'imagenet_knn_T0.07', {'k=10': 61.0})
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    'metrics', [{'k=10': float('nan')}, {'k=10': float('inf')}, {'k=10': 'high'}, {'k=10': True}, {}, {'k=10': -0.01},
                {'k=10': 100.01}])
def test_a_metric_must_be_a_percentage(metrics: dict, tmp_path: Path):
    with pytest.raises(ValueError) as e:
        write(tmp_path / 'x.json', 'imagenet_knn_T0.07', metrics)
    assert '\n' not in str(e.value) and not (tmp_path / 'x.json').exists()
    assert write(tmp_path / 'x.json', 'imagenet_knn_T0.07', {'k=10': 0, 'k=20': 100 + 1e-12})['metrics']['k=10'] == 0


def test_values_that_json_lacks_and_folders_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match='object cannot be written as JSON'):
        write(tmp_path / 'x.json', 'imagenet_knn_T0.07', {'k=10': 1.0}, protocol={'model': object()})
    with pytest.raises(ValueError, match='is a folder; a record is a file'):
        write(tmp_path, 'imagenet_knn_T0.07', {'k=10': 1.0})


def test_two_results_share_a_path_only_if_weights_protocol_and_data_are_the_same():
    def name(protocol: dict, model: Backbone, **data) -> Path:
        return records.record_path('out', 'imagenet_knn_T0.07', model, protocol, {**whole('imagenet_x'), **data})

    first = name({'k': (10,)}, backbone())
    assert first == name({'k': [10]}, backbone()) and first.parent == Path('out')
    assert first.name.startswith(f'imagenet_knn_T0.07-simsiam_resnet50.{RGB}-') and first.suffix == '.json'
    others = [name({'k': [20]}, backbone()), name({'k': [10]}, backbone(digest='f' * 16)),
              name({'k': [10]}, backbone(), counts={'train': 3}), name({'k': [10]}, backbone(), digest='x')]
    assert len({first, *others}) == 5
    odd = name({}, backbone(None, 'hf-hub:some one/we|rd "ä" name.pth'))
    assert set(odd.name) <= set('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-=')


CASES = {'imagenet_knn_T0.07': (RGB, KNN), 'places205_mhead_linear': (RGB, PLACES),
         'imagenet_linear_avgpool': (RGB, {'top1': 69.84}), 'voc07_svm_feature5': (BGR, {'mAP': 85.2}),
         'voc07_lowshot_svm_feature5': (BGR, SVM), 'imagenet_linear': ('fb_bs256_ep100_in1k', {'top1': 68.3}),
         'imagenet_mhead_linear': (BGR, {'feature1': 15.57, 'feature5': 69.85}),
         'voc0712_faster_rcnn_c4_24k': (BGR, {'AP50': 79.85}),
         'coco_mask_rcnn_r50_fpn_ms_1x': (BGR, {'box_AP': 38.8, 'mask_AP': 34.9}),
         'voc12aug_fcn_r50_d8_512_20k': (BGR, {'mIoU': 46.27})}


@pytest.mark.parametrize('benchmark', CASES)
def test_a_difference_is_measured_minus_published_for_the_same_file(benchmark: str, tmp_path: Path):
    tag, published = CASES[benchmark]
    found = write(tmp_path / 'x.json', benchmark, {k: v - 1.5 for k, v in published.items()}, backbone(tag))
    assert found['not_comparable'] is None
    assert found['difference'] == {k: pytest.approx(-1.5) for k in published}
    text = format_record(found)
    assert all(f'{v - 1.5:.2f}' in text and str(v) in text for v in published.values()) and '-1.50' in text


def test_a_worse_result_is_called_worse_by_how_much_and_with_its_standard_error(tmp_path: Path):
    found = write(tmp_path / 'knn.json', 'imagenet_knn_T0.07', {**KNN, 'k=10': 58.7, 'k=20': 60.3, 'k=100': 59.0})
    text = format_record(found)
    assert ('worse than published: k=10 1.50 points below (standard error 0.31); '  # sqrt((p q + p' q') / 50000)
            'k=20 0.10 points below (standard error 0.31, so it may be chance)\n') in text
    assert re.search(r'k=10 +58.70 +0.22 ', text)  # sqrt(.587 * .413 / 50000)
    boxes = write(tmp_path / 'voc.json', 'voc07_svm_feature5', {'mAP': 1.0}, backbone(BGR))
    assert 'points below\n' in format_record(boxes) and 'std. error' not in format_record(boxes)
    assert 'worse' not in format_record(write(tmp_path / 'same.json', 'imagenet_knn_T0.07', KNN))
    (tmp_path / 'voc.json').unlink()
    assert 'Standard error of an accuracy: at most 0.22 points; differences of less than 0.63 points' in report(
        [tmp_path])


@pytest.mark.parametrize('benchmark', CASES)
@pytest.mark.parametrize('tag', [RGB, BGR, 'mm1x_ep200_in1k', 'fb_bs512_ep100_in1k', None, 'unknown_tag'])
def test_no_difference_from_numbers_of_other_weights_is_computed(benchmark: str, tag: str | None, tmp_path: Path):
    own, published = CASES[benchmark]
    has = tag is not None and any(e['benchmark'] == benchmark for e in find_results(tag))
    found = write(tmp_path / 'x.json', benchmark, dict(published), backbone(tag, 'mine'))
    assert bool(found['difference']) == has == any(e['same_weights'] and e['same_protocol'] for e in found['published'])
    assert has or tag != own
    assert found['published'], 'for orientation'
    text = format_record(found)
    assert has == ('difference' in text) and (has or 'other weights' in text or 'by another protocol' in text)
    assert 'reproduced' not in text


def test_numbers_of_another_generation_on_the_same_page_are_marked_as_other_weights(tmp_path: Path):
    found = write(tmp_path / 'x.json', 'voc07_svm_feature5', {'mAP': 85.2}, backbone(RGB))
    entry, = found['published']
    assert entry['tag'] == BGR and not entry['same_weights'] and '20211213' in entry['file']
    assert found['difference'] == {} and '0.00' not in format_record(found)


def test_a_number_of_the_same_file_by_another_protocol_is_shown_and_not_compared(tmp_path: Path):
    found = write(tmp_path / 'x.json', 'imagenet_linear_avgpool', {'top1': 68.0}, backbone('fb_bs256_ep100_in1k'))
    own = [e for e in found['published'] if e['same_weights']]
    assert [(e['benchmark'], e['same_protocol'], e['metrics']) for e in own] == [
        ('imagenet_linear', False, {'top1': 68.3})]
    assert found['difference'] == {} and 'by another protocol, imagenet_linear' in format_record(found)


def test_a_hostile_record_neither_ends_the_report_nor_adds_markup_to_it(results: Path, tmp_path: Path):
    before = report([results])
    benchmark, published = 'imagenet_knn_T0.07', KNN
    write(results / 'huge.json', benchmark, published, protocol={'T': 10**400})
    page = before.split('### imagenet_')[0]
    assert 'T 1000000' in report([results]) and '### ImageNet Nearest' in page and report([results]).startswith(page)
    found = write(results / 'huge.json', benchmark, published, protocol={'amp': 'BF16'})
    assert 'amp BF16 (published: off)' in found['not_comparable']
    name = '![x](https://a.example/p.png) [click](javascript:alert(1)) `code`'
    write(results / 'huge.json', benchmark, published, backbone(None, name), protocol={'T': 1})
    (results / '<img src=x>[a](b).json').write_text('{')
    text = report([results], markdown=True)
    assert '\\[click\\]' in text and '](javascript' not in text.replace('\\](', '') and '<img' not in text


def test_a_semi_supervised_result_states_its_rates_and_its_deviations(tmp_path: Path):
    benchmark = 'imagenet_semi_1pct'
    data = {'counts': {'train': 12811, 'test': 50000, 'classes': 1000}}
    rates = {'lr': 0.01, 'head_multiplier': 10.0}
    found = write(tmp_path / 'a.json', benchmark, {'top1': 1.0}, protocol=rates, data=data)
    assert found['not_comparable'] is None and not found['published']
    assert 'with lr 0.01, x 10.0 for the classifier' in format_record(found)
    for change in ({'protocol': {**rates, 'epochs': 1}}, {'data': {'counts': {**data['counts'], 'train': 5}}}):
        write(tmp_path / 'b.json', benchmark, {'top1': 2.0}, **{'protocol': rates, 'data': data, **change})
        text = report([tmp_path])
        assert 'epochs 1 (published: 20)' in text or '5 training images found (expected 12,811)' in text
        assert 'lr 0.01, x 10.0 for the classifier' in text


def changed(value):
    """Returns another value of the same type."""
    return {bool: lambda: not value, str: lambda: value + ' x', list: lambda: value[:-1]}.get(
        type(value), lambda: value * 2 + 1)()


@pytest.mark.parametrize('benchmark', CASES)
def test_a_record_with_a_parameter_changed_or_missing_is_not_comparable(benchmark: str, tmp_path: Path):
    tag, published = CASES[benchmark]
    for key, value in as_published(benchmark).items():
        found = write(tmp_path / 'x.json', benchmark, published, backbone(tag), protocol={key: changed(value)})
        assert key in found['not_comparable'] and found['difference'] == found['tolerance'] == {}
        text = format_record(found)
        assert f'not comparable with published numbers: {key}' in text and 'difference' not in text
        protocol = as_published(benchmark)
        del protocol[key]
        found = write_record(
            tmp_path / 'x.json', benchmark, protocol, backbone(tag), whole(benchmark), published, seconds=1)
        assert f'does not state {key}' in found['not_comparable'] and not found['difference']
    for amp in ('bfloat16', 'float16', 'off'):
        found = write(tmp_path / 'x.json', benchmark, published, backbone(tag), protocol={'amp': amp})
        assert found['not_comparable'] == (None if amp == 'off' else f'amp {amp} (published: off)')
    found = write(tmp_path / 'x.json', benchmark, published, backbone(tag), protocol={'changed': {'seed': 1}})
    assert 'changed' in found['not_comparable'] and not found['difference']


@pytest.mark.parametrize('benchmark', CASES)
def test_part_of_a_data_set_or_another_one_is_not_comparable(benchmark: str, tmp_path: Path):
    tag, published = CASES[benchmark]
    right = whole(benchmark)['counts']
    for counts in (*({**right, key: right[key] - 1} for key in right), {}, {**right, 'train': 'all'}):
        found = write(tmp_path / 'x.json', benchmark, published, backbone(tag), data={'counts': counts})
        assert 'found (expected ' in found['not_comparable'] and not found['difference']
    for unreadable in (3, ['a.jpg'] * 3, {'1': 'a', '2': 'b', '3': 'c'}):
        found = write_record(tmp_path / 'x.json', benchmark, as_published(benchmark), backbone(tag), whole(benchmark),
                             published, seconds=1, extra={'unreadable': unreadable})
        assert '3 images could not be read' in found['not_comparable'] and not found['difference']
    found = write(tmp_path / 'x.json', benchmark, published, backbone(tag), data={'name': 'folder'})
    assert 'measured on folder' in found['not_comparable'] and not found['difference']


def test_the_tolerance_is_the_difference_between_two_published_runs(tmp_path: Path):
    seen = {'voc07_svm_feature5': ('mAP', 0.43), 'imagenet_linear_avgpool': ('top1', 0.32),
            'imagenet_mhead_linear': ('feature5', 0.29)}
    for benchmark, (metric, value) in seen.items():
        found = write(tmp_path / 'x.json', benchmark, {metric: 50.0, 'other': 1.0}, backbone(None, 'mine'))
        assert found['tolerance'] == {metric: value}
    assert write(tmp_path / 'x.json', 'imagenet_knn_T0.07', KNN)['tolerance'] == {}
    assert all((name, metric) in {(e['benchmark'], m) for tag in WEIGHTS for e in comparing.find_published(name, tag)
                                  for m in e['metrics']} for name, metric in comparing.RUN_TO_RUN)


def test_a_note_says_that_no_number_is_published_if_there_could_be_one(tmp_path: Path):
    found = write_record(
        tmp_path / 'x.json', 'flowers_finetune', {'lr': 1}, backbone(None, 'mine'),
        {'name': 'folder', 'counts': {'train': 5}}, {'top1': 50.0}, seconds=1)
    assert found['published'] == [] and found['not_comparable'] is None and found['difference'] == {}
    for benchmark, name, said in (
            ('flowers_finetune', 'folder', False), ('folder_linear_moco', 'folder', False), ('finetune', 'a/b', False),
            ('imagenet_auto_probe', 'imagenet', False), ('imagenet_knn_T0.2', 'imagenet', True),
            ('cifar10_knn_T0.07', 'cifar10', True)):
        found = write_record(
            tmp_path / 'x.json', benchmark, {'lr': 1}, backbone(None, 'mine'), {'name': name, 'counts': {}},
            {'top1': 50.0}, seconds=1)
        for text in (format_record(found), report([tmp_path]), report([tmp_path], markdown=False)):
            assert (f'no number is published for {benchmark}' in text.replace('No number', 'no number')) == said


def test_unchanged_linear_protocols_are_comparable(tmp_path: Path):
    from simsiam_models.benchmarks.linear.protocol import benchmark_name, choose_protocol
    for name, dataset in (
            ('fair', 'imagenet'), ('mmselfsup', 'imagenet'), ('mhead', 'imagenet'), ('mhead', 'places205'),
            ('mhead', 'inat18')):
        for overrides in ({}, {'epochs': 2}, {'lr': 0.5}):
            chosen = choose_protocol(name, dataset, overrides)
            benchmark = benchmark_name(chosen, dataset)
            found = write_record(
                tmp_path / 'x.json', benchmark, chosen.record(), backbone(), whole(benchmark), {'top1': 5.0}, seconds=1)
            if overrides:
                assert found['not_comparable'] or benchmark.endswith('_changed') and not found['published']
            else:
                assert benchmark in comparing.REQUIRED and found['not_comparable'] is None


HOSTILE = {
    'nothing': b'', 'no JSON': b'{"format": ', 'deep': b'[' * 100_000, 'bytes': b'\xff\xfe\0\1', 'a list': b'[1]',
    'null': b'null', 'a number': b'3', 'NaN': b'NaN', 'a run of train.py': b'{"model": "simsiam_resnet50", "lr": 0.05}',
    'long number': b'9' * 5000}


def edited(tmp_path: Path, **changes) -> bytes:
    value = write(tmp_path / 'good.json', 'imagenet_knn_T0.07', KNN)
    return json.dumps({**value, **changes}).encode()


def hostile(tmp_path: Path) -> dict[str, bytes]:
    weights = {'name': 'x', 'tag': None, 'digest': 'y'}
    changes = {
        'no tag': {'weights': {'name': 'x', 'digest': 'y'}},
        'a truth as count': {'data': {'name': 'x', 'counts': {'train': True}}},
        'less than no image': {'data': {'name': 'x', 'counts': {'test': -5}}},
        'too many images': {'data': {'name': 'x', 'counts': {'test': 10**5000 % 10**400 + 10**399}}},
        'version': {'version': 99}, 'no benchmark': {'benchmark': None}, 'a list as protocol': {'protocol': []},
        'no metric': {'metrics': {}}, 'a text as metric': {'metrics': {'k=10': '60.2'}},
        'a truth as metric': {'metrics': {'k=10': True}}, 'a huge metric': {'metrics': {'k=10': 10**400}},
        'a list as metric': {'metrics': {'k=10': [1]}}, 'less than none': {'metrics': {'k=10': -50}},
        'more than all': {'metrics': {'k=10': 1e8}}, 'a list as extra': {'extra': []},
        'nested': {'protocol': {'T': json.loads('[' * 200 + ']' * 200)}},
        'no name': {'weights': {**weights, 'name': 3}},
        'a list as tag': {'weights': {**weights, 'tag': []}}, 'no digest': {'weights': {'name': 'x', 'tag': None}},
        'no counts': {'data': {'name': 'imagenet'}}, 'counts in a list': {'data': {'name': 'imagenet', 'counts': []}},
        'no data': {'data': None}}
    changes |= {f'unreadable {x}': {'extra': {'unreadable': x}} for x in (2.5, 3.0, True, -1, 'three', None)}
    found = {name: edited(tmp_path, **change) for name, change in changes.items()}
    found['infinite metric'] = edited(tmp_path).replace(b'60.2', b'1e999')
    return {**HOSTILE, **found}


def test_broken_and_foreign_files_raise_one_line_that_names_them(tmp_path: Path):
    cases = hostile(tmp_path)
    for name, text in cases.items():
        file = tmp_path / 'case.json'
        file.write_bytes(text)
        for read in (read_record, lambda f: report([f])):
            with pytest.raises(ValueError) as e:
                read(file)
            assert 'case.json' in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 600, name
    with open(tmp_path / 'large.json', 'wb') as f:
        f.truncate(records.LARGEST + 1)  # takes no room
    with pytest.raises(ValueError, match='large.json is not a record: it is too large \\(.* bytes'):
        read_record(tmp_path / 'large.json')
    for read in (read_record, lambda f: report([f])):
        with pytest.raises(FileNotFoundError, match='none.json'):
            read(tmp_path / 'none.json')


def test_unreadable_files_and_folders_are_named(tmp_path: Path, monkeypatch):
    file = tmp_path / 'good.json'
    edited(tmp_path)
    with pytest.raises(ValueError, match=f'{tmp_path} is a folder'):
        read_record(tmp_path)
    for error in (PermissionError(13, 'Permission denied'), FileNotFoundError(2, 'Gone'), OSError(5, 'I/O error')):
        def read(self: Path, error: OSError = error):
            raise error  # without the name, as read(2) has it
        with monkeypatch.context() as m:
            m.setattr(Path, 'read_bytes', read)
            for named in (read_record, lambda f: report([f]), lambda f: report([f.parent])):
                with pytest.raises(OSError, match=rf'good.json cannot be read \({error.strerror}\)'):
                    named(file)
    (tmp_path / 'sub').mkdir()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith('sub'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', closed)
    assert 'sub cannot be listed (Permission denied)' in report([tmp_path])


def test_strange_but_possible_values_do_not_break_the_tables(tmp_path: Path):
    weights = {'name': 'a|b\n<script>\x1b[31m`', 'tag': 'nobody', 'digest': ''}
    for i, changes in enumerate([
            {'weights': weights}, {'benchmark': 'x\n|y'}, {'metrics': {'a\n|b' * 99: 0.5, 'k=10': 5, 'b_ ' * 99: 1}},
            {'protocol': {'T': {'a': [1]}, 'changed': [{}]}},
            {'data': {'name': 'imagenet', 'counts': {'train': 10**15}}},
            {'data': {'name': 'x', 'counts': {'train': None, 'classes': [1]}}},
            {'data': {'name': 'x', 'counts': {}, 'digest': ['|'] * 9}}, {'protocol': {'changed': {'a': 1}, 'name': []}},
            {'published': 3, 'difference': 'all'}]):
        (tmp_path / f'{i}.json').write_bytes(edited(tmp_path, **changes))
    markdown, text = report([tmp_path]), report([tmp_path], markdown=False)
    assert '<script>' not in markdown and '\x1b' not in markdown + text
    widths = [line.replace('\\|', '').count('|') for line in markdown.splitlines() if line.startswith('|')]
    assert len(widths) > 20 and set(widths) <= {4, 5, 6, 7, 8}
    for i in range(9):
        assert format_record(read_record(tmp_path / f'{i}.json'))


def rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


HEADERS = [
    '| Weights |  | Best Layer | SVM | k=1 | k=2 | k=4 | k=8 | k=16 | k=32 | k=64 | k=96 |',
    '| Weights |  | Feature1 | Feature2 | Feature3 | Feature4 | Feature5 | AvgPool |',
    '| Weights |  | AvgPool |',
    '| Weights |  | Feature1 | Feature2 | Feature3 | Feature4 | Feature5 |',
    '| Weights |  | k=10 | k=20 | k=100 | k=200 |',
    '| Weights |  | AP50 |',
    '| Weights |  | mAP(Box) | AP50(Box) | AP75(Box) | mAP(Mask) | AP50(Mask) | AP75(Mask) |',
    '| Weights |  | mIOU |',
    '| Weights | top1 |',
    '| Weights | k=10 | k=20 | k=100 | k=200 |',
    '| Weights | k=10 | k=20 | k=100 | k=200 |']


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One record of each kind, and some that do not belong in the page's tables."""
    folder = tmp_path / 'results'
    for benchmark, (tag, published) in CASES.items():
        write(folder / f'{benchmark}.json', benchmark, {k: v - 0.25 for k, v in published.items()}, backbone(tag))
    few = {'counts': {'train': 100, 'test': 50, 'classes': 3}}
    write(folder / 'sub' / 'partial.json', 'imagenet_knn_T0.07', KNN, data=few)
    write(folder / 'sub' / 'hot.json', 'imagenet_knn_T0.07', KNN, protocol={'T': 0.1})
    write_record(
        folder / 'moco.json', 'imagenet_linear_moco', {}, backbone(), whole('imagenet_x'), {'top1': 71.5}, seconds=1)
    return folder


def test_the_tables_have_the_columns_of_the_page(results: Path):
    text = report([results])
    headers = [line for line, under in zip(text.splitlines(), text.splitlines()[1:], strict=False)
               if under.startswith('| ---')]
    assert headers == HEADERS
    assert [line for line in text.splitlines() if line.startswith('#')] == [
        '### VOC07 SVM / Low-shot SVM', '### ImageNet Linear Evaluation',
        "### ImageNet Linear Evaluation, facebookresearch/simsiam's protocol (best of 90 epochs)",
        '### Places205 Linear Evaluation', '### ImageNet Nearest-Neighbor Classification',
        '### Pascal VOC 2007 + 2012', '### COCO2017', '### Pascal VOC 2012 + Aug',
        '### imagenet_linear_moco on imagenet (1,281,167 + 50,000 images of 1000 classes)',
        '### imagenet_knn_T0.07 on imagenet (1,281,167 + 50,000 images of 1000 classes)',
        '### imagenet_knn_T0.07 on imagenet (abababab, 100 + 50 images of 3 classes)']


def test_published_numbers_follow_the_measured_ones(results: Path):
    found = rows(report([results]))
    svm = found[:found.index(['Weights', '', *(f'Feature{i}' for i in range(1, 6)), 'AvgPool'])]
    name = f'simsiam_resnet50.{BGR}'
    assert svm[2] == [name, 'measured', 'feature5', '84.95', *(f'{v - 0.25:.2f}' for v in SVM.values())]
    assert svm[3] == [name, 'published, same weights', 'feature5', '85.20', *(f'{v:.2f}' for v in SVM.values())]
    assert svm[4] == [name, 'difference', '', *['-0.25'] * 9]
    assert svm[5] == [name, 'tolerance', '', '0.43', *[''] * 8]
    knn = found[found.index(['Weights', '', 'k=10', 'k=20', 'k=100', 'k=200']):]
    assert knn[2] == [f'simsiam_resnet50.{RGB}', 'measured', '59.95', '60.15', '58.55', '57.15']
    assert knn[3] == [f'simsiam_resnet50.{RGB}', 'published, same weights', '60.2', '60.4', '58.8', '57.4']
    assert knn[4][1:] == ['difference', *['-0.25'] * 4]


def test_a_page_row_of_two_generations_is_split(results: Path):
    """The page's ImageNet row has Feature1-5 of one file and AvgPool of another."""
    found = rows(report([results / 'imagenet_linear_avgpool.json', results / 'imagenet_mhead_linear.json']))
    bgr, rgb = f'simsiam_resnet50.{BGR}', f'simsiam_resnet50.{RGB}'
    assert [rgb, 'published, same weights', '', '', '', '', '', '69.84'] in found
    assert [bgr, 'published, same weights', '15.57', '37.21', '47.28', '62.21', '69.85', ''] in found
    alone = rows(report([results / 'imagenet_linear_avgpool.json']))
    assert [row[-1] for row in alone[2:]] == ['69.59', '69.84', '-0.25', '0.32']


def test_other_weights_get_their_own_published_rows_and_no_difference(tmp_path: Path):
    write(tmp_path / 'x.json', 'imagenet_knn_T0.07', KNN, backbone(None, 'run/backbone'))
    write(tmp_path / 'y.json', 'voc07_svm_feature5', {'mAP': 85.2}, backbone(RGB))
    text = report([tmp_path])
    found = rows(text)
    assert ['run/backbone', 'measured', '60.20', '60.40', '58.80', '57.40'] in found
    assert [RGB, 'published, other weights', '60.2', '60.4', '58.8', '57.4'] in found
    assert [BGR, 'published, other weights', 'feature5', '85.20', *[''] * 8] in found
    assert not [row for row in found if row[1] in ('difference', 'published, same weights')]
    assert 'v0.9.1 (bbdf670d)' in text and '20211213-b605f9f1' in text and 'inferred from git history' in text


def test_other_parameters_partial_data_and_other_benchmarks_are_listed_apart_with_the_reason(results: Path):
    write(results / 'other_k.json', 'imagenet_knn_T0.07', {'k=5': 59.0})  # a number without a column there
    whole_set = '(1,281,167 + 50,000 images of 1000 classes)'
    blocks = {block.split('\n')[0]: block for block in report([results]).split('### ')}
    moco, hot, part = (blocks[f'{name} on imagenet {of}'] for name, of in (
        ('imagenet_linear_moco', whole_set), ('imagenet_knn_T0.07', whole_set),
        ('imagenet_knn_T0.07', '(abababab, 100 + 50 images of 3 classes)')))
    assert '| 71.50 |' in moco and '- No number is published for imagenet_linear_moco.' in moco
    assert '- Not comparable with published numbers: 100 training images found (expected 1,281,167)' in part
    name = f'simsiam_resnet50.{RGB}'
    assert [row for row in rows(hot) if row[0] == name] == [
        [name, 'T 0.07', '59.00', '', '', '', ''], [name, 'T 0.1', '', '60.20', '60.40', '58.80', '57.40']]
    assert f'- {name}: not comparable with published numbers: T 0.1 (published: 0.07).' in hot
    assert f'- {name}: no number is published for k=5.' in hot
    knn = [row for row in rows(blocks['ImageNet Nearest-Neighbor Classification']) if row[1] == 'measured']
    assert [row[2] for row in knn] == ['59.95']
    write(results / 'more_k.json', 'imagenet_knn_T0.07', {'k=10': 60.0, 'k=7': 58.5, 'k=10 top-5': 77.25})
    assert f'- {name}, also measured for imagenet_knn_T0.07: k=7 58.50, k=10 top-5 77.25.' in report([results])


def test_the_best_layer_is_the_one_with_the_best_svm_and_the_others_are_noted(tmp_path: Path):
    for layer, value in enumerate((50, 60, 70, 88, 85), 1):
        numbers = {'mAP': value, 'mAP_11point': 99 - value}
        write(tmp_path / f'{layer}.json', f'voc07_svm_feature{layer}', numbers, backbone(BGR))
        write(tmp_path / f'low{layer}.json', f'voc07_lowshot_svm_feature{layer}', {'k=1': 30 + layer}, backbone(BGR))
    text = report([tmp_path])
    assert rows(text)[2][:5] == [f'simsiam_resnet50.{BGR}', 'measured', 'feature4', '88.00', '34.00']
    assert 'SVM by layer: feature1 50.00, feature2 60.00, feature3 70.00, feature4 88.00, feature5 85.00.' in text
    (tmp_path / 'low4.json').unlink()
    text = report([tmp_path])
    assert rows(text)[2][4] == '35.00' and 'low-shot SVM is of feature5' in text


def test_two_results_of_the_same_weights_are_two_rows(tmp_path: Path):
    for i in range(2):
        write(tmp_path / f'{i}.json', 'imagenet_knn_T0.07', {'k=10': 50.0 + i})
    assert [row[2] for row in rows(report([tmp_path])) if row[1] == 'measured'] == ['50.00', '51.00']
    once = report([tmp_path])
    (tmp_path / 'link.json').symlink_to('0.json')
    os.link(tmp_path / '1.json', tmp_path / 'hard.json')
    assert report([tmp_path, tmp_path / '0.json', tmp_path / 'link.json']) == report([tmp_path]) == once


def test_the_comparison_in_a_file_is_not_trusted(tmp_path: Path):
    protocol = {**as_published('imagenet_knn_T0.07'), 'T': 1}
    (tmp_path / 'x.json').write_bytes(edited(
        tmp_path, difference={'k=10': 0.0}, not_comparable=None, protocol=protocol))
    (tmp_path / 'good.json').unlink()
    text = report([tmp_path])
    assert 'T 1 (published: 0.07)' in text and 'difference' not in text


def test_files_in_a_folder_that_are_not_records_are_left_out_by_name(results: Path, tmp_path: Path):
    for name in ('args.json', 'config.json', 'other.json'):  # the first two are of a run
        (results / name).write_text('{"model": "x"}')
    (results / 'torn.json').write_text('{"format"')
    text = report([results])
    assert 'Skipped files that are not records:' in text
    assert '1 JSON file of other kinds' in text and 'torn.json' in text
    with pytest.raises(ValueError, match='args.json is JSON, but not the record'):
        report([results / 'args.json'])
    empty = tmp_path / 'empty'
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match='empty: no record of a benchmark there'):
        report([empty])


def test_the_terminal_form_has_the_same_cells_in_aligned_columns(results: Path):
    markdown, text = report([results]), report([results], markdown=False)
    assert '|' not in text and '#' not in text
    lines = text.splitlines()
    header = next(line for line in lines if line.startswith('Weights') and 'k=200' in line)
    measured = lines[lines.index(header) + 1]
    for name, value in zip(('k=10', 'k=20', 'k=100', 'k=200'), ('59.95', '60.15', '58.55', '57.15'), strict=True):
        assert header.index(name) == measured.index(value)
    flat = ' '.join(text.split()).lower()
    table = [row for row in rows(markdown) if row[0] != 'Weights' and not row[0].startswith('---')]
    (results / 'voc07_lowshot_svm_feature5.json').unlink()
    header = report([results], markdown=False).splitlines()[2]
    assert header.split() == ['Weights', 'Best', 'Layer', 'SVM'], 'columns without a number take no room'
    assert len(table) > 20 and all(' '.join(cell.split()).lower() in flat for row in table for cell in row)


def test_the_command_prints_the_report(results: Path, capsys, monkeypatch):
    parser = argparse.ArgumentParser()
    reports.add_arguments(parser)
    monkeypatch.setenv('COLUMNS', '90')
    assert reports.run(parser.parse_args([str(results), '--markdown'])) == 0
    assert capsys.readouterr().out == report([results], markdown=True) + '\n'
    assert reports.run(parser.parse_args([str(results)])) == 0
    assert capsys.readouterr().out == report([results], markdown=False, width=90) + '\n'


def test_every_published_benchmark_has_a_column_of_its_own_for_each_of_its_numbers():
    columns = {(c.benchmark, c.metric) for table in reports.PAGE for c in table.columns}
    for tag in WEIGHTS:
        for entry in find_results(tag):
            found = {(comparing.strip_layer(entry['benchmark']), metric) for metric in entry['metrics']}
            assert found - {('voc12aug_fcn_r50_d8_512_20k', 'mIoU_first_report')} <= columns
    unpublished = {
        'inat18_mhead_linear', 'imagenet_semi_1pct', 'imagenet_semi_10pct', 'coco_mask_rcnn_r50_fpn_ms_2x',
        'coco_mask_rcnn_r50_c4_ms_1x', 'coco_mask_rcnn_r50_c4_ms_2x', 'cityscapes_fcn_r50_d8_769_40k'}
    assert {comparing.strip_layer(name) for name in CASES} == set(comparing.REQUIRED) - unpublished


def test_a_benchmark_with_unknown_published_parameters_is_not_compared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(comparing.REQUIRED, 'voc12aug_fcn_r50_d8_512_20k')
    found = compare({
        'benchmark': 'voc12aug_fcn_r50_d8_512_20k', 'protocol': {}, 'data': {'name': 'voc12', 'counts': {}},
        'metrics': {'mIoU': 60.0}, 'weights': {'name': 'm', 'tag': BGR, 'digest': ''}})
    assert 'not known here' in found['not_comparable'] and found['published'] and not found['difference']
