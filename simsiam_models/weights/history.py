"""How weights were trained, as a model card states it: read from the files that a run leaves in its folder.

A run of `simsiam pretrain` has args.json and log.jsonl, `finetune` record.json, and a published repository
training.json, which holds the same facts, so that publishing it again loses none. Folders of the user's machine are
left out of all of them.
"""
import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..runtime.lifecycle import ARGS
from ..runtime.log import LOG
from ..runtime.messages import short
from .folders import read_json
from .networks import BACKBONE
from .published import NAME, WEIGHTS, hub_id

TRAINING, RECORD = 'training.json', 'record.json'
DEMO = 'the built-in demonstration data'


class Score(NamedTuple):
    """A number that was measured, in percent."""

    name: str
    value: float
    remark: str


class History(NamedTuple):
    """What is known about a training."""

    summary: str  # continues 'A resnet18 ...'
    data: str  # name of the images
    facts: dict[str, str]  # name -> value
    command: str = ''
    scores: tuple[Score, ...] = ()
    base_model: str | None = None  # Hub id
    datasets: tuple[str, ...] = ()  # Hub ids

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), 'scores': [score._asdict() for score in self.scores]}


def read_history(source: Path, epochs: int | None = None) -> History | None:
    """Returns how the weights of a run's folder, or of a folder or checkpoint in it, were trained; None if unknown.

    `epochs` is how many of them are in the weights; None: all. Raises ValueError if a file is damaged.
    """
    folder = source if source.is_dir() and source.name != BACKBONE else source.parent
    if (folder / TRAINING).is_file():
        return _parse(folder / TRAINING)
    if (folder / RECORD).is_file():
        record = read_json(folder / RECORD)
        benchmark = record.get('benchmark')
        return _read_finetuning(record) if benchmark == 'finetune' or '_semi_' in str(benchmark) else None
    if (folder / ARGS).is_file():
        args = read_json(folder / ARGS)
        return _read_pretraining(args, _read_log(folder / LOG), epochs) if 'recipe' in args else None
    return None


def _parse(file: Path) -> History:
    """Reads training.json, which may come from anybody: names and numbers only."""
    values = read_json(file)
    try:
        scores = tuple(Score(short(s['name']), float(s['value']), short(s['remark'], 300)) for s in values['scores'])
        if not all(0 <= score.value <= 100 for score in scores):
            raise ValueError
        base, datasets = values.get('base_model'), values.get('datasets') or ()
        facts = {short(k): short(v, 300) for k, v in values['facts'].items()}
        return History(
            short(values['summary'], 300), short(values['data']), facts, short(values.get('command', ''), 1000), scores,
            base and short(base), tuple(map(short, datasets)))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f'{file} does not describe a training as `publish` writes it: remove the file') from None


def _read_log(file: Path) -> list[dict[str, Any]]:
    """Returns the lines of log.jsonl; an unfinished last one is left out."""
    lines = []
    for text in file.read_text(encoding='utf-8', errors='replace').splitlines() if file.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        lines += [line] if isinstance(line, dict) else []
    return lines


def _read_pretraining(args: dict[str, Any], log: list[dict[str, Any]], epochs: int | None) -> History:
    data, total, extensions = _name_data(args.get('data')), args.get('epochs'), list(args.get('extensions') or ())
    done = total if epochs is None else epochs
    while extensions and done <= extensions[-1]['from_epoch']:  # a longer schedule that these weights have not seen
        total = extensions.pop()['epochs_before']
    initial, base = _describe_initial(args.get('init_from'))
    facts = {
        'Recipe': args.get('recipe'), 'Initialised from': initial,
        'Epochs': f'{done}' if done == total else f'{done} of {total}; training had not finished',
        'Extended': '; '.join(
            f'from {x["epochs_before"]} to {x["epochs"]} epochs, with the learning rates of {x["epochs"]} epochs after '
            f'epoch {x["from_epoch"]}' for x in extensions),
        'Batch': args.get('batch_size'), 'Learning rate per 256 images': args.get('lr'),
        'Weight decay': args.get('weight_decay'),
        'Data': f'{data}, {_count(args.get("images"))} images, without labels',
        'Processes': args.get('processes'), 'Precision': args.get('amp'), 'Seed': args.get('seed'),
        'Versions': _join(args.get('versions'))}
    stated = {k: str(v) for k, v in facts.items() if v not in (None, '')}
    unfinished = '' if done == total else f', {done} of {total} epochs'
    commands = [_name_command(x.get('command')) for x in (args, *extensions)]
    scores = _read_knn(args, [line for line in log if line.get('epoch', 0) <= (done or 0)])
    source = str(args.get('data') or '')
    hub = re.match(r'hf(?:-stream)?:([\w.-]+/[\w.-]+)', source)
    return History(
        f'pretrained by SimSiam on {data}{unfinished}', data, stated, ' && '.join(filter(None, commands)), scores, base,
        (hub[1],) if hub else ())


