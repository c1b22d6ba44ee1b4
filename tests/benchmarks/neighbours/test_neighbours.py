"""`simsiam neighbours` on pieces of scikit-learn's two photographs, with planted copies and a wrong label."""
import base64
import csv
import io
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_sample_image

from simsiam_models import cli
from simsiam_models.benchmarks.feature_table import FeatureTable, write_table
from simsiam_models.benchmarks.neighbours import nearest
from simsiam_models.benchmarks.neighbours.copies import LIMIT, compare, join, look_at
from simsiam_models.benchmarks.neighbours.findings import find_outliers, find_wrong_labels, mask_copies
from simsiam_models.data.readers.images import MemoryImages

CPU = torch.device('cpu')
MODEL = ['--model', 'resnet10t:random', '--image-size', '32', '--device', 'cpu', '--workers', '0']
KINDS = {'exact.jpg': 'same file', 'q40.jpg': 'recompressed', 'half.jpg': 'resized', 'twin.png': 'same pixels',
         'mirrored.jpg': 'mirrored'}


@pytest.fixture(scope='module')
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pieces of 106 px in two classes, the five kinds of copies, and a crop, which is none."""
    root = tmp_path_factory.mktemp('neighbours') / 'photos'
    for name in ('china', 'flower'):
        (root / name).mkdir(parents=True)
        whole = Image.fromarray(load_sample_image(f'{name}.jpg'))
        for i in range(24):
            x, y = i % 6 * 106, i // 6 * 106
            whole.crop((x, y, x + 106, y + 106)).save(root / name / f'{i:02}.jpg', quality=92)
    for i, copy in enumerate(KINDS, 6):
        source = root / 'china' / f'{i:02}.jpg'
        image, target = Image.open(source).convert('RGB'), root / 'china' / f'{i:02}_{copy}'
        if copy.startswith('exact'):
            shutil.copy(source, target)
        elif copy.startswith('half'):
            image.resize((53, 53), Image.Resampling.LANCZOS).save(target, quality=90)
        elif copy.startswith('mirrored'):
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(target, quality=90)
        else:
            image.save(target, **({'quality': 40} if copy.startswith('q40') else {}))
    Image.open(root / 'flower' / '08.jpg').crop((20, 20, 70, 70)).save(root / 'flower' / '08_crop.jpg')
    return root


@pytest.fixture(scope='module')
def found(photos: Path) -> Path:
    """The folder with the tables and the sheet of one run."""
    out = photos.parent / 'out'
    assert cli.main(['neighbours', str(photos), *MODEL, '--cache', str(photos.parent / 'cache'), '--k', '3', '--out',
                     str(out / 'n.csv'), '--html', str(out / 'n.html')]) == 0
    return out


def read(file: Path) -> list[dict[str, str]]:
    with open(file, newline='', encoding='utf-8') as f:
        return list(csv.DictReader(f))


def test_every_kind_of_copy_is_found_and_nothing_else(found):
    rows = read(found / 'n-copies.csv')
    kinds = {Path(row['path']).name.partition('_')[2] or Path(row['original']).name.partition('_')[2]: row['kind']
             for row in rows}
    assert kinds == KINDS and len(rows) == 5
    for row in rows:
        assert Path(row['path']).name[:2] == Path(row['original']).name[:2]


def test_the_neighbours_are_those_of_the_cosine_without_the_image_itself(photos, found):
    file = photos.parent / 'x.npz'
    assert cli.main(['embed', str(photos), *MODEL, '--cache', str(photos.parent / 'cache'), '--out', str(file)]) == 0
    with np.load(file) as table:
        x, paths = table['avgpool'].astype(np.float64), table['paths'].tolist()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosines = x @ x.T
    np.fill_diagonal(cosines, -1)
    rows = read(found / 'n.csv')
    assert [row['path'] for row in rows] == [path for path in paths for _ in range(3)]
    assert {row['path'] == row['neighbour'] for row in rows} == {False}
    expected = np.sort(cosines, 1)[:, :-4:-1].ravel()
    np.testing.assert_allclose([float(row['cosine']) for row in rows], expected, atol=1e-6)
    assert sum(row['copy'] == 'same file' for row in rows) == 2  # each is the nearest of the other


def test_what_embed_wrote_gives_the_same_tables(photos, found, capsys):
    pytest.importorskip('pyarrow')
    pandas = pytest.importorskip('pandas')
    file, out = photos.parent / 'x.parquet', photos.parent / 'again'
    assert cli.main(['embed', str(photos), *MODEL, '--cache', str(photos.parent / 'cache'), '--out', str(file)]) == 0
    assert cli.main(['neighbours', '--features', str(file), '--k', '3', '--out', str(out / 'n.parquet'), '--device',
                     'cpu', '--workers', '0']) == 0
    for name in ('n', 'n-copies', 'n-outliers', 'n-labels'):
        frame, rows = pandas.read_parquet(out / f'{name}.parquet'), read(found / f'{name}.csv')
        assert frame.astype(str).to_dict('records') == rows


def test_features_without_their_images_still_have_neighbours_and_a_line_says_what_is_missing(tmp_path, capsys):
    x = np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32)
    write_table(tmp_path / 'x.csv', FeatureTable({'avgpool': x}, [f'gone/{i}.jpg' for i in range(30)], None, [], {}))
    assert cli.main(['neighbours', '--features', str(tmp_path / 'x.csv'), '--out', str(tmp_path / 'n.csv'), '--html',
                     str(tmp_path / 'n.html'), '--device', 'cpu']) == 0
    said = capsys.readouterr().out
    assert 'gone/0.jpg is not a file on this machine, so there is no search' in said and 'copies:' not in said
    assert len(read(tmp_path / 'n.csv')) == 150 and not (tmp_path / 'n-labels.csv').exists()
    assert 'The image cannot be read.' in (tmp_path / 'n.html').read_text()


def test_a_query_finds_its_copy(photos, tmp_path, capsys):
    query = tmp_path / 'query.jpg'
    Image.open(photos / 'flower' / '14.jpg').save(query, quality=60)
    args = ['neighbours', str(photos), *MODEL, '--cache', str(photos.parent / 'cache'), '--query', str(query)]
    assert cli.main([*args, '--k', '2', '--out', str(tmp_path / 'q.csv'), '--html', str(tmp_path / 'q.html')]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f'{query}:' in lines
    assert re.fullmatch(r'  (0\.9|1\.0)\d+  .*flower/14\.jpg  \(recompressed\)', lines[lines.index(f'{query}:') + 1])
    rows = read(tmp_path / 'q.csv')
    assert len(rows) == 2 and rows[0]['copy'] == 'recompressed' and rows[1]['copy'] == ''
    assert (tmp_path / 'q.html').read_text().count('data:image/jpeg') == 3


def test_a_query_that_is_no_image_is_named_before_anything_is_extracted(photos, tmp_path, capsys):
    bad = tmp_path / 'bad.jpg'
    bad.write_bytes(b'no image')
    for query, said in ((bad, 'cannot be read as an image'), (tmp_path / 'gone.jpg', 'no such file')):
        args = ['neighbours', str(photos), *MODEL, '--cache', str(tmp_path / 'cache'), '--query', str(query)]
        assert cli.main(args) == 1
        err = capsys.readouterr().err
        assert err.startswith(f'simsiam: --query {query}: ') and said in err and err.count('\n') == 1
        assert '--allow-partial' not in err and not (tmp_path / 'cache').exists()


def test_a_query_of_another_model_than_the_features_is_refused(photos, capsys):
    file = photos.parent / 'x.npz'
    cli.main(['embed', str(photos), *MODEL, '--cache', str(photos.parent / 'cache'), '--out', str(file)])
    query = str(photos / 'china' / '00.jpg')
    assert cli.main(['neighbours', '--features', str(file), '--query', query, '--model', 'resnet18:random', '--device',
                     'cpu']) == 1
    assert 'but --model resnet18:random has the weights' in capsys.readouterr().err
    assert cli.main(['neighbours', '--features', str(file), '--query', query, *MODEL[:2], '--device', 'cpu']) == 0
    assert '1.0000' in capsys.readouterr().out  # at the size of the features


class Sheet(HTMLParser):
    """The elements and texts of a page; fails on one that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ('meta', 'img', 'link'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_sheet_is_one_file_whose_images_all_load_and_whose_links_lead_somewhere(found):
    text = (found / 'n.html').read_text()
    page = Sheet(text)
    images = [attrs for tag, attrs in page.tags if tag == 'img']
    assert len(images) > 100 and all(attrs['alt'] for attrs in images)
    with Image.open(io.BytesIO(base64.b64decode(images[0]['src'].removeprefix('data:image/jpeg;base64,')))) as image:
        assert image.format == 'JPEG' and max(image.size) <= 160
    assert not [tag for tag, _ in page.tags if tag in ('script', 'link', 'iframe')]
    assert 'http:' not in text and 'https:' not in text and "default-src 'none'" in text
    ids = {attrs['id'] for _, attrs in page.tags if 'id' in attrs}
    links = [attrs['href'] for tag, attrs in page.tags if tag == 'a']
    assert len(links) == 4 and all(link[1:] in ids for link in links)
    assert 'prefers-color-scheme: dark' in text and 'width=device-width' in text


def test_names_of_files_are_text_in_the_sheet_and_in_the_tables(photos, tmp_path, capsys):
    root = os.fsencode(tmp_path / 'data')
    names = [
        b'<img src=x onerror=alert(1)>.jpg', b'=1+1.jpg', b'two\nFORGED\x1b[2J.jpg', b'\xff\xfe.jpg', b'"&amp;.jpg']
    for i, name in enumerate(names):
        folder = os.path.join(root, [b'<b>bold</b>', b'=1+1'][i % 2])
        os.makedirs(folder, exist_ok=True)
        shutil.copy(photos / 'china' / f'{i:02}.jpg', os.path.join(folder, name))
    assert cli.main(['neighbours', os.fsdecode(root), *MODEL, '--cache', str(tmp_path / 'cache'), '--out',
                     str(tmp_path / 'n.csv'), '--html', str(tmp_path / 'n.html')]) == 0
    said = ''.join(capsys.readouterr())
    assert all(c.isprintable() or c == '\n' for c in said) and '--k 5: using 4, as there are only 5 images' in said
    page = Sheet((tmp_path / 'n.html').read_text())
    assert not [tag for tag, attrs in page.tags if 'onerror' in attrs or attrs.get('src') == 'x']
    joined = ''.join(page.texts)
    assert '<img src=x onerror=alert(1)>.jpg' in joined and '"&amp;.jpg' in joined and '<b>bold</b>' in joined
    assert '\x1b' not in joined and 'two\\nFORGED\\x1b[2J.jpg' in joined
    cells = [cell for row in read(tmp_path / 'n.csv') for cell in row.values()]
    assert not [cell for cell in cells if cell.startswith(('=', '+', '@', '\t', '\r'))]


def test_an_unreadable_image_stops_or_is_left_out_by_name(photos, tmp_path, capsys):
    shutil.copytree(photos / 'china', tmp_path / 'data')
    (tmp_path / 'data' / 'torn.jpg').write_bytes(b'no image')
    args = ['neighbours', str(tmp_path / 'data'), *MODEL, '--cache', str(tmp_path / 'c'), '--out', f'{tmp_path}/n.csv']
    assert cli.main(args) == 1
    assert 'torn.jpg' in capsys.readouterr().err
    assert cli.main([*args, '--allow-partial']) == 0
    said = capsys.readouterr().out
    assert f'left out: {tmp_path}/data/torn.jpg' in said and 'copies: 5 of 29 images, in 5 groups' in said


def test_images_without_neighbours_that_count_have_no_agreement(tmp_path, capsys):
    assert math.isnan(find_wrong_labels(np.array([[1], [0]]), np.zeros((2, 1), bool), np.array([0, 1]))[1])
    for i in range(6):
        file = tmp_path / 'photos' / 'ab'[i // 3] / f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(file)
    html = tmp_path / 'p.html'
    assert cli.main(['neighbours', str(tmp_path / 'photos'), '--model', 'resnet10t:random', '--device', 'cpu',
                     '--workers', '0', '--output', str(tmp_path / 'n.csv'), '--html', str(html)]) == 0
    out, text = capsys.readouterr().out, html.read_text()
    assert 'no image has a neighbour that is not a copy of it' in out and 'nan' not in out
    assert 'None found.' in text and 'nan%' not in text


def test_long_narrow_images_are_copies_only_if_their_pixels_agree():
    rng = np.random.default_rng(0)
    x = [rng.integers(0, 256, (1, 20_000, 3), np.uint8) for _ in range(3)]
    pictures = [*x, x[0][:, ::-1], x[1].transpose(1, 0, 2), rng.integers(0, 256, (1, 60_000, 3), np.uint8)]
    pieces = [np.ascontiguousarray(x) for x in pictures]
    looks = [look_at(MemoryImages(pieces, None, [], 'noise'), i) for i in range(len(pieces))]
    alike = {(i, j) for i in range(6) for j in range(i) if compare(looks[i], looks[j])[0] <= LIMIT}
    assert alike == {(3, 0)} and compare(looks[0], looks[0]) == (0, False)


def test_a_planted_wrong_label_is_suspected_and_copies_do_not_vote():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 40)
    x = (np.eye(2)[labels] @ rng.standard_normal((2, 16)) * 3 + rng.standard_normal((80, 16))).astype(np.float32)
    labels[3] = 1
    found, cosines = nearest.find_others(x, 15, CPU)
    doubts, agree = find_wrong_labels(found, np.ones_like(found, bool), labels)
    assert [(d.row, d.suggested) for d in doubts] == [(3, 0)] and agree == 79 / 80
    groups = np.full(80, -1)
    groups[[3, found[3, 0]]] = 1
    assert mask_copies(found, groups)[3].tolist() == [False] + [True] * 14
    assert mask_copies(found, np.full(80, -1)).all()


def test_an_image_far_from_all_others_is_an_outlier_and_so_are_two_copies_of_it():
    rng = np.random.default_rng(0)
    x = (np.ones(32) + 0.1 * rng.standard_normal((60, 32))).astype(np.float32)
    x[7] = x[8] = rng.standard_normal(32)
    found, cosines = nearest.find_others(x, 15, CPU)
    groups = np.full(60, -1)
    assert {o.row for o in find_outliers(cosines, mask_copies(found, groups))} >= {7, 8}
    groups[[7, 8]] = 1
    assert [o.row for o in find_outliers(cosines, mask_copies(found, groups))] == [7, 8]


def test_links_are_joined_to_groups():
    assert join([(5, 6), (1, 2), (6, 9), (2, 5), (3, 4)]) == [[1, 2, 5, 6, 9], [3, 4]]


def test_each_image_is_left_out_of_its_own_neighbours_among_many_copies_too():
    x = np.ones((20, 4), np.float32)
    found, _ = nearest.find_others(x, 3, CPU)
    assert found.shape == (20, 3) and not (found == np.arange(20)[:, None]).any()


@pytest.mark.parametrize('approximate', [False, True])
def test_faiss_finds_the_same_neighbours_and_states_its_recall(approximate, monkeypatch):
    pytest.importorskip('faiss')
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((20, 16))[rng.integers(0, 20, 900)] + 0.3 * rng.standard_normal((900, 16)))
    x = x.astype(np.float32)
    exact, cosines = nearest.find_nearest(x, x, 6, CPU)
    monkeypatch.setattr(nearest, 'LARGE', 800)
    said: list[str] = []
    found, close = nearest.find_nearest(x, x, 6, CPU, approximate, say=said.append)
    recall = np.mean([len(np.intersect1d(a, b)) / 6 for a, b in zip(exact, found, strict=True)])
    if not approximate:
        assert recall == 1 and not said
        np.testing.assert_allclose(close, cosines, atol=1e-5)
        return
    stated = float(re.search(r'recall (\d\.\d+) of the 6 nearest, measured on 900 images', said[0])[1])
    assert stated >= nearest.RECALL and abs(stated - recall) < 0.002


