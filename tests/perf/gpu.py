"""Measures everything on one GPU, each part in a process with its own time limit; started by gpu.sh, which see.

Results are written after each part, so one that fails or takes too long costs only its own figures.
"""
import argparse
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import step
import torch
from table import make_table
from together import Bench, copy_rate, make_noise, median_time, open_images

from simsiam_models.benchmarks.search import find_neighbours
from simsiam_models.data import Images, TwoViews, kernel
from simsiam_models.data.augment import finish
from simsiam_models.data.readers import decode
from simsiam_models.runtime.distributed import cores, synchronize
from simsiam_models.training.recipes import RECIPES, Recipe
from simsiam_models.training.step import Perf

ROOT = Path(__file__).resolve().parents[2]
Save = Callable[[dict[str, Any]], None]  # keeps what a part has found so far


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured: by default, what the bars are about."""

    device: str = 'cuda'
    recipe: str = 'in1k_bs512_ep100'
    batch: int = 512
    steps: int = 10
    rounds: int = 3
    copy: int = 1 << 31  # bytes
    bank: int = 1_281_167
    queries: int = 50_000
    width: int = 2048
    cifar_recipe: str = 'cifar10_ep800'
    cifar_batch: int = 512
    cifar: int = 50_000  # images

    def resolve(self, cifar: bool = False) -> Recipe:
        name, batch = (self.cifar_recipe, self.cifar_batch) if cifar else (self.recipe, self.batch)
        return dataclasses.replace(RECIPES[name], batch_size=batch)


SMOKE = Sizes(
    'cpu', 'demo', 4, 1, 1, copy=1 << 16, bank=600, queries=20, width=16, cifar_recipe='demo', cifar_batch=4, cifar=16)


def measure_copy(sizes: Sizes, images: Images, save: Save) -> None:
    """The rate at which the card copies its own memory."""
    save({'bytes_per_s': copy_rate(torch.device(sizes.device), sizes.copy)})


def measure_data(sizes: Sizes, images: Images, save: Save) -> None:
    """JPEG -> crops, JPEG -> finished views; the augmentation on the card alone, compiled and not, and its kernels."""
    device, recipe = torch.device(sizes.device), sizes.resolve()
    views = TwoViews(images, recipe.augmentation, recipe.batch_size, device=device, workers=cores(), on_device=True)
    found: dict[str, Any] = {'threads': cores(), 'kernel': kernel.load_library() is not None,
                             'simplejpeg': decode.simplejpeg is not None}
    rates: dict[str, list[float]] = {'crops': [], 'views': []}
    for round_ in range(1 + sizes.rounds):
        for name, load in (('crops', views.batches), ('views', views.epoch)):
            batches = load(round_)
            next(batches)  # as many batches are under way now as at the end
            start = time.perf_counter()
            n = sum(recipe.batch_size for _ in itertools.islice(batches, sizes.steps))
            synchronize(device)
            rates[name].append(n / (time.perf_counter() - start))
            batches.close()
    found['images_per_s'] = {name: statistics.median(r[1:]) for name, r in rates.items()}
    save(found)
    x, sent = views._copy(next(views.batches(0)))
    for name, colours in (('compiled', views._colours), ('uncompiled', None)):
        found[f'augmentation_{name}_s'] = median_time(
            lambda *_, colours=colours: finish(x, sent, colours), (x, x))
        save(found)
    if device.type == 'cuda':
        for name, colours in (('compiled', views._colours), ('uncompiled', None)):
            with torch.profiler.profile() as profile:
                finish(x, sent, colours)
                synchronize(device)
            found[f'kernels_{name}'] = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())
            save(found)


def measure_together(sizes: Sizes, images: Images, save: Save, cifar: bool = False) -> None:
    """The step alone, the data alone, and both together, without and with torch.compile."""
    found = {}
    if cifar:
        images = make_noise(sizes.cifar, RECIPES[sizes.cifar_recipe].augmentation.size)
    for name, perf in (('eager', Perf()), ('compiled', Perf(compile=True))):
        if sizes.device == 'cuda':
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        bench = Bench(
            images, sizes.resolve(cifar), sizes.device, workers=cores(), steps=sizes.steps * (4 if cifar else 1),
            perf=perf)
        found[name] = bench.measure(sizes.rounds)
        bench.stream.close()
        del bench
        save(found)


def measure_step(sizes: Sizes, images: Images, save: Save) -> None:
    """The step alone, in the precisions, with both memory formats, and compiled last, since that may take too long."""
    found, smoke = {}, sizes is SMOKE
    eager = [n for n in (step.PLAIN, *step.OURS) if 'compiled' not in n and (not smoke or n in step.USUAL)]
    for names in (eager, ['ours bf16, compiled']):
        found.update(step.measure(
            sizes.resolve(), torch.device(sizes.device), names, 1 if smoke else 3, sizes.rounds))
        save({'batch': sizes.batch, 'steps': found})


def measure_knn(sizes: Sizes, images: Images, save: Save) -> None:
    """The 200 nearest of ImageNet's size, from features in host memory."""
    generator = torch.Generator(sizes.device).manual_seed(0)
    centres = torch.randn(1000, sizes.width, generator=generator, device=sizes.device)

    def make(n: int) -> np.ndarray:
        x = np.empty((n, sizes.width), np.float32)
        for i in range(0, n, 1 << 16):
            of = torch.randint(1000, (len(x[i:i + (1 << 16)]),), generator=generator, device=sizes.device)
            noise = torch.randn(len(of), sizes.width, generator=generator, device=sizes.device)
            x[i:i + len(of)] = (centres[of] / 2 + noise).relu_().cpu().numpy()
        return x

    bank, queries = make(sizes.bank), make(sizes.queries)
    find_neighbours(bank[:500], queries[:10], 10, sizes.device)  # loads the libraries
    start = time.perf_counter()
    found, cosines = find_neighbours(bank, queries, min(200, sizes.bank), sizes.device)
    save({'seconds': time.perf_counter() - start, 'first_cosines': cosines[:5, 0].tolist()})


