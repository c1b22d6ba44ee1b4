"""Nearest neighbours are exact, whatever the chunks; votes are those of the protocol."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from sklearn.neighbors import NearestNeighbors

from simsiam_models import cli, create_simsiam
from simsiam_models.benchmarks.backbone import load_backbone
from simsiam_models.benchmarks.options import read_sizes
from simsiam_models.benchmarks.search import (
    EXTRA,
    Rows,
    count_hits,
    error_bound,
    find_candidates,
    find_neighbours,
)
from simsiam_models.training.monitor import knn_accuracy
from simsiam_models.weights.export import export_backbone

pytestmark = pytest.mark.usefixtures('one_thread')


def features(n: int, width: int = 64, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).standard_normal((10, width))
    return np.maximum(centres[rng.integers(10, size=n)] + rng.standard_normal((n, width)), 0).astype(np.float32)


def in_float64(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of equal cosines the lower index first: sums are taken row by row, so equal rows are equal."""
    b, q = bank.astype(np.float64), queries.astype(np.float64)
    cosines = np.stack([(b * row).sum(1) for row in q])
    cosines /= np.maximum(np.sqrt((b * b).sum(1)) * np.sqrt((q * q).sum(1))[:, None], 1e-60)
    order = np.argsort(-cosines, 1, kind='stable')[:, :k]
    return order, np.take_along_axis(cosines, order, 1)


@pytest.mark.parametrize('n, m, width, k', [(500, 37, 64, 20), (5000, 130, 33, 200), (7, 3, 5, 7), (1, 1, 1, 1)])
def test_neighbours_are_those_of_a_loop_in_float64(n, m, width, k):
    bank, queries = features(n, width), features(m, width, 1)
    found, cosines = find_neighbours(bank, queries, k)
    expected, exact = in_float64(bank, queries, k)
    assert (found == expected).all()
    np.testing.assert_allclose(cosines, exact, atol=1e-14)


def test_neighbours_are_scikit_learns():
    bank, queries = features(800), features(90, seed=1)
    distance, expected = NearestNeighbors(n_neighbors=15, metric='cosine', algorithm='brute').fit(
        bank.astype(np.float64)).kneighbors(queries.astype(np.float64))
    found, cosines = find_neighbours(bank, queries, 15)
    assert (found == expected).all()
    np.testing.assert_allclose(1 - cosines, distance, atol=1e-12)


@pytest.mark.parametrize('chunk, block, extra', [(7, 3, 5), (100, 1, 64), (999, 50, 1)])
def test_no_size_of_chunks_changes_a_bit(chunk, block, extra):
    bank, queries = features(1500), features(50, seed=1)
    bank[700:900], bank[1400] = bank[:200], bank[3]  # copies: ties
    expected = find_neighbours(bank, queries, 30)
    got = find_neighbours(bank, queries, 30, chunk=chunk, block=block, extra=extra)
    assert (got[0] == expected[0]).all() and (got[1] == expected[1]).all()


def test_equal_rows_have_equal_cosines_to_the_bit():
    bank, queries = features(1500, 70), features(50, 70, 1)
    bank[700:900], bank[1400] = bank[:200], bank[3]
    found, cosines = find_neighbours(bank, queries, 1500)
    expected, exact = in_float64(bank, queries, 1500)
    assert (found == expected).all() and np.abs(cosines - exact).max() < 1e-15
    of = np.empty_like(cosines)
    np.put_along_axis(of, found, cosines, 1)
    assert (of[:, 700:900] == of[:, :200]).all() and (of[:, 1400] == of[:, 3]).all()
    assert (find_neighbours(bank, queries, 30)[0] == expected[:, :30]).all()


def test_threads_change_no_bit(monkeypatch):
    bank, queries = features(3000), features(300, seed=1)
    expected = find_neighbours(bank, queries, 30)
    torch.set_num_threads(3)
    got = find_neighbours(bank, queries, 30)
    assert torch.get_num_threads() == 3
    assert (got[0] == expected[0]).all() and (got[1] == expected[1]).all()


