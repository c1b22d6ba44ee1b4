"""Uses the public names as a user does. Nothing runs it: `.ci/run` checks it by `mypy --strict`, against the wheel."""
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from simsiam_models import Checkpoint, SimSiam, create_simsiam, load_checkpoint, simsiam_loss, simsiam_resnet50
from simsiam_models.benchmarks import detection, segmentation
from simsiam_models.benchmarks.results.record import read_record
from simsiam_models.benchmarks.results.report import report
from simsiam_models.data import Augmentation, Images, Stream, TwoViews, open_data
from simsiam_models.predict.classifier import load_classifier
from simsiam_models.weights import export_backbone


def pretrain(folder: str) -> None:
    train, val = open_data(folder)
    assert_type(train, Images | Stream)
    assert_type(val, Images | None)
    model = create_simsiam('simsiam_resnet50', dim=2048, pred_dim=512)
    assert_type(model, SimSiam)
    for x1, x2 in TwoViews(train, Augmentation(), batch=64).epoch(0):
        assert_type(x1, Tensor)
        p1, p2, z1, z2 = model.forward(x1, x2)
        assert_type(simsiam_loss(p1, p2, z1, z2), Tensor)
    export_backbone(model.backbone, Path('backbone'), 'simsiam_resnet50')


def load(path: Path) -> None:
    checkpoint = load_checkpoint(path)
    assert_type(checkpoint, Checkpoint)
    assert_type(checkpoint.backbone, dict[str, Tensor])
    assert_type(checkpoint.projector, dict[str, Tensor] | None)
    timm.create_model('simsiam_resnet50').load_state_dict(checkpoint.model_state())
    network: nn.Module = simsiam_resnet50(num_classes=10)
    network.eval()


def transfer() -> None:
    assert_type(detection.train('objects', 'runs/objects', dataset='folder'), dict[str, Any])
    assert_type(detection.load('runs/objects')(['photo.jpg']), list[dict[str, Any]])
    losses = detection.build('resnet18:random', classes=['cat', 'dog']).losses(
        [torch.zeros(3, 64, 64)], [{'boxes': torch.zeros(0, 4), 'labels': torch.zeros(0, dtype=torch.long)}])
    assert_type(losses, dict[str, Tensor])
    masks = segmentation.load('runs/masks')(['photo.jpg'])
    assert_type(masks[0].shape, tuple[Any, ...])
    assert_type(segmentation.build('resnet18:random', classes=2).names, list[str])


def read() -> None:
    classifier = load_classifier('runs/classifier', torch.device('cpu'))
    assert_type(classifier.prepare(np.zeros((64, 64, 3), np.uint8)), Tensor)
    assert_type(read_record('runs/classifier/record.json'), dict[str, Any])
    assert_type(report(['runs'], markdown=True), str)
