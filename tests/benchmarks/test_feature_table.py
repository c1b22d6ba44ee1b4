"""What `simsiam embed` writes is read by other tools and by `read_features`, in every format."""
import csv
import json
import os
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import warm
from conftest import ROOT

from simsiam_models.benchmarks.feature_reading import read_features
from simsiam_models.benchmarks.feature_table import SUFFIXES, FeatureTable, check_format, write_table

ABOUT = {'model': 'tiny', 'weights': '0123456789abcdef', 'data': 'photos', 'image_size': 32, 'resize': 37}
PATHS = ['a/=1+1.jpg', 'a/two\nlines.jpg', 'b/ü,"quoted".png', "'b/apostrophe.png", '=b/formula.png']


def make_table(labelled: bool = True) -> FeatureTable:
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    labels = np.array([2, 0, 2, 0, 0]) if labelled else None
    return FeatureTable({'avgpool': x}, PATHS, labels, ['=1+1', 'empty', 'ü'] if labelled else [], ABOUT)


@pytest.mark.parametrize('labelled', [True, False])
@pytest.mark.parametrize('suffix', ['', *SUFFIXES])
def test_every_format_gives_back_what_was_written_bit_for_bit(suffix, labelled, tmp_path):
    if suffix == '.parquet':
        pytest.importorskip('pyarrow')
    table = make_table(labelled)
    write_table(tmp_path / f'x{suffix}', table)
    found = read_features([tmp_path / f'x{suffix}'])
    np.testing.assert_array_equal(found.arrays['avgpool'], table.arrays['avgpool'])
    assert found.paths == PATHS and found.about == ({} if suffix == '.csv' else ABOUT)
    if labelled:
        assert found.classes == ['=1+1', 'ü']  # those that have images
        assert [found.classes[i] for i in found.labels] == [table.classes[i] for i in table.labels]
    else:
        assert found.labels is None and found.classes == []


def test_other_tools_read_the_formats(tmp_path):
    table = make_table()
    x = table.arrays['avgpool']
    for suffix in ('.csv', '.npy', '.safetensors'):
        write_table(tmp_path / f'x{suffix}', table)
    with open(tmp_path / 'x.csv', newline='', encoding='utf-8') as f:
        rows = list(csv.DictReader(f))
    assert rows[0]['path'] == 'a/=1+1.jpg' and rows[4]['path'] == "'=b/formula.png" and rows[1]['label'] == '0'
    assert [np.float32(rows[3][f'avgpool_{i}']) for i in range(7)] == x[3].tolist()
    np.testing.assert_array_equal(np.load(tmp_path / 'x.npy'), x)
    assert json.loads((tmp_path / 'x.json').read_text())['paths'] == PATHS
    load_file = pytest.importorskip('safetensors.numpy').load_file
    np.testing.assert_array_equal(load_file(tmp_path / 'x.safetensors')['avgpool'], x)


def test_parquet_is_read_by_pandas_and_datasets(tmp_path):
    pandas, datasets = pytest.importorskip('pandas'), pytest.importorskip('datasets')
    table, file = make_table(), tmp_path / 'x.parquet'
    write_table(file, table)
    frame = pandas.read_parquet(file)
    np.testing.assert_array_equal(np.stack(frame['avgpool']), table.arrays['avgpool'])
    assert frame['path'].tolist() == PATHS and frame['class'].tolist() == ['ü', '=1+1', 'ü', '=1+1', '=1+1']
    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / 'cache'))
    np.testing.assert_array_equal(rows.with_format('numpy')['avgpool'][:], table.arrays['avgpool'])


def test_under_torchrun_each_process_writes_a_shard_and_all_together_are_the_data(few_digits, tmp_path):
    pytest.importorskip('pyarrow')
    out = tmp_path / 'x.parquet'
    args = ['-m', 'simsiam_models', 'embed', str(few_digits), '--model', 'resnet10t:random', '--image-size', '32',
            '--device', 'cpu', '--cache', str(tmp_path / 'cache'), '--out']
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--local-addr', '127.0.0.1', '--nproc-per-node', '2']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    for launcher, file in (torchrun, out), ([], tmp_path / 'one.npz'):
        done = subprocess.run(
            [warm.python(), *launcher, *args, str(file)], capture_output=True, text=True, timeout=200, cwd=ROOT,
            env=env)
        assert done.returncode == 0, done.stderr
    shards = sorted(tmp_path.glob('x-*.parquet'))
    assert [file.name for file in shards] == ['x-00000-of-00002.parquet', 'x-00001-of-00002.parquet']
    assert not out.exists() and len(read_features([tmp_path / 'one.npz']).paths) == 64
    found, whole = read_features(shards), read_features([tmp_path / 'one.npz'])
    np.testing.assert_array_equal(found.arrays['avgpool'], whole.arrays['avgpool'])
    assert found.paths == whole.paths and (found.labels == whole.labels).all() and found.about == whole.about
    with pytest.raises(ValueError, match='1 shards such as x-00001-of-00002.parquet are given, but there are 2'):
        read_features(shards[1:])


