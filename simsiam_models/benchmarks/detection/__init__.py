"""Detection transfer: Faster R-CNN and Mask R-CNN on a ResNet backbone.

    from simsiam_models.benchmarks import detection

    detection.train('my_objects', 'runs/mine', dataset='folder', protocol='coco_fpn_1x', iterations=2000, batch_size=4)
    predictor = detection.load('runs/mine')
    detector = detection.build('simsiam_resnet50', kind='fasterrcnn_c4', classes=['cat', 'dog'])
"""
from .command import train
from .model import build
from .stored import load

__all__ = ['build', 'load', 'train']
