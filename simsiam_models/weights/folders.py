"""Reads the files beside weights: config.json of exported folders, and the arguments of a run.

Such a file may come from anybody. It can describe a network, its pixels and its labels, and nothing else: only plain
values are read, so that no file can name code, a path, an address or other weights.
"""
import dataclasses
import inspect
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
from safetensors.torch import load_file
from timm.models import PretrainedCfg, build_model_with_cfg, is_model
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..runtime.messages import one_line, short
from .reading import find_export, require_file, require_numbers
from .tensorfile import CONFIG, MODEL

LARGEST_ARGS = 2**16  # sum of the numbers among the arguments of a network
MOST_PARAMETERS = 10**10
LONGEST = 1 << 24  # bytes: 21,000 class names take 0.5 MB
# What tells timm where weights are, or how to load them.
SOURCES = {'url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'custom_load'}
DESCRIPTION = {field.name for field in dataclasses.fields(PretrainedCfg)} - SOURCES
# Arguments of timm's functions rather than of a network, and the names that a loader's arguments have.
OF_TIMM = {
    *inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters,
    'features_only', 'branch', 'device', 'dtype'}
OF_LOADERS = re.compile('pretrained|checkpoint|state_dict|(^|_)(load|path$|file|url|hub|cache|cfg$|fn$)')


class Network(NamedTuple):
    """A network as timm builds it: `timm.create_model(name, **args)`."""

    name: str
    args: dict[str, Any]
    description: dict[str, Any] = {}  # timm's pretrained_cfg without any source of weights


def read_json(file: Path) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises FileNotFoundError, or ValueError if it holds no such object."""
    require_file(file)
    if file.stat().st_size > LONGEST:
        raise ValueError(f'{file} is larger than {LONGEST >> 20} MB, too large for a description of weights')
    try:
        value = json.loads(file.read_text(encoding='utf-8-sig'))
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{file} is not valid JSON ({one_line(e, 80)}); remove it, or download it again') from None
    if not isinstance(value, dict):
        raise ValueError(f'{file} holds no JSON object')
    return value


def check_network(name: Any, args: Any, where: Path) -> Network:
    """Returns a network that a file names, if it is one of timm's with plain arguments; raises ValueError if not.

    The number of classes is none of its arguments: the weights, or the caller, decide on it.
    """
    if not isinstance(name, str) or not is_model(name := name.split('.')[0]):
        raise ValueError(f'{where}: {short(name)!r} is not the name of a timm model')
    if not isinstance(args := {} if args is None else args, dict):
        raise ValueError(f'{where}: model_args is not an object')
    for key, value in args.items():
        if key in OF_TIMM or OF_LOADERS.search(key):
            raise ValueError(f'{where}: model_args holds {short(key)!r}, which is not an argument of a network')
        if not _is_plain(value):
            raise ValueError(
                f'{where}: model_args holds {short(key)!r} {short(value)}, which is not a number or a plain name')
    args = {k: v for k, v in args.items() if k != 'num_classes'}
    if sum(map(abs, _list_numbers(args))) > LARGEST_ARGS:
        raise ValueError(f'{where}: the numbers in model_args are too large for a network: {short(args)}')
    return Network(name, args)


def _list_numbers(value: Any) -> Iterator[float]:
    """Yields all numbers in a value of JSON."""
    if isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _list_numbers(part)
    elif isinstance(value, int | float):
        yield value


@contextmanager
def limit_parameters(where: str | Path, most: int = MOST_PARAMETERS) -> Iterator[None]:
    """Raises ValueError as soon as the network that `where` names, built in this block, has more parameters."""
    count, thread = 0, threading.get_ident()

    def add(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 0 if parameter is None or threading.get_ident() != thread else parameter.numel()
        if count > most:
            raise ValueError(f'{where}: the network would have more than {most:,} parameters, which cannot be right')

    hook = register_module_parameter_registration_hook(add)
    try:
        yield
    except RuntimeError as e:
        if 'allocate' not in str(e):
            raise
        raise ValueError(f'{where}: the network needs more memory than there is') from None
    finally:
        hook.remove()


def _is_plain(value: Any, depth: int = 4) -> bool:
    """Returns whether a value of JSON holds only numbers and names without a path or an address."""
    if isinstance(value, list | dict):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(v, depth - 1) for v in inner)
    return not isinstance(value, str) or re.fullmatch(r'[\w+,. -]{0,200}', value, re.ASCII) is not None


def read_config(folder: Path) -> Network:
    """Returns the network that config.json of an exported folder names, with the number of classes of its weights.

    Raises FileNotFoundError if there is none, ValueError if it names more than a network.
    """
    file = folder / CONFIG
    config = read_json(file)
    cfg = config.get('pretrained_cfg', config)  # timm once wrote everything into one object
    if not isinstance(cfg, dict) or 'architecture' not in config:
        raise ValueError(f'{file} is not that of a model exported for timm: it has only {short(", ".join(config))}')
    network = check_network(config['architecture'], config.get('model_args'), file)
    description = {k: cfg[k] for k in DESCRIPTION & set(cfg)}
    description |= {k: config[k] for k in ('num_classes', 'label_names', 'label_descriptions') if k in config}
    classes = description.setdefault('num_classes', 1000)
    if type(classes) is not int or classes < 0:
        raise ValueError(f'{file}: num_classes {short(classes)} is not a number of classes')
    return network._replace(description={**description, 'architecture': network.name})


def create_from_folder(folder: str | Path, pretrained: bool = True, **kwargs: Any) -> nn.Module:
    """Does what `timm.create_model('local-dir:FOLDER', pretrained=True)` does, with what `read_config` allows.

    Weights come from model.safetensors alone, and fill every entry of the network that was exported. Raises
    FileNotFoundError, ValueError, or what timm raises.
    """
    name, args, cfg = read_config(Path(folder))
    args, classes = {**args, **kwargs}, kwargs.pop('num_classes', None)
    args.pop('num_classes', None)
    state = load_file(find_export(Path(folder))) if pretrained else {}
    require_numbers(state, f'{folder}: ')
    file = Path(folder) / MODEL  # has at least a byte for each parameter; `kwargs` may add some
    most = file.stat().st_size + 10**7 if file.is_file() else MOST_PARAMETERS
    with limit_parameters(Path(folder) / CONFIG, most):
        model = timm.create_model(name, pretrained_cfg=cfg, **args)
    if {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in model.state_dict().items()}:
        model.load_state_dict(state)
    elif pretrained:  # timm adapts what `kwargs` change: channels, image size
        model = timm.create_model(name, True, pretrained_cfg={**cfg, 'state_dict': state}, **args)
        cast(dict[str, Any], model.pretrained_cfg).pop('state_dict', None)
    if classes not in (None, model.num_classes):  # timm checks every entry only with the classifier of the weights
        cast(Callable[[int], None], model.reset_classifier)(classes)
    return model
