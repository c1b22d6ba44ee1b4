"""Labels mean the same in lists, tables, Arrow files, tars and metadata; the log says where they come from."""
import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats import (
    HAS,
    add,
    caches,  # noqa: F401 - a fixture
    needs_datasets,
    needs_webdataset,
    samples_of,
    write_files,
)

from simsiam_models.data import DataError, FolderImages, open_data
from simsiam_models.data.readers.labels import Choice, split_choice

if HAS['datasets']:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def pictures(few_digits) -> list[bytes]:
    return [data for _, data, _ in samples_of(few_digits)]


def files(root: Path, pictures: list[bytes], n: int) -> list[str]:
    names = [f'{i:03} a.png' for i in range(n)]
    write_files(root, [(name, pictures[2 * i + 1], 0) for i, name in enumerate(names)])
    return names


def in_text(root: Path, pictures: list[bytes], labels: list[Any]) -> Path:
    names = files(root, pictures, len(labels))
    (root / 'list.txt').write_text(''.join(f'{name} {label}\n' for name, label in zip(names, labels, strict=True)))
    return root / 'list.txt'


def in_csv(root: Path, pictures: list[bytes], labels: list[Any], header: str = 'label', file: str = 'list.csv') -> Path:
    names = files(root, pictures, len(labels))
    with open(root / file, 'w', newline='') as f:
        csv.writer(f).writerows([('file_name', header), *zip(names, labels, strict=True)])
    return root / file


def in_json(
    root: Path, pictures: list[bytes], labels: list[Any], header: str = 'label', file: str = 'list.jsonl',
) -> Path:
    names = files(root, pictures, len(labels))
    lines = [json.dumps({'file_name': name, header: label}) for name, label in zip(names, labels, strict=True)]
    (root / file).write_text('\n'.join(lines))
    return root / file


def in_metadata(root: Path, pictures: list[bytes], labels: list[Any], header: str = 'label') -> Path:
    in_csv(root, pictures, labels, header, 'metadata.csv')
    return root


def in_metadata_json(root: Path, pictures: list[bytes], labels: list[Any], header: str = 'label') -> Path:
    in_json(root, pictures, labels, header, 'metadata.jsonl')
    return root


def in_tar(root: Path, pictures: list[bytes], labels: list[Any], ending: str = 'cls') -> Path:
    members = [(f'{i:03}.{end}', data) for i, label in enumerate(labels) for end, data in (
        (ending, None if label is None else str(label).encode()), ('png', pictures[2 * i + 1])) if data is not None]
    return tar(root / 'a.tar', members)


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    import tarfile
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as f:
        for name, data in members:
            add(f, name, data)
    return path


def in_table(root: Path, pictures: list[bytes], labels: Any, header: str = 'label', **more: Any) -> Path:
    labels = labels if isinstance(labels, pa.Array) else pa.array(labels)
    root.mkdir(parents=True, exist_ok=True)
    images = [pictures[2 * i + 1] for i in range(len(labels))]
    pq.write_table(pa.table({'image': images, header: labels, **more}), root / 'a.parquet')
    return root / 'a.parquet'


def opened(path: Path, choice: str = '') -> tuple[list[int] | None, list[str]]:
    images, _ = open_data(f'{path}{choice}')
    assert all(images.read(i).shape == (32, 32, 3) for i in range(len(images)))
    return None if images.labels is None else images.labels.tolist(), images.classes


WRITERS: dict[str, Callable[..., Path]] = {
    'text': in_text, 'csv': in_csv, 'json': in_json, 'metadata': in_metadata, 'metadata json': in_metadata_json,
    'tar': in_tar, 'tar cls.txt': lambda *a: in_tar(*a, 'cls.txt'), 'tar odd cls': lambda *a: in_tar(*a, 'a.CLS')}
if HAS['datasets']:
    WRITERS['table'] = in_table

RULE = [
    ([3, 0, 3, 10], [3, 0, 3, 10], [str(i) for i in range(11)]),
    (['3', '0', '3', '10'], [3, 0, 3, 10], [str(i) for i in range(11)]),
    ([3.0, 0.0, 3.0, 10.0], [3, 0, 3, 10], [str(i) for i in range(11)]),
    (['zebra', 'ant', 'Émeu x', 'zebra'], [1, 0, 2, 1], ['ant', 'zebra', 'Émeu x']),
    ([True, False, False, True], [1, 0, 0, 1], ['False', 'True']),
    (['n01', '7', 'n01', '10'], [2, 1, 2, 0], ['10', '7', 'n01']),
    (['01', '1', '0' * 30 + '2', '2.'], [1, 1, 2, 2], ['0', '1', '2']),
]


