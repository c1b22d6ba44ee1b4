"""Reports on a run: figures of its steps, unreadable images, kNN accuracy, and the first signs of a collapse."""
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..data import TwoViews
from ..runtime.distributed import mean_over_processes
from ..runtime.files import write_atomically
from ..runtime.log import RunLog
from ..runtime.messages import clock_time
from ..runtime.precision import suggest_off
from .doctor import Diagnosis, Doctor
from .monitor import MOST, KnnMonitor, Moment, Reading, is_collapsed
from .step import Trainer

UNREADABLE = 'unreadable.txt'


class Journal:
    """Collects the figures of an interval, and writes them once the step after it is launched.

    Reading a figure waits for the device, so the device always gets its next step first. `figures` holds the newest
    figures by name ('knn': accuracies in percent), `diagnosis` what the doctor found at the last reading. `failed`
    means that the run must stop, because --on-collapse says so. `start` names the weights before training.
    """

    def __init__(
        self, log: RunLog, trainer: Trainer, steps: int, knn: KnnMonitor | None, *, on_collapse: str,
        max_steps: float = math.inf) -> None:
        self.log, self.trainer, self.steps, self.knn, self.on_collapse = log, trainer, steps, knn, on_collapse
        self.total = int(min(trainer.recipe.epochs * steps, max_steps))  # steps of the run
        self.doctor = Doctor(
            trainer.recipe.lr, trainer.recipe.batch_size, steps * trainer.recipe.batch_size, trainer.amp)
        self.figures: dict[str, Any] = {'knn': {}}
        self.diagnosis: Diagnosis | None = None
        self.failed, self.start = False, 'random'
        self._losses: list[Tensor] = []
        self._waited, self._began = 0.0, Moment(trainer.world.device)
        self._pending: tuple[Reading, Moment, int, float, dict[str, Any]] | None = None
        self._named = 0  # unreadable images in UNREADABLE

    def state_dict(self) -> dict[str, Any]:
        size = {} if self.knn is None else {'size': self.knn.size}
        return {
            'knn': {**self.figures['knn'], **size}, 'doctor': self.doctor.state_dict(), 'log_bytes': self.log.size()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        accuracies = dict(state['knn'])
        size = accuracies.pop('size', MOST)
        if self.knn is not None:
            if self.knn.size not in (None, size):
                self.log.say('the kNN monitor keeps its images, so that its numbers stay comparable; --knn-images '
                             'takes effect in a new run only')
            self.knn.size = size
            self.knn.select(size)
        self.figures['knn'] = accuracies
        self.doctor.load_state_dict(state['doctor'])

    def restore(self) -> None:
        """Opens new files after the folder was deleted and made again; call it on rank 0."""
        self._named = 0  # so that UNREADABLE is written again
        self.log.restore()

    def measure_waiting(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields the batches of an epoch, and adds up the time spent waiting for them."""
        self._began, clock = Moment(self.trainer.world.device), time.perf_counter()
        for batch in batches:
            self._waited += time.perf_counter() - clock
            yield batch
            clock = time.perf_counter()

    def add_step(self, loss: Tensor) -> None:
        """Counts a step that is launched, then reads the figures of the interval before it."""
        self._losses.append(loss)
        self.log.step()
        self.flush()

    def end_interval(self, epoch: int, step: int, x1: Tensor, p1: Tensor, z1: Tensor) -> None:
        """Starts to read the figures of the last step; `flush` writes them."""
        trainer = self.trainer
        mean = mean_over_processes(torch.stack(self._losses).mean(), trainer.world)
        reading = Reading(mean, x1, p1, z1, trainer.model)
        where = {'epoch': epoch, 'step': step, 'lr': trainer.optimizer.param_groups[0]['lr']}
        self._pending = reading, self._began, len(self._losses), self._waited, where
        self._losses, self._waited, self._began = [], 0.0, reading.moment

    def flush(self) -> None:
        """Writes the last interval's figures if that is still due; FloatingPointError if the loss is not finite."""
        if self._pending is None:
            return
        reading, began, n, waited, where = self._pending
        self._pending, f = None, self.figures
        f.update(where, **reading.read())
        seconds = reading.moment.since(began)
        f.update(images_per_second=n * self.trainer.recipe.batch_size / seconds, waiting=min(1.0, waited / seconds))
        if not math.isfinite(f['loss']):
            raise FloatingPointError(
                f'the loss is {f["loss"]} at epoch {f["epoch"]}, step {f["step"]}: lower --lr '
                f'({self.trainer.recipe.lr:g}){suggest_off(self.trainer.amp)}; the last checkpoint is kept')
        f['collapsed'] = is_collapsed(f['std'], f['rank'], f['samples'])
        before, now = self.diagnosis, self.doctor.examine(f)
        self.diagnosis, f['diagnosis'] = now, now and now.name
        self._write(seconds / n)
        if now and (before is None or (before.name, before.collapsed) != (now.name, now.collapsed)):
            self.log.say(str(now))
        self.failed = self.log.main and self.doctor.confirmed and self.on_collapse == 'stop'

    def _write(self, seconds_per_step: float) -> None:
        f, done = self.figures, self.figures['epoch'] * self.steps + self.figures['step']
        text = (f'loss {f["loss"]:.4f}  std {f["std"]:.2f}  rank {f["rank"]:.0f}  lr {f["lr"]:.3g}  '
                f'{f["images_per_second"]:.0f} img/s  waiting {100 * f["waiting"]:.0f} %'
                f'{"  COLLAPSED" if f["collapsed"] else ""}')
        where = f'epoch {f["epoch"] + 1}/{self.trainer.recipe.epochs} step {f["step"]}/{self.steps}  '
        left = f'  left {clock_time((self.total - done) * seconds_per_step)}'
        self.log.figures(where, {k: v for k, v in f.items() if k != 'knn'}, text, done, left)

    def measure_before(self) -> None:
        """Measures the kNN accuracy of the backbone as it starts, and of the pixels if images are small."""
        if self.knn is None:
            return
        small = self.trainer.recipe.augmentation.size <= 64
        self.figures['knn'] = before = self.knn.measure_before(
            self.trainer.model.backbone, self.start, pixels=small)
        text = ', '.join(f'{k} {v:.1f} %' for k, v in before.items())
        self.log.figures(
            '', {'epoch': 0, 'knn': before, 'knn_images': self.knn.sizes},
            f'before training, {self.knn.describe()}: {text}')

    def measure_knn(self, epoch: int) -> None:
        """Measures the kNN accuracy of the backbone after `epoch` epochs."""
        if (knn := self.knn) is None:
            raise RuntimeError('this run has no kNN monitor')
        accuracy = self.figures['knn']['trained'] = knn.measure(self.trainer.model.backbone)
        self.log.figures(
            '', {'epoch': epoch, 'knn': accuracy, 'knn_images': knn.sizes},
            f'epoch {epoch}: {knn.describe()} {accuracy:.1f} %', epoch * self.steps)

    def report_unreadable(self, epoch: int, views: TwoViews) -> None:
        """Logs how many images could not be read so far."""
        if n := len(views.unreadable):
            total = len(views.images)
            self.log.figures(
                '', {'epoch': epoch, 'unreadable': n, 'images': total},
                f'epoch {epoch}: {n} of {total} images are unreadable so far and were replaced; '
                f'{self.log.path.with_name(UNREADABLE)} names them', epoch * self.steps)

    def gather_unreadable(self, views: TwoViews, epoch: int) -> None:
        """Merges `views.unreadable` of all processes; rank 0 writes the names to the file.

        Raises UnreadableError if there are more than --max-unreadable allows.
        """
        found = {k: v for part in self.trainer.world.gather(views.unreadable) for k, v in part.items()}
        views.unreadable = found
        if len(found) == self._named:
            return
        self._named = len(found)
        if self.log.main:
            path = self.log.path.with_name(UNREADABLE)
            text = ''.join(f'{found[i]}\n' for i in sorted(found)).encode()
            try:
                write_atomically(path, lambda f: f.write(text))
            except OSError as e:
                self.log.say(f'{path} cannot be written ({e.strerror})')
        views.judge(found, epoch)
