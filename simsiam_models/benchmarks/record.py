"""A benchmark's result as one JSON file, with what is published for the same weights beside it.

A difference to a published number is taken only where the weights are the very file that it belongs to, the data set is
whole, and every parameter is the published protocol's: see `compare`. A published number was not measured here.
"""
import importlib.metadata
import json
import math
import platform
import re
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .counts import LABELLED, SIZES, deviation

if TYPE_CHECKING:
    from .backbone import Backbone

FORMAT, VERSION = 'simsiam_models benchmark', 1
LARGEST = 64 * 2**20  # bytes of a file that can be a record
CENTRE = {'resize': 256, 'image_size': 224}
SQUASHED = {'squash': True, 'pooling': 'mmselfsup', **CENTRE}
COSTS = [1, 10, 100, *(0.5**n for n in range(4, 20))]
MHEAD = {
    'inputs': 'five', 'optimizer': 'sgd', 'lr': 0.01, 'momentum': 0.9, 'nesterov': True, 'weight_decay': 1e-4,
    'batch_size': 256, 'schedule': 'steps', 'lr_gamma': 0.1, 'reported': 'last', **CENTRE}
LINEAR = {
    'inputs': 'avgpool', 'batch_size': 4096, 'scaled_lr': 1.6, 'momentum': 0.9, 'weight_decay': 0, 'epochs': 90,
    'schedule': 'cosine', 'augmentation': 'resized_crop', **CENTRE}
# What a record's protocol has to say for its benchmark to be the published one (sections of protocols: 2 to 5).
PROTOCOLS: dict[str, dict[str, Any]] = {
    'imagenet_knn_T0.07': {'T': 0.07, 'features': 'avgpool', **CENTRE},
    'imagenet_linear': {'optimizer': 'larc', 'reported': 'best', **LINEAR},
    'imagenet_linear_avgpool': {'optimizer': 'lars_mmselfsup', 'reported': 'last', **LINEAR},
    'imagenet_mhead_linear': {
        'epochs': 90, 'lr_steps': [30, 60], 'augmentation': 'resized_crop_colour', 'jitter': 0.4, 'lighting': 0.1,
        **MHEAD},
    'places205_mhead_linear': {'epochs': 28, 'lr_steps': [7, 14, 21], 'augmentation': 'random_crop', **MHEAD},
    'inat18_mhead_linear': {'epochs': 84, 'lr_steps': [24, 48, 72], 'augmentation': 'resized_crop', **MHEAD},
    **dict.fromkeys(('imagenet_semi_1pct', 'imagenet_semi_10pct'), {
        'optimizer': 'sgd', 'epochs': 20, 'batch_size': 256, 'steps': [12, 16], 'momentum': 0.9, **CENTRE}),
    'voc07_svm': {'costs': COSTS, 'folds': 3, **SQUASHED},
    'voc07_lowshot_svm': {'costs': COSTS, 'samples': 5, 'negatives_per_positive': 19, **SQUASHED},
}
# The entry of spread.json for a benchmark and its metric.
SPREAD = {
    ('voc07_svm_feature5', 'mAP'): 'svm_mAP', ('imagenet_linear_avgpool', 'top1'): 'avgpool_top1',
    ('imagenet_mhead_linear', 'feature5'): 'mhead_feature5', ('voc0712_faster_rcnn_c4_24k', 'AP50'): 'voc0712_AP50',
    ('coco_mask_rcnn_r50_fpn_ms_1x', 'box_AP'): 'coco_box_AP', ('coco_mask_rcnn_r50_fpn_ms_1x', 'mask_AP'):
    'coco_mask_AP', ('voc12aug_fcn_r50_d8_512_20k', 'mIoU'): 'voc12aug_mIoU'}
# Numbers of the same task by another protocol: shown, never compared with.
RELATED = {'imagenet_linear': 'imagenet_linear_avgpool', 'imagenet_linear_avgpool': 'imagenet_linear'}


class NoRecordError(ValueError):
    """JSON of another kind, as args.json and config.json of a run."""


def record_path(folder: str | Path, benchmark: str, backbone: 'Backbone', protocol: dict, data: dict) -> Path:
    """A name in `folder` that two results share only where they are of the same thing."""
    from ..data.index import digest

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
        data: name (a key of SIZES, where it is one of these sets), counts (train, test, classes) and digest.
        metrics: percent.
        extra: whatever else is worth keeping; 'unreadable', images that were left out, makes a record incomparable.

    Raises:
        ValueError: a metric is no number of percent, or something has no form in JSON.
        OSError: the file cannot be written.
    """
    from ..training.checkpoint import write_atomically

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
        FileNotFoundError, ValueError: no such file, or it is no record.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such record; `simsiam knn`, `linear` and the like write them')
    if path.stat().st_size > LARGEST:
        raise ValueError(f'{path}: is no record: {path.stat().st_size:,} bytes are too many')

    def constant(name: str) -> None:
        raise ValueError(f'{name} is no number')

    try:
        value = json.loads(path.read_bytes().decode(errors='surrogateescape'), parse_constant=constant)
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{path}: is not readable as JSON ({" ".join(str(e).split())[:150]})') from None
    if not isinstance(value, dict) or value.get('format') != FORMAT:
        raise NoRecordError(f'{path}: is JSON, but no record of a benchmark; its "format" would be {FORMAT!r}')
    if value.get('version') != VERSION:
        raise ValueError(f'{path}: is a record of version {str(value.get("version"))[:20]}, and this program reads '
                         f'{VERSION}; read it with the program that wrote it')
    return checked(value, str(path))


def checked(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The record, whose parts are what they should be, or a ValueError."""
    for key, kind in (('benchmark', str), ('protocol', dict), ('weights', dict), ('data', dict), ('metrics', dict)):
        if not isinstance(record.get(key), kind):
            raise ValueError(f'{where}: the record has no usable {key!r}: {short(record.get(key))}')
    weights, data = record['weights'], record['data']
    if not all(isinstance(weights.get(key), kind) for key, kind in (
            ('name', str), ('digest', str), ('tag', str | None))):
        raise ValueError(f"{where}: the record's weights have no name, tag (or null) or digest: {short(weights)}")
    if not isinstance(data.get('name'), str) or not isinstance(data.get('counts'), dict):
        raise ValueError(f"{where}: the record's data have no name or counts: {short(data)}")
    if not record['metrics']:
        raise ValueError(f'{where}: the record has no metric')
    for name, value in record['metrics'].items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
            raise ValueError(f'{where}: the metric {short(name)} is {short(value)}, which is no number of percent')
    return record


