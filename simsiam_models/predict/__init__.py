"""`simsiam predict`: applies trained classifiers, detectors and segmenters to images."""
