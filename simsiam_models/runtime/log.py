"""One line per interval from rank 0: progress bar or plain line, log.jsonl, TensorBoard, Weights & Biases."""
import hashlib
import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .checkpoint import LOG


def check_extras(tensorboard: bool, wandb: str | None) -> None:
    """Raises ValueError where a package that a flag asks for is not installed."""
    for flag, asked, package in (('--tensorboard', tensorboard, 'tensorboard'), ('--wandb', wandb, 'wandb')):
        if asked and importlib.util.find_spec(package) is None:
            raise ValueError(f'{flag} needs the package {package}: python3 -m pip install {package}')


class RunLog:
    """Used by rank 0 only; elsewhere every call does nothing. A full disk costs lines, not the run."""

    def __init__(self, folder: Path, main: bool) -> None:
        self.path, self.main = folder / LOG, main
        self.bar: tqdm | None = None
        self._writer, self._wandb, self._broken = None, None, False

    def resume(self, size: int) -> None:
        """Drop lines past the checkpoint that is continued: its steps are done and logged again."""
        if self.main and self.path.exists() and self.path.stat().st_size > size:
            os.truncate(self.path, size)

    def size(self) -> int:
        """Bytes of log.jsonl so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def attach(self, tensorboard: bool, wandb: str | None, record: dict[str, Any], step: int) -> None:
        """Send the figures to TensorBoard (OUTPUT/tensorboard) and to a project of Weights & Biases as well."""
        if not self.main:
            return
        folder = self.path.parent
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / 'tensorboard'), purge_step=step + 1 if step else None)
        if wandb:
            import wandb as wb

            # The same folder is the same run there, also after a restart.
            name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
            try:
                self._wandb = wb.init(
                    project=wandb, id=name, name=folder.name, dir=str(folder), config=record, resume='allow')
            except Exception as e:  # no login, no network, ...
                raise ValueError(
                    f'--wandb {wandb}: {_one_line(e)}; `wandb login` logs in, WANDB_MODE=offline needs none') from None

    def start(self, total: int, done: int) -> None:
        if self.main and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, unit='step', dynamic_ncols=True, smoothing=0.05)

    def move(self, done: int) -> None:
        """The run is at another step than the bar."""
        if self.bar is not None:
            self.bar.n = done
            self.bar.refresh()

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def say(self, text: str) -> None:
        if not self.main:
            return
        try:
            tqdm.write(text.encode('utf-8', 'backslashreplace').decode(), file=sys.stdout)  # names of files, too
            sys.stdout.flush()
        except OSError:  # the disk of a log file is full: no reason to end the run
            pass

    def figures(self, where: str, figures: dict[str, Any], text: str, step: int = 0) -> None:
        """One JSON line; `text` goes into the bar, or onto a line of its own where there is no terminal."""
        if not self.main:
            return
        before = self._size_or_none()
        try:
            with open(self.path, 'a') as f:
                f.write(json.dumps(_finite(figures)) + '\n')
            self._broken = False
        except OSError as e:
            self._cut(before)
            if not self._broken:
                self.say(f'{self.path} cannot be written ({e.strerror}); going on without')
            self._broken = True
        self._send(figures, step)
        if self.bar is not None and where:
            self.bar.set_postfix_str(text)
        else:
            self.say(f'{where}{text}')

    def _send(self, figures: dict[str, Any], step: int) -> None:
        if self._writer is None and self._wandb is None:
            return
        numbers = {}
        for key, value in figures.items():
            for name, x in (value.items() if isinstance(value, dict) else [('', value)]):
                if isinstance(x, (int, float)):
                    numbers[f'{key}/{name}' if name else key] = float(x)
        try:
            if self._writer is not None:
                for name, x in numbers.items():
                    self._writer.add_scalar(name, x, step)
            if self._wandb is not None:
                self._wandb.log(numbers, step=step)
        except Exception as e:  # a full disk, or whatever the libraries meet
            self._writer = self._wandb = None
            self.say(f'TensorBoard or W&B failed ({_one_line(e)}); going on without')

    def _size_or_none(self) -> int | None:
        try:
            return self.size()
        except OSError:
            return None

    def _cut(self, size: int | None) -> None:
        """Half a line is no JSON."""
        try:
            if size is not None and self.path.exists():
                os.truncate(self.path, size)
        except OSError:
            pass

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        try:
            if self._writer is not None:
                self._writer.close()
            if self._wandb is not None:
                self._wandb.finish()
        except Exception as e:
            self.say(f'TensorBoard or W&B failed ({_one_line(e)})')
        self._writer = self._wandb = None


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _one_line(e: Exception) -> str:
    return ' '.join(str(e).split())[:200] or type(e).__name__
