"""The loop that detection and segmentation share, on a network of one layer."""
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simsiam_models.benchmarks.transfer import (
    KEYS,
    Schedule,
    Transfer,
    TransferTrainer,
    compute_lr,
    fit,
    make_optimizer,
    measure_batch_norms,
    resume,
)
from simsiam_models.runtime.distributed import World
from simsiam_models.runtime.lifecycle import Lifecycle
from simsiam_models.runtime.log import RunLog
from simsiam_models.runtime.signals import Signals, Stopped

CPU = World(0, 1, torch.device('cpu'))
IDENTITY = {'kind': 'test'}
SCHEDULE = dict(iterations=10, batch_size=4, lr=0.1, momentum=0.9, weight_decay=1e-4, eval_every=4, log_every=3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.net(x)
        return {'loss_a': (y - 1).square().mean(), 'loss_b': y.abs().mean()}


class Batches:
    """The batch of a step is a function of the step. `at`: what happens before the batch of a step."""

    def __init__(self, at: dict[int, Any]) -> None:
        self.unreadable: dict[int, str] = {}
        self.at = at

    def load(self, step: int) -> Iterator[Tensor]:
        while True:
            if step in self.at:
                self.at.pop(step)()
            yield torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            step += 1

    def join(self) -> None:
        pass


def run(folder: Path, at: dict[int, Any] | None = None, scale: float = 1.0, **changes: Any) -> Transfer:
    """Runs to the end, or to what `at` does."""
    schedule = Schedule(**{**SCHEDULE, **changes})
    folder.mkdir(exist_ok=True)
    log = RunLog(folder, True)
    with Signals() as signals, Lifecycle(folder / 'checkpoint.pth', KEYS, CPU, signals, log.say) as life:
        trainer = TransferTrainer(Net(), schedule, CPU, 'off', tuple, weights={'loss_b': 0.5})
        transfer = Transfer(
            trainer, Batches(at or {}), lambda batch, step: (batch * scale,),
            lambda run: {'metrics': {'weight': run.trainer.model.net[0].weight.sum().item()}}, life, log, IDENTITY)
        life.claim(IDENTITY)
        resume(transfer, set())
        fit(transfer)
    return transfer


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def test_the_warm_up_is_mmdets_and_the_steps_multiply_the_rate():
    s = Schedule(
        iterations=24000, batch_size=16, lr=0.02, momentum=0.9, weight_decay=1e-4, warmup=100, lr_steps=(18000, 22000),
        eval_every=2000)
    for step, lr in ((0, 0.02 * 0.001), (50, 0.02 * (1 - 0.5 * 0.999)), (99, 0.02 * (1 - 0.01 * 0.999)), (100, 0.02),
                     (17999, 0.02), (18000, 0.002), (21999, 0.002), (22000, 0.0002), (23999, 0.0002)):
        assert compute_lr(s, step) == pytest.approx(lr, rel=1e-9), step


def test_the_polynomial_rate_ends_above_its_floor():
    s = Schedule(
        iterations=20000, batch_size=16, lr=0.01, momentum=0.9, weight_decay=5e-4, power=0.9, floor=1e-4, eval_every=1)
    assert compute_lr(s, 0) == pytest.approx(0.01)
    assert compute_lr(s, 10000) == pytest.approx((0.01 - 1e-4) * 0.5**0.9 + 1e-4)
    assert compute_lr(s, 19999) == pytest.approx((0.01 - 1e-4) * (1 / 20000) ** 0.9 + 1e-4)


def test_norms_decay_unless_the_schedule_says_otherwise():
    net = Net()
    assert len(make_optimizer(net, Schedule(**SCHEDULE)).param_groups) == 1
    groups = make_optimizer(net, Schedule(**SCHEDULE, decay_norms=False)).param_groups
    assert [g['weight_decay'] for g in groups] == [1e-4, 0.0]
    assert {id(p) for p in groups[1]['params']} == {id(p) for p in net.net[1].parameters()}
    assert sum(len(g['params']) for g in groups) == len(list(net.parameters()))


def test_the_log_holds_weighted_means_and_every_evaluation(tmp_path: Path):
    transfer = run(tmp_path)
    rows = read_log(tmp_path)
    assert [r['step'] for r in rows] == [3, 4, 4, 6, 8, 8, 9, 10, 10]
    assert all(r['loss'] == pytest.approx(r['loss_a'] + 0.5 * r['loss_b']) for r in rows if 'loss' in r)
    assert [h['step'] for h in transfer.history] == [4, 8, 10]


@pytest.mark.parametrize('at', [2, 4, 5])
def test_a_signal_saves_and_the_same_command_ends_in_the_same_bits(at: int, tmp_path: Path):
    whole = run(tmp_path / 'whole')
    with pytest.raises(Stopped):
        run(tmp_path / 'stopped', {at: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    saved = torch.load(tmp_path / 'stopped' / 'checkpoint.pth', weights_only=True)['step']
    assert saved in (at, at + 1)
    again = run(tmp_path / 'stopped')
    for key, value in whole.trainer.model.state_dict().items():
        assert torch.equal(value, again.trainer.model.state_dict()[key])
    assert [h['metrics'] for h in whole.history] == [h['metrics'] for h in again.history]
    logs = read_log(tmp_path / 'whole'), read_log(tmp_path / 'stopped')
    losses = [[(r['step'], r['loss']) for r in rows if 'loss' in r] for rows in logs]
    assert losses[0] == losses[1]


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r'the loss is nan by iteration 6; lower --lr \(0.1\)'):
        run(tmp_path, scale=float('nan'), log_every=6, eval_every=6)
    assert not (tmp_path / 'checkpoint.pth').exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path):
    run(tmp_path)
    state = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)
    torch.save(state | {'model': {}}, tmp_path / 'checkpoint.pth')
    with pytest.raises(ValueError, match='does not fit this run'):
        run(tmp_path)


def test_precise_statistics_are_the_means_over_the_batches(tmp_path: Path):
    transfer = run(tmp_path)
    norm, batches = transfer.trainer.model.net[1], list(zip(range(5), Batches({}).load(10), strict=False))
    with torch.no_grad():
        inputs = [transfer.trainer.model.net[0](x) for _, x in batches]
    measure_batch_norms(transfer, 5)
    assert torch.allclose(norm.running_mean, torch.stack([x.mean(0) for x in inputs]).mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, torch.stack([x.var(0) for x in inputs]).mean(0), atol=1e-6)
    assert norm.momentum == 0.1 and not transfer.trainer.model.training