def test_among_equals_the_lower_index_comes_first():
    bank, queries = features(3000, 33), features(20, 33, 1)
    bank[1000:1010] = bank[2990:] = bank[500] = queries[0]
    found, cosines = find_neighbours(bank, queries, 5)
    assert found[0].tolist() == [500, 1000, 1001, 1002, 1003]
    assert len(set(cosines[0])) == 1


@pytest.mark.parametrize('std', [0, 1e-6, 1e-4])
def test_collapsed_features_are_ranked_exactly(std, capsys):
    rng = np.random.default_rng(0)
    bank, queries = (
        (1 + std * rng.standard_normal((n, 40))).astype(np.float32) for n in (700, 11))
    found, _ = find_neighbours(bank, queries, 10, extra=20)
    assert (found == in_float64(bank, queries, 10)[0]).all()
    assert 'ranking them in float64' in capsys.readouterr().err


def test_without_ties_no_query_takes_the_slow_way(capsys):
    find_neighbours(features(3000), features(200, seed=1), 50)
    assert capsys.readouterr().err == ''


def test_the_bound_holds_for_the_worst_order_of_additions():
    """All products added one after the other: off by more than any library is, and still below e."""
    unit = features(1, 40_000)[0].astype(np.float64)
    unit = (unit / np.sqrt((unit * unit).sum())).astype(np.float32)
    s = np.add.accumulate(unit * unit, dtype=np.float32)[-1]
    assert 1e-6 < abs(float(s) - 1) < error_bound(40_000)


def test_no_product_is_further_off_than_the_bound():
    bank, queries = features(2000, 200), features(60, 200, 1)
    bank[::3] -= 0.5  # negative numbers, too
    values, rows, lengths, own = find_candidates(
        Rows(bank), Rows(queries), 100, torch.device('cpu'), chunk=300, block=16)
    exact = np.einsum('mkd,md->mk', bank[rows].astype(np.float64), queries.astype(np.float64))
    error = np.abs(values - exact / lengths[rows] / own[:, None])
    assert error.max() < error_bound(200) < 2e-5
    assert error.max() > error_bound(200) / 100


def test_rows_of_zeros_have_the_cosine_zero():
    bank, queries = features(50), features(4, seed=1)
    bank[7], queries[2] = 0, 0
    found, cosines = find_neighbours(bank, queries, 50)
    assert (cosines[2] == 0).all() and found[2].tolist() == list(range(50))
    assert cosines[0][found[0] == 7] == 0


@pytest.mark.parametrize('value', [np.nan, np.inf, 1e35])
def test_what_is_not_finite_is_refused(value):
    bank = features(50)
    bank[7, 3] = value
    with pytest.raises(ValueError, match='NaN, infinity'):
        find_neighbours(bank, features(4), 5)


def test_only_the_kept_rows_take_part():
    bank, queries = features(400), features(20, seed=1)
    keep = np.flatnonzero(np.arange(400) % 3)
    found, cosines = find_neighbours(Rows(bank, keep), Rows(queries, np.array([4, 2])), 9)
    expected = find_neighbours(bank[keep], queries[[4, 2]], 9)
    assert (found == expected[0]).all() and (cosines == expected[1]).all()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match='k=51: the bank has 50 images'):
        find_neighbours(features(50), features(4), 51)
    with pytest.raises(ValueError, match='64 and 32'):
        find_neighbours(features(50), features(4, 32), 5)
    with pytest.raises(ValueError, match='float32'):
        find_neighbours(features(50).astype(np.float64), features(4), 5)


def votes(found, cosines, bank_labels, classes, k, t) -> list[list[int]]:
    """Section 5 of the protocol, one image after the other: classes by their sums, of equal sums the lower first."""
    ranked = []
    for rows, s in zip(found, cosines, strict=True):
        sums = [0.0] * classes
        for row, value in zip(rows[:k], s[:k], strict=True):
            sums[bank_labels[row]] += np.exp(value / t)
        ranked.append(sorted(range(classes), key=lambda c: (-sums[c], c)))
    return ranked


