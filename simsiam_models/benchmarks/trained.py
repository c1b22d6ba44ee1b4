"""What detection and segmentation share around their loop: flags, trained networks on disk, results."""
import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..runtime import checkpoint
from ..runtime.checkpoint import LAST
from ..runtime.files import write_csv, write_json
from ..runtime.messages import json_object, short
from ..weights import tensorfile
from ..weights.export import export_backbone
from ..weights.folders import check_network, read_json
from ..weights.tensorfile import CONFIG, MODEL
from .backbone import RANDOM, Backbone, load_backbone
from .options import add_held_out, add_model
from .results.record import format_record, write_record
from .samples import Pair
from .transfer import KEYS

BACKBONE = 'backbone'  # in a run's folder
RECORD, PER_CLASS, SHEET = 'record.json', 'per_class.csv', 'sheet.jpg'
VERSION = 1  # of an exported network
SHOWN = 5  # classes
COUNT: dict[str, Any] = dict(type=int, metavar='N')  # a kind of flag
# The flags that only training uses.
TRAINING = (
    'branch', 'model_args', 'batch_size', 'iterations', 'lr', 'image_size', 'eval_every', 'test', 'loss_mean',
    'head_channels', 'rois', 'pool_size', 'proposals')


def add_run(parser: argparse.ArgumentParser, what: str, protocols: Sequence[str], datasets: Sequence[str]) -> None:
    """Adds the flags of a run that trains a network called `what`; the first protocol is the default."""
    add = parser.add_argument
    add_model(parser)
    add('--model-args', type=json_object, default={}, metavar='JSON', help='keyword arguments of the backbone')
    add('--output', '--out', dest='output', type=Path, required=True, metavar='FOLDER',
        help=f'folder of the run, its {what} and its record; the same command continues the run')
    add('--protocol', choices=list(protocols), default=protocols[0], help=f'default: {protocols[0]}')
    add('--dataset', choices=list(datasets), help="default: the protocol's")
    add('--allow-partial', action='store_true', help='accept fewer images than the data set has')
    add_held_out(parser)
    add('--eval-only', type=Path, metavar='CHECKPOINT', help=f'measure a trained {what}: the folder of a run or its '
        'checkpoint.pth')
    add('--device', metavar='D', help='cuda, mps or cpu (default: the first one available)')
    add('--workers', **COUNT, help='threads that read images (default: by device and cores)')
    add('--amp', choices=['off', 'bfloat16', 'float16'], default='off', help='precision (default: off, as published)')
    add('--checkpoint-minutes', type=float, default=10.0, metavar='X', help='default: 10')
    parser.set_defaults(kept='the same command continues from the last checkpoint')


def check_run(args: argparse.Namespace) -> None:
    """Raises ValueError if --output is inside the data, or --eval-only has training flags or an --output in use."""
    data, output = Path(args.data).resolve(), args.output.resolve()
    if data.is_dir() and data in (output, *output.parents):
        raise ValueError(
            f'--output {args.output}: is inside the data folder {args.data}, whose files it might overwrite; name a '
            'folder elsewhere')
    if args.eval_only is None:
        return
    if given := [f'--{name.replace("_", "-")}' for name in TRAINING if getattr(args, name, None) not in (None, {})]:
        raise ValueError(f'--eval-only uses the settings of the trained run: leave out {", ".join(given)}')
    if any((output / name).exists() for name in (RECORD, LAST)):
        raise ValueError(f'--output {args.output}: already holds a run or a record; name another folder')


def follow_run(args: argparse.Namespace, numbers: dict[str, Any], **defaults: str) -> None:
    """Sets flags to those of the trained run, for --eval-only; raises ValueError if one was given with another value.

    `numbers` is the protocol in the run's record, `defaults` are the values of flags that are not given.
    """
    for flag, default in defaults.items():
        given, used = getattr(args, flag), numbers['name' if flag == 'protocol' else flag]
        if given not in (default, used):
            raise ValueError(
                f'--eval-only {args.eval_only}: trained with --{flag} {used}, not {given}; leave --{flag} out')
        setattr(args, flag, used)


