"""Every command and block of Python of README, docs and the help runs small, from the wheel, outside the clone."""
import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, TINY, build_wheel
from documents import Source, all_commands, all_python, read_commands
from stand_ins import write_data, write_weights

from simsiam_models import __version__
from simsiam_models.cli import COMMANDS, build_parser

pytestmark = pytest.mark.timeout(1000)  # the first test waits for all commands


# Lines, of Python one of a block, that another test runs as they are written: in a clone, on a cluster, for minutes.
ELSEWHERE = {
    'python3 -m pip install -e . && python3 train.py': 'test_train.py::test_digits_are_learned_without_labels',
    'python3 train.py': 'test_train.py::test_digits_are_learned_without_labels',
    'simsiam publish --all --dry-run FOLDER':
        'weights/test_publish.py::test_every_tag_is_written_from_its_authors_file_and_the_same_command_goes_on',
    '#!/bin/bash': 'test_slurm.py::test_the_script_of_the_docs_saves_and_queues_again_when_its_time_is_up',
    'python3 -c "import runpy, simsiam_models; runpy.run_path(\'validate.py\', run_name=\'__main__\')" '
    '--data-dir FOLDER --model simsiam_resnet50 --num-classes 10 --checkpoint output/train/RUN/model_best.pth.tar':
        'test_package.py::'
        'test_the_line_for_timms_scripts_makes_our_names_known_to_a_script_and_keeps_its_flags',
    'features = model(x)                                   # (1, 2048)':
        'test_package.py::test_the_first_block_of_the_readme_runs_as_written',
    "model = timm.create_model('local-dir:OUT', pretrained=True).eval()":
        'benchmarks/finetune/test_finetune.py::test_the_lines_of_the_docs_name_the_class_of_a_photo',
    'from simsiam_models.benchmarks import detection':
        'benchmarks/detection/test_detect.py::test_the_example_of_the_docs_runs',
    'from simsiam_models.benchmarks import segmentation':
        'benchmarks/segmentation/test_segment.py::test_the_example_of_the_docs_runs',
    "torch.hub.load('.', 'simsiam_r50', source='local', pretrained=False, tag='fb_bs256_ep100_in1k')":
        'test_hubconf.py::test_the_line_of_the_docs_runs_in_a_clone'}
# Lines that no test can run.
NOWHERE = {
    'simsiam atlas cifar --model runs/cifar --projection tsne pca umap --html cifar.html': 'for a figure',
    'python3 -m pip install -e \'.[test]\' && python3 -m pytest -n 2 --dist loadfile -m "not slow"': 'runs the tests',
    'python3 -m pytest -n 2 --dist loadfile -m "not slow"': 'runs the tests', 'python3 -m pytest -m slow': 'the same',
    'python3 -m pytest tests/weights': 'runs tests', 'python3 -m ruff check .': 'CI runs it',
    'python3 -m mypy': 'CI runs it',
    "python3 -m pip install -e '.[docs]' && python3 -m sphinx -W -n docs site": 'CI builds the site',
    "python3 -m pip install -e '.[test]'": 'CI installs the package', 'python3 -m pip install -e .': 'the same',
    'python3 -m venv .venv && . .venv/bin/activate': 'CI makes an environment',
    'python3 train.py --device-modules simsiam_models --data-dir FOLDER --model simsiam_resnet50.mm_ep200_in1k '
    '--pretrained --num-classes 10 --opt adamw --lr 5e-4 --layer-decay 0.8 --epochs 30':
        "timm's script, which its package lacks",
    "model = torch.hub.load('OWNER/simsiam_models', 'simsiam_r50', trust_repo=True)                      # _lin, _full":
        'asks GitHub; test_hubconf.py does the same with a clone',
    "backbone=dict(type='ResNet', depth=50, style='pytorch', "
    "init_cfg=dict(type='Pretrained', checkpoint='resnet50_mm.pth'))": 'a part of a configuration of mmdet'}
