"""The command line of pretraining: every number of a recipe is a flag."""
import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from ..data.augment import Augmentation
from ..data.opening import is_demo
from ..runtime.messages import check_flags, json_object
from ..runtime.precision import AMP
from .recipes import RECIPES, Recipe, list_rules

# Group -> field of Recipe or Augmentation -> help; without the flag the recipe's own number holds.
NUMBERS = {
    'model': {
        'model': 'backbone: any timm model',
        'model_args': 'its keyword arguments, as JSON, e.g. \'{"img_size": 96}\'',
        'dim': 'width of the outputs z and p, channels',
        'pred_dim': "the predictor's hidden width, channels (paper: dim / 4)",
        'proj_layers': 'fully connected layers of the projector'},
    'optimization': {
        'epochs': 'passes over the data',
        'batch_size': 'samples per step, over all processes',
        'lr': 'base learning rate, per 256 samples; the rate used is lr * batch / 256',
        'momentum': 'momentum of SGD',
        'weight_decay': 'weight decay on all parameters, batch norm and biases included',
        'warmup_epochs': 'linear warm-up, epochs (paper: 10 for batches of 1024 and more)',
        'fix_pred_lr': "keep the predictor's learning rate constant (--no-fix-pred-lr: decay it)"},
    'augmentation': {
        'size': 'side of a view, pixels',
        'crop_scale': 'smallest and largest share of the area that a crop takes',
        'crop_ratio': 'smallest and largest width / height of a crop',
        'jitter_p': 'probability of colour jitter',
        'brightness': 'brightness factor, uniform in 1 - x .. 1 + x',
        'contrast': 'the same for contrast',
        'saturation': 'the same for saturation',
        'hue': 'hue shift, uniform in -x .. x of the hue circle (at most 0.5)',
        'gray_p': 'probability of grayscale',
        'blur_p': 'probability of Gaussian blur',
        'blur_sigma': 'smallest and largest standard deviation of the blur, pixels',
        'flip_p': 'probability of a horizontal flip'},
    'kNN monitor': {
        'eval_resize': 'short side before the centre crop, pixels',
        'knn_k': 'neighbours',
        'knn_t': 'temperature: a neighbour of cosine s has the weight exp(s / T)',
        'knn_every': 'measure every N epochs (0: only before and after; -1: never)'}}
# Type of a field -> how argparse reads it, unless it is a single value of that type.
SPECIAL: dict[type, dict[str, Any]] = {
    bool: {'action': argparse.BooleanOptionalAction}, dict: {'type': json_object, 'metavar': 'JSON'},
    tuple: {'type': float, 'nargs': 2, 'metavar': ('MIN', 'MAX')}}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.epilog = '\n\n'.join(filter(None, (_recipe_table(), parser.epilog)))
    parser.formatter_class, parser.allow_abbrev = argparse.RawDescriptionHelpFormatter, False
    parser.set_defaults(prog=parser.prog)
    for title, add_group in (
            ('run', _add_run_flags), ('checkpoints', _add_checkpoint_flags), ('speed', _add_speed_flags),
            ('log', _add_log_flags)):
        add_group(parser.add_argument_group(title).add_argument)
    for title, fields in NUMBERS.items():
        group = parser.add_argument_group(f"{title} (default: the recipe's number, see the table below)")
        for name, text in fields.items():
            kind = type(_numbers(Recipe(''))[name])
            options: dict[str, Any] = SPECIAL.get(kind, {'type': kind, 'metavar': 'X'})
            group.add_argument(_flag(name), dest=name, help=text, **options)


def _add_run_flags(add: Callable[..., Any]) -> None:
    add('data', nargs='?', metavar='DATA',
        help='folder of images (one subfolder per class, also below DATA/train and DATA/val, or flat), list of files '
             '(.txt, .csv), folder or pattern of .tar shards, Arrow or Parquet folder, CIFAR folder, '
             'torchvision:NAME[:ROOT], hf:REPO[:SPLIT], hf-stream:REPO[:SPLIT], or a stream of tars (pipe:COMMAND, '
             'https://...tar); default: the demonstration data')
    add('--images-per-epoch', type=int, metavar='N', help='length of an epoch, for a stream that does not state it')
    add('--recipe', choices=RECIPES, metavar='NAME',
        help='a recipe of the table below (default: in1k_bs512_ep100; demo for the demonstration data)')
    add('--output', metavar='DIR',
        help='folder of the run; the same command continues the run (default: runs/RECIPE-DATA)')
    add('--resume', default='auto', metavar='auto|never|FILE',
        help="auto: continue from the newest checkpoint in the run's folder; never: refuse a folder that holds a run; "
             'FILE: start a new folder from this checkpoint of the same recipe and data (default: auto)')
    add('--extend', type=int, metavar='N',
        help='continue the finished or stopped run in its folder to a total of N epochs, instead of --epochs: the '
             'remaining epochs use the learning rates of an N-epoch run. The same command, with or without --extend, '
             'continues the longer run')
    add('--init-from', metavar='FILE|TAG',
        help='start a new run from these weights: a published tag, the OUTPUT of a run, an exported folder, or a '
             'checkpoint in any known layout, with the same backbone; the projector and predictor are loaded too, '
             'if they are there and fit (default: random weights)')
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
             'gone) the run continues, and stops when the newest is 3 M minutes old (default: 10)')
    add('--checkpoint-steps', type=int, metavar='N', help='also write a checkpoint every N steps (default: off)')
    add('--keep-last', type=int, default=2, metavar='N', help='keep the N newest checkpoints (default: 2)')
    add('--keep-every', type=int, default=0, metavar='K',
        help='also keep the checkpoint after every K-th epoch, as checkpoint_epochNNNN.pth (default: off)')


