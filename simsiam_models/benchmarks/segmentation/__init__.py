"""Segmentation transfer: FCN-D8 on a ResNet backbone.

    from simsiam_models.benchmarks import segmentation

    segmentation.train('my_masks', 'runs/mine', dataset='folder', model='simsiam_resnet50', batch_size=8)
    predictor = segmentation.load('runs/mine')
    segmenter = segmentation.build('simsiam_resnet50', classes=['road', 'car', 'sky'])
"""
from .command import train
from .model import build
from .stored import load

__all__ = ['build', 'load', 'train']
