"""The CUDA paths: precisions, views that the card finishes, steps without waiting. Skipped where there is no card."""
import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

from simsiam_models.benchmarks import segmentation
from simsiam_models.benchmarks.detection.model import build
from simsiam_models.benchmarks.search import find_neighbours
from simsiam_models.benchmarks.transfer import Schedule, TransferTrainer
from simsiam_models.data import Augmentation, FolderImages, TwoViews
from simsiam_models.runtime.distributed import World
from simsiam_models.training import pretrain
from simsiam_models.training.autoperf import choose_perf
from simsiam_models.training.recipes import RECIPES
from simsiam_models.training.setup import make_model
from simsiam_models.training.step import Perf, Trainer, train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]


@pytest.mark.parametrize('amp', ['bfloat16', 'float16', 'off'])
def test_ten_steps_on_the_card_lower_the_loss(few_digits: Path, tmp_path: Path, amp: str):
    figures = pretrain.main([
        str(few_digits), *TINY, '--device', 'cuda', '--amp', amp, '--epochs', '10', '--batch-size', '64',
        '--workers', '2', '--output', str(tmp_path)])
    assert -1 <= figures['loss'] < 0 and not figures['collapsed']


def test_the_card_finishes_the_views_that_the_kernel_finishes(few_digits: Path, caplog: pytest.LogCaptureFixture):
    images, aug = FolderImages(few_digits), Augmentation(size=32)
    here = TwoViews(images, aug, 16, workers=2).epoch(0)
    there = TwoViews(images, aug, 16, workers=2, device='cuda').epoch(0)
    for a, b in zip(here, there, strict=True):
        for x, y in zip(a, b, strict=True):
            assert y.is_cuda and (x - y.cpu()).abs().max() < 1e-4
            assert y.is_contiguous(memory_format=torch.channels_last)
    assert 'cannot be compiled' not in caplog.text


def test_copies_that_run_ahead_of_a_busy_card_mix_up_no_view(few_digits: Path):
    images, aug = FolderImages(few_digits), Augmentation(size=32)
    here = TwoViews(images, aug, 16, workers=2, on_device=True)
    there, got = TwoViews(images, aug, 16, workers=4, device='cuda'), []
    for epoch in range(8):
        for x1, x2 in there.epoch(epoch):
            torch.cuda._sleep(20_000_000)  # cycles, about 10 ms: the host and the copies are soon far ahead
            got.append((x1.clone(), x2.clone()))
    want = [views for epoch in range(8) for views in here.epoch(epoch)]
    for a, b in zip(want, got, strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x - y.cpu()).abs().max() < 1e-4


def test_a_short_run_says_that_compiling_does_not_pay_and_a_flag_compiles_it(
        few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    args = [str(few_digits), *TINY, '--device', 'cuda', '--epochs', '3', '--batch-size', '16', '--workers', '2']
    pretrain.main([*args, '--output', str(tmp_path / 'a')])
    assert 'not compiling' in capsys.readouterr().out and torch.backends.cudnn.benchmark
    assert json.loads((tmp_path / 'a' / 'args.json').read_text())['perf'] == {'channels_last': True, 'compile': False}
    figures = pretrain.main([*args, '--compile', '--output', str(tmp_path / 'b')])
    said = capsys.readouterr().out
    assert 'compiled the model in' in said and 'channels_last, compiled' in said and math.isfinite(figures['loss'])


def test_the_trial_compiles_on_the_card_and_leaves_the_model_as_it_was():
    recipe, device, said = RECIPES['demo'], torch.device('cuda'), []
    model = make_model(recipe, 0)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def make_step(trial: torch.nn.Module, amp: str, perf: Perf) -> functools.partial:
        return functools.partial(train_step, Trainer(trial.train(), recipe, World(0, 1, device), amp, perf))
    amp, perf = choose_perf(
        model, (16, 3, 32, 32), device, ('bfloat16',), make_step, said.append, ways=[Perf(), Perf(compile=True)],
        budget=4.0)
    assert amp == 'bfloat16' and perf.channels_last and len(said) == 3 and 'compiled in' in said[1]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_card_finds_the_neighbours_that_the_cpu_finds():
    rng = np.random.default_rng(0)
    bank, queries = (np.maximum(rng.standard_normal((n, 256), np.float32), 0) for n in (3000, 40))
    here, there = (find_neighbours(bank, queries, 20, device, chunk=512) for device in ('cpu', 'cuda'))
    assert np.array_equal(here[0], there[0]) and np.array_equal(here[1], there[1])


@pytest.mark.parametrize('amp', ['bfloat16', 'float16', 'off'])
def test_neither_data_nor_step_makes_the_host_wait(few_digits: Path, amp: str):
    recipe, device = RECIPES['demo'], torch.device('cuda')
    model = make_model(recipe, 0).to(device, memory_format=torch.channels_last).train()
    trainer = Trainer(model, recipe, World(0, 1, device), amp)
    views = TwoViews(FolderImages(few_digits), recipe.augmentation, 16, workers=2, device=device)
    for x1, x2 in views.epoch(0):  # compilers and cuDNN's first calls may wait
        train_step(trainer, x1, x2)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for x1, x2 in views.epoch(1):
            train_step(trainer, x1, x2)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('amp', ['bfloat16', 'float16', 'off'])
@pytest.mark.parametrize('kind', ['fasterrcnn_c4', 'maskrcnn_fpn'])
def test_a_detector_trains_and_detects_on_the_card(kind: str, amp: str):
    device = torch.device('cuda')
    detector = build('resnet18:random', kind, 5, rois=32, pool_size=6).to(device)
    schedule = Schedule(iterations=9, batch_size=2, lr=1e-3, momentum=0.9, weight_decay=1e-4, eval_every=9)
    trainer = TransferTrainer(detector, schedule, World(0, 1, device), amp, tuple)
    images = [torch.rand(3, 128, 160, device=device), torch.rand(3, 160, 128, device=device)]
    targets = [{
        'boxes': torch.tensor([[10.0, 20, 90, 100]]), 'labels': torch.tensor([3]),
        'masks': torch.ones(1, *x.shape[1:], dtype=torch.uint8)} for x in images]
    losses = [sum(trainer.step((images, targets, [0, 1]), step).values()).item() for step in range(9)]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    found = detector.eval().detect(images)
    assert all(f.boxes.is_cuda and len(f.boxes) == len(f.scores) <= 100 for f in found)


@pytest.mark.parametrize('amp', ['bfloat16', 'float16', 'off'])
def test_a_segmenter_trains_and_predicts_on_the_card(amp: str):
    device = torch.device('cuda')
    segmenter = segmentation.build('resnet18:random', 5).to(device)
    schedule = Schedule(
        iterations=9, batch_size=2, lr=1e-3, momentum=0.9, weight_decay=5e-4, power=0.9, floor=1e-5, eval_every=9)
    trainer = TransferTrainer(segmenter, schedule, World(0, 1, device), amp, tuple, weights={'aux': 0.4})
    images, masks = torch.rand(2, 3, 96, 128, device=device), torch.zeros(2, 96, 128, dtype=torch.uint8)
    masks[:, 20:60], masks[:, :, 100:] = 3, 255
    losses = [sum(trainer.step((images, masks), step).values()).item() for step in range(9)]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    logits = segmenter.eval().compute_logits(images)
    assert logits.is_cuda and logits.shape == (2, 5, 96, 128) and logits.dtype == torch.float32
