"""Prepares a run for its first step: data, model, the claim of its folder, and the way to compute a step."""
import argparse
import copy
import dataclasses
import functools
import operator
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..data import Images, Stream, TwoViews, open_data
from ..data.readers.images import spread, stored_sizes
from ..data.readers.index import digest
from ..runtime import checkpoint
from ..runtime.distributed import World, default_workers, parallel, synchronize, synchronize_batchnorm
from ..runtime.lifecycle import ARGS, OUTPUTS, Lifecycle, amend_claim
from ..runtime.precision import AMP, autocast, choose_amp, has_bfloat16
from ..runtime.versions import command, versions
from ..simsiam import SimSiam, create_simsiam, simsiam_loss
from ..weights.folders import read_json
from ..weights.networks import BACKBONE, TIMM_ERRORS
from .autoperf import WAYS, choose_perf
from .extension import check_epochs, extend, match_epochs
from .initial import KEY as INITIAL
from .initial import Initial, check_same, load_initial, match_initial
from .monitor import KnnMonitor, allowed_size, has_classes
from .recipes import Recipe
from .step import Perf, Trainer, train_step

# The entries of a checkpoint.
KEYS = {'model', 'optimizer', 'scaler', 'epoch', 'step', 'knn', 'doctor', 'unreadable', 'log_bytes', 'run', 'processes'}
# The arguments that may differ between a run and its continuation: none of them changes what is learned. The data may
# have moved; `digest` and `images` tell whether they are the same.
FREE = {
    'data', 'images_per_epoch', 'output', 'resume', 'device', 'workers', 'log_every', 'max_steps', 'compile',
    'auto_perf', 'perf', 'processes', 'knn_data', 'knn_images', 'max_unreadable', 'on_collapse', 'checkpoint_minutes',
    'checkpoint_steps', 'keep_last', 'keep_every', 'tensorboard', 'wandb', 'command', 'versions'}