# The longest beginning of a command that stands here has the flags that make it small, unless it gives them itself.
CPU = '--device cpu --workers 0'
FEATURES = f'--image-size 32 {CPU}'
SMALL = {
    'weights': '', 'convert': '', 'publish': '', 'report': '', 'prepare': '--short-side 16 --workers 1',
    'pretrain': f'{shlex.join(TINY[2:])} --batch-size 16 --workers 0 --max-steps 2',
    'pretrain FOLDER --recipe small --output': f'{shlex.join(TINY[2:])} --batch-size 32 --workers 0',
    'pretrain IMAGENET --init-from':
        '--image-size 32 --eval-resize 32 --batch-size 4 --amp off --max-steps 1 --knn-every -1 ' + CPU,
    'pretrain --help': '', 'finetune --help': '',
    'atlas': FEATURES, 'atlas --features': CPU,
    'preflight': f'--recipe small --batch-size 16 --seconds 3 {CPU}',
    'knn': f'--allow-partial {FEATURES}',
    'linear': f'--epochs 1 --batch-size 8 --allow-partial {FEATURES}',
    'linear FOLDER --protocol auto': FEATURES, 'linear CIFAR10_FOLDER': f'--allow-partial {FEATURES}',
    'svm': f'--allow-partial --jobs 1 --taps feat5 --model resnet10t:random {FEATURES}',
    'finetune': f'--epochs 1 --batch-size 32 {FEATURES}',
    'finetune FOLDER --lr': f'--model resnet10t:random --epochs 1 --batch-size 32 {FEATURES}',
    'detect': '--model resnet10t:random --iterations 2 --batch-size 2 --image-size 64 --rois 8 --pool-size 4 '
              f'--proposals 20 --allow-partial {CPU}',
    'detect VOCdevkit --eval-only': f'--allow-partial {CPU}',
    'segment': f'--model resnet10t:random --iterations 2 --batch-size 2 --image-size 64 --head-channels 8 '
               f'--allow-partial {CPU}',
    'segment VOCdevkit --eval-only': f'--allow-partial {CPU}',
    'predict': CPU, 'embed': FEATURES, 'neighbours': FEATURES, 'neighbours --features': ''}
# What code finds where it reads, from an earlier command: the page and subcommand that wrote it, and its name.
WRITTEN = {
    'pretrain my_photos_256': 'data/prepare/my_photos_256', 'runs/mine': 'pretraining/pretrain/runs/mine',
    'checkpoint.pth': 'pretraining/pretrain/runs/mine/checkpoint.pth',
    'runs/cifar10': 'pretraining/pretrain/runs/cifar10',
    'predict OUT': 'benchmarks/finetune/finetune/OUT', 'runs/photos': 'benchmarks/finetune/finetune/OUT',
    'runs/classifier': 'benchmarks/finetune/finetune/OUT', 'runs/detector': 'benchmarks/index/detect/OUT',
    'runs/segmenter': 'benchmarks/index/segment/OUT', 'results': 'benchmarks/index/linear/results',
    'runs/rates': 'benchmarks/finetune/finetune/runs/rates', 'report runs': 'benchmarks/detection/detect/runs',
    'runs/demo': 'look/report/pretrain/runs/demo',
    'resnet50.pth': 'libraries/convert/resnet50.pth', 'resnet50.onnx': 'libraries/convert/resnet50.onnx',
    'features.parquet': 'look/neighbours/embed/features.parquet'}
# Words that cannot stay: a placeholder for no file, and sizes of which a flag cannot be given twice.
REPLACED = {
    ' TAG': ' mm_ep200_in1k', '--seconds 60': '--seconds 3', '--image-size 240': '--image-size 96',
    '--nproc-per-node 8': '--standalone --local-addr 127.0.0.1 --nproc-per-node 2'}
WRITES = {'--output', '--out', '--dry-run', '--html'}  # the next word is no input
# Runs the commands of a plan one after the other in one process, and writes what became of them.
DRIVER = '''
import contextlib, io, json, os, subprocess, sys, traceback
import torch
from simsiam_models import __file__ as package, cli
plan, results, scopes = json.load(open(sys.argv[1])), [], {}
torch.set_num_threads(1)
for job in plan['jobs']:
    os.chdir(job['folder'])
    for name, target in job['links'].items():
        if not os.path.lexists(name):
            os.makedirs(os.path.dirname(name) or '.', exist_ok=True)
            os.symlink(target, name)
    said = io.StringIO()
    if 'command' in job:
        words = subprocess.run(['bash', '-c', "printf '%s\\\\0' " + job['command']], stdout=subprocess.PIPE, check=True)
        sys.argv = words.stdout.decode().split('\\0')[:-1]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            if 'python' in job:
                exec(job['python'], scopes.setdefault(job['folder'], {}))
            code = cli.main(sys.argv[1:]) if 'command' in job else 0
        except SystemExit as e:
            code = e.code
        except BaseException:
            code = traceback.format_exc()
    results.append({'code': code, 'said': said.getvalue(), 'package': package})
    with open(plan['results'], 'w') as file:
        json.dump(results, file)
'''