@pytest.mark.parametrize(
    'given, labels, classes', RULE, ids=['int', 'digits', 'float', 'name', 'bool', 'name first', 'zeros'])
@pytest.mark.parametrize('how', WRITERS)
def test_the_same_labels_are_the_same_classes_in_every_format(tmp_path, pictures, how, given, labels, classes):
    assert opened(WRITERS[how](tmp_path / 'data', pictures, given)) == (labels, classes)


WRONG = {
    'negative': ([1, -1, 0], r"'-1' is not a class number; use integers from 0 to 99999"),
    'too large': ([1, 100000, 0], "'100000' is not a class number"),
    'far too large': (['1', '1' + '0' * 400, '0'], "'10000000.* is not a class number"),
    'not whole': ([1, 0.5, 1], "'0.5' is not a class number"),
    'a name among numbers': (['1', 'dog', '0'], "'dog' is not a class number"),
}


@pytest.mark.parametrize('wrong', WRONG)
@pytest.mark.parametrize('how', WRITERS)
def test_labels_that_break_the_rule_are_named_and_never_used(tmp_path, pictures, how, wrong, caplog):
    given, reason = WRONG[wrong]
    path = WRITERS[how](tmp_path / 'data', pictures, given)
    if how == 'table' or how.startswith('metadata'):
        assert opened(path) == (None, [])
        assert re.search(reason, caplog.text) and ('row 1' in caplog.text or 'line ' in caplog.text)
    else:
        with pytest.raises(ValueError, match=r'(line [23]|001\.(cls|a\.CLS)(\.txt)?): the label ' + reason):
            open_data(path)


@pytest.mark.parametrize('how', [name for name in WRITERS if name != 'text'])
def test_one_missing_label_is_counted_and_named(tmp_path, pictures, how, caplog):
    given = ['b', None if 'csv' not in how and how != 'metadata' else '', 'a', 'b']
    path = WRITERS[how](tmp_path / 'data', pictures, given)
    if how in ('csv', 'json'):
        with pytest.raises(ValueError, match='line [23]: has no label, unlike the lines before it'):
            open_data(path)
    else:
        assert opened(path) == (None, [])
        assert '1 of 4 ' in caplog.text
        assert ('row 1' if how == 'table' else '001') in caplog.text


def test_a_tar_without_any_label_but_other_files_says_so(tmp_path, pictures, caplog):
    path = tar(tmp_path / 'a.tar', [('0.png', pictures[1]), ('0.json', b'{"label": 1}'), ('0.txt', b'dog')])
    assert opened(path) == (None, [])
    assert 'no .cls beside the images, only .json .txt; #label=ENDING chooses' in caplog.text
    assert opened(path, '#label=json') == ([1], ['0', '1'])
    assert opened(path, '#label=.TXT') == ([0], ['dog'])
    folders = tar(tmp_path / 'b.tar', [('cat/0.png', pictures[1]), ('dog/1.png', pictures[3]), ('README.md', b'x')])
    assert opened(folders) == (None, [])
    assert 'folders in a tar are not classes' in caplog.text


def test_the_label_of_an_image_has_its_name_or_is_the_only_one_of_the_sample(tmp_path, pictures):
    png = pictures[1]
    path = tar(tmp_path / 'a.tar', [
        ('./x/a.v1.png', png), ('x/a.v1.cls', b'1'), ('x/a.other.cls', b'9'),  # its own name
        ('x/b.5.cls', b'2'), ('x/b.5.2.png', png), ('c.png', png), ('c.label.cls', b'3')])  # the only one
    assert opened(path) == ([1, 2, 3], ['0', '1', '2', '3'])


# Columns


@needs_datasets
@pytest.mark.parametrize(
    'type_', ['string', 'large_string', 'dictionary', 'int8', 'uint64', 'float32', 'decimal', 'list',
              'ClassLabel'])