def _describe_initial(initial: dict[str, Any] | None) -> tuple[str, str | None]:
    """Names the weights that a training started from, without a folder, and their Hub id if they are published."""
    if not initial:
        return '', None
    tag, parts = initial.get('tag'), 'backbone, projector and predictor' if initial.get('heads') else 'backbone'
    name = f'{NAME}.{tag} ({WEIGHTS[tag].license})' if tag in WEIGHTS else short(Path(initial.get('source', '')).name)
    return f'{name}: {parts}', hub_id(f'{NAME}.{tag}') if tag in WEIGHTS else None


def _read_knn(args: dict[str, Any], log: list[dict[str, Any]]) -> tuple[Score, ...]:
    """Returns the last kNN accuracy that was measured after training began, with the baselines beside it."""
    lines = [line for line in log if isinstance(line.get('knn'), int | float) and math.isfinite(line['knn'])]
    if not lines:
        return ()
    last = lines[-1]
    before: dict[str, Any] = next((line['knn'] for line in log if isinstance(line.get('knn'), dict)), {})
    images: Sequence[int] = last.get('knn_images') or ()
    sizes = [f'{images[0]} bank images and {images[1]} queries'] if len(images) == 2 else []
    names = {'random': 'untrained backbone', 'initial': 'backbone before this training', 'pixels': 'raw pixels'}
    others = [f'{names[k]} {v:.1f}' for k, v in before.items() if k in names and isinstance(v, float)]
    return Score(
        f'weighted kNN top-1 (k={args.get("knn_k")}, T={args.get("knn_t")})', round(last['knn'], 2), '; '.join([
            f'kNN monitor, after epoch {last["epoch"]}', *sizes, *others])),


def _read_finetuning(record: dict[str, Any]) -> History:
    weights, data, protocol = (record.get(k) or {} for k in ('weights', 'data', 'protocol'))
    counts, tag = data.get('counts') or {}, weights.get('tag')
    own = data.get('name') in (None, 'folder')
    name, base = _name_data((data.get('path') if own else data['name']) or 'images'), short(weights.get('name') or '')
    base = base if base.startswith(('hf-hub:', 'hf_hub:')) else Path(base).name
    known = isinstance(tag, str) and tag in WEIGHTS
    terms = f' ({WEIGHTS[str(tag)].license})' if known else ''
    facts = {
        'Fine-tuned from': f'{NAME}.{tag}{terms}' if known else base,
        'Data': f'{name}: {_count(counts.get("train"))} training and {_count(counts.get("test"))} validation images of '
                f'{_count(counts.get("classes"))} classes',
        'Validation': protocol.get('validation'), 'Epochs': (record.get('extra') or {}).get('last_epoch'),
        'Batch': protocol.get('batch_size'), 'Optimizer': protocol.get('optimizer'),
        'Learning rate': protocol.get('lr'), 'Seed': protocol.get('seed'), 'Date': record.get('date'),
        'Versions': _join(record.get('versions'))}
    chosen = '; the best epoch was chosen on them' if protocol.get('keep') == 'best' else ''
    measured = {k: v for k, v in (record.get('metrics') or {}).items() if k in ('top1', 'top5')}
    return History(
        f'fine-tuned on {name}', name, {k: short(str(v), 300) for k, v in facts.items() if v not in (None, '')},
        scores=tuple(Score(
            k.replace('top', 'top-'), round(float(v), 2), f'{counts.get("test")} validation images{chosen}')
            for k, v in measured.items()),
        base_model=hub_id(f'{NAME}.{tag}') if known else base[7:] if base.startswith(('hf-hub:', 'hf_hub:')) else None)


def _name_data(data: Any) -> str:
    """Returns the name of DATA: no folder above it, and no command or address that may hold a password."""
    if data is None:
        return DEMO
    data = str(data).partition('#')[0]
    if data.startswith(('pipe:', 'http:', 'https:')):
        return 'a stream of images'
    if data.startswith(('hf:', 'hf-stream:', 'torchvision:')):
        return short(':'.join(data.split(':')[:2]))
    return short(Path(data).name or 'a folder of images')


def _name_command(command: Any) -> str:
    """Returns a command line in which names stand for folders, files, addresses and other commands."""
    try:
        words = shlex.split(command) if isinstance(command, str) else []
    except ValueError:
        return ''
    shown, flag = [], ''
    for i, word in enumerate(words):
        name, equals, value = word.partition('=') if word.startswith('--') else ('', '', word)
        flag = name or flag
        if _is_private(value) and i:
            value = flag.removeprefix('--').replace('-', '_').upper() or 'DATA'
        shown.append(f'{name}{equals}{shlex.quote(value) if value else ""}')
        flag = name if name and not equals else ''
    return ' '.join(shown)


def _is_private(word: str) -> bool:
    public = word.startswith(('hf:', 'hf-stream:', 'torchvision:', '{', '['))
    return word.startswith('pipe:') or ('/' in word or '\\' in word) and not public or word.count(':/') > 0


def _count(n: Any) -> str:
    return f'{n:,}' if isinstance(n, int) else 'an unknown number of'


def _join(versions: Any) -> str:
    return ', '.join(f'{k} {v}' for k, v in versions.items()) if isinstance(versions, dict) else ''
