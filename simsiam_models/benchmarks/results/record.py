"""A benchmark's result as one JSON file, which also lists what is published for the same weights.

Published numbers are never measured here; see `compare` for when a difference from them is computed.
"""
import codecs
import json
import re
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...data.readers.index import digest
from ...runtime.accuracy import standard_error
from ...runtime.files import write_atomically
from ...runtime.messages import guess_path, is_count, one_line, short
from ...runtime.versions import command, versions
from ...weights.published import WEIGHTS
from ..backbone import Backbone
from ..protocols import KNN_T
from .accuracy import count_tested, describe_difference
from .compare import TOLERANCE, compare, list_changes, note_unpublished, own_numbers

FORMAT, VERSION = 'simsiam_models benchmark', 1
FIELDS = {'benchmark': str, 'protocol': dict, 'weights': dict, 'data': dict, 'metrics': dict, 'extra': dict}
MMSELFSUP = (  # in the names of benchmarks by its protocols
    f'knn_T{KNN_T:g}', 'mhead_linear', 'linear_avgpool', 'linear_mmselfsup', 'svm', 'semi_', 'fcn_r50_d8')
EXIF = "EXIF orientation is not applied here; MMSelfSup's reader (OpenCV) applied it to images that have one"
LARGEST = 64 * 2**20  # bytes of a file that is read as a record
DEEPEST = 100  # nested lists and tables


class NoRecordError(ValueError):
    """The file is JSON of another kind, such as args.json or config.json of a run."""


def record_path(
    folder: str | Path, benchmark: str, backbone: Backbone, protocol: dict[str, Any], data: dict[str, Any],
) -> Path:
    """Returns a path in `folder` that two results share only if weights, protocol and data are the same."""
    about = to_json_types([protocol, data.get('digest'), data.get('counts')])
    key = digest(json.dumps(about, sort_keys=True), backbone.identity)
    name = re.sub(r'[^\w.=-]+', '-', Path(backbone.name).name or backbone.name, flags=re.ASCII).strip('-.')
    return Path(folder) / f'{benchmark}-{name[:80]}-{key[:8]}.json'


def write_record(
    path: str | Path, benchmark: str, protocol: dict[str, Any], backbone: Backbone, data: dict[str, Any],
    metrics: Mapping[str, float], *, seconds: float, extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the JSON atomically and returns its content; raises ValueError if a record cannot hold a value.

    Args:
        benchmark: its name in weights/published.json if it has one there.
        protocol: every parameter, under the names in compare.REQUIRED; true under 'changed' if it is not as published.
        data: name (a key of SIZES for a data set in it), counts (train, test, classes), digest, and path as typed.
        metrics: percent.
        extra: other results. 'unreadable' images (their number, a list or a table) make a record incomparable.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f'{path} is a folder; a record is a file, such as {path / (benchmark + ".json")}')
    record = check_record(to_json_types({
        'format': FORMAT, 'version': VERSION, 'benchmark': benchmark, 'protocol': protocol,
        'weights': {
            'name': backbone.name, 'tag': backbone.tag, 'digest': backbone.digest, 'pixels': _describe_pixels(backbone),
            'mean': backbone.mean, 'std': backbone.std},
        'data': data, 'metrics': dict(metrics), 'extra': extra or {}}), path)
    if any(name in benchmark for name in MMSELFSUP):
        record['exif'] = EXIF
    record |= {
        **compare(record), 'command': command(), 'versions': versions(), 'seconds': round(float(seconds), 1),
        'date': datetime.now(timezone.utc).isoformat(timespec='seconds')}
    text = json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False) + '\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda f: f.write(text.encode(errors='surrogateescape')))
    return record


def _describe_pixels(backbone: Backbone) -> str:
    reversed_since = backbone.tag in WEIGHTS and WEIGHTS[backbone.tag].bgr
    return 'RGB; trained on BGR (inferred), the input channels of conv1 reversed since' if reversed_since else 'RGB'


