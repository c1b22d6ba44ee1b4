"""`simsiam predict`: what trained classifiers, detectors and segmenters say of images."""
