"""VOC07 classification with linear SVMs."""
