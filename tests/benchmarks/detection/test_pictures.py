"""The sheet of pictures: where truth and prediction stand, and what can be read."""
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simsiam_models.benchmarks.detection import pictures
from simsiam_models.benchmarks.detection.pictures import PANEL, Drawn, SheetRow, write_sheet
from simsiam_models.benchmarks.panels import GAP, TITLE

NOTHING = Drawn(np.zeros((0, 4)), np.zeros(0, np.int64))
BOX = Drawn(np.array([[60.0, 60, 180, 200]]), np.array([1]))
CLASSES = ['cat', 'dog', 'bird']


def row(truth: Drawn = NOTHING, predicted: Drawn = NOTHING, height: int = 240, width: int = 240) -> SheetRow:
    return SheetRow('gray.jpg', np.full((height, width, 3), 128, np.uint8), truth, predicted)


def panels(path: Path, height: int = PANEL) -> list[np.ndarray]:
    """The left and the right picture of a sheet of one row, float."""
    sheet = np.asarray(Image.open(path).convert('RGB')).astype(float)
    assert sheet.shape == (height + TITLE + 2 * GAP, 2 * PANEL + 3 * GAP, 3)
    return [sheet[GAP + TITLE:GAP + TITLE + height, x:x + PANEL] for x in (GAP, 2 * GAP + PANEL)]


def coloured(panel: np.ndarray) -> np.ndarray:
    return panel.max(2) - panel.min(2) > 60


def test_truth_is_on_the_left_and_prediction_on_the_right(tmp_path: Path):
    write_sheet(tmp_path / 'a.png', [row(BOX)], CLASSES)
    write_sheet(tmp_path / 'b.png', [row(NOTHING, BOX)], CLASSES)
    for path, drawn in ((tmp_path / 'a.png', 0), (tmp_path / 'b.png', 1)):
        found = panels(path)
        assert coloured(found[drawn]).any() and (found[1 - drawn] == 128).all()


