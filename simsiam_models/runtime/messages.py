"""Text for users: errors in one line, rules for flags, lengths of time, sizes."""
import difflib
import html
import importlib.util
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_logger = logging.getLogger('simsiam_models')
MAX_NAMED = 5  # names in a message
FORMULA = tuple('=+-@\t\r\n\uff1d\uff0b\uff0d\uff20')  # the first characters, also in full width (OWASP)

Rule = tuple[str, Any, bool, str]  # flag, its value, whether the value is allowed, what it must be


def check_flags(rules: Iterable[Rule]) -> None:
    """Raises ValueError for the first flag whose value is not allowed."""
    for flag, value, allowed, rule in rules:
        if not allowed:
            raise ValueError(f'{flag} {value}: must be {rule}')


def counted(n: int, one: str, many: str | None = None) -> str:
    """Returns '1 image' or '2,000 images'; by default the plural is that of `one` with an s."""
    return f'{n:,} {one if n == 1 else many or one + "s"}'


def is_count(value: Any) -> bool:
    """Returns whether a value of JSON is a whole number from 0 that a float64 holds exactly; true is none."""
    return type(value) is int and 0 <= value < 2**53


def require(what: str, **packages: str) -> None:
    """Raises RuntimeError if a package that `what` needs is not installed. `packages`: import name -> pip's name."""
    missing = [pip for module, pip in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise RuntimeError(f'{what} needs {" and ".join(missing)}: pip install {" ".join(missing)}')


def printable(text: str, keep: str = '') -> str:
    """Writes every character that is not printable as Python does, except for those in `keep`.

    These are control characters of terminals and of bidirectional text, line breaks, and bytes that are no text.
    """
    return text if text.isprintable() else ''.join(
        c if c.isprintable() or c in keep else c.encode('unicode_escape', 'backslashreplace').decode() for c in text)


def as_text(name: Any) -> str:
    """Returns a name with replacement characters for bytes that are text in no encoding."""
    return str(name).encode(errors='surrogateescape').decode(errors='replace')


def inert_cell(value: Any) -> Any:
    """Returns a cell of a CSV file; text that a spreadsheet would take for a formula gets an apostrophe in front."""
    if isinstance(value, str) and value.startswith(FORMULA):
        try:
            float(value)
        except ValueError:
            return f"'{value}"
    return value


def restore_cell(cell: str) -> str:
    """Undoes what `inert_cell` did to text."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell


def plain_markdown(text: str) -> str:
    """Returns Markdown, also in a cell of a table, that shows exactly this text: no link, code, emphasis or HTML."""
    text = html.escape(printable(text), quote=False)
    marks = r'[\\|\[\]`*~]|(?<![^\W_])_|_(?![^\W_])|^[#+-](?=\s)'
    links = r':(?=//)|(?<=www)\.|@'  # that GitHub makes of plain addresses
    return re.sub(f'{marks}|{links}', r'\\\g<0>', text, flags=re.IGNORECASE)


def one_line(error: Any, most: int = 200) -> str:
    """Returns the text of an error without line breaks, at most `most` characters; its type if it has no text."""
    return printable(' '.join(str(error).split()))[:most] or type(error).__name__


def short(value: Any, most: int = 80) -> str:
    """Returns a value from a file as printable text in one line, cut to `most` characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = ' '.join(''.join(c if c.isprintable() else ' ' for c in text).split())
    return text if len(text) <= most else text[:most - 3] + '...'


def name_some(names: Sequence[str]) -> str:
    more = f' and {len(names) - MAX_NAMED:,} more' if len(names) > MAX_NAMED else ''
    return f'{", ".join(short(name, 40) or ascii(name) for name in names[:MAX_NAMED])}{more}'


def guess(name: str, names: Iterable[str], likeness: float = 0.75) -> str:
    """Returns 'did you mean X?' for the one of `names` that a misspelt name is most like, or ''."""
    return ''.join(f'did you mean {printable(near)}?' for near in difflib.get_close_matches(name, names, 1, likeness))


def guess_path(path: str | Path) -> str:
    """Returns 'did you mean X?' for the file or folder beside `path` that a misspelt name is most like, or ''."""
    try:
        with os.scandir(Path(path).parent) as entries:
            names = [os.path.normpath(entry.path) for entry in itertools.islice(entries, 1000)]
        return guess(name := os.path.normpath(path), [other for other in names if other != name])
    except (OSError, ValueError):
        return ''


def clock_time(seconds: float) -> str:
    """h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02}:{s:02}'


def size_text(n: float) -> str:
    """Returns a number of bytes with its unit."""
    for unit in ('B', 'kB', 'MB', 'GB'):
        if n < 999.5:
            return f'{n:.3g} {unit}'
        n /= 1000
    return f'{n:,.4g} TB'


def announce(text: str) -> None:
    """Logs a line that all processes of a run would say; under torchrun only the first one does."""
    if os.environ.get('RANK', '0') == '0':
        _logger.warning(text)


def silent(*what: Any) -> None:
    """Takes the place of print in processes other than the main one."""


def json_object(text: str) -> dict[str, Any]:
    """Parses JSON for argparse, which shows the name of this function in its error."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value
