"""train.py's command line: every number of a recipe is a flag, and --help is its manual."""
import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from ..data.augment import Augmentation
from ..runtime.messages import check_flags, json_object
from ..runtime.precision import AMP
from .recipes import RECIPES, Recipe

# flag, field, type, help. Fields of Augmentation and of Recipe; without the flag the recipe's own number holds.
MODEL = [
    ('--model', 'model', str, 'backbone: any timm model'),
    ('--model-args', 'model_args', json_object, 'its keyword arguments, as JSON, e.g. \'{"img_size": 96}\''),
    ('--dim', 'dim', int, 'width of the outputs z and p, channels'),
    ('--pred-dim', 'pred_dim', int, "the predictor's hidden width, channels (paper: dim / 4)"),
    ('--proj-layers', 'proj_layers', int, 'fully connected layers of the projector'),
]
OPTIMIZATION = [
    ('--epochs', 'epochs', int, 'passes over the data'),
    ('--batch-size', 'batch_size', int, 'samples per step, over all processes'),
    ('--lr', 'lr', float, 'base learning rate, per 256 samples; the rate used is lr * batch / 256'),
    ('--momentum', 'momentum', float, 'momentum of SGD'),
    ('--weight-decay', 'weight_decay', float, 'weight decay on all parameters, batch norm and biases included'),
    ('--warmup-epochs', 'warmup_epochs', int, 'linear warm-up, epochs (paper: 10 for batches of 1024 and more)'),
    ('--fix-pred-lr', 'fix_pred_lr', bool, "keep the predictor's learning rate constant (--no-fix-pred-lr: decay it)"),
]
AUGMENTATION = [
    ('--image-size', 'size', int, 'side of a view, pixels'),
    ('--crop-scale', 'crop_scale', (float, float), 'smallest and largest share of the area that a crop takes'),
    ('--crop-ratio', 'crop_ratio', (float, float), 'smallest and largest width / height of a crop'),
    ('--jitter-p', 'jitter_p', float, 'probability of colour jitter'),
    ('--brightness', 'brightness', float, 'brightness factor, uniform in 1 - x .. 1 + x'),
    ('--contrast', 'contrast', float, 'the same for contrast'),
    ('--saturation', 'saturation', float, 'the same for saturation'),
    ('--hue', 'hue', float, 'hue shift, uniform in -x .. x of the hue circle (at most 0.5)'),
    ('--gray-p', 'gray_p', float, 'probability of grayscale'),
    ('--blur-p', 'blur_p', float, 'probability of Gaussian blur'),
    ('--blur-sigma', 'blur_sigma', (float, float), 'smallest and largest standard deviation of the blur, pixels'),
    ('--flip-p', 'flip_p', float, 'probability of a horizontal flip'),
]
MONITOR = [
    ('--eval-resize', 'eval_resize', int, 'short side before the centre crop, pixels'),
    ('--knn-k', 'knn_k', int, 'neighbours'),
    ('--knn-t', 'knn_t', float, 'temperature: a neighbour of cosine s has the weight exp(s / T)'),
    ('--knn-every', 'knn_every', int, 'measure every N epochs (0: only before and after)'),
]


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='train.py', description=description, epilog=_recipe_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for title, add_flags in (
            ('run', _add_run_flags), ('checkpoints', _add_checkpoint_flags), ('speed', _add_speed_flags),
            ('log', _add_log_flags)):
        add_flags(parser.add_argument_group(title).add_argument)
    for title, table in (
            ('model', MODEL), ('optimization', OPTIMIZATION), ('augmentation', AUGMENTATION), ('kNN monitor', MONITOR)):
        group = parser.add_argument_group(f"{title} (default: the recipe's number, see the table below)")
        for flag, name, kind, text in table:
            _add_number(group, flag, name, kind, text)
    return parser