def walk(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from walk(subparser)


def read_help() -> Iterator[Source]:
    for parser in walk(build_parser()):
        for line in f'{parser.description}\n{parser.epilog}'.splitlines():
            if command := re.match(r'(?:example: |  )((simsiam|torchrun)\b.*?)(\s{2,}|$)', line):
                yield Source('help', command[1].strip())


def collect() -> list[Source]:
    """Returns each command once; those that write what others read come first."""
    found: dict[str, Source] = {}
    for source in (*all_commands(), *read_help()):
        found.setdefault(source.text, source)
    order = ['prepare', 'pretrain', *dict.fromkeys(name.split()[0] for name in COMMANDS)]
    return sorted(
        (source for source in found.values() if source.text not in {**ELSEWHERE, **NOWHERE}),
        key=lambda source: order.index(find_subcommand(source.text)))


def collect_python() -> list[Source]:
    listed = {**ELSEWHERE, **NOWHERE}
    return [source for source in all_python() if not any(line in listed for line in source.text.splitlines())]


def find_flags(command: str, table: dict[str, str]) -> list[str]:
    """Returns the words to append; raises KeyError for a subcommand that the table lacks."""
    words = shlex.split(command)
    begun = max((k for k in table if f'{" ".join(words[1:])} '.startswith(f'{k} ')), key=len, default=None)
    if begun is None:
        raise KeyError(f'{command}: give it flags that make it small in SMALL, or the test that runs it in ELSEWHERE')
    groups: list[list[str]] = []
    for word in shlex.split(table[begun]):
        groups.append([word]) if word.startswith('--') else groups[-1].append(word)
    return [word for group in groups if group[0] not in words for word in group]


def shrink(command: str) -> str:
    for old, new in REPLACED.items():
        command = command.replace(old, new)
    return command


def find_links(command: str, places: dict[str, str]) -> dict[str, str]:
    """Returns the names that a command reads -> the files that stand in for them."""
    words, found = shlex.split(command), {}
    subcommand = find_subcommand(command)
    for before, word in zip(words, words[1:], strict=False):
        name = word if word in places else word.split('/')[0]
        if before not in WRITES and (target := places.get(f'{subcommand} {word}', places.get(name))):
            found[name] = target
    return {} if subcommand == 'convert' and found.pop('OUT', None) else found


def find_subcommand(command: str) -> str:
    words = shlex.split(command)
    return words[words.index('simsiam_models' if words[0] == 'torchrun' else 'simsiam') + 1]


class Installed(NamedTuple):
    """A wheel's folder, and an environment in which Python finds it and nothing reaches beyond this machine."""

    site: Path
    work: Path
    torch: Path  # torch.hub's cache
    env: dict[str, str]

    def run(self, *words: str | Path, folder: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*map(str, words)], cwd=folder or self.work, env=self.env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope='module')
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp('installed')
    site, work = folder / 'site', folder / 'work'
    subprocess.run(
        [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', str(site),
         str(build_wheel(folder / 'wheel'))], check=True, timeout=120)
    work.mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ('HF_TOKEN', 'SIMSIAM_HUB_NAMESPACE')}
    return Installed(site, work, folder / 'torch/hub/checkpoints', {
        **env, 'PYTHONPATH': str(site), 'TORCH_HOME': str(folder / 'torch'), 'HF_HOME': str(folder / 'hf'),
        'SIMSIAM_CACHE': str(folder / 'cache'), 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1',
        'CUDA_VISIBLE_DEVICES': '', 'PYTHONDONTWRITEBYTECODE': '1'})


@pytest.fixture(scope='module')
def places(tmp_path_factory: pytest.TempPathFactory, installed: Installed) -> dict[str, str]:
    """What commands name -> the file or folder that stands in for it."""
    folder = tmp_path_factory.mktemp('stand_ins')
    written = {name: installed.work / path for name, path in WRITTEN.items()}
    made = {**write_data(folder / 'data'), **write_weights(folder / 'weights', installed.torch), **written}
    return {name: str(path) for name, path in made.items()}


