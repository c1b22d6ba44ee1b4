"""Segmentation transfer: FCN-D8 on a ResNet backbone.

    from simsiam_models.benchmarks import segmentation
    segmenter = segmentation.build('simsiam_resnet50', classes=['road', 'car', 'sky'])
    predictor = segmentation.load('runs/my_segmenter')
"""
from .model import build
from .stored import load
