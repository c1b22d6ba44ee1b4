"""How uncertain an accuracy is, and a difference between two."""
import math
from collections.abc import Sequence
from typing import Any

from ...runtime.accuracy import difference_error, standard_error

ACCURACIES = 'knn', 'linear', 'auto_probe', 'finetune', 'semi'  # in the names of benchmarks that measure accuracies


def count_tested(record: dict[str, Any]) -> int:
    """Returns the number of test images that a record's accuracies are of; 0 if unknown, or if it has none."""
    n = record['data']['counts'].get('test')
    return n if isinstance(n, int) and n > 0 and any(name in record['benchmark'] for name in ACCURACIES) else 0


def describe_difference(a: float, b: float, images: int) -> str:
    """Describes how far a is from b: '3.10 points below', and for accuracies its standard error.

    `images`: the number of test images of each (0: no accuracies). Accuracies on the same images differ by less than
    the error says, which is that of different ones.
    """
    text = f'{abs(a - b):.2f} points {"below" if a < b else "above"}'
    if not images:
        return text
    error = difference_error(a, b, images)
    return f'{text} (standard error {error:.2f}{", so it may be chance" if abs(a - b) <= 2 * error else ""})'


def note_uncertainty(records: Sequence[dict[str, Any]]) -> list[str]:
    """Returns a sentence on which of these accuracies may be apart by chance; nothing for other metrics."""
    errors = [
        standard_error(value, n) for record in records if (n := count_tested(record))
        for value in record['metrics'].values()]
    return [
        f'Standard error of an accuracy: at most {max(errors):.2f} points; differences of less than '
        f'{2 * math.sqrt(2) * max(errors):.2f} points (two standard errors) may be chance.'] if errors else []
