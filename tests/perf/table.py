"""The table of gpu.py: each figure, and its bar with `reached` or `missed`."""
import statistics
from typing import Any

from together import memory_bound

EPOCHS = 800  # of the CIFAR-10 recipe


def make_table(found: dict[str, Any]) -> str:
    """Returns the table as lines of text, from what the parts have found; figures that are missing are left out."""
    m, sizes = found['machine'], found['sizes']
    took = found['seconds']
    lines = [
        f'{m["card"]}, {m["cores"]} cores, torch {m["torch"]}, CUDA {m["cuda"]}, Python {m["python"]}, {m["date"]}, '
        f'load {m["load"][0]:.1f}',
        f'recipe {sizes["recipe"]}, batch {sizes["batch"]}; medians of {sizes["rounds"]} rounds of {sizes["steps"]} '
        f'steps; {took:.0f} s in all (bar 540: {_verdict(took < 540)})']
    for add in (_copy, _data, _together, _steps, _cifar, _knn, _tests):
        part = add.__name__.strip('_').replace('steps', 'step')
        if part not in found:
            continue
        try:
            lines += add(found)
        except KeyError:
            lines.append(f'{part}: incomplete')
        if 'error' in found[part]:
            lines.append(f'{part}: {found[part]["error"]}')
    return '\n'.join(lines) + '\n'


def _verdict(reached: bool) -> str:
    return 'reached' if reached else 'missed'


def _row(name: str, value: str, bar: str = '', reached: bool = False) -> str:
    return f'{name:44}{value:>24}' + (f'   {bar}: {_verdict(reached)}' if bar else '')


def _copy(found: dict[str, Any]) -> list[str]:
    return [_row('copy rate of the card', f'{found["copy"]["bytes_per_s"] / 1e12:.2f} TB/s')]


def _data(found: dict[str, Any]) -> list[str]:
    d = found['data']
    return [
        _row(f'JPEG -> two crops, {d["threads"]} threads', f'{d["images_per_s"]["crops"]:.0f} images/s'),
        _row('JPEG -> two views on the device', f'{d["images_per_s"]["views"]:.0f} images/s'),
        *(_row(f'augmentation of a batch, {name}', f'{1e3 * d[f"augmentation_{name}_s"]:.2f} ms' + (
            f', {d[f"kernels_{name}"]} kernels' if f'kernels_{name}' in d else '')) for name in (
                'compiled', 'uncompiled'))]


def best(part: dict[str, Any]) -> dict[str, Any]:
    """Returns the faster of the eager and the compiled bench: what the trial of a run would take."""
    return max((part[k] for k in ('eager', 'compiled') if k in part), key=lambda b: b['samples_per_s']['step alone'])


def _benches(part: dict[str, Any]) -> list[str]:
    return [
        _row(f'{task}, {name}, amp {part[name]["amp"]}', f'{rate:.0f} pairs/s')
        for name in ('eager', 'compiled') if name in part for task, rate in part[name]['samples_per_s'].items()]


def _together(found: dict[str, Any]) -> list[str]:
    part = found['together']
    if not {'eager', 'compiled'} & {*part}:
        raise KeyError
    b, sizes = best(part), found['sizes']
    rate, share = b['samples_per_s']['together'], b['augmentation_s'] / b['step_s']
    lines = [
        *_benches(part), _row('end to end, the faster way', f'{rate:.0f} pairs/s', 'bar 1800', rate >= 1800),
        _row('', '', 'aim 2500', rate >= 2500),
        _row('waiting for data', f'{100 * b["waiting"]:.1f} %', 'bar 2 %', b['waiting'] < 0.02),
        _row('augmentation / step', f'{100 * share:.1f} %', 'bar 3 %', share <= 0.03)]
    if 'peak_bytes' in b:
        lines.append(_row('peak memory', f'{b["peak_bytes"] / 2**30:.1f} GiB'))
    if 'bytes_per_s' in found.get('copy', {}):
        low, high = memory_bound(sizes['batch'], 224, found['copy']['bytes_per_s'])
        lines.append(_row('step / shortest that memory allows', (
            f'{1e3 * b["step_s"]:.0f} / {1e3 * low:.0f}..{1e3 * high:.0f} ms')))
    return lines


def _steps(found: dict[str, Any]) -> list[str]:
    lines = []
    for name, f in found['step']['steps'].items():
        ms = statistics.median(f['ms']) if f['ms'] else None
        text = f['error'][:60] if ms is None else f'{ms:.0f} ms, {1e3 * found["step"]["batch"] / ms:.0f} pairs/s'
        peak = f', {f["peak_bytes"] / 2**30:.0f} GiB' if 'peak_bytes' in f and ms is not None else ''
        lines.append(_row(f'step alone: {name}{peak}', text))
    return lines


def _cifar(found: dict[str, Any]) -> list[str]:
    part = found['cifar']
    if not {'eager', 'compiled'} & {*part}:
        raise KeyError
    sizes, b = found['sizes'], best(part)
    steps = sizes['cifar'] // sizes['cifar_batch']  # per epoch
    epoch = steps * sizes['cifar_batch'] / b['samples_per_s']['together']  # seconds
    return [
        *(f'CIFAR-10 R18, {line}' for line in _benches(part)),
        _row('CIFAR-10 R18, crops cut by the CPU', f'{60 / epoch:.1f} epochs/min'),
        _row(f'CIFAR-10 R18, {EPOCHS} epochs, extrapolated', f'{EPOCHS * epoch / 60:.0f} min', 'bar 60 min',
             EPOCHS * epoch < 3600)]


def _knn(found: dict[str, Any]) -> list[str]:
    sizes, seconds = found['sizes'], found['knn']['seconds']
    return [_row(f'kNN {sizes["bank"]} x {sizes["width"]}, {sizes["queries"]} queries', f'{seconds:.1f} s', 'bar 10 s',
                 seconds < 10)]


def _tests(found: dict[str, Any]) -> list[str]:
    t = found['tests']
    bad = t['failures'] + t['errors']
    return [_row('GPU tests', f'{t["tests"]} run, {t["skipped"]} skipped, {bad} failed', 'bar all',
                 not bad and not t['skipped'])]