@pytest.mark.parametrize('t', [0.07, 0.1, 1.0])
def test_hits_are_those_of_the_protocols_loop(t):
    bank, queries = features(300), features(41, seed=1)  # fewer test images than MMSelfSup's 100
    of, labels = np.random.default_rng(2).integers(12, size=300), np.random.default_rng(3).integers(12, size=41)
    found, cosines = in_float64(bank, queries, 300)
    ks = [20, 1, 3, 300]
    right = count_hits(found, cosines, of, labels, ks=ks, t=t, classes=12)
    for k, (top1, top5) in zip(ks, right, strict=True):
        ranked = votes(found, cosines, of, 12, k, t)
        assert top1 == sum(r[0] == y for r, y in zip(ranked, labels, strict=True))
        assert top5 == sum(y in r[:min(5, k)] for r, y in zip(ranked, labels, strict=True))


def test_among_equal_sums_the_lower_class_wins():
    found, cosines = np.array([[0, 1, 2, 3]] * 2), np.full((2, 4), 0.5)
    right = count_hits(found, cosines, np.array([2, 1, 1, 2]), np.array([1, 2]), ks=[4], t=0.07, classes=3)
    assert right.tolist() == [[1, 2]]


def test_the_smallest_temperature_is_the_nearest_neighbour():
    bank, queries = features(300), features(41, seed=1)
    of, labels = np.random.default_rng(2).integers(10, size=300), np.random.default_rng(3).integers(10, size=41)
    found, cosines = find_neighbours(bank, queries, 20)
    right = count_hits(found, cosines, of, labels, ks=[1, 20], t=1e-6, classes=10)
    assert right[0, 0] == right[1, 0] == (of[found[:, 0]] == labels).sum()


def test_the_monitor_of_a_run_measures_the_same():
    bank, queries = features(900), features(200, seed=1)
    of, labels = np.random.default_rng(2).integers(10, size=900), np.random.default_rng(3).integers(10, size=200)
    found, cosines = find_neighbours(bank, queries, 50)
    got = 100 * count_hits(found, cosines, of, labels, ks=[50], t=0.1, classes=10)[0, 0] / 200
    assert got == knn_accuracy(*map(torch.from_numpy, (bank, of, queries, labels)), 50, 0.1)