def test_a_box_of_negative_size_is_drawn_where_it_starts(tmp_path: Path):
    """It stays in the truth, as in COCO's metric."""
    write_sheet(tmp_path / 'sheet.png', [row(Drawn(np.array([[180.0, 60, 120, 200]]), np.array([1])))], CLASSES)
    assert coloured(panels(tmp_path / 'sheet.png')[0])[60 * PANEL // 240:].any()


def test_a_box_lies_where_its_object_is(tmp_path: Path):
    write_sheet(tmp_path / 'sheet.png', [row(BOX)], CLASSES)
    rows, columns = np.nonzero(coloured(panels(tmp_path / 'sheet.png')[0]))
    scale = PANEL / 240
    assert abs(columns.min() - 60 * scale) < 4 and abs(columns.max() - 180 * scale) < 4
    assert abs(rows.max() - 200 * scale) < 4 and -25 < rows.min() - 60 * scale < -10  # the caption stands above
    inside = panels(tmp_path / 'sheet.png')[0][int(70 * scale):int(190 * scale), int(70 * scale):int(170 * scale)]
    assert (inside == 128).all()


def test_a_mask_colours_its_object_and_nothing_else(tmp_path: Path):
    mask = np.zeros((1, 240, 240), np.uint8)
    mask[0, 100:150, 80:160] = 1
    write_sheet(tmp_path / 'sheet.png', [row(NOTHING, BOX._replace(masks=mask))], CLASSES)
    found = coloured(panels(tmp_path / 'sheet.png')[1])
    assert found[200:300, 160:320].all() and not found[310:390, 130:350].any()
    empty = BOX._replace(masks=np.zeros_like(mask))
    write_sheet(tmp_path / 'empty.png', [row(empty)], CLASSES)
    write_sheet(tmp_path / 'none.png', [row(BOX)], CLASSES)
    assert (tmp_path / 'empty.png').read_bytes() == (tmp_path / 'none.png').read_bytes()


def test_a_class_has_the_same_colour_in_both_and_another_than_its_neighbours(tmp_path: Path):
    other = BOX._replace(labels=np.array([2]))
    write_sheet(tmp_path / 'sheet.png', [row(BOX, BOX), row(BOX, other)], CLASSES)
    sheet = np.asarray(Image.open(tmp_path / 'sheet.png'))
    edge = [sheet[y + 300, x + 120] for y in (GAP + TITLE, 2 * (GAP + TITLE) + PANEL) for x in (GAP, 2 * GAP + PANEL)]
    assert (edge[0] == edge[1]).all() and (edge[0] == edge[2]).all() and (edge[0] != edge[3]).any()


def test_captions_are_drawn_inside_the_picture_with_class_and_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts, draw = [], pictures._write
    monkeypatch.setattr(pictures, '_write', lambda p, box, text, c: texts.append(text) or draw(p, box, text, c))
    boxes = np.array([[0.0, 0, 20, 20], [220, 230, 239, 239], [0, 0, 240, 240]])
    scores = Drawn(boxes, np.array([0, 1, 2]), np.array([0.987, 0.5, 0.051]))
    write_sheet(tmp_path / 'sheet.png', [row(Drawn(boxes, np.array([0, 1, 2])), scores)], CLASSES)
    assert texts == ['bird', 'dog', 'cat', 'bird 0.05', 'dog 0.50', 'cat 0.99']
    sheet = np.asarray(Image.open(tmp_path / 'sheet.png')).astype(int)
    for x in (0, GAP + PANEL):  # the space between the panels stays white
        assert (sheet[GAP + TITLE:, x:x + GAP] == 255).all()


@pytest.mark.parametrize('name', [
    'caf\u00e9', '\u732b', 'a\x1b[31m', 'b\nc', 'a name that is longer than the picture is wide ' * 4, '', '\ud800'])
def test_every_name_of_a_class_and_of_a_file_can_be_drawn(tmp_path: Path, name: str):
    narrow = row(BOX._replace(scores=np.array([0.5])), width=30)._replace(title=name)
    write_sheet(tmp_path / 'sheet.png', [narrow], ['', name])
    write_sheet(tmp_path / 'plain.png', [narrow._replace(title='')], ['', '' if name else 'x'])
    assert (tmp_path / 'sheet.png').read_bytes() != (tmp_path / 'plain.png').read_bytes()


@pytest.mark.parametrize('height, width', [(1, 300), (300, 1), (2000, 1500), (5, 5)])
def test_pictures_of_any_size_fill_a_panel(tmp_path: Path, height: int, width: int):
    boxes = np.array([[-50, -50, 9000, 9000], [2, 2, 2, 2], [1, 0, 2, 1], [8000, 8000, 9000, 9000.0]])
    drawn = Drawn(boxes, np.array([0, 1, 2, 0]), masks=np.ones((4, height, width), bool))
    write_sheet(tmp_path / 'sheet.png', [row(drawn, drawn, height, width)], CLASSES)
    panels(tmp_path / 'sheet.png', max(1, round(height * PANEL / max(height, width))))


@pytest.mark.parametrize('name, kind', [('a.png', 'PNG'), ('a.jpg', 'JPEG'), ('a.JPEG', 'JPEG')])
def test_the_ending_decides_the_format(tmp_path: Path, name: str, kind: str):
    write_sheet(tmp_path / name, [row(BOX)] * 16, CLASSES)
    with Image.open(tmp_path / name) as image:
        assert image.format == kind and image.height == 16 * (PANEL + TITLE + GAP) + GAP
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_another_ending_and_too_many_or_no_pictures_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match='a.gif: a sheet of pictures must end in .png, .jpg, .jpeg'):
        write_sheet(tmp_path / 'a.gif', [row()], CLASSES)
    for rows, n in (([], 0), ([row()] * 17, 17)):
        with pytest.raises(ValueError, match=f'a.png: {n} pictures; a sheet has 1 to 16'):
            write_sheet(tmp_path / 'a.png', rows, CLASSES)
    with pytest.raises(OSError, match='a.png'):
        write_sheet(tmp_path / 'missing' / 'a.png', [row()], CLASSES)
