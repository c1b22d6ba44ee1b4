"""Tables of text: numbers to the right, wide ones scroll inside the page."""
import re
from collections.abc import Sequence

from .document import escape

STYLE = '''
.wide { overflow-x: auto; width: fit-content; max-width: 100%; margin: .75rem 0 1rem; background: var(--panel);
  border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.4; overflow-wrap: normal }
caption { text-align: left; font-weight: 600; padding: .6rem .75rem .3rem }
th, td { padding: .35rem .75rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line);
  max-width: 28rem } td:first-child { overflow-wrap: anywhere; min-width: 6rem }
th { font-weight: 600; color: var(--soft); white-space: nowrap; vertical-align: bottom }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.notes { font-size: .875rem; color: var(--soft); padding-left: 1.1rem; max-width: 60rem }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .4rem 1.5rem; margin: 1rem 0 }
dt { color: var(--soft) } dd { margin: 0; font-variant-numeric: tabular-nums }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; margin: 0;
  white-space: pre-wrap } pre span { white-space: nowrap }
summary { cursor: pointer; padding: .25rem 0; width: fit-content }
@media (max-width: 34rem) { dl { grid-template-columns: minmax(0, 1fr); gap: 0 } dd { margin-bottom: .6rem } }
@media print { .wide { overflow: visible; border: 0 } th, td, .n { white-space: normal; padding: .15rem .4rem }
  table { font-size: 8pt }
  details::details-content { content-visibility: visible; block-size: auto } }
'''
NUMBER = re.compile(r'[-+\u2212]?(\d[\d,]*(\.\d+)?|\.\d+)(e[-+]?\d+)?( ?%)?|-|')


def draw_table(rows: Sequence[Sequence[str]], caption: str, notes: Sequence[str] = ()) -> str:
    """Returns a table as HTML, with all cells as text; the first row is the header. Columns of numbers are aligned."""
    header, *body = rows
    numeric = [bool(body) and all(NUMBER.fullmatch(row[i]) for row in body) for i in range(len(header))]
    kinds = [' class="n"' if right else '' for right in numeric]
    head = ''.join(f'<th scope="col"{kind}>{escape(cell)}</th>' for cell, kind in zip(header, kinds, strict=True))
    lines = ''.join('<tr>' + ''.join(
        f'<td{kind}>{escape(cell)}</td>' for cell, kind in zip(row, kinds, strict=True)) + '</tr>\n' for row in body)
    return wrap_wide(
        f'<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table>',
        caption) + draw_notes(notes)


def wrap_wide(inner: str, label: str) -> str:
    """Returns HTML that scrolls sideways by itself, also by keyboard; `label` names it."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{escape(label)}">{inner}</div>\n'


def draw_notes(notes: Sequence[str]) -> str:
    lines = ''.join(f'<li>{escape(note)}</li>' for note in notes)
    return f'<ul class="notes">{lines}</ul>\n' if notes else ''


def draw_facts(facts: Sequence[tuple[str, str]]) -> str:
    """Returns names with their values; a value that is a command is set as code."""
    lines = ''.join(f'<dt>{escape(name)}</dt><dd>{_draw_value(name, value)}</dd>\n' for name, value in facts)
    return f'<dl>{lines}</dl>\n'


def _draw_value(name: str, value: str) -> str:
    if name != 'Command':
        return escape(value)
    flags = re.sub(r'(?<= )--?[a-z][a-z-]*', r'<span>\g<0></span>', escape(value))  # no line ends inside a flag
    return f'<pre>{flags}</pre>'