@pytest.fixture(scope='module')
def results(installed: Installed, places: dict[str, str]) -> dict[str, dict]:
    """Command or block of Python -> what became of it."""
    jobs, work = [], installed.work
    commands = [source for source in collect() if source.text.startswith('simsiam ')]
    for source in commands:
        flags = shlex.join(find_flags(source.text, SMALL))
        jobs.append({
            'folder': work / source.page / find_subcommand(source.text), 'links': find_links(source.text, places),
            'command': f'{shrink(source.text)} {flags}'})
    for source in collect_python():
        links = {name: place for name, place in places.items() if re.search(f"[':]{re.escape(name)}['/]", source.text)}
        jobs.append({'folder': work / source.page / 'python', 'links': links, 'python': source.text})
    for job in jobs:
        job['folder'].mkdir(parents=True, exist_ok=True)
    plan = work / 'plan.json'
    plan.write_text(json.dumps({'jobs': jobs, 'results': work / 'results.json'}, default=str))
    done = installed.run(sys.executable, '-c', DRIVER, plan, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads((work / 'results.json').read_text())
    sources = [*commands, *collect_python()]
    return {source.text: result for source, result in zip(sources, found, strict=True)}


@pytest.mark.parametrize('command', [s.text for s in collect() if s.text.startswith('simsiam ')])
def test_a_command_runs_as_it_is_written(command: str, results: dict[str, dict], installed: Installed):
    result = results[command]
    assert result['code'] in (0, None) and 'Traceback' not in result['said'], f'{result["code"]}\n{result["said"]}'
    assert Path(result['package']).is_relative_to(installed.site)


@pytest.mark.parametrize('source', collect_python(), ids=lambda source: f'{source.page}: {source.text.splitlines()[0]}')
def test_a_block_of_python_runs_as_it_is_written(source: Source, results: dict[str, dict]):
    assert results[source.text]['code'] == 0, results[source.text]['code']


@pytest.mark.parametrize('command', [s.text for s in collect() if s.text.startswith('torchrun ')])
def test_a_command_of_torchrun_runs_with_two_processes(command: str, places: dict[str, str], installed: Installed):
    folder = installed.work / 'torchrun' / find_subcommand(command)
    folder.mkdir(parents=True)
    for name, target in find_links(command, places).items():
        (folder / name).symlink_to(target)
    words = ['-m', 'torch.distributed.run', *shlex.split(shrink(command))[1:]]
    small = find_flags(command[command.index('simsiam_models'):], SMALL)
    done = installed.run(sys.executable, *words, *small, folder=folder, timeout=200)
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stdout + done.stderr


def test_the_wheel_has_the_command_and_the_module(installed: Installed):
    said = installed.run(installed.site / 'bin/simsiam', '--version').stdout
    assert said.startswith(f'simsiam_models {__version__}\n')
    done = installed.run(sys.executable, '-m', 'simsiam_models', '--help')
    assert done.returncode == 0 and '\n    pretrain ' in done.stdout, done.stderr


def test_lines_that_other_tests_run_are_on_the_pages_and_so_are_the_tests():
    lines = {source.text for source in all_commands()} | {
        line for source in all_python() for line in source.text.splitlines()}
    assert lines >= {*ELSEWHERE, *NOWHERE}
    for test in ELSEWHERE.values():
        file, name = test.split('::')
        assert f'def {name}(' in (ROOT / 'tests' / file).read_text()


def test_every_command_is_one_that_a_test_runs():
    for source in collect():
        assert re.match('simsiam |torchrun ', source.text), source


def test_a_new_line_is_found_and_asks_for_its_size():
    text = '# A\n`simsiam knn X`, `simsiam knn`\n```bash\nsimsiam new \\\n  X # x\n```\n```python\nsimsiam(x)\n```\n'
    assert [*read_commands('A', text)] == [('A', 'simsiam knn X'), ('A', 'simsiam new X')]
    with pytest.raises(KeyError, match='give it flags that make it small'):
        find_flags('simsiam new X', SMALL)
    assert find_flags('simsiam a --lr 1', {'a': '--lr 2 --b 3 4'}) == ['--b', '3', '4']


def test_every_argument_has_a_help_text():
    for parser in walk(build_parser()):
        for action in parser._actions:
            if not isinstance(action, argparse._SubParsersAction):
                assert action.help and action.help != argparse.SUPPRESS, f'{parser.prog}: {action.metavar}'
