"""Two processes train and measure a segmenter as one does."""
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import spawn
from scenes import write_scenes

from simsiam_models.benchmarks import segmentation
from simsiam_models.benchmarks.datasets.masks import open_masks
from simsiam_models.benchmarks.pixels import Normalizer
from simsiam_models.benchmarks.protocols import SEGMENTATION
from simsiam_models.benchmarks.segmentation.data import CropAugmentation, load_tests, load_training
from simsiam_models.benchmarks.segmentation.inference import Inference
from simsiam_models.benchmarks.segmentation.settings import take
from simsiam_models.benchmarks.segmentation.training import SegmentationEvaluation, make_example, make_inputs
from simsiam_models.benchmarks.transfer import Schedule, TransferTrainer
from simsiam_models.runtime.distributed import World

STEPS = 4
TINY = {'layers': [1, 1, 1, 1], 'channels': [8, 16, 24, 32], 'stem_width': 8, 'stem_type': 'deep'}


def widen_images(images: torch.Tensor, *others: torch.Tensor) -> tuple:
    return images.double(), *others


def train(rank: int, folder: str, size: int, loss_mean: str) -> dict[str, Any]:
    """Trains on batches of 4 images in `size` processes; returns the losses of each step, the weights and metrics."""
    world, losses = World(rank, size, torch.device('cpu')), []
    pair = open_masks('folder', folder)
    segmenter = segmentation.build(
        'resnet18:random', pair.train.classes, model_args=TINY, channels=(12, 6), loss_mean=loss_mean)
    segmenter.double().world = world
    schedule = Schedule(
        iterations=STEPS, batch_size=4, lr=0.01, momentum=0.9, weight_decay=5e-4, power=0.9, eval_every=STEPS)
    numbers = {**take(SEGMENTATION['voc12aug_20k'], CropAugmentation), 'box': (64, 48), 'crop': 48}
    loader = load_training(pair.train, CropAugmentation(**numbers), 4, world, seed=0, workers=0)
    trainer = TransferTrainer(
        segmenter, schedule, world, 'off', lambda: widen_images(*make_example(segmenter, world.device)),
        weights={'aux': 0.4})
    normalize = Normalizer(segmenter.source.mean, segmenter.source.std, world.device)
    trainer.net.train()
    for step, items in zip(range(STEPS), loader.load(0)):  # noqa: B905 - the loader has no end
        found = trainer.step(widen_images(*make_inputs(items, step, 0, 48, normalize, 18)), step)
        losses.append([x.item() for x in found.values()])
    weights, shown = copy.deepcopy(segmenter.state_dict()), {}
    evaluation = SegmentationEvaluation(
        load_tests(pair.test, (64, 48), world, 0), Inference(box=(64, 48), test='slide', crop=48, stride=32), normalize,
        pair.test.classes, frozenset(range(3)), shown.update, lambda row, labels: None)
    entry = evaluation.measure(segmenter.float().eval(), world)
    return {'losses': losses, 'weights': weights, 'metrics': entry['metrics'], 'shown': sorted(shown)}


@pytest.mark.parametrize('loss_mean', ['all', 'valid'])
def test_two_processes_compute_what_one_does(loss_mean: str, tmp_path: Path, one_thread: None):
    folder = write_scenes(tmp_path / 'scenes', 8, 3)
    whole = train(0, str(folder), 1, loss_mean)
    a, b = spawn(train, tmp_path, str(folder), 2, loss_mean)
    losses = [torch.tensor(x['losses'], dtype=torch.float64) for x in (a, b, whole)]
    assert torch.allclose((losses[0] + losses[1]) / 2, losses[2], rtol=1e-7, atol=1e-9)
    for key, value in whole['weights'].items():
        assert torch.equal(a['weights'][key], b['weights'][key]), key
        assert torch.allclose(a['weights'][key].double(), value.double(), rtol=1e-6, atol=1e-9), key
    assert a['metrics'] == b['metrics'] == pytest.approx(whole['metrics'], abs=0.01)
    assert a['shown'] == whole['shown'] == [0, 1, 2] and b['shown'] == []
