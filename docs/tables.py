"""Tables of the pages as Markdown, from the numbers that the commands use, so that they cannot differ from them."""
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from simsiam_models.benchmarks import protocols as p
from simsiam_models.benchmarks.datasets.sizes import SIZES
from simsiam_models.training.recipes import RECIPES
from simsiam_models.weights.published import RESULTS, WEIGHTS, format_metrics

LINEAR_NAMES = {
    'inputs': 'features', 'optimizer': 'optimizer', 'batch_size': 'batch', 'lr': 'learning rate',
    'schedule': 'schedule', 'lr_steps': 'falls after epochs', 'lr_gamma': 'falls by the factor', 'epochs': 'epochs',
    'momentum': 'momentum', 'nesterov': 'Nesterov', 'weight_decay': 'weight decay', 'trust': 'trust coefficient',
    'init_std': 'std of initial weights', 'augmentation': 'augmentation', 'crop_scale': 'area of a crop',
    'jitter': 'colour jitter', 'lighting': 'std of PCA noise', 'flip_p': 'probability of a flip',
    'image_size': 'image size, px', 'resize': 'short side in tests, px', 'eval_every': 'evaluated every N epochs, N =',
    'reported': 'reported epoch'}
WORDS = {
    'avgpool': 'average pool', 'five': 'five maps', 'larc': 'LARC', 'lars_mmselfsup': "LARS, MMSelfSup's", 'sgd': 'SGD',
    'resized_crop': 'crop, flip', 'resized_crop_colour': 'crop, flip, colour, PCA noise',
    'random_crop': 'random 224 of 256 px, flip'}


def format_value(value: Any) -> str:
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, tuple | list):
        return ', '.join(map(format_value, value))
    if isinstance(value, str):
        return WORDS.get(value, value)
    return f'{value:,}' if isinstance(value, int) else f'{value:g}'


def format_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)


def transpose(
    columns: Mapping[str, Any], names: Mapping[str, str], show: Callable[[Any, str], Any] = getattr,
) -> str:
    """Returns a table with a column for each protocol, and a row for each of its numbers."""
    return format_table(['', *(f'`{name}`' for name in columns)], (
        [title, *(format_value(show(column, key)) for column in columns.values())] for key, title in names.items()))


def list_recipes() -> str:
    return format_table(
        ['recipe', 'model', 'epochs', 'batch', 'lr per 256', 'weight decay', 'description'],
        ([f'`{name}`', r.model, r.epochs, r.batch_size, f'{r.lr:g}', f'{r.weight_decay:g}', r.about]
         for name, r in RECIPES.items()))


def list_linear() -> str:
    def show(protocol: p.LinearProtocol, key: str) -> Any:
        value = getattr(protocol, key)
        return '-' if key in protocol.idle else f'{value:g} per 256' if key == 'lr' and protocol.lr_per_256 else value
    return transpose(p.LINEAR, LINEAR_NAMES, show)


def list_detection() -> str:
    def show(protocol: p.DetectionProtocol, key: str) -> Any:
        sides = protocol.short_sides
        unit = 'iterations' if protocol.iterations else 'epochs'
        every = 'epoch' if protocol.eval_every == 1 else f'{protocol.eval_every:,} {unit}'
        return {
            'images': f'{SIZES[protocol.dataset].train:,} / {SIZES[protocol.dataset].test:,}',
            'length': f'{protocol.iterations or protocol.epochs:,} {unit}',
            'steps': f'{format_value(protocol.lr_steps)} {unit}', 'every': every,
            'sides': f'{sides[0]} to {sides[-1]} in steps of {sides[1] - sides[0]}',
            'detector': f'`{protocol.detector}`'}.get(key) or getattr(protocol, key)
    return transpose(p.DETECTION, {
        'detector': 'detector', 'dataset': 'data', 'images': 'images that train / test', 'batch_size': 'batch',
        'lr': 'learning rate', 'length': 'length', 'steps': 'rate x 0.1 after', 'warmup': 'linear warm-up, iterations',
        'momentum': 'momentum', 'weight_decay': 'weight decay', 'sides': 'short side in training, px',
        'test_side': 'short side in tests, px', 'long_side': 'long side at most, px', 'every': 'evaluated every'}, show)


def list_detectors() -> str:
    return transpose(p.DETECTORS, {
        'scales': 'anchor scales, in strides', 'ratios': 'anchor ratios', 'strides': 'strides of the maps',
        'rpn_iou': 'RPN: IoU negative below, positive from', 'rpn_samples': 'RPN: anchors per image',
        'train_proposals': 'proposals in training, before and after NMS',
        'test_proposals': 'proposals in tests, before and after NMS', 'rois': 'RoIs per image in training',
        'roi_share': 'share of positives, at most', 'pool_size': 'cells per side of a RoI', 'score': 'lowest score',
        'nms': 'IoU of NMS', 'detections': 'detections per image'})


