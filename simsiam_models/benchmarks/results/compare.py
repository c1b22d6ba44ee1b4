"""Finds the published numbers that belong to a record, and decides whether it may be compared with them.

A difference is computed only if the weights are the very file that was measured, the data set is complete and every
parameter is that of the published protocol.
"""
import json
import re
from collections.abc import Collection
from typing import Any

from ...runtime.messages import counted, short
from ...weights.published import WEIGHTS, find_page_results, find_results
from .. import protocols
from ..datasets.sizes import LABELLED, SIZES, deviation

CHANGED = '(changed)'  # ends the name of a protocol in which a number was changed
CENTRE = {'resize': protocols.RESIZE, 'image_size': protocols.SIZE}
SQUASHED = {'squash': True, 'pooling': 'mmselfsup', **CENTRE}
SEMI, SEMI_FIXED = protocols.SEMI, protocols.SEMI_FIXED
AVGPOOL = (
    'optimizer', 'reported', 'inputs', 'batch_size', 'scaled_lr', 'momentum', 'weight_decay', 'epochs', 'schedule',
    'augmentation', *CENTRE)
MHEAD = (
    'epochs', 'lr_steps', 'augmentation', 'jitter', 'lighting', 'inputs', 'optimizer', 'lr', 'momentum', 'nesterov',
    'weight_decay', 'batch_size', 'schedule', 'lr_gamma', 'reported', *CENTRE)
LINEAR = {  # benchmark -> protocol, parameters that count if the protocol uses them
    'imagenet_linear': ('fair', AVGPOOL), 'imagenet_linear_avgpool': ('mmselfsup', AVGPOOL),
    'imagenet_mhead_linear': ('mhead', MHEAD), 'places205_mhead_linear': ('mhead_places205', MHEAD),
    'inat18_mhead_linear': ('mhead_inat18', MHEAD)}
DETECTION = ('batch_size', 'lr', 'momentum', 'weight_decay', 'short_sides', 'test_side', 'long_side', 'flip_p')
SEGMENTATION = (
    'batch_size', 'iterations', 'lr', 'floor', 'power', 'momentum', 'weight_decay', 'box', 'ratios', 'crop',
    'cat_max_ratio', 'flip_p', 'brightness', 'contrast', 'saturation', 'hue', 'loss_mean', 'aux_weight', 'test')
# Benchmark -> the parameters that a record's protocol must state for its numbers to be comparable, as JSON holds them.
REQUIRED: dict[str, dict[str, Any]] = json.loads(json.dumps({
    f'imagenet_knn_T{protocols.KNN_T:g}': {'T': protocols.KNN_T, 'features': 'avgpool', **CENTRE},
    **{benchmark: {key: getattr(protocols.LINEAR[name], key) for key in keys if key not in protocols.LINEAR[name].idle}
       for benchmark, (name, keys) in LINEAR.items()},
    **dict.fromkeys(('imagenet_semi_1pct', 'imagenet_semi_10pct'), {
        'optimizer': SEMI_FIXED['optimizer'], **SEMI, 'steps': SEMI_FIXED['steps'],
        'momentum': SEMI_FIXED['momentum'], **CENTRE}),
    **{p.benchmark: {
        'name': name, 'variant': 'mmdet', 'rois': protocols.DETECTORS[p.detector].rois,
        **({'iterations': p.iterations, 'lr_steps': p.lr_steps} if p.iterations else {}),
        **{key: getattr(p, key) for key in DETECTION}} for name, p in protocols.DETECTION.items()},
    **{p.benchmark: {'name': name, **{key: getattr(p, key) for key in SEGMENTATION}}
       for name, p in protocols.SEGMENTATION.items()},
    'voc07_svm': {'costs': protocols.SVM_COSTS, 'folds': protocols.SVM_FOLDS, **SQUASHED},
    'voc07_lowshot_svm': {
        'costs': protocols.SVM_COSTS, 'samples': protocols.LOW_SHOT_DRAWS,
        'negatives_per_positive': protocols.LOW_SHOT_NEGATIVES, **SQUASHED}}))
# Run-to-run differences, in percent; `TOLERANCE` says between which runs.
RUN_TO_RUN = {
    ('voc07_svm_feature5', 'mAP'): 0.43, ('imagenet_linear_avgpool', 'top1'): 0.32,
    ('imagenet_mhead_linear', 'feature5'): 0.29, ('voc0712_faster_rcnn_c4_24k', 'AP50'): 0.17,
    ('coco_mask_rcnn_r50_fpn_ms_1x', 'box_AP'): 0.3, ('coco_mask_rcnn_r50_fpn_ms_1x', 'mask_AP'): 0.2,
    ('voc12aug_fcn_r50_d8_512_20k', 'mIoU'): 2.24}
TOLERANCE = ("how much two pretraining runs of MMSelfSup's 100-epoch recipe, weights 20211213 and 20211230, differ, in "
             'percent (open-mmlab/mmselfsup configs/selfsup/simsiam/README.md @ v0.5.0 and v0.9.1)')
# The same task by another protocol: its numbers are shown, but never compared.
RELATED = {'imagenet_linear': 'imagenet_linear_avgpool', 'imagenet_linear_avgpool': 'imagenet_linear'}


