"""N processes compute what one process with the whole batch computes."""
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import TINY, run_train
from timm.layers import BatchNormAct2d
from torch import nn

from simsiam_models.training.distributed import GlobalBatchNorm, World, gather_rows, synchronize_batchnorm

WORLD = 2


def _spawn(work, tmp_path: Path, *args) -> list:
    mp.spawn(_enter, (work, str(tmp_path / 'store'), str(tmp_path), args), nprocs=WORLD)
    return [torch.load(tmp_path / f'{rank}.pt') for rank in range(WORLD)]


def _enter(rank: int, work, store: str, folder: str, args: tuple) -> None:
    os.environ['GLOO_SOCKET_IFNAME'] = 'lo'
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=WORLD)
    torch.save(work(rank, *args), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def _layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), BatchNormAct2d(5), nn.Flatten(), nn.LazyLinear(6),
                         nn.BatchNorm1d(6, affine=False)).double()


def _half(rank: int, x: torch.Tensor):
    model = _layers()
    model(x)  # sizes the lazy layer
    model = synchronize_batchnorm(_fresh(model), World(rank, WORLD, torch.device('cpu')))
    assert isinstance(model[1], GlobalBatchNorm)
    ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    y = ddp(x.chunk(WORLD)[rank])
    y.pow(3).mean().backward()
    return y.detach(), {k: p.grad for k, p in model.named_parameters()}, model.state_dict()


def _fresh(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if hasattr(m, 'reset_running_stats'):
            m.reset_running_stats()
    return model


def test_global_batchnorm_equals_the_whole_batch_in_float64(tmp_path):
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double()
    parts = _spawn(_half, tmp_path, x)
    model = _layers()
    model(x)
    _fresh(model)
    model.zero_grad()
    y = model(x)
    y.pow(3).mean().backward()
    assert (torch.cat([p[0] for p in parts]) - y).abs().max() < 1e-12
    for _, gradients, state in parts:
        for k, p in model.named_parameters():
            assert (gradients[k] - p.grad).abs().max() < 1e-12, k
        for k, v in model.state_dict().items():
            assert (state[k] - v).abs().max() < 1e-12, k


def _gather(rank: int) -> torch.Tensor:
    return gather_rows(torch.arange(7.0)[rank::WORLD, None], 7, World(rank, WORLD, torch.device('cpu')))


def test_gathered_rows_are_in_order(tmp_path):
    assert all(torch.equal(t, torch.arange(7.0)[:, None]) for t in _spawn(_gather, tmp_path))


@pytest.fixture(scope='module')
def one_and_two(few_digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp('worlds')
    args = [few_digits, *TINY, '--epochs', '2', '--batch-size', '16', '--max-steps', '5', '--workers', '0']
    for processes in (1, 2):
        result = run_train(*args, '--output', folder / str(processes), processes=processes)
        assert result.returncode == 0, result.stderr
    return [torch.load(folder / n / 'checkpoint.pth', weights_only=True) for n in ('1', '2')]


def test_two_processes_end_five_steps_with_the_weights_of_one(one_and_two):
    one, two = (c['model'] for c in one_and_two)
    assert one.keys() == two.keys()
    for k, v in one.items():
        assert (two[k].double() - v.double()).norm() <= 1e-5 * v.double().norm() + 1e-7, k


def test_two_processes_measure_the_same_knn(one_and_two):
    one, two = (c['knn'] for c in one_and_two)
    assert one['pixels'] == pytest.approx(two['pixels'])


def test_a_batch_that_does_not_divide_is_one_line(few_digits, tmp_path):
    result = run_train(
        few_digits, *TINY, '--batch-size', '15', '--workers', '0', '--output', tmp_path / 'out', processes=2)
    assert result.returncode != 0 and not (tmp_path / 'out').exists()
    said = [line for line in result.stderr.splitlines() if line.startswith('train.py:')]
    assert said == ['train.py: --batch-size 15 does not divide by 2 processes; use a multiple of 2']