MEMORY = '''
import sys, threading, time
import numpy as np, torch
from simsiam_models.benchmarks.search import find_neighbours
torch.set_num_threads(1)
bank, queries = (np.load(path, mmap_mode='r') for path in sys.argv[1:3])
def anonymous():
    return next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('RssAnon')) * 1024
find_neighbours(bank[:500], queries[:64], 10)
torch.mm(torch.zeros(64, 512), torch.zeros(512, 2048))  # the library keeps buffers of its own
before, peak, over = anonymous(), [0], threading.Event()
def watch():
    while not over.wait(0.001):
        peak[0] = max(peak[0], anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
find_neighbours(bank, queries, 10, chunk=2048, block=64)
over.set()
watcher.join()
print(peak[0] - before)
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc')
def test_memory_stays_below_the_stated_bound(tmp_path):
    bank, queries, d, k = features(40_000, 512), features(256, 512, 1), 512, 10
    order = np.argsort(bank @ queries[0])  # ever nearer ones: the most that can be inserted
    np.save(tmp_path / 'bank.npy', bank[order])
    np.save(tmp_path / 'queries.npy', queries)
    done = subprocess.run(
        [sys.executable, '-c', MEMORY, tmp_path / 'bank.npy', tmp_path / 'queries.npy'], cwd=ROOT,
        capture_output=True, text=True, env={'OMP_NUM_THREADS': '1', 'PATH': '', 'MALLOC_ARENA_MAX': '1'})
    assert done.returncode == 0, done.stderr
    kept = k + EXTRA
    bound = 4 * 256 * d + 12 * 256 * kept + 16 * 256 * k + 8 * 40_000
    bound += 4 * 2048 * d + 64 * (16 * 2048 + 128 * kept)
    assert int(done.stdout) < bound < bank.nbytes / 4


@pytest.mark.parametrize('command', ['knn', 'embed'])
@pytest.mark.parametrize(('flags', 'said'), [
    ('--image-size 0 --resize 0', '--image-size 0: must be at least 8 pixels'),
    ('--image-size 0', '--image-size 0: must be at least 8 pixels'),
    ('--image-size -5', '--image-size -5: must be at least 8 pixels'),
    ('--resize 0', '--resize 0: must be at least the image size, 8'),
    ('--image-size 64 --resize 63', '--resize 63: must be at least the image size, 64'),
    ('--workers -3', '--workers -3: must be at least 0'), ('--batch-size 0', '--batch-size 0: must be at least 1')])
def test_a_flag_outside_its_range_is_one_sentence_before_data_are_opened(command, flags, said, tmp_path, capsys):
    more = ['--out', str(tmp_path / 'x.npz')] if command == 'embed' else []
    assert cli.main([command, str(tmp_path / 'none'), '--model', 'none', *more, *flags.split()]) == 1
    assert capsys.readouterr().err == f'simsiam: {said}\n'


def test_sizes_left_out_are_those_of_the_protocol():
    parse = cli.build_parser().parse_args
    for flags, own, sizes in (
            ('', 224, (224, 256)), ('--dataset cifar10', 224, (32, 32)), ('--image-size 64', 224, (64, 73)),
            ('--image-size 64 --dataset cifar100', 224, (64, 64)), ('--resize 300', 224, (224, 300)),
            ('--resize 40 --dataset cifar10', 224, (32, 40)), ('', 32, (32, 37)), ('', 384, (384, 439)),
            ('--image-size 64', 384, (64, 73))):
        assert read_sizes(parse(['knn', 'x', *flags.split()]), own) == sizes


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A folder of train.py that learned from 24 px."""
    torch.manual_seed(0)  # on features of some random networks, --protocol auto diverges
    folder, model = tmp_path_factory.mktemp('run'), create_simsiam('resnet10t', dim=16, pred_dim=4)
    export_backbone(model.backbone, folder / 'backbone', 'resnet10t', size=24, resize=24)
    torch.save({'model': model.state_dict()}, folder / 'checkpoint.pth')
    (folder / 'args.json').write_text(json.dumps({'model': 'resnet10t', 'augmentation': {'size': 24}}))
    return folder


def test_a_backbone_tells_its_own_size(run, tmp_path):
    sizes = {
        str(run): 24, f'local-dir:{run / "backbone"}': 24, str(run / 'checkpoint.pth'): 24,
        'simsiam_resnet18_cifar:random': 32, 'simsiam_resnet50:random': 224, 'test_vit:random': 160}
    assert {name: load_backbone(name).image_size for name in sizes} == sizes
    assert load_backbone('test_vit:random', img_size=64).image_size == 64
    export_backbone(timm.create_model('resnet18', num_classes=0), tmp_path / 'y', 'resnet18', size=48, resize=48)
    assert load_backbone(str(tmp_path / 'y')).image_size == 48
    assert load_backbone(str(tmp_path / 'y' / 'model.safetensors')).image_size == 48
    (tmp_path / 'y' / 'config.json').write_text('{"pretrained_cfg": "x"}')  # of something else
    (tmp_path / 'y' / 'args.json').write_text('{"model": "resnet18", "model_args": "x", "augmentation": [1]}')
    assert load_backbone(str(tmp_path / 'y' / 'model.safetensors')).image_size == 224
    shutil.copytree(run / 'backbone', tmp_path / 'x')
    config = tmp_path / 'x' / 'config.json'
    said = json.loads(config.read_text())
    for size in ([3, 4, 4], [3, 32.5, 32.5], [3, True, True]):
        config.write_text(json.dumps({**said, 'pretrained_cfg': {**said['pretrained_cfg'], 'input_size': size}}))
        with pytest.raises(ValueError, match='input_size .* channels, height and width are needed, 8 to 4096 px'):
            load_backbone(str(tmp_path / 'x'))


@pytest.mark.parametrize('command', ['knn', 'embed', 'linear --protocol fair --epochs 1', 'linear --protocol auto'])
def test_images_have_the_size_of_the_model_and_a_line_says_so(command, run, few_digits, tmp_path, capsys):
    name, *flags = command.split()
    for part in ('train', 'val'):
        shutil.copytree(few_digits, tmp_path / part)
    shutil.rmtree(tmp_path / 'val' / '3')
    out = tmp_path / 'out'
    args = [name, str(tmp_path), *flags, '--model', str(run), '--device', 'cpu', '--out', str(out)]
    if '--epochs' not in flags:
        args += ['--cache', str(tmp_path / 'cache')]
    line = f'images of 24 px, the size in the configuration of {run} (--image-size changes it)'
    assert cli.main([*args, '--resize', '23']) == 1
    assert capsys.readouterr().err.startswith('simsiam: --resize 23: must be at least the image size, 24')
    for more, said, sizes in (([], 1, (24, 27)), (['--image-size', '32'], 0, (32, 37))):
        assert cli.main([*args, *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines.count(line) == said
        if name == 'embed':
            about = [json.loads(p.read_text()) for p in (tmp_path / 'cache').glob('*/about.json')]
            assert (sizes[0], sizes[1]) in [(a['transform']['crop'], a['transform']['resize']) for a in about]
            continue
        assert lines.count('1 of 10 classes have no test image: 3') == 1
        path, = (Path(text.removeprefix('written to ')) for text in lines if text.startswith('written to '))
        protocol = json.loads(path.read_text())['protocol']
        assert (protocol['image_size'], protocol['resize']) == sizes


@pytest.mark.parametrize('part', ['train', 'val'])
def test_where_no_image_can_be_read_there_is_nothing_to_measure(part, few_digits, tmp_path, capsys):
    data = tmp_path / 'data'
    classes = '34' if part == 'train' else '3'  # one class to learn from is refused
    for name in '34':
        shutil.copytree(few_digits / name, data / ('val' if part == 'train' else 'train') / name)
    for name in classes:
        (data / part / name).mkdir(parents=True)
        (data / part / name / 'x.jpg').write_bytes(b'no JPEG')
    broken = data / part / '3' / 'x.jpg'
    command = [
        'knn', str(data), '--model', 'resnet10t:random', '--image-size', '32', '--k', '1', '--allow-partial',
        '--output', str(tmp_path / 'results'), '--cache', str(tmp_path / 'cache')]
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    name = 'training' if part == 'train' else 'test'
    assert f'none of the {len(classes)} {name} images can be read, the first: {broken}' in said
    assert 'Warning' not in said
    assert not list(tmp_path.glob('results/*'))


def test_the_command_measures_and_writes_a_record(digits, tmp_path, capsys):
    for part, odd in (('train', 0), ('val', 1)):
        for i, file in enumerate(sorted(digits.glob('*/*'))):
            if i % 5 == odd:
                target = tmp_path / 'data' / part / file.parent.name / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(file)
    command = [
        'knn', str(tmp_path / 'data'), '--model', 'resnet10t:random', '--image-size', '32', '--resize', '32', '--k',
        '1', '10', '200', '201', '500', '--device', 'cpu', '--output', str(tmp_path / 'results'), '--cache',
        str(tmp_path / 'cache')]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    path, = (tmp_path / 'results').glob('folder_knn_T0.07-*.json')
    assert 'k=10' in said and said.endswith(f'written to {path}\n')
    assert '\n--k 201 500: skipped, as there are only 200 training images\n' in said
    record = json.loads(path.read_text())
    assert record['protocol']['k'] == [1, 10, 200]
    assert record['metrics'].keys() == {f'k={k}{top}' for k in (1, 10, 200) for top in ('', ' top-5')}
    assert record['metrics']['k=1'] == record['metrics']['k=1 top-5'] > 60  # digits; chance is 10
    assert record['metrics']['k=10'] < record['metrics']['k=10 top-5'] <= 100
    assert record['protocol'].items() >= {'T': 0.07, 'image_size': 32, 'resize': 32, 'features': 'avgpool'}.items()
    assert record['data']['counts'] == {'train': 200, 'test': 200, 'classes': 10, 'test_classes': 10}
    for flags, words in {
        '--k 0': '--k 0: must be whole numbers from 1, each once',
        '--temperature 0': '--temperature 0: must be more than 0',
        '--k 5 5': '--k 5 5: must be whole numbers from 1, each once',
        '--k 201 300': '--k 201 300: there are 200 training images; use --k 200 or less'}.items():
        assert cli.main([*command, *flags.split()]) == 1
        assert capsys.readouterr().err.endswith(f'simsiam: {words}\n')
