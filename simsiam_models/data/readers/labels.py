"""What a label is, and which classes the labels of a data set make: one rule for lists, tables, Arrow files and tars.

The first label decides. If it is a number, all must be whole numbers from 0 to MAX_CLASSES - 1, as integers, floats or
text; they are the numbers of the classes, which number all from 0 to the largest. Otherwise every label is the name of
a class, and the classes are numbered in the order of their names; `True` and `False` are names, too.

A label is missing if it is null, NaN or empty. If only some are missing, a list is refused; a table or tar has no
labels then, and the log says why. If one breaks the rule, a list or tar is refused, and a table has no labels.

The column of a table that has the labels is, in this order:

1. the one that `#label=COLUMN` chooses;
2. the first of COLUMNS[:5] that holds class names of the datasets library, or numbers;
3. the only one that holds such class names;
4. the first of COLUMNS, whatever its case;
5. the only one of text or truth values whose labels repeat (see `_suits`), or else of integers, and none of OTHERS.
"""
import math
import os
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...runtime.messages import short

MAX_CLASSES = 100_000  # a larger number is not a class
COLUMNS = (
    'label', 'labels', 'fine_label', 'class', 'target', 'class_name', 'class_label', 'label_name', 'classname',
    'category', 'category_name', 'classes', 'species', 'y', 'class_id', 'label_id', 'category_id', 'target_id')
OTHERS = (
    'split', 'subset', 'fold', 'partition', 'is_train', 'is_valid', 'is_test', 'is_validation', 'width', 'height',
    'text', 'caption', 'url', 'license', 'source', 'id', 'index')
NAMED, NUMBERED, PLAIN, DOUBTFUL = range(4)  # kinds of columns: class names; integers; text; only if its name says so
SAMPLE = 1000  # rows that tell whether a column has labels
_NUMBER = re.compile(r'[-+]?[0-9]+(\.[0-9]*)?|[-+]?\.[0-9]+', re.ASCII)


@dataclass(frozen=True)
class Choice:
    """What the user chooses with `DATA#image=NAME,label=NAME`: columns, or in a tar endings such as `left.jpg`."""

    image: str | None = None
    label: str | None = None


def split_choice(spec: str) -> tuple[str, Choice | None]:
    """Splits `DATA#image=NAME,label=NAME`; None without a choice, as if a file has that very name."""
    found = re.fullmatch(r'(.*)#((?:image|label)=[^#]*)', spec, re.DOTALL)
    if found is None or os.path.exists(spec):
        return spec, None
    named = dict(re.findall(r'(?:^|,)(image|label)=((?:(?!,(?:image|label)=).)*)', found[2]))
    if not all(named.values()):
        raise ValueError(f'{spec}: write #image=NAME,label=NAME, or one of the two')
    return found[1], Choice(named.get('image'), named.get('label'))


class LabelError(ValueError):
    """A label breaks the rule; `at` is the place where it stands first."""

    def __init__(self, reason: str, at: Any) -> None:
        super().__init__(reason)
        self.at = at


class Labels:
    """The labels of a data set, collected one by one."""

    def __init__(self) -> None:
        self.codes = array('i')  # number of the distinct label
        self._places: dict[Any, tuple[int, Any]] = {}  # label -> (code, where it is first)

    def add(self, label: Any, place: Any) -> None:
        """Adds the next label; None if it is missing."""
        self.codes.append(-1 if label is None else self._places.setdefault(label, (len(self._places), place))[0])

    def number(self) -> 'tuple[array[int], list[str]]':
        """Returns the class of each label, and the names of the classes; raises LabelError."""
        labels, classes = number_classes(list(self._places), [place for _, place in self._places.values()])
        return array('i', map(labels.__getitem__, self.codes)), classes


