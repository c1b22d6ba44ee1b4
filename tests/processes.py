"""Runs a function in two gloo processes, for tests."""
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import warm

WORLD = 2


def spawn(work: Callable[..., Any], tmp_path: Path, *args: Any) -> list[Any]:
    """work(rank, *args) in each process -> what they returned, by rank."""
    with warm.spawned():
        mp.spawn(_enter, (work, str(tmp_path / 'store'), str(tmp_path), args), nprocs=WORLD)
    return [torch.load(tmp_path / f'{rank}.pt') for rank in range(WORLD)]


def _enter(rank: int, work: Callable[..., Any], store: str, folder: str, args: tuple) -> None:
    os.environ['GLOO_SOCKET_IFNAME'] = 'lo'
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=WORLD)
    torch.save(work(rank, *args), f'{folder}/{rank}.pt')
    dist.destroy_process_group()
