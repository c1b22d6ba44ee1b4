"""What a fine-tuning run leaves: a folder for timm, a confusion matrix, the accuracy of each class, a record."""
import argparse
import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...runtime.files import write_atomically
from ...weights.export import PLAIN_TIMM
from ..results.record import format_record, write_record
from .settings import Settings, list_deviations
from .source import Source
from .training import UNREADABLE, Finetuning, measure_accuracy

RECORD, PER_CLASS, CONFUSION = 'record.json', 'per_class.csv', 'confusion.csv'
PRINTED = 20  # most classes of a confusion matrix that is printed
WHOLE = 1000  # most classes of one that is written whole

Pairs = dict[tuple[int, int], int]  # (label, predicted class) -> images


def write_result(args: argparse.Namespace, source: Source, run: Finetuning) -> dict[str, Any]:
    """Exports the kept weights, writes and prints the confusion matrix and the record; returns the record."""
    run.classifier.export(run.best['weights'])
    folder, classes = run.classifier.folder, source.classes
    pairs = count_pairs(run.val.samples.labels, run.best['predicted'][:, 0])
    rows = measure_classes(pairs, classes)
    _write_csv(folder / PER_CLASS, [['class', 'images', 'right', 'accuracy'], *(r.values() for r in rows)])
    _write_csv(folder / CONFUSION, make_confusion_rows(pairs, classes))
    plain = args.protocol == 'plain'
    record = write_record(
        folder / RECORD, 'finetune' if plain else f'{args.dataset}_{args.protocol}', describe_protocol(run),
        run.classifier.backbone,
        {'name': args.data if plain else args.dataset,
         'counts': {'train': len(source.train), 'test': len(source.val), 'classes': len(classes)},
         'digest': source.digest},
        collect_metrics(run), seconds=sum(row['seconds'] for row in run.history),
        extra=collect_details(run, pairs, rows))
    report_result(run, pairs, rows)
    epoch = f'epoch {run.best["epoch"]}'
    run.life.say(
        f'{f"best {epoch} of {run.epoch}" if plain else epoch}, {source.validation}\n{format_record(record)}')
    first = ''
    if PLAIN_TIMM.get(run.classifier.name, run.classifier.name) == 'simsiam_resnet18_cifar':
        first = 'import simsiam_models; '  # timm alone has no network of this name
    run.life.say(
        f"the classifier: {first}timm.create_model('local-dir:{folder}', pretrained=True); {folder / PER_CLASS}, "
        f'{folder / CONFUSION}, {folder / RECORD}')
    return record


def describe_protocol(run: Finetuning) -> dict[str, Any]:
    """Returns the record's protocol."""
    protocol = {
        k: v for k, v in run.identity.items() if k not in ('benchmark', 'digest', 'images', 'weights', 'model')}
    if run.classifier.backbone.bgr:
        protocol['bgr'] = 'the input channels of the first layer were reversed for RGB pixels, with the same outputs'
    if run.identity['protocol'] != 'plain':
        protocol['changed'] = list_deviations(run.identity)
        protocol['note'] = (
            'one of nine pairs of lr and head_multiplier; it is not known which of them the published number is of')
    return protocol


def collect_metrics(run: Finetuning) -> dict[str, float]:
    """Returns the kept epoch's accuracy and, of a semi-supervised run, that of each measured epoch."""
    metrics = measure_accuracy(run.best['predicted'], run.val.samples.labels)
    if len(run.classifier.classes) <= 5:
        del metrics['top5']
    if run.identity['protocol'] != 'plain':
        metrics |= {f'top1_epoch{row["epoch"]}': row['top1'] for row in run.history if 'top1' in row}
    return metrics


