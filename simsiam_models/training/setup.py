"""What a run has before its first step: its data, its model, its folder, and how it steps."""
import argparse
import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..data import open_data
from ..runtime import checkpoint
from ..runtime.distributed import World
from ..runtime.log import RunLog
from ..runtime.precision import AMP, choose_amp
from ..simsiam import SimSiam, create_simsiam, simsiam_loss
from .autoperf import MakeStep, Perf, choose_perf
from .monitor import KnnMonitor
from .recipes import Recipe

# What may differ between a run and its continuation: nothing here changes what is learned. The data may lie elsewhere:
# `digest` and `images` tell whether they are the same.
FREE = {
    'data', 'images_per_epoch', 'output', 'resume', 'device', 'workers', 'log_every', 'max_steps', 'compile',
    'auto_perf', 'perf', 'processes', 'knn_data', 'max_unreadable', 'on_collapse', 'checkpoint_minutes',
    'checkpoint_steps', 'keep_last', 'keep_every', 'tensorboard', 'wandb'}


def load_monitor(args: argparse.Namespace, recipe: Recipe, train: Any, val: Any, world: World, workers: int):
    """The kNN monitor, or None where no images have labels."""
    if args.knn_data is not None:
        train, val = open_data(args.knn_data)
        if train.labels is None:
            raise ValueError(f'--knn-data {args.knn_data} has no class folders, so it has no labels')
    queries = len(train) // 5 if val is None else len(val)
    if train.labels is None or queries < world.size:  # every process is to have one
        return None
    return KnnMonitor(
        train, val, recipe.augmentation.size, recipe.eval_resize, recipe.knn_k, recipe.knn_t, world, workers)


def make_model(recipe: Recipe, seed: int) -> SimSiam:
    torch.manual_seed(seed)
    try:
        return create_simsiam(
            recipe.model, dim=recipe.dim, pred_dim=recipe.pred_dim, proj_layers=recipe.proj_layers, **recipe.model_args)
    except (RuntimeError, TypeError) as e:  # timm: no such model, no such argument
        raise ValueError(
            f'--model {recipe.model} cannot be built ({e}); timm.list_models() names them all') from None


def make_scaler(amp: str, world: World) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(world.device.type, enabled=amp == 'float16')


def claim(
    args: argparse.Namespace, name: str, recipe: Recipe, model: SimSiam, shape: tuple[int, ...], images: Any,
    folder: Path, world: World, log: RunLog,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Make the folder this run's; its recorded arguments, and the checkpoint that it continues from, or None.

    A continued run keeps the recorded precision.

    Raises:
        ValueError: the folder, or the checkpoint, is another run's.
    """
    known = args.amp == 'auto' and (folder / checkpoint.ARGS).exists()  # then what is recorded holds
    amp = 'off' if known else choose_amp(args.amp, world.device, model, shape)
    numbers = dataclasses.asdict(recipe)
    del numbers['about']
    here = args.data and str(Path(args.data).resolve() if Path(args.data).exists() else args.data)
    record = {
        'recipe': name, 'data': here, 'images': len(images), 'digest': images.digest, 'seed': args.seed, 'amp': amp,
        **numbers, **{k: getattr(args, k) for k in FREE & set(vars(args)) - {'data'}}, 'processes': world.size,
        'perf': None}
    free = FREE | ({'amp'} if args.amp == 'auto' else set())

    def own() -> tuple[dict[str, Any], dict[str, Any] | None]:
        given = None
        if args.resume not in ('auto', 'never'):
            given = checkpoint.read(Path(args.resume))
            said = checkpoint.differences(given['run'], record, free)
            if said:
                raise ValueError(f'--resume {args.resume} belongs to another run ({said})')
            record['amp'] = given['run']['amp']
            given['log_bytes'] = 0
        old = checkpoint.claim_folder(folder, record, free, args.resume == 'never')
        if old is not None:
            log.say(f'{folder} holds this run: continuing it')
        state = checkpoint.load(folder, log.say, record, free)
        if state is not None and given is not None:
            log.say(f'{folder} has checkpoints of its own, so --resume {args.resume} is left aside')
        return old or record, state or given

    return world.broadcast_from_main(own)


def decide_perf(
    args: argparse.Namespace, model: SimSiam, shape: tuple[int, ...], record: dict[str, Any], continued: bool,
    folder: Path, make_step: MakeStep, world: World, log: RunLog,
) -> tuple[str, Perf]:
    """Precision, memory format and compilation: as recorded, else by --auto-perf, else the defaults."""
    amp = record['amp']
    if record.get('perf'):
        perf = Perf(**record['perf'])
        return amp, dataclasses.replace(perf, compile=perf.compile or args.compile and not args.auto_perf)
    if not args.auto_perf:
        return amp, Perf(compile=args.compile)

    def choose() -> tuple[str, Perf]:
        amps = ('bfloat16', 'off') if args.amp == 'auto' and world.device.type == 'cpu' and not continued else (amp,)
        chosen = choose_perf(model, shape, world.device, amps, make_step, log.say)
        checkpoint.amend_record(folder, {'amp': chosen[0], 'perf': dataclasses.asdict(chosen[1])})
        return chosen

    return world.broadcast_from_main(choose)


def compile_or_not(
    model: SimSiam, shape: tuple[int, ...], amp: str, perf: Perf, device: torch.device, say: Callable[[str], None],
) -> None:
    """Compile in place where that works; a trial on a copy leaves the batch norm statistics alone.

    The trial has the run's own shape and precision, so that the run takes over what was compiled for it.
    """
    try:
        trial = copy.deepcopy(model)
        trial.compile()
        x = torch.zeros(shape, device=device).contiguous(memory_format=perf.memory_format)
        with torch.autocast(device.type, AMP[amp], enabled=amp != 'off'):
            outputs = trial(x, x)
        simsiam_loss(*(y.float() for y in outputs)).backward()
    except Exception as e:  # compilers fail in many ways, none of which should end the run
        say(f'--compile does not work here ({type(e).__name__}); going on without it')
        return
    model.compile()
