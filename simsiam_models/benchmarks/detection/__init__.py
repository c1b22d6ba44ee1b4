"""Detection transfer: Faster R-CNN and Mask R-CNN on a ResNet backbone."""
