"""N processes compute what one process with the whole batch computes."""
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, run_train
from processes import WORLD, spawn
from timm.layers import BatchNormAct2d
from torch import nn

from simsiam_models import create_simsiam, simsiam_loss
from simsiam_models.runtime.distributed import (
    GlobalBatchNorm,
    World,
    _meet,
    cores,
    default_workers,
    gather_rows,
    synchronize_batchnorm,
)
from simsiam_models.training.recipes import Recipe
from simsiam_models.training.schedule import make_optimizer, set_lr


def test_a_gpu_is_fed_by_all_cores_of_the_process_and_a_training_cpu_by_one_thread(monkeypatch):
    monkeypatch.setattr('os.sched_getaffinity', lambda pid: set(range(64)))
    assert default_workers(torch.device('cuda')) == cores() == 64 and default_workers(torch.device('cpu')) == 1
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert default_workers(torch.device('cuda')) == 16


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
    parts = spawn(_half, tmp_path, x)
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


def test_processes_meet_under_one_name_whatever_an_earlier_start_left_behind():
    store, names = dist.HashStore(), []
    for _ in range(3):  # the second and the third start find the words of the first
        found = {}

        def come(rank: int, found: dict = found) -> None:
            time.sleep(0.05 * ((rank + len(names)) % 3))
            found[rank] = _meet(store, rank, 3)
        threads = [threading.Thread(target=come, args=(rank,)) for rank in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(30)
        assert len(found) == 3 and len(set(found.values())) == 1
        names.append(found[0])
    assert len(set(names)) == 3


def _gather(rank: int) -> torch.Tensor:
    return gather_rows(torch.arange(7.0)[rank::WORLD, None], 7, World(rank, WORLD, torch.device('cpu')))


def test_gathered_rows_are_in_order(tmp_path):
    assert all(torch.equal(t, torch.arange(7.0)[:, None]) for t in spawn(_gather, tmp_path))


def _five_steps(rank: int, world: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = create_simsiam(
        'resnet18', dim=32, pred_dim=8, layers=(1, 1, 1, 1), channels=(16, 16, 32, 32), stem_type='deep', stem_width=8)
    model = synchronize_batchnorm(model.to(dtype), World(rank, world, torch.device('cpu')))
    net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    recipe = Recipe('', batch_size=64, lr=0.05, epochs=5)
    optimizer = make_optimizer(model, recipe)
    views = torch.randn(5, 2, 64, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    for step, (x1, x2) in enumerate(views):
        set_lr(optimizer, step, recipe)
        loss = simsiam_loss(*net(x1.chunk(world)[rank], x2.chunk(world)[rank]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {k: v.detach().double() for k, v in model.state_dict().items()}


@pytest.mark.parametrize('dtype, bound', [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_two_processes_end_five_steps_with_the_weights_of_one(tmp_path, dtype, bound):
    torch.set_num_threads(1)
    one = _five_steps(0, 1, dtype)
    for two in spawn(_five_steps, tmp_path, WORLD, dtype):
        assert one.keys() == two.keys()
        # Relative to the tensor, and to the step size for those that start at zero.
        for k, v in one.items():
            assert (two[k] - v).norm() <= bound * max(1.0, float(v.norm())), k


@pytest.fixture(scope='module')
def one_and_two(few_digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp('worlds')
    # So small a rate that five steps do not amplify rounding (at 0.01, up to 1.3e-5 by the seed).
    args = [few_digits, *TINY, '--epochs', '5', '--batch-size', '64', '--lr', '0.001', '--workers', '0']
    for processes in (1, 2):
        result = run_train(*args, '--output', folder / str(processes), processes=processes, python=sys.executable)
        assert result.returncode == 0, result.stderr
    return [torch.load(folder / n / 'checkpoint.pth', weights_only=True) for n in ('1', '2')]


def test_torchrun_ends_five_steps_of_train_py_with_the_weights_of_one_process(one_and_two):
    one, two = (torch.cat([v.double().flatten() for v in c['model'].values()]) for c in one_and_two)
    assert (two - one).norm() <= 1e-5 * one.norm()


def test_two_processes_measure_the_same_knn(one_and_two):
    one, two = (c['knn'] for c in one_and_two)
    assert one['pixels'] == pytest.approx(two['pixels'])


def test_a_batch_that_does_not_divide_is_one_line(few_digits, tmp_path):
    result = run_train(
        few_digits, *TINY, '--batch-size', '15', '--workers', '0', '--output', tmp_path / 'out', processes=2)
    assert result.returncode != 0 and not (tmp_path / 'out').exists()
    said = [line for line in result.stderr.splitlines() if line.startswith('train.py:')]
    assert said == ['train.py: --batch-size 15 does not divide by 2 processes; use a multiple of 2']
