"""Records that no published number can stand beside, as tables that compare models.

There is a table for each benchmark and data set, with a row for each model (and layer) and a column for each metric.
In what the protocols of its rows differ stands in the rows; what holds for all of them is said once, below.
"""
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ...runtime.messages import short
from .compare import CHANGED, SIZES, changes, family, is_changed, missing, unpublished, unreadable
from .record import called, counts_of, pair_of

Compared = tuple[dict[str, Any], dict[str, Any]]  # record, compare(record)
Label = Callable[[dict[str, Any]], str]  # of a record's weights
# Of a protocol what is told by its name, by the columns or by its other numbers, or has no part in the result.
ELSEWHERE = {'name', 'base', 'changed', 'note', 'tap', 'k', 'scaled_lr', 'batch_size_used', 'validation', 'processes'}
WIDEST = 40  # characters of a protocol in a row; longer ones are numbered
VARIANT = re.compile(r'_(last|best|epoch\d+)')  # of a metric: the same at another epoch than the one reported


class Sheet(NamedTuple):
    """A table, its header first."""

    title: str
    rows: list[list[str]]
    notes: list[str]
    keys: int  # so many columns say what a row is
    variants: tuple[int, ...] = ()  # columns that may be left out where there is no room


def labels(records: list[dict[str, Any]]) -> Label:
    """Names of weights, with the beginning of the digest where several share a name."""
    digests: dict[str, set[str]] = {}
    for record in records:
        digests.setdefault(called(record['weights']), set()).add(record['weights']['digest'])

    def label(weights: dict[str, Any]) -> str:
        name = called(weights)
        return name if len(digests[name]) == 1 else f'{name} ({short(weights["digest"][:8]) or "no digest"})'

    return label


def sheets(compared: list[Compared], label: Label) -> list[Sheet]:
    groups: dict[tuple[str, str], list[Compared]] = {}
    for c in compared:
        groups.setdefault((family(c[0]['benchmark']), _data_set(c[0])), []).append(c)
    return [_sheet(group, label) for group in groups.values()]


def _data_set(record: dict[str, Any]) -> str:
    """The same for the same images: a whole set that is known is one in whatever form."""
    data = record['data']
    if _whole(record):
        return data['name']
    return json.dumps([data.get('digest') or data['name'], data['counts']], sort_keys=True)


def _whole(record: dict[str, Any]) -> bool:
    return record['data']['name'] in SIZES and not missing(record)


def _sheet(group: list[Compared], label: Label) -> Sheet:
    order: dict[str, int] = {}  # rows of the same weights together
    for record, _ in group:
        order.setdefault(label(record['weights']), len(order))
    group = sorted(group, key=lambda c: (order[label(c[0]['weights'])], c[0]['benchmark']))
    records = [record for record, _ in group]
    benchmark, data = family(records[0]['benchmark']), records[0]['data']
    metrics = _in_order(list({name: None for record in records for name in record['metrics']}))
    ways, differing, notes = _protocols(records)
    keys = {'Weights': [label(record['weights']) for record in records]}
    if any(record['benchmark'] != benchmark for record in records):
        keys['Layer'] = [record['benchmark'].removeprefix(benchmark).strip('_') for record in records]
    if any(ways):
        keys['Protocol'] = ways
    rows = [[*keys, *(short(name, 40) for name in metrics)]]
    for i, record in enumerate(records):
        numbers = (record['metrics'].get(name) for name in metrics)
        rows.append([*(column[i] for column in keys.values()), *('' if x is None else f'{x:.2f}' for x in numbers)])
    whole = _whole(records[0])
    digest = '' if whole else short(str(data.get('digest') or '')[:8])
    where = data['path'] if data['name'] == 'folder' and isinstance(data.get('path'), str) else data['name']
    about = ', '.join(filter(None, (digest, counts_of(data)))) or 'counts not told'
    return Sheet(
        short(f'{benchmark} on {short(where)} ({about})', 200), rows,
        [*notes, *_notes(group, label, differing)], len(keys),
        tuple(len(keys) + i for i, name in enumerate(metrics) if VARIANT.search(name)))


def _in_order(metrics: list[str]) -> list[str]:
    """What is reported first; then what continues the name of another, as `top1_last` does."""
    known = set(metrics)

    def depth(name: str) -> int:
        return sum(name[:i] in known for i, c in enumerate(name[:100]) if c in '_ ')

    return sorted(metrics, key=lambda name: (bool(VARIANT.search(name)), depth(name)))


def _protocols(records: list[dict[str, Any]]) -> tuple[list[str], set[str], list[str]]:
    """What each row says of its protocol, the parameters in which rows differ, and notes."""
    protocols, nothing = [record['protocol'] for record in records], object()
    parameters = list({key: None for p in protocols for key in p if key not in ELSEWHERE})
    pairs = [pair_of(record) for record in records]
    if any(pairs):  # which has both of them
        parameters = [key for key in parameters if key not in ('lr', 'head_multiplier')]
    differing = [key for key in parameters if any(
        p.get(key, nothing) != protocols[0].get(key, nothing) for p in protocols)]
    named = bool(differing) or any(map(is_changed, protocols)) or len({str(p.get('name')) for p in protocols}) > 1
    ways = []
    for p, pair in zip(protocols, pairs, strict=True):
        name = short(p['name'], 40).removesuffix(CHANGED).strip() if named and isinstance(p.get('name'), str) else ''
        values = [f'{short(key, 24)} {short(p[key], 24)}' if key in p else f'no {short(key, 24)}' for key in differing]
        label = ' '.join(filter(None, (name, CHANGED if is_changed(p) else '')))
        ways.append(short(', '.join(filter(None, (label, pair, *values))), 400))
    if max(map(len, ways)) <= WIDEST:
        return ways, set(differing), []
    number = {way: str(i) for i, way in enumerate(dict.fromkeys(filter(None, ways)), 1)}
    return [number.get(way, '') for way in ways], set(differing), [f'Protocol {i}: {way}.' for way, i in number.items()]


def _notes(group: list[Compared], label: Label, differing: set[str]) -> list[str]:
    """Each once; with names of rows where it does not hold for all."""
    notes: dict[str, list[str]] = {}  # note -> names of rows
    for record, found in group:
        said = []
        if found['not_comparable']:
            said.append(f'not comparable with published numbers: {short(found["not_comparable"], 400)}.')
        else:
            if texts := changes(record['protocol'], differing):
                said.append(f'changed: {short("; ".join(texts), 400)}.')
            if missed := unreadable(record):
                said.append(f'{missed:,} {"image" if missed == 1 else "images"} could not be read.')
            if found['published']:  # and not of what was measured, or it stood in another table
                said.append(f'no number is published for {", ".join(map(short, list(record["metrics"])[:4]))}.')
            elif text := unpublished(record):
                said.append(f'{text}.')
        for note in said:
            notes.setdefault(note, []).append(label(record['weights']))
    return [
        f'{note[0].upper()}{note[1:]}' if len(of) == len(group) else f'{", ".join(dict.fromkeys(of))}: {note}'
        for note, of in notes.items()]
