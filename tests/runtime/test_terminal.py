"""What reaches a terminal, a spreadsheet and a Markdown page from names that strangers chose."""
import csv
import io
import logging
import sys

import pytest
from tqdm import tqdm

from simsiam_models.runtime.messages import guess_path, inert_cell, one_line, plain_markdown, printable
from simsiam_models.runtime.terminal import Parser, PlainStream, plain_terminal

HOSTILE = [
    '\x1b[2J', '\x1b]0;title\x07', '\x9b31m', '\u202egpj.exe', '\u2066', '\udcff', '\x00', '\x7f', '\b', 'a\rb', '\t']


@pytest.mark.parametrize('name', HOSTILE)
def test_no_control_character_passes_a_stream(name):
    out = io.StringIO()
    print(f'class {name} \u00e9\u4e2d\U0001f600', file=PlainStream(out))
    text = out.getvalue()
    assert text.endswith('\u00e9\u4e2d\U0001f600\n') and text[:-1].isprintable() and text != f'class {name}'


def test_a_progress_bar_still_moves_on_its_line():
    out = io.StringIO()
    for _ in tqdm(range(3), file=PlainStream(out), desc='a\x1b[2Jb', mininterval=0):
        pass
    text = out.getvalue()
    assert text.count('\r') >= 2 and '\\r' not in text and '\x1b' not in text and 'a\\x1b[2Jb' in text


@pytest.mark.parametrize('text, want', [
    ('plain', 'plain'), ('a\nb', 'a\\nb'), ('\x1b', '\\x1b'), ('\u202e', '\\u202e'), ('\udcff', '\\udcff'),
    ('\U000e0041', '\\U000e0041'), ('\u4e2d', '\u4e2d')])
def test_what_is_not_printable_is_written_as_python_writes_it(text, want):
    assert printable(text) == want == repr(text)[1:-1]


def test_an_error_in_one_line_is_printable():
    assert one_line(ValueError('a\x1b[2J\n  b')) == 'a\\x1b[2J b'


def test_prints_logs_and_warnings_of_a_command_are_plain_and_a_log_message_is_one_line(capsys, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, 'handlers', [])
    before = sys.stdout, sys.stderr
    with plain_terminal():
        print('\x1b[1mout')
        print('\x1b[1merr', file=sys.stderr)
        logging.getLogger('simsiam_models').warning('a\nverdict: \x1b[32mfine')
    assert (sys.stdout, sys.stderr) == before
    out, err = capsys.readouterr()
    assert out == '\\x1b[1mout\n' and err == '\\x1b[1merr\na\\nverdict: \\x1b[32mfine\n'


def test_an_error_of_argparse_quotes_in_one_line(capsys):
    with pytest.raises(SystemExit), plain_terminal():
        Parser('simsiam').parse_args(['a\n\x1b[2Jsimsiam: done'])
    assert capsys.readouterr().err.splitlines()[-1] == (
        'simsiam: error: unrecognized arguments: a\\n\\x1b[2Jsimsiam: done (all arguments: simsiam --help)')


@pytest.mark.parametrize('cell', [
    '=1+1', '+1+1', '-1+1', '@SUM(A1)', '\t=1', '\r=1', '\n=1', '=cmd|"/c calc"!A1', '\uff1d1+1', '-', '=', '+a'])
def test_a_cell_that_a_spreadsheet_would_compute_is_text(cell):
    text = io.StringIO()
    csv.writer(text).writerow([inert_cell(cell)])
    assert next(csv.reader(io.StringIO(text.getvalue(), newline='')))[0] == f"'{cell}"


@pytest.mark.parametrize('cell', ['', 'cat', 'a=b', '-0.5', '+1e-3', '-3', -0.5, 7, None, 'x-1', "'a"])
def test_numbers_and_names_stay_as_they_are(cell):
    assert inert_cell(cell) == cell


@pytest.mark.parametrize('name, want', [
    ('a|b', r'a\|b'), ('`x`', r'\`x\`'), ('[x](http://y)', r'\[x\](http\://y)'), ('![x](y)', r'!\[x\](y)'),
    ('<img src=x>', '&lt;img src=x&gt;'), ('a&lt;b', 'a&amp;lt;b'), ('a\n# b', r'a\\n# b'), ('**x**', r'\*\*x\*\*'),
    ('_x_', r'\_x\_'), ('~~x~~', r'\~\~x\~\~'), ('simsiam_resnet50', 'simsiam_resnet50'), ('\\|', r'\\\|'),
    ('https://a.example', r'https\://a.example'), ('WWW.a.example', r'WWW\.a.example'), ('a@b', r'a\@b'),
    ('# a', r'\# a'), ('- a', r'\- a'), ('-1.5', '-1.5')])
def test_markdown_shows_names_and_obeys_none(name, want):
    assert plain_markdown(name) == want


@pytest.mark.parametrize('words, name, hint', [
    (['a', '--epocs', '3'], 'x', '--epochs'), (['sub', '--modle=3'], 'x sub', '--model'), (['a', '--zzz'], 'x', None),
    (['sub', 'b'], 'x sub', None), (['a', 'b'], 'x', None)])
def test_a_misspelt_flag_gets_one_line_that_suggests_the_right_one(words, name, hint, capsys):
    parser = Parser('x', allow_abbrev=False)
    parser.add_argument('--epochs')
    if words[0] == 'sub':
        parser.add_subparsers().add_parser('sub', allow_abbrev=False).add_argument('--model')
    else:
        parser.add_argument('data')
    with pytest.raises(SystemExit) as e:
        parser.parse_args(words)
    line, = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and line.startswith(f'{name}: error: unrecognized arguments: ')
    assert f'(all arguments: {name} --help)' in line
    assert (f'did you mean {hint}?' in line if hint else 'mean' not in line)


@pytest.mark.parametrize('name, near', [
    ('my_fotos', 'my_photos'), ('./my_fotos/', 'my_photos'), ('a/tran.csv', 'a/train.csv'), ('zzz', ''), ('q/my', ''),
    ('hf:me/data', ''), ('a\0b', ''), ('', '')])
def test_a_misspelt_path_gets_the_name_beside_it(name, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'my_photos').mkdir()
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'train.csv').touch()
    assert guess_path(name) == (f'did you mean {near}?' if near else '')
