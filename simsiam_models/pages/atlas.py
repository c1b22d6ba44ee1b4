"""The atlas: a page with a map of images. The script, the style and the elements lie beside this file."""
import base64
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from string import Template
from typing import Any

from ..runtime.messages import counted
from .document import escape, write_page

FOLDER = Path(__file__).parent


def write_atlas(
    path: Path, title: str, data: dict[str, Any], sheets: Iterable[bytes], *, facts: str, usage: str,
    about: dict[str, str], left_out: list[str],
) -> None:
    """Writes the page; raises OSError if it cannot be written.

    Args:
        data: what `atlas_map.js` reads.
        sheets: JPEG files with the thumbnails.
        facts: a line on what the map shows.
        usage: what to do with a list that the page has saved.
        about: more on the map.
        left_out: why images could not be read.
    """
    style, *scripts = ((FOLDER / name).read_text('utf-8') for name in ('atlas.css', 'atlas_map.js', 'atlas_lists.js'))
    texts = ''.join(f'<li>{escape(text)}</li>' for text in left_out)
    body = Template((FOLDER / 'atlas.html').read_text('utf-8')).substitute(
        facts=escape(facts), usage=escape(usage),
        about=''.join(f'<dt>{escape(term)}</dt><dd>{escape(text)}</dd>' for term, text in about.items()),
        left_out=f'<details><summary>{counted(len(left_out), "image")} could not be read</summary>'
                 f'<ul>{texts}</ul></details>\n' if left_out else '')
    write_page(path, title, itertools.chain([body], _embed(data, sheets)), style=style, script=''.join(scripts))


def _embed(data: dict[str, Any], sheets: Iterable[bytes]) -> Iterator[str]:
    yield f'<script type="application/json" id="data">{embed_json(data)}</script>\n'
    for i, sheet in enumerate(sheets):
        yield f'<script type="text/plain" id="sheet{i}">{base64.b64encode(sheet).decode()}</script>\n'


def embed_json(data: Any) -> str:
    """Returns ASCII that a script element can hold: no text in it ends the element or opens a comment."""
    return json.dumps(data, separators=(',', ':'), allow_nan=False).replace('<', '\\u003c')