def test_labels_of_every_type_are_used(tmp_path, pictures, type_):
    names = pa.array(['b', 'a', 'b'])
    column = {
        'string': names, 'large_string': names.cast(pa.large_string()), 'dictionary': names.dictionary_encode(),
        'int8': pa.array([1, 0, 1], pa.int8()), 'uint64': pa.array([1, 0, 1], pa.uint64()),
        'float32': pa.array([1, 0, 1], pa.float32()), 'decimal': pa.array([1, 0, 1]).cast(pa.decimal128(19, 0)),
        'list': pa.array([[1], [0], [1]]), 'ClassLabel': names}[type_]
    path = in_table(tmp_path, pictures, column)
    if type_ == 'ClassLabel':
        rows = datasets.load_dataset('parquet', data_files=[str(path)], split='train', cache_dir=str(tmp_path / 'c'))
        path = tmp_path / 'saved'
        names = datasets.ClassLabel(names=['b', 'a', 'c'])
        rows = rows.cast_column('label', names)
        rows.save_to_disk(path)
        assert opened(path) == ([0, 1, 0], ['b', 'a', 'c'])  # the order of the data set
        rows = rows.map(lambda row: {'labels': [row['label']]}, remove_columns='label')
        rows.cast_column('labels', datasets.Sequence(names)).save_to_disk(tmp_path / 'lists')
        assert opened(tmp_path / 'lists') == ([0, 1, 0], ['b', 'a', 'c'])
        return
    text = type_ in ('string', 'large_string', 'dictionary')
    assert opened(path) == ([1, 0, 1], ['a', 'b'] if text else ['0', '1'])


@needs_datasets
@pytest.mark.parametrize('values, reason', [
    ([[1], [0, 1], [1]], 'lists of labels, not all with exactly one'),
    ([0.0, float('nan'), 1.0], '1 of 3 rows have no label'),
    (['a', '', 'b'], '1 of 3 rows have no label'), ([1, 2**40, 1], 'is not a class number')])
def test_a_column_of_labels_that_is_not_used_is_named_with_the_reason(tmp_path, pictures, values, reason, caplog):
    assert opened(in_table(tmp_path, pictures, values)) == (None, [])
    assert 'no labels, although there is a column label: ' in caplog.text and reason in caplog.text


@pytest.mark.parametrize('header', ['Label', 'class_name', 'species', 'target', 'category', 'breed', 'weather today'])
@pytest.mark.parametrize(
    'how', ['csv', 'json', 'metadata', 'metadata json', pytest.param('table', marks=needs_datasets)])
def test_the_column_of_the_labels_may_have_another_name_and_is_named(tmp_path, pictures, how, header, caplog):
    path = WRITERS[how](tmp_path / 'data', pictures, ['b', 'a', 'b'], header)
    assert opened(path) == ([1, 0, 1], ['a', 'b'])
    assert f'labels from the column {header}, 2 classes' in caplog.text


@needs_datasets
def test_a_nested_column_is_found_by_its_name(tmp_path, pictures):
    column = pa.array([{'fine_label': 1, 'name': 'x'}, {'fine_label': 0, 'name': 'y'}])
    path = in_table(tmp_path, pictures, column, 'annotation')
    assert opened(path, '#label=annotation.fine_label') == ([1, 0], ['0', '1'])
    assert opened(path, '#label=annotation.name') == ([0, 1], ['x', 'y'])


@needs_datasets
def test_what_is_unclear_is_not_guessed_but_named_and_can_be_chosen(tmp_path, pictures, caplog):
    more = {'season': pa.array(['wet', 'dry', 'wet']), 'split': pa.array(['train'] * 3)}
    path = in_table(tmp_path, pictures, ['b', 'a', 'b'], 'breed', **more)
    assert opened(path) == (None, [])
    assert 'not clear which column has them (breed, season, split); #label=COLUMN chooses one' in caplog.text
    assert opened(path, '#label=season') == ([1, 0, 1], ['dry', 'wet'])
    with pytest.raises(ValueError, match='#label=colour: no such column of labels; there are breed, season, split'):
        open_data(f'{path}#label=colour')


@needs_datasets
@pytest.mark.parametrize('name', ['text', 'split', 'id'])
def test_a_caption_a_split_or_an_id_is_no_label(tmp_path, pictures, name):
    assert opened(in_table(tmp_path, pictures, ['a', 'b', 'a'], name)) == (None, [])
    values = [f'a sentence about picture {i}' for i in range(30)]
    assert opened(in_table(tmp_path / '2', pictures, values, 'sentence')) == (None, [])


