"""One process or many, one result: torchrun's environment, and batch norm over all processes on CUDA and CPU."""
import copy
import inspect
import os
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

PATIENCE = 600  # seconds

T = TypeVar('T')


@dataclass(frozen=True)
class World:
    """The processes of a run, as this one sees them."""

    rank: int
    size: int
    device: torch.device
    control: Any = None  # a gloo group for decisions, which need not wait for a GPU

    @property
    def main(self) -> bool:
        return self.rank == 0

    def all_reduce_max(self, values: Sequence[int]) -> list[int]:
        """Returns the element-wise maximum over the processes."""
        if self.size == 1:
            return list(values)
        table = torch.tensor(values, dtype=torch.int32)
        dist.all_reduce(table, dist.ReduceOp.MAX, self.control)
        return table.tolist()

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """Calls `make` on rank 0 and returns its result on every process; every process raises its error, too."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.main:
            try:
                box[0] = make()
            except Exception as e:  # whatever it is: the other processes wait for an answer
                box[1] = e
        dist.broadcast_object_list(box, 0, self.control)
        if box[1] is not None:
            raise box[1]
        return cast(T, box[0])

    def all_or_none(self, make: Callable[[], T]) -> T:
        """Calls `make` on every process and returns its own result; if one process fails, all of them raise."""
        if self.size == 1:
            return make()
        made = error = None
        try:
            made = make()
        except Exception as e:  # whatever it is: the other processes wait for an answer
            error = e
        texts = self.gather(error and str(error))
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
            if text is not None:
                raise ValueError(f'process {rank}: {text}')
        return cast(T, made)

    def gather(self, mine: Any) -> list[Any]:
        """Returns the objects of all processes, ordered by rank."""
        if self.size == 1:
            return [mine]
        table = [None] * self.size
        dist.all_gather_object(table, mine, self.control)
        return table


def default_device() -> str:
    if torch.cuda.is_available():
        return 'cuda'
    return 'mps' if torch.backends.mps.is_available() else 'cpu'


def choose_device(name: str | None = None) -> torch.device:
    """Returns the device of that name; for None, the first available of CUDA, MPS and the CPU.

    Raises:
        ValueError: torch cannot use this device here.
    """
    name = name or default_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:  # AssertionError: a torch without CUDA
        why = textwrap.shorten(str(e).split('. ')[0], 120, placeholder=' ...')
        raise ValueError(
            f'--device {name}: not available here ({why}); use {default_device()}, or leave it out') from None
    return device


def cores() -> int:
    """Returns the number of CPU cores that this process may use: its share of the machine under torchrun."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, found // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work; does nothing on the CPU."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


def default_workers(device: torch.device) -> int:
    """Returns the number of threads for data: one if the CPU also trains, else one per core of this process's share."""
    return 1 if device.type == 'cpu' else cores()


@contextmanager
def join_world(device: str | None = None) -> Iterator[World]:
    """Joins the process group that torchrun describes (nccl on CUDA, gloo elsewhere); a world of one without torchrun.

    Raises:
        ValueError: the device is not available.
    """
    chosen = choose_device(device)
    size = int(os.environ.get('WORLD_SIZE', 1))
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == 'cuda':
        chosen = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        torch.cuda.set_device(chosen)
    rank = int(os.environ['RANK'])
    store = next(dist.rendezvous('env://', rank, size))[0]
    dist.init_process_group(
        'nccl' if chosen.type == 'cuda' else 'gloo', store=dist.PrefixStore(_meet(store, rank, size), store), rank=rank,
        world_size=size)
    try:
        yield World(dist.get_rank(), size, chosen, dist.new_group(backend='gloo'))
    finally:
        dist.destroy_process_group()