def collect_details(run: Finetuning, pairs: Pairs, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the record's other results."""
    classes, s = run.classifier.classes, run.trainer.settings
    confusion = {c: {} for c in classes}
    for (label, predicted), n in pairs.items():
        confusion[classes[label]][classes[predicted]] = n
    return {
        'best_epoch': run.best['epoch'], 'last_epoch': run.epoch, 'kept': s.keep, 'stopped_early': run.epoch < s.epochs,
        'epochs': run.history, 'per_class': rows, 'confusion': confusion,
        'averaged_weights': run.trainer.ema is not None,
        'unreadable': sorted({*run.train.unreadable.values(), *run.val.unreadable.values()})}


def report_result(run: Finetuning, pairs: Pairs, rows: list[dict[str, Any]]) -> None:
    """Prints the confusion matrix, or the worst classes of many, and the images that could not be read."""
    say = run.life.say
    if len(rows) <= PRINTED:
        say(format_confusion(pairs, rows))
    else:
        worst = sorted((r for r in rows if r['images']), key=lambda r: r['accuracy'])[:5]
        say('worst classes: ' + ', '.join(f'{r["class"]} {r["accuracy"]:.1f} %' for r in worst))
    if len(rows) > WHOLE:
        say(f'{CONFUSION} lists the pairs that occur, not all {len(rows)} x {len(rows)}')
    if train := list(run.train.unreadable.values()):
        say(f'{len(train)} training images could not be read and were replaced; the first: {train[0]}')
    if val := list(run.val.unreadable.values()):
        say(f'{len(val)} validation images could not be read and are left out of all numbers; the first: {val[0]}')


def count_pairs(labels: np.ndarray, predicted: Tensor) -> Pairs:
    """Counts the pairs of label and predicted class that occur among the readable images."""
    table = np.stack([labels, predicted.numpy()], 1)
    pairs, counts = np.unique(table[table[:, 1] != UNREADABLE], axis=0, return_counts=True)
    return {(i, j): n for (i, j), n in zip(pairs.tolist(), counts.tolist(), strict=True)}


def measure_classes(pairs: Pairs, classes: list[str]) -> list[dict[str, Any]]:
    """Returns each class's validation images, the number of right ones, and percent; None if there is no image."""
    rows = [{'class': c, 'images': 0, 'right': 0, 'accuracy': None} for c in classes]
    for (label, predicted), n in pairs.items():
        rows[label]['images'] += n
        if label == predicted:
            rows[label]['right'] = n
    for r in rows:
        if r['images']:
            r['accuracy'] = round(100 * r['right'] / r['images'], 2)
    return rows


def make_confusion_rows(pairs: Pairs, classes: list[str]) -> list[list[Any]]:
    """Returns the matrix with a row for each label; for more than WHOLE classes the pairs that occur."""
    if len(classes) > WHOLE:
        return [['label', 'predicted', 'images'], *([classes[i], classes[j], n] for (i, j), n in pairs.items())]
    counts = ([pairs.get((i, j), 0) for j in range(len(classes))] for i in range(len(classes)))
    return [['label \\ predicted', *classes], *([c, *row] for c, row in zip(classes, counts, strict=True))]


def format_confusion(pairs: Pairs, rows: list[dict[str, Any]]) -> str:
    """Returns a table. Rows: labels; columns: predicted classes by number; the last column: percent right."""
    names = [f'{i} {r["class"]}'[:24] for i, r in enumerate(rows)]
    head = 'label, predicted as'
    wide, cell = max(map(len, [head, *names])), max(4, len(str(max(pairs.values()))) + 1)
    lines = [f'{head:{wide}}' + ''.join(f'{i:>{cell}}' for i in range(len(rows))) + '   right']
    for i, (name, r) in enumerate(zip(names, rows, strict=True)):
        counts = [pairs.get((i, j), 0) for j in range(len(rows))]
        right = '    none' if r['accuracy'] is None else f'{r["accuracy"]:6.1f} %'
        lines.append(f'{name:{wide}}' + ''.join(f'{n:>{cell}}' for n in counts) + right)
    return '\n'.join(lines)


def format_grid(settings: list[Settings], records: list[dict[str, Any]]) -> str:
    """Returns the top-1 of each pair of learning rates as a table."""
    lines = [f'{"lr of the backbone":20}{"x for the classifier":>22}{"top-1":>8}']
    for s, r in zip(settings, records, strict=True):
        lines.append(f'{s.lr:<20g}{s.head_multiplier:>22g}{r["metrics"]["top1"]:8.2f}')
    best = max(range(len(records)), key=lambda i: records[i]['metrics']['top1'])
    lines.append(
        f'best pair: {settings[best].lr:g} and {settings[best].head_multiplier:g}, chosen on the test images')
    return '\n'.join(lines)


def _write_csv(path: Path, rows: list[Any]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(rows)
    write_atomically(path, lambda f: f.write(text.getvalue().encode(errors='surrogateescape')))
