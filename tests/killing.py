"""train.py with an accident in it: `python tests/killing.py ACCIDENT COUNT ARGS...` (see ACCIDENTS below).

Where the environment names a file MARKER, an accident happens only once: to whoever creates that file.
"""
import errno
import json
import os
import resource
import runpy
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from simsiam_models.data import FolderImages, TwoViews
from simsiam_models.data.readers import images as sources
from simsiam_models.runtime import checkpoint
from simsiam_models.training import autoperf
from simsiam_models.training.monitor import KnnMonitor

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


def die() -> None:
    marker = os.environ.get('MARKER')
    if marker:
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, count: int, do: Callable[[], None], after: bool = False) -> None:
    """`do` before, or after, call number `count` of owner.name."""
    real, calls = getattr(owner, name), [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count and not after:
            do()
        result = real(*args, **kwargs)
        if calls[0] == count and after:
            do()
        return result
    setattr(owner, name, call)


def in_write(count: int) -> None:
    """In the middle of checkpoint `count`: half of its bytes are there."""
    real, calls = torch.save, [0]

    class Half:
        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 50_000

        def write(self, data: Any) -> int:
            if len(data) > self.left:
                self.file.write(memoryview(data)[:self.left])
                self.file.file.flush()
                os.fsync(self.file.file.fileno())
                die()
            self.left -= len(data)
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    def save(state: Any, file: Any) -> None:
        calls[0] += 1
        real(state, Half(file) if calls[0] == count else file)
    torch.save = save


def full_disk(count: int) -> None:
    """No file may grow past 20 kB from optimizer step `count` on."""
    at_call(torch.optim.SGD, 'step', count, lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)))


def full_for_a_while(count: int) -> None:
    full_disk(count)
    at_call(torch.optim.SGD, 'step', count + 4, lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)))


def vanished(count: int) -> None:
    """The run's folder is gone from step `count` on, for four steps: a link to a mount that is lost for a while."""
    folder = Path(sys.argv[sys.argv.index('--output') + 1])
    away = folder.with_name(folder.name + '-away')

    def lose() -> None:
        folder.rename(away)
        folder.symlink_to('no such mount')

    at_call(torch.optim.SGD, 'step', count, lose)
    at_call(torch.optim.SGD, 'step', count + 4, lambda: away.replace(folder) if folder.unlink() is None else None)


def deleted(count: int) -> None:
    """The run's folder is deleted at step `count`."""
    at_call(torch.optim.SGD, 'step', count, lambda: shutil.rmtree(sys.argv[sys.argv.index('--output') + 1]))


def signals(number: int) -> Callable[[int], None]:
    return lambda count: at_call(torch.optim.SGD, 'step', count, lambda: os.kill(os.getpid(), number))


def on_rank_1(accident: Callable[[int], None]) -> Callable[[int], None]:
    return lambda count: accident(count) if os.environ.get('RANK') == '1' else None


def no_mount() -> None:
    raise FileNotFoundError('no such mount')


def fail(error: Exception) -> Callable[[], None]:
    def do() -> None:
        raise error
    return do


def no_number(count: int) -> None:
    """The weights overflow at step `count`."""
    real, calls = torch.optim.SGD.step, [0]

    def step(self: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        calls[0] += 1
        if calls[0] == count:
            with torch.no_grad():
                self.param_groups[0]['params'][0].fill_(float('nan'))
        return result
    torch.optim.SGD.step = step


ACCIDENTS: dict[str, Callable[[int], None]] = {
    'none': lambda count: None,
    'read': lambda count: at_call(FolderImages, 'read', count, die),
    'batch': lambda count: at_call(TwoViews, 'finish', count, die),
    'backward': lambda count: at_call(torch.Tensor, 'backward', count, die),
    'before step': lambda count: at_call(torch.optim.SGD, 'step', count, die),
    'after step': lambda count: at_call(torch.optim.SGD, 'step', count, die, after=True),
    'before write': lambda count: at_call(torch, 'save', count, die),
    'in write': in_write,
    'after write': lambda count: at_call(torch, 'save', count, die, after=True),
    'before sync': lambda count: at_call(os, 'fsync', count, die),
    'after sync': lambda count: at_call(os, 'fsync', count, die, after=True),
    'before rename': lambda count: at_call(os, 'replace', count, die),
    'after rename': lambda count: at_call(os, 'replace', count, die, after=True),
    'in load': lambda count: at_call(checkpoint, 'read', count, die),
    'I/O error in load': lambda count: at_call(
        zipfile.ZipFile, 'testzip', count, fail(OSError(errno.EIO, os.strerror(errno.EIO)))),
    'no memory in load': lambda count: at_call(torch, 'load', count, fail(MemoryError())),
    'SIGTERM': signals(signal.SIGTERM),
    'SIGINT': signals(signal.SIGINT),
    'SIGUSR1': signals(signal.SIGUSR1),
    'SIGTERM in the trial': lambda count: at_call(
        autoperf, 'time_step', count, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    'SIGINT before the first checkpoint': lambda count: at_call(
        KnnMonitor, 'measure_before', count, lambda: os.kill(os.getpid(), signal.SIGINT)),
    'SIGTERM twice': lambda count: [signals(signal.SIGTERM)(count) for _ in range(2)],
    'rank 1 dies': on_rank_1(lambda count: at_call(torch.optim.SGD, 'step', count, die)),
    'SIGTERM on rank 1': on_rank_1(signals(signal.SIGTERM)),
    'no data on rank 1': on_rank_1(lambda count: at_call(sources, 'open_index', 1, no_mount)),
    'full disk': full_disk,
    'full from the start': lambda count: at_call(torch, 'save', 1, lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))),
    'full for a while': full_for_a_while,
    'vanished': vanished,
    'deleted': deleted,
    'no number': no_number,
}


def note_samples() -> None:
    """Each batch that a step took goes into the file SAMPLES: {"epoch", "batch", "indices"}."""
    real = TwoViews.finish

    def finish(self: TwoViews, batch: Any) -> Any:
        with open(os.environ['SAMPLES'], 'a') as f:
            f.write(json.dumps(dict(epoch=batch.epoch, indices=[int(i) for i in batch.indices])) + '\n')
        return real(self, batch)
    TwoViews.finish = finish


if __name__ == '__main__':
    accident, count = sys.argv[1], int(sys.argv[2])
    sys.argv[:3] = [str(ROOT / 'train.py')]
    if 'SAMPLES' in os.environ:
        note_samples()
    ACCIDENTS[accident](count)
    runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')
