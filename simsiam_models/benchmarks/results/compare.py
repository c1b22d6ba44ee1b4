"""What is published for a record's benchmark, and whether the record may be held against it.

A difference to a published number is taken only where the weights are the very file that it belongs to, the data set is
whole, and every parameter is the published protocol's: see `compare`.
"""
import json
import math
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

from ...runtime.messages import short
from ...weights.published import WEIGHTS, published, same_page
from ..datasets.sizes import LABELLED, SIZES, deviation

CHANGED = '(changed)'  # ends the name of a protocol that is no longer the published one
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
        return f'the parameters that {short(benchmark)} was published with are not known here'
    said = []
    kind = benchmark.split('_')[0]
    if data['name'] != kind:
        said.append(f'measured on {short(data["name"])}, not on {SIZES[kind].title}')
    elif found := missing(record):
        said.append(found)
    if missed := unreadable(record):
        said.append(f'{missed} images could not be read')
    for key, value in wanted.items():
        if key not in protocol:
            said.append(f'the record does not tell its {key} ({short(value)} is published)')
        elif not _same(protocol[key], value):
            said.append(f'{key} {short(protocol[key])} where {short(value)} is published')
    if protocol.get('amp') not in (None, 'off'):
        said.append(f'amp {short(protocol["amp"])} where off is published')
    if is_changed(protocol) and not said:
        said.append(f'changed: {"; ".join(changes(protocol)) or "the record does not tell what"}')
    return '; '.join(said) or None


def missing(record: dict[str, Any]) -> str | None:
    """What the record's data set has less or more than the whole one; None where it is that, or an unknown one."""
    data = record['data']
    return deviation(data['name'], data['counts'], LABELLED.get(record['benchmark'].rpartition('_')[2]))


def unpublished(record: dict[str, Any]) -> str:
    """That nobody published a number, where somebody could have: of data that others have, by a known protocol."""
    benchmark = record['benchmark']
    if benchmark.split('_')[0] not in SIZES or benchmark.endswith('_auto_probe'):
        return ''
    return f'no number is published for {short(benchmark)}'


def unreadable(record: dict[str, Any]) -> int:
    """How many images were left out or replaced; the record has a number, or a list or table of them."""
    found = record.get('extra', {}).get('unreadable', 0)
    return found if isinstance(found, int) else len(found)


def is_changed(protocol: dict[str, Any]) -> bool:
    """Whether it is no longer the one that its name stands for."""
    return bool(protocol.get('changed')) or str(protocol.get('name')).endswith(CHANGED)


def changes(protocol: dict[str, Any], known: Collection[str] = ()) -> list[str]:
    """In what, as the record tells it; without the parameters that are `known`."""
    changed = protocol.get('changed')
    if isinstance(changed, dict):
        pairs = {k: v if isinstance(v, dict) else {'used': v} for k, v in changed.items() if k not in known}
        return [f'{short(k)} {short(v.get("used"))}' + (
            f' where {short(v["published"])} is published' if 'published' in v else '') for k, v in pairs.items()]
    if isinstance(changed, list):
        return [short(x) for x in changed]
    return [short(changed)] if changed and changed is not True else []


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
