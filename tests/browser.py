"""Opens pages in headless Chromium, and collects what it says and asks for."""
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

CHROMIUM = os.environ.get('CHROMIUM') or shutil.which('chromium') or '/usr/bin/chromium'
# Names of files and classes that must show as text.
HOSTILE = ['<img src=x onerror=alert(1)>', '"quoted\' &amp; </style>', 'שלום.jpg', '🦊 fox.png', 'a\x1b[2J\u202eb\n']
COUNT_STOPS = '''() => [...document.querySelectorAll('a[href], button, input, select, summary, [tabindex="0"]')]
  .filter(e => e.checkVisibility()).length'''
NAME_FOCUS = '''() => { const all = [...document.querySelectorAll('*')]; return all.indexOf(document.activeElement) }'''


class Opened(NamedTuple):
    """A page in the browser. `messages`: of its console, and its errors. `requests`: for anything but the file."""

    page: 'playwright.sync_api.Page'  # noqa: F821
    messages: list[str]
    requests: list[str]

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate('() => document.documentElement.scrollWidth - window.innerWidth')

    def violations(self) -> list[str]:
        """What axe-core finds against accessibility, contrast included."""
        from axe_playwright_python.sync_playwright import Axe
        return [f'{v["id"]}: {[n["html"][:200] for n in v["nodes"][:3]]}'
                for v in Axe().run(self.page).response['violations']]

    def unreached(self) -> int:
        """How many of the visible controls the Tab key does not reach."""
        controls, reached = self.page.evaluate(COUNT_STOPS), set()
        for _ in range(controls + 2):
            self.page.keyboard.press('Tab')
            reached.add(self.page.evaluate(NAME_FOCUS))
        return controls - len(reached - {-1, self.page.evaluate('() => [...document.all].indexOf(document.body)')})


class Browser:
    """Opens files of this machine."""

    def __init__(self, chromium: 'playwright.sync_api.Browser') -> None:  # noqa: F821
        self.chromium = chromium

    def open(self, path: Path, width: int = 1200, dark: bool = False, height: int = 800) -> Opened:
        context = self.chromium.new_context(
            viewport={'width': width, 'height': height}, color_scheme='dark' if dark else 'light')
        page, messages, requests = context.new_page(), [], []
        page.on('console', lambda message: messages.append(message.text))
        page.on('pageerror', lambda error: messages.append(str(error)))
        page.on('request', lambda request: requests.append(request.url))
        page.goto(path.resolve().as_uri())
        page.wait_for_load_state()
        own = path.resolve().as_uri()
        requests[:] = [url for url in requests if url != own and not url.startswith('data:')]
        return Opened(page, messages, requests)


@pytest.fixture(scope='module')
def browser() -> Iterator[Browser]:
    """Headless Chromium; skips where it or Playwright is missing."""
    sync_api = pytest.importorskip('playwright.sync_api', reason='needs playwright')
    if not Path(CHROMIUM).exists():
        pytest.skip('needs Chromium (apt install chromium), or its path in $CHROMIUM')
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield Browser(chromium)
        chromium.close()
