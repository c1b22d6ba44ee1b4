"""Text for users: errors in one line, rules for flags, lengths of time."""
import importlib.util
import json
import logging
import os
from collections.abc import Iterable
from typing import Any

_logger = logging.getLogger('simsiam_models')

Rule = tuple[str, Any, bool, str]  # flag, its value, whether the value is allowed, what it must be


def check_flags(rules: Iterable[Rule]) -> None:
    """Raises ValueError for the first flag whose value is not allowed."""
    for flag, value, allowed, rule in rules:
        if not allowed:
            raise ValueError(f'{flag} {value}: must be {rule}')


def require(what: str, **packages: str) -> None:
    """Raises RuntimeError if a package that `what` needs is not installed. `packages`: import name -> pip's name."""
    missing = [pip for module, pip in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise RuntimeError(f'{what} needs {" and ".join(missing)}: pip install {" ".join(missing)}')


def one_line(error: Any, most: int = 200) -> str:
    """Returns the text of an error without line breaks, at most `most` characters; its type if it has no text."""
    return ' '.join(str(error).split())[:most] or type(error).__name__


def short(value: Any, most: int = 80) -> str:
    """Returns a value from a file as printable text in one line, cut to `most` characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = ' '.join(''.join(c if c.isprintable() else ' ' for c in text).split())
    return text if len(text) <= most else text[:most - 3] + '...'


def clock_time(seconds: float) -> str:
    """h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02}:{s:02}'


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
