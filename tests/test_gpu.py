"""The CUDA paths: precisions, views that the card finishes, steps without waiting. Skipped where there is no card."""
import math
from pathlib import Path

import pytest
import torch
from conftest import TINY

from simsiam_models.benchmarks import segmentation
from simsiam_models.benchmarks.detection.model import build
from simsiam_models.benchmarks.transfer import Schedule, TransferTrainer
from simsiam_models.data import Augmentation, FolderImages, TwoViews
from simsiam_models.runtime.distributed import World
from simsiam_models.training import pretrain
from simsiam_models.training.recipes import RECIPES
from simsiam_models.training.setup import make_model
from simsiam_models.training.step import Trainer, train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]


@pytest.mark.parametrize('amp', ['bfloat16', 'float16', 'off'])
def test_ten_steps_on_the_card_lower_the_loss(few_digits: Path, tmp_path: Path, amp: str):
    figures = pretrain.main([
        str(few_digits), *TINY, '--device', 'cuda', '--amp', amp, '--epochs', '10', '--batch-size', '64',
        '--workers', '2', '--output', str(tmp_path)])
    assert -1 <= figures['loss'] < 0 and not figures['collapsed']


def test_the_card_finishes_the_views_that_the_kernel_finishes(few_digits: Path):
    images, aug = FolderImages(few_digits), Augmentation(size=32)
    here = TwoViews(images, aug, 16, workers=2).epoch(0)
    there = TwoViews(images, aug, 16, workers=2, device='cuda').epoch(0)
    for a, b in zip(here, there, strict=True):
        for x, y in zip(a, b, strict=True):
            assert y.is_cuda and (x - y.cpu()).abs().max() < 1e-4


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