def test_files_of_two_models_are_refused(tmp_path):
    table = make_table()
    write_table(tmp_path / 'a.npz', table)
    write_table(tmp_path / 'b.npz', table._replace(about={**ABOUT, 'weights': 'f' * 16}))
    with pytest.raises(ValueError, match=f'avgpool of 7 numbers, weights {"f" * 16}, unlike .*a.npz; give files from'):
        read_features([tmp_path / 'a.npz', tmp_path / 'b.npz'])


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_damaged_file_is_one_sentence(suffix, tmp_path):
    if suffix == '.parquet':
        pytest.importorskip('pyarrow')
    file = tmp_path / f'x{suffix}'
    write_table(file, make_table())
    file.write_bytes(file.read_bytes()[:-37])
    with pytest.raises(ValueError, match='^--features .*: not as simsiam embed writes it, or damaged') as e:
        read_features([file])
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('change', [
    {'paths': [1, 2]}, {'paths': None}, {'about': []}, {'about': 'x'}, {'labels': [10**400, 0], 'classes': ['a']},
    {'labels': [0.5, 0.5], 'classes': ['a']}, {'labels': [0, 0], 'classes': [1]},
    {'labels': [[0], [0]], 'classes': ['a']}, '[' * 100_000])
def test_a_description_of_another_kind_is_one_sentence(change, tmp_path):
    np.save(tmp_path / 'x.npy', np.zeros((2, 3), np.float32))
    rest = {'feature': 'avgpool', 'paths': ['a', 'b'], 'about': {}}
    (tmp_path / 'x.json').write_text(json.dumps(rest))
    assert len(read_features([tmp_path / 'x.npy']).paths) == 2
    (tmp_path / 'x.json').write_text(change if isinstance(change, str) else json.dumps({**rest, **change}))
    with pytest.raises(ValueError, match='not as simsiam embed writes it, or damaged') as e:
        read_features([tmp_path / 'x.npy'])
    assert str(tmp_path / 'x.npy') in str(e.value)


def test_a_compressed_file_is_read_unless_it_would_unpack_to_far_more(tmp_path):
    names = [f'{i}' for i in range(300)]
    np.savez_compressed(tmp_path / 'x.npz', avgpool=np.zeros((300, 2048), np.float32), paths=names)
    assert read_features([tmp_path / 'x.npz']).arrays['avgpool'].shape == (300, 2048)
    with zipfile.ZipFile(tmp_path / 'y.npz', 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open('avgpool.npy', 'w', force_zip64=True) as f:
            for _ in range(1100):
                f.write(bytes(1 << 20))
    with pytest.raises(ValueError, match='it would unpack to 1.15 GB'):
        read_features([tmp_path / 'y.npz'])


def test_a_pipe_is_no_file_of_features(tmp_path):
    for suffix in ('.npz', '.npy', '.csv', '.parquet', '.safetensors'):
        os.mkfifo(tmp_path / f'x{suffix}')
        with pytest.raises(FileNotFoundError, match='no such file'):
            read_features([tmp_path / f'x{suffix}'])
    (tmp_path / 'y.csv').write_text('path,avgpool_0,avgpool_1\na\n\n')
    with pytest.raises(ValueError, match='y.csv: not as simsiam embed writes it'):
        read_features([tmp_path / 'y.csv'])


def test_a_file_that_is_not_there_or_no_table_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='--features .*none.npz: no such file'):
        read_features([tmp_path / 'none.npz'])
    (tmp_path / 'x.txt').write_text('x')
    with pytest.raises(ValueError, match='x.txt: must be a folder, or a file that ends in .npz'):
        read_features([tmp_path / 'x.txt'])
    with pytest.raises(ValueError, match='is a file; name a folder'):
        (tmp_path / 'x').write_text('x')
        check_format(Path(tmp_path / 'x'), 1)