def list_segmentation() -> str:
    names = {
        'dataset': 'data', 'batch_size': 'batch', 'iterations': 'iterations', 'lr': 'learning rate',
        'floor': 'lowest rate', 'power': 'power of the schedule', 'momentum': 'momentum',
        'weight_decay': 'weight decay', 'box': 'images fit into, px', 'ratios': 'times a ratio of', 'crop': 'crop, px',
        'cat_max_ratio': 'largest share of a class in a crop', 'flip_p': 'probability of a flip', 'test': 'test',
        'stride': 'stride of windows, px', 'align_corners': 'align_corners', 'aux_weight': 'weight of the second loss',
        'eval_every': 'evaluated every, iterations'}
    return transpose(p.SEGMENTATION, names, lambda protocol, key: '-' if (
        key == 'stride' and protocol.test == 'whole') else getattr(protocol, key))


def list_semi() -> str:
    rows = {**p.SEMI, **p.SEMI_FIXED, 'lr_gamma': p.SEMI_LR_GAMMA, 'lrs': p.SEMI_LRS, 'heads': p.SEMI_HEAD_MULTIPLIERS}
    names = {
        'epochs': 'epochs', 'batch_size': 'batch', 'optimizer': 'optimizer', 'momentum': 'momentum',
        'lrs': 'learning rates of the backbone', 'heads': 'times this for the classifier',
        'steps': 'falls after epochs', 'lr_gamma': 'falls by the factor', 'crop_scale': 'area of a crop',
        'flip': 'probability of a flip', 'eval_every': 'evaluated every N epochs, N ='}
    return format_table(['', *(f'`{name}`' for name in p.SEMI_WEIGHT_DECAY)], [
        *([title, *[format_value(rows[key])] * 2] for key, title in names.items()),
        ['weight decay', *map(format_value, p.SEMI_WEIGHT_DECAY.values())]])


def list_svm() -> str:
    costs = f'{format_value(p.SVM_COSTS[:3])} and 0.5^n for n = 4 to {len(p.SVM_COSTS)}'
    weights, svc = p.LINEAR_SVC['class_weight'], {k: v for k, v in p.LINEAR_SVC.items() if k != 'class_weight'}
    return format_table(['', 'value'], [
        ['costs', costs], ['folds that choose the cost', p.SVM_FOLDS],
        ['weight of a positive, of a negative', f'{weights[1]}, {weights[-1]}'],
        ["scikit-learn's `LinearSVC`", ', '.join(f'`{k}={v!r}`' for k, v in svc.items())],
        ['AP', p.SVM_AP], ['low-shot: positives per class', format_value(p.LOW_SHOT_KS)],
        ['low-shot: negatives per positive', p.LOW_SHOT_NEGATIVES], ['low-shot: draws', p.LOW_SHOT_DRAWS]])


def list_weights() -> str:
    return format_table(
        ['tag', 'publisher', 'epochs', 'batch', 'linear top-1, **published**', 'classifier', 'licence'],
        ([f'`{tag}`', w.publisher, w.epochs, w.batch, w.top1, 'yes' if w.linear else '', w.license]
         for tag, w in WEIGHTS.items()))


def shorten(source: str) -> str:
    return re.sub(r' configs/\S+| \(\w+\)|;.*', '', source)


def list_published(*benchmarks: str) -> str:
    return format_table(['weights', 'benchmark', 'published, %', 'source'], (
        [f'`{e["tag"]}`', f'`{e["benchmark"]}`', format_metrics(e), f'[{shorten(e["source"])}]({e["url"]})']
        for e in RESULTS if e['benchmark'].startswith(benchmarks)))


def list_sizes() -> str:
    return format_table(['data set', 'training images', 'test images', 'classes'], (
        [s.title, *map(format_value, (s.train, s.test, s.classes))] for s in SIZES.values()))


def render_all() -> dict[str, str]:
    """Returns the name that pages use -> table."""
    assert {f.name for f in dataclasses.fields(p.LinearProtocol)} - set(LINEAR_NAMES) == {
        'name', 'lr_per_256', 'report_epochs'}
    return {
        'recipes': list_recipes(), 'linear': list_linear(), 'detection': list_detection(),
        'detectors': list_detectors(), 'segmentation': list_segmentation(), 'semi': list_semi(), 'svm': list_svm(),
        'weights': list_weights(), 'sizes': list_sizes(),
        'knn': f'k = {format_value(p.KNN_KS)} at T = {p.KNN_T:g}',
        'published_knn': list_published('imagenet_knn'),
        'published_linear': list_published('imagenet_linear', 'imagenet_mhead', 'places205'),
        'published_svm': list_published('voc07_'), 'published_detection': list_published('voc0712', 'coco'),
        'published_segmentation': list_published('voc12aug', 'cityscapes')}
