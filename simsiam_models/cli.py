"""The `simsiam` command: a table of subcommands."""
import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from . import __version__
from .benchmarks import embed
from .benchmarks.detection import command as detect
from .benchmarks.finetune import command as finetune
from .benchmarks.knn import command as knn
from .benchmarks.linear import command as linear
from .benchmarks.neighbours import atlas
from .benchmarks.neighbours import command as neighbours
from .benchmarks.segmentation import command as segment
from .benchmarks.svm import command as svm
from .data import prepare
from .predict import command as predict
from .preflight.report import preflight
from .report import command as report
from .runtime import versions
from .runtime.messages import printable
from .runtime.signals import Signals
from .runtime.terminal import Parser, plain_terminal
from .training import pretrain
from .weights import sources
from .weights.convert import TARGETS, convert
from .weights.publish import publish, publish_all
from .weights.published import NAME, WEIGHTS, describe
from .weights.tensorfile import MODEL
from .weights.verify import TOLERANCE, verify


def list_weights(args: argparse.Namespace) -> None:
    print(f'{"tag":26}{"epochs":>7}{"batch":>7}{"top-1":>7}  {"licence":14}cached')
    for tag, w in WEIGHTS.items():
        path = sources.find_cached(f'{NAME}.{tag}', w)
        source = 'no' if path is None else 'Hub' if path.name == MODEL else 'converted'
        print(f'{tag:26}{w.epochs:>7}{w.batch:>7}{w.top1 or "-":>7}  {w.license:14}{source}')
    print('\ntop-1: ImageNet linear evaluation in percent, as published by the authors; not measured again here.')


def verify_weights(args: argparse.Namespace) -> int:
    passed, lines = verify(args.target, args.dtype)
    print('\n'.join([*lines, 'passed' if passed else 'FAILED']))
    return 0 if passed else 1


def publish_weights(args: argparse.Namespace) -> int:
    if args.all:
        given = {
            'CHECKPOINT': args.checkpoint, '--tag': args.tag, '--license': args.license, '--repo': args.repo,
            '--private': args.private or None}
        if left := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"--all publishes every tag from its authors' server: leave {', '.join(left)} out")
        return 0 if publish_all(args.dry_run, functools.partial(print, flush=True)) else 1
    if args.checkpoint is None or args.tag is None and args.repo is None:
        raise ValueError('name a CHECKPOINT and its --tag or --repo, or publish every tag with --all')
    print(publish(args.checkpoint, args.tag, args.dry_run, args.license, repo=args.repo, private=args.private))
    return 0


def run_preflight(args: argparse.Namespace) -> None:
    preflight(
        args.data, recipe=args.recipe, batch=args.batch_size, device=args.device, seconds=args.seconds,
        workers=args.workers, sample=sys.maxsize if args.all else args.sample, file=args.json,
        images_per_epoch=args.images_per_epoch)


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('target', metavar='TAG|PATH', help='a published tag, or a ResNet-50 file or exported folder')
    parser.add_argument('--dtype', choices=list(TOLERANCE), default='float32', help='type of the computed outputs')


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'source', type=Path, metavar='IN',
        help='a checkpoint, the OUTPUT of `pretrain` or `finetune`, or a folder exported for timm, of any architecture')
    parser.add_argument('out', type=Path, metavar='OUT', help='a new folder or file')
    text = 'timm writes a folder that timm and transformers load; every other target is one file'
    parser.add_argument('--to', required=True, choices=TARGETS, help=text)
    parser.add_argument('--branch', metavar='NAME', help='which network to load from a file with several')


def add_publish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'checkpoint', type=Path, nargs='?', metavar='CHECKPOINT',
        help='a checkpoint, the OUTPUT of `pretrain` or `finetune`, or a folder exported for timm')
    parser.add_argument('--tag', help=f'the repository is NAMESPACE/MODEL.TAG, such as {NAME}.TAG')
    parser.add_argument('--repo', metavar='OWNER/NAME', help='the repository for your own weights, instead of --tag')
    parser.add_argument('--private', action='store_true', help='make the repository private')
    parser.add_argument(
        '--all', action='store_true', help="publish every tag from its authors' server; run it again to continue")
    parser.add_argument(
        '--license', metavar='ID',
        help="licence of your own weights, as the Hub calls it ('mit', 'apache-2.0', 'other', ...)")
    parser.add_argument(
        '--dry-run', type=Path, metavar='DIR',
        help='write the repository into DIR and upload nothing (--all: a folder in DIR for each tag)')


def add_preflight(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('data', metavar='DATA', help="as for `pretrain`; 'demo' is the built-in demonstration data")
    parser.add_argument(
        '--recipe', metavar='NAME', help="a `pretrain` recipe (default: the one that suits the data and device)")
    parser.add_argument('--batch-size', type=int, metavar='N', help="default: the recipe's, or less if necessary")
    parser.add_argument('--device', metavar='D', help='cuda, mps or cpu (default: the first one available)')
    parser.add_argument(
        '--seconds', type=float, default=120.0, metavar='S',
        help='time limit; at most half of it goes into reading (default: 120)')
    parser.add_argument(
        '--workers', type=int, metavar='N', help='threads that read images (default: as for `pretrain`)')
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        '--sample', type=int, metavar='N', help='images to read (default: as many as half of --seconds allows)')
    which.add_argument('--all', action='store_true', help='read every image, however long it takes')
    parser.add_argument(
        '--images-per-epoch', type=int, metavar='N', help='length of an epoch, for a stream that does not state it')
    parser.add_argument('--json', type=Path, metavar='FILE', help='also write the report to FILE, as a record')