@needs_datasets
def test_names_of_the_datasets_library_are_preferred_to_other_columns(tmp_path, pictures):
    rows = datasets.Dataset.from_dict(
        {'image': [{'bytes': pictures[i], 'path': None} for i in (1, 3, 5)], 'kind': [2, 0, 2],
         'species': ['x', 'y', 'x']},
        features=datasets.Features({
            'image': datasets.Image(), 'kind': datasets.ClassLabel(names=['r', 's', 't']),
            'species': datasets.Value('string')}))
    rows.save_to_disk(tmp_path)
    assert opened(tmp_path) == ([2, 0, 2], ['r', 's', 't'])


# Several images


def test_one_of_several_images_of_a_tars_sample_is_chosen_by_its_ending(tmp_path, pictures):
    members = [(f'{i}.{end}', data) for i in range(3) for end, data in (
        ('left.png', pictures[2 * i + 1]), ('right.png', pictures[2 * i + 7]), ('cls', b'%d' % i))]
    path = tar(tmp_path / 'a.tar', members)
    with pytest.raises(ValueError, match='0 has more than one image .* #image=right.png after the name of the tar'):
        open_data(path)
    left, _ = open_data(f'{path}#image=left.png')
    right, _ = open_data(f'{path}#image=RIGHT.png')
    assert left.labels.tolist() == right.labels.tolist() == [0, 1, 2] and left.digest != right.digest
    assert np.array_equal(left.read(2), open_data(f'{tmp_path}/*.tar#image=left.png')[0].read(2))
    assert not np.array_equal(left.read(2), right.read(2))
    said = r'looked for up.png; files that do not end in up.png, skipped: 6 \(3 .left.png, 3 .right'
    with pytest.raises(FileNotFoundError, match=said):
        open_data(f'{path}#image=up.png')


@needs_webdataset
def test_one_of_several_images_of_a_streams_sample_is_chosen_by_its_ending(tmp_path, pictures):
    path = tar(tmp_path / 'a.tar', [('0.left.png', pictures[1]), ('0.right.png', pictures[3])])
    stream, _ = open_data(f'pipe:cat {path}', 1)
    with pytest.raises(DataError, match=r'several images \(left.png, right.png\); choose one with #image=left.png'):
        list(stream.samples(0, 0, 0))
    for ending, want in (('left.png', pictures[1]), ('right.png', pictures[3])):
        chosen, _ = open_data(f'pipe:cat {path}#image={ending}', 1)
        assert list(chosen.samples(0, 0, 0)) == [want] and chosen.digest != stream.digest


@needs_datasets
def test_one_of_several_columns_of_images_is_chosen_by_its_name(tmp_path, pictures):
    pq.write_table(pa.table({'left': pictures[1:4], 'right': pictures[5:8]}), tmp_path / 'a.parquet')
    for prefix in ('', 'hf:'):
        spec = f'{prefix}{tmp_path}'
        with pytest.raises(ValueError, match=r'several columns of images \(left, right\).*#image=COLUMN'):
            open_data(spec)
        left, right = (open_data(f'{spec}#image={name}')[0] for name in ('left', 'right'))
        assert left.digest != right.digest and not np.array_equal(left.read(0), right.read(0))
    with pytest.raises(ValueError, match='no column up for #image=; its columns are left, right'):
        open_data(f'{tmp_path}#image=up')
    stream, _ = open_data(f'hf-stream:{tmp_path}#image=right', 3)
    assert sorted(stream.samples(0, 0, 0)) == sorted(pictures[5:8])


def test_one_of_several_columns_of_paths_is_chosen_by_its_name(tmp_path, pictures):
    names = files(tmp_path, pictures, 4)
    (tmp_path / 'a.csv').write_text(f'left,right,kind\n{names[0]},{names[1]},x\n{names[2]},{names[3]},y\n')
    with pytest.raises(ValueError, match='the columns left, right all name images; choose one with .*#image=COLUMN'):
        open_data(tmp_path / 'a.csv')
    right, _ = open_data(f'{tmp_path}/a.csv#image=right,label=kind')
    assert [right.path(i).name for i in range(2)] == [names[1], names[3]]
    assert right.labels.tolist() == [0, 1] and right.classes == ['x', 'y']
    with pytest.raises(ValueError, match='#image=up: no such column; there are left, right, kind'):
        open_data(f'{tmp_path}/a.csv#image=up')


