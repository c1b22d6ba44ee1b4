"""Plays a practitioner who has a folder of photographs, one subfolder per class: every step by the installed command.

    python tests/practitioner.py PHOTOS WORK      PHOTOS: a folder or a tar of it; WORK: a new folder for all outputs

Prints a table of the steps with wall time and figures. Copies of PLANTED photographs are planted for `neighbours`, and
what it finds is compared with them. Needs the extras benchmarks, data and plots. Not a test of pytest's.
"""
import csv
import json
import random
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from PIL import Image, ImageOps

PLANTED = 20
KINDS = {  # how a copy is made
    'exact': lambda image, path: None,
    'recompressed': lambda image, path: image.save(path, quality=40),
    'half': lambda image, path: image.resize((image.width // 2, image.height // 2)).save(path, quality=90),
    'png': lambda image, path: image.save(path.with_suffix('.png')),
    'mirrored': lambda image, path: ImageOps.mirror(image).save(path, quality=90)}


def run(name: str, *words: str | Path) -> str:
    """Runs a subcommand of simsiam; returns what it prints."""
    began = time.perf_counter()
    done = subprocess.run(['simsiam', name, *map(str, words)], capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f'simsiam {name}: exit code {done.returncode}\n{done.stdout}{done.stderr}')
    print(f'{name:11}{seconds:6.0f} s', end='  ', flush=True)
    return done.stdout


def plant(photos: Path, target: Path) -> dict[str, tuple[str, str]]:
    """Copies the photographs, and plants copies of some; returns name of the copy -> its original's, and its kind."""
    shutil.copytree(photos, target)
    files = random.Random(0).sample(sorted(target.rglob('*.jpg')), PLANTED)
    planted = {}
    for number, path in enumerate(files):
        with Image.open(path) as image:
            image = image.convert('RGB')
        for kind, save in KINDS.items():
            copy = path.with_name(f'copy{number}-{kind}.jpg')
            if kind == 'exact':
                shutil.copy(path, copy)
            save(image, copy)
            planted[copy.with_suffix('.png' if kind == 'png' else '.jpg').name] = path.name, kind
    return planted


def compare_copies(file: Path, planted: dict[str, tuple[str, str]]) -> str:
    """Returns how many planted copies are in one group with their originals, and what else is called a copy."""
    groups: dict[str, set[str]] = {}
    with open(file, newline='') as f:
        for row in csv.DictReader(f):
            groups.setdefault(row['group'], set()).update(Path(row[k]).name for k in ('path', 'original'))
    found = [name for name, (original, _) in planted.items() if any({name, original} <= g for g in groups.values())]
    true = set(planted) | {original for original, _ in planted.values()}
    false = [sorted(group - true) for group in groups.values() if group - true]
    by_kind = {kind: sum(planted[name][1] == kind for name in found) for kind in KINDS}
    kinds = ', '.join(f'{kind} {n} of {PLANTED}' for kind, n in by_kind.items())
    return f'copies found: {kinds}; other groups or members: {len(false)} {false[:5] if false else ""}'


def main(photos: Path, work: Path) -> None:
    began = time.perf_counter()
    work.mkdir(parents=True)
    if photos.is_file():
        with tarfile.open(photos) as tar:
            tar.extractall(work / 'photos', filter='data')
        photos = work / 'photos'
    planted = plant(photos, work / 'with_copies')

    said = run('preflight', photos, '--seconds', 60)
    commands = [line.strip() for line in said.splitlines() if line.strip().startswith('simsiam ')]
    print(f'recommends {" and ".join(commands)}')
    said = run('pretrain', photos, '--recipe', 'small', '--epochs', 20, '--output', work / 'runs/pretrained')
    print(next(line for line in said.splitlines() if 'trained backbone' in line))
    run('finetune', photos, '--model', work / 'runs/pretrained', '--epochs', 20, '--output', work / 'runs/classifier')
    record = json.loads((work / 'runs/classifier/record.json').read_text())
    print(f'top-1 {record["metrics"]["top1"]:.1f} % of {record["data"]["counts"]["test"]} held-out photographs')
    run('predict', work / 'runs/classifier', photos, '--output', work / 'labels.csv')
    with open(work / 'labels.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    right = sum(row['label'] == Path(row['path']).parent.name for row in rows)
    print(f'{len(rows)} photographs, {right} with the label of their folder (most of them were trained on)')
    said = run('neighbours', work / 'with_copies', '--model', work / 'runs/pretrained', '--output', work / 'near.csv',
               '--html', work / 'near.html')
    print(compare_copies(work / 'near-copies.csv', planted))
    print(''.join(f'{"":20}{line}\n' for line in said.splitlines()), end='')
    run('embed', photos, '--model', work / 'runs/pretrained', '--output', work / 'features.parquet', '--tsne')
    print(f'features.parquet {(work / "features.parquet").stat().st_size:,} bytes')
    said = run('report', work / 'runs')
    print(said.splitlines()[0] if said else '')
    print(f'in all     {time.perf_counter() - began:6.0f} s')


if __name__ == '__main__':
    main(*map(Path, sys.argv[1:]))