def _meet(store: dist.Store, rank: int, size: int) -> str:
    """Agrees with the other processes on a name for this start that no earlier start had.

    torchrun may keep its store across restarts, and new processes would find the addresses of dead ones in it.

    Raises:
        RuntimeError: a process does not arrive within ten minutes.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f'simsiam/hello/{rank}', own)
        store.wait([f'simsiam/welcome/{own}'], timedelta(seconds=PATIENCE))
        name: str = store.get(f'simsiam/welcome/{own}').decode()
        store.set(f'simsiam/here/{name}/{rank}', '')
        return name
    answered: dict[int, str] = {}
    missing, end = list(range(1, size)), time.monotonic() + PATIENCE
    while missing:
        for other in list(missing):
            if store.check([f'simsiam/hello/{other}']):
                token = store.get(f'simsiam/hello/{other}').decode()
                if answered.get(other) != token:  # the first token may belong to an earlier start
                    store.set(f'simsiam/welcome/{token}', own)
                    answered[other] = token
            if store.check([f'simsiam/here/{own}/{other}']):
                missing.remove(other)
        if time.monotonic() > end:
            raise RuntimeError(f'Connection: process {missing[0]} of {size} did not arrive within {PATIENCE} seconds')
        time.sleep(0.02)
    return own


def synchronize_batchnorm(model: nn.Module, world: World) -> nn.Module:
    """Makes every batch norm use the statistics of all processes; parameters, buffers and names stay the same.

    torch's SyncBatchNorm runs only on accelerators; CPU processes get `GlobalBatchNorm`.
    """
    if world.size == 1:
        return model
    if world.device.type == 'cuda':
        return cast(nn.Module, convert_sync_batchnorm(model))
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm) and not isinstance(child, GlobalBatchNorm):
                setattr(parent, name, GlobalBatchNorm(child))
    return model


def parallel(model: nn.Module, loss: Callable[[nn.Module], Tensor], world: World) -> nn.Module:
    """Wraps the model so that gradients are averaged over the processes.

    Args:
        loss: computes any loss of the wrapped model, on made-up input.
    """
    if world.size == 1:
        return model
    # Buffers need no broadcast: synchronised batch norm keeps them equal. torch 2.14 renames the argument.
    ddp: Callable[..., nn.Module] = nn.parallel.DistributedDataParallel
    name = 'forward_sync_buffers'
    if name not in inspect.signature(ddp).parameters:
        name = 'broadcast_buffers'
    net = ddp(model, [world.device] if world.device.type == 'cuda' else None, **{name: False})
    if world.device.type == 'cpu':
        _settle_buckets(net, model, loss)
    return net


def _settle_buckets(net: nn.Module, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
    """Takes a step that leaves no trace, after which DDP sorts its buckets once and for all.

    Otherwise the first step after a restart would sum the gradients of the processes in a different order.
    """
    before = copy.deepcopy(model.state_dict())
    training = model.training
    loss(net.train()).backward()
    model.zero_grad(set_to_none=True)
    model.load_state_dict(before)
    net.train(training)


class _SumOverProcesses(torch.autograd.Function):
    """Sums a tensor over the processes, and its gradient too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class GlobalBatchNorm(_BatchNorm):
    """Batch norm over the samples of all processes, however many each holds; plain torch, for CPU processes."""

    def __init__(self, bn: _BatchNorm) -> None:
        super().__init__(bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats)
        self.weight, self.bias = bn.weight, bn.bias
        for name, buffer in bn.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.train(bn.training)
        # timm's BatchNormAct2d includes its activation.
        self.drop, self.act = getattr(bn, 'drop', nn.Identity()), getattr(bn, 'act', nn.Identity())

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f'batch norm needs (B, C, ...), not {tuple(x.shape)}')

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return cast(Tensor, self.act(self.drop(super().forward(x))))
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        dtype, x = x.dtype, x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        # The processes may hold different numbers of samples: of the regions in a detector, for example.
        own = x.new_full((1,), x.numel() // x.shape[1])
        sums = _SumOverProcesses.apply(torch.cat([x.sum(dims), own]))
        n = sums[-1].detach()
        mean = sums[:-1] / n  # (C,)
        centred = x - mean.view(shape)
        var = _SumOverProcesses.apply(centred.square().sum(dims)) / n  # (C,)
        y = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        mean_buffer, var_buffer, count = self.running_mean, self.running_var, self.num_batches_tracked
        if mean_buffer is not None and var_buffer is not None and count is not None:  # track_running_stats
            with torch.no_grad():
                count += 1
                m = self.momentum if self.momentum is not None else 1 / float(count)
                mean_buffer.lerp_(mean.to(mean_buffer), m)
                var_buffer.lerp_((var * n / (n - 1)).to(var_buffer), m)
        return cast(Tensor, self.act(self.drop(y.to(dtype))))


def gather_rows(x: Tensor, n: int, world: World) -> Tensor:
    """Gathers a table of n rows, of which each process holds rows rank, rank + world, ..., on every process."""
    if world.size == 1:
        return x
    share = -(-n // world.size)
    padded = x.new_zeros(share, *x.shape[1:])
    padded[:len(x)] = x
    parts = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[:n]


def mean_over_processes(x: Tensor, world: World) -> Tensor:
    """Averages a tensor over the processes, in place."""
    if world.size > 1:
        dist.all_reduce(x)
    return x / world.size
