"""The frame of every page: it asks for nothing, and runs only the script it was given."""
from pathlib import Path

import pytest
from browser import HOSTILE, Browser
from PIL import Image

from simsiam_models.pages.document import escape, link_sections, open_section, write_page
from simsiam_models.pages.gallery import STYLE, Cell, draw_row


def write(path: Path, **more: str) -> Path:
    cells = [Cell(lambda: Image.new('RGB', (300, 200), 'teal'), 'seen', name) for name in HOSTILE]
    write_page(path, HOSTILE[0], [
        link_sections(HOSTILE), *(open_section(i, name, name) + '</section>' for i, name in enumerate(HOSTILE)),
        draw_row('Row', [*cells, Cell(lambda: None, 'gone')])], style=STYLE, **more)
    return path


@pytest.mark.parametrize('dark', [False, True])
@pytest.mark.parametrize('width', [360, 1200])
def test_a_page_is_quiet_fits_and_is_accessible(tmp_path, browser: Browser, width, dark):
    opened = browser.open(write(tmp_path / 'p.html'), width, dark)
    assert not opened.messages and not opened.requests
    assert opened.overflow() <= 0 and not opened.violations() and not opened.unreached()
    back = opened.page.evaluate('() => getComputedStyle(document.body).backgroundColor')
    assert (sum(map(int, back[4:-1].split(','))) < 200) == dark


def test_names_show_as_text(tmp_path, browser: Browser):
    page = browser.open(write(tmp_path / 'p.html')).page
    headings = page.locator('h2').all_text_contents()
    assert headings == HOSTILE[:4] + ['a\\x1b[2J\\u202eb\\n'] and page.title() == HOSTILE[0]
    assert page.locator('img').count() == 5 and 'The image cannot be read.' in page.content()


def test_only_the_script_of_the_page_runs_and_nothing_is_fetched(tmp_path, browser: Browser):
    (tmp_path / 'x.png').write_bytes(b'')
    other = '<script>document.title = "other"</script><img src="x.png" alt="">'
    write_page(tmp_path / 'p.html', 'A title', [other], script='document.body.id = "own"')
    opened = browser.open(tmp_path / 'p.html')
    assert opened.page.locator('body').get_attribute('id') == 'own' and opened.page.title() == 'A title'
    assert len(opened.messages) == 2 and all('Content Security Policy' in text for text in opened.messages)


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / 'file').write_bytes(b'')
    with pytest.raises(OSError, match=r'^--html: .*file/p.html cannot be written \(.*\); make room there'):
        write(tmp_path / 'file' / 'p.html')
    assert escape('\udcff<') == '\\udcff&lt;'
