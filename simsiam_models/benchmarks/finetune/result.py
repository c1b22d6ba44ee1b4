"""Writes the results of a fine-tuning run: a folder for timm, a confusion matrix, class accuracies, a record."""
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from torch import Tensor

from ...data.readers.images import Images, name_of
from ...runtime.files import write_csv
from ...runtime.messages import printable, short
from ..results.record import format_record, write_record
from .settings import list_deviations
from .training import UNREADABLE, Finetuning, measure_accuracy

RECORD, PER_CLASS, CONFUSION = 'record.json', 'per_class.csv', 'confusion.csv'
PREDICTIONS = 'predictions.csv'
PRINTED = 20  # a confusion matrix of more classes is not printed
WHOLE = 1000  # a confusion matrix of more classes is written as a list of pairs

Pairs = dict[tuple[int, int], int]  # (label, predicted class) -> images


def write_result(run: Finetuning, data: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """Exports the kept weights, writes and prints the confusion matrix and the record; returns the record.

    `data` is the entry of the data set in the record; `shared` are the images of both parts.
    """
    classifier, s, protocol = run.classifier, run.trainer.settings, run.identity['protocol']
    best = cast(dict[str, Any], run.best)
    folder, classes, labels, plain = classifier.folder, classifier.classes, run.val.samples.labels, protocol == 'plain'
    classifier.export(best['weights'])
    pairs = count_pairs(labels, best['predicted'][:, 0])
    rows = measure_classes(pairs, classes)
    write_csv(folder / PER_CLASS, [['class', 'images', 'right', 'accuracy'], *(r.values() for r in rows)])
    write_csv(folder / CONFUSION, make_confusion_rows(pairs, classes))
    if best['predicted'].shape[1] > 2:  # a checkpoint of an earlier version has no scores
        write_csv(folder / PREDICTIONS, list_predictions(run.val.samples.images, labels, best['predicted'], classes))
    metrics = measure_accuracy(best['predicted'], labels)
    if len(classes) <= 5:
        del metrics['top5']
    if not plain:
        metrics |= {f'top1_epoch{row["epoch"]}': row['top1'] for row in run.history if 'top1' in row}
    confusion: dict[str, dict[str, int]] = {c: {} for c in classes}
    for (label, predicted), n in pairs.items():
        confusion[classes[label]][classes[predicted]] = n
    extra = {
        'best_epoch': best['epoch'], 'last_epoch': run.epoch, 'kept': s.keep, 'stopped_early': run.epoch < s.epochs,
        'epochs': run.history, 'per_class': rows, 'confusion': confusion, 'averaged_weights': bool(s.ema_decay),
        'shared_images': shared,
        'unreadable': sorted({*run.train.unreadable.values(), *run.val.unreadable.values()})}
    record = write_record(
        folder / RECORD, 'finetune' if plain else f'{data["name"]}_{protocol}', describe_protocol(run),
        classifier.backbone, data, metrics, seconds=sum(row['seconds'] for row in run.history), extra=extra)
    report_result(run, pairs, rows)
    epoch = f'best epoch {best["epoch"]} of {run.epoch}' if plain else f'epoch {best["epoch"]}'
    run.life.say(f'{epoch}, {printable(run.identity["validation"])}\n{format_record(record)}')
    first = 'import simsiam_models; ' if classifier.name == 'simsiam_resnet18_cifar' else ''  # plain timm has none
    run.life.say(
        f"the classifier: {first}timm.create_model('local-dir:{folder}', pretrained=True); {folder / PER_CLASS}, "
        f'{folder / CONFUSION}, {folder / PREDICTIONS}, {folder / RECORD}')
    return record


def describe_protocol(run: Finetuning) -> dict[str, Any]:
    elsewhere = ('benchmark', 'digest', 'images', 'weights', 'model')  # in the record
    protocol = {k: v for k, v in run.identity.items() if k not in elsewhere}
    if run.identity['protocol'] != 'plain':
        protocol['changed'] = list_deviations(run.identity)
        protocol['note'] = (
            'one of nine pairs of lr and head_multiplier; which of them gave the published number is not known')
    return protocol


def report_result(run: Finetuning, pairs: Pairs, rows: list[dict[str, Any]]) -> None:
    """Prints the confusion matrix, or the worst classes of many, and the images that could not be read."""
    say = run.life.say
    if len(rows) <= PRINTED:
        say(format_confusion(pairs, rows))
    else:
        worst = sorted((r for r in rows if r['images']), key=lambda r: r['accuracy'])[:5]
        say('worst classes: ' + ', '.join(f'{short(r["class"])} {r["accuracy"]:.1f} %' for r in worst))
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


def list_predictions(
    images: Images, labels: np.ndarray, predicted: Tensor, classes: list[str],
) -> Iterator[list[Any]]:
    """Yields a header, and for each readable image its path, label, predicted class and the score of that class."""
    yield ['path', 'label', 'predicted', 'score']
    for row, (first, _, score) in enumerate(predicted.tolist()):
        if first != UNREADABLE:
            yield [name_of(images, row), classes[labels[row]], classes[first], round(score / 1e6, 6)]


def measure_classes(pairs: Pairs, classes: list[str]) -> list[dict[str, Any]]:
    """Returns each class's validation images, the number of right ones, and percent; None if there is no image."""
    images: Counter[int] = Counter()
    for (label, _), n in pairs.items():
        images[label] += n
    table = ((c, images[i], pairs.get((i, i), 0)) for i, c in enumerate(classes))
    return [
        {'class': c, 'images': n, 'right': right, 'accuracy': round(100 * right / n, 2) if n else None}
        for c, n, right in table]


def make_confusion_rows(pairs: Pairs, classes: list[str]) -> list[list[Any]]:
    """Returns the matrix with a row for each label; for more than WHOLE classes the pairs that occur."""
    if len(classes) > WHOLE:
        return [['label', 'predicted', 'images'], *([classes[i], classes[j], n] for (i, j), n in pairs.items())]
    counts = ([pairs.get((i, j), 0) for j in range(len(classes))] for i in range(len(classes)))
    return [['label \\ predicted', *classes], *([c, *row] for c, row in zip(classes, counts, strict=True))]


def format_confusion(pairs: Pairs, rows: list[dict[str, Any]]) -> str:
    """Returns a table. Rows: labels; columns: predicted classes by number; the last column: percent right."""
    names = [printable(f'{i} {r["class"]}')[:24] for i, r in enumerate(rows)]
    head = 'label, predicted as'
    wide, cell = max(map(len, [head, *names])), max(4, len(str(max(pairs.values()))) + 1)
    lines = [f'{head:{wide}}' + ''.join(f'{i:>{cell}}' for i in range(len(rows))) + '   right']
    for i, (name, r) in enumerate(zip(names, rows, strict=True)):
        right = '    none' if r['accuracy'] is None else f'{r["accuracy"]:6.1f} %'
        lines.append(f'{name:{wide}}' + ''.join(f'{pairs.get((i, j), 0):>{cell}}' for j in range(len(rows))) + right)
    return '\n'.join(lines)