def test_a_choice_is_split_from_the_name_unless_a_file_has_that_name(tmp_path, pictures):
    assert split_choice('a#b.tar#image=x.jpg,label=a, b') == ('a#b.tar', Choice('x.jpg', 'a, b'))
    assert split_choice('hf:me/data:train#label=y') == ('hf:me/data:train', Choice(None, 'y'))
    assert split_choice('pipe:cat a#b.tar') == ('pipe:cat a#b.tar', None)
    name = tmp_path / 'x#label=y'
    write_files(name, [('a.png', pictures[1], 0)])
    assert len(open_data(name)[0]) == 1
    with pytest.raises(ValueError, match='write #image=NAME,label=NAME, or one of the two'):
        split_choice('a.tar#image=')


def test_a_choice_where_there_is_none_is_refused(tmp_path, pictures):
    names = files(tmp_path / 'flat', pictures, 2)
    (tmp_path / 'flat/l.txt').write_text(names[0])
    for spec, match in (('demo', 'no columns'), (f'{tmp_path}/flat', 'has no metadata.csv'),
                        (f'{tmp_path}/flat/l.txt', 'no columns'), (f'torchvision:MNIST:{tmp_path}', 'no columns')):
        with pytest.raises(ValueError, match=match):
            open_data(f'{spec}#label=y')


# Lists and metadata


def test_rows_of_a_csv_without_names_may_begin_with_the_label(tmp_path, pictures):
    names = files(tmp_path, pictures, 2)
    (tmp_path / 'a.csv').write_text(f'dog,{names[0]}\ncat,{names[1]}\n')
    assert opened(tmp_path / 'a.csv') == ([1, 0], ['cat', 'dog'])


def test_a_caption_in_a_list_is_no_label_and_the_log_says_so(tmp_path, pictures, caplog):
    path = in_csv(tmp_path, pictures, [f'picture number {i}' for i in range(30)], 'caption')
    assert opened(path) == (None, [])
    assert 'not clear which column has them (caption)' in caplog.text
    for _ in range(2):  # also from the cache
        caplog.clear()
        open_data(path)
        assert 'caption' in caplog.text


def test_metadata_may_lie_above_train_and_val(tmp_path, pictures):
    for part in ('train', 'val'):
        files(tmp_path / part, pictures, 3)
    rows = [f'{part}/{i:03} a.png,{label}' for part in ('train', 'val') for i, label in enumerate('bab')]
    (tmp_path / 'metadata.csv').write_text('\n'.join(['file_name,label', *rows]))
    train, val = open_data(tmp_path)
    assert train.labels.tolist() == val.labels.tolist() == [1, 0, 1] and train.classes == val.classes == ['a', 'b']


def test_metadata_labels_images_below_one_subfolder_but_not_those_of_class_folders(tmp_path, pictures, caplog):
    write_files(tmp_path / 'one', [(f'images/{i}.png', pictures[1], 0) for i in range(3)])
    (tmp_path / 'one/metadata.csv').write_text('file_name,kind\n./images/2.png,x\nimages/0.png,y\nimages/1.png,x\n')
    assert opened(tmp_path / 'one') == ([1, 0, 0], ['x', 'y'])
    write_files(tmp_path / 'two', [(f'{name}/{i}.png', pictures[1], 0) for name in 'ab' for i in range(2)])
    digest = FolderImages(tmp_path / 'two').digest
    (tmp_path / 'two/metadata.csv').write_text('file_name,kind\na/0.png,x\na/1.png,y\nb/0.png,x\nb/1.png,z\n')
    assert opened(tmp_path / 'two') == ([0, 0, 1, 1], ['a', 'b']) and FolderImages(tmp_path / 'two').digest == digest
    assert 'the subfolders are the classes; #label=kind chooses that column of metadata.csv' in caplog.text
    assert opened(tmp_path / 'two', '#label=kind') == ([0, 1, 0, 2], ['x', 'y', 'z'])


