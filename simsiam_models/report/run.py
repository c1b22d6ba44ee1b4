"""Reads the folder of a run, and lists the facts for the first section of its page."""
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..benchmarks.results.record import read_record
from ..runtime.lifecycle import ARGS
from ..runtime.log import LOG
from ..runtime.messages import counted, is_count, short, size_text
from ..runtime.runlock import describe_process, is_alive, read_lock
from ..training.setup import is_sound
from ..weights.folders import read_json
from ..weights.tensorfile import hash_file

RECORD = 'record.json'
KINDS = {'finetune': 'fine-tuning', 'detect': 'detector training', 'segment': 'segmenter training'}
NEEDED = {
    'recipe': str, 'model': str, 'images': int, 'digest': str, 'epochs': int, 'batch_size': int, 'seed': int,
    'augmentation': dict}
NUMBERS = 'variant', 'optimizer', 'epochs', 'iterations', 'batch_size', 'lr', 'amp', 'seed'  # of a protocol
PARTS = {'train': 'training', 'test': 'test', '': ''}
LARGEST_LOG = 256 << 20  # bytes
NOT_YET = 'recorded when the run ends'
HASHED = ARGS, LOG, RECORD, 'backbone/model.safetensors', 'model.safetensors'


class RunFolder(NamedTuple):
    """The folder of a run; `kind` is 'pretrain', or the command that KINDS names."""

    folder: Path
    kind: str
    args: dict[str, Any]  # args.json
    record: dict[str, Any] | None  # None: it is not finished, or pretraining
    lines: list[dict[str, Any]]  # of log.jsonl
    damaged: int  # lines that are no JSON, or beyond the run

    @property
    def figures(self) -> list[dict[str, Any]]:
        """Returns the lines with the figures of an interval, each once and in order."""
        lines = {(line['epoch'], line['step']): line for line in self.lines if {'loss', 'epoch', 'step'} <= line.keys()}
        return [lines[at] for at in sorted(lines)]

    @property
    def steps(self) -> int:
        """Returns the steps of an epoch of pretraining."""
        steps: int = self.args['images'] // self.args['batch_size']
        return max(1, steps)

    @property
    def reached(self) -> tuple[int, int]:
        """Returns the epoch that pretraining is in, from 0, and the steps done in it, as far as its log says."""
        last = self.figures[-1] if self.figures else {'epoch': 0, 'step': 0}
        return (last['epoch'] + 1, 0) if last['step'] >= self.steps else (last['epoch'], last['step'])