def test_without_faiss_its_absence_is_named(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(RuntimeError, match='^--approximate needs faiss-cpu: pip install faiss-cpu$'):
        nearest.find_nearest(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), 1, CPU, True)


@pytest.mark.parametrize(('args', 'said'), [
    ('--out n.csv', 'give either DATA or --features FILE'), ('x --features y --out n.csv', 'give either DATA or'),
    ('x', 'nothing to write: add --output FILE.csv, --html FILE.html, or --query IMAGE'),
    ('x --out n.txt', '--output n.txt: the file name must end in one of .csv, .json, .parquet'),
    ('x --html n.txt', '--html n.txt: must be a file that ends in .html'),
    ('x --out n.csv --k 0', '--k 0: must be at least 1')])
def test_a_mistake_is_one_sentence_before_data_are_opened(args, said, capsys):
    assert cli.main(['neighbours', *args.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f'simsiam: {said}') and error.count('\n') == 1


def test_the_commands_of_the_docs_run(photos, tmp_path, monkeypatch, capsys):
    block = re.search(r'```bash\n(simsiam neighbours .*?)```', (ROOT / 'docs/look/neighbours.md').read_text(), re.S)[1]
    commands = [line.partition('#')[0].split() for line in block.replace('\\\n', ' ').splitlines()]
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'PHOTOS').symlink_to(photos)
    shutil.copy(photos / 'china' / '00.jpg', 'photo.jpg')
    assert len(commands) >= 3
    for command in commands:
        if '.parquet' in ' '.join(command):
            pytest.importorskip('pyarrow')
        model = [] if '--features' in command else [*MODEL, '--cache', str(tmp_path / 'cache')]
        words = [name for word in command[1:] for name in (sorted(map(str, Path().glob(word))) or [word])]
        assert cli.main([*words, *model, *([] if model else ['--device', 'cpu'])]) == 0, command