def check_trained(model: nn.Module, what: str) -> None:
    """Raises RuntimeError if a parameter or a batch norm of the network, which it calls `what`, is frozen."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    frozen += [name for name, m in model.named_modules() if 'Frozen' in type(m).__name__ or (
        isinstance(m, _BatchNorm) and model.training and not m.training)]
    if frozen:
        raise RuntimeError(f'{len(frozen)} parts of the {what} are frozen, the first is {frozen[0]}')


def count_parts(model: nn.Module) -> str:
    """Returns how large a network is of which all parts train."""
    norms = sum(isinstance(m, _BatchNorm) for m in model.modules())
    parameters = sum(p.numel() for p in model.parameters())
    return f'{parameters:,} parameters and {norms} batch norms, all of which are trained'


def name_classes(classes: int | Sequence[str]) -> list[str]:
    """Returns the names of classes, which are their numbers if only their count is given."""
    if isinstance(classes, int):
        return [str(i) for i in range(classes)]
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise ValueError(f'classes must be their number or a list of names, not {short(classes)}')
    return [str(c) for c in classes]


def describe_source(source: Backbone) -> dict[str, Any]:
    """Returns what `restore_source` needs."""
    return {
        'architecture': source.architecture, 'model_args': source.args, 'mean': source.mean, 'std': source.std}


def restore_source(config: dict[str, Any], where: Path) -> Backbone:
    """Returns the untrained backbone that `describe_source` described."""
    network = check_network(config['architecture'], config['model_args'], where)
    source = load_backbone(f'{network.name}{RANDOM}', **network.args)
    source.mean, source.std = tuple(config['mean']), tuple(config['std'])
    return source


def export_network(model: nn.Module, source: Backbone, folder: Path, what: str, config: dict[str, Any]) -> None:
    """Writes FOLDER/`what` for `read_export`, and the backbone `source` of the network for timm."""
    (folder / what).mkdir(parents=True, exist_ok=True)
    tensorfile.write(folder / what / MODEL, model.state_dict())
    write_json(folder / what / CONFIG, {'format': f'simsiam_models {what}', 'version': VERSION, **config})
    export_backbone(source.model, folder / BACKBONE, source.architecture, source.args, source.image_size)


def read_export(folder: Path, what: str, command: str) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """Returns the configuration and the weights of the network called `what` in a run's folder, and where they are.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    folder = folder / what if (folder / what).is_dir() else folder
    if not (folder / CONFIG).is_file() or not (folder / MODEL).is_file():
        raise FileNotFoundError(
            f'{folder}: no {CONFIG} and {MODEL} of a {what} there; name the --output of `simsiam {command}`')
    config, kind = read_json(folder / CONFIG), f'simsiam_models {what}'
    if config.get('format') != kind or config.get('version') != VERSION:
        raise ValueError(f'{folder / CONFIG} is not of a {what}, whose "format" is {kind!r}, version {VERSION}')
    if not tensorfile.is_whole(folder / MODEL):
        raise ValueError(f'{folder / MODEL}: it is damaged or was cut off; export or copy it again')
    return config, load_file(folder / MODEL), folder


def read_run(path: Path, command: str) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """Returns the identity of a run of `simsiam COMMAND`, its network's weights, and the file that holds them.

    `path` is the folder of the run, or its checkpoint.pth, which a run that is not finished has, too.
    """
    file = path / LAST if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f'--eval-only {path}: no {LAST} of `simsiam {command}` there')
    state = checkpoint.read(file, KEYS)
    if (run := state['run']).get('benchmark') != command:
        raise ValueError(f'--eval-only {path}: a run of another kind ({short(run.get("benchmark"))})')
    return run, state['model'], file


def name_source(source: Backbone) -> dict[str, Any]:
    """Returns what a record says of the weights that a network was trained from."""
    return {'name': source.name, 'tag': source.tag, 'digest': source.digest}


def rename_source(source: Backbone, names: Mapping[str, Any]) -> None:
    """Gives the backbone of a trained network the names, from `name_source`, of what it was trained from."""
    source.name, source.tag, source.digest = (names[key] for key in ('name', 'tag', 'digest'))


def write_result(
    folder: Path, benchmark: str, protocol: dict[str, Any], source: Backbone, data: Pair, entry: dict[str, Any],
    *, seconds: float, extra: dict[str, Any], say: Callable[[str], Any],
) -> dict[str, Any]:
    """Writes the table of classes and the record of an evaluation, prints it, and returns it.

    `entry` holds its metrics, unreadable images, and per_class: rows whose first column of a metric ranks the classes.
    """
    rows = entry['per_class']
    write_csv(folder / PER_CLASS, [list(rows[0]), *(list(row.values()) for row in rows)])
    unreadable = [*extra.pop('unreadable', {}).values(), *entry['unreadable'].values()]
    record = write_record(
        folder / RECORD, benchmark, protocol, source, data.data(), entry['metrics'], seconds=seconds, extra={
            'per_class': rows, 'unreadable': sorted(set(unreadable)), 'shared_images': data.shared, **extra})
    if bad := list(entry['unreadable'].values()):
        say(f'{len(bad)} test images could not be read and are left out of all numbers; the first: {bad[0]}')
    key = next(name for name in rows[0] if name not in ('class', 'images', 'objects', 'pixels'))
    ranked = sorted((r for r in rows if r.get(key) is not None), key=lambda r: r[key])
    listed = ranked if len(ranked) <= 2 * SHOWN else [*ranked[:SHOWN], *ranked[-SHOWN:]]
    say(f'{key} of {"the" if listed is ranked else "the worst and the best"} classes: ' + ', '.join(
        f'{short(r["class"], 30)} {r[key]:.1f}' for r in listed))
    say(format_record(record))
    return record