def _add_run_flags(add: Callable[..., Any]) -> None:
    add('data', nargs='?', metavar='DATA',
        help='folder of images (one subfolder per class, also below DATA/train and DATA/val, or flat), list of files '
             '(.txt, .csv), folder or pattern of .tar shards, Arrow or Parquet folder, CIFAR folder, '
             'torchvision:NAME[:ROOT], hf:REPO[:SPLIT], hf-stream:REPO[:SPLIT], or a stream of tars (pipe:COMMAND, '
             'https://...tar); default: the demonstration data')
    add('--images-per-epoch', type=int, metavar='N', help='length of an epoch, for a stream that has no length')
    add('--recipe', choices=RECIPES, metavar='NAME',
        help='one of the table below (default: in1k_bs512_ep100 for a folder, demo without DATA)')
    add('--output', metavar='DIR',
        help='folder of the run; the same command continues the run (default: runs/RECIPE-DATA)')
    add('--resume', default='auto', metavar='auto|never|FILE',
        help="auto: continue from the newest checkpoint in the run's folder; never: refuse a folder that holds a run; "
             'FILE: start a new folder from this checkpoint of the same recipe and data (default: auto)')
    add('--seed', type=int, default=0, help='seed of the weights, the order and the augmentation (default: 0)')
    add('--max-steps', type=int, metavar='N', help='stop after N optimizer steps in all (default: run to the end)')
    add('--max-unreadable', type=float, default=0.1, metavar='SHARE',
        help='share of the images that may be unreadable: each is counted, named in OUTPUT/unreadable.txt and replaced '
             'by the next readable one (the kNN monitor leaves it out); with more, the run stops (default: 0.1)')
    add('--on-collapse', choices=['warn', 'stop'], default='warn',
        help='when the outputs collapse: only report it, or stop the run (default: warn)')


def _add_checkpoint_flags(add: Callable[..., Any]) -> None:
    add('--checkpoint-minutes', type=float, default=10.0, metavar='M',
        help='write a checkpoint inside the epoch when the newest is M minutes old; one is also written after each '
             'epoch, at --max-steps, and on SIGTERM, SIGUSR1 and SIGINT. If none can be written (disk full, folder '
             'gone) the run goes on, and stops when the newest is 3 M minutes old (default: 10)')
    add('--checkpoint-steps', type=int, metavar='N', help='also write a checkpoint every N steps (default: off)')
    add('--keep-last', type=int, default=2, metavar='N', help='keep the N newest checkpoints (default: 2)')
    add('--keep-every', type=int, default=0, metavar='K',
        help='also keep the checkpoint after every K-th epoch, as checkpoint_epochNNNN.pth (default: off)')


def _add_speed_flags(add: Callable[..., Any]) -> None:
    add('--device', help='cuda, mps or cpu (default: the first one available)')
    add('--amp', choices=['auto', *AMP], default='auto',
        help='precision of the forward pass; auto: bfloat16 if the GPU supports it (on a CPU: if a short timing finds '
             'it faster), else float16 with a GradScaler on CUDA, else off (default: auto)')
    add('--compile', action='store_true', help='torch.compile the model (default: off)')
    add('--auto-perf', action='store_true',
        help='time memory formats, torch.compile and (on a CPU, with --amp auto) precisions for about a minute, and '
             'take the fastest; a continued run keeps that choice (default: channels last, not compiled)')
    add('--workers', type=int, metavar='N', help='threads per process that read and crop images, 0: none '
        "(default: 1 if the CPU also trains, else the process's share of the cores, at most 8)")
    add('--grad-accum-steps', type=int, default=1, metavar='N',
        help='must be 1: batch norm takes its statistics over the batch of one forward pass, so accumulated '
             'micro-batches are another method, not a larger batch (default: 1)')


def _add_log_flags(add: Callable[..., Any]) -> None:
    add('--log-every', type=int, default=50, metavar='N', help='write a line of figures every N steps (default: 50)')
    add('--tensorboard', action='store_true', help='also write the figures for TensorBoard, to OUTPUT/tensorboard')
    add('--wandb', metavar='PROJECT', help='also send the figures to this Weights & Biases project')
    add('--knn-data', metavar='DATA', help='labelled images for the kNN monitor (default: DATA, if it is labelled)')


def _add_number(group: Any, flag: str, name: str, kind: Any, text: str) -> None:
    if kind is bool:
        group.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, help=text)
    elif isinstance(kind, tuple):
        group.add_argument(flag, dest=name, type=kind[0], nargs=2, metavar=('MIN', 'MAX'), help=text)
    else:
        group.add_argument(flag, dest=name, type=kind, metavar='JSON' if kind is json_object else 'X', help=text)


def _numbers(recipe: Recipe) -> dict[str, Any]:
    numbers = dataclasses.asdict(recipe)
    return {**numbers, **numbers.pop('augmentation')}


