"""Predicts the classes of images, as a table: path, label, probability, and the next most likely classes."""
import argparse
from typing import Any

import numpy as np
import torch

from ..benchmarks.results.record import check_output
from ..runtime.files import explain_write_errors
from ..runtime.messages import announce, printable, short
from ..runtime.tables import Columns, check_table, format_table, write_table
from .classifier import ImageClassifier, load_classifier
from .inputs import Inputs
from .reading import Reader

TOP = 5


def predict_labels(args: argparse.Namespace, images: Inputs, device: torch.device) -> int:
    """Writes or prints a row for each image, in their order; returns the exit status."""
    if args.output is not None:
        check_table(args.output)
        check_output(args.output.parent)
    classifier = load_classifier(args.model, device)
    if args.top_k is not None and args.top_k > len(classifier.classes):
        raise ValueError(f'--top-k {args.top_k}: {args.model} has only {len(classifier.classes)} classes; use at '
                         'most that many')
    k = min(args.top_k or TOP, len(classifier.classes))
    if not classifier.named:
        announce(f'{args.model} has no class names (label_names in config.json), so labels are class numbers')
    reader = Reader(images, classifier.prepare, args.batch_size, args.workers)
    labels, probabilities = classify(classifier, reader, k)
    rows = make_rows(reader, classifier.classes, labels, probabilities)
    if args.output is None:
        print(format_rows(rows, k))
    else:
        with explain_write_errors(args.output, '--output'):
            write_table(args.output, list_columns(k), rows)
        print(f'{args.output}: labels of {len(images) - len(reader.unreadable):,} of {len(images):,} images')
    return reader.report()


def classify(classifier: ImageClassifier, reader: Reader, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first k classes of each image, (N, k) int64, and their probabilities, float32.

    Both are zero for unreadable images.
    """
    labels, probabilities = np.zeros((len(reader.images), k), np.int64), np.zeros((len(reader.images), k), np.float32)
    for rows, items in reader:
        labels[rows], probabilities[rows] = classifier.predict(items, k)
    return labels, probabilities


def list_columns(k: int) -> Columns:
    """Returns path, label, probability, label2, probability2, ..., error."""
    columns: Columns = {'path': str}
    for i in range(1, k + 1):
        number = '' if i == 1 else i
        columns |= {f'label{number}': str, f'probability{number}': float}
    return {**columns, 'error': str}


def make_rows(
    reader: Reader, classes: list[str], labels: np.ndarray, probabilities: np.ndarray,
) -> list[list[Any]]:
    """Returns the cells of `list_columns` for each image; an unreadable one has only a path and an error."""
    rows = []
    for row in range(len(reader.images)):
        if error := reader.unreadable.get(row):
            cells = [None, None] * labels.shape[1]
        else:
            pairs = zip(labels[row].tolist(), probabilities[row].tolist(), strict=True)
            cells = [cell for label, p in pairs for cell in (classes[label], round(p, 6))]
        rows.append([reader.images.name_of(row), *cells, error])
    return rows


def format_rows(rows: list[list[Any]], k: int) -> str:
    """Returns the table for a terminal."""
    lines = []
    for path, label, p, *others, error in rows:
        rest = ', '.join(f'{short(name, 30)} {q:.4f}' for name, q in zip(others[::2], others[1::2], strict=True)
                         if name is not None)
        found = ('', '', 'cannot be read') if error else (short(label, 40), f'{p:.4f}', rest)
        lines.append([printable(path), *found])
    names = ['path', 'label', 'probability', *(['others'] if k > 1 else [''])]
    return format_table(names, lines)
