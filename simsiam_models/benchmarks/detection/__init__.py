"""Detection transfer: Faster R-CNN and Mask R-CNN on a ResNet backbone.

    from simsiam_models.benchmarks import detection
    detector = detection.build('simsiam_resnet50', kind='fasterrcnn_c4', classes=['cat', 'dog'])
    predictor = detection.load('runs/my_detector')
"""
from .model import build
from .stored import load