def read_run(folder: Path) -> RunFolder | None:
    """Reads a run's folder; returns None if it holds none. Raises ValueError if its files are damaged."""
    if not (folder / ARGS).is_file():
        return None
    args = read_json(folder / ARGS)
    kind = args.get('benchmark', 'pretrain' if 'recipe' in args else None)
    if kind not in ('pretrain', *KINDS):
        return None
    if kind == 'pretrain' and (bad := [k for k, t in NEEDED.items() if not isinstance(args.get(k), t) or not (
            abs(args[k]) < 2**63 and (k == 'seed' or args[k] > 0) if t is int else args[k])]):
        raise ValueError(f'{folder / ARGS} is damaged: it has no usable {bad[0]}; restore the file')
    if kind == 'pretrain' and not (is_sound(args) and isinstance(args.get('data'), str | None)):
        raise ValueError(f'{folder / ARGS} is damaged; restore the file')
    record = read_record(folder / RECORD) if (folder / RECORD).is_file() else None
    lines, damaged = _read_lines(folder / LOG)
    last = args['epochs'] if kind == 'pretrain' else sys.maxsize
    sound = [line for line in lines if all(key not in line or is_count(line[key]) for key in ('epoch', 'step')) and (
        line.get('epoch', 0) <= last)]
    return RunFolder(folder, kind, args, record, sound, damaged + len(lines) - len(sound))


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the lines of a log, and the number of those that are damaged."""
    def read_integer(text: str) -> int:
        if len(text) > 18:
            raise ValueError('no number of a run has so many digits')
        return int(text)

    lines, damaged = [], 0
    if path.is_file() and path.stat().st_size > LARGEST_LOG:
        raise ValueError(f'{path} is larger than {size_text(LARGEST_LOG)}, too large for the log of a run')
    for text in path.read_text(errors='replace').splitlines() if path.is_file() else []:
        try:
            line = json.loads(text, parse_int=read_integer)
            damaged += not isinstance(line, dict)
            lines += [line] if isinstance(line, dict) else []
        except (ValueError, RecursionError):
            damaged += 1
    return lines, damaged


def describe_state(run: RunFolder) -> str:
    """Returns whether a run is finished, running or stopped, how far it came, and whether its outputs collapsed."""
    holder: dict[str, Any] = {}
    with suppress(OSError):  # a folder in its place
        holder, _ = read_lock(run.folder / 'lock') or ({}, 0)
    running = is_alive(holder, describe_process()) if holder else False  # None: only its machine knows
    stopped = f'stopped, or running on {short(holder["host"])},' if running is None else 'stopped'
    if run.kind != 'pretrain':
        return 'running' if running else 'finished' if run.record else f'{stopped} before the end'
    (epoch, step), epochs = run.reached, run.args['epochs']
    state = 'running' if running else 'finished' if epoch >= epochs else stopped
    if state != 'finished':
        state += f' after {epoch} of {counted(epochs, "epoch")}'
        state += f' and {step} of {counted(run.steps, "step")}' if step else ''
    last = run.figures[-1] if run.figures else {}
    if last.get('collapsed') or last.get('diagnosis'):
        state += f'; {"its outputs have collapsed" if last.get("collapsed") else "not healthy"}'
        state += f' ({short(last["diagnosis"])})' if last.get('diagnosis') else ''
    return state


def list_facts(run: RunFolder) -> list[tuple[str, str]]:
    """Returns names and values that say what a run is."""
    a, record = run.args, run.record or {}
    facts = [('Folder', str(run.folder)), ('State', describe_state(run)), ('Model', _describe_model(run))]
    facts += _list_recipe(a) if run.kind == 'pretrain' else [('Protocol', _describe_protocol(run))]
    facts.append(('Data', _describe_data(run)))
    facts += [('Extended', f'from epoch {x["from_epoch"] + 1} on, to {x["epochs"]} epochs in total instead '
               f'of {x["epochs_before"]}: {short(x.get("command"), 400)}')
              for x in (a.get('extensions', []) if run.kind == 'pretrain' else ())]
    unreadable = [line['unreadable'] for line in run.lines if is_count(line.get('unreadable'))]
    if unreadable:
        facts.append(('Unreadable', f'{counted(unreadable[-1], "image")}, replaced; unreadable.txt names them'))
    if run.damaged:
        facts.append(('Damaged', f'{counted(run.damaged, "line")} of {LOG} left out'))
    command = a.get('command') or record.get('command')
    absent = 'not recorded' if record or run.kind == 'pretrain' else NOT_YET
    facts.append(('Command', command if isinstance(command, str) else absent))
    versions = a.get('versions') or record.get('versions')
    facts.append(('Versions', ', '.join(
        f'{k} {v}' for k, v in versions.items()) if isinstance(versions, dict) else absent))
    files = [run.folder / name for name in HASHED if (run.folder / name).is_file()]
    facts += [(f'SHA-256 of {file.relative_to(run.folder)}', f'{hash_file(file)}, {size_text(file.stat().st_size)}')
              for file in files]
    return facts


def _describe_model(run: RunFolder) -> str:
    args = run.args.get('model_args')
    source = (run.record or {}).get('weights') or run.args.get('source')
    name = run.args.get('model') or (source.get('name') if isinstance(source, dict) else None)
    text = str(name or 'not recorded')
    text += f' {json.dumps(args)}' if args else ''
    if run.kind == 'pretrain' and (initial := run.args.get('init_from')):
        text += f', from {initial.get("source")} (SHA-256 {str(initial.get("sha256"))[:16]})'
    if run.record:
        text += f', weights {run.record["weights"]["digest"]}'
    return text


def _describe_protocol(run: RunFolder) -> str:
    """Returns the name of a protocol, and its main numbers, which stand beside the name or in `args`."""
    found = run.args.get('protocol') or (run.record or {}).get('protocol', {})
    numbers = found if isinstance(found, dict) else run.args
    name = numbers.get('name') if isinstance(found, dict) else found
    shown = [f'{key.replace("_", " ")} {short(numbers[key])}' for key in NUMBERS if numbers.get(key) is not None]
    return f'{short(name)}: {", ".join(shown)}' if name and shown else short(name or 'not recorded')


def _describe_data(run: RunFolder) -> str:
    data = (run.record or {}).get('data', {})
    name = run.args.get('data', data.get('path', data.get('name')))
    absent = 'the built-in demonstration data' if run.kind == 'pretrain' else 'not recorded' if data else NOT_YET
    counts = data.get('counts') or {'': run.args.get('images')}
    parts = [counted(n, f'{PARTS[part]} image'.lstrip()) for part, n in counts.items() if part in PARTS and is_count(n)]
    digest = data.get('digest') or run.args.get('digest')
    return ', '.join(filter(None, [str(name or absent), ' and '.join(parts), digest and f'digest {digest}']))


def _list_recipe(a: dict[str, Any]) -> list[tuple[str, str]]:
    n = a['processes'] if isinstance(a.get('processes'), int) else 1
    return [
        ('Recipe', f'{a["recipe"]}: {a["epochs"]} epochs, batch {a["batch_size"]}, learning rate {a.get("lr")} per 256 '
                   f'samples, weight decay {a.get("weight_decay")}, views of {a["augmentation"].get("size")} px'),
        ('Seed', str(a['seed'])), ('Hardware', f'{counted(n, "process", "processes")}, precision {a.get("amp")}')]
