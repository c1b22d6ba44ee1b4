"""Reads images in threads, in their order, with a progress bar, and names those that cannot be read."""
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data import UnreadableError
from ..data.threads import AHEAD, Job, make_threads, run_in_order
from .inputs import Inputs

NAMED = 20  # unreadable images that the terminal shows; the output names all


class Reader:
    """Yields the rows of the readable images of each batch, and what `prepare` makes of their pixels (H, W, 3).

    `unreadable`, row -> reason, names the others. Once all batches are read, it is complete.
    """

    def __init__(self, images: Inputs, prepare: Callable[[np.ndarray], Any], batch: int, workers: int) -> None:
        self.images, self.prepare, self.batch, self.workers = images, prepare, batch, workers
        self.unreadable: dict[int, str] = {}

    def __iter__(self) -> Iterator[tuple[list[int], list[Any]]]:
        ahead = max(AHEAD, -(-2 * self.workers // self.batch))  # so that no thread waits for the model
        batches = run_in_order(make_threads(self.workers), self._jobs(), ahead)
        with tqdm(total=len(self.images), unit=' images', disable=not sys.stderr.isatty()) as bar:
            for rows, items in batches:
                readable = [(row, item) for row, item in zip(rows, items, strict=True) if row not in self.unreadable]
                if readable:
                    yield [row for row, _ in readable], [item for _, item in readable]
                bar.update(len(rows))

    def _jobs(self) -> Iterator[Job]:
        for start in range(0, len(self.images), self.batch):
            rows = range(start, min(start + self.batch, len(self.images)))
            items: list[Any] = [None] * len(rows)
            yield (rows, items), [functools.partial(self._fill, items, k, row) for k, row in enumerate(rows)]

    def _fill(self, items: list[Any], k: int, row: int) -> None:
        try:
            items[k] = self.prepare(self.images.read(row))
        except UnreadableError as e:
            self.unreadable[row] = str(e)

    def report(self) -> int:
        """Names unreadable images on stderr; returns the exit status, 1 if no image could be read."""
        reasons = [self.unreadable[row] for row in sorted(self.unreadable)]
        for reason in reasons[:NAMED]:
            print(reason, file=sys.stderr)
        if reasons:
            more = f' ({len(reasons) - NAMED:,} of them not listed here)' if len(reasons) > NAMED else ''
            print(f'{len(reasons):,} of {len(self.images):,} images cannot be read and have no prediction{more}',
                  file=sys.stderr)
        return int(len(reasons) == len(self.images))