def test_metadata_for_another_purpose_changes_nothing(tmp_path, pictures, caplog):
    files(tmp_path, pictures, 3)
    digest = FolderImages(tmp_path).digest
    captions = 'file_name,caption\n' + ''.join(f'{i:03} a.png,"{i}"\n' for i in range(3))
    for text in ('camera,lens\nx,y\n', captions, '', '"'):
        (tmp_path / 'metadata.csv').write_text(text)
        source, _ = open_data(tmp_path)
        assert source.labels is None and source.digest == digest
    assert 'not used' in caplog.text and 'caption' in caplog.text


def test_a_list_beside_unlabelled_images_is_named(tmp_path, pictures, caplog):
    path = in_csv(tmp_path, pictures, ['a', 'b', 'a'], file='train.csv')
    assert opened(tmp_path) == (None, [])
    assert f'has no labels, but train.csv: use {path}' in caplog.text


# Two answers to one question


@pytest.mark.parametrize('how', ['json', 'metadata json', 'tar'])
def test_a_number_that_no_float_can_hold_is_not_a_class(tmp_path, pictures, how, caplog):
    labels = [10 ** 400, 1]
    if how == 'tar':
        path = tar(tmp_path / 'a.tar', [('0.png', pictures[1]), ('0.json', json.dumps(labels[0]).encode())])
    else:
        path = WRITERS[how](tmp_path / 'data', pictures, labels)
    reason = r"'10000000.*\.\.\.' is not a class number"
    if how == 'metadata json':
        assert opened(path) == (None, []) and re.search(reason, caplog.text)
    else:
        with pytest.raises(ValueError, match=reason):
            open_data(f'{path}#label=json' if how == 'tar' else path)


def test_metadata_that_gives_an_image_two_labels_gives_none(tmp_path, pictures, caplog):
    path = in_metadata(tmp_path, pictures, ['cat', 'dog'])
    with open(path / 'metadata.csv', 'a') as f:
        f.write('000 a.png,cat\n')  # again, with the same
    assert opened(path) == ([0, 1], ['cat', 'dog'])
    with open(path / 'metadata.csv', 'a') as f:
        f.write('./000 a.png,dog\n')
    assert opened(path) == (None, [])
    assert 'no labels, although there is a column label: line 5: 000 a.png has another label there than in line 2' in (
        caplog.text)


def test_a_chosen_column_of_metadata_that_cannot_be_used_is_not_replaced_by_the_folders(tmp_path, pictures):
    write_files(tmp_path, [(f'{folder}/1.png', pictures[1], 0) for folder in 'ab'])
    (tmp_path / 'metadata.csv').write_text('file_name,kind\na/1.png,x\nb/1.png,\n')
    assert opened(tmp_path) == ([0, 1], ['a', 'b'])
    with pytest.raises(ValueError, match='metadata.csv#label=kind: 1 of 2 images have no label, the first is b/1.png'):
        open_data(f'{tmp_path}#label=kind')


def test_labels_that_the_first_line_of_json_lacks_are_not_overlooked(tmp_path, pictures):
    files(tmp_path, pictures, 2)
    (tmp_path / 'a.jsonl').write_text('{"file_name": "000 a.png"}\n{"file_name": "001 a.png", "label": "dog"}\n')
    with pytest.raises(ValueError, match="a.jsonl, line 2: has the label 'dog', unlike the lines before it"):
        open_data(tmp_path / 'a.jsonl')


@pytest.mark.parametrize('header, twice', [('path,label,label', 'label'), ('label,path,path', 'path')])
def test_two_columns_of_one_name_are_refused_if_that_name_counts(tmp_path, pictures, header, twice):
    name = files(tmp_path, pictures, 1)[0]
    row = [name if column == 'path' else str(i) for i, column in enumerate(header.split(','))]
    (tmp_path / 'a.csv').write_text(f'{header}\n{",".join(row)}\n')
    with pytest.raises(ValueError, match=f"a.csv, line 1: several columns are named '{twice}'"):
        open_data(tmp_path / 'a.csv')
    (tmp_path / 'a.csv').write_text(f'path,label,,\n{name},3,x,y\n')  # no name, twice
    assert opened(tmp_path / 'a.csv')[0] == [3]


