"""A contact sheet: one HTML file with thumbnails, which needs neither a network nor scripts."""
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ...pages.document import link_sections, open_section, write_page
from ...pages.gallery import STYLE, Cell, draw_row

ROWS = 100  # of a section; the tables have all


class Section(NamedTuple):
    """Rows of images under a heading; each row has its own heading. `total` counts those that there are."""

    title: str
    explanation: str
    rows: list[tuple[str, list[Cell]]]
    total: int


def write_sheet(path: Path, title: str, sections: list[Section]) -> None:
    """Writes the sheet; raises OSError if the file cannot be written."""
    write_page(path, title, _list_pieces(sections), style=STYLE)


def _list_pieces(sections: list[Section]) -> Iterator[str]:
    yield link_sections(f'{s.title} ({s.total:,})' for s in sections)
    for i, section in enumerate(sections):
        shown = ' None found.' if not section.total else (
            f' Shown: {len(section.rows):,} of {section.total:,}.' if len(section.rows) < section.total else '')
        yield open_section(i, section.title, f'{section.explanation}{shown}')
        for heading, cells in section.rows:
            yield draw_row(heading, cells)
        yield '</section>\n'
