"""What the commands write to a terminal: no control characters, whatever the names of files and classes hold."""
import argparse
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NoReturn, TextIO

from .messages import guess, printable


class PlainStream:
    """A text stream that shows control characters, of a terminal or of bidirectional text, instead of sending them.

    Line feeds pass, and so does the carriage return at the start of a text, with which progress bars begin.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        start, text = ('\r', text[1:]) if text.startswith('\r') else ('', text)
        return self._stream.write(start + printable(text, keep='\n'))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


class _Formatter(logging.Formatter):
    """A line per message of ours; other packages may write several."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(record.message, keep='' if record.name.startswith('simsiam_models') else '\n')


class Parser(argparse.ArgumentParser):
    """argparse, except that an error is one line, and that one about a misspelt flag suggests the right one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # That of a subcommand, too, so that the error names it.
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            hints = [guess(word.partition('=')[0], self._option_string_actions) for word in unknown if word[:1] == '-']
            self.error('; '.join([f'unrecognized arguments: {" ".join(unknown)}', *filter(None, hints[:1])]))
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {printable(message)} (all arguments: {self.prog} --help)\n')


@contextmanager
def plain_terminal() -> Iterator[None]:
    """Protects the terminal from what the program prints and logs inside the block."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # the terminal's encoding may lack letters
            stream.reconfigure(errors='backslashreplace')
    with redirect_stdout(PlainStream(sys.stdout)), redirect_stderr(PlainStream(sys.stderr)):
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter())
        logging.basicConfig(handlers=[handler])
        yield
