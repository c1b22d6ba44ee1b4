"""The frame of every page: one HTML file that asks for nothing else, in light and dark, on a phone and on paper."""
import base64
import hashlib
import html
import io
from collections.abc import Iterable
from pathlib import Path

from ..runtime.files import explain_write_errors, write_atomically
from ..runtime.messages import printable

# The contrast of every text colour with --back and --panel is at least 4.5 : 1, that of --s1 to --s4 at least 3 : 1.
STYLE = '''
:root { color-scheme: light dark; --back: #fbfbfa; --panel: #fff; --text: #1d2125; --soft: #5b636b; --line: #dfe2e5;
  --link: #0a58ca; --bad: #b3261e; --s1: #2864b4; --s2: #b4551e; --s3: #23784b; --s4: #8246a0 }
@media (prefers-color-scheme: dark) {
  :root { --back: #131517; --panel: #1b1e21; --text: #e6e8ea; --soft: #a5adb5; --line: #33383d;
    --link: #8ab4f8; --bad: #ff8a80; --s1: #7daaf0; --s2: #f0a06e; --s3: #78c896; --s4: #c896e6 } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0 auto; max-width: 78rem; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; background: var(--back);
  color: var(--text); overflow-wrap: anywhere;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.75rem; line-height: 1.2; margin: .5rem 0 .75rem; font-weight: 650; letter-spacing: -.01em }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 .5rem; font-weight: 650 }
h3 { font-size: .95rem; margin: 1.5rem 0 .5rem; font-weight: 600 }
p { max-width: 46rem; margin: .25rem 0 1rem } .soft { color: var(--soft) } .bad { color: var(--bad) }
section { margin-top: 3rem } section > :last-child { margin-bottom: 0 }
a { color: var(--link) } :focus-visible { outline: 3px solid var(--link); outline-offset: 2px; border-radius: 2px }
nav ul { list-style: none; margin: 0; padding: .75rem 0; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem;
  border-block: 1px solid var(--line); font-size: .9rem }
nav a { display: inline-block; padding: .15rem 0 }
img, svg { max-width: 100% }
code, pre { font: .875em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
@media print {
  :root { color-scheme: light; --back: #fff; --panel: #fff; --text: #000; --soft: #444; --line: #bbb; --link: #000;
    --bad: #a00; --s1: #2864b4; --s2: #b4551e; --s3: #23784b; --s4: #8246a0 }
  body { max-width: none; padding: 0; font-size: 10pt } nav { display: none }
  h2, h3 { break-after: avoid } figure, tr, .row { break-inside: avoid } section { margin-top: 1.5rem } }
'''


def escape(text: str) -> str:
    """Returns HTML, also for an attribute, that shows exactly this text; characters without a shape are spelled out."""
    return html.escape(printable(text))


def check_page(file: Path | None) -> None:
    """Raises ValueError if --html names no page."""
    if file is not None and (file.suffix not in ('.html', '.htm') or file.is_dir()):
        raise ValueError(f'--html {file}: must be a file that ends in .html')


def write_page(
    path: Path, title: str, body: Iterable[str], *, style: str = '', script: str = '', flag: str = '--html',
) -> None:
    """Writes a page with this title, which is text, around pieces of HTML, one after the other.

    The page may load nothing but what it embeds. Of scripts, only `script` runs.

    Args:
        style: more rules for the style sheet.
        script: JavaScript, runs at the end of the page.
        flag: the flag that named the file, for errors.

    Raises:
        OSError: the file cannot be written.
    """
    with explain_write_errors(path, flag):
        path.parent.mkdir(parents=True, exist_ok=True)

        def write(file: io.BufferedIOBase) -> None:
            file.write((
                '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
                '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
                f'<meta http-equiv="Content-Security-Policy" content="{_make_policy(script)}">\n'
                f'<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n'
                f'<h1>{escape(title)}</h1>\n').encode())
            for piece in body:
                file.write(piece.encode())
            file.write(f'</main>\n{f"<script>{script}</script>" if script else ""}\n</body>\n</html>\n'.encode())

        write_atomically(path, write, shared=True)  # nobody can foresee the name of the temporary file


def _make_policy(script: str) -> str:
    allowed = f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'{allowed if script else ''}"


def link_sections(titles: Iterable[str]) -> str:
    """Returns links to sections; the one with number i must have the id `s` and i (see `open_section`)."""
    links = ''.join(f'<li><a href="#s{i}">{escape(title)}</a></li>' for i, title in enumerate(titles))
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n'


def open_section(number: int, title: str, text: str = '') -> str:
    """Returns the beginning of a section: its heading, and a paragraph if there is text. `</section>` ends it."""
    paragraph = f'<p class="soft">{escape(text)}</p>\n' if text else ''
    return f'<section aria-labelledby="s{number}">\n<h2 id="s{number}">{escape(title)}</h2>\n{paragraph}'