def run_tests(sizes: Sizes, images: Images, save: Save, out: Path) -> None:
    """The tests that need a card."""
    report = out / 'pytest.xml'
    with open(out / 'pytest.log', 'w') as log:
        subprocess.run(
            [sys.executable, '-m', 'pytest', '-q', '-m', 'gpu', '-p', 'no:cacheprovider', f'--junitxml={report}',
             'tests/test_gpu.py'], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    suite = ElementTree.parse(report).getroot().find('testsuite')
    report.unlink()
    save({name: int(suite.get(name)) for name in ('tests', 'failures', 'errors', 'skipped')})


PARTS = {  # name -> seconds it may take, what it does; the most important first
    'copy': (20, measure_copy), 'data': (60, measure_data), 'together': (140, measure_together),
    'step': (110, measure_step), 'cifar': (60, functools.partial(measure_together, cifar=True)),
    'knn': (60, measure_knn), 'tests': (120, run_tests)}
LIMIT = 525  # seconds for all of them


def run_part(name: str, sizes: Sizes, images: Images, out: Path, limit: float) -> dict[str, Any]:
    """Runs a part in a process group of its own; returns what it has saved, its seconds, and its error, if any."""
    kept, start = out / f'{name}.part', time.monotonic()
    if limit < 1:
        return {'error': 'no time was left'}

    def save(found: dict[str, Any]) -> None:
        kept.with_suffix('.new').write_text(json.dumps(found))
        kept.with_suffix('.new').replace(kept)

    def work() -> None:
        os.setpgid(0, 0)
        PARTS[name][1](sizes, images, save, **({'out': out} if name == 'tests' else {}))

    process = multiprocessing.get_context('fork').Process(target=work)
    process.start()
    process.join(limit)
    error = None if process.exitcode == 0 else f'exit status {process.exitcode}; its error is above'
    if process.exitcode is None:
        error = f'stopped after {limit:.0f} s'
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    found = json.loads(kept.read_text()) if kept.exists() else {}
    kept.unlink(missing_ok=True)
    return {**found, 'seconds_of_part': time.monotonic() - start, **({'error': error} if error else {})}


def describe_machine(device: str) -> dict[str, Any]:
    """Describes the machine; CUDA is asked in another process, since a process that has used it cannot fork."""
    card = ''
    if device == 'cuda':
        code = 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")'
        card = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip()
        if not card:
            sys.exit('gpu.py: torch sees no CUDA device here; --smoke runs on a CPU')
    return {
        'card': card or 'no card', 'cores': cores(), 'load': os.getloadavg(), 'torch': torch.__version__,
        'cuda': torch.version.cuda, 'python': platform.python_version(), 'date': time.strftime('%Y-%m-%d')}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, help='images (default: generated JPEGs)')
    parser.add_argument('--out', type=Path, default=Path(os.environ.get('OUT', 'gpu_results')))
    parser.add_argument('--batch', type=int, help='samples per step, for a card with less memory (default: 512)')
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS))
    parser.add_argument('--smoke', action='store_true', help='tiny sizes, on a CPU, nothing compiled')
    args = parser.parse_args()
    start, sizes = time.monotonic(), SMOKE if args.smoke else Sizes(**({'batch': args.batch} if args.batch else {}))
    if args.smoke:
        torch._dynamo.config.disable = True
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {'sizes': dataclasses.asdict(sizes), 'machine': describe_machine(sizes.device)}
    with tempfile.TemporaryDirectory() as made:
        os.environ['SIMSIAM_CACHE'] = f'{made}/cache'
        images = open_images(args.data, Path(made) / 'jpegs', sizes.batch)
        kernel.load_library()  # before the fork, so once
        for name in args.parts:
            limit = min(PARTS[name][0], LIMIT - (time.monotonic() - start))
            print(f'--- {name} (at most {limit:.0f} s)', flush=True)
            found[name] = run_part(name, sizes, images, args.out, limit)
            (args.out / 'gpu.json').write_text(json.dumps(found, indent=1))
    found['seconds'] = time.monotonic() - start
    table = make_table(found)
    (args.out / 'gpu.json').write_text(json.dumps({**found, 'table': table}, indent=1))
    (args.out / 'table.txt').write_text(table)
    print(table)
    sys.exit(any('error' in found[name] for name in args.parts))


if __name__ == '__main__':
    main()
