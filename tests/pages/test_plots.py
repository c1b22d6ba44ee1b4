"""Curves stay small without losing their extremes, and tables align numbers."""
import math
import xml.etree.ElementTree as ET

import numpy as np
from browser import Browser

from simsiam_models.pages import plots, tables
from simsiam_models.pages.document import write_page
from simsiam_models.pages.plots import GROUPS, Plot, Series, draw_plots, draw_svg, thin, write_plots
from simsiam_models.pages.tables import draw_facts, draw_table

X = list(range(5000))
NOISY = np.random.default_rng(0).standard_normal(5000)
PLOT = Plot('p', 'A <b>title</b> $x^2$', 'epoch $', [Series('one & two', X, NOISY), Series('_b', X, NOISY + 1)])


def test_thinned_points_are_points_of_the_curve_and_keep_every_extreme():
    y = NOISY.copy()
    y[777], y[3210] = 50, -50
    a, b = thin(X, y)
    assert len(a) <= 2 * GROUPS + 2 and (np.diff(a) > 0).all() and a[0] == 0 and a[-1] == 4999
    np.testing.assert_array_equal(b, y[a.astype(int)])
    assert b.max() == 50 and b.min() == -50
    gaps = np.where(np.arange(5000) < 1000, math.nan, y)
    assert np.isnan(thin(X, gaps)[1]).sum() >= GROUPS // 6


def test_a_drawing_is_small_well_formed_and_described():
    text = draw_svg(PLOT)
    root = ET.fromstring(text.replace('xlink:', ''))
    assert len(text) < 40_000 and root.get('role') == 'img'
    assert root.get('aria-label').startswith('A <b>title</b> $x^2$ by epoch $. one & two: from 0.126 to ')
    assert '#' not in ''.join(e.get('style', '') for e in root.iter() if 'url' not in e.get('style', ''))
    assert 'var(--s1)' in text and 'var(--s2)' in text
    ids = [e.get('id') for text in (text, draw_svg(PLOT._replace(name='q')))
           for e in ET.fromstring(text.replace('xlink:', '')).iter() if e.get('id')]
    assert len(ids) == len(set(ids))


def test_curves_are_drawn_in_the_colours_of_the_page(tmp_path, browser: Browser):
    write_page(tmp_path / 'p.html', 'Plots', [draw_plots([PLOT])], style=plots.STYLE)
    strokes = []
    for dark in (False, True):
        opened = browser.open(tmp_path / 'p.html', dark=dark)
        found = opened.page.evaluate('''() => [...document.querySelectorAll('svg path')].map(
            p => [p.getBBox().width * p.getBBox().height, getComputedStyle(p).stroke])
            .filter(p => p[1] != 'none')''')
        strokes += [stroke for area, stroke in found if area > 1000]
        assert not opened.messages and not opened.violations()
    assert strokes == [
        'rgb(40, 100, 180)', 'rgb(180, 85, 30)', 'rgb(125, 170, 240)', 'rgb(240, 160, 110)']
    assert opened.page.locator('figcaption').first.text_content().startswith('A <b>title</b> $x^2$')


def test_plots_are_written_as_pictures(tmp_path):
    from PIL import Image

    (file,) = write_plots(tmp_path / 'new', [PLOT])
    with Image.open(file) as image:
        assert file.name == 'p.png' and image.size == (800, 460)


def test_numbers_stand_to_the_right_and_wide_tables_scroll_by_themselves(tmp_path, browser: Browser):
    rows = [['name', 'top1', *(f'metric {i}' for i in range(20))], ['<i>', '1.50', *['-2.00'] * 20],
            ['b', '-', *['1,000'] * 20]]
    write_page(tmp_path / 'p.html', 'Tables', [
        draw_table(rows, 'A table', ['a <note>']), draw_facts([('Command', 'simsiam <x>')])], style=tables.STYLE)
    opened = browser.open(tmp_path / 'p.html', 360)
    assert opened.overflow() <= 0 and not opened.violations() and not opened.unreached()
    aligned = opened.page.evaluate('() => [...document.querySelectorAll("tbody tr:first-child td")].map('
                                   'e => getComputedStyle(e).textAlign)')
    assert aligned == ['left'] + ['right'] * 21
    assert opened.page.locator('td').first.text_content() == '<i>'