class Command(NamedTuple):
    add_arguments: Callable[[argparse.ArgumentParser], Any]
    run: Callable[[argparse.Namespace], int | None]  # the exit status; None is 0
    help: str
    example: str  # the arguments of one


COMMANDS = {
    'weights list': Command(
        lambda parser: None, list_weights, 'list the published weights, and show which of them a cache holds',
        ''),
    'weights info': Command(
        lambda parser: parser.add_argument('tag', metavar='TAG', help='as `simsiam weights list` shows it'),
        lambda args: print(describe(args.tag)),
        'show the origin of published weights and their numbers', 'mm_ep200_in1k'),
    'weights verify': Command(add_verify, verify_weights, 'check hash, keys, values and outputs of a tag or a file',
        'backbone/model.safetensors'),
    'convert': Command(
        add_convert, lambda args: print(convert(args.source, args.out, args.to, args.branch)),
        'convert a checkpoint or an exported network to timm, torchvision, detectron2, mmdet or ONNX',
        'runs/mine backbone.onnx --to onnx'),
    'publish': Command(
        add_publish, publish_weights, 'write a Hub repository from a checkpoint, or one for every tag, and upload it',
        'runs/mine --repo OWNER/my_photos --license mit --dry-run repository'),
    'pretrain': Command(
        pretrain.add_arguments, pretrain.run,
        'pretrain without labels on ImageNet, CIFAR-10 or your own images; use torchrun for several devices',
        'my_photos --recipe small'),
    'preflight': Command(
        add_preflight, run_preflight, 'inspect a data set, time a short training run, and suggest a `pretrain` command',
        'my_photos --seconds 60'),
    'prepare': Command(
        prepare.add_arguments, prepare.run,
        'write a copy of an image folder that is faster to read, with large images resized',
        'my_photos my_photos_256'),
    'knn': Command(knn.add_arguments, knn.run, 'classify by weighted nearest neighbours on frozen features',
        'my_photos --model runs/mine'),
    'linear': Command(
        linear.add_arguments, linear.run,
        'train a linear classifier on frozen features: published protocols, or a grid on cached features',
        'IMAGENET --protocol mmselfsup'),
    'svm': Command(
        svm.add_arguments, svm.run, 'train linear SVMs on five feature maps of VOC07, from all images or from a few',
        'VOCdevkit'),
    'finetune': Command(
        finetune.add_arguments, finetune.run,
        'fine-tune a backbone on a labelled folder, or by the semi-supervised protocols',
        'my_photos --model runs/mine --output runs/classifier'),
    'detect': Command(
        detect.add_arguments, detect.run,
        'train a detector on a ResNet backbone, and measure it: VOC 07+12, COCO, or your own objects',
        'VOCdevkit --output runs/voc'),
    'segment': Command(
        segment.add_arguments, segment.run,
        'train a segmenter on a ResNet backbone, and measure it: VOC12 + Aug, Cityscapes, or your own masks',
        'VOCdevkit --output runs/voc_masks'),
    'predict': Command(
        predict.add_arguments, predict.run, 'apply a trained classifier, detector or segmenter to images',
        'runs/classifier my_photos --output labels.csv'),
    'embed': Command(embed.add_arguments, embed.run, 'write features of any images to a file, and draw their t-SNE',
        'my_photos --output features.npz'),
    'neighbours': Command(
        neighbours.add_arguments, neighbours.run,
        'find nearest images, copies, outliers and likely wrong labels',
        'my_photos --output near.csv --html near.html'),
    'atlas': Command(
        atlas.add_arguments, atlas.run,
        'draw a map of the images as a page to open in a browser: zoom, search by image, select',
        'my_photos --html atlas.html'),
    'report': Command(
        report.add_arguments, report.run,
        'show records of benchmarks in tables, next to the published numbers, or a run as a page',
        'runs/mine --html mine.html'),
}


class ShowVersions(argparse.Action):
    """Looks up the versions when they are asked for, so that no other command waits for them."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f'simsiam_models {__version__}\n{versions.describe()}')
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    parser = Parser('simsiam', description='SimSiam: pretraining, published weights, benchmarks and prediction.')
    parser.add_argument(
        '--version', action=ShowVersions, nargs=0, help='show the versions that a bug report needs, and exit')
    parser.set_defaults(run=lambda args: parser.print_help())
    top = parser.add_subparsers(metavar='COMMAND')
    weights = top.add_parser('weights', help='published weights: list them, show one, verify one').add_subparsers(
        required=True, metavar='COMMAND')
    for name, command in COMMANDS.items():
        parent = weights if name.startswith('weights ') else top
        subparser = parent.add_parser(name.split()[-1], help=command.help, description=command.help)
        subparser.set_defaults(run=command.run)
        subparser.epilog = f'example: simsiam {name} {command.example}'
        subparser.formatter_class = argparse.RawDescriptionHelpFormatter  # keeps the example on one line
        command.add_arguments(subparser)
    return parser


@plain_terminal()
def main(argv: list[str] | None = None) -> int:
    args = None
    try:
        with Signals():
            args = build_parser().parse_args(argv)
            status = args.run(args) or 0
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # the reader, `head` for example, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, RuntimeError, OSError, FloatingPointError, MemoryError) as e:
        text = f'not enough memory ({e})' if isinstance(e, MemoryError) else str(e)
        print(f'simsiam: {printable(text)}', file=sys.stderr)
        return 1
    except KeyboardInterrupt as e:  # Stopped, or Python's own before Signals takes over
        if os.environ.get('RANK', '0') == '0':
            text = '; '.join(filter(None, (str(e) or 'stopped by SIGINT', getattr(args, 'kept', None))))
            print(f'simsiam: {text}', file=sys.stderr)
        return getattr(e, 'code', 130)


if __name__ == '__main__':
    sys.exit(main())
