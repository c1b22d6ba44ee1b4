"""A benchmark's result as one JSON file, with what is published for the same weights beside it.

A published number was not measured here; `compare` says when a difference to one is taken.
"""
import importlib.metadata
import json
import platform
import re
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...data.readers.index import digest
from ...runtime.files import write_atomically
from ...runtime.messages import short
from ..backbone import Backbone
from .compare import changes, compare, spread, unpublished

FORMAT, VERSION = 'simsiam_models benchmark', 1
LARGEST = 64 * 2**20  # bytes of a file that can be a record
DEEPEST = 100  # lists and tables in one another


class NoRecordError(ValueError):
    """JSON of another kind, as args.json and config.json of a run."""


def record_path(folder: str | Path, benchmark: str, backbone: 'Backbone', protocol: dict, data: dict) -> Path:
    """A name in `folder` that two results share only where they are of the same thing."""
    about = plain([protocol, data.get('digest'), data.get('counts')])
    key = digest(json.dumps(about, sort_keys=True), backbone.identity)
    name = re.sub(r'[^\w.=-]+', '-', Path(backbone.name).name or backbone.name, flags=re.ASCII).strip('-.')
    return Path(folder) / f'{benchmark}-{name[:80]}-{key[:8]}.json'


def write_record(
    path: str | Path, benchmark: str, protocol: dict[str, Any], backbone: 'Backbone', data: dict[str, Any],
    metrics: Mapping[str, float], seconds: float, extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the JSON, whole or not at all, and returns what it holds.

    Args:
        benchmark: as weights/published.json calls it, where that has it.
        protocol: every parameter; where it is to be compared, those of PROTOCOLS under their names. A true value under
            'changed' says that it is another protocol.
        data: name (a key of SIZES, where it is one of these sets), counts (train, test, classes), digest, and where it
            has one its path as typed.
        metrics: percent.
        extra: whatever else is worth keeping; 'unreadable', images that were left out (their number, a list or a
            table), makes a record incomparable.

    Raises:
        ValueError: a metric is no number of percent, or something has no form in JSON.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f'{path} is a folder; a record is a file, as {path / (benchmark + ".json")}')
    record = {
        'format': FORMAT, 'version': VERSION, 'benchmark': benchmark, 'protocol': protocol,
        'weights': {
            'name': backbone.name, 'tag': backbone.tag, 'digest': backbone.digest,
            'pixels': 'BGR' if backbone.bgr else 'RGB', 'mean': backbone.mean, 'std': backbone.std},
        'data': data, 'metrics': dict(metrics), 'extra': extra or {}}
    record = checked(plain(record), str(path))
    record |= {
        **compare(record), 'versions': versions(), 'seconds': round(float(seconds), 1),
        'date': datetime.now(timezone.utc).isoformat(timespec='seconds')}
    text = json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False) + '\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda f: f.write(text.encode(errors='surrogateescape')))
    return record


def check_output(folder: Path) -> None:
    """Make the folder of the records, and see that it can be written to, before hours of work.

    Raises:
        ValueError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as f:
            f.write(b'simsiam')
            f.flush()
    except OSError as e:
        raise ValueError(
            f'--output {folder}: no record can be written there ({e.strerror}); name a folder that can be written '
            'to') from None


def plain(value: Any) -> Any:
    """As JSON holds it: numpy's numbers and arrays, tuples, sets and paths become what they stand for.

    Raises:
        ValueError: NaN or infinity, or an object of another kind.
    """

    def other(x: Any) -> Any:
        if isinstance(x, (set, frozenset)):
            return sorted(x)
        if hasattr(x, 'tolist'):
            return x.tolist()
        if isinstance(x, Path):
            return str(x)
        raise TypeError(f'{type(x).__name__} has no form in JSON')

    try:
        return json.loads(json.dumps(value, default=other, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as e:
        raise ValueError(f'a record holds numbers, texts, lists and tables of them ({e})') from None


def versions() -> dict[str, str]:
    found = {'python': platform.python_version()}
    for name in ('simsiam-models', 'torch', 'torchvision', 'timm', 'numpy', 'scikit-learn'):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_record(path: str | Path) -> dict[str, Any]:
    """What `write_record` wrote.

    Raises:
        FileNotFoundError, ValueError, OSError: no such file, it is no record, or it cannot be read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise ValueError(f'{path}: is a folder; name a record in it, or give the folder to `simsiam report`')
        if not path.is_file():
            raise FileNotFoundError(f'{path}: no such record; `simsiam knn`, `linear` and the like write them')
        if (size := path.stat().st_size) > LARGEST:
            raise ValueError(f'{path}: is no record: {size:,} bytes are too many')
        content = path.read_bytes()
    except OSError as e:
        if e.errno is None:  # said above
            raise
        raise type(e)(f'{path}: cannot be read ({e.strerror}); mend that, or leave the file out') from None

    def constant(name: str) -> None:
        raise ValueError(f'{name} is no number')

    try:
        value = json.loads(content.decode(errors='surrogateescape'), parse_constant=constant)
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{path}: is not readable as JSON ({" ".join(str(e).split())[:150]})') from None
    if not isinstance(value, dict) or value.get('format') != FORMAT:
        raise NoRecordError(f'{path}: is JSON, but no record of a benchmark; its "format" would be {FORMAT!r}')
    if _depth(value) > DEEPEST:
        raise ValueError(f'{path}: is no record: it is nested more than {DEEPEST} deep')
    if value.get('version') != VERSION:
        raise ValueError(f'{path}: is a record of version {str(value.get("version"))[:20]}, and this program reads '
                         f'{VERSION}; read it with the program that wrote it')
    return checked(value, str(path))


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [x for v in level if isinstance(v, (dict, list)) for x in (v.values() if isinstance(v, dict) else v)]
    return depth


