"""README and docs: their length, links, and the messages that they quote."""
import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT
from documents import PAGES


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 120


def list_anchors(page: Path) -> set[str]:
    """Returns the anchors of headings, as GitHub and the site name them."""
    titles = re.findall(r'^#+ (.*)$', re.sub(r'^```.*?^```', '', page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_of_the_repository(page: Path):
    for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
        if not target.startswith('http'):
            name, _, anchor = target.partition('#')
            found = (page.parent / name).resolve() if name else page
            assert found.is_file() and found.is_relative_to(ROOT), target
            assert not anchor or anchor in list_anchors(found), target


def list_texts() -> list[str]:
    """Returns the constant parts of all strings of the package."""
    return [
        node.value for path in (ROOT / 'simsiam_models').rglob('*.py') for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_the_messages_that_troubleshooting_quotes_are_those_of_the_package():
    texts, others = list_texts(), ('Killed', 'error: externally', 'Unknown model', 'Too Many Requests', 'torch.hub')
    page = re.sub(r'\s+', ' ', (ROOT / 'docs/troubleshooting.md').read_text())
    quoted = [q for bold in re.findall(r'\*\*(`.*?`.*?)\*\*', page) for q in re.findall('`([^`]+)`', bold)]
    quoted += [name for name in re.findall(r'\| `([a-z ]+)` \|', page)]
    assert len(quoted) > 20
    for message in quoted:
        if not message.startswith(others):
            parts = [part for part in re.split(r' ?\.\.\.,? ?', message) if re.search(r'\w{3}', part)]
            assert parts and all(any(part in text for text in texts) for part in parts), (message, parts)