def prepare(args: argparse.Namespace, recipe: Recipe, world: World) -> tuple[TwoViews, KnnMonitor | None, SimSiam]:
    """Opens the data and builds the model; writes nothing.

    Raises ValueError, FileNotFoundError or DataError if the data, the batch or the model cannot be used.
    """
    train, val = open_data(args.data, args.images_per_epoch)
    workers = default_workers(world.device) if args.workers is None else args.workers
    views = TwoViews(
        train, recipe.augmentation, recipe.batch_size, seed=args.seed, rank=world.rank, world=world.size,
        device=world.device, workers=workers, max_unreadable=args.max_unreadable)
    if args.knn_data is not None:
        train, val = open_data(args.knn_data)
        if train.labels is None:
            raise ValueError(f'--knn-data {args.knn_data} has no labels; use class folders, a list or a table')
        if not has_classes(train):
            raise ValueError(f'--knn-data {args.knn_data} has only one class; kNN needs at least two')
    knn = None  # without several classes, or with too few images for one query per process
    if recipe.knn_every >= 0 and has_classes(train) and (len(train) // 5 if val is None else len(val)) >= world.size:
        most = allowed_size(recipe, recipe.epochs * len(views) * recipe.batch_size)
        knn = KnnMonitor(
            cast(Images, train), val, recipe, world, size=args.knn_images, most=most, workers=workers,
            max_unreadable=args.max_unreadable)
    return views, knn, make_model(recipe, args.seed)


def make_model(recipe: Recipe, seed: int) -> SimSiam:
    """Builds the recipe's model with weights from `seed`; raises ValueError if timm has no such model or argument."""
    torch.manual_seed(seed)
    try:
        return create_simsiam(
            recipe.model, dim=recipe.dim, pred_dim=recipe.pred_dim, proj_layers=recipe.proj_layers, **recipe.model_args)
    except (RuntimeError, *TIMM_ERRORS) as e:
        raise ValueError(f'--model {recipe.model} cannot be built ({e}); timm.list_models() names them all') from None


def name_output(args: argparse.Namespace, recipe_name: str) -> Path:
    """Returns the run's folder: --output, or runs/RECIPE-DATA."""
    if args.output:
        return Path(args.output)
    data = 'demo' if args.data is None else Path(args.data).resolve().name if Path(args.data).exists() else re.sub(
        r'[\W_]', '-', args.data)
    return Path(f'runs/{recipe_name}-{data}')


def claim(
    args: argparse.Namespace, name: str, recipe: Recipe, model: SimSiam, images: Images | Stream, life: Lifecycle,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Claims the run's folder; returns its recorded arguments, and the checkpoint that it continues from, or None.

    A continued run keeps its recorded precision. Raises ValueError if the folder or checkpoint is another run's.
    """
    world, continued, data = life.world, (life.folder / ARGS).exists(), args.data
    amp = 'off' if args.amp == 'auto' and continued else choose_amp(
        args.amp, world.device, model, _view_shape(recipe, world))
    numbers, sizes = dataclasses.asdict(recipe), digest_sizes(images)
    del numbers['about']
    record = {
        'recipe': name, 'data': data and str(Path(data).resolve() if Path(data).exists() else data),
        'images': len(images), 'digest': images.digest, 'sizes': sizes, 'seed': args.seed, 'amp': amp,
        **numbers, **{k: getattr(args, k) for k in FREE & set(vars(args)) - {'data'}}, 'processes': world.size,
        'perf': None, 'command': command(), 'versions': versions()}
    free = FREE | {'extensions', 'sizes'} | ({'amp'} if args.amp == 'auto' else set())
    record, given, initial = world.broadcast_from_main(
        lambda: _match_earlier(args, recipe, record, free, life.folder, model=model))
    record = life.claim(record, free, fresh=args.resume == 'never')
    state = life.resume(record, free | ({'epochs'} if record.get('extensions') else set()))
    lost = state is None and given is None
    if continued and lost and world.broadcast_from_main((life.folder / BACKBONE).exists):
        raise ValueError(f'{life.folder} holds a trained backbone, but no checkpoint; give another --output')
    if continued:
        done = state is not None and state['epoch'] == record['epochs'] and args.extend is None
        life.say(f'{life.folder} holds this run' + (
            ', but no checkpoint: it begins again' if lost else
            ', and it is finished; --extend N continues it to N epochs' if done else ': continuing it'))
    if state is not None and given is not None:
        life.say(f'{life.folder} already has checkpoints, so --resume {args.resume} is ignored')
    state = state or given
    if (state['run'] if state else record).get('sizes', sizes) != sizes:
        life.say(f'{args.data}: the image files have other sizes than when this run began, so it goes on with other '
                 'pixels; if that is a mistake, stop it, and continue with the images it began with')
    if args.extend is not None:
        record, said = world.broadcast_from_main(lambda: extend(life.folder, record, state, args.extend, recipe))
        life.say(said)
    if state is None and INITIAL in record:
        _fill(args, recipe, model, record, life, initial)
    return record, state


def digest_sizes(images: Images | Stream) -> str | None:
    """Hashes the sizes of 64 files, which reveal most data sets that were replaced; None if there are no files."""
    if isinstance(images, Stream):
        return None
    sizes = stored_sizes(images, spread(len(images), 64))
    return None if sizes is None else digest(sizes.astype('<i8'))


def _match_earlier(
    args: argparse.Namespace, recipe: Recipe, record: dict[str, Any], free: set[str], folder: Path, *, model: SimSiam,
) -> tuple[dict[str, Any], dict[str, Any] | None, Initial | None]:
    """Compares the arguments with what the run in the folder, or the one of --resume FILE, has become meanwhile.

    Returns the arguments to claim the folder with, the checkpoint of --resume FILE, and the weights of --init-from for
    a new run. Writes nothing.
    """
    recorded, given, initial = _read_recorded(folder), None, None
    if args.resume != 'never' and (  # else `claim` says what is wrong
            recorded or not any((folder / name).exists() for name in (ARGS, *OUTPUTS))):
        check_epochs(args.extend, record, recorded, free, folder)
    if args.resume not in ('auto', 'never'):
        if not Path(args.resume).is_file():
            raise FileNotFoundError(f'--resume {args.resume}: no such file; name a checkpoint, or use auto or never')
        given = {**checkpoint.read(Path(args.resume), KEYS), 'log_bytes': 0}
    if earlier := recorded or given and given['run']:
        where = folder if recorded else Path(args.resume)
        record = {
            **record, **{k: v for k, v in earlier.items() if k == 'extensions'},
            'epochs': match_epochs(
                earlier['epochs'] if args.epochs is None and args.extend is not None else recipe.epochs, args.extend,
                earlier),
            **match_initial(args.init_from, earlier, model, recipe, where)}
    elif args.init_from is not None:
        initial = load_initial(args.init_from, model, recipe)
        record = {**record, INITIAL: initial.record}
    if given is not None:
        free = free | ({'epochs'} if record.get('extensions') else set())
        if differing := checkpoint.find_differences(given['run'], record, free):
            raise ValueError(f'--resume {args.resume} belongs to another run ({differing})')
        record = {**record, 'amp': given['run']['amp']}
    return record, given, initial


def _read_recorded(folder: Path) -> dict[str, Any]:
    """Returns the arguments of the pretraining in a folder; {} if it holds none, or something else."""
    try:
        recorded = read_json(folder / ARGS)
    except (ValueError, OSError):  # `Lifecycle.claim` says what is wrong
        return {}
    if 'recipe' not in recorded or 'epochs' not in recorded:
        return {}
    if not is_sound(recorded):
        raise ValueError(f'{folder / ARGS} is damaged; give another --output, or restore the file')
    return recorded


def is_sound(recorded: dict[str, Any]) -> bool:
    """Returns whether what a continued run takes from its arguments can be what a run has written."""
    try:
        total, perf, initial = recorded['epochs'], recorded.get('perf'), recorded.get(INITIAL)
        for extension in reversed(recorded.get('extensions', [])):
            before, epochs, start = (operator.index(extension[k]) for k in ('epochs_before', 'epochs', 'from_epoch'))
            if not (epochs == total > before and 0 <= start <= before):
                return False
            total = before
        return (
            operator.index(total) > 0 and recorded['amp'] in AMP
            and (perf is None or isinstance(perf, dict) and {*perf} == {'channels_last', 'compile'})
            and (initial is None or all(isinstance(initial[k], str) for k in ('source', 'sha256'))))
    except (TypeError, KeyError):
        return False


def _fill(
    args: argparse.Namespace, recipe: Recipe, model: SimSiam, record: dict[str, Any], life: Lifecycle,
    initial: Initial | None,
) -> None:
    """Fills the model with the weights of --init-from, read again if an earlier start left no checkpoint."""
    def load_again() -> Initial:
        again = load_initial(args.init_from, model, recipe)
        check_same(again, record[INITIAL], life.folder)
        return again

    initial = initial or life.world.broadcast_from_main(load_again)
    model.load_state_dict(initial.state, strict=False)  # `load_initial` has compared the entries
    life.say(initial.text)


def _view_shape(recipe: Recipe, world: World) -> tuple[int, int, int, int]:
    """Returns the shape of the views of a step on one process, (B, 3, S, S)."""
    size = recipe.augmentation.size
    return recipe.batch_size // world.size, 3, size, size


def make_trainer(
    args: argparse.Namespace, recipe: Recipe, model: SimSiam, record: dict[str, Any], life: Lifecycle, continued: bool,
) -> Trainer:
    """Moves the model to the device, follows --amp, --compile and --auto-perf, and wraps it for several processes."""
    world, shape = life.world, _view_shape(recipe, life.world)
    amp, perf = decide_perf(args, recipe, model, record, life, continued)
    model.to(world.device).to(memory_format=perf.memory_format)
    synchronize_batchnorm(model, world)
    if perf.compile:
        x = torch.zeros(shape, device=world.device).contiguous(memory_format=perf.memory_format)
        _compile_or_not(model, x, amp, life.say)
    blank = torch.zeros(2, *shape[1:], device=world.device)
    net = parallel(model, lambda net: simsiam_loss(*net(blank, blank)), world)
    return Trainer(model, recipe, world, amp, perf, net=net, seed=args.seed)


def decide_perf(
    args: argparse.Namespace, recipe: Recipe, model: SimSiam, record: dict[str, Any], life: Lifecycle, continued: bool,
) -> tuple[str, Perf]:
    """Chooses precision, memory format and compilation: as recorded, else by --auto-perf, else the defaults.

    On a single CUDA card the trial of --auto-perf also decides about compiling, without --compile and --no-compile.
    """
    amp, world = record['amp'], life.world
    if record.get('perf'):
        perf = Perf(**record['perf'])
        keep = args.auto_perf or args.compile is None
        return amp, perf if keep else dataclasses.replace(perf, compile=args.compile)
    # A trial on one card says nothing about several, which wait for each other in every batch norm.
    by_trial = world.device.type == 'cuda' and world.size == 1 and not continued and args.compile is None
    if not args.auto_perf and not by_trial:
        return amp, Perf(compile=bool(args.compile))

    def make_step(trial: nn.Module, amp: str, perf: Perf) -> Callable[..., Any]:
        trainer = Trainer(cast(SimSiam, trial.train()), recipe, World(0, 1, world.device), amp, perf, seed=args.seed)
        return functools.partial(train_step, trainer)

    def choose() -> tuple[str, Perf]:
        more: dict[str, Any]
        if args.auto_perf:
            life.say('auto-perf: timing a few ways of computing a step, for about a minute')
            more = {'ways': [way for way in WAYS if args.compile is not False or not way.compile]}
        else:
            life.say('auto-perf: timing the step with and without torch.compile (--no-compile skips this)')
            steps = min(recipe.epochs * (record['images'] // recipe.batch_size), args.max_steps or sys.maxsize)
            more = {'ways': [Perf(), Perf(compile=True)], 'steps_of_run': steps}
        both = args.amp == 'auto' and world.device.type == 'cpu' and has_bfloat16() and not continued
        amps = ('bfloat16', 'off') if both else (amp,)
        chosen = choose_perf(model, _view_shape(recipe, world), world.device, amps, make_step, life.say, **more)
        amend_claim(life.folder, {'amp': chosen[0], 'perf': dataclasses.asdict(chosen[1])})
        return chosen

    return world.broadcast_from_main(choose)


def _compile_or_not(model: SimSiam, x: torch.Tensor, amp: str, say: Callable[[str], None]) -> None:
    """Compiles the model in place if that works; a trial on a copy leaves the batch norm statistics unchanged.

    `x` has the run's own shape and memory format, so the run reuses what was compiled for it.
    """
    try:
        began, trial = time.perf_counter(), copy.deepcopy(model)
        trial.compile()
        with autocast(x.device, amp):
            outputs = trial(x, x)
        simsiam_loss(*(y.float() for y in outputs)).backward()
        synchronize(x.device)
    except Exception as e:  # torch.compile and the C++ compiler behind it raise errors of many kinds
        say(f'--compile does not work here ({type(e).__name__}); the run continues without it')
        return
    say(f'compiled the model in {time.perf_counter() - began:.0f} s')
    model.compile()