def number_classes(distinct: Sequence[Any], places: Sequence[Any] | None = None) -> tuple[list[int], list[str]]:
    """Returns the class of each of these distinct labels, and the names of all classes.

    Args:
        distinct: in the order in which they first occur; none is missing.
        places: of each label, for the error.

    Raises:
        LabelError: a label breaks the rule.
    """
    if not distinct:
        return [], []
    numbers, names = list[int](), list[str]()
    numbered = _read_number(distinct[0]) is not None
    for i, given in enumerate(distinct):
        if numbered and (n := _read_number(given)) is not None and 0 <= n < MAX_CLASSES and n == int(n):
            numbers.append(int(n))
        elif not numbered and (name := _read_name(given)) is not None:
            names.append(name)
        else:
            rule = (f'a class number; use integers from 0 to {MAX_CLASSES - 1}' if numbered else
                    'a class name or number')
            raise LabelError(f'the label {short(given)!r} is not {rule}', i if places is None else places[i])
    if numbered:
        return numbers, [str(i) for i in range(max(numbers) + 1)]
    classes = sorted(set(names))
    number = {name: i for i, name in enumerate(classes)}
    return [number[name] for name in names], classes


def is_missing(label: Any) -> bool:
    return label is None or label == '' or isinstance(label, float) and math.isnan(label)


def _read_number(label: Any) -> float | None:
    """Returns None for what is not a number."""
    if isinstance(label, (str, bytes)):
        text = _read_name(label)
        return None if text is None or not _NUMBER.fullmatch(text) else float(text)
    is_number = isinstance(label, (int, float)) and not isinstance(label, bool)
    return label if is_number and -math.inf < label < math.inf else None


def _read_name(label: Any) -> str | None:
    """Returns None for what is not text on one line, or a truth value."""
    if isinstance(label, bytes):
        label = label.decode(errors='surrogateescape')
    text = str(label) if isinstance(label, (str, bool, int)) else ''
    return text if text and not re.search(r'[\0-\x1f\x7f]', text) else None


def choose_column(kinds: Mapping[str, int], choice: Choice, read_first: Callable[[str], list[Any]]) -> str | None:
    """Returns the column that has the labels, or None.

    Args:
        kinds: of the columns that could have them, NAMED to DOUBTFUL.
        choice: the user's.
        read_first: returns the labels in the first SAMPLE rows of a column.

    Raises:
        ValueError: there is no such column as the chosen one.
    """
    if choice.label is not None:
        if choice.label not in kinds:
            raise ValueError(f'#label={choice.label}: no such column of labels; there are {", ".join(kinds) or "none"}')
        return choice.label
    typed = [name for name in COLUMNS[:5] if kinds.get(name) in (NAMED, NUMBERED)]
    named = [column for column, kind in kinds.items() if kind == NAMED]
    lower = {column.lower(): column for column in reversed(list(kinds))}
    known = [lower[name] for name in COLUMNS if name in lower]
    if found := typed or (named if len(named) == 1 else known):
        return found[0]
    suits = {column: _suits(read_first(column)) for column, kind in kinds.items() if kind != DOUBTFUL and
             column.lower() not in OTHERS}
    for how in ('names', 'numbers'):
        if found := [column for column in suits if suits[column] == how]:
            return found[0] if len(found) == 1 else None
    return None


def _suits(labels: list[Any]) -> str:
    """Returns 'names' or 'numbers' if these could be labels, since they repeat, and '' otherwise."""
    distinct = list(dict.fromkeys(label for label in labels if not is_missing(label)))
    if not distinct or len(distinct) > len(labels) // 2 + 10:
        return ''
    try:
        number_classes(distinct)
    except LabelError:
        return ''
    return 'names' if _read_number(distinct[0]) is None else 'numbers'


def describe_column(column: str | None, others: Iterable[str], classes: int, reason: str = '') -> str:
    """Returns the line that says which column has the labels, or why none has; '' if there is no other column."""
    if reason:
        return f'no labels, although there is a column {column}: {reason}'
    if column is not None:
        return f'labels from the column {column}, {classes} classes'
    names = short(', '.join(others), 300)
    return names and f'no labels: it is not clear which column has them ({names}); #label=COLUMN chooses one'
