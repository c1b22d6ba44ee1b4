"""One line per interval from rank 0: progress bar or plain line, log.jsonl, TensorBoard, Weights & Biases."""
import hashlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .files import finite
from .messages import one_line

LOG = 'log.jsonl'


def check_extras(tensorboard: bool, wandb: str | None) -> None:
    """Raises ValueError if a package that a flag needs is not installed."""
    for flag, wanted, package in (('--tensorboard', tensorboard, 'tensorboard'), ('--wandb', wandb, 'wandb')):
        if wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f'{flag} needs the package {package}: python3 -m pip install {package}')


class RunLog:
    """The log of a run. Only rank 0 writes; a full disk costs lines, but does not end the run."""

    def __init__(self, folder: Path, main: bool) -> None:
        self.path, self.main = folder / LOG, main
        self.bar: tqdm | None = None
        self._writer: Any = None
        self._wandb: Any = None
        self._broken = False

    def resume(self, size: int) -> None:
        """Drops the lines after the checkpoint that the run continues from: its steps are logged again."""
        if self.main and self.path.exists() and self.path.stat().st_size > size:
            os.truncate(self.path, size)

    def size(self) -> int:
        """Returns the length of log.jsonl in bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def attach(self, tensorboard: bool, wandb: str | None, record: dict[str, Any], step: int) -> None:
        """Also sends the figures to TensorBoard (OUTPUT/tensorboard) and to a Weights & Biases project."""
        if not self.main:
            return
        folder = self.path.parent
        if tensorboard:
            self._open_tensorboard(step)
        if wandb:
            import wandb as wb

            # The same folder is the same W&B run, also after a restart.
            name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
            try:
                self._wandb = wb.init(
                    project=wandb, id=name, name=folder.name, dir=str(folder), config=record, resume='allow')
            except Exception as e:  # wandb raises errors of its own: no login, no network, ...
                raise ValueError(
                    f'--wandb {wandb}: {one_line(e)}; run `wandb login`, or set WANDB_MODE=offline') from None

    def _open_tensorboard(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(self.path.parent / 'tensorboard'), purge_step=step + 1 if step else None)

    def restore(self) -> None:
        """Opens new files after the folder was deleted and made again; call it on rank 0."""
        if self._writer is not None:
            try:
                self._writer.close()
                self._open_tensorboard(0)
            except Exception as e:  # tensorboard raises errors of its own
                self._writer = None
                self.say(f'TensorBoard failed ({one_line(e)}); the run continues without it')

    def start(self, total: int, done: int) -> None:
        """Shows a progress bar on a terminal, in optimizer steps."""
        if self.main and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, unit='step', dynamic_ncols=True, smoothing=0.05)

    def step(self) -> None:
        """Advances the bar by one step."""
        if self.bar is not None:
            self.bar.update()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self.main:
            return
        try:
            # File names may not be UTF-8.
            tqdm.write(text.encode('utf-8', 'backslashreplace').decode(), file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # the disk of a log file is full: no reason to end the run
            pass

    def figures(self, where: str, figures: dict[str, Any], text: str, step: int = 0, left: str = '') -> None:
        """Writes one JSON line; shows `text` in the bar, or on a line of its own if there is no terminal.

        `where` and `left` are only on that line: the bar has its own position and time left.
        """
        if not self.main:
            return
        before = None
        try:
            before = self.size()
            with open(self.path, 'a') as f:
                f.write(json.dumps(finite(figures)) + '\n')
            self._broken = False
        except OSError as e:
            self._truncate(before)
            if not self._broken:
                self.say(f'{self.path} cannot be written ({e.strerror}); the run continues without it')
            self._broken = True
        self._send(figures, step)
        if self.bar is not None and where:
            self.bar.set_postfix_str(text)
        else:
            self.say(f'{where}{text}{left}')

    def _truncate(self, size: int | None) -> None:
        """Removes an incomplete last line, which is not JSON."""
        try:
            if size is not None and self.path.exists():
                os.truncate(self.path, size)
        except OSError:
            pass

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
        except Exception as e:  # tensorboard and wandb raise errors of their own, and OSError on a full disk
            self._writer = self._wandb = None
            self.say(f'TensorBoard or W&B failed ({one_line(e)}); the run continues without it')

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        try:
            if self._writer is not None:
                self._writer.close()
            if self._wandb is not None:
                self._wandb.finish()
        except Exception as e:  # tensorboard and wandb raise errors of their own
            self.say(f'TensorBoard or W&B failed ({one_line(e)})')
        self._writer = self._wandb = None
