"""Measures how much of the processor other processes use while something is timed."""
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

LIMIT = Path('/sys/fs/cgroup/cpu.max')  # of a container
STAT = Path('/proc/stat')
MOST = 0.1  # share of others that does not disturb a timing


class Clock(NamedTuple):
    """Seconds since the start of the machine, summed over the cores that this process may use."""

    total: float
    idle: float
    own: float  # of this process and its children


def read_clock() -> Clock | None:
    """Returns None where the system does not say (not Linux), or where a container has a share of many cores."""
    with suppress(OSError, ValueError, IndexError):
        if LIMIT.exists() and LIMIT.read_text().split()[0] != 'max':
            return None
        mine = {f'cpu{i}' for i in os.sched_getaffinity(0)}
        rows = [line.split() for line in STAT.read_text().splitlines()]
        # user nice system idle iowait irq softirq steal; the columns after these are in user and nice, too
        ticks = [[int(x) for x in row[1:9]] for row in rows if row[0] in mine]
        second, own = os.sysconf('SC_CLK_TCK'), os.times()
        return Clock(sum(map(sum, ticks)) / second, sum(row[3] + row[4] for row in ticks) / second, sum(own[:4]))
    return None


def find_disturbance(before: Clock | None, after: Clock | None) -> float | None:
    """Returns the share of the cores' time between two readings that other processes used; None if unknown.

    0 if it is at most MOST, or less than what was idle: then there was room for both.
    """
    if before is None or after is None or after.total <= before.total:
        return None
    total, idle, own = (b - a for a, b in zip(before, after, strict=True))
    others = max(0.0, 1 - (idle + own) / total)
    return others if others > max(MOST, idle / total) else 0.0
