"""The numbers that the authors of the published weights give for them, as data; none was measured here.

published.json holds one entry per weights file and benchmark: 'tag', 'benchmark', 'metrics' (percent), 'source', 'url',
and where known 'protocol', 'confidence', 'warning', and the 'pages' that list it: its own first, then those that copied
it.
"""
import json
from functools import cache
from pathlib import Path
from typing import Any

from ..resnet import WEIGHTS
from . import sources


@cache
def _entries() -> list[dict[str, Any]]:
    return json.loads(Path(__file__).with_name('published.json').read_text(encoding='utf-8'))


def published(tag: str) -> list[dict[str, Any]]:
    """The entries that belong to this very file; none for weights that nobody published."""
    return [entry for entry in _entries() if entry['tag'] == tag]


def same_page(tag: str) -> list[dict[str, Any]]:
    """The entries that a page lists beside those of this file although another file was measured.

    MMSelfSup's page mixes two generations of weights, and its 1.x page copies all but the linear result.
    """
    pages = {entry['pages'][0] for entry in published(tag) if 'pages' in entry}
    return [entry for entry in _entries() if entry['tag'] != tag and pages & set(entry.get('pages', []))]


def describe(tag: str) -> str:
    """Where a published file comes from and every number published for it, as text.

    Raises:
        ValueError: nobody published weights under this tag.
    """
    tag = tag.removeprefix('simsiam_resnet50.')
    if tag not in WEIGHTS:
        raise ValueError(f'{tag!r} is not a published tag: choose one of {", ".join(WEIGHTS)}')
    w = WEIGHTS[tag]
    lines = [
        f'simsiam_resnet50.{tag}: ImageNet-1k, {w.epochs} epochs, batch {w.batch}, '
        f'{f"linear classifier of {w.num_classes} classes" if w.num_classes else "no classifier"}, license {w.license}',
        f'Hub:      {sources.hub_id(f"simsiam_resnet50.{tag}")}',
        f'upstream: {w.url} (layout {w.layout}, SHA-256 '
        f'{f"begins with {w.sha256_prefix}" if w.sha256_prefix else "not published"})',
        'Numbers of this file (percent; published by its authors, not measured again here):',
        *map(_line, published(tag))]
    if others := same_page(tag):
        lines += ['On the same page, but measured with another file:', *map(_line, others)]
    return '\n'.join(lines)


def _line(entry: dict[str, Any]) -> str:
    numbers = ', '.join(f'{metric} {value}' for metric, value in entry['metrics'].items())
    remarks = [entry[key] for key in ('protocol', 'source', 'warning') if key in entry]
    if 'confidence' in entry:
        remarks.append(f'which weights: {entry["confidence"]}')
    return f'  {entry["tag"]}  {entry["benchmark"]}: {numbers} ({"; ".join(remarks)})'