def check_output(folder: Path) -> None:
    """Creates the folder of the output; raises ValueError if it is not writable, before hours of work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(buffering=0, dir=folder) as f:
            f.write(b'simsiam')
    except OSError as e:
        raise ValueError(
            f'--output {folder}: cannot be written to ({e.strerror}); name a writable folder') from None


def to_json_types(value: Any) -> Any:
    """Converts numpy numbers and arrays, tuples and paths to the types that JSON holds."""
    def convert(x: Any) -> Any:
        if not hasattr(x, 'tolist') and not isinstance(x, Path):
            raise TypeError(f'{type(x).__name__} cannot be written as JSON')
        return str(x) if isinstance(x, Path) else x.tolist()

    try:
        return json.loads(json.dumps(value, default=convert, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as e:
        raise ValueError(f'a record holds numbers, strings, and lists and tables of them ({e})') from None


def read_record(path: str | Path) -> dict[str, Any]:
    """Reads what `write_record` wrote.

    Raises NoRecordError if the file is JSON but not a record, ValueError if it is not JSON, or a record that is damaged
    or of another version, and OSError if it cannot be read.
    """
    def refuse(constant: str) -> None:
        raise ValueError(f'{constant} is not a number')

    def make_table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(table := dict(pairs)) < len(pairs):
            raise ValueError(f'a name stands twice in the table of {short(", ".join(table))}')
        return table

    path = Path(path)
    try:
        if path.is_dir():
            raise ValueError(f'{path} is a folder; name a record in it, or pass the folder to `simsiam report`')
        if (size := path.stat().st_size) > LARGEST:
            raise ValueError(f'{path} is not a record: it is too large ({size:,} bytes)')
        if not path.is_file():
            raise ValueError(f'{path} is not a record: it is not a regular file')
        content = path.read_bytes()
    except OSError as e:
        absent = isinstance(e, FileNotFoundError)
        hint = 'fix that, or leave the file out' if not absent else (
            guess_path(path) or '`simsiam knn` and the other benchmarks write records')
        raise type(e)(f'{path} cannot be read ({e.strerror}); {hint}') from None
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode(errors='surrogateescape')
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=make_table)
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{path} is not valid JSON ({one_line(e, 150)})') from None
    if not isinstance(value, dict) or value.get('format') != FORMAT:
        raise NoRecordError(f'{path} is JSON, but not the record of a benchmark, whose "format" is {FORMAT!r}')
    if _is_deeper(value, DEEPEST):
        raise ValueError(f'{path} is not a record: it nests more than {DEEPEST} levels deep')
    if value.get('version') != VERSION:
        raise ValueError(
            f'{path} is a record of version {str(value.get("version"))[:20]}, but this program reads version '
            f'{VERSION}; use the program that wrote it')
    return check_record(value, path)


def _is_deeper(value: Any, levels: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not levels or any(_is_deeper(part, levels - 1) for part in parts)


def check_record(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the record; raises ValueError, which names `path`, if a part is missing or of the wrong type."""
    for key, kind in FIELDS.items():
        if not isinstance(record.get(key), kind) and (key in record or key != 'extra'):
            raise ValueError(f'{path}: the record has no usable {key!r}: {short(record.get(key))}')
    weights, data, metrics = record['weights'], record['data'], record['metrics']
    names = ((weights.get('name'), str), (weights.get('digest'), str), (weights.get('tag'), str | None))
    counts = data['counts'] if isinstance(data.get('counts'), dict) else {}
    unreadable = record.get('extra', {}).get('unreadable', 0)
    rules = [
        ('tag' in weights and all(isinstance(value, kind) for value, kind in names),
         f"the record's weights lack a name, tag (or null) or digest: {short(weights)}"),
        (isinstance(data.get('name'), str) and isinstance(data.get('counts'), dict),
         f"the record's data lack a name or counts: {short(data)}"),
        (all(is_count(n) for n in counts.values() if isinstance(n, int)),
         f"the record's data.counts are not numbers of images: {short(data)}"),
        (metrics, 'the record has no metric'),
        *((type(x) in (int, float) and -1e-6 < x < 100 + 1e-6,
           f'the metric {short(name)} is {short(x)}, which is not a percentage') for name, x in metrics.items()),
        (isinstance(unreadable, (list, dict)) or type(unreadable) is int and unreadable >= 0,
         f"the record's extra.unreadable is {short(unreadable)}, not a number, list or table of images")]
    for allowed, text in rules:
        if not allowed:
            raise ValueError(f'{path}: {text}')
    return record


