"""The code that README and docs show: commands, blocks of Python, and what the prose quotes."""
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]


class Source(NamedTuple):
    """A command or a block as a user reads it, and the page where it stands first."""

    page: str
    text: str


def name_page(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix('').as_posix().removeprefix('docs/')


def read_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yields the language and the text of each code block; for what the prose quotes, language ''."""
    for part in re.split(r'^(```[^\n]*\n.*?^```\n)', text, flags=re.S | re.M):
        if block := re.fullmatch(r'```([^\n]*)\n(.*?)```\n', part, re.S):
            yield block[1], block[2]
        else:
            yield from (('', quoted.replace('\n', ' ')) for quoted in re.findall(r'`([^`]+)`', part))


def split_lines(block: str) -> list[str]:
    """Returns the commands of a block, without comments, and its script as one line, the first."""
    if block.startswith('#!'):
        return [block.splitlines()[0]]
    lines = re.sub(r'\s*\\\n\s*', ' ', block).splitlines()
    return [line for line in (re.split(r'\s+#', line)[0].strip() for line in lines) if line]


def read_commands(page: str, text: str) -> Iterator[Source]:
    for language, block in read_blocks(text):
        if language == 'bash':
            yield from (Source(page, line) for line in split_lines(block))
        elif not language and re.match(r'simsiam (weights \w+|(?!weights)\w+) (?!.*\.\.\.)', block):  # more than a name
            yield Source(page, block)


def all_commands() -> list[Source]:
    return [source for path in PAGES for source in read_commands(name_page(path), path.read_text())]


def all_python() -> list[Source]:
    """Returns each block of Python once."""
    found: dict[str, Source] = {}
    for path in PAGES:
        for language, block in read_blocks(path.read_text()):
            if language == 'python':
                found.setdefault(block, Source(name_page(path), block))
    return list(found.values())
