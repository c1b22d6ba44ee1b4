"""The `simsiam` command: a thin table of subcommands. Heavy imports wait until a command runs."""
import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .benchmarks import embed
from .benchmarks.finetune import command as finetune
from .benchmarks.knn import command as knn
from .benchmarks.linear import command as linear
from .benchmarks.results import report
from .benchmarks.svm import command as svm
from .runtime.signals import Signals

BENCHMARKS = {  # command: its module, what it does
    'knn': (knn, 'weighted nearest neighbours on frozen features'),
    'linear': (linear, 'a linear classifier on frozen features: published protocols, or a grid on cached features'),
    'svm': (svm, 'VOC07: linear SVMs on five taps, from all images or from a few'),
    'finetune': (finetune, 'a classifier from a backbone and a labelled folder, and the semi-supervised protocols'),
    'embed': (embed, 'features of any images into a file; t-SNE'),
    'report': (report, 'records of benchmarks as one table, measured beside published')}


def weights_list(args: argparse.Namespace) -> int:
    from .weights import sources
    from .weights.published import WEIGHTS

    print(f'{"tag":26}{"epochs":>7}{"batch":>7}{"top-1":>7}  {"licence":14}cached')
    for tag, w in WEIGHTS.items():
        path = sources.cached(f'simsiam_resnet50.{tag}', w)
        where = '' if path is None else 'Hub' if path.name == sources.MODEL else 'converted'
        print(f'{tag:26}{w.epochs:>7}{w.batch:>7}{w.top1 or "-":>7}  {w.license:14}{where or "no"}')
    print('\ntop-1: ImageNet linear evaluation in percent, as published by the authors; not measured again here.')
    return 0


def weights_info(args: argparse.Namespace) -> int:
    from .weights.published import describe

    print(describe(args.tag))
    return 0


def weights_verify(args: argparse.Namespace) -> int:
    from .weights.verify import verify

    passed, lines = verify(args.target, args.dtype)
    print('\n'.join([*lines, 'passed' if passed else 'FAILED']))
    return 0 if passed else 1


def convert(args: argparse.Namespace) -> int:
    from .weights.convert import convert

    print(convert(args.source, args.out, args.to))
    return 0


def publish(args: argparse.Namespace) -> int:
    from .weights.publish import publish

    print(publish(args.checkpoint, args.tag, dry_run=args.dry_run, license=args.license))
    return 0


def preflight(args: argparse.Namespace) -> int:
    from .preflight.report import preflight

    sample = sys.maxsize if args.all else args.sample
    preflight(
        args.data, args.recipe, args.batch_size, args.device, args.seconds, args.workers, sample, args.json,
        args.images_per_epoch)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser('simsiam', description='SimSiam weights and benchmarks.')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    def add(to: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], int], text: str):
        command = to.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    weights = commands.add_parser('weights', help='published weights: list, info, verify').add_subparsers(
        required=True, metavar='COMMAND')
    add(weights, 'list', weights_list, 'the published weights, and which of them a cache holds')
    command = add(weights, 'info', weights_info, 'where one file comes from, and every number published for it')
    command.add_argument('tag', metavar='TAG')
    command = add(weights, 'verify', weights_verify, 'check hash, keys, values and outputs of a tag or a checkpoint')
    command.add_argument('target', metavar='TAG|PATH')
    command.add_argument(
        '--dtype', choices=['float32', 'float16', 'bfloat16'], default='float32', help='of the computed outputs')

    command = add(commands, 'convert', convert, 'a checkpoint of any known layout -> another layout')
    command.add_argument('source', type=Path, metavar='IN')
    command.add_argument('out', type=Path, metavar='OUT')
    command.add_argument(
        '--to', required=True, choices=['timm', 'torchvision', 'detectron2', 'mmdet', 'onnx'],
        help='timm is a folder that timm and transformers load; the others are one file')

    command = add(commands, 'publish', publish, 'write a Hub repository from a checkpoint, and upload it')
    command.add_argument('checkpoint', type=Path, metavar='CHECKPOINT')
    command.add_argument('--tag', required=True, help='the repository is NAMESPACE/simsiam_resnet50.TAG')
    command.add_argument('--license', help='licence of your own weights; published tags have theirs')
    command.add_argument('--dry-run', type=Path, metavar='DIR', help='write the repository into DIR and upload nothing')

    command = add(
        commands, 'preflight', preflight,
        'what is in a data set, how fast it trains here, and the command of train.py that follows from it')
    command.add_argument('data', metavar='DATA', help="as for train.py; 'demo' is the built-in demonstration data")
    command.add_argument('--recipe', metavar='NAME', help="one of train.py's (default: what fits data and device)")
    command.add_argument('--batch-size', type=int, metavar='N', help="default: the recipe's, or less where it must be")
    command.add_argument('--device', metavar='D', help='cuda, mps or cpu (default: the first of these that is there)')
    command.add_argument(
        '--seconds', type=float, default=120.0, metavar='S', help='in all; at most half are for reading (default: 120)')
    command.add_argument('--workers', type=int, metavar='N', help="threads that read images (default: train.py's)")
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        '--sample', type=int, metavar='N', help='images to read (default: as many as half of the seconds allow)')
    which.add_argument('--all', action='store_true', help='read every image, however long it takes')
    command.add_argument(
        '--images-per-epoch', type=int, metavar='N', help='length of an epoch of a stream that does not tell its own')
    command.add_argument('--json', type=Path, metavar='FILE', help='write the same there, as a record')

    for name, (module, text) in BENCHMARKS.items():
        module.add_arguments(add(commands, name, module.run, text))
    return parser


def main(argv: list[str] | None = None) -> int:
    args = None
    try:
        with Signals():
            args = build_parser().parse_args(argv)
            for stream in (sys.stdout, sys.stderr):  # names of files may be no text
                if hasattr(stream, 'reconfigure'):
                    stream.reconfigure(errors='backslashreplace')
            logging.basicConfig(format='%(message)s')
            status = args.run(args)
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, RuntimeError, OSError, FloatingPointError) as e:
        text = ''.join(c if c.isprintable() or c == '\n' else repr(c)[1:-1] for c in str(e))  # no terminal's commands
        print(f'simsiam: {text}', file=sys.stderr)
        return 1
    except MemoryError as e:
        print(f'simsiam: not enough memory ({e})', file=sys.stderr)
        return 1
    except KeyboardInterrupt as e:  # training.stopping.Stopped, but for the first moment
        if os.environ.get('RANK', '0') == '0':
            text = '; '.join(filter(None, (str(e) or 'stopped by SIGINT', getattr(args, 'kept', None))))
            print(f'simsiam: {text}', file=sys.stderr)
        return getattr(e, 'code', 130)


if __name__ == '__main__':
    sys.exit(main())