def compare(record: dict[str, Any]) -> dict[str, Any]:
    """Returns what is published for a record's benchmark, and by metric how far the measured numbers are from it."""
    benchmark, metrics = record['benchmark'], record['metrics']
    found = find_published(benchmark, record['weights']['tag'])
    reason = why_not_comparable(record) if found or strip_layer(benchmark) in REQUIRED else None
    difference, tolerance = {}, {}
    if reason is None:
        own = own_numbers(found)
        difference = {name: round(value - own[name], 4) for name, value in metrics.items() if name in own}
        tolerance = {name: RUN_TO_RUN[benchmark, name] for name in metrics if (benchmark, name) in RUN_TO_RUN}
    return {'published': found, 'not_comparable': reason, 'difference': difference, 'tolerance': tolerance}


def find_published(benchmark: str, tag: str | None) -> list[dict[str, Any]]:
    """Returns entries of weights/published.json with `file`, `same_weights` and `same_protocol`.

    First those of the same weights file, then those of other files on the same page or, if none of them is of this
    benchmark, of all other weights, for orientation.
    """
    own = find_results(tag) if tag else []
    others = find_page_results(tag) if tag and own else []
    if benchmark not in {entry['benchmark'] for entry in own + others}:
        pretraining = [other for other, weights in WEIGHTS.items() if other != tag and not weights.linear]
        others = [entry for other in pretraining for entry in find_results(other)]
    return [
        {**entry, 'file': WEIGHTS[entry['tag']].url.rsplit('/', 1)[-1], 'same_weights': entry in own,
         'same_protocol': entry['benchmark'] == benchmark and 'protocol' in entry}
        for entry in own + others
        if entry['benchmark'] == benchmark or entry in own and entry['benchmark'] == RELATED.get(benchmark)]


def own_numbers(published: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the metrics of the entries of `find_published` that have the same weights and protocol."""
    return {
        name: value for entry in published if entry['same_weights'] and entry['same_protocol']
        for name, value in entry['metrics'].items()}


def strip_layer(benchmark: str) -> str:
    """Returns the benchmark's name without the layer: voc07_svm_feature5 -> voc07_svm."""
    return re.sub(r'_feature[1-5]$', '', benchmark)


def why_not_comparable(record: dict[str, Any]) -> str | None:
    """Lists how a record departs from the published protocol of its benchmark; None if it does not."""
    benchmark, protocol, name = record['benchmark'], record['protocol'], record['data']['name']
    required = REQUIRED.get(strip_layer(benchmark))
    if required is None:
        return f'the published parameters of {short(benchmark)} are not known here'
    kind = benchmark.split('_')[0]
    data = size_deviation(record) if name == kind else f'measured on {short(name)}, not on {SIZES[kind].title}'
    reasons = [text for text in (data, describe_unreadable(record)) if text]
    stated = {**protocol, 'amp': protocol.get('amp') or 'off'}
    for key, value in {**required, 'amp': 'off'}.items():
        if key not in stated:
            reasons.append(f'the record does not state {key} (published: {short(value)})')
        elif not _equal(stated[key], value):
            reasons.append(f'{key} {short(stated[key])} (published: {short(value)})')
    if is_changed(protocol) and not reasons:
        reasons.append(f'changed: {"; ".join(list_changes(protocol)) or "the record does not say what"}')
    return '; '.join(reasons) or None


def size_deviation(record: dict[str, Any]) -> str | None:
    """Describes how a record's data set differs in size from the complete one; None if it does not, or is unknown."""
    data = record['data']
    return deviation(data['name'], data['counts'], LABELLED.get(record['benchmark'].rpartition('_')[2]))


def note_unpublished(record: dict[str, Any]) -> str:
    """Notes that no number is published; returns '' if none could be: on the user's own data, or by the auto probe."""
    benchmark = record['benchmark']
    possible = benchmark.split('_')[0] in SIZES and not benchmark.endswith('_auto_probe')
    return f'no number is published for {short(benchmark)}' if possible else ''


def describe_unreadable(record: dict[str, Any]) -> str:
    """Returns how many images were left out or replaced; '' if none were."""
    found = record.get('extra', {}).get('unreadable', 0)
    n = found if isinstance(found, int) else len(found)
    return f'{counted(n, "image")} could not be read' if n else ''


def is_changed(protocol: dict[str, Any]) -> bool:
    """Returns whether a number differs from those that the protocol's name stands for."""
    return bool(protocol.get('changed')) or str(protocol.get('name')).endswith(CHANGED)


def list_changes(protocol: dict[str, Any], known: Collection[str] = ()) -> list[str]:
    """Describes each change that the protocol states, except changes of the parameters `known`."""
    changed = protocol.get('changed') or []
    if isinstance(changed, dict):
        values = {k: v if isinstance(v, dict) else {'used': v} for k, v in changed.items() if k not in known}
        return [f'{short(k)} {short(v.get("used"))}' + (
            f' (published: {short(v["published"])})' if 'published' in v else '') for k, v in values.items()]
    return [short(x) for x in (changed if isinstance(changed, list) else [changed]) if x is not True]


def _equal(a: Any, b: Any) -> bool:
    # math.isclose would fail for an integer that is too large for a float, which JSON can hold.
    return a == b or {type(a), type(b)} <= {int, float} and b * (1 - 1e-9) <= a <= b * (1 + 1e-9)