def checked(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The record, whose parts are what they should be, or a ValueError."""
    for key, kind in (('benchmark', str), ('protocol', dict), ('weights', dict), ('data', dict), ('metrics', dict)):
        if not isinstance(record.get(key), kind):
            raise ValueError(f'{where}: the record has no usable {key!r}: {short(record.get(key))}')
    if not isinstance(record.get('extra', {}), dict):
        raise ValueError(f"{where}: the record has no usable 'extra': {short(record['extra'])}")
    weights, data = record['weights'], record['data']
    if not all(isinstance(weights.get(key), kind) for key, kind in (
            ('name', str), ('digest', str), ('tag', str | None))):
        raise ValueError(f"{where}: the record's weights have no name, tag (or null) or digest: {short(weights)}")
    if not isinstance(data.get('name'), str) or not isinstance(data.get('counts'), dict):
        raise ValueError(f"{where}: the record's data have no name or counts: {short(data)}")
    if not record['metrics']:
        raise ValueError(f'{where}: the record has no metric')
    for name, value in record['metrics'].items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e-6 < value < 100 + 1e-6:
            raise ValueError(f'{where}: the metric {short(name)} is {short(value)}, which is no number of percent')
    found = record.get('extra', {}).get('unreadable', 0)
    if isinstance(found, bool) or not isinstance(found, (int, list, dict)) or isinstance(found, int) and found < 0:
        raise ValueError(f"{where}: the record's extra.unreadable is {short(found)}, which is no number of images, nor "
                         'a list or table of them')
    return record


def pair_of(record: dict[str, Any]) -> str:
    """Of a semi-supervised result the pair of rates, which its protocol leaves open; else ''."""
    protocol = record['protocol']
    if protocol.get('head_multiplier') is None:
        return ''
    return f'lr {short(protocol.get("lr"), 12)}, x {short(protocol["head_multiplier"], 12)} for the classifier'


def counts_of(data: dict[str, Any]) -> str:
    """'1,281,167 + 50,000 images of 1000 classes', of what the record tells."""
    counts = {k: v for k, v in data['counts'].items() if isinstance(v, int)}
    images = ' + '.join(f'{counts[key]:,}' for key in ('train', 'test') if key in counts)
    parts = [f'{images} images'] if images else []
    return ' of '.join(parts + ([f'{counts["classes"]} classes'] if 'classes' in counts else []))


def called(weights: dict[str, Any]) -> str:
    """The name as the user wrote it; of a long path the end, which tells it from others."""
    name, tag = weights['name'], weights['tag']
    text = short(name if tag is None or tag in name else f'{name} ({tag})', LARGEST)
    return text if len(text) <= 60 else f'...{text[-57:]}'


def print_record(record: dict[str, Any]) -> str:
    """Measured beside published, as text."""
    weights, data, now = record['weights'], record['data'], compare(record)
    beside = {}
    for entry in now['published']:
        if entry['same_weights'] and entry['same_protocol']:
            beside |= entry['metrics']
    comparable = now['not_comparable'] is None
    head = ['metric', 'measured', *(['published', 'difference', 'spread'] if beside and comparable else [])]
    rows = [head]
    for name, value in record['metrics'].items():
        row = [short(name, 40), f'{value:.2f}']
        if len(head) > 2:
            row += [
                str(beside.get(name, '-')), f'{now["difference"][name]:+.2f}' if name in now['difference'] else '-',
                f'{now["tolerance"][name]:.2f}' if name in now['tolerance'] else '-']
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        f'{short(record["benchmark"])}: {called(weights)} on {short(data["name"])}'
        f' ({counts_of(data) or "counts not told"})']
    for row in rows:
        lines.append('  ' + '  '.join(
            cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))))
    if pair := pair_of(record):
        lines.append(f'with {pair}')
    if not comparable:
        lines.append(f'not comparable with published numbers: {now["not_comparable"]}')
    elif said := changes(record['protocol']):
        lines.append(f'changed: {"; ".join(said)}')
    if now['tolerance'] and comparable:
        lines.append(f'spread: {spread()["description"]}')
    lines += map(published_line, now['published'])
    if not now['published'] and (said := unpublished(record)):
        lines.append(said)
    return '\n'.join(lines)


def published_line(entry: dict[str, Any]) -> str:
    """One published entry with where it comes from."""
    numbers = ', '.join(f'{name} {value}' for name, value in entry['metrics'].items())
    which = 'this file' if entry['same_weights'] else f'other weights, {entry["file"]}'
    what = '' if entry['same_protocol'] else f' by another protocol, {entry["benchmark"]}'
    return f'published for {entry["tag"]} ({which}){what}: {numbers} ({source(entry)})'


def source(entry: dict[str, Any]) -> str:
    """Who published it, by which protocol, and what speaks against it."""
    remarks = [entry[key] for key in ('source', 'protocol', 'warning') if key in entry]
    return '; '.join(remarks + ([f'which weights: {entry["confidence"]}'] if 'confidence' in entry else []))
