"""Segmentation transfer: FCN-D8 on a ResNet backbone.

    from simsiam_models.benchmarks import segmentation

    segmenter = segmentation.build('simsiam_resnet50', classes=['ground', 'disc', 'square'])
    losses = segmenter.losses(images, masks)  # (B, 3, H, W) normalised, (B, H, W) from 0 to 2, or 255: ignored
    (losses['decode'] + 0.4 * losses['aux']).backward()

    predictor = segmentation.load('runs/mine')  # a folder that `simsiam segment` wrote
    mask = predictor(['photo.jpg'])[0]  # (H, W): positions in predictor.classes
    predictor.save(mask, 'mask.png')
"""
from .model import build
from .stored import load
