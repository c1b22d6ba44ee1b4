"""One line per interval from rank 0: a progress bar in a terminal, plain lines elsewhere, and log.jsonl."""
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm


class RunLog:
    """Used by rank 0 only; elsewhere every call does nothing."""

    def __init__(self, folder: Path, main: bool) -> None:
        self.path, self.main = folder / 'log.jsonl', main
        self.bar: tqdm | None = None

    def start(self, total: int, done: int) -> None:
        if self.main and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, unit='step', dynamic_ncols=True, smoothing=0.05)

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def figures(self, where: str, figures: dict[str, Any], text: str) -> None:
        """One JSON line; `text` goes into the bar, or onto a line of its own where there is no terminal."""
        if not self.main:
            return
        with open(self.path, 'a') as f:
            f.write(json.dumps(figures) + '\n')
        if self.bar is not None and where:
            self.bar.set_postfix_str(text)
        else:
            self.say(f'{where}{text}')

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