def compare(record: dict[str, Any]) -> dict[str, Any]:
    """What is published for a record's benchmark, and how far the measured numbers are from it.

    Returns:
        published: entries of weights/published.json with `file`, `same_weights` and `same_protocol`.
        not_comparable: why no published number may be held against the record, or None.
        difference: metric -> measured - published; only for the same weights and protocol.
        tolerance: metric -> how much two pretraining runs of one recipe were seen to differ.
    """
    benchmark, tag, metrics = record['benchmark'], record['weights']['tag'], record['metrics']
    found = published_for(benchmark, tag)
    reason = why_not_comparable(record) if found or family(benchmark) in PROTOCOLS else None
    difference, tolerance = {}, {}
    for entry in found:
        if reason is None and entry['same_weights'] and entry['same_protocol']:
            difference |= {
                name: round(value - entry['metrics'][name], 4) for name, value in metrics.items()
                if name in entry['metrics']}
    if reason is None:
        tolerance = {
            name: abs(spread()['deltas'][key]) for name in metrics if (key := SPREAD.get((benchmark, name)))}
    return {'published': found, 'not_comparable': reason, 'difference': difference, 'tolerance': tolerance}


def published_for(benchmark: str, tag: str | None) -> list[dict[str, Any]]:
    """Those of the same file first; else those of others, which differ in more than a run."""
    from ..resnet import WEIGHTS
    from ..weights.published import published, same_page

    own = published(tag) if tag else []
    others = same_page(tag) if own else []
    if benchmark not in {entry['benchmark'] for entry in own + others}:  # of any weights, for orientation
        others = [entry for other in WEIGHTS if other != tag and '_lin_' not in other for entry in published(other)]
    found = []
    for entry in own + others:
        if entry['benchmark'] not in (benchmark, RELATED.get(benchmark)):
            continue
        same = entry['benchmark'] == benchmark
        if not same and entry not in own:
            continue
        found.append({
            **entry, 'file': WEIGHTS[entry['tag']].url.rsplit('/', 1)[-1], 'same_weights': entry in own,
            'same_protocol': same})
    return found


def family(benchmark: str) -> str:
    """The benchmark without its layer."""
    return re.sub(r'_feature[1-5]$', '', benchmark)


def why_not_comparable(record: dict[str, Any]) -> str | None:
    """In what a record departs from the published protocol of its benchmark; None where in nothing."""
    benchmark, protocol, data = record['benchmark'], record['protocol'], record['data']
    wanted = PROTOCOLS.get(family(benchmark))
    if wanted is None:
        return f'the parameters that {benchmark} was published with are not known here'
    said = []
    kind = benchmark.split('_')[0]
    if data['name'] != kind:
        said.append(f'measured on {data["name"]}, not on {SIZES[kind].title}')
    elif found := deviation(kind, data['counts'], LABELLED.get(benchmark.rpartition('_')[2])):
        said.append(found)
    if unreadable := _unreadable(record.get('extra')):
        said.append(f'{unreadable} images could not be read')
    for key, value in wanted.items():
        if key not in protocol:
            said.append(f'the record does not tell its {key} ({short(value)} is published)')
        elif not _same(protocol[key], value):
            said.append(f'{key} {short(protocol[key])} where {short(value)} is published')
    if protocol.get('amp') not in (None, 'off'):
        said.append(f'amp {short(protocol["amp"])} where off is published')
    changed = protocol.get('changed')
    if changed and not said:
        said.append(f'changed: {short(changed)}')
    return '; '.join(said) or None


def _unreadable(extra: Any) -> int:
    """How many images were left out or replaced: a number, or a list or table of them."""
    found = extra.get('unreadable') if isinstance(extra, dict) else None
    return found if isinstance(found, int) else len(found) if isinstance(found, (list, dict)) else 0


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool) or not all(isinstance(x, (int, float)) for x in (a, b)):
        return a == b
    try:
        return math.isclose(a, b, rel_tol=1e-9)
    except OverflowError:  # JSON has whole numbers of any length
        return False


@cache
def spread() -> dict[str, Any]:
    """How much two runs were seen to differ."""
    return json.loads(Path(__file__).with_name('spread.json').read_text(encoding='utf-8'))


def short(value: Any, most: int = 80) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = ' '.join(''.join(c if c.isprintable() else ' ' for c in text).split())
    return text if len(text) <= most else text[:most - 3] + '...'


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
    name, tag = weights['name'], weights['tag']
    return short(name if tag is None or tag in name else f'{name} ({tag})')


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
    if now['tolerance'] and comparable:
        lines.append(f'spread: {spread()["description"]}')
    for entry in now['published']:
        lines.append(published_line(entry))
    if not now['published']:
        lines.append(f'no number is published for {short(record["benchmark"])}')
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