def test_a_name_that_no_file_can_have_is_one_sentence(tmp_path, pictures):
    files(tmp_path, pictures, 1)
    (tmp_path / 'a.jsonl').write_text('{"file_name": "000 a.png"}\n{"file_name": "\\ud800.png"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: no file can be named '\\ud800.png'"):
        open_data(tmp_path / 'a.jsonl')


@pytest.mark.parametrize('again', ['0.png', './0.png', '0.PNG'])
@pytest.mark.parametrize('choice', ['', '#image=png'])
def test_an_image_that_is_in_a_tar_twice_is_no_matter_of_choice(tmp_path, pictures, again, choice):
    path = tar(tmp_path / 'a.tar', [('0.png', pictures[1]), (again, pictures[3])])
    with pytest.raises(ValueError, match='more than one image .*write the tar again') as refused:
        open_data(f'{path}{choice}')
    assert '#image=' not in str(refused.value)


# Tables


@needs_datasets
@pytest.mark.parametrize('kind, labels', [
    ('one of a fixed number', [1, 0]), ('several of a fixed number', None), ('lists', None), ('structs', None),
    ('string_view', None)])
def test_a_column_of_labels_of_an_odd_type_is_used_or_named(tmp_path, pictures, caplog, kind, labels):
    if kind == 'string_view' and not hasattr(pa, 'string_view'):
        pytest.skip('pyarrow has no string_view yet')
    path = in_table(tmp_path, pictures, {
        'one of a fixed number': lambda: pa.array([[1], [0]], pa.list_(pa.int64(), 1)),
        'several of a fixed number': lambda: pa.array([[0., 1.], [1., 0.]], pa.list_(pa.float32(), 2)),
        'lists': lambda: pa.array([[[1]], [[0]]]), 'structs': lambda: pa.array([[{'a': 1}], [{'a': 0}]]),
        'string_view': lambda: pa.array(['b', 'a'], pa.string_view())}[kind]())
    assert opened(path)[0] == labels
    assert 'label' in caplog.text and ('no labels, although' in caplog.text) == (labels is None)


@needs_datasets
@pytest.mark.parametrize('form', ['parquet', 'arrow'])
def test_files_that_number_the_classes_differently_are_never_read_as_one_table(tmp_path, pictures, form):
    for i, names in enumerate((['cat', 'dog'], ['cat', 'dog'], ['dog', 'cat'])):
        rows = datasets.Dataset.from_dict(
            {'image': [{'bytes': pictures[2 * i + 1], 'path': None}], 'label': [0]},
            features=datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=names)}))
        if form == 'parquet':
            rows.to_parquet(str(tmp_path / f'train-{i}.parquet'))
        else:
            rows.save_to_disk(str(tmp_path / 'saved'))
            next((tmp_path / 'saved').glob('*.arrow')).rename(tmp_path / f'train-{i}.arrow')
            (tmp_path / 'saved/state.json').unlink()
    with pytest.raises((ValueError, DataError), match='train-0.parquet and train-2.parquet|align') as refused:
        open_data(tmp_path)
    assert '\n' not in str(refused.value)
    (tmp_path / f'train-2.{form}').unlink()
    assert opened(tmp_path) == ([0, 0], ['cat', 'dog'])


@needs_datasets
def test_one_damaged_file_of_a_table_is_named(tmp_path, pictures):
    for i in range(3):
        in_table(tmp_path / f'{i}', pictures, [0, 1]).rename(tmp_path / f'train-{i}.parquet')
    (tmp_path / 'train-1.parquet').write_bytes(b'PAR1')
    with pytest.raises(DataError, match='train-1.parquet cannot be opened'):
        open_data(tmp_path)


@needs_datasets
def test_the_suffix_of_a_table_may_be_in_capitals(tmp_path, pictures):
    path = in_table(tmp_path, pictures, [1, 0]).rename(tmp_path / 'A.PARQUET')
    assert opened(path)[0] == opened(tmp_path)[0] == [1, 0]


@pytest.mark.parametrize('how', ['metadata', 'table'] if HAS['datasets'] else ['metadata'])
def test_spellings_of_a_class_are_named_in_every_format(tmp_path, pictures, how, caplog):
    WRITERS[how](tmp_path / 'data', pictures, ['cat', 'Cat', 'dog'])
    assert opened(tmp_path / 'data')[1] == ['Cat', 'cat', 'dog']
    assert 'classes whose names differ in case, blanks or encoding only: Cat, cat' in caplog.text
