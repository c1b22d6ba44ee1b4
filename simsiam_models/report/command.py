"""`simsiam report`: results beside published numbers, as tables for a terminal or in Markdown, or a run as a page.

    simsiam report results/                                  tables
    simsiam report runs/mine --html mine.html                the run: curves, views, neighbours, results
    simsiam report runs/mine --plots plots                   the curves as PNG files
"""
import argparse
import tempfile
from pathlib import Path

from ..benchmarks.results import report
from ..pages.document import check_page
from ..pages.plots import make_distinct, write_plots
from ..runtime.files import explain_write_errors
from ..runtime.lifecycle import ARGS
from ..runtime.messages import require, size_text
from .curves import list_plots
from .page import read_inputs, write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    report.add_arguments(parser)
    add = parser.add_argument
    add('--html', type=Path, metavar='FILE.html',
        help='write a page instead, which opens from disk: for a run, its curves, the views and neighbours of some '
             'images, and its mistakes; for records, their tables')
    add('--plots', type=Path, metavar='FOLDER', help='write the curves of a run as PNG files')
    add('--data', metavar='DATA', help="the run's images, if they have moved since training")


def run(args: argparse.Namespace) -> int:
    if args.html is None and args.data is not None:
        raise ValueError(f'--data {args.data}: only --html shows images; add --html FILE.html')
    if args.html is None and args.plots is None:
        try:
            return report.run(args)
        except FileNotFoundError as e:
            if not any((path / ARGS).is_file() for path in args.results):
                raise
            raise FileNotFoundError(f'{e}; for the page of the run, add --html FILE.html') from None
    require('--html' if args.html else '--plots', matplotlib='matplotlib')
    if args.markdown:
        raise ValueError('--markdown: prints tables to the terminal; leave it out with --html and --plots')
    if args.html is not None:
        check_file(args.html)
    inputs = read_inputs(args.results)
    if args.html is not None:
        write_report(args.html, args.results, inputs, args.data)
        print(f'written to {args.html}, {size_text(args.html.stat().st_size)}')
    if args.plots is not None:
        runs = inputs[0]
        if not (drawn := [(one, list_plots(one)) for one in runs]):
            raise ValueError(f'--plots {args.plots}: {args.results[0]} is not the folder of a run; name its OUTPUT')
        names = make_distinct([one.folder.resolve().name for one in runs])
        for name, (_, plots) in zip(names, drawn, strict=True):
            folder = args.plots / name if len(runs) > 1 else args.plots
            print(f'{len(write_plots(folder, plots))} plots written to {folder}')
    return 0


def check_file(file: Path) -> None:
    """Raises ValueError or OSError if the page cannot be written to this file, before minutes of work."""
    check_page(file)
    with explain_write_errors(file, '--html'):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
