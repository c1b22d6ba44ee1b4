"""Import this first: Ctrl-C while one of our programs imports torch, which takes seconds, ends in one line."""
import itertools
import sys
from pathlib import Path
from types import TracebackType

TRAIN = Path(__file__).resolve().parents[2] / 'train.py'


def name_program(words: list[str]) -> str | None:
    """Returns the name of our program that a command line of Python starts, or None if that is another's."""
    for word, following in itertools.pairwise([*words[1:], '']):
        if word == '-m':
            return 'simsiam' if following == 'simsiam_models' else None
        if not word.startswith('-'):
            return 'simsiam' if Path(word).stem == 'simsiam' else 'train.py' if Path(word).resolve() == TRAIN else None
    return None


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(f'{PROGRAM}: stopped by SIGINT', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


PROGRAM = name_program(sys.orig_argv)
if PROGRAM is not None:
    sys.excepthook = _report