def describe_rates(record: dict[str, Any]) -> str:
    """Returns the learning rates of a semi-supervised result, which its protocol leaves open; '' for other results."""
    lr, multiplier = (record['protocol'].get(key) for key in ('lr', 'head_multiplier'))
    return '' if multiplier is None else f'lr {short(lr, 12)}, x {short(multiplier, 12)} for the classifier'


def describe_counts(data: dict[str, Any]) -> str:
    """Returns '1,281,167 + 50,000 images of 1000 classes', or as much of that as the record states."""
    counts = {k: v for k, v in data['counts'].items() if isinstance(v, int)}
    images = ' + '.join(f'{counts[key]:,}' for key in ('train', 'test') if key in counts)
    classes = f'{counts["classes"]} classes' if 'classes' in counts else ''
    return ' of '.join(filter(None, (images and f'{images} images', classes)))


def display_name(weights: dict[str, Any]) -> str:
    """Returns the name as the user wrote it, or the end of a long path, which distinguishes it from others."""
    name, tag = weights['name'], weights['tag']
    text = short(name if tag is None or tag in name else f'{name} ({tag})', LARGEST)
    return text if len(text) <= 60 else f'...{text[-57:]}'


def format_record(record: dict[str, Any]) -> str:
    """Formats a record as text, with the measured numbers next to the published ones."""
    data, now, rates = record['data'], compare(record), describe_rates(record)
    reason, changes = now['not_comparable'], '; '.join(list_changes(record['protocol']))
    return '\n'.join(filter(None, (
        f'{short(record["benchmark"])}: {display_name(record["weights"])} on {short(data["name"])}'
        f' ({describe_counts(data) or "counts unknown"})',
        *_format_metrics(record, now),
        _describe_worse(record, now),
        rates and f'with {rates}',
        f'not comparable with published numbers: {reason}' if reason else changes and f'changed: {changes}',
        f'tolerance: {TOLERANCE}' if now['tolerance'] else '',
        *map(format_published, now['published']),
        '' if now['published'] else note_unpublished(record))))


def _format_metrics(record: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns the lines of a table; `now`: from `compare`."""
    metrics, n = record['metrics'], count_tested(record)
    columns = [('measured', metrics, '.2f')]
    if n:
        columns.append(('std. error', {name: standard_error(value, n) for name, value in metrics.items()}, '.2f'))
    own = own_numbers(now['published'])
    if own and now['not_comparable'] is None:
        columns += [
            ('published', own, ''), ('difference', now['difference'], '+.2f'), ('tolerance', now['tolerance'], '.2f')]
    rows = [['metric', *(header for header, _, _ in columns)]]
    rows += [[short(name, 40), *(format(values[name], form) if name in values else '-' for _, values, form in columns)]
             for name in metrics]
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ['  '.join(['', row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]


def _describe_worse(record: dict[str, Any], now: dict[str, Any]) -> str:
    """Returns how far metrics are below their published numbers; '' if none is; `now`: from `compare`."""
    own, metrics, n = own_numbers(now['published']), record['metrics'], count_tested(record)
    worse = [f'{short(name, 40)} {describe_difference(metrics[name], own[name], n)}'
             for name, difference in now['difference'].items() if difference < 0]
    return f'worse than published: {"; ".join(worse)}' if worse else ''


def format_published(entry: dict[str, Any]) -> str:
    """Returns the numbers of a published entry and their source."""
    numbers = ', '.join(f'{name} {value}' for name, value in entry['metrics'].items())
    which = 'this file' if entry['same_weights'] else f'other weights, {entry["file"]}'
    another = f'another protocol, {entry["benchmark"]}' if 'protocol' in entry else 'a protocol that is not stated'
    protocol = '' if entry['same_protocol'] else f' by {another}'
    return f'published for {entry["tag"]} ({which}){protocol}: {numbers} ({describe_source(entry)})'


def describe_source(entry: dict[str, Any]) -> str:
    """Returns who published an entry, by which protocol, and any reservations."""
    labels = {'source': '', 'protocol': '', 'warning': '', 'confidence': 'which weights: '}
    return '; '.join(f'{label}{entry[key]}' for key, label in labels.items() if key in entry)
