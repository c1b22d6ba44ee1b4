"""Reads the images that train a network, in the batches of a plan, and those that it is measured on.

What an image becomes is a function of (seed, epoch, index), so neither the number of threads or processes nor a restart
changes it.
"""
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from ..data import DataError, UnreadableError
from ..data.threads import AHEAD, Job, make_threads, run_in_order
from ..runtime.distributed import World

MAX_UNREADABLE = 0.1  # share of the images

Key = tuple[int, int, int]  # seed, epoch, index


class BatchOrder(Protocol):
    """The order of images, which is a function of (seed, epoch): every process has the same."""

    seed: int

    def at(self, step: int) -> tuple[int, np.ndarray]: ...  # epoch; (batch,) int64 places among the rows

    def stand_ins(self, place: int) -> Iterator[int]: ...  # places to try for the one at `place`, itself first


Plan = TypeVar('Plan', bound=BatchOrder)


class ItemLoader:
    """Reads images in threads. `unreadable` names those that cannot be read, index -> reason."""

    def __init__(self, images: Any, rows: np.ndarray, world: World, workers: int) -> None:
        self.images, self.rows, self.world, self.workers = images, np.asarray(rows, np.int64), world, workers
        self.unreadable: dict[int, str] = {}
        self.threads = make_threads(workers)

    def join(self) -> None:
        """Gathers `unreadable` from all processes; raises DataError if there are too many."""
        for found in self.world.gather(self.unreadable):
            self.unreadable |= found
        self.check_unreadable()

    def check_unreadable(self) -> None:
        if len(self.unreadable) > MAX_UNREADABLE * len(self.rows):
            raise DataError(
                f'{self.images.name}: {len(self.unreadable)} of {len(self.rows)} images cannot be read, more than '
                f'{MAX_UNREADABLE:.0%}; the first: {self.unreadable[min(self.unreadable)]}')


class TrainItems(ItemLoader, Generic[Plan]):
    """Yields the items of each step, without end. Another image replaces an unreadable one, with its own target.

    Args:
        images: a source with `name`.
        rows: the images that train.
        prepare: a row and (seed, epoch, row) -> the item; raises UnreadableError if the image cannot be read. The key
            is that of the image in the plan, also if another one replaces it.
        workers: threads; with 0, the caller's own thread reads.
    """

    def __init__(
        self, images: Any, rows: np.ndarray, plan: Plan, prepare: Callable[[int, Key], Any], world: World,
        workers: int,
    ) -> None:
        super().__init__(images, rows, world, workers)
        self.plan, self.prepare = plan, prepare

    def load(self, step: int) -> Iterator[list[Any]]:
        """Yields this process's items of `step` and of those after it: places rank, rank + world, ... of the batch.

        Raises:
            DataError: more than MAX_UNREADABLE of the images cannot be read, or none; see also `prepare`.
        """
        for items, reasons in run_in_order(self.threads, self._jobs(step)):
            self.unreadable |= reasons
            self.check_unreadable()
            yield items

    def _jobs(self, first: int) -> Iterator[Job]:
        for step in itertools.count(first):
            epoch, batch = self.plan.at(step)
            mine = batch[self.world.rank::self.world.size].tolist()
            items: list[Any] = [None] * len(mine)
            reasons: dict[int, str] = {}
            yield (items, reasons), [
                functools.partial(self._fill, items, reasons, k, (epoch, place)) for k, place in enumerate(mine)]

    def _fill(self, items: list[Any], reasons: dict[int, str], k: int, at: tuple[int, int]) -> None:
        epoch, place = at
        key = self.plan.seed, epoch, int(self.rows[place])
        for stand_in in self.plan.stand_ins(place):
            row = int(self.rows[stand_in])
            try:
                items[k] = self.prepare(row, key)
                return
            except UnreadableError as e:
                reasons[row] = str(e)
        raise DataError(
            f'{self.images.name}: none of the {len(self.rows)} images can be read; the first: {reasons[min(reasons)]}')


class EvalItems(ItemLoader):
    """Yields this process's items, rows rank, rank + world, ..., once.

    `unreadable` names those that it leaves out; they must not count in a metric. Arguments as for TrainItems.
    """

    def __init__(
        self, images: Any, rows: np.ndarray, prepare: Callable[[int], Any], world: World, workers: int,
    ) -> None:
        super().__init__(images, rows, world, workers)
        self.prepare = prepare

    def __iter__(self) -> Iterator[Any]:
        self.unreadable = {}  # what failed in an earlier pass may be readable now
        for items, reasons in run_in_order(self.threads, self._jobs(), max(AHEAD, 2 * self.workers)):
            self.unreadable |= reasons
            self.check_unreadable()
            yield from items

    def _jobs(self) -> Iterator[Job]:
        for row in self.rows[self.world.rank::self.world.size].tolist():
            items, reasons = list[Any](), dict[int, str]()
            yield (items, reasons), [functools.partial(self._fill, items, reasons, row)]

    def _fill(self, items: list[Any], reasons: dict[int, str], row: int) -> None:
        try:
            items.append(self.prepare(row))
        except UnreadableError as e:
            reasons[row] = str(e)
