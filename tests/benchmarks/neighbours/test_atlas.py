"""`simsiam atlas`: what the page holds, and what it does in a browser."""
import base64
import csv
import importlib.util
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, Opened
from PIL import Image
from sklearn.datasets import load_sample_image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from simsiam_models import cli
from simsiam_models.benchmarks.feature_table import FeatureTable, write_table
from simsiam_models.benchmarks.neighbours.atlas_data import write_classes
from simsiam_models.benchmarks.neighbours.sprites import choose_side, make_sprites, sort_by_place
from simsiam_models.data import open_data
from simsiam_models.data.readers.images import MemoryImages
from simsiam_models.pages.atlas import FOLDER, embed_json
from simsiam_models.runtime.messages import printable

N = 60
MODEL = ['--model', 'resnet10t:random', '--image-size', '32', '--device', 'cpu', '--workers', '0']


def cut(i: int) -> Image.Image:
    """The piece number i of scikit-learn's two photographs, 64 x 48 px."""
    x, y = i % 30 % 6 * 100, i % 30 // 6 * 80
    return Image.fromarray(load_sample_image(('china.jpg', 'flower.jpg')[i // 30])).crop((x, y, x + 64, y + 48))


def make_features(paths: list[str], file: Path, labels: np.ndarray | None, classes: list[str]) -> np.ndarray:
    centres = np.random.default_rng(0).standard_normal((2, 16))
    x = 3 * centres[np.arange(len(paths)) * 2 // len(paths)]
    x = (x + np.random.default_rng(1).standard_normal(x.shape)).astype(np.float32)
    write_table(file, FeatureTable({'avgpool': x}, paths, labels, classes, {'model': 'a model', 'weights': 'abc'}))
    return x


@pytest.fixture(scope='module')
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pieces of photographs in two classes, and a smaller copy of one of them."""
    root = tmp_path_factory.mktemp('atlas') / 'photos'
    for i in range(N):
        file = root / ('china', 'flower')[i // 30] / f'{i:02}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        cut(i).save(file, quality=95)
    cut(14).resize((48, 36)).save(root / 'flower' / '99.jpg', quality=95)
    return root


@pytest.fixture(scope='module')
def features(photos: Path) -> np.ndarray:
    paths = sorted(map(str, photos.rglob('*.jpg')))
    labels = np.array([path.split(os.sep)[-2] == 'flower' for path in paths], int)
    return make_features(paths, photos.parent / 'x.npz', labels, ['china', 'flower'])


@pytest.fixture(scope='module')
def page(photos: Path, features: np.ndarray) -> Path:
    file = photos.parent / 'atlas.html'
    assert cli.main(['atlas', '--features', str(photos.parent / 'x.npz'), '--html', str(file), '--device', 'cpu',
                     '--projection', 'tsne', 'pca', '--k', '5', '--workers', '0']) == 0
    return file


def read(page: Path) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text())[1])


def numbers(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


def test_the_map_is_the_projection_of_the_protocol_in_the_unit_square(page, features):
    tsne = TSNE(perplexity=30, early_exaggeration=12, learning_rate=200, max_iter=1000, n_iter_without_progress=300,
                init='random', random_state=0).fit_transform(features)
    pca = PCA(2, random_state=0).fit_transform(features)
    for shown, expected in zip(read(page)['maps'], (tsne, pca), strict=True):
        xy = numbers(shown['xy'], '<f4').reshape(-1, 2)
        assert xy.min() >= -1e-6 and xy.max() <= 1 + 1e-6 and max(np.ptp(xy, 0)) == pytest.approx(1)
        flipped = expected * (1, -1)
        scale = np.ptp(flipped, 0).max()
        np.testing.assert_allclose(xy - xy.mean(0), (flipped - flipped.mean(0)) / scale, atol=1e-5)


def test_the_nearest_images_in_the_page_are_those_of_the_float64_cosine(page, features):
    data, x = read(page), features.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosines = x @ x.T
    np.fill_diagonal(cosines, -2)
    order = np.argsort(-cosines, 1, kind='stable')[:, :5]
    assert (numbers(data['near'], '<u4').reshape(-1, 5) == order).all()
    stored = numbers(data['cosines'], '<u2').reshape(-1, 5) / 65535 * 2 - 1
    np.testing.assert_allclose(stored, np.take_along_axis(cosines, order, 1), atol=2e-5)


def test_the_copy_is_a_finding_of_both_images(page):
    copies = next(f for f in read(page)['findings'] if f['key'] == 'copies')
    assert copies['rows'] == [[14, 'has copies'], [N, 'copy of china/14.jpg (resized)']]


def test_every_thumbnail_shows_its_image(page, photos):
    data, text = read(page), page.read_text()
    tiles, names = data['tiles'], data['names']
    place, sizes = numbers(tiles['place'], '<u4'), numbers(tiles['sizes'], 'u1').reshape(-1, 2)
    assert sorted(place) == list(range(N + 1)) and tiles['side'] == 64  # the images are no larger
    sheet = Image.open(io.BytesIO(base64.b64decode(re.search(r'id="sheet0">(.*?)</script>', text)[1])))
    for row in (0, 17, N):
        x, y = place[row] % 8 * 64, place[row] // 8 * 64
        tile = np.asarray(sheet.crop((x, y, x + sizes[row, 0], y + sizes[row, 1])), float)
        image = np.asarray(Image.open(photos / names[row]), float)
        assert tile.shape == image.shape and np.abs(tile - image).mean() < 12


def test_a_page_of_ten_thousand_photographs_is_smaller_than_60_MB():
    """Thumbnails are nearly all of a page; these are pieces of photographs, enlarged to the full tile."""
    pieces = np.stack([np.asarray(cut(i).resize((96, 72))) for i in range(N)])
    sprites = make_sprites(MemoryImages(pieces, None, [], 'pieces'), np.arange(N), 96, 0)
    assert 10_000 / N * sum(map(len, sprites.sheets)) * 4 / 3 < 55e6
    blank = MemoryImages(np.zeros((1, 1, 1, 3), np.uint8).repeat(200, 2), None, [], 'wide')

    class Many(MemoryImages):
        def __len__(self) -> int:
            return self.n

        def read(self, index: int) -> np.ndarray:
            return blank.images[0]
    for n, side in ((100, 128), (10_000, 96), (40_000, 48), (1_000_000, 32)):
        many = Many(blank.images, None, [], 'many')
        many.n = n
        assert choose_side(many) == side


def test_thumbnails_that_are_close_on_the_map_share_a_sheet():
    xy = np.random.default_rng(0).random((64 * 16, 2))
    order = sort_by_place(xy)
    assert sorted(order) == list(range(len(xy)))
    assert max(np.ptp(xy[order[i:i + 64]], 0).max() for i in range(0, len(xy), 64)) < 0.4


@pytest.mark.parametrize(('n', 'folders'), [(2, False), (3, False), (3, True), (40, True)])
def test_flat_folders_one_class_and_few_images_have_a_page(n, folders, tmp_path, browser, capsys):
    for i in range(n):
        (tmp_path / 'data' / ('one' if folders else '')).mkdir(parents=True, exist_ok=True)
        cut(i).save(tmp_path / 'data' / ('one' if folders else '') / f'{i}.png')
    assert cli.main(['atlas', str(tmp_path / 'data'), *MODEL, '--cache', str(tmp_path / 'c'), '--html',
                     str(tmp_path / 'a.html')]) == 0
    assert ('too few for t-SNE, which needs 31; the map is a PCA' in capsys.readouterr().out) == (n < 31)
    opened = browser.open(tmp_path / 'a.html')
    assert not opened.messages and opened.page.locator('#classes li').count() == int(folders)
    opened.page.fill('#find', '1')
    opened.page.click('#found button >> nth=0')
    assert opened.page.locator('#found button').count() == min(n, 25)


def test_an_unreadable_image_is_named_on_the_page(photos, tmp_path, browser, capsys):
    for i in range(4):
        (tmp_path / 'data').mkdir(exist_ok=True)
        cut(i).save(tmp_path / 'data' / f'{i}.png')
    (tmp_path / 'data' / 'torn.jpg').write_bytes(b'no image')
    args = ['atlas', str(tmp_path / 'data'), *MODEL, '--cache', str(tmp_path / 'c'), '--html', str(tmp_path / 'a.html')]
    assert cli.main(args) == 1 and 'torn.jpg' in capsys.readouterr().err
    assert cli.main([*args, '--allow-partial']) == 0
    page = browser.open(tmp_path / 'a.html').page
    assert page.get_by_text('1 image could not be read').is_visible()
    assert 'torn.jpg' in page.locator('details li').text_content()


@pytest.mark.parametrize(('args', 'said'), [
    ('--html a.html', 'give either DATA or --features FILE'),
    ('x --html a.txt', '--html a.txt: must be a file that ends in .html'),
    ('x --html a.html --k 0', '--k 0: must be at least 1'),
    ('x --html a.html --thumbnail 300', '--thumbnail 300: must be in 16 .. 240 pixels'),
    ('--features x.npz --html a.html', 'x.npz: a single image has no neighbours; give more images'),
    ('--features y.npz --html a.html --projection tsne',
     '--projection tsne: needs at least 31 images, but there are 3; use --projection pca')])
def test_a_mistake_is_one_sentence(args, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, n in (('x.npz', 1), ('y.npz', 3)):
        make_features([f'gone/{i}.jpg' for i in range(n)], tmp_path / name, None, [])
    assert cli.main(['atlas', *args.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f'simsiam: {said}') and error.count('\n') == 1


def test_without_umap_its_package_is_named(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None if name == 'umap' else find(name))
    assert cli.main(['atlas', 'x', '--html', 'a.html', '--projection', 'umap']) == 1
    assert capsys.readouterr().err == 'simsiam: --projection umap needs umap-learn: pip install umap-learn\n'


@pytest.mark.parametrize(('classes', 'read'), [
    (['0', '01', '2'], ['0', '1', '2']), (['1', '01'], ["'01", "'1"]), (['1', 'cat'], ["'1", 'cat']),
    (['123456', '-1'], ["'-1", "'123456"]), (['cat', '=x'], ["'=x", 'cat'])])
def test_a_list_keeps_classes_apart_that_look_like_numbers(classes, read, tmp_path):
    for i in range(len(classes)):
        cut(i).save(tmp_path / f'{i}.jpg')
    with open(tmp_path / 'list.csv', 'w') as f:
        csv.writer(f).writerows([('path', 'label'), *((f'{i}.jpg', c) for i, c in enumerate(write_classes(classes)))])
    images = open_data(str(tmp_path / 'list.csv'))[0]
    assert images.classes == read and len(set(images.labels.tolist())) == len(classes)


def test_no_text_ends_the_element_that_holds_it():
    text = '</script><!--<script>\udcff\u2028"'
    assert '<' not in embed_json([text]) and embed_json([text]).isascii() and json.loads(embed_json([text])) == [text]


# Machado et al. (2009), severity 1: protanopia, deuteranopia, tritanopia; linear RGB.
SIGHTS = [np.eye(3), [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
          [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
          [[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]]]
TO_LMS = np.array([[.4122214708, .5363325363, .0514459929], [.2119034982, .6806995451, .1073969566],
                   [.0883024619, .2817188376, .6299787005]])
TO_LAB = np.array([[.2104542553, .7936177850, -.0040720468], [1.9779984951, -2.4285922050, .4505937099],
                   [.0259040371, .7827717662, -.8086757660]])


@pytest.mark.parametrize('dark', [False, True])
def test_the_colour_blind_tell_any_two_colours_apart_and_all_stand_out(dark):
    rules = [' '.join(rule.split()) for rule in re.findall(
        r':root \{(.*?)\}', (FOLDER / 'atlas.css').read_text(), re.S)]
    values = dict(re.findall(r'--(\w+): #(\w{6})', rules[int(dark)]))
    assert rules[2] == rules[0].replace('--map: #fbfbfa', '--map: #fff')  # paper is light
    names = [*(f'c{i}' for i in range(8)), 'map']
    srgb = np.array([[int(values[name][i:i + 2], 16) for i in (0, 2, 4)] for name in names])
    linear = np.where(srgb <= 10, srgb / 255 / 12.92, ((srgb / 255 + .055) / 1.055) ** 2.4)
    light = linear @ [.2126, .7152, .0722] + .05
    assert (np.maximum(light[:8], light[8]) / np.minimum(light[:8], light[8])).min() >= 3
    for sight in SIGHTS:
        lab = np.cbrt(np.clip(linear[:8] @ np.array(sight).T, 0, 1) @ TO_LMS.T) @ TO_LAB.T
        apart = np.linalg.norm(lab[:, None] - lab, axis=2) + np.eye(8)
        assert apart.min() >= 0.09


# ---- In the browser ----

def count_colours(opened: Opened) -> int:
    """Different colours on the map."""
    pixels = 'pen.getImageData(0, 0, canvas.width, canvas.height).data'
    return opened.page.evaluate(f'() => new Set(new Uint32Array({pixels}.buffer)).size')


@pytest.mark.parametrize('dark', [False, True])
@pytest.mark.parametrize('width', [360, 1200])
def test_the_page_is_quiet_drawn_accessible_and_fits(page, browser: Browser, width, dark):
    opened = browser.open(page, width, dark)
    opened.page.fill('#find', 'china/03')
    opened.page.click('#found button')
    opened.page.wait_for_timeout(300)
    assert not opened.messages and not opened.requests
    assert count_colours(opened) > 100 and opened.overflow() <= 0
    assert not opened.violations() and not opened.unreached()
    opened.page.emulate_media(media='print')
    assert opened.page.locator('#classes').is_visible() and not opened.page.locator('#tools').is_visible()
    opened.page.wait_for_function('() => pen.getImageData(1, 1, 1, 1).data.every(value => value === 255)')


def test_a_search_finds_the_image_itself_first_and_then_the_exact_neighbours(page, browser: Browser):
    opened, data = browser.open(page), read(page)
    opened.page.fill('#find', 'flower/40')
    assert opened.page.locator('#found button').count() == 1
    opened.page.click('#found button')
    rows = [int(row) for row in opened.page.eval_on_selector_all('#found button', 'all => all.map(b => b.dataset.row)')]
    row = data['names'].index('flower/40.jpg')
    assert rows == [row, *numbers(data['near'], '<u4').reshape(-1, 5)[row]]
    values = opened.page.locator('#found button span').all_text_contents()
    assert values[0] == '1.000' and float(values[1]) < 1
    assert opened.page.locator('#found-title').text_content() == 'Nearest to flower/40.jpg'


def places(opened: Opened) -> np.ndarray:
    """Where the images lie in the window."""
    box = opened.page.locator('#map').bounding_box()
    return np.array(opened.page.evaluate('() => rows.map(row => [sx(row), sy(row)])')) + (box['x'], box['y'])


def export(opened: Opened, file: Path) -> Path:
    with opened.page.expect_download() as download:
        opened.page.click('#save')
    download.value.save_as(file)
    return file


def test_a_lasso_selects_what_it_surrounds_and_the_list_reads_as_data(page, photos, browser: Browser):
    opened, data = browser.open(page), read(page)
    at = places(opened)
    x = np.median(at[:, 0]) + 0.3
    inside = {data['names'][row] for row in np.flatnonzero((at[:, 0] > x) & (at[:, 1] > 0))}
    right, top, bottom = at[:, 0].max() + 15, at[:, 1].min() - 12, at[:, 1].max() + 12
    opened.page.click('#lasso')
    opened.page.mouse.move(x, top)
    opened.page.mouse.down()
    for corner in ((right, top), (right, bottom), (x, bottom)):
        opened.page.mouse.move(*corner, steps=3)
    opened.page.mouse.up()
    assert 0 < len(inside) < N and opened.page.locator('#count').text_content() == f'{len(inside)} images selected'
    images = open_data(str(export(opened, photos / 'selection.csv')))[0]
    assert {os.path.relpath(images.name_of(i), photos) for i in range(len(images))} == inside
    for i, label in enumerate(images.labels):
        assert images.classes[label] == Path(images.name_of(i)).parent.name
    opened.page.fill('#prefix', str(photos) + '/')
    images = open_data(str(export(opened, photos.parent / 'elsewhere.csv')))[0]
    assert len(images) == len(inside) and images.read(0).shape[2] == 3


def test_classes_and_findings_choose_what_is_shown_and_selected(page, browser: Browser):
    opened = browser.open(page)
    opened.page.click('#classes li:nth-child(2) button')
    opened.page.click('#select-shown')
    assert opened.page.locator('#count').text_content() == '31 images selected'
    opened.page.click('#all')
    opened.page.click('#clear')
    opened.page.check('#findings input >> nth=0')
    opened.page.click('#select-shown')
    assert opened.page.locator('#count').text_content() == '2 images selected'
    opened.page.click('#list')
    assert opened.page.locator('#found bdi').all_text_contents() == ['14.jpg', '99.jpg']


def test_the_keyboard_alone_searches_selects_and_saves(page, photos, browser: Browser):
    opened, names = browser.open(page), read(page)['names']

    def go(id_: str) -> None:
        for _ in range(80):
            opened.page.keyboard.press('Tab')
            if opened.page.evaluate('() => document.activeElement.id') == id_:
                return
        raise AssertionError(id_)
    say = opened.page.locator('#status')
    go('map')
    opened.page.keyboard.press('ArrowRight')
    first = say.text_content()
    opened.page.keyboard.press('ArrowRight')
    assert first.split(',')[0] in names and say.text_content() != first
    name = say.text_content().split(',')[0]
    opened.page.keyboard.press('Space')
    assert opened.page.locator('#count').text_content() == '1 image selected'
    opened.page.keyboard.press('Enter')
    assert opened.page.locator('#found-title').text_content() == f'Nearest to {name}'
    opened.page.keyboard.press('Escape')
    seen = set()
    opened.page.keyboard.press('PageUp')
    for _ in range(N + 1):
        opened.page.keyboard.press('PageUp')
    for _ in range(N + 1):
        seen.add(say.text_content().split(',')[0])
        opened.page.keyboard.press('PageDown')
    assert seen == set(names)  # also those that others cover
    go('find')
    opened.page.keyboard.type('flower/5')
    assert opened.page.locator('#found button').count() == 10
    go('save')
    with opened.page.expect_download() as download:
        opened.page.keyboard.press('Enter')
    download.value.save_as(photos / 'keys.csv')
    with open(photos / 'keys.csv', newline='') as f:
        assert [row['path'] for row in csv.DictReader(f)] == [name]


def test_keys_and_buttons_zoom_around_the_image_in_focus(page, browser: Browser):
    opened, names = browser.open(page), read(page)['names']
    opened.page.locator('#map').focus()
    opened.page.keyboard.press('PageDown')
    opened.page.keyboard.press('PageDown')
    row, before = names.index(opened.page.locator('#status').text_content().split(',')[0]), places(opened)
    for _ in range(9):
        opened.page.keyboard.press('+')
    np.testing.assert_allclose(places(opened)[row], before[row], atol=0.5)
    assert np.ptp(places(opened), 0).min() > 20 * np.ptp(before, 0).min()
    opened.page.keyboard.press('Enter')
    assert opened.page.locator('#found-title').text_content() == f'Nearest to {names[row]}'
    for _ in range(9):
        opened.page.click('#zoom-out')
    np.testing.assert_allclose(places(opened), before, atol=1)


def test_dragging_moves_the_map_and_the_wheel_zooms_to_the_pointer(page, browser: Browser):
    opened = browser.open(page)
    before = places(opened)
    opened.page.mouse.move(*before[7])
    opened.page.mouse.wheel(0, -400)
    after = places(opened)
    np.testing.assert_allclose(after[7], before[7], atol=0.5)
    assert np.ptp(after, 0).min() > 1.5 * np.ptp(before, 0).min()
    opened.page.mouse.down()
    opened.page.mouse.move(*(before[7] + (40, -25)), steps=8)
    opened.page.mouse.up()
    moved = places(opened) - after
    assert np.ptp(moved, 0).max() < 0.01 and np.abs(moved[0] - (40, -25)).max() < 10  # the first pixels are a click
    opened.page.select_option('#projection', 'PCA')
    opened.page.wait_for_timeout(600)
    assert np.abs(places(opened) - after - moved).max() > 5 and not opened.messages


HOSTILE = [
    b'<img src=x onerror=alert(1)>.jpg', b'=1+1.jpg', b'two\nlines, "quoted".jpg', b'\xff\xfe.jpg', 'שלום.jpg'.encode(),
    '🦊 fox.jpg'.encode(), '\u202ebidi.jpg'.encode(), b' blank.jpg', b'\x1b[2J.jpg', b"'; alert(1)//.jpg"]
CLASSES = ['</script><script>alert(1)</script>', '=1+1', 'שלום', '🦊\u202e']


def test_names_show_as_text_and_come_back_from_a_list(tmp_path, browser: Browser):
    root = os.fsencode(tmp_path / 'data')
    os.makedirs(root)
    for i, name in enumerate(HOSTILE):
        path = os.path.join(root, name.replace(b'/', b'_'))
        cut(i).save(tmp_path / 'x.jpg')
        os.rename(tmp_path / 'x.jpg', path)
    names = [name.replace(b'/', b'_').decode(errors='surrogateescape') for name in HOSTILE]
    with open(tmp_path / 'data' / 'list.csv', 'w', newline='', errors='surrogateescape') as f:
        csv.writer(f).writerows([('path', 'label'), *((name, CLASSES[i % 4]) for i, name in enumerate(names))])
    page = tmp_path / 'a.html'
    assert cli.main(['atlas', str(tmp_path / 'data' / 'list.csv'), *MODEL, '--cache', str(tmp_path / 'c'), '--html',
                     str(page)]) == 0
    opened = browser.open(page)
    opened.page.click('#select-shown')
    opened.page.click('#list')
    assert opened.page.locator('#found bdi').all_text_contents() == [printable(name) for name in names]
    assert sorted(opened.page.locator('#classes bdi').all_text_contents()) == sorted(map(printable, CLASSES))
    assert not opened.messages and opened.page.locator('img').count() == 0 and not opened.violations()
    images = open_data(str(export(opened, tmp_path / 'data' / 'selection.csv')))[0]
    assert [os.path.relpath(images.name_of(i), tmp_path / 'data') for i in range(len(images))] == names
    expected = ["'=1+1" if name == '=1+1' else name for name in CLASSES]  # nothing for a spreadsheet to compute
    assert [images.classes[k] for k in images.labels] == [expected[i % 4] for i in range(len(names))]
    assert [images.read(i).shape for i in range(len(images))] == [(48, 64, 3)] * len(names)
