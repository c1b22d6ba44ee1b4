"""Makes tables that compare models from the records without a published number.

Each benchmark and data set has a table, with a row for each model (and layer) and a column for each metric.
Rows state the parameters in which their protocols differ; notes below a table state what holds for all rows.
"""
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from ...runtime.messages import short
from ..datasets.sizes import SIZES
from . import compare
from .accuracy import note_uncertainty
from .record import describe_counts, describe_rates, display_name

Compared = tuple[dict[str, Any], dict[str, Any]]  # record, compare(record)
Label = Callable[[dict[str, Any]], str]  # of a record's weights
# Parameters that rows leave out: names, columns or other parameters imply them, or they do not affect the result.
OMITTED = {'name', 'base', 'changed', 'note', 'tap', 'k', 'scaled_lr', 'batch_size_used', 'validation', 'processes'}
WIDEST = 40  # characters that a row may say about its protocol; longer texts become numbered notes
VARIANT = re.compile(r'_(last|best|epoch\d+)')  # in a metric's name: at another epoch than the reported one


class ResultTable(NamedTuple):
    title: str
    rows: list[list[str]]  # the first is the header
    notes: list[str]
    keys: int  # the first columns, which identify a row
    variants: tuple[int, ...] = ()  # columns that may be left out if there is no room


def make_label(records: list[dict[str, Any]]) -> Label:
    """Returns a function that names weights, with the start of the digest if several of `records` share a name."""
    weights_of = {(display_name(record['weights']), record['weights']['digest']) for record in records}
    digests = Counter(name for name, _ in weights_of)

    def label(weights: dict[str, Any]) -> str:
        name = display_name(weights)
        return name if digests[name] == 1 else f'{name} ({short(weights["digest"][:8]) or "no digest"})'

    return label


def tabulate(compared: list[Compared], label: Label) -> list[ResultTable]:
    """Returns a table for each benchmark and data set. A complete known data set counts as one in any format."""
    groups: dict[tuple[str, str], list[Compared]] = {}
    for record, found in compared:
        data = record['data']
        images = data['name'] if _is_complete(record) else [data.get('digest') or data['name'], data['counts']]
        key = compare.strip_layer(record['benchmark']), json.dumps(images, sort_keys=True)
        groups.setdefault(key, []).append((record, found))
    return [_tabulate_group(group, label) for group in groups.values()]


def _is_complete(record: dict[str, Any]) -> bool:
    return record['data']['name'] in SIZES and not compare.size_deviation(record)


def _tabulate_group(group: list[Compared], label: Label) -> ResultTable:
    names = list(dict.fromkeys(label(record['weights']) for record, _ in group))  # keeps their rows together
    group = sorted(group, key=lambda c: (names.index(label(c[0]['weights'])), c[0]['benchmark']))
    records = [record for record, _ in group]
    benchmark = compare.strip_layer(records[0]['benchmark'])
    known = dict.fromkeys(name for record in records for name in record['metrics'])
    metrics = sorted(known, key=lambda name: (  # reported ones first, `top1` before `top1_last`
        bool(VARIANT.search(name)), sum(name[:i] in known for i, c in enumerate(name[:100]) if c in '_ ')))
    ways, differing, notes = _describe_protocols(records)
    keys = {'Weights': [label(record['weights']) for record in records]}
    if any(record['benchmark'] != benchmark for record in records):
        keys['Layer'] = [record['benchmark'].removeprefix(benchmark).strip('_') for record in records]
    if any(ways):
        keys['Protocol'] = ways
    rows = [[*keys, *(short(name, 40) for name in metrics)]]
    for record, key in zip(records, zip(*keys.values(), strict=True), strict=True):
        rows.append([*key, *(f'{record["metrics"][m]:.2f}' if m in record['metrics'] else '' for m in metrics)])
    uncertainty = note_uncertainty(records) if len(records) > 1 else []  # something to compare
    notes += [*uncertainty, *_make_notes(group, label, differing)]
    return ResultTable(
        _make_title(records[0], benchmark), rows, notes, len(keys),
        tuple(len(keys) + i for i, name in enumerate(metrics) if VARIANT.search(name)))


def _make_title(record: dict[str, Any], benchmark: str) -> str:
    data = record['data']
    digest = '' if _is_complete(record) else short(str(data.get('digest') or '')[:8])
    where = data['path'] if data['name'] == 'folder' and isinstance(data.get('path'), str) else data['name']
    about = ', '.join(filter(None, (digest, describe_counts(data)))) or 'counts unknown'
    return short(f'{benchmark} on {short(where)} ({about})', 200)


def _describe_protocols(records: list[dict[str, Any]]) -> tuple[list[str], set[str], list[str]]:
    """Returns what each row says about its protocol, the parameters in which rows differ, and notes."""
    protocols, absent = [record['protocol'] for record in records], object()
    rates = [describe_rates(record) for record in records]
    omitted = OMITTED | ({'lr', 'head_multiplier'} if any(rates) else set())  # which the rates state
    differing = [key for key in dict.fromkeys(key for p in protocols for key in p if key not in omitted) if any(
        p.get(key, absent) != protocols[0].get(key, absent) for p in protocols)]
    changed = [compare.CHANGED if compare.is_changed(p) else '' for p in protocols]
    named = differing or any(changed) or len({str(p.get('name')) for p in protocols}) > 1
    ways = []
    for p, change, rate in zip(protocols, changed, rates, strict=True):
        name = short(p['name'], 40) if named and isinstance(p.get('name'), str) else ''
        values = [f'{short(key, 24)} {short(p[key], 24)}' if key in p else f'no {short(key, 24)}' for key in differing]
        label = ' '.join(filter(None, (name.removesuffix(compare.CHANGED).strip(), change)))
        ways.append(short(', '.join(filter(None, (label, rate, *values))), 400))
    if max(map(len, ways)) <= WIDEST:
        return ways, set(differing), []
    number = {way: str(i) for i, way in enumerate(dict.fromkeys(filter(None, ways)), 1)}
    return [number.get(way, '') for way in ways], set(differing), [f'Protocol {i}: {way}.' for way, i in number.items()]


def _make_notes(group: list[Compared], label: Label, differing: set[str]) -> list[str]:
    """Returns each note once, with the names of its rows unless it holds for all of them."""
    rows_of: dict[str, list[str]] = {}
    for record, found in group:
        reason, changes = found['not_comparable'], '; '.join(compare.list_changes(record['protocol'], differing))
        unpublished = compare.note_unpublished(record)
        if found['published']:  # for other metrics only: else the record would be in a table of the page
            unpublished = f'no number is published for {", ".join(map(short, list(record["metrics"])[:4]))}'
        notes = [f'not comparable with published numbers: {short(reason, 400)}'] if reason else [
            changes and f'changed: {short(changes, 400)}', compare.describe_unreadable(record), unpublished]
        for note in filter(None, notes):
            rows_of.setdefault(f'{note}.', []).append(label(record['weights']))
    return [
        f'{note[0].upper()}{note[1:]}' if len(rows) == len(group) else f'{", ".join(dict.fromkeys(rows))}: {note}'
        for note, rows in rows_of.items()]