def _add_speed_flags(add: Callable[..., Any]) -> None:
    add('--device', help='cuda, mps or cpu (default: the first one available)')
    add('--amp', choices=['auto', *AMP], default='auto',
        help='precision of the forward pass; auto: bfloat16 if the GPU supports it (on a CPU: if a short timing finds '
             'it faster), else float16 with a GradScaler on CUDA, else off (default: auto)')
    add('--compile', action=argparse.BooleanOptionalAction,
        help='compile the model with torch.compile (default: off; on a single GPU, a new run of more than 15 minutes '
             'decides by a trial of about a minute, and a continued run keeps the choice)')
    add('--auto-perf', action='store_true',
        help='time memory formats, torch.compile and (on a CPU, with --amp auto) precisions for about a minute, and '
             'take the fastest; a continued run keeps that choice (default: channels last; see also --compile)')
    add('--workers', type=int, metavar='N', help='threads per process that read and crop images, 0: none '
        "(default: 1 if the CPU also trains, else the process's share of the cores)")
    add('--grad-accum-steps', type=int, default=1, metavar='N',
        help='must be 1: batch norm takes its statistics over the batch of one forward pass, so accumulated '
             'micro-batches are another method, not a larger batch (default: 1)')


def _add_log_flags(add: Callable[..., Any]) -> None:
    add('--log-every', type=int, default=50, metavar='N', help='write a line of figures every N steps (default: 50)')
    add('--tensorboard', action='store_true', help='also write the figures for TensorBoard, to OUTPUT/tensorboard')
    add('--wandb', metavar='PROJECT', help='also send the figures to this Weights & Biases project')
    add('--knn-data', metavar='DATA', help='labelled images for the kNN monitor (default: DATA, if it is labelled)')
    add('--knn-images', type=_count_or_all, metavar='N|all',
        help='images for the kNN monitor, one query to four bank images (default: as many as it measures in a few '
             'seconds and within 5 %% of the run; its output states the numbers)')


def _count_or_all(text: str) -> int:
    try:
        return sys.maxsize if text == 'all' else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be a number of images, or 'all'") from None


def _flag(name: str) -> str:
    return '--image-size' if name == 'size' else f'--{name.replace("_", "-")}'


def _numbers(recipe: Recipe) -> dict[str, Any]:
    numbers = dataclasses.asdict(recipe)
    return {**numbers, **numbers.pop('augmentation')}


def _recipe_table() -> str:
    """Returns a table with a row per flag and a column per recipe."""
    recipes = [_numbers(recipe) for recipe in RECIPES.values()]
    names = [name for fields in NUMBERS.values() for name in fields if name != 'model_args']
    rows = [['recipe', *RECIPES], *([_flag(name), *(_short(r[name]) for r in recipes)] for name in names)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return '\n  '.join(['recipes:', *lines]) + '\n\n' + '\n'.join(f'  {k}: {r.about}' for k, r in RECIPES.items())


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return ' '.join(map(_short, value))
    return f'{value:g}' if isinstance(value, float) else str(value)


def name_recipe(args: argparse.Namespace) -> str:
    return args.recipe or ('demo' if is_demo(args.data) else 'in1k_bs512_ep100')


def resolve_recipe(args: argparse.Namespace) -> tuple[str, Recipe]:
    """Returns the recipe's name, and the recipe with the flags' numbers; raises ValueError if one is out of range."""
    name = name_recipe(args)
    recipe = RECIPES[name]
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items() if v is not None}
    numbers, aug = (
        {f.name: given[f.name] for f in dataclasses.fields(kind) if f.name in given} for kind in (Recipe, Augmentation))
    if numbers.get('model', recipe.model) != recipe.model:
        numbers.setdefault('model_args', {})  # the recipe's belong to the recipe's model
    size = recipe.augmentation.size
    if aug.get('size', size) != size:
        numbers.setdefault('eval_resize', round(recipe.eval_resize * aug['size'] / size))
    recipe = dataclasses.replace(recipe, augmentation=dataclasses.replace(recipe.augmentation, **aug), **numbers)
    _check(args, recipe)
    return name, recipe


def _check(args: argparse.Namespace, recipe: Recipe) -> None:
    if args.grad_accum_steps != 1:
        raise ValueError(
            f'--grad-accum-steps {args.grad_accum_steps}: refused, because batch norm takes its statistics over the '
            'batch of one forward pass; accumulated micro-batches are another method. Use more processes or a '
            'smaller batch (the paper reports 66.1 at batch 64, 67.3 at 128, 68.1 at 256)')
    v = {**vars(args), **_numbers(recipe)}
    least = dict(log_every=1, checkpoint_steps=1, keep_every=0, images_per_epoch=1, workers=0, knn_images=10)
    rules = {
        **list_rules(recipe), **{name: (v[name] is None or v[name] >= n, f'at least {n}') for name, n in least.items()},
        'max_unreadable': (0 <= v['max_unreadable'] < 1, 'at least 0, below 1'),
        'checkpoint_minutes': (v['checkpoint_minutes'] > 0, 'above 0'),
        'keep_last': (v['keep_last'] >= 2, 'at least 2: a damaged one falls back to the one before')}
    check_flags((_flag(name), v[name], *rule) for name, rule in rules.items())