def _recipe_table() -> str:
    """A table with a row per flag and a column per recipe."""
    columns = {name: _numbers(recipe) for name, recipe in RECIPES.items()}
    rows = [['recipe', *columns]]
    for flag, name, _, _ in MODEL + OPTIMIZATION + AUGMENTATION + MONITOR:
        if name != 'model_args':
            rows.append([flag] + [_short(c[name]) for c in columns.values()])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    about = [f'{name}: {recipe.about}' for name, recipe in RECIPES.items()]
    return '\n'.join(['recipes:', *(f'  {line}' for line in lines), '', *(f'  {line}' for line in about)])


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return ' '.join(map(_short, value))
    return f'{value:g}' if isinstance(value, float) else str(value)


def resolve_recipe(args: argparse.Namespace) -> tuple[str, Recipe]:
    """The name of the recipe, and the recipe with the numbers that flags give.

    Raises:
        ValueError: a number outside its range.
    """
    name = args.recipe or ('demo' if args.data is None else 'in1k_bs512_ep100')
    recipe = RECIPES[name]
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items() if v is not None}
    aug_names = {f.name for f in dataclasses.fields(Augmentation)}
    names = {f.name for f in dataclasses.fields(Recipe)} - {'about', 'augmentation'}
    aug = dataclasses.replace(recipe.augmentation, **{k: v for k, v in given.items() if k in aug_names})
    numbers = {k: v for k, v in given.items() if k in names}
    if numbers.get('model', recipe.model) != recipe.model:
        numbers.setdefault('model_args', {})  # the recipe's belong to the recipe's model
    if aug.size != recipe.augmentation.size:
        numbers.setdefault('eval_resize', round(recipe.eval_resize * aug.size / recipe.augmentation.size))
    recipe = dataclasses.replace(recipe, augmentation=aug, **numbers)
    _check(args, recipe)
    return name, recipe


def _check(args: argparse.Namespace, recipe: Recipe) -> None:
    aug = recipe.augmentation
    if args.grad_accum_steps != 1:
        raise ValueError(
            f'--grad-accum-steps {args.grad_accum_steps}: refused, because batch norm takes its statistics over the '
            'batch of one forward pass; accumulated micro-batches are another method. Use more processes or a '
            'smaller batch (the paper reports 66.1 at batch 64, 67.3 at 128, 68.1 at 256)')
    rules = [
        ('--epochs', recipe.epochs, recipe.epochs >= 1, 'at least 1'),
        ('--batch-size', recipe.batch_size, recipe.batch_size >= 2, 'at least 2'),
        ('--lr', recipe.lr, recipe.lr > 0, 'above 0'),
        ('--warmup-epochs', recipe.warmup_epochs, 0 <= recipe.warmup_epochs < recipe.epochs, '0 .. --epochs - 1'),
        ('--image-size', aug.size, aug.size >= 8, 'at least 8 pixels'),
        ('--eval-resize', recipe.eval_resize, recipe.eval_resize >= aug.size, 'at least --image-size'),
        ('--crop-scale', aug.crop_scale, 0 < aug.crop_scale[0] <= aug.crop_scale[1] <= 1, '0 < MIN <= MAX <= 1'),
        ('--crop-ratio', aug.crop_ratio, 0 < aug.crop_ratio[0] <= aug.crop_ratio[1], '0 < MIN <= MAX'),
        ('--blur-sigma', aug.blur_sigma, 0 < aug.blur_sigma[0] <= aug.blur_sigma[1], '0 < MIN <= MAX'),
        ('--hue', aug.hue, 0 <= aug.hue <= 0.5, 'in 0 .. 0.5'),
        ('--max-unreadable', args.max_unreadable, 0 <= args.max_unreadable < 1, 'at least 0, below 1'),
        ('--log-every', args.log_every, args.log_every >= 1, 'at least 1'),
        ('--checkpoint-minutes', args.checkpoint_minutes, args.checkpoint_minutes > 0, 'above 0'),
        ('--checkpoint-steps', args.checkpoint_steps, args.checkpoint_steps is None or args.checkpoint_steps >= 1,
         'at least 1'),
        ('--keep-last', args.keep_last, args.keep_last >= 2, 'at least 2: a damaged one falls back to the one before'),
        ('--keep-every', args.keep_every, args.keep_every >= 0, 'at least 0'),
        ('--images-per-epoch', args.images_per_epoch, args.images_per_epoch is None or args.images_per_epoch >= 1,
         'at least 1'),
        ('--workers', args.workers, args.workers is None or args.workers >= 0, 'at least 0'),
    ] + [(f'--{n.replace("_", "-")}', getattr(aug, n), 0 <= getattr(aug, n) <= 1, 'a probability')
         for n in ('jitter_p', 'gray_p', 'blur_p', 'flip_p')]
    check_flags(rules)
